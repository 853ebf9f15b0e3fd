"""What `ganq doctor` finds in the environment that is meant for other programs, and that ganq ignores."""

import os
from collections.abc import Iterator, Sequence

from worker.celery_bridge import environment
from worker.doctor.check import Finding, ok


def check_environment(left_out: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """
    Args:
        left_out: folders of PYTHONPATH that are not searched, each with what would hide a module.
    """
    if names := environment.foreign(os.environ):
        yield ok("ignored", f"{', '.join(names)}: settings of other programs, which ganq does not read")
    if left_out:
        folders = ", ".join(f"{folder} ({name})" for folder, name in left_out)
        yield ok("ignored", f"PYTHONPATH: {folders} would hide modules that ganq needs, and is not searched")
