"""
Decode images in child processes, which run storage/datasets/decode_worker.py.

If a child dies or hangs on an image, that image is left out and the child is replaced.
"""

import json
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import StorageError
from storage.datasets.decode_worker import ANSWER, READY, REQUEST
from storage.datasets.sources import Reading

WALL_SECONDS = 120.0
"""For one image; a child that has not answered by then is killed."""
WATCH_SECONDS = 1.0
AHEAD = 8
"""Images in flight for each child: enough to keep it busy, few enough to stay small in memory."""


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

    def __init__(self, reading: Reading) -> None:
        self.arguments = [str(reading.reader), repr(reading.white_level), reading.fit]
        self.process: subprocess.Popen[bytes] | None = None
        self.since: float | None = None
        """When the current request was sent."""
        self.stopped = False

    def _ensure(self) -> "subprocess.Popen[bytes]":
        if self.process is None or self.process.poll() is not None:
            self.close()  # the pipes of one that died by itself
            if self.stopped:
                raise StorageError("decoding was stopped")  # the answer is not awaited
            # By its path, and -P: the child must import nothing of ours, torch least of all.
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("decode_worker.py")), *self.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={},
            )
            assert self.process.stdout is not None
            if self.process.stdout.read(len(READY)) != READY:
                code = self.process.wait()
                self.close()
                raise StorageError(
                    f"a process that decodes images does not start (exit {code})",
                    hint="see ganq doctor: Pillow may be missing or broken, or memory too short",
                )
        return self.process

    def decode(self, number: int, data: bytes, size: int) -> Decoded:
        """
        Decode one image; a child that crashes or stalls is replaced.

        A child that died quickly is asked once more: the kernel, short of memory, may have
        killed it because of another process, and the cache is permanent.
        """
        began = self.since = time.monotonic()
        try:
            answer = self._ask(number, data, size)
            if answer is None and not self.stopped and time.monotonic() - began < WALL_SECONDS / 2:
                answer = self._ask(number, data, size)
        finally:
            self.since = None
        return answer or Decoded(number, {"reason": "crashed or stalled the decoder", "detail": ""}, b"")

    def _ask(self, number: int, data: bytes, size: int) -> Decoded | None:
        process = self._ensure()
        assert process.stdin is not None
        assert process.stdout is not None
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
        self.close()
        return None

    def kill_if_stalled(self) -> None:
        process, since = self.process, self.since
        if process is not None and since is not None and time.monotonic() - since > WALL_SECONDS:
            process.kill()

    def stop(self) -> None:
        """End the wait for an answer; called from another thread."""
        self.stopped = True
        process = self.process
        if process is not None:
            process.kill()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            for pipe in (self.process.stdin, self.process.stdout):
                with suppress(OSError):
                    if pipe is not None:
                        pipe.close()
            self.process.wait()
            self.process = None


def decode_all(
    images: Iterable[tuple[int, bytes]], *, size: int, workers: int, reading: Reading | None = None
) -> Iterator[Decoded]:
    """
    Decode (number, file's bytes) pairs in `workers` children.

    Yields:
        One answer for each image, in the order of the input.
    """
    local = threading.local()
    decoders: list[Decoder] = []

    def work(number: int, data: bytes) -> Decoded:
        if not hasattr(local, "decoder"):
            local.decoder = Decoder(reading or Reading())
            decoders.append(local.decoder)
        decoder: Decoder = local.decoder
        return decoder.decode(number, data, size)

    ended = threading.Event()

    def watch() -> None:
        # One thread for all: a Timer for each image cost a third of the speed.
        while not ended.wait(WATCH_SECONDS):
            for decoder in tuple(decoders):
                decoder.kill_if_stalled()

    threading.Thread(target=watch, name="decode-watch", daemon=True).start()
    waiting: deque[Future[Decoded]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for number, data in images:
            waiting.append(pool.submit(work, number, data))
            if len(waiting) >= workers * AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        ended.set()
        for future in waiting:
            future.cancel()
        for decoder in decoders:
            decoder.stop()
        pool.shutdown()
        # Only now is no thread left that could start another child.
        for decoder in decoders:
            decoder.close()
