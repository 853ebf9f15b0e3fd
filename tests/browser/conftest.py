"""A server over tests/browser/world.py, and a browser that looks at it."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser.serving import CHROMIUM, Server, environment
from browser.world import World, build
from services import missing

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

    from storage.settings import Settings


def _settings(home: Path, template: Path) -> "Settings":
    from conftest import make_settings

    home.mkdir(parents=True)
    shutil.copy(template, home / "ganq.db")
    return make_settings(home, f"sqlite:///{home / 'ganq.db'}")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, _sqlite_template: Path) -> Iterator[World]:
    """Jobs of all sorts; tests that change it make one of their own (own_world)."""
    made = build(_settings(tmp_path_factory.mktemp("web") / "home", _sqlite_template))
    yield made
    made.close()


@pytest.fixture(scope="session")
def server(world: World) -> Iterator[Server]:
    """Read-only."""
    started = Server(environment(world.settings)).start()
    yield started
    started.stop()


@pytest.fixture
def own_world(tmp_path: Path, _sqlite_template: Path) -> Iterator[World]:
    """An empty home that a test fills."""
    made = World(_settings(tmp_path / "own", _sqlite_template))
    yield made
    made.close()


@pytest.fixture
def own_server(own_world: World) -> Iterator[Server]:
    """Over own_world, with changes allowed."""
    started = Server(environment(own_world.settings), ("--port", "0", "--allow-changes")).start()
    yield started
    started.stop()


@pytest.fixture(scope="module")  # Playwright runs an event loop, in which asyncio.run of other tests fails
def browser() -> "Iterator[Browser]":
    if not os.path.exists(CHROMIUM):
        missing(f"no browser: {CHROMIUM} (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Watched:
    """What a page must never do, noted while it is used."""

    def __init__(self, context: "BrowserContext") -> None:
        self.foreign: list[str] = []
        self.errors: list[str] = []
        self.requests: list[str] = []
        context.on("request", self._asked)
        context.on("weberror", lambda error: self.errors.append(str(error.error)))
        context.on("console", lambda message: self._said(message.type, message.text))
        context.on("dialog", self._opened)

    def _opened(self, dialog: Any) -> None:
        self.errors.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def _asked(self, request: Any) -> None:
        self.requests.append(request.url)
        if not request.url.startswith(("http://127.0.0.1:", "blob:", "data:")):
            self.foreign.append(request.url)

    def _said(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and "Failed to load resource" not in text and "ERR_" not in text:
            self.errors.append(text)


@pytest.fixture
def open_page(browser: "Browser") -> "Iterator[Callable[..., Page]]":
    """Opens a page of a server, logged in; at the end nothing may have gone wrong in it."""
    contexts = []

    def opened(server: Server, path: str = "/", *, width: int = 1280, scheme: str = "light") -> "Page":
        context = browser.new_context(
            viewport={"width": width, "height": 860},
            color_scheme=scheme,  # type: ignore[arg-type]
            reduced_motion="reduce",
        )
        watched = Watched(context)
        contexts.append((context, watched))
        page = context.new_page()
        page.goto(server.link)
        page.wait_for_url(server.base + "/")  # it goes on by itself
        page.goto(server.base + path)
        page.watched = watched  # type: ignore[attr-defined]
        return page

    yield opened
    for context, watched in contexts:
        context.close()
        assert watched.foreign == []
        assert watched.errors == []
