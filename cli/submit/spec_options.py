"""
Create the options of a command from the fields of a spec, so that they cannot differ.

Types, choices and bounds are defined in the spec; the command adds the help texts. A field
without a help text fails at import, and so does a help text without a field.
"""

import types
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from cli.ui.params import RenamedChoice, RenamedOption
from jobs.recipes import RECIPES
from jobs.renamed import FIELDS
from jobs.specs import Spec, option_of

F = TypeVar("F", bound=Callable[..., Any])

RENAMED_FLAGS = {new: option_of(old) for old, new in FIELDS.items()}
"""Flags of ganq 0.2, by the field that they set now."""


class NotRepeatable(click.Option):
    """An option that is an error if given twice with different values."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        for flag in (*self.opts, *self.secondary_opts):
            option = parser._long_opt.get(flag) or parser._short_opt.get(flag)
            if option is not None:
                self._refuse_second(option, ctx)

    def _refuse_second(self, option: Any, ctx: click.Context) -> None:
        process_once = option.process

        def process(value: Any, state: Any) -> None:
            present, before = self.name in state.opts, state.opts.get(self.name)
            process_once(value, state)
            if present and (after := state.opts[self.name]) != before:
                raise click.UsageError(f"{self.opts[0]} was given twice: {before} and {after}", ctx)

        option.process = process


def spec_options(
    spec: type[Spec],
    help_texts: Mapping[str, str],
    *,
    excluded: Iterable[str] = (),
    types: Mapping[str, click.ParamType[Any]] | None = None,
    flags: Mapping[str, tuple[str, ...]] | None = None,
    not_repeatable: Iterable[str] = (),
) -> Callable[[F], F]:
    """
    Add each field of a spec as an option; None means 'not given'.

    Args:
        help_texts: of each field, in the order of the help page.
        excluded: fields without an option.
        types: option types that differ from the field's type.
        flags: flags of options that have several.
        not_repeatable: options that must not be given twice; of others the last value counts.

    Raises:
        TypeError: a field has no help text, or a help text has no field.
    """
    fields = spec.model_fields
    if odd := set(fields) ^ (set(help_texts) | set(excluded)):
        raise TypeError(f"{spec.__name__} and its options differ: {', '.join(sorted(odd))}")

    def decorate(command: F) -> F:
        for name in reversed(list(help_texts)):
            names = (flags or {}).get(name) or (option_of(name),)
            help_text = f"{help_texts[name]} {_default_text(spec, name, fields[name])}".rstrip()
            kind = (types or {}).get(name) or option_type(fields[name], name)
            if kind is bool:
                names, kind = (f"{names[0]}/--no-{names[0][2:]}",), None
            attributes: dict[str, Any] = {"cls": NotRepeatable if name in not_repeatable else click.Option}
            if name in RENAMED_FLAGS:
                attributes = {"cls": RenamedOption, "old": RENAMED_FLAGS[name]}
            command = click.option(*names, name, type=kind, default=None, help=help_text, **attributes)(
                command
            )
        return command

    return decorate


def given_only(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were typed."""
    return {name: value for name, value in options.items() if value is not None}


def option_type(field: FieldInfo, name: str) -> Any:
    """Return the click type of a field."""
    annotation = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return RenamedChoice(get_args(annotation), field=name)
    return annotation


def _default_text(spec: type[Spec], name: str, field: FieldInfo) -> str:
    """Return the default of an option: one value, or one for each recipe, and those at one size."""
    if name == "recipe":  # its help text contains the default
        return ""
    default = spec.of_new.get(name, field.default)
    if field.is_required() or default is None or default == ():
        values = {}
    else:
        values = {"": _format_default(default)}
    if spec.kind == "train":
        by_recipe = {
            recipe.name: _format_default(recipe.defaults.get(name, default))
            for recipe in RECIPES.values()
            if any(name in other.defaults for other in RECIPES.values())
        }
        values = by_recipe or values
    if not values:
        return ""
    shown = [f"{value} ({recipe})" for recipe, value in values.items()]
    if len(set(values.values())) == 1:
        shown = [next(iter(values.values()))]
    if spec.kind == "train":
        shown += [
            f"{_format_default(at_size[name])} at {size} pixels ({recipe.name})"
            for recipe in RECIPES.values()
            for size, at_size in recipe.by_size.items()
            if name in at_size
        ]
    return f"[default: {', '.join(shown)}]"


def _format_default(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
