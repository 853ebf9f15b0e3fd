"""`ganq gc`: delete unreferenced files from the volume."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.session import LABEL_FILTER, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import Duration

if TYPE_CHECKING:
    from storage.gc.archive import Archived
    from storage.gc.policy import Policy
    from storage.gc.sweep import Item, Plan, Swept

DEFAULT_AGE_S = 30 * 86400.0
MAX_KEPT_SHOWN = 10
"""Maximum number of listed jobs whose results are kept."""


@click.command(
    epilog=examples(
        "ganq gc --dry-run",
        "ganq gc --dry-run --paths --jobs --older-than 90d",
        "ganq gc --datasets --jobs --older-than 30d",
        "ganq gc --jobs --rows --older-than 90d",
    )
)
@click.option("--dry-run", is_flag=True, help="List what would be deleted; delete nothing.")
@click.option("--datasets", is_flag=True, help="Also delete decoded data sets that no recent job has used.")
@click.option("--jobs", is_flag=True, help="Also delete images, samples and checkpoints of old jobs.")
@click.option(
    "--rows",
    is_flag=True,
    help="Also move old jobs without results from the job table to the archive on the volume.",
)
@click.option("--keep-named", is_flag=True, help="With --rows: keep the rows of jobs that have a name.")
@click.option(
    "--older-than",
    type=Duration(minimum=0.0),
    help="Minimum age for --datasets, --jobs and --rows, e.g. 12h or 90d.  [default: 30d]",
)
@click.option("--named", is_flag=True, help="With --jobs: also delete results of trainings that have a name.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    type=LABEL_FILTER,
    help="With --jobs: only results of jobs with this label; repeatable.",
)
@click.option("--yes", is_flag=True, help="Do not ask before --jobs and --datasets delete something.")
@click.option("--paths", is_flag=True, help="List each path.")
@output.json_option
def gc(
    dry_run: bool,
    datasets: bool,
    jobs: bool,
    rows: bool,
    keep_named: bool,
    older_than: float | None,
    named: bool,
    labels: tuple[str, ...],
    yes: bool,
    paths: bool,
    as_json: bool,
) -> int:
    """
    Delete unreferenced files from the volume.

    Without options: files of ended jobs that no row of the job table refers to, and
    abandoned temporary files. Safe while jobs run; an interrupted run is completed by the
    next one. With --jobs also the results of old jobs; their rows and logs are kept. Results
    that a queued or running job needs are not deleted, nor are imports, jobs marked by
    `ganq keep` and, without --named, trainings that have a name.

    With --rows, jobs that ended long ago and have no results leave the job table, with their
    attempts, events and logs; ganq status --archived lists them. A retried job, a shard and
    a prerequisite stay as long as the jobs that refer to them.

    On a terminal --jobs and --datasets ask before they delete something.

    Exit code 1 if a file could not be deleted, or if the volume belongs to another job table.
    """
    if older_than is not None and not (datasets or jobs or rows):
        raise click.UsageError("--older-than requires --datasets, --jobs or --rows")
    if keep_named and not rows:
        raise click.UsageError("--keep-named requires --rows")
    if named and not jobs:
        raise click.UsageError("--named requires --jobs")
    if labels and not jobs:
        raise click.UsageError("--label requires --jobs")
    from contextlib import nullcontext

    from jobs.labels import read_filters
    from storage.db.queries import Filter
    from storage.gc.archive import Archived, archive_rows
    from storage.gc.policy import Policy
    from storage.gc.sweep import Collector, Swept, alone

    session = open_session()
    age_s = DEFAULT_AGE_S if older_than is None else older_than
    policy = Policy(
        grace_s=session.settings.lease_seconds,
        datasets_s=age_s if datasets else None,
        jobs_s=age_s if jobs else None,
        named_models=named,
        among=frozenset(session.queries.ids(Filter(labels=read_filters(labels)))) if labels else None,
    )
    collector = Collector(session.database, session.volume, policy)
    with nullcontext() if dry_run else alone(session.database):
        plan = collector.plan()
        if not (dry_run or yes or as_json) and output.on_terminal():
            _confirm(plan)
        swept = Swept() if dry_run else collector.sweep(plan)
        archived: Archived | None = None
        if rows:
            archived = archive_rows(
                session.database, session.volume, age_s=age_s, keep_named=keep_named, dry_run=dry_run
            )
    deleted = plan.items if dry_run else swept.gone
    if as_json:
        found = _as_json(str(session.volume.root), dry_run, deleted, plan, swept)
        if archived is not None:
            found["archived"] = {"jobs": archived.jobs, "bytes": archived.bytes, "kept": dict(archived.kept)}
        output.print_json(found)
    else:
        _print(dry_run, deleted, plan, swept, paths, policy)
        if archived is not None:
            _print_archived(archived, dry_run)
    return 1 if swept.failed else 0


def _print_archived(archived: "Archived", dry_run: bool) -> None:
    jobs = output.count(archived.jobs, "job")
    if dry_run:
        click.echo(f"{jobs} would leave the job table for the archive (--dry-run)")
    else:
        click.echo(f"{jobs} archived ({output.size(archived.bytes)}); ganq status --archived lists them")
    for why, number in archived.kept.most_common():
        output.notice(f"kept: {output.count(number, 'old job')}: {why}")


def _confirm(plan: "Plan") -> None:
    """Ask before something goes that a person may still want; what no row points to goes unasked."""
    from storage.gc.policy import Reason

    wanted = [one for one in plan.items if one.reason in (Reason.RESULTS, Reason.DATASET)]
    if wanted:
        jobs = len({one.job_id for one in wanted if one.job_id is not None})
        sets = sum(one.reason is Reason.DATASET for one in wanted)
        what = [f"the results of {output.count(jobs, 'job')}"] if jobs else []
        what += [output.count(sets, "decoded data set")] if sets else []
        total = output.size(sum(one.bytes for one in wanted))
        click.confirm(f"delete {' and '.join(what)} ({total}; --dry-run lists them)?", abort=True)


def _by_reason(items: "Iterable[Item]") -> dict[str, dict[str, int]]:
    number: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for item in items:
        number[str(item.reason)] += 1
        size[str(item.reason)] += item.bytes
    return {reason: {"count": number[reason], "bytes": size[reason]} for reason in sorted(number)}


def _as_json(
    volume: str, dry_run: bool, deleted: "Sequence[Item]", plan: "Plan", swept: "Swept"
) -> dict[str, Any]:
    def facts(item: "Item") -> dict[str, Any]:
        return {"path": item.path, "reason": str(item.reason), "bytes": item.bytes, "job": item.job_id}

    return {
        "volume": volume,
        "dry_run": dry_run,
        "count": len(deleted),
        "bytes": sum(item.bytes for item in deleted),
        "reasons": _by_reason(deleted),
        "items": [facts(item) for item in deleted],
        "kept": [{**facts(item), "why": why} for item, why in swept.kept],
        "failed": [{**facts(item), "why": why} for item, why in swept.failed],
        "spared": [{"job": job.id, "name": job.name, "why": why} for job, why in plan.spared],
        "notes": plan.notes,
    }


def _print(
    dry_run: bool, deleted: "Sequence[Item]", plan: "Plan", swept: "Swept", paths: bool, policy: "Policy"
) -> None:
    if paths:
        for item in deleted:
            click.echo(f"{_printable(item.path)}  {output.size(item.bytes)}  {item.reason}")
    if deleted:
        rows = [
            [reason, f"{total['count']:,}", output.size(total["bytes"])]
            for reason, total in _by_reason(deleted).items()
        ]
        output.print_table(("WHAT", "NUMBER", "SIZE"), rows, right=("NUMBER", "SIZE"))
        size = output.size(sum(item.bytes for item in deleted))
        click.echo(
            f"{output.count(len(deleted), 'file or folder', 'files and folders')}, {size}: "
            + ("would be deleted (--dry-run)" if dry_run else "deleted")
        )
    else:
        click.echo("nothing to delete")
    for item, why in swept.kept:
        output.notice(f"kept: {_printable(item.path)}: {why}")
    for job, why in plan.spared[:MAX_KEPT_SHOWN]:
        output.notice(f"kept: job {job.id}: {_printable(why)}")
    if len(plan.spared) > MAX_KEPT_SHOWN:
        output.notice(f"kept: {len(plan.spared) - MAX_KEPT_SHOWN} more jobs   (--json lists all)")
    for note in plan.notes:
        output.notice(f"note: {_printable(note)}")
    for item, why in swept.failed:
        output.notice(f"error: {_printable(item.path)} could not be deleted: {why}")
    if dry_run and policy.jobs_s is None:
        output.notice("  → add --jobs and --datasets to include old jobs and data sets")


def _printable(text: str) -> str:
    """Replace what is not valid UTF-8 in a file name."""
    return output.clean(text.encode("utf-8", "replace").decode())
