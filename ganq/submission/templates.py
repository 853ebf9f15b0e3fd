"""
Templates: options of a training under a name, in <GANQ_HOME>/templates/NAME.toml.

A template is a job file with one job, so that `ganq submit -f` accepts it, too.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ganq.submission.describe import render
from ganq.submission.options import field_name, known_names, unknown_option
from ganq.submission.requests import JOB_OPTIONS
from jobs.errors import NotFoundError, SpecError
from jobs.specs import check_name
from storage.settings import Settings

KIND = "train"


def template_path(settings: Settings, name: str) -> Path:
    """
    Return the file of a template, which need not exist.

    Raises:
        SpecError: the name is not valid.
    """
    return settings.home / "templates" / f"{check_name(name)}.toml"


def template_names(settings: Settings) -> list[str]:
    """Return the names of all templates."""
    return sorted(path.stem for path in (settings.home / "templates").glob("*.toml"))


def save_template(settings: Settings, name: str, options: Mapping[str, Any]) -> Path:
    """
    Write a template; one of this name is replaced.

    Args:
        options: of client.train(), by field.

    Raises:
        SpecError: the name is not valid.
        StorageError: it cannot be written.
    """
    from storage.volume.durable import raise_storage_error, write_bytes

    path = template_path(settings, name)
    text = render(KIND, options, "toml", [f"template {name} of ganq submit train"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode())
    except OSError as exc:
        raise_storage_error(exc, path)
    return path


def load_template(settings: Settings, name: str) -> dict[str, Any]:
    """
    Return the options of a template, by field.

    Raises:
        NotFoundError: there is no such template; the hint lists those that exist.
        SpecError: the file is not valid.
    """
    path = template_path(settings, name)
    try:
        jobs = tomllib.loads(path.read_text(encoding="utf-8")).get("job")
    except FileNotFoundError:
        known = ", ".join(template_names(settings)) or "none; ganq submit train --save-as NAME writes one"
        raise NotFoundError(f"there is no template {name}", hint=f"templates: {known}") from None
    except (OSError, ValueError) as exc:
        raise SpecError(f"the template {path} cannot be read: {exc}") from None
    if not isinstance(jobs, list) or len(jobs) != 1 or jobs[0].get("kind") != KIND:
        raise SpecError(f"the template {path} does not have one [[job]] of kind {KIND}")
    known_fields = {*known_names(KIND), *JOB_OPTIONS}
    options = {field_name(KIND, key): value for key, value in jobs[0].items() if key != "kind"}
    for field in options:
        if field not in known_fields:
            raise unknown_option(f"the template {path} has an unknown option {field!r}", field, known_fields)
    return options
