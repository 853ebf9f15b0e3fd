"""Archives that were made to hang or to fill a machine are refused, with the file and the limit they met."""

import gzip
import io
import lzma
import os
import re
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import psutil
import pytest
from PIL import Image

from ganq.submission.preflight import usual_side
from jobs.errors import DatasetError, StorageError
from storage.datasets import archives
from storage.datasets.cache import open_images
from storage.datasets.decode_pool import decode_all
from storage.datasets.sources import Reading, open_reader, scan
from storage.sandbox import NOBODY_ID

if TYPE_CHECKING:
    from storage.volume.layout import Volume

MAX_SECONDS = 30.0
"""For what takes STALL_SECONDS at most, on a machine that does other things besides."""


def readers() -> list[psutil.Process]:
    """The processes of this one that read archives; a session's servers may be its children, too."""
    children = psutil.Process().children()
    return [one for one in children if any("archive_process" in part for part in one.cmdline())]


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def header(name: str = "a.png", size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


def block(info: tarfile.TarInfo, data: bytes = b"") -> bytes:
    """A member as it lies in a tar."""
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def with_size(info: tarfile.TarInfo, size: int) -> bytes:
    """A header with a size in base 256, as GNU tar writes what octal digits cannot say."""
    raw = bytearray(block(info))
    raw[124:136] = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


def pax(record: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return block(header("x", len(record), kind), record)


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body


def zip_of(members: int, *, size: int = 0) -> bytes:
    """A zip whose table of contents names one region of the file many times, each time as another file."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    content = os.urandom(1000) + bytes(size)
    packed = packer.compress(content) + packer.flush()
    local = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, 0, 8, 0, 0, 0, len(packed), len(content), 5, 0)
    table = b"".join(
        struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            *(b"PK\1\2", 20, 20, 0, 8, 0, 0, zlib.crc32(content), len(packed), len(content)),
            *(len(name), 0, 0, 0, 0, 0, 0),
        )
        + name
        for name in (b"%x.png" % number for number in range(members))
    )
    start = len(local) + 5 + len(packed)
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, members, members, len(table), start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + len(table), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return local + b"0.png" + packed + table + end64 + locator + end


END = bytes(1024)
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a header of negative size": (
        lambda: block(header("a.png", 3), b"abc") + with_size(header("x", 0, tarfile.XHDTYPE), -512),
        "a size of -512 bytes",
    ),
    "a member of negative size": (
        lambda: block(header("a.png", 3), b"abc") + with_size(header("b.png"), -512) + END,
        "a size of -512 bytes",
    ),
    "a negative size in a pax header": (
        lambda: (
            block(header("a.png", 3), b"abc") + pax(record("size", "-1536")) + block(header("b.png")) + END
        ),
        "a size of -1536 bytes",
    ),
    "a pax record of 200,000 digits": (
        lambda: pax(b"1" * 200_000) + block(header()) + END,
        "more CPU time than the limits",
    ),
    "a pax header of 40 MB": (lambda: pax(b"1" * (40 << 20)), "a header of 41943040 bytes"),
    "a long name of 40 MB": (
        lambda: block(header("x", 40 << 20, tarfile.GNUTYPE_LONGNAME), b"a" * (40 << 20)),
        "a header of 41943040 bytes",
    ),
    "a packed file of endless zeros": (
        lambda: gzip.compress(block(header("a.mov", 2 << 30)) + bytes(64 << 20), 9),
        "unpacks to more than 0.05 GB",
    ),
    "a chain of 100,000 headers": (
        lambda: block(header("x", 1, tarfile.GNUTYPE_LONGNAME), b"y") * 100_000 + block(header()),
        "broken archive",
    ),
    "members that lie over each other": (lambda: zip_of(2000, size=40_000), "unpacks to more than 0.05 GB"),
    "a table of contents that lies": (
        lambda: (good := zip_of(3))[:-82] + good[-82:-58] + (1 << 60).to_bytes(8, "little") * 2 + good[-42:],
        "broken archive",
    ),
    "a dictionary of 1.5 GB": (
        lambda: (
            (good := lzma.compress(block(header()) + END, lzma.FORMAT_ALONE))[:1]
            + (0x60000000).to_bytes(4, "little")
            + good[5:]
        ),
        "of memory",
    ),
    "a sparse map of 1e18 bytes": (
        lambda: (
            pax(record("GNU.sparse.size", str(10**18)) + record("GNU.sparse.numblocks", "0"))
            + block(header("a.png"))
            + END
        ),
        "unpacks to more than 0.05 GB",
    ),
}


@pytest.mark.parametrize(("make", "said"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_archive_is_refused_with_its_name_and_the_limit(
    tmp_path: Path, make: Callable[[], bytes], said: str
) -> None:
    path = tmp_path / "faces.tar"
    path.write_bytes(make())
    code = (
        "import re, sys\nfrom pathlib import Path\nfrom jobs.errors import DatasetError\n"
        "from storage.datasets.cache import check\nfrom storage.datasets.sources import Reading\n"
        "try:\n    print(check(Path(sys.argv[1]), reading=Reading(max_unpacked_gb=0.05)))\n"
        "except DatasetError as exc:\n    print(exc.message)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=2 * MAX_SECONDS
    )
    assert time.monotonic() - began < MAX_SECONDS
    message, kilobytes = done.stdout.splitlines()
    assert str(path) in message
    assert said in message
    assert int(kilobytes) < 400_000


def test_a_sparse_map_that_runs_backwards_ends_while_it_is_unpacked(tmp_path: Path, volume: "Volume") -> None:
    """Listing it is harmless; unpacking it unpacks all that lies before again for each piece."""
    piece, pieces = 1 << 16, 2000
    places = ",".join(f"{i * piece},{piece},{(i + 1) * piece},{-piece}" for i in range(pieces))
    sparse = record("GNU.sparse.size", str(piece * pieces)) + record("GNU.sparse.map", places)
    sparse += record("GNU.sparse.numblocks", str(2 * pieces))
    before = os.urandom(20 << 20)
    data = block(header("a.mov", len(before)), before) + pax(sparse)
    path = tmp_path / "faces.tar.gz"
    path.write_bytes(gzip.compress(data + block(header("a.png", piece), os.urandom(piece)) + END, 1))
    assert scan(path).names == ["a.png"]
    with pytest.raises(DatasetError, match=r"more CPU time than the limits .* 5 s without"):
        open_images(volume, str(path), 16)
    assert list(volume.datasets.iterdir()) == []


def test_a_zip_of_many_entries_is_listed_quickly(tmp_path: Path) -> None:
    (tmp_path / "faces.zip").write_bytes(zip_of(100_000))
    began = time.monotonic()
    assert len(scan(tmp_path / "faces.zip").names) == 100_000
    assert time.monotonic() - began < MAX_SECONDS


def itxt_bomb() -> bytes:
    """A sound PNG with a text that unpacks to 1 GB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    text = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1024)) + packer.flush()
    whole = png()
    return whole[:33] + chunk(b"iTXt", b"a\0\1\0\0\0" + text) + whole[33:]


