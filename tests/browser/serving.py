"""A `ganq web` of the tests' own."""

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from storage.settings import Settings


CHROMIUM = "/usr/bin/chromium"


def environment(settings: "Settings") -> dict[str, str]:
    """The settings as GANQ_* for a child process."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GANQ_")}
    values = {one.name: getattr(settings, one.name) for one in fields(settings)}
    return env | {f"GANQ_{name.upper()}": str(value) for name, value in values.items() if value is not None}


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    """One process; `link` is what it printed."""

    env: dict[str, str]
    arguments: tuple[str, ...] = ("--port", "0")
    said: list[str] = field(default_factory=list)
    program: tuple[str, ...] = ("-m", "cli.main")

    def start(self) -> "Server":
        self.process = subprocess.Popen(
            [sys.executable, "-P", *self.program, "web", *self.arguments],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.strip())
            if line.startswith("the page: "):
                self.base = line.split()[2].rstrip("/")
                break
        else:
            raise AssertionError(f"no server: {self.said}")
        self.port = urlsplit(self.base).port or 0
        self.token = (Path(self.env["GANQ_HOME"]) / "web-token").read_text().strip()
        self.link = f"{self.base}/?token={self.token}"
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                if self.get("/healthz").status == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError("the server does not answer")

    def again(self) -> "Server":
        """Start it on the same port."""
        self.arguments = ("--port", str(self.port), *self.arguments[2:])
        return self.start()

    def get(
        self, path: str, *, method: str = "GET", body: Any = None, logged_in: bool = True, **headers: str
    ) -> Answer:
        """Ask; underscores in names of headers are hyphens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if logged_in:
            named.setdefault("Authorization", f"Bearer {self.token}")
        data = None if body is None else json.dumps(body)
        connection.request(method, path, body=data, headers=named)
        found = connection.getresponse()
        answer = Answer(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())
        connection.close()
        return answer

    def stop(self, *, kill: bool = False) -> None:
        if self.process.poll() is None:
            (self.process.kill if kill else self.process.terminate)()
        self.process.wait(timeout=20)
        if self.process.stderr is not None:
            self.process.stderr.close()
