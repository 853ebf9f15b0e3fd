"""Files of a result that a server sends."""

import hashlib
from pathlib import Path

import pytest

from ganq.remote.files import ResultFolder
from jobs.errors import StorageError


@pytest.mark.parametrize("name", ["/x", "../x", "images/../../x", "..\\x", "images/", ""])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(StorageError, match="leads out of the folder"):
        ResultFolder(out, {}).write(name, iter([b"x"]))
    assert list(tmp_path.rglob("*")) == [out]


def test_a_file_with_another_content_leaves_nothing(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path, {"images/0.png": hashlib.sha256(b"right").hexdigest()})
    with pytest.raises(StorageError, match="another content"):
        folder.write("images/0.png", iter([b"wrong"]))
    assert not any((tmp_path / "images").iterdir())
    folder.write("images/0.png", iter([b"ri", b"ght"]))
    assert (tmp_path / "images" / "0.png").read_bytes() == b"right"
