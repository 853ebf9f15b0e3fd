"""`ganq submit generate`."""

import re
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.session import JOB, Session, open_session
from cli.submit import sweep
from cli.submit.options import accept, needed, read_submit_options, show_plan, submit_options
from cli.submit.preflight import WEIGHTS
from cli.submit.spec_options import given_only, spec_options
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import NamedPath
from jobs.class_checks import unknown_class
from jobs.errors import CheckpointNotFoundError, JobNotFoundError, SpecError
from jobs.kinds import kind_named
from jobs.specs import GenerateSpec

if TYPE_CHECKING:
    from storage.db.rows import Job

WORDS = {
    "count": "How many pictures.",
    "seeds": "Or these pictures by number: 0,4-6.",
    "keep": "Or the K that the discriminator likes best …",
    "of": "… of so many that are drawn.",
    "interpolate": "Or the frames of a way between pictures, 3,17,42; as GIF and MP4, too.",
    "frames": "Frames of the whole way. Default: 60 from one picture to the next.",
    "grid_epochs": "Add a grid of the first 8 pictures with a row for each checkpoint that was kept.",
    "reject": "Draw again what the discriminator likes least: this share of all draws, e.g. 0.5.",
    "truncation": "Keep each latent number within ± this; less is tamer, e.g. 1.5.",
    "checkpoint": "best, last, or a number of epochs.",
    "class_name": "Of a conditional model: the class to draw. Default: its classes in turn.",
    "seed": "Picture i depends on (checkpoint, seed, i) alone.",
    "noise_mean": "Mean of the latent numbers.",
    "noise_std": "Their standard deviation; less is tamer.",
    "grid": "Pictures on one grid; 0 makes no grids.",
    "grid_pages": "Grids at most.",
    "out": "A folder that gets a copy of the result.",
    "device": "Where to draw.",
    "format": "Files of that kind, or one archive: tar of PNGs, npz of arrays.",
    "quality": "Of jpeg [95], or of a webp that loses something; a webp is lossless without.",
    "micro_batch": "Pictures in one pass; part of what fixes the bits.",
    "shard_size": "Pictures in one part, in whole micro-batches; of more, workers share the parts.",
    "max_workers": "Workers that may be at this job at once; 0: all that are free.",
    "deterministic": "On a GPU: kernels that always give the same bits.",
}

RANGE = re.compile(r"([0-9]{1,12})(?:-([0-9]{1,12}))?")
PICTURE_BYTES_PER_PIXEL = 1.7
"""A PNG of a face, about: 15.5 kB at 96×96."""


class Ranges(click.ParamType[tuple[tuple[int, int], ...]]):
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
                self.fail(f"{part[:40]!r} is no picture number or range; e.g. 0,4-6", param, ctx)
            ranges.append((int(found[1]), int(found[2] or found[1])))
        return tuple(ranges)


class Numbers(click.ParamType[tuple[int, ...]]):
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
                self.fail(f"{part[:40]!r} is no picture number; e.g. 3,17", param, ctx)
        return tuple(map(int, parts))


NEVER_SWEPT = ("source", "draws", "seeds", "out", "interpolate")
"""What the command finds itself, and what is itself a list or a folder."""

KINDS_OF_OPTIONS: dict[str, click.ParamType[Any]] = {
    "seeds": Ranges(),
    "interpolate": Numbers(),
    "out": NamedPath(),
}


