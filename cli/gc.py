"""`ganq gc`: delete from the volume what nobody needs any more."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.session import open_session
from cli.ui import output
from cli.ui.lazy import examples

if TYPE_CHECKING:
    from storage.gc.policy import Policy
    from storage.gc.sweep import Item, Plan, Swept

AGE = re.compile(r"([0-9]{1,6})\s*(d|h|min)")
UNITS = {"d": 86400.0, "h": 3600.0, "min": 60.0}


class Age(click.ParamType[float]):
    """'30d', '12h', '90min' to seconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        found = AGE.fullmatch(str(value).strip())
        if found is None:
            self.fail(f"{str(value)[:40]!r} is no age; e.g. 30d, 12h, 90min", param, ctx)
        return int(found[1]) * UNITS[found[2]]


@click.command(
    epilog=examples(
        "ganq gc --dry-run",
        "ganq gc --dry-run --paths --jobs --older-than 90d",
        "ganq gc --datasets --jobs --older-than 30d",
    )
)
@click.option("--dry-run", is_flag=True, help="Show what would go; delete nothing.")
@click.option("--datasets", is_flag=True, help="Also decoded data sets that no job has used lately.")
@click.option(
    "--jobs", is_flag=True, help="Also pictures, samples and checkpoints of jobs that ended long ago."
)
@click.option(
    "--older-than", type=Age(), help="How long ago, for --datasets and --jobs: 12h, 90d.  [default: 30d]"
)
@click.option("--paths", is_flag=True, help="Name each path.")
@output.json_option
def gc(
    dry_run: bool, datasets: bool, jobs: bool, older_than: float | None, paths: bool, as_json: bool
) -> int:
    """
    Delete from the volume what nobody needs any more.

    By itself: what attempts that have ended left behind and no row of the job table
    points to, and temporary names that no writer can be at. It is safe while jobs run,
    and what it was killed at goes the next time. With --jobs the results of old jobs go,
    except those that a waiting or running job needs; their rows and logs stay.

    Exit code 1 if something could not be deleted, or this is not the job table's volume.
    """
    if older_than is not None and not (datasets or jobs):
        raise click.UsageError("--older-than belongs to --datasets or --jobs")
    from contextlib import nullcontext

    from storage.gc.policy import Policy
    from storage.gc.sweep import Collector, Swept, alone

    session = open_session()
    age_s = 30 * UNITS["d"] if older_than is None else older_than
    policy = Policy(
        grace_s=session.settings.lease_seconds,
        datasets_s=age_s if datasets else None,
        jobs_s=age_s if jobs else None,
    )
    garbage = Collector(session.database, session.volume, policy)
    with nullcontext() if dry_run else alone(session.database):
        plan = garbage.plan()
        swept = Swept() if dry_run else garbage.sweep(plan)
    gone = plan.items if dry_run else swept.gone
    if as_json:
        output.print_json(_as_json(str(session.volume.root), dry_run, gone, plan, swept))
    else:
        _print(dry_run, gone, plan, swept, paths, policy)
    return 1 if swept.failed else 0


def _by_reason(items: "Iterable[Item]") -> dict[str, dict[str, int]]:
    number: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for one in items:
        number[str(one.reason)] += 1
        size[str(one.reason)] += one.bytes
    return {reason: {"count": number[reason], "bytes": size[reason]} for reason in sorted(number)}


def _as_json(
    volume: str, dry_run: bool, gone: "Sequence[Item]", plan: "Plan", swept: "Swept"
) -> dict[str, Any]:
    def facts(item: "Item") -> dict[str, Any]:
        return {"path": item.path, "reason": str(item.reason), "bytes": item.bytes, "job": item.job_id}

    return {
        "volume": volume,
        "dry_run": dry_run,
        "count": len(gone),
        "bytes": sum(one.bytes for one in gone),
        "reasons": _by_reason(gone),
        "items": [facts(one) for one in gone],
        "kept": [{**facts(item), "why": why} for item, why in swept.kept],
        "failed": [{**facts(item), "why": why} for item, why in swept.failed],
        "notes": plan.notes,
    }


def _print(
    dry_run: bool, gone: "Sequence[Item]", plan: "Plan", swept: "Swept", paths: bool, policy: "Policy"
) -> None:
    if paths:
        for one in gone:
            click.echo(f"{_plain(one.path)}  {output.size(one.bytes)}  {one.reason}")
    if gone:
        rows = [
            [reason, f"{told['count']:,}", output.size(told["bytes"])]
            for reason, told in _by_reason(gone).items()
        ]
        output.print_table(("WHAT", "NUMBER", "SIZE"), rows, right=("NUMBER", "SIZE"))
        total = output.size(sum(one.bytes for one in gone))
        click.echo(
            f"{output.count(len(gone), 'thing')}, {total}: "
            + ("would be deleted (--dry-run)" if dry_run else "deleted")
        )
    else:
        click.echo("nothing to delete")
    for item, why in swept.kept:
        output.notice(f"kept: {_plain(item.path)}: {why}")
    for note in plan.notes:
        output.notice(f"note: {_plain(note)}")
    for item, why in swept.failed:
        output.notice(f"error: {_plain(item.path)} could not be deleted: {why}")
    if dry_run and policy.jobs_s is None:
        output.notice("  → --jobs and --datasets show what old jobs and data sets would free")


def _plain(text: str) -> str:
    """A name on the volume may be no UTF-8."""
    return output.clean(text.encode("utf-8", "replace").decode())
