"""Real workers, started as a user starts them; real kills."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from storage.db.engine import Database

START_S = 120.0
"""Two cores that seven others use, too, need half a minute for what takes two seconds."""

LATER = pytest.mark.tier2
postgres_later = pytest.mark.parametrize(
    "backend", ["sqlite", pytest.param("postgres", marks=LATER)], indirect=True
)
"""For tests that take long and hardly depend on the database: on Postgres in tier 2."""


class Ganq:
    """
    The installed `ganq` on a machine of the test's own.

    Args:
        within: a command that runs another command, on another host for example.
        program: the `ganq` of another installation.
    """

    def __init__(
        self, env: dict[str, str], folder: Path, *, within: Sequence[str] = (), program: str | None = None
    ) -> None:
        self.env = {**os.environ, **env, "OMP_NUM_THREADS": "1"}
        self.folder = folder
        self.within = within
        self.program = [program] if program else [sys.executable, "-P", "-m", "cli.main"]
        self.workers: list[subprocess.Popen[bytes]] = []
        self._table: Database | None = None

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Run one command; returns what it printed."""
        done = self.run(*arguments)
        assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*self.within, *self.program, *arguments],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))

    def start_worker(
        self, name: str = "w1", *, within: Sequence[str] = (), options: Sequence[str] = (), **env: str
    ) -> "subprocess.Popen[bytes]":
        """
        Start a worker on the CPU.

        Args:
            within: a command that runs another command, such as unshare or setpriv.
            options: of `ganq worker`, instead of --gpus none.
        """
        arguments = ("worker", *(options or ("--gpus", "none")), "--name", name)
        return self._start(name, within, arguments, env)

    def start_up(
        self, *, within: Sequence[str] = (), options: Sequence[str] = ()
    ) -> "subprocess.Popen[bytes]":
        """Start `ganq up`; its log is that of "up"."""
        return self._start("up", within, ("up", "--no-web", *(options or ("--gpus", "none"))), {})

    def _start(
        self, name: str, within: Sequence[str], arguments: Sequence[str], env: dict[str, str]
    ) -> "subprocess.Popen[bytes]":
        log = open(self.folder / f"{name}.log", "ab")  # noqa: SIM115 - the worker keeps writing to it
        worker = subprocess.Popen(
            [*self.within, *within, *self.program, *arguments],
            env={**self.env, **env},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        self.workers.append(worker)
        return worker

    def log(self, name: str = "w1") -> str:
        return (self.folder / f"{name}.log").read_text()

    def job(self, job_id: int) -> dict[str, Any]:
        job: dict[str, Any] = self.json("status", str(job_id))
        return job

    # --- the table itself: a command each time would take a core from the workers -----------

    def peek(self, job_id: int) -> dict[str, Any]:
        """All columns of a job."""
        from tables import job_row

        return job_row(self.table, job_id)

    def steps(self, job_id: int) -> list[int]:
        """The steps of a job's checkpoints, oldest first."""
        from storage.db.queries import Queries

        return [one.step for one in Queries(self.table).checkpoints(job_id)]

    def present(self) -> list[str]:
        """The names of the workers that have spoken."""
        from storage.db.queries import Queries

        return [one.name for one in Queries(self.table).workers()]

    @property
    def table(self) -> "Database":
        """The job table that the commands use."""
        from storage.db.engine import Database
        from storage.settings import Settings

        if self._table is None:
            self._table = Database(Settings.load(self.env))
        return self._table

    def stop(self) -> None:
        if self._table is not None:
            self._table.dispose()
            self._table = None
        left: list[psutil.Process] = []
        families = [_family(worker.pid) for worker in self.workers]
        for worker in self.workers:
            worker.terminate()
        for worker, family in zip(self.workers, families, strict=True):
            try:
                worker.wait(timeout=30)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            _, alive = psutil.wait_procs(family, timeout=10)
            for process in alive:
                process.kill()
            left += alive
        assert not left, f"workers left {left} behind"


def attempt_folder(ganq: Ganq, job_id: int) -> Path:
    """Where the newest attempt of a job writes."""
    attempt = ganq.job(job_id)["attempt"]
    return Path(ganq.env["GANQ_VOLUME"]) / "jobs" / f"{job_id:06d}" / f"a{attempt}"


def weights(folder: Path) -> str:
    """One hash over every tensor of a checkpoint folder's state, name by name."""
    import numpy as np
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "state.safetensors").items()):
        digest.update(name.encode() + str(tensor.dtype).encode() + np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def part(worker: "subprocess.Popen[bytes]", module: str) -> psutil.Process | None:
    """Return a process of a worker's family by its module or room: worker.supervisor or worker.runner."""
    for process in _family(worker.pid):
        try:
            if any(one == module or one.startswith(f"{module}.") for one in process.cmdline()):
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def the_part(worker: "subprocess.Popen[bytes]", module: str) -> psutil.Process:
    """Return the same process; fail the test if there is none."""
    found = part(worker, module)
    assert found is not None, f"the worker has no process {module}"
    return found


def put_to_sleep(processes: Iterable[psutil.Process], database: "Database") -> None:
    """
    Stop processes (SIGSTOP) outside of their transactions.

    One that is stopped within keeps what it has locked, on SQLite the right to write, and a test
    would wait for that instead of for what it is about (docs/guarantees.md, what is not promised).

    Raises:
        StoppedInAWriteError: one that had stopped at a failpoint did so while another thread of it wrote.
    """
    awake = [one for one in processes if one.status() != psutil.STATUS_STOPPED]
    for _ in range(10):
        for one in awake:
            one.suspend()
        until(lambda: all(one.status() == psutil.STATUS_STOPPED for one in awake), what="all asleep")
        if _others_can_write(database):
            return
        for one in awake:
            one.resume()
        time.sleep(0.05)
    raise StoppedInAWriteError


class StoppedInAWriteError(AssertionError):
    """A test's bad luck: begin again."""


def bury(worker: "subprocess.Popen[bytes]") -> None:
    """Kill a worker with all its processes, so that their locks are released."""
    for one in [*psutil.Process(worker.pid).children(recursive=True), psutil.Process(worker.pid)]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    worker.wait(10)


def _others_can_write(database: "Database") -> bool:
    if database.engine.dialect.name != "sqlite":
        return True
    import sqlite3

    other = sqlite3.connect(str(database.engine.url.database), timeout=1.0, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
    except sqlite3.OperationalError:
        return False
    finally:
        other.close()
    return True


def until(true: Callable[..., Any], *, within_s: float = START_S, what: str = "") -> Any:
    """Wait for something that real processes bring about."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        found = true()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"did not come about within {within_s:.0f} s: {what or true}")
