"""`ganq report`: a job as one file that opens in any browser."""

from pathlib import Path

import click

from cli.session import JOB, open_session
from cli.ui import output
from cli.ui.lazy import examples


@click.command(epilog=examples("ganq report 7", "ganq report faces --html faces.html"))
@click.argument("job", type=JOB)
@click.option(
    "--html",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write it.  [default: ganq-ID.html]",
)
@output.json_option
def report(job: str, path: Path | None, as_json: bool) -> int:
    """
    Write JOB's page to one self-contained HTML file: slider, sample grids and curves, or its images.

    The file needs no server and no internet connection. It stays under 20 MB; of a long run
    it holds as many sample grids as fit, evenly chosen, and the best one.
    """
    from storage.volume.durable import write_bytes

    session = open_session()
    found = session.queries.find(job)
    path = (path or Path(f"ganq-{found.id}.html")).absolute()
    if session.remote:
        data = session.report(found)
    else:
        from web.report import report as render
        from web.site import Site

        data = render(Site(session.settings, session.database), found)
    write_bytes(path, data)
    if as_json:
        output.print_json({"id": found.id, "path": str(path), "bytes": len(data)})
    else:
        click.echo(str(path))
        output.notice(output.size(len(data)))
    return 0
