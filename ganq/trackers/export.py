"""Find the programs of --to, and write or follow the runs of trainings for them."""

import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ganq.session import Session
from ganq.trackers.curves import Run
from jobs.errors import ConfigError, SpecError

if TYPE_CHECKING:
    from storage.db.rows import Job

FOLLOW_S = 1.0
TRACKERS = {
    "tensorboard": ("TensorBoard", "ganq.trackers.tensorboard", "TensorboardRun"),
    "wandb": ("wandb", "ganq.trackers.weights_and_biases", "WandbRun"),
    "trackio": ("trackio", "ganq.trackers.trackio", "TrackioRun"),
}
"""Name, module and class of each tracker; a module is imported when it is used."""


def follow(
    session: Session, jobs: "Sequence[Job]", folder: Path, tracker: str, *, until_end: bool
) -> Iterator[int]:
    """
    Write the runs below `folder`, one folder for each job; yield how many values each pass has added.

    A step is the number of images that were seen. No tag gets a step twice: what earlier exports have
    written into the folder is left out, and so is what a resumed attempt computes again.

    Args:
        tracker: one of TRACKERS.
        until_end: continue until all jobs have ended.

    Raises:
        SpecError: a job is no training.
        ConfigError: the tracker is not installed, or what is in the folder cannot be read.
        StorageError: the folder cannot be written.
    """
    for job in jobs:
        if job.kind != "train":
            raise SpecError(
                f"job {job.id} is of kind {job.kind} and has no curves", hint="give jobs of kind train"
            )
    name, module, made_by = TRACKERS[tracker]
    try:
        run_of = getattr(import_module(module), made_by)
        runs: list[Run] = [run_of(job.id, folder / f"{job.name or job.kind}-{job.id}") for job in jobs]
    except ImportError as exc:
        raise ConfigError(f"{name} cannot be imported: {exc}", hint=f"pip install 'ganq[{tracker}]'") from exc
    try:
        while True:
            rows = session.queries.get_many([job.id for job in jobs])
            by_id = sorted(runs, key=lambda run: run.job_id)
            yield sum(run.add(row, session.record_volume(row)) for run, row in zip(by_id, rows, strict=True))
            if not until_end or all(row.state.terminal for row in rows):
                return
            time.sleep(FOLLOW_S)
    finally:
        for run in runs:
            run.close()
