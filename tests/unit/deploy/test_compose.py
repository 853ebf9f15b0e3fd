"""
docker-compose.yml, Dockerfile and docker/make_secrets.py agree with each other and with the code.

No engine is needed. Where `docker compose` is installed, its own reading of the file is checked too.
"""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
COMPOSE = ROOT / "docker-compose.yml"
WORKERS = {"worker-gpu0": "gpu", "worker-gpu1": "gpu2", "worker-cpu": "cpu"}
SERVICES = {"redis", "postgres", "migrate", "web", *WORKERS}
OURS = ("migrate", "web", *WORKERS)
SECRET_FILES = {
    "postgres_password",
    "redis_password",
    "redis.acl",
    "web_token",
    "database_url",
    "redis_url",
    "host_database_url",
    "host_redis_url",
    "host.env",
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file with its anchors resolved."""
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = compose["services"]
    return found


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder, with a space in its name, that holds what make_secrets.py and compose read."""
    folder = tmp_path / "a check out"
    (folder / "docker").mkdir(parents=True)
    shutil.copy(ROOT / "docker" / "make_secrets.py", folder / "docker")
    shutil.copy(COMPOSE, folder)
    return folder


def make_secrets(checkout: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run it as a newcomer does: a bare Python that has no packages."""
    return subprocess.run(
        [sys.executable, "-I", "-S", str(checkout / "docker" / "make_secrets.py"), *options],
        env={"PATH": os.environ["PATH"], **env},
        capture_output=True,
        text=True,
        check=False,
    )


def made(checkout: Path, name: str) -> str:
    return (checkout / "docker" / "secrets" / name).read_text()


def dotenv(checkout: Path) -> dict[str, str]:
    """What .env says, read as a shell would."""
    lines = (checkout / ".env").read_text().splitlines()
    pairs = (line.partition("=") for line in lines if not line.startswith("#"))
    return {key: "".join(shlex.split(value)) for key, _, value in pairs}


def host_environment(checkout: Path) -> dict[str, str]:
    """What `. docker/secrets/host.env` exports in a shell."""
    script = '. "$0" && env -0'
    shell = subprocess.run(
        ["sh", "-c", script, str(checkout / "docker" / "secrets" / "host.env")],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    pairs = (one.partition("=") for one in shell.stdout.split("\0") if one)
    return {key: value for key, _, value in pairs if key.startswith("GANQ_")}


# --- docker-compose.yml -------------------------------------------------------------------


def test_the_services_are_those_of_a_small_deployment(services: dict[str, Any]) -> None:
    assert set(services) == SERVICES


@pytest.mark.parametrize("name", [name for name in WORKERS if "gpu" in name])
def test_a_gpu_worker_reserves_one_gpu_and_refuses_to_start_without(
    services: dict[str, Any], name: str
) -> None:
    (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
    # Without device_ids, or without capabilities, an engine gives every GPU, or none.
    assert device == {
        "driver": "nvidia",
        "device_ids": [name.removeprefix("worker-gpu")],
        "capabilities": ["gpu"],
    }
    # In the container it is number 0. 'all' would be content with none and train on the CPU.
    command = services[name]["command"]
    assert command[command.index("--gpus") + 1] == "0"


def test_the_cpu_worker_reserves_no_gpu(services: dict[str, Any]) -> None:
    assert "deploy" not in services["worker-cpu"]
    command = services["worker-cpu"]["command"]
    assert command[command.index("--gpus") + 1] == "none"


def test_only_workers_hang_on_a_profile(services: dict[str, Any]) -> None:
    assert {name: one["profiles"] for name, one in services.items() if "profiles" in one} == {
        name: [profile] for name, profile in WORKERS.items()
    }


def test_every_worker_has_a_name_and_a_hostname_of_its_own(services: dict[str, Any]) -> None:
    names = [services[name]["command"][services[name]["command"].index("--name") + 1] for name in WORKERS]
    assert len(set(names)) == len(WORKERS)
    # Where `ganq health` must ask the job table, it asks for its host: a shared name would hide a dead one.
    assert [services[name]["hostname"] for name in WORKERS] == names


@pytest.mark.parametrize("name", OURS)
def test_every_command_is_one_that_ganq_understands(services: dict[str, Any], name: str) -> None:
    import click

    from cli.main import root

    lines = [services[name]["command"]]
    check = services[name]["healthcheck"]
    if name != "web" and "test" in check:  # the page is asked for a connection
        assert check["test"][:2] == ["CMD", "ganq"]
        lines.append(check["test"][2:])
    for line in lines:
        group: click.Command = root
        args = list(line)
        context = click.Context(root, info_name="ganq")
        while isinstance(group, click.Group):
            _, found, args = group.resolve_command(context, args)
            assert found is not None
            group = found
        group.make_context(line[0], args)  # raises UsageError for an option that is not there


def test_long_running_services_have_health_checks_and_the_migration_has_none(
    services: dict[str, Any],
) -> None:
    for name, one in services.items():
        check = one["healthcheck"]
        if name == "migrate":
            assert check == {"disable": True}  # it would inherit the workers', and ends before it is asked
        else:
            assert check["test"][0] in ("CMD", "CMD-SHELL")
            assert {"interval", "timeout", "retries"} <= set(check)
    assert services["worker-cpu"]["healthcheck"]["test"] == ["CMD", "ganq", "health"]
    # On its unix socket Postgres answers while it is still being made.
    assert "pg_isready -h 127.0.0.1" in services["postgres"]["healthcheck"]["test"][1]


def test_workers_start_after_the_migration_and_the_migration_after_postgres(services: dict[str, Any]) -> None:
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert services["migrate"]["restart"] == "no"  # else it never counts as completed
    assert services["migrate"]["command"] == ["db", "upgrade"]
    for name in ("web", *WORKERS):
        assert services[name]["depends_on"] == {
            "migrate": {"condition": "service_completed_successfully"},
            "redis": {"condition": "service_healthy"},
        }


def test_ports_are_published_on_the_loopback_only(services: dict[str, Any]) -> None:
    published = {name: one["ports"] for name, one in services.items() if "ports" in one}
    assert set(published) == {"redis", "postgres", "web"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    # Workers reach the two by a network that leads nowhere else.
    assert all(services[name]["networks"] == ["ganq"] for name in OURS if name != "web")


def test_the_inner_network_leads_nowhere(compose: dict[str, Any]) -> None:
    assert compose["networks"]["ganq"] == {"internal": True}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_is_hardened(services: dict[str, Any], name: str) -> None:
    one = services[name]
    assert one["read_only"] is True
    assert one["cap_drop"] == ["ALL"]
    assert one["security_opt"] == ["no-new-privileges:true"]
    assert one["pids_limit"] > 0
    assert any(tmpfs.startswith("/tmp:") and "size=" in tmpfs for tmpfs in one["tmpfs"])
    assert not {"privileged", "network_mode", "pid", "ipc"} & set(one)
    if name == "postgres":
        # Its entrypoint begins as root, to take over the volume, and then becomes postgres.
        assert set(one["cap_add"]) == {"CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID"}
    else:
        assert re.match(r"\$\{GANQ_UID\b.*:\$\{GANQ_GID\b", one["user"])
        assert "cap_add" not in one
        assert one["init"] is True


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_is_given_the_time_to_save_its_job(services: dict[str, Any], name: str) -> None:
    from storage.settings import Settings

    grace_s = int(services[name]["stop_grace_period"].removesuffix("s"))
    assert grace_s >= 90
    assert grace_s > Settings.drain_seconds + 20


@pytest.mark.parametrize("name", OURS)
def test_folders_have_the_path_that_they_have_on_the_host(services: dict[str, Any], name: str) -> None:
    volume, data = services[name]["volumes"]
    for mount in (volume, data):
        assert mount["type"] == "bind"
        assert mount["source"].split(":")[0].strip("${}") == mount["target"].strip("${}")
        # The engine would make a missing one as root, and the worker could not write there.
        assert mount["bind"] == {"create_host_path": False}
    assert data["read_only"] is True
    assert "read_only" not in volume
    assert services[name]["environment"]["GANQ_VOLUME"].startswith("${GANQ_VOLUME:?")


@pytest.mark.parametrize("name", OURS)
def test_no_secret_is_in_the_environment(services: dict[str, Any], name: str) -> None:
    from storage.settings import SECRETS, Settings

    environment = services[name]["environment"]
    for secret in set(SECRETS) - {"api_token"}:  # a token is for machines without the database
        assert environment[f"GANQ_{secret.upper()}_FILE"] == f"/run/secrets/{secret}"
        assert secret in services[name]["secrets"]
    known = {f"GANQ_{field.upper()}" for field in Settings.__dataclass_fields__}
    assert {key.removesuffix("_FILE") for key in environment} <= known


def test_secrets_are_the_files_that_make_secrets_makes(compose: dict[str, Any]) -> None:
    declared = compose["secrets"]
    used = {secret for one in compose["services"].values() for secret in one.get("secrets", [])}
    assert used == set(declared)
    for secret in declared.values():
        assert secret["file"].startswith("docker/secrets/")
        assert secret["file"].removeprefix("docker/secrets/") in SECRET_FILES
    redis = compose["services"]["redis"]
    assert redis["command"][redis["command"].index("--aclfile") + 1] == "/run/secrets/redis_acl"


def test_every_variable_without_a_default_is_one_that_make_secrets_sets(checkout: Path) -> None:
    assert make_secrets(checkout).returncode == 0
    uses = re.findall(r"\$\{(\w+)(:[-?])?", COMPOSE.read_text())
    needed = {name for name, how in uses if how != ":-"}
    assert needed
    assert needed <= set(dotenv(checkout))


# --- Dockerfile ---------------------------------------------------------------------------


def dockerfile() -> list[str]:
    """Its instructions, each on one line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def copied() -> list[tuple[list[str], str]]:
    """(sources, target) of each COPY from the checkout."""
    lines = [line.split()[1:] for line in dockerfile() if line.startswith("COPY ") and "--from=" not in line]
    return [(words[:-1], words[-1]) for words in lines]


def test_the_image_holds_exactly_the_packages_of_pyproject() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {name for name in found if not name.endswith(".*")}
    folders = {
        source: target for sources, target in copied() for source in sources if (ROOT / source).is_dir()
    }
    assert folders == {name: name for name in packages}


def test_the_build_is_shown_what_it_copies_and_nothing_else() -> None:
    shown, *rest = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    assert shown == "*"  # passwords, data and results stay outside
    sources = {source for sources, _ in copied() for source in sources}
    assert {line for line in rest if line.startswith("!")} == {f"!{source}" for source in sources}


def test_libraries_are_installed_by_hash_and_nothing_else_is_fetched() -> None:
    installs = re.findall(r"pip (?:install|wheel) .*?(?=&&|$)", "\n".join(dockerfile()), flags=re.MULTILINE)
    assert len(installs) == 3
    locked, *ours = installs
    assert "--require-hashes" in locked
    assert "--only-binary :all:" in locked
    assert "requirements.lock" in locked
    assert all("--no-index" in line and "--no-deps" in line for line in ours)


def test_the_image_does_not_run_as_root() -> None:
    (user,) = [line.removeprefix("USER ") for line in dockerfile() if line.startswith("USER ")]
    assert user == "10001:10001"


# --- docker/make_secrets.py ---------------------------------------------------------------


def test_all_files_are_made_and_only_their_owner_reads_them(checkout: Path) -> None:
    run = make_secrets(checkout)
    assert run.returncode == 0, run.stderr
    folder = checkout / "docker" / "secrets"
    assert {path.name for path in folder.iterdir()} == SECRET_FILES
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in (*folder.iterdir(), checkout / ".env"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert (checkout / "volume").is_dir()
    assert (checkout / "data").is_dir()
    password = made(checkout, "redis_password").strip()
    assert len(password) >= 32
    assert password != made(checkout, "postgres_password").strip()
    assert password not in run.stdout + (checkout / ".env").read_text()


def test_a_second_run_keeps_passwords_and_moves_what_it_is_asked_to(checkout: Path, tmp_path: Path) -> None:
    make_secrets(checkout, "--volume", str(tmp_path / "its own disk"), "--redis-port", "16379")
    before = {name: made(checkout, name) for name in SECRET_FILES}
    with (checkout / ".env").open("a") as env:
        env.write("# mine\nREDIS_IMAGE=example.org/redis\n")
    run = make_secrets(checkout, "--postgres-port", "15432")
    assert run.returncode == 0, run.stderr
    after = {name: made(checkout, name) for name in SECRET_FILES}
    changed = {name for name in SECRET_FILES if before[name] != after[name]}
    assert changed == {"host_database_url"}
    values = dotenv(checkout)
    assert values["GANQ_VOLUME"] == str(tmp_path / "its own disk")
    assert (values["GANQ_REDIS_PORT"], values["GANQ_POSTGRES_PORT"]) == ("16379", "15432")
    assert values["REDIS_IMAGE"] == "example.org/redis"
    assert "# mine" in (checkout / ".env").read_text()


def test_a_password_that_was_lost_half_way_is_made_again(checkout: Path) -> None:
    make_secrets(checkout)
    (checkout / "docker" / "secrets" / "redis_password").write_text("")
    make_secrets(checkout)
    password = made(checkout, "redis_password").strip()
    assert password
    assert f">{password} " in made(checkout, "redis.acl")


def test_the_urls_are_what_ganq_reads(checkout: Path) -> None:
    from sqlalchemy import make_url

    from storage.settings import Settings

    make_secrets(checkout, "--redis-port", "16379")
    secrets = checkout / "docker" / "secrets"
    inside = {f"GANQ_{name.upper()}_FILE": str(secrets / name) for name in ("database_url", "redis_url")}
    for env, database_at, redis_at in (
        (host_environment(checkout), ("127.0.0.1", 5432), "127.0.0.1:16379"),
        (inside, ("postgres", 5432), "redis:6379"),
    ):
        settings = Settings.load({"GANQ_HOME": str(checkout), **env})
        database = make_url(settings.database_url)
        assert (database.host, database.port) == database_at
        assert (database.username, database.database) == ("ganq", "ganq")
        assert database.password == made(checkout, "postgres_password").strip()
        assert settings.redis_url == f"redis://ganq:{made(checkout, 'redis_password').strip()}@{redis_at}/0"
    assert host_environment(checkout)["GANQ_VOLUME"] == str(checkout / "volume")


def test_containers_never_run_as_root(checkout: Path) -> None:
    make_secrets(checkout)
    values = dotenv(checkout)
    assert values["GANQ_UID"] != "0"
    assert values["GANQ_GID"] != "0"
    for path in (checkout / "docker" / "secrets" / "redis.acl", checkout / "volume"):
        assert str(path.stat().st_uid) == values["GANQ_UID"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root runs it by sudo")
def test_who_used_sudo_owns_the_results(checkout: Path) -> None:
    make_secrets(checkout, SUDO_UID="1234", SUDO_GID="1235")
    values = dotenv(checkout)
    assert (values["GANQ_UID"], values["GANQ_GID"]) == ("1234", "1235")
    about = (checkout / "volume").stat()
    assert (about.st_uid, about.st_gid) == (1234, 1235)


@pytest.mark.parametrize(
    "options",
    [("--redis-port", "0"), ("--postgres-port", "http"), ("--volume", "a:b"), ("--data", "it's")],
)
def test_what_is_invalid_in_a_mount_or_a_url_is_refused(checkout: Path, options: tuple[str, ...]) -> None:
    run = make_secrets(checkout, *options)
    assert run.returncode == 2
    assert options[0] in run.stderr
    assert "Traceback" not in run.stderr
    assert not (checkout / ".env").exists()


# --- docker compose itself ----------------------------------------------------------------


def compose_config(checkout: Path) -> subprocess.CompletedProcess[str]:
    profiles = [word for profile in WORKERS.values() for word in ("--profile", profile)]
    passed = {key: value for key, value in os.environ.items() if not key.startswith(("GANQ_", "COMPOSE_"))}
    return subprocess.run(
        ["docker", "compose", *profiles, "config", "--format", "json"],
        cwd=checkout,
        env=passed,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def compose_program() -> None:
    if shutil.which("docker") is None:
        pytest.skip("there is no docker on this machine")
    asked = subprocess.run(["docker", "compose", "version"], capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        pytest.skip("docker has no compose plugin on this machine")


@pytest.mark.usefixtures("compose_program")
def test_docker_compose_reads_the_file_as_it_is_meant(checkout: Path, tmp_path: Path) -> None:
    data = tmp_path / "images for $HOME"
    assert make_secrets(checkout, "--data", str(data)).returncode == 0
    run = compose_config(checkout)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""  # not a word of warning either
    read = json.loads(run.stdout)
    assert set(read["services"]) == SERVICES
    for name in OURS:
        targets = [mount["target"].replace("$$", "$") for mount in read["services"][name]["volumes"]]
        assert targets == [str(checkout / "volume"), str(data)]
    for secret in read["secrets"].values():
        assert Path(secret["file"]).is_file()


@pytest.mark.usefixtures("compose_program")
def test_without_secrets_docker_compose_says_how_to_make_them(checkout: Path) -> None:
    run = compose_config(checkout)
    assert run.returncode != 0
    assert "run docker/make_secrets.py first" in run.stderr
