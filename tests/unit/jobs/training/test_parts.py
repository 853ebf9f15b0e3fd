"""Seeds, losses, augmentation, averages, grids and batches, each against its definition."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits
from unit.jobs.augmenting import augment
from unit.jobs.local_context import noise_images

from jobs import device, grids, rng
from jobs.errors import DatasetError, GpuUnavailableError, OutOfMemoryError, TrainingDivergedError
from jobs.networks.dcgan import Architecture
from jobs.training.augment import shift
from jobs.training.data import Batches
from jobs.training.dcgan_steps import CachedFakes
from jobs.training.ema import Ema, ema_decay
from jobs.training.logger import RunningMeans
from jobs.training.losses import LOSSES, Loss

CPU = torch.device("cpu")

# --- seeds ------------------------------------------------------------------------------------


def test_derived_seeds_are_fixed_forever_and_differ_by_every_argument() -> None:
    assert rng.derive(0, "noise", 1) == 0x408F_F873_AD5C_892F
    values = {
        rng.derive(0, "a"),
        rng.derive(1, "a"),
        rng.derive(0, "b"),
        rng.derive(0, "a", 0),
        rng.derive(0, "a", 1),
        rng.derive(0, "a", 1, 1),
    }
    assert len(values) == 6
    assert max(rng.derive(0, "x", i) for i in range(64)) > 2**62


def test_a_latent_depends_on_its_seed_and_number_alone() -> None:
    many = rng.latents(3, range(500), 10)
    assert torch.equal(rng.latents(3, [499, 7], 10), many[[499, 7]])
    assert not torch.equal(rng.latents(4, [7], 10), many[[7]])
    assert rng.latents(3, [2**40], 10).isfinite().all()


def test_latents_whose_numbers_share_their_low_32_bits_differ() -> None:
    a, b = rng.latents(0, [5, 5 + 2**32], 8)
    assert not torch.equal(a, b)


def test_latents_are_normal_and_scaled() -> None:
    sample = rng.latents(1, range(2000), 100)
    assert sample.mean().abs() < 0.01
    assert (sample.std() - 1).abs() < 0.01
    assert abs(np.corrcoef(sample[:-1, 0], sample[1:, 0])[0, 1]) < 0.1
    moved = rng.latents(1, range(2000), 100, mean=3, std=0.5)
    torch.testing.assert_close(moved, sample * 0.5 + 3)


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own() -> None:
    first, second = rng.permutation(0, 0, 50), rng.permutation(0, 1, 50)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert first.tolist() != second.tolist()
    assert torch.equal(first, rng.permutation(0, 0, 50))


# --- losses -----------------------------------------------------------------------------------


def loss_of(name: str) -> Loss:
    loss = LOSSES[name]
    assert isinstance(loss, Loss)
    return loss


def test_bce_is_pytorchs_with_its_gradient() -> None:
    probabilities = torch.tensor([0.0, 1e-9, 0.3, 1.0], requires_grad=True)
    loss = loss_of("bce")
    for ours, target in ((loss.d_real, 1.0), (loss.d_fake, 0.0), (loss.g, 1.0)):
        theirs = binary_cross_entropy(probabilities, torch.full((4,), target))
        assert torch.equal(ours(probabilities), theirs)
        (a,) = torch.autograd.grad(ours(probabilities), probabilities)
        (b,) = torch.autograd.grad(theirs, probabilities)
        assert torch.equal(a, b)


def test_nonsaturating_is_bce_on_logits() -> None:
    logits = torch.tensor([-30.0, -1.0, 0.0, 2.0])
    ones, zeros = torch.ones(4), torch.zeros(4)
    loss = loss_of("nonsaturating")
    torch.testing.assert_close(loss.d_real(logits), binary_cross_entropy_with_logits(logits, ones))
    torch.testing.assert_close(loss.d_fake(logits), binary_cross_entropy_with_logits(logits, zeros))
    torch.testing.assert_close(loss.g(logits), binary_cross_entropy_with_logits(logits, ones))


def test_hinge_has_its_margins() -> None:
    loss = loss_of("hinge")
    assert loss.d_real(torch.tensor([2.0, 0.0])) == 0.5
    assert loss.d_fake(torch.tensor([-2.0, 0.0])) == 0.5
    assert loss.g(torch.tensor([2.0, 4.0])) == -3.0


def test_a_nan_score_does_not_abort_the_process() -> None:
    assert loss_of("bce").d_real(torch.tensor([math.nan])).isfinite()


# --- augmentation -----------------------------------------------------------------------------


def test_a_shift_moves_pixels_and_brings_in_zeros() -> None:
    image = torch.arange(1.0, 10).view(1, 1, 3, 3)
    moved = shift(image, torch.tensor([[1], [-1]]))
    assert moved[0, 0].tolist() == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]


def test_augmentation_is_differentiable_twice() -> None:
    batch = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)

    def augmented(x: Any) -> Any:
        return augment(x, ("color", "translation", "cutout"), rng.generator(0, "test"))

    assert torch.autograd.gradcheck(augmented, (batch,))
    assert torch.autograd.gradgradcheck(lambda x: augmented(x).square(), (batch,))


def test_colour_is_brightness_saturation_and_contrast_in_turn() -> None:
    x = torch.rand(4, 3, 6, 6) * 2 - 1
    b, s, c = torch.rand((3, 4, 1, 1, 1), generator=rng.generator(5, "test"))
    y = x + (b - 0.5)
    y = (y - y.mean(1, keepdim=True)) * (s * 2) + y.mean(1, keepdim=True)
    y = (y - y.mean((1, 2, 3), keepdim=True)) * (c + 0.5) + y.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(augment(x, ("color",), rng.generator(5, "test")), y)


def test_augmentation_ignores_the_global_generator_and_its_own_order_of_names() -> None:
    x = torch.rand(4, 3, 16, 16)
    torch.manual_seed(1)
    a = augment(x, ("translation", "color", "cutout"), rng.generator(0, "test"))
    torch.manual_seed(2)
    b = augment(x, ("cutout", "color", "translation"), rng.generator(0, "test"))
    assert torch.equal(a, b)
    assert torch.equal(augment(x, (), rng.generator(0, "test")), x)


def test_a_cut_hole_has_half_the_side_and_translation_reaches_an_eighth() -> None:
    ones = torch.ones(200, 3, 16, 16)
    holes = (augment(ones, ("cutout",), rng.generator(0, "test"))[:, 0] == 0).sum((1, 2))
    assert holes.max() == 64
    moved = augment(ones, ("translation",), rng.generator(0, "test"))[:, 0]
    assert (moved.sum((1, 2))).min() == 14 * 14


# --- the average ------------------------------------------------------------------------------


def test_the_average_keeps_half_after_one_half_life() -> None:
    assert ema_decay(1000, images_seen=10**9, half_life=1000) == pytest.approx(0.5)
    assert ema_decay(64, images_seen=64, half_life=1e6) == pytest.approx(0.5**20), (
        "ramp-up: 5 % of what was seen"
    )


def test_the_average_moves_weights_and_statistics_and_stays_in_eval_mode() -> None:
    arch = Architecture(size=16, nz=4, ngf=2, ndf=2)
    net = arch.build_generator(0)
    average = Ema(net, half_life=100)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad():
        net(torch.randn(8, 4, 1, 1))
        net.get_parameter("Gene.0.weight").add_(1)
    average.update(images=100, images_seen=10**9)
    for key, old in before.items():
        new, mine = net.state_dict()[key], average.net.state_dict()[key]
        torch.testing.assert_close(mine, (old + new) / 2 if old.is_floating_point() else new)
    assert not average.net.training
    assert not any(parameter.requires_grad for parameter in average.net.parameters())


# --- grids ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 8, 9, 64])
def test_grids_are_torchvisions_to_the_last_bit(count: int) -> None:
    make_grid = pytest.importorskip("torchvision.utils").make_grid
    batch = torch.rand(count, 3, 12, 12, generator=rng.generator(0, "test")) * 2.6 - 1.3

    def saved(**options: Any) -> Any:
        grid = make_grid(batch.clone(), nrow=8, padding=2, normalize=True, **options)
        return grid.mul(255).add_(0.5).clamp_(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()

    assert np.array_equal(grids.tile(grids.stretched(batch)), saved())
    assert np.array_equal(grids.tile(grids.to_uint8(batch)), saved(value_range=(-1, 1)))


# --- batches ----------------------------------------------------------------------------------


def test_batches_are_torchvisions_floats_in_the_order_of_the_epoch() -> None:
    transforms = pytest.importorskip("torchvision.transforms.functional")
    images = noise_images(11, 16)
    batches = Batches(images, batch=4, seed=9, mirror=False, device=CPU)
    assert batches.per_epoch == 2, "the last incomplete batch is dropped"
    order = rng.permutation(9, 3, 11)
    for place in (1, 0):
        expected = [
            transforms.normalize(transforms.to_tensor(images.images_N3HW[i].transpose(1, 2, 0)), [0.5], [0.5])
            for i in order[place * 4 : place * 4 + 4]
        ]
        assert torch.equal(batches.get(3, place), torch.stack(expected))


def test_mirrored_batches_flip_some_images_and_the_same_ones_each_time() -> None:
    images = noise_images(64, 16)
    plain = Batches(images, batch=64, seed=0, mirror=False, device=CPU).get(0, 0)
    mirrored = Batches(images, batch=64, seed=0, mirror=True, device=CPU).get(0, 0)
    same = (mirrored == plain).flatten(1).all(1)
    flipped = (mirrored == plain.flip(3)).flatten(1).all(1)
    assert (same | flipped).all()
    assert 16 < int(same.sum()) < 48
    again = Batches(images, batch=64, seed=0, mirror=True, device=CPU)
    assert torch.equal(mirrored, again.get(0, 0))
    plain_next = Batches(images, batch=64, seed=0, mirror=False, device=CPU).get(1, 0)
    same_next = (again.get(1, 0) == plain_next).flatten(1).all(1)
    assert not torch.equal(same, same_next), "each epoch draws anew"


def test_fewer_images_than_a_batch_are_refused_with_a_hint() -> None:
    with pytest.raises(DatasetError) as caught:
        Batches(noise_images(5, 16), batch=8, seed=0, mirror=False, device=CPU)
    assert caught.value.code == "BAD_DATASET"
    assert "--batch 5" in (caught.value.hint or "")


# --- the rest ---------------------------------------------------------------------------------


def test_kept_fakes_and_replayed_statistics_are_those_of_passes_made_again() -> None:
    arch = Architecture(size=16, nz=4, ngf=3, ndf=2)
    latents = torch.randn(8, 4, 1, 1)
    ours, theirs = arch.build_generator(0), arch.build_generator(0)
    kept = CachedFakes(ours)
    for _ in range(4):
        assert torch.equal(kept.get(0, lambda: latents), theirs(latents).detach())
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-6, atol=1e-7)


def test_running_means_are_reset_and_raise_on_nan() -> None:
    means = RunningMeans()
    means.add({"loss_d": torch.tensor(1.0), "loss_g": torch.tensor(5.0)})
    means.add({"loss_d": torch.tensor(2.0)})
    assert means.read(2) == {"loss_d": 1.5, "loss_g": 5.0}
    assert means.read(2) == {}
    means.add({"loss_d": torch.tensor(math.nan)})
    with pytest.raises(TrainingDivergedError, match="step 3: loss_d is nan"):
        means.read(3)


def test_a_meter_keeps_what_it_was_given_though_the_next_step_writes_over_it() -> None:
    means, loss = RunningMeans(), torch.tensor(1.0)
    means.add({"loss_d": loss})
    loss.fill_(3.0)
    means.add({"loss_d": loss})
    loss.fill_(100.0)
    assert means.read(2) == {"loss_d": 2.0}


def test_running_out_of_memory_says_what_to_make_smaller() -> None:
    with pytest.raises(OutOfMemoryError) as caught, device.memory_errors("a smaller --batch"):
        torch.empty(2**60, dtype=torch.uint8)
    assert caught.value.hint == "a smaller --batch"
    with pytest.raises(OutOfMemoryError), device.memory_errors(""):
        raise torch.OutOfMemoryError
    with pytest.raises(RuntimeError, match="other"), device.memory_errors(""):
        raise RuntimeError("other")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused_and_auto_takes_the_cpu() -> None:
    assert device.choose("auto") == CPU
    with pytest.raises(GpuUnavailableError):
        device.choose("cuda")
