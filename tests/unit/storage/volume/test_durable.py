"""Files are there whole or not at all, also after a power cut; what is torn is recognised."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.context import GeneratedImage
from jobs.errors import CheckpointCorruptError, DiskFullError, StorageError, VolumeError
from storage.results.writer import ImageFiles
from storage.volume.durable import (
    MANIFEST,
    TEMP_MARK,
    durable_file,
    make_folder,
    read_verified,
    sha256_file,
    sync_parents,
    write_bytes,
    write_folder,
    write_json,
)

ROOT = Path(__file__).parents[4]


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def writers(**contents: bytes) -> dict[str, Callable[[Path], object]]:
    def writer(data: bytes) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(data)

    return {name.replace("_", "."): writer(data) for name, data in contents.items()}


BREAKS = [RuntimeError("in the middle"), KeyboardInterrupt(), OSError(5, "I/O error")]


# --- whole or not at all ------------------------------------------------------------------------


def test_a_written_file_is_there_with_its_digest(tmp_path: Path) -> None:
    digest = write_bytes(tmp_path / "f", b"abc")
    assert (tmp_path / "f").read_bytes() == b"abc"
    assert digest == sha256_file(tmp_path / "f")
    assert names(tmp_path) == ["f"]


def test_json_is_written_for_people_and_in_one_order(tmp_path: Path) -> None:
    write_json(tmp_path / "f", {"b": 1, "a": "ü"})
    text = (tmp_path / "f").read_text()
    assert json.loads(text) == {"a": "ü", "b": 1}
    assert text.index('"a"') < text.index('"b"')
    assert text.endswith("\n")


@pytest.mark.parametrize(
    "error", [RuntimeError("in the middle"), KeyboardInterrupt(), OSError(5, "I/O error")]
)
def test_a_write_that_breaks_off_leaves_the_old_file_and_no_rest(tmp_path: Path, error: Any) -> None:
    write_bytes(tmp_path / "f", b"old")

    def work() -> None:
        with durable_file(tmp_path / "f") as file:
            file.write(b"new")
            raise error

    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)):
        work()

    assert names(tmp_path) == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


def test_a_folder_appears_whole_with_a_manifest_of_all_its_files(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "epoch-5"

    digest, size = write_folder(target, writers(state_bin=b"abc", meta_json=b"{}"))

    assert names(target) == [MANIFEST, "meta.json", "state.bin"]
    assert size == 5
    assert digest == sha256_file(target / MANIFEST)
    assert json.loads((target / MANIFEST).read_text())["files"][0] == {
        "name": "state.bin",
        "bytes": 3,
        "sha256": sha256_file(target / "state.bin"),
    }
    assert names(target.parent) == ["epoch-5"]


@pytest.mark.parametrize(
    "error", [RuntimeError("in the middle"), KeyboardInterrupt(), OSError(5, "I/O error")]
)
def test_a_folder_whose_writer_breaks_off_is_not_there(tmp_path: Path, error: Any) -> None:
    def broken(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)):
        write_folder(tmp_path / "c", {**writers(a=b"1"), "b": broken})

    assert names(tmp_path) == []


def test_a_folder_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    digest, _ = write_folder(tmp_path / "c", writers(a=b"1"))

    with pytest.raises(StorageError):
        write_folder(tmp_path / "c", writers(a=b"2"))

    assert read_verified(tmp_path / "c", "a", digest) == b"1"
    assert names(tmp_path) == ["c"]


def test_readers_in_a_loop_never_see_a_torn_file(tmp_path: Path) -> None:
    """Each version is one letter, many times: a mixture or a short one would be torn."""
    path, size, stop = tmp_path / "f", 200_000, threading.Event()
    write_bytes(path, b"a" * size)
    torn: list[tuple[int, int]] = []
    reads = 0

    def read() -> None:
        nonlocal reads
        while not stop.is_set():
            data = path.read_bytes()
            if len(data) != size or len(set(data)) != 1:
                torn.append((len(data), len(set(data))))
            reads += 1

    readers = [threading.Thread(target=read) for _ in range(3)]
    for one in readers:
        one.start()
    for number in range(60):
        write_bytes(path, bytes([97 + number % 26]) * size)
    stop.set()
    for one in readers:
        one.join()

    assert torn == []
    assert reads > 60


def test_readers_of_a_folder_find_it_complete_or_not_at_all(tmp_path: Path) -> None:
    target, done, torn = tmp_path / "c", threading.Event(), []

    def read() -> None:
        while not done.is_set():
            with suppress(FileNotFoundError):
                if (seen := names(target)) != [MANIFEST, "a", "b"]:
                    torn.append(seen)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(20):
        write_folder(target, writers(a=b"1" * 50_000, b=b"2" * 50_000))
        target.rename(tmp_path / f"away-{number}")
    done.set()
    reader.join()
    assert torn == []


# --- the order that survives a power cut ----------------------------------------------------------


def traced(tmp_path: Path, code: str) -> list[str]:
    """The system calls of a child that runs `code`, from its mark on, each with its path."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    log = tmp_path / "trace"
    calls = "trace=openat,write,fsync,rename,renameat,renameat2,mkdir,mkdirat"
    script = (
        "import sys, os\nfrom pathlib import Path\nfrom storage.volume.durable import *\n"
        f"os.chdir({str(tmp_path)!r})\nos.write(2, b'MARK')\n{code}\n"
    )
    done = subprocess.run(
        [strace, "-f", "-y", "-e", calls, "-o", str(log), sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in done.stderr or "PTRACE" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if "MARK" in line)
    return lines[begin + 1 :]


def position(calls: list[str], pattern: str, after: int = -1) -> int:
    for number, line in enumerate(calls):
        if number > after and re.search(pattern, line):
            return number
    pytest.fail(f"no {pattern} after call {after} in\n" + "\n".join(calls))


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    calls = traced(tmp_path, "write_bytes(Path('d/f'), b'abc')")

    written = position(calls, r'write\(.*d/f\.tmp-.*"abc"')
    synced = position(calls, r"fsync\(.*d/f\.tmp-.*= 0", written)
    renamed = position(calls, r'rename.*"d/f\.tmp-.*"d/f".*= 0', synced)
    position(calls, r"fsync\(\d+<[^>]*/d>\).*= 0", renamed)


def test_a_folders_files_are_synced_then_its_manifest_then_its_name(tmp_path: Path) -> None:
    calls = traced(tmp_path, "write_folder(Path('d/c'), {'a': lambda p: p.write_bytes(b'abc') and None})")

    made = position(calls, r'mkdir.*"d".*= 0')
    position(calls, rf"fsync\(\d+<{re.escape(str(tmp_path))}>\).*= 0", made)
    written = position(calls, r'write\(.*/a>.*"abc"')
    synced = position(calls, r"fsync\(.*d/c\.tmp-\w+/a>.*= 0", written)
    manifest = position(calls, rf"fsync\(.*/{MANIFEST}\.tmp-.*= 0", synced)
    named = position(calls, rf"rename.*{MANIFEST}", manifest)
    inside = position(calls, r"fsync\(\d+<[^>]*/d/c\.tmp-\w+>\).*= 0", named)
    renamed = position(calls, r'rename.*"d/c\.tmp-\w+".*"d/c".*= 0', inside)
    position(calls, r"fsync\(\d+<[^>]*/d>\).*= 0", renamed)


# --- a disk that is full or may not be written ------------------------------------------------------


@pytest.fixture
def tiny_disk() -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = Path(tempfile.mkdtemp(prefix="gq-"))
    mounted = os.geteuid() == 0 and (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "ganq-test", str(folder)],
            capture_output=True,
            check=False,
        ).returncode
        == 0
    )
    if not mounted:
        folder.rmdir()
        pytest.skip("only root, where it may mount, can make a disk that is full")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


