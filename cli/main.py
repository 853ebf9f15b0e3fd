"""
The entry point of `ganq`: the table of commands, and the one place where an error becomes an exit code.

Nothing heavier than click is imported here: help must be instant, and so must a typo.
"""

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click

from cli.ui.lazy import Entry, LazyGroup, examples
from jobs.text import as_utf8, require_text, use_streams_of_any_encoding

WORK, WATCH, DATA, RUN, ADMIN = "Work", "Watch", "Data and models", "Run", "Admin"

COMMANDS = (
    Entry("submit", "cli.submit.options:submit", "Submit a training, a generation or an evaluation.", WORK),
    Entry("cancel", "cli.control:cancel", "Cancel queued or running jobs.", WORK),
    Entry("hold", "cli.control:hold", "Keep queued jobs from starting.", WORK),
    Entry("release", "cli.control:release", "Let held jobs start.", WORK),
    Entry("retry", "cli.retry:retry", "Submit an ended job again, as a new one.", WORK),
    Entry("status", "cli.status:status", "List jobs, or show all about one.", WATCH),
    Entry("wait", "cli.wait:wait", "Wait until jobs have ended.", WATCH),
    Entry("logs", "cli.logs:logs", "Print what a job has logged.", WATCH),
    Entry("events", "cli.logs:events", "Print a job's history.", WATCH),
    Entry("open", "cli.results:open_", "Show where a job's results are.", WATCH),
    Entry("compare", "cli.compare:compare", "Put finished evaluations beside each other.", WATCH),
    Entry("workers", "cli.workers:workers", "List the workers.", WATCH),
    Entry("dataset", "cli.dataset:dataset", "Check, make and list data sets.", DATA),
    Entry("checkpoints", "cli.results:checkpoints", "List a job's checkpoints.", DATA),
    Entry("import", "cli.import_:import_", "Make weights from elsewhere usable.", DATA),
    Entry("export", "cli.export:export", "Write a job's weights for other programs.", DATA),
    Entry("up", "cli.up:up", "Run everything on this machine.", RUN),
    Entry("demo", "cli.demo:demo", "See it work: draw faces, train, generate.", RUN),
    Entry("worker", "cli.worker:worker", "Run one worker for each GPU.", RUN),
    Entry("web", "cli.web:web", "Serve the page: queue, runs, images.", RUN),
    Entry("doctor", "cli.doctor:doctor", "Look for what is wrong with the set-up.", ADMIN),
    Entry("health", "cli.health:health", "Say whether the workers here are well, by exit code.", ADMIN),
    Entry("limit", "cli.limit:limit", "Limit how many jobs of a user or a queue run at once.", ADMIN),
    Entry("gc", "cli.gc:gc", "Delete from the volume what nobody needs.", ADMIN),
    Entry("db", "cli.db:db", "Make or upgrade the job table.", ADMIN),
    Entry("completion", "cli.completion:completion", "Print a shell's completion script.", ADMIN),
)

MEANT = {
    "train": "submit train",
    "generate": "submit generate",
    "evaluate": "submit evaluate",
    "list": "status",
    "ls": "status",
    "ps": "status",
    "queue": "status",
    "delete": "cancel",
    "stop": "cancel",
    "kill": "cancel",
    "log": "logs",
    "limits": "limit",
    "quota": "limit",
    "help": "--help",
}

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141
COMPLETE = "_GANQ_COMPLETE"
"""The variable by which a shell's completion script asks."""
GARBAGE_EVERY = 100_000
PRINTERS = (__name__, "cli.ui.output")
INTERNAL_ERROR_HINT = "this is a bug in ganq; --debug shows the traceback"


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from storage.version import version

        click.echo(f"ganq {version()}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    entries=COMMANDS,
    meant=MEANT,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "ganq submit train --data faces/ --epochs 400",
        "ganq submit generate --count 1000",
        "ganq status",
    ),
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error (also GANQ_DEBUG=1).")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show it, leave.",
)
@click.pass_context
def root(ctx: click.Context, debug: bool) -> None:
    """A job queue for GANs: train, generate, and watch it happen."""
    ctx.color = _colour()


def _colour() -> bool | None:
    """False where colours are unwanted (https://no-color.org); None: on a terminal."""
    return False if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else None


