"""`ganq export --to tensorboard`: read back by TensorBoard's own reader."""

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
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


# --- Weights & Biases -------------------------------------------------------------------------


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file: the log format of LevelDB behind a header of 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def records(folder: Path) -> list[tuple[dict[str, Any], Path]]:
    """What the offline runs below a folder have logged, and where."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    protobuf: Any = wandb_internal_pb2
    wandb.teardown()  # waits for the process that writes the files, as the end of a command does
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in leveldb_log(file.read_bytes()):
            record = protobuf.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                found.append((items, file.parent))
    return found


@pytest.mark.tier2
def test_offline_runs_of_wandb_have_each_value_once_by_images_seen(
    ganq: "Ganq",
    trained: Callable[..., int],
    attempt: Any,
    tmp_path: Path,
    settings: "Settings",
    database: Any,
) -> None:
    from sqlalchemy import text

    pytest.importorskip("wandb", reason="the extra ganq[wandb] is not installed")
    job_id = trained(epochs=4, name="faces")
    attempt(job_id, 1, steps=range(5, 21, 5), samples=(1, 2), kid=0.5)
    folder = tmp_path / "runs" / f"faces-{job_id}"
    said = ganq("export", job_id, "--to", "wandb", tmp_path / "runs")
    assert said.code == 0, said.err
    assert "wandb sync" in said.err
    logged = records(folder)
    losses = [(one["images_seen"], one["Loss/G/loss"]) for one, _ in logged if "Loss/G/loss" in one]
    assert losses == [(8 * step, step / 2) for step in range(5, 21, 5)]
    assert [one["images_seen"] for one, _ in logged if one.get("Metrics/kid_effnet-lite0") == 0.5] == [160]
    images = [
        (one["images_seen"], (run / "files" / one["Samples/fakes.path"]).read_bytes())
        for one, run in logged
        if "Samples/fakes.path" in one
    ]
    samples = Volume(settings.volume).attempt(job_id, 1) / "samples"
    assert images == [(80 * epoch, (samples / f"epoch-{epoch:04d}.png").read_bytes()) for epoch in (1, 2)]
    again = json.loads(ganq("export", job_id, "--to", "wandb", tmp_path / "runs", "--json").out)
    assert again["values"] == 0
    assert records(folder) == logged
    attempt(job_id, 2, steps=range(15, 31, 5), samples=(3,))
    database.write(lambda conn: conn.execute(text("UPDATE job SET attempt = 2")))
    more = json.loads(ganq("export", job_id, "--to", "wandb", tmp_path / "runs", "--json").out)
    assert more["values"] > 0
    seen = [one["images_seen"] for one, _ in records(folder) if "Loss/G/loss" in one]
    assert len(seen) == len(set(seen))


# --- trackio ------------------------------------------------------------------------------------


@pytest.mark.tier2
def test_runs_of_trackio_have_each_step_once_and_the_bytes_of_the_samples(
    ganq: "Ganq",
    trained: Callable[..., int],
    attempt: Any,
    tmp_path: Path,
    settings: "Settings",
    database: Any,
) -> None:
    from sqlalchemy import text

    if find_spec("trackio") is None:  # it reads the folder when it is imported
        pytest.skip("the extra ganq[trackio] is not installed")

    def logged(job_id: int, tag: str) -> list[tuple[int, Any]]:
        from trackio.sqlite_storage import SQLiteStorage

        lines = SQLiteStorage.get_logs("ganq", f"faces-{job_id}")
        return sorted((line["step"], line[tag]) for line in lines if tag in line)

    job_id = trained(epochs=4, name="faces")
    attempt(job_id, 1, steps=range(5, 21, 5), samples=(1, 2), kid=0.5)
    runs = tmp_path / "runs"
    said = ganq("export", job_id, "--to", "trackio", runs)
    assert said.code == 0, said.err
    assert f"TRACKIO_DIR={runs} trackio show --project ganq" in said.err
    assert logged(job_id, "Loss/G/loss") == [(8 * step, step / 2) for step in range(5, 21, 5)]
    assert logged(job_id, "Metrics/kid_effnet-lite0") == [(160, 0.5)]
    samples = Volume(settings.volume).attempt(job_id, 1) / "samples"
    images = [
        (step, (runs / "media" / image["file_path"]).read_bytes())
        for step, image in logged(job_id, "Samples/fakes")
    ]
    assert images == [(80 * epoch, (samples / f"epoch-{epoch:04d}.png").read_bytes()) for epoch in (1, 2)]
    attempt(job_id, 2, steps=range(15, 31, 5), samples=(3,))
    database.write(lambda conn: conn.execute(text("UPDATE job SET attempt = 2")))
    more = json.loads(ganq("export", job_id, "--to", "trackio", runs, "--json").out)
    assert more["values"] > 0
    assert [step for step, _ in logged(job_id, "Loss/G/loss")] == [8 * step for step in range(5, 31, 5)]
    again = json.loads(ganq("export", job_id, "--to", "trackio", runs, "--json").out)
    assert again["values"] == 0
    elsewhere = ganq("export", job_id, "--to", "trackio", tmp_path / "other")
    assert (elsewhere.code, "one folder in each process" in elsewhere.err) == (2, True)


def test_a_tracker_that_is_not_installed_names_its_extra(
    ganq: "Ganq", trained: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    trained(name="a")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "ganq.trackers.weights_and_biases", raising=False)
    said = ganq("export", "a", "--to", "wandb", tmp_path / "runs")
    assert (said.code, "pip install 'ganq[wandb]'" in said.err) == (2, True)
