"""
The power test: each of the five guards is taken out, and the checker must find the damage.

Each scenario makes the zombie, or the race, or the crash that its guard is for. With the
guard in place it shows nothing; without it, at least one violation. A harness that cannot
fail proves nothing. What the fsync guard keeps from a real power cut is in
test_power_cut.py; here its absence shows in the order of the system calls.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from chaos.guards import without
from chaos.invariants import look, table_violations, violations
from chaos.test_volume_faults import traced
from machine import Ganq, StoppedInAWriteError, bury, part, put_to_sleep, until
from results import add_model
from sqlalchemy import text
from tables import job_row

from storage.db.engine import Database
from storage.volume.layout import Volume

if TYPE_CHECKING:
    from storage.db.rows import Job
    from storage.settings import Settings

sqlite_only = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
ROOT = Path(__file__).parents[2]


def stopped(process: psutil.Process | None) -> bool:
    return process is not None and process.status() == psutil.STATUS_STOPPED


class Play:
    """A worker that will fall asleep at a point, and an heir that takes its time."""

    def __init__(self, ganq: Ganq, database: Database, settings: "Settings", guard_out: str) -> None:
        self.ganq = ganq
        self.database = database
        self.volume = Volume(settings.volume)
        self.env = {"GANQ_ENABLE_FAILPOINTS": "1", **without(guard_out)}

    def zombie(self, points: str, what: str, *submit: str) -> tuple[int, psutil.Process]:
        """The job whose first attempt sleeps at the point, and its process that does."""
        for _ in range(3):
            worker = self.ganq.start_worker("zombie", **self.env, GANQ_FAILPOINTS=points)
            self.worker = worker
            job = int(self.ganq.json("submit", *submit)["id"])
            until(partial(self._sleeps, what), what=f"{what} at {points}")
            process = part(worker, f"worker.{what}")
            assert process is not None
            try:
                put_to_sleep([process], self.database)
            except StoppedInAWriteError:
                bury(worker)
                self.ganq("cancel", str(job))
            else:
                return job, process
        raise StoppedInAWriteError

    def _sleeps(self, what: str) -> bool:
        return stopped(part(self.worker, f"worker.{what}"))

    def heir(self, job: int, points: str = "") -> None:
        """The second attempt runs and has begun to work."""
        self.ganq.start_worker("heir", **self.env, GANQ_FAILPOINTS=points)

        def works() -> bool:
            row = job_row(self.database, job)
            return row["attempt"] == 2 and bool((row["progress"] or {}).get("done"))

        if points:
            until(works, what="the heir at work")
        else:
            until(lambda: job_row(self.database, job)["state"] == "succeeded", what="the heir's success")

    def ended(self, job: int) -> None:
        until(lambda: job_row(self.database, job)["state"] == "succeeded", what="the end of the job")

    def violations(self) -> list[str]:
        return violations(self.database, self.volume)


SLOW_PICTURES = "generate.drawn=sleep:0.3@1+"
SLOW_STEPS = "train.stepped=sleep:0.15@1+"


def finish(play: Play, settings: "Settings", small: list[str]) -> list[str]:
    """A zombie publishes while its heir draws: the row then points to a result that is not there."""
    add_model(settings)
    submit = ("generate", "--from", "m", "--micro-batch", "4", "--count", "40", "--grid", "16")
    job, supervisor = play.zombie("supervisor.before_finish=stop", "supervisor", *submit)
    play.heir(job, SLOW_PICTURES)
    supervisor.resume()
    play.ended(job)
    return play.violations()


def register(play: Play, settings: "Settings", small: list[str]) -> list[str]:
    """A zombie registers a checkpoint while its heir trains."""
    submit = ("train", *small, "--epochs", "2", "--save-every", "1")
    job, supervisor = play.zombie("supervisor.before_register=stop", "supervisor", *submit)
    play.heir(job, SLOW_STEPS)
    supervisor.resume()
    until(
        lambda: (
            f"job {job}: lease released" in play.ganq.log("zombie") or look(play.database).checkpoints[job]
        ),
        what="the zombie's move",
    )
    play.ended(job)
    return play.violations()


def share_a_folder(play: Play, settings: "Settings", small: list[str]) -> list[str]:
    """A zombie's runner goes on where its heir has written: it clears the place for its own checkpoint."""
    submit = ("train", *small, "--epochs", "2", "--save-every", "1")
    job, runner = play.zombie("train.stepped=stop@3;folder.begun=stop@1", "runner", *submit)
    supervisor = part(play.worker, "worker.supervisor.loop")
    assert supervisor is not None
    put_to_sleep([supervisor], play.database)
    play.heir(job)
    runner.resume()
    time.sleep(0.2)
    until(lambda: stopped(runner), what="the zombie's first save")
    found = play.violations()
    supervisor.resume()
    runner.resume()
    return found


SCENARIOS: dict[str, tuple["Callable[[Play, Settings, list[str]], list[str]]", str]] = {
    "finish_fence": (finish, "I5"),
    "checkpoint_fence": (register, "I4"),
    "attempt_folder": (share_a_folder, "I7"),
}


@pytest.mark.tier2
@sqlite_only
@pytest.mark.parametrize("name", SCENARIOS)
def test_without_the_guard_there_is_a_violation(
    ganq: Ganq, database: Database, settings: "Settings", small: list[str], name: Any
) -> None:
    scenario, law = SCENARIOS[name]
    found = scenario(Play(ganq, database, settings, name), settings, small)
    assert any(one.startswith(law) for one in found), found


