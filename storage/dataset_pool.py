"""
Child processes that decode pictures: storage/ingest.py is what runs in them.

A child that dies or hangs on one picture costs that picture and nothing else.
"""

import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.ingest import ANSWER, REQUEST

WALL_SECONDS = 120.0
"""For one picture; a child that has not answered by then is killed."""
AHEAD = 8
"""Pictures in flight for each child: enough to keep it busy, few enough to stay small in memory."""


@dataclass(frozen=True)
class Decoded:
    """One answer: pixels (3·size·size bytes), or the reason why there are none."""

    number: int
    facts: dict[str, Any]
    pixels: bytes

    @property
    def reason(self) -> str | None:
        return self.facts.get("reason")


class Decoder:
    """One child process; used by one thread at a time."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def _ensure(self) -> "subprocess.Popen[bytes]":
        if self.process is None or self.process.poll() is not None:
            # By its path, and -P: the child must import nothing of ours, torch least of all.
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("ingest.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={},
            )
        return self.process

    def decode(self, number: int, data: bytes, size: int) -> Decoded:
        """Have one picture decoded; a child that falls over it is replaced."""
        process = self._ensure()
        assert process.stdin is not None
        assert process.stdout is not None
        watchdog = threading.Timer(WALL_SECONDS, process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            process.stdin.write(REQUEST.pack(number, size, len(data)) + data)
            process.stdin.flush()
            header = process.stdout.read(ANSWER.size)
            if len(header) == ANSWER.size:
                answered, text_bytes, pixel_bytes = ANSWER.unpack(header)
                text, pixels = process.stdout.read(text_bytes), process.stdout.read(pixel_bytes)
                if answered == number and len(text) == text_bytes and len(pixels) == pixel_bytes:
                    return Decoded(number, json.loads(text), pixels)
        except BrokenPipeError:
            pass
        finally:
            watchdog.cancel()
        self.close()
        return Decoded(number, {"reason": "crashed or stalled the decoder", "detail": ""}, b"")

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            for pipe in (self.process.stdin, self.process.stdout):
                with suppress(OSError):
                    if pipe is not None:
                        pipe.close()
            self.process.wait()
            self.process = None


def decode_all(pictures: Iterable[tuple[int, bytes]], *, size: int, workers: int) -> Iterator[Decoded]:
    """
    Decode (number, file's bytes) pairs in `workers` children.

    Yields:
        One answer a picture, in the order they came in.
    """
    local = threading.local()
    decoders: list[Decoder] = []

    def work(number: int, data: bytes) -> Decoded:
        if not hasattr(local, "decoder"):
            local.decoder = Decoder()
            decoders.append(local.decoder)
        decoder: Decoder = local.decoder
        return decoder.decode(number, data, size)

    waiting: deque[Future[Decoded]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            for number, data in pictures:
                waiting.append(pool.submit(work, number, data))
                if len(waiting) >= workers * AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            for decoder in decoders:
                decoder.close()
