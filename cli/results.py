"""`ganq open` and `ganq checkpoints`: the results of a job and their paths."""

import os
import shutil
import subprocess
import sys

import click

from cli.session import JOB, open_session
from cli.ui import output
from cli.ui.lazy import examples
from jobs.errors import NotFoundError

COLUMNS = ("EPOCH", "STEP", "KIND", "METRIC", "SIZE", "CREATED", "PATH")


@click.command(
    "open", epilog=examples("ganq open 12", "ganq open faces --print", "cd $(ganq open 12 --print)")
)
@click.argument("job", type=JOB)
@click.option("--print", "print_only", is_flag=True, help="Only print the path.")
@output.json_option
def open_(job: str, print_only: bool, as_json: bool) -> int:
    """Print the path of JOB's results, and open it in a file manager if there is a display."""
    from cli.ui.job_page import result_paths

    session = open_session()
    found = session.queries.find(job)
    paths = result_paths(session, found)
    path = next((paths[n] for n in ("copy", "images", "grids", "samples", "folder") if n in paths), None)
    missing = path is None or not path.exists()
    if missing and found.part_of is not None:
        raise NotFoundError(
            f"job {found.id} ({found.state}) is a shard of job {found.part_of}, which has the images",
            hint=f"ganq open {found.part_of}",
        )
    if (found.result or {}).get("deleted_at"):
        raise NotFoundError(
            f"the results of job {found.id} were deleted by ganq gc, "
            f"{output.timestamp((found.result or {})['deleted_at'])}",
            hint=f"ganq retry {found.id} generates them again; ganq status {found.id} shows the job",
        )
    if missing:
        raise NotFoundError(
            f"job {found.id} ({found.state}) has no results yet"
            if not found.state.terminal
            else f"job {found.id} ({found.state}) has no results"
            + (f" at {path}: they were deleted, or the volume is not mounted" if path else ""),
            hint=f"ganq status {found.id} shows its state; GANQ_VOLUME is the folder of all results",
        )
    if as_json:
        output.print_json({"id": found.id, "path": str(path), "paths": {n: str(p) for n, p in paths.items()}})
        return 0
    click.echo(str(path))
    opener = None if print_only else _file_manager()
    if opener is not None:
        subprocess.Popen(
            [opener, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return 0


def _file_manager() -> str | None:
    """Return the program that opens a folder, if stdout is a terminal on a display."""
    if not output.on_terminal():
        return None
    if sys.platform == "darwin":
        return shutil.which("open")
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return shutil.which("xdg-open")
    return None


@click.command(
    epilog=examples("ganq checkpoints 12", "ganq submit generate --from 12 --checkpoint 200 --count 64")
)
@click.argument("job", type=JOB)
@output.json_option
def checkpoints(job: str, as_json: bool) -> int:
    """List the checkpoints of JOB, oldest first, for `submit generate --checkpoint EPOCH`."""
    session = open_session()
    found = session.queries.find(job)
    known = session.queries.checkpoints(found.id)
    if as_json:
        output.print_json_array(
            {**each.__dict__, "absolute_path": str(session.settings.volume / each.path)} for each in known
        )
        return 0
    if not known:
        click.echo(f"job {found.id} ({found.state}) has no checkpoints")
        return 0
    rows = [
        [
            str(each.epoch),
            f"{each.step:,}",
            each.kind,
            "" if each.metric is None else f"{each.metric:.4g}",
            output.size(each.bytes),
            output.timestamp(each.created_at),
            str(session.settings.volume / each.path),
        ]
        for each in known
    ]
    output.print_table(COLUMNS, rows, right=("EPOCH", "STEP", "METRIC", "SIZE"))
    if any(each.metric is not None for each in known):
        from storage.status.job_text import metric_key

        click.echo(f"metric: {metric_key(found)}, lower is better")
    return 0
