"""`ganq web`: serve the web page."""

from pathlib import Path

import click

from cli.ui.lazy import examples
from cli.ui.params import BoundedInt


@click.command(
    epilog=examples(
        "ganq web",
        "ganq web --port 9000 --allow-changes",
        "ganq web --host 0.0.0.0 --token-file /etc/ganq/web-token --server-name gpu.lab.example",
        "ganq web --trust-proxy 127.0.0.1/32 --server-name ganq.lab.example",
    )
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on."
)
@click.option(
    "--port",
    type=BoundedInt(0, 65535),
    default=8311,
    show_default=True,
    help="Port; the next free one if it is taken.",
)
@click.option(
    "--allow-changes/--read-only",
    default=None,
    help="Whether the page can cancel, retry and change jobs.  [default: read-only]",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with the login token; created if missing.  [default: GANQ_HOME/web-token]",
)
@click.option(
    "--server-name",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="Host name of the server; repeatable.",
)
@click.option(
    "--trust-proxy",
    "proxies",
    multiple=True,
    metavar="CIDR",
    help="Addresses of a proxy that authenticates users and sends their name in a header; repeatable.",
)
@click.option("--user-header", default="X-Forwarded-User", show_default=True, help="Name of that header.")
def web(
    host: str,
    port: int,
    allow_changes: bool | None,
    token_file: Path | None,
    hosts: tuple[str, ...],
    proxies: tuple[str, ...],
    user_header: str,
) -> None:
    """
    Serve the web page: queue, runs with images and curves, logs, workers, data sets.

    Prints a login link. `ganq up` also serves the page. A cluster needs one server with
    access to the job table and the volume.
    """
    from storage.settings import Settings
    from web.serve import Options, serve

    options = Options(
        host=host,
        port=port,
        allow_changes=bool(allow_changes),
        token_file=token_file,
        hosts=hosts,
        proxies=proxies,
        user_header=user_header,
    )
    serve(Settings.load(), options, lambda line: click.echo(line, err=True))
