"""
Write a checkpoint as files that other programs read: .pth, .safetensors, .onnx.

Names and keys are the tutorial's: epoch 400 becomes netg_399.pth with `Gene.0.weight` …
and netd_399.pth with `Discrim.0.weight` …, each a plain state dict.
"""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import ConfigError, SpecError
from storage.volume.durable import make_folder, write_bytes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Exported:
    """The files that an export wrote."""

    paths: tuple[Path, ...]
    facts: dict[str, Any] = field(default_factory=dict)


def export(
    format: str,
    arch: Mapping[str, Any],
    tensors: "Mapping[str, Tensor]",
    folder: Path,
    epoch: int,
    *,
    force: bool = False,
) -> Exported:
    """
    Write a checkpoint's networks for other programs.

    Args:
        format: a key of FORMATS.
        arch: meta["arch"] of the checkpoint.
        tensors: its tensors, `G.…` and, if there is a discriminator, `D.…`.
        folder: made if it is not there.
        epoch: complete epochs; the files carry the tutorial's number, one less.
        force: replace files that are there.

    Raises:
        SpecError: no such format.
        ConfigError: a file is there already, or the packages for ONNX are missing.
        StorageError: the folder cannot be written; no half file is left.
    """
    if format not in FORMATS:
        raise SpecError(
            f"there is no export format {format[:40]!r}", hint=f"--format is one of: {', '.join(FORMATS)}"
        )
    return FORMATS[format](arch, tensors, folder, epoch, force=force)


def export_pth(
    arch: Mapping[str, Any], tensors: "Mapping[str, Tensor]", folder: Path, epoch: int, *, force: bool = False
) -> Exported:
    """
    Write netg_E.pth and netd_E.pth, as the tutorial's torch.save(net.state_dict(), PATH) wrote them.

    A spectral-norm discriminator keeps the keys of PyTorch's spectral_norm: see state_dicts().
    """
    import torch

    def encode(weights: "dict[str, Tensor]") -> bytes:
        file = io.BytesIO()
        torch.save(weights, file)
        return file.getvalue()

    return _write_pair("pth", encode, arch, tensors, folder, epoch, force)


def export_safetensors(
    arch: Mapping[str, Any], tensors: "Mapping[str, Tensor]", folder: Path, epoch: int, *, force: bool = False
) -> Exported:
    """Write netg_E.safetensors and netd_E.safetensors: the same keys as .pth, without code."""
    from safetensors.torch import save

    # One entry: safetensors writes several in a random order, and equal weights should be equal files.
    about = {"ganq": json.dumps({"arch": dict(arch), "epoch": epoch}, sort_keys=True)}

    def encode(weights: "dict[str, Tensor]") -> bytes:
        return save(weights, metadata=about)

    return _write_pair("safetensors", encode, arch, tensors, folder, epoch, force)


def export_onnx(
    arch: Mapping[str, Any], tensors: "Mapping[str, Tensor]", folder: Path, epoch: int, *, force: bool = False
) -> Exported:
    """
    Write netg_E.onnx: latents `z` (N, nz, 1, 1) to `images` (N, 3, size, size) in [-1, 1].

    Returns:
        facts: opset, max_abs_diff to PyTorch as measured in onnxruntime, tolerance.
    """
    (path,) = _free_paths(folder, ["netg"], "onnx", epoch, force)
    from jobs.networks.dcgan import Architecture
    from jobs.networks.onnx_export import OPSET, TOLERANCE, generator_onnx

    model, difference = generator_onnx(Architecture.from_json(dict(arch)), tensors)
    make_folder(folder)
    write_bytes(path, model)
    return Exported((path,), {"opset": OPSET, "max_abs_diff": difference, "tolerance": TOLERANCE})


FORMATS: dict[str, Callable[..., Exported]] = {
    "pth": export_pth,
    "safetensors": export_safetensors,
    "onnx": export_onnx,
}


def _write_pair(
    suffix: str,
    encode: "Callable[[dict[str, Tensor]], bytes]",
    arch: Mapping[str, Any],
    tensors: "Mapping[str, Tensor]",
    folder: Path,
    epoch: int,
    force: bool,
) -> Exported:
    from jobs.networks.dcgan import Architecture
    from jobs.networks.weights import state_dicts

    networks = state_dicts(Architecture.from_json(dict(arch)), tensors)
    paths = _free_paths(folder, list(networks), suffix, epoch, force)
    make_folder(folder)
    for path, weights in zip(paths, networks.values(), strict=True):
        write_bytes(path, encode(weights))
    return Exported(paths, {"networks": list(networks)})


def _free_paths(folder: Path, names: list[str], suffix: str, epoch: int, force: bool) -> tuple[Path, ...]:
    """Return the paths of an export; all are checked before the first is written."""
    from jobs.networks.weights import origin_epoch

    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, not a folder", hint="give a folder to export to")
    paths = tuple(folder / f"{name}_{origin_epoch(epoch)}.{suffix}" for name in names)
    for path in paths:
        if path.is_dir() or (path.exists() and not force):
            raise ConfigError(
                f"{path} is already there", hint="--force replaces it, or choose another folder"
            )
    return paths
