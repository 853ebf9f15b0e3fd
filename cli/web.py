"""`ganq web`: the page that shows queue, runs and images."""

from pathlib import Path

import click

from cli.ui.lazy import examples
from cli.ui.params import Whole


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
    type=Whole(0, 65535),
    default=8311,
    show_default=True,
    help="Port; the next free one if it is taken.",
)
@click.option(
    "--allow-changes/--read-only",
    default=None,
    help="Whether jobs can be cancelled, retried and so on from the page.  [default: read-only]",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with the token of the link; made if it is not there.  [default: GANQ_HOME/web-token]",
)
@click.option(
    "--server-name",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A host name under which it is reached; repeatable.",
)
@click.option(
    "--trust-proxy",
    "proxies",
    multiple=True,
    metavar="CIDR",
    help="Addresses of a proxy that logs users in and names them in a header; repeatable.",
)
@click.option("--user-header", default="X-Forwarded-User", show_default=True, help="That header.")
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
    Serve the page: queue, runs with their images and curves, logs, workers, data sets.

    Prints a link that logs a browser in. `ganq up` starts the page, too. On a cluster one
    server with access to the job table and the volume is enough.
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
    serve(Settings.load(), options, lambda said: click.echo(said, err=True))
