"""What `ganq submit` says of a data set before a job is accepted: left out, classes, size."""

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

if TYPE_CHECKING:
    from unit.conftest import Ganq

SMALL = ("--size", 24, "--batch", 4)


@pytest.fixture
def tree(tmp_path: Path) -> Any:
    for kind in ("cats", "dogs"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for number in range(6):
            (tmp_path / "data" / kind / f"{number}.png").touch()
    return tmp_path / "data"


def test_formats_that_are_not_read_are_refused_at_submit_with_the_ways_out(ganq: "Ganq", tree: Any) -> None:
    for number in range(6):
        (tree / "dogs" / f"{number}.HEIC").touch()
    said = ganq("submit", "train", "--data", tree, *SMALL)
    assert said.code != 0
    assert "6 of 18 images" in said.err
    assert "6 × HEIC is not read; to use HEIC, convert it: magick" in said.err
    assert "--max-skip 0.34 skips them" in said.err
    accepted = ganq("submit", "train", "--data", tree, *SMALL, "--max-skip", 0.34)
    assert accepted.code == 0
    assert "left out: 6 × HEIC is not read" in accepted.err


def test_a_class_behind_a_link_that_leads_away_is_refused_at_submit(
    ganq: "Ganq", tree: Any, tmp_path: Path
) -> None:
    (tree / "dogs").rename(tmp_path / "elsewhere")
    (tree / "dogs").symlink_to(tmp_path / "elsewhere")
    said = ganq("submit", "train", "--data", tree, *SMALL)
    assert "6 of 12 images" in said.err
    assert "6 × link out of the folder" in said.err


def test_a_folder_of_heic_alone_says_so(ganq: "Ganq", tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.heic").touch()
    said = ganq("submit", "train", "--data", tmp_path, *SMALL)
    assert "there are no images in" in said.err
    assert "6 × HEIC is not read" in said.err


def test_submit_names_the_classes_that_a_run_will_learn(ganq: "Ganq", tree: Any) -> None:
    said = ganq("submit", "train", "--data", tree, *SMALL, "--conditional")
    assert said.code == 0
    assert "classes: 2: cats (6), dogs (6)" in said.err
    (tree / "train").mkdir()
    for kind in ("cats", "dogs"):
        (tree / kind).rename(tree / "train" / kind)
    said = ganq("submit", "train", "--data", tree, *SMALL, "--conditional")
    assert "classes: 2: cats (6), dogs (6)" in said.err


def test_labels_of_a_dataset_json_that_miss_an_image_are_refused(ganq: "Ganq", tmp_path: Path) -> None:
    names = [f"00000/img{number:08d}.png" for number in range(6)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        for name in names:
            out.writestr(name, b"x")
        labels = [[name, number % 2] for number, name in enumerate(names[:5])]
        out.writestr("dataset.json", json.dumps({"labels": labels}))
    said = ganq("submit", "train", "--data", tmp_path / "a.zip", *SMALL, "--conditional")
    assert "has no label for 1 of 6 images" in said.err
    assert ganq("submit", "train", "--data", tmp_path / "a.zip", *SMALL).code == 0


@pytest.mark.parametrize("first", ["giant", "text", "tiny"])
def test_the_size_of_a_path_is_that_of_its_usable_images(ganq: "Ganq", tmp_path: Path, first: str) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    for number in range(60):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
    if first == "giant":
        Image.new("1", (20_000, 20_000)).save(folder / "0-first.png")
    elif first == "text":
        (folder / "0-first.png").write_text("no image")
    else:
        Image.new("RGB", (4, 4)).save(folder / "0-first.png")
    said = ganq("submit", "evaluate", folder, "--data", folder, "--dry-run", "--json")
    assert said.json()["spec"]["size"] == 64
