"""`ganq up`: everything that one machine needs, in the foreground."""

import click

from cli.ui.params import Whole


@click.command()
@click.option(
    "--gpus", default="auto", show_default=True, metavar="WHICH", help="As in ganq worker: auto, none, 0,1"
)
@click.option(
    "--cpu-workers",
    type=Whole(1, 1024),
    metavar="N",
    help="Instead of GPUs: so many workers on the CPU, each on its own share of the cores.",
)
def up(gpus: str, cpu_workers: int | None) -> None:
    """
    Start the local stack and stay: job table, embedded Redis, one worker per GPU.

    Submit jobs from another terminal. Ctrl-C saves the running job and stops;
    the next `ganq up` goes on with it.

    \b
    Examples:
      ganq up
      ganq up --gpus none
      ganq up --cpu-workers 2
    """
    import signal

    from storage.settings import Settings
    from worker.host import logs
    from worker.host.local_stack import local_stack, wait_ready

    settings = Settings.load()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    code = 0
    with logs.relayed(settings), local_stack(settings, gpus=gpus, cpu_workers=cpu_workers) as stack:
        try:
            if wait_ready(settings, stack.worker):
                click.echo(f"ganq is up: {settings.home}", err=True)
                click.echo("submit from another terminal:  ganq submit train --data DIR", err=True)
                click.echo("Ctrl-C saves the running job and stops", err=True)
            code = stack.tend(lambda said: click.echo(said, err=True))
        except KeyboardInterrupt:
            click.echo("\nstopping; a job that runs is saved first …", err=True)
            code = 0
    raise SystemExit(code)
