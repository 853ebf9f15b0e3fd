"""`ganq doctor`: what is wrong with the set-up."""

import click

from cli import output
from cli.lazy import examples

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
SHOWN = ("home", "volume", "database_url", "redis_url", "data", "user", "queues")
"""Settings that are always shown; the others only where they differ from their defaults."""


@click.command(epilog=examples("ganq doctor", "ganq doctor --json"))
@output.json_option
def doctor(as_json: bool) -> int:
    """
    Look at all that ganq stands on, and say what to do about what is wrong.

    Settings, job table, Redis, volume, GPUs, torch, workers, and jobs that cannot
    move. Changes nothing. Exit code 1 if something failed; a warning is no failure.
    """
    from storage.settings import Settings
    from worker.diagnosis import examine

    settings = Settings.load()
    findings = []
    if not as_json:
        _show_settings(settings.redacted(), settings)
    for finding in examine(settings):
        findings.append(finding)
        if not as_json:
            _show(finding.verdict, finding.check, finding.said, finding.hint)
    counted = {verdict: sum(one.verdict == verdict for one in findings) for verdict in COLOURS}
    if as_json:
        told = [
            {
                "check": one.check,
                "verdict": str(one.verdict),
                "said": output.clean(one.said),
                "hint": None if one.hint is None else output.clean(one.hint),
            }
            for one in findings
        ]
        output.print_json({"ok": not counted["fail"], "settings": settings.redacted(), "findings": told})
    else:
        click.echo(
            f"\n{counted['ok']} ok, {output.count(counted['warn'], 'warning')}, {counted['fail']} failed"
        )
    return 1 if counted["fail"] else 0


def _show_settings(values: dict[str, object], settings: object) -> None:
    from dataclasses import MISSING, fields

    for f in fields(settings):  # type: ignore[arg-type]
        changed = f.default is not MISSING and values[f.name] != f.default
        if values[f.name] is not None and (f.name in SHOWN or changed):
            click.echo(f"{f.name:<20}{output.clean(values[f.name])}")
    click.echo()


def _show(verdict: str, check: str, said: str, hint: str | None) -> None:
    import os

    word = f"{verdict:<6}"
    if output.on_terminal() and not os.environ.get("NO_COLOR"):
        word = click.style(word, fg=COLOURS[verdict])
    click.echo(f"{word}{check:<10}{output.clean(said)}")
    if hint is not None:
        click.echo(f"      {'':<10}→ {output.clean(hint)}")
