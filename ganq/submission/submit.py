"""Submit a request: the calls of `import ganq` and of the REST API."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ganq.session import Session
from ganq.submission.accept import (
    AcceptedJob,
    AcceptedSweep,
    UnresolvedRequest,
    accept_job,
    accept_sweep,
    notify_for_many,
    notify_workers,
)
from ganq.submission.options import read_axes
from ganq.submission.requests import Request, resolve
from ganq.submission.sweep import product

if TYPE_CHECKING:
    from storage.settings import Settings

Opened = Callable[[bool], Session]
"""Opens the job table; True: creates one if there is none."""


@dataclass(frozen=True)
class SubmittedJob:
    """An accepted job whose workers have been notified."""

    accepted: AcceptedJob
    data: str | None
    """Data set of a training on this machine."""
    notices: list[str]


@dataclass(frozen=True)
class SubmittedSweep:
    """An accepted sweep whose workers have been notified."""

    accepted: AcceptedSweep
    data: str | None
    """Data set of a training on this machine."""
    notices: list[str]


def submit_request(settings: "Settings", opened: Opened, request: Request) -> SubmittedJob:
    """
    Submit one job and notify the workers.

    Raises:
        SpecError, DatasetError, NotFoundError: the request cannot work; nothing was submitted.
    """
    if settings.api_url:
        session = opened(False)
        asked = UnresolvedRequest(request.kind, request.given)
        return SubmittedJob(accept_job(session, asked, request.job), None, session.take_notices())
    found = resolve(settings, opened, request)
    accepted = accept_job(found.session, found.specs[0], request.job, after=found.after)
    notices = [*found.notices, *notify_workers(found.session, accepted.job)]
    return SubmittedJob(accepted, found.data, notices)


def submit_axes(
    settings: "Settings", opened: Opened, request: Request, over: Mapping[str, Iterable[Any]]
) -> SubmittedSweep:
    """
    Submit a job for each combination of values in one transaction, and notify the workers.

    Args:
        over: values of each option; the last one changes fastest.

    Raises:
        SpecError, DatasetError, NotFoundError: the request cannot work; nothing was submitted.
    """
    changes = product(read_axes(request.kind, over, request.given))
    if settings.api_url:
        session = opened(False)
        asked = UnresolvedRequest(request.kind, request.given)
        return SubmittedSweep(
            accept_sweep(session, asked, request.job, changes), None, session.take_notices()
        )
    found = resolve(settings, opened, request, changes, sweep=True)
    accepted = accept_sweep(found.session, found.specs, request.job, changes, after=found.after)
    notices = [*found.notices, *notify_for_many(found.session, accepted.sweep.job_ids)]
    return SubmittedSweep(accepted, found.data, notices)
