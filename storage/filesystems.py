"""Which file system holds a folder: SQLite's locks hold on a local disk alone."""

import os
import re
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")
NETWORK_FILESYSTEMS = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "ceph", "glusterfs", "beegfs", "gpfs", "afs"),
    *("virtiofs", "vboxsf", "ocfs2", "gfs2", "orangefs", "pvfs2", "ncpfs", "coda"),
)
"""Types that several machines share, or a machine and its guests; see is_network_filesystem()."""


def is_network_filesystem(kind: str) -> bool:
    """
    Whether file locks and shared memory of several machines may miss each other on this type.

    FUSE is one of them, whatever stands behind it: 'fuse', 'fuse.sshfs', 'fuseblk'.
    """
    return kind in NETWORK_FILESYSTEMS or kind.startswith("fuse")


def filesystem_type(folder: Path, mountinfo: Path = MOUNTINFO) -> str:
    """
    The type of the file system that holds a folder, '' where the system does not say.

    Args:
        folder: need not exist yet; links are followed.
        mountinfo: see proc(5).
    """
    try:
        mounts = mountinfo.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    real = os.path.realpath(folder)
    try:
        number = os.stat(real).st_dev
        device = f"{os.major(number)}:{os.minor(number)}"
    except OSError:
        device = ""
    best, kind = (False, -1), ""
    for line in mounts:
        left, _, right = line.partition(" - ")
        fields = left.split()
        point = _unescaped(fields[4])
        if real == point or real.startswith(point.rstrip("/") + "/"):
            # The device decides where it is listed: a later mount may hide a longer mount point.
            rank = (fields[2] == device, len(point))
            if rank >= best:
                best, kind = rank, right.split()[0]
    return kind


def _unescaped(point: str) -> str:
    r"""Mount points are written with \040 for a space, \134 for a backslash, and so on."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), point)
