"""Jobs and workers as pages show them: facts for programs, with texts, signs and links."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jobs.states import JobState
from storage.db.rows import Job, WorkerRow
from storage.status import job_text
from storage.status.job_text import StatusContext
from web.html import Facts, cut
from web.site import Site

SIGNS = {
    "queued": "○",
    "held": "‖",
    "running": "▶",
    "waiting": "◌",
    "unresponsive": "!",
    "succeeded": "✓",
    "failed": "✕",
    "cancelled": "–",
}
"""A state is a word, a sign and a colour; the colour never stands alone."""


def tone(job: Job, around: StatusContext) -> str:
    """Return the key of SIGNS, which is the class of the colour as well."""
    if job.state is JobState.RUNNING:
        worker = around.workers.get(job.worker or "")
        silent = worker is not None and worker.silent_s > job_text.UNRESPONSIVE_S
        return "unresponsive" if silent else "running"
    if job.state is JobState.QUEUED and job.held:
        return "held"
    if job.state is JobState.QUEUED and (job.blockers or job.not_before is not None or job.yielded_at):
        return "waiting"
    return str(job.state)


def as_row(job: Job, around: StatusContext) -> Facts:
    job = job_text.as_one(job, around)
    look = tone(job, around)
    so_far = job_text.progress_facts(job)
    stamp = f"{job.attempt}-{so_far.get('epoch') or ''}-{job.state}"
    failed = job.state is JobState.FAILED or look == "waiting"
    reason = job.error_message if failed else job_text.warning(job, around)
    return {
        **job_text.as_json(job, around),
        "tone": look,
        "sign": SIGNS[look],
        "status": cut(job_text.state(job, around), 200),
        "progress_text": job_text.progress(job),
        "rate_text": job_text.rate_text(job_text.rate(job)),
        "reason": cut(reason, 300) if reason else None,
        "age": job_text.age(job, around),
        "url": f"/jobs/{job.id}",
        "thumbnail": f"/jobs/{job.id}/thumb?v={stamp}" if _has_images(job, so_far) else None,
    }


def _has_images(job: Job, so_far: dict[str, Any]) -> bool:
    """Return whether a job may have a grid on the volume, by its row."""
    begun = job.attempt > 0 and "deleted_at" not in (job.result or {})
    return begun and (job.kind == "generate" or (job.kind == "train" and bool(so_far.get("epoch"))))


def rows(site: Site, jobs: Sequence[Job]) -> tuple[list[Facts], StatusContext]:
    around = StatusContext.of(site.queries, jobs)
    return [as_row(job, around) for job in jobs], around


def worker_card(worker: WorkerRow, job: Job | None) -> Facts:
    """
    Return the facts of a worker and the progress of its job.

    The job table knows at once when a job begins or ends; the worker's own row follows with a heartbeat.
    """
    if worker.state in ("idle", "busy"):
        worker = replace(worker, state="idle" if job is None else "busy")
    silent = worker.silent_s > job_text.UNRESPONSIVE_S and worker.state != "stopped"
    fresh = worker.silent_s <= job_text.STALE_S
    progress: dict[str, Any] = (job.progress if job is not None else None) or {}
    return {
        **{name: getattr(worker, name) for name in WorkerRow.__dataclass_fields__},
        "job_id": None if job is None else job.id,
        "unresponsive": silent,
        "tone": "unresponsive"
        if silent
        else {"busy": "running", "stopped": "cancelled"}.get(worker.state, "queued"),
        "job": None if job is None else {"id": job.id, "name": job.name, "kind": job.kind},
        "progress_text": job_text.progress(job) if job is not None else "",
        "fraction": job_text.fraction(job) if job is not None else None,
        "rate_text": job_text.rate_text(job_text.rate(job)) if job is not None and fresh else "",
        "gpu": {key: progress[key] for key in ("gpu_memory", "gpu_utilisation") if key in progress},
    }


def worker_cards(site: Site, workers: Sequence[WorkerRow]) -> list[Facts]:
    jobs = site.queries.running() if workers else {}
    return [worker_card(worker, jobs.get(worker.name)) for worker in workers]