@pytest.mark.tier2
@sqlite_only
@pytest.mark.parametrize("name", SCENARIOS)
def test_with_the_guard_there_is_none(
    ganq: Ganq, database: Database, settings: "Settings", small: list[str], name: Any
) -> None:
    scenario, _ = SCENARIOS[name]
    assert scenario(Play(ganq, database, settings, ""), settings, small) == []


@pytest.mark.tier2
@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("out", [True, False], ids=["guard out", "guard in"])
def test_each_guard_is_needed_on_postgres_too(
    ganq: Ganq, database: Database, settings: "Settings", small: list[str], name: Any, out: bool
) -> None:
    scenario, law = SCENARIOS[name]
    found = scenario(Play(ganq, database, settings, name if out else ""), settings, small)
    assert any(one.startswith(law) for one in found) if out else not found, found


# --- claims: two guards, of which either is enough ----------------------------------------------

JOBS = 60
CLAIMER = f"""
import sys, time
from pathlib import Path
from sqlalchemy.exc import IntegrityError
from jobs.kinds import SPEC_VERSION
from storage.db.engine import Database
from storage.db.store import JobStore
from storage.db.rows import WorkerIdentity
from storage.settings import Settings

who = WorkerIdentity(sys.argv[1], "host", "cpu", "boot", 1, 1, ("default",), "0")
store = JobStore(Database(Settings.load()))
store.running()
Path(sys.argv[2]).touch()
while not Path(sys.argv[3]).exists():
    pass
for _ in range({JOBS}):
    try:
        store.claim(who, kinds=("train",), spec_version=SPEC_VERSION)
    except IntegrityError:
        pass
"""


def race(settings_env: dict[str, str], tmp_path: Path, guard_out: str) -> None:
    """Two processes claim at a barrier until nothing is left."""
    env = {**os.environ, **settings_env, **without(guard_out)}
    ready, go = [tmp_path / "r0", tmp_path / "r1"], tmp_path / "go"
    claimers = [
        subprocess.Popen([sys.executable, "-P", "-c", CLAIMER, f"w{n}", str(ready[n]), str(go)], env=env)
        for n in range(2)
    ]
    try:
        until(lambda: all(one.exists() for one in ready), what="both at the barrier")
        go.touch()
        assert [one.wait(60) for one in claimers] == [0, 0]
    finally:
        for one in claimers:
            one.kill()


@pytest.mark.parametrize(
    ("index", "cas", "safe"),
    [(False, True, True), (True, False, True), (False, False, False)],
    ids=["only the compare-and-set", "only the index", "neither"],
)
def test_either_the_index_or_the_compare_and_set_keeps_two_from_one_job(
    database: Database,
    settings_env: dict[str, str],
    job_factory: "Callable[..., Job]",
    tmp_path: Path,
    index: bool,
    cas: bool,
    safe: bool,
) -> None:
    for _ in range(JOBS):
        job_factory()
    if not index:
        database.write(lambda conn: conn.execute(text("DROP INDEX uq_attempt_open")))
    race(settings_env, tmp_path, "" if cas else "claim_cas")
    found = list(table_violations(look(database)))
    claimed = [row for row in look(database).jobs.values() if row.state == "running"]
    assert claimed
    if safe:
        assert found == []
        assert all(row.attempt == 1 for row in claimed)
    else:
        assert any(one.startswith("I3") for one in found)


# --- fsync: in the order of the system calls ------------------------------------------------------


def unsynced(calls: list[str]) -> list[str]:
    """
    What a power cut would take, by a trace: I8.

    A file has its final name before its bytes are durable, or a row is committed before
    the names that it points to are.
    """
    dirty: set[str] = set()
    names: set[str] = set()
    found = []
    for line in calls:
        if written := re.search(r"\bwrite\(\d+<([^>]*/volume/jobs/[^>]*)>", line):
            dirty.add(written[1])
        elif synced := re.search(r"\b(?:fsync|fdatasync)\(\d+<([^>]*)>\).*= 0$", line):
            dirty.discard(synced[1])
            names.discard(synced[1])
        elif re.search(r"\bsyncfs\(.*= 0$", line):
            dirty.clear()
            names.clear()
        elif moved := re.search(
            r"\brename\w*\(.*?\"([^\"]*/volume/jobs/[^\"]*)\".*?\"([^\"]*)\".*= 0$", line
        ):
            found += [
                f"I8: {moved[2]} is there, and {one} is not durable"
                for one in dirty
                if one.startswith(moved[1])
            ]
            names.add(str(Path(moved[2]).parent))
        elif made := re.search(r"\bmkdir\w*\(.*?\"([^\"]*/volume/jobs/[^\"]*)\".*= 0$", line):
            names.add(str(Path(made[1]).parent))
        elif reported := re.search(r"MARK (registered|succeeded)", line):
            found += [f"I8: a row was {reported[1]}, and the names in {one} are not durable" for one in names]
    return found


@sqlite_only
@pytest.mark.parametrize("what", ["checkpoints", "pictures"])
def test_without_fsync_the_order_is_broken_and_with_it_it_is_not(
    database: Database, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    database.dispose()
    for guard_out in ("", "fsync"):
        home = tmp_path / f"home-{guard_out}"
        home.mkdir()
        shutil.copy(database_url.removeprefix("sqlite:///"), home / "ganq.db")
        for name, value in without(guard_out).items():
            monkeypatch.setenv(name, value)
        found = unsynced(traced(home, what, tmp_path / f"log-{guard_out}"))
        assert bool(found) == bool(guard_out), found
