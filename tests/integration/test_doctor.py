"""`ganq doctor` among real servers, real mounts and real workers that have gone wrong."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from machine import Ganq, part, put_to_sleep, until

pytestmark = pytest.mark.slow

Look = Callable[..., tuple[int, dict[str, list[dict[str, Any]]]]]


@pytest.fixture
def backend() -> str:
    """SQLite, except where a test brings its own Postgres."""
    return "sqlite"


@pytest.fixture
def look(ganq: Ganq) -> Look:
    """Runs `ganq doctor --json`: (exit code, findings by check)."""

    def run(*before: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
        command = [*before, sys.executable, "-P", "-m", "cli.main", "doctor", "--json"]
        done = subprocess.run(
            command, env=ganq.env, cwd=ganq.folder, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stderr == ""
        found: dict[str, list[dict[str, Any]]] = {}
        for one in json.loads(done.stdout)["findings"]:
            found.setdefault(one["check"], []).append(one)
        return done.returncode, found

    return run


def of(found: dict[str, list[dict[str, Any]]], check: str, word: str) -> dict[str, Any]:
    """The one finding with this word."""
    (one,) = [one for one in found[check] if word in one["message"]]
    return one


def test_servers_that_accept_and_say_nothing_are_reported_within_half_a_minute(ganq: Ganq) -> None:
    from services import Postgres, postgres_binaries

    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("no Postgres")
    with Postgres(binaries) as server, socket.create_server(("127.0.0.1", 0)) as redis:
        ganq.env["GANQ_DATABASE_URL"] = server.tcp_url(server.create())
        ganq.env["GANQ_REDIS_URL"] = f"redis://ada:s3cret-bell@127.0.0.1:{redis.getsockname()[1]}/0"
        assert server.process is not None
        master = psutil.Process(server.process.pid)
        family = [master, *master.children(recursive=True)]
        for one in family:
            with suppress(psutil.NoSuchProcess):  # a backend that has just ended
                one.suspend()
        try:
            began = time.monotonic()
            done = ganq.run("doctor")
            took = time.monotonic() - began
        finally:
            for one in reversed(family):
                with suppress(psutil.NoSuchProcess):
                    one.resume()
    assert done.returncode == 1
    assert took < 30
    assert "error database" in done.stdout
    assert "Redis does not answer within 2 s" in done.stdout
    for secret in (server.password, "s3cret-bell"):
        assert secret not in done.stdout + done.stderr


# --- mounts -------------------------------------------------------------------------------


@pytest.fixture
def unshared(settings: Any) -> Callable[..., list[str]]:
    """The beginning of a command that runs with a mount of its own on the volume: unshared('-t tmpfs …')."""
    settings.volume.mkdir(exist_ok=True)
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare")

    def begin(how: str, target: Path = settings.volume) -> list[str]:
        script = f'mount {how} "{target}" && exec "$@"'
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]

    return begin


def test_a_volume_that_is_nearly_full_fails(look: Look, unshared: Callable[..., list[str]]) -> None:
    code, found = look(*unshared("-t tmpfs -o size=4m none"))
    assert code == 1
    assert of(found, "volume", "is full: 0.0 GB free")["level"] == "error"
    assert of(found, "volume", "is in memory")["level"] == "warn"


def test_a_volume_that_is_read_only_fails(look: Look, unshared: Callable[..., list[str]]) -> None:
    code, found = look(*unshared("-t tmpfs -o ro,size=8g none"))
    assert code == 1
    assert of(found, "volume", "cannot be written: read-only file system")["level"] == "error"


# --- workers of this machine --------------------------------------------------------------


def test_a_worker_with_another_tmpdir_is_named(ganq: Ganq, tmp_path: Path, look: Look) -> None:
    other = tmp_path / "t"
    other.mkdir()
    ganq.start_worker("w1", TMPDIR=str(other))
    ganq.start_worker("w2")
    until(lambda: len(ganq.present()) == 2, what="two workers")
    code, found = look()
    assert code == 0
    said = of(found, "sockets", "the sockets of w1 are in")
    assert said["level"] == "warn"
    assert str(other) in said["message"]
    assert "ganq health asks the job table" in said["message"]
    assert not [one for one in found["sockets"] if "sockets of w2" in one["message"]]


def test_a_worker_with_a_private_tmp_is_named(
    ganq: Ganq, tmp_path: Path, look: Look, unshared: Callable[..., list[str]]
) -> None:
    place = tmp_path / "t"
    place.mkdir(mode=0o1777)
    ganq.env["TMPDIR"] = str(place)
    before = unshared("-t tmpfs -o size=64m none", place)
    worker = subprocess.Popen(
        [*before, sys.executable, "-P", "-m", "cli.main", "worker", "--gpus", "none", "--name", "w1"],
        env=ganq.env,
        cwd=ganq.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    ganq.workers.append(worker)
    until(lambda: ganq.present(), what="a worker")
    _, found = look()
    assert "PrivateTmp=no" in of(found, "sockets", "the socket of w1 is not in")["hint"]
    assert ganq.run("health").returncode == 0, "the job table knows of it"


def test_a_worker_whose_sockets_were_cleaned_away_is_named_and_healthy_by_the_job_table(
    ganq: Ganq, tmp_path: Path, look: Look
) -> None:
    place = tmp_path / "t"
    place.mkdir(mode=0o1777)
    ganq.env["TMPDIR"] = str(place)
    ganq.start_worker("w1")
    until(lambda: ganq.present(), what="a worker")
    (runtime,) = place.glob("ganq-*-*")
    shutil.rmtree(runtime)
    _, found = look()
    assert of(found, "sockets", "the socket of w1 is not in")["level"] == "warn"
    assert ganq("health").startswith("healthy: w1 is idle, by the job table")


def test_a_worker_that_died_and_one_that_is_stopped_are_named(ganq: Ganq, look: Look) -> None:
    first, second = ganq.start_worker("w1"), ganq.start_worker("w2")
    until(lambda: len(ganq.present()) == 2, what="two workers")
    supervisor = part(second, "worker.supervisor.loop")
    assert supervisor is not None
    for process in (part(first, "worker.supervisor.loop"), psutil.Process(first.pid)):
        assert process is not None
        process.kill()
    put_to_sleep([supervisor], ganq.table)
    try:
        until(lambda: "unresponsive: w1 on" in str(look()), within_s=20, what="silence")
        code, found = look()
        assert of(found, "workers", "died on this machine")["message"] == "died on this machine: w1"
        assert "w2" in of(found, "workers", "unresponsive")["message"]
        assert of(found, "workers", "none is running")["level"] == "warn"
        assert code == 0
    finally:
        supervisor.resume()