def test_a_full_disk_is_reported_and_nothing_is_left(tiny_disk: Path) -> None:
    write_bytes(tiny_disk / "old", b"old")

    with pytest.raises(DiskFullError) as caught:
        write_bytes(tiny_disk / "old", b"x" * 2_000_000)
    assert "no room left" in str(caught.value)
    assert "MB" in str(caught.value)
    assert "GANQ_VOLUME" in (caught.value.hint or "")
    with pytest.raises(DiskFullError):
        write_folder(tiny_disk / "c", writers(a=b"1", b=b"x" * 2_000_000))

    assert names(tiny_disk) == ["old"]
    assert (tiny_disk / "old").read_bytes() == b"old"
    write_folder(tiny_disk / "c", writers(a=b"x" * 500_000))  # all the room is there again


def test_a_quota_is_a_full_disk_too(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(DiskFullError):
            write_bytes(tmp_path / "f", b"x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == []


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder that may not be written, and one in it that may not be entered, for a user who is not root."""
    folder = Path(tempfile.mkdtemp(prefix="gq-"))
    (folder / "hidden").mkdir(mode=0o000)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o755)
    (folder / "hidden").chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_bytes(folder / "f", b"x"),
        lambda folder: write_folder(folder / "c", writers(a=b"1")),
        lambda folder: make_folder(folder / "a" / "b"),
    ],
    ids=["file", "folder", "make_folder"],
)
def test_a_folder_that_may_not_be_written_is_reported(as_nobody: Path, write: Any) -> None:
    with pytest.raises(VolumeError) as caught:
        write(as_nobody)
    assert "permission denied" in str(caught.value)
    assert str(as_nobody) in str(caught.value)
    assert names(as_nobody) == ["hidden"]


def test_a_folder_that_may_not_be_entered_is_reported(as_nobody: Path) -> None:
    inside = as_nobody / "hidden" / "a" / "b"
    with pytest.raises(VolumeError):
        make_folder(inside)
    with pytest.raises(VolumeError):
        write_bytes(inside / "f", b"x")


def test_a_file_in_the_way_of_a_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(StorageError, match="not a directory"):
        make_folder(tmp_path / "f" / "deep")


def test_an_attempts_folder_that_was_deleted_is_never_created_again(tmp_path: Path) -> None:
    """As when its volume is unmounted: what is written below the mount point is hidden once it is back."""
    attempt = tmp_path / "jobs" / "000001" / "a1"
    sink = ImageFiles(attempt, inside=attempt)
    image = GeneratedImage(np.zeros((8, 8, 3), np.uint8), {"seed": 1})
    attempts: list[Callable[[], object]] = [
        lambda: make_folder(attempt / "samples", inside=attempt),
        lambda: write_folder(attempt / "checkpoints" / "epoch-0001", writers(a=b"1"), inside=attempt),
        lambda: sink.add([image]),
        lambda: write_bytes(attempt / "file", b"x"),
        lambda: sync_parents(attempt, tmp_path),
    ]
    for write in attempts:
        with pytest.raises(VolumeError, match="no longer exists"):
            write()
    assert not list(tmp_path.iterdir())


def test_making_a_folder_that_is_there_is_not_an_error(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_redirect_from_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not above"):
        sync_parents(tmp_path / "a" / "b", tmp_path / "c")


def test_fifty_that_make_the_same_folder_all_succeed(tmp_path: Path) -> None:
    failed = []
    start = threading.Barrier(50)

    def make() -> None:
        start.wait()
        try:
            make_folder(tmp_path / "a" / "b" / "c")
        except Exception as exc:
            failed.append(exc)

    threads = [threading.Thread(target=make) for _ in range(50)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert failed == []


# --- reading what was written -----------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, str]:
    digest, _ = write_folder(tmp_path / "epoch-5", writers(state=b"weights", other=b"more"))
    return tmp_path / "epoch-5", digest


def test_an_intact_folder_is_read(kept: tuple[Path, str]) -> None:
    folder, digest = kept
    assert read_verified(folder, "state", digest) == b"weights"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda folder: flip(folder / "state"),
    "a short file": lambda folder: (folder / "state").write_bytes(b"wei"),
    "an empty file": lambda folder: (folder / "state").write_bytes(b""),
    "a missing file": lambda folder: (folder / "state").unlink(),
    "a flipped bit in the manifest": lambda folder: flip(folder / MANIFEST),
    "an empty manifest": lambda folder: (folder / MANIFEST).write_bytes(b""),
    "a missing manifest": lambda folder: (folder / MANIFEST).unlink(),
    "a missing folder": lambda folder: shutil.rmtree(folder),
    "a folder in the file's place": lambda folder: replace_by_a_folder(folder / "state"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_recognised_and_says_where(kept: tuple[Path, str], damage: Any) -> None:
    folder, digest = kept
    DAMAGE[damage](folder)

    with pytest.raises(CheckpointCorruptError) as caught:
        read_verified(folder, "state", digest)

    assert str(caught.value).startswith("epoch-5: ")
    assert "\n" not in str(caught.value)
    assert caught.value.folder == folder
    assert "ganq checkpoints" in (caught.value.hint or "")


def test_a_damaged_checkpoint_of_a_job_is_reported_with_the_job(tmp_path: Path) -> None:
    with pytest.raises(CheckpointCorruptError) as caught:
        read_verified(tmp_path / "jobs" / "000012" / "a1" / "checkpoints" / "epoch-0005", "state", "0" * 64)
    assert str(caught.value).startswith("job 12, epoch-0005: ")
    assert (caught.value.hint or "").endswith("ganq checkpoints 12")


def test_a_manifest_that_was_forged_with_its_file_is_recognised(
    kept: tuple[Path, str], tmp_path: Path
) -> None:
    folder, digest = kept
    other, _ = write_folder(tmp_path / "forged", writers(state=b"evil"))
    shutil.rmtree(folder)
    (tmp_path / "forged").rename(folder)

    assert other != digest
    with pytest.raises(CheckpointCorruptError, match="not the one that was registered"):
        read_verified(folder, "state", digest)


def test_a_file_that_the_manifest_does_not_list_is_never_read(kept: tuple[Path, str]) -> None:
    folder, digest = kept
    (folder / "extra").write_bytes(b"smuggled")
    with pytest.raises(CheckpointCorruptError, match="does not list"):
        read_verified(folder, "extra", digest)


def test_temporary_names_are_recognisable(tmp_path: Path) -> None:
    with durable_file(tmp_path / "f") as file:
        file.write(b"x")
        (only,) = names(tmp_path)
        assert only.startswith(f"f{TEMP_MARK}")
