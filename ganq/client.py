"""The client: submit jobs, and find them."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ganq.job import Job, Reference
from ganq.notices import report
from ganq.opening import open_session
from ganq.references import reference_text
from ganq.session import Session
from jobs.errors import SpecError
from storage.settings import Settings

if TYPE_CHECKING:
    from os import PathLike
    from types import TracebackType
    from typing import Self

    from jobs.specs import Spec
    from storage.db.rows import Job as JobRow
    from storage.volume.layout import Volume


def connect(where: "Settings | str | None" = None, *, token: str | None = None) -> "Client":
    """
    Return a client of the job table that `ganq` uses, or of a server.

    Nothing is opened yet: the job table is opened by the first call that needs it.

    Args:
        where: settings, or the URL of a server ('https://ganq.lab.example'); None: from GANQ_* and ganq.toml,
            as the command line reads them.
        token: for the server; None: that of GANQ_API_TOKEN_FILE.

    Raises:
        ConfigError: a setting is invalid.
    """
    return Client(settings_of(where, token))


def settings_of(where: "Settings | str | None", token: str | None) -> Settings:
    """Return the settings of connect() and aconnect()."""
    if isinstance(where, Settings):
        return where
    settings = Settings.load()
    if where is not None:
        settings = replace(settings, api_url=where, api_token=token or settings.api_token)
    return settings


@dataclass(frozen=True)
class Sweep:
    """Jobs that were submitted in one transaction."""

    id: str
    name: str
    jobs: tuple[Job, ...]

    def wait(self, timeout: float | None = None, *, check: bool = True) -> "Sweep":
        """
        Wait until all jobs have ended.

        Args:
            timeout: in seconds, for all jobs together.
            check: raise the error of the first job that did not succeed.

        Raises:
            TimeoutError: they have not ended in time.
            GanqError: a job did not succeed.
        """
        from ganq.job import wait_for

        wait_for(self.jobs, timeout)
        for job in self.jobs if check else ():
            job.check()
        return self


class Client:
    """
    Access to one job table. connect() creates it.

    Methods may be called from several threads. A client is a context manager that closes its connections.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._opened: Session | None = None
        self._volume: Volume | None = None
        self._lock = threading.Lock()

    # --- submit -------------------------------------------------------------------------------

    def train(self, **options: Any) -> Job:
        """
        Submit a training.

        Args:
            options: those of `ganq submit train`, with `_` for `-`: `data`, `recipe`, `epochs`, `lr_g`, …;
                `continue_from` and `init_from` take a job. Beside them `name`, `priority`, `queue`, `after`,
                `user`, `hold`, `no_preempt`, `time_limit` (seconds, or '2h30m'), `submit_key`, `labels`,
                `note`, `begin` ('22:00', 'now+2h' or a datetime), `after_any` and `after_fail`;
                and `template`, the name of options that `ganq submit train --save-as` has saved.

        Returns:
            The accepted job.

        Raises:
            SpecError, DatasetError, NotFoundError: the request cannot work; nothing was submitted.
        """
        return self._submit("train", options)

    def generate(self, model: Reference | None = None, **options: Any) -> Job:
        """
        Submit a generation of images.

        Args:
            model: the training or import that provides the generator; None: the newest.
            options: those of `ganq submit generate`: `count`, `seeds` (numbers, ranges or pairs), `keep` with
                `of`, `checkpoint`, `now`, …; and those of every job: see train().

        Returns:
            The accepted job.

        Raises:
            SpecError, NotFoundError: the request cannot work; nothing was submitted.
        """
        return self._submit("generate", {"source": model, **options} if model is not None else options)

    def evaluate(self, subject: Reference, **options: Any) -> Job:
        """
        Submit an evaluation: metrics, and a search for copies of training images.

        Args:
            subject: a training, an import or a generation; or the path of generated images.
            options: those of `ganq submit evaluate`: `data`, `checkpoint`, `count`, …; and those of every
                job: see train().

        Returns:
            The accepted job.

        Raises:
            SpecError, DatasetError, NotFoundError: the request cannot work; nothing was submitted.
        """
        return self._submit("evaluate", {"subject": subject, **options})

    def submit(self, spec: "Spec", **options: Any) -> Job:
        """
        Submit a spec.

        Args:
            spec: a TrainSpec, GenerateSpec or EvaluateSpec.
            options: those of every job: see train().

        Returns:
            The accepted job.

        Raises:
            SpecError, DatasetError, NotFoundError: the request cannot work; nothing was submitted.
        """
        return self._submit(spec.kind, options_of_spec(spec) | options)

    def sweep(self, kind: str, over: Mapping[str, Iterable[Any]], **options: Any) -> Sweep:
        """
        Submit a job for each combination of values, all in one transaction.

        Args:
            kind: 'train', 'generate' or 'evaluate'.
            over: values of each option; the last one changes fastest.
            options: of all jobs; `name` is that of the sweep, and the first part of the names of its jobs;
                `max_running` limits how many of them run at once.

        Raises:
            SpecError, DatasetError, NotFoundError: the request cannot work; nothing was submitted.
        """
        from ganq.submission.preflight import remember_data
        from ganq.submission.requests import read_request
        from ganq.submission.submit import submit_axes

        request = read_request(kind, with_template(self.settings, kind, options))
        found = submit_axes(self.settings, self._open, request, over)
        if found.data is not None:
            remember_data(self.settings, found.data)
        report(found.notices)
        accepted = found.accepted
        rows = self.session.queries.get_many(accepted.sweep.job_ids)
        return Sweep(accepted.sweep.id, accepted.name, tuple(Job(self, row) for row in rows))

    def submit_file(self, path: "str | PathLike[str]") -> list[Job]:
        """
        Submit the jobs of a job file in one transaction: all or none.

        Args:
            path: a TOML file; see `ganq submit -f`.

        Returns:
            The accepted jobs, in the order of their ids.

        Raises:
            SpecError, DatasetError, NotFoundError: a job cannot work; nothing was submitted.
            OSError: the file cannot be read.
        """
        from pathlib import Path

        from ganq.submission.jobfile import plan_file, read_file, submit_planned

        plan = plan_file(self.settings, self._open, read_file(Path(path).read_bytes(), Path(path).name))
        made, notices = submit_planned(plan)
        report(notices)
        rows = plan.session.queries.get_many([one for ids in made for one in ids])
        return [Job(self, row) for row in rows]

    def _submit(self, kind: str, options: Mapping[str, Any]) -> Job:
        from ganq.submission.preflight import remember_data
        from ganq.submission.requests import read_request
        from ganq.submission.submit import submit_request

        request = read_request(kind, with_template(self.settings, kind, options))
        found = submit_request(self.settings, self._open, request)
        if found.data is not None:
            remember_data(self.settings, found.data)
        report(found.notices)
        return Job(self, found.accepted.job)

    # --- find ---------------------------------------------------------------------------------

    def job(self, reference: Reference) -> Job:
        """
        Return a job.

        Args:
            reference: an id, or a name: the newest job of this name.

        Raises:
            JobNotFoundError: there is none.
        """
        return Job(self, self.session.queries.find(reference_text(reference)))

    def jobs(
        self,
        *,
        state: str | Sequence[str] | None = None,
        kind: str | None = None,
        user: str | None = None,
        name: str | None = None,
        labels: Mapping[str, str | None] | None = None,
        sweep: str | None = None,
        since: float | str | None = None,
        limit: int | None = None,
    ) -> Iterator[Job]:
        """
        Yield jobs, newest first; they are read in pages, so that memory does not grow.

        Args:
            state: one or several of 'queued', 'running', 'succeeded', 'failed', 'cancelled'.
            name: only jobs whose name contains this text.
            labels: only jobs with these labels; a value of None matches any.
            sweep: id or name of a sweep.
            since: only jobs that were submitted within this time: seconds, or '7d'.
            limit: maximum number of jobs.

        Raises:
            SpecError: there is no such state or kind.
            JobNotFoundError: there is no such sweep.
        """
        from itertools import islice

        from ganq.submission.requests import read_seconds
        from jobs.kinds import kind_named
        from storage.db.queries import Filter

        states = [state] if isinstance(state, str) else state
        if kind is not None:
            kind_named(kind)
        queries = self.session.queries
        wanted = Filter(
            states=None if states is None else tuple(_state_named(one) for one in states),
            kind=kind,
            user=user,
            name=name,
            labels=tuple((labels or {}).items()),
            sweep=None if sweep is None else queries.find_sweep(sweep),
            since=None if since is None else queries.now() - read_seconds(since),
        )
        return (Job(self, row) for row in islice(queries.stream(wanted), limit))

    # --- workers ------------------------------------------------------------------------------

    def drain(self, *names: str, host: str | None = None, wait: float | None = None) -> list[str]:
        """
        Have workers return their jobs and exit, as `ganq drain` does.

        Args:
            names: of the workers; none: all of `host`.
            wait: seconds to wait until they have exited; None: return at once.

        Returns:
            The names of the workers that were asked.

        Raises:
            SpecError: neither names nor a host is given.
            NotFoundError: there is no such worker.
            TimeoutError: not all have exited in time; the request stays.
        """
        from ganq.draining import choose, request_drain, wait_until_stopped

        if not names and host is None:
            raise SpecError("drain takes names of workers, or a host")
        chosen = choose(self.session, names, host)
        request_drain(self.session, chosen)
        left = [] if wait is None else wait_until_stopped(self.session, chosen, wait)
        if left:
            raise TimeoutError(f"not exited within {wait:g} s: {', '.join(left)}; the request stays")
        return [row.name for row in chosen]

    # --- connections --------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """The opened job table. Its methods are not part of the public interface."""
        return self._open(False)

    @property
    def volume(self) -> "Volume":
        """
        The shared volume.

        Raises:
            VolumeError: it does not answer.
        """
        if self._volume is None:
            self._volume = self.session.volume
        return self._volume

    def volume_of(self, job: "JobRow") -> "Volume":
        """
        Return the volume with the files of a job that has started.

        Raises:
            VolumeError: it does not answer, or this machine does not see it.
        """
        return self.volume if self._volume is not None else self.session.volume_of(job)

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        with self._lock:
            if self._opened is not None:
                self._opened.database.dispose()
            self._opened = None

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        self.close()

    def _open(self, create: bool) -> Session:
        with self._lock:
            if self._opened is None:
                self._opened = open_session(create=create, settings=self.settings)
            return self._opened


def with_template(settings: Settings, kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return options with those of their `template` as defaults.

    Raises:
        NotFoundError, SpecError: there is no such template, or it is of another kind.
    """
    given = dict(options)
    name = given.pop("template", None)
    if name is None:
        return given
    from ganq.submission.options import field_name
    from ganq.submission.templates import KIND, load_template

    if kind != KIND:
        raise SpecError(f"templates are of kind {KIND}, and this job is of kind {kind}")
    defaults = load_template(settings, name)
    typed = {field_name(kind, one) for one in given}
    return {**{one: value for one, value in defaults.items() if one not in typed}, **given}


def options_of_spec(spec: "Spec") -> dict[str, Any]:
    """Return a spec as options of its kind, without the layout of results, which each submission sets."""
    return {name: value for name, value in spec.to_json().items() if value is not None and name != "layout"}


def _state_named(name: str) -> Any:
    from jobs.states import JobState

    try:
        return JobState(name)
    except ValueError:
        raise SpecError(
            f"there is no state {name[:40]!r}", hint=f"states: {', '.join(map(str, JobState))}"
        ) from None
