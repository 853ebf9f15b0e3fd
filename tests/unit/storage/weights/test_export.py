"""Checkpoints as files for other programs, and the way back."""

import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from jobs.errors import ConfigError, DiskFullError, ForeignFileError, SpecError
from jobs.networks import onnx_export
from jobs.networks.dcgan import Architecture
from jobs.networks.weights import join
from storage.weights.export import FORMATS, export
from storage.weights.load import load_origin, read_weights


def checkpoint(arch: Architecture) -> dict[str, Tensor]:
    """Networks that have seen a few batches, so that BatchNorm's statistics matter."""
    netg, netd = arch.build_generator(1), arch.build_discriminator(2)
    draw = torch.Generator().manual_seed(3)
    for _ in range(20):
        netg(3 * torch.randn(8, arch.nz, 1, 1, generator=draw))
        netd(torch.randn(8, 3, arch.size, arch.size, generator=draw))
    tensors = join(netg.state_dict(), netd.state_dict())
    last = [key for key in tensors if key.startswith("G.") and key.endswith(".weight")][-1]
    tensors[last] = tensors[last] * 100  # images that use the whole range of tanh
    return {key: tensor.clone() for key, tensor in tensors.items()}


def generate(arch: Architecture, tensors: dict[str, Tensor], latents: Tensor) -> Tensor:
    netg = arch.build_generator().eval()
    netg.load_state_dict({key[2:]: tensor for key, tensor in tensors.items() if key.startswith("G.")})
    with torch.inference_mode():
        made: Tensor = netg(latents)
        return made


ARCHS = [
    pytest.param(Architecture(size=96, nz=10, ngf=4, ndf=4), id="96"),
    pytest.param(Architecture(size=64, nz=10, ngf=4, ndf=4), id="64"),
    pytest.param(Architecture(size=24, nz=10, ngf=4, ndf=4, norm_d="spectral"), id="24-spectral"),
    pytest.param(Architecture(size=96, nz=10, ngf=4, ndf=4, norm_d="none", arch="balanced"), id="96-even"),
]


