"""Models without a training, and what a finished generation job left on the volume."""

import json
from pathlib import Path
from typing import Any

from storage.db.engine import Database
from storage.db.store import JobStore
from storage.results.reader import names_of_result
from storage.settings import Settings
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


def result_files(folder: Path) -> dict[str, bytes]:
    """Every byte of a published result: images or archives, grids, manifest."""
    found: dict[str, bytes] = {}
    for name in names_of_result(folder):
        path = folder / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        found |= {one.relative_to(folder).as_posix(): one.read_bytes() for one in files}
    return found
