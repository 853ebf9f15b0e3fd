"""Published images of a generation, read one by one."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jobs.errors import NotFoundError, StorageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image as PILImage

    from jobs.context import StoredImage
    from storage.db.rows import Job
    from storage.volume.layout import Volume


@dataclass(frozen=True)
class Image:
    """One published image. Its pixels are read from the volume when they are asked for."""

    index: int
    """Place in the result; names the file."""
    seed: int
    sample_index: int
    """Number of the latent: the image depends on (checkpoint, seed, sample index) alone."""
    score: float | None
    """Score of the discriminator, if the job computed one."""
    sha256: str
    """Of the bytes that to_bytes() returns."""
    class_name: str | None = None
    """Class, of a class-conditional model."""
    record: dict[str, Any] = field(default_factory=dict, repr=False)
    """The whole line of the manifest."""
    _made: "StoredImage | None" = field(default=None, repr=False, compare=False)

    def to_bytes(self) -> bytes:
        """
        Return the bytes of the file, or of the archive's member; of an npz the raw pixels.

        Raises:
            StorageError: they are missing, or differ from the manifest.
        """
        from storage.results.formats import bytes_of

        assert self._made is not None
        try:
            data = bytes_of(self._made)
        except OSError as exc:
            raise StorageError(f"{self._made.path} cannot be read: {exc.strerror}") from exc
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise StorageError(f"{self._made.path} has changed since it was published")
        return data

    def to_numpy(self) -> "NDArray[np.uint8]":
        """
        Return the pixels: uint8, shape (height, width, 3).

        Raises:
            StorageError: see to_bytes().
        """
        import numpy as np

        from storage.results.codecs import decode

        data = self.to_bytes()
        if (shape := self.record.get("shape")) is not None:
            return np.frombuffer(data, np.uint8).reshape(shape)
        return decode(data)

    def to_pil(self) -> "PILImage":
        """
        Return the image as a PIL image, mode RGB.

        Raises:
            StorageError: see to_bytes().
        """
        from PIL.Image import fromarray

        return fromarray(self.to_numpy())


def images_of(volume: "Volume", job: "Job") -> Iterator[Image]:
    """
    Yield the published images of a generation.

    Raises:
        NotFoundError: the job has none.
        StorageError: the manifest cannot be read, or differs from the registered one.
    """
    result = job.result or {}
    sha256 = result.get("manifest_sha256")
    if "deleted_at" in result:
        raise NotFoundError(
            f"the images of job {job.id} were deleted", hint=f"ganq retry {job.id} generates them again"
        )
    if not isinstance(sha256, str):
        reason = f"it is {job.state}" if job.kind == "generate" else f"it is of kind {job.kind}"
        raise NotFoundError(
            f"job {job.id} has no published images: {reason}",
            hint="images exist when a generation has succeeded",
        )
    return _read(volume, job, sha256)


def _read(volume: "Volume", job: "Job", sha256: str) -> Iterator[Image]:
    from storage.results.reader import read_manifest

    folder = volume.attempt(job.id, job.attempt)
    for index, made in enumerate(read_manifest(folder, sha256)):
        record = made.record
        yield Image(
            index=index,
            seed=record["seed"],
            sample_index=record["draw"],
            score=record.get("score"),
            sha256=record["sha256"],
            class_name=record.get("class"),
            record=dict(record),
            _made=made,
        )
