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
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster.hosts import NFS, POSTGRES, REDIS, Cluster, Host, missing, nfs_missing
from cluster.run import ClusterRun, family, short_folder
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


@pytest.fixture
def cluster(folder: Path) -> Iterator[ClusterRun]:
    """Three hosts with the table of Postgres, and no worker yet."""
    run = ClusterRun(folder, 1, postgres=True)
    try:
        run.on(run.cluster.workers[0])("db", "upgrade")
        yield run
    finally:
        run.close()


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


# --- fault by fault -----------------------------------------------------------------------------


def submit(run: ClusterRun, host: Host, *names: str, **options: Any) -> list[int]:
    """Submit trainings."""
    model = family(1, 1, run.data)[0]
    jobs = [{**model, "name": name, "submit-key": name, **options} for name in names]
    file = run.folder / "some.json"
    file.write_text(json.dumps({"job": jobs}))
    return [int(job["id"]) for job in json.loads(run.on(host)("submit", "-f", str(file), "--json"))]


def state(run: ClusterRun, job_id: int) -> tuple[str, int]:
    server = run.cluster.postgres
    assert server is not None
    database = run.table.rpartition("dbname=")[2]
    ((now, attempt),) = server.sql(f"SELECT state, attempt FROM job WHERE id = {job_id}", database)
    return now, attempt


def outcomes(run: ClusterRun, job_id: int) -> list[tuple[str, str]]:
    server = run.cluster.postgres
    assert server is not None
    order = f"SELECT worker, outcome FROM attempt WHERE job_id = {job_id} ORDER BY number"
    return [(one[0], one[1]) for one in server.sql(order, run.table.rpartition("dbname=")[2])]


def running(run: ClusterRun, job_id: int) -> None:
    until(lambda: state(run, job_id)[0] == "running", what="a worker takes the job")


def succeeded(run: ClusterRun, job_id: int) -> None:
    until(lambda: state(run, job_id)[0] == "succeeded", within_s=300, what="the job succeeds")


@pytest.mark.parametrize("way", ["both", "out", "in"])
def test_a_worker_that_is_cut_off_from_the_database_publishes_nothing_and_another_goes_on(
    way: str, cluster: ClusterRun
) -> None:
    first, second, third = cluster.cluster.workers
    cluster.start(first)
    [job] = submit(cluster, third, "first", epochs=8)
    running(cluster, job)
    cluster.cluster.cut(first, POSTGRES, way=way)
    cluster.start(second)
    succeeded(cluster, job)
    cluster.cluster.heal()
    assert [one for one in outcomes(cluster, job) if one[1] == "succeeded"] == [("w2", "succeeded")]
    assert outcomes(cluster, job)[0] == ("w1", "lost")
    cluster.cluster.cut(second, POSTGRES)
    [later] = submit(cluster, third, "later")
    succeeded(cluster, later)
    assert outcomes(cluster, later)[-1] == ("w1", "succeeded"), "the first one works again"


@pytest.mark.parametrize("way", ["both", "out", "in"])
def test_a_worker_that_is_cut_off_from_redis_alone_works_on_and_finds_jobs_by_itself(
    way: str, cluster: ClusterRun
) -> None:
    host = cluster.cluster.workers[0]
    cluster.start(host)
    until(lambda: "is ready" in log(cluster, "w1"), what="a worker")
    cluster.cluster.cut(host, REDIS, way=way)
    [job] = submit(cluster, cluster.cluster.workers[1], "one")
    succeeded(cluster, job)
    assert outcomes(cluster, job) == [("w1", "succeeded")]


def test_a_slow_network_that_loses_packets_costs_no_attempt(cluster: ClusterRun) -> None:
    host = cluster.cluster.workers[0]
    cluster.cluster.slow(host, delay_s=0.05, loss=0.02)
    cluster.start(host)
    [job] = submit(cluster, host, "one")
    succeeded(cluster, job)
    assert outcomes(cluster, job) == [("w1", "succeeded")]


def test_the_job_of_a_host_that_is_gone_goes_on_elsewhere_after_the_lease(cluster: ClusterRun) -> None:
    first, second, _ = cluster.cluster.workers
    cluster.start(first)
    [job] = submit(cluster, second, "one", epochs=8)
    running(cluster, job)
    cluster.start(second)
    until(lambda: "is ready" in log(cluster, "w2"), what="another worker")
    first.lose()
    lost_at = time.monotonic()
    until(lambda: state(cluster, job) == ("running", 2), what="the second attempt")
    assert time.monotonic() - lost_at < 20, "the lease is 4 s"
    succeeded(cluster, job)
    assert outcomes(cluster, job) == [("w1", "lost"), ("w2", "succeeded")]


def test_a_lost_host_of_the_same_name_is_not_taken_for_this_one(cluster: ClusterRun) -> None:
    """Two machines with one name: a process id of the other says nothing about processes here."""
    _, first, second = cluster.cluster.workers
    assert first.name == second.name
    cluster.start(first)
    cluster.start(second)
    until(lambda: "is ready" in log(cluster, "w2") and "is ready" in log(cluster, "w3"), what="workers")
    jobs = submit(cluster, first, "one", "two", epochs=16)
    for job in jobs:
        running(cluster, job)
    time.sleep(6)  # longer than the lease: whoever looked for the other's process would not find it
    for job in jobs:
        assert state(cluster, job)[1] == 1, "its worker lives, on the other host"
        succeeded(cluster, job)
        assert len(outcomes(cluster, job)) == 1


def test_a_second_worker_of_one_name_refuses_until_the_first_is_gone(cluster: ClusterRun) -> None:
    """By default workers are named after their host."""
    _, first, second = cluster.cluster.workers
    one = cluster.start(first, "beta-cpu")
    until(lambda: "is ready" in log(cluster, "beta-cpu"), what="the first worker")
    assert cluster.start(second, "beta-cpu").wait(120) != 0
    assert "--name" in log(cluster, "beta-cpu"), "the way out"
    assert one.poll() is None
    first.lose()
    again = cluster.start(second, "beta-cpu")
    [job] = submit(cluster, second, "one")
    succeeded(cluster, job)
    assert again.poll() is None


def log(run: ClusterRun, name: str) -> str:
    path = run.folder / f"{name}.log"
    return path.read_text() if path.exists() else ""


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
