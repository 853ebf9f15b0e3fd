"""
P2: a training run that was killed anywhere, any number of times, ends with the bits of one that was not.

Random specs, random places to die, real processes and files (chaos/attempts.py). Every attempt is a
process of its own, so each resume is one by another worker.
"""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
from chaos.attempts import Desk
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from PIL import Image

from jobs.specs import TrainSpec
from storage.datasets.cache import open_images
from storage.volume.durable import read_verified
from storage.volume.layout import Volume

PICTURES = 22
NEVER = 1e9
JOBS = itertools.count(1)

SPECS = st.fixed_dictionaries(
    {
        "recipe": st.sampled_from(["dcgan", "sngan", "rpgan"]),
        "size": st.sampled_from([16, 24, 32]),
        "ngf": st.integers(4, 8),
        "ndf": st.integers(4, 8),
        "d_every": st.integers(1, 3),
        "g_every": st.integers(1, 6),
        "ema_half_life_kimg": st.sampled_from([0.0, 0.02]),
        "augment": st.sampled_from([(), ("color",), ("translation", "cutout")]),
        "mirror": st.booleans(),
        "fake_reuse": st.sampled_from(["until-g-step", "none"]),
        "save_every": st.integers(1, 3),
        "checkpoint_seconds": st.sampled_from([1e-9, 0.01, NEVER]),
        "batch": st.integers(3, 8),
        "epochs": st.integers(2, 4),
        "seed": st.integers(0, 2**40),
    }
)
RUNNER_DIES = {
    "runner.assigned": 1,
    "train.data_open": 1,
    "train.built": 1,
    "train.between_networks": 16,
    "train.stepped": 16,
    "folder.begun": 5,
    "folder.file_written": 15,
    "file.synced": 10,  # of grids, manifests and spec.json
    "file.renamed": 10,
    "folder.written": 5,
    "folder.renamed": 5,
    "runner.worked": 1,
}
KILLS = st.one_of(
    st.sampled_from(sorted(RUNNER_DIES)).flatmap(
        lambda point: st.integers(1, RUNNER_DIES[point]).map(lambda k: f"{point}=kill@{k}")
    ),
    st.integers(1, 16).map(lambda k: f"context.preempted=on@{k}"),
    st.tuples(st.sampled_from(["before_register", "registered"]), st.integers(1, 5)),
)


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    """A volume for all examples; each is a job of its own."""
    root = tmp_path_factory.mktemp("property")
    volume = Volume(root / "volume")
    volume.ensure()
    (root / "pictures").mkdir()
    for i in range(PICTURES):
        Image.effect_noise((40, 40), 60 + i).convert("RGB").save(root / "pictures" / f"{i:02d}.png")
    return volume


def images(volume: Volume, size: int) -> tuple[str, str]:
    """(their folder, their fingerprint); decoded at the first call."""
    data = str(volume.root.parent / "pictures")
    return data, open_images(volume, data, size, workers=1).fingerprint


def desk(volume: Volume, options: dict[str, object], **changes: object) -> Desk:
    data, fingerprint = images(volume, int(str(options["size"])))
    every_epoch = {"nz": 5, "keep_every": 1, "data": data, "device": "cpu"}
    spec = TrainSpec.create(**{**every_epoch, **options, **changes})
    return Desk(volume, next(JOBS), spec, fingerprint)


def undisturbed(volume: Volume, options: dict[str, object]) -> Desk:
    """The run that nothing happens to, and that makes no resume checkpoints either."""
    straight = desk(volume, options, checkpoint_seconds=NEVER)
    last = straight.attempt()
    assert last["op"] == "done", last
    return straight


def check_whole(one: Desk) -> None:
    """Whatever has died: each checkpoint that is registered can be read, and verifies."""
    for checkpoint in one.checkpoints:
        for name in ("state.safetensors", "generator.safetensors", "state.json"):
            read_verified(one.folder(checkpoint), name, checkpoint.manifest_sha256)


def check_same(disturbed: Desk, straight: Desk) -> None:
    assert disturbed.kept() == straight.kept()
    assert disturbed.samples() == straight.samples(), "a grid differs, is missing, or was drawn in two ways"
    assert disturbed.result["bit_exact"] is True
    for key in ("step", "epoch", "g_steps", "images", "image_count"):
        assert disturbed.result[key] == straight.result[key]


