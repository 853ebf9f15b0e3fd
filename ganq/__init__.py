"""
Submit jobs to ganq and use their results from Python.

    import ganq

    client = ganq.connect()
    job = client.train(data="faces/", epochs=200, name="faces")
    job.wait()
    images = client.generate(job, count=64).wait().images()

Importing this package loads neither torch nor Celery nor SQLAlchemy; docs/python.md is the manual.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ganq.aio import AsyncClient, AsyncImage, AsyncJob, AsyncSweep, aconnect
    from ganq.client import Client, Sweep, connect
    from ganq.generator import Generator
    from ganq.images import Image
    from ganq.job import Job
    from jobs.errors import GanqError
    from jobs.specs import EvaluateSpec, GenerateSpec, TrainSpec
    from storage.db.rows import Checkpoint, Event
    from storage.settings import Settings

__all__ = [
    "AsyncClient",
    "AsyncImage",
    "AsyncJob",
    "AsyncSweep",
    "Checkpoint",
    "Client",
    "EvaluateSpec",
    "Event",
    "GanqError",
    "GenerateSpec",
    "Generator",
    "Image",
    "Job",
    "Settings",
    "Sweep",
    "TrainSpec",
    "aconnect",
    "connect",
]

_MODULES = {
    "AsyncClient": "ganq.aio",
    "AsyncImage": "ganq.aio",
    "AsyncJob": "ganq.aio",
    "AsyncSweep": "ganq.aio",
    "Checkpoint": "storage.db.rows",
    "Client": "ganq.client",
    "EvaluateSpec": "jobs.specs",
    "Event": "storage.db.rows",
    "GanqError": "jobs.errors",
    "GenerateSpec": "jobs.specs",
    "Generator": "ganq.generator",
    "Image": "ganq.images",
    "Job": "ganq.job",
    "Settings": "storage.settings",
    "Sweep": "ganq.client",
    "TrainSpec": "jobs.specs",
    "aconnect": "ganq.aio",
    "connect": "ganq.client",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'ganq' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
