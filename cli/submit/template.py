"""`--save-as` and `--template` of `ganq submit train`."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from ganq.submission.preflight import ON_SERVER
from ganq.submission.templates import load_template, save_template, template_names
from jobs.errors import NotFoundError, SpecError
from storage.settings import Settings

FIELDS = {"source": "continue_from", "start": "init_from", "held": "hold"}
"""Parameters of the command whose option has another name in files."""
NOT_SAVED = (
    "name",
    "note",
    "submit_key",
    "user",
    "dry_run",
    "wait",
    "as_json",
    "sweep",
    "save_as",
    "template",
)
PATHS = ("data", "init_netg", "init_netd")
TYPED = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)


class TemplateName(click.ParamType[str]):
    """The name of a template, with shell completion."""

    name = "template"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        with suppress(Exception):  # errors would disturb the shell
            known = template_names(Settings.load())
            return [CompletionItem(one) for one in known if one.startswith(incomplete)]
        return []


def use_template(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Make the options of a template the defaults of this command."""
    if value is None or ctx.resilient_parsing:
        return value
    try:
        options = load_template(Settings.load(), value)
    except (NotFoundError, SpecError) as exc:
        raise exc from None
    parameters = {FIELDS.get(one.name or "", one.name or ""): one for one in ctx.command.params}
    ctx.default_map = {}
    for field, given in options.items():
        if field not in parameters:
            raise SpecError(f"template {value}: {field!r} is not an option of this command")
        given = [f"{key}={one}" for key, one in given.items()] if field == "labels" else given
        many = getattr(parameters[field], "multiple", False)
        single = ",".join(map(str, given)) if isinstance(given, list) and not many else given
        ctx.default_map[parameters[field].name] = single
    return value


def save_typed_options(name: str) -> Path:
    """Write the options of this command and of its own template as a template."""
    from jobs.labels import read_label

    ctx = click.get_current_context()
    options: dict[str, Any] = {}
    for parameter in ctx.command.params:
        field = parameter.name or ""
        value = ctx.params.get(field)
        if field in NOT_SAVED or value is None or ctx.get_parameter_source(field) not in TYPED:
            continue
        if field in PATHS and not str(value).startswith(ON_SERVER):
            value = str(Path(value).expanduser().absolute())
        if field == "labels":
            value = dict(map(read_label, value))
        options[FIELDS.get(field, field)] = list(value) if isinstance(value, tuple) else value
    return save_template(Settings.load(), name, options)
