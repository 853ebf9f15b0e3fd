"""Load on the page's server without a browser: fifty viewers, an hour of commits, 10,000 connections."""

import asyncio
import contextlib
import json
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil

from storage.settings import Settings
from tests.browser.serving import Server, environment
from tests.browser.world import EPOCHS, World

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHANGES = ("--port", "0", "--allow-changes")
CLIENTS, COMMITS_PER_SECOND, SECONDS = 50, 20, 15
HOUR, HOUR_COMMITS_PER_SECOND = 3600, 30
GRID_EVERY = 60
POLLS_FASTER = f"""\
import web.live
web.live.POLL_S = 0.5 / {HOUR_COMMITS_PER_SECOND}
from cli.main import main
main()
"""
"""A server that polls the table as many times more often as commits arrive more often than one a second."""
CONNECTIONS, AT_ONCE = 10_000, 200
USUAL_FILES = 1024
"""Open files that a process may have on most systems."""


@contextmanager
def served(settings: Settings, **how: Any) -> Iterator[Server]:
    server = Server(environment(settings), CHANGES, **how).start()
    assert server.process.stderr is not None
    # Else the server would wait for room in the pipe: it writes a line for each connection that it refuses.
    threading.Thread(target=server.process.stderr.read, daemon=True).start()
    try:
        yield server
    finally:
        server.stop()


