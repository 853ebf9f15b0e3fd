"""
Job files: several jobs in one TOML file, submitted in one transaction.

    [defaults]
    data = "faces/"

    [[job]]
    kind = "train"
    name = "faces"
    epochs = 200

    [[job]]
    kind = "generate"
    from = "faces"
    count = 1000

A job refers to another one of the file by its name. Until the transaction, negative numbers stand for ids.
"""

import json
import re
import secrets
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ganq.session import Session
from ganq.submission.accept import common_columns, extras_of, notify_for_many, prerequisites
from ganq.submission.options import SOURCES, field_name, known_names, read_axes, unknown_option
from ganq.submission.planned import PlannedQueries, planned_job
from ganq.submission.preflight import remember_data
from ganq.submission.requests import JOB_OPTIONS, Request, read_request, resolve
from ganq.submission.sweep import MAX_JOBS, job_names, product
from jobs.errors import GanqError, SpecError

if TYPE_CHECKING:
    from storage.db.rows import Job
    from storage.db.store.sweeps import Entry
    from storage.settings import Settings

MAX_BYTES = 4_000_000
TOP = ("job", "defaults", "comment")
REFERENCES = ("source", "continue_from", "init_from", "subject")
JOB_LINE = re.compile(r"^[ \t]*\[\[[ \t]*job[ \t]*\]\]", re.MULTILINE)


@dataclass(frozen=True)
class FileJob:
    """One [[job]] table: a job, or a sweep."""

    place: str
    """Position in the file for error messages: "jobs.toml, line 12"."""
    request: Request
    axes: Mapping[str, Sequence[Any]]
    """Values of each swept field; empty: one job."""
    changes: list[dict[str, Any]]
    names: tuple[str, ...]
    """Name of each job; none if the job has no name."""

    @property
    def label(self) -> str:
        return self.request.job.name or self.request.kind


@dataclass(frozen=True)
class PlannedFile:
    """A job file that was checked against the job table."""

    session: Session
    jobs: list[FileJob]
    """In the order of the submission."""
    entries: "list[Entry]"
    notices: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    """Data sets of trainings."""


def read_file(text: bytes, name: str) -> list[FileJob]:
    """
    Read a job file.

    Args:
        text: TOML, or JSON with the same keys.
        name: for errors.

    Raises:
        SpecError: it is not valid: the message has the line.
    """
    data = _parse(text, name)
    lines = [text.count(b"\n", 0, found.start()) + 1 for found in JOB_LINE.finditer(text.decode())]
    return read_tables(data, name, [f"{name}, line {line}" for line in lines])


def read_tables(data: Mapping[str, Any], name: str, places: Sequence[str] = ()) -> list[FileJob]:
    """
    Read the tables of a job file.

    Args:
        places: where each job stands, for errors; as many as jobs, or they are numbered.

    Raises:
        SpecError: they are not valid.
    """
    for key in data:
        if key not in TOP:
            raise unknown_option(f"{name}: there is no table {key[:40]!r}", key, TOP)
    tables, defaults = data.get("job"), data.get("defaults", {})
    if not isinstance(tables, list) or not tables or not all(isinstance(one, dict) for one in tables):
        raise SpecError(f"{name} has no [[job]] table", hint='[[job]], then kind = "train" and its options')
    if not isinstance(defaults, dict):
        raise SpecError(f"{name}: defaults is not a table", hint="[defaults]")
    if len(places) != len(tables):
        places = [f"{name}, job {index + 1}" for index in range(len(tables))]
    _check_defaults(defaults, [str(table.get("kind")) for table in tables], name)
    jobs = [_read_job(table, defaults, place) for table, place in zip(tables, places, strict=True)]
    if sum(len(job.changes) for job in jobs) > MAX_JOBS:
        raise SpecError(f"{name} has more than {MAX_JOBS:,} jobs", hint="use several files")
    _check_names(jobs)
    return _in_order(jobs)


def _parse(text: bytes, name: str) -> dict[str, Any]:
    if len(text) > MAX_BYTES:
        raise SpecError(f"{name} is larger than {MAX_BYTES // 1_000_000} MB")
    try:
        decoded = text.decode()
        if decoded.lstrip()[:1] == "{":
            data: dict[str, Any] = json.loads(decoded)
            return data
        return tomllib.loads(decoded)
    except UnicodeDecodeError as exc:
        raise SpecError(f"{name} is not UTF-8 text (byte {exc.start})") from None
    except json.JSONDecodeError as exc:
        raise SpecError(f"{name}, line {exc.lineno}, column {exc.colno}: {exc.msg}") from None
    except tomllib.TOMLDecodeError as exc:
        where = re.search(r"\(at (.*)\)$", str(exc))
        message = str(exc)[: where.start()].strip() if where else str(exc)
        raise SpecError(f"{name}, {where[1] if where else 'TOML'}: {message}") from None
    except RecursionError:
        raise SpecError(f"{name} is nested too deeply") from None


