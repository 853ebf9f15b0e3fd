"""The networks are the tutorial's, at every size."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.errors import SpecError
from jobs.networks.dcgan import Arch, Architecture, NormD
from jobs.networks.heads import LowPass
from jobs.networks.layout import layers
from jobs.training.state import freeze


def weight_of(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


SIZES = [16, 24, 32, 48, 64, 96, 128, 192]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("norm_d", ["batch", "spectral", "none"])
def test_each_size_makes_images_and_one_score_each(size: Any, norm_d: NormD) -> None:
    arch = Architecture(size=size, nz=5, ngf=2, ndf=2, norm_d=norm_d)
    generated = arch.build_generator(0)(torch.randn(3, 5, 1, 1))
    assert generated.shape == (3, 3, size, size)
    assert arch.build_discriminator(0)(generated).shape == (3,)


def test_the_generator_has_the_tutorials_layers_keys_and_size() -> None:
    net = Architecture(size=96).build_generator(0)
    assert sum(parameter.numel() for parameter in net.parameters()) == 3_578_432
    convs = {n: m for n, m in net.named_modules() if isinstance(m, nn.ConvTranspose2d)}
    assert [(n, m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0]) for n, m in convs.items()] == [
        ("Gene.0", 512, 4, 1, 0),
        ("Gene.3", 256, 4, 2, 1),
        ("Gene.6", 128, 4, 2, 1),
        ("Gene.9", 64, 4, 2, 1),
        ("Gene.12", 3, 5, 3, 1),
    ]
    assert [conv.bias for conv in convs.values()] == [None] * 5
    assert isinstance(net.Gene[-1], nn.Tanh)


def test_the_discriminator_has_the_tutorials_layers_and_keys() -> None:
    net = Architecture(size=96).build_discriminator(0)
    kinds = [type(layer).__name__ for layer in net.Discrim]
    hidden = ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert kinds == ["Conv2d", "LeakyReLU", *hidden, *hidden, *hidden, "Conv2d", "Sigmoid"]
    convs = [layer for layer in net.Discrim if isinstance(layer, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0]) for c in convs] == [
        (64, 5, 3, 1),
        (128, 4, 2, 1),
        (256, 4, 2, 1),
        (512, 4, 2, 1),
        (1, 4, 1, 0),
    ]
    biases = [key for key in net.state_dict() if key.endswith("bias")]
    assert [key for key in biases if int(key.split(".")[1]) in (0, 2, 5, 8, 11)] == ["Discrim.11.bias"]
    assert [layer.negative_slope for layer in net.Discrim if isinstance(layer, nn.LeakyReLU)] == [0.2] * 4


def test_a_spectral_discriminator_has_unit_norms_logits_and_the_same_indices() -> None:
    net = Architecture(size=24, ndf=4, norm_d="spectral").build_discriminator(0)
    assert not any(isinstance(layer, nn.BatchNorm2d | nn.Sigmoid) for layer in net.Discrim)
    plain = Architecture(size=24, ndf=4).build_discriminator(0)
    at = [i for i, layer in enumerate(net.Discrim) if isinstance(layer, nn.Conv2d)]
    assert at == [i for i, layer in enumerate(plain.Discrim) if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        for _ in range(50):
            net(torch.randn(2, 3, 24, 24))
    for i in at:
        largest = torch.linalg.matrix_norm(weight_of(net.Discrim[i]).detach().flatten(1), 2)
        assert largest.item() == pytest.approx(1.0, abs=0.02)


def test_initial_weights_follow_from_the_seed_and_leave_the_global_generator_alone() -> None:
    arch = Architecture(size=16, ngf=2, ndf=2)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    a, b, c = arch.build_generator(1), arch.build_generator(1), arch.build_generator(2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weight_of(a.Gene[0]), weight_of(b.Gene[0]))
    assert not torch.equal(weight_of(a.Gene[0]), weight_of(c.Gene[0]))


def test_an_architecture_survives_json_and_refuses_what_it_does_not_know() -> None:
    arch = Architecture(size=48, nz=7, ngf=3, ndf=5, norm_d="spectral")
    assert Architecture.from_json(arch.to_json()) == arch
    with pytest.raises(SpecError):
        Architecture.from_json({**arch.to_json(), "attention": True})
    # What ganq 0.1 wrote, and what it can read.
    assert "arch" not in arch.to_json()
    assert "classes" not in arch.to_json()
    with pytest.raises(SpecError):
        Architecture(size=50)
    with pytest.raises(SpecError):
        Architecture(size=48, arch="resnet", norm_d="batch")


@pytest.mark.parametrize("kind", ["dcgan", "balanced", "resnet"])
@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("skips", [False, True])
def test_a_full_resolution_layer_starts_as_upsampling_and_is_known_from_json(
    kind: Arch, size: int, skips: bool
) -> None:
    arch = Architecture(
        size=size, nz=5, ngf=2, ndf=2, arch=kind, norm_d="none", classes=2, full_res_conv=True, skips=skips
    )
    assert Architecture.from_json(arch.to_json()) == arch
    assert Architecture.from_json({**arch.to_json(), "grown": 0}) == arch
    assert (
        not {"full_res_conv", "skips", "grown"}
        & replace(arch, full_res_conv=False, skips=False).to_json().keys()
    )
    net = arch.build_generator(0)
    images = net(torch.randn(3, 5, 1, 1), torch.tensor([0, 1, 0]))
    assert images.shape == (3, 3, size, size)
    assert arch.build_discriminator(0)(images, torch.tensor([0, 1, 0])).shape == (3,)
    mix = next(one for one in net.modules() if isinstance(one, nn.Conv2d) and one.out_channels in (64, 144))
    side = 3 if size == 96 else 2
    repeated = nn.functional.pixel_shuffle(mix(torch.randn(1, mix.in_channels, 2, 2)), side)
    of_each = repeated[..., ::side, ::side]
    assert torch.allclose(of_each.repeat_interleave(side, 2).repeat_interleave(side, 3), repeated)


@pytest.mark.parametrize("kind", ["dcgan", "balanced", "resnet"])
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("full_res_conv", [False, True])
def test_an_antialiased_generator_ends_in_the_filter_and_is_known_from_json(
    kind: Arch, skips: bool, full_res_conv: bool
) -> None:
    arch = Architecture(
        size=64, nz=5, ngf=2, ndf=2, arch=kind, norm_d="none", antialias=True, skips=skips,
        full_res_conv=full_res_conv,
    )  # fmt: skip
    assert Architecture.from_json(arch.to_json()) == arch
    assert "antialias" not in replace(arch, antialias=False).to_json()
    net = arch.build_generator(0)
    filters = [one for one in net.modules() if isinstance(one, LowPass)]
    assert len(filters) == (3 if skips else 1)
    assert net(torch.randn(3, 5, 1, 1)).shape == (3, 3, 64, 64)
    other = replace(arch, antialias=False).build_generator(0)
    assert net.state_dict().keys() > other.state_dict().keys(), "another program must not omit the filter"
    assert not any(name.endswith("kernel") for name, _ in net.named_parameters()), "it is not trained"


@pytest.mark.parametrize("period", [2, 3, 4, 6, 8])
def test_the_filter_keeps_areas_and_removes_dots_at_the_period_of_the_last_layer(period: int) -> None:
    area_B3HW = torch.full((1, 3, 24, 24), 0.5)
    assert torch.allclose(LowPass(period)(area_B3HW), area_B3HW)
    dots_B3HW = area_B3HW.clone()
    dots_B3HW[:, :, ::period, ::period] += 0.2
    inside_B3HW = LowPass(period)(dots_B3HW)[..., 4:-4, 4:-4]
    assert torch.allclose(inside_B3HW, dots_B3HW.mean().expand_as(inside_B3HW))


@pytest.mark.parametrize("kind", ["dcgan", "balanced", "resnet"])
@pytest.mark.parametrize("skips", [False, True])
def test_larger_patches_take_layers_and_nothing_else_from_both_networks(kind: Arch, skips: bool) -> None:
    usual = Architecture(
        size=192, nz=5, ngf=2, ndf=2, arch=kind, norm_d="none", skips=skips, full_res_conv=True
    )
    arch = replace(usual, patch_size=6)
    assert Architecture.from_json(arch.to_json()) == arch
    assert "patch_size" not in usual.to_json(), "which ganq 0.2 does not know"
    images_B3HW = arch.build_generator(0)(torch.randn(2, 5, 1, 1))
    assert images_B3HW.shape == (2, 3, 192, 192)
    assert arch.build_discriminator(0)(images_B3HW).shape == (2,)
    assert [a - b for a, b in zip(layers(kind, 192), layers(kind, 192, 6), strict=True)] == (
        [2, 2] if kind == "resnet" else [1, 1]
    )


def test_only_networks_with_skips_have_an_early_phase() -> None:
    arch = Architecture(size=96, ngf=2, ndf=2, skips=True)
    assert [arch.at(side).side for side in (24, 48, 96)] == [24, 48, 96]
    assert arch.at(96) == arch
    wrong: Any
    for wrong in ({"skips": False, "grown": 48}, {"grown": 32}, {"grown": 96}, {"size": 48}):
        with pytest.raises(SpecError):
            replace(arch, **wrong)


@pytest.mark.parametrize("arch", ["dcgan", "balanced", "resnet"])
@pytest.mark.parametrize("size", [16, 24, 96])
def test_the_layers_that_can_be_frozen_are_known_without_building_the_networks(arch: Arch, size: int) -> None:
    built = Architecture(size=size, nz=5, ngf=2, ndf=2, norm_d="none", arch=arch)
    freeze_g = partial(freeze, built.build_generator(0), "Gene", option="--freeze-g")
    freeze_d = partial(freeze, built.build_discriminator(0), "Discrim", option="--freeze-d")
    for frozen, counted in zip((freeze_g, freeze_d), layers(arch, size), strict=True):
        frozen(count=counted - 1)
        with pytest.raises(SpecError, match=f"has {counted} layers"):
            frozen(count=counted)


@pytest.mark.parametrize(("kind", "norm"), [("dcgan", "batch"), ("balanced", "spectral"), ("resnet", "none")])
def test_a_grey_generator_makes_equal_channels_and_its_weights_are_those_of_any_other(
    kind: Arch, norm: NormD
) -> None:
    arch = Architecture(size=16, nz=4, ngf=4, ndf=4, arch=kind, norm_d=norm, grey=True)
    assert Architecture.from_json(arch.to_json()) == arch
    assert "grey" not in replace(arch, grey=False).to_json()
    grey, colour = arch.build_generator(1), replace(arch, grey=False).build_generator(1)
    assert grey.state_dict().keys() == colour.state_dict().keys()
    latents = torch.randn(3, 4, 1, 1)
    for net in (grey, copy.deepcopy(grey)):
        images = net(latents)
        assert torch.equal(images[:, 0], images[:, 1])
        assert torch.equal(images[:, 0], images[:, 2])
        assert images.std() > 0
