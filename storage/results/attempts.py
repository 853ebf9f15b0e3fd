"""
A training as a whole: the samples and metrics of all its attempts.

An attempt continues from a checkpoint, and a run that diverged goes back to one: metrics from a step on
that comes again are dropped, as the run itself has dropped them. The newest attempt's folder has the samples
of all.
"""

import json
import os
import shutil
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.volume.durable import NO_LINKS, TEMP_MARK
from storage.volume.layout import Volume

METRICS = "metrics.jsonl"
MAX_LINE_BYTES = 1 << 20


@dataclass
class Tail:
    """One metrics.jsonl, and how much of it was read."""

    path: Path
    offset: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> None:
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                for line in file:
                    if not line.endswith(b"\n"):  # being written
                        return
                    self.offset += len(line)
                    if len(line) <= MAX_LINE_BYTES and (found := _parsed(line)) is not None:
                        self.lines.append(found)
        except OSError:  # none yet, or the volume is unavailable, which the page reports
            return


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        return None
    return found


@dataclass
class Metrics:
    """All lines of one run, oldest first."""

    tails: dict[int, Tail] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(
        self, volume: Volume, job_id: int, attempts: int
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return (lines of training, lines of evaluations)."""
        with self.lock:
            training: list[dict[str, Any]] = []
            measured: list[dict[str, Any]] = []
            for number in range(1, attempts + 1):
                path = volume.attempt(job_id, number) / METRICS
                tail = self.tails.setdefault(number, Tail(path))
                tail.read()
                for line in tail.lines:
                    _append(measured if "metric" in line else training, line)
            return training, measured


def _append(lines: list[dict[str, Any]], line: dict[str, Any]) -> None:
    while lines and lines[-1]["step"] >= line["step"]:
        lines.pop()
    lines.append(line)


def sample_files(volume: Volume, job_id: int) -> list[tuple[int, Path]]:
    """Return (epoch, path) of a training's sample grids, by epoch; the later attempt's of two of an epoch."""
    found: dict[int, Path] = {}
    folders = [path for path in volume.job(job_id).glob("a[1-9]*") if path.name[1:].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name[1:])):
        for path in folder.glob("samples/epoch-*.png"):
            with suppress(ValueError):
                found[int(path.stem.removeprefix("epoch-"))] = path
    return sorted(found.items())


def gather_samples(volume: Volume, job_id: int, attempt: int) -> None:
    """
    Complete the samples of an attempt by those of earlier ones, and point the job's `samples` to them.

    They are hard links, or copies where the file system has none. What cannot be linked is left out.
    """
    folder = volume.attempt(job_id, attempt) / "samples"
    present: set[str] = set()
    with suppress(OSError):
        present = set(os.listdir(folder))
    for number in range(attempt - 1, 0, -1):  # a later attempt's sample replaces that of an earlier one
        earlier = volume.attempt(job_id, number) / "samples"
        with suppress(OSError):
            for name in sorted(set(os.listdir(earlier)) - present):
                if TEMP_MARK not in name:
                    folder.mkdir(exist_ok=True)
                    _link_or_copy(earlier / name, folder / name)
                    present.add(name)
    if present:
        volume.point(volume.samples(job_id), folder)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError as exc:
        if exc.errno not in NO_LINKS:
            raise
        temp = target.with_name(f"{target.name}{TEMP_MARK}{os.getpid():x}")
        shutil.copyfile(source, temp)
        temp.rename(target)
