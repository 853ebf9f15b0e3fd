"""`ganq worker`: run jobs on this machine's GPUs."""

import click

from cli.ui.params import Whole


@click.command()
@click.option(
    "--gpus",
    default="auto",
    show_default=True,
    metavar="WHICH",
    help="auto or all (those of CUDA_VISIBLE_DEVICES; else the CPU), none, or indices and UUIDs: 0,1",
)
@click.option(
    "--cpu-workers",
    type=Whole(1, 1024),
    metavar="N",
    help="Instead of GPUs: so many workers on the CPU, each on its own share of the cores.",
)
@click.option("--cores", metavar="A,B-C", help="Instead of GPUs: one worker on these CPU cores.")
@click.option("--queues", metavar="A,B", help="Queues to serve.  [default: GANQ_QUEUES, or 'default']")
@click.option("--name", metavar="NAME", help="The worker's name.  [default: HOST-gpu0, HOST-cpu]")
def worker(
    gpus: str, cpu_workers: int | None, cores: str | None, queues: str | None, name: str | None
) -> None:
    """
    Run jobs on this machine: one worker per GPU, or one on the CPU.

    SIGTERM (Ctrl-C) drains: the running job is saved, goes back to the queue and
    goes on elsewhere, or here when a worker is back.

    \b
    Examples:
      ganq worker
      ganq worker --gpus 0,1 --queues default,urgent
      ganq worker --gpus none --name spare
      ganq worker --cpu-workers 2
    """
    from jobs.specs import check_name
    from storage.settings import Settings
    from worker.host.launcher import launch

    chosen = tuple(one.strip() for one in (queues or "").split(",") if one.strip())
    raise SystemExit(
        launch(
            Settings.load(),
            gpus=gpus,
            queues=chosen,
            name=check_name(name) if name else None,
            cpu_workers=cpu_workers,
            cores=cores,
        )
    )
