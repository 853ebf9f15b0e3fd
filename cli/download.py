"""`ganq download`: copy the result of a generation to a folder, as the user who types it."""

from pathlib import Path

import click

from cli.session import JOB, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import NonEmptyPath
from jobs.errors import NotFoundError, SpecError, StorageError
from jobs.states import JobState

ONLY = ("best", "grids", "images")


@click.command(epilog=examples("ganq download 12", "ganq download faces --out images/"))
@click.argument("job", type=JOB)
@click.option("--out", type=NonEmptyPath(path_type=Path), help="Folder.  [default: that of the submission]")
@click.option(
    "--only",
    type=click.Choice(ONLY),
    help="Only the images, the grids, or the image with the highest score (from a server: GANQ_API_URL).",
)
@output.json_option
def download(job: str, out: Path | None, only: str | None, as_json: bool) -> int:
    """
    Copy the images of JOB to a folder, completely or not at all.

    With GANQ_API_URL they come from a server: an interrupted download is resumed, and
    each image is compared with its SHA-256.

    Workers that run as another user do not write to --out of `submit generate`: this command does,
    as do `submit --wait` and `ganq wait`. The copy is checked against the manifest.
    """
    from storage.results.reader import copy_out, names_of_result

    session = open_session()
    found = session.queries.find(job)
    target = out or found.spec.get("out")
    if only is not None and not session.remote:
        raise SpecError("--only is for downloads from a server (GANQ_API_URL)", hint=f"ganq open {found.id}")
    if target is None:
        raise SpecError(f"job {found.id} was submitted without --out", hint="give a folder: --out DIR")
    if found.kind != "generate":
        raise NotFoundError(
            f"job {found.id} is of kind {found.kind} and has no images", hint=f"ganq open {found.id}"
        )
    if found.part_of is not None:
        raise NotFoundError(
            f"job {found.id} is a shard of job {found.part_of}, which has the images",
            hint=f"ganq download {found.part_of}",
        )
    if found.state is not JobState.SUCCEEDED:
        raise NotFoundError(
            f"job {found.id} ({found.state}) has no result"
            + ("" if found.state.terminal else " yet: ganq wait copies it when it has succeeded"),
            hint=f"ganq status {found.id} shows its state",
        )
    target = Path(target).expanduser().absolute()
    if session.remote:
        return _print_result(found.id, session.download(found, target, only), as_json)
    folder = session.volume_of(found).attempt(found.id, found.attempt)
    if "deleted_at" in (found.result or {}) or not names_of_result(folder):
        raise NotFoundError(
            f"the images of job {found.id} were deleted", hint=f"ganq retry {found.id} generates them again"
        )
    if failed := copy_out(folder, str(target)).get("out_error"):
        raise StorageError(failed, hint="give another folder: --out DIR")
    return _print_result(found.id, target, as_json)


def _print_result(job_id: int, target: Path, as_json: bool) -> int:
    if as_json:
        output.print_json({"id": job_id, "out": str(target)})
    else:
        click.echo(str(target))
    return 0
