"""`ganq submit evaluate`."""

from typing import Any

import click

from cli.session import open_session
from cli.submit import plan as plans
from cli.submit import sweep
from cli.submit.accept import submit_job, submit_sweep, submit_unresolved
from cli.submit.notify import notices_of
from cli.submit.options import read_submit_options, submit_options
from cli.submit.spec_options import given_only, spec_options
from cli.ui import output
from cli.ui.lazy import examples
from ganq.submission import preflight
from ganq.submission.accept import prerequisites
from ganq.submission.evaluate import prepare
from jobs.specs import FEATURE_NETWORKS, EvaluateSpec
from storage.settings import Settings

NEVER_SWEPT = (
    *("source", "path", "data", "feature_network", "feature_sha256", "device", "loader_workers"),
    *("reader", "keep_duplicates", "white_level", "max_unpacked_gb", "fit"),
)

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
    "fit": "How images that are not square become square: their centre, black bars, or distorted.",
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
    request = read_submit_options(options)
    given = given_only(options)
    settings = Settings.load()
    if settings.api_url and not request.dry_run:
        return submit_unresolved(
            "evaluate", {**given, "subject": subject}, request, EvaluateSpec, NEVER_SWEPT
        )
    preflight.find_feature_network(given)
    changes = sweep.combinations(EvaluateSpec, request.sweep, given, never=NEVER_SWEPT)
    found = prepare(
        settings, lambda create: open_session(create=create, settings=settings), subject, given, changes
    )
    session, spec = found.session, found.specs[0]
    notices_of(found.notices)
    if request.dry_run:
        prerequisites(session, request)
        plan = {"images": spec.count, "max_real_images": spec.search}
        seconds = plans.evaluation_seconds(session.queries, spec)
        return plans.show_plan(spec, plan, seconds, request.as_json, changes if request.sweep else ())
    if found.after:
        output.notice(f"job {found.after[0]} has not ended: this job starts after it")
    if request.sweep:
        return submit_sweep(session, found.specs, request, changes, after=found.after)
    return submit_job(session, spec, request, after=found.after)
