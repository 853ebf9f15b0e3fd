"""
Ask the supervisors of this machine for their state, over their own sockets.

No database is asked, so that a database that is away makes no worker look dead.
"""

import json
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from worker.host.process import exists, state_of

ANSWER_S = 5.0
"""A supervisor that does not answer for so long is stopped, frozen, or starved of the processor."""
LOOP_S = 180.0
"""A loop or heartbeat thread that has made no iteration for so long is stuck: idle ones make one a minute."""
DRAIN_LATE_S = 30.0


class Status(StrEnum):
    """How a worker is."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"  # it works as well as its surroundings let it; a restart mends nothing
    UNHEALTHY = "unhealthy"


@dataclass(frozen=True)
class Condition:
    """One worker, judged."""

    worker: str
    status: Status
    why: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        return self.status is not Status.UNHEALTHY


def ask_supervisors(runtime: Path, name: str | None = None) -> list[Condition]:
    """All at once, so that several that are stopped take no longer than one."""
    signs = []
    for path in sorted(runtime.glob("live-*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            sign = json.loads(path.read_text())
            if name in (None, sign["worker"]):
                signs.append((str(sign["worker"]), int(sign["pid"]), path.with_suffix(".sock")))
    lines = [(worker, pid, path, _connect(path)) for worker, pid, path in signs]
    deadline = time.monotonic() + ANSWER_S
    conditions = []
    for worker, pid, path, line in lines:
        if isinstance(line, socket.socket):
            with line:
                conditions.append(_hear(worker, pid, line, deadline))
        else:
            condition = _unreachable(worker, pid, path, line)
            if condition is not None:
                conditions.append(condition)
    return _without_ghosts(conditions)


def _without_ghosts(conditions: list[Condition]) -> list[Condition]:
    """A worker that was started again under another process leaves its killed self behind."""
    alive = {one.worker for one in conditions if one.healthy}
    return [one for one in conditions if one.healthy or one.worker not in alive]


def _connect(path: Path) -> socket.socket | OSError:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.settimeout(1.0)
    try:
        line.connect(str(path))
    except OSError as exc:
        line.close()
        return exc
    return line


def _unreachable(worker: str, pid: int, path: Path, exc: OSError) -> Condition | None:
    if isinstance(exc, BlockingIOError | TimeoutError):  # many have asked, and none was answered
        return Condition(worker, Status.UNHEALTHY, _silence(pid), {"pid": pid})
    if isinstance(exc, PermissionError):
        why = f"may not be asked by this user: {path}"
        return Condition(worker, Status.UNHEALTHY, why, {"pid": pid})
    launcher = path.stem.rpartition("-")[2]
    if not path.with_suffix(".json").exists():
        return None  # it has just said goodbye
    if launcher.isdigit() and exists(int(launcher)):
        why = f"its supervisor (process {pid}) has died and none has taken its place yet"
    else:
        why = f"was killed (process {launcher}); start it again, or remove {path.with_suffix('.json')}"
    return Condition(worker, Status.UNHEALTHY, why, {"pid": pid})


def _hear(worker: str, pid: int, line: socket.socket, deadline: float) -> Condition:
    said = b""
    try:
        while not said.endswith(b"\n"):
            line.settimeout(max(deadline - time.monotonic(), 0.2))
            part = line.recv(4096)
            if not part:
                raise ConnectionError
            said += part
        facts = json.loads(said)
        return judge(facts)
    except TimeoutError:
        return Condition(worker, Status.UNHEALTHY, _silence(pid), {"pid": pid})
    except (OSError, ValueError, KeyError, TypeError):
        why = f"process {pid} broke off its answer: it has just ended, or is another version of ganq"
        return Condition(worker, Status.UNHEALTHY, why, {"pid": pid})


def _silence(pid: int) -> str:
    how = {
        "T": ": it is stopped (kill -CONT lets it go on)",
        "D": ": it waits for a disk that does not answer",
    }
    return f"process {pid} does not answer within {ANSWER_S:.0f} s{how.get(state_of(pid), '')}"


def judge(facts: dict[str, Any]) -> Condition:
    """
    Args:
        facts: what worker.supervisor.status_socket.Pulse.facts() says; ages in seconds.

    Raises:
        KeyError: a fact is missing.
    """
    status, why = _verdict(facts)
    return Condition(str(facts["worker"]), status, why, facts)


def _verdict(facts: dict[str, Any]) -> tuple[Status, str]:
    doing = f"{facts['state']} with job {facts['job_id']}" if facts["job_id"] is not None else facts["state"]
    draining_s, silent_s = facts["draining_s"], facts["database_s"]
    if facts["dead_threads"]:
        return Status.UNHEALTHY, f"is {doing}, but its {' and '.join(facts['dead_threads'])} has died"
    if draining_s is not None and draining_s > facts["drain_seconds"] + DRAIN_LATE_S:
        return Status.UNHEALTHY, f"has been draining for {draining_s:.0f} s, longer than it may"
    if silent_s > facts["away_after_s"]:
        return Status.DEGRADED, (
            f"is {doing}; the job table has not answered for {silent_s:.0f} s:"
            " the work goes on, nothing is claimed or published until it does"
        )
    # The database answers, so that nothing of this is a wait for it.
    if facts["turned_s"] > facts.get("stuck_after_s", LOOP_S):
        return Status.UNHEALTHY, f"is {doing}, but its loop has been stuck for {facts['turned_s']:.0f} s"
    if facts["beat_s"] > LOOP_S:
        return Status.UNHEALTHY, f"is {doing}, but its heart has been stuck for {facts['beat_s']:.0f} s"
    if facts.get("volume_s", 0.0) > facts.get("volume_after_s", 0.0):
        return Status.DEGRADED, (
            f"is {doing}; the volume {facts['volume']} has not answered for {facts['volume_s']:.0f} s:"
            " no job is taken until it does"
        )
    if facts.get("stuck_runner") is not None:
        return Status.DEGRADED, (
            f"is {doing}; its runner (process {facts['stuck_runner']}) was killed and does not die, as"
            " it waits in the kernel: no job is taken until it has"
        )
    if facts["spoke_s"] > facts["away_after_s"]:
        return Status.DEGRADED, (
            f"is {doing}; the job table has taken no word of it for {facts['spoke_s']:.0f} s"
        )
    return Status.HEALTHY, f"is {doing}"


# --- the job table ------------------------------------------------------------------------
