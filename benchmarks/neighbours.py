"""What else the machine does while a piece is measured: a piece with busy neighbours is measured again."""

import os
import time
from dataclasses import dataclass

import psutil

SAMPLE_S = 0.5
POLL_S = 1.0
QUIET_FOR_S = 5.0
"""How long a look at the neighbours holds."""
SHORTEST_S = 1.0
"""Processor time is counted in hundredths of seconds: a shorter piece says nothing about others."""


@dataclass
class Watch:
    """
    Tells how much of the processors others took.

    Args:
        most: share of all processors that others may take, else a piece does not count.
        patience_s: for all repetitions and waits of a run together; after that everything counts.
    """

    most: float = 0.1
    patience_s: float = 900.0
    spent_s: float = 0.0
    looked_at: float = -QUIET_FOR_S

    def wait_for_quiet(self) -> None:
        """Until others take less than `most`, or patience is at its end."""
        if time.monotonic() - self.looked_at < QUIET_FOR_S:
            return
        while self.spent_s < self.patience_s:
            meter = RunningMeans()
            time.sleep(SAMPLE_S)
            if meter.share() <= self.most:
                self.looked_at = time.monotonic()
                return
            time.sleep(POLL_S)
            self.spent_s += SAMPLE_S + POLL_S

    def again(self, share: float, seconds: float) -> bool:
        """Whether a piece must be measured again."""
        if share <= self.most or seconds < SHORTEST_S or self.spent_s >= self.patience_s:
            return False
        self.spent_s += seconds
        self.looked_at = -QUIET_FOR_S
        return True


class RunningMeans:
    """Processor time of all others since it was made."""

    def __init__(self) -> None:
        self.own, self.busy, self.at = _own_seconds(), _busy_seconds(), time.monotonic()

    def share(self) -> float:
        """Of all processors, from 0 to 1: others' processes, and what the hypervisor took."""
        others = (_busy_seconds() - self.busy) - (_own_seconds() - self.own)
        whole = (time.monotonic() - self.at) * (os.cpu_count() or 1)
        return max(0.0, others / whole)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _own_seconds() -> float:
    """This process and all below it; those that have ended are in their parents' account."""
    total = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.Error:
            continue
    return total
