"""Messages as kombu puts them into Redis: notifications, and malformed ones."""

import base64
import json

from worker.celery_bridge.app import TASK, queue_key


def envelope(body: str = "W10=", **changes: object) -> str:
    """One message. `body` is base64; any other part can be replaced by name."""
    headers = {"lang": "py", "task": TASK, "id": "1", "root_id": "1", "parent_id": None, "group": None}
    properties = {
        "correlation_id": "1",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": queue_key("default")},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": "1",
    }
    message = {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": properties,
    }
    return json.dumps({**message, **changes})


def notification(job_id: int, number: int = 1) -> str:
    """
    Return one notification for a job, as the dispatcher sends it.

    Args:
        number: tells one delivery of many apart.
    """
    body = json.dumps([[job_id], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    message = json.loads(envelope(base64.b64encode(body.encode()).decode()))
    message["headers"]["id"] = message["headers"]["root_id"] = f"notification-{number}"
    message["properties"]["delivery_tag"] = message["properties"]["correlation_id"] = f"notification-{number}"
    return json.dumps(message)
