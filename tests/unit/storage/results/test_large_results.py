"""Results of more than ten thousand images: folders of files, and archives that are linked."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from results import result_files, verify_manifest
from unit.jobs.local_context import LocalContext

import jobs.specs.generate
from ganq.remote.files import _foreign, _hashes
from jobs.context import GeneratedImage, ImageNames, ImageSink, Shard
from jobs.errors import NotFoundError, StorageError
from jobs.generation import merge_shards
from jobs.specs import GenerateSpec
from storage.datasets.sources import scan
from storage.results import formats
from storage.results.reader import (
    PublishedImages,
    are_there,
    copy_out,
    is_there,
    read_images,
    read_manifest,
)
from storage.results.writer import ImageFiles
from storage.volume.durable import sha256_file
from web.manifest import ShardedIndex, open_index

COUNT = 100
CHECKPOINT = {"source": 1, "micro_batch": 1, "shard_size": 16, "format": "tar"}


def pixels(seed: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 255, (2, 2, 3), dtype=np.uint8)
    return small.repeat(4, axis=0).repeat(4, axis=1)


def image(number: int, *, equal: bool = False) -> GeneratedImage:
    record = {"seed": 7, "draw": number, "score": number / 100}
    return GeneratedImage(pixels(0 if equal else number), record, output_index=number)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat a result of more than ten images as a large one."""
    monkeypatch.setattr(jobs.specs.generate, "MAX_FLAT", 10)
    monkeypatch.setattr(jobs.specs.generate, "IMAGES_PER_TAR", 8)
    monkeypatch.setattr(formats, "IMAGES_PER_FOLDER", 10)


class Merge(LocalContext):
    """A context whose sinks write files."""

    def image_sink(self, **options: Any) -> ImageSink:
        options.pop("shard", None)
        return ImageFiles(self.folder, **options)


def shards_of(spec: GenerateSpec, folder: Path, *, equal: bool = False) -> list[Shard]:
    """Write the shards of a generation as their workers do."""
    found = []
    for place, one in enumerate(spec.split()):
        sink = ImageFiles(
            folder / f"shard{place}", format=spec.format, total=one.image_count, names=one.names
        )
        sink.add(image(n, equal=equal) for first, last in one.ranges for n in range(first, last + 1))
        result = sink.publish()
        images = PublishedImages(sink.folder, result["manifest_sha256"])
        assert one.draws is not None
        files = sink.shard_files() if "archives" in result else None
        found.append(Shard(place, one.draws, images, None, files, all_equal=equal))
    return found


def linked(folder: Path, *, equal: bool = False, **options: Any) -> tuple[Path, dict[str, Any]]:
    spec = GenerateSpec.create(**{**CHECKPOINT, "count": COUNT, "grid": 4, "grid_pages": 5, **options})
    shards = shards_of(spec, folder, equal=equal)
    context = Merge(folder / "a1")
    result = merge_shards.link(spec, context, shards, [None] * len(shards))
    for one in shards:  # as after the commit
        assert one.files is not None
        shutil.rmtree(one.files.folder)
    return folder / "a1", result


def unsplit(folder: Path, **options: Any) -> dict[str, Any]:
    spec = GenerateSpec.create(**{**CHECKPOINT, "count": COUNT, "shard_size": COUNT, **options})
    sink = ImageFiles(folder, format=spec.format, total=COUNT, names=spec.names)
    sink.add(image(n) for first, last in spec.ranges for n in range(first, last + 1))
    return sink.publish()


def files_below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


# --- folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_image_files_of_a_large_result_are_in_folders_by_their_number(
    large: None, format: Any, tmp_path: Path
) -> None:
    result = unsplit(tmp_path / "a1", format=format)
    folder = tmp_path / "a1"
    assert [one.name for one in sorted((folder / "images").iterdir())] == [f"{n:04d}" for n in range(10)]
    assert all(len(list(one.iterdir())) == 10 for one in (folder / "images").iterdir())
    assert (folder / "images" / "0003" / f"000037{formats.FORMATS[format].codec.suffix}").is_file()
    assert verify_manifest(folder, manifest_sha256=result["manifest_sha256"]) == COUNT
    assert is_there(folder, result["manifest_sha256"])
    assert [one.record["draw"] for one in read_manifest(folder, result["manifest_sha256"])] == [*range(COUNT)]


def test_numbers_beyond_a_million_sort_as_names(large: None, tmp_path: Path) -> None:
    result = unsplit(tmp_path / "a1", format="png", count=None, seeds=((999_950, 1_000_049),))
    names = sorted(path.name for path in files_below(tmp_path / "a1" / "images"))
    assert (names[0], names[-1]) == ("0999950.png", "1000049.png")
    assert [int(name[:-4]) for name in names] == [*range(999_950, 1_000_050)]
    assert verify_manifest(tmp_path / "a1", manifest_sha256=result["manifest_sha256"]) == COUNT


