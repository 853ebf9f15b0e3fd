"""A job: its state, its files, and requests for it."""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from ganq.copies import copy_pending, download
from ganq.notices import report
from ganq.polling import poll_delay_s
from jobs.errors import DatabaseUnavailableError, JobError, NotFoundError, error_of

if TYPE_CHECKING:
    from ganq.client import Client
    from ganq.generator import Generator
    from ganq.images import Image
    from jobs.errors import GanqError
    from storage.db.queries import Queries
    from storage.db.rows import Checkpoint, Event
    from storage.db.rows import Job as JobRow

Reference = Union["Job", int, str, "PathLike[str]"]
"""A job, its id or its name; of an evaluation also the path of images."""


class JobAttributes:
    """What a job is, as of the last read of its row."""

    _client: object
    _row: "JobRow"

    def __repr__(self) -> str:
        name = f" ({self.name})" if self.name else ""
        return f"<ganq.{type(self).__name__} {self.id}{name}: {self.kind}, {self.state}>"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and (self._client, self.id) == (other._client, other.id)

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def id(self) -> int:
        """Number of the job."""
        return self._row.id

    @property
    def name(self) -> str | None:
        """Name that was given at submission; a name refers to its newest job."""
        return self._row.name

    @property
    def kind(self) -> str:
        """'train', 'generate', 'evaluate' or 'import'."""
        return self._row.kind

    @property
    def user(self) -> str:
        """User who submitted the job."""
        return self._row.user

    @property
    def queue(self) -> str:
        """Queue of the job."""
        return self._row.queue

    @property
    def priority(self) -> int:
        """Own priority of the job, as set() changes it."""
        return self._row.own_priority

    @property
    def attempt(self) -> int:
        """Number of the newest attempt; 0: none has started."""
        return self._row.attempt

    @property
    def created_at(self) -> float:
        """Time of the submission, in seconds since 1970."""
        return self._row.created_at

    @property
    def started_at(self) -> float | None:
        """Time at which the newest attempt started, in seconds since 1970; None: none has."""
        return self._row.started_at

    @property
    def finished_at(self) -> float | None:
        """Time at which the job ended, in seconds since 1970; None: it has not."""
        return self._row.finished_at

    @property
    def state(self) -> str:
        """'queued', 'running', 'succeeded', 'failed' or 'cancelled'."""
        return str(self._row.state)

    @property
    def spec(self) -> dict[str, Any]:
        """All options of the job."""
        return dict(self._row.spec)

    @property
    def note(self) -> str | None:
        """Text that a user has given the job."""
        return self._row.note

    @property
    def result(self) -> dict[str, Any] | None:
        """Facts about the result of a job that has succeeded, e.g. metrics of an evaluation."""
        return self._row.result

    @property
    def error(self) -> "GanqError | None":
        """The error of a failed job."""
        return error_of_row(self._row)

    def check(self) -> None:
        """
        Raise the error of a job that has failed or was cancelled.

        Raises:
            GanqError: of the class of its error code; JobError for a cancelled job.
        """
        require_success(self._row)


