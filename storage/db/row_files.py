"""
Rows in files, for backups and archives, on SQLite and Postgres alike.

JSON lines: one with a table's name and columns, then one for each row, JSON columns as their text.
"""

import gzip
import json
from collections.abc import Iterable
from typing import Any

from sqlalchemy import JSON, ColumnElement, Connection, Table, Text, bindparam, cast, insert, select, true

from storage.db import tables
from storage.db.json_object import JsonObject

CHUNK = 500


def write_rows(
    conn: Connection, file: gzip.GzipFile, table: Table, where: ColumnElement[bool] | None = None
) -> int:
    """Write the rows of a table in the order of their keys; return their number."""
    columns = [cast(one, Text) if isinstance(one.type, JsonObject) else one for one in table.columns]
    file.write(_line({"table": table.name, "columns": [one.name for one in table.columns]}))
    query = select(*columns).where(true() if where is None else where).order_by(*table.primary_key.columns)
    number = 0
    for row in conn.execute(query):
        file.write(_line(list(row)))
        number += 1
    return number


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def insert_rows(conn: Connection, lines: Iterable[str], *, skip_present: bool = False) -> dict[str, int]:
    """
    Insert rows that write_rows() wrote; return the number of each table.

    Args:
        skip_present: leave rows out whose key is there (SQLite only).
    """
    by_name = {table.name: table for table in tables.metadata.sorted_tables}
    counts: dict[str, int] = {}
    table, columns, rows = tables.job, [""], list[dict[str, Any]]()

    def flush() -> None:
        if rows:
            conn.execute(_insertion(conn, table, columns, skip_present), rows)
            counts[table.name] = counts.get(table.name, 0) + len(rows)
            rows.clear()

    for line in lines:
        value = json.loads(line)
        if isinstance(value, dict):
            flush()
            table, columns = by_name[value["table"]], value["columns"]
            continue
        rows.append({f"v_{name}": one for name, one in zip(columns, value, strict=True)})
        if len(rows) == CHUNK:
            flush()
    flush()
    return counts


def _insertion(conn: Connection, table: Table, columns: list[str], skip_present: bool) -> Any:
    values: dict[str, Any] = {}
    for name in columns:
        is_json = isinstance(table.c[name].type, JsonObject)
        value = bindparam(f"v_{name}", type_=Text() if is_json else table.c[name].type)
        # SQLite keeps the text; CAST(… AS JSON) would make a number of it.
        values[name] = cast(value, JSON()) if is_json and conn.dialect.name != "sqlite" else value
    statement = insert(table).values(values)
    return statement.prefix_with("OR IGNORE") if skip_present else statement
