"""RunContext: the folder of an attempt, and when it must survive a power cut."""

import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from jobs.errors import DiskFullError, VolumeError
from storage.volume.durable import make_folder
from storage.volume.layout import Volume
from storage.volume.ownership import quarantined
from worker.ipc import Channel
from worker.runner.context import RunContext


class Bench:
    """A context of a first attempt, its supervisor's end of the channel, and the files synced so far."""

    def __init__(
        self, volume: Volume, monkeypatch: pytest.MonkeyPatch, submitted_at: float = 0.0, attempt: int = 1
    ) -> None:
        self.synced: list[str] = []
        really = os.fsync

        def fsync(fd: int) -> None:
            really(fd)
            self.synced.append(os.readlink(f"/proc/self/fd/{fd}"))

        ours, theirs = socket.socketpair()
        self.supervisor = Channel(ours)
        about = {"job_id": 7, "attempt": attempt, "kind": "train", "label": "faces", "spec": {}}
        order = {**about, "submitted_at": submitted_at, "inputs": {}, "checkpoints": [], "shards": []}
        monkeypatch.setattr(os, "fsync", fsync)
        self.runner = Channel(theirs)
        self.context = RunContext(order, self.runner, volume)

    def close(self) -> None:
        self.context.acknowledge()
        self.context.close()
        self.runner.close()
        self.supervisor.close()