class Job(JobAttributes):
    """One job. Its attributes are as of the last read; refresh(), wait() and the requests read it again."""

    def __init__(self, client: "Client", row: "JobRow") -> None:
        self._client: Client = client
        self._row = row

    # --- what it is ---------------------------------------------------------------------------

    @property
    def labels(self) -> dict[str, str]:
        """Labels that a user has given the job; reads the table."""
        return self._queries.labels_of([self.id]).get(self.id, {})

    @property
    def progress(self) -> dict[str, Any]:
        """Progress as of the last heartbeat: `done`, `total`, `unit`, `rate`, of a training `epoch`."""
        from storage.status.job_text import progress_facts

        return progress_facts(self._row)

    @property
    def status(self) -> str:
        """The state with its reason, e.g. 'waiting on 12' or 'retry in 9 s'; reads the job table."""
        from storage.status import job_text

        self.refresh()
        context = job_text.StatusContext.of(self._queries, [self._row])
        return job_text.state(job_text.as_one(self._row, context), context)

    def refresh(self) -> "Job":
        """
        Read the job again.

        Raises:
            DatabaseUnavailableError: the job table cannot be reached.
        """
        self._row = self._queries.get(self.id)
        return self

    def wait(self, timeout: float | None = None, *, check: bool = True) -> "Job":
        """
        Wait until the job has ended, also while the job table is unavailable.

        Args:
            timeout: in seconds; None: no timeout.
            check: raise the error of a job that did not succeed.

        Raises:
            TimeoutError: it has not ended in time; it continues.
            GanqError: it has failed or was cancelled; the class is that of its error code.
        """
        wait_for([self], timeout)
        if check:
            self.check()
        return self

    def events(self) -> "list[Event]":
        """Return the history of the job, oldest event first."""
        return self._queries.events(self.id)

    def logs(self, *, follow: bool = False, all_attempts: bool = False) -> Iterator[str]:
        """
        Yield the lines of the log.

        Args:
            follow: wait for new lines until the job has ended.
            all_attempts: include the attempts before the newest.

        Raises:
            VolumeError: the volume is not available.
        """
        from ganq.logs import log_lines

        return log_lines(self._client.session, self.id, follow=follow, everything=all_attempts)

    # --- its files ----------------------------------------------------------------------------

    def images(self) -> "Iterator[Image]":
        """
        Yield the images of a generation that has succeeded, in order; each is read when it is used.

        Raises:
            NotFoundError: the job has no published images.
            StorageError: the volume or the list of images cannot be read.
        """
        from ganq.images import images_of

        row = self.refresh()._row
        if self._client.session.remote:
            return self._client.session.images(row)
        return images_of(self._client.volume_of(row), row)

    @property
    def checkpoints(self) -> "list[Checkpoint]":
        """The checkpoints, oldest first: `epoch`, `step`, `metric`, `path` on the volume; reads the table."""
        return self._queries.checkpoints(self.id)

    def generator(self, checkpoint: str | int = "best", *, device: str = "auto") -> "Generator":
        """
        Load the generator of a training or an import into this process, without a queue.

        Args:
            checkpoint: 'best', 'last' or an epoch.
            device: 'auto', 'cpu' or 'cuda'.

        Raises:
            NotFoundError: the job has no such checkpoint, or no generator.
            CheckpointCorruptError: its files differ from what was registered.
        """
        from jobs.kinds import kind_named
        from jobs.specs.base import check_checkpoint

        if not kind_named(self.kind).makes_model:
            source = self._row.spec.get("source")
            raise NotFoundError(
                f"job {self.id} is of kind {self.kind} and has no generator",
                hint=f"job {source} is its model" if source is not None else None,
            )
        chosen = self._queries.choose_checkpoint(self.id, check_checkpoint(str(checkpoint)))
        from ganq.generator import load

        return load(self._client.session.generator_volume(chosen), chosen, device)

    def download(self, out: "str | PathLike[str]", *, only: str | None = None) -> Path:
        """
        Copy the images to a folder, completely or not at all.

        Args:
            only: 'images', 'grids' or 'best', from a server; None: all.

        Returns:
            The folder, or with 'best' the file.

        Raises:
            NotFoundError: the job has no images.
            StorageError: they cannot be copied.
        """
        return download(self._client.session, self.refresh()._row, Path(out), only)

    # --- requests -----------------------------------------------------------------------------

    def cancel(self) -> "Job":
        """
        Cancel the job: a queued one at once, a running one at its next step.

        Raises:
            InvalidTransitionError: it has ended.
        """
        session = self._client.session
        return self._now(session.store.request_cancel(self.id, by=session.settings.user))

    def pause(self, *, reason: str | None = None, wait: float | None = None) -> "Job":
        """
        Stop the running job with its work saved and hold it until resume(); a queued one is held.

        Args:
            reason: text for the history of the job.
            wait: seconds to wait until its worker has stopped it; None: return at once.

        Raises:
            InvalidTransitionError: it has ended.
            TimeoutError: its worker has not stopped it in time; the request stays.
        """
        session = self._client.session
        self._now(session.store.pause(self.id, by=session.settings.user, reason=reason))
        if wait is not None:
            stopped, _ = wait_until_stopped(session.queries, [self.id], wait)
            if not stopped:
                raise TimeoutError(f"job {self.id} has not stopped within {wait:g} s; the request stays")
            self._now(stopped[0])
        return self

    def resume(self) -> "Job":
        """
        Continue the paused job, or let the held one start: the same as release().

        Raises:
            InvalidTransitionError: it is neither queued nor being paused.
        """
        return self.release()

    def hold(self) -> "Job":
        """
        Prevent the queued job from starting until release().

        Raises:
            InvalidTransitionError: it is not queued.
        """
        session = self._client.session
        return self._now(session.store.hold(self.id, held=True, by=session.settings.user))

    def release(self) -> "Job":
        """
        Allow the held or paused job to start.

        Raises:
            InvalidTransitionError: it is neither queued nor being paused.
        """
        from ganq.submission.accept import notify_workers

        session = self._client.session
        now = session.store.hold(self.id, held=False, by=session.settings.user)
        if str(now.state) == "queued":
            report(notify_workers(session, now))
        return self._now(now)

    def set(
        self,
        *,
        priority: int | None = None,
        name: str | None = None,
        note: str | None = None,
        labels: Mapping[str, str | None] | None = None,
    ) -> "Job":
        """
        Change the priority or the name of the queued or running job, or the note and labels of any.

        Args:
            note: '' removes it.
            labels: are added to those that the job has; None or '' removes one.

        Raises:
            SpecError: the name or a label is not valid.
            InvalidTransitionError: it has ended.
        """
        from jobs.labels import check_label

        store = self._client.session.store
        changes = {key: value or None for key, value in (labels or {}).items()}
        for key, value in changes.items():
            check_label(key, value or "")
        if name is not None:
            from jobs.specs import check_name

            self._now(store.rename(self.id, check_name(name)))
        if priority is not None:
            self._now(store.set_priority(self.id, priority))
        if changes:
            self._now(store.set_labels(self.id, changes))
        if note is not None:
            self._now(store.set_note(self.id, note))
        return self

    def move(self, *, before: Reference) -> "Job":
        """
        Move the queued job before another one of the same user and queue; it gets its priority if lower.

        Raises:
            InvalidTransitionError: one of them is not queued.
            SpecError: they are of different users or queues.
        """
        other = self._client.job(before)
        return self._now(self._client.session.store.move_before(self.id, other.id))

    def keep(self, *, undo: bool = False) -> "Job":
        """
        Protect the results from `ganq gc` and `ganq rm`.

        Args:
            undo: let them be deleted again.
        """
        return self._now(self._client.session.store.keep(self.id, kept=not undo))

    def retry(self, *, with_waiting: bool = False) -> "Job":
        """
        Submit the ended job again.

        Args:
            with_waiting: also the jobs that waited on it and ended with it.

        Returns:
            The new job.

        Raises:
            InvalidTransitionError: it has not ended.
        """
        from ganq.submission.retry import resubmit

        first: Job | None = None
        for again in resubmit(self._client.session, self.refresh()._row, with_waiting=with_waiting):
            report(again.notices)
            first = first or Job(self._client, again.new)
        assert first is not None
        return first

    # ------------------------------------------------------------------------------------------

    @property
    def _queries(self) -> "Queries":
        return self._client.session.queries

    def _now(self, row: "JobRow") -> "Job":
        self._row = row
        return self


