"""
All that the work in jobs/ asks of the world around it.

train.py and generate.py see nothing but this: no database, no Redis, no paths
outside their attempt. worker/runner/context.py implements it over the shared volume;
a test implements it over a temporary folder.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

CheckpointKind = Literal["resume", "epoch", "final"]


@dataclass(frozen=True)
class Images:
    """A decoded data set: uint8 pictures, memory-mapped, in a fixed order."""

    images_N3HW: "NDArray[np.uint8]"
    fingerprint: str  # sha-256 over names, contents and size: the same pictures, the same value
    classes: tuple[str, ...] = ()
    labels_N: "NDArray[np.int64] | None" = None

    def __len__(self) -> int:
        return len(self.images_N3HW)


@dataclass(frozen=True)
class Sample:
    """A grid of samples that is drawn when it is written, beside the training."""

    name: str
    """E.g. 'epoch-0005'."""
    draw: "Callable[[], NDArray[np.uint8]]"
    """Gives uint8 (H, W, 3). Runs on another thread than the training."""


@dataclass(frozen=True)
class Snapshot:
    """A stored checkpoint, verified against the sha-256 in the job table, in memory."""

    step: int
    epoch: int
    tensors: "dict[str, Tensor]"
    meta: dict[str, Any]
    sha256: str
    job_id: int | None = None


@dataclass(frozen=True)
class GeneratedImage:
    """One generated image and its line in manifest.jsonl."""

    pixels_HW3: "NDArray[np.uint8]"
    record: dict[str, Any] = field(default_factory=dict)  # seed, draw (the sample index), score
    output_index: int | None = None  # names the file; None: the number of images before this one


@dataclass(frozen=True)
class Made:
    """A picture that a part of this job has made: its line in the part's manifest, and where it lies."""

    path: Path
    record: dict[str, Any]  # seed, draw, score, bytes, sha256, and shape where the format does not tell it
    offset: int = 0  # where it begins in a file that holds many


