"""The page in Debian's Chromium: first row of a full table, slider, gallery, live updates, start, load."""

import http.client
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import stack, web_load
from benchmarks.measure import Ratio, alternate, compare, limit
from benchmarks.models import trained
from benchmarks.neighbours import Watch
from benchmarks.tables import fill, growing_tables
from benchmarks.web_load import CHANGES, served
from jobs.specs import GenerateSpec, Spec, TrainSpec
from storage.db.schema import prepare
from storage.results.codecs import encode_png
from storage.settings import Settings
from tests.browser.serving import CHROMIUM, Server, environment
from tests.browser.world import World, picture, tiled

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

DESCRIPTION = """\
The page in a headless Chromium on the same machine. First row: from the navigation to a row in the DOM,
median; commit to DOM: the slowest of ten; start: until the first page, median; slider: one step of a run
with 80 grids of 822×822, mean; 50 clients: each holds an event stream and fetches the queue after each
notification, while 20 commits a second arrive. An hour of one commit a second passes in two minutes: 3,600
commits to a running training at 30 a second, with a server that polls 30 times as often; growth is of its
second half, when the caches are full: of the server's resident memory and of the browser's heap after a
collection. 10,000 connections ask for the event stream at once and stay open; the server may open 1,024
files when it starts. Training (half a minute) and generation (20,000 images) run on both cores, with and
without a Chromium on the same machine that opens the job's page at its start; the A/A column is the
ratio of two rounds without it."""

TABLES = (100_000, 1_000_000)
GRIDS, IMAGES = 80, 10_000
SAME = 0.97
"""Share of the rate without the page that training and generation must keep."""


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """
    Run the benchmark.

    Raises:
        RuntimeError: Postgres is not installed.
    """
    from playwright.sync_api import sync_playwright

    times = rounds or 7
    lines: list[Ratio] = []
    raw: dict[str, Any] = {}
    settings = _empty(work / "page")
    watch.wait_for_quiet()
    raw["start"] = starts = [_start(settings) for _ in range(max(times, 5))]
    lines.append(limit("start of the server", "600 ms", "ms", statistics.median(starts), 600))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, jobs, env in growing_tables(work, TABLES, users=10):
            watch.wait_for_quiet()
            raw[f"{name} {jobs}"] = found = _first_row(Settings.load(env), browser, max(times, 5))
            what = f"{jobs:,} jobs, {name}"
            lines.append(limit(f"first row, {what}", "500 ms", "ms", found["median"], 500))
            lines.append(limit(f"commit to DOM, {what}", "2 s", "ms", found["commit"], 2000))
        world = World(settings)
        watch.wait_for_quiet()
        raw["slider"] = slider = _slider(world, settings, browser)
        lines.append(limit("slider step, mean", "25 ms", "ms", slider["mean"], 25))
        raw["gallery"] = gallery = _gallery(world, settings, browser)
        lines.append(limit("10,000 images, requests", "10", "requests", gallery["requests"], 10))
        lines.append(limit("10,000 images, nodes", "200", "nodes", gallery["nodes"], 200))
        lines.append(limit("10,000 images, ms a frame", "20 ms (50 fps)", "ms", 1000 / gallery["fps"], 20))
        world.close()
        watch.wait_for_quiet()
        hour = _empty(work / "hour")
        raw["hour"] = grown = web_load.memory(hour, lambda server, path: _opened(server, browser, path))
        lines.append(limit("an hour of commits: server grows", "10 MB", "MB", grown["server_grown_mb"], 10))
        lines.append(
            limit("an hour of commits: browser's heap grows", "10 MB", "MB", grown["heap_grown_mb"], 10)
        )
        lines += _beside(work, browser, rounds or 5, watch, raw)
        browser.close()
    settings = _empty(work / "clients")
    fill(settings, 10_000)
    watch.wait_for_quiet()
    raw["clients"] = clients = web_load.clients(settings)
    most = limit("50 clients, 20 commits/s", "10 % of a core", "% of a core", clients["cpu_percent"], 10)
    raw["connections"] = flood = web_load.connections(settings)
    what = "10,000 connections to the event stream"
    lines.append(most)
    lines.append(limit(f"{what}: accepted", "256", "streams", flood["accepted"], 256))
    lines.append(limit(f"{what}: server grows", "64 MB", "MB", flood["grown_mb"], 64))
    lines.append(limit(f"{what}: first page after it", "10 s", "s", flood["page_after_s"], 10))
    return lines, raw


def _empty(home: Path) -> Settings:
    home.mkdir(parents=True, exist_ok=True)
    settings = Settings.load({"GANQ_HOME": str(home)})
    prepare(settings)
    return settings


