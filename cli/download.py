"""`ganq download`: copy the result of a generation to a folder, as the user who types it."""

from pathlib import Path

import click

from cli.session import JOB, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import NonEmptyPath

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
    from ganq.copies import download as copy_images

    session = open_session()
    found = session.queries.find(job)
    target = copy_images(session, found, out, only)
    if as_json:
        output.print_json({"id": found.id, "out": str(target)})
    else:
        click.echo(str(target))
    return 0
