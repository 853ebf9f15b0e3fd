"""
A rolling upgrade: workers of ganq 0.2 and of this code side by side, through each migration.

    GANQ_TEST_0_2=…/bin/ganq pytest -m tier3 tests/compatibility/test_rolling_upgrade.py

GANQ_TEST_0_2 names the program of an installation of ganq 0.2 (commit 7c878f0). Minutes.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from machine import Ganq, until
from results import attempt_folder, result_files

from storage.db.engine import SCHEMA_REVISION, Database
from storage.db.schema import upgrade
from storage.settings import Settings

OLD = "GANQ_TEST_0_2"
PROGRAM = os.environ.get(OLD)
"""Read here, because tests begin without variables of GANQ."""
OLD_SCHEMA = 3
NEWER = [f"{number:04d}" for number in range(OLD_SCHEMA + 1, int(SCHEMA_REVISION) + 1)]

pytestmark = [
    pytest.mark.tier3,
    pytest.mark.timeout(1800),
    pytest.mark.parametrize("backend", ["postgres"], indirect=True),
    pytest.mark.skipif(PROGRAM is None, reason=f"no ganq 0.2: {OLD} names its program"),
]


class Both:
    """One table and one volume, and ganq in two versions."""

    def __init__(self, env: dict[str, str], folder: Path) -> None:
        self.old, self.new = Ganq(env, folder, program=PROGRAM), Ganq(env, folder)
        self.volume = Path(env["GANQ_HOME"]) / "volume"

    def by(self, job: int) -> list[tuple[str, str]]:
        """Return worker and outcome of each attempt."""
        return [(one["worker"], one["outcome"]) for one in self.new.job(job)["attempts"]]

    def succeeded(self, job: int) -> dict[str, Any]:
        until(lambda: self.old.job(job)["state"] not in ("queued", "running"), what=f"the end of job {job}")
        found = self.old.job(job)
        assert found["state"] == "succeeded", found
        return found

    def bytes_of(self, job: int) -> dict[str, bytes]:
        return result_files(attempt_folder(self.volume, self.new.job(job)))


@pytest.fixture
def both(empty_database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Both]:
    env = {"GANQ_HOME": str(tmp_path / "home"), "GANQ_USER": "ada", "GANQ_REDIS_URL": redis_url}
    env |= {"GANQ_DATABASE_URL": empty_database_url, "GANQ_POLL_SECONDS": "0.5"}
    env |= {"GANQ_HEARTBEAT_SECONDS": "0.5", "GANQ_LEASE_SECONDS": "5", "GANQ_REAP_SECONDS": "0.5"}
    found = Both(env, tmp_path)
    yield found
    found.new.stop()
    found.old.stop()


def migrate(url: str, revision: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what `ganq db upgrade` does, up to one migration."""
    database = Database(Settings(home=home, volume=home, database_url=url, redis_url="", user="ada"))
    to_head = command.upgrade
    with monkeypatch.context() as only:
        only.setattr(command, "upgrade", lambda config, _: to_head(config, revision))
        upgrade(database)
    database.dispose()


def test_workers_of_both_versions_go_on_through_each_migration(
    both: Both,
    small: list[str],
    empty_database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = both.old, both.new
    assert old("--version").split()[-1].startswith("0.2")
    old("db", "upgrade")
    worker = old.start_worker("old")
    training = old.json("submit", "train", *small, "--epochs", "3")["id"]
    both.succeeded(training)
    images = ("submit", "generate", "--from", str(training), "--count", "24", "--micro-batch", "4")
    before = old.json(*images)["id"]
    both.succeeded(before)

    for revision in NEWER:
        busy = old.json("submit", "train", *small, "--epochs", "60")["id"]
        until(lambda job=busy: old.job(job)["state"] == "running", what="the old worker is busy")
        migrate(empty_database_url, revision, tmp_path, monkeypatch)
        assert old.json("db", "status")["usable"] is True, revision
        both.succeeded(busy)
        assert both.old.job(busy)["attempt"] == 1, f"migration {revision} cost an attempt"
        after = old.json(*images)["id"]
        both.succeeded(after)
        assert worker.poll() is None

    new.start_worker("new")
    until(lambda: len(new.json("workers")) == 2, what="both workers")
    jobs = [(old if n % 2 else new).json(*images)["id"] for n in range(8)]
    newest = new.json("submit", "train", *small, "--epochs", "2")["id"]
    long = old.json("submit", "train", *small, "--epochs", "60", "--checkpoint-seconds", "0.5")["id"]
    for job in jobs:
        both.succeeded(job)
    both.succeeded(newest)
    assert [name for name, _ in both.by(newest)] == ["new"], "an old worker took what it does not know"
    both.succeeded(long)

    # The same spec of 0.2 has the same bytes, whoever ran it.
    worker.terminate()
    assert worker.wait(60) == 0
    last = old.json(*images)["id"]
    both.succeeded(last)
    assert both.by(last) == [("new", "succeeded")]
    assert both.bytes_of(last) == both.bytes_of(before)
    for job in [training, before, *jobs, newest, long, last]:
        assert [outcome for _, outcome in both.by(job)] == ["succeeded"]


def test_a_training_moves_from_an_old_worker_to_a_new_one_during_the_upgrade(
    both: Both, small: list[str]
) -> None:
    old, new = both.old, both.new
    old("db", "upgrade")
    worker = old.start_worker("old")
    train = ("submit", "train", *small, "--epochs", "200", "--checkpoint-seconds", "0.5")
    moved, whole = old.json(*train)["id"], old.json(*train)["id"]
    until(lambda: old.json("checkpoints", str(moved)), what="a checkpoint")
    new("db", "upgrade")
    new.start_worker("new")
    until(lambda: len(new.json("workers")) == 2, what="both workers")
    worker.terminate()
    assert worker.wait(60) == 0
    both.succeeded(moved)
    both.succeeded(whole)
    assert both.by(moved) == [("old", "requeued"), ("new", "succeeded")]
    digests = [new.json("checkpoints", str(job))[-1] for job in (moved, whole)]
    assert weights_of(both, digests[0]) == weights_of(both, digests[1])


def weights_of(both: Both, checkpoint: dict[str, Any]) -> str:
    from machine import weights

    return weights(both.volume / checkpoint["path"])
