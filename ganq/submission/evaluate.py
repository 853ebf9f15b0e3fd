"""Resolve a request for an evaluation: its subject, its specs, and the jobs that it waits for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ganq.session import Session
from ganq.submission import preflight
from ganq.submission.generate import check_source
from jobs.errors import DatasetError, JobNotFoundError, NotFoundError, SpecError
from jobs.kinds import kind_named
from jobs.specs import MIN_IMAGES, EvaluateSpec, GenerateSpec
from storage.settings import Settings
from storage.status.units import count

if TYPE_CHECKING:
    from storage.datasets.sources import Reading
    from storage.db.rows import Job

MINIMUM_HINT = f"use at least {MIN_IMAGES}; 2,000 give reliable metrics"


Opener = Callable[[bool], Session]
"""Opens the job table; True: creates one if there is none."""


@dataclass(frozen=True)
class Evaluation:
    """A resolved request."""

    session: Session
    specs: list[EvaluateSpec]
    after: list[int]
    """Jobs to wait for."""
    notices: list[str] = field(default_factory=list)


def prepare(
    settings: Settings,
    opened: Opener,
    subject: str,
    given: Mapping[str, Any],
    changes: Sequence[Mapping[str, Any]] = ({},),
) -> Evaluation:
    """
    Find the subject and create the specs.

    Args:
        subject: a job, or the path of a folder, zip or tar of images.
        given: options of all jobs; paths are absolute.
        changes: options that differ, for each job.

    Raises:
        NotFoundError: the job, its images or a path does not exist.
        SpecError, DatasetError: the request does not fit the subject, or there are too few images.
    """
    if not subject.strip():
        raise SpecError("JOB|PATH is empty", hint="give a job, or a folder, zip or tar of images")
    derived: dict[str, Any]
    after: list[int] = []
    found = _find_subject(opened, subject)
    if isinstance(found, Path):
        derived = {"path": str(found)}
        reading = preflight.reading_of(EvaluateSpec.of_new | dict(given))
        if "size" not in given:
            derived["size"] = preflight.usual_side(found, reading)
        _require_images(str(found), reading)
        session = opened(True)
    else:
        session, job = found
        for change in changes:  # each may use another checkpoint; if one is missing, all wait
            derived, awaited = _derive(session, job, {**given, **change})
            after = after or awaited
    if "data" in given or "data" not in derived:
        derived["data"] = preflight.find_data(settings, given.get("data"))
    fixed = {**derived, **given, "data": derived["data"]}
    specs = [EvaluateSpec.create(**{**fixed, **change}) for change in changes]
    spec = specs[0]
    notices = []
    if Path(spec.data).exists():
        _require_images(spec.data, preflight.reading_of(spec.to_json()))
    else:
        notices.append(
            f"{spec.data} does not exist here; a worker with the decoded copy can still run the job"
        )
    if "data" not in given:
        notices.append(f"comparing with the real images in {spec.data}")
    return Evaluation(session, specs, after, notices)


def _find_subject(opened: Opener, subject: str) -> "Path | tuple[Session, Job]":
    """
    Return the job, or the path.

    Raises:
        JobNotFoundError: it is neither.
    """
    path = Path(subject).expanduser().absolute()
    try:
        session = opened(False)
        return session, session.queries.find(subject)
    except NotFoundError as exc:
        if path.exists():
            return path
        if "/" in subject:
            raise NotFoundError(f"{path} does not exist", hint="give a job, or a folder of images") from exc
        if isinstance(exc, JobNotFoundError):
            raise JobNotFoundError(
                f"there is no job and no folder {subject[:70]!r}",
                hint="ganq status lists ids and names",
            ) from exc
        raise


def _derive(session: Session, job: "Job", given: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """
    Return the fields of the spec that follow from the job, and the jobs to wait for.

    Raises:
        SpecError: the job generates no images, too few or of another size, or --checkpoint was given
            for a generation.
        NotFoundError: its images or its checkpoint do not exist and never will.
    """
    if kind_named(job.kind).makes_model:
        model, after = job, check_source(session, job, str(given.get("checkpoint", "best")), now=False)
    elif job.kind == "generate":
        if "checkpoint" in given:
            raise SpecError(
                f"--checkpoint cannot be used with job {job.id}, a generation",
                hint=f"evaluate its model instead: job {job.spec.get('source')}",
            )
        if job.state.terminal and (job.state != "succeeded" or "deleted_at" in (job.result or {})):
            reason = "were deleted" if job.state == "succeeded" else f"do not exist: it is {job.state}"
            raise NotFoundError(
                f"the images of job {job.id} {reason}", hint=f"ganq retry {job.id} generates them again"
            )
        _require_generated_images(job)
        model, after = session.queries.get(job.spec_field("source")), [] if job.state.terminal else [job.id]
    else:
        raise SpecError(
            f"job {job.id} is of kind {job.kind} and has no images",
            hint="evaluate a training, an import or a generation",
        )
    derived = {"source": job.id, "size": model.spec_field("size")}
    if given.get("size", derived["size"]) != derived["size"]:
        raise SpecError(
            f"--size {given['size']}: the images of job {job.id} are {derived['size']}×{derived['size']}",
            hint="omit --size; only the images of a PATH are resized",
        )
    if model.spec.get("data"):
        # Read the real images in the same way as the training did.
        derived |= vars(preflight.reading_of(model.spec))
        derived["data"] = model.spec["data"]
    return derived, after


def _require_images(path: str, reading: "Reading") -> None:
    """
    Check the number of images.

    Raises:
        DatasetError: too few for a meaningful metric.
    """
    found = preflight.count_images(path, reading)
    if found < MIN_IMAGES:
        raise DatasetError(f"{path} contains {count(found, 'image')}, too few to evaluate", hint=MINIMUM_HINT)


def _require_generated_images(job: "Job") -> None:
    """
    Check the number of images of a generation.

    Raises:
        SpecError: too few for a meaningful metric.
    """
    total = GenerateSpec.from_json(job.spec).total
    if total < MIN_IMAGES:
        raise SpecError(
            f"job {job.id} generates {count(total, 'image')}, too few to evaluate", hint=MINIMUM_HINT
        )
