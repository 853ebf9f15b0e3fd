"""One request of the REST API, read and checked before its handler runs."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ganq.session import Session
from ganq.submission.options import unknown_option
from jobs.errors import JobNotFoundError, SpecError
from storage.db.engine import Requester
from storage.db.rows import Job
from storage.db.store import JobStore
from storage.db.tokens import Role
from web.principals import Principal
from web.problems import HttpError
from web.site import Site

PREFIX = "/api/v1"
MAX_BODY = 1 << 20
"""Bytes of a JSON body."""
BODY_READ = "ganq_body_read"
"""Key of the scope: the body was read. Else the connection is closed, so that the rest is not read."""
DRAIN_S = 2.0
MAX_DEPTH = 16
MAX_ID = 2**63 - 1
MAX_TEXT = 4096
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Param:
    """A parameter of the query."""

    name: str
    schema: Mapping[str, Any]
    """JSON Schema; of an array, the values are separated by commas."""
    description: str

    def read(self, text: str) -> Any:
        """
        Parse the text of a parameter.

        Raises:
            SpecError: the text is no such value.
        """
        if self.schema["type"] == "array":
            items = [one.strip() for one in text.split(",")]
            if len(items) > self.schema.get("maxItems", 1000):
                raise SpecError(f"{self.name}: more than {self.schema['maxItems']} values")
            return [self._value(one, self.schema["items"]) for one in items]
        return self._value(text, self.schema)

    def _value(self, text: str, schema: Mapping[str, Any]) -> Any:
        kind, allowed = schema["type"], schema.get("enum")
        if kind == "integer":
            least, most = schema.get("minimum", 0), schema.get("maximum", MAX_ID)
            if not re.fullmatch(r"-?[0-9]{1,19}", text) or not least <= int(text) <= most:
                raise SpecError(f"{self.name}: {text[:40]!r} is not a whole number from {least} to {most}")
            return int(text)
        if kind == "boolean":
            if text not in ("true", "false"):
                raise SpecError(f"{self.name}: {text[:40]!r} is neither true nor false")
            return text == "true"
        if allowed is not None and text not in allowed:
            raise SpecError(f"{self.name}: there is no {text[:40]!r}", hint=f"one of {', '.join(allowed)}")
        most = schema.get("maxLength", MAX_TEXT)
        if not text or len(text) > most or _UNPRINTABLE.search(text):
            raise SpecError(
                f"{self.name}: the value must be text of 1 to {most} characters that can be shown"
            )
        return text


@dataclass(frozen=True)
class Endpoint:
    """One operation: what the router, the checks and the OpenAPI document need to know."""

    method: str
    path: str
    operation: str
    summary: str
    handler: "Callable[[Call], Response]"
    role: Role = Role.VIEWER
    params: Sequence[Param] = ()
    body: str | None = None
    """Name of the schema of the JSON body."""
    most_body: int = MAX_BODY
    """Bytes of the body."""
    takes: str | None = None
    """Media type of a body that is no JSON; `most_body` bytes of it are read into Call.raw."""
    receive: "Callable[[Call], Awaitable[Response]] | None" = None
    """Handles a body of any length, instead of `handler`."""
    answer: str | None = None
    """Name of the schema of the answer; None: `media` without a schema."""
    media: str = "application/json"
    status: int = 200
    also: tuple[int, ...] = ()
    """Further statuses of success."""
    errors: tuple[int, ...] = ()
    """Statuses of errors beside those of every endpoint."""
    headers: tuple[str, ...] = ()
    """Headers that it reads."""
    on_volume: bool = False
    live: bool = False
    """Whether it is also a stream of events; then `stream` answers that."""
    description: str = ""

    @property
    def changes(self) -> bool:
        return self.method not in ("GET", "HEAD")


@dataclass
class Call:
    """A request whose role, query and body have been checked."""

    site: Site
    request: Request
    principal: Principal
    query: dict[str, Any]
    body: dict[str, Any] = field(default_factory=dict)
    raw: bytes = b""

    @property
    def reference(self) -> str:
        """
        Return the job's id or name in the address.

        Raises:
            JobNotFoundError: it cannot be one.
        """
        text: str = self.request.path_params["job"]
        if _UNPRINTABLE.search(text) or len(text) > MAX_TEXT:
            raise JobNotFoundError("there is no such job", hint="GET /api/v1/jobs lists them")
        return text

    @cached_property
    def job(self) -> Job:
        """
        Return the job that the address names.

        Raises:
            JobNotFoundError: there is none.
        """
        return self.site.queries.find(self.reference)

    def changed_job(self) -> Job:
        """
        Return the job that the address names, which the caller may change.

        Raises:
            JobNotFoundError: there is none.
            ForbiddenError: it belongs to somebody else.
        """
        self.principal.require_change(self.job)
        return self.job

    @property
    def session(self) -> Session:
        """Return the session of the facade: the settings are the server's, the user is the caller."""
        settings = replace(self.site.settings, user=self.principal.user, api_url="")
        return Session(settings, self.site.database, self.site.recent, "api")

    @property
    def store(self) -> JobStore:
        return JobStore(self.site.database, Requester(self.principal.user, "api"))


