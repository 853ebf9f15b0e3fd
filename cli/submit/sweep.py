"""
Parse `--sweep FIELD=VALUES`: one job for each combination of the values.

    --sweep lr-g=1e-4,2e-4 --sweep seed=0-1     4 jobs, named base-lr-g-0.0001-seed-0 …
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.ui import output
from ganq.submission.sweep import product, require_size
from jobs.errors import SpecError
from jobs.renamed import FIELDS

if TYPE_CHECKING:
    from jobs.specs import Spec

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
    require_size(axes.values())
    typed = {
        name: [_convert(spec, name, text) for part in values for text in part]
        for name, values in axes.items()
    }
    return product(typed)


def describe(changes: Sequence[Mapping[str, Any]]) -> str:
    """Return e.g. '20 jobs: lr-g (2 values) × seed (10 values)', for --dry-run."""
    axes = {name: len({str(change[name]) for change in changes}) for name in changes[0]}
    shown = " × ".join(f"{_option(name)[2:]} ({output.count(n, 'value')})" for name, n in axes.items())
    return f"{output.count(len(changes), 'job')}: {shown}"


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
