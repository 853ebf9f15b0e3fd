"""
The passport of a generated PNG: a tEXt chunk that says from what the image was made.

    {"version": 1, "checkpoint": SHA-256 of its manifest, "index": sample index, "spec": options that choose
     the image, "build": what its last bits depend on, "pixels": start of the SHA-256 of its pixels}

`ganq remake` makes the image again from it.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jobs.errors import SpecError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KEYWORD = b"ganq"
VERSION = 1
SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER_BYTES = len(SIGNATURE) + 25
"""Length of signature and IHDR, after which the chunk is inserted."""
MAX_BYTES = 64 * 1024
DIGEST_CHARACTERS = 16
TYPES = {"version": int, "checkpoint": str, "index": int, "spec": dict, "build": dict, "pixels": str}


def digest(pixels_HW3: "NDArray[np.uint8]") -> str:
    """Return the start of the SHA-256 of an image's pixels, row by row, in hex."""
    return hashlib.sha256(pixels_HW3.tobytes()).hexdigest()[:DIGEST_CHARACTERS]


def with_passport(png: bytes, facts: Mapping[str, Any], pixels_HW3: "NDArray[np.uint8]") -> bytes:
    """Return a PNG with a passport; its pixels stay as they are."""
    text = json.dumps({"version": VERSION, **facts, "pixels": digest(pixels_HW3)}, separators=(",", ":"))
    body = b"tEXt" + KEYWORD + b"\0" + text.encode("ascii")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:HEADER_BYTES] + chunk + png[HEADER_BYTES:]


def read_passport(data: bytes, name: str) -> dict[str, Any]:
    """
    Return the passport of a PNG.

    Args:
        data: the whole file.
        name: of the file, in errors.

    Raises:
        SpecError: it is no PNG, or has no passport, or one that is damaged or of a newer ganq.
    """
    if not data.startswith(SIGNATURE):
        raise SpecError(f"{name} is no PNG", hint="only PNG files of ganq submit generate have a passport")
    text = _find(data)
    if text is None:
        raise SpecError(
            f"{name} has no passport: it was made with --no-passport, by ganq 0.2 or by another program, or "
            "a program that drops texts has saved it",
            hint="take the file that the job wrote (ganq open JOB); its manifest.jsonl has seed and index",
        )
    try:
        facts: dict[str, Any] = json.loads(text)
        damaged = any(type(facts[key]) is not kind for key, kind in TYPES.items())
    except (ValueError, KeyError, TypeError, RecursionError):
        damaged = True
    if damaged:
        raise SpecError(f"the passport of {name} is damaged", hint="take the file that the job wrote")
    if facts["version"] > VERSION:
        raise SpecError(f"the passport of {name} is of a newer ganq", hint="update ganq")
    return facts


def _find(data: bytes) -> bytes | None:
    """Return the text of the first chunk with this keyword, at any position; None if there is none."""
    place = len(SIGNATURE)
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + min(length, MAX_BYTES)]
        keyword, _, text = body.partition(b"\0")
        if kind == b"tEXt" and keyword == KEYWORD:
            return text
        if kind == b"iTXt" and keyword == KEYWORD and text[:1] == b"\0":  # as some editors save it
            return text.split(b"\0", 3)[-1]
        place += 12 + length
    return None
