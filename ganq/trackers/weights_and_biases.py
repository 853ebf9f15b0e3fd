"""Export the curves and samples of trainings as offline runs of Weights & Biases."""

import json
import os
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # an offline export sends nothing; read at import
import wandb

from ganq.trackers.curves import Point, Run
from jobs.errors import ConfigError
from storage.volume.durable import make_folder, write_bytes

if TYPE_CHECKING:
    from storage.db.rows import Job

WRITTEN = "ganq-written.json"
STEP = "images_seen"
"""The x-axis. It is not wandb's own step, below which wandb drops values: a metric is measured later."""


@dataclass
class WandbRun(Run):
    """
    An offline run of one training, which `wandb sync` uploads.

    Each export adds a part of the same run: wandb cannot read its files back, so that a file beside them
    remembers what they contain.
    """

    def __post_init__(self) -> None:
        self._run: Any = None
        try:
            self.written = {(tag, images) for tag, images in json.loads((self.folder / WRITTEN).read_text())}
        except FileNotFoundError:
            if (self.folder / "wandb").exists():
                raise ConfigError(
                    f"{self.folder} has runs of wandb that ganq has not written", hint="choose another folder"
                ) from None
        except (OSError, ValueError, TypeError) as exc:
            raise ConfigError(
                f"{self.folder / WRITTEN} cannot be read: {exc}", hint="choose another folder"
            ) from exc

    def write(self, job: "Job", new: list[Point]) -> None:
        if not new:
            return
        if self._run is None:
            self._run = self._begin(job)
        for images, points in groupby(sorted(new, key=lambda one: one.images), key=lambda one: one.images):
            values = {
                one.tag: wandb.Image(str(one.value)) if isinstance(one.value, Path) else one.value
                for one in points
            }
            self._run.log({STEP: images, **values})
        self.written |= {(one.tag, one.images) for one in new}
        write_bytes(self.folder / WRITTEN, json.dumps(sorted(self.written)).encode())

    def _begin(self, job: "Job") -> Any:
        make_folder(self.folder)
        name = job.name or f"{job.kind}-{job.id}"
        run = wandb.init(
            mode="offline",
            dir=str(self.folder),
            project="ganq",
            name=name,
            id=f"job-{job.id}-{int(job.created_at)}",
            resume="allow",
            config={"job": job.id, **job.spec},
            settings=wandb.Settings(
                silent=True, console="off", x_disable_meta=True, x_disable_stats=True, disable_git=True
            ),
        )
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        return run

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
