"""`ganq compare`: evaluations beside each other, or trainings by what they measured themselves."""

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
LOOK_BACK = 10_000


@click.command(
    epilog=examples(
        "ganq compare", "ganq compare 12 15 faces", "ganq compare --sweep rates", "ganq compare 12 15 --json"
    )
)
@click.argument("jobs", nargs=-1, type=JOB)
@click.option("--sweep", help="The jobs of this array: its id, or the name that they begin with.")
@output.json_option
def compare(jobs: tuple[str, ...], sweep: str | None, as_json: bool) -> int:
    """
    Put finished evaluations beside each other, the best first.

    JOBS are evaluations, or jobs that have been evaluated: then their newest evaluation
    counts. Without JOBS, the newest 20. Best is by the first metric that all of them have.
    Trainings that nobody has evaluated, and those of a sweep, are compared by what they
    measured themselves, each at its best checkpoint.
    """
    if jobs and sweep is not None:
        raise SpecError("jobs and --sweep do not go together", hint="use one of the two")
    session = open_session()
    if sweep is not None:
        members = _of_sweep(session, sweep)
        if members[0].kind == "train":
            return _trainings(session, members, as_json)
        return _evaluations(members, as_json)
    members = [session.queries.find(one) for one in jobs]
    finished = _finished(session)
    evaluated = {one.spec.get("source") for one in finished}
    if members and all(one.kind == "train" and one.id not in evaluated for one in members):
        return _trainings(session, members, as_json)
    chosen = [_evaluation_of(one, finished) for one in members] if members else finished[:LATEST]
    return _evaluations(list({one.id: one for one in chosen}.values()), as_json)


def _of_sweep(session: Session, reference: str) -> "list[Job]":
    """
    Raises:
        JobNotFoundError: there is no such sweep.
        SpecError: its jobs measure nothing.
    """
    from storage.db.queries import Filter

    members = list(session.queries.stream(Filter(sweep=session.queries.find_sweep(reference))))
    if members[0].kind not in ("train", "evaluate"):
        raise SpecError(
            f"the jobs of {reference} are of kind {members[0].kind}: nothing of them is measured",
            hint="ganq submit evaluate JOB measures the pictures of one",
        )
    if members[0].kind == "evaluate":
        members = [one for one in members if one.state is JobState.SUCCEEDED]
        if not members:
            raise NotFoundError(
                f"no job of {reference} has succeeded", hint=f"ganq status --sweep {reference}"
            )
    return members


# --- evaluations --------------------------------------------------------------------------


def _evaluations(chosen: "list[Job]", as_json: bool) -> int:
    chosen, by = _ranked(chosen)
    if as_json:
        output.print_json_array(
            {"id": one.id, "name": one.name, "of": _of(one), "evaluation": one.result} for one in chosen
        )
        return 0
    if not chosen:
        click.echo("no evaluation has finished yet\n  → ganq submit evaluate JOB makes one")
        return 0
    cells = [evaluation_text.row(one.result or {}) for one in chosen]
    keys = list(dict.fromkeys(name for row in cells for name in row))
    heads = _heads(keys)
    rows = [
        [str(one.id), _of(one), _pictures(one), *(row.get(name, "") for name in keys)]
        for one, row in zip(chosen, cells, strict=True)
    ]
    output.print_table(("ID", "OF", "MADE", *heads), rows, right=("ID", "MADE", *heads))
    click.echo(_footer(by, keys))
    if len({(one.result or {}).get("data", {}).get("fingerprint") for one in chosen}) > 1:
        output.notice(
            "these were measured against different real pictures, or the same at another size: "
            "their numbers do not compare"
        )
    return 0


def _heads(keys: Sequence[str]) -> list[str]:
    """Columns: a metric without its network, where all have the same one."""
    short = [key.partition("/")[0] for key in keys]
    names = [name if short.count(name) == 1 else key for name, key in zip(short, keys, strict=True)]
    return [{"precision": "PREC"}.get(name, name.upper()) for name in names]


def _footer(by: str | None, keys: Sequence[str]) -> str:
    """What the order is, and whose eyes the numbers are of."""
    order = f"the best by {by} first; lower is better" if by else "no metric that all have: newest first"
    networks = sorted({key.partition("/")[2] for key in keys if "/" in key})
    return f"{order}{f' · features of {networks[0]}' if len(networks) == 1 else ''}"


