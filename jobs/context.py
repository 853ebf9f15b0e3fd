"""
The interface between a job and the worker that runs it.

Code in jobs/ uses nothing else: no database, no Redis, no paths outside its attempt.
worker/runner/context.py implements it on the shared volume, tests on a temporary folder.
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
    """A decoded data set: uint8 images, memory-mapped, in a fixed order."""

    images_N3HW: "NDArray[np.uint8]"
    fingerprint: str  # SHA-256 of names, contents and size
    classes: tuple[str, ...] = ()
    labels_N: "NDArray[np.int64] | None" = None

    def __len__(self) -> int:
        return len(self.images_N3HW)


@dataclass(frozen=True)
class Sample:
    """A sample grid that is drawn when it is written, in parallel with training."""

    name: str
    """E.g. 'epoch-0005'."""
    draw: "Callable[[], NDArray[np.uint8]]"
    """Return uint8 (H, W, 3). Runs in another thread than training."""


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory, verified against the SHA-256 in the job table."""

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
    passport: dict[str, Any] | None = None  # from what it was made, for formats that can hold it


@dataclass(frozen=True)
class ImageNames:
    """How the images of a generation are named and divided into files; see GenerateSpec.names."""

    digits: int = 6
    folders: bool = False
    """Whether image files lie in folders of 10,000, by their number."""
    per_tar: int = 10_000
    first_tar: int = 0
    """Number of the first archive: those of all shards are numbered together."""
    linked: bool = False
    """Whether the parent publishes the archives and manifests of its shards as they are."""


PLAIN_NAMES = ImageNames()


@dataclass(frozen=True)
class ShardFiles:
    """What a shard has published, for a parent that links to it."""

    folder: Path
    images: int
    bytes: int  # of all images
    manifest_bytes: int
    manifest_sha256: str
    archives: list[dict[str, Any]]  # archive (its name), bytes, sha256


@dataclass(frozen=True)
class StoredImage:
    """An image that a shard has published: its line in the manifest, and its place on the volume."""

    path: Path
    record: dict[str, Any]  # seed, draw, score, bytes, sha256; and shape, if the format does not contain it
    offset: int = 0  # of its first byte, in a file of many images


