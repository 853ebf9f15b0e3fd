"""
How the two networks are run in a plain pass: in which numbers.

Weights, moments, losses, penalties and the average stay in float32: autocast computes
convolutions in bfloat16 between weights of 32 bits. A penalty runs the network itself
(state.discriminator), and only Passes.g and Passes.d run in bfloat16.

Shapes in names: B pictures, Z latent numbers, H, W pixels.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from jobs.device import SINCE_0_2
from jobs.errors import SpecError
from jobs.specs import TrainSpec
from jobs.training.state import TrainState

Precision = Literal["fp32", "bf16"]


def precision_of(spec: TrainSpec, device: torch.device, *, began: Precision | None = None) -> Precision:
    """
    What --precision comes to on this device.

    'auto' is bf16 on a GPU that computes in it, but for recipe dcgan, which is there to be
    compared with the tutorial. On a CPU it would save too little (docs/decisions/0011).

    Args:
        began: what a run that goes on began with; it stays with that where the device can.

    Raises:
        SpecError: bf16 on a GPU that only imitates it.
    """
    if spec.precision == "bf16" and device.type == "cuda" and not computes_in_bf16(device):
        raise SpecError(
            f"--precision bf16: {torch.cuda.get_device_name(device)} does not compute in bfloat16",
            hint="--precision fp32, or auto",
        )
    if spec.precision != "auto":
        return spec.precision
    wanted = began or ("bf16" if device.type == "cuda" and spec.recipe != "dcgan" else "fp32")
    return "bf16" if wanted == "bf16" and computes_in_bf16(device) else "fp32"


def computes_in_bf16(device: torch.device) -> bool:
    """Whether bfloat16 saves time there. A CPU without its instructions imitates it, and takes longer."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


class AutocastPasses:
    """
    Plain passes of a run's two networks.

    Args:
        precision: what precision_of() says.
        state: whose networks they are; in bf16 they are changed so that some layers stay in float32.
    """

    def __init__(self, precision: Precision, state: TrainState, device: torch.device) -> None:
        self.precision = precision
        self.device = device
        self._g: Callable[..., Any] = state.generator
        self._d: Callable[..., Any] = state.discriminator
        if self.precision == "bf16":
            for net in (state.generator, state.discriminator):
                _spare(net, device.type)

    def g(self, latents_BZ11: Tensor, *more: Tensor) -> Tensor:
        """Pictures, float32 (B, 3, H, W); `more` is what else the generator takes."""
        return self._run(self._g, latents_BZ11, *more)

    def d(self, images_B3HW: Tensor, *more: Tensor) -> Tensor:
        """Scores, float32 (B,)."""
        return self._run(self._d, images_B3HW, *more)

    def _run(self, net: Callable[..., Any], *what: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            made: Tensor = net(*what)
        return made.float()


def build_facts(
    spec: TrainSpec, device: torch.device, *, began: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    What a run's last bits depend on here, for the build fingerprint.

    Args:
        began: the fingerprint that stands in the checkpoint from which the run goes on.
    """
    before = None if began is None else {**SINCE_0_2, **began}["precision"]
    return {"precision": precision_of(spec, device, began=before)}


def _spare(net: nn.Module, kind: str) -> None:
    """
    Keep in float32 what bfloat16's 8 bits would spoil.

    A sigmoid above 0.998 would be 1, whose logarithm a loss has no use for; a tanh has
    fewer steps near ±1 than a picture has greys; and spectral norm's power iteration
    writes into buffers of 32 bits.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Sigmoid | nn.Tanh):
            layer.register_forward_pre_hook(_to_float32)
        elif isinstance(layer, ParametrizationList):
            layer.forward = torch.autocast(kind, enabled=False)(layer.forward)  # type: ignore[method-assign]


def _to_float32(layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(one.float() for one in given)
