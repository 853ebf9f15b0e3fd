"""
What may befall a training run: kills at every phase, NaN, a full disk, bad checkpoints, no memory, no data.

Rows F1, F23, F28, F33, F34 and F35 of FAULTS. Most run on chaos.attempts.Desk (true runner, true files,
no table); what a person sees is tested with real workers.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from chaos.attempts import Desk, hashes, meta
from chaos.invariants import assert_invariants
from machine import Ganq, attempt_folder, part, until, weights
from tables import job_row, without_backoff
from unit.jobs.local_context import LocalContext, noise_images

import jobs.training.train
from jobs.errors import DiskFullError, StopRequested
from jobs.specs import TrainSpec
from storage.datasets.cache import open_images
from storage.db.engine import Database
from storage.volume.durable import TEMP_MARK, write_folder
from storage.volume.layout import Volume

sqlite_only = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)

NEVER = 1e9
SMALL = {"size": 16, "ngf": 4, "ndf": 4, "nz": 8, "batch": 16, "save_every": 1, "epochs": 3, "keep_every": 1}
LAST = 3 * 6
"""Steps of that run: 96 images are six batches."""


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    volume = Volume(tmp_path_factory.mktemp("desk") / "volume")
    volume.ensure()
    return volume


@pytest.fixture(scope="module")
def new_desk(volume: Volume, faces: Path) -> Callable[..., Desk]:
    numbers = iter(range(1, 1000))

    def make(**options: Any) -> Desk:
        fingerprint = open_images(volume, str(faces), 16, workers=1).fingerprint
        given = {"recipe": "sngan", "data": str(faces), "device": "cpu", **SMALL, **options}
        return Desk(volume, next(numbers), TrainSpec.create(**given), fingerprint)

    return make


@pytest.fixture(scope="module")
def calm(new_desk: Callable[..., Desk]) -> Callable[..., Desk]:
    """The uninterrupted run of some options, made once."""
    known: dict[str, Desk] = {}

    def get(**options: Any) -> Desk:
        key = str(sorted(options.items()))
        if key not in known:
            known[key] = new_desk(checkpoint_seconds=NEVER, **options)
            assert known[key].attempt()["op"] == "done"
        return known[key]

    return get


def events_of(desk: Desk, type: str) -> list[dict[str, Any]]:
    return [one["detail"] for one in desk.events if one["type"] == type]


def check_finite(desk: Desk) -> None:
    """Check that no registered checkpoint had a NaN, including those that retention has deleted."""
    import numpy as np
    from safetensors.numpy import load_file

    for one in desk.checkpoints:
        for file in ("state.safetensors", "generator.safetensors"):
            for name, tensor in load_file(desk.folder(one) / file).items():
                assert np.isfinite(tensor).all(), f"{one.path}: {name}"


# --- F1: killed at every phase ----------------------------------------------------------------

PHASES = [
    "supervisor.claimed",
    "runner.assigned",
    "train.data_open",
    "train.built",
    "train.between_networks@5",
    "train.stepped@8",
    "folder.begun@1",
    "folder.file_written@5",
    "file.synced.MANIFEST.json@2",
    "file.renamed.MANIFEST.json@2",
    "folder.written@3",
    "folder.renamed@3",
    "supervisor.before_register@2",
    "supervisor.registered@2",
    "supervisor.pruned@1",
    "file.synced.epoch-0006.png@1",
    "runner.worked",
    "supervisor.before_finish",
    "supervisor.finished",
]
FEW = PHASES[4:12:2] + PHASES[12:15:2] + PHASES[17:]


def check_work_lost(ganq: Ganq, job: int, attempts: int) -> None:
    """Check that each attempt resumed from the newest checkpoint registered before it."""
    reached = 0
    for number in range(1, attempts + 1):
        log = Path(ganq.env["GANQ_VOLUME"]) / "jobs" / f"{job:06d}" / f"a{number}" / "log.txt"
        lines = log.read_text().splitlines() if log.exists() else []
        for line in lines:
            if "resuming at step" in line:
                went_on = int(line.split("resuming at step ")[1].split()[0])
                assert went_on >= reached, f"attempt {number} lost more than one save interval"
                reached = went_on
            if "checkpoint " in line and ", step " in line:
                reached = int(line.split(", step ")[1].split(",")[0])


def killed_at(ganq: Ganq, database: Database, folder: Path, small: list[str], points: list[str]) -> None:
    """Kill one job once at each of these points, over two workers; compare it with an uninterrupted one."""
    fired = folder / "fired"
    fired.mkdir()
    entries = [(name, k or "1") for name, _, k in (point.partition("@") for point in points)]
    armed = {
        "GANQ_ENABLE_FAILPOINTS": "1",
        "GANQ_FAILPOINTS": ";".join(f"{name}=kill@{k}" for name, k in entries),
        "GANQ_FAILPOINTS_FIRED": str(fired),
    }
    options = [
        *small,
        "--epochs",
        "6",
        "--save-every",
        "1",
        "--keep-last",
        "1",
        "--checkpoint-seconds",
        "0.001",
    ]
    calm = ganq.start_worker("calm")
    plain = ganq.json("submit", "train", *options, "--wait")["id"]
    calm.send_signal(signal.SIGTERM)
    assert calm.wait(30) == 0
    for number in range(2):
        ganq.start_worker(f"w{number}", **armed)
    job = ganq.json("submit", "train", *options)["id"]
    with without_backoff(database):
        until(lambda: job_row(database, job)["state"] == "succeeded", within_s=400, what="the end")
    names = {name for name, _ in entries}
    until(lambda: {one.name for one in fired.iterdir()} == names, what="all points")
    row = ganq.job(job)
    # Sometimes a supervisor and its runner each reach a failpoint in the same attempt.
    most = len(names - {"supervisor.finished"}) + 1
    assert most - 2 <= row["attempt"] <= most
    assert row["bit_exact"] is True
    check_work_lost(ganq, job, row["attempt"])
    folders = [attempt_folder(ganq, one) / "checkpoints" / "final" for one in (plain, job)]
    assert hashes(folders[0]) == hashes(folders[1])
    assert_invariants(database, Volume(Path(ganq.env["GANQ_VOLUME"])))


@pytest.mark.tier2
@sqlite_only
def test_a_training_killed_at_its_phases_ends_with_the_bits_of_an_undisturbed_one(
    ganq: Ganq, redis_url: str, database: Database, small: list[str], tmp_path: Path
) -> None:
    killed_at(ganq, database, tmp_path, small, FEW)


@pytest.mark.tier2
def test_a_training_killed_at_every_phase_ends_with_the_bits_of_an_undisturbed_one(
    ganq: Ganq, redis_url: str, database: Database, small: list[str], tmp_path: Path
) -> None:
    killed_at(ganq, database, tmp_path, small, PHASES)


# --- F34: NaN ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["dcgan", "sngan"])
@pytest.mark.parametrize("seconds", [1e-9, NEVER], ids=["saved at each step", "saved by epochs"])
@pytest.mark.parametrize("step", [0, pytest.param(8, marks=pytest.mark.tier2)])
def test_a_nan_that_does_not_come_again_leaves_no_trace_in_the_result(
    new_desk: Callable[..., Desk], calm: Callable[..., Desk], recipe: str, seconds: Any, step: int
) -> None:
    desk = new_desk(recipe=recipe, checkpoint_seconds=seconds)
    assert desk.attempt(f"train.nan.{step}x1=on@1")["op"] == "done"
    assert desk.kept() == calm(recipe=recipe).kept()
    assert desk.samples() == calm(recipe=recipe).samples()
    (back,) = events_of(desk, "rolled_back")
    assert back["action"] == "the same again"
    assert back["to_step"] == (step if seconds < 1 else step // 6 * 6)
    assert desk.result["lr_scale"] == 1.0
    assert len(desk.result["rollbacks"]) == 1
    assert desk.result["bit_exact"] is True


def test_each_nan_far_apart_gets_its_own_second_try(
    new_desk: Callable[..., Desk], calm: Callable[..., Desk]
) -> None:
    desk = new_desk(checkpoint_seconds=NEVER)
    # The last two are one incident: nothing was saved between them, so the rates are halved.
    points = "train.nan.2x1=on@1;train.nan.8x1=on@1;train.nan.14x1=on@1;train.nan.17x1=on@2"
    assert desk.attempt(points)["op"] == "done"
    assert [one["action"] for one in events_of(desk, "rolled_back")] == [
        "the same again",
        "the same again",
        "the same again",
        "lower rates",
    ]
    assert desk.result["lr_scale"] == 0.5
    assert desk.kept()[("epoch", 12)] == calm().kept()[("epoch", 12)]


def test_a_run_that_diverges_by_itself_continues_with_half_the_rates_and_says_so(
    new_desk: Callable[..., Desk], calm: Callable[..., Desk]
) -> None:
    desk = new_desk(checkpoint_seconds=1e-9)
    assert desk.attempt("train.nan.8x1=on@1+")["op"] == "done"
    check_finite(desk)
    assert [(one["action"], one["to_step"]) for one in events_of(desk, "rolled_back")] == [
        ("the same again", 8),
        ("lower rates", 6),
    ]
    assert desk.result["lr_scale"] == 0.5
    kept = desk.kept()
    assert kept[("epoch", 6)] == calm().kept()[("epoch", 6)]
    assert kept[("final", LAST)] != calm().final()
    facts = meta(desk.folder(desk.checkpoints[-1]))
    assert facts["lr_scale"] == 0.5
    assert [one["lr_scale"] for one in facts["rollbacks"]] == [1.0, 0.5]
    assert "back to step 6, lower rates" in desk.log()


@pytest.mark.parametrize("seconds", [1e-9, NEVER], ids=["saved at each step", "saved by epochs"])
@pytest.mark.parametrize(
    "kill",
    [
        "train.stepped=kill@14",
        *(
            pytest.param(one, marks=pytest.mark.tier2)
            for one in ("train.stepped=kill@10", "folder.renamed=kill@2")
        ),
    ],
)
def test_where_the_rates_were_halved_depends_on_no_clock_and_no_kill(
    new_desk: Callable[..., Desk], seconds: Any, kill: str
) -> None:
    plain, killed = new_desk(checkpoint_seconds=NEVER), new_desk(checkpoint_seconds=seconds)
    diverges = "train.nan.8x1=on@1+"
    assert plain.attempt(diverges)["op"] == "done"
    assert killed.attempt(f"{diverges};{kill}")["op"] == "killed"
    assert killed.attempt(diverges)["op"] == "done"
    assert killed.final() == plain.final()
    assert killed.result["lr_scale"] == 0.5


def test_a_run_that_diverges_with_half_the_rates_too_fails_with_its_best_kept(
    new_desk: Callable[..., Desk], calm: Callable[..., Desk]
) -> None:
    desk = new_desk(checkpoint_seconds=NEVER)
    last = desk.attempt("train.nan.8x1=on@1+;train.nan.9x0.5=on@1+")
    assert (last["op"], last["code"]) == ("failed", "NAN_LOSS")
    assert len(events_of(desk, "rolled_back")) == 2
    assert "halving the learning rates did not help" in last["message"]
    assert f"ganq checkpoints {desk.job_id}" in last["hint"] or "ganq checkpoints JOB" in last["hint"]
    check_finite(desk)
    assert desk.kept()[("epoch", 6)] == calm().kept()[("epoch", 6)]


# --- F35: no memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["train.out_of_memory=on@3", "train.stepped=raise:MemoryError@3"])
def test_no_memory_asks_for_a_fresh_process_and_names_a_batch(
    new_desk: Callable[..., Desk], point: str
) -> None:
    last = new_desk().attempt(point)
    assert (last["op"], last["code"], last["replace"]) == ("failed", "OUT_OF_MEMORY", True)
    assert "--batch 8" in last["hint"]


@pytest.mark.tier2
@sqlite_only
def test_out_of_memory_gets_one_fresh_process_and_then_fails(
    ganq: Ganq, redis_url: str, small: list[str]
) -> None:
    worker = ganq.start_worker(
        GANQ_ENABLE_FAILPOINTS="1", GANQ_FAILPOINTS="train.out_of_memory=on@8+;train.stepped=sleep:0.05@1+"
    )
    job = ganq.json("submit", "train", *small, "--epochs", "20")["id"]
    pids = set()

    def over() -> bool:
        runner = part(worker, "worker.runner.main")
        row = ganq.job(job)
        if runner is not None and row["state"] == "running" and row["progress"]:
            pids.add(runner.pid)
        return bool(row["state"] == "failed")

    until(over, what="the failure")
    row = ganq.job(job)
    assert row["error"]["code"] == "OUT_OF_MEMORY"
    assert "--batch 8" in row["error"]["hint"]
    assert [one["outcome"] for one in row["attempts"]] == ["retried", "failed"]
    assert len(pids) == 2, "the second try was no fresh process"


def test_training_does_not_wait_for_its_checkpoints(
    new_desk: Callable[..., Desk], calm: Callable[..., Desk]
) -> None:
    class Slow(Desk):
        """A desk whose table answers after the run has made progress."""

        went_on = 0

        def _register(self, message: dict[str, Any], channel: Any, dies: bool) -> None:
            deadline = time.monotonic() + 30
            done = message["step"] * self.spec.batch
            while message["kind"] != "final" and time.monotonic() < deadline:
                progress = [one["progress"]["done"] for one in channel.receive() if one["op"] == "progress"]
                if any(one > done for one in progress):
                    self.went_on += 1
                    break
            super()._register(message, channel, dies)

    plain = new_desk(epochs=40, save_every=20)
    slow = Slow(plain.volume, plain.job_id, plain.spec, plain.fingerprint)
    assert slow.attempt()["op"] == "done"
    assert slow.went_on == 1
    assert [one.kind for one in slow.checkpoints] == ["epoch", "final"]


# --- F28: bad checkpoints ---------------------------------------------------------------------


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


def truncate(folder: Path) -> None:
    os.truncate(folder / "state.safetensors", 1000)


def flip_a_bit(folder: Path) -> None:
    path = folder / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_the_manifest(folder: Path) -> None:
    (folder / "MANIFEST.json").unlink()


HARMS = [delete, truncate, flip_a_bit, lose_the_manifest]


def other_shapes(desk: Desk) -> None:
    """Make the newest checkpoint one of other networks, intact and registered."""
    from safetensors.numpy import load_file, save_file

    newest = desk.checkpoints[-1]
    folder = desk.folder(newest)
    state = load_file(folder / "state.safetensors")
    state["g.Gene.0.weight"] = state["g.Gene.0.weight"][:, :-1].copy()

    def rewrite(data: bytes, path: Path) -> None:
        path.write_bytes(data)

    rest = {name: (folder / name).read_bytes() for name in ("generator.safetensors", "state.json")}
    shutil.rmtree(folder)
    newest.manifest_sha256, _ = write_folder(
        folder,
        {
            "state.safetensors": partial(save_file, state),
            **{name: partial(rewrite, data) for name, data in rest.items()},
        },
    )


def interrupted(new_desk: Callable[..., Desk]) -> Desk:
    """A run with two checkpoints, of steps 6 and 12, killed in the third epoch."""
    desk = new_desk(checkpoint_seconds=NEVER)
    assert desk.attempt(dies="registered", at=2)["op"] == "killed"
    assert [one.step for one in desk.checkpoints] == [6, 12]
    return desk


@pytest.mark.parametrize("harm", [*HARMS, other_shapes], ids=lambda harm: harm.__name__)
def test_a_corrupt_checkpoint_is_reported_and_the_previous_one_gives_the_same_result(
    new_desk: Callable[..., Desk], calm: Callable[..., Desk], harm: Any
) -> None:
    desk = interrupted(new_desk)
    harm(desk if harm is other_shapes else desk.folder(desk.checkpoints[-1]))
    bad = desk.checkpoints[-1].path
    assert desk.attempt()["op"] == "done"
    (skipped,) = events_of(desk, "checkpoint_skipped")
    assert skipped["path"] == bad
    assert skipped["reason"]
    assert f"checkpoint {bad} is skipped" in desk.log()
    assert "resuming at step 6 of" in desk.log()
    assert desk.final() == calm().final()


def test_after_a_bad_checkpoint_its_successor_of_the_same_step_is_the_one_that_counts(
    new_desk: Callable[..., Desk], calm: Callable[..., Desk]
) -> None:
    desk = interrupted(new_desk)
    flip_a_bit(desk.folder(desk.checkpoints[-1]))
    # The second attempt repeats step 12 and dies; the third must not read the corrupt one again.
    assert desk.attempt(dies="registered")["op"] == "killed"
    assert desk.attempt()["op"] == "done"
    assert len(events_of(desk, "checkpoint_skipped")) == 1
    assert desk.result["resumed_from"] == 12
    assert desk.final() == calm().final()


def test_without_an_intact_checkpoint_the_run_fails_and_names_the_solution(
    new_desk: Callable[..., Desk],
) -> None:
    desk = interrupted(new_desk)
    for one, harm in zip(desk.checkpoints, [truncate, delete], strict=True):
        harm(desk.folder(one))
    last = desk.attempt()
    assert (last["op"], last["code"]) == ("failed", "CHECKPOINT_CORRUPT")
    assert last["hint"] == f"ganq retry {desk.job_id} starts it again from the beginning"
    assert len(events_of(desk, "checkpoint_skipped")) == 2


# --- F33: images ----------------------------------------------------------------------------


@pytest.fixture
def own_pictures(tmp_path: Path, faces: Path) -> Path:
    return Path(shutil.copytree(faces, tmp_path / "own"))


def test_images_that_vanish_in_the_middle_are_not_missed(
    new_desk: Callable[..., Desk], calm: Callable[..., Desk], own_pictures: Path
) -> None:
    desk = new_desk(data=str(own_pictures))
    assert desk.attempt(dies="registered")["op"] == "killed"
    shutil.rmtree(own_pictures)
    assert desk.attempt()["op"] == "done"
    assert desk.kept() == calm().kept()


@pytest.fixture
def own_volume(tmp_path: Path) -> Volume:
    volume = Volume(tmp_path / "volume")
    volume.ensure()
    return volume


def stopped_desk(
    own_volume: Volume, own_pictures: Path, checkpoints: int = 1, *, keep_cache: bool = False
) -> Desk:
    """A run on a volume of its own, killed after some checkpoints; its decoded images are deleted."""
    cached = open_images(own_volume, str(own_pictures), 16, workers=1)
    given = {"recipe": "sngan", "data": str(own_pictures), "device": "cpu", **SMALL}
    desk = Desk(own_volume, 1, TrainSpec.create(**given), cached.fingerprint)
    assert desk.attempt(dies="registered" if checkpoints else "before_register")["op"] == "killed"
    assert len(desk.checkpoints) == checkpoints
    if not keep_cache:
        shutil.rmtree(own_volume.dataset(cached.fingerprint))
    return desk


def test_decoded_images_that_were_deleted_are_decoded_again(
    calm: Callable[..., Desk], own_volume: Volume, own_pictures: Path
) -> None:
    desk = stopped_desk(own_volume, own_pictures)
    assert desk.attempt()["op"] == "done"
    assert desk.kept() == calm().kept()


def test_decoded_images_of_which_half_became_zeros_are_decoded_again(
    calm: Callable[..., Desk], own_volume: Volume, own_pictures: Path
) -> None:
    desk = stopped_desk(own_volume, own_pictures, keep_cache=True)
    (images,) = own_volume.datasets.glob("*/images.u8")
    size = images.stat().st_size
    with open(images, "r+b") as file:
        file.write(bytes(size // 2))
    assert desk.attempt()["op"] == "done"
    (event,) = events_of(desk, "dataset_damaged")
    assert "1 of 1 blocks are not what was written" in event["reason"]
    assert desk.kept() == calm().kept()


@pytest.mark.parametrize("checkpoints", [0, 1])
def test_other_images_than_at_the_beginning_are_refused(
    own_volume: Volume, own_pictures: Path, checkpoints: int
) -> None:
    desk = stopped_desk(own_volume, own_pictures, checkpoints)
    next(own_pictures.glob("*.png")).unlink()
    last = desk.attempt()
    assert (last["op"], last["code"]) == ("failed", "BAD_DATASET")
    assert "not those of this run's first attempt" in last["message"]
    assert "restore them" in last["hint"]


def test_missing_images_without_a_copy_are_reported_by_name(own_volume: Volume, own_pictures: Path) -> None:
    desk = stopped_desk(own_volume, own_pictures)
    shutil.rmtree(own_pictures)
    last = desk.attempt()
    assert last["op"] == "failed"
    assert str(own_pictures) in last["message"]
    assert last["hint"]


def test_a_cache_that_is_deleted_while_a_run_reads_it_is_read_to_the_end(
    tmp_path: Path, own_volume: Volume, own_pictures: Path
) -> None:
    images = open_images(own_volume, str(own_pictures), 16, workers=1)
    spec = TrainSpec.create(data="/x", recipe="sngan", **{**SMALL, "epochs": 1})

    def at(asked: int) -> None:
        if asked == 2:
            shutil.rmtree(own_volume.dataset(images.fingerprint))

    ctx = LocalContext(tmp_path, data=images, stop_at=at)
    assert jobs.training.train.run(spec, ctx)["step"] == 6
    assert not own_volume.dataset(images.fingerprint).exists()


# --- F23: no room for a checkpoint ------------------------------------------------------------


class FullDisk(LocalContext):
    """Saves at these steps find no free space."""

    full_at: frozenset[int] = frozenset()

    def save_checkpoint(self, *, step: int, **more: Any) -> None:
        if step in self.full_at:
            raise DiskFullError("no room left at /v (needed: 2.0 MB, free: 1.0 MB)", needed=2, free=1)
        super().save_checkpoint(step=step, **more)


def on_a_full_disk(folder: Path, *steps: int, **given: Any) -> tuple[FullDisk, TrainSpec]:
    ctx = FullDisk(folder, data=noise_images(16, 16), **given)
    ctx.full_at = frozenset(steps)
    options = {**SMALL, "batch": 4, "epochs": 3, "checkpoint_seconds": 1e-9}
    return ctx, TrainSpec.create(data="/x", recipe="sngan", **options)


def test_three_missed_saves_are_borne_loudly_and_change_no_bit(tmp_path: Path) -> None:
    straight, spec = on_a_full_disk(tmp_path)
    jobs.training.train.run(spec, straight)
    ctx, _ = on_a_full_disk(tmp_path, 2, 3, 4, 7, 8, 9)
    jobs.training.train.run(spec, ctx)
    assert [(one["type"], one["misses"]) for one in ctx.events] == [
        ("checkpoint_save_failed", n) for n in (1, 2, 3)
    ] * 2
    assert sum(line.startswith("NOT SAVED: no room left") for line in ctx.lines) == 6
    *phases, measuring, end = [
        report.get("phase") for report in ctx.reports if report.get("phase") != "reading images"
    ]
    assert (measuring, end) == ("measuring the real images", None)
    full = "DISK_FULL: no room left at /v (needed: 2.0 MB, free: 1.0 MB)"
    # A report comes before the save of its step; that the disk has room again shows with the next.
    missed = [f"{full}, {n} of 3 saves missed" for n in (1, 2, 3)]
    assert phases == [None, None, *missed, None, None, *missed, None, None]
    assert [one.step for one in ctx.saved] == [1, 5, 6, 10, 11, 12]
    assert all(
        (a == b).all()
        for a, b in zip(ctx.saved[-1].state.values(), straight.saved[-1].state.values(), strict=True)
    )


@pytest.mark.parametrize("steps", [(2, 3, 4, 5), (12,)], ids=["the fourth in a row", "the final one"])
def test_a_save_that_cannot_be_missed_gives_the_job_back(tmp_path: Path, steps: Any) -> None:
    ctx, spec = on_a_full_disk(tmp_path, *steps)
    with pytest.raises(DiskFullError) as caught:
        jobs.training.train.run(spec, ctx)
    assert (caught.value.needed, caught.value.free) == (2, 1)
    assert ctx.saved[-1].step == min(steps) - 1


def test_a_drain_on_a_full_disk_stops_all_the_same(tmp_path: Path) -> None:
    ctx, spec = on_a_full_disk(tmp_path, 3, stop_at=lambda asked: "drain" if asked == 3 else None)
    with pytest.raises(StopRequested):
        jobs.training.train.run(spec, ctx)
    assert [one.step for one in ctx.saved] == [1, 2]


@pytest.fixture
def small_volume(settings_env: dict[str, str], backend: str) -> Iterator[Path]:
    """A small file system mounted at the volume's path."""
    folder = Path(settings_env["GANQ_VOLUME"])
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=128m", "ganq-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.tier2
@sqlite_only
def test_a_disk_that_fills_up_during_training_is_reported_and_waited_for(
    small_volume: Path, ganq: Ganq, redis_url: str, database: Database, small: list[str]
) -> None:
    ganq.start_worker(GANQ_ENABLE_FAILPOINTS="1", GANQ_FAILPOINTS="train.stepped=sleep:0.03@1+")
    options = [*small, "--epochs", "24", "--save-every", "12", "--checkpoint-seconds", "1"]
    plain = ganq.json("submit", "train", *options, "--wait")["id"]
    job = ganq.json("submit", "train", *options)["id"]
    until(lambda: ganq.steps(job), what="a first checkpoint")
    fill = small_volume / "somebody's.file"
    with open(fill, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_volume).free - (16 << 10))

    def phase() -> str:
        found = ganq.peek(job)  # three saves are missed within seconds: a command might come too late
        return str((found["progress"] or {}).get("phase") or "") if found["state"] == "running" else ""

    shown = until(lambda: phase() if "DISK_FULL" in phase() else "", what="DISK_FULL while it runs")
    assert "needed: " in shown
    assert "free: " in shown
    until(lambda: ganq.peek(job)["state"] == "queued", what="the fourth miss")
    found = ganq.job(job)
    assert found["error"]["code"] == "DISK_FULL"
    assert "needed: " in found["error"]["message"]
    assert "the job then continues" in found["error"]["hint"]
    misses = [one for one in found["events"] if one["type"] == "checkpoint_save_failed"]
    assert [one["detail"]["misses"] for one in misses] == [1, 2, 3]
    assert "DISK_FULL" in ganq("status", str(job))
    assert_invariants(database, Volume(small_volume))
    assert not list(small_volume.rglob(f"*{TEMP_MARK}*")), "half a checkpoint was left behind"
    fill.unlink()
    assert ganq.run("wait", str(job), "--timeout", "90").returncode == 0
    folders = [attempt_folder(ganq, one) / "checkpoints" / "final" for one in (plain, job)]
    assert weights(folders[0]) == weights(folders[1])


