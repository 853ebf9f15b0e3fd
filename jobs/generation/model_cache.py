"""Generators loaded from checkpoints, the last few kept, so that a warm process need not build them again."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jobs.context import Snapshot
from jobs.errors import CheckpointCorruptError, SpecError
from jobs.generation.inference import for_inference
from jobs.networks.classes import label_of, labels_of
from jobs.networks.dcgan import AnyDiscriminator, Architecture

KEPT = 4


@dataclass(frozen=True)
class Model:
    """A pair in eval mode, channels last, on its device."""

    arch: Architecture
    generator: nn.Module
    discriminator: AnyDiscriminator | None
    classes: tuple[str, ...] = ()
    """Names of the classes that the generator can be asked for."""

    def labels(self, numbers: Iterable[int], class_name: str | None, device: torch.device) -> list[Tensor]:
        """
        What both networks take beside latents or pictures: the classes of these pictures, or nothing.

        Raises:
            SpecError: the model knows no such class.
        """
        label = label_of(class_name, self.classes)
        if not self.classes:
            return []
        return [labels_of(numbers, len(self.classes), label).to(device)]

    def scorer(self) -> AnyDiscriminator:
        """
        Raises:
            SpecError: the model came without a discriminator.
        """
        if self.discriminator is None:
            raise SpecError(
                "this model has no discriminator, so there is nothing to choose the best pictures by",
                hint="use --count N instead of --keep and --of, or import the model with its netd file",
            )
        return self.discriminator


_loaded: "OrderedDict[tuple[str, str], Model]" = OrderedDict()


def load(snapshot: Snapshot, device: torch.device) -> Model:
    """
    Args:
        snapshot: tensors 'G.…' and, if it can score, 'D.…'; meta["arch"].

    Raises:
        CheckpointCorruptError: the tensors do not fit meta["arch"].
    """
    known = recall(snapshot.sha256, device)
    if known is not None:
        return known
    model = _loaded[snapshot.sha256, str(device)] = _build(snapshot, device)
    while len(_loaded) > KEPT:
        _loaded.popitem(last=False)
    return model


def recall(sha256: str | None, device: torch.device) -> Model | None:
    """A model that this process has loaded not long ago: nothing is read."""
    if sha256 is None or (key := (sha256, str(device))) not in _loaded:
        return None
    _loaded.move_to_end(key)
    return _loaded[key]


def _build(snapshot: Snapshot, device: torch.device) -> Model:
    arch = Architecture.from_json(snapshot.meta["arch"])
    generator = arch.build_generator()
    _fill(generator, snapshot.tensors, "G.")
    discriminator = None
    if any(key.startswith("D.") for key in snapshot.tensors):
        discriminator = arch.build_discriminator()
        _fill(discriminator, snapshot.tensors, "D.")
        discriminator.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Model(
        arch, for_inference(generator, device), discriminator, tuple(snapshot.meta.get("classes", ()))
    )


def _fill(net: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    try:
        net.load_state_dict(own)
    except RuntimeError as exc:
        raise CheckpointCorruptError(
            "the checkpoint's tensors are not those of the networks it describes",
            hint="another checkpoint of the job may be whole: ganq checkpoints JOB",
        ) from exc
    net.eval().requires_grad_(False)
