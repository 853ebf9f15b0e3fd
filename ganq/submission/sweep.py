"""The jobs of a sweep: one for each combination of values, and their names."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jobs.errors import SpecError
from jobs.specs import option_of

MAX_JOBS = 10_000  # storage.db.store.sweeps.MAX_SWEEP_JOBS; --dry-run does not import it
MAX_NAME = 64


def require_size(axes: Iterable[Sequence[Sequence[str]]]) -> None:
    """
    Check the number of jobs before their values are created.

    Args:
        axes: parts of the values of each field: a part is one value, or a range.

    Raises:
        SpecError: too many jobs.
    """
    _require_number(math.prod(sum(map(len, parts)) for parts in axes))


def product(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """
    Return the swept fields of each job; the last field changes fastest.

    Args:
        axes: values of each field.

    Raises:
        SpecError: no values, a value twice, or too many jobs.
    """
    _require_number(math.prod(map(len, axes.values())))
    for name, values in axes.items():
        if not len(values):
            raise SpecError(f"the sweep of {name} has no values", hint="give one value or more")
        if len({str(value) for value in values}) < len(values):
            raise SpecError(f"--sweep {option_of(name)[2:]} repeats a value", hint="give each value once")
    return [dict(zip(axes, combination, strict=True)) for combination in itertools.product(*axes.values())]


def _require_number(number: int) -> None:
    if number > MAX_JOBS:
        raise SpecError(
            f"this sweep has {number:,} jobs; the maximum is {MAX_JOBS:,}",
            hint="use fewer values, or submit several sweeps",
        )


def job_names(base: str, changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name for each job that contains its values: 'rates-lr-g-0.0001-seed-3'."""
    names = ["-".join([base, *(_name_part(*item) for item in change.items())]) for change in changes]
    if len(set(names)) < len(names) or max(map(len, names)) > MAX_NAME:
        return [f"{base}-{index}" for index in range(len(changes))]
    return names


def _name_part(field: str, value: Any) -> str:
    if isinstance(value, bool):
        return ("" if value else "no-") + option_of(field)[2:]
    return f"{option_of(field)[2:]}-{re.sub(r'[^A-Za-z0-9._-]', '_', str(value))}"
