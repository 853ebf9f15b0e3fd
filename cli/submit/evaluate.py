"""`ganq submit evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.session import Session, open_session
from cli.submit import preflight, sweep
from cli.submit.generate import check_source
from cli.submit.options import accept, needed, read_submit_options, show_plan, submit_options
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

LEAST = f"{FEWEST_PICTURES} are the least, 2,000 make good numbers"

WORDS = {
    "data": "The real pictures. Default: those that the model was trained on.",
    "checkpoint": "best, last, or a number of epochs.",
    "count": "Made pictures that are looked at, at most.",
    "search": "Real pictures at most.",
    "size": "Side in pixels. Default: the model's; of a PATH, that of most of its images.",
    "feature_network": f"{' or '.join(FEATURE_NETWORKS)}, or the path of a weight file.",
    "feature_sha256": "The sha-256 of that file.",
    "seed": "Of the pictures that are drawn.",
    "micro_batch": "Pictures in one pass of the generator; part of what fixes the bits.",
    "max_skip": "Share of images that may be left out: broken, or of a format that is not read.",
    "keep_duplicates": "Use real images with equal bytes more than once.",
    "white_level": "Value that becomes white in grey images of 16 bits or floats; 0: 65535.",
    "max_unpacked_gb": "What an archive may unpack to, in gigabytes.",
    "loader_workers": "Processes that decode pictures.",
    "device": "Where to draw and to look.",
    "deterministic": "On a GPU: kernels that always give the same bits.",
}


@click.command(
    epilog=examples(
        "ganq submit evaluate 12 --wait",
        "ganq submit evaluate faces --checkpoint 200",
        "ganq submit evaluate pictures/ --data faces/",
        "ganq compare",
    )
)
@click.argument("what", metavar="JOB|PATH")
@spec_options(
    EvaluateSpec,
    WORDS,
    own=("source", "path", "reader"),
    kinds={"data": click.Path(), "feature_network": click.Path()},
)
@submit_options
def evaluate(what: str, **options: Any) -> int:
    """
    Measure how good pictures are, and whether they are copies of the training pictures.

    JOB is a training or an import, from which pictures are drawn, or a generation, whose
    pictures are taken; PATH a folder, zip or tar of pictures.
    """
    if not what.strip():
        raise SpecError(
            "what is to be evaluated is empty", hint="name a job, or a folder, zip or tar of pictures"
        )
    wish = read_submit_options(options)
    given = given_only(options)
    preflight.find_feature_network(given)
    changes = sweep.combinations(EvaluateSpec, wish.sweep, given, never=NEVER_SWEPT) if wish.sweep else [{}]
    settings = Settings.load()
    about: dict[str, Any]
    after: list[int] = []
    found = _find(settings, what)
    if isinstance(found, Path):
        about = {"path": str(found)}
        reading = preflight.reading_of(EvaluateSpec.of_new | given)
        if "size" not in given:
            about["size"] = preflight.usual_side(found, reading)
        _enough(str(found), reading)
        session = open_session(create=True, settings=settings)
    else:
        session, job = found
        for change in changes:  # each may name another checkpoint; if one is not there yet, all wait
            about, awaited = _of_job(session, job, given | change)
            after = after or awaited
    if "data" in given or "data" not in about:
        about["data"] = preflight.find_data(settings, given.get("data"))
    specs = [EvaluateSpec.create(**{**about, **given, "data": about["data"], **one}) for one in changes]
    spec = specs[0]
    if Path(spec.data).exists():
        _enough(spec.data, preflight.reading_of(spec.to_json()))
    else:
        output.notice(f"{spec.data} is not here: a worker that has the decoded copy can still do it")
    if "data" not in given:
        output.notice(f"comparing with {spec.data}")
    if wish.dry_run:
        needed(session, wish)
        plan = {"pictures": spec.count, "real_pictures_at_most": spec.search}
        from cli.submit.estimate import evaluation_seconds

        seconds = evaluation_seconds(session.queries, spec)
        return show_plan(spec, plan, seconds, wish.as_json, changes if wish.sweep else ())
    if after:
        output.notice(f"job {after[0]} has not ended; this one waits for it")
    if wish.sweep:
        return sweep.accept_sweep(session, specs, wish, after=[*after, *needed(session, wish)])
    return accept(session, spec, wish, after=after)


def _find(settings: Settings, what: str) -> "Path | tuple[Session, Job]":
    """
    Raises:
        JobNotFoundError: neither a job nor a path.
    """
    path = Path(what).expanduser().absolute()
    try:
        session = open_session(settings=settings)
        return session, session.queries.find(what)
    except NotFoundError as exc:
        if path.exists():
            return path
        if "/" in what:
            raise NotFoundError(
                f"there is nothing at {path}", hint="name a job, or a folder of pictures"
            ) from exc
        if isinstance(exc, JobNotFoundError):
            raise JobNotFoundError(
                f"there is no job {what[:70]!r}, and no folder of that name",
                hint="ganq status lists ids and names",
            ) from exc
        raise


def _of_job(session: Session, job: "Job", given: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """
    Returns:
        Fields of the spec, and the jobs to wait for.

    Raises:
        SpecError: a job that makes no pictures, too few or of another size, or --checkpoint of
            pictures that are made already.
        NotFoundError: its pictures or its checkpoint are not there, and never will be.
    """
    if kind_named(job.kind).makes_model:
        model, after = job, check_source(session, job, str(given.get("checkpoint", "best")), now=False)
    elif job.kind == "generate":
        if "checkpoint" in given:
            raise SpecError(
                f"the pictures of job {job.id} are made already: there is no --checkpoint to choose",
                hint=f"--checkpoint goes with job {job.spec.get('source')}, from which they were drawn",
            )
        if job.state.terminal and (job.state != "succeeded" or "deleted_at" in (job.result or {})):
            gone = "were deleted" if job.state == "succeeded" else f"never came: it has {job.state}"
            raise NotFoundError(
                f"the pictures of job {job.id} {gone}", hint=f"ganq retry {job.id} makes them again"
            )
        _enough_made(job)
        model, after = session.queries.get(job.spec_field("source")), [] if job.state.terminal else [job.id]
    else:
        raise SpecError(
            f"job {job.id} is of kind {job.kind} and has no pictures",
            hint="evaluate a training, an import or a generation",
        )
    about = {"source": job.id, "size": model.spec_field("size")}
    if given.get("size", about["size"]) != about["size"]:
        raise SpecError(
            f"--size {given['size']}: the pictures of job {job.id} are of {about['size']}×{about['size']}",
            hint="leave it away; only a PATH's pictures are brought to a size",
        )
    if model.spec.get("data"):
        # The real images are those that it was trained on, so they are read as they were then.
        about |= vars(preflight.reading_of(model.spec))
        about["data"] = model.spec["data"]
    return about, after


def _enough(path: str, reading: "Reading") -> None:
    """
    Raises:
        DatasetError: so few pictures that no number would have a meaning.
    """
    found = preflight.count_images(path, reading)
    if found < FEWEST_PICTURES:
        raise DatasetError(
            f"{path} holds {output.count(found, 'picture')}, too few to be measured", hint=LEAST
        )


def _enough_made(job: "Job") -> None:
    """
    Raises:
        SpecError: a generation of so few pictures.
    """
    made = GenerateSpec.from_json(job.spec).total
    if made < FEWEST_PICTURES:
        raise SpecError(
            f"job {job.id} makes {output.count(made, 'picture')}, too few to be measured", hint=LEAST
        )
