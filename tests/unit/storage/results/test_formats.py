"""Every word of --format: whole or not at all, verified, copied, the same bytes however it was split."""

import io
import json
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from results import result_files, verify_manifest

from jobs.context import PLAIN_NAMES, GeneratedImage, ImageNames, StoredImage
from jobs.errors import DiskFullError, StorageError
from jobs.generation import merge_shards
from jobs.specs import GenerateSpec
from storage.results import formats
from storage.results.formats import FORMATS, NPZ, RESULT
from storage.results.reader import copy_out, read_manifest
from storage.results.writer import ImageFiles
from storage.volume.durable import sha256_file

SIZE = 24
ARCHIVES = ("tar", "npz")

pytestmark = pytest.mark.parametrize("format", list(FORMATS))


def pixels(seed: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 255, (3, 3, 3), dtype=np.uint8)
    return small.repeat(SIZE // 3, axis=0).repeat(SIZE // 3, axis=1)


def write(
    folder: Path,
    format: str,
    numbers: range,
    *,
    total: int | None = None,
    names: ImageNames = PLAIN_NAMES,
) -> ImageFiles:
    sink = ImageFiles(folder, format=format, total=len(numbers) if total is None else total, names=names)
    sink.add(
        GeneratedImage(pixels(n), {"seed": 7, "draw": n, "score": None}, output_index=n) for n in numbers
    )
    return sink


def test_a_result_of_any_format_appears_at_once_and_verifies(format: Any, tmp_path: Path) -> None:
    sink = write(tmp_path / "a1", format, range(10))
    sink.add_grid("grid-0000", pixels(99))
    assert not [one.name for one in (tmp_path / "a1").iterdir() if RESULT.fullmatch(one.name)]
    facts = sink.publish()
    assert verify_manifest(tmp_path / "a1", manifest_sha256=facts["manifest_sha256"]) == 10
    assert (tmp_path / "a1" / facts["images"]).exists()
    assert all(RESULT.fullmatch(one.name) for one in (tmp_path / "a1").iterdir())


def test_other_programs_read_it(format: Any, tmp_path: Path) -> None:
    write(tmp_path / "a1", format, range(10)).publish()
    folder = tmp_path / "a1"
    if format == "tar":
        with tarfile.open(folder / "shard-00000.tar") as tar:
            names = tar.getnames()
            members = [tar.extractfile(name) for name in names]
            read = [np.asarray(Image.open(io.BytesIO(one.read()))) for one in members if one is not None]
        assert names == [f"{i:06d}.png" for i in range(10)]
    elif format == "npz":
        with np.load(folder / NPZ) as arrays:
            read = list(arrays["pictures"])
            assert arrays["numbers"].tolist() == list(range(10))
            assert np.isnan(arrays["scores"]).all()
    else:
        read = [np.asarray(Image.open(one)) for one in sorted((folder / "images").iterdir())]
    wanted = np.stack([pixels(i) for i in range(10)]).astype(int)
    assert np.abs(np.stack(read) - wanted).max() <= (0 if format != "jpeg" else 25)


def test_the_manifest_says_where_each_image_is_and_its_hash(format: Any, tmp_path: Path) -> None:
    facts = write(tmp_path / "a1", format, range(5, 9)).publish()
    made = list(read_manifest(tmp_path / "a1", facts["manifest_sha256"]))
    assert [one.record["draw"] for one in made] == [5, 6, 7, 8]
    lines = [json.loads(line) for line in (tmp_path / "a1" / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        if "archive" in line:
            assert line["sha256"] == sha256_file(tmp_path / "a1" / line["archive"])
    assert len(lines) == 4 + (format in ARCHIVES)
    reader = ImageFiles(tmp_path, format=format, total=1)
    for number, one in zip(range(5, 9), made, strict=True):
        assert np.array_equal(reader.pixels(one), reader.shown(pixels(number)))


@pytest.mark.parametrize("cuts", [(0, 4, 10), (0, 1, 2, 9, 10), (0, 10)])
def test_gathered_parts_are_the_bytes_of_one_that_was_not_split(
    format: Any, cuts: Any, tmp_path: Path
) -> None:
    names = ImageNames(per_tar=3)
    whole = write(tmp_path / "whole", format, range(10), names=names)
    whole.publish()
    parts: list[Iterable[StoredImage]] = []
    for place, (first, end) in enumerate(pairwise(cuts)):
        facts = write(tmp_path / f"part{place}", format, range(first, end)).publish()
        parts.append(read_manifest(tmp_path / f"part{place}", facts["manifest_sha256"]))
    gathered = ImageFiles(tmp_path / "gathered", format=format, total=10, names=names)
    spec = GenerateSpec.create(source=1, count=10, format=format, grid=0)
    for placed in merge_shards._all(parts):
        gathered.adopt(placed.image, output_index=placed.output_index)
    facts = gathered.publish()
    assert result_files(tmp_path / "gathered") == result_files(tmp_path / "whole")
    assert verify_manifest(tmp_path / "gathered", manifest_sha256=facts["manifest_sha256"]) == spec.total


@pytest.mark.parametrize("harm", ["missing", "changed", "extra", "truncated"])
def test_a_harmed_result_does_not_verify(format: Any, harm: str, tmp_path: Path) -> None:
    write(tmp_path / "a1", format, range(6)).publish()
    folder = tmp_path / "a1"
    archive = {"tar": "shard-00000.tar", "npz": NPZ}.get(format)
    victim = folder / (archive or f"images/000003{FORMATS[format].codec.suffix}")
    if harm == "missing":
        victim.unlink()
    elif harm == "truncated":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif harm == "extra":
        more = victim.with_name("shard-00009.tar" if format in ARCHIVES else f"x{victim.suffix}")
        shutil.copy(victim, more)
    else:
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(bytes(data))
    with pytest.raises(StorageError):
        verify_manifest(folder)


def test_a_result_is_copied_whole_and_a_strange_one_is_not_touched(format: Any, tmp_path: Path) -> None:
    facts = write(tmp_path / "a1", format, range(6)).publish()
    assert copy_out(tmp_path / "a1", str(tmp_path / "out")) == {"out": str(tmp_path / "out")}
    assert verify_manifest(tmp_path / "out", manifest_sha256=facts["manifest_sha256"]) == 6
    write(tmp_path / "a2", format, range(7, 9)).publish()
    assert "already holds" in copy_out(tmp_path / "a2", str(tmp_path / "out"))["out_error"]
    assert verify_manifest(tmp_path / "out", manifest_sha256=facts["manifest_sha256"]) == 6


def test_a_discarded_result_leaves_nothing_and_a_killed_one_is_swept(format: Any, tmp_path: Path) -> None:
    write(tmp_path / "a1", format, range(5), total=9).discard()
    assert list((tmp_path / "a1").iterdir()) == []
    killed = write(tmp_path / "a1", format, range(5), total=9)  # never discarded
    write(tmp_path / "a1", format, range(3)).publish()
    assert verify_manifest(tmp_path / "a1") == 3
    assert all(RESULT.fullmatch(one.name) for one in (tmp_path / "a1").iterdir())
    killed.discard()  # its file handles


def test_memory_does_not_grow_with_the_number_of_images(
    format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where they are written, nor where they are gathered, nor where they are verified."""
    if format in ("webp", "jpeg"):
        pytest.skip("a folder of files, as png")
    monkeypatch.setattr("storage.results.writer.LINES_PER_WRITE", 100)
    monkeypatch.setattr(formats, "WRITE_BUFFER", 4096)
    pixels_HW3, folder = pixels(1)[:8, :8], tmp_path

    def work(count: int, place: str = "") -> int:
        tmp_path = folder / place
        tracemalloc.start()
        sink = ImageFiles(tmp_path / f"a{count}", format=format, total=count)
        for i in range(count):
            sink.add([GeneratedImage(pixels_HW3, {"seed": 7, "draw": i, "score": None})])
        digest = sink.publish()["manifest_sha256"]
        whole = ImageFiles(tmp_path / f"w{count}", format=format, total=count)
        for placed in merge_shards._all([read_manifest(tmp_path / f"a{count}", digest)]):
            whole.adopt(placed.image, output_index=placed.output_index)
        whole.publish()
        assert verify_manifest(tmp_path / f"w{count}") == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    work(10)
    few = work(300)
    # Twice at most: what a thread of an earlier test, or a late import, takes meanwhile counts, too.
    many = next((peak for place in "12" if (peak := work(1200, place)) - few < 50_000), None)
    assert many is not None, "900 lines would be more than that"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "ganq-test", str(folder)]
    done = subprocess.run(mount, check=False, capture_output=True)
    if done.returncode != 0:
        pytest.skip("may not mount here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_fills_at_seven_tenths_is_reported_leaves_nothing_and_works_again_with_room(
    format: Any, small_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "storage.results.writer.require_room", lambda folder, needed: None
    )  # others took the room
    monkeypatch.setattr(formats, "WRITE_BUFFER", 4096)
    noise = [np.random.default_rng(i).integers(0, 255, (96, 96, 3), dtype=np.uint8) for i in range(40)]
    size = len(FORMATS[format].codec.encode(noise[0], None))

    def result(folder: Path) -> ImageFiles:
        sink = ImageFiles(folder, format=format, total=40)
        for start in range(0, 40, 5):
            sink.add(
                GeneratedImage(noise[i], {"seed": 0, "draw": i, "score": None})
                for i in range(start, start + 5)
            )
        return sink

    hog = small_disk / "hog"
    hog.write_bytes(bytes(max(0, (1 << 20) - 28 * (size // 4096 + 2) * 4096)))
    with pytest.raises(DiskFullError, match="no room left"):
        result(small_disk / "a1").publish()
    assert [one.name for one in small_disk.iterdir() if one.name != "a1"] == ["hog"]
    assert list((small_disk / "a1").iterdir()) == []
    hog.unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    result(small_disk / "a2").publish()
    assert verify_manifest(small_disk / "a2") == 40
