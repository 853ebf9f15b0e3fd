"""The samples and metrics of a training that had several attempts."""

import json
import os
from pathlib import Path

import pytest

from storage.results.attempts import Metrics, gather_samples
from storage.volume.durable import NO_LINKS
from storage.volume.layout import Volume


def draw(volume: Volume, attempt: int, *epochs: int) -> None:
    folder = volume.attempt(1, attempt) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for epoch in epochs:
        (folder / f"epoch-{epoch:04d}.png").write_text(f"a{attempt}")


def shown(volume: Volume) -> dict[str, str]:
    return {path.name[6:10]: path.read_text() for path in sorted(volume.samples(1).iterdir())}


@pytest.mark.parametrize("links", [True, False])
def test_one_folder_has_the_samples_of_all_attempts_and_the_later_ones_win(
    volume: Volume, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(NO_LINKS[0], "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    draw(volume, 1, 1, 2, 3)
    (volume.attempt(1, 1) / "samples" / "epoch-0004.png.tmp-1f").write_text("torn")
    volume.attempt(1, 2).mkdir()
    draw(volume, 3, 3, 4)
    gather_samples(volume, 1, 3)
    assert shown(volume) == {"0001": "a1", "0002": "a1", "0003": "a3", "0004": "a3"}
    gather_samples(volume, 1, 3)
    assert len(shown(volume)) == 4
    assert sorted(path.name for path in (volume.attempt(1, 1) / "samples").glob("*.png")) == [
        f"epoch-{i:04d}.png" for i in (1, 2, 3)
    ]
    assert Path(volume.samples(1)).readlink() == Path("a3/samples")


def test_the_link_follows_the_newest_attempt(volume: Volume) -> None:
    draw(volume, 1, 1)
    gather_samples(volume, 1, 1)
    draw(volume, 2, 2)
    gather_samples(volume, 1, 2)
    assert shown(volume) == {"0001": "a1", "0002": "a2"}


def test_metrics_of_all_attempts_are_one_series(volume: Volume) -> None:
    for attempt, steps in ((1, (10, 20, 30)), (2, (20, 30, 40))):
        folder = volume.attempt(1, attempt)
        folder.mkdir(parents=True)
        lines = [{"step": step, "loss_d": attempt} for step in steps]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    training, measured = Metrics().read(volume, 1, 2)
    assert [(one["step"], one["loss_d"]) for one in training] == [(10, 1), (20, 2), (30, 2), (40, 2)]
    assert measured == []
