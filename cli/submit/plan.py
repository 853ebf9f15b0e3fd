"""What `--dry-run` prints: the resolved spec, steps, bytes, and the time that similar jobs took."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from cli.session import NoJobsYetError, open_session
from cli.submit import sweep
from cli.ui import output
from jobs.errors import JobNotFoundError
from jobs.specs import NETWORK_OPTIONS, EvaluateSpec, GenerateSpec, TrainSpec
from jobs.states import JobState

if TYPE_CHECKING:
    from torch import Tensor, nn

    from jobs.specs import Spec
    from storage.db.queries import Queries
    from storage.db.rows import Job
    from storage.settings import Settings

PNG_BYTES_PER_PIXEL = 1.7
"""Average of a generated face: 15.5 kB at 96×96."""
PROCESS_BYTES = 630_000_000
"""Of a process with PyTorch, before it builds a network."""
ACTIVATION_FACTOR, PENALTY_FACTOR = 1.5, 2.0
"""Memory relative to the activations of one pass: within a tenth of rpgan at 96 to 256 pixels on a CPU."""
HISTORY = 100
"""Jobs that are searched for similar ones."""
TRAINING_FIELDS = (
    *NETWORK_OPTIONS,
    *("progressive", "d_every", "g_every", "r1_gamma", "r2_gamma", "penalty_every"),
    *("precision", "cuda_graphs"),
)
EVALUATION_FIELDS = ("size", "count", "search", "feature_network")
RENAMED_KEYS = {
    "images": "pictures",
    "images_shown": "pictures_shown",
    "images_generated": "pictures_drawn",
    "images_kept": "pictures_kept",
    "max_real_images": "real_pictures_at_most",
}
"""Keys of a plan, and their names in ganq 0.2, which JSON still contains."""
GENERATION_FIELDS = tuple(name for name in NETWORK_OPTIONS if name not in ("ndf", "norm_d"))


def show_plan(
    spec: "Spec",
    plan: Mapping[str, Any],
    seconds: float | None,
    as_json: bool,
    changes: Sequence[Mapping[str, Any]] = (),
    *,
    unresolved: Mapping[str, Any] | None = None,
) -> int:
    """
    Print a plan.

    Args:
        unresolved: fields that get their value when the job is submitted, as they were given.
        changes: of a sweep, the fields that differ in each job; `spec` is the first.
    """
    described = spec.to_json() | dict(unresolved or {})
    if as_json:
        plan = dict(plan) | {old: plan[new] for new, old in RENAMED_KEYS.items() if new in plan}
        facts = {"kind": spec.kind, "spec": described, "plan": plan, "estimate_seconds": seconds}
        output.print_json(facts | ({"sweep": [dict(change) for change in changes]} if changes else {}))
        return 0
    if changes:
        click.echo(f"sweep of {sweep.describe(changes)}; the first job:")
    fields = {name: value for name, value in described.items() if value not in (None, [])}
    for title, rows in (("spec", fields), ("plan", plan)):
        click.echo(title)
        width = max(map(len, rows))
        for name, value in rows.items():
            click.echo(f"  {name.ljust(width)}  {output.clean(_format_value(name, value))}")
    click.echo("time")
    if seconds is None:
        click.echo("  unknown: no similar job has run yet")
    else:
        click.echo(f"  about {output.duration(seconds)}, at the rate of earlier jobs")
    click.echo("nothing was submitted (--dry-run)")
    return 0


def _format_value(name: str, value: Any) -> str:
    if "bytes" in name:
        return output.size(value)
    if isinstance(value, list):
        return ",".join("-".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)
    return f"{value:,}" if type(value) is int and name != "seed" else str(value)


# --- steps and bytes ----------------------------------------------------------------------


def training_plan(spec: TrainSpec, images: int) -> dict[str, int]:
    """
    Return steps of each network, images that the discriminator sees, and bytes on disk.

    Args:
        images: files that are images by their name.
    """
    batches = images // spec.batch
    kept = checkpoints_kept(spec)
    total = spec.epochs * batches
    steps = (
        min(total, spec.budget.steps(per_epoch=batches, batch=spec.batch) or total) if spec.budget else total
    )
    epochs, rest = divmod(steps, batches) if batches else (0, 0)
    ends = {"ends_at_step": steps, "ends_at_epoch": -(-steps // max(batches, 1))} if steps < total else {}
    return {
        "images": images,
        "batches_per_epoch": batches,
        "steps_d": epochs * -(-batches // spec.d_every) + -(-rest // spec.d_every),
        "steps_g": epochs * -(-batches // spec.g_every) + -(-rest // spec.g_every),
        "images_shown": steps * spec.batch,
        **ends,
        "sample_grids": epochs // spec.save_every + (rest + epochs % spec.save_every > 0),
        "checkpoints_kept": kept,
        "checkpoint_bytes": checkpoint_bytes(spec),
        "bytes_on_disk": kept * checkpoint_bytes(spec) + images * 3 * spec.size**2,
        "memory_bytes": memory_bytes(spec),
    }


def generation_plan(model: "Job", spec: GenerateSpec) -> dict[str, Any]:
    """Return images, grids and bytes on disk."""
    pages = min(-(-spec.total // spec.grid), spec.grid_pages) if spec.grid else 0
    size = model.spec.get("size", 96)
    return {
        "model": f"job {model.id} ({model.state})",
        "images_generated": spec.drawn,
        "images_kept": spec.total,
        "grids": pages,
        "bytes_on_disk": int(spec.total * size * size * PNG_BYTES_PER_PIXEL),
    }


def checkpoints_kept(spec: TrainSpec) -> int:
    """Return the maximum number of checkpoints on disk: newest, every keep_every-th, final, resume."""
    saved = spec.epochs // spec.save_every
    apart = spec.epochs // spec.keep_every if spec.keep_every else 0
    return min(saved, spec.keep_last + apart) + 2


def checkpoint_bytes(spec: TrainSpec) -> int:
    """Return the approximate bytes of a checkpoint: networks, Adam's moments, moving average."""
    import torch

    from jobs.networks.dcgan import Architecture

    networks = Architecture.of_spec(spec)
    with torch.device("meta"):  # shapes alone
        built = networks.build_generator(), networks.build_discriminator()
    numbers = [sum(one.numel() for one in each.state_dict().values()) for each in built]
    generator, discriminator = map(int, numbers)
    average = generator if spec.ema_half_life_kimg > 0 else 0
    return 4 * (3 * (generator + discriminator) + average + generator + discriminator)