def _start(settings: Settings) -> float:
    """Return the milliseconds from the start of `ganq web` to its first page."""
    began = time.perf_counter()
    command = [sys.executable, "-P", "-m", "cli.main", "web", *CHANGES]
    process = subprocess.Popen(command, env=environment(settings), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    port = int(process.stderr.readline().split()[2].rpartition(":")[2].strip("/"))
    token = (settings.home / "web-token").read_text().strip()
    connection = http.client.HTTPConnection("127.0.0.1", port)  # accepted as soon as the server runs
    connection.request("GET", "/", headers={"Authorization": f"Bearer {token}"})
    assert connection.getresponse().read()
    took = 1000 * (time.perf_counter() - began)
    process.terminate()
    process.wait()
    process.stderr.close()
    return took


def _opened(server: Server, browser: "Browser", path: str = "/") -> "Page":
    page = browser.new_context(viewport={"width": 1280, "height": 860}).new_page()
    page.goto(server.link)
    page.wait_for_url(server.base + "/")  # it goes on by itself
    if path != "/":
        page.goto(server.base + path)
    return page


def _first_row(settings: Settings, browser: "Browser", times: int) -> dict[str, Any]:
    with served(settings) as server:
        began = time.perf_counter()
        page = _opened(server, browser)
        page.locator("tbody tr").first.wait_for()
        cold = 1000 * (time.perf_counter() - began)
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
    found = {"cold": cold, "values": values, "median": statistics.median(values)}
    return {**found, "commits": commits, "commit": max(commits)}


def _slider(world: World, settings: Settings, browser: "Browser") -> dict[str, float]:
    job = world.submit("run")
    progress = {"done": 1, "total": GRIDS, "unit": "images", "epoch": GRIDS, "epochs": GRIDS}
    world.begin(job, state="succeeded", progress=progress, result={})
    world.train_files(job, range(1, 5))
    for epoch in range(1, GRIDS + 1):
        small = tiled([picture(place, noise=1 - epoch / GRIDS) for place in range(64)])
        path = world.volume.attempt(job, 1) / "samples" / f"epoch-{epoch:04d}.png"
        path.write_bytes(encode_png(np.kron(small, np.ones((3, 3, 1), np.uint8))))
    with served(settings) as server:
        page = _opened(server, browser, f"/jobs/{job}")
        page.locator("#where b").first.wait_for()
        page.wait_for_timeout(5000)
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
    with served(settings) as server:
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
        page.get_by_text(f"{IMAGES:,} of {IMAGES:,}").wait_for()
        jump = 1000 * (time.perf_counter() - began)
        page.context.close()
    return {"requests": requests, "nodes": nodes, "fps": fps, "jump_ms": jump}


def _beside(work: Path, browser: "Browser", rounds: int, watch: Watch, raw: dict[str, Any]) -> list[Ratio]:
    """Return the rates of training and generation with the page open, over those without it."""
    lines = []
    with stack.Queue(work / "beside", workers=("--gpus", "none", "--no-web")) as queue:
        model = trained(work, queue, 32)
        data = str(stack.faces(work))
        small = {
            "size": 96,
            "ngf": 32,
            "ndf": 32,
            "batch": 64,
            "epochs": 12,
            "save_every": 1,
            "device": "cpu",
        }
        specs: dict[str, tuple[Spec, str]] = {
            "train": (TrainSpec.create(data=data, recipe="dcgan", **small), "loop_rate"),
            "generate": (GenerateSpec.create(source=model.id, count=20_000, device="cpu"), "whole_rate"),
        }
        for name, (spec, metric) in specs.items():
            run_it = queue.train if spec.kind == "train" else queue.generate
            pieces = {
                "without": partial(_rates, run_it, spec),
                "page open": partial(_with_page, run_it, spec, queue.settings, browser),
            }
            series = alternate(pieces, max(rounds, 3), watch=watch, say=lambda line: None)
            raw[name] = series.values
            mine, alone = series.of("page open", metric), series.of("without", metric)
            lines.append(compare(f"{name}: page open", "without", "images/s", mine, alone, at_least=SAME))
    return [_or_within_noise(one) for one in lines]


def _or_within_noise(line: Ratio) -> Ratio:
    """Return the line as met, too, if two rounds without the page differ as much."""
    noise = line.aa_low is not None and line.median >= line.aa_low
    return replace(line, bar=f"{line.bar}, or within A/A", met=bool(line.met) or noise)


def _rates(run_it: Callable[..., dict[str, float]], spec: Spec, **how: Any) -> dict[str, float]:
    return stack.with_rates(run_it(spec, **how))


def _with_page(
    run_it: Callable[..., dict[str, float]], spec: Spec, settings: Settings, browser: "Browser"
) -> dict[str, float]:
    """Run a job while a browser shows it."""
    with served(settings) as server:
        page = _opened(server, browser)
        found = _rates(run_it, spec, begun=lambda job: page.goto(f"{server.base}/jobs/{job.id}"))
        page.context.close()
    return found
