"""Interleaved measurements (A B A B …): medians of ratios, quartiles, and the ratio of A to itself."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.neighbours import RunningMeans, Watch

Piece = Callable[[], Mapping[str, float]]
"""A short measurement, which returns named values."""


class Series:
    """The values of all pieces: values[piece][name][round]."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, list[float]]] = {}

    def add(self, piece: str, measured: Mapping[str, float]) -> None:
        for name, value in measured.items():
            self.values.setdefault(piece, {}).setdefault(name, []).append(float(value))

    def of(self, piece: str, name: str) -> list[float]:
        return self.values[piece][name]


def alternate(
    pieces: Mapping[str, Piece],
    rounds: int,
    *,
    watch: Watch,
    warm_up: int = 1,
    say: Callable[[str], None] = print,
) -> Series:
    """
    Run the pieces in turn, `rounds` times, after `warm_up` rounds that are not measured.

    Every other round is in reverse order, so that no piece always follows the same one. A piece during
    which other processes used much CPU time is measured again; their fraction is the value 'others'.
    """
    series = Series()
    for number in range(-warm_up, rounds):
        for name, piece in list(pieces.items())[:: 1 if number % 2 == 0 else -1]:
            measured = _quietly(piece, watch) if number >= 0 else piece()
            if number >= 0:
                series.add(name, measured)
            shown = ", ".join(f"{key} {value:.4g}" for key, value in measured.items())
            say(f"  {f'round {number + 1}/{rounds}' if number >= 0 else 'warm-up'}  {name}: {shown}")
    return series


def _quietly(piece: Piece, watch: Watch) -> dict[str, float]:
    while True:
        watch.wait_for_quiet()
        meter, began = RunningMeans(), time.monotonic()
        measured = piece()
        share = meter.share()
        if not watch.again(share, time.monotonic() - began):
            return {**measured, "others": share}


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile, with linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Ratio:
    """A line of the table; low and high are the quartiles of the ratios of the rounds."""

    what: str
    against: str
    metric: str
    median: float
    low: float
    high: float
    aa_median: float | None
    aa_low: float | None
    aa_high: float | None
    value: float
    peer_value: float
    bar: str
    met: bool | None

    def to_json(self) -> dict[str, Any]:
        return {
            key: round(value, 5) if isinstance(value, float) else value for key, value in vars(self).items()
        }


def compare(
    what: str,
    against: str,
    metric: str,
    mine: Sequence[float],
    peer: Sequence[float],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Ratio:
    """
    Return the median of the ratios mine/peer, and the ratio of the peer to itself one round later.

    Args:
        at_least, at_most: the bar, if there is one.
    """
    ratios = [a / b for a, b in zip(mine, peer, strict=True)]
    itself = [a / b for a, b in pairwise(peer)]
    median = statistics.median(ratios)
    bar = f"≥ {at_least:g}" if at_least is not None else f"≤ {at_most:g}" if at_most is not None else ""
    met = None
    if at_least is not None:
        met = median >= at_least
    elif at_most is not None:
        met = median <= at_most
    return Ratio(
        what=what,
        against=against,
        metric=metric,
        median=median,
        low=quantile(ratios, 0.25),
        high=quantile(ratios, 0.75),
        aa_median=statistics.median(itself) if itself else None,
        aa_low=quantile(itself, 0.25) if itself else None,
        aa_high=quantile(itself, 0.75) if itself else None,
        value=statistics.median(mine),
        peer_value=statistics.median(peer),
        bar=bar,
        met=met,
    )


def limit(what: str, against: str, metric: str, value: float, most: float) -> Ratio:
    """Return a line without rounds: a value, its upper limit, and their ratio."""
    ratio = value / most
    return Ratio(
        what, against, metric, ratio, ratio, ratio, None, None, None, value, most, "≤ 1", ratio <= 1.0
    )
