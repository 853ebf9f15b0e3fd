"""`ganq worker`: run jobs on the GPUs of this machine."""

import click

from cli.ui.params import BoundedInt, Duration


@click.command()
@click.option(
    "--gpus",
    default="auto",
    show_default=True,
    metavar="WHICH",
    help="auto or all (the GPUs of CUDA_VISIBLE_DEVICES, or the CPU if there are none), none, or indices "
    "or UUIDs, e.g. 0,1.",
)
@click.option(
    "--cpu-workers",
    type=BoundedInt(1, 1024),
    metavar="N",
    help="Number of CPU workers, which share the cores; instead of GPUs.",
)
@click.option("--cores", metavar="A,B-C", help="One CPU worker on these cores; instead of GPUs.")
@click.option("--queues", metavar="A,B", help="Queues to serve.  [default: GANQ_QUEUES, or 'default']")
@click.option("--name", metavar="NAME", help="Name of the worker.  [default: HOST-gpu0, HOST-cpu]")
@click.option(
    "--exit-when-idle",
    type=Duration(unit="s"),
    metavar="SECONDS",
    help="Drain and exit with 0 after this long without a job, e.g. 120 or 5min.",
)
@click.option(
    "--metrics-port",
    metavar="[HOST:]PORT",
    help="Serve Prometheus metrics; a further worker on the next port.  [default: GANQ_METRICS_PORT]",
)
def worker(
    gpus: str,
    cpu_workers: int | None,
    cores: str | None,
    queues: str | None,
    name: str | None,
    exit_when_idle: float | None,
    metrics_port: str | None,
) -> None:
    """
    Run jobs on this machine: one worker per GPU, or one on the CPU.

    SIGTERM and Ctrl-C drain the worker: the running job is saved and requeued, and any
    worker can resume it.

    \b
    Examples:
      ganq worker
      ganq worker --gpus 0,1 --queues default,urgent
      ganq worker --gpus none --name spare
      ganq worker --cpu-workers 2
      ganq worker --exit-when-idle 120
    """
    import os

    from jobs.specs import check_name
    from storage.settings import Settings
    from worker.host.launcher import launch

    names = tuple(queue.strip() for queue in (queues or "").split(",") if queue.strip())
    settings = {} if metrics_port is None else {"GANQ_METRICS_PORT": metrics_port}
    raise SystemExit(
        launch(
            Settings.load({**os.environ, **settings}),
            gpus=gpus,
            queues=names,
            name=check_name(name) if name else None,
            cpu_workers=cpu_workers,
            cores=cores,
            exit_when_idle_s=exit_when_idle,
        )
    )