class ImageSink(Protocol):
    """Where a generation job puts its pictures; nothing is visible before publish()."""

    def add(self, images: Iterable[GeneratedImage]) -> None:
        """Encode and write images; their lines in the manifest keep this order."""

    def adopt(self, made: Made, *, output_index: int) -> None:
        """Take over an image of a shard without encoding it again."""

    def shown(self, pixels_HW3: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
        """The picture as who reads it back will see it: a lossy format changes it."""

    def pixels(self, made: Made) -> "NDArray[np.uint8]":
        """What a picture that can be taken over shows: uint8 (H, W, 3)."""

    def add_grid(self, name: str, pixels_HW3: "NDArray[np.uint8]") -> None:
        """Write one grid, e.g. name 'grid-0000'."""

    def add_file(self, name: str, data: bytes) -> None:
        """Write one more file that is shown beside the grids, e.g. name 'interpolation.gif'."""

    def publish(self) -> dict[str, Any]:
        """Make all of it durable, then visible; returns facts for the job's result."""

    def made(self) -> Iterable[Made]:
        """After publish(): the pictures, in order."""


@dataclass(frozen=True)
class Part:
    """One shard of a job that was split."""

    job_id: int
    draws: tuple[int, int]  # the places (first, last) in the order of draws that it computes
    made: Iterable[Made] | None  # in order; None: it is gone from the volume, or not whole
    build: dict[str, Any] | None = None  # jobs.device.build_fingerprint() of its worker, if it was recorded


class JobContext(Protocol):
    """What a running job may do. Every method may raise StopRequested or a StorageError."""

    job_id: int
    attempt: int

    def stop_reason(self) -> str | None:
        """A jobs.states.StopReason once somebody wants the job to stop; cheap, ask at every step."""

    def report(
        self,
        done: int,
        total: int,
        unit: str,
        *,
        rate: float | None = None,
        epoch: int | None = None,
        epochs: int | None = None,
        phase: str | None = None,
    ) -> None:
        """
        Say how far the work is. Cheap: the context thins out what it passes on.

        Args:
            done, total: counted in `unit` ('pictures').
            rate: pictures per second, measured by the job.
            phase: what is done now, when it is not the work itself ('reading pictures').
        """

    def log(self, message: str) -> None:
        """One line for log.txt."""

    def metrics(self, record: Mapping[str, float | int | str | None]) -> None:
        """One line for metrics.jsonl."""

    def images(self, data: str, size: int, *, pin: str = "fingerprint") -> Images:
        """
        The data set, decoded once and kept on the volume by its fingerprint.

        Args:
            pin: under which name the fingerprint is fixed, for a job that reads more than one.
        """

    def event(self, type: str, **detail: Any) -> None:
        """Something that a person should find in the job's history, e.g. 'rolled_back'."""

    def resume(
        self, restore: Callable[[Snapshot], None], *, whole_epoch: bool = False, step: int | None = None
    ) -> Snapshot | None:
        """
        Go on from the newest checkpoint of this job that is whole and can be taken up.

        Args:
            take_up: raises CheckpointCorruptError for one that will not do; then an older one is tried.
            whole_epoch: pass over those of kind 'resume'.
            step: the one that is wanted; any other if it is not there.

        Returns:
            The one that was taken up; None: there are none, so this is a fresh start.

        Raises:
            CheckpointCorruptError: there are some, and not one of them is whole.
            DiskFullError: there is no room for the next.
        """

    def save_checkpoint(
        self,
        *,
        kind: CheckpointKind,
        epoch: int,
        step: int,
        state: "Mapping[str, Tensor]",
        generator: "Mapping[str, Tensor]",
        meta: Mapping[str, Any],
        sample: Sample | None = None,
    ) -> None:
        """
        Have a checkpoint made durable, then registered under the fence; it may go on after this returns.

        One at a time: call wait_for_save() before the next. What is handed over must not change.

        Args:
            kind: 'resume' (replaced by the next), 'epoch' (every save_every), 'final'.
            epoch: epochs that are complete.
            step: the only cursor: discriminator batches seen so far.
            state: all that the run needs to go on (state.safetensors).
            generator: all that generation needs: EMA generator and discriminator. Both on the
                CPU, in any memory layout.
            meta: JSON facts needed to rebuild the networks and counters; 'metric' goes into the table.
            sample: a grid that is drawn and written first.
        """

    def is_saving(self) -> bool:
        """Whether a checkpoint is still on its way; cheap, ask at every step."""

    def wait_for_save(self) -> None:
        """
        Until the checkpoint that was handed over last is registered; at once if none is on its way.

        Raises:
            DiskFullError, VolumeError, StorageError: it could not be written; nothing was registered.
        """

    def save_sample(self, name: str, pixels_HW3: "NDArray[np.uint8]") -> None:
        """One grid of samples, e.g. name 'epoch-0005'."""

    def model(self) -> Snapshot:
        """The generator that this generation job draws from (generator.safetensors)."""

    def model_sha256(self) -> str:
        """What Snapshot.sha256 of model() will be; nothing is read."""

    def models(self) -> "Iterator[Snapshot]":
        """The checkpoints of that model which were kept, oldest first, for --grid-epochs."""

    def sample_grids(self) -> "Sequence[Sample]":
        """The sample grids of that model's training that exist, oldest first; draw() reads a file."""

    def generated_images(self, most: int) -> "Iterator[NDArray[np.uint8]] | None":
        """
        Pictures that the job named by the spec has published, uint8 (H, W, 3), evenly chosen.

        Returns:
            None if that job is one that others draw from: see model().
        """

    def save_files(self, files: "Mapping[str, bytes | NDArray[np.uint8]]") -> list[dict[str, Any]]:
        """
        Write files into the attempt's folder, each whole or not at all; pixels become a PNG.

        Returns:
            name, bytes and sha256 of each, for the job's result, which makes them count.
        """

    def weights(self, path: str, *, sha256: str | None = None) -> "dict[str, Tensor]":
        """
        Weights from a file the user gave (.pth or .safetensors), safely read.

        Raises:
            ForeignFileError: it is not what it says, or not the file with this sha-256.
        """

    def parts(self) -> list[Part]:
        """Of a job that was split: what each part has made, in the order of draws."""

    def pictures(
        self,
        *,
        format: str = "png",
        quality: int | None = None,
        total: int | None = None,
        part: int | None = None,
    ) -> ImageSink:
        """
        Where to put generated pictures.

        Args:
            format, quality: as in GenerateSpec.
            total: how many will come.
            part: which shard of this job they are, where this attempt makes one again; they go when it ends.
        """

    def scratch(self) -> Path:
        """The attempt's own folder."""
