"""Errors of the REST API: problem details (RFC 9457) with ganq's code and hint."""

import json
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from jobs.errors import (
    AccessError,
    DatabaseUnavailableError,
    DirectoryFullError,
    DiskFullError,
    ForbiddenError,
    GanqError,
    NotFoundError,
    SpecError,
    StorageError,
    SubmitKeyReusedError,
    VolumeError,
)

MEDIA_TYPE = "application/problem+json"
MAX_CHARACTERS = 2000
STATUSES: tuple[tuple[type[GanqError], int], ...] = (
    (NotFoundError, 404),
    (DatabaseUnavailableError, 503),
    (VolumeError, 503),
    (DiskFullError, 507),
    (DirectoryFullError, 507),
    (SubmitKeyReusedError, 409),
    (SpecError, 400),
    (ForbiddenError, 403),
    (AccessError, 401),
    (StorageError, 500),
    (GanqError, 409),
)


class HttpError(GanqError):
    """A request that is refused for a reason that only HTTP has; `status` is a fact."""


@dataclass(frozen=True)
class Problem:
    """One error."""

    status: int
    code: str
    detail: str
    hint: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """Further members."""

    @classmethod
    def of(cls, exc: GanqError) -> "Problem":
        """Return the problem of an error; facts that are plain JSON come along."""
        status = next(status for kind, status in STATUSES if isinstance(exc, kind))
        facts = {name: value for name, value in exc.facts.items() if name in ("known", "given", "job_id")}
        return cls(
            exc.facts.get("status", status), exc.facts.get("code", exc.code), exc.message, exc.hint, facts
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "type": f"urn:ganq:error:{self.code}",
            "title": self.code.replace("_", " ").lower(),
            "status": self.status,
            "detail": _shown(self.detail),
            "code": self.code,
            "hint": _shown(self.hint) if self.hint else None,
            **self.facts,
        }


def _shown(text: str) -> str:
    from storage.settings import redact

    clean = redact(text.encode("utf-8", "replace").decode())
    return clean if len(clean) <= MAX_CHARACTERS else f"{clean[:MAX_CHARACTERS]}…"


def problem(found: Problem, headers: dict[str, str] | None = None) -> Response:
    """Return a problem as a response."""
    body = json.dumps(found.as_json(), default=str).encode()
    return Response(body, found.status, headers, media_type=MEDIA_TYPE)
