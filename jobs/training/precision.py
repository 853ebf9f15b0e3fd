"""
Number format of the forward passes: float32, or bfloat16 by autocast.

Weights, moments, losses, penalties and the moving average stay in float32; autocast computes convolutions
in bfloat16. Gradient penalties run the network itself (state.discriminator); only AutocastPasses run in
bfloat16.

Shapes in names: B images, Z latent dimensions, H, W pixels.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from jobs.device import DEFAULTS_OF_OLD_FINGERPRINTS
from jobs.errors import SpecError
from jobs.specs import TrainSpec
from jobs.training.state import TrainState

Precision = Literal["fp32", "bf16"]


def precision_of(spec: TrainSpec, device: torch.device, *, began: Precision | None = None) -> Precision:
    """
    Return the number format that --precision selects on a device.

    'auto' is bf16 on a GPU that supports it, except for recipe dcgan, which is meant to be compared with the
    tutorial. On a CPU it would save too little (docs/decisions/0011).

    Args:
        began: the format that a resumed run began with; it is kept where the device supports it.

    Raises:
        SpecError: bf16 on a GPU that only emulates it.
    """
    if spec.precision == "bf16" and device.type == "cuda" and not supports_bf16(device):
        raise SpecError(
            f"--precision bf16: {torch.cuda.get_device_name(device)} does not support bfloat16",
            hint="--precision fp32, or auto",
        )
    if spec.precision != "auto":
        return spec.precision
    wanted = began or ("bf16" if device.type == "cuda" and spec.recipe != "dcgan" else "fp32")
    return "bf16" if wanted == "bf16" and supports_bf16(device) else "fp32"


def supports_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 saves time. A CPU without the instructions emulates it, which takes longer."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


class AutocastPasses:
    """
    Forward passes of a run's two networks.

    Args:
        precision: the result of precision_of().
        state: its networks are modified in bf16 so that some layers stay in float32.
    """

    def __init__(self, precision: Precision, state: TrainState, device: torch.device) -> None:
        self.precision = precision
        self.device = device
        self._g: Callable[..., Any] = state.generator
        self._d: Callable[..., Any] = state.discriminator
        if self.precision == "bf16":
            for net in (state.generator, state.discriminator):
                _keep_in_float32(net, device.type)

    def g(self, latents_BZ11: Tensor, *labels: Tensor) -> Tensor:
        """Return images, float32 (B, 3, H, W)."""
        return self._run(self._g, latents_BZ11, *labels)

    def d(self, images_B3HW: Tensor, *labels: Tensor) -> Tensor:
        """Return scores, float32 (B,)."""
        return self._run(self._d, images_B3HW, *labels)

    def _run(self, net: Callable[..., Any], *inputs: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output: Tensor = net(*inputs)
        return output.float()


def precision_facts(
    spec: TrainSpec, device: torch.device, *, began: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    Return what a run's last bits depend on here, for the build fingerprint.

    Args:
        began: the fingerprint in the checkpoint that the run resumes from.
    """
    stored = None if began is None else {**DEFAULTS_OF_OLD_FINGERPRINTS, **began}["precision"]
    return {"precision": precision_of(spec, device, began=stored)}


def _keep_in_float32(net: nn.Module, device_type: str) -> None:
    """
    Keep the layers in float32 for which bfloat16's 8 bits are too few.

    A sigmoid above 0.998 would be 1, whose logarithm makes the loss infinite; a tanh has fewer steps near ±1
    than an image has grey levels; and spectral norm's power iteration writes into float32 buffers.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Sigmoid | nn.Tanh):
            layer.register_forward_pre_hook(_to_float32)
        elif isinstance(layer, ParametrizationList):
            layer.forward = torch.autocast(device_type, enabled=False)(layer.forward)  # type: ignore[method-assign]


def _to_float32(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(one.float() for one in inputs)
