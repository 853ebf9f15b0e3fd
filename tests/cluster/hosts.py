"""
Several hosts on one machine: each with its own network, name, processes, mounts and boot.

    router ─┬─ 10.91.0.2 Postgres, 10.91.0.3 Redis
            ├─ 10.91.1.2 the first worker's host
            └─ 10.91.2.2 ...

Nothing listens outside of these namespaces. All packets between hosts pass the router, whose rules drop or
slow any direction of any pair. The first process of each host dies with this one, also after kill -9; the
kernel then ends the rest of the host and takes its network away.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import psutil
from machine import until
from services import Postgres, Redis, Server, die_with_parent, postgres_binaries, redis_binary

NEEDED = ("ip", "nsenter", "unshare", "mount")
POSTGRES, REDIS = "10.91.0.2", "10.91.0.3"
SLOW_ROAD = Path(__file__).with_name("slow_road.py")
SLOW_TABLE = "91"
NFS = "GANQ_TEST_NFS_EXPORT"


def missing() -> str | None:
    """Return why there can be no hosts on this machine."""
    for program in NEEDED:
        if shutil.which(program) is None:
            return f"no {program} on this machine (apt-get install iproute2 util-linux)"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    if postgres_binaries() is None or redis_binary() is None:
        return "no Postgres or no Redis on this machine"
    pair = ["unshare", "--net", "ip", "link", "add", "name", "v0", "type", "veth", "peer", "name", "v1"]
    done = subprocess.run(pair, capture_output=True, text=True, check=False)
    return f"the kernel refuses a pair of interfaces: {done.stderr.strip()}" if done.returncode else None


def nfs_missing() -> str | None:
    """Return why there can be no NFS volume: each host mounts the export by itself, with its own cache."""
    if "nfs4" not in Path("/proc/filesystems").read_text():
        return "this kernel has no NFS client (/proc/filesystems)"
    if not os.environ.get(NFS):
        return f"no NFS server: {NFS} names an export, such as localhost:/srv/ganq"
    return None


def run(*command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done


class Host:
    """
    Args:
        folder: its local disk.
        name: what gethostname() says; two hosts may have one.
        script: what its first process runs before it waits, in sh.
    """

    def __init__(self, folder: Path, name: str, script: str = "true") -> None:
        self.folder = folder
        self.name = name
        self.script = script
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.boot()

    def boot(self) -> None:
        """Start, or start again after lose(): another boot, the same disk, an empty /tmp."""
        boot_id, ready = self.folder / "boot_id", self.folder / "ready"
        boot_id.write_text(f"{uuid.uuid4()}\n")
        ready.unlink(missing_ok=True)
        (self.folder / "tmp").mkdir(exist_ok=True)
        steps = [
            f"hostname {self.name}",
            f"mount --bind {boot_id} /proc/sys/kernel/random/boot_id",
            f"mount -t tmpfs -o mode=1777 tmpfs {self.folder / 'tmp'}",
            "ip link set lo up",
            self.script,
            f"touch {ready}",
        ]
        # wait: the first process of a namespace inherits the orphans and must collect them.
        script = f"{' && '.join(steps)} && while :; do sleep 1000 & wait; done"
        kinds = ("--net", "--uts", "--ipc", "--pid", "--mount")
        with open(self.folder / "boot.log", "wb") as log:
            self.process = subprocess.Popen(
                ["unshare", *kinds, "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, signal.SIGKILL),
            )
        deadline = time.monotonic() + 20
        while not ready.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.lose()
                raise RuntimeError(f"{self.name} does not start: {(self.folder / 'boot.log').read_text()}")
            time.sleep(0.01)
        (first,) = psutil.Process(self.process.pid).children()
        self.pid = first.pid

    def within(self, *, user: int | None = None, cwd: Path | None = None) -> list[str]:
        """Return a command that runs another one on this host."""
        options = ["-t", str(self.pid), "-n", "-u", "-i", "-p", "-m", f"--wd={cwd or '/'}"]
        if user is not None:
            options += ["-S", str(user), "-G", str(user)]
        return ["nsenter", *options, "--"]

    def ip(self, *arguments: str, check: bool = True) -> str:
        return run("nsenter", "-t", str(self.pid), "-n", "--", "ip", *arguments, check=check).stdout

    def lose(self) -> None:
        """Kill every process of this host with SIGKILL, as if its power had failed."""
        if self.process is not None and self.process.poll() is None:
            for first in psutil.Process(self.process.pid).children():
                with suppress(psutil.NoSuchProcess):
                    first.kill()  # the kernel kills all others of the namespace
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            self.process.kill()
            self.process.wait()

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def family(self) -> list[psutil.Process]:
        """Return its processes without the first one and its sleep."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for one in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.readlink(f"/proc/{one.pid}/ns/pid") == space and one.name() not in ("sh", "sleep"):
                    found.append(one)
        return found


