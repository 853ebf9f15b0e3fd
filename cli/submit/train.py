"""`ganq submit train`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from cli.session import JOB, Session, open_session
from cli.submit import plan as plans
from cli.submit import preflight, sweep
from cli.submit.accept import prerequisites, submit_job, submit_sweep
from cli.submit.generate import known_classes
from cli.submit.options import read_submit_options, submit_options
from cli.submit.spec_options import given_only, spec_options
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import RenamedChoice
from jobs.class_checks import other_classes
from jobs.errors import SpecError
from jobs.kinds import kind_named
from jobs.recipes import DEFAULT_RECIPE, RECIPES
from jobs.specs import FEATURE_NETWORKS, Augment, TrainSpec, check_same_run, difference
from storage.settings import Settings

if TYPE_CHECKING:
    from storage.db.rows import Job

HELP = {
    "data": "Folder, zip or tar of images.  [default: GANQ_DATA, or the data set used last]",
    "recipe": f"Defaults for the options below [default: {DEFAULT_RECIPE}]. "
    + " ".join(f"{recipe.name}: {recipe.summary}." for recipe in RECIPES.values()),
    "size": "Side of the square images in pixels: 8×2^k or 12×2^k.",
    "batch": "Batch size.",
    "epochs": "Number of epochs.",
    "save_every": "Epochs between checkpoints, each with a grid of samples.",
    "seed": "Random seed. The same seed gives bit-identical results.",
    "device": "Device to train on.",
    "lr_g": "Learning rate of the generator (Adam).",
    "lr_d": "Learning rate of the discriminator (Adam).",
    "beta1": "Adam's beta1.",
    "beta2": "Adam's beta2.",
    "nz": "Dimension of the latent vector.",
    "ngf": "Base number of channels of the generator.",
    "ndf": "Base number of channels of the discriminator.",
    "d_every": "Update the discriminator on every N-th batch.",
    "g_every": "Update the generator on every N-th batch.",
    "arch": "Network architecture: the tutorial's DCGAN, a DCGAN with balanced channels, or a ResNet without "
    "normalisation.",
    "loss": "Loss function.",
    "norm_d": "Normalisation of the discriminator.",
    "r1_gamma": "Weight of the R1 gradient penalty (real images); 0 disables it.",
    "r2_gamma": "Weight of the R2 gradient penalty (generated images); 0 disables it.",
    "penalty_every": "Lazy regularisation: apply the penalties on every N-th step, N times as strong.",
    "lr_end": "Final learning rates as a fraction of the initial ones (cosine schedule).",
    "gamma_end": "Final penalty weights as a fraction of the initial ones (cosine schedule).",
    "beta2_end": "Final value of beta2 (cosine schedule); 0: constant.",
    "fake_reuse": "Whether D gets new generated images in each step, or the same ones until the next G step.",
    "ema_half_life_kimg": "Half-life of the generator's EMA, in thousands of images; 0 disables it.",
    "augment": "Differentiable augmentation of D's inputs: translation, color, cutout; 'auto' chooses by "
    "the size of the data set; 'none' disables it.",
    "augment_p": "Probability of each augmentation per image; with --ada-target the maximum (0.3 for color).",
    "ada_target": "Adaptive augmentation (ADA): target of D's overfitting statistic; 0 disables it.",
    "ada_kimg": "Thousands of images in which the augmentation probability can rise from 0 to 1.",
    "mirror": "Random horizontal flips.",
    "conditional": "Train a class-conditional model; the classes are the subfolders of the data set.",
    "max_skip": "Maximum fraction of images that are left out: unreadable, or of an unsupported format.",
    "keep_duplicates": "Also use files whose bytes are equal to another's.",
    "white_level": "Value of white in grey images of 16 bits or floats; 0: 65535.",
    "max_unpacked_gb": "Maximum unpacked size of an archive in gigabytes.",
    "grey": "Generate greyscale images.",
    "loader_workers": "Processes that decode the data set (once).",
    "init_netg": "Initial weights of the generator (.pth, .safetensors).",
    "init_netd": "Initial weights of the discriminator.",
    "freeze_d": "Number of discriminator layers to freeze, counted from the image.",
    "freeze_g": "Number of generator layers to freeze, counted from the latent vector.",
    "checkpoint_seconds": "Seconds between resume checkpoints.",
    "keep_last": "Keep the newest N epoch checkpoints, beside the final one and one resume checkpoint.",
    "keep_every": "Also keep every checkpoint whose epoch is divisible by N; 0 disables this.",
    "keep_best": "Also keep the N checkpoints with the lowest metric.",
    "metric": "Metric of the checkpoints; lower is better.",
    "feature_network": f"Feature network of 'kid' and 'fid': {' or '.join(FEATURE_NETWORKS)}, "
    "or the path of a weight file.",
    "feature_sha256": "SHA-256 of that file.",
    "eval_every": "Epochs between evaluations; 0: as often as costs 5 % of the run time.",
    "eval_samples": "Real and generated images per evaluation; 0: 64 to 500, by the length of the run.",
    "patience": "Stop after N evaluations without improvement; 0: never.",
    "deterministic": "Use deterministic kernels on a GPU.",
    "precision": "Precision of the networks; 'auto': bf16 on GPUs that support it, except for recipe dcgan.",
    "cuda_graphs": "Capture training steps as CUDA graphs (several times faster on a GPU).",
}

PATHS: dict[str, click.ParamType[Any]] = {
    name: click.Path() for name in ("data", "init_netg", "init_netd", "feature_network")
}

NETWORKS = ("size", "nz", "ngf", "ndf", "arch", "norm_d", "conditional", "grey")
"""Fields that must be equal for the weights of one run to fit another."""

NEVER_SWEPT = (*PATHS, "continue_from", "init_from", "augment", "feature_sha256", "max_unpacked_gb", "reader")
"""Paths, fields that depend on a path, and lists."""

POLICIES = get_args(Augment)


class Policies(click.ParamType[tuple[str, ...]]):
    """'translation,color' or 'none'."""

    name = "a,b|none"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        chosen = dict.fromkeys(part.strip() for part in str(value).split(","))
        if [*chosen] == ["none"]:
            return ()
        if "none" in chosen:
            self.fail("none cannot be combined with other values", param, ctx)
        for part in chosen:
            if part not in POLICIES:
                self.fail(f"{part[:40]!r} is not one of {', '.join(POLICIES)}, none", param, ctx)
        return tuple(chosen)


@click.command(
    epilog=examples(
        "ganq submit train --data faces/ --epochs 400",
        "ganq submit train --data faces.zip --size 64 --augment none --name small --wait",
        "ganq submit train --recipe dcgan --g-every 5 --dry-run",
        "ganq submit train --continue small --epochs 800",
        "ganq submit train --init-from faces --data few/ --freeze-d 3 --epochs 50",
        "ganq submit train --sweep lr-g=1e-4,2e-4 --sweep seed=0-9 --name rates",
    )
)
@click.option(
    "--continue", "source", type=JOB, help="Continue from the last checkpoint of this job, with its options."
)
@click.option(
    "--init-from",
    "start",
    type=JOB,
    help="Fine-tune the best networks of this job; their architecture is taken from it.",
)
@spec_options(
    TrainSpec,
    HELP,
    excluded=("continue_from", "init_from", "reader"),
    types={"augment": Policies(), "recipe": RenamedChoice([*RECIPES], field="recipe"), **PATHS},
    flags={"loader_workers": ("--loader-workers", "--num-workers")},
)
@submit_options
def train(source: str | None, start: str | None, **options: Any) -> int:
    """Train a GAN on a folder of images."""
    request = read_submit_options(options)
    settings = Settings.load()
    given = _absolute(given_only(options))
    preflight.find_feature_network(given)
    changes = sweep.combinations(TrainSpec, request.sweep, given, never=NEVER_SWEPT)
    after: list[int] = []
    if start is not None:
        if source is not None:
            raise SpecError(
                "--continue resumes a run, and --init-from starts a new one",
                hint="use only one of them",
            )
        session = open_session(settings=settings)
        model = session.queries.find(start)
        given = fine_tuned(session, model, given)
        if not model.state.terminal:
            after = [model.id]
    if source is None:
        given["data"] = preflight.find_data(settings, given.get("data"))
        specs = [TrainSpec.create(**{"recipe": DEFAULT_RECIPE, **given, **change}) for change in changes]
    else:
        session = open_session(settings=settings)
        parent = session.queries.find(source)
        if "data" in given:
            given["data"] = preflight.find_data(settings, given["data"])
        specs = [continued(session, parent, {**given, **change}) for change in changes]
        if not parent.state.terminal:
            after = [parent.id]
    spec = specs[0]
    listing = preflight.check_training(max(specs, key=lambda spec: spec.batch))
    for each in specs:
        preflight.check_frozen_layers(each)
    if start is not None and spec.conditional:
        known = known_classes(session, model)
        if known is not None and len(known) != (found := len(listing.classes())):
            raise other_classes(model.id, len(known), found)
    if request.dry_run:
        if request.after:
            prerequisites(open_session(settings=settings), request)
        plan = plans.training_plan(spec, len(listing.names))
        seconds = plans.training_seconds(settings, spec, plan)
        return plans.show_plan(spec, plan, seconds, request.as_json, changes if request.sweep else ())
    session = open_session(create=True, settings=settings)
    if options.get("data") is None:
        output.notice(f"training on {spec.data}")
    preflight.notice_data(listing, classes=spec.conditional)
    if after:
        output.notice(f"job {after[0]} has not ended: this job starts after it")
    if request.sweep:
        code = submit_sweep(session, specs, request, changes, after=after)
    else:
        code = submit_job(session, spec, request, after=after)
    preflight.remember_data(settings, spec.data)
    return code


def continued(session: Session, parent: "Job", given: dict[str, Any]) -> TrainSpec:
    """
    Return the spec of a run that continues another.

    Args:
        given: typed options; they override the parent's.

    Raises:
        SpecError: the parent is no training, it has reached the last epoch, or an option must not change.
        CheckpointNotFoundError: it has no checkpoint.
    """
    if parent.kind != TrainSpec.kind:
        raise SpecError(
            f"job {parent.id} is of kind {parent.kind}; only a training can be continued",
            hint="--init-from JOB starts a new run with its networks",
        )
    from storage.db.queries import without_checkpoint

    known = session.queries.checkpoints(parent.id)
    if parent.state.terminal and not known:
        raise without_checkpoint(parent)
    done = known[-1].epoch if parent.state.terminal else parent.spec_field("epochs")
    epochs = given.get("epochs", parent.spec_field("epochs"))
    if epochs <= done:
        raise SpecError(
            f"job {parent.id} already has {output.count(done, 'epoch')}: --epochs {epochs} adds none",
            hint=f"--epochs counts from the start of job {parent.id}: e.g. --epochs {2 * max(done, 1)}",
        )
    # The weights come from the checkpoint, not from where the parent's came from.
    reset = {"init_netg": None, "init_netd": None, "init_from": None, "continue_from": parent.id}
    if "feature_network" in given:
        reset["feature_sha256"] = None  # the parent's belongs to another file
    spec = TrainSpec.from_json({**parent.spec, **reset, **given})
    check_same_run(parent.spec, spec)
    return spec


def fine_tuned(session: Session, start: "Job", given: dict[str, Any]) -> dict[str, Any]:
    """
    Return the options of a run that starts from another job's networks, with the inherited ones.

    Raises:
        SpecError: the job has no networks, or an option contradicts them.
        CheckpointNotFoundError: it has ended without a checkpoint.
    """
    if not kind_named(start.kind).makes_model:
        raise SpecError(
            f"--init-from: job {start.id} is of kind {start.kind} and has no networks",
            hint="use a training or an import",
        )
    if start.state.terminal and not session.queries.checkpoints(start.id):
        from storage.db.queries import without_checkpoint

        raise without_checkpoint(start)
    # Specs of ganq 0.1 have no `arch`, and its imports no `norm_d`.
    inherited = {
        "arch": "dcgan",
        "conditional": False,
        "grey": False,
        **{name: start.spec[name] for name in NETWORKS if name in start.spec},
    }
    if inherited.get("norm_d", "batch") is None:  # imported without a discriminator: any fits
        del inherited["ndf"], inherited["norm_d"]
    changed = [name for name in inherited if name in given and given[name] != inherited[name]]
    if changed:
        differences = ", ".join(difference(name, given[name], inherited[name]) for name in changed)
        raise SpecError(
            f"the networks of job {start.id} do not fit {differences}",
            hint="omit these options: the networks determine them",
        )
    recipe = start.spec.get("recipe") or _closest_recipe(inherited)
    return {"recipe": recipe, **inherited, **given, "init_from": start.id}


def _closest_recipe(networks: Mapping[str, Any]) -> str:
    """
    Return a recipe for imported networks: one with the same normalisation of D, if there is a D,
    then with the same generator.
    """

    def differs(recipe: str) -> list[bool]:
        trained = TrainSpec.create(recipe=recipe, data="")
        return [networks.get(part) not in (None, getattr(trained, part)) for part in ("norm_d", "arch")]

    return min((DEFAULT_RECIPE, "sngan", *RECIPES), key=differs)


def _absolute(given: dict[str, Any]) -> dict[str, Any]:
    """Make paths absolute: the worker runs in another folder."""
    for name in ("init_netg", "init_netd"):
        if name in given:
            given[name] = str(Path(given[name]).expanduser().absolute())
    return given