@pytest.fixture
def bench(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with closing(Bench(volume, monkeypatch)) as bench:
        yield bench


def save_a_checkpoint(bench: Bench) -> None:
    import torch

    some = {"w": torch.zeros(2)}
    bench.context.save_checkpoint(kind="epoch", epoch=1, step=1, state=some, generator=some, meta={})
    (message,) = bench.supervisor.receive() or []
    assert message["op"] == "checkpoint"


def save_a_file(bench: Bench) -> None:
    bench.context.save_files({"evaluation.json": b"{}"})


def test_a_job_without_progress_does_not_wait_for_the_disk(bench: Bench, volume: Volume) -> None:
    bench.context.log("begun")
    assert bench.synced == []
    assert not (volume.job(7) / "spec.json").exists()


def test_from_its_first_progress_on_a_jobs_folder_identifies_it(bench: Bench, volume: Volume) -> None:
    bench.context.report(0, 1, "images")
    assert len(bench.synced) == 1
    assert "spec.json" in bench.synced[0]  # its content: after a power cut it is complete or absent
    assert json.loads((volume.job(7) / "spec.json").read_text())["job"] == 7
    assert (volume.latest / "faces").resolve() == volume.attempt(7, 1).resolve()
    (volume.latest / "faces").unlink()
    bench.context.report(1, 1, "images")
    assert len(bench.synced) == 1
    assert not (volume.latest / "faces").is_symlink(), "each word of progress makes the link again"


def make_pictures(bench: Bench) -> None:
    bench.context.image_sink().publish()


@pytest.mark.parametrize("save", [save_a_checkpoint, save_a_file, make_pictures])
def test_when_something_can_be_registered_the_path_to_it_is_durable(
    bench: Bench, volume: Volume, save: Callable[[Bench], None]
) -> None:
    save(bench)
    assert json.loads((volume.job(7) / "spec.json").read_text())["job"] == 7
    # A name is durable once its folder is synced.
    assert {str(volume.jobs), str(volume.job(7)), str(volume.attempt(7, 1))} <= set(bench.synced)


def test_a_folder_that_an_attempt_before_left_unsynced_is_made_durable_too(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(volume.job(7), named=False)
    with closing(Bench(volume, monkeypatch)) as bench:
        save_a_file(bench)
        assert str(volume.jobs) in bench.synced


def test_the_path_is_synced_once_for_all_that_an_attempt_saves(bench: Bench, volume: Volume) -> None:
    save_a_file(bench)
    save_a_file(bench)
    assert bench.synced.count(str(volume.jobs)) == 1


def test_a_job_of_another_table_with_the_same_id_is_quarantined(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Bench(volume, monkeypatch, submitted_at=1.5)) as old:
        old.context.log("of the former table")
        save_a_file(old)
    with closing(Bench(volume, monkeypatch, submitted_at=2.5)) as new:
        save_a_file(new)
        assert json.loads((volume.job(7) / "spec.json").read_text())["submitted_at"] == 2.5
        (message,) = new.supervisor.receive() or []
        (former,) = quarantined(volume)
        assert (message["type"], message["detail"]) == ("quarantined", {"folder": volume.relative(former)})
        log = (volume.attempt(7, 1) / "log.txt").read_text()
        assert former.name in log
        assert "of the former table" not in log
    assert sorted(one.name for one in (former / "a1").iterdir()) == ["evaluation.json", "log.txt"]
    assert json.loads((former / "spec.json").read_text())["submitted_at"] == 1.5


@pytest.mark.parametrize("introduced", [True, False])
def test_the_folder_of_the_same_job_stays_for_its_next_attempt(
    volume: Volume, monkeypatch: pytest.MonkeyPatch, introduced: bool
) -> None:
    for attempt in (1, 2):
        with closing(Bench(volume, monkeypatch, submitted_at=1.5, attempt=attempt)) as bench:
            if introduced:
                bench.context.write_spec()
    assert quarantined(volume) == []


def test_a_first_attempt_uses_nothing_of_a_job_that_was_killed_before_it_wrote_its_spec(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Bench(volume, monkeypatch, submitted_at=1.5)) as old:
        old.context.log("of the former table")
    with closing(Bench(volume, monkeypatch, submitted_at=2.5)):
        (former,) = quarantined(volume)
        assert "of the former table" in (former / "a1" / "log.txt").read_text()
        assert "of the former table" not in (volume.attempt(7, 1) / "log.txt").read_text()


def test_a_job_that_could_not_write_its_spec_writes_it_with_the_next_report(
    bench: Bench, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", no_room)
        with pytest.raises(DiskFullError):
            bench.context.report(0, 1, "images")
    assert not (volume.job(7) / "spec.json").exists()
    bench.context.report(1, 1, "images")
    assert (volume.job(7) / "spec.json").exists()


def test_each_image_that_is_left_out_has_a_line_of_the_log_whatever_its_name(
    bench: Bench, volume: Volume, tmp_path: Path
) -> None:
    for number in range(9):
        Image.new("RGB", (32, 32), (number * 20, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "two\nlines.png").write_bytes(b"no image")
    bench.context.assignment["spec"] = {"max_skip": 0.5, "loader_workers": 1}
    bench.context.images(str(tmp_path), 16)
    lines = (volume.attempt(7, 1) / "log.txt").read_text().splitlines()
    assert len(lines) == 3
    assert "left out: two lines.png: " in lines[0]
    assert lines[1].endswith("9 images used")
    assert "left out: 1 ×" in lines[2]


def test_nothing_is_saved_where_the_folder_was_deleted(bench: Bench, volume: Volume) -> None:
    save_a_file(bench)
    volume.root.rename(volume.root.with_name("away"))
    with pytest.raises(VolumeError, match="no longer exists"):
        save_a_file(bench)
    assert not volume.root.exists()


def test_what_is_found_in_a_data_set_is_logged_and_an_event(bench: Bench, tmp_path: Path) -> None:
    for number in range(8):
        image = Image.new("L", (24, 24), 20 * (number % 4))
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "a.heic").touch()
    bench.context.assignment["spec"] = {
        "max_skip": 0.5,
        "loader_workers": 1,
        "reader": 2,
        "keep_duplicates": False,
    }
    assert len(bench.context.images(str(tmp_path), 16)) == 4
    sent = bench.supervisor.receive() or []
    said = [one["detail"] for one in sent if one.get("type") == "dataset"]
    assert said == [{"images": 4, "reasons": {"HEIC is not read": 1}, "copies": 4, "grey": 4}]


def test_generated_images_keep_their_copies_when_they_are_evaluated(bench: Bench, tmp_path: Path) -> None:
    for number in range(8):
        Image.new("RGB", (24, 24), (9, 90, 200)).save(tmp_path / f"{number}.png")
    bench.context.assignment["spec"] = {
        "max_skip": 0.5,
        "loader_workers": 1,
        "reader": 2,
        "keep_duplicates": False,
    }
    assert len(bench.context.images(str(tmp_path), 16, pin="path_fingerprint")) == 8
