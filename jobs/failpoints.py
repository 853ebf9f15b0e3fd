"""
Named places at which a test can inject a fault.

They do nothing unless GANQ_ENABLE_FAILPOINTS=1 was in the environment when the process started. No deployment
sets it, and a test shows that they are inert without it.

    GANQ_FAILPOINTS="durable.renamed=kill@2;train.step=sleep:0.5@3+"
    GANQ_FAILPOINTS_FIRED=/some/folder      an entry fires once over all processes, and leaves a mark

An entry is name=action[@k][+]: it fires when this process passes the place for the k-th time (default: the
first), with + also every later time. Actions:

    kill          SIGKILL to this process           stop      SIGSTOP to this process
    raise:ENOSPC  OSError with that errno           raise:MemoryError  any builtin exception
    sleep:2.5     seconds, letting other threads run
    hang:60       seconds, holding the interpreter: no thread of this process runs
    on            nothing by itself; failpoint() returns True, and the caller acts
"""

import builtins
import ctypes
import errno
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass

ENABLED = os.environ.get("GANQ_ENABLE_FAILPOINTS") == "1"


@dataclass(frozen=True)
class Entry:
    """One parsed entry of GANQ_FAILPOINTS."""

    action: str
    argument: str
    at: int = 1
    repeats: bool = False


def parse(text: str) -> dict[str, Entry]:
    """
    Parse the variable's value.

    Args:
        text: entries separated by ';', see the module.

    Raises:
        ValueError: not name=action.
    """
    entries = {}
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        name, equals, what = part.partition("=")
        if not equals:
            raise ValueError(f"no failpoint: {part!r}")
        what, _, at = what.partition("@")
        action, _, argument = what.partition(":")
        entries[name] = Entry(action, argument, int(at.rstrip("+") or 1), at.endswith("+"))
    return entries


_entries = parse(os.environ.get("GANQ_FAILPOINTS", "")) if ENABLED else {}
_times: Counter[str] = Counter()


def failpoint(name: str) -> bool:
    """
    Mark a named place; do nothing unless a test has armed it.

    Returns:
        True if the test wants the caller to act ('on').

    Raises:
        Exception: the one that the test names.
    """
    if not _entries or name not in _entries:
        return False
    return _fire(name, _entries[name])


def _fire(name: str, entry: Entry) -> bool:
    _times[name] += 1
    due = _times[name] >= entry.at if entry.repeats else _times[name] == entry.at
    if not due or not _first_of_all(name):
        return False
    if entry.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif entry.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif entry.action == "sleep":
        time.sleep(float(entry.argument))
    elif entry.action == "hang":
        # PyDLL keeps the interpreter's lock, as a kernel launch that never returns does.
        ctypes.PyDLL(None).usleep(int(float(entry.argument) * 1e6))
    elif entry.action == "raise":
        code = getattr(errno, entry.argument, None)
        if code is not None:
            raise OSError(code, os.strerror(code))
        raise getattr(builtins, entry.argument)(f"failpoint {name}")
    return entry.action == "on"


def _first_of_all(name: str) -> bool:
    """Return whether this process may fire: with GANQ_FAILPOINTS_FIRED, only the first of all processes."""
    folder = os.environ.get("GANQ_FAILPOINTS_FIRED")
    if folder is None:
        return True
    try:
        os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True
