"""
The session of a server: the questions and changes of the job table as requests.

It has the methods of ganq.session.Session, so that the facade and the commands are the same. What needs the
table itself raise an error.
"""

import os
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from ganq.references import reference_text
from ganq.remote.api import Api
from ganq.remote.rows import checkpoint_row, event_row, job_row, worker_row
from ganq.session import Session
from ganq.submission.accept import AcceptedJob, AcceptedSweep, SubmitOptions, UnresolvedRequest
from ganq.submission.jobfile import FileJob, located
from ganq.submission.planned import WithPlanned
from ganq.submission.preflight import ON_SERVER, find_data, remember_data
from ganq.submission.retry import Resubmitted
from jobs.errors import CheckpointNotFoundError, ConfigError, JobNotFoundError, VolumeError
from jobs.kinds import KINDS
from jobs.states import JobState
from storage.db.queries import PAGE, Filter, Queries, Usage, UsageKey
from storage.db.quotas import Quota, Quotas
from storage.db.rows import Checkpoint, Event, Job, WorkerRow
from storage.db.store import JobStore
from storage.db.store.shards import ShardSummary
from storage.db.store.sweeps import Sweep
from storage.settings import Settings

if TYPE_CHECKING:
    from storage.volume.layout import Volume


NEWEST = 50
"""Jobs of each kind among which the newest model is searched."""
REFERENCES = ("source", "continue_from", "init_from", "subject")
"""Options that name a job, by a ganq.Job as well."""