class HostsPostgres(Postgres):
    """The Postgres of the tests, on a host of its own."""

    def __init__(self, binaries: Path, host: Host) -> None:
        self.host = host
        # A killed server keeps what it has passed to the kernel; only the rest can be lost.
        super().__init__(
            binaries, settings={"synchronous_commit": "on", "listen_addresses": POSTGRES, "port": "5432"}
        )

    def _prepare(self) -> None:
        super()._prepare()
        self.port = 5432
        with open(self.folder / "data" / "pg_hba.conf", "a") as rules:
            rules.write("host all all 10.91.0.0/16 scram-sha-256\n")

    def start(self, command: list[str], ready: Any, **how: Any) -> None:
        user = how.pop("user", None)
        for key in ("group", "extra_groups"):
            how.pop(key, None)
        super().start([*self.host.within(user=user), *command], ready, **how)

    def network_url(self, database: str) -> str:
        return f"postgresql+psycopg://ganq:{self.password}@{POSTGRES}:{self.port}/{database}"


class HostsRedis(Redis):
    """A Redis on a host of its own; without a password, because nobody else reaches it."""

    def __init__(self, binary: str, host: Host) -> None:
        self.host = host
        super().__init__(binary)

    @property
    def url(self) -> str:
        return f"redis://{REDIS}:6379/0"

    def restart(self) -> None:
        socket = self.folder / "redis.sock"
        options = ["--port", "6379", "--bind", REDIS, "--protected-mode", "no", "--dir", str(self.folder)]
        options += ["--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
        self.start([*self.host.within(), self.binary, *options], socket.exists)


Cut = tuple[str, ...]
"""Arguments of one rule of the router: an address, and one that it no longer reaches."""


class Cluster:
    """
    A router, a host with Postgres and Redis, and hosts for workers that share a volume.

    Args:
        folder: with a short path: a socket's path has at most 107 bytes.
        names: of the workers' hosts.
        postgres: False leaves Postgres out; a SQLite table then lies on a disk that all hosts share.
        nfs: an export that each host mounts by itself, instead of a folder that all have.
    """

    def __init__(self, folder: Path, names: Sequence[str], *, postgres: bool, nfs: str = "") -> None:
        self.folder = folder
        self.volume = folder / "volume"
        self.shared = folder / "shared"
        self.cuts: list[Cut] = []
        self.hosts: list[Host] = []
        self.servers: list[Server] = []
        self.roads: list[subprocess.Popen[bytes]] = []
        for one in (self.volume, self.shared):
            one.mkdir()
        try:
            forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
            loose = "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $f; done"
            self.router = self._add(Host(folder / "router", "router", f"{forward} && {loose}"))
            self.server_host = self._add(Host(folder / "server", "server"))
            self._connect(self.server_host, 0, POSTGRES, REDIS)
            # nosharecache: else hosts of one kernel would see each other's writes at once.
            mount = f"mount --bind {self.shared} {self.volume}"
            if nfs:
                mount = f"mount -t nfs4 -o nosharecache,hard {nfs} {self.volume}"
            self.workers = []
            for number, name in enumerate(names, 1):
                host = self._add(Host(folder / f"host{number}", name, mount))
                self.workers.append(host)
                self._connect(host, number, self.address(host))
            self.redis = HostsRedis(str(redis_binary()), self.server_host)
            self.servers.append(self.redis)
            self.postgres: HostsPostgres | None = None
            if postgres:
                binaries = postgres_binaries()
                assert binaries is not None
                self.postgres = HostsPostgres(binaries, self.server_host)
                self.servers.append(self.postgres)
        except BaseException:
            self.close()
            raise

    def _add(self, host: Host) -> Host:
        self.hosts.append(host)
        return host

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every host; its servers end with it."""
        for host in reversed(self.hosts):
            host.lose()
        for road in self.roads:  # in the router's network, but not among its processes
            road.kill()
            road.wait()
        for server in self.servers:
            server.stop()

    # --- the network ----------------------------------------------------------------------

    def address(self, host: Host) -> str:
        return f"10.91.{self.workers.index(host) + 1}.2"

    def _connect(self, host: Host, number: int, *addresses: str) -> None:
        interface, gateway = f"h{number}", f"10.91.{number}.1"
        # The kernel takes the network of a lost host away in its own time.
        self.router.ip("link", "del", interface, check=False)
        peer = ("peer", "name", "eth0", "netns", str(host.pid))
        until(lambda: self._linked(interface, peer), within_s=20, what=f"a cable to {host.name}")
        self.router.ip("addr", "add", f"{gateway}/24", "dev", interface)
        self.router.ip("link", "set", interface, "up")
        for address in addresses:
            host.ip("addr", "add", f"{address}/24", "dev", "eth0")
        host.ip("link", "set", "eth0", "up")
        host.ip("route", "add", "default", "via", gateway)

    def _linked(self, interface: str, peer: tuple[str, ...]) -> bool:
        self.router.ip("link", "add", interface, "type", "veth", *peer, check=False)
        return interface in self.router.ip("-o", "link")

    def cut(self, host: Host, server: str, *, way: str = "both") -> None:
        """
        Drop what passes between a host and a server, without an answer.

        Args:
            server: POSTGRES or REDIS.
            way: 'out' (what the host sends), 'in' (what it would receive) or 'both'.
        """
        here = self.address(host)
        pairs = {"out": [(here, server)], "in": [(server, here)]}
        for source, target in pairs.get(way, pairs["out"] + pairs["in"]):
            cut: Cut = ("from", source, "to", target, "blackhole", "pref", "100")
            if cut not in self.cuts:
                self.router.ip("rule", "add", *cut)
                self.cuts.append(cut)

    def slow(self, host: Host, *, delay_s: float, loss: float) -> None:
        """
        Let packets from and to a host arrive late, or not at all.

        By a process between them and not by tc netem, which many kernels leave out.

        Args:
            loss: probability for each packet.
        """
        road = ["nsenter", "-t", str(self.router.pid), "-n", "--", sys.executable, "-P", str(SLOW_ROAD)]
        self.roads.append(
            subprocess.Popen(
                [*road, str(delay_s), str(loss)],
                stdin=subprocess.DEVNULL,
                preexec_fn=partial(die_with_parent, signal.SIGKILL),
            )
        )
        until(lambda: "slow0" in self.router.ip("-o", "link"), within_s=20, what="the slow road")
        self.router.ip("link", "set", "slow0", "up")
        self.router.ip("route", "add", "default", "dev", "slow0", "table", SLOW_TABLE)
        here = self.address(host)
        # Only from the cables: what comes from the slow road has already been on it.
        for end, interface in (("from", f"h{self.workers.index(host) + 1}"), ("to", "h0")):
            rule: Cut = (end, here, "iif", interface, "lookup", SLOW_TABLE, "pref", "200")
            self.router.ip("rule", "add", *rule)
            self.cuts.append(rule)

    def heal(self) -> None:
        """Let all packets pass, at once."""
        for cut in self.cuts:
            self.router.ip("rule", "del", *cut)
        self.cuts.clear()
        for road in self.roads:
            road.kill()
            road.wait()
        self.roads.clear()

    # --- hosts ----------------------------------------------------------------------------

    def back(self, host: Host) -> None:
        """Boot a lost host again, with its old address."""
        host.boot()
        self._connect(host, self.workers.index(host) + 1, self.address(host))
