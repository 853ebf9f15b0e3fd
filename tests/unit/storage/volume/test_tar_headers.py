"""Headers of tar archives, compared with those of the standard library."""

import tarfile
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storage.volume.tar_headers import Header, header

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=300)
SIZES = st.integers(0, (1 << 33) + 5)
FIELDS = ("name", "size", "type")
READ = [*range(100), *range(124, 136), *range(148, 157), *range(345, 500)]
"""Bytes of name, size, checksum, type and prefix."""


def of_tarfile(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry.tobuf(tarfile.PAX_FORMAT)


def read(kind: type[tarfile.TarInfo], block: bytes) -> Any:
    try:
        found = kind.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as exc:
        return type(exc).__name__
    return {name: getattr(found, name) for name in FIELDS}


@given(NAMES, SIZES)
@example("images/000001.png", 8192)
@example("a" * 100, 0)
@example("a" * 101, (1 << 33) - 1)
@example("é", 1 << 33)
def test_a_header_is_that_of_tarfile(name: str, size: int) -> None:
    assert header(name, size) == of_tarfile(name, size)


@given(NAMES, SIZES, st.sampled_from((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
def test_a_header_is_read_as_tarfile_reads_it(name: str, size: int, format: Literal[0, 1, 2]) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = size
    try:
        block = entry.tobuf(format)[: tarfile.BLOCKSIZE]
    except ValueError:  # the format has no room for it
        return
    assert read(Header, block) == read(tarfile.TarInfo, block)


@given(st.sampled_from(READ), st.integers(0, 255), st.booleans())
@example(135, ord("7"), True)
@example(156, ord("5"), True)
@example(156, ord("5"), False)
@example(124, 0x80, True)
def test_a_damaged_header_is_read_or_refused_as_tarfile_does(
    at: int, byte: int, checksum_right: bool
) -> None:
    block = bytearray(header("images/000001.png", 8192))
    block[at] = byte
    if checksum_right:
        block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]  # type: ignore[attr-defined]
    assert read(Header, bytes(block)) == read(tarfile.TarInfo, bytes(block))


@pytest.mark.parametrize("block", [b"", bytes(512), b"x" * 100, b"x" * 512])
def test_what_is_no_header_is_refused_as_tarfile_does(block: bytes) -> None:
    assert isinstance(read(Header, block), str)
    assert read(Header, block) == read(tarfile.TarInfo, block)
