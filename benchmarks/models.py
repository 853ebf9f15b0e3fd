"""A trained generator for the benchmarks of generation."""

from pathlib import Path

from benchmarks import stack
from benchmarks.in_process import Pointer
from jobs.kinds import SPEC_VERSION
from jobs.specs import TrainSpec
from storage.db.rows import Job
from storage.volume.checkpoints import read_checkpoint, write_checkpoint
from storage.volume.layout import Volume


def trained(work: Path, queue: stack.Queue, ngf: int) -> Job:
    """Train two epochs of faces at 96×96, so that images compress unlike noise."""
    small = {"size": 96, "ngf": ngf, "ndf": 16, "epochs": 2, "save_every": 2, "device": "cpu"}
    spec = TrainSpec.create(data=str(stack.faces(work)), recipe="sngan", **small)
    return queue.wait(queue.submit(spec))


def copied(model: Job, source: stack.Queue, target: stack.Queue) -> Job:
    """Copy the generator into another queue, as an import does."""
    volume = Volume(target.settings.volume)
    pointer = Pointer(**source.pointer(model))
    snapshot = read_checkpoint(Volume(source.settings.volume), pointer, "generator")

    def files(job_id: int) -> tuple[str, str, int, int]:
        folder = volume.checkpoints(job_id, 1) / "import"
        digest, size = write_checkpoint(folder, generator=snapshot.tensors, meta=snapshot.meta)
        return volume.relative(folder), digest, size, 0

    return target.store.add_finished(
        kind="import",
        spec={"netg": "/nowhere", "netd": None, "size": 96, "nz": 100, "ngf": 32, "ndf": 16},
        spec_version=SPEC_VERSION,
        user="benchmark",
        name="copied",
        files=files,
    )
