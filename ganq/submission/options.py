"""Options of jobs as keyword arguments and keys of job files: their names, and values in several forms."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from jobs.errors import SpecError
from jobs.kinds import kind_named
from jobs.renamed import FIELDS

if TYPE_CHECKING:
    from jobs.specs import Spec

ALIASES = {"class": "class_name", "num_workers": "loader_workers"}
"""Options whose name is not that of their field."""
SOURCES: dict[str, tuple[str, ...]] = {
    "train": ("continue_from", "init_from"),
    "generate": ("source", "now"),
    "evaluate": ("subject",),
}
"""Options that name another job, or how to use it; beside the fields of the spec."""
SOURCE_ALIASES = {"train": {"continue": "continue_from"}, "generate": {"from": "source"}, "evaluate": {}}
INTERNAL = ("draws", "layout")
"""Fields that no option sets."""
NEVER_SWEPT = (
    *("data", "init_netg", "init_netd", "feature_network", "feature_sha256", "source", "path", "out"),
    *("continue_from", "init_from", "subject", "now", "seeds", "interpolate", "augment", "progressive"),
    "reader",
)
TEXTS = ("data", "path", "out", "init_netg", "init_netd", "feature_network", "feature_sha256")
"""Options that are read before their spec is validated."""
RANGE = re.compile(r"([0-9]{1,12})(?:-([0-9]{1,12}))?")


def spec_class(kind: str) -> "type[Spec]":
    """
    Return the spec of a kind that can be submitted.

    Raises:
        SpecError: there is no such kind.
    """
    if kind not in SOURCES:
        raise SpecError(
            f"jobs of kind {kind[:40]!r} cannot be submitted", hint=f"kinds: {', '.join(SOURCES)}"
        )
    return kind_named(kind).spec_class()


def known_names(kind: str) -> list[str]:
    """Return the names of all options of a kind that are not those of every job."""
    fields = [name for name in spec_class(kind).model_fields if name not in INTERNAL]
    return [*dict.fromkeys([*SOURCES[kind], *fields])]


def field_name(kind: str, name: str) -> str:
    """Return the field that an option sets: `lr-g` and `lr_g` are the same."""
    plain = name.replace("-", "_")
    plain = ALIASES.get(plain, SOURCE_ALIASES[kind].get(plain, plain))
    return FIELDS.get(plain, plain)


def read_options(kind: str, options: Mapping[str, Any], also: Sequence[str] = ()) -> dict[str, Any]:
    """
    Return options by field; those that are None are left out.

    Args:
        also: names for the suggestion that are not fields.

    Raises:
        SpecError: there is no such option, or one is given twice.
    """
    known = known_names(kind)
    found: dict[str, Any] = {}
    for name, value in options.items():
        field = field_name(kind, name)
        if field not in known:
            raise unknown_option(f"{kind} has no option {name[:40]!r}", field, [*known, *also])
        if field in found:
            raise SpecError(f"{name!r} is given twice", hint=f"it is the same as {field!r}")
        if value is not None:
            found[field] = read_value(field, value)
    return found


def unknown_option(message: str, name: str, known: Iterable[str]) -> SpecError:
    """Return the error of an unknown name, with the nearest that exist."""
    near = get_close_matches(name, [*known], n=3)
    return SpecError(message, hint=f"did you mean {' or '.join(near)}?" if near else None)


def read_axes(kind: str, over: Mapping[str, Iterable[Any]], given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """
    Return the values of each field of a sweep.

    Args:
        given: options of all jobs.

    Raises:
        SpecError: an option is unknown, cannot be swept, or is given twice.
    """
    axes: dict[str, list[Any]] = {}
    if not over:
        raise SpecError("the sweep has no options", hint="e.g. seed = [0, 1, 2]")
    for name, values in over.items():
        field = field_name(kind, name)
        if field not in known_names(kind):
            raise unknown_option(f"{kind} has no option {name[:40]!r}", field, known_names(kind))
        if field in NEVER_SWEPT:
            raise SpecError(f"{name!r} cannot be swept")
        if field in given or field in axes:
            raise SpecError(f"{name!r} is given as an option and in the sweep", hint="use only one of them")
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise SpecError(f"the sweep of {name!r} needs a list of values", hint="e.g. seed = [0, 1, 2]")
        axes[field] = [read_value(field, value) for value in values]
    return axes


def read_value(field: str, value: Any) -> Any:
    """
    Return the value of a field from one of its forms.

    Raises:
        SpecError: it is none of them.
    """
    if isinstance(value, PathLike):
        return fspath(value)
    if field in TEXTS and not isinstance(value, str):
        raise SpecError(f"{field}: {str(value)[:60]!r} is not text")
    if field == "checkpoint":
        return str(value)
    if field == "seeds":
        return _ranges(value)
    if field == "interpolate" and isinstance(value, str):
        return tuple(first for first, _ in _ranges(value))
    if field == "augment":
        if not isinstance(value, str | list | tuple):
            raise SpecError(
                f"augment: {str(value)[:60]!r} is not a list", hint="e.g. ['translation', 'color']"
            )
        parts = value.split(",") if isinstance(value, str) else list(value)
        chosen = [str(part).strip() for part in parts]
        return () if chosen == ["none"] else tuple(dict.fromkeys(chosen))
    return value


def parse_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """
    Return '0,4-6' as ((0, 0), (4, 6)).

    Raises:
        ValueError: it is no list of image indices.
    """
    ranges = []
    for part in text.split(","):
        found = RANGE.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"{part[:40]!r} is not an image index or range; e.g. 0,4-6")
        ranges.append((int(found[1]), int(found[2] or found[1])))
    return tuple(ranges)


def _ranges(value: Any) -> tuple[tuple[int, int], ...]:
    """Return image indices as ranges: from '0,4-6', a range, or a list of numbers and pairs."""
    try:
        if isinstance(value, str):
            return parse_ranges(value)
        if isinstance(value, range) and value.step == 1 and len(value):
            return ((value[0], value[-1]),)
        pairs = [(one, one) if isinstance(one, int) else tuple(one) for one in value]
        return tuple((int(first), int(last)) for first, last in pairs)
    except (TypeError, ValueError) as exc:
        raise SpecError(f"seeds: {exc}", hint="e.g. '0,4-6', or [0, [4, 6]]") from None
