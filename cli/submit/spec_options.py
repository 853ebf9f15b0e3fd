"""
Options made from the fields of a spec, so that the command line and the spec cannot differ.

A field's type, choices and bounds stand in the spec alone; a command brings the words.
A field without words fails at import, and so do words without a field.
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

FORMER_FLAGS = {new: option_of(old) for old, new in FIELDS.items()}
"""Flags of ganq 0.2, by the field that they set now."""


class Once(click.Option):
    """An option that may not be given twice: for a wish that a script cannot mean to replace."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        for flag in (*self.opts, *self.secondary_opts):
            option = parser._long_opt.get(flag) or parser._short_opt.get(flag)
            if option is not None:
                self._refuse_a_second(option, ctx)

    def _refuse_a_second(self, option: Any, ctx: click.Context) -> None:
        take = option.process

        def process(value: Any, state: Any) -> None:
            there, before = self.name in state.opts, state.opts.get(self.name)
            take(value, state)
            if there and (after := state.opts[self.name]) != before:
                raise click.UsageError(f"{self.opts[0]} was given twice: {before} and {after}", ctx)

        option.process = process


def spec_options(
    spec: type[Spec],
    words: Mapping[str, str],
    *,
    own: Iterable[str] = (),
    kinds: Mapping[str, click.ParamType[Any]] | None = None,
    names: Mapping[str, tuple[str, ...]] | None = None,
    once: Iterable[str] = (),
) -> Callable[[F], F]:
    """
    Decorator: each field of a spec as an option; None stands for 'not given'.

    Args:
        words: help for each field, in the order of the help page.
        own: fields for which the command has options of its own.
        kinds: fields whose value a person writes in another form than JSON's.
        names: more names of an option, as others know it.
        once: options of which a second value is an error; of others the last one counts.

    Raises:
        TypeError: a field has no words, or words have no field.
    """
    fields = spec.model_fields
    if odd := set(fields) ^ (set(words) | set(own)):
        raise TypeError(f"{spec.__name__} and its options differ in: {', '.join(sorted(odd))}")

    def decorate(command: F) -> F:
        for name in reversed(list(words)):
            flags = (names or {}).get(name) or (option_of(name),)
            help_text = f"{words[name]} {_default_words(spec, name, fields[name])}".rstrip()
            kind = (kinds or {}).get(name) or option_type(fields[name], name)
            if kind is bool:
                flags, kind = (f"{flags[0]}/--no-{flags[0][2:]}",), None
            attributes: dict[str, Any] = {"cls": Once if name in once else click.Option}
            if name in FORMER_FLAGS:
                attributes = {"cls": RenamedOption, "old": FORMER_FLAGS[name]}
            command = click.option(*flags, name, type=kind, default=None, help=help_text, **attributes)(
                command
            )
        return command

    return decorate


def given_only(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a person has typed."""
    return {name: value for name, value in options.items() if value is not None}


def option_type(field: FieldInfo, name: str) -> Any:
    annotation = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(one for one in get_args(annotation) if one is not type(None))
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return RenamedChoice(get_args(annotation), field=name)
    return annotation


def _default_words(spec: type[Spec], name: str, field: FieldInfo) -> str:
    """What holds if nothing is said: one value, or one for each recipe."""
    if name == "recipe":  # it is what the other defaults depend on; its words name its own
        return ""
    default = spec.of_new.get(name, field.default)
    if field.is_required() or default is None or default == ():
        values = {}
    else:
        values = {"": _shown(default)}
    if spec.kind == "train":
        by_recipe = {
            one.name: _shown(one.defaults.get(name, default))
            for one in RECIPES.values()
            if any(name in other.defaults for other in RECIPES.values())
        }
        values = by_recipe or values
    if not values:
        return ""
    if len(set(values.values())) == 1:
        return f"[default: {next(iter(values.values()))}]"
    return "[default: " + ", ".join(f"{value} ({recipe})" for recipe, value in values.items()) + "]"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
