"""`ganq submit generate`."""

import re
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.session import JOB, Session, open_session
from cli.submit import plan as plans
from cli.submit import sweep
from cli.submit.accept import prerequisites, submit_job, submit_sweep
from cli.submit.options import read_submit_options, submit_options
from cli.submit.preflight import WEIGHT_SUFFIXES
from cli.submit.spec_options import given_only, spec_options
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import NonEmptyPath
from jobs.class_checks import unknown_class
from jobs.errors import CheckpointNotFoundError, JobNotFoundError, SpecError
from jobs.kinds import kind_named
from jobs.specs import GenerateSpec

if TYPE_CHECKING:
    from storage.db.rows import Job

HELP = {
    "count": "Number of images.",
    "seeds": "Instead of --count: the images with these indices, e.g. 0,4-6.",
    "keep": "Instead of --count: the K images with the highest discriminator scores …",
    "of": "… of N generated images.",
    "interpolate": "Instead of --count: interpolate between these images, e.g. 3,17,42; also as GIF and MP4.",
    "frames": "Frames of the interpolation.  [default: 60 from one image to the next]",
    "grid_epochs": "Add a grid with the first 8 images from each checkpoint that was kept.",
    "reject": "Replace the fraction of images with the lowest discriminator scores, e.g. 0.5.",
    "truncation": "Truncate the latent distribution at ± this value; smaller is less diverse, e.g. 1.5.",
    "checkpoint": "best, last, or an epoch.",
    "class_name": "Class to generate (conditional models).  [default: all classes in turn]",
    "seed": "Random seed. Image i depends only on the checkpoint, the seed and i.",
    "noise_mean": "Mean of the latent distribution.",
    "noise_std": "Standard deviation of the latent distribution; smaller is less diverse.",
    "grid": "Images per grid; 0: no grids.",
    "grid_pages": "Maximum number of grids.",
    "out": "Copy the result to this folder.",
    "device": "Device to generate on.",
    "format": "Output format: files, or one archive (tar of PNGs, npz of arrays).",
    "quality": "Quality of jpeg [95] and of lossy webp; webp is lossless without it.",
    "micro_batch": "Images per forward pass. Other values may change the last bit of a pixel.",
    "shard_size": "Images per shard, in whole micro-batches; several workers share a larger job.",
    "max_workers": "Maximum number of workers that process the job; 0: no limit.",
    "deterministic": "Use deterministic kernels on a GPU.",
}

RANGE = re.compile(r"([0-9]{1,12})(?:-([0-9]{1,12}))?")


class IndexRanges(click.ParamType[tuple[tuple[int, int], ...]]):
    """'0,4-6' to ((0, 0), (4, 6))."""

    name = "a,b-c"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[int, int], ...]:
        if isinstance(value, tuple):
            return value
        ranges = []
        for part in str(value).split(","):
            found = RANGE.fullmatch(part.strip())
            if found is None:
                self.fail(f"{part[:40]!r} is not an image index or range; e.g. 0,4-6", param, ctx)
            ranges.append((int(found[1]), int(found[2] or found[1])))
        return tuple(ranges)


class IndexList(click.ParamType[tuple[int, ...]]):
    """'3,17' to (3, 17)."""

    name = "a,b"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        for part in parts:
            if not re.fullmatch(r"[0-9]{1,12}", part):
                self.fail(f"{part[:40]!r} is not an image index; e.g. 3,17", param, ctx)
        return tuple(map(int, parts))


NEVER_SWEPT = ("source", "draws", "seeds", "out", "interpolate")
"""What the command finds itself, and what is itself a list or a folder."""

OPTION_TYPES: dict[str, click.ParamType[Any]] = {
    "seeds": IndexRanges(),
    "interpolate": IndexList(),
    "out": NonEmptyPath(),
}


