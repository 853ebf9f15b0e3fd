"""Whether a training gets better, in a word, from its evaluations and events."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MIN_EVALUATIONS = 3
"""Fewer show no trend."""
TOO_EARLY = "too early to say"
COLLAPSED = 0.25
"""Diversity below which a generator has collapsed: jobs/metrics/diversity.py."""


def of_training(
    evaluations: Sequence[Mapping[str, Any]] | None,
    events: Iterable[tuple[str, Mapping[str, Any] | None]],
    *,
    spec: Mapping[str, Any],
    error: tuple[str | None, str | None] = (None, None),
    ended: bool = False,
) -> str | None:
    """
    Return the verdict on a training, with its reason; None if it is too early to say and the job has ended.

    Args:
        events: type and detail of the events of the job, oldest first.
        error: code and message of the error that ended it.
    """
    reasons: dict[str, str | None] = {"diverged": None, "collapsed": None}
    for event, detail in events:
        if event in reasons:
            reasons[event] = str((detail or {}).get("reason") or "see ganq events")
        elif event == "rolled_back":  # training continues from before that
            reasons = dict.fromkeys(reasons)
    if error[0] in ("NAN_LOSS", "COLLAPSED"):
        reasons["diverged" if error[0] == "NAN_LOSS" else "collapsed"] = error[1]
    said = verdict(evaluations, spec=spec, **reasons)
    return None if ended and said and said.startswith(TOO_EARLY) else said


def verdict(
    evaluations: Sequence[Mapping[str, Any]] | None,
    *,
    diverged: str | None = None,
    collapsed: str | None = None,
    spec: Mapping[str, Any] | None = None,
) -> str | None:
    """
    Return 'improving', 'flat since epoch N', 'collapsed', 'diverged' or 'too early to say', with the reason.

    Args:
        evaluations: lines of metrics.jsonl with epoch, metric, spread and diversity, oldest first; None if
            they cannot be read.
        diverged, collapsed: why, by the events of the job; None if it has not.

    Returns:
        None for a training that is not evaluated, or whose evaluations cannot be read.
    """
    if diverged is not None:
        return f"diverged: {diverged}"
    if collapsed is not None:
        return f"collapsed: {collapsed}"
    if evaluations is None:
        return None
    known = [one for one in evaluations if _number(one.get("metric")) is not None]
    if not known:
        return None if (spec or {}).get("metric") == "none" else f"{TOO_EARLY}: not evaluated yet"
    diversity = _number(known[-1].get("diversity"))
    if len(known) < MIN_EVALUATIONS:
        times = "once" if len(known) == 1 else "twice"
        return f"{TOO_EARLY}: evaluated {times}"
    if diversity is not None and diversity < COLLAPSED:
        if all((_number(one.get("diversity")) or 0.0) < COLLAPSED for one in known):
            return f"{TOO_EARLY}: its images are still almost identical"
        return f"collapsed: at epoch {known[-1].get('epoch')} its images are almost identical"
    return _trend(known)


def _trend(known: Sequence[Mapping[str, Any]]) -> str:
    """
    Compare the best of the evaluations so far with the newest ones.

    A value is better than the best before it if it is lower by more than its spread, which is the noise of
    the measurement. A run whose last two evaluations are no better is flat.
    """
    best, since = float(known[0]["metric"]), 0
    for place, one in enumerate(known):
        value, noise = float(one["metric"]), _number(one.get("spread")) or 0.0
        if value < best - noise:
            best, since = value, place
    epoch = known[since].get("epoch")
    if len(known) - 1 - since < 2:
        return "improving"
    return f"flat since epoch {epoch}"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
