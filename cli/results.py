"""`ganq open` and `ganq checkpoints`: what a job has made, and where it lies."""

import os
import shutil
import subprocess
import sys

import click

from cli.session import JOB, open_session
from cli.ui import output
from cli.ui.lazy import examples
from jobs.errors import NotFoundError

COLUMNS = ("EPOCH", "STEP", "KIND", "METRIC", "SIZE", "MADE", "PATH")


@click.command(
    "open", epilog=examples("ganq open 12", "ganq open faces --print", "cd $(ganq open 12 --print)")
)
@click.argument("job", type=JOB)
@click.option("--print", "print_only", is_flag=True, help="Print the path; open no window.")
@output.json_option
def open_(job: str, print_only: bool, as_json: bool) -> int:
    """Print where JOB's pictures are, and open a file manager there if there is a display."""
    from cli.ui.job_page import result_paths

    session = open_session()
    found = session.queries.find(job)
    paths = result_paths(session, found)
    best = next((paths[n] for n in ("copy", "images", "grids", "samples", "folder") if n in paths), None)
    gone = best is None or not best.exists()
    if gone and found.part_of is not None:
        raise NotFoundError(
            f"job {found.id} ({found.state}) is a part of job {found.part_of}, which gathers the pictures",
            hint=f"ganq open {found.part_of}",
        )
    if (found.result or {}).get("deleted_at"):
        raise NotFoundError(
            f"the results of job {found.id} were deleted by ganq gc, "
            f"{output.timestamp((found.result or {})['deleted_at'])}",
            hint=f"ganq retry {found.id} makes them again; ganq status {found.id} shows what is known",
        )
    if gone:
        raise NotFoundError(
            f"job {found.id} ({found.state}) has no results yet"
            if not found.state.terminal
            else f"job {found.id} ({found.state}) has left no results"
            + (f" at {best}: the volume is not here, or they were deleted" if best else ""),
            hint=f"ganq status {found.id} shows how far it is; GANQ_VOLUME says where results are",
        )
    if as_json:
        output.print_json({"id": found.id, "path": str(best), "paths": {n: str(p) for n, p in paths.items()}})
        return 0
    click.echo(str(best))
    opener = None if print_only else _file_manager()
    if opener is not None:
        subprocess.Popen(
            [opener, str(best)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return 0


def _file_manager() -> str | None:
    """The program that opens a folder, if a person sits before a display."""
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
    """List JOB's checkpoints, oldest first; each epoch can be named to `submit generate --checkpoint`."""
    session = open_session()
    found = session.queries.find(job)
    known = session.queries.checkpoints(found.id)
    if as_json:
        output.print_json_array(
            {**one.__dict__, "absolute_path": str(session.settings.volume / one.path)} for one in known
        )
        return 0
    if not known:
        click.echo(f"job {found.id} ({found.state}) has no checkpoints")
        return 0
    rows = [
        [
            str(one.epoch),
            f"{one.step:,}",
            one.kind,
            "" if one.metric is None else f"{one.metric:.4g}",
            output.size(one.bytes),
            output.timestamp(one.created_at),
            str(session.settings.volume / one.path),
        ]
        for one in known
    ]
    output.print_table(COLUMNS, rows, right=("EPOCH", "STEP", "METRIC", "SIZE"))
    if any(one.metric is not None for one in known):
        from storage.status.job_text import metric_key

        click.echo(f"metric: {metric_key(found)}, lower is better")
    return 0
