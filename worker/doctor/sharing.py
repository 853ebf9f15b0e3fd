"""Checks of `ganq doctor`: whether several Unix users can share the volume."""

import grp
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from storage.volume.layout import Volume
from storage.volume.permissions import account_of, belongs_to_group
from worker.doctor.check import Finding, error, ok, warn
from worker.doctor.jobs import listed

NEWEST = 50
"""Number of job folders to check."""
GUIDE = "docs/operations.md, Several Unix users"


def check_sharing(root: Path) -> Iterator[Finding]:
    """Check group, setgid bit and owners of the volume; nothing is reported for a volume of one account."""
    try:
        about = root.stat()
    except OSError:
        return
    if about.st_mode & stat.S_IWOTH and not about.st_mode & stat.S_ISVTX:
        yield error(
            "volume", f"all users may change {root}", f"chmod o-w {root}; share it with a group: {GUIDE}"
        )
    owners, closed = set(), []
    for path, one in _newest(root):
        owners.add(one.st_uid)
        if not (one.st_mode & stat.S_ISGID and one.st_mode & stat.S_IRWXG == stat.S_IRWXG):
            closed.append(path)
    if not belongs_to_group(root):
        if len(owners) > 1:
            yield warn(
                "volume",
                f"{listed([account_of(uid) for uid in sorted(owners)])} write to {root}, which belongs to no"
                " group: they cannot read or delete each other's files",
                f"give it to a group with the setgid bit: {GUIDE}",
            )
        return
    group = _group_name(about.st_gid)
    mine = {os.getegid(), *os.getgroups()}
    if os.geteuid() not in (0, about.st_uid) and about.st_gid not in mine:
        yield error(
            "volume",
            f"this account is not in the group {group} of {root}",
            f"sudo usermod --append --groups {group} {account_of(os.geteuid())}, then log in again",
        )
    elif closed:
        yield warn(
            "volume",
            f"{len(closed)} of its newest folders are not shared with the group {group}, e.g. {closed[0]}",
            f"sudo chgrp -R {group} {root}; sudo chmod -R g+rwX {root}; "
            f"sudo find {root} -type d -exec chmod g+s {{}} +",
        )
    else:
        yield ok("volume", f"shared by the group {group}")


def _newest(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the volume's folders and those of the newest jobs with their attempts."""
    volume = Volume(root)
    folders = [volume.jobs, volume.datasets, volume.latest]
    with suppress(OSError):
        for job in sorted(volume.jobs.glob("[0-9]*"))[-NEWEST:]:
            folders += [job, *job.glob("a[0-9]*")]
    for path in folders:
        with suppress(OSError):
            yield path, path.stat()


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
