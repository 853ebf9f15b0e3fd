"""The Celery application takes only JSON, has one task and no remote control, and acknowledges early."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from worker.celery_bridge.app import TASK, make_app, queue_key, register_task, send_notification

if TYPE_CHECKING:
    from storage.settings import Settings

pytestmark = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)


@pytest.fixture
def app(settings: "Settings") -> Iterator[Any]:
    app = make_app(settings)
    register_task(app)
    yield app
    app.close()


def test_one_task_is_registered(app: Any) -> None:
    assert [name for name in app.tasks if not name.startswith("celery.")] == [TASK]


def test_no_thread_gets_an_application_made_from_a_foreign_celeryconfig(app: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from celery import current_app

    with ThreadPoolExecutor() as pool:
        assert pool.submit(current_app._get_current_object).result() is app


def test_a_notification_is_fetched_only_when_the_pool_process_is_free(app: Any) -> None:
    conf = app.conf
    assert (conf.worker_concurrency, conf.worker_prefetch_multiplier, conf.worker_disable_prefetch) == (
        1,
        1,
        True,
    )
    assert conf.task_acks_late is False
    assert conf.worker_cancel_long_running_tasks_on_connection_loss is False


def test_nothing_but_json_is_accepted_and_nothing_can_be_broadcast(app: Any) -> None:
    assert list(app.conf.accept_content) == ["json"]
    assert app.conf.worker_enable_remote_control is False
    assert app.conf.result_backend in (None, "disabled://")


def test_celery_waits_for_an_unavailable_redis_without_a_limit(app: Any) -> None:
    assert app.conf.broker_connection_max_retries is None
    assert app.conf.broker_transport_options["visibility_timeout"] >= 7 * 24 * 3600


def test_a_notification_is_a_small_json_message_with_a_hint(settings: "Settings", redis_url: str) -> None:
    import redis

    from worker.celery_bridge.notify import try_notify

    assert try_notify(settings, 7, "default", "") is True
    raw = redis.Redis.from_url(redis_url).lrange(queue_key("default"), 0, -1)
    assert len(raw) == 1
    message = json.loads(raw[0])
    assert message["headers"]["task"] == TASK
    assert message["content-type"] == "application/json"
    assert len(raw[0]) < 2000


def test_a_notification_is_what_celery_itself_would_have_sent(
    settings: "Settings", redis_url: str, app: Any
) -> None:
    import redis

    from worker.celery_bridge.notify import try_notify

    client = redis.Redis.from_url(redis_url)
    send_notification(app, "default", 7, "")
    assert try_notify(settings, 7, "default", "") is True
    ours, celerys = (json.loads(one) for one in client.lrange(queue_key("default"), 0, -1))

    def without_ids(message: dict[str, Any]) -> dict[str, Any]:
        found = {**message, "headers": dict(message["headers"]), "properties": dict(message["properties"])}
        for part, names in (("headers", ("id", "root_id", "origin")), ("properties", ("reply_to",))):
            for name in names:
                assert isinstance(found[part].pop(name), str)
        for name in ("correlation_id", "delivery_tag"):
            assert found["properties"].pop(name)
        return found

    assert without_ids(ours) == without_ids(celerys)
    for one in (ours, celerys):
        assert one["headers"]["id"] == one["headers"]["root_id"] == one["properties"]["correlation_id"]


def test_notifying_needs_no_celery(settings: "Settings", redis_url: str) -> None:
    code = (
        "import sys\nfrom storage.settings import Settings\n"
        "from worker.celery_bridge.notify import try_notify\n"
        f"settings = Settings.load({{'GANQ_REDIS_URL': {redis_url!r}, 'GANQ_HOME': '/nowhere'}})\n"
        "assert try_notify(settings, 1, 'q', '')\n"
        "heavy = {'celery', 'kombu', 'sqlalchemy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_notifying_without_redis_fails_quickly_and_raises_nothing(settings: "Settings") -> None:
    from worker.celery_bridge.notify import try_notify

    assert try_notify(settings, 7, "default", "") is False


def test_the_supervisor_needs_neither_celery_nor_torch_nor_pydantic(backend: str) -> None:
    code = (
        "import sys, worker.supervisor.loop\n"
        "heavy = {'celery', 'torch', 'pydantic', 'numpy', 'PIL', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_queue_holds_a_bounded_number_of_notifications(settings: "Settings", redis_url: str) -> None:
    """However many jobs are submitted while all workers are busy."""
    from worker.celery_bridge.notify import MAX_WAITING, notify, waiting

    for job in range(MAX_WAITING + 50):
        notify(settings, job, "default", "")
    assert waiting(settings, ["default"], "") == {"default": MAX_WAITING}
