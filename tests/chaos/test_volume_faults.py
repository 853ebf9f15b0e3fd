"""
Files that the table calls committed are durable and whole, whatever the disk does.

Rows F3, F23 to F26, F30 and F50 of docs/fault-matrix.md. What a worker writes is written
by writer.py under strace, which shows the order of the system calls, lets each of them
be the last one, or gives them errors.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from chaos import writer
from machine import Ganq, part, the_part, until
from results import add_model, attempt_folder, verify_manifest
from sqlalchemy import text
from tables import job_row

from jobs.errors import CheckpointCorruptError, DiskFullError
from storage.db.engine import Database
from storage.db.queries import Queries
from storage.volume.checkpoints import GENERATOR, write_checkpoint
from storage.volume.durable import (
    MANIFEST,
    read_verified,
    sha256_file,
    write_bytes,
    write_folder,
)
from storage.volume.layout import Volume

if TYPE_CHECKING:
    import torch

    from storage.settings import Settings

ROOT = Path(__file__).parents[2]
WRITER = Path(__file__).with_name("writer.py")
CALLS = "openat,write,writev,pwrite64,ftruncate,fsync,fdatasync,syncfs,rename,renameat,renameat2,mkdir"
LAST_CALLS = ["fsync", "fdatasync", "syncfs", "rename", "unlink", "unlinkat", "rmdir", "mkdir"]

sqlite_only = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)


@pytest.fixture
def home(_sqlite_template: Path, tmp_path: Path) -> Path:
    """A machine with an empty job table."""
    folder = tmp_path / "machine"
    folder.mkdir()
    shutil.copy(_sqlite_template, folder / "ganq.db")
    return folder


def strace(
    log: Path, *options: str, command: list[str], timeout: float = 60
) -> "subprocess.CompletedProcess[str]":
    """Run a command under strace; skip where tracing is not allowed."""
    found = shutil.which("strace")
    if found is None:
        pytest.skip("strace is not installed")
    # The writer imports helpers of the tests; without() puts a folder there, too.
    python_path = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The filter in the kernel makes it fast, and makes strace 6.1 forget to inject signals.
    fast = [] if any("signal=" in one for one in options) else ["--seccomp-bpf"]
    done = subprocess.run(
        [found, "-f", *fast, "-y", "-o", str(log), *options, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(python_path)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if "ptrace" in done.stderr.lower() and "MARK" not in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()[:200]}")
    return done


def written(home: Path, what: str, *options: str, log: Path) -> "subprocess.CompletedProcess[str]":
    return strace(log, *options, command=[sys.executable, str(WRITER), str(home), what])


def traced(home: Path, what: str, log: Path) -> list[str]:
    done = written(home, what, "-e", f"trace={CALLS}", log=log)
    assert done.returncode == 0, done.stderr
    return whole(log.read_text().splitlines())


def whole(lines: list[str]) -> list[str]:
    """Join calls that strace has split because another process made one; each is placed where it ended."""
    begun: dict[str, str] = {}
    found = []
    for line in lines:
        pid = line.partition(" ")[0]
        if line.endswith("<unfinished ...>"):
            begun[pid] = line.removesuffix("<unfinished ...>").rstrip()
        elif "resumed>" in line:
            found.append(begun.pop(pid, pid) + line.partition("resumed>")[2])
        else:
            found.append(line)
    return found


class Trace:
    """System calls in order; each pattern must come after the previous one."""

    def __init__(self, calls: list[str], begin: str) -> None:
        self.calls = calls
        self.at = next(n for n, line in enumerate(calls) if f"MARK {begin}" in line)

    def then(self, pattern: str) -> "Trace":
        for number in range(self.at + 1, len(self.calls)):
            if re.search(pattern, self.calls[number]):
                self.at = number
                return self
        pytest.fail(f"no {pattern} in\n" + "\n".join(self.calls[self.at : self.at + 200]))

    def before(self, mark: str, *unwanted: str) -> "Trace":
        """Check that none of these occurs between here and a mark."""
        end = next(n for n in range(self.at, len(self.calls)) if f"MARK {mark}" in self.calls[n])
        for line in self.calls[self.at + 1 : end]:
            assert not any(re.search(pattern, line) for pattern in unwanted), line
        return self


OK = r".*= 0$"
COMMIT = rf"(fsync|fdatasync)\(\d+<[^>]*ganq\.db-wal>\){OK}"


# --- the order ----------------------------------------------------------------------------------


def test_a_checkpoint_is_durable_before_its_row_is(home: Path, tmp_path: Path) -> None:
    """F27's other half: write < fsync < rename < fsync of the folder < the row's commit."""
    trace = Trace(traced(home, "checkpoints", tmp_path / "log"), "checkpoint")
    temp = r"epoch-0001\.tmp-\w+"
    for name in ("state.safetensors", "generator.safetensors", "state.json"):
        trace.then(rf"write\(\d+<[^>]*{temp}/{re.escape(name)}>").then(
            rf"fsync\(\d+<[^>]*{temp}/{re.escape(name)}>\){OK}"
        )
    trace.then(rf"write\(\d+<[^>]*{temp}/{MANIFEST}\.tmp-").then(
        rf"fsync\(\d+<[^>]*{temp}/{MANIFEST}\.tmp-\w+>\){OK}"
    )
    trace.then(rf'rename.*{MANIFEST}"{OK}').then(rf"fsync\(\d+<[^>]*{temp}>\){OK}")
    trace.then(rf'rename.*{temp}".*epoch-0001"{OK}').then(rf"fsync\(\d+<[^>]*/checkpoints>\){OK}")
    trace.before("written", COMMIT).then("MARK written").then(COMMIT).then("MARK registered")


def test_images_are_durable_before_the_job_has_succeeded(home: Path, tmp_path: Path) -> None:
    trace = Trace(traced(home, "pictures", tmp_path / "log"), "pictures")
    trace.then(r"write\(\d+<[^>]*images\.tmp-\w+/000004\.png>").then(
        r"write\(\d+<[^>]*grids\.tmp-\w+/grid-0000\.png>"
    )
    trace.before("published", COMMIT)
    trace.then(r"write\(\d+<[^>]*/manifest\.jsonl\.tmp-")
    trace.then(rf"syncfs\(\d+<[^>]*/a1>\){OK}")
    trace.then(rf'rename.*images\.tmp-.*/images"{OK}').then(rf'rename.*grids\.tmp-.*/grids"{OK}')
    trace.then(rf"fsync\(\d+<[^>]*/a1>\){OK}")
    trace.then(rf'rename.*manifest\.jsonl"{OK}').then(rf"fsync\(\d+<[^>]*/a1>\){OK}")
    trace.then("MARK published").then(COMMIT).then("MARK succeeded")


def test_a_data_set_is_durable_before_it_has_its_name(faces: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import os, sys; from pathlib import Path; from storage.datasets.cache import open_images\n"
        "from storage.volume.layout import Volume\n"
        "volume = Volume(Path(sys.argv[1])); volume.ensure(); os.write(2, b'MARK begun')\n"
        "open_images(volume, sys.argv[2], 16, max_skip=0.0, workers=1, progress=lambda a, b: None)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "volume"), str(faces)]
    done = strace(log, "-e", f"trace={CALLS}", command=command)
    assert done.returncode == 0, done.stderr
    trace = Trace(whole(log.read_text().splitlines()), "begun")
    temp = r"datasets/[^>\"]*\.tmp-\w+"
    trace.then(rf"write\(\d+<[^>]*{temp}/images\.u8>").then(rf"fsync\(\d+<[^>]*{temp}/images\.u8>\){OK}")
    trace.then(rf"fsync\(\d+<[^>]*{temp}/index\.json\.tmp-\w+>\){OK}").then(rf'rename.*index\.json"{OK}')
    trace.then(rf"fsync\(\d+<[^>]*{temp}>\){OK}")
    trace.then(rf'rename.*{temp}".*datasets/[0-9a-f]{{64}}"{OK}').then(rf"fsync\(\d+<[^>]*/datasets>\){OK}")


# --- each call the last one ---------------------------------------------------------------------


def killed_at(home: Path, tmp_path: Path, call: str, number: int) -> bool:
    """
    Run the writer on a copy of `home` and kill it as its n-th call begins; return False if it ended before.
    """
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(home, copy, symlinks=True)
    inject = f"inject={call}:signal=KILL:when={number}"
    done = written(copy, "all", "-e", f"trace={call}", "-e", inject, log=tmp_path / "log")
    if "MARK ended" in done.stderr:
        return False
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    checkpoints, results = writer.check(copy)
    committed = done.stderr.count("MARK registered")
    # The two of the old state, and those that this run has reported as committed.
    assert checkpoints >= 2 + min(committed, 2)
    assert results >= 1 + done.stderr.count("MARK succeeded")
    return True


def every_kill(home: Path, tmp_path: Path, calls: list[str]) -> int:
    written(home, "all", "-e", "trace=none", log=tmp_path / "log")  # the old state
    assert writer.check(home) == (2, 1)
    kills = 0
    for call in calls:
        number = 1
        while killed_at(home, tmp_path, call, number):
            number += 1
        kills += number - 1
    return kills


def test_f03_killed_at_any_rename_the_old_state_and_the_committed_one_load(
    home: Path, tmp_path: Path
) -> None:
    assert every_kill(home, tmp_path, ["rename"]) >= 9


@pytest.mark.tier2
@pytest.mark.timeout(900)
def test_f03_killed_at_any_call_the_old_state_and_the_committed_one_load(home: Path, tmp_path: Path) -> None:
    kills = every_kill(home, tmp_path, LAST_CALLS)
    print(f"F3: {kills} kills at {', '.join(LAST_CALLS)}")
    assert kills > 60


# --- a disk that is full ------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "ganq-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root, where it may mount, can make a disk that is full")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def tensors(megabytes: int) -> "dict[str, torch.Tensor]":
    import torch

    return {"G.a": torch.zeros(megabytes * 250_000), "D.a": torch.ones(10)}


def test_f23_a_checkpoint_that_does_not_fit_leaves_the_one_before(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, _ = write_checkpoint(small_disk / "old", generator=tensors(1), meta={})
    with pytest.raises(DiskFullError) as reported:
        write_checkpoint(small_disk / "new", generator=tensors(8), meta={})
    assert "needed: 8.1 MB, free: 3." in reported.value.message
    assert reported.value.needed > 8_000_000 > reported.value.free
    assert names(small_disk) == ["old"]
    # If the file system does not report free space, the write itself fails, in Rust.
    monkeypatch.setattr("storage.volume.durable.free_bytes", lambda folder: None)
    with pytest.raises(DiskFullError, match=r"needed: 8\.1 MB, free: unknown"):
        write_checkpoint(small_disk / "new", generator=tensors(8), meta={})
    assert names(small_disk) == ["old"]
    assert read_verified(small_disk / "old", GENERATOR, old)
    write_checkpoint(small_disk / "new", generator=tensors(2), meta={})


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_f23_a_full_disk_is_reported_whichever_call_finds_it(call: str, home: Path, tmp_path: Path) -> None:
    """NFS may say ENOSPC only at fsync. The write that fails is the checkpoint's own."""
    written(home, "all", "-e", "trace=none", log=tmp_path / "log")
    target = home / "volume" / "jobs" / "000003" / "a1" / "checkpoints" / "epoch-0001"
    code = (
        "import sys; from pathlib import Path; from storage.volume.durable import *\n"
        "def state(path): path.write_bytes(b'x' * 9000)\n"
        "try:\n write_folder(Path(sys.argv[1]), {'state': state}, needed=9000)\n"
        "except StorageError as exc:\n print(exc.code, exc.message)\n"
    )
    inject = f"inject={call}:error=ENOSPC:when={'1+' if call == 'fsync' else '1'}"
    command = [sys.executable, "-c", code, str(target)]
    target.parent.mkdir(parents=True)
    done = strace(tmp_path / "log", "-e", f"trace={call}", "-e", inject, command=command)
    assert done.stdout.startswith("DISK_FULL no room left at"), done.stdout + done.stderr
    assert "needed: 9.0 kB, free: " in done.stdout
    assert names(target.parent) == []
    assert writer.check(home) == (2, 1)