def test_merged_files_are_those_of_an_unsplit_job(large: None, tmp_path: Path) -> None:
    spec = GenerateSpec.create(**{**CHECKPOINT, "count": COUNT, "format": "png", "grid": 0})
    shards = [one.images or () for one in shards_of(spec, tmp_path)]
    merge_shards.run(spec, Merge(tmp_path / "a1"), shards)
    unsplit(tmp_path / "whole", format="png")
    assert result_files(tmp_path / "a1") == result_files(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["missing", "extra"])
def test_a_harmed_folder_of_many_does_not_verify(large: None, harm: str, tmp_path: Path) -> None:
    unsplit(tmp_path, format="png")
    victim = tmp_path / "images" / "0003" / "000037.png"
    if harm == "missing":
        victim.unlink()
    else:
        shutil.copy(victim, tmp_path / "images" / "0002" / victim.name)
    with pytest.raises(StorageError):
        verify_manifest(tmp_path)


@pytest.mark.parametrize("format", ["png", "tar"])
def test_a_copy_of_a_large_result_is_whole_and_another_result_is_not_overwritten(
    large: None, format: Any, tmp_path: Path
) -> None:
    if format == "tar":
        folder, result = linked(tmp_path)
    else:
        folder, result = tmp_path / "a1", unsplit(tmp_path / "a1", format=format)
    out = tmp_path / "out"
    assert copy_out(folder, str(out)) == {"out": str(out)}
    assert result_files(out) == result_files(folder)
    assert copy_out(folder, str(out)) == {"out": str(out)}, "an equal copy is kept"
    victim = max(
        path for path in files_below(out) if path.suffix in (".png", ".tar") and "grid" not in path.name
    )
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    assert "already holds" in copy_out(folder, str(out))["out_error"]
    assert verify_manifest(folder, manifest_sha256=result["manifest_sha256"]) == COUNT


# --- linked archives -------------------------------------------------------------------------


def test_a_parent_lists_its_shards_and_its_archives_outlive_them(large: None, tmp_path: Path) -> None:
    folder, result = linked(tmp_path)
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["first"], line["images"]) for line in lines] == [
        (place, 16 * place, min(16, COUNT - 16 * place)) for place in range(7)
    ]
    assert (result["image_count"], result["shards"], result["images"]) == (COUNT, 7, ".")
    assert len(result["grids"]) == 5
    assert sorted(one.name for one in folder.glob("*.tar")) == [f"shard-{n:05d}.tar" for n in range(13)]
    assert verify_manifest(folder, manifest_sha256=result["manifest_sha256"]) == COUNT
    images = list(read_manifest(folder, result["manifest_sha256"]))
    assert [one.record["draw"] for one in images] == [*range(COUNT)]
    assert all(np.array_equal(formats.pixels_of(one), pixels(n)) for n, one in enumerate(images))
    assert not list(folder.glob("*.tmp-*"))


def test_linking_moves_no_byte_of_an_archive(large: None, tmp_path: Path) -> None:
    spec = GenerateSpec.create(**CHECKPOINT, count=COUNT, grid=0)
    shards = shards_of(spec, tmp_path)
    merge_shards.link(spec, Merge(tmp_path / "a1"), shards, [None] * len(shards))
    inodes = {path.stat().st_ino for path in tmp_path.glob("shard*/*") if path.is_file()}
    there = [path for path in files_below(tmp_path / "a1") if path.name != "manifest.jsonl"]
    assert len(there) == 13 + 7
    assert {path.stat().st_ino for path in there} <= inodes