def error_of_row(row: "JobRow") -> "GanqError | None":
    """Return the error of a failed job."""
    if row.error_code is None:
        return None
    return error_of(row.error_code, row.error_message or row.error_code, row.error_hint)


def require_success(row: "JobRow") -> None:
    """
    Raise the job's error if it has not succeeded.

    Raises:
        GanqError: the job has failed or was cancelled.
    """
    if str(row.state) == "cancelled":
        reason = f": {row.error_message}" if row.error_message else ""
        raise JobError(f"job {row.id} was cancelled{reason}", hint=f"ganq retry {row.id}")
    if str(row.state) == "failed":
        raise error_of_row(row) or JobError(f"job {row.id} has failed", hint=f"ganq status {row.id}")


def wait_for(jobs: Sequence[Job], timeout: float | None = None) -> None:
    """
    Wait until all jobs have ended, and copy results that their workers could not copy to `out`.

    Raises:
        TimeoutError: they have not ended in time.
    """
    started = time.monotonic()
    left = [job for job in jobs if not job._row.state.terminal]
    while left:
        polled = time.monotonic()
        try:
            rows = {row.id: row for row in left[0]._queries.get_many([job.id for job in left])}
            for job in left:
                job._row = rows.get(job.id, job._row)
            left = [job for job in left if not job._row.state.terminal]
        except DatabaseUnavailableError:
            pass  # it waits for the database as a command does
        now = time.monotonic()
        if left and timeout is not None and now - started >= timeout:
            ids = ", ".join(str(job.id) for job in left[:10])
            raise TimeoutError(f"not ended within {timeout:g} s: job {ids}; it continues")
        if left:
            pause = poll_delay_s(now - started, query_s=now - polled)
            time.sleep(pause if timeout is None else min(pause, max(0.0, started + timeout - now)))
    for job in jobs:
        if (reason := copy_pending(job._client.session, job._row)) is not None:
            warnings.warn(reason, stacklevel=2)


def wait_until_stopped(
    queries: "Queries", ids: Sequence[int], timeout: float | None = None
) -> "tuple[list[JobRow], list[JobRow]]":
    """
    Wait until none of the jobs is running, also while the job table is unavailable.

    Returns:
        (jobs that no worker has, jobs that were still running when the timeout, in seconds, expired).
    """
    from storage.status.job_text import StatusContext, as_one

    started = time.monotonic()
    while True:
        polled = time.monotonic()
        running: list[JobRow] = []
        stopped: list[JobRow] = []
        with suppress(DatabaseUnavailableError):
            rows = sorted(queries.get_many(ids), key=lambda row: row.id)
            context = StatusContext.of(queries, rows)
            for row in rows:
                (running if str(as_one(row, context).state) == "running" else stopped).append(row)
            if not running:
                return stopped, []
        now = time.monotonic()
        if timeout is not None and now - started >= timeout:
            return stopped, running
        time.sleep(poll_delay_s(now - started, query_s=now - polled))
