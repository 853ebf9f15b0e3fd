"""`ganq demo`: draw faces, train on them and generate images through the queue, in one folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.ui import output
from cli.ui.lazy import examples

if TYPE_CHECKING:
    from cli.session import Session
    from storage.db.rows import Job

# These settings show faces after two or three minutes of training on two cores. Tried with the recipe sngan:
# four styles, learning rates 1e-4 to 4e-4, batch sizes 32 and 64, half-lives 2 and 4, with and without
# augmentation. With rpgan only these were tried.
STYLE = "pixel-art"
FACES = 1000
TRAIN = {
    "--size": "48",
    "--ngf": "32",
    "--ndf": "32",
    "--lr-g": "4e-4",
    "--lr-d": "4e-4",
    "--batch": "64",
    "--ada-target": "0",
    "--ema-half-life-kimg": "4",
    "--epochs": "120",
    "--save-every": "20",
}
IMAGE_COUNT = 64


@click.command(epilog=examples("ganq demo", "ganq demo --home demo --gpus none"))
@click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("ganq-demo"),
    show_default=True,
    help="Folder for everything that the demo creates.",
)
@click.option("--gpus", default="auto", show_default=True, metavar="WHICH", help="As in ganq worker.")
def demo(home: Path, gpus: str) -> int:
    """
    Run a complete example; takes a few minutes on two CPU cores.

    Draws a thousand cartoon faces, starts the local stack, submits a training and a
    generation, follows them, and prints the paths of the images. Everything is in one
    folder, which can be deleted afterwards.
    """
    from cli.session import open_session
    from storage.datasets.synthetic import make_faces, styles
    from storage.settings import Settings
    from web.serve import wait_running
    from worker.host.local_stack import local_stack, wait_ready

    for name in [name for name in os.environ if name.startswith("GANQ_")]:
        del os.environ[name]  # do not use the real queue
    os.environ["GANQ_HOME"] = str(home.absolute())
    settings = Settings.load()
    faces = settings.home / "faces"

    drawn = next(each for each in styles() if each.name == STYLE)
    from cli.ui.progress import progress

    output.notice(f"1  drawing {FACES} faces: {drawn.title} by {drawn.creator}, {drawn.licence}")
    with progress("   drawing", "faces") as update:
        make_faces(faces, style=STYLE, count=FACES, size=96, progress=update)

    output.notice("2  starting the local stack: job table, Redis, a worker")
    settings.home.mkdir(parents=True, exist_ok=True)
    log = settings.home / "demo.log"
    with (
        open(log, "wb") as sink,
        local_stack(settings, gpus=gpus, log=sink, page=("--allow-changes",)) as stack,
    ):
        if not wait_ready(settings, stack.worker):
            output.notice(f"the worker has ended: see {log}")
            return 1
        if (about := wait_running(settings)) is not None:
            output.notice(f"   watch it in a browser:  {about['link']}")
        options = [part for pair in TRAIN.items() for part in pair]
        output.notice("3  submitting two jobs")
        training = _submit("submit", "train", "--data", str(faces), *options, "--name", "demo")
        generating = _submit("submit", "generate", "--from", str(training), "--count", str(IMAGE_COUNT))
        session = open_session()
        code = _follow(session, [training, generating])
        _run_and_print("status")
        return code or _print_results(session, session.queries.get(generating), drawn.attribution())


def _submit(*arguments: str) -> int:
    """Run a ganq command, print it, and return the id of the submitted job."""
    import json
    import subprocess

    from worker.host.embedded_redis import worker_command

    output.notice("   $ ganq " + " ".join(arguments))
    done = subprocess.run(
        worker_command(*arguments, "--json"), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return int(json.loads(done.stdout)["id"])


def _run_and_print(*arguments: str) -> None:
    import subprocess

    from worker.host.embedded_redis import worker_command

    output.notice("\n   $ ganq " + " ".join(arguments))
    subprocess.run(worker_command(*arguments), check=False)


def _follow(session: "Session", ids: list[int]) -> int:
    from cli.ui.follow import exit_code_of, follow

    jobs, timed_out = follow(session, ids)
    return exit_code_of(jobs, timed_out)


def _print_results(session: "Session", job: "Job", attribution: str) -> int:
    """Print the paths of the results."""
    attempt = session.volume.attempt(job.id, job.attempt)
    result = job.result or {}
    click.echo(f"\n{result.get('image_count')} images    {attempt / 'images'}")
    for grid in result.get("grids", []):
        click.echo(f"grid         {attempt / grid}")
    click.echo(f"samples      {session.volume.latest / 'demo' / 'samples'}  (samples during the training)")
    click.echo(f"\nTrained on: {attribution.strip()}")
    click.echo(f"\nnext: GANQ_HOME={session.settings.home} ganq up, then ganq submit generate --count 1000")
    return 0
