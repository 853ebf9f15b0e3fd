"""
Access control: a token that is exchanged for a cookie, or a trusted proxy that names the user.

Gate checks every request: the host must be on the allow-list, the browser must be logged in, and a change
must come from the page itself, or, at the REST API, carry a token. It adds the security headers to every
response. The token is that of the login link, or one of `ganq token create`.
"""

import base64
import hashlib
import hmac
import html
import ipaddress
import os
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.errors import AccessError, ConfigError, ForbiddenError, GanqError, UnauthenticatedError
from storage.db.tokens import Role, Token, Tokens, require_valid
from web.principals import Principal, proxied
from web.problems import Problem, problem

TOKEN_FILE = "web-token"
TOKEN_LETTERS = 32
POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
_RAW_HEADERS = [
    (name.lower().encode(), value.encode())
    for name, value in {**HEADERS, "Cache-Control": "private, no-store"}.items()
]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
READS = ("GET", "HEAD")
CHANGE_HEADER = "x-ganq-token"
API = "/api/"
LOGIN = "Log in: ganq open opens this page with its token; ganq open --print prints the link.\n"
LOGIN_STYLE = (
    ":root{color-scheme:light dark}body{font:16px/1.6 system-ui,sans-serif;max-width:34rem;margin:18vh auto;"
    "padding:0 20px}h1{font-size:22px}code{font:15px ui-monospace,monospace;padding:2px 7px;"
    "border-radius:5px;background:#8882}"
)
LOGIN_PAGE = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Log in · ganq</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{LOGIN_STYLE}</style>
<main><h1>{{title}}</h1><p>Run <code>ganq open</code> on the machine where ganq runs. It opens this page with
its token, and this browser stays logged in for 180 days.</p>
<p>For another browser, e.g. a phone: <code>ganq open --print</code> prints the link.</p></main></html>
"""
BEARER = 'Bearer realm="ganq"'
_CODES = {
    401: UnauthenticatedError.code,
    403: ForbiddenError.code,
    405: "METHOD_NOT_ALLOWED",
    421: "WRONG_HOST",
}
TOKEN_CHECKED_S = 1.0
"""A token is looked up at most so often: it works for so long after it was revoked."""
MAX_CACHED_TOKENS = 1000
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def read_token(path: Path) -> str:
    """
    Return the token in a file; make the file, readable by its owner alone, if there is none.

    Raises:
        ConfigError: it cannot be read, others may read it, or it is too short to be a secret.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {(exc.strerror or '').lower()}") from exc
    else:
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others", hint=f"chmod 600 {path}")
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from exc
    if len(token) < TOKEN_LETTERS:
        raise ConfigError(
            f"{path} holds no token of {TOKEN_LETTERS} letters", hint="delete it; a new one is made"
        )
    return token


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """
    Parse networks in CIDR notation.

    Raises:
        ConfigError: one of them is no network.
    """
    try:
        return tuple(ipaddress.ip_network(text.strip()) for text in texts)
    except ValueError as exc:
        raise ConfigError(f"{exc}", hint="e.g. --trust-proxy 10.0.0.5/32") from exc


@dataclass(frozen=True)
class Access:
    """Token, host names and trusted proxies."""

    token: str | None
    hosts: Sequence[str] = LOOPBACK
    proxies: Sequence[Network] = ()
    user_header: str = "x-forwarded-user"

    def _derived(self, purpose: str) -> str:
        return hmac.new((self.token or _SPARE).encode(), purpose.encode(), hashlib.sha256).hexdigest()

    @property
    def cookie_name(self) -> str:
        """Name of the cookie; unique, because browsers send the cookies of a host to all its ports."""
        return f"ganq-{self._derived('name')[:8]}"

    @property
    def cookie(self) -> str:
        return self._derived("cookie")

    def cookie_of(self, token_id: int) -> str:
        """Return the cookie of a browser that has logged in with a token of the job table."""
        return f"{token_id}.{self._derived(f'cookie of token {token_id}')}"

    @property
    def change_token(self) -> str:
        """Token that the page sends with a change; other sites cannot read it."""
        return self._derived("change")


_SPARE = secrets.token_hex(32)
"""Secret for changes where there is no token: behind a proxy."""


