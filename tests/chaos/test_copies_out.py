"""`--out` while two attempts of one job copy: a worker that was taken for dead continues."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from machine import until
from results import verify_manifest

from jobs.context import GeneratedImage
from storage.results.writer import ImageFiles

COUNT = 60
COPY = "import sys; from pathlib import Path; from storage.results.reader import copy_out\n"
COPY += "print(copy_out(Path(sys.argv[1]), sys.argv[2]))"


def published(folder: Path, *, brightness: int = 0) -> None:
    sink = ImageFiles(folder)
    sink.add(GeneratedImage(np.full((8, 8, 3), (i + brightness) % 256, np.uint8), {}) for i in range(COUNT))
    sink.add_grid("grid-0000", np.zeros((8, 8, 3), np.uint8))
    sink.publish()


@pytest.fixture
def copies(tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Start processes that copy an attempt's result to out/ and stop themselves at some file."""

    def start(attempt: str, *, stop_at: int | None = None) -> "subprocess.Popen[str]":
        points = f"images.copying=stop@{stop_at}" if stop_at else ""
        copying = subprocess.Popen(
            [sys.executable, "-c", COPY, str(tmp_path / "000012" / attempt), str(tmp_path / "out")],
            env={**os.environ, "GANQ_ENABLE_FAILPOINTS": "1", "GANQ_FAILPOINTS": points},
            stdout=subprocess.PIPE,
            text=True,
        )
        if stop_at:
            process = psutil.Process(copying.pid)
            until(lambda: process.status() == psutil.STATUS_STOPPED, what="the stop")
        return copying

    return start


def answer(copying: "subprocess.Popen[str]") -> str:
    copying.send_signal(signal.SIGCONT)
    result, _ = copying.communicate(timeout=60)
    assert copying.returncode == 0
    return result


@pytest.mark.parametrize("first_to_end", ["a1", "a2"])
def test_two_attempts_that_copy_at_once_leave_the_whole_result(
    tmp_path: Path, copies: Callable[..., subprocess.Popen[str]], first_to_end: str
) -> None:
    for attempt in ("a1", "a2"):
        published(tmp_path / "000012" / attempt)
    zombie = copies("a1", stop_at=COUNT // 2)
    heir = copies("a2", stop_at=COUNT // 3)
    if first_to_end == "a1":
        answer(zombie)
        result = answer(heir)
    else:
        result = answer(heir)
        answer(zombie)
    assert result == f"{{'out': {str(tmp_path / 'out')!r}}}\n"
    assert verify_manifest(tmp_path / "out") == COUNT
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["grids", "images", "manifest.jsonl"]


def test_a_copy_that_differs_from_the_manifest_is_reported_as_missing(
    tmp_path: Path, copies: Callable[..., subprocess.Popen[str]]
) -> None:
    """The earlier attempt has produced other bytes (another device), and writes its images last."""
    published(tmp_path / "000012" / "a1", brightness=1)
    published(tmp_path / "000012" / "a2")
    heir = copies("a2", stop_at=COUNT // 2)
    answer(copies("a1"))
    result = answer(heir)
    assert "out_error" in result
    assert "does not hold the whole result" in result or "already holds" in result


def test_what_killed_attempts_have_left_beside_a_copy_is_deleted_by_the_next(
    tmp_path: Path, copies: Callable[..., subprocess.Popen[str]]
) -> None:
    for attempt in ("a1", "a2"):
        published(tmp_path / "000012" / attempt)
    (tmp_path / "out" / ".images.tmp-000012").mkdir(parents=True)  # of ganq 0.2
    (tmp_path / "out" / ".images.tmp-0000123").mkdir()  # of another job
    killed = copies("a1", stop_at=COUNT // 2)
    killed.kill()
    killed.communicate()
    assert answer(copies("a2")) == f"{{'out': {str(tmp_path / 'out')!r}}}\n"
    there = sorted(one.name for one in (tmp_path / "out").iterdir())
    assert there == [".images.tmp-0000123", "grids", "images", "manifest.jsonl"]
