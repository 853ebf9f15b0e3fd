"""Everything about one job, as `ganq status JOB` shows it."""

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
TROUBLES = (
    "checkpoint_save_failed",
    "checkpoint_skipped",
    "dataset_damaged",
    "not_bit_exact",
    "rolled_back",
    "stopped_early",
)
"""Events that are shown however long ago they were, the last few of them."""
TROUBLES_SHOWN = 4
LOG_LINES = 8
LOG_TAIL_BYTES = 64 * 1024
BLURRED_KID = 1
"""Faces with noise that one hardly sees get 0.86, black squares 1.80: docs/quality.md."""
MOST_WATCHED = ("log", "evaluation", "checkpoints", "events", "attempts", "results", "spec")
"""The sections of a page, in the order in which a small screen has room for them."""
WHOLE_AT_ONCE = ("checkpoints", "samples", "metrics.jsonl")
PUBLISHED = ("grids", "manifest.jsonl", "neighbours.png", "evaluation.json")


def lines(session: Session, job_id: int, *, rows: int | None = None) -> list[str]:
    """
    The page for a person, line by line.

    Args:
        rows: of a screen that it must fit; what changes goes before what does not.
    """
    queries = session.queries
    job = queries.get(job_id)
    around = job_text.StatusContext.of(queries, [job])
    job = job_text.as_one(job, around)
    page = [f"job {job.id}{f' · {output.clean(job.name)}' if job.name else ''} · {job.kind}", ""]
    silence = _silence(session, job)
    page += _facts(_about(session, job, around))
    if silence is not None:
        page += ["", f"{silence}: its results and its log are not shown"]
    measured = job.kind == "evaluate" and job.state is JobState.SUCCEEDED
    sections = {
        "attempts": list(_attempts(session, job, around)),
        "evaluation": [*map(output.clean, evaluation_text.lines(job.result or {}))] if measured else [],
        "checkpoints": list(_checkpoints(session, job)),
        "results": list(_results(session, job)) if silence is None else [],
        "events": list(_events(session, job)),
        "log": log_tail(session, job, LOG_LINES) if silence is None else [],
        "spec": _facts(_spec(job)),
    }
    if rows is not None:
        sections = _fitting(sections, rows - len(page))
    for title, body in sections.items():
        page += _section(title, body)
    return page[:rows]


def _fitting(sections: dict[str, list[str]], rows: int) -> dict[str, list[str]]:
    """The sections for which there is room, the log shortened to it if need be."""
    chosen = set()
    for title in MOST_WATCHED:
        body = sections[title]
        if title == "log":
            body = sections[title] = body[-max(rows - 2, 1) :]
        if body and len(body) + 2 <= rows:
            chosen.add(title)
            rows -= len(body) + 2
    return {title: body for title, body in sections.items() if title in chosen}


def as_json(session: Session, job_id: int) -> dict[str, Any]:
    """The same for a program."""
    queries = session.queries
    job = queries.get(job_id)
    around = job_text.StatusContext.of(queries, [job])
    silence = _silence(session, job)
    paths = result_paths(session, job) if silence is None else {}
    return {
        **job_text.as_json(job, around),
        "queue_position": queries.queue_position(job) + 1 if _claimable(job) else None,
        "inputs": job.inputs,
        "attempts": queries.attempts(job.id),
        "checkpoints": [one.__dict__ for one in queries.checkpoints(job.id)],
        "events": [one.__dict__ for one in queries.events(job.id)],
        "log_tail": log_tail(session, job, LOG_LINES) if silence is None else [],
        "paths": {name: str(path) for name, path in paths.items()},
        "volume_error": silence,
    }


def _silence(session: Session, job: Job) -> str | None:
    """Return that the volume does not answer, if it does not and the job has anything there."""
    if job.attempt:
        try:
            session.volume  # noqa: B018 - asking is the check
        except VolumeError as exc:
            return exc.message
    return None


