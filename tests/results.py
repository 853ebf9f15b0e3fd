"""Models without a training, and what a finished generation job left on the volume."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jobs.errors import StorageError
from storage.db.engine import Database
from storage.db.store import JobStore
from storage.results.formats import MANIFEST, pixels_of
from storage.results.reader import manifest_lines, names_of_result, read_manifest, verify_lines
from storage.settings import Settings
from storage.volume.durable import sha256_file
from storage.volume.layout import Volume

SIZE, NZ = 16, 8


def add_model(settings: Settings, name: str = "m", *, ngf: int = 4, seed: int = 1) -> int:
    """
    Record networks that nobody trained as an imported job: images of noise, but reproducible ones.

    Returns:
        The job's id.
    """
    from jobs.networks.dcgan import Architecture
    from jobs.networks.weights import join
    from storage.volume.checkpoints import write_checkpoint

    volume = Volume(settings.volume)
    volume.ensure()
    arch = Architecture(size=SIZE, nz=NZ, ngf=ngf, ndf=4)
    netg, netd = arch.build_generator(seed), arch.build_discriminator(seed + 1)
    tensors = {key: one.clone() for key, one in join(netg.state_dict(), netd.state_dict()).items()}
    meta = {"arch": arch.to_json(), "recipe": "import", "epoch": 0, "step": 0, "kind": "import"}

    def files(job_id: int) -> tuple[str, str, int, int]:
        target = volume.checkpoints(job_id, 1) / "import"
        digest, size = write_checkpoint(target, generator=tensors, meta=meta)
        return volume.relative(target), digest, size, 0

    database = Database(settings)
    try:
        store = JobStore(database)
        sides = {key: arch.to_json()[key] for key in ("size", "nz")}
        job = store.add_finished(
            kind="import",
            spec={"netg": "/nowhere", "netd": "/nowhere", **sides, "ngf": ngf, "ndf": 4},
            spec_version=1,
            user="t",
            name=name,
            files=files,
        )
    finally:
        database.dispose()
    return job.id


def attempt_folder(volume: Path, job: dict[str, Any]) -> Path:
    """Where a finished job's row points, from `ganq status --json`."""
    return Volume(volume).attempt(job["id"], job["attempt"])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def verify_manifest(folder: Path, *, manifest_sha256: str | None = None) -> int:
    """
    Check a published result: each image exists, is complete and can be decoded, and there are no others.

    Returns:
        The number of images.
    """
    try:
        digest = sha256_file(folder / MANIFEST)
        if manifest_sha256 not in (None, digest):
            raise StorageError(f"{folder / MANIFEST} has changed since it was published")
        count = verify_lines(folder, manifest_lines(folder))
        for made in read_manifest(folder, digest):
            pixels_of(made)
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as exc:
        raise StorageError(f"{folder / MANIFEST} or an image that it names is broken: {exc}") from exc
    return count


def verify_files(folder: Path, files: Iterable[Mapping[str, Any]]) -> None:
    """Check the files that a result lists."""
    for one in files:
        path = folder / one["name"]
        if not path.is_file() or path.stat().st_size != one["bytes"] or sha256_file(path) != one["sha256"]:
            raise StorageError(f"{path} is missing or has changed since it was published")


def result_files(folder: Path) -> dict[str, bytes]:
    """Every byte of a published result: images or archives, grids, manifest."""
    found: dict[str, bytes] = {}
    for name in names_of_result(folder):
        path = folder / name
        files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
        found |= {one.relative_to(folder).as_posix(): one.read_bytes() for one in files}
    return found
