"""`ganq doctor`: diagnose the installation."""

from collections import Counter
from typing import TYPE_CHECKING

import click

from cli.ui import output
from cli.ui.lazy import examples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from storage.settings import Settings
    from worker.doctor.check import Finding

INDENT = 16
COLOURS = {"ok": "green", "warn": "yellow", "error": "red"}
ALWAYS_SHOWN = ("home", "volume", "database_url", "redis_url", "data", "user", "queues")
"""Settings that are shown even if they have their defaults."""
SETTINGS_TIMEOUT_S = 5.0
SERVER_TIMEOUT_S = 20.0
MIN_SECRET_LENGTH = 6
"""Shorter passwords are not masked, because they would match parts of words."""


@click.command(epilog=examples("ganq doctor", "ganq doctor --json", "ganq doctor --verify-data"))
@click.option("--verify-data", is_flag=True, help="Also verify the checksums of all decoded data sets.")
@output.json_option
def doctor(verify_data: bool, as_json: bool) -> int:
    """
    Check the installation and suggest fixes.

    Checks settings, job table, workers, blocked jobs, Redis, volume, GPUs and torch, each
    with a timeout. Changes nothing. Exit code 1 if there is an error; warnings do not count.
    With GANQ_API_URL it checks that server and the token instead.
    """
    from jobs.errors import GanqError
    from storage.settings import Settings
    from worker.doctor.check import error, within

    try:
        settings = within(SETTINGS_TIMEOUT_S, Settings.load)
    except GanqError as exc:
        return _report(None, [error("settings", exc.message, exc.hint)], as_json)
    except TimeoutError:
        hint = "GANQ_CONFIG, GANQ_DATABASE_URL_FILE and GANQ_REDIS_URL_FILE must be regular files"
        return _report(None, [error("settings", "a settings file cannot be read completely", hint)], as_json)
    if settings.api_url:
        return _report(settings, _check_server(settings), as_json)
    import ganq_entry
    from worker.doctor.examine import examine

    return _report(settings, examine(settings, ganq_entry.left_out, verify_data=verify_data), as_json)


def _check_server(settings: "Settings") -> "Iterable[Finding]":
    """Check that the server of GANQ_API_URL answers and knows the token."""
    from cli.session import open_session
    from jobs.errors import GanqError
    from worker.doctor.check import as_finding, error, ok, within

    try:
        workers = within(SERVER_TIMEOUT_S, lambda: open_session(settings=settings).queries.workers())
    except GanqError as exc:
        yield as_finding("server", exc)
    except TimeoutError as exc:
        yield error("server", f"{settings.api_url}: {exc}", hint="check GANQ_API_URL and the network")
    else:
        shown = output.count(len(workers), "worker")
        yield ok("server", f"{settings.api_url} answers and accepts the token; it has {shown}")
    yield ok("local", "this machine is not checked, because commands use the server; unset GANQ_API_URL")


def _report(settings: "Settings | None", findings: "Iterable[Finding]", as_json: bool) -> int:
    mask = _masker(settings)
    if settings is not None and not as_json:
        _print_settings(settings)
    report = []
    for finding in findings:
        level, message = str(finding.level), mask(finding.message)
        hint = None if finding.hint is None else mask(finding.hint)
        former = {"verdict": "bad" if level == "error" else level, "said": message}  # keys of ganq 0.2
        report.append({"check": finding.check, "level": level, "message": message, "hint": hint, **former})
        if not as_json:
            _print_finding(finding.check, level, message, hint)
    counts = Counter(entry["level"] for entry in report)
    if as_json:
        shown = settings.redacted() if settings is not None else None
        output.print_json({"ok": not counts["error"], "settings": shown, "findings": report})
    else:
        warnings, errors = output.count(counts["warn"], "warning"), output.count(counts["error"], "error")
        click.echo(f"\n{counts['ok']} ok, {warnings}, {errors}")
    return 1 if counts["error"] else 0


def _masker(settings: "Settings | None") -> "Callable[[str], str]":
    """Return a function that masks passwords: in URLs, and those of this installation anywhere."""
    from urllib.parse import unquote, urlsplit

    known = set()
    for url in (settings.database_url, settings.redis_url) if settings is not None else ():
        given = urlsplit(url).password
        known |= {given, unquote(given)} if given else set()
    secrets = sorted((secret for secret in known if len(secret) >= MIN_SECRET_LENGTH), key=len, reverse=True)

    def mask(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, "***")
        return output.clean(text)

    return mask


def _print_settings(settings: "Settings") -> None:
    from dataclasses import MISSING, fields

    values = settings.redacted()
    for f in fields(settings):
        changed = f.default is not MISSING and values[f.name] != f.default
        if values[f.name] is not None and (f.name in ALWAYS_SHOWN or changed):
            click.echo(f"{f.name:<20}{output.clean(values[f.name])}")
    click.echo()


def _print_finding(check: str, level: str, message: str, hint: str | None) -> None:
    text = click.style(f"{level:<6}", fg=COLOURS[level])
    click.echo(f"{text}{check:<10}{_wrapped(message, INDENT)}")
    if hint is not None:
        click.echo(f"{'':<{INDENT}}→ {_wrapped(hint, INDENT + 2)}")


def _wrapped(text: str, indent: int) -> str:
    """Wrap between words on a terminal, never within one, so that commands and paths can be copied."""
    if not output.on_terminal():
        return text
    import shutil
    import textwrap

    room = max(shutil.get_terminal_size().columns - indent, 20)
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return f"\n{'':<{indent}}".join(lines)
