"""The page in Debian's Chromium: first row of a full table, slider, gallery, live updates, start."""

import asyncio
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.measure import Ratio, limit
from benchmarks.neighbours import Watch
from benchmarks.tables import fill, full_tables
from storage.db.schema import prepare
from storage.settings import Settings
from tests.browser.serving import CHROMIUM, Server, environment
from tests.browser.world import World

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

DESCRIPTION = """\
The page in a headless Chromium on the same machine. First row: from the navigation to a row in the DOM,
median; commit to DOM: the slowest of ten; slider: one step of a run with 80 grids, mean; 50 clients: each
holds an event stream and fetches the queue after each notification, while 20 commits a second arrive."""

TABLES = (100_000, 1_000_000)
GRIDS, IMAGES = 80, 10_000
CLIENTS, COMMITS_PER_SECOND, SECONDS = 50, 20, 15
CHANGES = ("--port", "0", "--allow-changes")


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """
    Raises:
        RuntimeError: Postgres is not installed.
    """
    from playwright.sync_api import sync_playwright

    times = rounds or 7
    lines: list[Ratio] = []
    raw: dict[str, Any] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for jobs in TABLES:
            for name, env in full_tables(work, jobs, users=10):
                watch.wait_for_quiet()
                settings = Settings.load(env)
                raw[f"{name} {jobs}"] = found = _first_row(settings, browser, times)
                what = f"{jobs:,} jobs, {name}"
                lines.append(limit(f"first row, {what}", "500 ms", "ms", found["median"], 500))
                lines.append(limit(f"commit to DOM, {what}", "2 s", "ms", found["commit"], 2000))
        settings = _empty(work / "page")
        raw["start"] = starts = [_start(settings) for _ in range(times)]
        lines.append(limit("start of the server", "600 ms", "ms", statistics.median(starts), 600))
        world = World(settings)
        raw["slider"] = slider = _slider(world, settings, browser)
        lines.append(limit("slider step, mean", "25 ms", "ms", slider["mean"], 25))
        raw["gallery"] = gallery = _gallery(world, settings, browser)
        lines.append(limit("10,000 images, requests", "10", "requests", gallery["requests"], 10))
        lines.append(limit("10,000 images, nodes", "200", "nodes", gallery["nodes"], 200))
        lines.append(limit("10,000 images, ms a frame", "20 ms (50 fps)", "ms", 1000 / gallery["fps"], 20))
        browser.close()
        world.close()
    settings = _empty(work / "clients")
    fill(settings, 10_000)
    raw["clients"] = clients = _clients(settings)
    lines.append(
        limit("50 clients, 20 commits/s", "10 % of a core", "% of a core", clients["cpu_percent"], 10)
    )
    return lines, raw


def _empty(home: Path) -> Settings:
    home.mkdir(parents=True, exist_ok=True)
    settings = Settings.load({"GANQ_HOME": str(home)})
    prepare(settings)
    return settings


@contextmanager
def _served(settings: Settings) -> Iterator[Server]:
    server = Server(environment(settings), CHANGES).start()
    try:
        yield server
    finally:
        server.stop()


def _start(settings: Settings) -> float:
    began = time.perf_counter()
    server = Server(environment(settings), CHANGES).start()
    server.get("/")
    took = 1000 * (time.perf_counter() - began)
    server.stop()
    return took


def _opened(server: Server, browser: "Browser", path: str = "/") -> "Page":
    page = browser.new_context(viewport={"width": 1280, "height": 860}).new_page()
    page.goto(server.link)
    page.wait_for_url(server.base + "/")  # it goes on by itself
    page.goto(server.base + path)
    return page


def _first_row(settings: Settings, browser: "Browser", times: int) -> dict[str, Any]:
    with _served(settings) as server:
        page = _opened(server, browser)
        values = []
        for _ in range(times):
            page.goto("about:blank")
            time.sleep(1)
            began = time.perf_counter()
            page.goto(server.base + "/", wait_until="commit")
            page.locator("tbody tr").first.wait_for()
            values.append(1000 * (time.perf_counter() - began))
        page.locator("#liveness.live").wait_for()
        world = World(settings)
        commits = []
        for number in range(10):
            began = time.perf_counter()
            world.submit(f"new-{number}")
            page.get_by_text(f"new-{number}", exact=True).wait_for()
            commits.append(1000 * (time.perf_counter() - began))
        world.close()
        page.context.close()
    return {"values": values, "median": statistics.median(values), "commits": commits, "commit": max(commits)}