def _finished(session: Session) -> "list[Job]":
    from storage.db.queries import Filter

    wanted = Filter(kind="evaluate", states=(JobState.SUCCEEDED,))
    return session.queries.page(wanted, limit=LOOK_BACK)


def _evaluation_of(job: "Job", finished: "list[Job]") -> "Job":
    """
    Raises:
        NotFoundError: it is no finished evaluation, and has none.
    """
    if job.kind == "evaluate" and job.state is JobState.SUCCEEDED:
        return job
    for one in finished:
        if one.spec.get("source") == job.id:
            return one
    if job.kind == "evaluate":
        raise NotFoundError(f"job {job.id} is {job.state}", hint=f"ganq status {job.id} shows how far it is")
    raise NotFoundError(
        f"job {job.id} has not been evaluated", hint=f"ganq submit evaluate {job.id} --wait does it"
    )


def _of(one: "Job") -> str:
    """What was evaluated."""
    if one.spec.get("path"):
        return str(one.spec["path"])
    pinned: Any = (one.inputs or {}).get("checkpoint") or {}
    epoch = f", epoch {pinned['epoch']:,}" if "epoch" in pinned else ""
    return f"job {one.spec.get('source')}{epoch}"


def _pictures(one: "Job") -> str:
    made = (one.result or {}).get("image_count")
    return f"{made:,}" if isinstance(made, int) else ""


def _ranked(jobs: "list[Job]") -> "tuple[list[Job], str | None]":
    """By the first metric that all have, lowest first, and its key; as they are if there is none."""
    tables = [(one.result or {}).get("metrics") or {} for one in jobs]
    shared = [key for key in (tables[0] if tables else ()) if all(key in table for table in tables)]
    if not shared:
        return jobs, None
    by = shared[0]
    return sorted(jobs, key=lambda one: float(((one.result or {}).get("metrics") or {})[by]["value"])), by


# --- trainings ----------------------------------------------------------------------------


def _trainings(session: Session, members: "list[Job]", as_json: bool) -> int:
    rows = [(one, _measured(session, one)) for one in members]
    keys = {job_text.metric_key(one) for one, best in rows if best is not None}
    rows.sort(key=lambda row: (row[1] is None, row[1] or (0.0, 0), row[0].id))
    changed = _changed(members)
    if as_json:
        output.print_json_array(
            {
                "id": one.id,
                "name": one.name,
                "state": one.state,
                "options": {name: one.spec.get(name) for name in changed},
                "metric": None
                if best is None
                else {"key": job_text.metric_key(one), "best": best[0], "best_epoch": best[1]},
            }
            for one, best in rows
        )
        return 0
    if not keys:
        one = members[0]
        raise NotFoundError(
            f"job {one.id} has not been evaluated, and has measured nothing itself"
            if len(members) == 1
            else f"none of these {len(members)} trainings has been measured yet",
            hint=f"ganq submit evaluate {one.id} --wait does it; --eval-every 10 measures while it trains",
        )
    metric = next(iter(keys)) if len(keys) == 1 else "metric"
    heads = ("ID", "NAME", *(name.replace("_", "-") for name in changed), "STATE", "EPOCH")
    (head,) = _heads([metric])
    table = [
        [
            str(one.id),
            one.name or "",
            *(str(one.spec.get(name)) for name in changed),
            str(one.state),
            *(("", "") if best is None else (f"{best[1]:,}", f"{best[0]:.4g}")),
        ]
        for one, best in rows
    ]
    output.print_table((*heads, head), table, right=("ID", "EPOCH", head, *heads[2:-2]))
    click.echo(f"{metric} of each one's best checkpoint; lower is better")
    if len(keys) > 1:
        output.notice(f"these were measured by {' and '.join(sorted(keys))}: their numbers do not compare")
    return 0


def _measured(session: Session, one: "Job") -> tuple[float, int] | None:
    """The value and the epoch of a training's best checkpoint so far."""
    found = (one.result or {}).get("metric") or {}
    if "best" in found:
        return float(found["best"]), int(found["best_epoch"])
    if one.state.terminal:
        return None
    known = [(c.metric, c.epoch) for c in session.queries.checkpoints(one.id) if c.metric is not None]
    return min(known, default=None)


def _changed(members: "list[Job]") -> list[str]:
    """The fields of the spec that are not the same in all."""
    names = dict.fromkeys(name for one in members for name in one.spec)
    return [name for name in names if len({str(one.spec.get(name)) for one in members}) > 1]
