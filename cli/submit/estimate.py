"""How fast jobs like this one were: the only honest estimate is a measured one."""

from statistics import median
from typing import Any

from jobs.errors import JobNotFoundError
from jobs.specs import EvaluateSpec, TrainSpec
from jobs.states import JobState
from storage.db.queries import Filter, Queries
from storage.db.rows import Job

LOOK_BACK = 100
LIKE_TRAINING = (
    *("size", "nz", "ngf", "ndf", "norm_d", "arch"),
    *("d_every", "g_every", "r1_gamma", "r2_gamma", "penalty_every", "precision", "cuda_graphs"),
)
LIKE_LOOKING = ("size", "count", "search", "feature_network")
LIKE_DRAWING = ("size", "nz", "ngf", "arch")


def training_rate(queries: Queries, spec: TrainSpec) -> float | None:
    """Median pictures per second of earlier trainings of the same networks; None if there are none."""
    wanted = spec.to_json()
    earlier = queries.page(Filter(kind="train"), limit=LOOK_BACK)
    return _median([one for one in earlier if _alike(one.spec, wanted, LIKE_TRAINING)])


def generation_rate(queries: Queries, model: Job) -> float | None:
    """Median pictures per second of earlier generations from networks like this one's."""
    specs: dict[int, dict[str, Any]] = {model.id: model.spec}
    alike = []
    for one in queries.page(Filter(kind="generate"), limit=LOOK_BACK):
        source = one.spec.get("source")
        if not isinstance(source, int):
            continue
        if source not in specs:
            try:
                specs[source] = queries.get(source).spec
            except JobNotFoundError:
                continue
        if _alike(specs[source], model.spec, LIKE_DRAWING):
            alike.append(one)
    return _median(alike)


def evaluation_seconds(queries: Queries, spec: EvaluateSpec) -> float | None:
    """Median seconds of earlier evaluations of as many pictures; None if there are none."""
    wanted = spec.to_json()
    earlier = queries.page(Filter(kind="evaluate", states=(JobState.SUCCEEDED,)), limit=LOOK_BACK)
    alike = [one for one in earlier if _alike(one.spec, wanted, LIKE_LOOKING)]
    return _middle([(one.result or {}).get("seconds") for one in alike])


def _alike(one: dict[str, Any], other: dict[str, Any], names: tuple[str, ...]) -> bool:
    # Jobs of ganq 0.1 have no `arch`: it was the tutorial's.
    old = {"arch": "dcgan"}
    return all((one.get(name) or old.get(name)) == (other.get(name) or old.get(name)) for name in names)


def _median(jobs: list[Job]) -> float | None:
    # The result's rate is of the whole work; a short job has ended before a beat carried one.
    return _middle(
        [(one.result or {}).get("images_per_s") or (one.progress or {}).get("rate") for one in jobs]
    )


def _middle(values: list[Any]) -> float | None:
    known = [value for value in values if isinstance(value, int | float) and value > 0]
    return float(median(known)) if known else None