def _check_defaults(defaults: Mapping[str, Any], kinds: Sequence[str], name: str) -> None:
    """Refuse a default that no kind of job in the file has."""
    for key, value in defaults.items():
        if key in SOURCES and isinstance(value, dict):
            for option in value:
                _require_known(option, [key], f"{name}, [defaults.{key}]")
        else:
            _require_known(
                key, [kind for kind in kinds if kind in SOURCES] or list(SOURCES), f"{name}, [defaults]"
            )


def _require_known(option: str, kinds: Sequence[str], where: str) -> None:
    if not any(_has(kind, option) for kind in kinds):
        known = {one for kind in kinds for one in known_names(kind)} | set(JOB_OPTIONS)
        typed = (
            {one.replace("_", "-") for one in known} if "-" in option else known
        )  # as the file spells them
        raise unknown_option(f"{where}: there is no option {option[:40]!r}", option, typed)


def _has(kind: str, option: str) -> bool:
    return option.replace("-", "_") in JOB_OPTIONS or field_name(kind, option) in known_names(kind)


def _read_job(table: Mapping[str, Any], defaults: Mapping[str, Any], place: str) -> FileJob:
    with located(place):
        kind = table.get("kind")
        if not isinstance(kind, str) or kind not in SOURCES:
            said = "has no kind" if kind is None else f"has kind {str(kind)[:40]!r}"
            raise unknown_option(f"the job {said}; kinds: {', '.join(SOURCES)}", str(kind), SOURCES)
        own = {name: value for name, value in table.items() if name not in ("kind", "sweep")}
        given = {field_name(kind, name) for name in own}
        general = {
            name: value for name, value in defaults.items() if name not in SOURCES and _has(kind, name)
        }
        merged = {**general, **defaults.get(kind, {})}
        merged = {name: value for name, value in merged.items() if field_name(kind, name) not in given}
        request = read_request(kind, {**merged, **own})
        sweep = table.get("sweep", {})
        if not isinstance(sweep, dict):
            raise SpecError("sweep is not a table", hint="sweep = { lr-g = [1e-4, 2e-4], seed = [0, 1] }")
        if "sweep" not in table:
            name = request.job.name
            return FileJob(place, request, {}, [{}], (name,) if name else ())
        swept = {field_name(kind, name) for name in sweep}
        request = replace(
            request, given={name: value for name, value in request.given.items() if name not in swept - given}
        )
        axes = read_axes(kind, sweep, request.given)
        changes = product(axes)
        if request.job.name is None:
            raise SpecError("a sweep needs a name", hint='name = "rates"')
        return FileJob(place, request, axes, changes, tuple(job_names(request.job.name, changes)))


def _check_names(jobs: Sequence[FileJob]) -> None:
    """Refuse a name that occurs twice in the file."""
    places: dict[str, str] = {}
    for job in jobs:
        for name in dict.fromkeys(filter(None, (*job.names, job.request.job.name))):
            if name in places:
                raise SpecError(f"{job.place}: the name {name!r} is already that of {places[name]}")
            places[name] = job.place


def _references(job: FileJob) -> Iterator[str]:
    """Yield the names by which a job refers to others."""
    for name in REFERENCES:
        if isinstance(value := job.request.given.get(name), str):
            yield value
    options = job.request.job
    yield from (*options.after, *options.after_any, *options.after_fail)


def _in_order(jobs: Sequence[FileJob]) -> list[FileJob]:
    """
    Return the jobs so that each one refers only to jobs before it, otherwise in the order of the file.

    Raises:
        SpecError: they form a cycle.
    """
    by_name = {name: job for job in jobs for name in (*job.names, job.request.job.name) if name}
    ordered: list[FileJob] = []
    done: set[int] = set()
    for start in jobs:
        # A stack, not recursion: a chain may be longer than Python's stack.
        path = [start]
        while path:
            job = path[-1]
            waiting = [
                by_name[name]
                for name in _references(job)
                if name in by_name and id(by_name[name]) not in done
            ]
            if id(job) in done or not waiting:
                path.pop()
                if id(job) not in done:
                    done.add(id(job))
                    ordered.append(job)
                continue
            if any(one is waiting[0] for one in path):
                first = next(index for index, one in enumerate(path) if one is waiting[0])
                cycle = " → ".join(one.label for one in (*path[first:], waiting[0]))
                raise SpecError(f"{waiting[0].place}: the jobs wait for each other: {cycle}")
            path.append(waiting[0])
    return ordered


