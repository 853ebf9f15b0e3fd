"""
The process that makes the supervisor's file calls on the shared volume, because each of them may hang.

It asks the volume at short intervals and reports each answer; from their absence the supervisor concludes
that the volume hangs. It is not replaced then: its call returns when the volume is back.

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
from worker.host.process import die_with_parent, where
from worker.ipc import Channel, Message

DUMP_S = 2.0


class VolumeProcess:
    """One thread asks, one listens; each request has one of its own, as it may last for ever."""

    def __init__(self, channel: Channel, volume: Volume, probe_s: float) -> None:
        self.channel = channel
        self.volume = volume
        self.probe_s = probe_s

    def serve(self) -> None:
        """Work until the supervisor is gone."""
        threading.Thread(target=self._probe, name="probe", daemon=True).start()
        while (messages := self.channel.receive()) is not None:
            for message in messages:
                with suppress(RuntimeError):  # no thread is free; what is not deleted is for `ganq gc`
                    threading.Thread(target=self._do, args=(message,), daemon=True).start()
        os._exit(0)

    def _probe(self) -> None:
        while True:
            # Not stat(2), which a cache of NFS may answer. An error is an answer.
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
            found = dump(message["pid"], Path(message["log_file"]), message["why"])
            self._send("dumped", number=message["number"], where=found)

    def _send(self, op: str, **facts: object) -> None:
        with suppress(OSError):  # the supervisor is gone, and serve() sees it
            self.channel.send(op, **facts)


def dump(pid: int, log_file: Path, why: str) -> str:
    """
    Have a runner write all its stacks into the job's log (faulthandler).

    The handler is C and needs no interpreter, so it also runs while something holds that.
    It does not run while the main thread waits in the kernel, or is stopped.

    Returns:
        Where the stacks are, or why there are none, in words.
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
    told = f"no stacks: its main thread is {where(pid)}"
    _append(log_file, told)
    return told


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
    Entry point of the process that worker/supervisor/volume_watch.py starts.

    Args:
        arguments: the supervisor's process id, the channel's file descriptor, the volume, and the seconds
            between two probes.
    """
    parent, fd, root, probe_s = arguments
    die_with_parent(int(parent), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with its supervisor
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    VolumeProcess(Channel(socket.socket(fileno=int(fd))), Volume(Path(root)), float(probe_s)).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
