"""`ganq up`: everything that one machine needs, in the foreground."""

import click


@click.command()
@click.option(
    "--gpus", default="auto", show_default=True, metavar="WHICH", help="As in ganq worker: auto, none, 0,1"
)
def up(gpus: str) -> None:
    """
    Start the local stack and stay: job table, embedded Redis, one worker per GPU.

    Submit jobs from another terminal. Ctrl-C saves the running job and stops;
    the next `ganq up` goes on with it.

    \b
    Examples:
      ganq up
      ganq up --gpus none
    """
    import signal

    from storage.settings import Settings
    from worker.stack import local_stack, wait_ready

    settings = Settings.load()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    with local_stack(settings, gpus=gpus) as worker:
        if wait_ready(settings, worker):
            click.echo(f"ganq is up: {settings.home}", err=True)
            click.echo("submit from another terminal:  ganq submit train --data DIR", err=True)
            click.echo("Ctrl-C saves the running job and stops", err=True)
        try:
            code = worker.wait()
        except KeyboardInterrupt:
            click.echo("\nstopping: the running job is being saved …", err=True)
            code = 0
    raise SystemExit(code)
