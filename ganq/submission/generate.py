"""Resolve a request for a generation: its model, its specs, and the jobs that it waits for."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ganq.session import Session
from ganq.submission.preflight import WEIGHT_SUFFIXES
from jobs.class_checks import unknown_class
from jobs.errors import CheckpointNotFoundError, JobNotFoundError, SpecError
from jobs.kinds import kind_named
from jobs.specs import GenerateSpec

if TYPE_CHECKING:
    from storage.db.rows import Job


@dataclass(frozen=True)
class Generation:
    """A resolved request."""

    model: "Job"
    specs: list[GenerateSpec]
    after: list[int]
    """Jobs to wait for."""


def check_options(
    given: Mapping[str, Any], changes: Sequence[Mapping[str, Any]] = ({},), *, sweep: bool = False
) -> None:
    """
    Report invalid values before the job table is opened.

    Raises:
        SpecError: a value, or a combination of options, is not valid.
    """
    if sweep and "out" in given:
        raise SpecError("--out cannot be used with --sweep", hint="ganq open JOB shows where results are")
    for change in changes:
        GenerateSpec.create(source=0, **given, **change)


def prepare(
    session: Session,
    given: Mapping[str, Any],
    changes: Sequence[Mapping[str, Any]] = ({},),
    *,
    source: str | None,
    now: bool,
) -> Generation:
    """
    Find the model and create the specs.

    Args:
        given: options of all jobs.
        changes: options that differ, for each job.
        source: the job that provides the generator; None: the newest.
        now: do not wait for a running training.

    Raises:
        NotFoundError: the model or its checkpoint does not exist.
        SpecError: the request does not fit the model.
    """
    given = dict(given)
    model = find_model(session, source)
    if now and "checkpoint" not in given and not model.state.terminal:
        given["checkpoint"] = "last"
    for name in dict.fromkeys({**given, **change}.get("class_name") for change in changes):
        _check_class(session, model, name)
    specs = [GenerateSpec.create(source=model.id, **given, **change) for change in changes]
    spec = specs[0]
    after: list[int] = []
    for checkpoint in dict.fromkeys(each.checkpoint for each in specs):
        after = after or check_source(session, model, checkpoint, now=now)
    scoring = "--keep" if spec.keep is not None else "--reject" if spec.reject is not None else None
    if scoring and model.kind == "import" and model.spec.get("netd") is None:
        raise SpecError(
            f"job {model.id} was imported without a discriminator, which {scoring} requires",
            hint="use --count, or import the model again with its netd file",
        )
    return Generation(model, specs, after)


def find_model(session: Session, source: str | None) -> "Job":
    """
    Return the job that provides the generator.

    Raises:
        JobNotFoundError: there is none.
        SpecError: the job has no generator, or `source` is a file, which must be imported first.
    """
    if source is None:
        return session.queries.newest_model()
    try:
        job = session.queries.find(source)
    except JobNotFoundError:
        path = Path(source).expanduser()
        if path.exists() or "/" in source or path.suffix.lower() in WEIGHT_SUFFIXES:
            raise SpecError(
                f"--from {source[:200]} is a path; --from takes a job",
                hint=f"import it first: ganq import {source[:200]} --name NAME; then use --from NAME",
            ) from None
        raise
    if not kind_named(job.kind).makes_model:
        origin = job.spec.get("source")
        raise SpecError(
            f"job {job.id} is of kind {job.kind} and has no generator",
            hint=f"use --from {origin}, its model" if origin is not None else "use a training or an import",
        )
    return job


def _check_class(session: Session, model: "Job", class_name: str | None) -> None:
    """
    Check --class as far as possible without loading the model.

    Raises:
        SpecError: the model has no classes, or not this one.
    """
    if class_name is None:
        return
    if not model.spec.get("conditional", False):
        raise unknown_class(class_name, ())
    known = known_classes(session, model)
    if known is not None and class_name not in known:
        raise unknown_class(class_name, known)


def known_classes(session: Session, model: "Job") -> list[str] | None:
    """Return the classes of a conditional training; None until its data set has been decoded."""
    known: list[str] | None = (model.result or {}).get("classes")
    pinned = (model.inputs or {}).get("fingerprint")
    if known is None and pinned is not None and not session.remote:
        from storage.datasets.cache import classes_of

        known = classes_of(session.volume, pinned)
    return known


def check_source(session: Session, model: "Job", checkpoint: str, *, now: bool) -> list[int]:
    """
    Return the jobs to wait for until the checkpoint exists.

    Args:
        now: do not wait for a running training.

    Raises:
        CheckpointNotFoundError: it does not exist and never will.
    """
    if not model.state.terminal and not now:
        if checkpoint.isdigit():
            with suppress(CheckpointNotFoundError):  # the epoch may exist already
                session.queries.choose_checkpoint(model.id, checkpoint)
                return []
        epochs = model.spec.get("epochs")
        if checkpoint.isdigit() and isinstance(epochs, int) and int(checkpoint) > epochs:
            raise CheckpointNotFoundError(
                f"job {model.id} ends at epoch {epochs}, before epoch {checkpoint}",
                hint="use best, last, or an earlier epoch",
            )
        return [model.id]
    session.queries.choose_checkpoint(model.id, checkpoint)
    return []


def out_folder(given: str) -> str:
    path = Path(given).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise SpecError(f"--out {path} is a file", hint="give a folder; it is created if it does not exist")
    from storage.results.reader import occupied

    if (taken := occupied(path)) is not None:
        raise SpecError(f"--out {path} already contains {taken}", hint="use another folder")
    return str(path)
