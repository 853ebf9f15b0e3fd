"""The recipes: each resumes to the last bit; penalties, pairs and schedules are what the papers say."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from unit.jobs.augmenting import augment
from unit.jobs.local_context import LocalContext, noise_images, sha256_of

import jobs.generation.generate
import jobs.training.train
from jobs import rng
from jobs.errors import SpecError, StopRequested
from jobs.generation.inference import for_inference
from jobs.networks.dcgan import Arch, Architecture
from jobs.recipes import RECIPES
from jobs.specs import GenerateSpec, TrainSpec
from jobs.states import StopReason
from jobs.training.losses import LOSSES, RelativisticLoss, squared_gradient_norms
from jobs.training.schedules import half_cosine, phase_at, schedule_values

IMAGES = noise_images(21, 32)
RESIDUAL = Architecture(size=32, nz=4, ngf=2, ndf=2, arch="resnet", norm_d="none")


def spec_of(recipe: Any, **given: Any) -> Any:
    small = {"size": 32, "nz": 4, "ngf": 2, "ndf": 2, "batch": 4, "epochs": 2, "save_every": 1, "seed": 5}
    return TrainSpec.create(**{"data": "/faces", "recipe": recipe, **small, **given})


def train(folder: Any, spec: Any, **given: Any) -> Any:
    ctx = LocalContext(**{"folder": Path(folder), "data": IMAGES, **given})
    return jobs.training.train.run(spec, ctx), ctx


# --- every recipe -----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns_something_and_resumes_to_the_last_bit(tmp_path: Path, recipe: Any) -> None:
    spec = spec_of(recipe)
    result, straight = train(tmp_path, spec)
    assert result["bit_exact"] is True
    start = Architecture.of_spec(spec).build_generator(rng.derive(5, "init-g")).state_dict()
    moved = [
        key for key, value in start.items() if not torch.equal(value, straight.saved[-1].state[f"g.{key}"])
    ]
    assert len(moved) > len(start) / 2

    stopped = LocalContext(
        Path(tmp_path), IMAGES, stop_at=lambda asked: StopReason.DRAIN if asked == 7 else None
    )
    with suppress(StopRequested):
        jobs.training.train.run(spec, stopped)
    assert stopped.saved[-1].step == 7
    again = train(tmp_path, spec, resume_from=stopped.saved[-1].for_resume())[1]
    assert sha256_of(again.saved[-1].state) == sha256_of(straight.saved[-1].state)
    assert np.array_equal(again.samples["epoch-0002"], straight.samples["epoch-0002"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_images_can_be_drawn_and_chosen_from_a_run_of_every_recipe(tmp_path: Path, recipe: Any) -> None:
    final = train(tmp_path, spec_of(recipe, epochs=1))[1].saved[-1]
    ctx = LocalContext(Path(tmp_path), source=final.for_generate())
    jobs.generation.generate.run(GenerateSpec.create(source=1, keep=3, of=6, micro_batch=4), ctx)
    scores = [image.record["score"] for image in ctx.sink.stored_images]
    assert scores == sorted(scores, reverse=True)
    assert ctx.sink.stored_images[0].pixels_HW3.shape == (32, 32, 3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_of_every_recipe_can_start_from_another_of_its_kind(tmp_path: Path, recipe: Any) -> None:
    final = train(tmp_path, spec_of(recipe, epochs=1))[1].saved[-1]
    ctx = LocalContext(Path(tmp_path), IMAGES, start_weights={"g": final.generator, "d": final.generator})
    training = jobs.training.train.Training(spec_of(recipe, init_netg="g", init_netd="d"), ctx)
    assert all(
        torch.equal(value, final.generator[f"G.{key}"])
        for key, value in training.state.generator.state_dict().items()
    )


# --- starting from another job ----------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_starts_from_both_networks_of_another_and_frozen_layers_stay(
    tmp_path: Path, recipe: Any
) -> None:
    first = train(tmp_path, spec_of(recipe, epochs=1))[1].saved[-1]
    spec = spec_of(recipe, init_from=1, freeze_d=2, freeze_g=1, seed=9)
    ctx = LocalContext(Path(tmp_path), IMAGES, source=first.for_generate())
    training = jobs.training.train.Training(spec, ctx)
    begun = training.state.tensors()
    assert all(
        torch.equal(begun[f"g.{key[2:]}"], one) for key, one in first.generator.items() if key[0] == "G"
    )
    assert all(
        torch.equal(begun[f"d.{key[2:]}"], one) for key, one in first.generator.items() if key[0] == "D"
    )
    if training.state.ema is not None:
        assert all(
            torch.equal(begun[f"ema.{key[2:]}"], begun[f"g.{key[2:]}"])
            for key in first.generator
            if key[0] == "G"
        )
    training.run()
    end = ctx.saved[-1].state
    for net, which, frozen in (
        (training.state.generator.Gene, "g.Gene", 1),
        (training.state.discriminator.Discrim, "d.Discrim", 2),
    ):
        kernels = [
            f"{which}.{place}.{name}"
            for place, layer in enumerate(net)
            for name, one in layer.named_parameters()
            if one.dim() == 4
        ]
        places = list(dict.fromkeys(key.split(".")[2] for key in kernels))
        moved = {
            place: any(
                not torch.equal(end[key], first.generator[key.replace("g.", "G.", 1).replace("d.", "D.", 1)])
                for key in kernels
                if key.split(".")[2] == place
            )
            for place in places
        }
        assert [moved[place] for place in places] == [False] * frozen + [True] * (len(places) - frozen)

    # It resumes like any other, without reading the start again.
    stopped = LocalContext(
        Path(tmp_path),
        IMAGES,
        source=first.for_generate(),
        stop_at=lambda asked: StopReason.DRAIN if asked == 3 else None,
    )
    with suppress(StopRequested):
        jobs.training.train.run(spec, stopped)
    again = train(tmp_path, spec, resume_from=stopped.saved[-1].for_resume())[1]
    assert sha256_of(again.saved[-1].state) == sha256_of(end)


def test_a_start_with_other_networks_or_nothing_left_to_learn_is_refused_by_name(tmp_path: Path) -> None:
    first = train(tmp_path, spec_of("sngan", epochs=1))[1].saved[-1].for_generate()
    ctx = LocalContext(Path(tmp_path), IMAGES, source=first)
    with pytest.raises(SpecError) as caught:
        jobs.training.train.Training(spec_of("r3gan", init_from=1, nz=5), ctx)
    assert "--nz 5 (it has 4)" in caught.value.message
    assert "--norm-d none (it has spectral)" in caught.value.message
    with pytest.raises(SpecError, match="--freeze-d 4 leaves nothing to learn: the network has 4 layers"):
        jobs.training.train.Training(spec_of("sngan", init_from=1, freeze_d=4), ctx)


def test_a_start_without_a_discriminator_fits_any_and_one_with_other_classes_is_refused(
    tmp_path: Path,
) -> None:
    first = train(tmp_path, spec_of("rpgan", epochs=1))[1].saved[-1].for_generate()
    alone = {key: one for key, one in first.tensors.items() if key.startswith("G.")}
    ctx = LocalContext(Path(tmp_path), IMAGES, source=replace(first, tensors=alone))
    begun = jobs.training.train.Training(
        spec_of("sngan", arch="balanced", ndf=3, init_from=1), ctx
    ).state.tensors()
    assert all(torch.equal(begun[f"g.{key[2:]}"], one) for key, one in alone.items())
    with pytest.raises(SpecError, match=r"--arch dcgan \(it has balanced\)$"):
        jobs.training.train.Training(spec_of("sngan", init_from=1), ctx)

    first.meta["arch"]["classes"] = 3
    with pytest.raises(SpecError, match="know 3 classes, and none are requested"):
        jobs.training.train.Training(
            spec_of("rpgan", init_from=1), LocalContext(Path(tmp_path), IMAGES, source=first)
        )


# --- pairs and penalties ----------------------------------------------------------------------


def test_pairs_are_judged_by_the_difference_of_their_logits() -> None:
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0])
    loss = LOSSES["relativistic"]
    assert isinstance(loss, RelativisticLoss)
    assert loss.d(real, fake).item() == pytest.approx((np.log1p(np.exp(-1.0)) + np.log1p(np.exp(4.0))) / 2)
    assert loss.g(real, fake).item() == pytest.approx((np.log1p(np.exp(1.0)) + np.log1p(np.exp(-4.0))) / 2)
    torch.testing.assert_close(loss.d(real + 7, fake + 7), loss.d(real, fake))


def test_gradients_are_those_of_each_image_alone() -> None:
    net = RESIDUAL.build_discriminator(0).double()
    fill(net)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    found = squared_gradient_norms(images, net(images))
    for place in range(3):
        one = images[place : place + 1].detach().requires_grad_(True)
        net(one).sum().backward()
        assert one.grad is not None
        assert found[place].item() == pytest.approx(one.grad.square().sum().item())
    # Against the difference quotient: independent of autograd.
    step = torch.zeros_like(images[:1])
    step[0, 1, 16, 16] = 1e-6
    one = images[:1].detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(net(one).sum(), one)
    quotient = (net(one + step) - net(one - step)) / 2e-6
    assert slope[0, 1, 16, 16].item() == pytest.approx(quotient.item(), rel=1e-4)


def fill(net: Any) -> None:
    """What starts as zero gets values, as after some training."""
    with torch.no_grad():
        for place, parameter in enumerate(net.parameters()):
            if not parameter.any():
                draw = torch.Generator().manual_seed(place)
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)


@pytest.mark.parametrize(
    "arch", [RESIDUAL, *(Architecture(size=32, ndf=2, norm_d=one) for one in ("spectral", "none"))]
)
def test_penalties_reach_every_weight_that_shapes_the_slope(arch: Any) -> None:
    net = arch.build_discriminator(0)
    fill(net)
    images = torch.randn(2, 3, 32, 32).requires_grad_(True)
    seen = augment(images, ("translation", "color", "cutout"), rng.generator(0, "test"))
    squared_gradient_norms(images, net(seen)).mean().backward()  # type: ignore[no-untyped-call]  # torch's
    weights = {name: one for name, one in net.named_parameters() if "bias" not in name}
    assert all(one.grad is not None and bool(one.grad.any()) for one in weights.values())


@pytest.mark.parametrize("lazy", [1, 3])
def test_a_step_of_d_adds_both_penalties_as_the_formula_says(tmp_path: Path, lazy: int) -> None:
    spec = spec_of("r3gan", augment=(), r1_gamma=3.0, r2_gamma=0.5, penalty_every=lazy, gamma_end=1.0)
    training = jobs.training.train.Training(spec, LocalContext(Path(tmp_path), IMAGES))
    net = training.state.discriminator
    fill(net)
    now = schedule_values(spec, 0.0)
    reals, fakes = training.batches.get(0, 0), torch.rand(4, 3, 32, 32) * 2 - 1
    phase = phase_at(spec, 0, training.d_steps, now)
    loss, real_B, fake_B, _ = training._joint_d_loss(phase, reals, fakes, training._draw(phase, 0, 0, now))
    found = torch.autograd.grad(loss, list(net.parameters()))

    real, fake = reals.clone().requires_grad_(True), fakes.clone().requires_grad_(True)
    (slope_real,) = torch.autograd.grad(net(real).sum(), real, create_graph=True)
    (slope_fake,) = torch.autograd.grad(net(fake).sum(), fake, create_graph=True)
    pairs = nn.functional.softplus(net(fake) - net(real)).mean()
    r1 = slope_real.square().sum() / len(reals)
    r2 = slope_fake.square().sum() / len(fakes)
    expected = pairs + lazy * (3.0 / 2 * r1 + 0.5 / 2 * r2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    wanted = torch.autograd.grad(expected, list(net.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-6)
    assert (real_B.shape, fake_B.shape) == ((4,), (4,))

    training.state.step = 1
    phase = phase_at(spec, 1, training.d_steps, now)
    assert phase.penalty == (lazy == 1)
    without, *_ = training._joint_d_loss(phase, reals, fakes, training._draw(phase, 0, 1, now))
    assert without.item() == pytest.approx(expected.item() if lazy == 1 else pairs.item(), rel=1e-4)


def test_lines_of_metrics_hold_the_penalties(tmp_path: Path) -> None:
    _, ctx = train(tmp_path, spec_of("r3gan"))
    lines = [record for record in ctx.records if "metric" not in record]
    assert lines
    assert all(record["r1"] > 0 and record["r2"] > 0 for record in lines)


# --- schedules --------------------------------------------------------------------------------


def test_a_schedule_goes_from_its_first_value_to_its_last_and_stays_where_nothing_is_asked() -> None:
    assert [half_cosine(2.0, 1.0, done) for done in (0, 0.5, 1, 2)] == [2.0, 1.5, 1.0, 1.0]
    assert all(half_cosine(0.3, 0.3, done / 7) == 0.3 for done in range(8))
    falling = [half_cosine(1.0, 0.1, done / 20) for done in range(21)]
    assert falling == sorted(falling, reverse=True)
    spec = spec_of("r3gan", lr_g=1e-3, lr_end=0.5, r1_gamma=2.0, gamma_end=0.25, beta2=0.8, beta2_end=0.9)
    end = schedule_values(spec, 1.0, lr_scale=0.5)
    assert (end.lr_g, end.r1_gamma, end.beta2) == pytest.approx((2.5e-4, 0.5, 0.9))
    for recipe in ("dcgan", "sngan"):
        plain = spec_of(recipe)
        assert schedule_values(plain, 0.0) == schedule_values(plain, 0.37) == schedule_values(plain, 1.0)
        assert schedule_values(plain, 0.5).lr_g == plain.lr_g


def test_the_rates_of_a_run_end_where_the_schedule_says(tmp_path: Path) -> None:
    training = jobs.training.train.Training(
        spec_of("r3gan", lr_d=4e-4, lr_end=0.25), LocalContext(Path(tmp_path), IMAGES)
    )
    seen = []
    step = training.state.opt_d.step

    def noted(*args: Any) -> Any:
        seen.append(
            (training.state.opt_d.param_groups[0]["lr"], training.state.opt_d.param_groups[0]["betas"])
        )
        return step(*args)

    training.state.opt_d.step = noted  # type: ignore[method-assign, assignment]
    training.run()
    rates = [rate for rate, _ in seen]
    assert rates[0] == 4e-4
    assert rates == sorted(rates, reverse=True)
    assert 1e-4 < rates[-1] < 1.2e-4
    assert seen[0][1] == (0.0, 0.9)
    assert 0.98 < seen[-1][1][1] < 0.99


def test_g_is_judged_beside_the_scores_that_d_gave_before_its_step(tmp_path: Path) -> None:
    spec = spec_of("rpgan", size=32, augment=())
    training = jobs.training.train.Training(spec, LocalContext(Path(tmp_path), IMAGES))
    state = training.state
    now = schedule_values(spec, 0.0)
    phase = phase_at(spec, 0, training.d_steps, now)
    x = training._draw(phase, 0, 0, now)
    training._d_gradients(phase, x)
    with torch.no_grad():
        before_B = state.discriminator(training.batches.images_of(x))
        state.opt_d.step()
        real_B, fake_B = (
            state.discriminator(training.batches.images_of(x)),
            state.discriminator(training.fakes_B3HW),
        )
    expected = nn.functional.softplus(before_B - fake_B).mean().item()
    assert abs(expected - nn.functional.softplus(real_B - fake_B).mean().item()) > 1e-4, "D has not moved"
    assert training._g_gradients(phase, x)["loss_g"].item() == pytest.approx(expected, rel=1e-4)


def test_g_alone_on_a_batch_asks_d_about_the_real_images(tmp_path: Path) -> None:
    spec = spec_of("rpgan", size=32, augment=(), d_every=2)
    training = jobs.training.train.Training(spec, LocalContext(Path(tmp_path), IMAGES))
    state = training.state
    now = schedule_values(spec, 0.0)
    phase = phase_at(spec, 1, training.d_steps, now)
    assert (phase.d, phase.g) == (False, True)
    x = training._draw(phase, 0, 1, now)
    with torch.no_grad():
        real_B = state.discriminator(training.batches.images_of(x))
        fake_B = state.discriminator(state.generator(x["latents"]))
    expected = nn.functional.softplus(real_B - fake_B).mean().item()
    assert training._g_gradients(phase, x)["loss_g"].item() == pytest.approx(expected, rel=1e-4)


# --- the residual networks --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["balanced", "resnet"])
@pytest.mark.parametrize("size", [16, 24, 32, 48, 64, 96, 128, 192, 256])
def test_each_pair_makes_every_size(size: int, kind: Arch) -> None:
    arch = Architecture(size=size, nz=5, ngf=2, ndf=2, arch=kind, norm_d="none")
    images = arch.build_generator(0)(torch.randn(3, 5, 1, 1))
    assert images.shape == (3, 3, size, size)
    assert arch.build_discriminator(0)(images).shape == (3,)
    assert Architecture.from_json(arch.to_json()) == arch


def test_the_even_generator_has_fewer_weights_and_starts_without_a_checkerboard() -> None:
    even, plain = (
        Architecture(size=96, ngf=32, ndf=2, arch=kind, norm_d="none").build_generator(0)
        for kind in ("balanced", "dcgan")
    )
    numbers_even, numbers_plain = (sum(one.numel() for one in net.parameters()) for net in (even, plain))
    assert numbers_even < 0.65 * numbers_plain
    images = even.eval()(torch.randn(2, 100, 1, 1))
    squares = images.unfold(2, 3, 3).unfold(3, 3, 3)
    torch.testing.assert_close(squares, squares[..., :1, :1].expand_as(squares))


def test_the_even_generator_is_folded_for_inference() -> None:
    net = Architecture(size=96, nz=5, ngf=4, ndf=2, arch="balanced", norm_d="none").build_generator(3)
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(16, 5, 1, 1))
    net.eval()
    latents = torch.randn(4, 5, 1, 1)
    quick = for_inference(net, torch.device("cpu"))
    assert not [layer for layer in quick.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert all(parameter.requires_grad for parameter in net.parameters()), "the network itself was changed"
    with torch.inference_mode():
        torch.testing.assert_close(quick(latents), net(latents), rtol=1e-4, atol=1e-5)


def test_blocks_begin_as_nothing_and_images_without_a_checkerboard() -> None:
    net = RESIDUAL.build_generator(0)
    blocks = [layer for layer in net.Gene if type(layer).__name__ == "Block"]
    assert len(blocks) == 3
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(blocks[0](x), x)
    images = net(torch.randn(2, 4, 1, 1))
    squares = images.unfold(2, 2, 2).unfold(3, 2, 2)
    assert torch.equal(squares, squares[..., :1, :1].expand_as(squares)), "the last resize starts as a repeat"


def test_the_scale_of_a_fresh_resnet_pair_is_that_of_images_and_logits() -> None:
    arch = Architecture(size=96, ngf=16, ndf=16, arch="resnet", norm_d="none")
    images = arch.build_generator(0)(torch.randn(16, 100, 1, 1))
    logits = arch.build_discriminator(0)(images)
    assert 0.3 < images.std().item() < 3
    assert 0.1 < logits.std().item() < 10


def test_the_resnet_generator_passes_through_inference_unchanged_and_within_its_range() -> None:
    net = RESIDUAL.build_generator(3).eval()
    latents = 5 * torch.randn(4, 4, 1, 1)
    with torch.inference_mode():
        quick = for_inference(net, torch.device("cpu"))(latents)
        torch.testing.assert_close(quick, net(latents))
        assert quick.abs().max() == 1
        assert net.train()(latents).abs().max() > 1, "in training G may leave the range, and D sees it"
