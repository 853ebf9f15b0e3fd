"""A folder that can hold no more entries, a disk without inodes and a full one, on real ext4 file systems."""

import errno
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from jobs.context import GeneratedImage, ImageNames
from jobs.errors import DirectoryFullError, DiskFullError
from storage.results.writer import ImageFiles
from storage.volume.durable import make_folder, write_bytes

LONG = "x" * 225
"""With long names a folder of ext4 has few entries: three in a block of 1 KiB."""
Ext4 = Callable[..., Path]


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Ext4]:
    """Make and mount small ext4 file systems, with blocks of 1 KiB."""
    mounted = []

    def mount(megabytes: int, *options: str) -> Path:
        image, folder = tmp_path / "disk.img", tmp_path / "disk"
        folder.mkdir()
        with open(image, "wb") as file:
            file.truncate(megabytes << 20)
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("no mkfs.ext4 on this machine (apt-get install e2fsprogs)")
        # mkfs looks at all mounts, and one of another test may hang: without /proc it finds none.
        make = shlex.join(["mkfs.ext4", "-q", "-F", "-b", "1024", "-m", "0", *options, str(image)])
        hidden = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs none /proc && exec {make}"]
        done = subprocess.run(hidden, check=False, capture_output=True)
        if done.returncode != 0:
            pytest.skip(f"may not mount here: {done.stderr.decode().strip()}")
        done = subprocess.run(["mount", "-o", "loop", image, folder], check=False, capture_output=True)
        if done.returncode != 0:
            pytest.skip(f"may not mount here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def error_number(work: Callable[[int], object]) -> int | None:
    """Repeat until it fails."""
    for number in count():
        try:
            work(number)
        except OSError as exc:
            return exc.errno
    return None


@pytest.mark.tier2
def test_a_folder_that_is_full_is_not_reported_as_a_full_disk(ext4: Ext4) -> None:
    disk = ext4(64, "-O", "^large_dir")
    full, source = disk / "full", disk / "source"
    full.mkdir()
    source.mkdir()

    def link(number: int) -> None:
        if number % 60_000 == 0:  # ext4 allows 65,000 links of a file
            (source / f"{number // 60_000}").touch()
        os.link(source / f"{number // 60_000}", full / f"{number:06d}{LONG}")

    assert error_number(link) == errno.ENOSPC
    about = os.statvfs(disk)
    assert about.f_bavail > 1 << 10
    assert about.f_favail > 0

    def write() -> None:
        for number in range(200):  # a part of the index may still have space
            write_bytes(full / f"a{number:04d}{LONG}", b"1")

    with pytest.raises(DirectoryFullError, match=f"the folder {full} is full") as caught:
        write()
    assert "--format tar" in (caught.value.hint or "")
    assert not list(full.glob(".tmp-*")), "the probe is deleted"
    write_bytes(disk / "beside", b"1")


@pytest.mark.tier2
def test_a_folder_with_too_many_folders_is_full(ext4: Ext4) -> None:
    disk = ext4(110, "-O", "^dir_nlink", "-N", "66000")
    full = disk / "jobs"
    full.mkdir()
    assert error_number(lambda number: (full / f"{number:06d}").mkdir()) == errno.EMLINK
    with pytest.raises(DirectoryFullError):
        make_folder(full / "999999")


def test_a_disk_without_inodes_is_full_and_says_so(ext4: Ext4) -> None:
    disk = ext4(4, "-N", "64")
    sink = ImageFiles(disk / "a1", names=ImageNames(folders=True))
    pixels = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(DiskFullError, match="free inodes: 0"):
        sink.add(GeneratedImage(pixels, {"draw": number}, output_index=number) for number in range(100))
    assert not list((disk / "a1").iterdir())


def test_a_disk_without_space_is_full(ext4: Ext4) -> None:
    disk = ext4(4)
    with open(disk / "ballast", "wb") as file:
        assert error_number(lambda _: os.write(file.fileno(), bytes(1 << 16))) == errno.ENOSPC
    with pytest.raises(DiskFullError, match="no room left"):
        write_bytes(disk / "more", bytes(1 << 20))
