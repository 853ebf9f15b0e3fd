"""The type of the JSON columns: an object, or what somebody else has written there, without an error."""

import json
from typing import Any

from sqlalchemy import JSON
from sqlalchemy.types import TypeDecorator


class MalformedJson(dict[str, Any]):
    """An empty object in place of a value that is none; `text` is what was found."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class JsonObject(TypeDecorator[dict[str, Any]]):
    """
    JSON whose values are objects. Python's None is SQL's NULL.

    A value of another kind, or text that is no JSON (SQLite takes any), is read as MalformedJson:
    one row that ganq did not write must not break a query over many.
    """

    impl = JSON(none_as_null=True)
    cache_ok = True

    def coerce_compared_value(self, op: Any, value: Any) -> Any:
        return self.impl_instance.coerce_compared_value(op, value)

    def result_processor(self, dialect: Any, coltype: Any) -> Any:
        parsed = dialect.name != "sqlite"  # psycopg has parsed it

        def process(value: Any) -> dict[str, Any] | None:
            if value is None:
                return None
            if not parsed:
                try:
                    found = json.loads(value)
                except (ValueError, TypeError, RecursionError):
                    return MalformedJson(str(value))
            else:
                found = value
            if isinstance(found, dict):
                return found
            return None if found is None else MalformedJson(json.dumps(found))

        return process
