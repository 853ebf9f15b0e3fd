"""A machine that sees only a server's port: commands, `import ganq`, uploads and downloads."""

import hashlib
import http.client
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from browser.serving import Server, environment
from browser.world import World, build
from chaos.proxy import Proxy
from safetensors.torch import save_file
from sqlalchemy import insert
from unit.jobs.local_context import LocalContext

import ganq
from jobs.errors import (
    ForbiddenError,
    InvalidTransitionError,
    JobNotFoundError,
    ServerUnavailableError,
    SpecError,
    SubmitKeyReusedError,
    UnauthenticatedError,
)
from jobs.generation import generate
from jobs.networks.dcgan import Architecture
from jobs.specs import GenerateSpec
from storage.db.queries import Filter, Queries
from storage.db.tables import event
from storage.db.tokens import Role, Tokens
from storage.db.workers import WorkerStore
from storage.results.passport import read_passport, with_passport
from storage.results.writer import ImageFiles
from storage.volume.checkpoints import read_checkpoint

if TYPE_CHECKING:
    from storage.db.rows import WorkerIdentity
    from storage.settings import Settings

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Laptop:
    """A home of its own, and the address of a server."""

    env: dict[str, str]

    def __call__(self, *args: object, code: int = 0) -> str:
        """Run a command; return what it printed."""
        done = self.run(*args)
        assert done.returncode == code, (args, done.returncode, done.stderr)
        return done.stdout

    def run(self, *args: object) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            self.command(*args),
            env=self.env,
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done

    def command(self, *args: object) -> list[str]:
        return [sys.executable, "-P", "-m", "cli.main", *map(str, args)]


@pytest.fixture
def world(settings: "Settings") -> Iterator[World]:
    made = World(settings)
    made.database.require_schema()
    yield made
    made.close()


@pytest.fixture
def server(world: World) -> Iterator[Server]:
    started = Server(environment(world.settings), ("--port", "0", "--allow-changes")).start()
    yield started
    started.stop()


@pytest.fixture
def token(world: World) -> str:
    return Tokens(world.database).create("ada", Role.SUBMITTER, None)[1]


@pytest.fixture
def laptop(server: Server, token: str, tmp_path: Path) -> Laptop:
    return laptop_of(server.base, token, tmp_path)


