"""`ganq open` and `ganq checkpoints`: the results of a job and their paths."""

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import click

from cli.session import JOB, open_session
from cli.ui import output
from cli.ui.lazy import examples
from jobs.errors import NotFoundError

if TYPE_CHECKING:
    from storage.settings import Settings

COLUMNS = ("EPOCH", "STEP", "KIND", "METRIC", "SIZE", "CREATED", "PATH")


@click.command(
    "open",
    epilog=examples("ganq open", "ganq open 12", "ganq open faces --print", "cd $(ganq open 12 --print)"),
)
@click.argument("job", type=JOB, required=False)
@click.option("--print", "print_only", is_flag=True, help="Only print the path.")
@output.json_option
def open_(job: str | None, print_only: bool, as_json: bool) -> int:
    """
    Print the path of JOB's results, and open them if there is a display.

    They open in the page (`ganq up`, `ganq web`) while its server runs, else in a file manager.
    With GANQ_API_URL the page of that server is opened.
    Without JOB: print the link of the page, and open it.
    """
    from cli.ui.job_page import result_paths
    from storage.settings import Settings
    from web.serve import running

    if Settings.load().api_url:
        return _open_remote(job, print_only, as_json)
    if job is None:
        about = running(Settings.load())
        if about is None:
            raise NotFoundError("no page is served here", hint="ganq up or ganq web serves it")
        if as_json:
            output.print_json({"link": about["link"]})
            return 0
        click.echo(about["link"])
        if not print_only:
            _open_page(Settings.load(), about["link"])
        return 0
    session = open_session()
    found = session.queries.find(job)
    if found.kind == "train" and found.attempt > 1 and found.state.terminal:
        from storage.results.attempts import gather_samples
        from storage.volume.permissions import group_umask

        volume = session.volume_of(found)  # jobs of an older ganq, of which each attempt has its own
        with group_umask(volume.root):
            gather_samples(volume, found.id, found.attempt)
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
    if print_only or (opener := _opener()) is None:
        return 0
    about = running(session.settings)
    if about is not None:
        _open_page(session.settings, about["link"].replace("/?", f"/jobs/{found.id}?", 1))
    else:
        _start(opener, str(path))
    return 0


def _open_remote(job: str | None, print_only: bool, as_json: bool) -> int:
    session = open_session()
    found = None if job is None else session.queries.find(job)
    link = session.link_of(found)
    if as_json:
        output.print_json({"link": link} if found is None else {"id": found.id, "link": link})
        return 0
    click.echo(link)
    if not print_only and (opener := _opener()) is not None:
        _start(opener, link)
    return 0


def _open_page(settings: "Settings", link: str) -> None:
    """Open a link in the browser, through a file: the token in it must not be on a command line."""
    if (opener := _opener()) is None:
        return
    path = settings.home / "web-open.html"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(f'<!doctype html><meta http-equiv="refresh" content="0;url={link}">')
    _start(opener, str(path))


def _start(opener: str, what: str) -> None:
    subprocess.Popen(
        [opener, what],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _opener() -> str | None:
    """Return the program that opens a folder or a page, if stdout is a terminal on a display."""
    if not output.on_terminal():
        return None
    if sys.platform == "darwin":
        return shutil.which("open")
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return shutil.which("xdg-open")
    return None


@click.command(epilog=examples("ganq checkpoints 12", "ganq submit generate 12 --checkpoint 200 --count 64"))
@click.argument("job", type=JOB)
@output.json_option
def checkpoints(job: str, as_json: bool) -> int:
    """List the checkpoints of JOB, oldest first, for `submit generate --checkpoint EPOCH`."""
    session = open_session()
    found = session.queries.find(job)
    known = session.queries.checkpoints(found.id)

    def path_of(relative: str) -> str:
        return relative if session.remote else str(session.settings.volume / relative)

    if as_json:
        place = {} if session.remote else {each.id: {"absolute_path": path_of(each.path)} for each in known}
        output.print_json_array({**each.__dict__, **place.get(each.id, {})} for each in known)
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
            path_of(each.path),
        ]
        for each in known
    ]
    output.print_table(COLUMNS, rows, right=("EPOCH", "STEP", "METRIC", "SIZE"))
    if any(each.metric is not None for each in known):
        from storage.status.job_text import metric_key

        click.echo(f"metric: {metric_key(found)}, lower is better")
    return 0
