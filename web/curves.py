"""The metrics of a run as columns."""

from typing import Any

from storage.db.rows import Job
from storage.results.attempts import Metrics
from storage.volume.layout import Volume
from web.site import Site

MAX_POINTS = 4000
ABOUT = ("step", "epoch", "images", "key", "note")
"""Keys of a line that are not curves."""


def metrics_of(site: Site, job: Job) -> Metrics:
    found: Metrics = site.indexes.get_or_make(("metrics", job.id), Metrics, lambda _: 1 << 20)
    return found


def columns(volume: Volume, job: Job, metrics: Metrics, points: int = MAX_POINTS) -> dict[str, Any]:
    """
    Return a run's curves: x by epoch, images and hours, and a column for each value.

    Args:
        points: at most so many; more lines are averaged in groups.
    """
    training, measured = metrics.read(volume, job.id, job.attempt)
    per_epoch = images_per_epoch(job, training)
    hours: list[float] = []
    before, spent = 0.0, 0.0
    for line in training:
        images, rate = _number(line.get("images")) or 0.0, _number(line.get("images_per_s"))
        spent += max(images - before, 0) / rate if rate else 0.0
        before = images
        hours.append(spent / 3600)
    x: dict[str, list[Any]] = {
        "images": [_number(line.get("images")) for line in training],
        "epoch": [
            seen / per_epoch if per_epoch and (seen := _number(line.get("images"))) else line.get("epoch")
            for line in training
        ],
        "hours": hours,
    }
    names = dict.fromkeys(name for line in training for name in line if name not in ABOUT)
    series = {name: [_number(line.get(name)) for line in training] for name in names}
    group = -(-len(training) // max(1, min(points, MAX_POINTS))) or 1
    return {
        "x": {name: _grouped(column, group) for name, column in x.items()},
        "series": {
            name: _grouped(column, group)
            for name, column in series.items()
            if any(one is not None for one in column)
        },
        "evaluations": [
            {
                "epoch": line.get("epoch"),
                "step": line["step"],
                "value": _number(line.get("metric")),
                "diversity": _number(line.get("variety", line.get("diversity"))),
                "key": str(line.get("key", "metric"))[:80],
                "baseline": _number(line.get("floor", line.get("baseline"))),
            }
            for line in measured
        ],
        "images_per_epoch": per_epoch,
        "lines": len(training),
    }


def images_per_epoch(job: Job, training: list[dict[str, Any]]) -> float | None:
    """Return the images of an epoch, from the job's progress, else from the last line; None if unknown."""
    progress = job.progress or {}
    total, epochs = _number(progress.get("total")), _number(progress.get("epochs"))
    if total and epochs:
        return total / epochs
    for line in reversed(training):
        epoch, images = _number(line.get("epoch")), _number(line.get("images"))
        if epoch and images:
            return images / epoch
    return None


def _grouped(column: list[Any], group: int) -> list[Any]:
    if group == 1:
        return column
    found = []
    for start in range(0, len(column), group):
        some = [one for one in column[start : start + group] if one is not None]
        found.append(sum(some) / len(some) if some else None)
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if value - value == 0 else None
