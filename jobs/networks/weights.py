"""
State dicts: keys of ganq's files and of other programs' files.

    netg_399.pth, netd_399.pth   `Gene.0.weight` … and `Discrim.11.bias` …, one file each: network keys
    a checkpoint of ganq         `G.Gene.0.weight` … and `D.Discrim.11.bias` … in one file
    other DCGANs in PyTorch      `main.0.weight`, `module.Gene.0.weight` (DataParallel), no
                                 `num_batches_tracked` (before PyTorch 0.4.1)
    other checkpoints            `netG.main.0.weight`, `generator.model.0.weight` (Lightning), `g_ema.…`

Nothing here reads or writes a file: storage/weights/load.py reads, storage/weights/export.py writes.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jobs.errors import ForeignFileError, SpecError
from jobs.networks.dcgan import Arch, Architecture, NormD
from jobs.networks.heads import FULL_RESOLUTION_CHANNELS
from jobs.networks.layout import balanced_widths
from jobs.specs.base import PATCH_SIZES, size_plan

SEQUENTIAL = {"G": "Gene.", "D": "Discrim."}
NETWORK = {"G": "generator", "D": "discriminator"}
NETWORKS = {"G": "a generator", "D": "a discriminator"}
WRAPPERS = ("module.", "_orig_mod.", "models.", "networks.")
"""Prefixes of keys by DataParallel, torch.compile and dictionaries of networks."""
EDGE_KERNELS = {patch + 2: patch for patch in PATCH_SIZES}
"""Side of the kernel next to the pixels, and the patch size that it belongs to."""
WIDEST_CHANNELS = 65_536  # far above any real network, so that a forged shape cannot allocate terabytes
WANTED = "give weights of the tutorial's networks, saved with torch.save(net.state_dict(), PATH)"
SHOWN = 4  # names of keys in one message

NetworkRole = Literal["G", "D"]

OTHERS = (
    (("mapping.", "synthesis."), "StyleGAN"),
    (("style.", "to_rgb"), "StyleGAN"),
    (("down_blocks.", "up_blocks."), "a diffusion model"),
    (("input_blocks.", "output_blocks."), "a diffusion model"),
    (("layer1.", "layer4."), "a ResNet classifier"),
    (("features.", "classifier."), "an image classifier"),
    (("param_groups",), "an optimiser"),
    (("exp_avg",), "an optimiser"),
)
"""Other files by parts of their keys."""


def network_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Return the same weights under the keys that jobs/networks/dcgan.py uses.

    Removes `module.`, `_orig_mod.` and the name of the network (`netG.`, `generator.`, a checkpoint's `G.`
    and `D.`), prefers the moving average of a generator, renames another Sequential (`main.0.weight`) to
    `Gene` or `Discrim`, adds what old files lack (`num_batches_tracked`, and the zero bias of a last layer
    without one), and casts to float32. Unknown keys remain: fit() names them.
    """
    bare = {
        _unwrapped(key): tensor.float() if tensor.is_floating_point() else tensor.long()
        for key, tensor in tensors.items()
    }
    networks = _networks(bare)
    if not networks:
        return _with_missing_parts(_one_sequential(bare))
    found: dict[str, Tensor] = {}
    for which, network in networks.items():
        weights = _one_sequential(network, which)
        if which == "D":  # its keys must not be taken for G's
            weights = {
                key if key.startswith("Discrim") else f"Discrim.{key}": weights[key] for key in weights
            }
        found |= weights
    return _with_missing_parts(found)


def _unwrapped(key: str) -> str:
    while key.startswith(WRAPPERS):
        key = key.split(".", 1)[1]
    return key


