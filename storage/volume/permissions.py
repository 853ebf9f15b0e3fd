"""
Access of several Unix accounts to one volume: one policy for all files.

A volume whose root folder has the setgid bit belongs to its group. ganq then clears the group bits of the
umask wherever it writes there, and the kernel passes group and setgid bit on to new folders, so that each
member can read and delete what another has written. Any other volume follows the umask of the account that
writes.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.users import this_account

GROUP = stat.S_IRWXG
SHARE_HINT = "add this account to the group of the volume: docs/operations.md, Several Unix users"


def belongs_to_group(root: Path) -> bool:
    """Return whether a volume has the setgid bit, and so belongs to its group."""
    try:
        return bool(os.stat(root).st_mode & stat.S_ISGID)
    except OSError:
        return False


def use_group_umask(root: Path) -> None:
    """Share what this process writes with the volume's group; it writes to the volume only."""
    if belongs_to_group(root):
        os.umask(os.umask(0o022) & ~GROUP)


@contextmanager
def group_umask(root: Path) -> Iterator[None]:
    """Share what the block writes with the volume's group; for a process without other threads that write."""
    if not belongs_to_group(root):
        yield
        return
    before = os.umask(0o022)
    os.umask(before & ~GROUP)
    try:
        yield
    finally:
        os.umask(before)


def may_not_read(path: Path, *, uid: int | None = None) -> Path | None:
    """
    Return what an account may not read or enter: the path itself, or the first folder above it.

    Args:
        uid: of the account, judged by mode bits; None: this process, asked of the kernel.

    Returns:
        None if it may read the path, or if that cannot be known.
    """
    if uid == os.geteuid():
        uid = None
    for folder in reversed(path.parents):
        if not _may(folder, os.X_OK, uid):
            return folder
    wanted = os.R_OK | os.X_OK if os.path.isdir(path) else os.R_OK
    return None if _may(path, wanted, uid) else path


def _may(path: Path, wanted: int, uid: int | None) -> bool:
    if uid is None:
        # By the effective ids, and so with capabilities; access(2) drops those of any account but root.
        return os.access(path, wanted, effective_ids=True) or not os.path.lexists(path)
    if uid == 0:
        return True
    try:
        about = os.stat(path)
    except OSError:
        return True
    if os.path.isdir(path) and _has_acl(path):
        return True
    groups = _groups_of(uid)
    if about.st_uid == uid:
        bits = about.st_mode >> 6
    elif groups is None or about.st_gid in groups:
        bits = about.st_mode >> 3
    else:
        bits = about.st_mode
    return bits & wanted == wanted


def _has_acl(path: Path) -> bool:
    """Return whether an ACL grants rights beyond the mode bits."""
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except OSError:
        return False


def _groups_of(uid: int) -> set[int] | None:
    """Return the groups of an account; None if it is unknown here."""
    import pwd

    try:
        account = pwd.getpwuid(uid)
        return set(os.getgrouplist(account.pw_name, account.pw_gid))
    except (KeyError, OSError):
        return None


def account_of(uid: int) -> str:
    """Return the name of an account, or its number if it is unknown here."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OSError):
        return f"uid {uid}"


def denied(path: Path) -> str:
    """Return the message that this account may not read a path."""
    return f"{this_account()} may not read {may_not_read(path) or path}"
