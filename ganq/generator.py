"""A trained generator in this process, without a queue."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from jobs import device as devices
from jobs.context import Snapshot
from jobs.generation import model_cache
from jobs.generation.generate import Generation
from jobs.specs import GenerateSpec
from storage.volume.checkpoints import read_checkpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from storage.db.rows import Checkpoint
    from storage.volume.layout import Volume


def load(volume: "Volume", checkpoint: "Checkpoint", device: str) -> "Generator":
    """
    Load the generator of a checkpoint.

    Raises:
        CheckpointCorruptError: its files differ from what was registered.
        GpuUnavailableError: 'cuda' where there is none.
    """
    return Generator(read_checkpoint(volume, checkpoint, "generator"), devices.choose(device))


class Generator(nn.Module):
    """
    A generator in eval mode, optimised for inference on its device.

    Args:
        snapshot: of a checkpoint.
        device: where it computes; it cannot be moved afterwards.
    """

    def __init__(self, snapshot: Snapshot, device: torch.device) -> None:
        super().__init__()
        model = model_cache.load(snapshot, device)
        self.net = model.generator
        self.device = device
        self.nz = model.arch.nz
        self.size = model.arch.size
        self.classes = model.classes
        """Class names of a class-conditional model."""
        self.epoch = snapshot.epoch
        self.sha256 = snapshot.sha256
        """Of the checkpoint's manifest."""
        self._snapshot = snapshot
        self.eval()

    def forward(self, latents_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """
        Generate images from latents.

        Args:
            latents_BZ: standard normal, float32, shape (B, nz).
            labels_B: classes of a class-conditional model, int64.

        Returns:
            Images in [-1, 1], shape (B, 3, size, size).
        """
        labels = [] if labels_B is None else [labels_B.to(self.device)]
        return cast(Tensor, self.net(latents_BZ.to(self.device).reshape(-1, self.nz, 1, 1), *labels))

    def sample(self, count: int | None = None, **options: Any) -> "NDArray[np.uint8]":
        """
        Generate images that equal those of a generation job with the same options.

        Args:
            count: number of images.
            options: those of `ganq submit generate` that choose latents: `seed`, `seeds`, `truncation`,
                `class_name`, `noise_std`, `interpolate`, `micro_batch`, …

        Returns:
            uint8, shape (N, size, size, 3).

        Raises:
            SpecError: an option is not valid.
        """
        from ganq.submission.options import read_options

        given = read_options("generate", {"count": count, **options})
        spec = GenerateSpec.create(source=0, **{**given, "device": self.device.type})
        return np.stack(generate(self._snapshot, spec))


def generate(snapshot: Snapshot, spec: GenerateSpec) -> "list[NDArray[np.uint8]]":
    """
    Return the images of a generation job with this spec, uint8 (H, W, 3) each.

    Raises:
        SpecError, CheckpointCorruptError: as the job would.
    """
    with _unchanged_settings():
        generation = Generation(spec, cast(Any, _Context(snapshot)))
        return [image for batch in generation.pixels() for image in batch]


class _Context:
    """The part of jobs.context.JobContext that Generation.pixels() uses."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def model(self) -> Snapshot:
        return self._snapshot

    def model_sha256(self) -> str:
        return self._snapshot.sha256

    def stop_reason(self) -> str | None:
        return None

    def report(self, *args: Any, **facts: Any) -> None:
        pass


@contextmanager
def _unchanged_settings() -> Iterator[None]:
    """Restore torch's global settings, which belong to the caller."""
    algorithms = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
