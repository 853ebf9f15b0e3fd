"""Keys and shapes of weights: what is inferred from them, and how a misfit is named."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.errors import ForeignFileError
from jobs.networks.dcgan import Architecture
from jobs.networks.weights import (
    epoch_of_name,
    fit,
    infer_architecture,
    join,
    network_keys,
    origin_epoch,
    split,
    state_dicts,
)

ARCH = Architecture(size=24, nz=6, ngf=4, ndf=5)


def generator() -> dict[str, Tensor]:
    return dict(ARCH.build_generator(1).state_dict())


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("kind", ["dcgan", "balanced"])
@pytest.mark.parametrize("norm", ["batch", "spectral", "none"])
@pytest.mark.parametrize("size", [16, 24, 32, 48, 64, 96, 128, 192, 256])
def test_every_size_and_norm_is_inferred_from_its_own_weights(
    size: int, norm: Any, kind: Any, antialias: bool
) -> None:
    arch = Architecture(size=size, nz=7, ngf=2, ndf=3, norm_d=norm, arch=kind, antialias=antialias)
    netg, netd = arch.build_generator().state_dict(), arch.build_discriminator().state_dict()
    assert infer_architecture(network_keys(netg), network_keys(netd)) == arch


@pytest.mark.parametrize("kind", ["dcgan", "balanced"])
@pytest.mark.parametrize(("size", "patch_size"), [(64, 4), (96, 6), (128, 8), (256, 4)])
def test_the_patch_size_is_inferred_and_must_be_that_of_both(size: int, patch_size: int, kind: Any) -> None:
    arch = Architecture(size=size, patch_size=patch_size, nz=7, ngf=2, ndf=3, norm_d="none", arch=kind)
    netg, netd = arch.build_generator().state_dict(), arch.build_discriminator().state_dict()
    assert infer_architecture(network_keys(netg), network_keys(netd)) == arch
    other = replace(arch, patch_size=0).build_discriminator().state_dict()
    with pytest.raises(ForeignFileError, match="different patch sizes"):
        infer_architecture(network_keys(netg), network_keys(other))


@pytest.mark.parametrize(
    "spell",
    [
        pytest.param(lambda key: f"module.{key}", id="DataParallel"),
        pytest.param(lambda key: f"_orig_mod.module.{key}", id="compiled"),
        pytest.param(lambda key: f"G.{key}", id="checkpoint"),
        pytest.param(lambda key: key.replace("Gene", "main"), id="PyTorch example"),
        pytest.param(lambda key: key.removeprefix("Gene."), id="bare Sequential"),
        pytest.param(lambda key: None if "num_batches" in key else key, id="before 0.4.1"),
    ],
)
def test_other_spellings_of_the_same_weights_are_understood(spell: Callable[[str], str | None]) -> None:
    weights = generator()
    spelled = {name: t for key, t in weights.items() if (name := spell(key)) is not None}
    ours = fit(network_keys(spelled), ARCH, "G", name="netg.pth")
    assert all(torch.equal(ours[key], t) for key, t in weights.items())


def test_missing_and_unexpected_keys_are_named() -> None:
    weights = generator()
    weights["Gene.1.wait"] = weights.pop("Gene.1.weight")
    with pytest.raises(
        ForeignFileError, match=r"missing Gene\.1\.weight; unexpected Gene\.1\.wait"
    ) as caught:
        fit(weights, ARCH, "G", name="netg.pth")
    assert caught.value.missing == ["Gene.1.weight"]
    assert caught.value.unexpected == ["Gene.1.wait"]


def test_many_wrong_keys_make_one_short_line_without_control_characters() -> None:
    weights = generator() | {f"\x1b[31m{'x' * 500}{i}": torch.zeros(1) for i in range(100)}
    with pytest.raises(ForeignFileError, match="and 96 more") as caught:
        fit(weights, ARCH, "G", name="netg.pth")
    assert len(caught.value.message) < 500
    assert caught.value.message.isprintable()


def test_a_wrong_shape_is_named_with_the_one_that_fits() -> None:
    weights = generator()
    weights["Gene.1.bias"] = torch.zeros(9)
    weights["Gene.4.bias"] = torch.zeros(())
    with pytest.raises(
        ForeignFileError, match=r"Gene\.1\.bias is 9, and 8 fits .*\(1 more like it\)"
    ) as caught:
        fit(weights, ARCH, "G", name="netg.pth")
    assert caught.value.wrong_shape == ["Gene.1.bias", "Gene.4.bias"]


def test_other_networks_are_refused_with_what_was_expected() -> None:
    with pytest.raises(ForeignFileError, match="it is of a network with fully connected layers"):
        infer_architecture({"fc.weight": torch.zeros(2, 2)})
    weights = generator()
    weights["Gene.6.weight"] = torch.zeros(4, 3, 7, 7)
    with pytest.raises(ForeignFileError, match="end in a 7×7 kernel"):
        infer_architecture(weights)


def test_made_up_measures_are_refused_before_anything_is_built() -> None:
    huge = torch.zeros(1).expand(10**9, 8, 4, 4)
    with pytest.raises(ForeignFileError, match="nz 1000000000"):
        infer_architecture(generator() | {"Gene.0.weight": huge})
    deep = {f"Gene.{3 * i}.weight": torch.zeros(4, 4, 4, 4) for i in range(60)}
    with pytest.raises(ForeignFileError, match="no network of ganq has size"):
        infer_architecture(deep)


def test_join_and_split_are_inverse() -> None:
    netg, netd = generator(), dict(ARCH.build_discriminator(1).state_dict())
    assert split(join(netg, netd)) == (netg, netd)
    assert split(join(netg, None)) == (netg, {})


def test_state_dicts_own_their_memory_in_the_order_of_the_network() -> None:
    # A view of a larger storage: torch.save would write all of it.
    big = torch.zeros(10_000)
    weights = generator() | {"Gene.1.bias": big[:8]}
    shuffled = join(dict(reversed(weights.items())), None)
    netg = state_dicts(ARCH, shuffled)["netg"]
    assert list(netg) == list(generator())
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in netg.values())


def test_the_tutorial_counts_epochs_from_zero() -> None:
    assert origin_epoch(400) == 399
    assert epoch_of_name("netg_399.pth") == 400
    assert epoch_of_name("netd_4.safetensors") == 5
    assert epoch_of_name("generator.safetensors") is None


@pytest.mark.parametrize("option", ["skips", "full_res_conv"])
@pytest.mark.parametrize("kind", ["dcgan", "balanced"])
def test_a_generator_whose_shapes_do_not_tell_its_networks_is_refused_with_the_way_out(
    option: str, kind: Any
) -> None:
    given: Any = {option: True}
    netg = Architecture(size=96, ngf=2, nz=5, arch=kind, **given).build_generator().state_dict()
    with pytest.raises(ForeignFileError, match=option.replace("_", "-")) as caught:
        infer_architecture(network_keys(netg))
    assert "ganq push" in (caught.value.hint or "")
