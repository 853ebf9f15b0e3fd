"""
A job in words that are true: what the table's state alone does not say.

'running' with a wish to cancel is 'cancelling'; 'queued' may mean held, waiting for
another job, or waiting to try again. Used by status, wait and submit --wait alike.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from jobs.states import JobState
from storage.db.backoff import BACKOFF_S
from storage.db.queries import Queries
from storage.db.rows import UNABLE, Job, WorkerRow
from storage.db.store.shards import Shards
from storage.status import evaluation_text
from storage.status.units import clean, count, duration, roughly

SILENT_S = 60.0
"""A worker that has not spoken for so long is shown as silent; the reaper takes its job."""


@dataclass(frozen=True)
class StatusContext:
    """What a job's words depend on beside its own row."""

    now: float
    workers: Mapping[str, WorkerRow] = field(default_factory=dict)
    unmet: Mapping[int, Sequence[int]] = field(default_factory=dict)
    parts: Mapping[int, Shards] = field(default_factory=dict)

    @classmethod
    def of(cls, queries: Queries, jobs: Iterable[Job]) -> "StatusContext":
        waiting = [one.id for one in jobs if one.state is JobState.QUEUED and one.blockers]
        return cls(
            now=queries.now(),
            workers={row.name: row for row in queries.workers()},
            unmet=queries.unmet(waiting) if waiting else {},
            parts=queries.shards_of_all(waiting) if waiting else {},
        )


TAKES_NO_JOB = ("stopped", "draining", *UNABLE)


def served(queue: str, workers: Iterable[WorkerRow]) -> bool | None:
    """Whether a worker that has spoken lately takes jobs of this queue; None if there is no worker."""
    alive = [one for one in workers if one.silent_s < SILENT_S and one.state not in TAKES_NO_JOB]
    return any(queue in one.queues.split(",") for one in alive) if alive else None


def as_one(job: Job, around: StatusContext) -> Job:
    """A job whose parts are under way, as the one job that it is to a person: running, with their sum."""
    parts = around.parts.get(job.id)
    if parts is None or job.state is not JobState.QUEUED or not job.blockers or not parts.under_way:
        return job
    progress = {"done": parts.done, "total": parts.total, "unit": "pictures"}
    return replace(
        job,
        state=JobState.RUNNING,
        progress={**progress, "rate": round(parts.rate, 2) or None},
        worker=", ".join(parts.workers) or None,
    )


def state(job: Job, around: StatusContext) -> str:
    """The job's state, with why it does not move when it does not."""
    if job.malformed and not (job.state.terminal and job.error_code):
        return f"{job.state}: malformed"
    if job.state is JobState.RUNNING:
        worker = around.workers.get(job.worker or "")
        if job.cancel_requested_at is not None:
            return "cancelling"
        if worker is not None and worker.silent_s > SILENT_S:
            return f"silent for {duration(worker.silent_s)}"
        return "running"
    if job.state is JobState.SUCCEEDED and job.cancel_requested_at is not None:
        return "succeeded (cancel too late)"
    if job.state is not JobState.QUEUED:
        return str(job.state)
    if job.held:
        return "held"
    if job.blockers:
        needed = around.unmet.get(job.id, ())
        if not needed and job.id in around.parts:
            return "queued"
        return f"waits for {', '.join(map(str, needed)) or 'another job'}"
    if job.not_before is not None and job.not_before > around.now:
        why = f": {job.error_code}" if job.error_code else ""
        # No longer than the longest backoff: the time was noted by a clock that may differ from this one.
        return f"retry in {duration(min(job.not_before - around.now, BACKOFF_S[-1]))}{why}"
    return "queued"


def fraction(job: Job) -> float | None:
    """Share that is done, 0 to 1; None if the job has not said."""
    if job.state is JobState.SUCCEEDED:
        return 1.0
    progress = job.progress or {}
    done, total = _number(progress.get("done")), _number(progress.get("total"))
    if done is None or not total:
        return None
    return min(1.0, max(0.0, done / total))