def _networks(tensors: Mapping[str, Tensor]) -> dict[NetworkRole, dict[str, Tensor]]:
    """Return the weights of each network whose name the keys begin with; {} if they begin with none."""
    plain: dict[NetworkRole, dict[str, Tensor]] = {}
    averages: dict[NetworkRole, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, rest = key.partition(".")
        role = role_of(name)
        if role is not None and rest:
            which, average = role
            (averages if average else plain).setdefault(which, {})[_unwrapped(rest)] = tensor
    # An average without buffers uses those of the network.
    return {
        which: {**plain.get(which, {}), **averages.get(which, {})}
        for which in dict.fromkeys([*plain, *averages])
    }


def role_of(name: str) -> tuple[NetworkRole, bool] | None:
    """
    Return which network a name in a checkpoint belongs to, and whether it is the moving average.

    `netG`, `generator`, `G_state_dict` and `g_ema` are names of generators, `critic` of a discriminator.
    """
    letters = re.sub(r"[^a-z]", "", name.lower())
    average = re.search(r"ema|avg|average|shadow", letters) is not None
    bare = re.sub(
        r"state(dict)?|weights|params|model|network|net|ema|avg|average|shadow|copy|best|last", "", letters
    )
    if bare in ("g", "gen", "generator") or (average and not bare):
        return "G", average
    return ("D", average) if bare in ("d", "dis", "disc", "discriminator", "critic") else None


def _one_sequential(tensors: dict[str, Tensor], which: NetworkRole | None = None) -> dict[str, Tensor]:
    """
    Rename `main.0.weight`, `0.weight` or `net.main.0.weight`, if all keys belong to one Sequential.

    Args:
        which: the network, if it is known.
    """
    around = {key.partition(".")[0] for key in tensors}
    if len(around) == 1 and not any(key.split(".")[1].isdecimal() for key in tensors if "." in key):
        inside = {key.partition(".")[2]: tensor for key, tensor in tensors.items()}
        renamed = _one_sequential(inside, which) if all(inside) else {}
        if renamed and all(key.startswith(tuple(SEQUENTIAL.values())) for key in renamed):
            return renamed
    matches = [re.fullmatch(r"(?:([A-Za-z_]\w*)\.)?(\d{1,3})\.(.+)", key) for key in tensors]
    parts = [(match[1], int(match[2]), match[3]) for match in matches if match is not None]
    names = {name for name, _, _ in parts}
    if len(parts) < len(tensors) or len(names) != 1 or names <= {"Gene", "Discrim"}:
        return tensors
    # D's first kernel goes from a few colours, (ndf, 3, k, k); G's from latents to many channels.
    kernels = [
        (place, tensor)
        for (_, place, rest), tensor in zip(parts, tensors.values(), strict=True)
        if rest == "weight" and tensor.dim() == 4
    ]
    is_d = bool(kernels) and min(kernels, key=lambda kernel: kernel[0])[1].shape[1] <= 4
    prefix = SEQUENTIAL[which or ("D" if is_d else "G")]
    return {
        f"{prefix}{place}.{rest}": tensor
        for (_, place, rest), tensor in zip(parts, tensors.values(), strict=True)
    }


def check_colours(tensors: Mapping[str, Tensor], name: str) -> None:
    """
    Check that the networks have three colour channels.

    Args:
        tensors: network keys.
        name: the name of the file in an error.

    Raises:
        ForeignFileError: a network has another number of colour channels.
    """
    for which in ("G", "D"):
        layers = _layers(tensors, which)
        if len(layers) < 2 or layers[0][1].shape[-1] not in EDGE_KERNELS:
            continue
        kernel = layers[-1 if which == "G" else 0][1]
        if kernel.shape[-1] not in EDGE_KERNELS or kernel.shape[1] not in (1, 2, 4):
            continue
        channels = {1: "one colour channel", 2: "two colour channels", 4: "four colour channels"}
        raise ForeignFileError(
            f"{name}: a {NETWORK[which]} of images with {channels[kernel.shape[1]]} instead of three",
            hint="train it on images in RGB; ganq submit train --grey trains on grey images",
        )


def _with_missing_parts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for key in list(tensors):
        if key.endswith(".running_mean"):
            counter = key.removesuffix("running_mean") + "num_batches_tracked"
            tensors.setdefault(counter, torch.zeros((), dtype=torch.int64))
    layers = _layers(tensors, "D")
    if layers and layers[-1][1].shape[0] == 1 and layers[-1][1].shape[2] > 1:
        # PyTorch's own DCGAN example has no bias here; a bias of zero is the same network.
        # A residual discriminator ends in a 1×1 layer, which never has one.
        tensors.setdefault(f"Discrim.{layers[-1][0]}.bias", torch.zeros(1))
    return tensors


def select(tensors: Mapping[str, Tensor], which: NetworkRole) -> dict[str, Tensor]:
    """
    Return the weights of one network from network_keys(): a checkpoint's file has both.

    Unknown keys remain, so that load_state_dict() or fit() names them.
    """
    other = SEQUENTIAL["D" if which == "G" else "G"][:-1]
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(other)}


