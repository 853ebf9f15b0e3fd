"""Who sends a request, and what that person may do."""

from dataclasses import dataclass

from jobs.errors import ForbiddenError
from storage.db.rows import Job
from storage.db.tokens import Role
from storage.users import is_user_name, user_name


@dataclass(frozen=True)
class Principal:
    """The person behind a request."""

    user: str
    role: Role
    named: bool = True
    """Whether a token or a proxy names the person; the login link names nobody."""
    token_id: int | None = None

    def require(self, role: Role, what: str) -> None:
        """
        Check that a user has a role.

        Raises:
            ForbiddenError: the role does not include this one.
        """
        if not self.role.includes(role):
            raise ForbiddenError(
                f"the role {self.role} may not {what}",
                hint=f"ask for a token of the role {role} (ganq token create)",
            )

    def require_change(self, job: Job) -> None:
        """
        Check that a user may change a job.

        Raises:
            ForbiddenError: the person may not change this job.
        """
        self.require(Role.SUBMITTER, "change jobs")
        if job.user != self.user and not self.role.includes(Role.OPERATOR):
            raise ForbiddenError(
                f"job {job.id} belongs to {job.user}, and a submitter changes only their own jobs",
                hint="ask its owner, or an operator",
            )


def proxied(given: str | None) -> Principal | None:
    """Return the person whom a trusted proxy has logged in; None if the name is missing or malformed."""
    name = user_name(given or "")
    return Principal(name, Role.OPERATOR) if is_user_name(name) else None
