"""The page of a job: slider, grids and curves of a training; results of other kinds."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jobs.errors import GanqError, NotFoundError, SpecError
from jobs.states import JobState
from storage.db.queries import Filter
from storage.db.rows import Job
from storage.status import evaluation_text, job_text, units
from storage.status.job_text import StatusContext
from storage.status.verdict import of_training
from web import curves as curves_of
from web import html, rows
from web.files import job_of
from web.gallery import gallery_facts
from web.samples import samples_of, side_of
from web.site import Site

MAX_COMPARED = 4
RECENT = 20
"""Trainings that are suggested for a comparison."""


def page(request: Request) -> Response:
    site: Site = request.app.state.site
    job = job_of(request)
    typed = request.query_params.get("with", "")
    others, refused = _others(site, job, typed)
    if refused and html.wants_json(request):
        raise refused[0]
    if job.kind == "train":
        answer = html.answer(
            request,
            "run.html",
            lambda: _run(site, job, others),
            shown=lambda facts: _of_comparing(site, job, others, typed, refused),
        )
        if refused and html.FRAGMENT not in request.headers:  # the page of the run, which says why
            answer.status_code = 404 if isinstance(refused[0], NotFoundError) else 400
        return answer
    return html.answer(request, "job.html", lambda: job_facts(site, job))


def curves(request: Request) -> Response:
    """Return the metrics of a run as columns."""
    site: Site = request.app.state.site
    job = job_of(request)
    revision = f'W/"{site.revision()}"'
    if request.headers.get("if-none-match") == revision:
        return Response(status_code=304)
    points = request.query_params.get("points", "2000")
    if not points.isdecimal() or len(points) > 6:
        raise SpecError("points must be a number")
    found = (
        curves_of.columns(site.volume, job, curves_of.metrics_of(site, job), int(points))
        if site.volume_trouble() is None
        else {"x": {}, "series": {}, "evaluations": [], "images_per_epoch": None, "lines": 0}
    )
    return html.json_answer(found, headers={"ETag": revision})


def _others(site: Site, job: Job, given: str) -> tuple[list[Job], list[GanqError]]:
    """Return the trainings to compare with, and an error for each reference that is none."""
    references = [one.strip() for one in given.split(",") if one.strip()]
    refused: list[GanqError] = []
    if len(references) >= MAX_COMPARED:
        refused.append(
            SpecError(f"up to {MAX_COMPARED} runs can be compared", hint=f"with= takes {MAX_COMPARED - 1}")
        )
    found: dict[int, Job] = {}
    for reference in references[: MAX_COMPARED - 1]:
        try:
            other = site.queries.find(reference)
            if other.kind != "train":
                raise SpecError(
                    f"job {other.id} is of kind {html.cut(other.kind, 32)}; only trainings are compared"
                )
        except (NotFoundError, SpecError) as exc:
            refused.append(exc)
        else:
            found[other.id] = other
    return [one for one in found.values() if one.id != job.id], refused


def _of_comparing(
    site: Site, job: Job, others: list[Job], typed: str, refused: list[GanqError]
) -> html.Facts:
    """Return what the form for comparisons shows."""
    recent = site.queries.page(Filter(kind="train"), limit=RECENT)
    return {
        "typed": typed,
        "not_compared": [html.cut(one.message, 300) for one in refused],
        "recent": [
            {"id": one.id, "name": html.cut(one.name or f"run {one.id}", 64), "state": str(one.state)}
            for one in recent
            if one.id != job.id
        ],
        "differences": _differences([job, *others]),
    }


def _differences(jobs: list[Job]) -> list[html.Facts]:
    """Return the parameters that are not the same in all of these jobs."""
    specs = [dict(_spec(job)) for job in jobs]
    names = dict.fromkeys(name for spec in specs for name in spec)
    return [
        {"name": name, "values": [html.option(spec.get(name, "")) for spec in specs]}
        for name in names
        if any(spec.get(name) != specs[0].get(name) for spec in specs)
    ]


def head(site: Site, job: Job) -> html.Facts:
    """Return the facts at the top of each job's page."""
    (row,), around = rows.rows(site, [job])
    return {
        "job": row,
        "needs": [{"id": one, "state": str(state)} for one, state in site.queries.needs(job.id)],
        "facts": [{"name": name, "value": value} for name, value in _facts(site, job, around) if value],
        "spec": [{"name": name, "value": html.option(value)} for name, value in _spec(job)],
        "volume_trouble": site.volume_trouble() if job.attempt else None,
        "deleted_at": (job.result or {}).get("deleted_at"),
        "can": sorted(_can(job)),
        "retried_as": site.queries.retried_as(job.id) if job.state.terminal else None,
    }


def _can(job: Job) -> Iterator[str]:
    """Return the actions that the state of a job allows."""
    if job.part_of is not None:
        return
    if job.state.terminal:
        yield "retry"
    elif job.cancel_requested_at is None:
        yield "cancel"
        yield "priority"
    if job.cancel_requested_at is not None:
        return
    if job.held and not job.state.terminal:
        yield "resume" if job.attempt else "release"
    elif job.state is JobState.RUNNING:
        yield "pause"
    elif job.state is JobState.QUEUED:
        yield "hold"


