"""
The entry point of `ganq`: the table of commands, and the mapping of errors to messages and exit codes.

Only click is imported here, so that `--help` and usage errors are instant.
"""

import atexit
import errno
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
    Entry("pause", "cli.pause:pause", "Stop running jobs with their work saved.", WORK),
    Entry("resume", "cli.pause:resume", "Continue paused jobs.", WORK),
    Entry("hold", "cli.control:hold", "Prevent queued jobs from starting.", WORK),
    Entry("release", "cli.control:release", "Allow held jobs to start.", WORK),
    Entry("set", "cli.set:set_", "Change the priority, name, labels or note of jobs.", WORK),
    Entry("move", "cli.set:move", "Move queued jobs before another one.", WORK),
    Entry("retry", "cli.retry:retry", "Submit an ended job again.", WORK),
    Entry("status", "cli.status:status", "List jobs, or show one job.", WATCH),
    Entry("show", "cli.show:show", "Print a job as a command, a job file or Python.", WATCH),
    Entry("wait", "cli.wait:wait", "Wait until jobs have ended.", WATCH),
    Entry("logs", "cli.logs:logs", "Print the log of a job.", WATCH),
    Entry("events", "cli.logs:events", "Print the history of a job.", WATCH),
    Entry("open", "cli.results:open_", "Open the results of a job.", WATCH),
    Entry("download", "cli.download:download", "Copy the images of a job to a folder.", WATCH),
    Entry("report", "cli.report:report", "Write a job's page to one HTML file.", WATCH),
    Entry("compare", "cli.compare:compare", "Compare trainings and evaluations.", WATCH),
    Entry("workers", "cli.workers:workers", "List workers and their jobs.", WATCH),
    Entry("dataset", "cli.dataset:dataset", "Check, draw and list data sets.", DATA),
    Entry("checkpoints", "cli.results:checkpoints", "List the checkpoints of a job.", DATA),
    Entry("import", "cli.import_:import_", "Import weights.", DATA),
    Entry("export", "cli.export:export", "Export weights to other programs.", DATA),
    Entry("push", "cli.push:push", "Write a model as a folder to share.", DATA),
    Entry("remake", "cli.remake:remake", "Generate an image again from its passport.", DATA),
    Entry("up", "cli.up:up", "Run job table, Redis and workers on this machine.", RUN),
    Entry("demo", "cli.demo:demo", "Run an example: draw faces, train, generate.", RUN),
    Entry("worker", "cli.worker:worker", "Run one worker per GPU.", RUN),
    Entry("drain", "cli.drain:drain", "Have workers return their jobs and exit.", RUN),
    Entry("web", "cli.web:web", "Serve the web page.", RUN),
    Entry("doctor", "cli.doctor:doctor", "Diagnose the installation.", ADMIN),
    Entry("health", "cli.health:health", "Health check of the workers on this machine.", ADMIN),
    Entry("token", "cli.token:token", "Create and revoke tokens of the page and the REST API.", ADMIN),
    Entry("webhook", "cli.webhook:webhook", "Send events to webhooks, chats, mail or a command.", ADMIN),
    Entry("limit", "cli.limit:limit", "Limit the running jobs of a user or a queue.", ADMIN),
    Entry("keep", "cli.keep:keep", "Protect results from deletion.", DATA),
    Entry("rm", "cli.keep:rm", "Delete the results of jobs.", DATA),
    Entry("usage", "cli.usage:usage", "Sum the worker-hours and GPU-hours of users or queues.", ADMIN),
    Entry("gc", "cli.gc:gc", "Delete unreferenced files from the volume.", ADMIN),
    Entry("db", "cli.db:db", "Create or upgrade the job table.", ADMIN),
    Entry("backup", "cli.backup:backup", "Save the job table to a folder.", ADMIN),
    Entry("restore", "cli.backup:restore", "Restore a backup into an empty job table.", ADMIN),
    Entry("schema", "cli.show:schema", "Print the JSON Schema of job files.", ADMIN),
    Entry("completion", "cli.completion:completion", "Print the completion script of a shell.", ADMIN),
)

SUGGESTIONS = {
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
"""Environment variable that the completion scripts of click set."""
OUTPUT_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EBADF)
INTERNAL_ERROR_HINT = "this is a bug in ganq; --debug prints the traceback"


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from storage.version import version

        click.echo(f"ganq {version()}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    entries=COMMANDS,
    suggestions=SUGGESTIONS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "ganq submit train --data faces/ --epochs 400",
        "ganq submit generate --count 1000",
        "ganq status",
    ),
)
@click.option("--debug", is_flag=True, help="Print the traceback of errors (also GANQ_DEBUG=1).")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
@click.pass_context
def root(ctx: click.Context, debug: bool) -> None:
    """A job queue for GANs: train models, generate images, follow the progress."""
    ctx.color = _colour()