@click.command(
    epilog=examples(
        "ganq submit generate --count 1000",
        "ganq submit generate --from faces --checkpoint 200 --seeds 0,4-6 --out pictures/",
        "ganq submit generate --keep 64 --of 512 --noise-std 0.8 --wait",
        "ganq submit generate --from 12 --now --count 64",
        "ganq submit generate --interpolate 3,17,42,3 --frames 240 --out film/",
        "ganq submit generate --count 8 --grid-epochs",
    )
)
@click.option(
    "--from", "source", type=JOB, help="Job or name to draw from. Default: the newest training or import."
)
@click.option(
    "--now", is_flag=True, help="Don't wait for a training that has not ended: take its latest checkpoint."
)
@spec_options(
    GenerateSpec,
    WORDS,
    own=("source", "draws"),
    kinds=KINDS_OF_OPTIONS,
    once=("format",),
)
@submit_options
def generate(source: str | None, now: bool, **options: Any) -> int:
    """Make pictures from a trained GAN."""
    wish = read_submit_options(options)
    given = given_only(options)
    if "out" in given:
        given["out"] = _out_folder(given["out"])
    changes = sweep.combinations(GenerateSpec, wish.sweep, given, never=NEVER_SWEPT) if wish.sweep else [{}]
    if wish.sweep and "out" in given:
        raise SpecError("--out is one folder, and a sweep has many results", hint="leave it away: ganq open")
    # What is wrong with the numbers is said before the table is asked anything.
    for one in changes:
        GenerateSpec.create(source=0, **given, **one)
    session = open_session()
    model = find_model(session, source)
    if now and "checkpoint" not in given and not model.state.terminal:
        given["checkpoint"] = "last"
    for name in dict.fromkeys({**given, **one}.get("class_name") for one in changes):
        _check_class(session, model, name)
    specs = [GenerateSpec.create(source=model.id, **given, **one) for one in changes]
    spec = specs[0]
    after: list[int] = []
    for checkpoint in dict.fromkeys(one.checkpoint for one in specs):
        after = after or check_source(session, model, checkpoint, now=now)
    scoring = "--keep" if spec.keep is not None else "--reject" if spec.reject is not None else None
    if scoring and model.kind == "import" and model.spec.get("netd") is None:
        raise SpecError(
            f"job {model.id} came without a discriminator, which {scoring} needs to score pictures",
            hint="use --count, or import it again with its netd file",
        )
    if wish.dry_run:
        needed(session, wish)
        plan = _plan(model, spec)
        from cli.submit.estimate import generation_rate

        rate = generation_rate(session.queries, model)
        seconds = spec.drawn / rate if rate else None
        return show_plan(spec, plan, seconds, wish.as_json, changes if wish.sweep else ())
    if source is None:
        output.notice(f"drawing from job {model.id}{f' ({model.name})' if model.name else ''}")
    if spec.interpolate and find_spec("av") is None:
        output.notice(
            "there will be a GIF, and an MP4 only if PyAV is at the worker: pip install 'ganq[video]'"
        )
    if after:
        way = f"ganq release {model.id} lets it start" if model.held else "--now takes its latest checkpoint"
        state = "held" if model.held else model.state
        output.notice(f"job {model.id} is {state}: this one waits for it ({way})")
    if wish.sweep:
        return sweep.accept_sweep(session, specs, wish, after=[*after, *needed(session, wish)])
    return accept(session, spec, wish, after=after)


def find_model(session: Session, source: str | None) -> "Job":
    """
    The job that the generator comes from.

    Raises:
        JobNotFoundError: there is none.
        SpecError: a job without a generator, or a file, which must be imported first.
    """
    if source is None:
        return session.queries.newest_model()
    try:
        job = session.queries.find(source)
    except JobNotFoundError:
        path = Path(source).expanduser()
        if path.exists() or "/" in source or path.suffix.lower() in WEIGHTS:
            raise SpecError(
                f"--from {source[:200]} is a path, and generation draws from jobs",
                hint=f"make it one first: ganq import {source[:200]} --name NAME; then --from NAME",
            ) from None
        raise
    if not kind_named(job.kind).makes_model:
        origin = job.spec.get("source")
        raise SpecError(
            f"job {job.id} is of kind {job.kind} and has no generator of its own",
            hint=f"--from {origin} is what it drew from" if origin is not None else "--from a training job",
        )
    return job


def _check_class(session: Session, model: "Job", class_name: str | None) -> None:
    """
    What can be said of a class before the model is loaded.

    Raises:
        SpecError: the model knows none, or not this one.
    """
    if class_name is None:
        return
    if not model.spec.get("conditional", False):
        raise unknown_class(class_name, ())
    known = known_classes(session, model)
    if known is not None and class_name not in known:
        raise unknown_class(class_name, known)


def known_classes(session: Session, model: "Job") -> list[str] | None:
    """The classes that a conditional training learns; None while nobody has read its pictures."""
    known: list[str] | None = (model.result or {}).get("classes")
    pinned = (model.inputs or {}).get("fingerprint")
    if known is None and pinned is not None:
        from storage.datasets.cache import classes_of

        known = classes_of(session.volume, pinned)
    return known


def check_source(session: Session, model: "Job", checkpoint: str, *, now: bool) -> list[int]:
    """
    Whether the checkpoint is there, or will be.

    Args:
        now: don't wait for a training that has not ended.

    Returns:
        The jobs to wait for.

    Raises:
        CheckpointNotFoundError: it is not there, and never will be.
    """
    if not model.state.terminal and not now:
        if checkpoint.isdigit():
            with suppress(CheckpointNotFoundError):  # an epoch that is there already is not waited for
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


def _plan(model: "Job", spec: GenerateSpec) -> dict[str, Any]:
    pages = min(-(-spec.total // spec.grid), spec.grid_pages) if spec.grid else 0
    size = model.spec.get("size", 96)
    return {
        "model": f"job {model.id} ({model.state})",
        "pictures_drawn": spec.drawn,
        "pictures_kept": spec.total,
        "grids": pages,
        "bytes_on_disk": int(spec.total * size * size * PICTURE_BYTES_PER_PIXEL),
    }


def _out_folder(given: str) -> str:
    path = Path(given).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise SpecError(f"--out {path} is a file", hint="name a folder; it is made if it is not there")
    from storage.results.reader import occupied

    if (taken := occupied(path)) is not None:
        raise SpecError(
            f"--out {path} already holds {taken}, and would be overwritten", hint="name another folder"
        )
    return str(path)