class NoLocalDatabase:
    """Replaces the database, which this machine cannot reach."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def __getattr__(self, name: str) -> Any:
        raise ConfigError(
            f"this needs the job table itself, and GANQ_API_URL names a server ({self._api.url})",
            hint="run it on the server, or unset GANQ_API_URL",
        )

    def dispose(self) -> None:
        self._api.close()


def _job_path(reference: str | int) -> str:
    return f"/jobs/{quote(str(reference), safe='')}"


class RemoteQueries(Queries):
    """Queries as requests."""

    def __init__(self, api: Api) -> None:
        super().__init__(NoLocalDatabase(api))  # type: ignore[arg-type]
        self.api = api
        self._waiting: dict[int, list[int]] = {}
        self._shards: dict[int, ShardSummary] = {}
        self._labels: dict[int, dict[str, str]] = {}
        self._warnings: dict[int, str] = {}
        self._preempted_by: dict[int, int] = {}

    def _job(self, data: dict[str, Any]) -> Job:
        """Return a job, and cache what StatusContext reads next."""
        job = job_row(data)
        self._waiting[job.id] = list(data.get("waiting_on") or ())
        self._labels[job.id] = dict(data.get("labels") or {})
        for known, name in ((self._warnings, "warning"), (self._preempted_by, "preempted_by")):
            known.pop(job.id, None)
            if data.get(name) is not None:
                known[job.id] = data[name]
        self._shards.pop(job.id, None)
        if shards := data.get("shards"):
            number, ended, running = (int(shards[name]) for name in ("number", "ended", "running"))
            self._shards[job.id] = ShardSummary(number, ended, running, 0, 0, 0.0, ())
        return job

    def now(self) -> float:
        return float(self.api.get("")["now"])

    def get(self, job_id: int) -> Job:
        return self.find(str(job_id))

    def find(self, reference: str) -> Job:
        return self._job(self.api.get(_job_path(reference)))

    def page(self, wanted: Filter, *, limit: int, oldest_first: bool = False) -> list[Job]:
        found: list[Job] = []
        params = _params(wanted)
        while len(found) < limit:
            data = self.api.get("/jobs", **params, limit=min(PAGE, limit - len(found)))
            new = [self._job(one) for one in data["jobs"]]
            found += [job for job in new if job.id > (wanted.after_id or 0)]
            if not data["next"] or new[-1].id <= (wanted.after_id or 0):
                break
            params["before"] = new[-1].id
        return found[::-1] if oldest_first else found

    def ids(self, wanted: Filter) -> list[int]:
        found: list[int] = []
        params = _params(wanted)
        while True:
            data = self.api.get("/jobs", **params, limit=PAGE, fields="id")
            new = [one["id"] for one in data["jobs"]]
            found += [one for one in new if one > (wanted.after_id or 0)]
            if not data["next"] or new[-1] <= (wanted.after_id or 0):
                return found
            params["before"] = new[-1]

    def get_many(self, job_ids: Sequence[int]) -> list[Job]:
        found = []
        for start in range(0, len(job_ids), PAGE):
            some = ",".join(map(str, job_ids[start : start + PAGE]))
            found += [self._job(one) for one in self.api.get("/jobs", ids=some)["jobs"]]
        return sorted(found, key=lambda job: job.id)

    def counts(
        self, *, sweep: str | None = None, parts: bool = False, part_of: int | None = None
    ) -> dict[str, int]:
        found = self.api.get("/counts", sweep=sweep, shards="true" if parts else None, shards_of=part_of)
        return {str(state): int(found[state]) for state in JobState}

    def usage(self, by: UsageKey, since_s: float) -> list[Usage]:
        return [Usage(**one) for one in self.api.get("/usage", by=by, since_s=int(since_s))["usage"]]

    def find_sweep(self, reference: str) -> str:
        return str(self.api.get("/jobs", sweep=reference, limit=1, fields="sweep")["jobs"][0]["sweep"])

    def events(self, job_id: int, *, after_id: int = 0) -> list[Event]:
        found: list[Event] = []
        after: int | None = after_id
        while after is not None:
            data = self.api.get(f"{_job_path(job_id)}/events", after=after, limit=1000)
            found += [event_row(one) for one in data["events"]]
            after = data["next_after"]
        return found

    def attempts(self, job_id: int) -> list[dict[str, Any]]:
        return list(self.api.get(f"{_job_path(job_id)}/attempts")["attempts"])

    def checkpoints(self, job_id: int) -> list[Checkpoint]:
        return [
            checkpoint_row(one) for one in self.api.get(f"{_job_path(job_id)}/checkpoints")["checkpoints"]
        ]

    def checkpoint_of(self, sha256: str) -> Checkpoint | None:
        try:
            return checkpoint_row(self.api.get(f"/checkpoints/{sha256}"))
        except CheckpointNotFoundError:
            return None

    def parts(self, job_id: int) -> list[Job]:
        return self.page(Filter(part_of=job_id, parts=True), limit=1_000_000, oldest_first=True)

    def relations(self, job_id: int) -> dict[str, Any]:
        found: dict[str, Any] = self.api.get(f"{_job_path(job_id)}/relations")
        return found

    def needs(self, job_id: int) -> list[tuple[int, JobState]]:
        return [(one["id"], JobState(one["state"])) for one in self.relations(job_id)["after"]]

    def priority_sources(self, one: Job) -> list[int]:
        return list(self.relations(one.id)["priority_lent_by"])

    def ended_with(self, job_id: int) -> list[Job]:
        return self.get_many(self.relations(job_id)["ended_with_it"])

    def queue_position(self, one: Job) -> int:
        return int(self.relations(one.id)["ahead_in_queue"] or 0)

    def unfinished_dependencies(self, job_ids: Sequence[int]) -> dict[int, list[int]]:
        return {one: self._waiting[one] for one in job_ids if self._waiting.get(one)}

    def labels_of(self, job_ids: Sequence[int]) -> dict[int, dict[str, str]]:
        if unknown := [one for one in job_ids if one not in self._labels]:
            self.get_many(unknown)
        return {one: self._labels[one] for one in job_ids if self._labels.get(one)}

    def instabilities(self, job_ids: Sequence[int]) -> dict[int, str]:
        return {one: self._warnings[one] for one in job_ids if one in self._warnings}

    def preempted_by(self, job_ids: Sequence[int]) -> dict[int, int]:
        return {one: self._preempted_by[one] for one in job_ids if one in self._preempted_by}

    def waits_for_end(self, job_id: int) -> list[tuple[int, str, JobState]]:
        found = self.relations(job_id)["after_end"]
        return [(one["id"], one["condition"], JobState(one["state"])) for one in found]

    def shard_summaries(self, job_ids: Sequence[int]) -> dict[int, ShardSummary]:
        return {one: self._shards[one] for one in job_ids if one in self._shards}

    def workers(self) -> list[WorkerRow]:
        return [worker_row(one) for one in self.api.get("/workers")["workers"]]

    def submitter_uid(self, job_id: int) -> int | None:
        return None

    def newest_model(self, *, succeeded: bool = False) -> Job:
        models = [kind for kind in KINDS.values() if kind.makes_model]
        newest = [job for kind in models for job in self.page(Filter(kind=kind.name), limit=NEWEST)]
        for job in sorted(newest, key=lambda job: job.id, reverse=True):
            if (job.state is JobState.SUCCEEDED if succeeded else True) and (
                not job.state.terminal or self.checkpoints(job.id)
            ):
                return job
        raise JobNotFoundError(
            "there is nothing to generate from yet",
            hint="train first (ganq submit train --data DIR), or import weights (ganq import)",
        )


class PlannedRemoteQueries(WithPlanned, RemoteQueries):
    """The jobs of the server, with planned ones."""

    def __init__(self, api: Api, planned: Mapping[str, Sequence[Job]]) -> None:
        RemoteQueries.__init__(self, api)
        self.planned = planned


def _params(wanted: Filter) -> dict[str, Any]:
    """Return the query of GET /jobs."""
    params: dict[str, Any] = {
        "state": None if wanted.states is None else ",".join(map(str, wanted.states)),
        "kind": wanted.kind,
        "user": wanted.user,
        "name": wanted.name,
        "sweep": wanted.sweep,
        "label": ",".join(key if value is None else f"{key}={value}" for key, value in wanted.labels) or None,
        "before": wanted.before_id,
        "held": None if wanted.held is None else str(wanted.held).lower(),
        "shards": "true" if wanted.parts else None,
        "shards_of": wanted.part_of,
        "since_at": None if wanted.since is None else int(wanted.since),
        "to_retry": "true" if wanted.to_retry else None,
    }
    return {name: value for name, value in params.items() if value is not None}


class RemoteStore(JobStore):
    """Changes as requests."""

    def __init__(self, session: "RemoteSession") -> None:
        super().__init__(NoLocalDatabase(session.api))  # type: ignore[arg-type]
        self.session = session

    def _verb(self, job_id: int, verb: str, body: dict[str, Any] | None = None) -> Job:
        answer = self.session.api.post(f"{_job_path(job_id)}/{verb}", body or {})
        self.session.notices[:] = answer.get("notices", [])
        return self.session.queries._job(answer["job"])

    def request_cancel(self, job_id: int, *, by: str | None = None) -> Job:
        return self._verb(job_id, "cancel")

    def cancel_many(self, ids: Sequence[int]) -> Iterator[tuple[int, bool]]:
        for job_id in ids:
            yield job_id, self._verb(job_id, "cancel").state.terminal

    def hold(self, job_id: int, *, held: bool, by: str | None = None) -> Job:
        return self._verb(job_id, "hold" if held else "release")

    def pause(self, job_id: int, *, by: str | None = None, reason: str | None = None) -> Job:
        return self._verb(job_id, "pause", {} if reason is None else {"reason": reason})

    def keep(self, job_id: int, *, kept: bool) -> Job:
        return self._verb(job_id, "keep", {} if kept else {"undo": True})

    def set_priority(self, job_id: int, priority: int) -> Job:
        return self._change(job_id, priority=priority)

    def rename(self, job_id: int, name: str) -> Job:
        return self._change(job_id, name=name)

    def set_note(self, job_id: int, note: str | None) -> Job:
        return self._change(job_id, note=note or "")

    def set_labels(self, job_id: int, changes: Mapping[str, str | None]) -> Job:
        return self._change(job_id, labels=dict(changes))

    def move_before(self, job_id: int, other_id: int) -> Job:
        return self._verb(job_id, "move", {"before": other_id})

    def _change(self, job_id: int, **values: Any) -> Job:
        return self.session.queries._job(self.session.api.patch(_job_path(job_id), values)["job"])


class RemoteQuotas(Quotas):
    """The quota that blocks a job."""

    def __init__(self, queries: RemoteQueries) -> None:
        super().__init__(queries.database)
        self.queries = queries

    def quota_blocking_job(self, job: Job) -> Quota | None:
        found = self.queries.relations(job.id)["limit_reached"]
        return None if found is None else Quota(**found)


@dataclass(frozen=True)
class RemoteSession(Session):
    """A server."""

    queries: RemoteQueries
    api: Api = None  # type: ignore[assignment]
    notices: list[str] = field(default_factory=list)
    """Those of the last request."""
    remote: ClassVar[bool] = True

    @property
    def store(self) -> RemoteStore:
        return RemoteStore(self)

    @property
    def quotas(self) -> RemoteQuotas:
        return RemoteQuotas(self.queries)

    @property
    def volume(self) -> "Volume":
        raise VolumeError(
            f"the files are on the server {self.api.url}", hint="ganq logs and ganq download read them"
        )

    def volume_of(self, job: Job) -> "Volume":
        return self.volume

    def take_notices(self) -> list[str]:
        """Return the notices of the last request once."""
        taken = list(self.notices)
        self.notices.clear()
        return taken

    def accept_job(
        self, asked: UnresolvedRequest, request: SubmitOptions, after: Sequence[int]
    ) -> AcceptedJob:
        """Upload what is local, and submit; see ganq.submission.accept.accept_job()."""
        self.notices.clear()
        body, key = self.body(asked.kind, asked.options, request, after)
        answer = self.api.post("/jobs", body, key=key)
        self.notices.extend(answer["notices"])
        return AcceptedJob(self.queries._job(answer["job"]), answer["known"])

    def accept_sweep(
        self,
        asked: UnresolvedRequest,
        request: SubmitOptions,
        changes: Sequence[dict[str, Any]],
        after: Sequence[int],
    ) -> AcceptedSweep:
        """Upload what is local, and submit; see ganq.submission.accept.accept_sweep()."""
        self.notices.clear()
        body, key = self.body(asked.kind, asked.options, request, after)
        over = {name: list(dict.fromkeys(one[name] for one in changes)) for name in changes[0]}
        answer = self.api.post("/sweeps", {**body, "over": over}, key=key)
        self.notices.extend(answer["notices"])
        return AcceptedSweep(Sweep(answer["sweep"], tuple(answer["jobs"])), answer["name"], answer["known"])

    def submit_file(self, jobs: "Sequence[FileJob]") -> tuple[list[tuple[int, ...]], list[str]]:
        """Upload what is local, and submit; see ganq.submission.jobfile.submit_planned()."""
        self.notices.clear()
        tables = []
        names = {name for job in jobs for name in (*job.names, job.request.job.name) if name}
        for job in jobs:
            with located(job.place):
                body, key = self.body(job.request.kind, job.request.given, job.request.job, planned=names)
            swept = {"sweep": {name: list(values) for name, values in job.axes.items()}} if job.axes else {}
            tables.append({**body, **swept, "submit_key": key})
        places = [job.place for job in jobs]
        answer = self.api.post("/jobfiles", {"job": tables, "places": places}, key=secrets.token_hex(16))
        notices = [*dict.fromkeys([*self.take_notices(), *answer["notices"]])]
        return [tuple(ids) for ids in answer["jobs"]], notices

    def planned(self, planned: Mapping[str, Sequence[Job]]) -> PlannedRemoteQueries:
        return PlannedRemoteQueries(self.api, planned)

    def request_drain(self, names: Sequence[str]) -> None:
        for name in names:
            self.api.post(f"/workers/{quote(name, safe='')}/drain", {})

    def _with_data(self, kind: str, asked: Mapping[str, Any], planned: Collection[str]) -> dict[str, Any]:
        """Return the options with the data set that this machine uses by default; remember the one given."""
        given = {name: value for name, value in asked.items() if value is not None}
        subject = given.get("subject")
        in_file = isinstance(subject, str) and subject in planned  # comes before the jobs of the table
        of_path = kind == "evaluate" and not in_file and ("path" in given or self._is_path(subject))
        if kind == "evaluate" and subject is not None and not of_path and not in_file:
            given["subject"] = self.queries.find(reference_text(subject)).id
        if (kind == "train" and "continue_from" not in given) or of_path:
            if "data" not in given:
                given["data"] = find_data(self.settings, None)
                self.notices.append(
                    f"training on {given['data']}"
                    if kind == "train"
                    else f"comparing with the real images in {given['data']}"
                )
            data = os.fspath(given["data"])
            if kind == "train" and Path(data).expanduser().exists():
                remember_data(self.settings, str(Path(data).expanduser().absolute()))
        return given

    def _is_path(self, subject: Any) -> bool:
        """Return whether the subject of an evaluation is a path; as at home, a job comes first."""
        if not isinstance(subject, str | os.PathLike):
            return False
        text = os.fspath(subject)
        if "/" in text or text.startswith(ON_SERVER):
            return True
        try:
            self.queries.find(text)
        except JobNotFoundError:
            return Path(text).exists()
        return False

    def body(
        self,
        kind: str,
        asked: Mapping[str, Any],
        request: SubmitOptions,
        after: Sequence[int] = (),
        *,
        planned: Collection[str] = (),
    ) -> tuple[dict[str, Any], str]:
        """
        Upload what is local; return the body of a submission, and its key.

        Args:
            planned: names of jobs of the same file.
        """
        from ganq.remote.upload import on_server

        options = {
            name: reference_text(value)
            if name in REFERENCES and value is not None and not isinstance(value, str)
            else on_server(self.api, name, value)
            for name, value in self._with_data(kind, asked, planned).items()
        }
        of_job = {
            "name": request.name,
            "priority": request.priority,
            "no_preempt": request.no_preempt or None,
            "queue": request.queue,
            "after": [*map(str, after), *request.after] or None,
            "user": request.user,
            "hold": request.held or None,
            "time_limit": request.time_limit,
            "note": request.note,
            "labels": dict(request.labels) or None,
            "begin": None if request.begin is None else _with_zone(request.begin),
            "after_any": [*request.after_any] or None,
            "after_fail": [*request.after_fail] or None,
            "max_running": request.max_running,
        }
        given = {name: value for name, value in {**options, **of_job}.items() if value is not None}
        return {"kind": kind, **given}, request.submit_key or secrets.token_hex(16)

    def resubmit(self, job: Job, *, with_waiting: bool) -> Iterator[Resubmitted]:
        """See ganq.submission.retry.resubmit()."""
        answer = self.api.post(f"{_job_path(job.id)}/retry", {"with_waiting": with_waiting})
        for new in self.queries.get_many(answer["jobs"]):
            old = job if new.retry_of == job.id or new.retry_of is None else self.queries.get(new.retry_of)
            yield Resubmitted(old, new, answer["notices"] if old is job else [])

    def log_lines(self, job_id: int, attempt: int, *, last: int | None, follow: bool) -> Iterator[str]:
        """See ganq.logs.attempt_lines()."""
        from ganq.remote.files import log_lines

        return log_lines(self.api, _job_path(job_id), attempt, last=last, follow=follow)

    def images(self, job: Job) -> Iterator[Any]:
        """See ganq.images.images_of()."""
        from ganq.remote.files import images

        return images(self.api, _job_path(job.id))

    def generator_volume(self, chosen: Checkpoint) -> "Volume":
        """See ganq.remote.files.fetch_checkpoint()."""
        from ganq.remote.files import fetch_checkpoint

        return fetch_checkpoint(self.api, _job_path(chosen.job_id), chosen)

    def link_of(self, job: Job | None) -> str:
        """Return the address of a job's page, or of the queue's."""
        return f"{self.api.url}/" if job is None else f"{self.api.url}/jobs/{job.id}"

    def record_volume(self, job: Job) -> "Volume":
        """See ganq.remote.files.fetch_record()."""
        from ganq.remote.files import fetch_record

        return fetch_record(self.api, _job_path(job.id), job)

    def report(self, job: Job) -> bytes:
        """Fetch the page of a job as one HTML file."""
        return bytes(self.api.repeated(lambda: self.api.send("GET", f"{_job_path(job.id)}/report")).content)

    def download(self, job: Job, out: Path, only: str | None) -> Path:
        """Copy the result of a generation to a folder; see ganq.remote.files.download()."""
        from ganq.remote.files import download

        return download(self.api, job, _job_path(job.id), out, only)


def _with_zone(begin: Any) -> str:
    """Return a time with the zone of this machine, which may not be that of the server."""
    import time
    from datetime import datetime

    from jobs.times import read_time

    return datetime.fromtimestamp(read_time(begin, time.time())).astimezone().isoformat()


def open_remote(settings: Settings, way: str) -> RemoteSession:
    """
    Return the session of the server that the settings name; nothing is sent yet.

    Raises:
        ConfigError: the URL is malformed.
        UnauthenticatedError: there is no token.
    """
    api = Api(settings.api_url, settings.api_token, settings.api_seconds)
    queries = RemoteQueries(api)
    return RemoteSession(settings, queries.database, queries, way, api)
