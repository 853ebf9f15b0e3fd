"""Type of the JSON columns: objects; reading other values is no error."""

import json
from typing import Any

from sqlalchemy import JSON
from sqlalchemy.types import TypeDecorator


class MalformedJson(dict[str, Any]):
    """An empty object that replaces a value that is no object; `text` is that value."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class JsonObject(TypeDecorator[dict[str, Any]]):
    """
    JSON whose values are objects. Python's None is SQL's NULL.

    Other values, and text that is no JSON (SQLite accepts any), are read as MalformedJson, so that one
    malformed row does not break a query of many.
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