# --- what a person sees -----------------------------------------------------------------------


@pytest.mark.tier2
@sqlite_only
def test_status_shows_corrupt_checkpoints_another_build_and_rollbacks(
    ganq: Ganq, redis_url: str, small: list[str]
) -> None:
    slowly = {"GANQ_ENABLE_FAILPOINTS": "1", "GANQ_FAILPOINTS": "train.stepped=sleep:0.12@1+"}
    first = ganq.start_worker("w1", **slowly)
    options = [*small, "--epochs", "16", "--save-every", "1", "--checkpoint-seconds", "1000"]
    jobs = [ganq.json("submit", "train", *options)["id"] for _ in range(2)]
    bad, worse = jobs
    for job in jobs:
        until(lambda job=job: len(ganq.steps(job)) == 2, what="two checkpoints")
        if job == bad:
            runner = part(first, "worker.runner.main")
            assert runner is not None
            ganq("hold", str(worse))
            runner.send_signal(signal.SIGKILL)
            until(lambda: ganq.peek(bad)["state"] == "queued", what="the crash")
            ganq("hold", str(bad))
            ganq("release", str(worse))
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 0
    volume = Path(ganq.env["GANQ_VOLUME"])

    flip_a_bit(volume / ganq.json("checkpoints", str(bad))[-1]["path"])
    for one in ganq.json("checkpoints", str(worse)):
        truncate(volume / one["path"])
    nan = {"GANQ_ENABLE_FAILPOINTS": "1", "GANQ_FAILPOINTS": "train.nan.90x1=on@1"}
    ganq.start_worker("w2", **nan, OMP_NUM_THREADS="2")
    ganq("release", str(bad))
    assert ganq.run("wait", str(bad), "--timeout", "60").returncode == 0
    page = ganq("status", str(bad))
    assert "checkpoint_skipped" in page
    assert "state.safetensors has changed since it was written" in page
    assert "not_bit_exact" in page
    assert "threads 1 is now 2" in page
    assert "no: resumed on another device, build or number of threads" in page
    assert "rolled_back" in page
    assert "action=the same again" in page

    assert ganq.run("wait", str(worse), "--timeout", "60").returncode == 1
    found = ganq.job(worse)
    assert found["error"]["code"] == "CHECKPOINT_CORRUPT"
    assert found["error"]["hint"] == f"ganq retry {worse} starts it again from the beginning"
    again = ganq.json("retry", str(worse))[0]["id"]
    assert ganq.run("wait", str(again), "--timeout", "60").returncode == 0