# --- a disk that is broken ----------------------------------------------------------------------


IN_A_FOLDER = re.compile(r"epoch-\d+\.tmp-\w+|epoch-0001\"")


def one_error(home: Path, tmp_path: Path, call: str, error: str, number: int) -> str | None:
    """
    Let the writer's n-th call fail once.

    Returns:
        The line of the trace that failed, None if there were fewer calls.
    """
    copy, log = tmp_path / "copy", tmp_path / "log"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(home, copy)
    calls = "trace=fsync,rename,unlink,openat"
    inject = f"inject={call}:error={error}:when={number}"
    done = written(copy, "checkpoints", "-e", calls, "-e", inject, log=log)
    lines = whole(log.read_text().splitlines())
    hit = next((n for n, line in enumerate(lines) if "INJECTED" in line), None)
    if hit is None:
        return None
    writer.check(copy)
    failed = lines[hit]
    if IN_A_FOLDER.search(failed):
        assert "MARK ended" in done.stderr, failed + done.stderr
        assert writer.check(copy) == (2, 0)
    if call == "fsync":
        path = re.search(r"<([^>]*)>", failed)
        assert path is not None
        if ".tmp-" in path[1]:
            again = [line for line in lines[hit + 1 :] if line.partition(" ")[2].startswith("fsync(")]
            assert not any(f"<{path[1]}>" in line for line in again), "synced again after a failed fsync"
    return failed