@pytest.mark.parametrize("format", ["pth", "safetensors"])
@pytest.mark.parametrize("arch", ARCHS)
def test_out_and_in_and_out_again_gives_the_same_tensors_images_and_bytes(
    tmp_path: Path, arch: Architecture, format: str
) -> None:
    tensors = checkpoint(arch)
    first = export(format, arch.to_json(), tensors, tmp_path / "first", 400)
    assert [path.name for path in first.paths] == [f"netg_399.{format}", f"netd_399.{format}"]

    back_arch, back = load_origin(*first.paths)

    assert Architecture.from_json(back_arch) == arch
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    latents = torch.randn(3, arch.nz, 1, 1)
    assert torch.equal(generate(arch, back, latents), generate(arch, tensors, latents))
    second = export(format, back_arch, back, tmp_path / "second", 400)
    for one, other in zip(first.paths, second.paths, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_pth_is_a_plain_state_dict_with_the_tutorials_keys(tmp_path: Path) -> None:
    arch = Architecture(size=96, nz=5, ngf=2, ndf=2)
    netg, netd = export("pth", arch.to_json(), checkpoint(arch), tmp_path, 5).paths
    assert netg.name == "netg_4.pth"
    state = torch.load(netg, weights_only=True)
    assert type(state) is dict
    assert state["Gene.0.weight"].shape == (5, 16, 4, 4)
    assert state["Gene.12.weight"].shape == (2, 3, 5, 5)
    assert torch.load(netd, weights_only=True)["Discrim.11.bias"].shape == (1,)


def test_a_checkpoint_without_discriminator_exports_the_generator_alone(tmp_path: Path) -> None:
    arch = Architecture(size=24, nz=5, ngf=2, ndf=2)
    alone = {key: tensor for key, tensor in checkpoint(arch).items() if key.startswith("G.")}
    done = export("safetensors", arch.to_json(), alone, tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["netg_0.safetensors"]
    assert load_file(done.paths[0]).keys() == {key[2:] for key in alone}


CONDITIONAL = Architecture(size=24, nz=10, ngf=4, ndf=4, norm_d="spectral", classes=3)


def test_onnx_of_a_conditional_generator_takes_the_class_of_each_image(tmp_path: Path) -> None:
    tensors = checkpoint(CONDITIONAL)
    (path,) = export("onnx", CONDITIONAL.to_json(), tensors, tmp_path, 400).paths
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    latents = torch.randn(1, 10, 1, 1).expand(3, -1, -1, -1)
    given = {"z": latents.numpy(), "labels": torch.tensor([2, 0, 2]).numpy()}
    (images,) = session.run(["images"], given)
    assert (images[0] == images[2]).all()
    assert abs(images[0] - images[1]).max() > 0.01
    netg = CONDITIONAL.build_generator().eval()
    netg.load_state_dict({key[2:]: tensor for key, tensor in tensors.items() if key.startswith("G.")})
    with torch.inference_mode():
        expected = netg(latents, torch.tensor([2, 0, 2]))
    torch.testing.assert_close(torch.from_numpy(images), expected, rtol=0, atol=onnx_export.TOLERANCE)


RESIDUAL = Architecture(size=48, nz=10, ngf=4, ndf=4, arch="resnet", norm_d="none")


@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_a_resnet_pair_comes_out_with_its_own_keys(tmp_path: Path, format: str) -> None:
    tensors = checkpoint(RESIDUAL)
    netg, netd = export(format, RESIDUAL.to_json(), tensors, tmp_path, 400).paths
    back = join(read_weights(netg), read_weights(netd))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    with pytest.raises(ForeignFileError, match="not the tutorial's generator"):
        load_origin(netg, netd)  # ganq import reads the tutorial's networks alone


FILTERED = Architecture(size=24, nz=10, ngf=4, ndf=4, arch="balanced", norm_d="none", antialias=True)


@pytest.mark.parametrize(
    "arch",
    [*ARCHS[:2], ARCHS[3], pytest.param(RESIDUAL, id="resnet"), pytest.param(FILTERED, id="antialias")],
)
def test_onnx_gives_the_same_images_for_any_batch(tmp_path: Path, arch: Architecture) -> None:
    torch.manual_seed(0)
    tensors = checkpoint(arch)
    done = export("onnx", arch.to_json(), tensors, tmp_path, 400)

    (path,) = done.paths
    assert path.name == "netg_399.onnx"
    assert done.facts["opset"] == 18
    assert done.facts["max_abs_diff"] <= done.facts["tolerance"]
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {opset.domain: opset.version for opset in model.opset_import}[""] == 18
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 2, 7):
        latents = torch.randn(count, arch.nz, 1, 1)
        (images,) = session.run(["images"], {"z": latents.numpy()})
        expected = generate(arch, tensors, latents)
        assert expected.std() > 0.3  # images, not grey that any graph would match
        torch.testing.assert_close(torch.from_numpy(images), expected, rtol=0, atol=onnx_export.TOLERANCE)


def test_a_graph_that_differs_from_torch_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = Architecture(size=16, nz=5, ngf=2, ndf=2)
    tensors = checkpoint(arch)
    other = join(arch.build_generator(9).state_dict(), None)
    real_graph = onnx_export._graph

    def wrong_graph(network: Any, arch: Architecture) -> bytes:
        stranger = arch.build_generator().eval()
        stranger.load_state_dict({key[2:]: tensor for key, tensor in other.items()})
        return real_graph(stranger, arch)

    monkeypatch.setattr(onnx_export, "_graph", wrong_graph)
    with pytest.raises(ConfigError, match="differs from PyTorch"):
        export("onnx", arch.to_json(), tensors, tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_without_the_onnx_packages_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    arch = Architecture(size=16, nz=5, ngf=2, ndf=2)
    tensors = checkpoint(arch)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"needs the package {package}") as caught:
        export("onnx", arch.to_json(), tensors, tmp_path / "out", 1)
    assert caught.value.hint == "pip install 'ganq[onnx]'"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", list(FORMATS))
def test_files_that_are_there_stay_unless_forced(tmp_path: Path, format: str) -> None:
    arch = Architecture(size=16, nz=5, ngf=2, ndf=2)
    tensors = checkpoint(arch)
    name = "netg" if format == "onnx" else "netd"
    mine = tmp_path / f"{name}_0.{format}"
    mine.write_text("mine")
    with pytest.raises(ConfigError, match="already there"):
        export(format, arch.to_json(), tensors, tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == [mine.name]  # nor is the other one written
    assert mine.read_text() == "mine"
    export(format, arch.to_json(), tensors, tmp_path, 1, force=True)
    assert mine.stat().st_size > 1000


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    arch = Architecture(size=16, nz=5, ngf=2, ndf=2)
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        export("pth", arch.to_json(), checkpoint(arch), tmp_path / "out", 1)
    with pytest.raises(SpecError, match="no export format 'h5'"):
        export("h5", arch.to_json(), {}, tmp_path, 1)


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    arch = Architecture(size=16, nz=5, ngf=2, ndf=2)
    tensors = checkpoint(arch)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError):
        export("pth", arch.to_json(), tensors, tmp_path / "out", 1)
    assert list((tmp_path / "out").iterdir()) == []