class ImageSink(Protocol):
    """Write the images of a generation job; nothing is visible before publish()."""

    def add(self, images: Iterable[GeneratedImage]) -> None:
        """Encode and write images; their lines in the manifest keep this order."""

    def adopt(self, image: StoredImage, *, output_index: int) -> None:
        """Take over an image of a shard without encoding it again."""

    def link(self, shard: ShardFiles, *, build: int | None = None) -> None:
        """
        Take over all images of a shard, without reading them: its archives and its manifest.

        Args:
            build: number of its build in the result's `builds`.
        """

    def shown(self, pixels_HW3: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
        """Return the image as it is read back: a lossy format changes it."""

    def pixels(self, image: StoredImage) -> "NDArray[np.uint8]":
        """Return the pixels of an image of a shard: uint8 (H, W, 3)."""

    def add_grid(self, name: str, pixels_HW3: "NDArray[np.uint8]") -> None:
        """Write one grid, e.g. name 'grid-0000'."""

    def add_file(self, name: str, data: bytes) -> None:
        """Write a further file that is shown beside the grids, e.g. name 'interpolation.gif'."""

    def publish(self) -> dict[str, Any]:
        """Make all files durable, then visible; return facts for the job's result."""

    def stored(self) -> Iterable[StoredImage]:
        """Return the published images, in order."""

    def shard_files(self) -> ShardFiles:
        """Return the published files, of archives."""


@dataclass(frozen=True)
class Shard:
    """One shard of a job that was split."""

    job_id: int
    draws: tuple[int, int]  # sample indices (first, last)
    images: Iterable[StoredImage] | None  # in order; None: deleted from the volume, or incomplete
    build: dict[str, Any] | None = None  # jobs.device.build_fingerprint() of its worker, if it was recorded
    files: ShardFiles | None = None  # of archives that the parent links to
    all_equal: bool = False  # whether its images are all the same


class JobContext(Protocol):
    """The services of a running job. Every method may raise StopRequested or a StorageError."""

    job_id: int
    attempt: int

    def stop_reason(self) -> str | None:
        """Return a jobs.states.StopReason if the job is to stop, else None. Cheap: call it at every step."""

    def stop_step(self) -> int | None:
        """Return the step at which an earlier attempt found that the time of --stop-after had passed."""

    def pin_stop_step(self, step: int) -> None:
        """Record that step, so that each later attempt ends there, too."""

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
        Report progress. Cheap: the context limits how often reports are passed on.

        Args:
            done, total: in `unit` ('images').
            rate: images per second, measured by the job.
            phase: a step before or after the main work ('reading images').
        """

    def log(self, message: str) -> None:
        """Append a line to log.txt."""

    def metrics(self, record: Mapping[str, float | int | str | None]) -> None:
        """Append a line to metrics.jsonl."""

    def images(self, data: str, size: int, *, pin: str = "fingerprint") -> Images:
        """
        Return the data set, which is decoded once and cached on the volume by its fingerprint.

        Args:
            pin: the input under which the fingerprint is fixed, for a job that reads several data sets.
        """

    def event(self, type: str, **detail: Any) -> None:
        """Add an event to the job's history, e.g. 'rolled_back'."""

    def resume(
        self, restore: Callable[[Snapshot], None], *, whole_epoch: bool = False, step: int | None = None
    ) -> Snapshot | None:
        """
        Restore the newest valid checkpoint of this job.

        Args:
            restore: raises CheckpointCorruptError if it cannot use a checkpoint; an older one is tried then.
            whole_epoch: skip checkpoints of kind 'resume'.
            step: prefer the checkpoint of this step.

        Returns:
            The checkpoint that was restored; None if the job has none yet.

        Raises:
            CheckpointCorruptError: there are checkpoints, and none of them is valid.
            DiskFullError: there is no space for the next checkpoint.
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
        Save a checkpoint and register it with the fencing token; writing may continue after the return.

        Call wait_for_save() before the next. The tensors must not change until then.

        Args:
            kind: 'resume' (replaced by the next), 'epoch' (every save_every), 'final'.
            epoch: epochs that are complete.
            step: discriminator batches so far, the position of the run.
            state: what resuming needs (state.safetensors).
            generator: what generation needs: EMA generator and discriminator. Both on the
                CPU, in any memory layout.
            meta: JSON facts that rebuild the networks and counters; 'metric' is stored in the job table.
            sample: a grid that is drawn and written first.
        """

    def is_saving(self) -> bool:
        """Return whether a checkpoint is being written. Cheap: call it at every step."""

    def wait_for_save(self) -> None:
        """
        Wait until the last checkpoint is registered; return at once if none is being written.

        Raises:
            DiskFullError, VolumeError, StorageError: it could not be written, and was not registered.
        """

    def save_sample(self, name: str, pixels_HW3: "NDArray[np.uint8]") -> None:
        """Write a sample grid, e.g. name 'epoch-0005'."""

    def model(self) -> Snapshot:
        """Return the model of this job (generator.safetensors)."""

    def model_sha256(self) -> str:
        """Return the Snapshot.sha256 of model() without reading it."""

    def models(self) -> "Iterator[Snapshot]":
        """Return the retained checkpoints of that model, oldest first, for --grid-epochs."""

    def sample_grids(self) -> "Sequence[Sample]":
        """Return the existing sample grids of that model's training, oldest first; draw() reads a file."""

    def generated_images(self, most: int) -> "Iterator[NDArray[np.uint8]] | None":
        """
        Return at most `count` published images of the source job, evenly chosen: uint8 (H, W, 3).

        Returns:
            None if the source is a model: see model().
        """

    def save_files(self, files: "Mapping[str, bytes | NDArray[np.uint8]]") -> list[dict[str, Any]]:
        """
        Write files atomically into the attempt's folder; pixels become a PNG.

        Returns:
            name, bytes and sha256 of each, for the job's result, which publishes them.
        """

    def weights(self, path: str, *, sha256: str | None = None) -> "dict[str, Tensor]":
        """
        Read a weight file of the user (.pth or .safetensors) in a confined process.

        Raises:
            ForeignFileError: it is unsafe or malformed, or has another SHA-256.
        """

    def shards(self) -> list[Shard]:
        """Return the shards of a job that was split, in the order of sample indices; [] of any other job."""

    def image_sink(
        self,
        *,
        format: str = "png",
        quality: int | None = None,
        total: int | None = None,
        names: ImageNames = PLAIN_NAMES,
        shard: int | None = None,
        of_shards: bool = False,
    ) -> ImageSink:
        """
        Return a sink for generated images.

        Args:
            format, quality, names: as in GenerateSpec.
            total: the number of images that will be added.
            shard: the index of a shard that this attempt generates again; its files are deleted at the end.
            of_shards: the sink links to shards; it takes no images.
        """

    def scratch(self) -> Path:
        """Return the attempt's folder."""
