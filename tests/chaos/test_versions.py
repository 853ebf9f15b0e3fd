"""
Old and new code on old and new schemas: F45 of the fault matrix, with wheels that are really built.

    now        this checkout
    newer      one migration that only adds a column, the next SCHEMA_REVISION and SPEC_VERSION
    breaking   newer, and one migration that takes something away and says so

Each is unpacked into a folder of its own and put on PYTHONPATH: the same dependencies.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from machine import Ganq, part, postgres_later, until
from sqlalchemy import text

from jobs.kinds import SPEC_VERSION
from storage.db.engine import SCHEMA_REVISION, Database

if TYPE_CHECKING:
    from storage.settings import Settings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NEWER = f"{int(SCHEMA_REVISION) + 1:04d}"
BREAKING = f"{int(SCHEMA_REVISION) + 2:04d}"

ADDS = f'''
"""Adds: older code goes on."""
import sqlalchemy as sa
from alembic import op

revision = "{NEWER}"
down_revision = "{SCHEMA_REVISION}"


def upgrade() -> None:
    flavour = sa.Column("flavour", sa.String(16), server_default=sa.text("'plain'"), nullable=False)
    op.add_column("job", flavour)
'''
BREAKS = f'''
"""Takes away: older code must go."""
from alembic import op

revision = "{BREAKING}"
down_revision = "{NEWER}"


def upgrade() -> None:
    op.execute("ALTER TABLE job DROP COLUMN flavour")
    op.execute("UPDATE schema_info SET compatible_from = '{BREAKING}'")
'''


def replaced(path: Path, pattern: str, by: str) -> None:
    before = path.read_text()
    after, times = re.subn(pattern, by, before, flags=re.MULTILINE)
    assert times == 1, f"{pattern} stands {times} times in {path.name}"
    path.write_text(after)


def build(tree: Path, into: Path) -> Path:
    """Build a wheel of a tree and unpack it."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(into), str(tree)]
    subprocess.run(command, check=True, capture_output=True, timeout=180)
    [wheel] = into.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(into / "lib")
    return into / "lib"


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder to put on PYTHONPATH, by build."""
    base = tmp_path_factory.mktemp("wheels")
    tree = base / "tree"
    tree.mkdir()
    for name in ("cli", "worker", "storage", "jobs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("ganq_entry.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    built = {"now": build(tree, base / "now")}

    versions = tree / "storage" / "db" / "migrations" / "versions"
    engine, kinds = tree / "storage" / "db" / "engine.py", tree / "jobs" / "kinds.py"
    (versions / f"v{NEWER}_adds.py").write_text(ADDS)
    replaced(engine, r'^SCHEMA_REVISION = ".*"$', f'SCHEMA_REVISION = "{NEWER}"')
    replaced(kinds, r"^SPEC_VERSION = \d+$", f"SPEC_VERSION = {SPEC_VERSION + 1}")
    flavour = 'Column("flavour", String(16), nullable=False, server_default=text("\'plain\'")),'
    replaced(
        tree / "storage" / "db" / "tables.py",
        r'^    Index\("ix_job_state_id"',
        f'    {flavour}\n    Index("ix_job_state_id"',
    )
    replaced(tree / "pyproject.toml", r'^version = ".*"$', 'version = "9.1.0"')
    shutil.rmtree(tree / "build", ignore_errors=True)
    built["newer"] = build(tree, base / "newer")

    (versions / f"v{BREAKING}_breaks.py").write_text(BREAKS)
    replaced(engine, r'^SCHEMA_REVISION = ".*"$', f'SCHEMA_REVISION = "{BREAKING}"')
    replaced(tree / "storage" / "db" / "tables.py", r'^    Column\("flavour".*\n', "")
    replaced(tree / "pyproject.toml", r'^version = ".*"$', 'version = "9.2.0"')
    shutil.rmtree(tree / "build", ignore_errors=True)
    built["breaking"] = build(tree, base / "breaking")
    return built


@pytest.fixture
def settings_env(settings: Any, empty_database_url: str) -> dict[str, str]:
    """Settings of a machine whose database has no tables yet: a build creates them."""
    from dataclasses import fields

    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    values["database_url"] = empty_database_url
    return {f"GANQ_{name.upper()}": str(value) for name, value in values.items() if value is not None}


class Machine:
    """One database and volume, and ganq in several builds."""

    def __init__(self, env: dict[str, str], folder: Path, wheels: dict[str, Path]) -> None:
        self.builds = {name: Ganq({**env, "PYTHONPATH": str(path)}, folder) for name, path in wheels.items()}

    def __getitem__(self, build: str) -> Ganq:
        return self.builds[build]

    def revision(self) -> str:
        return str(self["now"].json("db", "status")["schema"])


@pytest.fixture
def machine(settings_env: dict[str, str], tmp_path: Path, wheels: dict[str, Path]) -> Iterator[Machine]:
    found = Machine(settings_env, tmp_path, wheels)
    found["now"]("db", "upgrade")
    yield found
    for one in found.builds.values():
        one.stop()


LONG = ("--epochs", "100000", "--checkpoint-seconds", "0.5")


def test_each_build_runs_its_own_code(wheels: dict[str, Path]) -> None:
    ask = (
        "import storage.db.engine as e, jobs.kinds as k; print(e.__file__, e.SCHEMA_REVISION, k.SPEC_VERSION)"
    )
    for name, revision, spec in (
        ("now", SCHEMA_REVISION, SPEC_VERSION),
        ("newer", NEWER, SPEC_VERSION + 1),
        ("breaking", BREAKING, SPEC_VERSION + 1),
    ):
        env = {**os.environ, "PYTHONPATH": str(wheels[name])}
        result = subprocess.run(
            [sys.executable, "-P", "-c", ask], env=env, capture_output=True, text=True, check=True
        ).stdout.split()
        assert result == [str(wheels[name] / "storage" / "db" / "engine.py"), revision, str(spec)]


@pytest.mark.tier2
@postgres_later
def test_a_migration_during_a_run_affects_nobody_and_newer_specs_wait_for_newer_workers(
    machine: Machine, small: list[str]
) -> None:
    now, newer = machine["now"], machine["newer"]
    worker = now.start_worker("old")
    job = now.json("submit", "train", *small, *LONG)["id"]
    until(lambda: now.json("checkpoints", str(job)), what="a checkpoint")
    assert f"→ {NEWER}" in newer("db", "upgrade")
    step = now.json("checkpoints", str(job))[-1]["step"]
    until(lambda: now.json("checkpoints", str(job))[-1]["step"] > step, what="a checkpoint on the new schema")
    assert now.job(job)["attempt"] == 1
    assert now.json("db", "status")["usable"] is True
    now("cancel", str(job))
    until(lambda: now.job(job)["state"] == "cancelled", what="the cancel")

    from_new = newer.json("submit", "train", *small, "--epochs", "1", "--priority", "9")["id"]
    from_old = now.json("submit", "train", *small, "--epochs", "1")["id"]
    assert now.run("wait", str(from_old), "--timeout", "60").returncode == 0
    assert now.job(from_new)["state"] == "queued", "an old worker took what it does not know"
    assert worker.poll() is None
    newer.start_worker("new")
    assert newer.run("wait", str(from_new), "--timeout", "60").returncode == 0
    assert newer.job(from_new)["worker"] == "new"


def test_new_code_never_runs_on_an_old_schema_and_never_migrates_by_itself(
    machine: Machine, small: list[str]
) -> None:
    newer = machine["newer"]
    for command in (("worker", "--gpus", "none"), ("submit", "train", *small), ("status",)):
        result = newer.run(*command)
        assert result.returncode == 1, command
        assert "is older" in result.stderr
        assert "ganq db upgrade" in result.stderr
        assert "Traceback" not in result.stderr
    assert machine.revision() == SCHEMA_REVISION


@pytest.mark.tier2
@postgres_later
def test_a_breaking_migration_drains_old_workers_and_the_job_continues_with_new_ones(
    machine: Machine, small: list[str]
) -> None:
    now, newer, breaking = machine["now"], machine["newer"], machine["breaking"]
    busy, idle = now.start_worker("busy"), None
    job = now.json("submit", "train", *small, "--epochs", "400", "--checkpoint-seconds", "0.5")["id"]
    until(lambda: now.json("checkpoints", str(job)), what="a checkpoint")
    idle = now.start_worker("idle")
    until(lambda: len(now.json("workers")) == 2, what="the idle worker")
    runner = part(busy, "worker.runner.main")
    breaking("db", "upgrade")
    assert [one.wait(timeout=40) for one in (busy, idle)] == [1, 1]
    assert runner is not None
    assert not runner.is_running()
    for name in ("busy", "idle"):
        log = now.log(name)
        assert "returns its job and stops" in log
        assert f"newer (schema {BREAKING})" in log
        assert "install the ganq that made it" in log
        assert "Traceback" not in log
    found = breaking.job(job)
    assert found["state"] == "queued"
    assert [one["outcome"] for one in found["attempts"]] == ["requeued"]
    for old in (now, newer):
        assert old.run("submit", "train", *small).returncode == 1
    breaking.start_worker("next")
    assert breaking.run("wait", str(job), "--timeout", "120").returncode == 0
    assert [one["outcome"] for one in breaking.job(job)["attempts"]] == ["requeued", "succeeded"]
    assert "resuming at step" in breaking("logs", str(job))


@postgres_later
def test_a_schema_on_which_not_even_the_release_works_ends_the_worker_with_a_message(
    machine: Machine, small: list[str], settings: "Settings", settings_env: dict[str, str]
) -> None:
    now = machine["now"]
    worker = now.start_worker("old")
    job = now.json("submit", "train", *small, *LONG)["id"]
    until(lambda: now.json("checkpoints", str(job)), what="a checkpoint")
    database = Database(
        type(settings)(**{**vars(settings), "database_url": settings_env["GANQ_DATABASE_URL"]})
    )

    def break_it(conn: Any) -> None:
        conn.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        conn.execute(text("UPDATE schema_info SET compatible_from = '9999'"))
        conn.execute(text("ALTER TABLE job RENAME COLUMN rung_at TO bell_at"))

    database.write(break_it)
    assert worker.wait(timeout=40) == 1
    assert "Traceback" not in now.log("old")
    assert "newer (schema 9999)" in now.log("old")
    state = database.read(lambda conn: conn.execute(text(f"SELECT state FROM job WHERE id = {job}")).scalar())
    assert state in ("running", "queued"), "a worker of the new schema can take it back"
    database.dispose()


def test_upgrades_of_two_versions_at_once_end_in_the_newer_schema(
    settings_env: dict[str, str], tmp_path: Path, wheels: dict[str, Path], empty_database_url: str
) -> None:
    machine = Machine(settings_env, tmp_path, wheels)
    names = ["now", "newer", "newer", "now"]
    running = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "cli.main", "db", "upgrade"],
            env=machine[name].env,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in names
    ]
    result = [one.communicate(timeout=90)[0] for one in running]
    assert [one.returncode for one in running] == [0, 0, 0, 0], result
    assert machine.revision() == NEWER
    assert machine["newer"].json("db", "status")["usable"] is True
