"""
Read the state of this machine's supervisors from their status sockets.

The database is not used, so that no worker looks dead while it is unavailable.
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
"""A supervisor that does not answer for so long is stopped, or gets no processor time."""
MAX_LOOP_S = 180.0
"""A loop or heartbeat thread without an iteration for so long is stuck: an idle one makes one per minute."""
DRAIN_LATE_S = 30.0
OLD_KEYS = {"loop_s": "turned_s", "heartbeat_s": "beat_s", "report_s": "spoke_s"}
"""Keys that version 0.2 sends and reads instead; 0.4 drops them."""


class Status(StrEnum):
    """Health of a worker."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"  # the database, the volume or a driver is at fault; a restart does not help
    UNHEALTHY = "unhealthy"


@dataclass(frozen=True)
class Condition:
    """Health of one worker, the reason, and its state as `ganq health --json` shows it."""

    worker: str
    status: Status
    why: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        return self.status is not Status.UNHEALTHY


def ask_supervisors(runtime: Path, name: str | None = None) -> list[Condition]:
    """
    Return the condition of each worker with a status socket in this folder, or of the one of that name.

    All are asked at once, so that several that do not answer take no longer than one.
    """
    found = []
    for path in sorted(runtime.glob("live-*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(path.read_text())
            if name in (None, content["worker"]):
                found.append((str(content["worker"]), int(content["pid"]), path.with_suffix(".sock")))
    connections = [(worker, pid, path, _connect(path)) for worker, pid, path in found]
    deadline = time.monotonic() + ANSWER_S
    conditions = []
    for worker, pid, path, connection in connections:
        if isinstance(connection, socket.socket):
            with connection:
                conditions.append(_receive(worker, pid, connection, deadline))
        else:
            condition = _unreachable(worker, pid, path, connection)
            if condition is not None:
                conditions.append(condition)
    return _without_replaced(conditions)


def _without_replaced(conditions: list[Condition]) -> list[Condition]:
    """Drop killed workers that were started again; the files of the killed process still exist."""
    alive = {one.worker for one in conditions if one.healthy}
    return [one for one in conditions if one.healthy or one.worker not in alive]


def _connect(path: Path) -> socket.socket | OSError:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(1.0)
    try:
        connection.connect(str(path))
    except OSError as exc:
        connection.close()
        return exc
    return connection


def _unreachable(worker: str, pid: int, path: Path, exc: OSError) -> Condition | None:
    if isinstance(exc, BlockingIOError | TimeoutError):  # the queue of unanswered clients is full
        return Condition(worker, Status.UNHEALTHY, _no_answer(pid), {"pid": pid})
    if isinstance(exc, PermissionError):
        why = f"may not be asked by this user: {path}"
        return Condition(worker, Status.UNHEALTHY, why, {"pid": pid})
    launcher = path.stem.rpartition("-")[2]
    if not path.with_suffix(".json").exists():
        return None  # it has just exited
    if launcher.isdigit() and exists(int(launcher)):
        why = f"its supervisor (process {pid}) has died and has not been replaced yet"
    else:
        why = f"was killed (process {launcher}); start it again, or remove {path.with_suffix('.json')}"
    return Condition(worker, Status.UNHEALTHY, why, {"pid": pid})


def _receive(worker: str, pid: int, connection: socket.socket, deadline: float) -> Condition:
    answer = b""
    try:
        while not answer.endswith(b"\n"):
            connection.settimeout(max(deadline - time.monotonic(), 0.2))
            part = connection.recv(4096)
            if not part:
                raise ConnectionError
            answer += part
        return judge(json.loads(answer))
    except TimeoutError:
        return Condition(worker, Status.UNHEALTHY, _no_answer(pid), {"pid": pid})
    except (OSError, ValueError, KeyError, TypeError):
        why = f"process {pid} broke off its answer: it has just ended, or is another version of ganq"
        return Condition(worker, Status.UNHEALTHY, why, {"pid": pid})


def _no_answer(pid: int) -> str:
    states = {
        "T": ": it is stopped (kill -CONT continues it)",
        "D": ": it waits for a disk that does not answer",
    }
    return f"process {pid} does not answer within {ANSWER_S:.0f} s{states.get(state_of(pid), '')}"


def with_old_keys(facts: dict[str, Any]) -> dict[str, Any]:
    """Add the keys of version 0.2 to a supervisor's state, for `ganq health` of that version and scripts."""
    return facts | {old: facts[new] for new, old in OLD_KEYS.items() if new in facts}


def judge(facts: dict[str, Any]) -> Condition:
    """
    Return a worker's condition.

    Args:
        facts: the supervisor's state, see worker.supervisor.status_socket.StatusSocket.status(); ages in
            seconds.

    Raises:
        KeyError: a key is missing.
    """
    facts = {new: facts[old] for new, old in OLD_KEYS.items() if old in facts} | facts
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
            " the running job goes on, nothing is claimed or published until it does"
        )
    # The database answers, so none of the following is caused by waiting for it.
    if facts["loop_s"] > facts.get("stuck_after_s", MAX_LOOP_S):
        return Status.UNHEALTHY, f"is {doing}, but its main loop has been stuck for {facts['loop_s']:.0f} s"
    if facts["heartbeat_s"] > MAX_LOOP_S:
        return Status.UNHEALTHY, (
            f"is {doing}, but its heartbeat thread has been stuck for {facts['heartbeat_s']:.0f} s"
        )
    if facts.get("volume_s", 0.0) > facts.get("volume_after_s", 0.0):
        return Status.DEGRADED, (
            f"is {doing}; the volume {facts['volume']} has not answered for {facts['volume_s']:.0f} s:"
            " no job is claimed until it does"
        )
    if facts.get("stuck_runner") is not None:
        return Status.DEGRADED, (
            f"is {doing}; its runner (process {facts['stuck_runner']}) was killed and does not die, as"
            " it waits in the kernel: no job is claimed until it has died"
        )
    if facts["report_s"] > facts["away_after_s"]:
        return Status.DEGRADED, (
            f"is {doing}; the job table has accepted no heartbeat for {facts['report_s']:.0f} s"
        )
    return Status.HEALTHY, f"is {doing}"
