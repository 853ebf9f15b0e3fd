"""The OpenAPI 3.1 document of the REST API; docs/openapi.json is a copy, which a test compares."""

import json
import re
from typing import Any

from storage.version import version
from web.api.call import PREFIX, Endpoint
from web.api.schemas import SHA256, schemas
from web.problems import MEDIA_TYPE

EVENT_STREAM = "text/event-stream"
ERRORS = {
    400: "the request is not valid",
    401: "no valid token",
    403: "the role does not allow it, or the server is read-only",
    404: "there is no such job, image or checkpoint",
    405: "the address does not take this method",
    409: "the state of the job does not allow it, or the key belongs to another request",
    412: "the job has changed since it was read",
    413: "the body is too large",
    415: "the body is not JSON",
    416: "there are no such bytes",
    421: "the server does not answer for this host name",
    500: "an error of the server",
    503: "the job table or the volume does not answer",
    507: "there is no room on the volume",
}
OF_ALL = (400, 401, 403, 421, 500, 503)
HEADERS = {
    "If-Match": "ETag of the job: the change is made only if the job has not changed since.",
    "Idempotency-Key": "Key of the submission: letters, digits, '.', '_', ':' and '-', at most 64.",
    "Content-Range": "Part of the file that is sent: bytes FIRST-LAST/TOTAL.",
    "Range": "Part of the file, e.g. bytes=1000-.",
    "Last-Event-ID": "Where a stream that broke off goes on.",
}
ABOUT = """
Submit, follow and control jobs of ganq, and read their results.

Each request needs a token: `Authorization: Bearer TOKEN`; `ganq token create` makes one. Errors are problem
details (RFC 9457) with ganq's error code and a hint. Unknown fields and parameters are refused. Version 1
only grows: clients must ignore keys of answers that they do not know.
""".strip()


def document(endpoints: tuple[Endpoint, ...]) -> dict[str, Any]:
    """Return the document of these endpoints."""
    paths: dict[str, dict[str, Any]] = {}
    for one in endpoints:
        paths.setdefault(PREFIX + one.path, {})[one.method.lower()] = _operation(one)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ganq",
            "version": version(),
            "summary": "A job queue for GANs",
            "description": ABOUT,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": schemas(),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def as_text(endpoints: tuple[Endpoint, ...]) -> str:
    """Return docs/openapi.json."""
    return json.dumps(document(endpoints), indent=1, ensure_ascii=False) + "\n"


def _operation(one: Endpoint) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": one.operation,
        "summary": one.summary,
        "description": f"{one.description}\n\nRole: {one.role}.".strip(),
    }
    if parameters := [*_of_path(one), *_of_query(one), *_of_headers(one)]:
        found["parameters"] = parameters
    if one.takes is not None:
        found["requestBody"] = {"content": {one.takes: {}}, "required": True}
    if one.body is not None:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{one.body}"}}}
        optional = one.body in ("Empty", "Keep", "Pause", "Retry")
        found["requestBody"] = {"content": content, "required": not optional}
    errors = {*OF_ALL, *one.errors, *((413, 415) if one.body is not None else ())}
    found["responses"] = {
        **{str(status): _success(one, status) for status in (one.status, *one.also)},
        **{
            str(status): {
                "description": ERRORS[status],
                "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
            }
            for status in sorted(errors)
        },
    }
    return found


def _success(one: Endpoint, status: int) -> dict[str, Any]:
    if status == 304:
        return {"description": "not modified"}
    schema = {} if one.answer is None else {"schema": {"$ref": f"#/components/schemas/{one.answer}"}}
    content: dict[str, Any] = {one.media: schema}
    if one.live:
        content[EVENT_STREAM] = {}
    texts = {200: "done", 201: "accepted", 202: "a part has arrived", 206: "a part of the file"}
    return {"description": texts[status], "content": content}


def _of_path(one: Endpoint) -> list[dict[str, Any]]:
    known = {
        "job": {"schema": {"type": "string", "minLength": 1}, "description": "Id or name of the job."},
        "epoch": {"schema": {"type": "integer", "minimum": 0}, "description": "Number of the epoch."},
        "webhook": {"schema": {"type": "integer", "minimum": 1}, "description": "Number of a webhook."},
        "sha256": {"schema": SHA256, "description": "SHA-256."},
        "file": {"schema": {"type": "string", "minLength": 1}, "description": "Name of the file."},
        "worker": {"schema": {"type": "string", "minLength": 1}, "description": "Name of the worker."},
        "dataset": {"schema": {"type": "string", "minLength": 1}, "description": "Id of the data set."},
    }
    names = re.findall(r"\{(\w+)\}", one.path)
    return [{"name": name, "in": "path", "required": True, **known[name]} for name in names]


def _of_query(one: Endpoint) -> list[dict[str, Any]]:
    found = []
    for param in one.params:
        row: dict[str, Any] = {"name": param.name, "in": "query", "description": param.description}
        row["schema"] = param.schema
        if param.schema["type"] == "array":
            row |= {"style": "form", "explode": False}
        found.append(row)
    return found


def _of_headers(one: Endpoint) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "header", "description": HEADERS[name], "schema": {"type": "string"}}
        for name in one.headers
    ]
