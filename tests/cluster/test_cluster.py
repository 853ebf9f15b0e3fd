"""
Several hosts: real workers in namespaces with their own network, name, processes and boot.

    make cluster-test

The seeds of long runs: make cluster SEED=1 JOBS=200 PARTITIONS=10 LOSSES=10 DATABASE=postgres.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from cluster.hosts import NFS, Cluster, missing, nfs_missing
from cluster.run import ClusterRun, short_folder
from machine import until

why = missing()
pytestmark = [
    pytest.mark.tier3,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(why is not None, reason=why or ""),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = short_folder()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


# --- all at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["postgres", "sqlite"])
def test_nothing_is_lost_or_made_twice_or_otherwise(database: str, folder: Path) -> None:
    run = ClusterRun(folder, 1, postgres=database == "postgres")
    try:
        assert run.run(jobs=30, partitions=3, losses=3) == []
        assert run.facts["attempts"].get("lost"), "no fault has met a job"
    finally:
        run.close()


def test_nothing_is_lost_or_made_twice_or_otherwise_on_nfs(folder: Path) -> None:
    if reason := nfs_missing():
        pytest.skip(reason)
    run = ClusterRun(folder, 1, postgres=True, nfs=os.environ[NFS])
    try:
        assert run.run(jobs=30, partitions=3, losses=3) == []
    finally:
        run.close()


# --- what is left ---------------------------------------------------------------------------------


LEAVE = """
import sys, time
from pathlib import Path
from cluster.hosts import Cluster
with Cluster(Path(sys.argv[1]), ["a", "b"], postgres=False) as cluster:
    print([host.pid for host in cluster.hosts], flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_of_the_hosts_outlives_their_maker(how: signal.Signals, folder: Path) -> None:
    before = interfaces()
    with subprocess.Popen(
        [sys.executable, "-c", LEAVE, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ) as maker:
        assert maker.stdout is not None
        firsts = [psutil.Process(pid) for pid in json.loads(maker.stdout.readline())]
        everyone = [*firsts, *(one for first in firsts for one in first.children(recursive=True))]
        maker.send_signal(how)
    until(lambda: not any(map(alive, everyone)), within_s=20, what="all processes end")
    assert interfaces() == before, "the machine's own network was left alone"
    assert str(folder) not in Path("/proc/mounts").read_text()


def alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def interfaces() -> str:
    names = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    return "\n".join(line.split()[0] for line in names.splitlines())


def test_servers_listen_only_where_the_workers_are(folder: Path) -> None:
    before = listening()
    with Cluster(folder, ["a"], postgres=True):
        assert not {5432, 6379} & (listening() - before)


def listening() -> set[int]:
    """Return the ports on which processes outside of the hosts listen."""
    return {getattr(one.laddr, "port", 0) for one in psutil.net_connections("tcp") if one.status == "LISTEN"}