@click.command(
    epilog=examples(
        "ganq submit generate --count 1000",
        "ganq submit generate --from faces --checkpoint 200 --seeds 0,4-6 --out images/",
        "ganq submit generate --keep 64 --of 512 --noise-std 0.8 --wait",
        "ganq submit generate --from 12 --now --count 64",
        "ganq submit generate --interpolate 3,17,42,3 --frames 240 --out film/",
        "ganq submit generate --count 8 --grid-epochs",
    )
)
@click.option(
    "--from",
    "source",
    type=JOB,
    help="Job that provides the generator.  [default: the newest training or import]",
)
@click.option("--now", is_flag=True, help="Do not wait for a running training: use its latest checkpoint.")
@spec_options(
    GenerateSpec,
    HELP,
    excluded=("source", "draws"),
    types=OPTION_TYPES,
    not_repeatable=("format",),
)
@submit_options
def generate(source: str | None, now: bool, **options: Any) -> int:
    """Generate images with a trained GAN."""
    request = read_submit_options(options)
    given = given_only(options)
    if "out" in given:
        given["out"] = _out_folder(given["out"])
    changes = sweep.combinations(GenerateSpec, request.sweep, given, never=NEVER_SWEPT)
    if request.sweep and "out" in given:
        raise SpecError("--out cannot be used with --sweep", hint="ganq open JOB shows where results are")
    for change in changes:  # report invalid values before the job table is opened
        GenerateSpec.create(source=0, **given, **change)
    session = open_session()
    model = find_model(session, source)
    if now and "checkpoint" not in given and not model.state.terminal:
        given["checkpoint"] = "last"
    for name in dict.fromkeys({**given, **change}.get("class_name") for change in changes):
        _check_class(session, model, name)
    specs = [GenerateSpec.create(source=model.id, **given, **change) for change in changes]
    spec = specs[0]
    after: list[int] = []
    for checkpoint in dict.fromkeys(each.checkpoint for each in specs):
        after = after or check_source(session, model, checkpoint, now=now)
    scoring = "--keep" if spec.keep is not None else "--reject" if spec.reject is not None else None
    if scoring and model.kind == "import" and model.spec.get("netd") is None:
        raise SpecError(
            f"job {model.id} was imported without a discriminator, which {scoring} requires",
            hint="use --count, or import the model again with its netd file",
        )
    if request.dry_run:
        prerequisites(session, request)
        plan = plans.generation_plan(model, spec)
        seconds = plans.generation_seconds(session.queries, model, spec)
        return plans.show_plan(spec, plan, seconds, request.as_json, changes if request.sweep else ())
    if source is None:
        output.notice(f"generating from job {model.id}{f' ({model.name})' if model.name else ''}")
    if spec.interpolate and find_spec("av") is None:
        output.notice("writing a GIF; an MP4 as well if the worker has PyAV: pip install 'ganq[video]'")
    if after:
        way = f"ganq release {model.id} lets it start" if model.held else "--now uses its latest checkpoint"
        state = "held" if model.held else model.state
        output.notice(f"job {model.id} is {state}: this job starts after it ({way})")
    if request.sweep:
        return submit_sweep(session, specs, request, changes, after=after)
    return submit_job(session, spec, request, after=after)


def find_model(session: Session, source: str | None) -> "Job":
    """
    Return the job that provides the generator.

    Raises:
        JobNotFoundError: there is none.
        SpecError: the job has no generator, or `source` is a file, which must be imported first.
    """
    if source is None:
        return session.queries.newest_model()
    try:
        job = session.queries.find(source)
    except JobNotFoundError:
        path = Path(source).expanduser()
        if path.exists() or "/" in source or path.suffix.lower() in WEIGHT_SUFFIXES:
            raise SpecError(
                f"--from {source[:200]} is a path; --from takes a job",
                hint=f"import it first: ganq import {source[:200]} --name NAME; then use --from NAME",
            ) from None
        raise
    if not kind_named(job.kind).makes_model:
        origin = job.spec.get("source")
        raise SpecError(
            f"job {job.id} is of kind {job.kind} and has no generator",
            hint=f"use --from {origin}, its model" if origin is not None else "use a training or an import",
        )
    return job


def _check_class(session: Session, model: "Job", class_name: str | None) -> None:
    """
    Check --class as far as possible without loading the model.

    Raises:
        SpecError: the model has no classes, or not this one.
    """
    if class_name is None:
        return
    if not model.spec.get("conditional", False):
        raise unknown_class(class_name, ())
    known = known_classes(session, model)
    if known is not None and class_name not in known:
        raise unknown_class(class_name, known)


def known_classes(session: Session, model: "Job") -> list[str] | None:
    """Return the classes of a conditional training; None until its data set has been decoded."""
    known: list[str] | None = (model.result or {}).get("classes")
    pinned = (model.inputs or {}).get("fingerprint")
    if known is None and pinned is not None:
        from storage.datasets.cache import classes_of

        known = classes_of(session.volume, pinned)
    return known


def check_source(session: Session, model: "Job", checkpoint: str, *, now: bool) -> list[int]:
    """
    Return the jobs to wait for until the checkpoint exists.

    Args:
        now: do not wait for a running training.

    Raises:
        CheckpointNotFoundError: it does not exist and never will.
    """
    if not model.state.terminal and not now:
        if checkpoint.isdigit():
            with suppress(CheckpointNotFoundError):  # the epoch may exist already
                session.queries.choose_checkpoint(model.id, checkpoint)
                return []
        epochs = model.spec.get("epochs")
        if checkpoint.isdigit() and isinstance(epochs, int) and int(checkpoint) > epochs:
            raise CheckpointNotFoundError(
                f"job {model.id} ends at epoch {epochs}, before epoch {checkpoint}",
                hint="use best, last, or an earlier epoch",
            )
        return [model.id]
    session.queries.choose_checkpoint(model.id, checkpoint)
    return []


def _out_folder(given: str) -> str:
    path = Path(given).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise SpecError(f"--out {path} is a file", hint="give a folder; it is created if it does not exist")
    from storage.results.reader import occupied

    if (taken := occupied(path)) is not None:
        raise SpecError(f"--out {path} already contains {taken}", hint="use another folder")
    return str(path)
