"""How a job is referred to."""

from os import PathLike, fspath
from typing import Any


def reference_text(reference: Any) -> str:
    """Return a reference (id, name, path or `ganq.Job`) as the command line takes it."""
    return fspath(reference) if isinstance(reference, PathLike) else str(getattr(reference, "id", reference))