def infer_architecture(
    netg: Mapping[str, Tensor],
    netd: Mapping[str, Tensor] | None = None,
    *,
    names: tuple[str, str] = ("the generator's file", "the discriminator's file"),
) -> Architecture:
    """
    Infer the architecture from the shapes of the weights.

    Args:
        netg, netd: network keys. Without netd, `ndf` and `norm_d` are the tutorial's.
        names: the names of the two files in an error.

    Raises:
        ForeignFileError: not a network of ganq, the two in the wrong order, or two of
            different image sizes.
    """
    if _layers(netg, "D") and not _layers(netg, "G"):
        raise ForeignFileError(
            f"{names[0]} holds {kind_of(netg)} instead of a generator",
            hint="the generator comes first: ganq import NETG NETD --name NAME",
        )
    layers = _layers(netg, "G")
    _check_inferable(netg, layers, names[0])
    size, patch_size = _sides(layers, names[0], "G", netg)
    nz, ngf = layers[0][1].shape[0], layers[-1][1].shape[0]
    arch: Arch = "dcgan"
    antialias = any(key.endswith(".kernel") for key in netg)
    if _patch_of_balanced(layers):
        arch, ngf = "balanced", layers[-1][1].shape[1] // balanced_widths(size, patch_size)[-1]
    sides = {"size": size, "patch_size": patch_size}
    generator = {**sides, "nz": nz, "ngf": ngf, "arch": arch, "antialias": antialias}
    if not netd:
        return _architecture(names[0], **generator)

    if _layers(netd, "G") and not _layers(netd, "D"):
        raise ForeignFileError(
            f"{names[1]} holds a generator instead of a discriminator",
            hint="the generator comes first: ganq import NETG NETD --name NAME",
        )
    layers = _layers(netd, "D")
    size_d, patch_d = _sides(layers[::-1], names[1], "D", netd)
    if size_d != size:
        raise ForeignFileError(
            f"{names[0]} makes images of {size}×{size}, {names[1]} judges {size_d}×{size_d}",
            hint="give two files of the same run, or the generator alone",
        )
    if patch_d != patch_size:
        raise ForeignFileError(
            f"{names[0]} and {names[1]} are of networks with different patch sizes",
            hint="give two files of the same run, or the generator alone",
        )
    spectral = any(".parametrizations." in key for key in netd)
    normed = any(key.endswith(".running_mean") for key in netd)
    norm_d: NormD = "spectral" if spectral else "batch" if normed else "none"
    return _architecture(
        f"{names[0]} with {names[1]}",
        **generator,
        ndf=layers[0][1].shape[0],
        norm_d=norm_d,
    )


def _check_inferable(netg: Mapping[str, Tensor], layers: list[tuple[int, Tensor]], name: str) -> None:
    """
    Check that the shapes of a generator's layers determine its architecture.

    Raises:
        ForeignFileError: it is one of ganq's whose shapes do not.
    """
    skips = any(key.startswith("GeneSkips.") for key in netg)
    if skips or (layers and layers[-1][1].shape == (3, FULL_RESOLUTION_CHANNELS, 3, 3)):
        raise ForeignFileError(
            f"{name} holds a generator with --{'skips' if skips else 'full-res-conv'}, "
            "and the file alone does not determine its networks",
            hint="import the folder that ganq push writes: its config.json describes them",
        )


