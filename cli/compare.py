"""`ganq compare`: rank evaluations, or trainings by the metric measured during training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.session import JOB, Session, open_session
from cli.ui import output
from cli.ui.lazy import examples
from jobs.errors import NotFoundError, SpecError
from jobs.states import JobState
from storage.status import evaluation_text, job_text

if TYPE_CHECKING:
    from storage.db.rows import Job

LATEST = 20
MAX_EVALUATIONS = 10_000


@click.command(
    epilog=examples(
        "ganq compare", "ganq compare 12 15 faces", "ganq compare --sweep rates", "ganq compare 12 15 --json"
    )
)
@click.argument("jobs", nargs=-1, type=JOB)
@click.option("--sweep", help="Compare the jobs of this sweep (id or name).")
@output.json_option
def compare(jobs: tuple[str, ...], sweep: str | None, as_json: bool) -> int:
    """
    Compare evaluations or trainings, best first.

    JOBS are evaluations, or jobs whose newest evaluation is used. Without JOBS, the newest
    20 evaluations. They are ranked by the first metric that all of them have. Trainings
    without an evaluation, and those of a sweep, are compared by the metric that was
    measured during training, each at its best checkpoint.
    """
    if jobs and sweep is not None:
        raise SpecError("JOBS cannot be combined with --sweep", hint="use only one of them")
    session = open_session()
    if sweep is not None:
        members = _sweep_members(session, sweep)
        if members[0].kind == "train":
            return _trainings(session, members, as_json)
        return _evaluations(members, as_json)
    members = [session.queries.find(reference) for reference in jobs]
    finished = _finished(session)
    if not members:
        return _evaluations(finished[:LATEST], as_json)
    found = {job.id: _evaluation_of(job, finished) for job in members}
    missing = [job for job in members if found[job.id] is None]
    if missing and all(job.kind == "train" for job in members):
        if len(missing) < len(members):
            output.notice(f"{_not_evaluated(missing)}: comparing by the metric measured during training")
        return _trainings(session, members, as_json)
    evaluations = {job.id: job for job in found.values() if job is not None}
    if missing and not evaluations:
        first = missing[0]
        if first.kind == "evaluate":
            raise NotFoundError(
                f"job {first.id} is {first.state}", hint=f"ganq status {first.id} shows its progress"
            )
        raise NotFoundError(
            _not_evaluated(missing), hint=f"ganq submit evaluate {first.id} --wait evaluates it"
        )
    if missing:
        output.notice(f"{_not_evaluated(missing)} and cannot be compared")
    return _evaluations(list(evaluations.values()), as_json)


def _not_evaluated(jobs: "Sequence[Job]") -> str:
    ids = ", ".join(str(job.id) for job in jobs)
    return f"job {ids} has not been evaluated" if len(jobs) == 1 else f"jobs {ids} have not been evaluated"


def _sweep_members(session: Session, reference: str) -> "list[Job]":
    """
    Return the jobs of a sweep; of evaluations only the succeeded ones.

    Raises:
        JobNotFoundError: there is no such sweep.
        SpecError: its jobs are neither trainings nor evaluations.
    """
    from storage.db.queries import Filter

    members = list(session.queries.stream(Filter(sweep=session.queries.find_sweep(reference))))
    if members[0].kind not in ("train", "evaluate"):
        raise SpecError(
            f"the jobs of {reference} are of kind {members[0].kind} and have no metrics",
            hint="ganq submit evaluate JOB evaluates the images of one",
        )
    if members[0].kind == "evaluate":
        members = [job for job in members if job.state is JobState.SUCCEEDED]
        if not members:
            raise NotFoundError(
                f"no job of {reference} has succeeded", hint=f"ganq status --sweep {reference}"
            )
    return members


# --- evaluations --------------------------------------------------------------------------


def _evaluations(evaluations: "list[Job]", as_json: bool) -> int:
    evaluations, rank_key = _ranked(evaluations)
    if as_json:
        output.print_json_array(
            {"id": job.id, "name": job.name, "of": _subject(job), "evaluation": job.result}
            for job in evaluations
        )
        return 0
    if not evaluations:
        click.echo("no evaluation has finished yet\n  → ganq submit evaluate JOB")
        return 0
    cells = [evaluation_text.row(job.result or {}) for job in evaluations]
    keys = list(dict.fromkeys(name for row in cells for name in row))
    headings = _headings(keys)
    rows = [
        [str(job.id), _subject(job), _image_count(job), *(row.get(name, "") for name in keys)]
        for job, row in zip(evaluations, cells, strict=True)
    ]
    output.print_table(("ID", "OF", "IMAGES", *headings), rows, right=("ID", "IMAGES", *headings))
    click.echo(_footer(rank_key, keys))
    if len({(job.result or {}).get("data", {}).get("fingerprint") for job in evaluations}) > 1:
        output.notice(
            "these evaluations used different real images or sizes: their metrics cannot be compared"
        )
    return 0


def _headings(keys: Sequence[str]) -> list[str]:
    """Return the headings: without the feature network if all metrics use the same one."""
    short = [key.partition("/")[0] for key in keys]
    names = [name if short.count(name) == 1 else key for name, key in zip(short, keys, strict=True)]
    return [name.upper() for name in names]


def _footer(rank_key: str | None, keys: Sequence[str]) -> str:
    """Explain the order and the columns."""
    order = f"best {rank_key} first; lower is better" if rank_key else "no common metric: newest first"
    networks = sorted({key.partition("/")[2] for key in keys if "/" in key})
    meanings = [f"{name}: {text}" for name, text in evaluation_text.MEANING.items() if name in keys]
    features = f" · features of {networks[0]}" if len(networks) == 1 else ""
    return "\n".join([*meanings, f"{order}{features}"])


def _finished(session: Session) -> "list[Job]":
    from storage.db.queries import Filter

    return session.queries.page(Filter(kind="evaluate", states=(JobState.SUCCEEDED,)), limit=MAX_EVALUATIONS)


def _evaluation_of(job: "Job", finished: "list[Job]") -> "Job | None":
    """Return the job itself if it is a finished evaluation, else its newest one."""
    if job.kind == "evaluate" and job.state is JobState.SUCCEEDED:
        return job
    return next((each for each in finished if each.spec.get("source") == job.id), None)


def _subject(job: "Job") -> str:
    """Return what was evaluated."""
    if job.spec.get("path"):
        return str(job.spec["path"])
    pinned: Any = (job.inputs or {}).get("checkpoint") or {}
    epoch = f", epoch {pinned['epoch']:,}" if "epoch" in pinned else ""
    return f"job {job.spec.get('source')}{epoch}"


def _image_count(job: "Job") -> str:
    number = (job.result or {}).get("image_count")
    return f"{number:,}" if isinstance(number, int) else ""


def _ranked(jobs: "list[Job]") -> "tuple[list[Job], str | None]":
    """Sort by the first metric that all have; return its key, or None and the original order."""
    tables = [(job.result or {}).get("metrics") or {} for job in jobs]
    shared = [key for key in (tables[0] if tables else ()) if all(key in table for table in tables)]
    if not shared:
        return jobs, None
    key = shared[0]
    return sorted(jobs, key=lambda job: float(((job.result or {}).get("metrics") or {})[key]["value"])), key


# --- trainings ----------------------------------------------------------------------------


def _trainings(session: Session, members: "list[Job]", as_json: bool) -> int:
    rows = [(job, _best(session, job)) for job in members]
    keys = {job_text.metric_key(job) for job, best in rows if best is not None}
    rows.sort(key=lambda row: (row[1] is None, row[1] or (0.0, 0), row[0].id))
    changed = _varying_fields(members)
    if as_json:
        output.print_json_array(
            {
                "id": job.id,
                "name": job.name,
                "state": job.state,
                "options": {name: job.spec.get(name) for name in changed},
                "metric": None
                if best is None
                else {"key": job_text.metric_key(job), "best": best[0], "best_epoch": best[1]},
            }
            for job, best in rows
        )
        return 0
    if not keys:
        first = members[0]
        raise NotFoundError(
            f"job {first.id} has not been evaluated and has no metric"
            if len(members) == 1
            else f"none of these {len(members)} trainings has a metric yet",
            hint=f"ganq submit evaluate {first.id} --wait; or train with --eval-every 10",
        )
    metric = next(iter(keys)) if len(keys) == 1 else "metric"
    columns = ("ID", "NAME", *(name.replace("_", "-") for name in changed), "STATE", "EPOCH")
    (heading,) = _headings([metric])
    table = [
        [
            str(job.id),
            job.name or "",
            *(str(job.spec.get(name)) for name in changed),
            str(job.state),
            *(("", "") if best is None else (f"{best[1]:,}", f"{best[0]:.4g}")),
        ]
        for job, best in rows
    ]
    output.print_table((*columns, heading), table, right=("ID", "EPOCH", heading, *columns[2:-2]))
    click.echo(f"{metric} of the best checkpoint of each training; lower is better")
    if len(keys) > 1:
        output.notice(f"these trainings used {' and '.join(sorted(keys))}: their metrics cannot be compared")
    return 0


def _best(session: Session, job: "Job") -> tuple[float, int] | None:
    """Return the metric and the epoch of the best checkpoint so far."""
    found = (job.result or {}).get("metric") or {}
    if "best" in found:
        return float(found["best"]), int(found["best_epoch"])
    if job.state.terminal:
        return None
    known = [(c.metric, c.epoch) for c in session.queries.checkpoints(job.id) if c.metric is not None]
    return min(known, default=None)


def _varying_fields(members: "list[Job]") -> list[str]:
    """Return the fields of the spec that are not equal in all jobs."""
    names = dict.fromkeys(name for job in members for name in job.spec)
    return [name for name in names if len({str(job.spec.get(name)) for job in members}) > 1]
