"""CPU time of other processes: a piece during which they are busy is measured again."""

import os
import time
from dataclasses import dataclass

import psutil

SAMPLE_S = 0.5
POLL_S = 1.0
QUIET_FOR_S = 5.0
"""Validity of a measurement of the other processes."""
SHORTEST_S = 1.0
"""CPU time is counted in hundredths of seconds, too coarse for shorter pieces."""


@dataclass
class Watch:
    """
    Measure the CPU time of other processes.

    Args:
        most: fraction of all CPUs that others may use; otherwise a piece is invalid.
        patience_s: total time of a run for repetitions and waits; after that every piece is valid.
    """

    most: float = 0.1
    patience_s: float = 900.0
    spent_s: float = 0.0
    looked_at: float = -QUIET_FOR_S

    def wait_for_quiet(self) -> None:
        """Wait until others use less than `most`, or until patience_s has passed."""
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
        """Return whether a piece must be measured again."""
        if share <= self.most or seconds < SHORTEST_S or self.spent_s >= self.patience_s:
            return False
        self.spent_s += seconds
        self.looked_at = -QUIET_FOR_S
        return True


class RunningMeans:
    """CPU time of all other processes since construction."""

    def __init__(self) -> None:
        self.own, self.busy, self.at = _own_seconds(), _busy_seconds(), time.monotonic()

    def share(self) -> float:
        """Return the fraction of CPU time of other processes and the hypervisor, from 0 to 1."""
        others = (_busy_seconds() - self.busy) - (_own_seconds() - self.own)
        whole = (time.monotonic() - self.at) * (os.cpu_count() or 1)
        return max(0.0, others / whole)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _own_seconds() -> float:
    """Return the CPU time of this process and its descendants, ended ones included."""
    total = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.Error:
            continue
    return total
