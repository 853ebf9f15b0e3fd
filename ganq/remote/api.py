"""Requests to the REST API, with its errors as ganq's own."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from ganq.notices import report
from jobs.errors import ConfigError, ServerUnavailableError, UnauthenticatedError, error_of

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
PREFIX = "/api/v1"
TIMEOUT_S = 30.0
UNAVAILABLE = (502, 503, 504)
"""Status codes with which a reverse proxy says that the server behind it does not answer."""
RETRIED_AFTER_S = (0.2, 1.0, 3.0)
"""Pauses before a request that may be repeated is sent again."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Api:
    """
    A server's REST API.

    Args:
        url: of the server: https://ganq.lab.example, or http://127.0.0.1:8311.
        token: of `ganq token create`.
        timeout_s: time without an answer, or a byte of one, after which the server counts as away.

    Raises:
        ConfigError: the URL is malformed.
        UnauthenticatedError: there is no token.
    """

    def __init__(self, url: str, token: str, timeout_s: float = TIMEOUT_S) -> None:
        try:
            parts = urlsplit(url)
            parts.port  # noqa: B018 - raises ValueError, too
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ConfigError(
                f"{url[:200]!r} is not the URL of a server", hint="e.g. https://ganq.lab.example"
            )
        token = token.strip()  # a file ends with a newline
        if not token:
            raise UnauthenticatedError(
                f"there is no token for {url}",
                hint="GANQ_API_TOKEN_FILE names the file that contains it; in Python: token=",
            )
        if not re.fullmatch(r"[!-~]+", token):
            raise UnauthenticatedError(
                "the token contains characters that no token has", hint="ganq token create makes one"
            )
        if parts.scheme == "http" and parts.hostname not in LOOPBACK:
            report([f"{url} is not encrypted: others on the network can read the token"])
        self.url = url.rstrip("/").removesuffix(PREFIX)
        self._token = token
        self._timeout_s = timeout_s
        self._client: httpx.Client | None = None

    @property
    def client(self) -> "httpx.Client":
        """Return the HTTP client; httpx is imported on first use."""
        if self._client is None:
            import httpx

            self._client = httpx.Client(**self.options())
        return self._client

    def options(self) -> dict[str, Any]:
        """Return the options of an HTTP client: headers, timeout, certificates."""
        import ssl

        from storage.version import version

        return {
            "headers": {"Authorization": f"Bearer {self._token}", "User-Agent": f"ganq/{version()}"},
            "timeout": self._timeout_s,
            "verify": ssl.create_default_context() if self.url.startswith("https") else False,
        }

    def get(self, path: str, **params: Any) -> Any:
        """
        Return the JSON of an address.

        Args:
            params: of the query; those that are None are left out.

        Raises:
            GanqError: that of the server.
            ServerUnavailableError: it does not answer.
        """
        given = {name: value for name, value in params.items() if value is not None}
        return self.object_of(self.repeated(lambda: self.send("GET", path, params=given)))

    def post(self, path: str, body: Mapping[str, Any], *, key: str | None = None) -> Any:
        """
        Send JSON and return the answer.

        Args:
            key: an Idempotency-Key, with which the request may be repeated.

        Raises:
            GanqError: that of the server.
            ServerUnavailableError: it does not answer.
        """
        headers = {} if key is None else {"Idempotency-Key": key}

        def once() -> Any:
            return self.send("POST", path, json=dict(body), headers=headers)

        return self.object_of(self.repeated(once) if key is not None else once())

    def patch(self, path: str, body: Mapping[str, Any]) -> Any:
        """Change something; see post()."""
        return self.object_of(self.send("PATCH", path, json=dict(body)))

    def send(self, method: str, path: str, **options: Any) -> "httpx.Response":
        """
        Send one request.

        Raises:
            GanqError: that of the server.
            ServerUnavailableError: it does not answer.
        """
        with self.unavailable():
            answer = self.client.request(method, self.url + PREFIX + path, **options)
        self.require_success(answer)
        return answer

    @contextmanager
    def stream(
        self, path: str, headers: Mapping[str, str] | None = None, **params: Any
    ) -> "Iterator[httpx.Response]":
        """
        Open an answer that is read piece by piece.

        Raises:
            GanqError: that of the server.
            ServerUnavailableError: it does not answer, or breaks off.
        """
        given = {name: value for name, value in params.items() if value is not None}
        with (
            self.unavailable(),
            self.client.stream(
                "GET", self.url + PREFIX + path, params=given, headers=dict(headers or {})
            ) as answer,
        ):
            if answer.is_error or answer.is_redirect:
                answer.read()
            self.require_success(answer)
            yield answer

    def repeated(self, work: Callable[[], T]) -> T:
        """Run an idempotent request; retry a few times if the server does not answer."""
        for pause in RETRIED_AFTER_S:
            try:
                return work()
            except ServerUnavailableError:
                time.sleep(pause)
        return work()

    @contextmanager
    def unavailable(self) -> Iterator[None]:
        """
        Translate connection errors of httpx.

        Raises:
            ServerUnavailableError: the server does not answer.
        """
        import httpx

        try:
            yield
        except httpx.TransportError as exc:
            reason = str(exc).strip() or type(exc).__name__
            raise ServerUnavailableError(
                f"{self.url} does not answer: {reason[:200].lower()}",
                hint="check GANQ_API_URL and the network",
            ) from exc
        except httpx.InvalidURL as exc:
            raise ConfigError(f"{self.url[:200]!r} is not the URL of a server: {exc}") from exc

    def require_success(self, answer: "httpx.Response") -> None:
        """
        Raise the error of an answer.

        Raises:
            GanqError: the error that the server answered.
        """
        media = answer.headers.get("content-type", "").partition(";")[0]
        if media == "application/problem+json":
            found = answer.json()
            text, facts = str(found.get("detail")), {"status": found.get("status")}
            raise error_of(str(found.get("code")), text + _both(found), found.get("hint"), **facts)
        if answer.is_success and (media != "text/html"):
            return
        if answer.status_code in UNAVAILABLE:
            raise ServerUnavailableError(
                f"{self.url} does not answer: HTTP {answer.status_code}",
                hint="a proxy answers for it: is the server running?",
            )
        if answer.is_redirect:
            raise ConfigError(
                f"{self.url} redirects to {answer.headers.get('location', '')[:200]}",
                hint="set GANQ_API_URL to that server; the token is not sent along",
            )
        raise self._other_server(answer)

    def object_of(self, answer: "httpx.Response") -> dict[str, Any]:
        """
        Return the JSON object of an answer; all answers of this API but files are objects.

        Raises:
            ConfigError: it is something else: another server answers.
        """
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._other_server(answer)
        return found

    def _other_server(self, answer: "httpx.Response") -> ConfigError:
        return ConfigError(
            f"{self.url} does not answer as the REST API of ganq does (HTTP {answer.status_code})",
            hint="check GANQ_API_URL; servers of ganq 0.2 have no REST API",
        )

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = None


def _both(found: Mapping[str, Any]) -> str:
    """Return how a request differs from the one that its key belongs to."""
    known, given = (found.get(name, {}).get("spec") for name in ("known", "given"))
    if not isinstance(known, dict) or not isinstance(given, dict):
        return ""
    differ = [name for name in {**known, **given} if known.get(name) != given.get(name)]
    return "".join(f"; {name} is {known.get(name)!r}, not {given.get(name)!r}" for name in differ[:5])
