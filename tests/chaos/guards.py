"""Start processes without one of their guards: see guards_off/sitecustomize.py."""

import runpy
from pathlib import Path

FOLDER = Path(__file__).parent / "guards_off"
GUARDS = tuple(runpy.run_path(str(FOLDER / "sitecustomize.py"))["GUARDS"])


def without(*guards: str) -> dict[str, str]:
    """Return the environment of a process that lacks these guards; none is left out for an empty name."""
    return {"PYTHONPATH": str(FOLDER), "GANQ_GUARDS_OFF": ",".join(filter(None, guards))}
