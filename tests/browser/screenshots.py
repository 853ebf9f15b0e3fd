"""`make screenshots`: every page, light and dark, narrow and wide, as PNGs to look at."""

import argparse
import tempfile
from pathlib import Path

from browser.serving import CHROMIUM, Server, environment
from browser.test_pages import PAGES
from browser.world import build
from conftest import make_settings
from playwright.sync_api import sync_playwright

from storage.db.schema import prepare

WINDOWS = {"narrow": (400, 860), "wide": (1280, 860)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("screenshots"))
    parser.add_argument("--home", type=Path, help="show this home, with --pages, and not the tests' jobs")
    parser.add_argument("--pages", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--full", action="store_true", help="the whole page, not a window of it")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ganq-") as temp:
        home = given.home or Path(temp) / "home"
        home.mkdir(exist_ok=True)
        settings = make_settings(home.absolute(), f"sqlite:///{home.absolute() / 'ganq.db'}")
        pages = dict(one.split("=", 1) for one in given.pages)
        if given.home is None:
            prepare(settings)
            world = build(settings)
            pages = {name: path.format(**world.ids) for name, path in PAGES.items()} | pages
            world.close()
        server = Server(environment(settings), ("--port", "0", "--allow-changes")).start()
        try:
            _shoot(server, pages, given.out, full=given.full)
        finally:
            server.stop()


def _shoot(server: Server, pages: dict[str, str], out: Path, *, full: bool) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for window, (width, height) in WINDOWS.items():
            for scheme in ("light", "dark"):
                context = browser.new_context(
                    viewport={"width": width, "height": height},
                    color_scheme=scheme,
                )
                page = context.new_page()
                page.goto(server.link)
                page.wait_for_url(server.base + "/")  # it goes on by itself
                for name, path in pages.items():
                    page.goto(server.base + path)
                    page.locator("#liveness.live").wait_for()
                    page.wait_for_timeout(900)
                    page.screenshot(path=out / f"{name}-{window}-{scheme}.png", full_page=full)
                context.close()
        browser.close()
    print(f"{len(pages) * 4} screenshots in {out}")


if __name__ == "__main__":
    main()