def _open_missing_streams() -> None:
    """A daemon may start us with stdout closed (`>&-`): what we print is then nobody's, and no error."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open as long as the process lives


def _collect_rarely() -> None:
    """
    Spare a short command the search for garbage.

    Loading modules makes some 100,000 objects, which stay. Python looks through them at every
    700th, and several times as it ends: a third of the processor time of `ganq status`.
    """
    gc.set_threshold(GARBAGE_EVERY)
    atexit.register(gc.freeze)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Returns:
        The exit code: 0 done, 1 failed, 2 usage, 3 not found, 124 timeout, 130 Ctrl-C.
    """
    if argv is None:
        _collect_rarely()
    _open_missing_streams()
    use_streams_of_any_encoding()
    args = [as_utf8(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    # An option of the whole program is understood wherever it stands, as people type it at the end.
    debug = "--debug" in args or os.environ.get("GANQ_DEBUG", "") not in ("", "0")
    args = [arg for arg in args if arg != "--debug"]
    as_json = "--json" in args
    try:
        for arg in args:
            require_text(arg)
        code = _run(args)
        sys.stdout.flush()
        return code
    except (KeyboardInterrupt, click.Abort):
        _raise_if(debug)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _abandon_stdout()
        return EXIT_PIPE
    except click.exceptions.NoArgsIsHelpError as exc:
        exc.show()
        return EXIT_USAGE
    except click.ClickException as exc:
        _raise_if(debug)
        return _tell(exc.format_message(), _usage_hint(exc), "USAGE", exc.exit_code, as_json)
    except Exception as exc:
        _raise_if(debug)
        from jobs.errors import GanqError

        if isinstance(exc, GanqError):
            return _tell(exc.message, exc.hint, exc.code, exc.exit_code, as_json)
        if isinstance(exc, OSError) and exc.strerror:
            _abandon_stdout()
            where = f"{exc.filename}: " if exc.filename else ""
            hint = "--debug shows where"
            if _came_of_printing(exc):
                where = "the answer could not be written: "
                hint = "what was asked may be done all the same: look (ganq status) before you repeat it"
            return _tell(f"{where}{exc.strerror.lower()}", hint, "OS_ERROR", EXIT_FAILED, as_json)
        if isinstance(exc, UnicodeEncodeError):  # of a path: whatever is printed can be
            return _tell(
                f"{exc.object[:200]!r} cannot be a path in this locale ({exc.encoding})",
                "set LC_ALL=C.UTF-8, or the locale in which it was made",
                "OS_ERROR",
                EXIT_FAILED,
                as_json,
            )
        said = str(exc).strip().splitlines()
        what = f"{type(exc).__name__}: {said[0]}" if said else type(exc).__name__
        return _tell(what, INTERNAL_ERROR_HINT, "INTERNAL_ERROR", EXIT_FAILED, as_json)


def _run(args: list[str]) -> int:
    # Not root.main(): it would turn a reader that has gone into exit code 1.
    if instruction := os.environ.get(COMPLETE):
        from click.shell_completion import shell_complete

        return shell_complete(root, {}, "ganq", COMPLETE, instruction)
    try:
        with root.make_context("ganq", args) as ctx:
            outcome: Any = root.invoke(ctx)
    except click.exceptions.Exit as exc:
        return exc.exit_code
    return outcome if isinstance(outcome, int) else 0


def _abandon_stdout() -> None:
    """The reader has gone (`ganq status | head`), or the disk is full: the rest is unwanted, also at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _came_of_printing(exc: OSError) -> bool:
    """Whether stdout would not take what was said: the last to be called were those who print."""
    where = exc.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    name = where.tb_frame.f_globals.get("__name__", "") if where is not None else ""
    return exc.filename is None and (name in PRINTERS or name.split(".")[0] in ("click", "rich"))


def _raise_if(debug: bool) -> None:
    if debug:
        raise


def _usage_hint(exc: click.ClickException) -> str | None:
    ctx = getattr(exc, "ctx", None)
    return f"{ctx.command_path} --help" if ctx is not None else None


def _tell(message: str, hint: str | None, code: str, exit_code: int, as_json: bool) -> int:
    """Write an error for a person, or for a program that asked for JSON; returns its exit code."""
    from storage.settings import redact

    if as_json:
        import json

        told = {"code": code, "message": redact(message), "hint": redact(hint) if hint else None}
        _to_stderr(json.dumps({"error": told}))
        return exit_code
    text = " ".join(redact(message).split())
    if text[1:2].islower():  # click's own begin with a capital; a class's name keeps it
        text = text[0].lower() + text[1:] if code == "USAGE" else text
    _to_stderr(click.style("error: ", fg="red") + text.rstrip("."))
    if hint:
        _to_stderr(f"  → {redact(hint)}")
    return exit_code


def _to_stderr(line: str) -> None:
    """The exit code says it as well, where stderr takes nothing."""
    with suppress(OSError):
        click.echo(line, err=True, color=_colour())


if __name__ == "__main__":
    sys.exit(main())
