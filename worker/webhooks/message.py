"""The message of an event, and its signature, by Standard Webhooks (https://www.standardwebhooks.com)."""

import base64
import hashlib
import hmac
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from storage.db.webhooks import ENDS, Delivery

LARGEST_BODY = 20_000
"""Bytes; a larger one is sent without the result and the detail, as the standard asks for small messages."""
AS_SENTENCE = {"cancelled": "was cancelled", **{one: f"has {one}" for one in ENDS if one != "cancelled"}}


@dataclass(frozen=True)
class Message:
    """What is sent: the same for each attempt."""

    id: str
    type: str
    """'job.succeeded'."""
    body: bytes
    title: str
    """One line for people."""
    text: str
    """Further lines for people; may be empty."""


def message_of(delivery: Delivery, installation: str) -> Message:
    """Return the message of an event; the facts of the job are those of now."""
    event, job = delivery.event, delivery.job
    error = None
    if job.error_code and job.state.terminal:
        error = {"code": job.error_code, "message": job.error_message, "hint": job.error_hint}
    about: dict[str, Any] = {
        "event": event.id,
        "attempt": event.attempt,
        "worker": event.worker,
        "detail": event.detail,
        "job": {
            **{name: getattr(job, name) for name in ("id", "name", "kind", "queue", "user", "sweep", "note")},
            "state": str(job.state),
            "labels": delivery.labels,
            "created_at": _iso(job.created_at),
            "started_at": _iso(job.started_at),
            "finished_at": _iso(job.finished_at),
            "error": error,
            "result": job.result,
        },
    }
    whole: dict[str, Any] = {"type": f"job.{event.type}", "timestamp": _iso(event.at), "data": about}
    body = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    if len(body) > LARGEST_BODY:
        about["detail"], about["job"]["result"] = None, None
        body = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    name = f" ({job.name})" if job.name else ""
    happened = AS_SENTENCE.get(event.type, event.type.replace("_", " "))
    title = f"ganq: job {job.id}{name} {happened}"
    text = f"{job.kind} of {job.user}"
    if error is not None and event.type in ("failed", "cancelled"):
        text += f"\n{error['message'] or error['code']}"
    return Message(f"evt_{installation}_{event.id}", f"job.{event.type}", body, title, text)


def test_message(installation: str, number: str, at: float) -> Message:
    """Return a message that says that it is a test."""
    whole: dict[str, Any] = {"type": "ganq.test", "timestamp": _iso(at), "data": {}}
    body = json.dumps(whole, separators=(",", ":")).encode()
    return Message(
        f"test_{installation}_{number}", "ganq.test", body, "ganq: a test", "this notification works"
    )


def signed_headers(message: Message, secret: str, at: float) -> dict[str, str]:
    """
    Return the headers of an attempt.

    Args:
        secret: 'whsec_' and base64.
        at: time of the attempt, in seconds since 1970; receivers refuse old ones.
    """
    key = base64.b64decode(secret.removeprefix("whsec_"))
    content = f"{message.id}.{int(at)}.".encode() + message.body
    signature = base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
    return {
        "webhook-id": message.id,
        "webhook-timestamp": str(int(at)),
        "webhook-signature": f"v1,{signature}",
        "content-type": "application/json",
    }


def _iso(at: float | None) -> str | None:
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
