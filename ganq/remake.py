"""Make a generated image again from the passport in its PNG, and compare both."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ganq.session import Session
from jobs.errors import CheckpointNotFoundError, NotFoundError, SpecError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from storage.db.rows import Checkpoint

MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Remade:
    """
    An image that was made again.

    Args:
        data: the PNG.
        same_bytes: whether it has the bytes of the file.
        same_pixels: whether it has the pixels of the file.
        differences: which facts differ, if the bytes do.
    """

    data: bytes
    passport: dict[str, Any]
    checkpoint: "Checkpoint"
    same_bytes: bool
    same_pixels: bool
    differences: list[str] = field(default_factory=list)


def remake(session: Session, path: Path, source: str | None = None) -> Remade:
    """
    Generate the image of a PNG again, in this process.

    Args:
        source: id or name of the job whose best checkpoint is taken; None: the checkpoint of the passport.

    Raises:
        NotFoundError: there is no such file.
        SpecError: it has no passport, or not a valid one.
        CheckpointNotFoundError: the job table does not know the checkpoint.
        CheckpointCorruptError: its files are missing or damaged.
    """
    from storage.results.passport import read_passport

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES)
    except OSError as exc:
        raise NotFoundError(f"{path} cannot be read: {(exc.strerror or '').lower()}") from exc
    passport = read_passport(data, str(path))
    if source is None:
        checkpoint = _checkpoint(session, passport["checkpoint"])
    else:
        checkpoint = session.queries.choose_checkpoint(session.queries.find(source).id, "best")
    remade, pixels, build = _generate(session, checkpoint, passport)
    shown = _decoded(data, path)
    same_pixels = shown.shape == pixels.shape and bool((shown == pixels).all())
    differences = [] if data == remade else _differences(passport, checkpoint, shown, pixels, build)
    return Remade(remade, passport, checkpoint, data == remade, same_pixels, differences)


def _checkpoint(session: Session, sha256: str) -> "Checkpoint":
    found = session.queries.checkpoint_of(sha256)
    if found is None:
        raise CheckpointNotFoundError(
            f"no checkpoint of this job table has the SHA-256 {sha256[:12]}…: another installation made the "
            "image, or the checkpoint was deleted",
            hint="run it there, or name a job with the same weights: ganq remake FILE --from JOB",
        )
    return found


def _generate(
    session: Session, checkpoint: "Checkpoint", passport: dict[str, Any]
) -> "tuple[bytes, NDArray[np.uint8], dict[str, Any]]":
    """Return the PNG, its pixels, and the build that made them."""
    import torch

    from ganq.generator import generate
    from jobs import device as devices
    from jobs.specs import GenerateSpec
    from storage.results.codecs import encode_png
    from storage.results.passport import with_passport
    from storage.volume.checkpoints import read_checkpoint

    volume = session.generator_volume(checkpoint)
    made_by = passport["build"]
    wanted = "cuda" if made_by.get("cuda") and torch.cuda.is_available() else "cpu"
    spec = GenerateSpec.of_image(passport["spec"], passport["index"], device=wanted)
    snapshot = read_checkpoint(volume, checkpoint, "generator")
    threads, as_then = torch.get_num_threads(), made_by.get("threads")
    try:
        if type(as_then) is int and 1 <= as_then <= 1024:
            torch.set_num_threads(as_then)  # the last bit may depend on their number
        (pixels,) = generate(snapshot, spec)
        build = devices.build_fingerprint(devices.choose(wanted), deterministic=spec.deterministic)
    finally:
        torch.set_num_threads(threads)
    facts = {"checkpoint": snapshot.sha256, "spec": spec.choice(), "build": build, "index": passport["index"]}
    return with_passport(encode_png(pixels), facts, pixels), pixels, build


def _decoded(data: bytes, path: Path) -> "NDArray[np.uint8]":
    from storage.results.codecs import decode

    try:
        return decode(data)
    except Exception as exc:  # Pillow raises nearly anything on damaged data
        raise SpecError(f"the pixels of {path} are damaged", hint="take the file that the job wrote") from exc


def _differences(
    passport: dict[str, Any],
    checkpoint: "Checkpoint",
    shown: "NDArray[np.uint8]",
    pixels: "NDArray[np.uint8]",
    build: dict[str, Any],
) -> list[str]:
    """Return which facts differ between a file and the image that was made again."""
    from jobs import device as devices
    from storage.results.passport import digest

    found: list[str] = []
    if digest(shown) != passport["pixels"]:
        found.append(
            f"the pixels were changed after the image was generated{_pixel_difference(shown, pixels)}"
        )
    if digest(pixels) != passport["pixels"]:
        builds = devices.differences(cast("dict[str, Any]", passport["build"]), build)
        if checkpoint.manifest_sha256 != passport["checkpoint"]:
            found.append(f"the checkpoint is another one (job {checkpoint.job_id}, epoch {checkpoint.epoch})")
        if builds:
            found.append(f"it was generated by another build: {', '.join(builds)}")
        if not found:
            found.append("index, seed or options in the passport are not those that the image was made with")
    elif not found:
        found.append("the pixels are equal; another program, or another build of ganq, has saved the file")
    return found


def _pixel_difference(shown: "NDArray[np.uint8]", pixels: "NDArray[np.uint8]") -> str:
    if shown.shape != pixels.shape:
        sizes = (f"{one.shape[1]}×{one.shape[0]}" for one in (shown, pixels))
        return ": {} pixels, generated were {}".format(*sizes)
    apart = abs(shown.astype(int) - pixels.astype(int))
    return (
        f": {int((apart.max(2) > 0).sum()):,} of {apart[..., 0].size:,}, by at most {int(apart.max())} of 255"
    )
