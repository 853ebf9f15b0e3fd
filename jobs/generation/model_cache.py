"""A cache of the models that were loaded last, so that a warm process does not load them again."""

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

CACHE_SIZE = 4


@dataclass(frozen=True)
class Model:
    """Generator and discriminator in eval mode, channels last, on the device."""

    arch: Architecture
    generator: nn.Module
    discriminator: AnyDiscriminator | None
    classes: tuple[str, ...] = ()
    """Class names of a conditional model."""

    def labels(self, numbers: Iterable[int], class_name: str | None, device: torch.device) -> list[Tensor]:
        """
        Return the class labels of images as a list with one tensor; empty for an unconditional model.

        Args:
            numbers: sample indices; the class is the index modulo the number of classes.
            class_name: one class for all images.

        Raises:
            SpecError: the model has no such class.
        """
        label = label_of(class_name, self.classes)
        if not self.classes:
            return []
        return [labels_of(numbers, len(self.classes), label).to(device)]

    def scorer(self) -> AnyDiscriminator:
        """
        Return the discriminator.

        Raises:
            SpecError: the model has none.
        """
        if self.discriminator is None:
            raise SpecError(
                "this model has no discriminator to select the best images with",
                hint="use --count N instead of --keep and --of, or import the model with its netd file",
            )
        return self.discriminator


_loaded: "OrderedDict[tuple[str, str], Model]" = OrderedDict()


def load(snapshot: Snapshot, device: torch.device) -> Model:
    """
    Return the model of a checkpoint, from the cache if it is there.

    Args:
        snapshot: tensors 'G.…' and, for scores, 'D.…'; meta["arch"].

    Raises:
        CheckpointCorruptError: the tensors do not fit meta["arch"].
    """
    found = cached(snapshot.sha256, device)
    if found is not None:
        return found
    model = _loaded[snapshot.sha256, str(device)] = _build(snapshot, device)
    while len(_loaded) > CACHE_SIZE:
        _loaded.popitem(last=False)
    return model


def cached(sha256: str | None, device: torch.device) -> Model | None:
    """Return a model from the cache without reading any file; None if it is not there."""
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
            "the checkpoint's tensors do not fit the architecture in its metadata",
            hint="another checkpoint of the job may be intact: ganq checkpoints JOB",
        ) from exc
    net.eval().requires_grad_(False)
