"""`ganq dataset`: what it prints for people, and for programs."""

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from storage.datasets.synthetic import STYLES

if TYPE_CHECKING:
    from unit.conftest import Ganq


def test_the_styles_are_listed_for_a_person_and_for_a_program(ganq: "Ganq") -> None:
    listed = ganq("dataset", "make", "--styles")
    assert listed.code == 0
    assert listed.out.startswith("STYLE ")
    told = ganq("dataset", "make", "--styles", "--json").json()
    assert [one["name"] for one in told] == list(STYLES)
    assert all(one["creator"] in listed.out and one["licence_url"] for one in told)


def test_a_check_says_how_many_images_are_the_same(ganq: "Ganq", tmp_path: Path) -> None:
    Image.new("RGB", (24, 24), (9, 9, 200)).save(tmp_path / "0.png")
    Image.new("RGB", (24, 24), (200, 9, 9)).save(tmp_path / "1.png")
    assert "copy" not in ganq("dataset", "check", tmp_path).out
    for number in range(2, 5):
        (tmp_path / f"{number}.png").write_bytes((tmp_path / "1.png").read_bytes())
    said = ganq("dataset", "check", tmp_path).out
    assert "left out  3 files with the bytes of another" in said
    assert "copy      3.png of 1.png" in said


def test_a_check_of_files_that_are_no_images_says_so(ganq: "Ganq", tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_text("hello")
    said = ganq("dataset", "check", tmp_path)
    assert (said.code, "no file can be used" in said.err) == (1, True)
    assert "1 image, 0 usable" in said.out
    assert "Error" not in said.err


def test_images_beside_those_of_a_generation_are_reported_as_ignored(ganq: "Ganq", tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "images"):
        folder.mkdir(exist_ok=True)
        for number in range(2):
            Image.new("RGB", (24, 24), (9, number, 200)).save(folder / f"{number}.png")
    assert "4 images, 4 usable" in ganq("dataset", "check", tmp_path).out

    (tmp_path / "grids").mkdir()
    (tmp_path / "manifest.jsonl").touch()
    said = ganq("dataset", "check", tmp_path).out
    assert "2 images, 2 usable" in said
    assert "2 images: the folder is that of a generation, of which only images/ is read" in said


def test_fewer_faces_than_before_replace_them_with_a_notice(ganq: "Ganq", tmp_path: Path) -> None:
    make = ("dataset", "make", tmp_path / "faces", "--size", 16, "--count")
    assert "replace" not in ganq(*make, 3).err
    assert "replace the 3 faces that were there" in ganq(*make, 2).err
    assert "ignored" not in ganq("dataset", "check", tmp_path / "faces").out, "of ATTRIBUTION.txt"
