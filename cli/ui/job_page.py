"""The page of one job, as `ganq status JOB` shows it."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cli.session import Session
from cli.ui import output
from jobs.durations import in_words
from jobs.errors import JobNotFoundError, VolumeError
from jobs.states import JobState
from storage.db.rows import Job
from storage.status import evaluation_text, job_text

EVENTS = 8
IMPORTANT_EVENTS = (
    "checkpoint_save_failed",
    "checkpoint_skipped",
    "collapsed",
    "dataset_damaged",
    "diverged",
    "not_bit_exact",
    "rolled_back",
    "budget_reached",
    "stopped_early",
)
"""Events of which the last few are shown even if they are old."""
MAX_IMPORTANT = 4
LOG_LINES = 8
LOG_TAIL_BYTES = 64 * 1024
SECTION_PRIORITY = ("log", "evaluation", "checkpoints", "events", "attempts", "results", "options")
"""Sections of the page in the order in which they are dropped last on a small screen."""
MANIFEST = "manifest.jsonl"
ATOMIC = ("checkpoints", "samples", "metrics.jsonl")
OUTCOMES = {"requeued": "stopped and requeued", "yielded": "preempted", "lost": "worker lost"}
"""Texts for the outcomes of attempts."""
TITLES = {"attempts": "attempts (one for each time the job was started)"}
PUBLISHED = ("grids", MANIFEST, "neighbours.png", "evaluation.json")


def lines(session: Session, job_id: int, *, rows: int | None = None, full: bool = False) -> list[str]:
    """
    Return the lines of the page.

    Args:
        rows: height of the screen that the page must fit.
        full: show all options, not only those that differ from the defaults.
    """
    queries = session.queries
    job = queries.get(job_id)
    context = job_text.StatusContext.of(queries, [job])
    job = job_text.as_one(job, context)
    page = [f"job {job.id}{f' · {output.clean(job.name)}' if job.name else ''} · {job.kind}", ""]
    volume_error = _volume_error(session, job)
    page += _aligned(_summary(session, job, context))
    if volume_error is not None:
        page += ["", f"{volume_error}; results and log are not shown"]
    measured = job.kind == "evaluate" and job.state is JobState.SUCCEEDED
    sections = {
        "attempts": list(_attempts(session, job, context)),
        "evaluation": [*map(output.clean, evaluation_text.lines(job.result or {}))] if measured else [],
        "checkpoints": list(_checkpoints(session, job)),
        "results": list(_results(session, job)) if volume_error is None else [],
        "events": list(_events(session, job)),
        "log": log_tail(session, job, LOG_LINES) if volume_error is None else [],
        "options": _aligned(_options(job, full)),
    }
    if rows is not None:
        sections = _fit_sections(sections, rows - len(page))
    for title, body in sections.items():
        page += _section(TITLES.get(title, title), body)
    return page[:rows]


def _fit_sections(sections: dict[str, list[str]], rows: int) -> dict[str, list[str]]:
    """Return the sections that fit; the log is shortened if necessary."""
    chosen = set()
    for title in SECTION_PRIORITY:
        body = sections[title]
        if title == "log":
            body = sections[title] = body[-max(rows - 2, 1) :]
        if body and len(body) + 2 <= rows:
            chosen.add(title)
            rows -= len(body) + 2
    return {title: body for title, body in sections.items() if title in chosen}


def as_json(session: Session, job_id: int) -> dict[str, Any]:
    """Return the page as JSON."""
    queries = session.queries
    job = queries.get(job_id)
    context = job_text.StatusContext.of(queries, [job])
    volume_error = _volume_error(session, job)
    paths = result_paths(session, job) if volume_error is None else {}
    return {
        **job_text.as_json(job, context),
        "queue_position": queries.queue_position(job) + 1 if _claimable(job) else None,
        "inputs": job.inputs,
        "hold": job_text.hold_facts(job, queries.events(job.id)) if job.held else None,
        "attempts": queries.attempts(job.id),
        "checkpoints": [each.__dict__ for each in queries.checkpoints(job.id)],
        "events": [event.__dict__ for event in queries.events(job.id)],
        "log_tail": log_tail(session, job, LOG_LINES) if volume_error is None else [],
        "paths": {name: str(path) for name, path in paths.items()},
        "volume_error": volume_error,
        **({"verdict": _verdict(session, job)} if job.kind == "train" else {}),
    }


def _volume_error(session: Session, job: Job) -> str | None:
    """Return why the files of a job cannot be read from this machine, if so."""
    if job.attempt:
        try:
            session.volume_of(job)
        except VolumeError as exc:
            return exc.message
    return None


def result_paths(session: Session, job: Job) -> dict[str, Path]:
    """
    Return the paths of the results by name.

    Images are results only when the job has succeeded; samples and checkpoints are complete
    as soon as they exist.
    """
    if job.attempt == 0:
        return {}
    folder = session.volume_of(job).attempt(job.id, job.attempt)
    found = {"folder": folder}
    names = {Path(name).stem: name for name in ATOMIC}
    if job.state is JobState.SUCCEEDED:
        # A folder or an archive, depending on the format. (In the result of a training, a number.)
        images = (job.result or {}).get("images")
        names |= {"images": images if isinstance(images, str) else "images"}
        names |= {Path(name).stem: name for name in PUBLISHED}
    found |= {what: folder / name for what, name in names.items() if (folder / name).exists()}
    if "samples" in found and (of_all := session.volume.samples(job.id)).exists():
        found["samples"] = of_all
    out = job.spec.get("out")
    result = job.result or {}
    if out is not None and job.state is JobState.SUCCEEDED and Path(out).is_dir():  # noqa: SIM102
        if result.get("out") or ("out_pending" in result and Path(out, MANIFEST).exists()):
            found["copy"] = Path(out)
    return found


def log_tail(session: Session, job: Job, count: int) -> list[str]:
    """Return the last lines of the log of the newest attempt; [] if it cannot be read."""
    if job.attempt == 0:
        return []
    path = session.volume_of(job).attempt(job.id, job.attempt) / "log.txt"
    try:
        with open(path, "rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES)
            file.seek(start)
            text = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [output.clean(line) for line in text[-count:]]


# --- the parts of the page ----------------------------------------------------------------


def _summary(session: Session, job: Job, context: job_text.StatusContext) -> Iterator[tuple[str, str]]:
    yield "state", job_text.state(job, context)
    if job.held and (hold := job_text.hold_facts(job, session.queries.events(job.id))) is not None:
        yield "held", job_text.hold_text(hold, context.now)
        does = "continues it" if job_text.is_paused(job, context) else "lets it go on"
        yield "", f"→ ganq resume {job.id} {does}"
    if job.state is JobState.RUNNING and job_text.silent_s(job, context) > job_text.UNRESPONSIVE_S:
        others = job_text.served(job.queue, context.workers.values())
        then = (
            "another worker requeues the job" if others else "start a worker (ganq up): it requeues the job"
        )
        yield "", f"→ the worker has stopped sending heartbeats; {then}"
    if job.state is JobState.CANCELLED and (by := _cancelled_by(session, job)):
        yield "cancelled", by
    if job.error_message:
        yield "error", f"{job.error_message} [{job.error_code}]"
    if job.error_hint:
        yield "", f"→ {job.error_hint}"
    if job.malformed:
        yield "malformed", f"this row was not written by ganq: {job.malformed}"
        if job.state is JobState.QUEUED:
            yield (
                "",
                f"→ a worker will fail it with BAD_SPEC; ganq cancel {job.id}, and submit it again",
            )
    if failed := (job.result or {}).get("out_error"):
        yield "not copied", f"{failed} (the images are on the volume: ganq open {job.id})"
    pending = (job.result or {}).get("out_pending")
    if pending and "deleted_at" not in (job.result or {}) and not Path(pending, MANIFEST).exists():
        yield "not copied", f"to {pending}: the worker runs as another account"
        yield "", f"→ ganq download {job.id}"
    share, progress = job_text.fraction(job), job_text.progress(job)
    if progress:
        how_far = f" {share:.0%}" if share and not job.state.terminal else ""
        yield "progress", f"{job_text.bar(share, 24)} {progress}{how_far}"
    if (speed := job_text.rate(job)) is not None:
        left = job_text.eta(job)
        ends = f", {output.duration(left)} left" if left is not None else ""
        yield "rate", f"{speed:,.1f} images/s{ends}"
    if _claimable(job):
        yield "in the queue", _queue_position_text(session, job, context)
    if (parts := context.parts.get(job.id)) is not None:
        counts = f"{parts.ended} of {parts.number} ended, {parts.running} running"
        yield "shards", f"{counts}   (ganq status {job.id} --shards)"
    if job.part_of is not None:
        yield "shard of", f"job {job.part_of}"
    for needed, how in session.queries.needs(job.id):
        yield "after", f"job {needed} ({how})"
    for needed, condition, state in session.queries.waits_for_end(job.id):
        yield "after", f"the {'failure' if condition == 'fail' else 'end'} of job {needed} ({state})"
    if job.note:
        yield "note", job.note
    if labels := context.labels.get(job.id):
        yield "labels", "  ".join(f"{key}={value}" for key, value in labels.items())
    yield "from", _source(session, job) or ""
    yield from _data(session, job)
    yield "worker", job_text.place(job, context)
    yield "submitted", f"{output.timestamp(job.created_at)} by {job.user}"
    yield "started", output.timestamp(job.started_at)
    yield "ended", output.timestamp(job.finished_at)
    if job.started_at is not None:
        yield "took", output.duration((job.finished_at or context.now) - job.started_at)
    if job.time_limit_s is not None:
        ran_s = job.ran_s + _runs_for(session, job, context)
        yield "time limit", f"{in_words(job.time_limit_s)} of run time, {in_words(ran_s)} used"
    if job.retry_of is not None:
        yield "retry of", f"job {job.retry_of}"
    if deleted_at := (job.result or {}).get("deleted_at"):
        yield "files", f"deleted by ganq gc, {output.timestamp(deleted_at)}, except the log"
    if job.bit_exact is not None:
        yield "bit-exact", _bit_exact(job)
    if warning := (job.result or {}).get("warning"):
        yield "warning", str(warning)
    if job.kind == "train" and (getting_better := _verdict(session, job)):
        yield "verdict", getting_better
    if measured := _metric(session, job):
        yield "metric", measured
    if stopped := (job.result or {}).get("stopped"):
        yield "ended", stopped
    if epochs := (job.result or {}).get("epochs"):
        yield "epochs", f"{', '.join(map(str, epochs))}   (rows of grids/epochs.png)"
    if note := (job.result or {}).get("note"):
        yield "note", str(note)
    preempted = f", preempted {output.count(job.yields, 'time')}" if job.yields else ""
    if (back := (job.result or {}).get("rollbacks")) and back[-1]["lr_scale"] != 1:
        yield "learning rate", f"halved: the training diverged at step {back[-1]['step']:,}"
    lent = ""
    if job.priority > job.own_priority and not job.state.terminal:
        lent = f", raised to {job.priority} by {_priority_source_text(session, job)}"
    yield "queue", f"{job.queue}, priority {job.own_priority}{lent}{preempted}"
    if job.kept:
        yield "kept", f"yes   (ganq keep --undo {job.id} allows deletion)"


def _queue_position_text(session: Session, job: Job, context: job_text.StatusContext) -> str:
    """Describe what a job that is ready to run is waiting for."""
    ahead = session.queries.queue_position(job)
    text = "next" if ahead == 0 else f"{output.count(ahead, 'job')} ahead"
    full = session.quotas.quota_blocking_job(job)
    if full is not None:
        limit = f"{full.scope} {full.name}: {full.running} running, limit {full.max_running}"
        text += f", when its limit permits: {limit}   (ganq limit)"
    served = job_text.served(job.queue, context.workers.values())
    if served is None:
        text += ", but no worker is running   (ganq up, or ganq worker)"
    elif not served:
        text += f", but no running worker serves the queue {job.queue}   (ganq worker --queues {job.queue})"
    return text


def _source(session: Session, job: Job) -> str | None:
    """Describe the model of a generation, or the subject of an evaluation."""
    source = job.spec.get("source")
    if job.kind not in ("generate", "evaluate") or not isinstance(source, int):
        return None
    with suppress(JobNotFoundError):
        model = session.queries.get(source)
        name = f" ({model.name})" if model.name else ""
        epoch = ((job.inputs or {}).get("checkpoint") or {}).get("epoch")
        if model.kind == "generate":
            return f"the images of job {source}{name}"
        which = job.spec.get("checkpoint") if epoch is None else f"epoch {epoch:,}"
        return f"job {source}{name}, checkpoint {which}"
    return f"job {source}"


def _bit_exact(job: Job) -> str:
    """Return whether the job's bits are those of another run, and which builds computed them."""
    builds = (job.result or {}).get("builds") or []
    if job.bit_exact:
        other = "one that was not split" if builds else "an uninterrupted run"
        return f"yes (identical to {other})"
    if not builds:
        return "no: resumed on another device, build or number of threads"
    names = (
        f"{one.get('shards')} on {one.get('device')}, torch {one.get('torch')}, {one.get('threads')} threads"
        for one in builds
    )
    return f"no: shards were computed by different builds: {'; '.join(names)}"


