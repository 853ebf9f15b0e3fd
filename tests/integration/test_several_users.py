"""Two Unix users and a third account that runs the worker, on one volume that belongs to their group."""

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from machine import Ganq, until
from safetensors.torch import save_file
from services import Postgres
from sqlalchemy import make_url
from users import account, why_not

ADA, GRACE, WORKER, GROUP = 43001, 43002, 43003, 43100

pytestmark = [
    pytest.mark.slow,
    pytest.mark.tier2,
    pytest.mark.timeout(300),
    pytest.mark.parametrize("backend", ["postgres"], indirect=True),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can run commands as other users"),
    pytest.mark.skipif(
        why_not(*account(ADA, GROUP), "sh", "-c", 'exec "$0" -c 1', sys.executable) is not None,
        reason="this Python cannot be run by other users",
    ),
]


@dataclass
class Person:
    """A Unix user with a home, a group and the commands."""

    uid: int
    home: Path
    env: dict[str, str]

    def run(self, *arguments: str, umask: str = "027") -> "subprocess.CompletedProcess[str]":
        shell = f'umask {umask}; exec "$@"'
        command = (*account(self.uid, GROUP), "sh", "-c", shell, "sh", sys.executable, "-P", "-m", "cli.main")
        return subprocess.run(
            [*command, *arguments],
            env=self.env,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def __call__(self, *arguments: str, code: int = 0, umask: str = "027") -> str:
        done = self.run(*arguments, umask=umask)
        assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, *arguments: str) -> int:
        """Submit a job without waiting; return its id."""
        done = self.run("submit", *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return int(json.loads(done.stdout)["id"])


@dataclass
class Lab:
    ganq: Ganq
    volume: Path
    ada: Person
    grace: Person


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that all users may enter; those of pytest are root's own."""
    with tempfile.TemporaryDirectory(prefix="gq-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def lab(ganq: Ganq, postgres: Postgres, database_url: str, place: Path) -> Lab:
    """A volume of the group with the setgid bit, and private homes."""
    ganq.folder = place
    volume = place / "shared"
    volume.mkdir()
    os.chown(volume, WORKER, GROUP)
    volume.chmod(0o2770)
    url = postgres.tcp_url(str(make_url(database_url).database))
    people = {}
    for name, uid in (("ada", ADA), ("grace", GRACE), ("worker", WORKER)):
        home = place / name
        home.mkdir(mode=0o700)
        os.chown(home, uid, uid)
        env = {**ganq.env, "GANQ_HOME": str(home), "GANQ_VOLUME": str(volume), "GANQ_DATABASE_URL": url}
        env |= {"HOME": str(home), "USER": name, "LOGNAME": name, "GANQ_USER": name, "TMPDIR": "/tmp"}
        people[name] = Person(uid, home, env)
    ganq.start_worker(within=account(WORKER, GROUP), **people["worker"].env)
    return Lab(ganq, volume, people["ada"], people["grace"])


def images(folder: Path, owner: int, mode: int) -> Path:
    from PIL import Image

    folder.mkdir()
    for i in range(32):
        Image.effect_noise((16, 16), 10 + i).convert("RGB").save(folder / f"{i}.png")
    for path in (folder, *folder.iterdir()):
        os.chown(path, owner, GROUP)
        path.chmod(0o750 if path.is_dir() else 0o640)
    folder.chmod(mode)
    return folder


SMALL = ("--size", "16", "--ngf", "4", "--ndf", "4", "--nz", "8", "--batch", "16", "--metric", "none")


def test_each_runs_every_command_on_her_own_jobs(lab: Lab, place: Path) -> None:
    data = images(place / "faces", ADA, 0o750)
    ada, grace = lab.ada, lab.grace
    ada("submit", "train", "--data", str(data), *SMALL, "--epochs", "2", "--name", "hers", "--wait")
    ada("export", "hers", "--out", str(ada.home / "weights"))
    exported = next((ada.home / "weights").glob("netg*"))
    assert exported.stat().st_uid == ADA
    ada("import", str(exported), "--name", "again", umask="077")
    out = ada.home / "images"
    ada("submit", "generate", "--from", "again", "--count", "4", "--out", str(out), "--wait", umask="077")
    copied = [out, *out.rglob("*")]
    assert len(list((out / "images").iterdir())) == 4
    assert {path.stat().st_uid for path in copied} == {ADA}, "the client copies, as its user"
    for path in lab.volume.rglob("*"):
        about = path.lstat()
        if not path.is_symlink():
            assert about.st_gid == GROUP, path
            assert about.st_mode & stat.S_IRGRP, path
            assert about.st_mode & stat.S_IROTH == 0 or about.st_uid == WORKER, path
    later = ada.home / "later"
    job = ada.submit("generate", "--from", "again", "--count", "4", "--out", str(later))
    until(lambda: lab.ganq.peek(job)["state"] == "succeeded", what="the generation")
    assert not later.exists(), "a worker writes only to the volume"
    shown = ada("status", str(job))
    assert f"to {later}: the worker runs as another account" in shown
    assert f"→ ganq download {job}" in shown
    grace("wait", str(job))
    assert not later.exists(), "somebody else's wait copies nothing"
    assert ada("download", str(job)) == f"{later}\n"
    assert "not copied" not in ada("status", str(job))
    for command in (
        ("logs", "hers"),
        ("events", "hers"),
        ("open", "hers", "--print"),
        ("checkpoints", "hers"),
    ):
        ada(*command)
    assert "a job of ada" in grace("rm", "hers", "--yes", code=1)
    assert list((lab.volume / "jobs").glob("000001/a1/checkpoints/*"))
    until(lambda: ada.run("rm", "again", str(job), "--yes").returncode == 0, what="the end of the grace")
    assert not list((lab.volume / "jobs").glob("000002/a1/checkpoints/*"))


def test_a_data_set_that_the_worker_may_not_read_is_refused_with_the_reason(lab: Lab) -> None:
    data = images(lab.ada.home / "private", ADA, 0o700)
    until(lambda: "w1" in lab.ganq.present(), what="the worker")
    said = lab.ada("submit", "train", "--data", str(data), *SMALL, "--epochs", "1", code=1)
    assert f"may not read {lab.ada.home}" in said
    assert "Several Unix users" in said


def test_a_job_whose_data_became_unreadable_fails_at_once(lab: Lab, place: Path) -> None:
    data = images(place / "faces", ADA, 0o750)
    job = lab.ada.submit("train", "--data", str(data), *SMALL, "--epochs", "1", "--hold")
    data.chmod(0o700)
    lab.ada("release", str(job))
    until(lambda: lab.ganq.peek(job)["state"] == "failed", what="the failure")
    row = lab.ganq.peek(job)
    assert row["error_code"] == "BAD_DATASET"
    assert row["error_message"] == f"the worker's user worker may not read {data}"
    assert row["attempt"] == 1


def test_an_import_that_the_workers_could_not_read_is_refused(lab: Lab) -> None:
    until(lambda: (lab.volume / "jobs").is_dir(), what="the volume's folders")
    lab.volume.chmod(0o770)  # no longer of the group
    for folder in lab.volume.iterdir():
        folder.chmod(0o770)
    from jobs.networks.dcgan import Architecture

    weights = lab.ada.home / "netg.safetensors"
    save_file(Architecture(size=16, nz=8, ngf=4, ndf=4).build_generator(1).state_dict(), weights)
    os.chown(weights, ADA, ADA)
    said = lab.ada("import", str(weights), "--name", "mine", umask="077", code=2)
    assert "could not read the imported weights" in said
    assert not list((lab.volume / "jobs").glob("*/a1"))


def test_a_role_that_may_only_read_is_named(lab: Lab, postgres: Postgres, database_url: str) -> None:
    import psycopg

    name = str(make_url(database_url).database)
    with psycopg.connect(postgres.conninfo(name), autocommit=True) as conn:
        conn.execute("DROP ROLE IF EXISTS reader")
        conn.execute("CREATE ROLE reader LOGIN PASSWORD 'r'")
        conn.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    lab.ada.env["GANQ_DATABASE_URL"] = (
        postgres.tcp_url(name).replace("ganq:", "reader:").replace(postgres.password, "r")
    )
    lab.ada("status")
    said = lab.ada("limit", "--user", "ada", "2", code=1)
    assert "this database role may not change jobs" in said
    assert "defect" not in said