def _slider(world: World, settings: Settings, browser: "Browser") -> dict[str, float]:
    job = world.submit("run")
    progress = {"done": 1, "total": GRIDS, "unit": "images", "epoch": GRIDS, "epochs": GRIDS}
    world.begin(job, state="succeeded", progress=progress, result={})
    world.train_files(job, range(1, GRIDS + 1))
    with _served(settings) as server:
        page = _opened(server, browser, f"/jobs/{job}")
        page.locator("#where b").first.wait_for()
        page.wait_for_timeout(2000)
        steps = page.evaluate(
            """async () => {
                const steps = [];
                for (let i = 0; i < 80; i++) {
                    const began = performance.now();
                    ganqRun.go(i);
                    await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
                    steps.push(performance.now() - began);
                }
                return steps;
            }"""
        )
        page.context.close()
    return {"mean": statistics.mean(steps), "worst": max(steps)}


def _gallery(world: World, settings: Settings, browser: "Browser") -> dict[str, float]:
    job = world.images("many", world.submit("model"), count=IMAGES, format="tar")
    with _served(settings) as server:
        page = browser.new_context(viewport={"width": 1280, "height": 860}).new_page()
        page.goto(server.link)
        page.wait_for_url(server.base + "/")  # it goes on by itself
        sheets: list[str] = []
        page.on("request", lambda request: sheets.append(request.url) if "/sheets/" in request.url else None)
        page.goto(f"{server.base}/jobs/{job}")
        page.locator("#space img").first.wait_for()
        page.wait_for_timeout(1000)
        requests, nodes = len(sheets), page.locator("#gallery *").count()
        fps = page.evaluate(
            """async () => {
                const view = document.getElementById("view"), began = performance.now();
                let frames = 0;
                while (performance.now() - began < 2000) {
                    view.scrollTop += 30;
                    await new Promise(requestAnimationFrame);
                    frames++;
                }
                return frames / (performance.now() - began) * 1000;
            }"""
        )
        began = time.perf_counter()
        page.locator("#goto").fill(str(IMAGES - 1))
        page.keyboard.press("Enter")
        page.get_by_text(f"{IMAGES - 1:,} of {IMAGES:,}").wait_for()
        jump = 1000 * (time.perf_counter() - began)
        page.context.close()
    return {"requests": requests, "nodes": nodes, "fps": fps, "jump_ms": jump}


def _clients(settings: Settings) -> dict[str, float]:
    with _served(settings) as server:
        process = psutil.Process(server.process.pid)
        return asyncio.run(_load(server, settings, process))


async def _load(server: Server, settings: Settings, process: psutil.Process) -> dict[str, float]:
    world = World(settings)
    job = world.submit("watched")
    fetched = 0

    async def client() -> None:
        nonlocal fetched
        head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {server.token}\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(f"GET /live HTTP/1.1\r\n{head}\r\n".encode())
        pages = await asyncio.open_connection("127.0.0.1", server.port)
        while line := await reader.readline():
            if line.startswith(b"event: revision"):
                pages[1].write(f"GET / HTTP/1.1\r\nX-Ganq-Fragment: 1\r\n{head}\r\n".encode())
                said = await pages[0].readuntil(b"\r\n\r\n")
                length = int(said.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
                await pages[0].readexactly(length)
                fetched += 1

    clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
    await asyncio.sleep(2)
    before, began, commits = process.cpu_times(), time.monotonic(), 0
    fetched = 0
    while (elapsed := time.monotonic() - began) < SECONDS:
        await asyncio.to_thread(world.set, job, hb_seq=commits)
        commits += 1
        await asyncio.sleep(max(0.0, commits / COMMITS_PER_SECOND - elapsed))
    after, took = process.cpu_times(), time.monotonic() - began
    for one in clients:
        one.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    world.close()
    used = after.user + after.system - before.user - before.system
    return {
        "cpu_percent": 100 * used / took,
        "fetches_a_second": fetched / took,
        "commits_a_second": commits / took,
        "rss_mb": process.memory_info().rss / 1e6,
    }
