"""Resolve a request for a training: its specs, its data set, and the jobs that it waits for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ganq.builtin import builtin_named
from ganq.session import Session
from ganq.submission import preflight
from ganq.submission.generate import known_classes
from jobs.class_checks import other_classes
from jobs.errors import SpecError
from jobs.kinds import kind_named
from jobs.recipes import DEFAULT_RECIPE, RECIPES
from jobs.specs import NETWORK_OPTIONS, NEW_NETWORK_OPTIONS, TrainSpec, check_same_run, difference
from storage.settings import Settings
from storage.status.units import count

if TYPE_CHECKING:
    from storage.datasets.sources import Listing
    from storage.db.rows import Job

NETWORKS = (*NETWORK_OPTIONS, "conditional", "grey")
"""Fields that must be equal for the weights of one run to fit another."""


@dataclass(frozen=True)
class Training:
    """A resolved request."""

    specs: list[TrainSpec]
    after: list[int]
    """Jobs to wait for."""
    listing: "Listing"


def prepare(
    settings: Settings,
    opened: Callable[[bool], Session],
    given: Mapping[str, Any],
    changes: Sequence[Mapping[str, Any]] = ({},),
    *,
    source: str | None,
    start: str | None,
    imports: bool = True,
) -> Training:
    """
    Create the specs and check them against the data set.

    Args:
        opened: returns the job table, and creates it if asked to; called only if another job is named.
        given: options of all jobs; paths are absolute.
        changes: options that differ, for each job.
        source: the job to continue.
        start: the job, or `builtin:NAME`, whose networks the training starts from.
        imports: False for a dry run, which imports no networks: `init_from` is then 0 for `builtin:NAME`.

    Raises:
        NotFoundError: a job, or a path, does not exist.
        SpecError, DatasetError: the request does not fit the job, or the data set.
    """
    given = dict(given)
    after: list[int] = []
    if start is not None and source is not None:
        raise SpecError(
            "--continue resumes a run, and --init-from starts a new one",
            hint="use only one of them",
        )
    builtin, model = builtin_named(start), None
    if builtin is not None:
        given = _with_networks(f"{start}", builtin.networks, None, given) | {"init_from": 0}
    elif start is not None:
        session = opened(False)
        model = session.queries.find(start)
        given = fine_tuned(session, model, given)
        if not model.state.terminal:
            after = [model.id]
    if source is None:
        given["data"] = preflight.find_data(settings, given.get("data"))
        specs = [TrainSpec.create(**{"recipe": DEFAULT_RECIPE, **given, **change}) for change in changes]
    else:
        session = opened(False)
        parent = session.queries.find(source)
        if "data" in given:
            given["data"] = preflight.find_data(settings, given["data"])
        specs = [continued(session, parent, {**given, **change}) for change in changes]
        if not parent.state.terminal:
            after = [parent.id]
    listing = preflight.check_training(max(specs, key=lambda spec: spec.batch))
    for each in specs:
        preflight.check_frozen_layers(each)
    if model is not None and specs[0].conditional:
        known = known_classes(session, model)
        if known is not None and len(known) != (found := len(listing.classes())):
            raise other_classes(model.id, len(known), found)
    if builtin is not None and imports:
        networks = builtin.imported(opened(True))
        specs = [spec.model_copy(update={"init_from": networks.id}) for spec in specs]
    return Training(specs, after, listing)


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
        raise without_checkpoint(session.queries, parent)
    done = known[-1].epoch if parent.state.terminal else parent.spec_field("epochs")
    epochs = given.get("epochs", parent.spec_field("epochs"))
    if epochs <= done:
        wanted = f"--epochs {epochs} adds none" if "epochs" in given else "say how many it shall have"
        raise SpecError(
            f"job {parent.id} already has {count(done, 'epoch')}: {wanted}",
            hint=f"--epochs counts from the start of job {parent.id}: e.g. --epochs {2 * max(done, 1)}",
        )
    # The weights come from the checkpoint, not from where the parent's came from.
    reset = dict.fromkeys(("init_netg", "init_netd", "init_from", "stop_after"))
    reset |= {"continue_from": parent.id}
    if "feature_network" in given:
        reset["feature_sha256"] = None  # the parent's belongs to another file
    spec = TrainSpec.from_json({**parent.spec, **reset, **given})
    check_same_run(parent.spec, spec)
    _check_budget(parent.id, spec, known[-1].step if parent.state.terminal else 0, done)
    return spec


def _check_budget(parent: int, spec: TrainSpec, steps: int, epochs: int) -> None:
    """
    Check that --stop-after leaves time to train.

    Raises:
        SpecError: the run that is continued has already used up --stop-after.
    """
    budget = spec.budget
    if budget is None or budget.unit == "s":
        return
    used = epochs if budget.unit == "epochs" else steps * spec.batch
    if budget.amount <= used:
        raise SpecError(
            f"job {parent} already has {used:,} {budget.unit}: --stop-after {budget} adds none",
            hint="it counts from the start of the run, as --epochs does",
        )


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

        raise without_checkpoint(session.queries, start)
    # Specs of earlier versions lack these. Their imports could have two of them; the user gives those.
    unrecorded = dict(NEW_NETWORK_OPTIONS)
    if start.kind == "import":
        del unrecorded["full_res_conv"], unrecorded["skips"]
    networks = unrecorded | {name: start.spec[name] for name in NETWORKS if name in start.spec}
    return _with_networks(f"job {start.id}", networks, start.spec.get("recipe"), given) | {
        "init_from": start.id
    }


def _with_networks(
    source: str, networks: Mapping[str, Any], recipe: str | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Return the options of a run that starts from networks.

    Args:
        source: where they are from, for people.
        networks: their options; older specs lack fields, and imports of ganq 0.1 have no `norm_d`.
        recipe: that they were trained with; None: unknown.

    Raises:
        SpecError: an option contradicts the networks.
    """
    inherited = {"arch": "dcgan", "conditional": False, "grey": False, **networks}
    if inherited.get("norm_d", "batch") is None:  # imported without a discriminator: any fits
        del inherited["ndf"], inherited["norm_d"]
    changed = [name for name in inherited if name in given and given[name] != inherited[name]]
    if changed:
        differences = ", ".join(difference(name, given[name], inherited[name]) for name in changed)
        raise SpecError(
            f"the networks of {source} do not fit {differences}",
            hint="omit these options: the networks determine them",
        )
    if given.get("progressive") and not inherited.get("skips", True):
        raise SpecError(
            f"--progressive grows networks with skip connections, and those of {source} have none",
            hint="omit --progressive",
        )
    return {"recipe": recipe or _closest_recipe(inherited), **inherited, **given}


def _closest_recipe(networks: Mapping[str, Any]) -> str:
    """
    Return a recipe for imported networks: one with the same normalisation of D, if there is a D,
    then with the same generator.
    """

    def differs(recipe: str) -> list[bool]:
        trained = TrainSpec.create(recipe=recipe, data="")
        return [networks.get(part) not in (None, getattr(trained, part)) for part in ("norm_d", "arch")]

    return min((DEFAULT_RECIPE, "sngan", *RECIPES), key=differs)


def absolute_paths(given: dict[str, Any]) -> dict[str, Any]:
    """Make paths absolute: the worker runs in another folder."""
    for name in ("init_netg", "init_netd"):
        if name in given:
            given[name] = str(Path(given[name]).expanduser().absolute())
    return given