def run_with(volume: Volume, options: dict[str, object], kills: list[object]) -> tuple[Desk, Desk]:
    straight, disturbed = undisturbed(volume, options), desk(volume, options)
    for kill in kills:
        known = len(disturbed.checkpoints)
        newest = disturbed.checkpoints[-1].step if disturbed.checkpoints else None
        how = {"dies": kill[0], "at": kill[1]} if isinstance(kill, tuple) else {"failpoints": kill}
        last = disturbed.attempt(**how)
        note(f"{kill}: {last['op']} after {len(disturbed.checkpoints) - known} checkpoints")
        check_whole(disturbed)
        assert last["op"] in ("killed", "stopped", "done"), last
        if newest is not None and "going on" in (log := attempt_log(disturbed)):
            assert f"resuming at step {newest} of" in log, "it did not go on from its newest checkpoint"
        if last["op"] == "stopped" and disturbed.checkpoints:
            assert last["reason"] == "preempt"
    last = disturbed.attempt()
    assert last["op"] == "done", last
    return disturbed, straight


def attempt_log(one: Desk) -> str:
    path: Path = one.volume.attempt(one.job_id, one.attempts) / "log.txt"
    return path.read_text() if path.exists() else ""


def hold_p2(volume: Volume, options: dict[str, object], kills: list[object]) -> None:
    disturbed, straight = run_with(volume, options, kills)
    check_same(disturbed, straight)
    for one in (disturbed, straight):
        shutil.rmtree(volume.job(one.job_id))


ANY: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "phases": [Phase.generate],  # to shrink an example of several seconds would take the time limit
}


@settings(max_examples=6, **ANY)
@given(options=SPECS, kills=st.lists(KILLS, min_size=1, max_size=3))
@pytest.mark.tier2
def test_a_run_that_was_killed_anywhere_ends_with_the_bits_of_one_that_was_not(
    volume: Volume, options: Any, kills: Any
) -> None:
    hold_p2(volume, options, kills)


@pytest.mark.tier2
@pytest.mark.timeout(3600)  # about 15 s an example on two cores
@settings(max_examples=100, **ANY)
@given(options=SPECS, kills=st.lists(KILLS, min_size=1, max_size=6))
def test_p2_with_many_more_specs_and_places_to_die(volume: Volume, options: Any, kills: Any) -> None:
    hold_p2(volume, options, kills)


def test_options_that_differ_on_resume_are_refused_with_all_of_them(volume: Volume) -> None:
    options = {"recipe": "sngan", "size": 16, "ngf": 4, "ndf": 4, "batch": 4, "epochs": 2, "save_every": 1}
    one = desk(volume, options)
    assert one.attempt(dies="registered")["op"] == "killed"
    one.spec = TrainSpec.create(
        **{
            **one.spec.to_json(),
            "batch": 5,
            "lr_g": 1e-3,
            "fake_reuse": "until-g-step",
            "augment": ("cutout",),
            "epochs": 9,
        }
    )
    last = one.attempt()
    assert (last["op"], last["code"]) == ("failed", "BAD_SPEC")
    for reported in (
        "--batch 5 (it has 4)",
        "--lr-g 0.001 (it has 0.0004)",
        "--fake-reuse until-g-step (it has none)",
        "--augment",
    ):
        assert reported in last["message"]
    assert "epochs" not in last["message"]
    assert "--init-from" in last["hint"]


def test_another_number_of_threads_continues_and_is_reported(volume: Volume) -> None:
    options = {"recipe": "sngan", "size": 16, "ngf": 4, "ndf": 4, "batch": 4, "epochs": 2, "save_every": 1}
    one = desk(volume, options)
    assert one.attempt(dies="registered")["op"] == "killed"
    assert one.attempt(threads=2)["op"] == "done"
    assert one.result["bit_exact"] is False
    (reported,) = one.events
    assert reported["type"] == "not_bit_exact"
    assert reported["detail"]["changed"] == "threads 1 is now 2"