def _data(session: Session, job: Job) -> Iterator[tuple[str, str]]:
    """Describe what the first attempt found in its data set."""
    details = [event.detail or {} for event in session.queries.events(job.id) if event.type == "dataset"]
    if not details:
        return
    from storage.datasets.summary import Summary

    with suppress(TypeError, ValueError, KeyError):  # written by a newer version
        for detail in {each.get("of", ""): each for each in details}.values():
            summary = Summary.from_json(detail)
            yield "data", output.count(summary.images, "image")
            white_level, grey = job.spec.get("white_level", 0.0), job.spec.get("grey", False)
            fit = job.spec.get("fit", "crop")
            for line in summary.lines(white_level=white_level, grey=grey, fit=fit):
                yield "", line


def _cancelled_by(session: Session, job: Job) -> str | None:
    """Return who has cancelled a job, and when, if that is recorded."""
    requests = [event for event in session.queries.events(job.id) if event.type == "cancel_requested"]
    if not requests:
        return None
    who = (requests[0].detail or {}).get("by")
    return f"requested{f' by {who}' if who else ''} at {output.timestamp(requests[0].at)}"


def _verdict(session: Session, job: Job) -> str | None:
    """Return whether a training gets better, in a word."""
    from storage.results.attempts import Metrics
    from storage.status.verdict import of_training

    if job.attempt == 0:
        return None
    evaluations: list[dict[str, Any]] | None = None
    if "deleted_at" not in (job.result or {}):
        with suppress(VolumeError):
            evaluations = Metrics().read(session.volume_of(job), job.id, job.attempt)[1]
    events = ((event.type, event.detail) for event in session.queries.events(job.id))
    error = (job.error_code, job.error_message)
    return of_training(evaluations, events, spec=job.spec, error=error, ended=job.state.terminal)


