"""How often to read the job table while waiting for a job."""

POLL_S = (0.02, 0.5)
POLL_SHARE = 0.1
"""Poll interval as a fraction of the time waited: short for short jobs, few queries for long ones."""


def poll_delay_s(waited_s: float, query_s: float = 0.0) -> float:
    """Return the delay before the next poll, at least the duration of the last query."""
    minimum, maximum = POLL_S
    return min(max(waited_s * POLL_SHARE, minimum, query_s), maximum)