class _Refused(Exception):  # noqa: N818 - an answer, not an error of the server
    """The request is refused."""

    def __init__(
        self,
        status: int,
        message: str,
        hint: str | None = None,
        headers: dict[str, str] | None = None,
        *,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.problem = Problem(status, code or _CODES[status], message, hint)
        self.headers = headers


class KnownTokens:
    """The table of tokens, with what it said within the last second."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self._known: dict[str | int, tuple[float, Token]] = {}

    async def check(self, text: str) -> Token:
        """
        Return the valid token of this text.

        Raises:
            UnauthenticatedError: the token is not valid.
        """
        return self._fresh(text) or self._keep(text, await run_in_threadpool(self.tokens.check, text))

    async def of_cookie(self, token_id: int) -> Token | None:
        """Return the token for which a cookie was given, if it is valid."""
        if (known := self._fresh(token_id)) is not None:
            return known
        found = await run_in_threadpool(self.tokens.get, token_id)
        if found is None or found.state != "valid":
            return None
        await run_in_threadpool(self.tokens.note_use, found)
        return self._keep(token_id, found)

    def _fresh(self, key: str | int) -> Token | None:
        known = self._known.get(key)
        return known[1] if known is not None and time.monotonic() - known[0] < TOKEN_CHECKED_S else None

    def _keep(self, key: str | int, found: Token) -> Token:
        if len(self._known) >= MAX_CACHED_TOKENS:
            self._known.clear()
        self._known[key] = time.monotonic(), found
        return found


class Gate:
    """
    ASGI middleware that checks requests and adds headers.

    Args:
        user: of this server; a request with the login link's token is his or hers.
    """

    def __init__(self, app: ASGIApp, access: Access, tokens: Tokens, user: str) -> None:
        self.app = app
        self.access = access
        self.tokens = KnownTokens(tokens)
        self.owner = Principal(user, Role.ADMIN, named=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *(pair for pair in message["headers"] if pair[0] != b"server"),
                    *(pair for pair in _RAW_HEADERS if pair[0] not in given),
                ]
            await send(message)

        refused = await self._refusal(scope)
        await (refused or self.app)(scope, receive, send_guarded)

    async def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        of_api = scope["path"].startswith(API)
        try:
            if not self._host_is_ours(headers.get("host", "")):
                raise _Refused(
                    421, "this server does not answer for that host name", "--server-name adds one"
                )
            if not of_api and scope["method"] not in (*READS, "POST"):
                raise _Refused(405, "only GET, HEAD and POST", headers={"Allow": "GET, HEAD, POST"})
            if not of_api and (given := self._token_of_link(scope)):
                return await self._exchange(scope, *given)
            scope["ganq_principal"] = await (self._of_api if of_api else self._of_page)(scope, headers)
        except _Refused as exc:
            if of_api:  # the body of a refused request is not read
                close = {} if scope["method"] in READS else {"Connection": "close"}
                return problem(exc.problem, {**(exc.headers or {}), **close})
            if exc.problem.status == 401 and "text/html" in headers.get("accept", ""):
                return _login_page()
            hint = f"{exc.problem.hint}\n" if exc.problem.hint else ""
            return PlainTextResponse(f"{exc.problem.detail}\n{hint}", exc.problem.status, exc.headers)
        except GanqError as exc:
            return problem(Problem.of(exc)) if of_api else PlainTextResponse(f"{exc.message}\n", 503)
        return None

    async def _of_page(self, scope: Scope, headers: Headers) -> Principal:
        """Return who uses the page; refuse a change that comes from elsewhere."""
        try:
            found = await self._bearer(headers)
        except AccessError as exc:
            raise _Refused(401, exc.message) from None
        found = found or self._proxied(scope, headers) or await self._cookie(headers)
        if found is None:
            raise _Refused(401, LOGIN.strip())
        if scope["method"] == "POST" and not self._from_the_page(scope, headers):
            raise _Refused(403, "a change must come from the page itself")
        return found

    async def _of_api(self, scope: Scope, headers: Headers) -> Principal:
        """
        Return who uses the REST API.

        A browser sends its cookie, and what a proxy asks for, with requests of other sites, too: a change
        needs a token, or must come from this site.
        """
        try:
            found = await self._bearer(headers)
        except UnauthenticatedError as exc:
            raise _Refused(401, exc.message, exc.hint, {"WWW-Authenticate": BEARER}) from None
        if found is not None:
            return found
        found = self._proxied(scope, headers)
        if scope["method"] not in READS and (found is not None or await self._cookie(headers)):
            site, origin = headers.get("sec-fetch-site"), headers.get("origin")
            if found is None or site not in (None, "same-origin") or (site is None and origin is not None):
                raise _Refused(403, "a change needs a token", "Authorization: Bearer TOKEN", code="FORBIDDEN")
        if (found := found or await self._cookie(headers)) is None:
            hint = "Authorization: Bearer TOKEN; ganq token create makes one"
            raise _Refused(401, "the request has no token", hint, {"WWW-Authenticate": BEARER})
        return found

    def _host_is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return name is not None and name in self.access.hosts

    def _proxied(self, scope: Scope, headers: Headers) -> Principal | None:
        client = scope.get("client")
        if not self.access.proxies or client is None:
            return None
        try:
            address = ipaddress.ip_address(client[0])
        except ValueError:
            return None
        if any(address in network for network in self.access.proxies):
            return proxied(headers.get(self.access.user_header))
        return None

    async def _bearer(self, headers: Headers) -> Principal | None:
        """
        Return whom the token in the header names; None if there is no such header.

        Raises:
            UnauthenticatedError: it is not valid.
        """
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        return await self._holder(given.strip())

    async def _holder(self, text: str) -> Principal:
        if self.access.token is not None and _equal(text, self.access.token):
            return self.owner
        return _principal(await self.tokens.check(text))

    def _token_of_link(self, scope: Scope) -> tuple[list[str], list[tuple[str, str]]] | None:
        """Return the tokens of a link and its other parameters; None if it has no token."""
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == "token"]
        if not given or scope["method"] not in READS:
            return None
        return given, [pair for pair in query if pair[0] != "token"]

    async def _exchange(self, scope: Scope, given: list[str], others: list[tuple[str, str]]) -> Response:
        """Exchange the token of the link for a cookie, and remove it from the address."""
        try:
            if len(given) != 1:
                raise UnauthenticatedError("there are several tokens")
            holder = await self._holder(given[0])
        except UnauthenticatedError:
            if "text/html" in Headers(scope=scope).get("accept", ""):
                return _login_page("This link's token is not valid")
            return PlainTextResponse("this link's token is not valid\n" + LOGIN, 401)
        rest = urlencode(others)
        path = "/" + scope["path"].lstrip("/\\")  # never //host, which would be another site
        # Not a redirect: after a link on another site or in a file a browser would not send the cookie along.
        target = html.escape(path + (f"?{rest}" if rest else ""))
        answer = HTMLResponse(f'<!doctype html><meta http-equiv="refresh" content="0;url={target}">')
        answer.set_cookie(
            self.access.cookie_name,
            self.access.cookie if holder.token_id is None else self.access.cookie_of(holder.token_id),
            max_age=180 * 24 * 3600,
            path="/",
            httponly=True,
            samesite="strict",
            secure=scope.get("scheme") == "https",
        )
        return answer

    async def _cookie(self, headers: Headers) -> Principal | None:
        given = cookie_parser(headers.get("cookie", "")).get(self.access.cookie_name, "")
        if self.access.token is not None and _equal(given, self.access.cookie):
            return self.owner
        number = given.partition(".")[0]
        if not re.fullmatch(r"[0-9]{1,15}", number) or not _equal(given, self.access.cookie_of(int(number))):
            return None
        found = await self.tokens.of_cookie(int(number))
        return None if found is None else _principal(found)

    def _from_the_page(self, scope: Scope, headers: Headers) -> bool:
        if not _equal(headers.get(CHANGE_HEADER, ""), self.access.change_token):
            return False
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site is not None:
            return site == "same-origin"
        return origin is not None and urlsplit(origin).netloc == headers.get("host")


def _login_page(title: str = "This browser is not logged in") -> Response:
    digest = base64.b64encode(hashlib.sha256(LOGIN_STYLE.encode()).digest()).decode()
    policy = POLICY.replace("default-src 'self'", f"default-src 'none'; style-src 'sha256-{digest}'")
    return HTMLResponse(LOGIN_PAGE.replace("{title}", title), 401, {"Content-Security-Policy": policy})


def _principal(found: Token) -> Principal:
    require_valid(found)
    return Principal(found.user, found.role, token_id=found.id)


def _equal(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), expected.encode())
