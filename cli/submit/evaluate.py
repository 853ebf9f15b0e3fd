"""`ganq submit evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.session import Session, open_session
from cli.submit import plan as plans
from cli.submit import preflight, sweep
from cli.submit.accept import prerequisites, submit_job, submit_sweep
from cli.submit.generate import check_source
from cli.submit.options import read_submit_options, submit_options
from cli.submit.spec_options import given_only, spec_options
from cli.ui import output
from cli.ui.lazy import examples
from jobs.errors import DatasetError, JobNotFoundError, NotFoundError, SpecError
from jobs.kinds import kind_named
from jobs.specs import FEATURE_NETWORKS, FEWEST_PICTURES, EvaluateSpec, GenerateSpec
from storage.settings import Settings

if TYPE_CHECKING:
    from storage.datasets.sources import Reading
    from storage.db.rows import Job

NEVER_SWEPT = (
    *("source", "path", "data", "feature_network", "feature_sha256", "device", "loader_workers"),
    *("reader", "keep_duplicates", "white_level", "max_unpacked_gb"),
)

MINIMUM_HINT = f"use at least {FEWEST_PICTURES}; 2,000 give reliable metrics"

HELP = {
    "data": "Real images.  [default: the training data of the model]",
    "checkpoint": "best, last, or an epoch.",
    "count": "Maximum number of generated images.",
    "search": "Maximum number of real images.",
    "size": "Side in pixels.  [default: that of the model, or of most images of PATH]",
    "feature_network": f"Feature network: {' or '.join(FEATURE_NETWORKS)}, or the path of a weight file.",
    "feature_sha256": "SHA-256 of that file.",
    "seed": "Random seed of the generated images.",
    "micro_batch": "Images per forward pass of the generator. Another value may change the last bit.",
    "max_skip": "Maximum fraction of images that are left out: unreadable, or of an unsupported format.",
    "keep_duplicates": "Also use real images whose bytes are equal to another's.",
    "white_level": "Value of white in grey images of 16 bits or floats; 0: 65535.",
    "max_unpacked_gb": "Maximum unpacked size of an archive in gigabytes.",
    "loader_workers": "Processes that decode images.",
    "device": "Device to evaluate on.",
    "deterministic": "Use deterministic kernels on a GPU.",
}


@click.command(
    epilog=examples(
        "ganq submit evaluate 12 --wait",
        "ganq submit evaluate faces --checkpoint 200",
        "ganq submit evaluate images/ --data faces/",
        "ganq compare",
    )
)
@click.argument("subject", metavar="JOB|PATH")
@spec_options(
    EvaluateSpec,
    HELP,
    excluded=("source", "path", "reader"),
    types={"data": click.Path(), "feature_network": click.Path()},
)
@submit_options
def evaluate(subject: str, **options: Any) -> int:
    """
    Measure the quality of generated images, and detect copies of training images.

    JOB is a training or an import, with which images are generated, or a generation, whose
    images are used. PATH is a folder, zip or tar of images.
    """
    if not subject.strip():
        raise SpecError("JOB|PATH is empty", hint="give a job, or a folder, zip or tar of images")
    request = read_submit_options(options)
    given = given_only(options)
    preflight.find_feature_network(given)
    changes = sweep.combinations(EvaluateSpec, request.sweep, given, never=NEVER_SWEPT)
    settings = Settings.load()
    derived: dict[str, Any]
    after: list[int] = []
    found = _find_subject(settings, subject)
    if isinstance(found, Path):
        derived = {"path": str(found)}
        reading = preflight.reading_of(EvaluateSpec.of_new | given)
        if "size" not in given:
            derived["size"] = preflight.usual_side(found, reading)
        _require_images(str(found), reading)
        session = open_session(create=True, settings=settings)
    else:
        session, job = found
        for change in changes:  # each may use another checkpoint; if one is missing, all wait
            derived, awaited = _derive(session, job, given | change)
            after = after or awaited
    if "data" in given or "data" not in derived:
        derived["data"] = preflight.find_data(settings, given.get("data"))
    fixed = {**derived, **given, "data": derived["data"]}
    specs = [EvaluateSpec.create(**{**fixed, **change}) for change in changes]
    spec = specs[0]
    if Path(spec.data).exists():
        _require_images(spec.data, preflight.reading_of(spec.to_json()))
    else:
        output.notice(
            f"{spec.data} does not exist here; a worker with the decoded copy can still run the job"
        )
    if "data" not in given:
        output.notice(f"comparing with the real images in {spec.data}")
    if request.dry_run:
        prerequisites(session, request)
        plan = {"images": spec.count, "max_real_images": spec.search}
        seconds = plans.evaluation_seconds(session.queries, spec)
        return plans.show_plan(spec, plan, seconds, request.as_json, changes if request.sweep else ())
    if after:
        output.notice(f"job {after[0]} has not ended: this job starts after it")
    if request.sweep:
        return submit_sweep(session, specs, request, changes, after=after)
    return submit_job(session, spec, request, after=after)


def _find_subject(settings: Settings, subject: str) -> "Path | tuple[Session, Job]":
    """
    Return the job, or the path.

    Raises:
        JobNotFoundError: it is neither.
    """
    path = Path(subject).expanduser().absolute()
    try:
        session = open_session(settings=settings)
        return session, session.queries.find(subject)
    except NotFoundError as exc:
        if path.exists():
            return path
        if "/" in subject:
            raise NotFoundError(f"{path} does not exist", hint="give a job, or a folder of images") from exc
        if isinstance(exc, JobNotFoundError):
            raise JobNotFoundError(
                f"there is no job and no folder {subject[:70]!r}",
                hint="ganq status lists ids and names",
            ) from exc
        raise


def _derive(session: Session, job: "Job", given: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """
    Return the fields of the spec that follow from the job, and the jobs to wait for.

    Raises:
        SpecError: the job generates no images, too few or of another size, or --checkpoint was given
            for a generation.
        NotFoundError: its images or its checkpoint do not exist and never will.
    """
    if kind_named(job.kind).makes_model:
        model, after = job, check_source(session, job, str(given.get("checkpoint", "best")), now=False)
    elif job.kind == "generate":
        if "checkpoint" in given:
            raise SpecError(
                f"--checkpoint cannot be used with job {job.id}, a generation",
                hint=f"evaluate its model instead: job {job.spec.get('source')}",
            )
        if job.state.terminal and (job.state != "succeeded" or "deleted_at" in (job.result or {})):
            reason = "were deleted" if job.state == "succeeded" else f"do not exist: it is {job.state}"
            raise NotFoundError(
                f"the images of job {job.id} {reason}", hint=f"ganq retry {job.id} generates them again"
            )
        _require_generated_images(job)
        model, after = session.queries.get(job.spec_field("source")), [] if job.state.terminal else [job.id]
    else:
        raise SpecError(
            f"job {job.id} is of kind {job.kind} and has no images",
            hint="evaluate a training, an import or a generation",
        )
    derived = {"source": job.id, "size": model.spec_field("size")}
    if given.get("size", derived["size"]) != derived["size"]:
        raise SpecError(
            f"--size {given['size']}: the images of job {job.id} are {derived['size']}×{derived['size']}",
            hint="omit --size; only the images of a PATH are resized",
        )
    if model.spec.get("data"):
        # Read the real images in the same way as the training did.
        derived |= vars(preflight.reading_of(model.spec))
        derived["data"] = model.spec["data"]
    return derived, after


def _require_images(path: str, reading: "Reading") -> None:
    """
    Check the number of images.

    Raises:
        DatasetError: too few for a meaningful metric.
    """
    found = preflight.count_images(path, reading)
    if found < FEWEST_PICTURES:
        raise DatasetError(
            f"{path} contains {output.count(found, 'image')}, too few to evaluate", hint=MINIMUM_HINT
        )


def _require_generated_images(job: "Job") -> None:
    """
    Check the number of images of a generation.

    Raises:
        SpecError: too few for a meaningful metric.
    """
    total = GenerateSpec.from_json(job.spec).total
    if total < FEWEST_PICTURES:
        raise SpecError(
            f"job {job.id} generates {output.count(total, 'image')}, too few to evaluate", hint=MINIMUM_HINT
        )
