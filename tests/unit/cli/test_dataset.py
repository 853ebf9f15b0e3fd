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