def _colour() -> bool | None:
    """Return False if colours are disabled (https://no-color.org), else None: click decides."""
    return False if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else None


def _open_missing_streams() -> None:
    """Replace closed streams (`>&-`) with /dev/null."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open as long as the process lives


def _limit_garbage_collection() -> None:
    """Collect rarely, and not at exit: saves a quarter of the CPU time of `ganq status`."""
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command and return its exit code.

    Exit codes: 0 success, 1 error, 2 usage error, 3 not found, 124 timeout, 130 Ctrl-C.
    """
    if argv is None:
        _limit_garbage_collection()
    _open_missing_streams()
    use_streams_of_any_encoding()
    args = [as_utf8(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    # --debug is accepted at any position.
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
        _reraise_if(debug)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_PIPE
    except click.exceptions.NoArgsIsHelpError as exc:
        exc.show()
        return EXIT_USAGE
    except click.ClickException as exc:
        _reraise_if(debug)
        return _report_error(exc.format_message(), _usage_hint(exc), "USAGE", exc.exit_code, as_json)
    except Exception as exc:
        _reraise_if(debug)
        from jobs.errors import GanqError

        if isinstance(exc, GanqError):
            return _report_error(exc.message, exc.hint, exc.code, exc.exit_code, as_json)
        if isinstance(exc, OSError) and exc.strerror:
            _discard_stdout()
            where = f"{exc.filename}: " if exc.filename else ""
            hint = "--debug prints the traceback"
            if exc.filename is None and exc.errno in OUTPUT_ERRORS:
                where = "the output could not be written: "
                hint = "the command may have succeeded; check with ganq status before you repeat it"
            return _report_error(f"{where}{exc.strerror.lower()}", hint, "OS_ERROR", EXIT_FAILED, as_json)
        if isinstance(exc, UnicodeEncodeError):  # a path; output is always encodable
            return _report_error(
                f"{exc.object[:200]!r} cannot be a path in this locale ({exc.encoding})",
                "set LC_ALL=C.UTF-8, or the locale in which it was created",
                "OS_ERROR",
                EXIT_FAILED,
                as_json,
            )
        lines = str(exc).strip().splitlines()
        message = f"{type(exc).__name__}: {lines[0]}" if lines else type(exc).__name__
        return _report_error(message, INTERNAL_ERROR_HINT, "INTERNAL_ERROR", EXIT_FAILED, as_json)


def _run(args: list[str]) -> int:
    # Not root.main(), which turns a closed pipe into exit code 1.
    if instruction := os.environ.get(COMPLETE):
        from click.shell_completion import shell_complete

        return shell_complete(root, {}, "ganq", COMPLETE, instruction)
    try:
        with root.make_context("ganq", args) as ctx:
            result: Any = root.invoke(ctx)
    except click.exceptions.Exit as exc:
        return exc.exit_code
    return result if isinstance(result, int) else 0


def _discard_stdout() -> None:
    """Redirect stdout to /dev/null: after a closed pipe or on a full disk, nothing more can be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reraise_if(debug: bool) -> None:
    if debug:
        raise


def _usage_hint(exc: click.ClickException) -> str | None:
    ctx = getattr(exc, "ctx", None)
    return f"{ctx.command_path} --help" if ctx is not None else None


def _report_error(message: str, hint: str | None, code: str, exit_code: int, as_json: bool) -> int:
    """Print an error as text or JSON; return the exit code."""
    from storage.settings import redact

    if as_json:
        import json

        error = {"code": code, "message": redact(message), "hint": redact(hint) if hint else None}
        _print_stderr(json.dumps({"error": error}))
        return exit_code
    text = " ".join(redact(message).split())
    if text[1:2].islower():  # messages of click begin with a capital letter
        text = text[0].lower() + text[1:] if code == "USAGE" else text
    _print_stderr(click.style("error: ", fg="red") + text.rstrip("."))
    if hint:
        _print_stderr(f"  → {redact(hint)}")
    return exit_code


def _print_stderr(line: str) -> None:
    """Print to stderr; an unwritable stderr is ignored, as the exit code reports the error too."""
    with suppress(OSError):
        click.echo(line, err=True, color=_colour())


if __name__ == "__main__":
    sys.exit(main())
