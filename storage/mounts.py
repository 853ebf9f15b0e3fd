"""What is mounted where, and how: the options decide whether a shared volume can be trusted."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    point: str
    kind: str
    source: str
    options: frozenset[str]
    """Of the mount and of its file system: 'rw', 'hard', 'lookupcache=pos'."""


def mount_of(folder: Path, mountinfo: Path = MOUNTINFO) -> Mount | None:
    """
    The mount that holds a folder; None where the system does not say.

    Args:
        folder: need not exist; links are followed.
        mountinfo: see proc(5).
    """
    try:
        lines = mountinfo.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    real = os.path.realpath(folder)
    try:
        number = os.stat(real).st_dev
        device = f"{os.major(number)}:{os.minor(number)}"
    except OSError:
        device = ""
    best: tuple[tuple[bool, int], Mount] | None = None
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, about = left.split(), right.split()
        if len(fields) < 6 or len(about) < 3:
            continue
        point = _unescaped(fields[4])
        if real == point or real.startswith(point.rstrip("/") + "/"):
            # The device decides where it is listed: a later mount may hide a longer mount point.
            rank = (fields[2] == device, len(point))
            if best is None or rank >= best[0]:
                options = frozenset(f"{fields[5]},{about[2]}".split(","))
                best = rank, Mount(point, about[0], _unescaped(about[1]), options)
    return best[1] if best else None


def _unescaped(point: str) -> str:
    r"""Mount points are written with \040 for a space, \134 for a backslash, and so on."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), point)
