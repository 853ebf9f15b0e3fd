"""
The log relay: writes the log of a worker and of all its processes, so that none of them blocks on it.

A terminal stopped with Ctrl-S, a full pipe or a stuck log collector blocks the process that writes to it;
here that is this process alone. It queues up to QUEUE_BYTES, drops further lines, and logs how many once it
can write again. It is a separate process because it must outlive a worker that is killed and also relay
what C libraries and the interpreter write. It is run by its path and imports nothing of ganq, so that it
starts in some milliseconds.
"""

import json
import os
import signal
import sys
import threading
import time
from collections import deque

QUEUE_BYTES = 4_000_000
LINE_BYTES = 65_536
"""Longer lines are cut."""
LINGER_S = 2.0
"""After all writers have ended: how long to wait for a destination that accepts nothing."""
GATHER_S = 0.01
"""Pause between reads: a worker that runs hundreds of jobs a second does not wake this for each line."""
RETRY_S = 0.1
RETRY_FAILED_S = 1.0


class Relay:
    """A bounded queue of lines between two threads."""

    def __init__(self, limit: int, *, as_json: bool) -> None:
        self.limit = limit
        self.as_json = as_json
        self.changed = threading.Condition()
        self.lines: deque[bytes] = deque()
        self.size = 0
        self.dropped = 0
        self.dropped_since = 0.0
        self.closed = False
        self.written_at = time.monotonic()

    # --- from the worker ------------------------------------------------------------------

    def read(self, source: int) -> None:
        """Queue lines from a file descriptor until every writer has closed its end."""
        rest = b""
        while data := os.read(source, LINE_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > LINE_BYTES:
                lines, rest = [*lines, rest], b""
            self.put(lines)
            if len(data) < LINE_BYTES:
                time.sleep(GATHER_S)
        self.put([rest] if rest else [])
        with self.changed:
            self.closed = True
            self.changed.notify()

    def put(self, lines: list[bytes]) -> None:
        with self.changed:
            for line in lines:
                # After an overflow wait until half is free: each gap costs a line that reports it.
                limit = self.limit // 2 if self.dropped else self.limit
                if self.size + len(line) >= limit:
                    self._drop(1)
                    continue
                if self.dropped:
                    self._append(self._gap_line())
                self._append(line + b"\n")
            self.changed.notify()

    def _append(self, line: bytes) -> None:
        self.lines.append(line)
        self.size += len(line)

    def _drop(self, lines: int) -> None:
        if not self.dropped:
            self.dropped_since = time.monotonic()
        self.dropped += lines

    def _gap_line(self) -> bytes:
        message = (
            f"{self.dropped:,} lines of this log were dropped: nothing could be written to it"
            f" for {time.monotonic() - self.dropped_since:.0f} s"
        )
        self.dropped = 0
        if self.as_json:
            facts = {"at": time.time(), "level": "WARNING", "logger": "ganq.logs", "message": message}
            return json.dumps(facts).encode() + b"\n"
        return f"{time.strftime('%Y-%m-%d %H:%M:%S')},000 WARNING ganq.logs: {message}\n".encode()

    # --- to the destination ---------------------------------------------------------------

    def write(self, destination: int) -> None:
        """Write queued lines to a file descriptor until the queue is closed and empty."""
        while True:
            with self.changed:
                while not (self.lines or self.dropped or self.closed):
                    self.changed.wait()
                batch, lost = self._next_batch()
            if not batch:
                return
            if not _write_all(destination, b"".join(batch)):  # a full disk, or a reader that has exited
                with self.changed:
                    self._drop(lost)
                if self.closed:
                    return
                time.sleep(RETRY_FAILED_S)
            self.written_at = time.monotonic()

    def _next_batch(self) -> tuple[list[bytes], int]:
        """Take lines from the queue; return them, and how many are lost if they cannot be written."""
        batch: list[bytes] = []
        taken = 0
        while self.lines and taken < LINE_BYTES:
            batch.append(self.lines.popleft())
            taken += len(batch[-1])
        self.size -= taken
        if batch or not self.dropped:
            return batch, len(batch)
        lost = self.dropped
        return [self._gap_line()], lost


def _write_all(destination: int, data: bytes) -> bool:
    while data:
        try:
            data = data[os.write(destination, data) :]
        except BlockingIOError:  # another process has made it non-blocking
            time.sleep(RETRY_S)
        except OSError:
            return False
    return True


def main(arguments: list[str]) -> None:
    """
    Relay lines from stdin to stderr.

    Args:
        arguments: 'text' or 'json'; then the queue's size in bytes, if not QUEUE_BYTES.
    """
    # A service manager signals every process of a worker; this one ends after the others.
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(sig, signal.SIG_IGN)
    relay = Relay(int(arguments[1]) if len(arguments) > 1 else QUEUE_BYTES, as_json=arguments[0] == "json")
    writer = threading.Thread(target=relay.write, args=(2,), daemon=True)
    writer.start()
    relay.read(0)
    relay.written_at = time.monotonic()
    while writer.is_alive() and time.monotonic() - relay.written_at < LINGER_S:
        writer.join(0.05)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
