"""`ganq submit train`."""

from typing import Any, get_args

import click

from cli.session import MODEL, TRAINING, open_session
from cli.submit import plan as plans
from cli.submit import sweep
from cli.submit.accept import submit_job, submit_sweep, submit_unresolved
from cli.submit.notify import notices_of
from cli.submit.options import read_submit_options, submit_options
from cli.submit.spec_options import given_only, spec_options
from cli.submit.template import TemplateName, save_typed_options, use_template
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import RenamedChoice
from ganq.submission import preflight
from ganq.submission.accept import prerequisites
from ganq.submission.train import absolute_paths, prepare
from jobs.budgets import read_switches
from jobs.errors import SpecError
from jobs.recipes import DEFAULT_RECIPE, RECIPES
from jobs.specs import FEATURE_NETWORKS, Augment, TrainSpec, check_name
from storage.settings import Settings

HELP = {
    "data": "Folder, zip or tar of images.  [default: GANQ_DATA, or the data set used last]",
    "recipe": f"Defaults for the options below [default: {DEFAULT_RECIPE}]. "
    + " ".join(f"{recipe.name}: {recipe.summary}." for recipe in RECIPES.values()),
    "size": "Side of the square images in pixels: 8×2^k or 12×2^k, from 16 to 1536.",
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
    "ndf": "Base number of channels of the discriminator.  [default: that of the generator]",
    "d_every": "Update the discriminator on every N-th batch.",
    "g_every": "Update the generator on every N-th batch.",
    "arch": "Network architecture: the tutorial's DCGAN, a DCGAN with balanced channels, or a ResNet without "
    "normalisation.",
    "patch_size": "Side of the patches of pixels that the generator's last layer makes, and the "
    "discriminator's first reads. Larger ones are faster, and blur; 0: 3 or 2, by the size.",
    "full_res_conv": "End the generator in a convolution at the resolution of the image.",
    "antialias": "Low-pass filter the generator's images, against patterns of dots.",
    "skips": "Skip connections between images of a quarter, half and full size, in both networks.",
    "progressive": "Train at a quarter of the size, after A images at half, after B at full size: A,B as "
    "20k,60k. Implies --skips. 'none': full size from the start.",
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
    "fit": "How images that are not square become square: their centre, black bars, or distorted.",
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
    "stop_after": "End as a success before the last epoch, with a final checkpoint, grid and evaluation: "
    "after 10m of running time, 200k-images, or a number of epochs. The schedules remain those of --epochs.",
    "deterministic": "Use deterministic kernels on a GPU.",
    "precision": "Precision of the networks; 'auto': bf16 on GPUs that support it, except for recipe dcgan.",
    "cuda_graphs": "Capture training steps as CUDA graphs (several times faster on a GPU).",
}

PATHS: dict[str, click.ParamType[Any]] = {
    name: click.Path() for name in ("data", "init_netg", "init_netd", "feature_network")
}

NEVER_SWEPT = (
    *PATHS,
    "continue_from",
    "init_from",
    "augment",
    "progressive",
    "feature_sha256",
    "max_unpacked_gb",
    "reader",
)
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


class ResolutionSwitches(click.ParamType[tuple[int, ...]]):
    """'20k,60k' or 'none'."""

    name = "a,b|none"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return read_switches(str(value))
        except SpecError as exc:
            self.fail(f"{exc.message}; {exc.hint}", param, ctx)


@click.command(
    epilog=examples(
        "ganq submit train --data faces/ --epochs 400",
        "ganq submit train --data faces.zip --size 64 --augment none --name small --wait",
        "ganq submit train --recipe dcgan --g-every 5 --dry-run",
        "ganq submit train --continue small --epochs 800",
        "ganq submit train -t night --data birds/ --stop-after 8h",
        "ganq submit train --init-from faces --data few/ --freeze-d 3 --epochs 50",
        "ganq submit train --init-from builtin:faces --data few/",
        "ganq submit train --sweep lr-g=1e-4,2e-4 --sweep seed=0-9 --name rates",
    )
)
@click.option(
    "-t",
    "--template",
    type=TemplateName(),
    is_eager=True,
    callback=use_template,
    help="Use the options that --save-as has saved; those of the command line have precedence.",
)
@click.option(
    "--save-as",
    metavar="TEMPLATE",
    help="Save the given options as a template when the job is accepted, apart from --name, --note, "
    "--user, --submit-key and --sweep.",
)
@click.option(
    "--continue",
    "source",
    type=TRAINING,
    help="Continue from the last checkpoint of this job, with its options.",
)
@click.option(
    "--init-from",
    "start",
    type=MODEL,
    help="Fine-tune the best networks of this job, or those that come with ganq (builtin:faces); their "
    "architecture is taken from it.",
)
@spec_options(
    TrainSpec,
    HELP,
    excluded=("continue_from", "init_from", "reader"),
    types={
        "augment": Policies(),
        "progressive": ResolutionSwitches(),
        "recipe": RenamedChoice([*RECIPES], field="recipe"),
        **PATHS,
    },
    flags={"loader_workers": ("--loader-workers", "--num-workers")},
)
@submit_options
def train(
    source: str | None, start: str | None, template: str | None, save_as: str | None, **options: Any
) -> int:
    """Train a GAN on a folder of images."""
    if save_as is not None:
        check_name(save_as)
    request = read_submit_options(options)
    settings = Settings.load()
    if settings.api_url and not request.dry_run:
        asked = {**given_only(options), "continue_from": source, "init_from": start}
        code = submit_unresolved("train", asked, request, TrainSpec, NEVER_SWEPT)
        if save_as is not None:
            output.notice(f"template {save_as}: {save_typed_options(save_as)}")
        return code
    given = absolute_paths(given_only(options))
    preflight.find_feature_network(given)
    changes = sweep.combinations(TrainSpec, request.sweep, given, never=NEVER_SWEPT)
    found = prepare(
        settings,
        lambda create: open_session(create=create, settings=settings),
        given,
        changes,
        source=source,
        start=start,
        imports=not request.dry_run,
    )
    spec = found.specs[0]
    if "ngf" in given and "ndf" not in given and spec.ndf == given["ngf"]:
        output.notice(f"--ndf {spec.ndf} follows --ngf")
    if request.dry_run:
        if request.after or request.after_any or request.after_fail:
            prerequisites(open_session(settings=settings), request)
        plan = plans.training_plan(spec, len(found.listing.names))
        seconds = plans.training_seconds(settings, spec, plan)
        imported_later = {"init_from": start} if spec.init_from == 0 else None
        return plans.show_plan(
            spec,
            plan,
            seconds,
            request.as_json,
            changes if request.sweep else (),
            unresolved=imported_later,
        )
    session = open_session(create=True, settings=settings)
    if options.get("data") is None:
        output.notice(f"training on {spec.data}")
    if spec.continue_from is not None:
        output.notice(f"continues job {spec.continue_from} from its last checkpoint")
    notices_of(preflight.data_notices(found.listing, classes=spec.conditional))
    if found.after:
        output.notice(f"job {found.after[0]} has not ended: this job starts after it")
    if request.sweep:
        code = submit_sweep(session, found.specs, request, changes, after=found.after)
    else:
        code = submit_job(session, spec, request, after=found.after)
    preflight.remember_data(settings, spec.data)
    if save_as is not None:
        output.notice(f"template {save_as}: {save_typed_options(save_as)}")
    return code
