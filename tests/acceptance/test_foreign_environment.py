"""Settings of other programs, and other people's modules, change nothing: ganq reads its own alone."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from socket import create_server
from threading import Thread
from typing import Any

import pytest
from machine import Ganq, until

import ganq_entry

ROOT = Path(__file__).parents[2]
# Where an idle worker looks at the table every few minutes only, a job that starts at once was notified.
on_postgres = pytest.mark.parametrize("backend", ["postgres"], indirect=True)
on_sqlite = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)


class OtherBroker:
    """Another project's Redis: counts who connects."""

    def __init__(self) -> None:
        self.visits = 0
        self.listener = create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self.listener.getsockname()[1]}/0"
        Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        while True:
            try:
                line, _ = self.listener.accept()
            except OSError:
                return
            self.visits += 1
            line.close()


@pytest.fixture
def other() -> Iterator[OtherBroker]:
    broker = OtherBroker()
    yield broker
    broker.listener.close()


def settings_of_others(url: str) -> dict[str, str]:
    return {
        **dict.fromkeys(("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"), url),
        **dict.fromkeys(("BROKER_URL", "CELERY_RESULT_BACKEND", "RESULT_BACKEND"), url),
        **dict.fromkeys(("CELERY_CONFIG_MODULE", "CONFIG_MODULE"), "celeryconfig"),
        **dict.fromkeys(("CELERY_LOADER", "LOADER"), "proj.loader:Loader"),
        **{"APP": "proj", "CELERY_APP": "proj", "DJANGO_SETTINGS_MODULE": "proj.settings"},
        **{"CELERY_CUSTOM_WORKER_POOL": "proj.pool:Pool", "CELERY_WORKER_REVOKES_MAX": "many"},
        **{
            "C_FAKEFORK": "1",
            "C_STRICT_APP": "1",
            "FORKED_BY_MULTIPROCESSING": "1",
            "REMAP_SIGTERM": "SIGQUIT",
        },
        **{"KOMBU_LOG_DEBUG": "1", "AUTOSCALE_KEEPALIVE": "long", "PICKLE_PROTOCOL": "none"},
    }


def run_a_job(ganq: Ganq, small: list[str]) -> None:
    done = ganq.run("submit", "train", *small, "--epochs", "1", "--wait")
    assert done.returncode == 0, done.stderr  # within the time of run(), which is shorter than a poll


@pytest.mark.slow
@on_postgres
def test_celery_settings_of_another_project_connect_no_worker_to_its_broker(
    ganq: Ganq, redis_url: str, small: list[str], other: OtherBroker
) -> None:
    ganq.env |= {
        "GANQ_POLL_SECONDS": "300",
        "GANQ_RING_AGAIN_SECONDS": "300",
        **settings_of_others(other.url),
    }
    loaded = ganq.folder / "loaded"
    marker = f"open({str(loaded)!r}, 'a').write(__name__)\n"
    (ganq.folder / "celeryconfig.py").write_text(f"{marker}broker_url = {other.url!r}\n")
    (ganq.folder / "proj.py").write_text(marker)
    (ganq.folder / "setproctitle.py").write_text(marker)  # which billiard imports where it is installed
    worker = ganq.start_worker()
    until(lambda: ganq.present(), what="the worker")
    run_a_job(ganq, small)
    assert other.visits == 0
    assert not loaded.exists(), loaded.read_text()
    assert "Traceback" not in ganq.log()
    worker.terminate()  # with REMAP_SIGTERM it would not drain
    assert worker.wait(timeout=60) == 0


def test_every_variable_that_celery_reads_is_known() -> None:
    """A new version of Celery that reads another one fails here."""
    from worker.celery_bridge.environment import foreign

    harmless = {"NO_COLOR", "TERM", "ITERM_PROFILE", "NUMBER_OF_PROCESSORS", "celery_dummy_proxy"}
    elsewhere = re.compile(r"/(contrib|t|tests)/|transport/(?!redis|virtual|__init__|base)")
    reads = re.compile(
        r"""(?:environ(?:\.get)?[(\[]|getenv\(|envvar=|_env\(|env(?:: str)? ?= ?)\s*['"](\w+)['"]"""
    )
    found: dict[str, str] = {}
    for package in ("celery", "kombu", "billiard", "vine"):
        spec = PathFinder.find_spec(package)  # kombu, once loaded, has none of its own
        assert spec is not None
        assert spec.origin is not None
        for path in Path(spec.origin).parent.rglob("*.py"):
            if not elsewhere.search(path.as_posix()):
                found.update(dict.fromkeys(reads.findall(path.read_text()), f"{package}: {path.name}"))
    assert {"CELERY_BROKER_URL", "BROKER_URL", "DJANGO_SETTINGS_MODULE", "CELERY_CONFIG_MODULE"} <= set(found)
    unknown = set(found) - harmless - set(foreign(found))
    assert not unknown, {name: found[name] for name in unknown}


# --- the import path --------------------------------------------------------------------------


