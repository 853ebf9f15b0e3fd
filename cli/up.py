"""`ganq up`: run the complete local stack in the foreground."""

import click

from cli.ui.params import BoundedInt


@click.command()
@click.option(
    "--gpus", default="auto", show_default=True, metavar="WHICH", help="As for ganq worker: auto, none, 0,1."
)
@click.option(
    "--cpu-workers",
    type=BoundedInt(1, 1024),
    metavar="N",
    help="Number of CPU workers, which share the cores; instead of GPUs.",
)
@click.option("--web/--no-web", "page", default=True, show_default=True, help="Serve the page, too.")
@click.option(
    "--web-port",
    type=BoundedInt(0, 65535),
    default=8311,
    show_default=True,
    help="Its port; the next free one if it is taken.",
)
def up(gpus: str, cpu_workers: int | None, page: bool, web_port: int) -> None:
    """
    Run the local stack: job table, embedded Redis, one worker per GPU.

    Submit jobs from another terminal. Ctrl-C saves the running job and stops; the next
    `ganq up` resumes it.

    \b
    Examples:
      ganq up
      ganq up --gpus none
      ganq up --cpu-workers 2
      ganq up --no-web
    """
    import os
    import signal
    import sys

    from storage.settings import Settings
    from web.serve import wait_running
    from worker.host import logs
    from worker.host.local_stack import local_stack, wait_ready
    from worker.host.service_manager import ServiceManager

    settings = Settings.load()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    code = 0
    manager = ServiceManager.from_environment(os.environ)
    served = ("--allow-changes", "--port", str(web_port)) if page else None
    stack_of_this = local_stack(settings, gpus=gpus, cpu_workers=cpu_workers, page=served)
    with logs.relayed(settings), stack_of_this as stack:
        try:
            if wait_ready(settings, stack.worker):
                click.echo(f"ganq is up: {settings.home}", err=True)
                if page and sys.stderr.isatty() and (about := wait_running(settings)) is not None:
                    click.echo(f"the page: {about['link']}", err=True)  # a log must not hold the token
                click.echo("submit from another terminal:  ganq submit train --data DIR", err=True)
                if settings.api_url:
                    click.echo(
                        f"note: where GANQ_API_URL is set, commands use {settings.api_url} instead", err=True
                    )
                click.echo("Ctrl-C saves the running job and stops", err=True)
                if manager is not None:
                    manager.watch(settings.runtime)
            code = stack.supervise(lambda line: click.echo(line, err=True))
        except KeyboardInterrupt:
            if manager is not None:
                manager.stopping()
            click.echo("\nstopping; saving the running job …", err=True)
            code = 0
    raise SystemExit(code)
