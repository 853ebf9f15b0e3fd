"""KEDA's query in deploy/kubernetes/ counts what claims would take."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from sqlalchemy import text, update

from storage.db.engine import Database
from storage.db.rows import Job, Lease
from storage.db.store import JobStore
from storage.db.tables import job, utcnow

MANIFEST = Path(__file__).parents[2] / "deploy" / "kubernetes" / "autoscaled" / "scaledjob.yaml"


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
def test_kedas_query_counts_work_that_can_start_or_runs(
    database: Database,
    store: JobStore,
    job_factory: Callable[..., Job],
    running_job_factory: Callable[..., Lease],
) -> None:
    _, scaled = yaml.safe_load_all(MANIFEST.read_text())
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["type"] == "postgresql"
    query = trigger["metadata"]["query"]

    def count() -> int:
        return int(database.read(lambda conn: conn.execute(text(query)).scalar_one()))

    def start_in(job_id: int, seconds: float) -> None:
        later = update(job).where(job.c.id == job_id).values(not_before=utcnow() + seconds)
        database.write(lambda conn: conn.execute(later))

    assert count() == 0
    running_job_factory()
    first = job_factory()
    assert count() == 2
    job_factory(after=[first.id])
    job_factory(queue="other")
    store.hold(job_factory().id, held=True)
    later = job_factory().id
    start_in(later, 3600)
    assert count() == 2
    start_in(later, -1)
    assert count() == 3
