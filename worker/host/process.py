"""Processes of this machine: identity, state, and how they end together."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
DEAD = ("Z", "X")
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
    Return an id of this boot of this machine and of this process namespace.

    Two containers on one machine share the boot but not their process ids, nor, in time namespaces, the
    start times of processes; so the namespaces are part of the id.

    Returns:
        Empty if the boot or the process namespace cannot be read.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    pid_namespace = _namespace("pid")
    return ":".join([boot, pid_namespace, _namespace("time")]) if boot and pid_namespace else ""


def _namespace(kind: str) -> str:
    try:
        return os.readlink(f"/proc/self/ns/{kind}").strip(f"{kind}:[]")
    except OSError:  # a kernel before 5.6 has no time namespaces
        return ""


def proc_is_ours() -> bool:
    """
    Return whether /proc lists processes by the ids of this process's own namespace.

    In a container that sees its host's /proc, /proc/42 is another process than the container's 42.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("NSpid:"):  # one id per namespace, from that of /proc to ours
                return line.split()[1:] == [str(os.getpid())]
    return False


def _stat(pid: int) -> list[str]:
    """Return /proc/<pid>/stat from the state on; empty if this process may not see it."""
    if not proc_is_ours():
        return []
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")  # a name is cut after 15 bytes
    except OSError:
        return []
    # The name in parentheses may contain spaces; the fields after the last ')' do not.
    return stat.rpartition(")")[2].split()


def start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 if it has ended or cannot be seen."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] not in DEAD else 0


def exists(pid: int) -> bool:
    """Return whether a process of this id exists in this process's namespace, of any user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def has_died(pid: int, ticks: int) -> bool:
    """
    Return True only if the recorded process is known to have ended.

    kill(2) answers for every process of the namespace. With hidepid, a missing /proc/<pid> proves nothing.
    /proc adds what it can show: a reused id, or a process that has ended and was not reaped.

    Args:
        pid: of a process of the same boot and namespace, see boot_id().
        ticks: its start_ticks(); 0 if it could not read them.
    """
    if pid <= 0:
        return False
    if not exists(pid):
        return True
    fields = _stat(pid)
    if not fields:
        return False
    return fields[0] in DEAD or 0 != ticks != int(fields[19])


def state_of(pid: int) -> str:
    """Return the letter of STATES that /proc shows for a process; empty if it shows none."""
    return (_stat(pid) or [""])[0]


def describe_state(pid: int) -> str:
    """Return the state of a process that does not answer, as text: 'asleep (futex_wait_queue)'."""
    state = state_of(pid)
    if not state:
        return "not visible in /proc" if exists(pid) else "gone"
    text = STATES.get(state, f"in state {state}")
    with suppress(OSError):
        if (function := Path(f"/proc/{pid}/wchan").read_text().strip("\0\n 0")) and state in "DS":
            text += f" ({function})"
    return text


def die_with_parent(parent: int, sig: signal.Signals) -> None:
    """
    Ask the kernel to signal this process when its parent dies (prctl(2)).

    Raises:
        SystemExit: the parent has died already.
    """
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        raise SystemExit(1)


def bound_to_this(sig: signal.Signals, command: list[str]) -> list[str]:
    """
    Return a command that runs `command` so that it gets `sig` when this process dies.

    This module, run as a program, sets the parent-death signal, which outlives execve(2), and becomes the
    command. A preexec function between fork and exec could deadlock.
    """
    return [sys.executable, "-P", "-m", "worker.host.process", str(os.getpid()), str(int(sig)), *command]


def release_free_memory() -> None:
    """Return freed memory to the kernel (glibc; other C libraries do so themselves)."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]), signal.Signals(int(sys.argv[2])))
    os.execvp(sys.argv[3], sys.argv[3:])