def _metric(session: Session, job: Job) -> str | None:
    """Describe the metric of the best checkpoint, with the real-vs-real baseline."""
    measured = [each for each in session.queries.checkpoints(job.id) if each.metric is not None]
    found = (job.result or {}).get("metric") or {}
    if not measured:
        if missing := (job.result or {}).get("no_metric"):
            return f"none: {missing}"
        if "last" not in found or "best" in found:  # not requested, or its checkpoints were deleted
            return None
        reason = "at the end; no checkpoint is the best: the images of each are almost identical"
        return f"{job_text.metric_key(job)} {found['last']:.4g} {reason}"
    best = min(measured, key=lambda each: (each.metric or 0.0, each.step))
    baseline, key = found.get("baseline"), job_text.metric_key(job)
    notes = "" if baseline is None else f"; baseline, real against real images: {baseline:.4g}"
    if key == "kid/effnet-lite0" and (best.metric or 0.0) > evaluation_text.UNINFORMATIVE_KID:
        notes += (
            f"; values above {evaluation_text.UNINFORMATIVE_KID:g} are not informative: look at the samples"
        )
    return f"{key} {best.metric:.4g} at epoch {best.epoch}, the best{notes}"


def _runs_for(session: Session, job: Job, context: job_text.StatusContext) -> float:
    """Return the seconds since the start of the running attempt."""
    if job.state is not JobState.RUNNING or not (attempts := session.queries.attempts(job.id)):
        return 0.0
    return float(max(context.now - attempts[-1]["started_at"], 0.0))


