"""Generated images appear together, lossless, named by a manifest that can be checked."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from results import verify_files, verify_manifest

from jobs.context import GeneratedImage
from jobs.errors import ForeignFileError, StorageError
from storage.results.codecs import encode_png, write_png
from storage.results.files import require_sha256, write_files
from storage.results.reader import copy_out, read_images
from storage.results.writer import ImageFiles
from storage.volume.durable import sha256_file


def pixels(seed: int, size: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)


def filled(folder: Path, count: int = 10) -> ImageFiles:
    sink = ImageFiles(folder)
    sink.add(GeneratedImage(pixels(i), {"seed": 7, "draw": i, "score": None}) for i in range(count))
    sink.add_grid("grid-0000", pixels(99, 64))
    return sink


def test_png_is_lossless_whatever_the_layout_in_memory(tmp_path: Path) -> None:
    for image in (pixels(1), pixels(2)[:, ::-1], pixels(3).transpose(1, 0, 2)):
        write_png(tmp_path / "a.png", image)
        with Image.open(tmp_path / "a.png") as back:
            assert np.array_equal(np.asarray(back), image)


def test_png_without_fpng_is_lossless_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    monkeypatch.setitem(sys.modules, "fpng", None)
    with Image.open(io.BytesIO(encode_png(pixels(1)))) as back:
        assert np.array_equal(np.asarray(back), pixels(1))


def test_nothing_is_visible_before_publication(tmp_path: Path) -> None:
    sink = filled(tmp_path / "a1")
    assert not any((tmp_path / "a1" / name).exists() for name in ("images", "grids", "manifest.jsonl"))
    facts = sink.publish()
    assert facts["image_count"] == 10
    assert facts["grids"] == ["grids/grid-0000.png"]
    assert verify_manifest(tmp_path / "a1", manifest_sha256=facts["manifest_sha256"]) == 10
    assert not list((tmp_path / "a1").glob("*.tmp-*"))


def test_the_manifest_has_index_seed_draw_score_and_hash(tmp_path: Path) -> None:
    filled(tmp_path / "a1").publish()
    line = json.loads((tmp_path / "a1" / "manifest.jsonl").read_text().splitlines()[3])
    assert line["index"] == 3
    assert (line["seed"], line["draw"], line["score"]) == (7, 3, None)
    assert line["sha256"] == sha256_file(tmp_path / "a1" / line["file"])


@pytest.mark.parametrize("harm", ["missing", "changed", "extra", "renumbered"])
def test_a_result_that_was_harmed_does_not_verify(harm: str, tmp_path: Path) -> None:
    filled(tmp_path / "a1").publish()
    images = tmp_path / "a1" / "images"
    if harm == "missing":
        (images / "000004.png").unlink()
    elif harm == "changed":
        shutil.copy(images / "000001.png", images / "000002.png")
    elif harm == "extra":
        shutil.copy(images / "000001.png", images / "000011.png")
    else:
        manifest = tmp_path / "a1" / "manifest.jsonl"
        manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(StorageError):
        verify_manifest(tmp_path / "a1")


def test_leftovers_of_a_killed_attempt_are_swept_and_never_published(tmp_path: Path) -> None:
    filled(tmp_path / "a1", count=15)  # killed before it was published
    filled(tmp_path / "a1", count=3).publish()
    assert verify_manifest(tmp_path / "a1") == 3
    assert not list((tmp_path / "a1").glob("*.tmp-*"))


def test_discarded_images_leave_nothing(tmp_path: Path) -> None:
    filled(tmp_path / "a1").discard()
    assert list((tmp_path / "a1").iterdir()) == []


def test_results_are_copied_out_and_a_bad_place_is_reported_and_harmless(tmp_path: Path) -> None:
    filled(tmp_path / "a1").publish()
    assert copy_out(tmp_path / "a1", str(tmp_path / "out")) == {"out": str(tmp_path / "out")}
    assert verify_manifest(tmp_path / "out") == 10
    (tmp_path / "file").touch()
    assert "out_error" in copy_out(tmp_path / "a1", str(tmp_path / "file"))
    assert verify_manifest(tmp_path / "a1") == 10


def test_a_folder_that_holds_images_already_is_not_written_to(tmp_path: Path) -> None:
    filled(tmp_path / "a1", count=4).publish()
    own = tmp_path / "out" / "images" / "000000.png"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert "already holds images" in copy_out(tmp_path / "a1", str(tmp_path / "out"))["out_error"]
    assert own.read_text() == "mine"
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["images"]


def test_an_image_file_is_named_by_its_output_index(tmp_path: Path) -> None:
    sink = ImageFiles(tmp_path / "a1")
    sink.add(GeneratedImage(pixels(0), output_index=index) for index in (7, 1000))
    sink.publish()
    assert sorted(one.name for one in (tmp_path / "a1" / "images").iterdir()) == ["000007.png", "001000.png"]
    assert verify_manifest(tmp_path / "a1") == 2


def test_a_manifest_that_cannot_be_written_leaves_no_images_behind(tmp_path: Path) -> None:
    (tmp_path / "a1" / "manifest.jsonl" / "in the way").mkdir(parents=True)
    sink = filled(tmp_path / "a1")
    with pytest.raises(StorageError):
        sink.publish()
    assert [one.name for one in (tmp_path / "a1").iterdir()] == ["manifest.jsonl"]


@pytest.mark.parametrize("harm", ["no manifest", "torn manifest", "not an image"])
def test_whatever_is_wrong_with_a_result_is_a_storage_error(harm: str, tmp_path: Path) -> None:
    filled(tmp_path / "a1").publish()
    manifest = tmp_path / "a1" / "manifest.jsonl"
    if harm == "no manifest":
        manifest.unlink()
    elif harm == "torn manifest":
        manifest.write_text("{torn")
    else:
        lines = [json.loads(line) for line in manifest.read_text().splitlines()]
        bad = tmp_path / "a1" / lines[0]["file"]
        bad.write_bytes(b"not an image")
        lines[0]["sha256"] = sha256_file(bad)
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(StorageError):
        verify_manifest(tmp_path / "a1")


def test_another_file_appears_with_the_images_and_is_verified_by_what_the_result_says(
    tmp_path: Path,
) -> None:
    sink = filled(tmp_path / "a1")
    sink.add_file("film.gif", b"GIF89a...")
    assert not (tmp_path / "a1" / "grids").exists()
    facts = sink.publish()
    assert [one["name"] for one in facts["files"]] == ["grids/film.gif"]
    verify_files(tmp_path / "a1", facts["files"])
    verify_manifest(tmp_path / "a1", manifest_sha256=facts["manifest_sha256"])
    (tmp_path / "a1" / "grids" / "film.gif").write_bytes(b"GIF89a..!")
    with pytest.raises(StorageError, match="changed"):
        verify_files(tmp_path / "a1", facts["files"])
    (tmp_path / "a1" / "grids" / "film.gif").unlink()
    with pytest.raises(StorageError, match="missing"):
        verify_files(tmp_path / "a1", facts["files"])


def test_a_result_without_other_files_says_nothing_of_them(tmp_path: Path) -> None:
    assert "files" not in filled(tmp_path / "a1").publish()


def test_reports_are_written_whole_and_a_file_is_what_its_checksum_says(tmp_path: Path) -> None:
    files = write_files(tmp_path, {"evaluation.json": b"{}", "neighbours.png": pixels(1)})
    verify_files(tmp_path, files)
    with Image.open(tmp_path / "neighbours.png") as back:
        assert np.array_equal(np.asarray(back), pixels(1))
    require_sha256(tmp_path / "evaluation.json", files[0]["sha256"])
    with pytest.raises(ForeignFileError, match="has the sha-256"):
        require_sha256(tmp_path / "evaluation.json", "0" * 64)
    with pytest.raises(ForeignFileError, match="cannot be read"):
        require_sha256(tmp_path / "nowhere", "0" * 64)


@pytest.mark.parametrize("most", [3, 10, 99])
def test_published_images_are_read_back_evenly_chosen(tmp_path: Path, most: int) -> None:
    facts = filled(tmp_path / "a1").publish()
    read = list(read_images(tmp_path / "a1", facts["manifest_sha256"], most))
    wanted = range(10) if most >= 10 else [place * 10 // most for place in range(most)]
    assert len(read) == min(most, 10)
    assert all(np.array_equal(one, pixels(i)) for one, i in zip(read, wanted, strict=True))