def _layers(tensors: Mapping[str, Tensor], which: NetworkRole) -> list[tuple[int, Tensor]]:
    """Return (index in the Sequential, kernel) of each convolution, in order."""
    pattern = re.compile(
        re.escape(SEQUENTIAL[which]) + r"(\d{1,3})\.(?:weight|parametrizations\.weight\.original)"
    )
    found = []
    for key, tensor in tensors.items():
        match = pattern.fullmatch(key)
        if match and tensor.dim() == 4:
            found.append((int(match[1]), tensor))
    return sorted(found, key=lambda layer: layer[0])


def kind_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what network keys are of, by their names and shapes; None if unknown."""
    keys = tuple(tensors)
    for parts, kind in OTHERS:
        if all(any(part in key for key in keys) for part in parts):
            return kind
    if _layers(tensors, "G"):
        return NETWORKS["G"]
    if any(tensor.dim() == 2 and min(tensor.shape) > 1 for tensor in tensors.values()):
        return "a network with fully connected layers, as classifiers have"
    return NETWORKS["D"] if _layers(tensors, "D") else None


def _sides(
    layers: list[tuple[int, Tensor]], name: str, which: NetworkRole, tensors: Mapping[str, Tensor]
) -> tuple[int, int]:
    """
    Return the side of the images and the patch size, 0 for that which the size has by itself.

    Args:
        layers: those between 4×4 and the pixels, pixels last.
    """
    if not layers:
        kind = kind_of(tensors)
        why = f"it is of {kind}" if kind else f"it has no key like {SEQUENTIAL[which]}0.weight"
        raise ForeignFileError(f"{name} does not hold a {NETWORK[which]}: {why}", hint=WANTED)
    kernel = layers[-1][1].shape[-1]
    doublings = len(layers) - 2
    balanced = _patch_of_balanced(layers) if which == "G" else None
    patch_size = balanced or EDGE_KERNELS.get(kernel)
    if patch_size is None or doublings < 1:
        raise ForeignFileError(
            f"{name}: {len(layers)} layers that end in a {kernel}×{kernel} kernel at the pixels "
            f"are not the tutorial's {NETWORK[which]}",
            hint="there that kernel is 5×5 (sizes 24, 48, 96 …) or 4×4 (16, 32, 64 …)",
        )
    size = 4 * patch_size * 2 ** min(doublings, 20)
    with suppress(SpecError):
        if size_plan(size)[1] == patch_size:
            patch_size = 0
    return size, patch_size


def _patch_of_balanced(layers: list[tuple[int, Tensor]]) -> int | None:
    """Return the patch size of a BalancedGenerator; None for any other network."""
    *hidden, last = [tuple(tensor.shape) for _, tensor in layers]
    if last[2] != 3 or any(shape[2] != 4 for shape in hidden):  # a residual one has 1×1 layers between
        return None
    return {3 * patch**2: patch for patch in PATCH_SIZES}.get(last[0])


def _architecture(name: str, **measures: Any) -> Architecture:
    largest = max(value for value in measures.values() if isinstance(value, int))
    try:
        if largest <= WIDEST_CHANNELS:
            return Architecture(**measures)
    except SpecError:
        pass
    shown = ", ".join(f"{key} {value}" for key, value in measures.items())
    raise ForeignFileError(f"{name}: no network of ganq has {shown}", hint="sizes are at most 1536 pixels")


def fit(
    tensors: Mapping[str, Tensor], arch: Architecture, which: NetworkRole, *, name: str
) -> dict[str, Tensor]:
    """
    Check every key and shape against the network, and return the weights in its order.

    Args:
        tensors: network keys.
        name: the name of the file in an error.

    Raises:
        ForeignFileError: it names the keys that are missing, unexpected or of another shape.
    """
    wanted = _shapes(arch, which)
    missing = [key for key in wanted if key not in tensors]
    unexpected = [key for key in tensors if key not in wanted]
    if missing or unexpected:
        parts = [
            f"{what} {_some(keys)}"
            for what, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise ForeignFileError(
            f"{name} is not the {NETWORK[which]} of {arch.size}×{arch.size} images: {'; '.join(parts)}",
            hint=WANTED,
            missing=missing,
            unexpected=unexpected,
        )
    other = [key for key, shape in wanted.items() if tensors[key].shape != shape]
    if other:
        key = other[0]
        raise ForeignFileError(
            f"{name}: {key} is {_shape(tensors[key])}, and {_shape_of(wanted[key])} fits the other layers"
            + (f" ({len(other) - 1} more like it)" if len(other) > 1 else ""),
            hint="the layers do not belong to one network; was the file put together from several?",
            wrong_shape=other,
        )
    return {key: tensors[key] for key in wanted}


def _shapes(arch: Architecture, which: NetworkRole) -> dict[str, torch.Size]:
    """Return the key and shape of every weight, without allocating it: on PyTorch's meta device."""
    with torch.device("meta"):
        network: nn.Module = arch.build_generator() if which == "G" else arch.build_discriminator()
    return {key: tensor.shape for key, tensor in network.state_dict().items()}