def test_archives_are_copied_where_the_file_system_has_no_links(
    large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    folder, result = linked(tmp_path)
    assert verify_manifest(folder, manifest_sha256=result["manifest_sha256"]) == COUNT


@pytest.mark.parametrize("harm", ["archive", "manifest", "extra manifest", "no manifest", "no archive"])
def test_a_harmed_result_of_shards_does_not_verify(large: None, harm: str, tmp_path: Path) -> None:
    folder, _ = linked(tmp_path)
    manifest, archive = folder / "manifests" / "00003.jsonl", folder / "shard-00003.tar"
    if harm == "archive":
        archive.write_bytes(archive.read_bytes()[:-1] + b"x")
    elif harm == "manifest":
        manifest.write_text(manifest.read_text().replace('"seed": 7', '"seed": 8', 1))
    elif harm == "extra manifest":
        shutil.copy(manifest, manifest.with_name("00099.jsonl"))
    else:
        (manifest if harm == "no manifest" else archive).unlink()
    with pytest.raises(StorageError):
        verify_manifest(folder)


def test_a_shard_without_its_archive_or_manifest_is_missing(large: None, tmp_path: Path) -> None:
    spec = GenerateSpec.create(**CHECKPOINT, count=COUNT)
    files = [one.files for one in shards_of(spec, tmp_path)]
    assert all(one is not None and are_there(one) for one in files)
    (tmp_path / "shard2" / "shard-00005.tar").unlink()
    (tmp_path / "shard3" / "manifest.jsonl").write_text("")
    shutil.rmtree(tmp_path / "shard4")
    assert [one is not None and are_there(one) for one in files] == [
        True,
        True,
        False,
        False,
        False,
        True,
        True,
    ]


def test_images_are_read_evenly_and_with_the_build_of_their_shard(large: None, tmp_path: Path) -> None:
    folder, result = linked(tmp_path)
    chosen = list(read_images(folder, result["manifest_sha256"], 10))
    assert all(np.array_equal(one, pixels(10 * n)) for n, one in enumerate(chosen))
    spec = GenerateSpec.create(**CHECKPOINT, count=COUNT, grid=0)
    shards = shards_of(spec, tmp_path)
    result = merge_shards.link(spec, Merge(tmp_path / "a2"), shards, [0, 1, *[0] * 5])
    builds = [one.record["build"] for one in read_manifest(tmp_path / "a2", result["manifest_sha256"])]
    assert builds == [int(n // 16 == 1) for n in range(COUNT)]
    assert open_index(tmp_path / "a2").line(17)["build"] == 1


@pytest.mark.parametrize("equal", [True, False])
def test_a_collapsed_generator_is_recognised_from_one_image_of_each_shard(
    large: None, equal: bool, tmp_path: Path
) -> None:
    _, result = linked(tmp_path, equal=equal)
    assert ("warning" in result) is equal


def test_shards_that_are_each_of_one_image_are_not_collapsed(large: None, tmp_path: Path) -> None:
    spec = GenerateSpec.create(**CHECKPOINT, count=COUNT, grid=0)
    shards = [replace(one, all_equal=True) for one in shards_of(spec, tmp_path)]
    assert "warning" not in merge_shards.link(spec, Merge(tmp_path / "a1"), shards, [None] * len(shards))


def test_a_job_of_an_older_version_is_merged_as_it_was(large: None, tmp_path: Path) -> None:
    spec = GenerateSpec.from_json({**CHECKPOINT, "count": COUNT})
    assert not spec.names.linked
    shards = [one.images or () for one in shards_of(spec, tmp_path)]
    merge_shards.run(spec, Merge(tmp_path / "a1"), shards)
    assert [one.name for one in (tmp_path / "a1").glob("*.tar")] == ["shard-00000.tar"]
    assert verify_manifest(tmp_path / "a1") == COUNT
    assert (tmp_path / "a1" / "manifest.jsonl").read_text().count('"index"') == COUNT


def test_the_folders_of_many_images_are_no_classes_of_a_data_set(large: None, tmp_path: Path) -> None:
    unsplit(tmp_path / "a1", format="png")
    (tmp_path / "a1" / "grids").mkdir(exist_ok=True)
    for source in (tmp_path / "a1", tmp_path / "a1" / "images"):
        listing = scan(source)
        assert len(listing.names) == COUNT
        assert listing.classes() == ()
    shutil.copytree(tmp_path / "a1" / "images", tmp_path / "images")
    assert len(scan(tmp_path / "images").classes()) == 10, "of another folder they are"


def test_a_download_knows_each_file_of_a_large_result_by_its_hash(large: None, tmp_path: Path) -> None:
    folder, _ = linked(tmp_path)
    unsplit(tmp_path / "files", format="png")
    for result in (folder, tmp_path / "files"):
        manifest = (result / "manifest.jsonl").read_bytes()
        hashes = _hashes([json.loads(line) for line in manifest.splitlines()])
        found = [path.relative_to(result).as_posix() for path in files_below(result)]
        assert set(hashes) == {name for name in found if not name.startswith(("grids", "manifest.jsonl"))}
        assert all(sha256_file(result / name) == digest for name, digest in hashes.items())
        assert list(_foreign(result, hashes, manifest)) == []
    shutil.rmtree(tmp_path / "files" / "images")
    (tmp_path / "files" / "images" / "0000").mkdir(parents=True)
    (tmp_path / "files" / "images" / "0000" / "000000.png").write_bytes(b"")
    assert list(_foreign(tmp_path / "files", hashes, manifest)) == ["images/0000/000000.png"]


# --- the index of the page and the API -------------------------------------------------------


def test_the_index_of_a_sharded_result_is_that_of_all_images(
    large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.manifest.OPEN_SHARDS", 2)
    folder, result = linked(tmp_path)
    index = open_index(folder)
    assert isinstance(index, ShardedIndex)
    assert index.count == COUNT
    expected = list(read_manifest(folder, result["manifest_sha256"]))
    for number in (0, 15, 16, 17, 99, 40):
        line = index.line(number)
        assert (line["index"], line["draw"]) == (number, number)
        assert index.made(number).path == expected[number].path
        assert formats.bytes_of(index.made(number)) == formats.bytes_of(expected[number])
        assert index.find(line["sha256"]) == number
    assert index.ordered("best", 0, 3) == [99, 98, 97]
    assert index.ordered("worst", 0, 2) == [0, 1]
    assert len(index._open) <= 2
    for call in (lambda: index.line(COUNT), lambda: index.find("0" * 64)):
        with pytest.raises(NotFoundError):
            call()
    (folder / "manifests" / "00000.jsonl").write_text("")
    with pytest.raises(StorageError):
        open_index(folder).line(0)


def test_names_depend_on_the_spec_alone() -> None:
    assert ImageNames() == GenerateSpec.create(source=1, count=10).names