def _priority_source_text(session: Session, job: Job) -> str:
    """Name the jobs that are waiting on this one and raise its priority."""
    found = session.queries.priority_sources(job)
    return ("job " if len(found) == 1 else "jobs ") + ", ".join(map(str, found)) if found else "others"


def _claimable(job: Job) -> bool:
    return job.state is JobState.QUEUED and not job.held and not job.blockers


def _options(job: Job, full: bool) -> Iterator[tuple[str, str]]:
    if not full:
        yield from job_text.changed_options(job).items()
        yield "", f"other options have their defaults   (ganq status {job.id} --full)"
        return
    for name, value in job.spec.items():
        if value not in (None, [], ""):
            yield name, job_text.option_text(value)


def _attempts(session: Session, job: Job, context: job_text.StatusContext) -> Iterator[str]:
    for attempt in session.queries.attempts(job.id):
        took = output.duration((attempt["ended_at"] or context.now) - attempt["started_at"])
        reason = f": {attempt['error_message']}" if attempt["error_message"] else ""
        outcome = OUTCOMES.get(attempt["outcome"], attempt["outcome"]) or "running"
        yield output.clean(
            f"{attempt['number']}  {outcome} after {took} on {attempt['worker']}"
            f" ({attempt['device'] or '?'}, {attempt['host'] or '?'}){reason}"
        )