def _some(keys: Iterable[str]) -> str:
    """Return a few keys of an untrusted file, without control characters and of limited length."""
    shown = [ascii(key)[1:-1][:60] for key in keys]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


def _shape(tensor: Tensor) -> str:
    return _shape_of(tensor.shape)


def _shape_of(shape: torch.Size) -> str:
    return "×".join(map(str, shape)) or "one number"


def join(netg: Mapping[str, Tensor], netd: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the weights of both networks with the keys of a checkpoint: `G.Gene.…`, `D.Discrim.…`."""
    both = {f"G.{key}": tensor for key, tensor in netg.items()}
    return both | {f"D.{key}": tensor for key, tensor in (netd or {}).items()}


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the network keys of G and of D, which may be empty: the inverse of join()."""
    netg = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("G.")}
    netd = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("D.")}
    return netg, netd


def state_dicts(arch: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """
    Return a checkpoint's networks as state dicts of the tutorial, on the CPU.

    A spectral-norm D keeps its own keys (`Discrim.0.parametrizations.weight.original`, `_u`,
    `_v`). Folding the norm into the weights would not make the file readable by the tutorial,
    whose D has BatchNorm there, and ganq could no longer import it.

    Args:
        tensors: keys of a checkpoint.

    Returns:
        {'netg': …, 'netd': …}, the second only if the checkpoint has a discriminator.

    Raises:
        ForeignFileError: the tensors are not those of `arch`.
    """
    netg, netd = split(tensors)
    both = {"netg": fit(netg, arch, "G", name="the checkpoint's generator")}
    if netd:
        both["netd"] = fit(netd, arch, "D", name="the checkpoint's discriminator")
    # clone(): torch.save writes the whole storage behind a view, safetensors refuses shared ones.
    return {
        name: {key: tensor.detach().cpu().contiguous().clone() for key, tensor in weights.items()}
        for name, weights in both.items()
    }


def origin_epoch(epoch: int) -> int:
    """Return the tutorial's number of an epoch: it counts from 0, ganq counts completed epochs."""
    return max(epoch - 1, 0)


def epoch_of_name(name: str) -> int | None:
    """Return ganq's epoch of a file with the tutorial's name: netg_399.pth → 400; else None."""
    match = re.fullmatch(r"net[gd]_(\d{1,7})\.\w+", name, re.IGNORECASE)
    return int(match[1]) + 1 if match else None
