"""Notices: what the command line prints to stderr beside its output, as log records."""

import logging
from collections.abc import Iterable

log = logging.getLogger("ganq")


def report(lines: Iterable[str]) -> None:
    """Log notices, e.g. that no worker is running or that Redis is unavailable."""
    for line in lines:
        log.warning(line)