def result_paths(session: Session, job: Job) -> dict[str, Path]:
    """
    Where a job's results lie, by what they are: what its newest attempt holds.

    Pictures count as results once the job has succeeded; samples and checkpoints are
    whole as soon as they are there.
    """
    if job.attempt == 0:
        return {}
    folder = session.volume.attempt(job.id, job.attempt)
    found = {"folder": folder}
    names = {Path(name).stem: name for name in WHOLE_AT_ONCE}
    if job.state is JobState.SUCCEEDED:
        # Pictures are a folder of files or an archive, as their format has it.
        # (A training's result says by the same word how many it has seen.)
        images = (job.result or {}).get("images")
        names |= {"images": images if isinstance(images, str) else "images"}
        names |= {Path(name).stem: name for name in PUBLISHED}
    found |= {what: folder / name for what, name in names.items() if (folder / name).exists()}
    out = job.spec.get("out")
    if out and job.state is JobState.SUCCEEDED and (job.result or {}).get("out") and Path(out).is_dir():
        found["copy"] = Path(out)
    return found


def log_tail(session: Session, job: Job, count: int) -> list[str]:
    """The last lines of the newest attempt's log; [] if there is none that can be read."""
    if job.attempt == 0:
        return []
    path = session.volume.attempt(job.id, job.attempt) / "log.txt"
    try:
        with open(path, "rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES)
            file.seek(start)
            said = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [output.clean(line) for line in said[-count:]]


# --- the parts of the page ----------------------------------------------------------------


def _about(session: Session, job: Job, around: job_text.StatusContext) -> Iterator[tuple[str, str]]:
    yield "state", job_text.state(job, around)
    if job.error_message:
        yield "error", f"{job.error_message} [{job.error_code}]"
    if job.error_hint:
        yield "", f"→ {job.error_hint}"
    if job.malformed:
        yield "malformed", f"no ganq wrote this row: {job.malformed}"
        if job.state is JobState.QUEUED:
            yield "", "→ a worker fails it with BAD_SPEC; or ganq cancel it, and submit it again"
    if failed := (job.result or {}).get("out_error"):
        yield "not copied", f"{failed} (the pictures themselves are safe: ganq open {job.id})"
    share, progress = job_text.fraction(job), job_text.progress(job)
    if progress:
        how_far = f" {share:.0%}" if share and not job.state.terminal else ""
        yield "progress", f"{job_text.bar(share, 24)} {progress}{how_far}"
    if (speed := job_text.rate(job)) is not None:
        left = job_text.eta(job)
        ends = f", {output.duration(left)} left" if left is not None else ""
        yield "rate", f"{speed:,.1f} pictures/s{ends}"
    if _claimable(job):
        yield "in the queue", _place(session, job, around)
    if (parts := around.parts.get(job.id)) is not None:
        told = f"{parts.ended} of {parts.number} have ended, {parts.running} running"
        yield "parts", f"{told}   (ganq status {job.id} --parts)"
    if job.part_of is not None:
        yield "part of", f"job {job.part_of}"
    for needed, how in session.queries.needs(job.id):
        yield "after", f"job {needed} ({how})"
    yield "from", _source(session, job) or ""
    yield from _data(session, job)
    yield "worker", job_text.place(job, around)
    yield "submitted", f"{output.timestamp(job.created_at)} by {job.user}"
    yield "started", output.timestamp(job.started_at)
    yield "ended", output.timestamp(job.finished_at)
    if job.started_at is not None:
        yield "took", output.duration((job.finished_at or around.now) - job.started_at)
    if job.time_limit_s is not None:
        ran_s = job.ran_s + _runs_for(session, job, around)
        yield "time limit", f"{in_words(job.time_limit_s)} of running, {in_words(ran_s)} used"
    if job.retry_of is not None:
        yield "retry of", f"job {job.retry_of}"
    if deleted_at := (job.result or {}).get("deleted_at"):
        yield "files", f"its results were deleted by ganq gc, {output.timestamp(deleted_at)}; its log stays"
    if job.bit_exact is not None:
        yield (
            "bit-exact",
            "yes" if job.bit_exact else "no: it was resumed on another device, build or number of threads",
        )
    if measured := _metric(session, job):
        yield "metric", measured
    if stopped := (job.result or {}).get("stopped"):
        yield "ended", stopped
    if epochs := (job.result or {}).get("epochs"):
        yield "epochs", f"{', '.join(map(str, epochs))}   (rows of grids/epochs.png)"
    if note := (job.result or {}).get("note"):
        yield "note", str(note)
    yields = f", yielded {output.count(job.yields, 'time')} to others" if job.yields else ""
    if (back := (job.result or {}).get("rollbacks")) and back[-1]["lr_scale"] != 1:
        yield "rates", f"halved: the training had diverged at step {back[-1]['step']:,}"
    lent = ""
    if job.priority > job.own_priority and not job.state.terminal:
        lent = f", {job.priority} lent by {_lenders(session, job)}"
    yield "queue", f"{job.queue}, priority {job.own_priority}{lent}{yields}"


def _place(session: Session, job: Job, around: job_text.StatusContext) -> str:
    """What a job waits for that could run."""
    from storage.db.quotas import Quotas

    ahead = session.queries.queue_position(job)
    place = "next" if ahead == 0 else f"{output.count(ahead, 'job')} before it"
    full = Quotas(session.database).full_for(job.user, job.queue)
    if full is not None:
        limit = f"the {full.scope} {full.name} may run {full.max_running} at once, and {full.running} run"
        place += f", once its limit lets it: {limit}   (ganq limit)"
    served = job_text.served(job.queue, around.workers.values())
    if served is None:
        place += ", but no worker is running   (ganq up, or ganq worker)"
    elif not served:
        place += f", but no running worker serves the queue {job.queue}   (ganq worker --queues {job.queue})"
    return place


def _source(session: Session, job: Job) -> str | None:
    """What a generation draws from, or an evaluation looks at."""
    source = job.spec.get("source")
    if job.kind not in ("generate", "evaluate") or not isinstance(source, int):
        return None
    with suppress(JobNotFoundError):
        model = session.queries.get(source)
        name = f" ({model.name})" if model.name else ""
        epoch = ((job.inputs or {}).get("checkpoint") or {}).get("epoch")
        if model.kind == "generate":
            return f"job {source}{name}: its pictures"
        which = job.spec.get("checkpoint") if epoch is None else f"epoch {epoch:,}"
        return f"job {source}{name}, checkpoint {which}"
    return f"job {source}"


def _data(session: Session, job: Job) -> Iterator[tuple[str, str]]:
    """What the first attempt found in its data set: what it uses, leaves out and converts."""
    found = [one.detail or {} for one in session.queries.events(job.id) if one.type == "dataset"]
    if not found:
        return
    from storage.datasets.summary import Summary

    with suppress(TypeError, ValueError, KeyError):  # of a newer version
        for detail in {one.get("of", ""): one for one in found}.values():
            summary = Summary.from_json(detail)
            yield "data", output.count(summary.images, "image")
            options = job.spec.get("white_level", 0.0), job.spec.get("grey", False)
            for line in summary.lines(white_level=options[0], grey=options[1]):
                yield "", line


def _metric(session: Session, job: Job) -> str | None:
    """The best checkpoint's value, and what real pictures get among themselves once that is known."""
    measured = [one for one in session.queries.checkpoints(job.id) if one.metric is not None]
    found = (job.result or {}).get("metric") or {}
    if not measured:
        if missing := (job.result or {}).get("no_metric"):
            return f"none: {missing}"
        if "last" not in found or "best" in found:  # never asked for, or its checkpoints are deleted
            return None
        told = "at the end; no checkpoint is called the best: the pictures of each are too much alike"
        return f"{job_text.metric_key(job)} {found['last']:.4g} {told}"
    best = min(measured, key=lambda one: (one.metric or 0.0, one.step))
    baseline, key = found.get("baseline"), job_text.metric_key(job)
    told = "" if baseline is None else f"; real-vs-real baseline {baseline:.4g}"
    if key == "kid/effnet-lite0" and (best.metric or 0.0) > BLURRED_KID:
        told += f"; above {BLURRED_KID:g} it tells little, so look at the samples"
    return f"{key} {best.metric:.4g} at epoch {best.epoch}, the best{told}"


def _runs_for(session: Session, job: Job, around: job_text.StatusContext) -> float:
    """Seconds that the attempt has run that is running now."""
    if job.state is not JobState.RUNNING or not (attempts := session.queries.attempts(job.id)):
        return 0.0
    return float(max(around.now - attempts[-1]["started_at"], 0.0))


def _lenders(session: Session, job: Job) -> str:
    """The jobs that wait for this one and have its priority."""
    found = session.queries.lenders(job)
    return ("job " if len(found) == 1 else "jobs ") + ", ".join(map(str, found)) if found else "others"


def _claimable(job: Job) -> bool:
    return job.state is JobState.QUEUED and not job.held and not job.blockers


def _spec(job: Job) -> Iterator[tuple[str, str]]:
    for name, value in job.spec.items():
        if value is None or value == [] or value == "":
            continue
        if isinstance(value, list):
            value = ", ".join("-".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)
        yield name, str(value)


def _attempts(session: Session, job: Job, around: job_text.StatusContext) -> Iterator[str]:
    for one in session.queries.attempts(job.id):
        took = output.duration((one["ended_at"] or around.now) - one["started_at"])
        why = f": {one['error_message']}" if one["error_message"] else ""
        yield output.clean(
            f"{one['number']}  {one['outcome'] or 'running'} after {took} on {one['worker']}"
            f" ({one['device'] or '?'}, {one['host'] or '?'}){why}"
        )


def _checkpoints(session: Session, job: Job) -> Iterator[str]:
    known = session.queries.checkpoints(job.id)
    if not known:
        return
    last = known[-1]
    epochs = sorted({one.epoch for one in known if one.kind != "resume"})
    listed = ", ".join(map(str, epochs[-12:]))
    yield f"{output.count(len(known), 'checkpoint')}, newest at epoch {last.epoch}, step {last.step:,}"
    if epochs:
        yield f"epochs {'… ' if len(epochs) > 12 else ''}{listed}   (ganq checkpoints {job.id})"


def _results(session: Session, job: Job) -> Iterator[str]:
    paths = result_paths(session, job)
    if not paths:
        return
    yield from _facts((name, str(path)) for name, path in paths.items())
    if "deleted_at" not in (job.result or {}):
        yield f"ganq open {job.id}"
    if job.attempt > 1:
        yield f"those of earlier attempts lie beside it, in {paths['folder'].parent}"


def _events(session: Session, job: Job) -> Iterator[str]:
    known = session.queries.events(job.id)
    earlier = known[:-EVENTS]
    if earlier:
        yield f"… {len(earlier)} earlier   (ganq events {job.id})"
    for one in [*[old for old in earlier if old.type in TROUBLES][-TROUBLES_SHOWN:], *known[-EVENTS:]]:
        yield event_line(one)


def event_line(one: Any) -> str:
    """One event in one line."""
    parts = [output.timestamp(one.at), one.type]
    if one.attempt is not None:
        parts.append(f"attempt {one.attempt}")
    if one.worker:
        parts.append(one.worker)
    parts += [f"{key}={value}" for key, value in (one.detail or {}).items()]
    return output.clean("  ".join(parts))


def _facts(facts: Any) -> list[str]:
    pairs = [(name, output.clean(value)) for name, value in facts if value not in ("", None)]
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"{name.ljust(width)}  {value}" for name, value in pairs]


def _section(title: str, body: list[str]) -> list[str]:
    return ["", title, *(f"  {line}" for line in body)] if body else []