def told(job: Job) -> dict[str, Any]:
    """How far a job has come; of one that succeeded at its end, as the last beat told of less."""
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
    """'epoch 12/400', '640/1,000 pictures', or the phase that is not the work itself."""
    so_far, result = told(job), job.result or {}
    if job.state is JobState.RUNNING and so_far.get("phase"):
        return clean(so_far["phase"])
    if job.state is JobState.SUCCEEDED and job.kind == "evaluate":
        return clean(evaluation_text.in_short(result))
    if job.state is JobState.SUCCEEDED and job.kind == "generate":
        made = _number(result.get("image_count"))
        if made is not None:
            return count(int(made), "picture")
    epoch, epochs = _number(so_far.get("epoch")), _number(so_far.get("epochs"))
    if result.get("stopped") and epoch is not None:
        return f"epoch {int(epoch):,}, stopped early"
    if epochs:
        return f"epoch {int(epoch or 0):,}/{int(epochs):,}"
    done, total = _number(so_far.get("done")), _number(so_far.get("total"))
    if done is None or total is None:
        return ""
    return f"{int(done):,}/{int(total):,} {clean(so_far.get('unit') or '')}".rstrip()


def rate(job: Job) -> float | None:
    """Pictures a second, while it runs."""
    found = _number((job.progress or {}).get("rate"))
    return found if job.state is JobState.RUNNING and found else None


def rate_text(per_second: float | None) -> str:
    if per_second is None:
        return ""
    return f"{per_second:,.0f}/s" if per_second >= 10 else f"{per_second:.1f}/s"


def eta(job: Job) -> float | None:
    """Seconds that are left at the present rate; None if nobody can say."""
    told = job.progress or {}
    done, total, speed = _number(told.get("done")), _number(told.get("total")), rate(job)
    if done is None or total is None or speed is None or told.get("phase"):
        return None
    return max(0.0, (total - done) / speed)


def place(job: Job, around: StatusContext) -> str:
    """The worker and its device, while it runs."""
    if job.state is not JobState.RUNNING or not job.worker:
        return ""
    worker = around.workers.get(job.worker)
    if worker is None or worker.device in job.worker:
        return clean(job.worker)
    return clean(f"{job.worker} ({worker.device})")


def age(job: Job, around: StatusContext) -> str:
    return roughly(around.now - job.created_at)


def bar(share: float | None, width: int = 10) -> str:
    """'██████────', for a terminal; blank until the job has said how far it is."""
    if share is None:
        return " " * width
    full = int(share * width)
    return "█" * full + "─" * (width - full)


def as_json(job: Job, around: StatusContext) -> dict[str, Any]:
    """A job for programs: the row's facts, and the words beside them."""
    job = as_one(job, around)
    parts = around.parts.get(job.id)
    return {
        "id": job.id,
        "name": job.name,
        "kind": job.kind,
        "state": str(job.state),
        "status": state(job, around),
        "user": job.user,
        "queue": job.queue,
        "priority": job.own_priority,
        "effective_priority": job.priority,
        "preemptible": job.preemptible,
        "yields": job.yields,
        "attempt": job.attempt,
        "worker": job.worker,
        "held": job.held,
        "waits_for": list(around.unmet.get(job.id, ())),
        "not_before": job.not_before,
        "time_limit_s": job.time_limit_s,
        "ran_s": job.ran_s,
        "cancel_requested_at": job.cancel_requested_at,
        "part_of": job.part_of,
        "sweep": job.sweep,
        "parts": None
        if parts is None
        else {"number": parts.number, "ended": parts.ended, "running": parts.running},
        "progress": told(job) or None,
        "fraction": fraction(job),
        "eta_seconds": eta(job),
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
    """Progress is JSON from another process: anything may stand in it."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def metric_key(training: "Job") -> str:
    """
    What a training's checkpoints are measured by, e.g. 'kid/effnet-lite0'; lower is better.

    Which network a file holds is known once it was read: until the result says so, the file's name stands in.
    """
    if known := ((training.result or {}).get("metric") or {}).get("key"):
        return str(known)
    spec = training.spec
    metric = spec.get("metric", "metric")
    if metric not in ("kid", "fid"):
        return str(metric)
    network, sha256 = str(spec.get("feature_network")), spec.get("feature_sha256")
    return f"{metric}/{PurePath(network).name}@{sha256[:8]}" if sha256 else f"{metric}/{network}"
