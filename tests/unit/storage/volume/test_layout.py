"""Where things lie, and that nothing lies elsewhere."""

import os
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import StorageError, VolumeError
from storage.volume.layout import Volume


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path / "volume")


def test_paths_are_made_from_ids(volume: Volume) -> None:
    root = volume.root
    assert volume.job(12) == root / "jobs" / "000012"
    assert volume.attempt(12, 3) == root / "jobs" / "000012" / "a3"
    assert volume.checkpoints(12, 3) == root / "jobs" / "000012" / "a3" / "checkpoints"
    assert volume.job(12_345_678).name == "12345678"
    assert volume.dataset("a" * 64) == root / "datasets" / ("a" * 64)


@pytest.mark.parametrize("mark", ["", "A" * 64, "a" * 63, "../" + "a" * 61, "a" * 64 + "\n", "a" * 65])
def test_what_is_no_fingerprint_makes_no_path(volume: Volume, mark: Any) -> None:
    with pytest.raises(ValueError):
        volume.dataset(mark)


def test_a_path_in_the_table_is_relative_and_comes_back(volume: Volume) -> None:
    path = volume.checkpoints(12, 1) / "epoch-0005"
    assert volume.relative(path) == "jobs/000012/a1/checkpoints/epoch-0005"
    volume.ensure()
    assert volume.absolute(volume.relative(path)) == path.resolve()


@pytest.mark.parametrize("path", ["../x", "jobs/../../x", "/etc/passwd", "link/x"])
def test_a_path_that_would_leave_the_volume_is_refused(volume: Volume, path: str, tmp_path: Path) -> None:
    volume.ensure()
    (volume.root / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError):
        volume.absolute(path)


def test_the_folders_are_made_and_nothing_else_is_left(volume: Volume) -> None:
    volume.ensure()
    volume.ensure()
    assert sorted(one.name for one in volume.root.iterdir()) == ["datasets", "jobs", "latest"]


def test_a_file_in_place_of_the_volume_is_reported(volume: Volume) -> None:
    volume.root.write_text("")
    with pytest.raises(VolumeError) as caught:
        volume.ensure()
    assert "is not a folder" in caught.value.message
    assert "GANQ_VOLUME" in (caught.value.hint or "")


def test_a_volume_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(StorageError):
        Volume(tmp_path / "f" / "volume").ensure()
    with pytest.raises(StorageError):
        Volume(tmp_path.__class__("/proc/ganq")).ensure()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_a_volume_that_may_not_be_written_is_reported(volume: Volume, tmp_path: Path) -> None:
    volume.ensure()
    for folder in (tmp_path, *tmp_path.parents):
        if folder.name.startswith("pytest-"):
            folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(VolumeError) as caught:
            volume.ensure()
    finally:
        os.seteuid(0)
    assert "permission denied" in caught.value.message


def test_latest_points_at_the_newest_result_also_after_the_volume_moved(
    volume: Volume, tmp_path: Path
) -> None:
    volume.ensure()
    for number in (1, 2):
        volume.attempt(number, 1).mkdir(parents=True)
        (volume.attempt(number, 1) / "mark").write_text(str(number))
        volume.point_latest("faces", volume.attempt(number, 1))

    assert (volume.latest / "faces" / "mark").read_text() == "2"
    assert [one.name for one in volume.latest.iterdir()] == ["faces"]
    volume.root.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "latest" / "faces" / "mark").read_text() == "2"


def test_a_users_folder_in_the_place_of_a_link_is_left_alone(volume: Volume) -> None:
    volume.ensure()
    (volume.latest / "faces").mkdir()
    (volume.latest / "faces" / "mine").write_text("")

    volume.point_latest("faces", volume.job(1))

    assert (volume.latest / "faces" / "mine").exists()
    assert [one.name for one in volume.latest.iterdir()] == ["faces"]


def test_a_folder_without_the_jobs_that_the_table_knows_is_not_the_volume(volume: Volume) -> None:
    with pytest.raises(VolumeError) as caught:
        volume.ensure(used=lambda: True)
    assert "but the job table has jobs with files" in caught.value.message
    assert f"mkdir -p {volume.jobs}" in (caught.value.hint or "")
    assert not volume.root.exists(), "something was made where a disk may be mounted later"

    volume.jobs.mkdir(parents=True)  # as the hint says
    volume.ensure(used=lambda: True)
    assert volume.datasets.is_dir()
