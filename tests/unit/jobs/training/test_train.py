"""Training: the tutorial's loop, resume to the last bit, and what stops a run."""

import copy
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from unit.jobs.local_context import LocalContext, noise_images, sha256_of

import jobs.training.train
from jobs import rng
from jobs.errors import DatasetError, SpecError, StopRequested, TrainingDivergedError
from jobs.networks.dcgan import Architecture
from jobs.specs import TrainSpec
from jobs.states import StopReason
from jobs.training.logger import TrainingLogger

IMAGES = noise_images(21, 16)


def spec_of(recipe: Any = "dcgan", **given: Any) -> Any:
    small = {"size": 16, "nz": 4, "ngf": 3, "ndf": 3, "batch": 4, "epochs": 3, "save_every": 2, "seed": 5}
    return TrainSpec.create(**{"data": "/faces", "recipe": recipe, **small, **given})


def context(folder: Any, **given: Any) -> Any:
    return LocalContext(**{"folder": Path(folder), "data": IMAGES, **given})


def train(folder: Any, spec: Any, **given: Any) -> Any:
    ctx = context(folder, **given)
    return jobs.training.train.run(spec, ctx), ctx


# --- the tutorial -----------------------------------------------------------------------------


def the_tutorials_loop(spec: Any, images: Any) -> Any:
    """RECIPES §1 written down plainly: default layout, default Adam, each pass made anew."""
    arch = Architecture.of_spec(spec)
    netg = arch.build_generator(rng.derive(spec.seed, "init-g"))
    netd = arch.build_discriminator(rng.derive(spec.seed, "init-d"))
    betas = (spec.beta1, 0.999)
    opt_g = torch.optim.Adam(netg.parameters(), spec.lr_g, betas=betas)
    opt_d = torch.optim.Adam(netd.parameters(), spec.lr_d, betas=betas)
    bce, ones, zeros = nn.BCELoss(), torch.ones(spec.batch), torch.zeros(spec.batch)
    shape = (spec.batch, spec.nz, 1, 1)
    fixed = rng.noise(spec.seed, "fixed", shape=shape)
    draws = 0
    noises = rng.noise(spec.seed, "noise", draws, shape=shape)
    saved, shown = {}, {}
    for epoch in range(spec.epochs):
        order = rng.permutation(spec.seed, epoch, len(images))
        for place in range(len(images) // spec.batch):
            chosen = order[place * spec.batch : (place + 1) * spec.batch]
            real = torch.from_numpy(images.images_N3HW[chosen.numpy()]).float() / 255 * 2 - 1
            if place % spec.d_every == 0:
                opt_d.zero_grad()
                bce(netd(real), ones).backward()
                bce(netd(netg(noises).detach()), zeros).backward()
                opt_d.step()
            if place % spec.g_every == 0:
                opt_g.zero_grad()
                draws += 1
                noises = rng.noise(spec.seed, "noise", draws, shape=shape)
                bce(netd(netg(noises)), ones).backward()
                opt_g.step()
        if (epoch + 1) % spec.save_every == 0:
            with torch.no_grad():
                shown[epoch + 1] = netg(fixed)[:64]
            saved[epoch + 1] = {
                **{f"g.{k}": v.clone() for k, v in netg.state_dict().items()},
                **{f"d.{k}": v.clone() for k, v in netd.state_dict().items()},
            }
    return saved, shown


@pytest.mark.parametrize(("d_every", "g_every"), [(1, 5), (1, 1), (1, 2), (2, 3), (2, 2)])
def test_the_origin_is_the_tutorials_loop(tmp_path: Path, d_every: int, g_every: int) -> None:
    spec = spec_of(d_every=d_every, g_every=g_every, epochs=4)
    saved, shown = the_tutorials_loop(spec, IMAGES)
    _, ctx = train(tmp_path, spec)
    ours = {item.epoch: item for item in ctx.saved}
    assert set(ours) == {2, 4}
    for epoch, expected in saved.items():
        for key, value in expected.items():
            # Layout (channels last) and Adam (fused) differ in the last bits: 20 steps of 2e-4 move
            # a weight by up to 4e-3; a missed or doubled step would show as 2e-4.
            torch.testing.assert_close(ours[epoch].state[key], value, rtol=2e-4, atol=4e-5, msg=key)
        grid = ctx.samples[f"epoch-{epoch:04d}"]
        span = shown[epoch].max() - shown[epoch].min()
        first = ((shown[epoch][0] - shown[epoch].min()) / span * 255 + 0.5).to(torch.uint8).permute(1, 2, 0)
        assert np.abs(grid[2:18, 2:18].astype(int) - first.numpy()).max() <= 1


def test_plus_has_fresh_noise_and_shows_the_average(tmp_path: Path) -> None:
    _, ctx = train(tmp_path, spec_of("sngan", ema_half_life_kimg=0.01))
    final = ctx.saved[-1]
    assert final.kind == "final"
    average = {k.removeprefix("ema."): v for k, v in final.state.items() if k.startswith("ema.")}
    assert sha256_of({f"G.{k}": v for k, v in average.items()}) == sha256_of(
        {k: v for k, v in final.generator.items() if k.startswith("G.")}
    )
    assert not torch.equal(average["Gene.0.weight"], final.state["g.Gene.0.weight"])
    net = Architecture.from_json(final.meta["arch"]).build_generator()
    net.load_state_dict(average)
    fixed = rng.noise(5, "fixed", shape=(4, 4, 1, 1))
    with torch.no_grad():
        first = ((net.eval()(fixed)[0] + 1) / 2 * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.abs(ctx.samples["epoch-0003"][2:18, 2:18].astype(int) - first).max() <= 1


# --- what is kept and told --------------------------------------------------------------------


def test_checkpoints_grids_metrics_and_progress_come_when_they_should(tmp_path: Path) -> None:
    result, ctx = train(tmp_path, spec_of(epochs=5))
    assert [(item.kind, item.epoch, item.step) for item in ctx.saved] == [
        ("epoch", 2, 10),
        ("epoch", 4, 20),
        ("final", 5, 25),
    ]
    assert list(ctx.samples) == ["epoch-0002", "epoch-0004", "epoch-0005"]
    *steps, measured = ctx.records
    assert [record["step"] for record in steps] == [5, 10, 15, 20, 25]
    assert all(record["loss_d"] > 0 and 0 < record["d_real"] < 1 for record in steps)
    assert (measured["step"], "metric" in measured) == (25, True), "it is evaluated at its end"
    assert ctx.reports[-1]["done"] == ctx.reports[-1]["total"] == 100
    assert ctx.reports[-1]["epoch"] == ctx.reports[-1]["epochs"] == 5
    assert result["images"] == 100
    assert result["bit_exact"] is True
    assert result["g_steps"] == 5
    meta = ctx.saved[-1].meta
    assert meta["fingerprint"] == IMAGES.fingerprint
    assert meta["arch"]["size"] == 16
    assert TrainSpec.from_json(meta["spec"]) == spec_of(epochs=5)
    assert set(ctx.saved[-1].generator) == {
        f"G.{k}" for k in Architecture(size=16, ngf=3).build_generator().state_dict()
    } | {f"D.{k}" for k in Architecture(size=16, ndf=3).build_discriminator().state_dict()}


def test_lines_that_wait_for_a_gpu_are_the_same_and_all_are_there_when_something_is_kept(
    tmp_path: Path,
) -> None:
    told = []
    for late in (0, 1):
        ctx = context(tmp_path)
        training = jobs.training.train.Training(spec_of(epochs=5), ctx)
        training.logger.delay = late
        training.run()
        told.append([{**record, "images_per_s": 0} for record in ctx.records])
    assert told[0] == told[1]
    assert [record["step"] for record in told[1]] == [5, 10, 15, 20, 25, 25]


def test_a_line_waits_until_the_next_is_due(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    logger = TrainingLogger(spec_of(epochs=5), ctx, 5, delay=1)
    for step, loss in ((5, 1.0), (10, 2.0)):
        logger.means.add({"loss_d": torch.tensor(loss)})
        logger.step(step)
    assert [record["loss_d"] for record in ctx.records] == [1.0]
    logger.flush(10)
    assert [record["loss_d"] for record in ctx.records] == [1.0, 2.0]


def test_a_grid_that_the_tutorial_would_not_make_moves_no_statistics(tmp_path: Path) -> None:
    with_grid = train(tmp_path, spec_of(epochs=3, save_every=2))[1].saved[-1]
    continued = train(tmp_path, spec_of(epochs=4, save_every=2), resume_from=with_grid.for_resume())[1]
    straight = train(tmp_path, spec_of(epochs=4, save_every=2))[1]
    assert sha256_of(continued.saved[-1].state) == sha256_of(straight.saved[-1].state)


def test_resume_checkpoints_come_by_the_clock(tmp_path: Path) -> None:
    _, ctx = train(tmp_path, spec_of(checkpoint_seconds=1e-9, epochs=1))
    assert [(item.kind, item.step) for item in ctx.saved] == [
        *(("resume", step) for step in range(1, 5)),
        ("final", 5),
    ]


# --- resume -----------------------------------------------------------------------------------

CHOICES = st.fixed_dictionaries(
    {
        "recipe": st.sampled_from(["dcgan", "sngan", "rpgan"]),
        "g_every": st.integers(1, 6),
        "d_every": st.integers(1, 3),
        "save_every": st.integers(1, 3),
        "ema_half_life_kimg": st.sampled_from([0.0, 0.02]),
        "augment": st.sampled_from([(), ("color",), ("translation", "cutout")]),
        "mirror": st.booleans(),
        "fake_reuse": st.sampled_from(["until-g-step", "none"]),
        "size": st.sampled_from([16, 24]),
    }
)


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(options=CHOICES, kills=st.lists(st.integers(0, 14), min_size=1, max_size=3), drained=st.booleans())
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(
    options: Any, kills: Any, drained: Any
) -> None:
    images = noise_images(21, options["size"])
    spec = spec_of(**options)
    with tempfile.TemporaryDirectory() as folder:
        straight = train(folder, spec, data=images)[1]
        snapshot = None
        samples: dict[str, Any] = {}
        for kill in kills:
            reason = StopReason.DRAIN if drained else StopReason.CANCEL
            ctx = context(
                folder,
                data=images,
                resume_from=snapshot,
                stop_at=lambda asked, at=kill, why=reason: why if asked >= at else None,
            )
            with suppress(StopRequested):  # a late kill may come after the end
                jobs.training.train.run(spec, ctx)
            snapshot = ctx.saved[-1].for_resume() if ctx.saved else snapshot
            samples |= ctx.samples
        result, ctx = train(folder, spec, data=images, resume_from=snapshot)
        samples |= ctx.samples
    assert result["bit_exact"] is True
    assert sha256_of(ctx.saved[-1].state) == sha256_of(straight.saved[-1].state)
    assert sha256_of(ctx.saved[-1].generator) == sha256_of(straight.saved[-1].generator)
    assert samples.keys() == straight.samples.keys()
    assert all(np.array_equal(samples[name], straight.samples[name]) for name in samples)


def test_more_epochs_continue_from_a_finished_run(tmp_path: Path) -> None:
    short = train(tmp_path, spec_of("sngan", epochs=2))[1]
    longer = train(tmp_path, spec_of("sngan", epochs=4), resume_from=short.saved[-1].for_resume())
    straight = train(tmp_path, spec_of("sngan", epochs=4))[1]
    assert longer[0]["resumed_from"] == 10
    assert sha256_of(longer[1].saved[-1].state) == sha256_of(straight.saved[-1].state)
    with pytest.raises(SpecError, match="has completed 4 epochs"):
        train(tmp_path, spec_of("sngan", epochs=3), resume_from=straight.saved[-1].for_resume())


def test_a_run_that_was_killed_after_its_last_checkpoint_ends_with_the_same_bits(tmp_path: Path) -> None:
    straight = train(tmp_path, spec_of(epochs=2))[1]
    again = train(tmp_path, spec_of(epochs=2), resume_from=straight.saved[-1].for_resume())[1]
    assert sha256_of(again.saved[-1].generator) == sha256_of(straight.saved[-1].generator)
    assert np.array_equal(again.samples["epoch-0002"], straight.samples["epoch-0002"])


def test_other_options_are_refused_by_name_and_harmless_ones_are_not(tmp_path: Path) -> None:
    snapshot = train(tmp_path, spec_of(epochs=2))[1].saved[-1].for_resume()
    with pytest.raises(SpecError) as caught:
        train(tmp_path, spec_of(batch=8, lr_g=1e-3, epochs=3), resume_from=snapshot)
    assert "--batch 8 (it has 4)" in caught.value.message
    assert "--lr-g 0.001 (it has 0.0002)" in caught.value.message
    assert "epochs" not in caught.value.message
    train(tmp_path, spec_of(epochs=2, data="/moved", checkpoint_seconds=9, keep_last=3), resume_from=snapshot)


def test_changed_images_are_refused_on_resume(tmp_path: Path) -> None:
    snapshot = train(tmp_path, spec_of(epochs=1))[1].saved[-1].for_resume()
    with pytest.raises(DatasetError, match="not those that this run began with"):
        train(tmp_path, spec_of(epochs=2), resume_from=snapshot, data=noise_images(21, 16, seed=1))


def test_another_build_continues_and_is_marked_from_then_on(tmp_path: Path) -> None:
    snapshot = train(tmp_path, spec_of(epochs=1))[1].saved[-1].for_resume()
    snapshot.meta["build"] = {**snapshot.meta["build"], "torch": "1.0"}
    result, ctx = train(tmp_path, spec_of(epochs=2), resume_from=snapshot)
    assert result["bit_exact"] is False
    assert any("another build" in line for line in ctx.lines)
    result, _ = train(tmp_path, spec_of(epochs=3), resume_from=ctx.saved[-1].for_resume())
    assert result["bit_exact"] is False, "the mark stays, though the build is the same again"


# --- what stops a run -------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [StopReason.CANCEL, StopReason.LOST])
def test_a_cancelled_or_lost_run_stops_at_once_and_saves_nothing(tmp_path: Path, reason: Any) -> None:
    ctx = context(tmp_path, stop_at=lambda asked: reason if asked == 3 else None)
    with pytest.raises(StopRequested) as caught:
        jobs.training.train.run(spec_of(), ctx)
    assert caught.value.reason == reason
    assert ctx.saved == []


@pytest.mark.parametrize("reason", [StopReason.DRAIN, StopReason.PREEMPT])
def test_a_drained_or_preempted_run_saves_at_its_current_step(tmp_path: Path, reason: Any) -> None:
    ctx = context(tmp_path, stop_at=lambda asked: reason if asked == 3 else None)
    with pytest.raises(StopRequested):
        jobs.training.train.run(spec_of(), ctx)
    assert [(item.kind, item.step, item.epoch) for item in ctx.saved] == [("resume", 3, 0)]
    # Stopped again before its first step, it has nothing new to keep.
    again = context(tmp_path, resume_from=ctx.saved[0].for_resume(), stop_at=lambda asked: reason)
    with pytest.raises(StopRequested):
        jobs.training.train.run(spec_of(), again)
    assert again.saved == []


@pytest.mark.parametrize("recipe", ["dcgan", "sngan", "rpgan"])
def test_nan_stops_the_run_and_no_nan_is_ever_saved(tmp_path: Path, recipe: str) -> None:
    start = Architecture.of_spec(spec_of(recipe)).build_generator(0).state_dict()
    start["Gene.0.weight"][0, 0, 0, 0] = float("nan")
    ctx = context(tmp_path, start_weights={"bad.pth": start})
    with pytest.raises(TrainingDivergedError) as caught:
        jobs.training.train.run(spec_of(recipe, init_netg="bad.pth", checkpoint_seconds=1e-9), ctx)
    assert "diverged at step 1" in caught.value.message
    assert caught.value.hint
    assert ctx.saved == []
    assert ctx.samples == {}


@pytest.mark.parametrize("seconds", [300, 1e-9], ids=["at the end", "by the clock"])
def test_infinite_weights_with_finite_losses_are_neither_saved_nor_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    step = torch.optim.Adam.step

    def step_and_break(self: torch.optim.Adam, *args: Any) -> None:
        step(self, *args)
        # A running statistic is in no loss: only the look at the weights finds it.
        training.state.generator.get_buffer("Gene.1.running_var")[0] = float("inf")

    ctx = context(tmp_path)
    training = jobs.training.train.Training(spec_of(epochs=1, checkpoint_seconds=seconds), ctx)
    monkeypatch.setattr(torch.optim.Adam, "step", step_and_break)
    with pytest.raises(TrainingDivergedError, match="not finite"):
        training.run()
    assert ctx.saved == []
    assert ctx.samples == {}


def test_fewer_images_than_a_batch_stop_the_run_before_it_begins(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    with pytest.raises(DatasetError, match="21 images do not fill one batch of 64"):
        jobs.training.train.run(spec_of(batch=64), ctx)
    assert ctx.records == []


# --- starting weights -------------------------------------------------------------------------


def test_starting_weights_are_taken_over_with_or_without_a_prefix(tmp_path: Path) -> None:
    arch = Architecture(size=16, nz=4, ngf=3, ndf=3)
    netg, netd = arch.build_generator(77).state_dict(), arch.build_discriminator(78).state_dict()
    ganq_file = {f"G.{k}": v for k, v in netg.items()} | {f"D.{k}": v for k, v in netd.items()}
    spec = spec_of(init_netg="g", init_netd="d", epochs=1, ema_half_life_kimg=1)
    states = []
    for weights in ({"g": netg, "d": netd}, {"g": ganq_file, "d": ganq_file}):
        training = jobs.training.train.Training(spec, context(tmp_path, start_weights=copy.deepcopy(weights)))
        state = training.state.tensors()
        assert torch.equal(state["g.Gene.0.weight"], netg["Gene.0.weight"])
        assert torch.equal(state["ema.Gene.0.weight"], netg["Gene.0.weight"])
        assert torch.equal(state["d.Discrim.0.weight"], netd["Discrim.0.weight"])
        states.append(sha256_of(state))
    assert states[0] == states[1]


def test_starting_weights_without_the_low_pass_filter_fit_a_generator_with_it(tmp_path: Path) -> None:
    plain = Architecture(size=16, nz=4, ngf=3, ndf=3).build_generator(77).state_dict()
    ctx = context(tmp_path, start_weights={"g": dict(plain)})
    state = jobs.training.train.Training(spec_of(init_netg="g", antialias=True), ctx).state
    assert all(torch.equal(state.generator.state_dict()[key], value) for key, value in plain.items())
    with pytest.raises(SpecError, match="--init-netg: the weights do not fit"):
        jobs.training.train.Training(
            spec_of(init_netg="g"), context(tmp_path, start_weights={"g": state.generator.state_dict()})
        )


def test_starting_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    other = Architecture(size=16, nz=4, ngf=5).build_generator(0).state_dict()
    with pytest.raises(SpecError, match="--init-netg: the weights do not fit"):
        jobs.training.train.run(spec_of(init_netg="g"), context(tmp_path, start_weights={"g": other}))


def test_starting_weights_that_are_no_generator_are_named_by_what_they_are(tmp_path: Path) -> None:
    discriminator = Architecture(size=16, nz=4, ngf=3).build_discriminator(0).state_dict()
    with pytest.raises(SpecError, match="--init-netg: the file holds a discriminator instead of a generator"):
        jobs.training.train.run(spec_of(init_netg="g"), context(tmp_path, start_weights={"g": discriminator}))
    stylegan = {"mapping.fc0.weight": torch.zeros(3, 3), "synthesis.b4.const": torch.zeros(3)}
    with pytest.raises(SpecError, match="do not fit the network: they are of StyleGAN"):
        jobs.training.train.run(spec_of(init_netg="g"), context(tmp_path, start_weights={"g": stylegan}))
