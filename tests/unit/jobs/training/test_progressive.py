"""Progressive resolution: growth, resume over each switch, and schedules that cannot work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from unit.jobs.local_context import LocalContext, noise_images, sha256_of

import jobs.training.train
from jobs import rng
from jobs.device import choose
from jobs.errors import SpecError, StopRequested
from jobs.generation.inference import for_inference
from jobs.networks.dcgan import Architecture
from jobs.specs import TrainSpec, check_same_run
from jobs.states import StopReason
from jobs.training.schedules import side_at, side_began
from jobs.training.state import TrainState

IMAGES = noise_images(40, 64)
SWITCHES = (26, 66)  # within the 7th batch of 4, and within the 17th


def spec_of(recipe: str = "rpgan", **given: Any) -> TrainSpec:
    small = {"size": 64, "nz": 4, "ngf": 4, "ndf": 4, "batch": 4, "epochs": 3, "save_every": 1, "seed": 5}
    options = {"data": "/faces", "metric": "none", "progressive": SWITCHES, **small, **given}
    return TrainSpec.create(recipe=recipe, **options)


def train(folder: Path, spec: TrainSpec, **given: Any) -> LocalContext:
    ctx = LocalContext(folder, data=IMAGES, **given)
    jobs.training.train.run(spec, ctx)
    return ctx


def test_images_have_a_quarter_then_half_then_the_full_side() -> None:
    spec = spec_of()
    assert [side_at(spec, step) for step in (0, 6, 7, 16, 17, 29)] == [16, 16, 32, 32, 64, 64]
    assert [side_began(spec, step) for step in (0, 6, 7, 16, 17)] == [0, 0, 7, 7, 17]
    assert side_at(spec_of(progressive=()), 0) == 64


@pytest.mark.parametrize(
    "recipe", ["rpgan", *(pytest.param(one, marks=pytest.mark.tier2) for one in ("dcgan", "sngan", "r3gan"))]
)
def test_a_run_that_was_stopped_around_a_switch_ends_with_the_same_bits(tmp_path: Path, recipe: str) -> None:
    spec = spec_of(recipe, ngf=2, ndf=2, epochs=2, progressive=(26, 52))
    whole = train(tmp_path, spec)
    assert [(one.step, one.meta["arch"].get("grown")) for one in whole.saved] == [(10, 32), (20, None)]
    for stop, side in ((7, 16), (8, 32), (13, 32), (14, None)):
        reasons = {stop: StopReason.PREEMPT}
        first = LocalContext(tmp_path, data=IMAGES, stop_at=reasons.get)
        with pytest.raises(StopRequested):
            jobs.training.train.run(spec, first)
        stopped = first.saved[-1]
        assert (stopped.step, stopped.meta["arch"].get("grown")) == (stop, side)
        second = train(tmp_path, spec, resume_from=stopped.for_resume(), attempt=2)
        assert sha256_of(second.saved[-1].state) == sha256_of(whole.saved[-1].state), f"stopped at {stop}"


@pytest.mark.parametrize("recipe", ["dcgan", "rpgan", "r3gan"])
def test_growing_changes_neither_the_images_nor_the_scores(recipe: str) -> None:
    spec = spec_of(recipe, size=96)
    state = TrainState.fresh(spec, choose("cpu"), side=24)
    with torch.no_grad():
        for weights in (*state.generator.parameters(), *state.discriminator.parameters()):
            weights.add_(torch.randn(weights.shape, generator=rng.generator(0, "test")), alpha=0.02)
    latents = rng.noise(0, "test", shape=(3, spec.nz, 1, 1))
    for side in (48, 96):
        generator, discriminator = state.generator.eval(), state.discriminator.eval()
        before = generator(latents)
        scores = discriminator(before)
        state.grow(spec, choose("cpu"), side)
        assert before.shape == (3, 3, 96, 96), "samples have full size in every phase"
        assert state.arch.side == side
        # The enlarged image passes Tanh before or after it is enlarged; nothing else differs.
        assert (state.generator.eval()(latents) - before).abs().mean() < 0.02
        torch.testing.assert_close(state.discriminator.eval()(before), scores, rtol=1e-4, atol=1e-5)
        assert state.generator.train()(latents).shape == (3, 3, side, side)


def test_the_moving_average_and_the_probability_of_augmentation_go_on_after_a_switch() -> None:
    spec = spec_of(augment=("translation",))
    state = TrainState.fresh(spec, choose("cpu"), side=16)
    assert state.ema is not None
    assert state.ada is not None
    state.ada.state_3[0] = 0.25
    with torch.no_grad():
        state.ema.net.get_parameter("Gene.0.weight").fill_(0.5)
    state.grow(spec, choose("cpu"), 32)
    assert bool((state.ema.net.get_parameter("Gene.0.weight") == 0.5).all())
    assert state.ada.p == 0.25


def test_sample_grids_have_full_size_before_the_images_have(tmp_path: Path) -> None:
    ctx = train(tmp_path, spec_of(epochs=2, save_every=1, batch=8, progressive=(2, 41)))
    assert {grid.shape for grid in ctx.samples.values()} == {(2 + 66, 2 + 8 * 66, 3)}
    early = ctx.saved[0]
    assert early.meta["arch"]["grown"] == 32
    arch = Architecture.from_json(early.meta["arch"])
    generator = arch.build_generator()
    generator.load_state_dict({k[2:]: v for k, v in early.generator.items() if k.startswith("G.")})
    images = for_inference(generator.eval(), choose("cpu"))(rng.noise(0, "test", shape=(2, 4, 1, 1)))
    assert images.shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"progressive": (66, 66)}, "images seen when half and when full size begins"),
        ({"progressive": (66,)}, "images seen when half and when full size begins"),
        ({"size": 48}, "a quarter of --size 48 is less than 16 pixels"),
        ({"skips": False}, "skip connections"),
        ({"init_from": 3}, "omit|trained ones are of full size"),
        ({"stop_after": "66-images"}, "--stop-after 66-images ends the run after 66"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_with_the_way_out(given: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message) as refused:
        spec_of(**given)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"progressive": (26, 120)}, "--epochs 3 ends the run after 120"),
        ({"stop_after": "1-epochs"}, "--stop-after 1-epochs ends the run after 40"),
    ],
)
def test_a_schedule_that_ends_after_the_run_is_refused(tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        train(tmp_path, spec_of(**given))


def test_a_run_cannot_change_its_resolution_when_it_goes_on() -> None:
    plain = spec_of(progressive=()).to_json()
    old = {
        name: value for name, value in plain.items() if name not in ("skips", "progressive", "full_res_conv")
    }
    check_same_run(old, spec_of(progressive=()))
    with pytest.raises(SpecError, match=r"--progressive 26,66 \(it has none\)"):
        check_same_run(old, spec_of())
    with pytest.raises(SpecError, match=r"--full-res-conv \(it has --no-full-res-conv\)"):
        check_same_run(old, spec_of(progressive=(), full_res_conv=True))


def test_networks_of_an_early_phase_cannot_start_another_run(tmp_path: Path) -> None:
    early = train(tmp_path, spec_of()).saved[0]
    state = TrainState.fresh(spec_of(progressive=(), skips=True), choose("cpu"))
    with pytest.raises(SpecError, match="of 32 pixels: --progressive had not reached full size"):
        state.load_model(early.for_generate(), state.arch)


# --- early grids --------------------------------------------------------------------------------


def test_early_grids_come_after_doubling_numbers_of_images_and_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(progressive=(), size=16, save_every=3)
    drawn: list[str] = []

    class Recorder(LocalContext):
        def save_sample(self, name: str, pixels_HW3: Any) -> None:
            drawn.append(name)
            super().save_sample(name, pixels_HW3)

    images = noise_images(40, 16)
    without = LocalContext(tmp_path, data=images)
    jobs.training.train.run(spec, without)
    monkeypatch.setattr("jobs.training.samples.FIRST_GRID", 8)
    ctx = Recorder(tmp_path, data=images)
    jobs.training.train.run(spec, ctx)
    # After 8, 16, 32 and 64 images, of 40 in an epoch; then the grid of the end.
    assert drawn == ["epoch-0001", "epoch-0001", "epoch-0001", "epoch-0002", "epoch-0003"]
    assert sha256_of(ctx.saved[-1].state) == sha256_of(without.saved[-1].state)
    drawn.clear()
    jobs.training.train.run(
        spec_of("dcgan", progressive=(), size=16, save_every=3), Recorder(tmp_path, data=images)
    )
    assert drawn == ["epoch-0003"], "the tutorial draws none"