def _checkpoints(session: Session, job: Job) -> Iterator[str]:
    known = session.queries.checkpoints(job.id)
    if not known:
        return
    last = known[-1]
    epochs = sorted({each.epoch for each in known if each.kind != "resume"})
    listed = ", ".join(map(str, epochs[-12:]))
    yield f"{output.count(len(known), 'checkpoint')}, newest at epoch {last.epoch}, step {last.step:,}"
    if epochs:
        yield f"epochs {'… ' if len(epochs) > 12 else ''}{listed}   (ganq checkpoints {job.id})"


def _results(session: Session, job: Job) -> Iterator[str]:
    paths = result_paths(session, job)
    if not paths:
        return
    yield from _aligned((name, str(path)) for name, path in paths.items())
    if "deleted_at" not in (job.result or {}):
        yield f"ganq open {job.id}"


def _events(session: Session, job: Job) -> Iterator[str]:
    known = session.queries.events(job.id)
    earlier = known[:-EVENTS]
    if earlier:
        yield f"… {len(earlier)} earlier   (ganq events {job.id})"
    important = [event for event in earlier if event.type in IMPORTANT_EVENTS][-MAX_IMPORTANT:]
    for event in [*important, *known[-EVENTS:]]:
        yield event_line(event)


def event_line(event: Any) -> str:
    """Return an event as one line."""
    columns = [output.timestamp(event.at), event.type]
    if event.attempt is not None:
        columns.append(f"attempt {event.attempt}")
    if event.worker:
        columns.append(event.worker)
    columns += [f"{key}={value}" for key, value in (event.detail or {}).items()]
    return output.clean("  ".join(columns))


def _aligned(facts: Any) -> list[str]:
    pairs = [(name, output.clean(value)) for name, value in facts if value not in ("", None)]
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"{name.ljust(width)}  {value}" for name, value in pairs]


def _section(title: str, body: list[str]) -> list[str]:
    return ["", title, *(f"  {line}" for line in body)] if body else []