class Client:
    """A connection that is kept open."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {server.token}\r\n"

    async def open(self) -> "Client":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        return self

    async def ask(self, path: str, more: str = "") -> int:
        """Send a request and read the head of the answer; return its status."""
        self.writer.write(f"GET {path} HTTP/1.1\r\n{more}{self.head}\r\n".encode())
        said = await self.reader.readuntil(b"\r\n\r\n")
        self.length = int(said.lower().partition(b"content-length: ")[2].partition(b"\r")[0] or 0)
        return int(said.split()[1])

    async def fetch(self, path: str, more: str = "X-Ganq-Fragment: 1\r\n") -> int:
        """Read a whole answer; return its status."""
        status = await self.ask(path, more)
        await self.reader.readexactly(self.length)
        return status

    def close(self) -> None:
        self.writer.close()


async def watch(server: Server, paths: tuple[str, ...], fetched: list[int]) -> None:
    """Fetch these addresses after each notification, as an open page does."""
    events, pages = await Client(server).open(), await Client(server).open()
    events.writer.write(f"GET /live HTTP/1.1\r\n{events.head}\r\n".encode())
    with contextlib.closing(events), contextlib.closing(pages):
        while line := await events.reader.readline():
            if line.startswith(b"event: revision"):
                for path in paths:
                    await pages.fetch(path)
                    fetched.append(1)


def clients(settings: Settings) -> dict[str, float]:
    """Return the processor time and memory with fifty viewers and twenty commits a second."""
    with served(settings) as server:
        return asyncio.run(_clients(server, settings))


async def _clients(server: Server, settings: Settings) -> dict[str, float]:
    process, world = psutil.Process(server.process.pid), World(settings)
    job = world.submit("watched")
    fetched: list[int] = []
    tasks = [asyncio.create_task(watch(server, ("/",), fetched)) for _ in range(CLIENTS)]
    await asyncio.sleep(2)
    fetched.clear()
    before, began, commits = process.cpu_times(), time.monotonic(), 0
    while (elapsed := time.monotonic() - began) < SECONDS:
        await asyncio.to_thread(world.set, job, hb_seq=commits)
        commits += 1
        await asyncio.sleep(max(0.0, commits / COMMITS_PER_SECOND - elapsed))
    after, took = process.cpu_times(), time.monotonic() - began
    await _end(tasks)
    world.close()
    used = after.user + after.system - before.user - before.system
    return {
        "cpu_percent": 100 * used / took,
        "fetches_a_second": len(fetched) / took,
        "commits_a_second": commits / took,
        "rss_mb": process.memory_info().rss / 1e6,
    }


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for one in tasks:
        one.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Hour:
    """A running training, of which each second a commit tells, faster than that."""

    def __init__(self, settings: Settings) -> None:
        self.world = World(settings)
        self.job = self.world.submit("long")
        self.world.begin(self.job)
        self.world.train_files(self.job, range(1, 5))
        self.metrics = self.world.volume.attempt(self.job, 1) / "metrics.jsonl"

    def commit(self, number: int) -> None:
        step = 40 + number
        if number % GRID_EVERY == 0:
            self.world.add_sample(self.job, 5 + number // GRID_EVERY)
        line = {"step": step, "epoch": 5, "images": step * 16, "loss_d": 0.6, "loss_g": 0.9}
        with open(self.metrics, "a") as file:
            file.write(json.dumps({**line, "images_per_s": 900.0}) + "\n")
        progress = {"done": step * 16, "total": 10**6, "unit": "images", "epoch": 5, "epochs": EPOCHS}
        self.world.set(self.job, hb_seq=number, progress={**progress, "rate": 900.0})

    def close(self) -> None:
        self.world.close()


def memory(settings: Settings, opened: Callable[[Server, str], "Page"]) -> dict[str, float]:
    """
    Return how server and browser grow while an hour of one commit a second passes in two minutes.

    Args:
        opened: opens a page of a server in a browser.
    """
    hour = Hour(settings)
    with served(settings, program=("-c", POLLS_FASTER)) as server:
        page = opened(server, f"/jobs/{hour.job}")
        page.locator("#where b").first.wait_for()
        heap = page.context.new_cdp_session(page)
        process = psutil.Process(server.process.pid)
        # All that changes, as somebody sees who goes from page to page.
        paths = ("/", f"/jobs/{hour.job}", f"/jobs/{hour.job}/events", f"/jobs/{hour.job}/log", "/workers")
        fetched = 0
        sizes: list[tuple[float, float]] = []
        began = time.monotonic()
        for number in range(HOUR):
            hour.commit(number)
            fetched += server.get(paths[number % len(paths)]).status == 200
            if number in (HOUR // 2, HOUR - 1):
                page.wait_for_timeout(1000)
                heap.send("HeapProfiler.collectGarbage")
                used = heap.send("Runtime.getHeapUsage")["usedSize"]
                sizes.append((process.memory_info().rss / 1e6, used / 1e6))
            page.wait_for_timeout(
                max(0.0, 1000 * (began + number / HOUR_COMMITS_PER_SECOND - time.monotonic()))
            )
        found = {"commits_a_second": HOUR / (time.monotonic() - began), "fetched": float(fetched)}
        page.context.close()
    hour.close()
    (server_before, heap_before), (server_after, heap_after) = sizes
    return {
        **found,
        "server_mb": server_after,
        "server_grown_mb": server_after - server_before,
        "heap_mb": heap_after,
        "heap_grown_mb": heap_after - heap_before,
    }


def connections(settings: Settings) -> dict[str, float]:
    """Return what becomes of a server to whose event stream 10,000 connections are opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(USUAL_FILES, hard), hard))  # of the server
        with served(settings) as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # of this process
            return asyncio.run(_connections(server))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def _connections(server: Server) -> dict[str, float]:
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    opened: list[Client] = []
    statuses: list[int] = []
    room = asyncio.Semaphore(AT_ONCE)

    async def connect() -> None:
        async with room:
            client = Client(server)
            try:
                await asyncio.wait_for(client.open(), 30)
                opened.append(client)
                statuses.append(await asyncio.wait_for(client.ask("/live"), 30))
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                statuses.append(0)

    began = time.monotonic()
    await asyncio.gather(*(connect() for _ in range(CONNECTIONS)))
    took = time.monotonic() - began
    grown = process.memory_info().rss - before
    began = time.monotonic()
    while await _page(server) != 200 and time.monotonic() - began < 60:
        await asyncio.sleep(0.1)
    answered = time.monotonic() - began
    for one in opened:
        one.close()
    return {
        "accepted": float(statuses.count(200)),
        "refused": float(statuses.count(503)),
        "without_answer": float(statuses.count(0)),
        "grown_mb": grown / 1e6,
        "seconds": took,
        "page_after_s": answered,
    }


async def _page(server: Server) -> int:
    client = Client(server)
    try:
        await asyncio.wait_for(client.open(), 5)
        return await asyncio.wait_for(client.fetch("/"), 5)
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return 0
