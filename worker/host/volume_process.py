"""
The volume process: makes the supervisor's file calls on the shared volume, because each of them may hang.

It probes the volume at short intervals and reports each answer; from their absence the supervisor concludes
that the volume hangs. The process is not replaced then: its call returns when the volume is back.

supervisor → this   delete {job_id, paths} · dump {number, pid, log_file, why}
this → supervisor   answered · deleted {job_id, paths} · dumped {number, where}
"""

import os
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from storage.volume.layout import Volume
from storage.volume.permissions import use_group_umask
from worker.host.process import describe_state, die_with_parent
from worker.ipc import Channel, Message

DUMP_S = 2.0


class VolumeProcess:
    """Probes in one thread, receives in another; each request has its own thread, as it may never return."""

    def __init__(self, channel: Channel, volume: Volume, probe_s: float) -> None:
        self.channel = channel
        self.volume = volume
        self.probe_s = probe_s

    def serve(self) -> None:
        """Run until the supervisor has exited."""
        threading.Thread(target=self._probe, name="probe", daemon=True).start()
        while (messages := self.channel.receive()) is not None:
            for message in messages:
                with suppress(RuntimeError):  # no thread can be started; `ganq gc` deletes what is left
                    threading.Thread(target=self._do, args=(message,), daemon=True).start()
        os._exit(0)

    def _probe(self) -> None:
        while True:
            # NFS may answer stat(2) from a cache. An error is an answer, too.
            try:
                os.statvfs(self.volume.jobs)
            except OSError:
                with suppress(OSError):
                    os.statvfs(self.volume.root)
            self._send("answered")
            time.sleep(self.probe_s)

    def _do(self, message: Message) -> None:
        if message["op"] == "delete":
            for path in message["paths"]:
                shutil.rmtree(self.volume.absolute(path), ignore_errors=True)
            self._send("deleted", job_id=message["job_id"], paths=message["paths"])
        elif message["op"] == "dump":
            where = dump(message["pid"], Path(message["log_file"]), message["why"])
            self._send("dumped", number=message["number"], where=where)

    def _send(self, op: str, **fields: object) -> None:
        with suppress(OSError):  # the supervisor has exited, and serve() notices
            self.channel.send(op, **fields)


def dump(pid: int, log_file: Path, why: str) -> str:
    """
    Make a runner write the stacks of all its threads to the job's log (faulthandler).

    The handler is C code and needs no interpreter lock, so it also runs while a thread holds that. It does
    not run while the main thread waits in the kernel or is stopped.

    Returns:
        Where the stacks are, or why there are none, as text.
    """
    _append(log_file, why)
    before = _size(log_file)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + DUMP_S
    while _size(log_file) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    if _size(log_file) > before:
        time.sleep(0.2)  # the other threads' stacks follow
        return "the stacks of its threads are in its log"
    reason = f"no stacks: its main thread is {describe_state(pid)}"
    _append(log_file, reason)
    return reason


def _append(log_file: Path, line: str) -> None:
    with suppress(OSError), open(log_file, "a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%H:%M:%S')} {line}\n")


def _size(log_file: Path) -> int:
    try:
        return log_file.stat().st_size
    except OSError:
        return 0


def main(arguments: list[str]) -> None:
    """
    Run the process; worker/supervisor/volume_monitor.py starts it.

    Args:
        arguments: the supervisor's process id, the channel's file descriptor, the volume, and the seconds
            between two probes.
    """
    parent, fd, root, probe_s = arguments
    die_with_parent(int(parent), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with its supervisor
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    use_group_umask(Path(root))
    VolumeProcess(Channel(socket.socket(fileno=int(fd))), Volume(Path(root)), float(probe_s)).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