def test_a_text_in_an_image_that_unpacks_to_a_gigabyte_is_not_unpacked() -> None:
    began = time.monotonic()
    (answer,) = decode_all([(0, itxt_bomb())], size=16, workers=1)
    assert answer.reason is None, "the text is skipped, and the image is used"
    (answer,) = decode_all([(0, itxt_bomb())], size=16, workers=1, reading=Reading(reader=1))
    assert answer.reason == "broken or truncated", "as ganq 0.2 had it"
    assert time.monotonic() - began < MAX_SECONDS


def test_the_size_of_an_image_that_claims_too_many_pixels_is_refused(
    tmp_path: Path,
) -> None:
    whole = png()
    size = struct.pack(">II", 100_000, 100_000)
    body = b"IHDR" + size + whole[24:29]
    (tmp_path / "a.png").write_bytes(whole[:12] + body + struct.pack(">I", zlib.crc32(body)) + whole[33:])
    with pytest.raises(DatasetError, match="more than 64 megapixels"):
        usual_side(tmp_path, Reading())


def test_the_process_that_reads_an_archive_is_confined_and_ends_with_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "faces.zip"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("a.png", png())
    listing = scan(path)
    with open_reader(listing, tmp_path) as reader:
        assert reader.read("a.png") == png()
        (child,) = readers()
        status = Path(f"/proc/{child.pid}/status").read_text()
        assert "Seccomp:\t2" in status
        assert "NoNewPrivs:\t1" in status
        if os.geteuid() == 0:
            assert f"Uid:\t{NOBODY_ID}\t{NOBODY_ID}" in status
        limits = Path(f"/proc/{child.pid}/limits").read_text()
        (memory,) = re.findall(r"Max address space +(\d+)", limits)
        assert int(memory) < 1 << 30
    assert not child.is_running()


def test_a_process_that_says_nothing_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "faces.zip"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("a.png", png())
    monkeypatch.setattr(archives, "WALL_SECONDS", 0.5)
    with archives.ArchiveProcess(path, "serve", reader=2, most_bytes=10**9) as child:
        for _ in child.frames():
            pass
        child.process.send_signal(19)  # SIGSTOP: as one that waits for a disk
        with pytest.raises(StorageError, match=r"faces\.zip was not read on for 0 s"):
            child.ask("a.png")
    assert child.process.returncode == -9


def test_a_zip_whose_reader_is_killed_loses_no_image(tmp_path: Path) -> None:
    path = tmp_path / "faces.zip"
    with zipfile.ZipFile(path, "w") as out:
        for number in range(3):
            out.writestr(f"{number}.png", png(number))
    listing = scan(path)
    with open_reader(listing, tmp_path) as reader:
        assert reader.read("0.png") == png(0)
        (child,) = readers()
        child.kill()
        child.wait()
        assert reader.read("1.png") == png(1)
        assert reader.read("2.png") == png(2)


@pytest.mark.parametrize("mode", ["w:", "w:gz", "w:xz", "w:bz2"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_good_archives_of_every_kind_are_read_as_before(
    tmp_path: Path, mode: Literal["w:", "w:gz", "w:xz", "w:bz2"], format: int
) -> None:
    names = ["./a.png", "sub/b.png", f"{'d' * 60}/{'n' * 60}.png"]
    if format != tarfile.USTAR_FORMAT:
        names += [f"{'d' * 200}/ä{'n' * 200}.png", "\udcff.png"]
    with tarfile.open(tmp_path / "faces", mode, format=format) as out:
        for number, name in enumerate(names):
            out.addfile(header(name, len(png(number))), io.BytesIO(png(number)))
    listing = scan(tmp_path / "faces")
    assert listing.names == sorted((name.removeprefix("./") for name in names), key=os.fsencode)
    with open_reader(listing, tmp_path) as reader:
        for number, name in enumerate(names):
            assert reader.read(name.removeprefix("./")) == png(number)
