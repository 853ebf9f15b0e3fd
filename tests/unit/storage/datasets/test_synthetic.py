"""The demo's faces: the same for the same seed, different among themselves, their artists named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.errors import DatasetError, SpecError
from storage.datasets.names import ATTRIBUTION
from storage.datasets.synthetic import STYLES, make_faces, styles


def load(folder: Path) -> np.ndarray:
    arrays = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            arrays.append(np.asarray(image.convert("RGB")))
    return np.stack(arrays)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_draws_faces_that_differ(style: Any, tmp_path: Path) -> None:
    faces = load(make_faces(tmp_path / style, style=style, count=6, size=48))
    assert faces.shape == (6, 48, 48, 3)
    assert len({face.tobytes() for face in faces}) == 6
    assert faces.std() > 20
    text = (tmp_path / style / ATTRIBUTION).read_text()
    info = next(one for one in styles() if one.name == style)
    assert info.creator in text
    assert info.licence in text


def test_every_style_has_a_licence_that_allows_it() -> None:
    assert {one.name for one in styles()} == set(STYLES)
    assert {one.licence for one in styles()} <= {"CC0 1.0", "CC BY 4.0"}


def test_face_i_depends_on_style_seed_and_i_alone(tmp_path: Path) -> None:
    few = load(make_faces(tmp_path / "few", count=4, size=32))
    many = load(make_faces(tmp_path / "many", count=120, size=32))  # several processes
    other = load(make_faces(tmp_path / "other", count=4, size=32, seed=1))
    assert np.array_equal(few, many[:4])
    assert not np.array_equal(few, other)


def test_a_folder_with_somebodys_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "face-000001.png").write_text("precious")
    with pytest.raises(DatasetError, match="did not draw"):
        make_faces(tmp_path / "mine", count=2, size=32)
    assert (tmp_path / "mine" / "face-000001.png").read_text() == "precious"


def test_its_own_data_set_is_replaced(tmp_path: Path) -> None:
    make_faces(tmp_path / "f", count=5, size=32)
    make_faces(tmp_path / "f", count=2, size=32)
    assert len(list((tmp_path / "f").glob("*.png"))) == 2


@pytest.mark.parametrize("bad", [{"style": "nobody"}, {"count": 0}, {"count": 10**9}, {"size": 3}])
def test_an_impossible_request_is_one_clear_line(bad: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        make_faces(tmp_path / "f", **bad)
    assert caught.value.hint
    assert not (tmp_path / "f").exists()
