"""`ganq submit`: what its commands share. The row in the table is the acceptance; all else follows it."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.session import JOB, Session
from cli.submit import sweep
from cli.ui import output
from cli.ui.duration_param import Duration
from cli.ui.lazy import Entry, LazyGroup, examples
from cli.ui.params import User, Whole
from jobs.errors import SpecError
from storage.settings import WORD, WORD_HINT

if TYPE_CHECKING:
    from jobs.specs import Spec
    from storage.db.rows import Job

F = TypeVar("F", bound=Callable[..., Any])


@click.group(
    cls=LazyGroup,
    entries=(
        Entry("train", "cli.submit.train:train", "Train a GAN on a folder of pictures."),
        Entry("generate", "cli.submit.generate:generate", "Make pictures from a trained GAN."),
        Entry("evaluate", "cli.submit.evaluate:evaluate", "Measure pictures against the real ones."),
    ),
    epilog=examples("ganq submit train --data faces/", "ganq submit generate --count 1000"),
)
def submit() -> None:
    """Submit a job. Once it is accepted it is never lost, whatever goes down."""


@dataclass(frozen=True)
class SubmitOptions:
    """What every kind of job can be given beside its spec."""

    name: str | None
    priority: int | None
    no_preempt: bool
    queue: str
    after: tuple[str, ...]
    user: str | None
    held: bool
    time_limit: float | None
    dry_run: bool
    wait: bool
    as_json: bool
    submit_key: str | None
    sweep: tuple[str, ...]

    def __post_init__(self) -> None:
        for option, value in (
            ("--queue", self.queue),
            ("--submit-key", self.submit_key),
        ):
            if value is not None and not WORD.fullmatch(value):
                raise SpecError(
                    f"{option} {value[:70]!r} cannot be used",
                    hint=WORD_HINT,
                )
        if self.wait and self.held:
            raise SpecError("--wait would wait for ever for a job on --hold", hint="use one of the two")
        if self.name is not None:
            from jobs.specs import check_name

            check_name(self.name)


def submit_options(command: F) -> F:
    """Decorator: the options that every `ganq submit` command has; take() gathers them."""
    for option in reversed(
        (
            click.option("--name", help="A name for the job; it works wherever an id does."),
            click.option(
                "--priority",
                type=Whole(-1000, 1000),
                help="Higher runs first.  [default: 0 for train, 5 for evaluate, 10 for generate]",
            ),
            click.option(
                "--no-preempt",
                is_flag=True,
                help="Never make room for a job of higher priority (a training does, and loses nothing).",
            ),
            click.option("--queue", default="default", show_default=True, help="Which workers may take it."),
            click.option(
                "--after", multiple=True, type=JOB, help="Start when this job has succeeded; repeatable."
            ),
            click.option("--user", type=User(), help="Who asks. Default: who you are here."),
            click.option(
                "--hold", "held", is_flag=True, help="Accept it, but let it start at `ganq release` only."
            ),
            click.option(
                "--time-limit",
                type=Duration(),
                help="How long it may run, over all attempts: 2h30m, 1d. A training saves itself first.",
            ),
            click.option(
                "--submit-key", help="The same key gives the same job, once: for scripts that repeat."
            ),
            click.option(
                "--sweep",
                multiple=True,
                metavar="FIELD=VALUES",
                help="One job for each value, as lr-g=1e-4,2e-4 or seed=0-9; repeat it for each combination.",
            ),
            click.option("--dry-run", is_flag=True, help="Show what would be done; submit nothing."),
            click.option("--wait", is_flag=True, help="Wait for its end, and exit 0 or 1 by it."),
            output.json_option,
        )
    ):
        command = option(command)
    return command


def read_submit_options(options: dict[str, Any]) -> SubmitOptions:
    """Take the options of wish_options() out of all that were given."""
    return SubmitOptions(**{name: options.pop(name) for name in SubmitOptions.__dataclass_fields__})


def needed(session: Session, wish: SubmitOptions) -> list[int]:
    """
    The jobs of --after, by id.

    Raises:
        JobNotFoundError: one of them does not exist.
    """
    return [session.queries.find(one).id for one in wish.after]


def accept(session: Session, spec: "Spec", wish: SubmitOptions, *, after: Sequence[int] = ()) -> int:
    """
    Commit the job, ring for it, say so, and wait for it if that is wished.

    Args:
        after: jobs that this one needs by its nature, beside those of --after.

    Returns:
        The exit code.

    Raises:
        JobNotFoundError, SpecError: a job in --after does not exist or has failed.
    """
    from cli.submit.notify import best_effort
    from jobs.kinds import SPEC_VERSION, kind_named

    kind = kind_named(spec.kind)
    named = needed(session, wish)
    split = spec.split()
    before = session.queries.by_submit_key(wish.submit_key) if wish.submit_key else None
    job = session.store.submit(
        ringing=True,
        parts=[(part.to_json(), part.pictures) for part in split],
        max_workers=getattr(spec, "max_workers", 0),
        kind=spec.kind,
        spec=spec.to_json(),
        spec_version=SPEC_VERSION,
        submit_key=wish.submit_key or secrets.token_hex(16),
        user=wish.user or session.settings.user,
        name=wish.name,
        queue=wish.queue,
        priority=kind.priority if wish.priority is None else wish.priority,
        preemptible=kind.preemptible and not wish.no_preempt,
        after=[*dict.fromkeys([*after, *named])],
        held=wish.held,
        time_limit_s=wish.time_limit,
    )
    with best_effort(f"job {job.id}"):
        _tell(session, job, wish, told_before=before is not None)
    return _wait_for(session, job, wish) if wish.wait else 0


def _tell(session: Session, job: "Job", wish: SubmitOptions, *, told_before: bool) -> None:
    """Say that a job is accepted, and ring for it whether or not that can be said."""
    from cli.submit.notify import ring
    from storage.status import job_text

    try:
        if wish.name is not None and not told_before:
            _say_if_taken(session, job)
        if not wish.as_json:
            around = job_text.StatusContext.of(session.queries, [job])
            name = f" ({job.name})" if job.name else ""
            accepted = "accepted earlier under this key" if told_before else "accepted"
            click.echo(f"job {job.id}{name}: {job.kind} {accepted}, {job_text.state(job, around)}")
    finally:
        ring(session, job)
    if wish.wait:
        return
    if wish.as_json:
        output.print_json(job_text.as_json(job, job_text.StatusContext.of(session.queries, [job])))
    else:
        click.echo(f"  → ganq status {job.id} --watch, ganq logs {job.id} -f")


def _wait_for(session: Session, job: "Job", wish: SubmitOptions) -> int:
    from cli.ui.follow import exit_code_of, follow
    from storage.status import job_text

    ended, timed_out = follow(session, [job.id], quiet=wish.as_json)
    if wish.as_json:
        output.print_json(job_text.as_json(ended[0], job_text.StatusContext.of(session.queries, ended)))
    return exit_code_of(ended, timed_out)


def _say_if_taken(session: Session, job: "Job") -> None:
    """A name means its newest job: say which one it meant until now."""
    from storage.db.queries import Filter

    for one in session.queries.page(Filter(before_id=job.id, name=job.name), limit=20):
        if one.name == job.name:
            output.notice(f"{job.name} was job {one.id} ({one.state}); from now on it means job {job.id}")
            return


def show_plan(
    spec: "Spec",
    plan: Mapping[str, Any],
    seconds: float | None,
    as_json: bool,
    changes: Sequence[Mapping[str, Any]] = (),
) -> int:
    """
    What --dry-run prints: the resolved spec, what it amounts to, and how long it may take.

    Args:
        changes: of a sweep, whose first job is shown, the fields that change in each.
    """
    if as_json:
        facts = {"kind": spec.kind, "spec": spec.to_json(), "plan": dict(plan), "estimate_seconds": seconds}
        output.print_json(facts | ({"sweep": [dict(one) for one in changes]} if changes else {}))
        return 0
    if changes:
        click.echo(f"sweep of {sweep.told(changes)}; of the first:")
    facts = {name: value for name, value in spec.to_json().items() if value not in (None, [])}
    for title, rows in (("spec", facts), ("plan", plan)):
        click.echo(title)
        width = max(map(len, rows))
        for name, value in rows.items():
            shown = _shown(name, value)
            click.echo(f"  {name.ljust(width)}  {output.clean(shown)}")
    click.echo("time")
    if seconds is None:
        click.echo("  unknown: no job like this one has run here yet")
    else:
        click.echo(f"  about {output.duration(seconds)}, at the rate of earlier jobs")
    click.echo("nothing was submitted (--dry-run)")
    return 0


def _shown(name: str, value: Any) -> str:
    if "bytes" in name:
        return output.size(value)
    if isinstance(value, list):
        return ",".join("-".join(map(str, one)) if isinstance(one, list) else str(one) for one in value)
    return f"{value:,}" if type(value) is int and name != "seed" else str(value)
