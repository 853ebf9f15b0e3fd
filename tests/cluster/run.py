"""
Many jobs on several hosts, networks that break, and hosts that are lost, by a seed.

    make cluster SEED=1 JOBS=200 PARTITIONS=10 LOSSES=10 DATABASE=postgres
    PYTHONPATH=tests python -m cluster.run --seed 1 --jobs 30 --partitions 3 --losses 3 -v

Three worker hosts, two of them with one host name. Jobs come in families: a training, images from it, images
in shards, the best of more, and an archive in shards. Each family is a job file, submitted on a random host;
a submission that fails is repeated with the same keys. Faults are spread over the jobs that have ended, so
that jobs are under way at each. At the end cluster/checker.py compares all with an undisturbed run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from cluster.checker import ENDS, rows
from cluster.hosts import NFS, POSTGRES, REDIS, Cluster, Host, missing, nfs_missing
from machine import Ganq

from storage.datasets.synthetic import make_faces

CHECKER = Path(__file__).with_name("checker.py")
NAMES = ("alpha", "beta", "beta")
VARIANTS = 6
FAMILY = 5
"""Jobs of a family, without their shards."""
IN_FLIGHT = 12
"""Jobs and shards that wait or run at once, at most, when a family is added."""
QUIET_S = 300.0
"""So long may nothing end: jobs that wait for a lease, a time-out of TCP and a backoff take less."""
INTERVALS = {
    "heartbeat_seconds": 0.5,
    "progress_seconds": 0.3,
    "cancel_poll_seconds": 0.5,
    "lease_seconds": 4.0,
    "reap_seconds": 0.5,
    "poll_seconds": 1.0,
    "renotify_seconds": 5.0,
    "drain_seconds": 5.0,
}
# Jobs that last: a fault of an idle worker tests nothing. A sleep uses no processor time.
SLOW = "generate.drawn=sleep:0.2@1+;train.stepped=sleep:0.1@1+;gather.adopted=sleep:0.05@1+"

TRAIN: dict[str, Any] = {
    **{"size": 16, "ngf": 4, "ndf": 4, "nz": 8, "batch": 8, "epochs": 3},
    **{"save-every": 1, "checkpoint-seconds": 0.3, "metric": "none", "device": "cpu"},
}
GENERATE: dict[str, Any] = {"micro-batch": 4, "grid": 16, "checkpoint": "last", "device": "cpu"}
DRAWN: dict[str, dict[str, Any]] = {
    "images": {"count": 40},
    "shards": {"count": 32, "shard-size": 8},
    "best": {"keep": 5, "of": 30},
    "archive": {"count": 24, "shard-size": 8, "format": "tar"},
}


def family(variant: int, number: int, data: Path) -> list[dict[str, Any]]:
    """Return the jobs of a file; those of one variant differ in their names only."""
    training = f"train{variant}-{number}"
    recipe = ("dcgan", "sngan")[variant % 2]
    jobs = [
        {"kind": "train", "name": training, "recipe": recipe, "seed": variant, "data": str(data), **TRAIN}
    ]
    for word, options in DRAWN.items():
        how = {"from": training, "seed": variant, **GENERATE, **options}
        jobs.append({"kind": "generate", "name": f"{word}{variant}-{number}", **how})
    return [{**job, "submit-key": f"key-{job['name']}"} for job in jobs]


class ClusterRun:
    """
    Args:
        folder: everything lies here; a short path.
        postgres: the database; else SQLite on the disk of the machine that the hosts share.
        nfs: the export that holds the volume; see cluster.hosts.
    """

    def __init__(
        self, folder: Path, seed: int, *, postgres: bool, nfs: str = "", verbose: bool = False
    ) -> None:
        self.folder = folder
        self.verbose = verbose
        self.rng = random.Random(f"{seed} {postgres}")
        self.accepted: dict[int, str] = {}
        self.counts: Counter[str] = Counter()
        self.began = time.monotonic()
        self.workers: dict[Host, subprocess.Popen[bytes]] = {}
        self.children: list[subprocess.Popen[bytes]] = []
        self.families = self.accepted_families = 0
        self.submission: subprocess.Popen[bytes] | None = None
        self.answer = folder / "answer.json"
        """What the submission has printed."""
        self.facts: dict[str, Any] = {}
        self.data = make_faces(folder / "faces", count=40, size=24)
        self.cluster = Cluster(folder, NAMES, postgres=postgres, nfs=nfs)
        self.env = {f"GANQ_{name.upper()}": str(value) for name, value in INTERVALS.items()}
        self.env |= {"GANQ_VOLUME": str(self.cluster.volume), "GANQ_REDIS_URL": self.cluster.redis.url}
        self.env |= {"GANQ_ENABLE_FAILPOINTS": "1", "GANQ_FAILPOINTS": SLOW, "GANQ_USER": "cluster"}
        server = self.cluster.postgres
        if server is not None:
            name = server.create()
            self.env["GANQ_DATABASE_URL"] = server.network_url(name)
            self.table = server.conninfo(name)
        else:
            (folder / "table").mkdir()
            self.table = f"sqlite:///{folder / 'table' / 'ganq.db'}"
            self.env["GANQ_DATABASE_URL"] = self.table

    def close(self) -> None:
        self.cluster.close()
        for child in self.children:
            child.wait()

    # --- hosts ----------------------------------------------------------------------------

    def on(self, host: Host) -> Ganq:
        """Return the command line of a host, with its own home and temporary folder."""
        env = {**self.env, "GANQ_HOME": str(host.folder / "home"), "TMPDIR": str(host.folder / "tmp")}
        return Ganq(env, self.folder, within=host.within(cwd=self.folder))

    def worker_name(self, host: Host) -> str:
        return f"w{self.cluster.workers.index(host) + 1}"

    def start(self, host: Host, name: str = "") -> "subprocess.Popen[bytes]":
        """Start a worker; `name`: instead of worker_name()."""
        self.workers[host] = self.on(host).start_worker(name or self.worker_name(host))
        self.children.append(self.workers[host])
        return self.workers[host]

    def tend(self) -> None:
        """Start a worker again that has ended, as a service manager does; submit what is next."""
        for host, worker in self.workers.items():
            if host.runs and worker.poll() is not None:
                self.note(f"the worker on {self.at(host)} has ended with {worker.returncode}")
                self.counts["worker exits"] += 1
                self.start(host)
        self.feed()

    def at(self, host: Host) -> str:
        return f"host {self.cluster.workers.index(host) + 1} ({host.name})"

    # --- jobs -----------------------------------------------------------------------------

    def feed(self) -> None:
        """Keep one submission of a family under way, on any host, until all are accepted."""
        if self.submission is None:
            if self.accepted_families == self.families or self.open() >= IN_FLIGHT:
                return
            running = [one for one in self.cluster.workers if one.runs]
            if running:
                self.submission = self.submit(self.rng.choice(running))
            return
        code = self.submission.poll()
        if code == 0:
            for job in json.loads(self.answer.read_text()):
                self.accepted[job["id"]] = job["name"]
            self.accepted_families += 1
        elif code is not None:
            self.counts["refused submissions"] += 1
            self.note(f"a submission has ended with {code}; once more")
        if code is not None:
            self.submission = None

    def submit(self, host: Host) -> "subprocess.Popen[bytes]":
        number = self.accepted_families
        file = self.folder / f"family-{number}.json"
        file.write_text(json.dumps({"job": family(number % VARIANTS, number, self.data)}))
        with open(self.answer, "wb") as answer, open(self.folder / "submit.log", "ab") as log:
            ganq = self.on(host)
            command = [
                *ganq.within,
                sys.executable,
                "-P",
                "-m",
                "cli.main",
                "submit",
                "-f",
                str(file),
                "--json",
            ]
            self.children.append(subprocess.Popen(command, env=ganq.env, stdout=answer, stderr=log))
        return self.children[-1]

    def open(self) -> int:
        return self._count(f"state NOT IN {ENDS}")

    def ended(self) -> int:
        return self._count(f"state IN {ENDS} AND part_of IS NULL")

    def busy(self) -> list[Host]:
        """Return the hosts whose workers have a job."""
        found = rows(self.table, "SELECT DISTINCT worker FROM attempt WHERE ended_at IS NULL")
        return [host for host in self.cluster.workers if {"worker": self.worker_name(host)} in found]

    def _count(self, which: str) -> int:
        return int(rows(self.table, f"SELECT count(*) AS n FROM job WHERE {which}")[0]["n"])

    # --- faults ---------------------------------------------------------------------------

    def partition(self, busy: list[Host]) -> None:
        """Cut a host that has a job, and perhaps others, from a server or both, one way or both."""
        others = self.rng.sample(self.cluster.workers, self.rng.choice((0, 0, 1, 2)))
        hosts = list(dict.fromkeys([self.rng.choice(busy), *others]))
        servers = self.rng.choice(((POSTGRES,), (REDIS,), (POSTGRES, REDIS)))
        way = self.rng.choice(("both", "out", "in"))
        # Shorter than the lease; longer; longer than TCP waits for an acknowledgement (20 s).
        seconds = self.rng.choice((self.rng.uniform(1, 3), self.rng.uniform(5, 12), self.rng.uniform(22, 28)))
        names = {POSTGRES: "Postgres", REDIS: "Redis"}
        what = " and ".join(names[one] for one in servers)
        where = ", ".join(map(self.at, hosts))
        self.note(f"cut {where} from {what} ({way}) for {seconds:.1f} s")
        for host in hosts:
            for server in servers:
                self.cluster.cut(host, server, way=way)
        self.wait(seconds)
        self.cluster.heal()
        self.counts["partitions"] += 1
        self.counts[f"partitions of {what}"] += 1
        self.counts["partitions one way"] += way != "both"

    def lose_host(self, busy: list[Host]) -> None:
        """Kill everything on a host that has a job; boot it again after a while."""
        host = self.rng.choice(busy)
        away = self.rng.choice((0.0, self.rng.uniform(1, 4), self.rng.uniform(5, 15)))
        self.note(f"lose {self.at(host)} for {away:.1f} s")
        host.lose()
        self.workers[host].wait()
        self.wait(away)
        self.cluster.back(host)
        self.start(host)
        self.counts["host losses"] += 1

    def wait(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            self.tend()
            time.sleep(0.2)

    # --- the run --------------------------------------------------------------------------

    def run(self, *, jobs: int, partitions: int, losses: int) -> list[str]:
        """Return the checker's sentences."""
        self.families = -(-jobs // FAMILY)
        self.calm(min(self.families, VARIANTS))
        self.on(self.cluster.workers[0])("db", "upgrade")
        for host in self.cluster.workers:
            self.start(host)
        faults = [self.partition] * partitions + [self.lose_host] * losses
        self.rng.shuffle(faults)
        self.began = last_end = time.monotonic()
        done = seen = 0
        while True:
            self.wait(0.3)
            # The last fault still finds jobs under way.
            due = done < len(faults) and seen >= done * 0.95 * self.families * FAMILY / len(faults)
            if due and (busy := self.busy()):
                faults[done](busy)
                done += 1
            if self.accepted_families == self.families and self.open() == 0:
                break  # perhaps before the last fault: the counts say so
            now = self.ended()
            if now != seen:
                seen, last_end = now, time.monotonic()
            elif time.monotonic() - last_end > QUIET_S:
                self.note(f"nothing has ended for {QUIET_S:.0f} s")
                break
        self.counts["seconds"] = round(time.monotonic() - self.began)
        return [*self.leave(), *self.check()]

    def calm(self, variants: int) -> None:
        """Run one family of each variant on one undisturbed worker, without a network."""
        home = self.folder / "calm"
        home.mkdir()
        intervals = {name: value for name, value in self.env.items() if name.endswith("_SECONDS")}
        env = {**intervals, "GANQ_HOME": str(home), "GANQ_REDIS_URL": "redis://127.0.0.1:1/0"}
        ganq = Ganq({**env, "GANQ_USER": "cluster"}, home)
        for variant in range(variants):
            file = home / f"family-{variant}.json"
            file.write_text(json.dumps({"job": family(variant, 0, self.data)}))
            ganq("submit", "-f", str(file))
        worker = ganq.start_worker("calm", options=("--gpus", "none", "--exit-when-idle", "2"))
        try:
            worker.wait(1200)
        finally:
            ganq.stop()

    def leave(self) -> list[str]:
        """Tell all workers to leave; return those that do not."""
        for worker in self.workers.values():
            for process in psutil.Process(worker.pid).children() if worker.poll() is None else ():
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGTERM)
        found = []
        for host, worker in self.workers.items():
            try:
                worker.wait(60)
            except subprocess.TimeoutExpired:
                found.append(f"the worker on {self.at(host)} has not left")
            if left := [one.name() for one in host.family()]:
                found.append(f"{self.at(host)} still runs {left}")
        return found

    def check(self) -> list[str]:
        """Run `ganq gc`, then the checker as a program of its own, and remember its facts."""
        # A worker that was cut off before its commit leaves a whole result, which no row names.
        self.on(self.cluster.workers[0])("gc")
        accepted = self.folder / "accepted.json"
        accepted.write_text(json.dumps(self.accepted))
        calm = self.folder / "calm"
        tables = ["--table", self.table, "--like-table", f"sqlite:///{calm / 'ganq.db'}"]
        volumes = ["--volume", str(self.cluster.volume), "--like-volume", str(calm / "volume")]
        # On a host, because a volume on NFS is mounted there.
        command = [*self.cluster.workers[0].within(), sys.executable, "-I", str(CHECKER)]
        command += [*tables, *volumes, "--accepted", str(accepted)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        *found, facts = done.stdout.splitlines() or [""]
        if done.returncode not in (0, 1) or not facts:
            return [f"the checker failed: {done.stderr.strip()}"]
        self.facts = json.loads(facts)
        return found

    def note(self, what: str) -> None:
        if self.verbose:
            print(f"{time.monotonic() - self.began:6.1f} s  {what}", flush=True)


def short_folder() -> Path:
    """Create a folder with a short path: a socket's path has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="gq-hosts-"))
    folder.chmod(0o755)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(prog="cluster.run", description=(__doc__ or "").strip().split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=30)
    parser.add_argument("--partitions", type=int, default=3)
    parser.add_argument("--losses", type=int, default=3)
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="postgres")
    parser.add_argument("--nfs", default="", help=f"an NFS export for the volume, as {NFS} of the tests")
    parser.add_argument("--keep", action="store_true", help="leave the table, the volume and the logs")
    parser.add_argument("-v", action="store_true", help="say everything that is done")
    given = parser.parse_args()
    if why := missing() or (given.nfs and nfs_missing()):
        print(why, file=sys.stderr)
        return 2
    for name in [one for one in os.environ if one.startswith("GANQ_")]:
        del os.environ[name]  # a developer's own settings
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that it cleans up
    folder = short_folder()
    run = None
    try:
        run = ClusterRun(
            folder, given.seed, postgres=given.database == "postgres", nfs=given.nfs, verbose=given.v
        )
        found = run.run(jobs=given.jobs, partitions=given.partitions, losses=given.losses)
        for one in found:
            print(one)
        told = {"seed": given.seed, "database": given.database, **run.counts, **run.facts}
        print(json.dumps({**told, "violations": len(found)}))
        return 1 if found else 0
    finally:
        if run is not None:
            run.close()
        if given.keep:
            print(f"everything is in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
