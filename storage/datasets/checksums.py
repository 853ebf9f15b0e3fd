"""
Checksums of a decoded data set.

CRC-32, because they detect damage (a torn disk, a truncated copy, zeros), not forgery: whoever
may write the file may write its checksums. zlib computes it at several GB/s on each of a few threads, so
that a data set of a gigabyte is checked in a fraction of a second once the disk has delivered it.
"""

import json
import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

BLOCK_BYTES = 4 << 20
READ_BYTES = 1 << 18
THREADS = 4
CHECKSUMS = "checksums"
"""Key in the index. An index without it was written by ganq 0.1.0 or older."""

Progress = Callable[[int, int], None]


class BlockChecksums:
    """Compute the checksum of each block of a stream while it is written."""

    def __init__(self) -> None:
        self.crc32: list[int] = []
        self._in_block = BLOCK_BYTES

    def update(self, data: bytes) -> None:
        view = memoryview(data)
        while len(view):
            if self._in_block == BLOCK_BYTES:
                self.crc32.append(0)
                self._in_block = 0
            part = view[: BLOCK_BYTES - self._in_block]
            self.crc32[-1] = zlib.crc32(part, self.crc32[-1])
            self._in_block += len(part)
            view = view[len(part) :]


def read_checksums(file: int, size: int, progress: Progress) -> list[int]:
    """
    Compute the checksum of each block of an open file.

    Args:
        file: its descriptor.
        progress: called with (blocks done, blocks).

    Raises:
        OSError: a block cannot be read. As an error, where a memory map would end the process.
    """

    local = threading.local()

    def checksum(block: int) -> int:
        # A buffer that is used again: fresh memory for each block would take as long as its checksum.
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(READ_BYTES))
        crc, at, end = 0, block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
        while at < end and (count := os.preadv(file, [local.buffer[: end - at]], at)):
            crc = zlib.crc32(local.buffer[:count], crc)
            at += count
        return crc  # of a block that is shorter than it should be, another one

    blocks = -(-size // BLOCK_BYTES)
    found = []
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="checksum")
    try:
        for crc in pool.map(checksum, range(blocks)):
            found.append(crc)
            progress(len(found), blocks)
    finally:
        pool.shutdown(cancel_futures=True)  # a run that is to stop does not wait for the rest
    return found


def with_checksums(index: dict[str, Any], crc32: list[int]) -> dict[str, Any]:
    """Return the index with the checksums of its images and of itself."""
    about = {"block_bytes": BLOCK_BYTES, "crc32": crc32, "index": index_checksum(index)}
    return {**index, CHECKSUMS: about}


def index_checksum(index: dict[str, Any]) -> int:
    """Return the checksum of an index without its checksums; JSON there and back does not change it."""
    rest = {key: value for key, value in index.items() if key != CHECKSUMS}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def damage(index: dict[str, Any], crc32: list[int]) -> str | None:
    """
    Return what is damaged, or None.

    Args:
        crc32: of the images as they are on the disk.
    """
    about = index[CHECKSUMS]
    if about["index"] != index_checksum(index):
        return "its index is not the one that was written"
    differ = [block for block, (is_, was) in enumerate(zip(crc32, about["crc32"], strict=True)) if is_ != was]
    if not differ:
        return None
    first = differ[0] * BLOCK_BYTES
    return f"{len(differ)} of {len(crc32)} blocks are not what was written, the first at byte {first}"