def read_query(request: Request, params: Sequence[Param]) -> dict[str, Any]:
    """
    Return the parameters of the query string.

    Raises:
        SpecError: a parameter is unknown, given twice or not valid.
    """
    known = {param.name: param for param in params}
    found: dict[str, Any] = {}
    for name, text in request.query_params.multi_items():
        if name not in known:
            raise unknown_option(f"there is no parameter {name[:40]!r}", name, known)
        if name in found:
            raise SpecError(f"{name} is given twice", hint="separate several values by commas")
        found[name] = known[name].read(text)
    return found


async def read_body(request: Request, most: int = MAX_BODY) -> dict[str, Any]:
    """
    Read a JSON object; nothing is {}.

    Raises:
        HttpError: it is too large, or of another media type.
        SpecError: it is no JSON object.
    """
    data = await read_bytes(request, most)
    if not data:
        return {}
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise HttpError(
            f"the body has the type {media[:80] or 'none'!r}",
            hint="Content-Type: application/json",
            status=415,
            code="UNSUPPORTED_MEDIA_TYPE",
        )
    return parse_object(data)


async def read_bytes(request: Request, most: int) -> bytes:
    """
    Return the body of a request.

    Raises:
        HttpError: the body is longer than `most` bytes; the rest is not read.
    """
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > most:
        raise _too_large(most)
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > most:
                raise _too_large(most)
    except ClientDisconnect as exc:
        raise SpecError("the body ended early") from exc
    request.scope[BODY_READ] = True
    return bytes(data)


async def read_rest(request: Request) -> bool:
    """
    Read and drop a body that nobody wants, if it is short and arrives soon; return whether it has ended.

    If the connection were closed before, the client might get a reset instead of the answer.
    """
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY:
        return False
    read = 0
    with suppress(ClientDisconnect, RuntimeError, TimeoutError):  # RuntimeError: a part was read before
        async with asyncio.timeout(DRAIN_S):
            async for chunk in request.stream():
                read += len(chunk)
                if read > MAX_BODY:
                    return False
            return True
    return False


def _too_large(most: int) -> HttpError:
    return HttpError(f"the body is larger than {most:,} bytes", status=413, code="BODY_TOO_LARGE")


def parse_object(data: bytes) -> dict[str, Any]:
    """
    Parse a JSON object.

    Raises:
        SpecError: it is no JSON object, has a key twice, or is nested too deeply.
    """
    try:
        found = json.loads(data, object_pairs_hook=_once, parse_constant=_no_constant)
    except SpecError:
        raise
    except (ValueError, RecursionError) as exc:
        reason = "nested too deeply" if isinstance(exc, RecursionError) else str(exc)[:200]
        raise SpecError(f"the body is not JSON: {reason}") from exc
    if not isinstance(found, dict):
        raise SpecError("the body is no JSON object", hint='e.g. {"kind": "generate", "count": 64}')
    _require_depth(found)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise SpecError("the body has a key twice")
    return found


def _no_constant(name: str) -> Any:
    raise SpecError(f"the body contains {name}, which is not JSON")


def _require_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise SpecError(f"the body is nested more than {MAX_DEPTH} levels deep")


def require_fields(body: Mapping[str, Any], known: Collection[str]) -> None:
    """
    Check the field names of a body.

    Raises:
        SpecError: the body has another field; the hint names the nearest.
    """
    for name in body:
        if name not in known:
            raise unknown_option(f"there is no field {name[:40]!r}", name, known)