def test_f26_what_failed_to_sync_is_never_synced_again_but_written_again(home: Path, tmp_path: Path) -> None:
    """Files and their folder: after an error the kernel may report success without having written."""
    hits = [one_error(home, tmp_path, "fsync", "EIO", number) for number in range(8, 15)]
    assert sum(bool(IN_A_FOLDER.search(hit or "")) for hit in hits) >= 3, hits


@pytest.mark.tier2
@pytest.mark.parametrize(("call", "error"), [("fsync", "EIO"), ("rename", "ESTALE"), ("rename", "EIO")])
def test_f26_one_error_costs_a_file_and_not_the_checkpoint(
    call: str, error: str, home: Path, tmp_path: Path
) -> None:
    """At each fsync and rename in turn: one more try, with a new file."""
    number = survived = 0
    while hit := one_error(home, tmp_path, call, error, number := number + 1):
        survived += bool(IN_A_FOLDER.search(hit))
    print(f"F26: {number - 1} × {error} at {call}, {survived} of them inside a checkpoint")
    assert survived >= 6


def test_f26_a_file_that_the_server_forgot_is_opened_once_more(tmp_path: Path) -> None:
    digest, _ = write_folder(tmp_path / "c", {"state": lambda path: path.write_bytes(b"weights")})
    code = (
        "import sys; from pathlib import Path; from storage.volume.durable import read_verified\n"
        "print(read_verified(Path(sys.argv[1]), 'state', sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c"), digest]
    only = ["-P", str(tmp_path / "c" / "state"), "-e", "trace=openat"]
    once = strace(tmp_path / "log", *only, "-e", "inject=openat:error=ESTALE:when=1", command=command)
    assert once.stdout.strip() == "b'weights'", once.stderr
    always = strace(tmp_path / "log", *only, "-e", "inject=openat:error=ESTALE", command=command)
    assert "CheckpointCorruptError" in always.stderr
    assert (tmp_path / "log").read_text().count("ESTALE") == 2, "opened more than once more"