def plan_file(
    settings: "Settings", opened: Callable[[bool], Session], jobs: Sequence[FileJob], *, dry_run: bool = False
) -> PlannedFile:
    """
    Check all jobs against the job table and the data sets; nothing is submitted.

    Args:
        dry_run: check them also if a server does that when they are submitted.

    Raises:
        NotFoundError, SpecError, DatasetError: a job cannot work; the message has its line.
    """
    from storage.db.store.sweeps import Entry, sweep_id
    from worker.celery_bridge.notify import MAX_NOTIFIED
    from worker.host.accounts import require_readable_data

    real = opened(True)
    if real.remote and not dry_run:
        return PlannedFile(real, list(jobs), [])
    planned: dict[str, list[Job]] = {}
    queries = real.planned(planned) if real.remote else PlannedQueries(real.database, planned)
    session = replace(real, queries=queries)
    entries: list[Entry] = []
    notices: list[str] = []
    data: list[str] = []
    number = 0
    for job in jobs:
        with located(job.place, planned):
            request = _resolved_names(job, planned)
            found = resolve(settings, lambda create: session, request, job.changes, sweep=bool(job.axes))
            for spec in {str(spec.to_json().get("data") or ""): spec for spec in found.specs}.values():
                if not real.remote:
                    require_readable_data(real.queries, spec.to_json())
            columns = common_columns(session, found.specs[0], request.job)
            if request.job.max_running is not None and not job.axes:
                raise SpecError("max-running limits the jobs of a sweep")
            key = request.job.submit_key or secrets.token_hex(16)
            shards = [] if job.axes else found.specs[0].split()
            if job.axes and any(spec.split() for spec in found.specs):
                raise SpecError("a sweep cannot contain jobs that are split", hint="raise shard-size")
            ids = tuple(-(number + 1 + index) for index in range(len(found.specs)))
            entries.append(
                Entry(
                    placeholders=ids,
                    specs=tuple(spec.to_json() for spec in found.specs),
                    names=job.names or (None,),
                    submit_key=key,
                    columns=columns,
                    after=tuple(dict.fromkeys([*found.after, *prerequisites(session, request.job)])),
                    swept=bool(job.axes),
                    shards=tuple((shard.to_json(), shard.image_count) for shard in shards),
                    max_workers=getattr(found.specs[0], "max_workers", 0),
                    will_notify=max(0, min(len(ids), MAX_NOTIFIED - number)),
                    extras=extras_of(session, request.job),
                )
            )
            number += len(ids)
            rows = [
                planned_job(one, name, spec, columns, sweep_id(key) if job.axes else None)
                for one, name, spec in zip(ids, job.names or (None,), entries[-1].specs, strict=True)
            ]
            for row in rows:
                planned.setdefault(row.name or f"#{row.id}", []).append(row)
            if job.axes and request.job.name not in job.names:
                planned[request.job.name or ""] = rows
            data += [found.data] if found.data is not None else []
            notices += [line for line in found.notices if line not in notices]
    return PlannedFile(real, list(jobs), entries, notices, data)


def _resolved_names(job: FileJob, planned: "Mapping[str, list[Job]]") -> Request:
    """Return the request with placeholders instead of names of the file."""
    request = job.request
    given = dict(request.given)
    for name in REFERENCES:
        rows = planned.get(value) if isinstance(value := given.get(name), str) else None
        if rows is None:
            continue
        if len(rows) > 1:
            raise SpecError(f"{value!r} is a sweep of {len(rows)} jobs", hint=f"name one: {rows[0].name}, …")
        if given.get("now"):
            raise SpecError(f"now: {value!r} is submitted by this file and has no checkpoint yet")
        given[name] = str(rows[0].id)

    def resolved(names: Sequence[str]) -> tuple[str, ...]:
        ids = [str(row.id) for name in names for row in planned.get(name, ())]
        return (*ids, *(name for name in names if name not in planned))

    options = replace(
        request.job,
        after=resolved(request.job.after),
        after_any=resolved(request.job.after_any),
        after_fail=resolved(request.job.after_fail),
    )
    return replace(request, given=given, job=options)


def submit_planned(plan: PlannedFile) -> tuple[list[tuple[int, ...]], list[str]]:
    """
    Submit a planned file in one transaction and notify the workers.

    Returns:
        The ids of the jobs of each entry, and notices.

    Raises:
        JobNotFoundError, SpecError: a job that it refers to has failed meanwhile; nothing was submitted.
    """
    if plan.session.remote:
        submitted: tuple[list[tuple[int, ...]], list[str]] = plan.session.submit_file(plan.jobs)
        return submitted
    made = plan.session.store.submit_together(plan.entries)
    for data in plan.data:
        remember_data(plan.session.settings, data)
    return made, [*plan.notices, *notify_for_many(plan.session, [one for ids in made for one in ids])]


class located:  # noqa: N801 - used like a function
    """Add the place in the file to an error, and names instead of placeholders."""

    def __init__(self, place: str, planned: "Mapping[str, list[Job]] | None" = None) -> None:
        self.place, self.planned = place, planned or {}

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, exc: BaseException | None, trace: Any) -> None:
        if isinstance(exc, GanqError):
            names = {str(row.id): row.name for rows in self.planned.values() for row in rows}

            def named(text: str) -> str:
                return re.sub(r"job (-\d+)", lambda found: f"job {names.get(found[1]) or found[1]}", text)

            exc.message = f"{self.place}: {named(exc.message)}"
            exc.args = (exc.message,)
            exc.hint = named(exc.hint) if exc.hint else None
