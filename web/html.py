"""Responses: facts as HTML by a template, as the live part of a page, or as JSON."""

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response

from storage.db.tokens import Role
from storage.status import units
from storage.version import version
from web.principals import Principal
from web.site import Site

WEB_FOLDER = Path(__file__).parent
FRAGMENT = "x-ganq-fragment"
MAX_TEXT = 2000
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
Facts = dict[str, Any]


def cut(value: Any, most: int = MAX_TEXT) -> str:
    """Return foreign text for display: without control characters and escape sequences, shortened."""
    said = units.clean(_ANSI.sub("", str(value)[: 4 * most])) if value is not None else ""
    return said if len(said) <= most else f"{said[:most]}… ({len(str(value)):,} characters)"


def number(value: Any) -> str:
    """Return a count with separators, or a measure with four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if isinstance(value, int) or (abs(value) >= 1000 and value == int(value)):
        return f"{int(value):,}"
    return f"{value:.4g}"


def moment(at: float | None) -> Markup:
    """Return a <time> in UTC, which the browser shows in its reader's zone."""
    if at is None:
        return Markup("")
    utc = datetime.fromtimestamp(at, UTC)
    return Markup('<time datetime="{}">{} UTC</time>').format(
        utc.isoformat(timespec="seconds"), utc.strftime("%Y-%m-%d %H:%M")
    )


def option(value: Any) -> str:
    """Return the value of a parameter as its option takes it: yes and no, lists with commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and not any(isinstance(one, list | dict) for one in value):
        return cut(", ".join(map(str, value)), 300)
    return cut(value, 300)


@cache
def _static_version() -> str:
    """Return a version of the static files for their addresses, so that browsers cache them for good."""
    newest = max(path.stat().st_mtime_ns for path in (WEB_FOLDER / "static").rglob("*"))
    return f"{version()}-{newest // 1_000_000:x}"


@cache
def environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(WEB_FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    env.filters |= {
        "cut": cut,
        "number": number,
        "moment": moment,
        "duration": units.duration,
        "roughly": units.roughly,
        "size": units.size,
        "json": lambda value: json.dumps(value, default=str),
        "pretty": lambda value: json.dumps(value, indent=2, default=str),
    }
    env.globals |= {
        "static": lambda name: f"/static/{_static_version()}/{name}",
        "count": units.count,
        "version": version(),
    }
    return env


def render(template: str, **values: Any) -> bytes:
    return environment().get_template(template).render(**values).encode()


def wants_json(request: Request) -> bool:
    if (asked := request.query_params.get("format")) is not None:
        return asked == "json"
    accepted = request.headers.get("accept", "")
    return "application/json" in accepted and "text/html" not in accepted


def as_json(value: Any) -> bytes:
    """Encode facts; what JSON lacks (NaN, infinities) becomes null, so that every parser reads it."""
    return json.dumps(_finite(value), default=str, allow_nan=False, separators=(",", ":")).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def json_answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(as_json(value), status, dict(headers or {}), media_type="application/json")


def answer(
    request: Request,
    template: str,
    facts: Callable[[], Facts],
    *,
    shown: Callable[[Facts], Facts] = lambda facts: {},
) -> Response:
    """
    Answer with a page, with its live part alone, or with its facts as JSON.

    Args:
        facts: what the page says, as JSON has it; asked once for each revision of the job table.
        shown: further values for the template.
    """
    site: Site = request.app.state.site
    principal: Principal = request.scope["ganq_principal"]
    user = principal.user if principal.named else None
    may_change = site.allow_changes and principal.role.includes(Role.SUBMITTER)
    kind = "json" if wants_json(request) else "part" if FRAGMENT in request.headers else "page"
    revision = site.revision()
    tag = f'W/"{revision}-{kind}"'
    headers = {"ETag": tag, "Vary": f"Accept, {FRAGMENT}, Cookie, Authorization"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    url = f"{request.url.path}?{request.url.query}"

    def make() -> bytes:
        found = facts()
        if kind == "json":
            return as_json(found)
        return render(
            template,
            **{**found, **shown(found)},
            request=request,
            site=site,
            revision=revision,
            part=kind == "part",
            user=user,
            may_change=may_change,
            change_token=request.app.state.access.change_token if may_change else "",
        )

    body = site.answers.get((url, kind, user, may_change), revision, make)
    return Response(body, headers=headers, media_type="application/json" if kind == "json" else "text/html")
