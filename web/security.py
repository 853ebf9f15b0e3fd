"""
Access control: a token that is exchanged for a cookie, or a trusted proxy that names the user.

Gate checks every request: the host must be on the allow-list, the browser must be logged in, and a change
must come from the page itself. It adds the security headers to every response.
"""

import hashlib
import hmac
import html
import ipaddress
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.errors import ConfigError

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
LOOPBACK = ("127.0.0.1", "localhost", "::1")
READS = ("GET", "HEAD")
CHANGE_HEADER = "x-ganq-token"
LOGIN = "Open the link that ganq web printed (or: ganq open --print). It holds the token.\n"
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

    @property
    def change_token(self) -> str:
        """Token that the page sends with a change; other sites cannot read it."""
        return self._derived("change")


_SPARE = secrets.token_hex(32)
"""Secret for changes where there is no token: behind a proxy."""


class Gate:
    """ASGI middleware that checks requests and adds headers."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "private, no-store")
                if "server" in headers:
                    del headers["server"]
            await send(message)

        malformed_error = self._refusal(scope)
        await (malformed_error or self.app)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if not self._host_is_ours(headers.get("host", "")):
            return PlainTextResponse("this server does not answer for that host name\n", 421)
        if scope["method"] not in (*READS, "POST"):
            return PlainTextResponse("only GET, HEAD and POST\n", 405, {"Allow": "GET, HEAD, POST"})
        scope["ganq_user"] = user = self._proxy_user(scope, headers)
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if any(name == "token" for name, _ in query) and scope["method"] in READS:
            return self._exchange(scope, query)
        if user is None and not self._logged_in(headers):
            return PlainTextResponse(LOGIN, 401)
        if scope["method"] == "POST" and not self._from_the_page(scope, headers):
            return PlainTextResponse("a change must come from the page itself\n", 403)
        return None

    def _host_is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return name is not None and name in self.access.hosts

    def _proxy_user(self, scope: Scope, headers: Headers) -> str | None:
        client = scope.get("client")
        if not self.access.proxies or client is None:
            return None
        try:
            address = ipaddress.ip_address(client[0])
        except ValueError:
            return None
        if any(address in network for network in self.access.proxies):
            return headers.get(self.access.user_header) or None
        return None

    def _exchange(self, scope: Scope, query: list[tuple[str, str]]) -> Response:
        """Exchange the token of the link for a cookie, and remove it from the address."""
        given = [value for name, value in query if name == "token"]
        if len(given) != 1 or self.access.token is None or not _equal(given[0], self.access.token):
            return PlainTextResponse("this link's token is not valid\n" + LOGIN, 401)
        rest = urlencode([pair for pair in query if pair[0] != "token"])
        path = "/" + scope["path"].lstrip("/\\")  # never //host, which would be another site
        # Not a redirect: after a link on another site or in a file a browser would not send the cookie along.
        target = html.escape(path + (f"?{rest}" if rest else ""))
        answer = HTMLResponse(f'<!doctype html><meta http-equiv="refresh" content="0;url={target}">')
        answer.set_cookie(
            self.access.cookie_name,
            self.access.cookie,
            max_age=180 * 24 * 3600,
            path="/",
            httponly=True,
            samesite="strict",
            secure=scope.get("scheme") == "https",
        )
        return answer

    def _logged_in(self, headers: Headers) -> bool:
        if self.access.token is None:
            return False
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _equal(bearer.strip(), self.access.token):
            return True
        cookies = cookie_parser(headers.get("cookie", ""))
        return _equal(cookies.get(self.access.cookie_name, ""), self.access.cookie)

    def _from_the_page(self, scope: Scope, headers: Headers) -> bool:
        if not _equal(headers.get(CHANGE_HEADER, ""), self.access.change_token):
            return False
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site is not None:
            return site == "same-origin"
        return origin is not None and urlsplit(origin).netloc == headers.get("host")


def _equal(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), expected.encode())
