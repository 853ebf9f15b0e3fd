"""Settings: environment first, then ganq.toml, then defaults; and nothing secret is shown."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import ConfigError
from storage.settings import Settings, redact
from worker.host.launcher import require_queues


def load(home: Any, **env: str) -> Settings:
    return Settings.load({"GANQ_HOME": str(home), **{f"GANQ_{k.upper()}": v for k, v in env.items()}})


def refused(home: Any, **env: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(home, **env)
    assert "\n" not in str(caught.value)
    return caught.value


def write_config(home: Any, text: str) -> None:
    (home / "ganq.toml").write_text(text)
    (home / "ganq.toml").chmod(0o600)


def test_a_single_machine_needs_no_settings(tmp_path: Path) -> None:
    settings = load(tmp_path)

    assert settings.volume == tmp_path / "volume"
    assert settings.database_url == f"sqlite:///{tmp_path}/ganq.db"
    assert settings.is_sqlite
    assert settings.embedded_redis
    assert settings.redis_url == f"redis+socket://{settings.runtime}/redis.sock"
    assert settings.user


def test_without_a_home_the_platforms_folder_is_taken() -> None:
    assert Settings.load({}).home.name == "ganq"


def test_the_environment_goes_before_the_file_and_the_file_before_defaults(tmp_path: Path) -> None:
    write_config(tmp_path, 'volume = "/from/file"\nuser = "file"\npoll_seconds = 3\n')

    settings = load(tmp_path, user="env")

    assert (settings.user, str(settings.volume), settings.poll_seconds) == ("env", "/from/file", 3.0)
    assert settings.reap_seconds == 2.0


@pytest.mark.parametrize("url", ["postgresql://u@h/d", "postgres://u@h/d", "postgresql+psycopg://u@h/d"])
def test_a_postgres_url_works_as_people_write_it(tmp_path: Path, url: str) -> None:
    assert load(tmp_path, database_url=url).database_url == "postgresql+psycopg://u@h/d"


@pytest.mark.parametrize("url", ["mysql://u:hunter2@h/d", "sqlite://", "nonsense", "postgresql:u:hunter2@h"])
def test_another_database_is_refused_without_showing_its_password(tmp_path: Path, url: str) -> None:
    error = refused(tmp_path, database_url=url)
    assert "neither Postgres nor an absolute SQLite path" in error.message
    if "://" in url:
        assert "hunter2" not in error.message


def test_a_secret_may_come_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("postgresql://u:hunter2@h/d\n")

    settings = load(tmp_path, database_url_file=str(secret))

    assert settings.database_url == "postgresql+psycopg://u:hunter2@h/d"
    assert "hunter2" not in str(settings.redacted())
    assert "GANQ_DATABASE_URL_FILE" in refused(tmp_path, database_url_file="/nowhere").message


def test_a_secret_from_something_endless_is_refused_at_once(tmp_path: Path) -> None:
    assert "is not a file with an address" in refused(tmp_path, database_url_file="/dev/zero").message


def test_an_address_in_a_file_is_reported_with_the_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mysql://u:hunter2@h/d\n")
    error = refused(tmp_path, database_url_file=str(secret))
    assert error.message.startswith(f"GANQ_DATABASE_URL = 'mysql://u:***@h/d' in {secret} is neither")
    secret.write_text("\n")
    error = refused(tmp_path, database_url_file=str(secret))
    assert error.message == f"{secret} is empty, which GANQ_DATABASE_URL_FILE names"


def test_a_relative_volume_is_refused_because_each_process_would_have_another(tmp_path: Path) -> None:
    error = refused(tmp_path, volume="pictures/here")
    assert "relative path" in error.message
    assert (error.hint or "").startswith("GANQ_VOLUME=/")
    write_config(tmp_path, 'volume = "here"\n')
    error = refused(tmp_path)
    assert error.message.startswith(f"volume = 'here' in {tmp_path}/ganq.toml is a relative path")
    assert (error.hint or "").startswith("volume = '/")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('volume = ""', "volume = '' in {} is empty"),
        ('user = "a\\tb"', "user in {} has characters"),
        ("lease_seconds = 5", "lease_seconds = 5 in {} is less than three heartbeats"),
        ("poll_seconds = 0", "poll_seconds = 0 in {} must be more than 0"),
        ('log_level = "LOUD"', "log_level = 'LOUD' in {} is not valid"),
        ('redis_url = "http://h"', "redis_url = 'http://h' in {}: it is not the address of a Redis server"),
        (
            'database_url = "postgresql://u:hunter2@h:x/d"',
            "database_url = 'postgresql://u:***@h:x/d' in {}: its",
        ),
    ],
)
def test_what_is_wrong_in_the_file_is_reported_of_the_file(tmp_path: Path, text: str, said: str) -> None:
    write_config(tmp_path, text)
    assert refused(tmp_path).message.startswith(said.format(tmp_path / "ganq.toml"))


def test_the_home_is_refused_in_the_file_that_is_there(tmp_path: Path) -> None:
    write_config(tmp_path, 'home = "/tmp/zz"\n')
    assert "set GANQ_HOME in the environment" in (refused(tmp_path).hint or "")


def test_a_long_address_is_not_cut_within_its_password(tmp_path: Path) -> None:
    assert "hunter" not in refused(tmp_path, database_url=f"mysql://u:{'hunter' * 50}@h/d").message


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf", "1e12", ""])
def test_seconds_that_are_none_are_refused_by_name(tmp_path: Path, value: str) -> None:
    write_config(tmp_path, f'lease_seconds = "{value}"\n')
    error = refused(tmp_path)
    assert f"lease_seconds = '{value}' in {tmp_path}/ganq.toml is not a number" in error.message
    assert error.hint == "e.g. 60", "less would be refused, too"
    if value:
        assert f"GANQ_LEASE_SECONDS={value} is no" in refused(tmp_path, lease_seconds=value).message


def test_a_setting_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    write_config(tmp_path, 'voluem = "/x"\n')
    error = refused(tmp_path)
    assert "'voluem'" in error.message
    assert "volume" in (error.hint or "")


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, "volume = /x\n")
    assert "not valid TOML" in refused(tmp_path).message


def test_a_file_that_anyone_can_write_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, 'user = "ada"\n')
    (tmp_path / "ganq.toml").chmod(0o666)
    assert "chmod o-w" in (refused(tmp_path).hint or "")


def test_a_config_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    assert "is not a file" in refused(tmp_path, config=str(tmp_path / "missing.toml")).message


def test_a_user_that_does_not_fit_the_table_is_shortened_or_refused(tmp_path: Path) -> None:
    assert load(tmp_path, user="x" * 64).user == "x" * 64
    assert len(load(tmp_path, user="x" * 65).user) == 64
    assert load(tmp_path, user="x" * 65).user != load(tmp_path, user="x" * 66).user
    assert "GANQ_USER" in refused(tmp_path, user="a\tb").message


def test_sockets_have_short_paths_and_a_folder_for_each_home_and_user(tmp_path: Path) -> None:
    one, other = load(tmp_path / ("deep/" * 40)), load(tmp_path)
    assert len(str(one.runtime / "redis.sock")) < 107
    assert one.runtime != other.runtime
    assert str(os.getuid()) in one.runtime.name


def test_a_temporary_folder_whose_path_is_too_long_for_a_socket_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = Path("/" + "x" * 60)
    monkeypatch.setattr("tempfile.tempdir", str(fits))
    assert load(tmp_path).runtime.parent == fits
    monkeypatch.setattr("tempfile.tempdir", "/" + "é" * 40)  # bytes count, not characters
    settings = load(tmp_path)
    assert settings.runtime.parent == Path("/tmp")
    assert settings.redis_url.startswith("redis+socket:///tmp/")


def test_a_redis_socket_whose_path_is_too_long_is_refused_before_it_is_cut_off(tmp_path: Path) -> None:
    path = "/" + "x" * 107
    assert load(tmp_path, redis_url=f"redis+socket://{path[:107]}")
    assert "GANQ_REDIS_URL is too long" in refused(tmp_path, redis_url=f"redis+socket://{path}").message


def test_a_home_has_one_runtime_folder_however_it_is_spelt(tmp_path: Path) -> None:
    """Else two `ganq up` would share its table, and a worker's name."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "link").symlink_to(home)
    runtimes = {load(one).runtime for one in (home, tmp_path / "link", home / ".." / "home")}
    assert len(runtimes) == 1