def console_script(folder: Path) -> Path:
    """What an installation puts into bin/, made from the entry point that pyproject.toml names."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["ganq"]
    module, _, function = entry.partition(":")
    (folder / "bin").mkdir()
    script = folder / "bin" / "ganq"
    script.write_text(
        f"#!{sys.executable}\nimport re\nimport sys\nfrom {module} import {function}\n"
        "if __name__ == '__main__':\n"
        "    sys.argv[0] = re.sub(r'(-script\\.pyw|\\.exe)?$', '', sys.argv[0])\n"
        f"    sys.exit({function}())\n"
    )
    script.chmod(0o755)
    return script


FOREIGN = 'raise SystemExit("a module of somebody else was loaded: " + __file__)\n'


def somebody_elses(folder: Path, *names: str) -> Path:
    """A folder of modules with these names; 'cli/' is a package."""
    folder.mkdir()
    for name in names:
        if name.endswith("/"):
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text(FOREIGN)
        else:
            (folder / name).write_text(FOREIGN)
    return folder


TAKEN = ("jobs.py", "storage.py", "worker/", "cli/", "redis.py", "celery.py", "queue.py", "sqlalchemy/")


def run(script: Path, *arguments: str, cwd: Path, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [script, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False
    )


@on_sqlite
@pytest.mark.parametrize("taken", TAKEN)
@pytest.mark.parametrize("how", ["PYTHONPATH", "trailing colon"])
def test_the_command_starts_whatever_is_on_pythonpath(
    tmp_path: Path, backend: str, settings_env: dict[str, str], taken: Any, how: str
) -> None:
    script = console_script(tmp_path)
    theirs = somebody_elses(tmp_path / "theirs", taken)
    path = str(theirs) if how == "PYTHONPATH" else "/nowhere:"  # an empty entry is the current folder
    env = {**os.environ, "PYTHONPATH": path}
    done = run(script, "status", "--json", cwd=theirs, env=env)
    assert done.returncode == 0, done.stderr


def test_the_names_that_are_reserved_are_those_of_the_package_and_of_what_it_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {
        name for name in project["tool"]["setuptools"]["packages"]["find"]["include"] if "." not in name
    }
    assert {*packages, "ganq_entry"} == set(ganq_entry.GANQ_PACKAGES)
    needed = {re.split(r"[^\w.-]", one)[0].lower() for one in project["project"]["dependencies"]}
    modules = {
        module
        for module, distributions in metadata.packages_distributions().items()
        if needed & {one.lower() for one in distributions}
    }
    assert modules <= ganq_entry.LIBRARIES


@on_sqlite
def test_what_installed_software_on_pythonpath_offers_stays(
    tmp_path: Path, backend: str, settings_env: dict[str, str]
) -> None:
    """As modules of a cluster give torch: its folder has records of what was installed, and is left alone."""
    script = console_script(tmp_path)
    tree = somebody_elses(tmp_path / "tree")
    (tree / "thing-1.0.dist-info").mkdir()
    (tree / "argparse.py").write_text("from optparse import *\n")  # an old backport
    (tree / "torch.py").write_text("print('their torch')\n")
    plain = somebody_elses(tmp_path / "plain")
    (plain / "helper.py").write_text("")
    theirs = somebody_elses(tmp_path / "theirs", "jobs.py")
    show = "import os; print(os.environ['PYTHONPATH'])"
    code = "import ganq_entry, subprocess, sys; ganq_entry.prepare()"
    code += f"; subprocess.run([sys.executable, '-c', {show!r}])"
    env = {**os.environ, "PYTHONPATH": f"{tree}:{theirs}:{plain}"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r}); {code}"],
        env=env, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{tree}:{plain}\n"
    assert run(script, "status", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(plain)}).returncode == 0


@pytest.mark.slow
@on_sqlite
@pytest.mark.parametrize("home", [pytest.param("", marks=pytest.mark.tier2), "/nowhere"])
def test_a_worker_and_its_processes_start_whatever_is_on_pythonpath(
    ganq: Ganq, redis_url: str, small: list[str], home: str
) -> None:
    script = console_script(ganq.folder)
    theirs = somebody_elses(ganq.folder / "theirs", *TAKEN, "ingest.py", "torch.py", "PIL.py")
    ganq.env |= {"PYTHONPATH": str(theirs), "PYTHONSTARTUP": str(theirs / "jobs.py")}
    if home:  # of an interpreter that does not read it, but whose children would
        ganq.env["PYTHONHOME"] = home
        script.write_text(script.read_text().replace(sys.executable, f"{sys.executable} -E"))
    log = open(ganq.folder / "w1.log", "ab")  # noqa: SIM115 - the worker keeps writing to it
    worker = subprocess.Popen(
        [script, "worker", "--gpus", "none", "--name", "w1"],
        env=ganq.env, cwd=theirs, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    log.close()
    ganq.workers.append(worker)
    until(lambda: ganq.present() or worker.poll() is not None, what="the worker")
    done = run(script, "submit", "train", *small, "--epochs", "1", "--wait", cwd=theirs, env=ganq.env)
    assert done.returncode == 0, done.stderr + ganq.log()
    assert "somebody else" not in ganq.log()


@on_sqlite
def test_doctor_names_what_is_ignored(tmp_path: Path, backend: str, settings_env: dict[str, str]) -> None:
    script = console_script(tmp_path)
    theirs = somebody_elses(tmp_path / "theirs", "jobs.py")
    env = {**os.environ, "PYTHONPATH": str(theirs), "BROKER_URL": "redis://:s3cret@elsewhere"}
    done = run(script, "doctor", cwd=tmp_path, env=env)
    assert f"PYTHONPATH: {theirs} (jobs.py)" in done.stdout
    assert "BROKER_URL" in done.stdout
    assert "s3cret" not in done.stdout
