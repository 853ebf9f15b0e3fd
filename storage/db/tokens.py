"""
Tokens of the page and the REST API: who may do what.

A token is a random text of 256 bits; the table contains its SHA-256 alone, so that a copy of the table lets
nobody in. A hash without salt suffices, because nobody can guess so long a text.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, insert, or_, select, update

from jobs.errors import NotFoundError, UnauthenticatedError
from storage.db.engine import Database
from storage.db.tables import token, utcnow

USED_EVERY_S = 60.0
"""The time of the last use is written at most so often, so that a read costs no commit."""
PREFIX = "ganq"
FORM = re.compile(rf"{PREFIX}_(?P<installation>[0-9a-f]{{1,16}})_[A-Za-z0-9_-]{{43}}")
NEW_TOKEN = "ganq token create --user USER --role ROLE makes a new one"


class Role(StrEnum):
    """What a token allows; each role includes the ones before it."""

    VIEWER = "viewer"
    SUBMITTER = "submitter"
    OPERATOR = "operator"
    ADMIN = "admin"

    def includes(self, other: "Role") -> bool:
        """Return whether this role allows what the other allows."""
        roles = [*Role]
        return roles.index(self) >= roles.index(other)


@dataclass(frozen=True)
class Token:
    """A token without its text. Times are seconds since 1970, UTC."""

    id: int
    user: str
    role: Role
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    used_at: float | None
    expired: bool = False

    @property
    def state(self) -> str:
        """'valid', 'expired' or 'revoked'."""
        return "revoked" if self.revoked_at is not None else "expired" if self.expired else "valid"


class Tokens:
    """The table of tokens."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(self, user: str, role: Role, expires_s: float | None) -> tuple[Token, str]:
        """
        Add a token.

        Args:
            expires_s: seconds from now; None: never.

        Returns:
            The token, and its text, which nothing can show again.
        """
        text = f"{PREFIX}_{self.database.installation}_{secrets.token_urlsafe(32)}"
        values: dict[str, Any] = {
            "sha256": _digest(text),
            "user": user,
            "role": str(role),
            "created_at": utcnow(),
        }
        values["expires_at"] = None if expires_s is None else utcnow() + expires_s

        def work(conn: Connection) -> Token:
            known = _row(conn, token.c.sha256 == values["sha256"])
            if known is None:  # else an earlier try has committed, and the answer was lost
                conn.execute(insert(token).values(values))
                known = _row(conn, token.c.sha256 == values["sha256"])
            assert known is not None
            return known

        return self.database.write(work), text

    def all(self) -> list[Token]:
        """Return all tokens, oldest first."""
        return self.database.read(
            lambda conn: [_token(row) for row in conn.execute(_COLUMNS.order_by(token.c.id))]
        )

    def get(self, token_id: int) -> Token | None:
        """Return a token by its number."""
        return self.database.read(lambda conn: _row(conn, token.c.id == token_id))

    def revoke(self, token_id: int) -> Token:
        """
        Make a token invalid at once.

        Raises:
            NotFoundError: there is no such token.
        """

        def work(conn: Connection) -> Token | None:
            mine = update(token).where(token.c.id == token_id, token.c.revoked_at.is_(None))
            conn.execute(mine.values(revoked_at=utcnow()))
            return _row(conn, token.c.id == token_id)

        found = self.database.write(work)
        if found is None:
            raise NotFoundError(f"there is no token {token_id}", hint="ganq token list shows them")
        return found

    def check(self, text: str) -> Token:
        """
        Return the token with this text, and note its use.

        Raises:
            UnauthenticatedError: it is malformed, of another installation, unknown, revoked or expired.
        """
        form = FORM.fullmatch(text)
        if form is None:
            raise UnauthenticatedError("this is not a token of ganq", hint=NEW_TOKEN)
        found = self.database.read(lambda conn: _row(conn, token.c.sha256 == _digest(text)))
        if found is None and form["installation"] != self.database.installation:
            raise UnauthenticatedError(
                "this token belongs to another installation of ganq", hint="use a token of this one"
            )
        if found is None:
            raise UnauthenticatedError("there is no such token", hint=NEW_TOKEN)
        self.note_use(require_valid(found))
        return found

    def note_use(self, used: Token) -> None:
        """Write the time of use, at most once within USED_EVERY_S."""
        long_ago = or_(token.c.used_at.is_(None), token.c.used_at < utcnow() - USED_EVERY_S)
        mine = select(token.c.id).where(token.c.id == used.id, long_ago)
        if self.database.read(lambda conn: conn.execute(mine).first()) is None:
            return
        use = update(token).where(token.c.id == used.id, long_ago).values(used_at=utcnow())
        self.database.write(lambda conn: conn.execute(use).rowcount)


def require_valid(found: Token) -> Token:
    """
    Return a token that is neither expired nor revoked.

    Raises:
        UnauthenticatedError: it is.
    """
    if found.state != "valid":
        raise UnauthenticatedError(f"token {found.id} of {found.user} is {found.state}", hint=NEW_TOKEN)
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


_COLUMNS = select(token, (token.c.expires_at <= utcnow()).label("expired"))


def _row(conn: Connection, condition: object) -> Token | None:
    row = conn.execute(_COLUMNS.where(condition)).first()  # type: ignore[arg-type]
    return None if row is None else _token(row)


def _token(row: object) -> Token:
    values = row._mapping  # type: ignore[attr-defined]
    return Token(
        **{name: values[name] for name in Token.__dataclass_fields__ if name not in ("role", "expired")},
        role=Role(values["role"]),
        expired=bool(values["expired"]),
    )
