"""`ganq submit`: the group of its commands and the options that all of them have."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from cli.session import JOB, LABEL
from cli.ui import output
from cli.ui.lazy import Entry, LazyGroup, examples
from cli.ui.params import BoundedInt, Duration, Time, User
from ganq.submission.accept import SubmitOptions
from jobs.errors import SpecError
from jobs.labels import read_label

F = TypeVar("F", bound=Callable[..., Any])


@click.group(
    cls=LazyGroup,
    entries=(
        Entry("train", "cli.submit.train:train", "Train a GAN on a folder of images."),
        Entry("generate", "cli.submit.generate:generate", "Generate images with a trained GAN."),
        Entry("evaluate", "cli.submit.evaluate:evaluate", "Compare generated images with real ones."),
    ),
    invoke_without_command=True,
    no_args_is_help=True,
    epilog=examples(
        "ganq submit train --data faces/",
        "ganq submit generate --count 1000",
        "ganq submit -f jobs.toml --dry-run",
        "ganq show faces --as toml | ganq submit -f -",
    ),
)
@click.option(
    "-f",
    "--file",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Submit the jobs of this TOML file, all or none; - reads stdin. docs/jobfiles.md describes it.",
)
@click.option("--dry-run", is_flag=True, help="With --file: print what would be submitted; submit nothing.")
@click.option("--hold", "held", is_flag=True, help="With --file: do not start the jobs until `ganq release`.")
@output.json_option
@click.pass_context
def submit(ctx: click.Context, file: str | None, dry_run: bool, held: bool, as_json: bool) -> int:
    """Submit a job, or the jobs of a file. An accepted job is never lost."""
    if ctx.invoked_subcommand is not None:
        if file is not None:
            raise click.UsageError(f"--file cannot be combined with {ctx.invoked_subcommand}", ctx)
        return 0
    if file is None:
        raise click.UsageError("no command and no --file", ctx)
    from cli.submit.from_file import submit_file

    return submit_file(file, dry_run=dry_run, held=held, as_json=as_json)


@dataclass(frozen=True, kw_only=True)
class CommandOptions(SubmitOptions):
    """Options of every `ganq submit` command that are not part of the spec."""

    dry_run: bool
    wait: bool
    as_json: bool
    sweep: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wait and self.held:
            raise SpecError("--wait would never return for a job on --hold", hint="use only one of them")


def submit_options(command: F) -> F:
    """Add the options of CommandOptions to a command."""
    for option in reversed(
        (
            click.option("--name", help="Name of the job; accepted wherever an id is."),
            click.option(
                "--priority",
                type=BoundedInt(-1000, 1000),
                help="Higher runs first.  [default: 0 for train, 5 for evaluate, 10 for generate]",
            ),
            click.option(
                "--no-preempt",
                is_flag=True,
                help="Do not let a job of higher priority preempt this training. (A preempted training "
                "resumes later and loses nothing.)",
            ),
            click.option(
                "--queue",
                default="default",
                show_default=True,
                help="Queue of the job; only workers that serve it run the job.",
            ),
            click.option(
                "--after", multiple=True, type=JOB, help="Start when this job has succeeded; repeatable."
            ),
            click.option(
                "--after-any",
                multiple=True,
                type=JOB,
                help="Start when this job has ended, with any outcome; repeatable.",
            ),
            click.option(
                "--after-fail",
                multiple=True,
                type=JOB,
                help="Start when this job has failed; cancelled if it ends otherwise. Repeatable.",
            ),
            click.option(
                "--begin",
                type=Time(),
                help="Start at this time or later: 22:00, 2026-12-01T06:30 (local time), now+2h.",
            ),
            click.option(
                "--label", "labels", multiple=True, type=LABEL, help="Label of the job; repeatable."
            ),
            click.option("--note", help="Text that is shown with the job."),
            click.option("--user", type=User(), help="Owner of the job.  [default: the current user]"),
            click.option(
                "--hold",
                "held",
                is_flag=True,
                help="Do not start the job until `ganq release`.",
            ),
            click.option(
                "--time-limit",
                type=Duration(),
                help="Maximum run time over all restarts, e.g. 2h30m or 1d. A training writes a checkpoint "
                "before it is stopped.",
            ),
            click.option(
                "--submit-key",
                help="Idempotency key: a second submission with the same key returns the first job.",
            ),
            click.option(
                "--sweep",
                multiple=True,
                metavar="FIELD=VALUES",
                help="Submit one job per value, e.g. lr-g=1e-4,2e-4 or seed=0-9; repeat the option for all "
                "combinations.",
            ),
            click.option(
                "--max-running",
                type=BoundedInt(1, 10_000),
                help="With --sweep: number of its jobs that may run at once.",
            ),
            click.option("--dry-run", is_flag=True, help="Print the resolved options; submit nothing."),
            click.option("--wait", is_flag=True, help="Wait until the job ends; exit 0 if it succeeded."),
            output.json_option,
        )
    ):
        command = option(command)
    return command


def read_submit_options(options: dict[str, Any]) -> CommandOptions:
    """Remove the values of submit_options() from `options` and return them."""
    values = {name: options.pop(name) for name in CommandOptions.__dataclass_fields__}
    values["labels"] = dict(map(read_label, values["labels"]))
    if values["max_running"] is not None and not values["sweep"]:
        raise SpecError("--max-running limits the jobs of a sweep", hint="ganq limit limits those of a user")
    return CommandOptions(**values)
