"""`ganq submit train`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from cli.session import JOB, NoJobsYetError, Session, open_session
from cli.submit import preflight, sweep
from cli.submit.generate import known_classes
from cli.submit.options import accept, needed, read_submit_options, show_plan, submit_options
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

WORDS = {
    "data": "Folder, zip or tar of pictures. Default: GANQ_DATA, or the one last made or used.",
    "recipe": f"A set of defaults for all below [default: {DEFAULT_RECIPE}]. "
    + " ".join(f"{one.name}: {one.summary}." for one in RECIPES.values()),
    "size": "Side of the square pictures, in pixels: 8×2^k or 12×2^k.",
    "batch": "Pictures in one step.",
    "epochs": "How often each picture is seen.",
    "save_every": "Epochs between sample grids with checkpoints.",
    "seed": "Where all chance comes from: the same seed gives the same bits.",
    "device": "Where to train.",
    "lr_g": "Adam's learning rate, generator.",
    "lr_d": "Adam's learning rate, discriminator.",
    "beta1": "Adam's first beta.",
    "beta2": "Adam's second beta.",
    "nz": "Numbers in one latent vector.",
    "ngf": "Width of the generator.",
    "ndf": "Width of the discriminator.",
    "d_every": "The discriminator steps on every N-th batch.",
    "g_every": "The generator steps on every N-th batch.",
    "arch": "The networks: the tutorial's; its channels balanced; or a ResNet without normalisation.",
    "loss": "The game that the two networks play.",
    "norm_d": "How the discriminator is kept in bounds.",
    "r1_gamma": "Penalty on the discriminator's slope at real pictures; 0 is off.",
    "r2_gamma": "The same at fakes.",
    "penalty_every": "The penalties come on every N-th step, N times as strong.",
    "lr_end": "Share of the learning rates that is left at the end, on a cosine.",
    "gamma_end": "Share of the penalties that is left at the end, on a cosine.",
    "beta2_end": "beta2 at the end, on a cosine; 0: it stays.",
    "fake_reuse": "Whether D sees new fakes at each step, or the same until G steps.",
    "ema_half_life_kimg": "Half-life of the generator's average, in thousands of pictures; 0 is off.",
    "augment": "What D sees changed, of translation, color and cutout; with 'auto' by the size of the "
    "data set, 'none' for nothing.",
    "augment_p": "Chance of each change for each picture; with --ada-target at most, and colours at 0.3.",
    "ada_target": "Let the chance follow how surely D knows training pictures, e.g. 0.6; 0: it stays.",
    "ada_kimg": "Thousands of pictures in which that chance can go from 0 to 1.",
    "mirror": "Show half of the pictures mirrored; only if left and right may be swapped.",
    "conditional": "Learn the classes of the folder tree, so that pictures can be asked for by class.",
    "max_skip": "Share of images that may be left out: broken, or of a format that is not read.",
    "keep_duplicates": "Use files with equal bytes more than once.",
    "white_level": "Value that becomes white in grey images of 16 bits or floats; 0: 65535.",
    "max_unpacked_gb": "What an archive may unpack to, in gigabytes.",
    "grey": "Make grey images: for data sets without colour.",
    "loader_workers": "Processes that decode the pictures, once.",
    "init_netg": "Starting weights of the generator (.pth, .safetensors).",
    "init_netd": "Starting weights of the discriminator.",
    "freeze_d": "Layers of the discriminator, from the pixels on, that keep their starting weights.",
    "freeze_g": "Layers of the generator, from the latents on, that keep theirs.",
    "checkpoint_seconds": "Seconds between resume points.",
    "keep_last": "Newest epoch checkpoints that stay, beside the final one and one resume point.",
    "keep_every": "Each checkpoint whose epoch is divisible by this stays, too; 0: none for that reason.",
    "keep_best": "So many of the measured ones stay, too: those with the lowest metric.",
    "metric": "What checkpoints are measured by, lower is better.",
    "feature_network": f"What 'kid' and 'fid' look with: {' or '.join(FEATURE_NETWORKS)}, "
    "or the path of a weight file.",
    "feature_sha256": "The sha-256 of that file.",
    "eval_every": "Epochs between evaluations; 0: as many as take a twentieth of the run.",
    "eval_samples": "Pictures of an evaluation, real and made; 0: 64 to 500, by the length of the run.",
    "patience": "Stop after so many evaluations without a new best; 0: never.",
    "deterministic": "On a GPU: kernels that always give the same bits.",
    "precision": "What the networks compute in; 'auto': bf16 on a GPU that has it, but for recipe dcgan.",
    "cuda_graphs": "On a GPU: record the work of a step once and replay it, several times as fast.",
}

PATHS: dict[str, click.ParamType[Any]] = {
    name: click.Path() for name in ("data", "init_netg", "init_netd", "feature_network")
}

NETWORKS = ("size", "nz", "ngf", "ndf", "arch", "norm_d", "conditional", "grey")
"""What makes weights of one run fit another."""

NEVER_SWEPT = (*PATHS, "continue_from", "init_from", "augment", "feature_sha256", "max_unpacked_gb")
"""Paths, what belongs to one, and what is itself a list."""


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
            self.fail("none goes with nothing else", param, ctx)
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
    "--continue", "source", type=JOB, help="Go on from the last checkpoint of this job, with its spec."
)
@click.option(
    "--init-from",
    "start",
    type=JOB,
    help="Start from the best networks of this job (fine-tuning): its sizes are taken over.",
)
@spec_options(
    TrainSpec,
    WORDS,
    own=("continue_from", "init_from", "reader"),
    kinds={"augment": Policies(), "recipe": RenamedChoice([*RECIPES], field="recipe"), **PATHS},
    names={"loader_workers": ("--loader-workers", "--num-workers")},
)
@submit_options
def train(source: str | None, start: str | None, **options: Any) -> int:
    """Train a GAN on a folder of pictures."""
    wish = read_submit_options(options)
    settings = Settings.load()
    given = _absolute(given_only(options))
    preflight.find_feature_network(given)
    changes = sweep.combinations(TrainSpec, wish.sweep, given, never=NEVER_SWEPT) if wish.sweep else [{}]
    after: list[int] = []
    if start is not None:
        if source is not None:
            raise SpecError(
                "--continue goes on with a run, and --init-from begins a new one",
                hint="use one of the two",
            )
        session = open_session(settings=settings)
        model = session.queries.find(start)
        given = started(session, model, given)
        if not model.state.terminal:
            after = [model.id]
    if source is None:
        given["data"] = preflight.find_data(settings, given.get("data"))
        specs = [TrainSpec.create(**{"recipe": DEFAULT_RECIPE, **given, **one}) for one in changes]
    else:
        session = open_session(settings=settings)
        parent = session.queries.find(source)
        if "data" in given:
            given["data"] = preflight.find_data(settings, given["data"])
        specs = [continued(session, parent, {**given, **one}) for one in changes]
        if not parent.state.terminal:
            after = [parent.id]
    spec = specs[0]
    listing = preflight.check_training(max(specs, key=lambda one: one.batch))
    for one in specs:
        preflight.check_frozen_layers(one)
    if start is not None and spec.conditional:
        known = known_classes(session, model)
        if known is not None and len(known) != (mine := len(listing.classes())):
            raise other_classes(model.id, len(known), mine)
    if wish.dry_run:
        if wish.after:
            needed(open_session(settings=settings), wish)
        plan = preflight.training_plan(spec, len(listing.names))
        estimate = _estimate(settings, spec, plan)
        return show_plan(spec, plan, estimate, wish.as_json, changes if wish.sweep else ())
    session = open_session(create=True, settings=settings)
    if options.get("data") is None:
        output.notice(f"training on {spec.data}")
    preflight.notice_data(listing, classes=spec.conditional)
    if after:
        output.notice(f"job {after[0]} has not ended; this one waits for it")
    if wish.sweep:
        code = sweep.accept_sweep(session, specs, wish, after=[*after, *needed(session, wish)])
    else:
        code = accept(session, spec, wish, after=after)
    preflight.remember_data(settings, spec.data)
    return code


def continued(session: Session, parent: "Job", given: dict[str, Any]) -> TrainSpec:
    """
    The spec of a run that goes on where another ended.

    Args:
        given: what was typed; overrides the parent's spec.

    Raises:
        SpecError: no training job, no later end, or another run.
        CheckpointNotFoundError: there is nothing to go on from.
    """
    if parent.kind != TrainSpec.kind:
        raise SpecError(
            f"job {parent.id} is of kind {parent.kind}, and only a training goes on",
            hint="--init-from JOB begins a new run with its networks",
        )
    from storage.db.queries import without_checkpoint

    known = session.queries.checkpoints(parent.id)
    if parent.state.terminal and not known:
        raise without_checkpoint(parent)
    done = known[-1].epoch if parent.state.terminal else parent.spec_field("epochs")
    epochs = given.get("epochs", parent.spec_field("epochs"))
    if epochs <= done:
        raise SpecError(
            f"job {parent.id} has {output.count(done, 'epoch')} already: --epochs {epochs} adds none",
            hint=f"--epochs counts from the start of job {parent.id}: e.g. --epochs {2 * max(done, 1)}",
        )
    # The checkpoint holds the weights; where the first ones came from plays no part any more.
    fresh = {"init_netg": None, "init_netd": None, "init_from": None, "continue_from": parent.id}
    if "feature_network" in given:
        fresh["feature_sha256"] = None  # the parent's was of another
    spec = TrainSpec.from_json({**parent.spec, **fresh, **given})
    check_same_run(parent.spec, spec)
    return spec


def started(session: Session, start: "Job", given: dict[str, Any]) -> dict[str, Any]:
    """
    The options of a run that starts from another job's networks, with those that it takes over.

    Raises:
        SpecError: no job with networks, or other ones are asked for.
        CheckpointNotFoundError: it has ended and left no checkpoint.
    """
    if not kind_named(start.kind).makes_model:
        raise SpecError(
            f"--init-from: job {start.id} is of kind {start.kind} and has no networks",
            hint="name a training or an import",
        )
    if start.state.terminal and not session.queries.checkpoints(start.id):
        from storage.db.queries import without_checkpoint

        raise without_checkpoint(start)
    # A spec of ganq 0.1 has no `arch`, and an import's of then nothing of `norm_d`.
    its = {
        "arch": "dcgan",
        "conditional": False,
        "grey": False,
        **{name: start.spec[name] for name in NETWORKS if name in start.spec},
    }
    if its.get("norm_d", "batch") is None:  # it came without a discriminator, so any will do
        del its["ndf"], its["norm_d"]
    changed = [name for name in its if name in given and given[name] != its[name]]
    if changed:
        told = ", ".join(difference(name, given[name], its[name]) for name in changed)
        raise SpecError(
            f"job {start.id} cannot be the start of a run with {told}",
            hint="leave these away: the networks are taken over as they are",
        )
    return {"recipe": start.spec.get("recipe") or _recipe_of(its), **its, **given, "init_from": start.id}


def _recipe_of(networks: Mapping[str, Any]) -> str:
    """
    The recipe for networks of an import, which knows none: one whose loss goes with D's norm, if it has
    a D, and of those one that has such a generator, too.
    """

    def differs(recipe: str) -> list[bool]:
        trained = TrainSpec.create(recipe=recipe, data="")
        return [networks.get(part) not in (None, getattr(trained, part)) for part in ("norm_d", "arch")]

    return min((DEFAULT_RECIPE, "plus", *RECIPES), key=differs)


def _absolute(given: dict[str, Any]) -> dict[str, Any]:
    """Paths as the worker needs them: it runs in another folder."""
    for name in ("init_netg", "init_netd"):
        if name in given:
            given[name] = str(Path(given[name]).expanduser().absolute())
    return given


def _estimate(settings: Settings, spec: TrainSpec, plan: dict[str, int]) -> float | None:
    from cli.submit.estimate import training_rate

    try:
        rate = training_rate(open_session(settings=settings).queries, spec)
    except NoJobsYetError:
        return None
    return plan["pictures_shown"] / rate if rate else None
