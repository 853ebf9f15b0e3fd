"""Other users of this machine, for tests that run as root, and limits on how many processes they may have."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILES = "-all,+dac_override,+fowner,+chown"
"""Every file of the test, as if all users were in one group; no right over processes of others."""

HIDEPID = ("unshare", "--mount", "sh", "-c", 'mount -t proc -o hidepid=2 proc /proc && exec "$@"', "sh")
"""A command that runs another one where /proc hides the processes of other users, as hardened machines do."""


OPENED = """
set -e
held=$(mktemp -d)
mount --bind "$2" "$held"
mount -t tmpfs -o mode=755 none "$1"
mkdir -p "$2"
mount --move "$held" "$2"
rmdir "$held"
shift 2
exec "$@"
"""


def with_python() -> tuple[str, ...]:
    """
    A command that runs another one where every user can run this Python.

    That of pyenv lies in a home that only its owner may enter: there, in a mount namespace, the home holds
    nothing but Python.
    """
    python = Path(sys.base_prefix)
    closed = [folder for folder in python.parents if not folder.stat().st_mode & 0o001]
    return ("unshare", "--mount", "sh", "-c", OPENED, "sh", str(closed[-1]), str(python)) if closed else ()


def account(uid: int, group: int) -> tuple[str, ...]:
    """A command that runs another one as this user, a member of this group, without any capability."""
    return (
        *with_python(),
        *("setpriv", "--reuid", str(uid), "--regid", str(uid), "--groups", str(group)),
        *("--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"),
    )


def user(uid: int) -> tuple[str, ...]:
    """A command that runs another one as this user."""
    return (
        *("setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"),
        *(f"--inh-caps={FILES}", f"--ambient-caps={FILES}", f"--bounding-set={FILES}"),
    )


def limited_user(uid: int) -> tuple[str, ...]:
    """The same for processes whose number is to be limited: no limit holds for root, anybody else stays."""
    return user(uid) if os.geteuid() == 0 else ()


def why_not(*command: str) -> str | None:
    """Return why this machine cannot run that."""
    if shutil.which(command[0]) is None:
        return f"there is no {command[0]}"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{' '.join(command)}: {done.stderr.strip()}" if done.returncode else None


def no_more_processes(pid: int, uid: int) -> None:
    """From now on every fork and every new thread of this process fails."""
    _limit(pid, uid, "1")


def processes_again(pid: int, uid: int) -> None:
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    _limit(pid, uid, "unlimited" if soft == resource.RLIM_INFINITY else str(soft))


def _limit(pid: int, uid: int, soft: str) -> None:
    # By the same user: root without CAP_SYS_RESOURCE may not.
    subprocess.run([*limited_user(uid), "prlimit", f"--pid={pid}", f"--nproc={soft}:"], check=True)


def runtime_folders(request: pytest.FixtureRequest, *uids: int) -> list[Path]:
    """Those that workers of these users make for the test's GANQ_HOME."""
    if "settings" not in request.fixturenames:
        return []
    mine = request.getfixturevalue("settings").runtime
    return [mine.with_name(mine.name.replace(f"ganq-{os.getuid()}-", f"ganq-{uid}-")) for uid in uids]
