"""
Describe the state and progress of a job in more detail than its `state` column.

A running job with a cancel request is 'cancelling'; a queued one may be held, waiting on
another job, or waiting for a retry. Used by all commands and by the web page.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from jobs.budgets import read_budget
from jobs.errors import SpecError
from jobs.states import JobState
from storage.db.backoff import BACKOFF_S
from storage.db.queries import Queries
from storage.db.rows import CANNOT_CLAIM, Event, Job, WorkerRow
from storage.db.store.shards import ShardSummary
from storage.status import evaluation_text
from storage.status.units import clean, count, duration, roughly, timestamp

UNRESPONSIVE_S = 60.0
"""A worker without a heartbeat for this long is shown as unresponsive; the reaper requeues its job."""
STALE_S = 25.0
"""After this long without a heartbeat (the default interval is 10 s), rate and ETA are not shown."""


@dataclass(frozen=True)
class StatusContext:
    """Facts beside a job's own row that its texts depend on."""

    now: float
    workers: Mapping[str, WorkerRow] = field(default_factory=dict)
    unfinished_dependencies: Mapping[int, Sequence[int]] = field(default_factory=dict)
    parts: Mapping[int, ShardSummary] = field(default_factory=dict)
    labels: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    warnings: Mapping[int, str] = field(default_factory=dict)
    """Why running trainings have diverged or collapsed; of those that have ended, the result says it."""
    preempted_by: Mapping[int, int] = field(default_factory=dict)
    """The jobs for which queued jobs gave up their worker."""

    @classmethod
    def of(
        cls,
        queries: Queries,
        jobs: Iterable[Job],
        labels: Mapping[int, Mapping[str, str]] | None = None,
    ) -> "StatusContext":
        """
        Load the context of some jobs.

        Args:
            labels: of the jobs, if they are known; else they are read.
        """
        jobs = list(jobs)
        waiting = [job.id for job in jobs if job.state is JobState.QUEUED and job.blockers]
        training = [job.id for job in jobs if job.state is JobState.RUNNING and job.kind == "train"]
        preempted = [job.id for job in jobs if job.state is JobState.QUEUED and job.yielded_at is not None]
        return cls(
            now=queries.now(),
            workers={row.name: row for row in queries.workers()},
            unfinished_dependencies=queries.unfinished_dependencies(waiting) if waiting else {},
            parts=queries.shard_summaries(waiting) if waiting else {},
            labels=queries.labels_of([job.id for job in jobs]) if labels is None else labels,
            warnings=queries.instabilities(training) if training else {},
            preempted_by=queries.preempted_by(preempted) if preempted else {},
        )


TAKES_NO_JOB = ("stopped", "draining", *CANNOT_CLAIM)


def served(queue: str, workers: Iterable[WorkerRow]) -> bool | None:
    """Return whether a live worker serves this queue; None if there is no live worker."""
    alive = [row for row in workers if row.silent_s < UNRESPONSIVE_S and row.state not in TAKES_NO_JOB]
    return any(queue in row.queues.split(",") for row in alive) if alive else None


def as_one(job: Job, context: StatusContext) -> Job:
    """
    Return a job as displayed.

    A split job with active shards is running, with the sum of their progress. A running job whose
    worker has stopped sending heartbeats has no rate and no ETA.
    """
    if job.state is JobState.RUNNING and silent_s(job, context) > STALE_S and job.progress:
        return replace(job, progress={**job.progress, "rate": None})
    parts = context.parts.get(job.id)
    if parts is None or job.state is not JobState.QUEUED or not job.blockers or not parts.under_way:
        return job
    progress = {"done": parts.done, "total": parts.total, "unit": "images"}
    if job.held and not parts.running:
        return replace(job, progress=progress)
    return replace(
        job,
        state=JobState.RUNNING,
        progress={**progress, "rate": round(parts.rate, 2) or None},
        worker=", ".join(parts.workers) or None,
    )


def silent_s(job: Job, context: StatusContext) -> float:
    """Return the seconds since the last heartbeat of the job's worker; 0 if it has no worker."""
    worker = context.workers.get(job.worker or "")
    return worker.silent_s if worker is not None else 0.0


