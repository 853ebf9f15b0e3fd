"""`ganq submit generate`."""

import re
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from cli.session import MODEL, Session, open_session
from cli.submit import plan as plans
from cli.submit import sweep
from cli.submit.accept import submit_job, submit_sweep, submit_unresolved
from cli.submit.options import read_submit_options, submit_options
from cli.submit.spec_options import given_only, spec_options
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import NonEmptyPath
from ganq.submission.accept import prerequisites
from ganq.submission.generate import check_options, out_folder, prepare
from ganq.submission.options import parse_ranges
from jobs.errors import JobNotFoundError
from jobs.specs import GenerateSpec
from jobs.specs.generate import TAR_ABOVE
from storage.settings import Settings

if TYPE_CHECKING:
    from storage.db.rows import Job

HELP = {
    "count": "Number of images.",
    "seeds": "Instead of --count: the images with these indices, e.g. 0,4-6.",
    "keep": "Instead of --count: the K images with the highest discriminator scores …",
    "of": "… of N generated images.",
    "interpolate": "Instead of --count: interpolate between these images, e.g. 3,17,42; also as GIF and MP4.",
    "frames": "Frames of the interpolation.  [default: 60 from one image to the next]",
    "grid_epochs": "Add a grid of 8 images from each kept checkpoint, and a video of all sample grids.",
    "reject": "Replace the fraction of images with the lowest discriminator scores, e.g. 0.5.",
    "truncation": "Truncate the latent distribution at ± this value; smaller is less diverse, e.g. 1.5.",
    "checkpoint": "best, last, or an epoch.",
    "class_name": "Class to generate (conditional models).  [default: all classes in turn]",
    "seed": "Random seed. Image i depends only on the checkpoint, the seed and i.",
    "noise_mean": "Mean of the latent distribution.",
    "noise_std": "Standard deviation of the latent distribution; smaller is less diverse.",
    "passport": "Write the origin of each PNG into it, for `ganq remake`.",
    "grid": "Images per grid; 0: no grids.",
    "grid_pages": "Maximum number of grids.",
    "out": "Copy the result to this folder.",
    "device": "Device to generate on.",
    "format": "Output format: files, or archives (tar of PNGs, one npz of arrays). More than 100,000 images "
    "become tar if it is not given.",
    "quality": "Quality of jpeg [95] and of lossy webp; webp is lossless without it.",
    "micro_batch": "Images per forward pass. Other values may change the last bit of a pixel.",
    "shard_size": "Images per shard, in whole micro-batches; several workers share a larger job.",
    "max_workers": "Maximum number of workers that process the job; 0: no limit.",
    "deterministic": "Use deterministic kernels on a GPU.",
}


class IndexRanges(click.ParamType[tuple[tuple[int, int], ...]]):
    """'0,4-6' to ((0, 0), (4, 6))."""

    name = "a,b-c"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[int, int], ...]:
        if isinstance(value, tuple):
            return value
        try:
            return parse_ranges(str(value))
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


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


NEVER_SWEPT = ("source", "draws", "layout", "seeds", "out", "interpolate")
"""What the command finds itself, and what is itself a list or a folder."""

OPTION_TYPES: dict[str, click.ParamType[Any]] = {
    "seeds": IndexRanges(),
    "interpolate": IndexList(),
    "out": NonEmptyPath(),
}


@click.command(
    epilog=examples(
        "ganq submit generate --count 1000",
        "ganq submit generate faces --checkpoint 200 --seeds 0,4-6 --out images/",
        "ganq submit generate --keep 64 --of 512 --noise-std 0.8 --wait",
        "ganq submit generate 12 --now --count 64",
        "ganq submit generate --interpolate 3,17,42,3 --frames 240 --out film/",
        "ganq submit generate --count 8 --grid-epochs",
    )
)
@click.argument("job", type=MODEL, required=False)
@click.option(
    "--from",
    "source",
    type=MODEL,
    help="The same as JOB.  [default: the newest training or import]",
)
@click.option("--now", is_flag=True, help="Do not wait for a running training: use its latest checkpoint.")
@spec_options(
    GenerateSpec,
    HELP,
    excluded=("source", "draws", "layout"),
    types=OPTION_TYPES,
    not_repeatable=("format",),
)
@submit_options
def generate(job: str | None, source: str | None, now: bool, **options: Any) -> int:
    """Generate images with the GAN that JOB has trained or imported."""
    if job is not None and source is not None:
        raise click.UsageError(f"two jobs are given: {job} and --from {source}")
    source = job if source is None else source
    request = read_submit_options(options)
    given = given_only(options)
    if Settings.load().api_url and not request.dry_run:
        asked = {**given, "source": source, "now": now or None}
        return submit_unresolved("generate", asked, request, GenerateSpec, NEVER_SWEPT)
    if "out" in given:
        given["out"] = out_folder(given["out"])
    changes = sweep.combinations(GenerateSpec, request.sweep, given, never=NEVER_SWEPT)
    check_options(given, changes, sweep=bool(request.sweep))
    session = open_session()
    found = prepare(session, given, changes, source=source, now=now)
    model, spec = found.model, found.specs[0]
    if request.dry_run:
        prerequisites(session, request)
        plan = plans.generation_plan(model, spec)
        seconds = plans.generation_seconds(session.queries, model, spec)
        return plans.show_plan(spec, plan, seconds, request.as_json, changes if request.sweep else ())
    if source is None:
        output.notice(f"generating from job {model.id}{f' ({model.name})' if model.name else ''}")
    if spec.total > TAR_ABOVE and "format" not in given:
        output.notice(f"{spec.total:,} images: tar archives of 10,000 each; --format png writes files")
    if spec.interpolate and find_spec("av") is None:
        output.notice("writing a GIF; an MP4 as well if the worker has PyAV: pip install 'ganq[video]'")
    if found.after:
        way = f"ganq release {model.id} lets it start" if model.held else "--now uses its latest checkpoint"
        state = "held" if model.held else model.state
        left = _time_left(session, model)
        output.notice(f"job {model.id} is {state}{left}: this job starts after it ({way})")
        if source is None:
            with suppress(JobNotFoundError):
                ended = session.queries.newest_model(succeeded=True)
                name = f" ({ended.name})" if ended.name else ""
                output.notice(
                    f"  --from {ended.id} generates at once, from the finished job {ended.id}{name}"
                )
    if request.sweep:
        return submit_sweep(session, found.specs, request, changes, after=found.after)
    return submit_job(session, spec, request, after=found.after)


def _time_left(session: Session, model: "Job") -> str:
    """Return how far a running training is and how long it will take, as far as that is known."""
    from storage.status import job_text

    model = job_text.as_one(model, job_text.StatusContext.of(session.queries, [model]))
    left = job_text.eta(model)
    parts = [job_text.progress(model), f"{output.duration(left)} left" if left is not None else ""]
    shown = ", ".join(part for part in parts if part)
    return f" ({shown})" if shown else ""