def laptop_of(url: str, token: str, tmp_path: Path) -> Laptop:
    home = tmp_path / "laptop"
    home.mkdir(exist_ok=True)
    (home / "token").write_text(token + "\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith("GANQ_")}
    # No database, no Redis, no volume: what is not there must not be asked for.
    env |= {"GANQ_HOME": str(home), "GANQ_DATABASE_URL": "sqlite:////nowhere/ganq.db"}
    env |= {"GANQ_REDIS_URL": "redis://127.0.0.1:1/0", "GANQ_VOLUME": "/nowhere"}
    return Laptop({**env, "GANQ_API_URL": url, "GANQ_API_TOKEN_FILE": str(home / "token")})


@pytest.fixture
def client(server: Server, token: str) -> Iterator[ganq.Client]:
    with ganq.connect(server.base, token=token) as client:
        yield client


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number in range(70):
        (folder / ("more" if number % 2 else ".") / f"{number}.png").write_bytes(f"image {number}".encode())
    return folder


def model_of(world: World) -> int:
    job = world.submit("model")
    world.begin(job, state="succeeded", result={"epoch": 24})
    world.add_checkpoint(job, 24, 0.5)
    return job


def blobs(world: World) -> list[Path]:
    return [path for path in (world.volume.root / "uploads" / "blobs").rglob("*") if path.is_file()]


def kept(folder: Path) -> dict[str, bytes]:
    """The files of a result by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# --- commands ---------------------------------------------------------------------------------


@pytest.mark.tier2_on("postgres")
def test_the_commands_work_as_at_home(laptop: Laptop, world: World, image_folder: Path) -> None:
    assert "no jobs yet" in laptop("status")
    done = laptop.run("submit", "train", "--data", image_folder, "--name", "faces", "--hold")
    assert "job 1 (faces): train accepted, held" in done.stdout
    assert "no worker is running" in done.stderr

    row = json.loads(laptop("status", "faces", "--json"))
    data = Path(row["spec"]["data"])
    assert data.is_relative_to(world.volume.root / "uploads")
    assert kept(data) == kept(image_folder)
    assert row["user"] == "ada"

    before = {path: path.stat().st_mtime_ns for path in blobs(world)}
    assert len(before) == 70
    (image_folder / "more" / "new.png").write_bytes(b"one more")
    laptop("submit", "train", "--data", image_folder, "--sweep", "seed=0-1", "--name", "r")
    added = set(blobs(world)) - set(before)
    assert len(added) == 1
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert "job 1 (faces): released" in laptop("release", "faces")
    assert "job 1 (faces): held" in laptop("pause", "1")
    assert "job 1 (faces): released" in laptop("resume", "--all", "--yes")
    assert "job 1 (faces): held" in laptop("hold", "1")
    assert "priority 7" in laptop("set", "faces", "--priority", "7", "--name", "new")
    laptop("set", "new", "--label", "project=avatars", "--note", "the good one")
    assert [one["id"] for one in json.loads(laptop("status", "--label", "project", "--json"))] == [1]
    assert "the good one" in laptop("status", "new")
    assert laptop("wait", "new", "--timeout", "0.2", code=124) == ""
    assert "job 1 (new): cancelled" in laptop("cancel", "new")
    assert "job 4 (new): submitted as a retry of job 1" in laptop("retry", "1")
    listed = json.loads(laptop("status", "--json", "--all"))
    assert [one["name"] for one in listed] == ["new", "r-seed-1", "r-seed-0", "new"]
    assert [one["id"] for one in json.loads(laptop("status", "--sweep", "r", "--json"))] == [3, 2]
    assert "by=ada" in laptop("events", "1")
    assert "via=api" in laptop("events", "1")
    assert "in the queue" in laptop("status", "4")
    assert laptop("workers").startswith("no workers")
    assert "generate accepted" in laptop("submit", "generate", "--from", "4", "--count", "4")
    assert ", begins " in laptop("submit", "train", "--data", image_folder, "--begin", "now+2h")


@pytest.fixture
def all_states(world: World, settings: "Settings") -> World:
    """Jobs of every state and reason that a status can have."""
    build(settings).close()
    unstable = world.submit("unstable")
    world.begin(unstable, progress={"done": 1, "total": 9, "unit": "images"})
    preempted = world.submit("preempted")
    world.set(preempted, yielded_at=time.time(), yields=1)
    with world.database.engine.begin() as conn:
        for job_id, kind, detail in (
            (unstable, "diverged", {"reason": "loss_g is not finite"}),
            (preempted, "preempt_requested", {"waiting_job": unstable}),
        ):
            conn.execute(insert(event).values(job_id=job_id, at=time.time(), type=kind, detail=detail))
    return world


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_jobs_of_every_state_are_shown_as_at_home(
    laptop: Laptop, client: ganq.Client, all_states: World
) -> None:
    home = Laptop(environment(all_states.settings))
    here, there = (json.loads(one("status", "--all", "--json")) for one in (home, laptop))
    for row in (*here, *there):  # these change with the time
        row.pop("ran_s"), row.pop("eta_seconds")
    assert there == here
    named = {row["name"]: row for row in there}
    assert named["unstable"]["warning"] == "diverged: loss_g is not finite"
    assert named["preempted"]["status"] == f"preempted by job {named['unstable']['id']}"
    times = re.compile(r"[0-9]+ (s|min|h)\b|\s+")
    assert times.sub(" ", laptop("status", "--all")) == times.sub(" ", home("status", "--all"))
    for job in client.jobs():
        assert job.status == next(row["status"] for row in there if row["id"] == job.id)
        assert (job.priority, job.user, job.created_at > 0) == (0, job.user, True)
        assert (job.labels, job.progress, repr(job)) == (job.labels, job.progress, repr(job))
    for name in ("faces-2", "unstable", "preempted", "held", "folder", "measured"):
        assert named[name]["status"].split()[0] in laptop("status", named[name]["id"])
    assert laptop.run("wait", "unstable", "--timeout", "0.1").returncode == 124
    assert laptop.run("pause", "faces-2", "--wait", "--timeout", "0.1").returncode in (3, 124)


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_what_needs_the_table_or_a_path_says_so(laptop: Laptop, world: World, tmp_path: Path) -> None:
    assert "the files are on the server" in laptop.run("gc").stderr
    for args in (("limit",), ("token", "list"), ("webhook", "list")):
        said = laptop.run(*args)
        assert (said.returncode, "GANQ_API_URL" in said.stderr) == (2, True), (args, said.stderr)
    said = laptop.run("submit", "train", "--data", tmp_path / "nope")
    assert said.returncode == 3
    assert f"server:{tmp_path / 'nope'}" in said.stderr
    assert "needs --wait" in laptop.run("submit", "generate", "--count", "4", "--out", "x").stderr
    said = laptop.run("submit", "train", "--data", "server:/data", "--dry-run")
    assert (said.returncode, "leave out --dry-run" in said.stderr) == (3, True)
    said = laptop.run("submit", "train", "--data", "server:/data")
    assert (said.returncode, "a path of the server" in said.stderr) == (1, True), said
    assert "no data set is given" in laptop.run("submit", "train").stderr
    assert laptop.run("status", "nope").returncode == 3
    laptop.env["GANQ_API_TOKEN_FILE"] = str(tmp_path / "none")
    assert "GANQ_API_TOKEN_FILE cannot be read" in laptop.run("status").stderr
    del laptop.env["GANQ_API_TOKEN_FILE"]
    assert "there is no token" in laptop.run("status").stderr
    laptop.env["GANQ_API_TOKEN"] = "ganq_x"
    assert "not a token of ganq" in laptop.run("status").stderr
    for url in ("ftp://x", "http://[::1", "http://127.0.0.1:99999"):
        laptop.env["GANQ_API_URL"] = url
        assert "is not the URL of a server" in laptop.run("status").stderr


def test_a_path_of_the_server_and_an_archive(
    laptop: Laptop, world: World, image_folder: Path, tmp_path: Path
) -> None:
    import shutil

    archive = shutil.make_archive(str(tmp_path / "faces"), "zip", image_folder)
    laptop("submit", "train", "--data", archive, "--batch", "16")
    admin = Tokens(world.database).create("ada", Role.ADMIN, None)[1]
    Path(laptop.env["GANQ_API_TOKEN_FILE"]).write_text(admin)
    laptop("submit", "train", "--data", f"server:{image_folder}")
    first, second = (json.loads(laptop("status", job, "--json"))["spec"]["data"] for job in (1, 2))
    assert Path(first).name == "faces.zip"
    assert Path(first).read_bytes() == Path(archive).read_bytes()
    assert second == str(image_folder)


JOBS = """
[defaults]
seed = 3
[[job]]
kind = "generate"
from = "faces"
count = 8
[[job]]
kind = "train"
name = "faces"
data = "{data}"
[[job]]
kind = "train"
name = "rates"
data = "{data}"
after = "faces"
sweep = {{ lr-g = [1e-4, 2e-4] }}
"""


@pytest.mark.tier2
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_job_files_templates_and_dry_runs_are_as_at_home(
    laptop: Laptop, world: World, image_folder: Path, tmp_path: Path
) -> None:
    home, queries = Laptop(environment(world.settings)), Queries(world.database)
    model_of(world)
    file = tmp_path / "jobs.toml"
    file.write_text(JOBS.format(data=image_folder))
    for args in (
        ("submit", "-f", file, "--dry-run"),
        ("submit", "train", "--data", image_folder, "--sweep", "seed=0-2", "--dry-run", "--json"),
        ("submit", "generate", "--count", "9", "--dry-run"),
    ):
        here, there = laptop.run(*args), home.run(*args)
        assert (here.stdout, here.returncode) == (there.stdout, 0), (args, here.stderr, there.stderr)
    assert blobs(world) == []  # a dry run sends nothing
    said = laptop("submit", "-f", file)
    assert said.splitlines() == [
        "job 2 (faces): train accepted, queued",
        "job 3: generate accepted, waiting on 2",
        f"sweep {queries.get(4).sweep}: 2 jobs of kind train accepted, 4 to 5",
        "  → ganq status",
    ]
    assert queries.get(2).spec["data"].startswith(str(world.volume.uploads))
    assert (queries.get(3).spec["source"], queries.get(3).user) == (2, "ada")
    file.write_text(file.read_text().replace("count = 8", "cuont = 8"))
    assert "jobs.toml, line 4: generate has no option 'cuont'" in laptop.run("submit", "-f", file).stderr
    file.write_text(file.read_text().replace("cuont = 8", "checkpoint = 'nope'"))
    assert "jobs.toml, line 4: " in laptop.run("submit", "-f", file).stderr
    assert queries.newest_model().id == 5
    laptop("submit", "train", "--data", image_folder, "--epochs", "7", "--save-as", "seven")
    laptop("submit", "train", "-t", "seven")
    laptop("submit", "train")  # the data set that this laptop used last
    specs = [queries.get(job).spec for job in (6, 7, 8)]
    assert [spec["epochs"] for spec in specs[:2]] == [7, 7]
    assert len({spec["data"] for spec in specs}) == 1


def test_failed_jobs_are_retried_and_workers_drained_from_a_laptop(
    laptop: Laptop, world: World, worker_identity: "WorkerIdentity"
) -> None:
    for name in ("a", "b", "c"):
        world.begin(world.submit(name, user="ada"), state="failed", error_code="CRASH_LOOP")
    laptop("retry", "2")
    said = laptop("retry", "--all-failed", "--since", "1d")
    assert "job 5 (a): submitted as a retry of job 1" in said
    assert "job 6 (c): submitted as a retry of job 3" in said
    assert "no job matches" in laptop("retry", "--all-failed")
    WorkerStore(world.database, worker_identity).report("idle")
    name = worker_identity.name
    assert "the role submitter may not do this" in laptop.run("drain", name).stderr
    operator = Tokens(world.database).create("olga", Role.OPERATOR, None)[1]
    Path(laptop.env["GANQ_API_TOKEN_FILE"]).write_text(operator)
    assert f"worker {name}: drain requested" in laptop("drain", name)


# --- results ----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["png", "tar", "npz"])
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_download_has_the_bytes_of_the_volume(
    laptop: Laptop, client: ganq.Client, world: World, tmp_path: Path, format: str
) -> None:
    from storage.results.reader import names_of_result

    made = world.images("made", model_of(world), count=50, format=format, scored=True)
    folder = world.volume.attempt(made, 1)
    assert laptop("download", made, "--out", tmp_path / "out").strip() == str(tmp_path / "out")
    known = {
        name: data for name, data in kept(folder).items() if name.partition("/")[0] in names_of_result(folder)
    }
    assert kept(tmp_path / "out") == known
    laptop("download", made, "--out", tmp_path / "out")  # the same again is fine
    laptop("download", made, "--out", tmp_path / "grids", "--only", "grids")
    assert {name.partition("/")[0] for name in kept(tmp_path / "grids")} == {"grids"}
    laptop("download", made, "--out", tmp_path / "best", "--only", "best")
    images = list(client.job(made).images())
    best = max(images, key=lambda image: image.score or 0.0)
    assert hashlib.sha256(next(iter(kept(tmp_path / "best").values()))).hexdigest() == best.sha256
    assert len(images) == 50
    assert hashlib.sha256(images[7].to_bytes()).hexdigest() == images[7].sha256
    assert images[7].to_numpy().shape == (32, 32, 3)
    other = world.images("other", 1, count=20, format=format)
    said = laptop.run("download", other, "--out", tmp_path / "out")
    assert said.returncode == 1
    assert "nothing there was touched" in said.stderr
    assert kept(tmp_path / "out") == known


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_download_that_is_killed_or_cut_off_continues_where_it_ended(
    server: Server, token: str, world: World, tmp_path: Path
) -> None:
    made = world.images("made", model_of(world), count=3000, format="png")
    proxy = Proxy(server.port)
    try:
        laptop = laptop_of(f"http://127.0.0.1:{proxy.port}", token, tmp_path)
        proxy.delay_s = 0.02
        out = tmp_path / "out"
        process = subprocess.Popen(
            laptop.command("download", made, "--out", out), env=laptop.env, stderr=subprocess.PIPE, cwd=ROOT
        )
        wait_for(lambda: (out / ".ganq-partial").exists())
        process.kill()
        process.communicate()
        arrived = len(kept(out))
        assert 1000 <= arrived < 3000
        first = next((out / "images").iterdir())
        then = first.stat().st_mtime_ns
        process = subprocess.Popen(
            laptop.command("download", made, "--out", out), env=laptop.env, stderr=subprocess.PIPE, cwd=ROOT
        )
        wait_for(lambda: len(os.listdir(out / "images")) > arrived + 100)
        proxy.cut()  # the network is gone for a while
        time.sleep(2)
        proxy.heal()
        proxy.delay_s = 0.0
        said = process.communicate(timeout=60)[1].decode()
        assert process.returncode == 0, said
        assert "trying again" in said
        assert first.stat().st_mtime_ns == then  # what had arrived was not fetched again
    finally:
        proxy.close()
    assert kept(out / "images") == kept(world.volume.attempt(made, 1) / "images")
    assert not (out / ".ganq-partial").exists()


def wait_for(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_network_that_is_silent_for_a_while_ends_neither_a_log_nor_a_download(
    server: Server, token: str, world: World, tmp_path: Path
) -> None:
    """Nothing passes and nothing is refused, as when a laptop is carried to another room."""
    made = world.images("made", model_of(world), count=600, format="png")
    job = world.submit("t")
    world.begin(job)
    world.log(job, b"one\n")
    with Proxy(server.port) as proxy:
        laptop = laptop_of(f"http://127.0.0.1:{proxy.port}", token, tmp_path)
        laptop.env["GANQ_API_SECONDS"] = "6"  # the server pings every five seconds
        pipe = subprocess.PIPE
        logs = subprocess.Popen(
            laptop.command("logs", job, "-f"), env=laptop.env, stdout=pipe, stderr=pipe, text=True, cwd=ROOT
        )
        assert logs.stdout is not None
        assert logs.stderr is not None
        assert logs.stdout.readline() == "one\n"
        proxy.delay_s = 0.05
        out = tmp_path / "out"
        download = subprocess.Popen(
            laptop.command("download", made, "--out", out), env=laptop.env, stderr=pipe, text=True, cwd=ROOT
        )
        wait_for(lambda: (out / "images").is_dir() and len(os.listdir(out / "images")) > 50)
        proxy.hole()
        with open(world.volume.attempt(job, 1) / "log.txt", "ab") as file:
            file.write(b"two\n")
        assert "trying again" in logs.stderr.readline()
        proxy.reset()
        proxy.heal()
        assert logs.stdout.readline() == "two\n"
        world.set(job, state="failed", error_code="CRASH_LOOP", lease_token=None)
        assert logs.communicate(timeout=30)[0] == ""
        said = download.communicate(timeout=60)[1]
        assert (logs.returncode, download.returncode) == (0, 0), said
    assert kept(out / "images") == kept(world.volume.attempt(made, 1) / "images")


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_an_upload_that_ends_midway_goes_on_where_it_ended(
    server: Server, token: str, world: World, tmp_path: Path
) -> None:
    archive = tmp_path / "faces.zip"
    with zipfile.ZipFile(archive, "w") as file:  # not compressed
        for number in range(64):
            file.writestr(f"{number}.png", os.urandom(640_000))
    with Proxy(server.port) as proxy:
        laptop = laptop_of(f"http://127.0.0.1:{proxy.port}", token, tmp_path)
        proxy.delay_s = 0.01
        command = laptop.command("submit", "train", "--data", archive, "--hold")
        process = subprocess.Popen(command, env=laptop.env, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        uploads = world.volume.uploads

        def arrived() -> int | None:
            with suppress(FileNotFoundError, ValueError):  # none, or it was renamed: complete
                return max(path.stat().st_size for path in uploads.glob("blobs/*/*.part"))
            return None

        wait_for(lambda: (arrived() or 0) > 4 << 20)
        proxy.cut()
        time.sleep(0.5)
        before = arrived()
        assert before is not None
        proxy.heal()
        while process.poll() is None:
            now = arrived()
            assert now is None or now >= before  # it does not begin anew
            time.sleep(0.01)
        said = process.communicate()[1]
        assert (process.returncode, "trying again" in said) == (0, True), said
    stored = [path for path in blobs(world) if path.stat().st_size > 1 << 20]
    assert [path.read_bytes() for path in stored] == [archive.read_bytes()]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_log_is_followed_over_a_restart_of_the_server(laptop: Laptop, server: Server, world: World) -> None:
    job = world.submit("t")
    world.begin(job)
    world.log(job, b"one\ntwo\n")
    command = laptop.command("logs", job, "-f", "-n", "1")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=laptop.env, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "two\n"
        with open(world.volume.attempt(job, 1) / "log.txt", "ab") as file:
            file.write(b"three\n")
            file.flush()
            assert process.stdout.readline() == "three\n"
            server.stop(kill=True)
            file.write(b"four\n")
            file.flush()
            assert "trying again" in process.stderr.readline()
            server.again()
            assert process.stdout.readline() == "four\n"
            file.write(b"five\nand no end")
        world.set(job, state="failed", error_code="CRASH_LOOP", lease_token=None)
        assert process.stdout.read() == "five\nand no end\n"
        assert process.wait(20) == 0
    assert laptop("logs", job) == "one\ntwo\nthree\nfour\nfive\nand no end\n"
    assert laptop("logs", job, "-n", "2") == "five\nand no end\n"


# --- uploads ----------------------------------------------------------------------------------


def send(
    server: Server, method: str, path: str, data: bytes = b"", token: str | None = None, **headers: str
) -> tuple[int, Any]:
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    line.request(
        method, f"/api/v1{path}", data, {"Authorization": f"Bearer {token or server.token}", **named}
    )
    answer = line.getresponse()
    found = json.loads(answer.read())
    line.close()
    return answer.status, found


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_file_arrives_in_parts_and_its_hash_is_checked(server: Server, world: World, token: str) -> None:
    data = os.urandom(3_000_000)
    sha256 = hashlib.sha256(data).hexdigest()
    path = f"/blobs/{sha256}"

    def part(first: int, last: int, content: bytes | None = None) -> tuple[int, Any]:
        body = data[first:last] if content is None else content
        return send(server, "PUT", path, body, token, Content_Range=f"bytes {first}-{last - 1}/{len(data)}")

    assert send(server, "GET", path)[1] == {"sha256": sha256, "complete": False, "offset": 0}
    assert part(0, 1_000_000)[0] == 202
    assert part(500_000, 600_000) == (409, part(0, 5)[1])  # not where the last part ended
    assert send(server, "GET", path)[1]["offset"] == 1_000_000
    status, said = part(1_000_000, len(data), b"x" * 2_000_000)
    assert (status, said["code"]) == (400, "WRONG_SHA256")
    assert send(server, "GET", path)[1]["offset"] == 0
    head = f"PUT /api/v1{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
    import socket

    with socket.create_connection(("127.0.0.1", server.port)) as line:  # it ends midway
        line.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[:1_500_000])
    wait_for(lambda: send(server, "GET", path)[1]["offset"] == 1_500_000)
    assert part(1_500_000, len(data))[0] == 201
    assert send(server, "PUT", path, data, token)[0] == 200  # it is there already
    assert [one.read_bytes() for one in blobs(world)] == [data]
    viewer = Tokens(world.database).create("vera", Role.VIEWER, None)[1]
    assert send(server, "PUT", path, data, viewer)[1]["code"] == "FORBIDDEN"


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_the_first_upload_creates_the_volume_that_no_worker_has_created_yet(
    world: World, server: Server, laptop: Laptop, image_folder: Path
) -> None:
    shutil.rmtree(world.volume.root)
    assert "accepted" in laptop("submit", "train", "--data", image_folder)
    assert len(blobs(world)) == 70
    world.begin(world.submit("t"), state="succeeded", result={})
    world.volume.root.rename(world.volume.root.with_name("elsewhere"))
    world.volume.root.mkdir()  # the mount point
    time.sleep(5.1)  # so long an answer of the volume holds
    refused = laptop.run("submit", "train", "--data", image_folder)
    assert refused.returncode != 0
    assert "the job table has jobs with files" in refused.stderr, "it is not mounted"
    assert not list(world.volume.root.iterdir())


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_false_listing_or_bundle_is_refused(server: Server, world: World, token: str) -> None:
    good = {"path": "a.png", "bytes": 1, "sha256": hashlib.sha256(b"a").hexdigest()}
    kind = {"Content_Type": "application/json"}

    def create(files: Any, **more: Any) -> tuple[int, Any]:
        return send(server, "POST", "/datasets", json.dumps({"files": files, **more}).encode(), token, **kind)

    for path in ("../a", "/etc/a", "a/../b", "", "a//b", ".", "a\x00", "x" * 300, "a\n"):
        assert create([{**good, "path": path}])[0] == 400, path
    for wrong in ({"bytes": -1}, {"bytes": True}, {"sha256": "abc"}, {"path": 5}, {"size": 4}):
        assert create([{**good, **wrong}])[0] == 400, wrong
    for files in ([], "x", [5], [good, good]):
        assert create(files)[0] == 400, files
    status, said = create([{**good, "bytes": 10**18}])
    assert (status, said["code"]) == (507, "DISK_FULL")
    assert "free" in said["detail"]
    bundle = io.BytesIO()
    with tarfile.open(fileobj=bundle, mode="w") as archive:
        entry = tarfile.TarInfo(good["sha256"])  # type: ignore[arg-type]
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"b"))
    assert send(server, "POST", "/blobs", bundle.getvalue(), token)[1]["code"] == "WRONG_SHA256"
    assert send(server, "POST", "/blobs", b"no tar" * 200, token)[0] == 400
    assert blobs(world) == []
    assert create([good])[1]["missing"] == [good["sha256"]]
    assert send(server, "PUT", f"/blobs/{good['sha256']}", b"a", token)[0] == 201
    assert create([{**good, "bytes": 2}])[0] == 400
    status, made = create([good], file=True)
    assert (status, made["data"]) == (201, f"dataset:{made['dataset']}/a.png")
    for data in ("dataset:" + "0" * 32, f"dataset:{made['dataset']}/..", f"dataset:{made['dataset']}/b"):
        body = json.dumps({"kind": "train", "data": data}).encode()
        assert send(server, "POST", "/jobs", body, token, **kind)[0] == 404, data


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_an_evaluation_of_a_job_file_takes_the_generation_of_that_file(
    laptop: Laptop, client: ganq.Client, world: World, image_folder: Path, tmp_path: Path
) -> None:
    model = model_of(world)
    older = world.images("mini", model, count=60, format="png")
    path = tmp_path / "jobs.toml"
    path.write_text(
        f'[[job]]\nkind = "generate"\nfrom = {model}\ncount = 64\nname = "mini"\n'
        f'[[job]]\nkind = "evaluate"\nsubject = "mini"\ndata = "{image_folder}"\nname = "measured"\n'
    )
    assert older in {job.id for job in client.jobs(name="mini")}
    for submit in (lambda: laptop("submit", "-f", path), lambda: client.submit_file(path)):
        submit()
        assert client.job("measured").spec["source"] == client.job("mini").id != older


def test_a_generator_is_fetched_and_makes_the_pixels_of_the_servers_own(
    client: ganq.Client, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_file(
        Architecture(size=16, nz=8, ngf=4, ndf=4).build_generator(1).state_dict(), tmp_path / "g.safetensors"
    )
    Laptop(environment(world.settings))("import", tmp_path / "g.safetensors", "--name", "tiny")
    generator = client.job("tiny").generator(device="cpu")
    assert not any(one.training for one in generator.modules())
    fetched = generator.sample(2, seed=7)
    with ganq.connect(world.settings) as local:
        own = local.job("tiny").generator(device="cpu").sample(2, seed=7)
    assert (fetched == own).all()
    assert fetched.shape == (2, 16, 16, 3)


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_an_image_is_made_again_and_weights_are_exported_on_a_laptop(
    laptop: Laptop, world: World, tmp_path: Path
) -> None:
    home = Laptop(environment(world.settings))
    laptop.env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    tiny = Architecture(size=16, nz=8, ngf=4, ndf=4).build_generator(1)
    save_file(tiny.state_dict(), tmp_path / "g.safetensors")
    home("import", tmp_path / "g.safetensors", "--name", "tiny")
    job_id = json.loads(home("status", "tiny", "--json"))["id"]
    chosen = Queries(world.database).choose_checkpoint(job_id, "best")
    context = LocalContext(tmp_path, source=read_checkpoint(world.volume, chosen, "generator"))
    context.sink = cast(Any, ImageFiles(tmp_path / "made", format="png", total=4))
    generate.run(GenerateSpec.create(source=job_id, count=4, grid=0, device="cpu"), context)

    made = sorted((tmp_path / "made" / "images").iterdir())
    for path in (made[0], made[-1]):
        assert "the same bytes" in laptop("remake", path, "--out", path.with_suffix(".again"))
        assert path.with_suffix(".again").read_bytes() == path.read_bytes()
    other = read_passport(made[0].read_bytes(), "x") | {"checkpoint": "0" * 64}
    made[1].write_bytes(with_passport(made[1].read_bytes(), other, np.zeros((1, 1, 3), np.uint8)))
    assert (
        "no checkpoint of this job table has the SHA-256 000000000000" in laptop.run("remake", made[1]).stderr
    )
    for one, folder in ((laptop, "there"), (home, "here")):
        one("export", "tiny", "--out", tmp_path / folder)
    assert kept(tmp_path / "there") == kept(tmp_path / "here")


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_curves_and_samples_are_exported_to_a_tracker_on_a_laptop(
    laptop: Laptop, world: World, settings: "Settings", tmp_path: Path
) -> None:
    accumulator: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(folder: str) -> Any:
        (run,) = (tmp_path / folder).iterdir()
        return accumulator.EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0}).Reload()

    def curves(run: Any) -> dict[str, list[tuple[int, float]]]:
        return {tag: [(one.step, one.value) for one in run.Scalars(tag)] for tag in run.Tags()["scalars"]}

    def images(run: Any) -> list[tuple[int, bytes]]:
        return [(one.step, one.encoded_image_string) for one in run.Images("Samples/fakes")]

    build(settings).close()
    laptop.env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    home = Laptop(environment(settings))
    home("export", "faces", "--to", "tensorboard", tmp_path / "here")
    laptop("export", "faces", "--to", "tensorboard", tmp_path / "there")
    assert curves(read("there")) == curves(read("here")) != {}
    assert images(read("there")) == images(read("here")) != []
    said = json.loads(laptop("export", "faces", "--to", "tensorboard", tmp_path / "there", "--json"))
    assert said["values"] == 0, "what was fetched is not fetched again, and not written again"
    job = Queries(world.database).find("faces")
    metrics = world.volume.attempt(job.id, job.attempt) / "metrics.jsonl"
    last = json.loads(metrics.read_text().splitlines()[-1])
    with open(metrics, "a") as file:
        more = {"step": last["step"] + 1000, "epoch": 10**6, "images": 10**7, "loss_g": 0.25}
        file.write(json.dumps(more) + "\n")
    laptop("export", "faces", "--to", "tensorboard", tmp_path / "there")
    assert (10**7, 0.25) in curves(read("there"))["Loss/G/loss"]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_model_is_pushed_hours_are_summed_and_the_page_is_opened_on_a_laptop(
    client: ganq.Client, laptop: Laptop, world: World, settings: "Settings", tmp_path: Path
) -> None:
    build(settings).close()
    laptop.env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    home = Laptop(environment(settings))
    tiny = Architecture(size=16, nz=8, ngf=4, ndf=4).build_generator(1)
    save_file(tiny.state_dict(), tmp_path / "g.safetensors")
    home("import", tmp_path / "g.safetensors", "--name", "tiny")
    for one, folder in ((laptop, "there"), (home, "here")):
        one("push", "tiny", "--to", tmp_path / folder, "--image-licence", "cc0-1.0")
    assert kept(tmp_path / "there") == kept(tmp_path / "here")
    there, here = (json.loads(one("usage", "--by", "kind", "--json")) for one in (laptop, home))
    of_kind = [(one["kind"], one["jobs"], one["attempts"]) for one in there]
    assert of_kind == [(one["kind"], one["jobs"], one["attempts"]) for one in here] != []
    assert there[0]["worker_hours"] == pytest.approx(here[0]["worker_hours"], rel=0.05), "some still run"
    faces = Queries(world.database).find("faces").id
    assert laptop("open", "--print").strip() == f"{laptop.env['GANQ_API_URL']}/"
    after = Filter(after_id=faces)
    assert client.session.queries.ids(after) == Queries(world.database).ids(after) != []
    assert laptop("open", "faces", "--print").strip() == f"{laptop.env['GANQ_API_URL']}/jobs/{faces}"


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_report_that_is_fetched_is_that_of_home(
    laptop: Laptop, world: World, settings: "Settings", tmp_path: Path
) -> None:
    build(settings).close()
    for name in ("faces", "folder"):
        laptop("report", name, "--html", tmp_path / "there.html")
        Laptop(environment(settings))("report", name, "--html", tmp_path / "here.html")
        there, here = ((tmp_path / f"{one}.html").read_text() for one in ("there", "here"))
        assert there == here
        assert "data:image/webp;base64," in there
    said = laptop.run("report", "held")
    assert (said.returncode, "has not begun" in said.stderr) == (3, True), said


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
@pytest.mark.parametrize("form", ["toml", "command", "python", "json"])
def test_what_show_prints_of_a_servers_job_can_be_submitted_from_a_laptop(
    laptop: Laptop, world: World, image_folder: Path, tmp_path: Path, form: str
) -> None:
    laptop("submit", "train", "--data", image_folder, "--epochs", "3", "--hold")
    shutil.rmtree(image_folder)
    shown = laptop("show", "1", "--as", form)
    assert str(world.volume.root) not in shown
    if form in ("toml", "json"):
        (tmp_path / f"jobs.{form}").write_text(shown)
        laptop("submit", "-f", tmp_path / f"jobs.{form}")
    elif form == "python":
        subprocess.run([sys.executable, "-c", shown], env=laptop.env, cwd=ROOT, check=True, timeout=60)
    else:
        laptop(*shlex.split(shown.replace("\\\n", ""), comments=True)[1:])
    first, again = (json.loads(laptop("status", number, "--json")) for number in (1, 2))
    assert first["spec"] == again["spec"]
    assert first["spec"]["epochs"] == 3


def test_a_path_of_a_server_is_shown_with_that_mark(laptop: Laptop, world: World) -> None:
    world.submit("faces", spec={"data": "/data/faces"})
    assert "--data=server:/data/faces" in laptop("show", "faces")
    assert "--data=/data/faces" in Laptop(environment(world.settings))("show", "faces")


# --- import ganq ------------------------------------------------------------------------------


def test_the_same_class_speaks_to_a_server(client: ganq.Client, world: World, image_folder: Path) -> None:
    model = model_of(world)
    training = client.train(data=image_folder, name="faces", hold=True, epochs=3)
    assert (training.state, training.status, training.spec["epochs"]) == ("queued", "held", 3)
    job = client.generate(model, count=8, seed=7, submit_key="night")
    assert client.generate(model, count=8, seed=7, submit_key="night") == job
    with pytest.raises(SubmitKeyReusedError, match="count is 8, not 9"):
        client.generate(model, count=9, seed=7, submit_key="night")
    spec = ganq.GenerateSpec.create(source=model, count=12, seed=7)
    seven = client.submit(spec, name="seven")
    assert seven.spec == spec.to_json()
    swept = client.sweep("generate", {"seed": range(3)}, source=model, count=4, name="s")
    assert [one.name for one in swept.jobs] == ["s-seed-0", "s-seed-1", "s-seed-2"]
    generations = {job.id, seven.id, *(one.id for one in swept.jobs)}
    assert {one.id for one in client.jobs(kind="generate", since="1h")} == generations
    assert client.jobs(limit=1).__next__().id == swept.jobs[-1].id
    assert training.release().status == "queued"
    assert training.set(priority=5, name="other").name == "other"
    assert client.job("other") == training
    assert training.cancel().state == "cancelled"
    again = training.retry()
    assert (again.state, again.name) == ("queued", "other")
    assert [event.type for event in again.events()] == ["submitted"]
    assert client.job(model).checkpoints[0].epoch == 24
    with pytest.raises(TimeoutError):
        again.wait(0.1)
    with pytest.raises(InvalidTransitionError):
        training.hold()
    with pytest.raises(JobNotFoundError):
        client.job("nope")
    with pytest.raises(SpecError, match="cuont") as caught:
        client.generate(model, cuont=4)
    assert "count" in str(caught.value.hint)
    his = world.submit("his", user="bob")
    with pytest.raises(ForbiddenError, match="belongs to bob"):
        client.job(his).cancel()


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_the_doctor_of_a_laptop_looks_at_the_server(laptop: Laptop, world: World, server: Server) -> None:
    report = json.loads(laptop("doctor", "--json"))
    assert [one["check"] for one in report["findings"]] == ["server", "local"]
    assert f"{server.base} answers and accepts the token" in report["findings"][0]["message"]
    assert report["ok"]
    Path(laptop.env["GANQ_API_TOKEN_FILE"]).write_text("ganq_00_x\n")
    said = laptop("doctor", code=1)
    assert "ganq token create" in said or "GANQ_API_TOKEN" in said, "the way out"
    server.stop()
    assert "does not answer" in laptop("doctor", code=1)


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_server_that_is_away_or_is_something_else_is_reported(
    world: World, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ganq.remote.api.RETRIED_AFTER_S", (0.01,))
    with ganq.connect(server.base, token="ganq_00_x") as client, pytest.raises(UnauthenticatedError):
        client.job(1)
    server.stop()
    with (
        ganq.connect(server.base, token="t") as client,
        pytest.raises(ServerUnavailableError, match="does not answer"),
    ):
        client.job(1)
    import http.server
    import threading

    class Other(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status = {"2": 302, "3": 502}.get(self.path[-1], 200)
            self.send_response(status)
            self.send_header("Location", "https://elsewhere.example/")
            json = {"4": b"[]", "5": b"{"}.get(self.path[-1])
            self.send_header("Content-Type", "application/json" if json else "text/html")
            self.end_headers()
            self.wfile.write(json or b"<html>welcome</html>")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    asked: list[str] = []
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        with ganq.connect(f"http://127.0.0.1:{other.server_port}", token="t") as client:
            for number in (1, 4, 5):  # a page, another JSON, none
                with pytest.raises(ganq.GanqError, match="does not answer as the REST API"):
                    client.job(number)
            with pytest.raises(ganq.GanqError, match="redirects to https://elsewhere"):
                client.job(2)
            with pytest.raises(ServerUnavailableError, match="does not answer: HTTP 502"):
                client.job(3)
            assert len([one for one in asked if one.endswith("3")]) == 2, "a proxy's error is not retried"
    finally:
        other.shutdown()
        other.server_close()


def test_connecting_to_a_server_loads_neither_torch_nor_celery(server: Server, token: str) -> None:
    program = (
        f"import ganq, sys; list(ganq.connect({server.base!r}, token={token!r}).jobs()); print(*sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, env=env
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"torch", "celery", "redis", "PIL", "numpy"})