def state(job: Job, context: StatusContext) -> str:
    """Return the state, and the reason if the job makes no progress."""
    if job.malformed and not (job.state.terminal and job.error_code):
        return f"{job.state}: malformed"
    if job.state is JobState.RUNNING:
        if job.cancel_requested_at is not None:
            return "cancelling"
        if (silence := silent_s(job, context)) > UNRESPONSIVE_S:
            return f"unresponsive for {duration(silence)}"
        return "pausing" if job.held else "running"
    if job.state is JobState.SUCCEEDED and job.cancel_requested_at is not None:
        return "succeeded (cancel too late)"
    if job.state is not JobState.QUEUED:
        return str(job.state)
    if job.held:
        return "paused" if is_paused(job, context) else "held"
    if job.blockers:
        needed = context.unfinished_dependencies.get(job.id, ())
        if job.begin_at is not None and not needed:
            return f"begins {timestamp(job.begin_at)}"
        if job.throttled and not needed:
            return f"waiting on its sweep ({job.max_running} run at once)"
        if not needed and job.id in context.parts:
            return "queued"
        return f"waiting on {', '.join(map(str, needed)) or 'another job'}"
    if job.not_before is not None and job.not_before > context.now:
        why = f": {job.error_code}" if job.error_code else ""
        # At most the longest backoff: the time was written by a clock that may differ from this one.
        return f"retry in {duration(min(job.not_before - context.now, BACKOFF_S[-1]))}{why}"
    by = context.preempted_by.get(job.id)
    return "queued" if by is None else f"preempted by job {by}"


def is_paused(job: Job, context: StatusContext) -> bool:
    """Return whether a job is held that has started, so that releasing it continues it."""
    parts = context.parts.get(job.id)
    begun = job.attempt > 0 or (parts is not None and parts.under_way)
    return job.held and job.state is JobState.QUEUED and begun


def hold_facts(job: Job, events: Iterable[Event]) -> dict[str, Any] | None:
    """Return who has held or paused a job that has not ended, when (seconds since 1970) and why."""
    if not job.held or job.state.terminal:
        return None
    asked = [one for one in events if one.type in ("held", "pause_requested")]
    if not asked:
        return {"at": job.created_at, "by": job.user, "reason": None}  # submitted with --hold
    detail = asked[-1].detail or {}
    return {"at": asked[-1].at, "by": detail.get("by"), "reason": detail.get("reason")}


def hold_text(facts: Mapping[str, Any], now: float) -> str:
    """Return e.g. 'by ada, 12 min ago: the GPU is needed'."""
    by = f"by {facts['by']}, " if facts["by"] else ""
    reason = f": {facts['reason']}" if facts["reason"] else ""
    return clean(f"{by}{roughly(now - facts['at'])} ago{reason}")


def after_pause(job: Job, context: StatusContext) -> str:
    """Return what a pause has done or will do, for the user who asked for it."""
    job, resume = as_one(job, context), f"ganq resume {job.id}"
    if job.state is not JobState.RUNNING:
        then = "continues it" if is_paused(job, context) else "lets it start"
        return f"{state(job, context)}; {resume} {then}"
    if (silence := silent_s(job, context)) > UNRESPONSIVE_S:
        return (
            f"pause requested; its worker has been silent for {duration(silence)}: held once it is requeued"
        )
    where = place(job, context) or "its worker"
    if job.kind == "train":
        return f"pause requested: {where} saves a checkpoint and stops; {resume} continues it"
    rest = "generates the other shards" if job.id in context.parts else "starts it from its beginning"
    return f"pause requested: {where} stops it; {resume} {rest}"


def fraction(job: Job) -> float | None:
    """Return the completed fraction, 0 to 1; None if unknown."""
    if job.state is JobState.SUCCEEDED:
        return 1.0
    progress = job.progress or {}
    done, total = _number(progress.get("done")), _number(progress.get("total"))
    if done is None or not total:
        return None
    return min(1.0, max(0.0, done / total, _time_used(job)))