def test_a_rename_whose_answer_was_lost_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS: 'you can not assume that if the operation failed, the file was not renamed' (rename(2))."""
    real = os.rename

    def renames_and_fails(source: str, target: str) -> None:
        real(source, target)
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "rename", renames_and_fails)
    write_bytes(tmp_path / "f", b"abc")
    digest, _ = write_folder(tmp_path / "c", {"a": lambda path: path.write_bytes(b"1")})
    monkeypatch.undo()
    assert (tmp_path / "f").read_bytes() == b"abc"
    assert read_verified(tmp_path / "c", "a", digest) == b"1"
    assert names(tmp_path) == ["c", "f"]


# --- the same through a real worker ---------------------------------------------------------------


def waiting_with(database: Database, job: int, code: str, *, attempt: int = 1) -> bool:
    row = job_row(database, job)
    return (row["state"], row["error_code"], row["attempt"]) == ("queued", code, attempt)


def soon(database: Database) -> None:
    """Remove the backoff."""
    database.write(lambda conn: conn.execute(text("UPDATE job SET not_before = NULL WHERE state = 'queued'")))


FAULTS = {  # in the order in which one job meets them
    "generate.drawn": ("EROFS", "VOLUME_UNAVAILABLE"),
    "images.written": ("ENOSPC", "DISK_FULL"),
    "images.synced": ("EIO", "VOLUME_UNAVAILABLE"),
    "images.images_renamed": ("ESTALE", "VOLUME_UNAVAILABLE"),
    "images.renamed": ("EDQUOT", "DISK_FULL"),
}


@sqlite_only
def test_f24_f25_f26_a_disk_that_fails_during_a_job_is_reported_and_waited_for(
    ganq: Ganq, database: Database, settings: "Settings", tmp_path: Path
) -> None:
    """One error after another, each once, at different moments of one job, which then succeeds."""
    add_model(settings)
    (tmp_path / "fired").mkdir()
    worker = ganq.start_worker(
        GANQ_ENABLE_FAILPOINTS="1",
        GANQ_FAILPOINTS=";".join(f"{point}=raise:{error}" for point, (error, _) in FAULTS.items()),
        GANQ_FAILPOINTS_FIRED=str(tmp_path / "fired"),
    )
    job = int(ganq.json("submit", "generate", "--from", "m", "--count", "40", "--micro-batch", "4")["id"])
    runners = set()
    for attempt, (_, code) in enumerate(FAULTS.values(), 1):
        until(
            partial(waiting_with, database, job, code, attempt=attempt),
            what=f"{code} of attempt {attempt}",
        )
        runners.add(the_part(worker, "worker.runner.main").pid)
        left = [one.name for one in Volume(settings.volume).attempt(job, attempt).iterdir()]
        assert not {"images", "grids", "manifest.jsonl"} & set(left), "half a result has a name"
        assert not [one for one in left if ".tmp-" in one]
        soon(database)
    until(lambda: job_row(database, job)["state"] == "succeeded", what="its end")
    row = ganq.job(job)
    assert row["error"] is None
    assert job_row(database, job)["crash_count"] == 0
    assert len(runners) == 1, "a full disk is no crash"
    folder = attempt_folder(settings.volume, row)
    assert verify_manifest(folder, manifest_sha256=row["result"]["manifest_sha256"]) == 40


@sqlite_only
@pytest.mark.tier2
def test_f25_a_volume_that_is_lost_under_a_training_is_waited_for_and_not_recreated(
    ganq: Ganq, database: Database, settings: "Settings", small: list[str]
) -> None:
    """As when a disk is unmounted: files created below the mount point would be hidden when it is back."""
    ganq.start_worker()
    asked = ("submit", "train", *small, "--epochs", "150", "--save-every", "1", "--metric", "none")
    undisturbed = int(ganq.json(*asked, "--name", "undisturbed", "--wait")["id"])
    job = int(ganq.json(*asked)["id"])
    until(lambda: Queries(database).checkpoints(job), what="a checkpoint")
    away = settings.volume.with_name("away")
    settings.volume.rename(away)
    for attempt in (1, 2):
        until(
            partial(waiting_with, database, job, "VOLUME_UNAVAILABLE", attempt=attempt),
            what=f"attempt {attempt} without a volume",
        )
        assert not settings.volume.exists()
        soon(database)
    away.rename(settings.volume)
    assert ganq.run("wait", str(job), "--timeout", "60").returncode == 0
    assert ganq.job(job)["result"]["bit_exact"] is True
    ends = [
        attempt_folder(settings.volume, ganq.job(one)) / "checkpoints/final" for one in (undisturbed, job)
    ]
    assert sha256_file(ends[0] / "state.safetensors") == sha256_file(ends[1] / "state.safetensors")


@sqlite_only
def test_f24_a_limit_on_file_sizes_is_reported_as_a_full_disk_and_the_job_continues_by_itself(
    ganq: Ganq, database: Database, settings: "Settings"
) -> None:
    """EFBIG at the manifest, after all images were written (RLIMIT_FSIZE of the runner)."""
    add_model(settings)
    worker = ganq.start_worker()
    runner = until(lambda: part(worker, "worker.runner.main"), what="the runner")
    limit = runner.rlimit(psutil.RLIMIT_FSIZE)
    runner.rlimit(psutil.RLIMIT_FSIZE, (20_000, limit[1]))
    job = int(ganq.json("submit", "generate", "--from", "m", "--count", "400", "--grid", "0")["id"])
    until(lambda: waiting_with(database, job, "DISK_FULL"), what="DISK_FULL")
    reported = ganq.job(job)["error"]["message"]
    assert re.search(r"needed: [\d.]+ \w+, free: [\d.]+ \w+", reported), reported
    runner.rlimit(psutil.RLIMIT_FSIZE, limit)
    assert ganq.run("wait", str(job), "--timeout", "60").returncode == 0
    assert the_part(worker, "worker.runner.main").pid == runner.pid, "a full disk is no crash"


@sqlite_only
def test_f50_logs_that_cannot_be_written_do_not_touch_the_result(
    ganq: Ganq, database: Database, settings: "Settings"
) -> None:
    """stdout closed, stderr and the job's own logs on /dev/full."""
    add_model(settings)
    job = int(ganq.json("submit", "generate", "--from", "m", "--count", "40", "--hold")["id"])
    folder = Volume(settings.volume).attempt(job, 1)
    folder.mkdir(parents=True)
    for name in ("log.txt", "metrics.jsonl"):
        (folder / name).symlink_to("/dev/full")
    mine = {"job": job, "submitted_at": job_row(database, job)["created_at"]}
    (folder.parent / "spec.json").write_text(json.dumps(mine))  # otherwise the folder is quarantined
    ganq.run("release", str(job))
    command = f"exec {sys.executable} -P -m cli.main worker --gpus none --name w1 >&- 2>/dev/full"
    worker = subprocess.Popen(
        ["sh", "-c", command],
        env={**ganq.env, "GANQ_LOG_LEVEL": "DEBUG"},
        cwd=ganq.folder,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    ganq.workers.append(worker)
    until(lambda: job_row(database, job)["state"] == "succeeded", what="the end")
    for name in ("log.txt", "metrics.jsonl"):
        (folder / name).unlink()  # /dev/full can be read for ever
    row = ganq.job(job)
    assert row["attempt"] == 1
    result = attempt_folder(settings.volume, row)
    assert verify_manifest(result, manifest_sha256=row["result"]["manifest_sha256"]) == 40


@sqlite_only
def test_f50_a_worker_with_all_standard_files_closed_writes_into_no_file_of_ours(
    ganq: Ganq, database: Database, settings: "Settings"
) -> None:
    add_model(settings)
    command = f"exec {sys.executable} -P -m cli.main worker --gpus none --name w1 <&- >&- 2>&-"
    worker = subprocess.Popen(["sh", "-c", command], env=ganq.env, cwd=ganq.folder, start_new_session=True)
    ganq.workers.append(worker)
    done = ganq.run("submit", "generate", "--from", "m", "--count", "40", "--wait")
    assert done.returncode == 0, done.stderr
    for one in ("worker.supervisor.loop", "worker.runner.main"):
        process = part(worker, one)
        assert process is not None
        for number in (1, 2):
            target = os.readlink(f"/proc/{process.pid}/fd/{number}")
            assert target.startswith(("/dev/null", "pipe:")), f"{one} says things into {target}"


# --- readers while it is written ------------------------------------------------------------------


@sqlite_only
def test_f30_readers_in_a_tight_loop_never_see_a_torn_checkpoint(
    ganq: Ganq, database: Database, settings: "Settings", small: list[str]
) -> None:
    """Training saves after every step; 500 reads by the table and by the file manager's path."""
    ganq.start_worker()
    options = ["--epochs", "100000", "--save-every", "1000", "--checkpoint-seconds", "0.001", "--name", "t"]
    job = int(ganq.json("submit", "train", *small, *options)["id"])
    volume, queries = Volume(settings.volume), Queries(database)
    until(lambda: queries.checkpoints(job), what="a first checkpoint")
    reads = gone = 0
    seen: set[int] = set()
    deadline = time.monotonic() + 60
    while (reads < 500 or len(seen) < 20) and time.monotonic() < deadline:
        newest = queries.checkpoints(job)[-1]
        try:
            read_verified(volume.absolute(newest.path), GENERATOR, newest.manifest_sha256)
            reads += 1
            seen.add(newest.id)
        except CheckpointCorruptError:
            # Pruned between the look into the table and the file: then its row has gone first.
            assert newest.id not in {one.id for one in queries.checkpoints(job)}, "a torn checkpoint"
            gone += 1
        for manifest in (settings.volume / "latest").glob("t/checkpoints/*/MANIFEST.json"):
            if ".tmp-" in str(manifest):
                continue
            try:
                listed = json.loads(manifest.read_bytes())["files"]
            except FileNotFoundError:
                continue
            assert [one["name"] for one in listed][-1] == "state.json"
    assert reads >= 500
    assert len(seen) >= 20, "the writer did not write meanwhile"
    print(f"F30: {reads} reads of {len(seen)} checkpoints, {gone} pruned under the reader")
    ganq("cancel", str(job))
