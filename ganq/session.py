"""Settings and job table, for the client and for the command line."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jobs.errors import JobNotFoundError
from storage.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.quotas import Quotas
    from storage.db.rows import Checkpoint, Job
    from storage.db.store import JobStore
    from storage.volume.layout import Volume


@dataclass(frozen=True)
class Session:
    """Settings, database and volume of a client or a command; modules are imported on first use."""

    settings: Settings
    database: "Database"
    queries: "Queries"
    way: str = "python"
    """How changes are asked for, for the events of the jobs: 'cli', 'python' or 'api'."""
    remote: ClassVar[bool] = False
    """Whether the job table is that of a server: ganq/remote/."""

    @property
    def store(self) -> "JobStore":
        from storage.db.engine import Requester
        from storage.db.store import JobStore

        return JobStore(self.database, Requester(self.settings.user, self.way))

    @property
    def quotas(self) -> "Quotas":
        from storage.db.quotas import Quotas

        return Quotas(self.database)

    @property
    def volume(self) -> "Volume":
        """
        Return the shared volume.

        Raises:
            VolumeError: it does not answer; a file access would block for ever.
        """
        from storage.reachable import require_answer
        from storage.volume.layout import Volume

        require_answer(self.settings.volume)
        return Volume(self.settings.volume)

    def volume_of(self, job: "Job") -> "Volume":
        """
        Return the shared volume with the files of a job that has started.

        Raises:
            VolumeError: it does not answer, or this machine does not see it.
        """
        from jobs.errors import VolumeError

        volume = self.volume
        if job.attempt and not volume.jobs.is_dir():
            raise VolumeError(
                f"this machine does not see the volume at {volume.root}",
                hint=f"mount it, or set GANQ_VOLUME to the folder that the worker of job {job.id} uses",
            )
        return volume

    def request_drain(self, names: Sequence[str]) -> None:
        """Ask workers to return their jobs and exit."""
        from storage.db.workers import WorkerStore

        WorkerStore.request_drain(self.database, names)

    # --- of a server; see ganq/remote/session.py ----------------------------------------------

    def take_notices(self) -> list[str]:
        """Return the notices of the last request once."""
        raise NotImplementedError

    def accept_job(self, asked: Any, request: Any, after: Sequence[int]) -> Any:
        """Submit a request that the server resolves."""
        raise NotImplementedError

    def accept_sweep(
        self, asked: Any, request: Any, changes: Sequence[dict[str, Any]], after: Sequence[int]
    ) -> Any:
        """Submit a sweep that the server resolves."""
        raise NotImplementedError

    def planned(self, planned: "Mapping[str, Sequence[Job]]") -> "Queries":
        """Return the queries with jobs that are not submitted yet; see ganq/submission/planned.py."""
        raise NotImplementedError

    def submit_file(self, jobs: Sequence[Any]) -> Any:
        """Submit the jobs of a job file that the server resolves."""
        raise NotImplementedError

    def resubmit(self, job: "Job", *, with_waiting: bool) -> Iterator[Any]:
        """Submit an ended job again."""
        raise NotImplementedError

    def log_lines(self, job_id: int, attempt: int, *, last: int | None, follow: bool) -> Iterator[str]:
        """Yield the lines of the log of an attempt."""
        raise NotImplementedError

    def images(self, job: "Job") -> Iterator[Any]:
        """Yield the images of a generation."""
        raise NotImplementedError

    def generator_volume(self, chosen: "Checkpoint") -> "Volume":
        """
        Return the volume that has the generator of a checkpoint, or a folder that is laid out like one.

        Raises:
            VolumeError: it does not answer, or this machine does not see it.
        """
        return self.volume_of(self.queries.get(chosen.job_id))

    def link_of(self, job: "Job | None") -> str:
        """Return the address of a job's page, or of the queue's."""
        raise NotImplementedError

    def record_volume(self, job: "Job") -> "Volume":
        """
        Return the volume with the metrics and samples of a training, or a folder that is laid out like one.

        Raises:
            VolumeError: it does not answer, or this machine does not see it.
        """
        return self.volume_of(job)

    def report(self, job: "Job") -> bytes:
        """Return the page of a job as one HTML file."""
        raise NotImplementedError

    def download(self, job: "Job", out: "Path", only: str | None) -> "Path":
        """Copy the result of a generation to a folder."""
        raise NotImplementedError


class NoJobsYetError(JobNotFoundError):
    """There is no job table yet."""