def _time_used(job: Job) -> float:
    """Return the used fraction of the running time of --stop-after; 0 without one."""
    left, given = _number((job.progress or {}).get("ends_in_s")), job.spec.get("stop_after")
    if left is None or not isinstance(given, str):
        return 0.0
    with suppress(SpecError):
        seconds = read_budget(given).seconds
        return 1.0 - left / seconds if seconds else 0.0
    return 0.0


def progress_facts(job: Job) -> dict[str, Any]:
    """Return the progress; of a succeeded job the final one, which no heartbeat has carried."""
    so_far, result = dict(job.progress or {}), job.result or {}
    if job.state is not JobState.SUCCEEDED:
        return so_far
    so_far.pop("phase", None)
    if job.kind == "train":
        epochs = job.spec.get("epochs", so_far.get("epochs"))
        return {
            **so_far,
            "done": result.get("images", so_far.get("done")),
            "epoch": result.get("epoch", epochs),
            "epochs": epochs,
        }
    return {**so_far, "done": so_far["total"]} if "total" in so_far else so_far


def progress(job: Job) -> str:
    """Return e.g. 'epoch 12/400', '640/1,000 images', or the current phase."""
    so_far, result = progress_facts(job), job.result or {}
    if job.state is JobState.RUNNING and so_far.get("phase"):
        return clean(so_far["phase"]).replace("pictures", "images")
    if job.state is JobState.SUCCEEDED and job.kind == "evaluate":
        return clean(evaluation_text.in_short(result))
    if job.state is JobState.SUCCEEDED and job.kind == "generate":
        generated = _number(result.get("image_count"))
        if generated is not None:
            return count(int(generated), "image")
    epoch, epochs = _number(so_far.get("epoch")), _number(so_far.get("epochs"))
    if result.get("stopped") and epoch is not None:
        how = f"after {clean(result['stop_after'])}" if result.get("stop_after") else "early"
        return f"epoch {int(epoch):,}, stopped {how}"
    if epochs:
        return f"epoch {int(epoch or 0):,}/{int(epochs):,}"
    done, total = _number(so_far.get("done")), _number(so_far.get("total"))
    if done is None or total is None:
        return ""
    unit = clean(so_far.get("unit") or "").replace("pictures", "images")  # rows of ganq 0.2
    return f"{int(done):,}/{int(total):,} {unit}".rstrip()


def warning(job: Job, context: StatusContext) -> str | None:
    """Return 'diverged: …' or 'collapsed: …' of a job that is running or succeeded although it has."""
    result = job.result or {}
    if said := result.get("warning"):
        return clean(said)
    stopped = clean(result.get("stopped") or "")
    return f"collapsed: {stopped}" if "collapsed" in stopped else context.warnings.get(job.id)


def rate(job: Job) -> float | None:
    """Return images per second of a running job."""
    found = _number((job.progress or {}).get("rate"))
    return found if job.state is JobState.RUNNING and found else None


def rate_text(per_second: float | None) -> str:
    """Return e.g. '410/s'; '' for None."""
    if per_second is None:
        return ""
    return f"{per_second:,.0f}/s" if per_second >= 10 else f"{per_second:.1f}/s"


def eta(job: Job) -> float | None:
    """Return the remaining seconds at the current rate; None if unknown."""
    facts = job.progress or {}
    done, total, speed = _number(facts.get("done")), _number(facts.get("total")), rate(job)
    if done is None or total is None or speed is None or facts.get("phase"):
        return None
    ends_in = _number(facts.get("ends_in_s"))  # of --stop-after
    left = max(0.0, (total - done) / speed)
    return left if ends_in is None else min(left, ends_in)


def place(job: Job, context: StatusContext) -> str:
    """Return worker and device of a running job."""
    if job.state is not JobState.RUNNING or not job.worker:
        return ""
    worker = context.workers.get(job.worker)
    if worker is None or worker.device in job.worker:
        return clean(job.worker)
    return clean(f"{job.worker} ({worker.device})")


def age(job: Job, context: StatusContext) -> str:
    """Return the age of a job; the date if it is older than a day."""
    seconds = context.now - job.created_at
    return roughly(seconds) if seconds < 86400 else timestamp(job.created_at)[:10]