def memory_bytes(spec: TrainSpec) -> int:
    """Return the approximate memory of a training process on a CPU; a GPU needs less by PROCESS_BYTES."""
    import torch

    from jobs.networks.dcgan import Architecture

    networks = Architecture.of_spec(spec)
    with torch.device("meta"):
        generator, discriminator = networks.build_generator(), networks.build_discriminator()
    # Not on the meta device, whose first use imports for more than a second.
    with torch.no_grad():
        of_g = _activations(generator.to_empty(device="cpu"), torch.zeros(1, spec.nz, 1, 1))
        of_d = _activations(discriminator.to_empty(device="cpu"), torch.zeros(1, 3, spec.size, spec.size))
    # D sees real images and fakes; a gradient penalty keeps the gradients of each layer, too.
    passes_d = 2 * (PENALTY_FACTOR if spec.r1_gamma + spec.r2_gamma > 0 else 1)
    numbers = spec.batch * ACTIVATION_FACTOR * (of_g + passes_d * of_d)
    return int(PROCESS_BYTES + 2 * checkpoint_bytes(spec) + 4 * numbers)


def _activations(net: "nn.Module", inputs: "Tensor") -> int:
    """Return how many numbers the layers of a network compute for one image."""
    counts: list[int] = []
    for layer in net.modules():
        if not list(layer.children()) and not getattr(layer, "inplace", False):
            layer.register_forward_hook(lambda layer, inputs, output: counts.append(output.numel()))
    net.eval()(inputs)
    return sum(counts)


# --- time ---------------------------------------------------------------------------------


def training_seconds(settings: "Settings", spec: TrainSpec, plan: Mapping[str, int]) -> float | None:
    """Estimate from earlier trainings of the same networks; None if there are none."""
    try:
        queries = open_session(settings=settings).queries
    except NoJobsYetError:
        return None
    rate = _median_rate(_similar(queries, spec.to_json(), "train", TRAINING_FIELDS))
    ends_in = (spec.budget.seconds if spec.budget else None) or float("inf")
    seconds = plan["images_shown"] / rate if rate else ends_in
    return min(seconds, ends_in) if min(seconds, ends_in) < float("inf") else None


def generation_seconds(queries: "Queries", model: "Job", spec: GenerateSpec) -> float | None:
    """Estimate from earlier generations with the same generator layout; None if there are none."""
    from storage.db.queries import Filter

    models: dict[int, dict[str, Any]] = {model.id: model.spec}
    similar = []
    for job in queries.page(Filter(kind="generate"), limit=HISTORY):
        source = job.spec.get("source")
        if not isinstance(source, int):
            continue
        if source not in models:
            try:
                models[source] = queries.get(source).spec
            except JobNotFoundError:
                continue
        if _same_fields(models[source], model.spec, GENERATION_FIELDS):
            similar.append(job)
    rate = _median_rate(similar)
    return spec.drawn / rate if rate else None


def evaluation_seconds(queries: "Queries", spec: EvaluateSpec) -> float | None:
    """Estimate from earlier evaluations of the same size; None if there are none."""
    jobs = _similar(queries, spec.to_json(), "evaluate", EVALUATION_FIELDS)
    return _median([(job.result or {}).get("seconds") for job in jobs if job.state is JobState.SUCCEEDED])


def _similar(queries: "Queries", spec: dict[str, Any], kind: str, fields: Sequence[str]) -> "list[Job]":
    from storage.db.queries import Filter

    return [
        job for job in queries.page(Filter(kind=kind), limit=HISTORY) if _same_fields(job.spec, spec, fields)
    ]


def _same_fields(a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str]) -> bool:
    former = {"arch": "dcgan"}  # jobs of ganq 0.1 have no `arch`
    return all((a.get(name) or former.get(name)) == (b.get(name) or former.get(name)) for name in names)


def _median_rate(jobs: "Sequence[Job]") -> float | None:
    # A short job ends before a heartbeat has carried its rate; its result has one.
    return _median(
        [(job.result or {}).get("images_per_s") or (job.progress or {}).get("rate") for job in jobs]
    )


def _median(values: Sequence[Any]) -> float | None:
    known = [value for value in values if isinstance(value, int | float) and value > 0]
    return float(median(known)) if known else None
