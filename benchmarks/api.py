"""The REST API on loopback: submissions, reads, uploads, downloads; and the import of the Python client."""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Ratio, limit, quantile
from benchmarks.neighbours import Watch
from benchmarks.tables import full_tables
from storage.settings import Settings
from tests.browser.serving import Server, environment
from tests.browser.world import World

if TYPE_CHECKING:
    from collections.abc import Iterator

DESCRIPTION = """\
The REST API on the loopback of the same machine, with 100,000 queued jobs in the table. Server and clients
share its cores. One submission: a generation from an existing training, one client, the median. Submissions
and reads a second: 16 connections. Upload of 16,000 images and download of 100,000: against `cp -r` of the
same files, each with `sync`."""

JOBS = 100_000
CONNECTIONS = 16
SECONDS = 8.0
IMAGES, IMAGE_BYTES = 16_000, 8192
DOWNLOADED, FORMATS = 100_000, ("tar", "png")


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """
    Run the benchmark.

    Raises:
        RuntimeError: Postgres is not installed.
    """
    lines: list[Ratio] = []
    raw: dict[str, Any] = {}
    for name, env in full_tables(work, JOBS, users=10):
        watch.wait_for_quiet()
        settings = Settings.load(env)
        with _served(settings) as server:
            raw[name] = found = asyncio.run(_requests(settings, server))
        lines.append(limit(f"one submission, p50, {name}", "10 ms", "ms", found["one"]["p50"], 10))
        lines.append(
            limit(f"submissions, mean, {name}", "5 ms (200/s)", "ms", 1000 / found["submits"]["rate"], 5)
        )
        lines.append(
            limit(f"reads, mean, {name}", "0.5 ms (2,000/s)", "ms", 1000 / found["reads"]["rate"], 0.5)
        )
    watch.wait_for_quiet()
    raw["files"] = found = _files(work)
    for way, count in (("upload", IMAGES), *((f"download ({one})", DOWNLOADED) for one in FORMATS)):
        lines.append(
            limit(f"{way}, {count:,} images", "cp / 0.7", "s", found[way], found[f"copy: {way}"] / 0.7)
        )
    raw["import"] = found = {
        name: min(_import_seconds(name) for _ in range(5)) for name in ("ganq", "sqlalchemy")
    }
    lines.append(
        limit("import ganq", "1.3 × import sqlalchemy", "s", found["ganq"], 1.3 * found["sqlalchemy"])
    )
    return lines, raw


@contextmanager
def _served(settings: Settings) -> "Iterator[Server]":
    server = Server(environment(settings), ("--port", "0", "--allow-changes")).start()
    try:
        yield server
    finally:
        server.stop()


def _import_seconds(module: str) -> float:
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


async def _requests(settings: Settings, server: Server) -> dict[str, Any]:
    world = World(settings)
    model = world.submit("model")
    world.begin(model, state="succeeded", result={"epoch": 24})
    world.add_checkpoint(model, 24, 0.5)
    world.close()
    body = {"kind": "generate", "source": model, "count": 64, "hold": True}
    submit = _request(server, "POST", "/jobs", body)
    one = await _load(server, [submit], connections=1)
    submits = await _load(server, [submit], connections=CONNECTIONS)
    reads = await _load(
        server,
        [_request(server, "GET", f"/jobs/{number}") for number in range(1, 65)],
        connections=CONNECTIONS,
    )
    lists = await _load(server, [_request(server, "GET", "/jobs?limit=50")], connections=CONNECTIONS)
    return {"one": one, "submits": submits, "reads": reads, "lists": lists}


def _request(server: Server, method: str, path: str, body: Any = None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} /api/v1{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {server.token}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


async def _load(server: Server, requests: list[bytes], *, connections: int) -> dict[str, float]:
    """Send requests over so many connections, each after the answer to the last one."""
    took: list[float] = []

    async def client(first: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 20)
        number = first
        while time.perf_counter() < end:
            began = time.perf_counter()
            writer.write(requests[number % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            if head[9:10] != b"2":
                raise RuntimeError(head.decode())
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]))
            took.append(1000 * (time.perf_counter() - began))
            number += connections
        writer.close()

    began = time.perf_counter()
    end = began + SECONDS
    await asyncio.gather(*(client(number) for number in range(connections)))
    return {
        "rate": len(took) / (time.perf_counter() - began),
        "p50": statistics.median(took),
        "p99": quantile(took, 0.99),
    }


def _files(work: Path) -> dict[str, float]:
    """Measure an upload and downloads, each beside a copy of the same files; return seconds."""
    from ganq.remote.api import Api
    from ganq.remote.upload import upload
    from storage.db.schema import prepare

    home = work / "files"
    settings = Settings.load({"GANQ_HOME": str(home)})
    prepare(settings)
    source = home / "source"
    source.mkdir()
    for number in range(IMAGES):
        (source / f"{number:06d}.png").write_bytes(os.urandom(IMAGE_BYTES))
    copied = _copy_seconds(source, home / "copy")
    with _served(settings) as server:
        api = Api(server.base, server.token)
        began = time.perf_counter()
        upload(api, source)
        os.sync()
        uploaded = time.perf_counter() - began
        api.close()
        found = {"copy: upload": copied, "upload": uploaded}
        world = World(settings)
        for one in FORMATS:
            made = world.images(one, world.submit("model"), count=DOWNLOADED, format=one)
            folder = world.volume.attempt(made, 1)
            found[f"copy: download ({one})"] = _copy_seconds(folder, home / f"copy-{one}")
            found[f"download ({one})"] = _download_seconds(server, made, home)
        world.close()
    return found


def _download_seconds(server: Server, job: int, home: Path) -> float:
    command = [
        sys.executable,
        "-P",
        "-m",
        "cli.main",
        "download",
        str(job),
        "--out",
        str(home / f"out-{job}"),
    ]
    env = {"GANQ_HOME": str(home / "laptop"), "GANQ_API_URL": server.base, "GANQ_API_TOKEN": server.token}
    began = time.perf_counter()
    subprocess.run(command, env={**os.environ, **env}, check=True, capture_output=True)
    os.sync()
    return time.perf_counter() - began


def _copy_seconds(source: Path, target: Path) -> float:
    os.sync()
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    os.sync()
    return time.perf_counter() - began
