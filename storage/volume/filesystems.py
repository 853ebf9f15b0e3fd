"""
The file system of a folder, and its mount options.

SQLite's locks work on local disks only, and a shared volume depends on its mount options.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")
NETWORK_FILESYSTEMS = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "ceph", "glusterfs", "beegfs", "gpfs", "afs"),
    *("virtiofs", "vboxsf", "ocfs2", "gfs2", "orangefs", "pvfs2", "ncpfs", "coda"),
)
"""Types that several machines, or a machine and its guests, share; see is_network_filesystem()."""


def is_network_filesystem(kind: str) -> bool:
    """
    Return whether file locks and shared memory of several machines may not work on this type.

    FUSE ('fuse', 'fuse.sshfs', 'fuseblk') counts as one of them.
    """
    return kind in NETWORK_FILESYSTEMS or kind.startswith("fuse")


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    point: str
    kind: str
    source: str
    options: frozenset[str]
    """Options of the mount and of its file system: 'rw', 'hard', 'lookupcache=pos'."""


def mount_of(folder: Path, mountinfo: Path = MOUNTINFO) -> Mount | None:
    """
    Return the mount of a folder; None if it cannot be found.

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
            # An equal device wins, because a later mount may hide a longer mount point.
            rank = (fields[2] == device, len(point))
            if best is None or rank >= best[0]:
                options = frozenset(f"{fields[5]},{about[2]}".split(","))
                best = rank, Mount(point, about[0], _unescaped(about[1]), options)
    return best[1] if best else None


def filesystem_type(folder: Path, mountinfo: Path = MOUNTINFO) -> str:
    """Return the type of a folder's file system; '' if it cannot be found."""
    mount = mount_of(folder, mountinfo)
    return mount.kind if mount is not None else ""


def _unescaped(point: str) -> str:
    r"""Decode a mount point, in which \040 is a space and \134 a backslash."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), point)