# --- redact -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://ada:pw@h/d", "postgresql://ada:***@h/d"),
        ("redis://:pw@h:6379/0", "redis://:***@h:6379/0"),
        (
            "cannot reach postgresql+psycopg://ada:p@w@h/d now",
            "cannot reach postgresql+psycopg://ada:***@h/d now",
        ),
        ("postgresql://h/d?user=ada&password=pw&x=1", "postgresql://h/d?user=ada&password=***&x=1"),
        ("rediss://h/0?ssl_keyfile=k&ssl_password=pw", "rediss://h/0?ssl_keyfile=k&ssl_password=***"),
        ("postgresql://ada@h:5432/d", "postgresql://ada@h:5432/d"),
        ("sqlite:////home/a:b/ganq.db", "sqlite:////home/a:b/ganq.db"),
        ("\x1b[31mred\x07 ü\n", "[31mred ü\n"),
    ],
)
def test_passwords_are_masked_and_control_characters_dropped(text: str, shown: str) -> None:
    assert redact(text) == shown


@given(st.text(st.characters(exclude_categories=["Z", "C"]), min_size=3))
def test_no_password_is_ever_shown_whole(password: Any) -> None:
    masked = redact(f"postgresql://ada:Q{password}Q@dbhost/d")
    assert f"Q{password}Q" not in masked
    assert masked.startswith("postgresql://ada:***@")


@pytest.mark.parametrize("queues", [(), ("a b",)])
def test_a_worker_that_would_serve_no_queue_does_not_start(queues: Any) -> None:
    with pytest.raises(ConfigError):
        require_queues(queues)


# --- names of 0.2 -------------------------------------------------------------------------------


@pytest.fixture
def nothing_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.settings._noticed", set())


def test_a_setting_by_its_old_name_counts_and_is_noticed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], nothing_noticed: None
) -> None:
    env = {"GANQ_HOME": str(tmp_path), "GANQ_WISHES_SECONDS": "3"}
    assert Settings.load(env).cancel_poll_seconds == Settings.load(env).cancel_poll_seconds == 3.0
    assert capsys.readouterr().err == "notice: GANQ_WISHES_SECONDS is now called GANQ_CANCEL_POLL_SECONDS\n"


def test_of_a_setting_under_both_names_the_new_one_wins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], nothing_noticed: None
) -> None:
    (tmp_path / "ganq.toml").write_text("ring_again_seconds = 30\nrenotify_seconds = 40\n")
    assert Settings.load({"GANQ_HOME": str(tmp_path)}).renotify_seconds == 40.0
    said = capsys.readouterr().err
    assert said == (
        f"notice: ring_again_seconds in {tmp_path}/ganq.toml is ignored: renotify_seconds is set, too\n"
    )
    env = {"GANQ_HOME": str(tmp_path), "GANQ_RING_AGAIN_SECONDS": "50"}
    assert Settings.load(env).renotify_seconds == 50.0, "the environment goes before the file"