def _ran_s(site: Site, job: Job, around: StatusContext) -> float:
    """Return the seconds that a job has run, without those in which it was paused or queued."""
    if job.state is JobState.RUNNING:
        attempts = site.queries.attempts(job.id) if job.attempt > 1 else []
        began_at = attempts[-1]["started_at"] if attempts else job.started_at
        return job.ran_s + max(around.now - (began_at or around.now), 0.0)
    return job.ran_s or (job.finished_at or around.now) - (job.started_at or around.now)


def _facts(site: Site, job: Job, around: StatusContext) -> Iterator[tuple[str, Any]]:
    if job.held and (hold := job_text.hold_facts(job, site.queries.events(job.id))) is not None:
        yield "held", html.cut(job_text.hold_text(hold, around.now), 300)
    yield "worker", job_text.place(job, around)
    if job.started_at is not None:
        name = "took" if job.finished_at else "running for" if job.state is JobState.RUNNING else "ran for"
        yield name, units.duration(_ran_s(site, job, around))
    yield "rate", job_text.rate_text(job_text.rate(job))
    yield "left", units.duration(job_text.eta(job))
    yield "attempt", str(job.attempt) if job.attempt > 1 else ""
    raises = job.priority > job.own_priority and not job.state.terminal
    raised = f", raised to {job.priority} by jobs that wait for it" if raises else ""
    yield "priority", f"{job.own_priority}{raised}"
    yield "queue", html.cut(job.queue, 64) if job.queue != "default" else ""
    yield "by", html.cut(job.user, 64)
    if job.bit_exact is not None:
        yield "bit-exact", "yes" if job.bit_exact else "no"


def _spec(job: Job) -> Iterator[tuple[str, Any]]:
    for name, value in job.spec.items():
        if value is not None and value != [] and value != "":
            yield html.cut(name, 64), value


def _as_drawn(job: Job, samples: list[html.Facts]) -> Job:
    """Return a training that has come as far as its newest grid; heartbeats report it seconds later."""
    so_far = job.progress or {}
    epoch, epochs, total = (so_far.get(name) for name in ("epoch", "epochs", "total"))
    drawn = max((one["epoch"] for one in samples if one["attempt"] == job.attempt), default=0)
    if job.state is not JobState.RUNNING or not isinstance(epoch, int) or not epochs or drawn <= epoch:
        return job
    done = max(so_far.get("done") or 0, (total or 0) * drawn // epochs)
    return replace(job, progress={**so_far, "epoch": drawn, "done": done})


def _run(site: Site, job: Job, others: list[Job]) -> html.Facts:
    run = run_facts(site, job)
    found = head(site, _as_drawn(job, run["samples"]))
    best = run["best"] or {}
    found["facts"] += [
        {"name": name, "value": value}
        for name, value in (
            ("verdict", _verdict(site, job)),
            ("note", evaluation_text.uninformative(run["metric"], best.get("metric"))),
        )
        if value
    ]
    return {
        **found,
        "run": run,
        "with": [run_facts(site, other) for other in others],
        "compared": ",".join(str(other.id) for other in others),
    }


def _verdict(site: Site, job: Job) -> str | None:
    """Return whether a training gets better, as `ganq status` says it."""
    if not job.attempt or site.volume_trouble() is not None:
        return None
    _, evaluations = curves_of.metrics_of(site, job).read(site.volume, job.id, job.attempt)
    events = ((one.type, one.detail) for one in site.queries.events(job.id))
    error = (job.error_code, job.error_message)
    said = of_training(evaluations, events, spec=job.spec, error=error, ended=job.state.terminal)
    return html.cut(said, 300) if said else None


def run_facts(site: Site, job: Job) -> html.Facts:
    """Return the facts for the slider: grids, checkpoints, images per epoch."""
    known = site.queries.checkpoints(job.id)
    measured = [one for one in known if one.metric is not None]
    best = min(measured, key=lambda one: (one.metric or 0.0, one.step)) if measured else None
    drawn = samples_of(site.volume, job) if site.volume_trouble() is None else []
    progress = job_text.progress_facts(job)
    epochs = progress.get("epochs") or job.spec.get("epochs")
    return {
        "id": job.id,
        "name": html.cut(job.name or f"run {job.id}", 64),
        "state": str(job.state),
        "side": side_of(job),
        "epochs": epochs,
        "epoch": progress.get("epoch"),
        "images_per_epoch": curves_of.images_per_epoch(job, []),
        "metric": job_text.metric_key(job),
        "samples": [
            {"epoch": one.epoch, "attempt": one.attempt, "url": one.url(job.id), "at": one.at}
            for one in drawn
        ],
        "checkpoints": [
            {"epoch": one.epoch, "step": one.step, "metric": one.metric}
            for one in known
            if one.kind != "resume"
        ],
        "best": None if best is None else {"epoch": best.epoch, "metric": best.metric},
        "curves": f"/jobs/{job.id}/curves",
    }


def job_facts(site: Site, job: Job) -> html.Facts:
    """Return the facts of a job that is not a training."""
    result = job.result or {}
    evaluated = job.kind == "evaluate" and job.state is JobState.SUCCEEDED
    return {
        **head(site, job),
        "gallery": gallery_facts(site, job),
        "evaluation": [html.cut(line, 400) for line in evaluation_text.lines(result)] if evaluated else [],
        "neighbours": f"/jobs/{job.id}/files/neighbours.png" if evaluated else None,
        "shards": [rows.as_row(one, StatusContext(0.0)) for one in site.queries.shards(job.id, most=200)],
    }
