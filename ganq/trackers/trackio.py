"""Export the curves and samples of trainings as local runs of trackio."""

import os
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ganq.trackers.curves import Point, Run
from jobs.errors import ConfigError
from storage.volume.durable import make_folder

if TYPE_CHECKING:
    from storage.db.rows import Job

PROJECT = "ganq"
FOLDER = "TRACKIO_DIR"
"""Variable with the folder of all runs; trackio reads it when it is imported."""


@dataclass
class TrackioRun(Run):
    """The run of one training; `trackio show` serves all runs of the folder above."""

    def __post_init__(self) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an export sends nothing
        os.environ[FOLDER] = str(self.folder.parent)
        from trackio import utils
        from trackio.sqlite_storage import SQLiteStorage

        self._run: Any = None
        if Path(utils.TRACKIO_DIR) != self.folder.parent:
            raise ConfigError(
                f"trackio writes to {utils.TRACKIO_DIR} in this process, not to {self.folder.parent}",
                hint="export to one folder in each process",
            )
        try:
            logs = SQLiteStorage.get_logs(PROJECT, self.folder.name)
        except Exception as exc:  # SQLite's errors, and trackio's own
            raise ConfigError(
                f"{self.folder.parent} holds runs that trackio cannot read: {exc}",
                hint="choose another folder",
            ) from exc
        self.written = {
            (tag, line["step"]) for line in logs for tag in line if tag not in ("step", "timestamp")
        }

    def write(self, job: "Job", new: list[Point]) -> None:
        from trackio import Image

        if not new:
            return
        if self._run is None:
            self._run = self._begin(job)
        for images, points in groupby(sorted(new, key=lambda one: one.images), key=lambda one: one.images):
            values = {
                one.tag: Image(str(one.value)) if isinstance(one.value, Path) else one.value for one in points
            }
            self._run.log(values, step=images)

    def _begin(self, job: "Job") -> Any:
        from trackio.run import Run as Log

        make_folder(self.folder.parent)
        return Log(
            url=None,
            client=None,
            project=PROJECT,
            name=self.folder.name,
            run_id=f"job-{job.id}-{int(job.created_at)}",
            config={"job": job.id, **job.spec},
        )

    def close(self) -> None:
        if self._run is not None:
            with redirect_stdout(None):  # "please wait…"
                self._run.finish()
