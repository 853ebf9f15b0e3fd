"""
Redis behind TLS: every client verifies the server by default, reads the URL's options alike,
and gives the password to no impostor.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from machine import Ganq, until
from tls import PASSWORD, Authority, Impostor, TlsRedis, start_redis

if TYPE_CHECKING:
    from storage.settings import Settings

pytestmark = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Iterator[TlsRedis]:
    with start_redis(*authority.issue("redis")) as running:
        yield running


@pytest.fixture
def impostor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Impostor]:
    """Somebody in Redis' place, whose certificate is signed by nobody whom the client knows."""
    stranger = Authority(tmp_path_factory.mktemp("stranger"))
    found = Impostor(*stranger.issue("redis"))
    yield found
    found.close()


def submitter(settings: "Settings") -> bool:
    from worker.celery_bridge.notify import try_notify

    return try_notify(settings, 7, "default", "")


def celery(settings: "Settings") -> bool:
    from kombu.exceptions import OperationalError

    from worker.celery_bridge.app import make_app, send_notification

    app = make_app(settings)
    try:
        with app.connection_for_read() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0)
        send_notification(app, "default", 7, "")
    except OperationalError:
        return False
    finally:
        app.close()
    return True


def doctor(settings: "Settings") -> bool:
    from worker.doctor.redis_server import check_redis

    return any(re.match(r"Redis \d+\.\d+\.\d+", one.message) for one in check_redis(settings))


CLIENTS = pytest.mark.parametrize("client", [submitter, celery, doctor])


@CLIENTS
def test_an_impostor_gets_no_password(settings: "Settings", impostor: Impostor, client: Any) -> None:
    assert not client(replace(settings, redis_url=impostor.url))
    assert impostor.greeted
    assert PASSWORD.encode() not in impostor.heard
    assert not impostor.heard  # nor anything else


@pytest.mark.slow
def test_a_worker_gives_an_impostor_no_password_and_says_so(
    ganq: Ganq, impostor: Impostor, small: list[str]
) -> None:
    ganq.env["GANQ_REDIS_URL"] = impostor.url
    ganq.start_worker()
    until(lambda: ganq.present() and impostor.greeted >= 2, what="a worker that tries to reach Redis")
    submitted = ganq.run("submit", "train", *small, "--epochs", "1", "--wait")
    assert submitted.returncode == 0, submitted.stderr  # it is found by polling
    assert "certificate" in submitted.stderr
    until(lambda: "certificate verify failed" in ganq.log(), what="a line in the worker's log")
    assert "Traceback" not in ganq.log()
    assert not impostor.heard


@CLIENTS
@pytest.mark.parametrize("spelling", ["", "CERT_REQUIRED", "required", "CERT_OPTIONAL", "optional"])
def test_a_server_of_the_named_authority_is_taken_however_that_is_spelt(
    settings: "Settings", server: TlsRedis, authority: Authority, client: Any, spelling: str
) -> None:
    options = f"?ssl_ca_certs={authority.certificate}" + (f"&ssl_cert_reqs={spelling}" if spelling else "")
    assert client(replace(settings, redis_url=server.url + options))


@CLIENTS
@pytest.mark.parametrize("spelling", ["CERT_NONE", "none"])
def test_verification_is_off_only_where_the_url_says_so(
    settings: "Settings", server: TlsRedis, client: Any, spelling: str
) -> None:
    assert client(replace(settings, redis_url=f"{server.url}?ssl_cert_reqs={spelling}"))


@CLIENTS
@pytest.mark.parametrize("spelling", ["", "?ssl_cert_reqs=CERT_REQUIRED", "?ssl_cert_reqs=required"])
def test_a_server_of_an_unknown_authority_is_refused(
    settings: "Settings", server: TlsRedis, client: Any, spelling: str
) -> None:
    assert not client(replace(settings, redis_url=server.url + spelling))


@CLIENTS
def test_a_certificate_for_another_host_is_refused_unless_the_url_says_otherwise(
    settings: "Settings", authority: Authority, client: Any
) -> None:
    known = f"?ssl_ca_certs={authority.certificate}"
    with start_redis(*authority.issue("elsewhere", for_host="DNS:elsewhere.example")) as other:
        assert not client(replace(settings, redis_url=other.url + known))
        assert client(replace(settings, redis_url=f"{other.url}{known}&ssl_check_hostname=false"))


@CLIENTS
def test_one_url_with_other_options_serves_all_clients(
    settings: "Settings", redis_url: str, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """redis-py's own options, which ended Celery's worker, and a password with signs that kombu cuts at."""
    import redis

    with redis.Redis.from_url(redis_url) as admin:
        admin.execute_command("ACL", "SETUSER", "odd", "on", ">a;b+c", "allkeys", "allcommands", "&*")
        url = redis_url.replace("redis://", "redis://odd:a;b+c@").removesuffix("/0")
        with caplog.at_level(logging.WARNING):
            assert client(replace(settings, redis_url=f"{url}?db=3&socket_timeout=5"))
        if client is not doctor:
            with redis.Redis.from_url(redis_url.removesuffix("/0"), db=3) as three:
                assert three.llen("ganq.default") == 1
        admin.execute_command("ACL", "DELUSER", "odd")


def test_doctor_says_why_a_server_is_not_trusted_and_what_to_do(
    settings: "Settings", server: TlsRedis
) -> None:
    from worker.doctor.redis_server import check_redis

    (told,) = check_redis(replace(settings, redis_url=server.url))
    assert told.level == "error"
    assert "certificate" in told.message
    assert "ssl_ca_certs" in (told.hint or "")
    assert PASSWORD not in told.message


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("rediss://h/0?ssl_cert_reqs=CERT_MAYBE", "ssl_cert_reqs=CERT_MAYBE is not required, optional"),
        ("rediss://h/0?ssl_check_hostname=maybe", "ssl_check_hostname=maybe is neither true nor false"),
        ("rediss://h/0?ssl_ca_cert=/x", "there is no option ssl_ca_cert"),
        ("redis://h/0?ssl_cert_reqs=none", "ssl_cert_reqs is for rediss://"),
    ],
)
def test_an_option_that_does_not_exist_is_refused_in_a_line(
    tmp_path: Path, backend: str, url: str, said: str
) -> None:
    from jobs.errors import ConfigError
    from storage.settings import Settings

    with pytest.raises(ConfigError) as refused:
        Settings.load({"GANQ_HOME": str(tmp_path), "GANQ_REDIS_URL": url})
    assert said in refused.value.message