def bar(share: float | None, width: int = 10) -> str:
    """Return a progress bar, e.g. '██████────'; blank if the progress is unknown."""
    if share is None:
        return " " * width
    full = int(share * width)
    return "█" * full + "─" * (width - full)


def as_json(job: Job, context: StatusContext) -> dict[str, Any]:
    """Return a job as JSON: the row and the texts."""
    job = as_one(job, context)
    parts = context.parts.get(job.id)
    shards = parts and {"number": parts.number, "ended": parts.ended, "running": parts.running}
    return {
        "id": job.id,
        "name": job.name,
        "kind": job.kind,
        "state": str(job.state),
        "status": state(job, context),
        "user": job.user,
        "queue": job.queue,
        "priority": job.own_priority,
        "effective_priority": job.priority,
        "preemptible": job.preemptible,
        "preemptions": job.yields,
        "yields": job.yields,  # this and other keys marked so: the name of ganq 0.2
        "attempt": job.attempt,
        "worker": job.worker,
        "held": job.held,
        "kept": job.kept,
        "waiting_on": list(context.unfinished_dependencies.get(job.id, ())),
        "preempted_at": job.yielded_at,
        "preempted_by": context.preempted_by.get(job.id),
        "waits_for": list(context.unfinished_dependencies.get(job.id, ())),  # ganq 0.2
        "not_before": job.not_before,
        "begin_at": job.begin_at,
        "max_running": job.max_running,
        "note": job.note,
        "labels": dict(context.labels.get(job.id, {})),
        "time_limit_s": job.time_limit_s,
        "ran_s": job.ran_s,
        "cancel_requested_at": job.cancel_requested_at,
        "shard_of": job.part_of,
        "part_of": job.part_of,  # ganq 0.2
        "sweep": job.sweep,
        "shards": shards,
        "parts": shards,  # ganq 0.2
        "progress": progress_facts(job) or None,
        "fraction": fraction(job),
        "eta_seconds": eta(job),
        "warning": warning(job, context),
        "result": job.result,
        "error": None
        if job.error_code is None
        else {"code": job.error_code, "message": job.error_message, "hint": job.error_hint},
        "malformed": job.malformed,
        "bit_exact": job.bit_exact,
        "retry_of": job.retry_of,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "spec": job.spec,
    }


def _number(value: Any) -> float | None:
    """Return a number of the progress, which is JSON of another process and may be anything."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def changed_options(job: Job) -> dict[str, str]:
    """Return the options of a job that differ from the defaults of its kind and recipe, as text."""
    from jobs.kinds import KINDS
    from jobs.recipes import RECIPES

    kind = KINDS.get(job.kind)
    defaults: dict[str, Any] = {}
    if kind is not None:
        defaults = {name: field.default for name, field in kind.spec_class().model_fields.items()}
        recipe = RECIPES.get(str(job.spec.get("recipe")))
        defaults |= recipe.defaults_at(job.spec.get("size")) if recipe is not None else {}
        defaults.pop("recipe", None)
        if job.spec.get("reader") == kind.spec_class().of_new.get("reader"):
            defaults |= kind.spec_class().of_new  # fields whose defaults are those of stored specs
    return {
        name: option_text(value)
        for name, value in job.spec.items()
        if value not in (None, [], "") and option_text(value) != option_text(defaults.get(name))
    }


def option_text(value: Any) -> str:
    """Return the value of an option: '0-3, 7' for [[0, 3], 7]."""
    if isinstance(value, list | tuple):
        return ", ".join("-".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def metric_key(training: Job) -> str:
    """
    Return the key of a training's metric, e.g. 'kid/effnet-lite0'; lower is better.

    The network of a weight file is known once the file was read; until then its file name is used.
    """
    if known := ((training.result or {}).get("metric") or {}).get("key"):
        return str(known)
    spec = training.spec
    metric = spec.get("metric", "metric")
    if metric not in ("kid", "fid"):
        return str(metric)
    network, sha256 = str(spec.get("feature_network")), spec.get("feature_sha256")
    return f"{metric}/{PurePath(network).name}@{sha256[:8]}" if sha256 else f"{metric}/{network}"
