"""The log of a job in pieces; its events and attempts."""

import os
import re

from starlette.requests import Request
from starlette.responses import Response

from jobs.errors import SpecError
from storage.db.rows import Job
from web import html
from web.files import job_of
from web.pages.run import head
from web.site import Site

PIECE = 64 * 1024
MAX_LINE = 2000
MAX_EVENTS = 1000


def page(request: Request) -> Response:
    """Show the end of a log, or the piece before a given byte."""
    site: Site = request.app.state.site
    job = job_of(request)
    attempt = _whole(request, "attempt") or job.attempt
    if attempt > max(job.attempt, 1):
        raise SpecError(f"job {job.id} has no attempt {attempt}", hint=f"the newest is {job.attempt}")
    before = _whole(request, "before")
    return html.answer(
        request,
        "log.html",
        lambda: {
            **head(site, job),
            "attempts": list(range(1, job.attempt + 1)),
            **_piece(site, job, attempt, before),
        },
    )


def _whole(request: Request, name: str) -> int | None:
    """
    Parse an optional number of the query string.

    Raises:
        SpecError: it is no number.
    """
    given = request.query_params.get(name)
    if given is None or given == "":
        return None
    if not re.fullmatch(r"[0-9]{1,15}", given):
        raise SpecError(f"{name} must be a number")
    return int(given)


def _piece(site: Site, job: Job, attempt: int, before: int | None) -> html.Facts:
    empty: html.Facts = {"attempt": attempt, "lines": [], "earlier": None, "later": before is not None}
    if not job.attempt or site.volume_trouble() is not None:
        return empty
    try:
        with open(site.volume.attempt(job.id, attempt) / "log.txt", "rb") as file:
            end = file.seek(0, os.SEEK_END)
            end = end if before is None else min(before, end)
            start = max(0, end - PIECE)
            file.seek(start)
            data = file.read(end - start)
    except OSError:
        return empty
    if start > 0:  # begin with a whole line, unless one is longer than all of this
        first = data.find(b"\n") + 1
        start, data = start + first, data[first:]
    lines = data.decode(errors="replace").split("\n")
    return {
        **empty,
        "lines": [html.cut(line, MAX_LINE) for line in (lines[:-1] if lines[-1] == "" else lines)],
        "earlier": start or None,
    }


def events(request: Request) -> Response:
    site: Site = request.app.state.site
    job = job_of(request)
    return html.answer(request, "events.html", lambda: _history(site, job))


def _history(site: Site, job: Job) -> html.Facts:
    known = site.queries.events(job.id)
    return {
        **head(site, job),
        "events": [
            {
                **one.__dict__,
                "detail": {key: html.cut(value, 300) for key, value in (one.detail or {}).items()},
            }
            for one in known[-MAX_EVENTS:]
        ],
        "left_out": max(0, len(known) - MAX_EVENTS),
        "attempts": site.queries.attempts(job.id),
    }
