"""Facts about processes of this machine: who they are, whether they still live, how they die together."""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
STATES = {
    "R": "running",
    "S": "asleep",
    "D": "waiting in the kernel, where no signal reaches it",
    "T": "stopped",
    "t": "stopped by a debugger",
    "Z": "dead",
}


def boot_id() -> str:
    """
    Names this boot of this machine and this process namespace.

    Two containers on one machine share the boot but not their process ids, so
    the namespace is part of the name; nor, in time namespaces, when a process began.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return ":".join([boot, *(_namespace(kind) for kind in ("pid", "time"))])


def _namespace(kind: str) -> str:
    try:
        return os.readlink(f"/proc/self/ns/{kind}").strip(f"{kind}:[]")
    except OSError:  # a kernel before 5.6 has no time namespaces
        return ""


def start_ticks(pid: int) -> int:
    """When a process began, in clock ticks since boot; 0 if it is gone. Tells a reused id apart."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The name in parentheses may hold spaces; what follows the last ')' does not.
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] in ("Z", "X") else int(fields[19])


def is_alive(pid: int, ticks: int) -> bool:
    """Whether the very process that was recorded still lives."""
    return start_ticks(pid) == ticks != 0


def where(pid: int) -> str:
    """What a process that does not answer is doing, by /proc, in words."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    told = STATES.get(state, f"in state {state}")
    with suppress(OSError):
        if (place := Path(f"/proc/{pid}/wchan").read_text().strip("\0\n 0")) and state in "DS":
            told += f" ({place})"
    return told


def die_with_parent(parent: int, sig: signal.Signals) -> None:
    """
    Have the kernel signal this process when its parent dies (prctl(2)).

    Raises:
        SystemExit: the parent is already gone.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        raise SystemExit(1)


def bound_to_this(sig: signal.Signals, command: list[str]) -> list[str]:
    """
    A command that runs `command` so that it gets `sig` when this process dies.

    A small program in between asks the kernel for that and then becomes the command;
    the wish outlives execve(2). A function between fork and exec could deadlock here.
    """
    return [sys.executable, "-P", "-m", "worker.process", str(os.getpid()), str(int(sig)), *command]


def release_free_memory() -> None:
    """Give what was freed back to the kernel, where the C library keeps it and can be asked (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]), signal.Signals(int(sys.argv[2])))
    os.execvp(sys.argv[3], sys.argv[3:])
