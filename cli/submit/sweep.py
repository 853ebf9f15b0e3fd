"""
Parse `--sweep FIELD=VALUES`: one job for each combination of the values.

    --sweep lr-g=1e-4,2e-4 --sweep seed=0-1     4 jobs, named base-lr-g-0.0001-seed-0 …
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.ui import output
from jobs.errors import SpecError
from jobs.renamed import FIELDS

if TYPE_CHECKING:
    from jobs.specs import Spec

MAX_JOBS = 10_000  # storage.db.store.sweeps.MOST_IN_A_SWEEP; --dry-run does not import it
MAX_NAME = 64
RANGE = re.compile(r"([0-9]{1,12})-([0-9]{1,12})")


def combinations(
    spec: "type[Spec]", texts: Sequence[str], given: Mapping[str, Any], *, never: Sequence[str]
) -> list[dict[str, Any]]:
    """
    Return the swept fields of each job; the last field changes fastest.

    Args:
        texts: 'FIELD=VALUES' as typed.
        given: fields that were given as options.
        never: fields that cannot be swept.

    Raises:
        SpecError: an unknown field, an invalid value, a field given twice, or too many jobs.
    """
    if not texts:
        return [{}]
    axes: dict[str, list[Sequence[str]]] = {}
    for text in texts:
        option, equals, values = text.partition("=")
        name = _field_name(option.strip().lstrip("-"), spec)
        if not equals or not values.strip():
            raise SpecError(f"--sweep {text[:60]!r} has no values", hint="e.g. --sweep lr-g=1e-4,2e-4")
        if name in never:
            raise SpecError(
                f"--sweep {option[:40]!r} cannot be swept", hint=f"ganq submit {spec.kind} --help"
            )
        if name not in spec.model_fields:
            fields = [_option(field)[2:] for field in spec.model_fields if field not in never]
            unknown = click.exceptions.NoSuchOption(
                name.replace("_", "-"), f"--sweep {option[:40]!r}: there is no such field.", fields
            )
            raise SpecError(unknown.format_message(), hint=f"ganq submit {spec.kind} --help")
        if name in axes or name in given:
            where = "as an option and in --sweep" if name in given else "in two --sweep options"
            raise SpecError(f"{_option(name)} is given {where}", hint="use only one of them")
        axes[name] = [_expand(part.strip()) for part in values.split(",")]
    number = math.prod(sum(map(len, values)) for values in axes.values())
    if number > MAX_JOBS:
        raise SpecError(
            f"this sweep has {number:,} jobs; the maximum is {MAX_JOBS:,}",
            hint="use fewer values, or submit several sweeps",
        )
    typed = [
        [(name, _convert(spec, name, text)) for part in values for text in part]
        for name, values in axes.items()
    ]
    for name, axis in zip(axes, typed, strict=True):
        if len({str(value) for _, value in axis}) < len(axis):
            raise SpecError(f"--sweep {_option(name)[2:]} repeats a value", hint="give each value once")
    return [dict(combination) for combination in itertools.product(*typed)]


def describe(changes: Sequence[Mapping[str, Any]]) -> str:
    """Return e.g. '20 jobs: lr-g (2 values) × seed (10 values)', for --dry-run."""
    axes = {name: len({str(change[name]) for change in changes}) for name in changes[0]}
    shown = " × ".join(f"{_option(name)[2:]} ({output.count(n, 'value')})" for name, n in axes.items())
    return f"{output.count(len(changes), 'job')}: {shown}"


def job_names(base: str, changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name for each job that contains its values: 'rates-lr-g-0.0001-seed-3'."""
    names = ["-".join([base, *(_name_part(*item) for item in change.items())]) for change in changes]
    if len(set(names)) < len(names) or max(map(len, names)) > MAX_NAME:
        return [f"{base}-{index}" for index in range(len(changes))]
    return names


def _name_part(field: str, value: Any) -> str:
    if isinstance(value, bool):
        return ("" if value else "no-") + _option(field)[2:]
    return f"{_option(field)[2:]}-{re.sub(r'[^A-Za-z0-9._-]', '_', str(value))}"


def _expand(part: str) -> Sequence[str]:
    """Return the values of '0-9' without creating them, or the text itself."""
    found = RANGE.fullmatch(part)
    if found is None:
        return (part,)
    low, high = int(found[1]), int(found[2])
    if high < low:
        raise SpecError(f"--sweep: the range {part} is descending", hint=f"e.g. {high}-{low}")
    return _NumberTexts(range(low, high + 1))


class _NumberTexts(Sequence[str]):
    """The numbers of a range as text."""

    def __init__(self, numbers: range) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return str(self.numbers[index])


def _convert(spec: "type[Spec]", name: str, text: str) -> Any:
    from cli.submit.spec_options import option_type
    from cli.ui.params import RenamedChoice
    from jobs.recipes import RECIPES

    kind = (
        RenamedChoice(RECIPES, field=name) if name == "recipe" else option_type(spec.model_fields[name], name)
    )
    try:
        return click.types.convert_type(kind).convert(text, None, None)
    except click.BadParameter as exc:
        raise SpecError(
            f"--sweep {_option(name)[2:]}: {exc.message.rstrip('.')}", hint="separate values with commas"
        ) from None


def _field_name(option: str, spec: "type[Spec]") -> str:
    """Return the field that an option sets, also by its former name."""
    fields = {_option(name)[2:]: name for name in spec.model_fields}
    name = fields.get(option, option.replace("-", "_"))
    return FIELDS.get(name, name)


def _option(name: str) -> str:
    from jobs.specs import option_of

    return option_of(name)
