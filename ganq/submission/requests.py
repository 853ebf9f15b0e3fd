"""A request to submit a job of any kind, from options to specs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from datetime import time as clock_time
from typing import Any

from ganq.references import reference_text
from ganq.session import Session
from ganq.submission import preflight
from ganq.submission.accept import SubmitOptions
from ganq.submission.options import NEVER_SWEPT as NEVER_SWEPT
from ganq.submission.options import read_options, spec_class
from jobs import durations
from jobs.errors import SpecError
from storage.settings import Settings

JOB_OPTIONS = {
    "name": "name",
    "priority": "priority",
    "no_preempt": "no_preempt",
    "queue": "queue",
    "after": "after",
    "user": "user",
    "hold": "held",
    "time_limit": "time_limit",
    "submit_key": "submit_key",
    "note": "note",
    "labels": "labels",
    "begin": "begin",
    "after_any": "after_any",
    "after_fail": "after_fail",
    "max_running": "max_running",
}
"""Options of every job, and the fields of SubmitOptions."""


@dataclass(frozen=True)
class Request:
    """A request whose names are known to be valid."""

    kind: str
    given: dict[str, Any]
    """Options of the spec, and those that name another job."""
    job: SubmitOptions


@dataclass(frozen=True)
class Resolved:
    """Specs that are ready to be submitted."""

    session: Session
    specs: list[Any]
    after: list[int]
    """Jobs to wait for, beside those of `after`."""
    notices: list[str]
    data: str | None = None
    """Data set of a training, which is remembered when the job is accepted."""


def read_request(kind: str, options: Mapping[str, Any]) -> Request:
    """
    Separate the options of the spec from those of every job, and check their names.

    Raises:
        SpecError: there is no such kind or option, or a value is not valid.
    """
    spec_class(kind)
    of_job = {name: options[name] for name in options if name.replace("-", "_") in JOB_OPTIONS}
    of_spec = {name: options[name] for name in options if name not in of_job}
    given = read_options(kind, of_spec, also=[*JOB_OPTIONS])
    return Request(kind, given, _job_options(of_job))


def _job_options(options: Mapping[str, Any]) -> SubmitOptions:
    values: dict[str, Any] = {}
    for name, value in options.items():
        if value is not None:
            values[JOB_OPTIONS[name.replace("-", "_")]] = value
    texts = ("name", "queue", "note", "submit_key")
    kinds = {"held": bool, "no_preempt": bool, **dict.fromkeys(texts, str)}
    for name, kind in kinds.items():
        if name in values and not isinstance(values[name], kind):
            raise SpecError(f"{name}: {values[name]!r} is not {'true or false' if kind is bool else 'text'}")
    priority = values.get("priority", 0)
    if isinstance(priority, bool) or not isinstance(priority, int) or not -1000 <= priority <= 1000:
        raise SpecError(f"priority: {priority!r} is not a whole number from -1000 to 1000")
    for name in ("after", "after_any", "after_fail"):
        if name in values:
            after = values[name]
            several = after if isinstance(after, list | tuple) else [after]
            values[name] = tuple(map(reference_text, several))
    labels = values.get("labels", {})
    if not isinstance(labels, Mapping) or not all(isinstance(one, str) for one in labels.values()):
        raise SpecError("labels: not a table of texts", hint='labels = { project = "faces" }')
    if "begin" in values and not isinstance(values["begin"], str | date | clock_time | timedelta):
        raise SpecError(f"begin: {values['begin']!r} is not a time", hint="'22:00', or a datetime")
    most = values.get("max_running", 1)
    if isinstance(most, bool) or not isinstance(most, int):
        raise SpecError(f"max-running: {most!r} is not a whole number")
    if "time_limit" in values:
        values["time_limit"] = read_seconds(values["time_limit"], minimum=1.0)
    if "user" in values:
        from storage.users import USER_HINT, is_user_name, user_name

        values["user"] = user_name(str(values["user"]))
        if not is_user_name(values["user"]):
            raise SpecError(f"user: {values['user'][:70]!r} is not a valid user name: {USER_HINT}")
    return SubmitOptions(**values)


def read_seconds(value: Any, minimum: float = 0.0) -> float:
    """
    Return a length of time in seconds.

    Raises:
        SpecError: it is neither a number of seconds nor a text like '2h30m'.
    """
    try:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        seconds = float(value) if number else durations.parse(str(value))
    except ValueError as exc:
        raise SpecError(str(exc)) from None
    if not minimum <= seconds <= 1e9:
        raise SpecError(f"{value!r} is less than {minimum:g} seconds, or more than 30 years")
    return seconds


def resolve(
    settings: Settings,
    opened: Callable[[bool], Session],
    request: Request,
    changes: Sequence[Mapping[str, Any]] = ({},),
    *,
    sweep: bool = False,
) -> Resolved:
    """
    Check a request against the job table and the data sets, and create its specs.

    Args:
        opened: opens the job table; True: creates one if there is none.
        changes: of a sweep, the options that differ, for each job.

    Raises:
        NotFoundError: a job, a checkpoint or a path does not exist.
        SpecError, DatasetError: the request cannot work.
    """
    given = dict(request.given)
    if request.kind == "train":
        return _resolve_training(settings, opened, given, changes)
    if request.kind == "evaluate":
        return _resolve_evaluation(settings, opened, given, changes)
    from ganq.submission import generate

    source, now = given.pop("source", None), bool(given.pop("now", False))
    if "out" in given:
        given["out"] = generate.out_folder(given["out"])
    generate.check_options(given, changes, sweep=sweep)
    session = opened(False)
    generation = generate.prepare(session, given, changes, source=_text(source), now=now)
    return Resolved(session, list(generation.specs), generation.after, [])


def _resolve_training(
    settings: Settings,
    opened: Callable[[bool], Session],
    given: dict[str, Any],
    changes: Sequence[Mapping[str, Any]],
) -> Resolved:
    from ganq.submission import train

    source, start = given.pop("continue_from", None), given.pop("init_from", None)
    given = train.absolute_paths(given)
    preflight.find_feature_network(given)
    training = train.prepare(settings, opened, given, changes, source=_text(source), start=_text(start))
    spec = training.specs[0]
    notices = preflight.data_notices(training.listing, classes=spec.conditional)
    if "data" not in given:
        notices.insert(0, f"training on {spec.data}")
    session = opened(True)
    return Resolved(session, list(training.specs), training.after, notices, spec.data)


def _resolve_evaluation(
    settings: Settings,
    opened: Callable[[bool], Session],
    given: dict[str, Any],
    changes: Sequence[Mapping[str, Any]],
) -> Resolved:
    from ganq.submission import evaluate

    subjects = [given.pop(name) for name in ("subject", "source", "path") if name in given]
    if len(subjects) != 1:
        raise SpecError("an evaluation is of one job or one path", hint="subject = JOB or PATH")
    preflight.find_feature_network(given)
    found = evaluate.prepare(settings, opened, reference_text(subjects[0]), given, changes)
    return Resolved(found.session, list(found.specs), found.after, found.notices)


def _text(reference: Any) -> str | None:
    return None if reference is None else reference_text(reference)
