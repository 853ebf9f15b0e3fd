"""`ganq export --to tensorboard`: read back by TensorBoard's own reader."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from storage.results.codecs import encode_png
from storage.volume.layout import Volume

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.db.store import JobStore
    from storage.settings import Settings

event_accumulator: Any = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator",
    reason="the extra ganq[tensorboard] is not installed",
)


@pytest.fixture
def attempt(settings: "Settings") -> Callable[..., None]:
    """Writes the record of one attempt: lines of training, evaluations and samples."""

    def write(
        job_id: int, number: int, *, steps: range, samples: tuple[int, ...] = (), kid: float | None = None
    ) -> None:
        folder = Volume(settings.volume).attempt(job_id, number)
        (folder / "samples").mkdir(parents=True)
        lines: list[dict[str, Any]] = [
            {
                "step": step,
                "epoch": step // 10,
                "images": step * 8,
                "loss_g": step / 2,
                "loss_d": None,
                "images_per_s": 100.0,
            }
            for step in steps
        ]
        if kid is not None:
            lines.append(
                {"step": steps[-1], "epoch": steps[-1] // 10, "key": "kid/effnet-lite0", "metric": kid}
            )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for epoch in samples:
            pixels = np.full((12, 20, 3), epoch, np.uint8)
            (folder / "samples" / f"epoch-{epoch:04d}.png").write_bytes(encode_png(pixels))

    return write


def read(folder: Path) -> Any:
    found = event_accumulator.EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return found.Reload()


def steps_of(run: Any, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in run.Scalars(tag)]


def test_curves_and_samples_of_all_attempts_are_read_back_each_step_once(
    ganq: "Ganq", trained: Callable[..., int], attempt: Any, tmp_path: Path, settings: "Settings"
) -> None:
    job_id = trained(epochs=4, name="faces")
    attempt(job_id, 1, steps=range(5, 31, 5), samples=(1, 2, 3), kid=0.5)
    said = ganq("export", job_id, "--to", "tensorboard", tmp_path / "runs")
    assert said.code == 0, said.err
    run = read(tmp_path / "runs" / f"faces-{job_id}")
    assert steps_of(run, "Loss/G/loss") == [(8 * step, step / 2) for step in range(5, 31, 5)]
    assert steps_of(run, "Timing/sec_per_kimg") == [(8 * step, 10.0) for step in range(5, 31, 5)]
    assert steps_of(run, "Metrics/kid_effnet-lite0") == [(240, 0.5)]
    assert "Loss/D/loss" not in run.Tags()["scalars"], "null is no value"
    images = run.Images("Samples/fakes")
    assert [(one.step, one.width, one.height) for one in images] == [
        (80, 20, 12),
        (160, 20, 12),
        (240, 20, 12),
    ]
    samples = Volume(settings.volume).attempt(job_id, 1) / "samples"
    assert images[1].encoded_image_string == (samples / "epoch-0002.png").read_bytes()
    assert [event.wall_time for event in run.Scalars("Loss/G/loss")] == sorted(
        event.wall_time for event in run.Scalars("Loss/G/loss")
    )


def test_a_second_export_adds_what_is_new_though_the_first_was_killed_and_the_run_resumed(
    ganq: "Ganq", store: "JobStore", trained: Callable[..., int], attempt: Any, tmp_path: Path, database: Any
) -> None:
    from sqlalchemy import text

    job_id = trained(name="faces")
    attempt(job_id, 1, steps=range(5, 31, 5), samples=(1, 2))
    target = ("--to", "tensorboard", tmp_path / "runs")
    assert ganq("export", job_id, *target).code == 0
    (first,) = (tmp_path / "runs" / f"faces-{job_id}").iterdir()
    first.write_bytes(first.read_bytes()[:-30])  # a kill in the middle of a record
    attempt(job_id, 2, steps=range(25, 41, 5), samples=(3,))
    database.write(lambda conn: conn.execute(text("UPDATE job SET attempt = 2")))
    assert ganq("export", job_id, *target, "--follow").code == 0
    run = read(tmp_path / "runs" / f"faces-{job_id}")
    assert steps_of(run, "Loss/G/loss") == [(8 * step, step / 2) for step in range(5, 41, 5)]
    assert [one.step for one in run.Images("Samples/fakes")] == [80, 160, 240]
    said = ganq("export", job_id, *target, "--json")
    assert said.json()["values"] == 0


def test_several_jobs_and_kinds_without_curves(
    ganq: "Ganq", trained: Callable[..., int], attempt: Any, job_factory: Any, tmp_path: Path
) -> None:
    for job_id in (trained(name="a"), trained(name="b")):
        attempt(job_id, 1, steps=range(5, 11, 5))
    said = ganq("export", "a", "b", "a", "--to", "tensorboard", tmp_path / "runs")
    assert "of 2 jobs written" in said.out
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["a-1", "b-2"]
    generation = job_factory(kind="generate")
    said = ganq("export", generation.id, "--to", "tensorboard", tmp_path / "runs")
    assert said.code != 0
    assert "is of kind generate and has no curves" in said.err
    assert "give one JOB" in ganq("export", "a", "b").err
    assert "--follow requires --to" in ganq("export", "a", "--follow").err
    (tmp_path / "file").touch()
    assert "file" in ganq("export", "a", "--to", "tensorboard", tmp_path / "file").err
