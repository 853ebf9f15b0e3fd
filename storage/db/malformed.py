"""
Malformed rows of the job table, which ganq did not write.

SQLite accepts text for a number and anything for JSON, and both databases accept unknown kinds. Such a job
fails with BAD_SPEC; an unknown kind of a newer spec version waits for a newer worker.
"""

from typing import Any

from sqlalchemy import Connection, bindparam, select, text

from jobs.errors import SpecError
from jobs.kinds import KINDS, SPEC_VERSION
from storage.db.rows import NUMBERS, OBJECTS, REQUIRED_NUMBERS, TEXTS, Job
from storage.db.tables import job

HINT = "submit it again with ganq submit"
_NO_NUMBER = "typeof({0}) NOT IN ('integer', 'real', 'null')"
_NO_KIND = "(kind NOT IN :kinds AND spec_version <= :newest)"
_MISTYPED = " OR ".join(
    [_NO_NUMBER.format(name) for name in NUMBERS] + [f"typeof(\"{name}\") <> 'text'" for name in TEXTS]
)
_NO_OBJECT = {
    dialect: " OR ".join(f"({name} IS NOT NULL AND {wrong.format(name)})" for name in OBJECTS)
    for dialect, wrong in (
        ("sqlite", "NOT CASE WHEN json_valid({0}) THEN json_type({0}) = 'object' ELSE 0 END"),
        ("postgresql", "json_typeof({0}) <> 'object'"),
    )
}
_WRONG = {"sqlite": f"({_NO_KIND} OR {_MISTYPED})", "postgresql": _NO_KIND}
_QUEUED = {
    dialect: text(f"SELECT id FROM job WHERE state = 'queued' AND id > :after AND {wrong}")
    for dialect, wrong in _WRONG.items()
}
_OPEN = {
    dialect: text(
        f"SELECT id FROM job WHERE state IN ('queued', 'running') AND ({wrong} OR {_NO_OBJECT[dialect]})"
        " ORDER BY id LIMIT :most"
    )
    for dialect, wrong in _WRONG.items()
}
_READABLE = text(
    "UPDATE job SET "
    + ", ".join(
        f"{name} = CASE WHEN {_NO_NUMBER.format(name)} THEN {'0' if name in REQUIRED_NUMBERS else 'NULL'}"
        f" ELSE {name} END"
        for name in NUMBERS
        if name != "attempt"
    )
    + f", attempt = CASE WHEN {_NO_NUMBER.format('attempt')} THEN"
    " coalesce((SELECT max(number) FROM attempt WHERE job_id = job.id), 0) ELSE attempt END"
    " WHERE id = :id"
)
_RUN_BY_WORKERS = [name for name, kind in KINDS.items() if kind.runner is not None]


def _known_kinds(statement: Any) -> Any:
    known = statement.bindparams(bindparam("kinds", expanding=True))
    return known, {"kinds": _RUN_BY_WORKERS, "newest": SPEC_VERSION}


def unclaimable_ids(conn: Connection, after_id: int) -> list[int]:
    """Return the queued jobs above an id that no claim finds, because of their kind or a mistyped column."""
    statement, bound = _known_kinds(_QUEUED[conn.dialect.name])
    return list(conn.execute(statement, {**bound, "after": after_id}).scalars())


def open_malformed_ids(conn: Connection, most: int) -> list[int]:
    """Return the malformed jobs that have not ended; reads all queued and running jobs."""
    statement, bound = _known_kinds(_OPEN[conn.dialect.name])
    return list(conn.execute(statement, {**bound, "most": most}).scalars())


def with_numbers(conn: Connection, row: Any) -> Any:
    """
    Return a job's locked row after replacing what is no number in number columns by 0 or NULL.

    The job can then be given its final state.
    """
    if all(isinstance(row._mapping[name], int | float | None) for name in NUMBERS):
        return row
    conn.execute(_READABLE, {"id": row.id})
    return conn.execute(select(job).where(job.c.id == row.id)).one()


def malformed_error(job: Job) -> SpecError:
    """Return the error of a job whose row is malformed."""
    return SpecError(f"ganq did not write this row of the job table: {job.malformed}", hint=HINT)
