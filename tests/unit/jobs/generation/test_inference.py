"""The generator that is folded for generation draws what the one that was trained draws."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from jobs import grids
from jobs.generation.inference import for_inference
from jobs.networks.balanced import BalancedGenerator
from jobs.networks.dcgan import Architecture, Generator

CPU = torch.device("cpu")


def trained_generator(size: Any, kind: Any = Generator) -> Any:
    """In eval mode, with running statistics, shifts and filters that are not those of a fresh network."""
    torch.manual_seed(size)
    net = kind(size=size, nz=6, ngf=4)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 2)
                layer.bias.normal_()
            elif isinstance(layer, nn.Conv2d):  # which begins as a repeat, and has no shift
                layer.weight.normal_(std=0.1)
                assert layer.bias is not None
                layer.bias.normal_(std=0.1)
        for _ in range(5):
            net(torch.randn(16, 6, 1, 1))
    return net.eval()


@pytest.mark.parametrize(("arch", "norm"), [("dcgan", "batch"), ("balanced", "spectral"), ("resnet", "none")])
def test_a_grey_generator_stays_grey_when_it_is_folded(arch: Any, norm: Any) -> None:
    grey = Architecture(size=16, nz=6, ngf=4, ndf=4, arch=arch, norm_d=norm, grey=True)
    net = grey.build_generator(1).eval()
    latents = torch.randn(8, 6, 1, 1)
    with torch.inference_mode():
        expected, folded = net(latents), for_inference(net, CPU)(latents)
    assert torch.equal(folded[:, 0], folded[:, 1])
    assert torch.allclose(folded, expected, atol=1e-5)


@pytest.mark.parametrize("kind", [Generator, BalancedGenerator])
@pytest.mark.parametrize("size", [16, 24, 64, 96])
def test_folded_generator_draws_the_same_images(size: int, kind: Any) -> None:
    net = trained_generator(size, kind)
    latents = torch.randn(8, 6, 1, 1)
    with torch.inference_mode():
        expected, folded = net(latents), for_inference(net, CPU)(latents)
    assert folded.shape == expected.shape
    assert torch.allclose(folded, expected, atol=1e-5)
    assert folded.std() > 0.01


@pytest.mark.parametrize("kind", [Generator, BalancedGenerator])
@pytest.mark.parametrize("full_res_conv", [False, True])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("patch_size", [2, 8])
def test_a_generator_with_other_last_layers_is_folded_to_the_same_images(
    kind: Any, full_res_conv: bool, antialias: bool, patch_size: int
) -> None:
    last = {"full_res_conv": full_res_conv, "antialias": antialias, "patch_size": patch_size}
    net = trained_generator(64, partial(kind, **last))
    latents = torch.randn(8, 6, 1, 1)
    with torch.inference_mode():
        expected, folded = net(latents), for_inference(net, CPU)(latents)
    assert torch.allclose(folded, expected, atol=1e-5)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in for_inference(net, CPU).modules())


def test_folding_is_repeatable_and_leaves_the_network_alone() -> None:
    net = trained_generator(24)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first, second = (for_inference(net, CPU).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_folded_generator_has_no_batch_norm_left() -> None:
    folded = for_inference(trained_generator(24), CPU)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.3, 0.7)])
def test_values_outside_of_the_range_become_black_and_white(low: float, high: float) -> None:
    images = torch.linspace(-3, 3, 3 * 64).view(1, 3, 8, 8)
    scaled = (images.clamp(low, high) - low) / (high - low)
    expected = scaled.mul(255).add(0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert (grids.to_uint8(images, low, high) == expected).all()
