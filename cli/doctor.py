"""`ganq doctor`: what is wrong with the set-up, and what to do about it."""

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
SHOWN = ("home", "volume", "database_url", "redis_url", "data", "user", "queues")
"""Settings that are always shown; the others only where they differ from their defaults."""
SETTINGS_S = 5.0
SHORTEST_SECRET = 6
"""A password that is shorter would be masked in the middle of words."""


@click.command(epilog=examples("ganq doctor", "ganq doctor --json", "ganq doctor --verify-data"))
@click.option(
    "--verify-data", is_flag=True, help="Read all decoded data sets and compare them with their checksums."
)
@output.json_option
def doctor(verify_data: bool, as_json: bool) -> int:
    """
    Look at all that ganq stands on, and say what to do about what is wrong.

    Settings and their files, job table, workers, jobs that cannot move, Redis, volume
    and what lies on it, GPUs, torch. Changes nothing, and waits for nothing for long.
    Exit code 1 if there is an error; warnings do not count.
    """
    from jobs.errors import GanqError
    from storage.settings import Settings
    from worker.doctor.check import error, within

    try:
        settings = within(SETTINGS_S, Settings.load)
    except GanqError as exc:
        return _report(None, [error("settings", exc.message, exc.hint)], as_json)
    except TimeoutError:
        hint = "GANQ_CONFIG, GANQ_DATABASE_URL_FILE and GANQ_REDIS_URL_FILE must name plain files"
        return _report(
            None, [error("settings", "a file of the settings cannot be read to its end", hint)], as_json
        )
    import ganq_entry
    from worker.doctor.examine import examine

    return _report(settings, examine(settings, ganq_entry.left_out, verify_data=verify_data), as_json)


def _report(settings: "Settings | None", findings: "Iterable[Finding]", as_json: bool) -> int:
    masked = _masker(settings)
    if settings is not None and not as_json:
        _show_settings(settings)
    reported = []
    for one in findings:
        level, message = str(one.level), masked(one.message)
        hint = None if one.hint is None else masked(one.hint)
        # The keys of 0.2, which 0.4 drops.
        old = {"verdict": "bad" if level == "error" else level, "said": message}
        reported.append({"check": one.check, "level": level, "message": message, "hint": hint, **old})
        if not as_json:
            _show(one.check, level, message, hint)
    counts = {level: sum(one["level"] == level for one in reported) for level in COLOURS}
    if as_json:
        shown = settings.redacted() if settings is not None else None
        output.print_json({"ok": not counts["error"], "settings": shown, "findings": reported})
    else:
        summary = [output.count(counts["warn"], "warning"), output.count(counts["error"], "error")]
        click.echo(f"\n{counts['ok']} ok, {', '.join(summary)}")
    return 1 if counts["error"] else 0


def _masker(settings: "Settings | None") -> "Callable[[str], str]":
    """Cleans a text of passwords in URLs, and of this set-up's own wherever a server repeats them."""
    from urllib.parse import unquote, urlsplit

    known = set()
    for url in (settings.database_url, settings.redis_url) if settings is not None else ():
        given = urlsplit(url).password
        known |= {given, unquote(given)} if given else set()
    secrets = sorted((one for one in known if len(one) >= SHORTEST_SECRET), key=len, reverse=True)

    def mask(text: str) -> str:
        for one in secrets:
            text = text.replace(one, "***")
        return output.clean(text)

    return mask


def _show_settings(settings: "Settings") -> None:
    from dataclasses import MISSING, fields

    values = settings.redacted()
    for f in fields(settings):
        changed = f.default is not MISSING and values[f.name] != f.default
        if values[f.name] is not None and (f.name in SHOWN or changed):
            click.echo(f"{f.name:<20}{output.clean(values[f.name])}")
    click.echo()


def _show(check: str, level: str, message: str, hint: str | None) -> None:
    word = click.style(f"{level:<6}", fg=COLOURS[level])
    click.echo(f"{word}{check:<10}{_wrapped(message, INDENT)}")
    if hint is not None:
        click.echo(f"{'':<{INDENT}}→ {_wrapped(hint, INDENT + 2)}")


def _wrapped(text: str, indent: int) -> str:
    """On a terminal broken between words, and never within one: a command or a path is copied from here."""
    if not output.on_terminal():
        return text
    import shutil
    import textwrap

    room = max(shutil.get_terminal_size().columns - indent, 20)
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return f"\n{'':<{indent}}".join(lines)
