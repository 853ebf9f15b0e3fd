"""The operating system refuses what a reader of untrusted bytes does not need; no audit hook is set."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from storage import sandbox
from storage.datasets.decode_pool import Decoder
from storage.datasets.sources import Reading
from storage.weights.load import read_weights

MODULES = (
    "_posixsubprocess, ctypes, fcntl, importlib.util, mmap, os, resource, select, signal, socket, subprocess"
    ", sys, threading, time"
)
LOAD = f"""
import {MODULES}
spec = importlib.util.spec_from_file_location('ganq_sandbox', {sandbox.__file__!r})
sandbox = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sandbox)
"""
# What a hole in a reader could try. `libc` stands for native code, which no audit hook sees.
ATTACKS = {
    "a shell without an audit event": (
        "_posixsubprocess.fork_exec([b'/bin/touch', b'canary'], [b'/bin/touch'], True, (), None, [],"
        " -1, -1, -1, -1, -1, -1, *os.pipe(), False, False, -1, None, None, None, -1, None, True)"
    ),
    "os.system": "native(-abs(os.system('touch canary')))",
    "subprocess": "subprocess.run(['touch', 'canary'], check=True)",
    "posix_spawn": "os.posix_spawn('/bin/touch', ['touch', 'canary'], {})",
    "exec": "os.execv('/bin/touch', ['touch', 'canary'])",
    "fork": "os.fork()",
    "clone3": "native(libc.syscall(435, ctypes.create_string_buffer(64), 64))",
    "vfork": "native(libc.vfork())",
    "thread": "threading.Thread(target=print).start()",
    "a secret file": "open('/etc/shadow', 'rb')",
    "a file of its own user": "open('kept', 'rb')",
    "a file by native code": "native(libc.open(b'kept', 0))",
    "a list of files": "os.listdir('/')",
    "writing a file": "open('canary', 'wb')",
    "writing by native code": "native(libc.open(b'canary', 0o101, 0o644))",
    "writing what is there": "native(libc.open(b'kept', 1))",
    "truncating": "native(libc.truncate(b'kept', 0))",
    "modes": "os.chmod('kept', 0o777)",
    "modes by native code": "native(libc.chmod(b'kept', 0o777))",
    "owners": "os.chown('kept', 1234, 1234)",
    "times": "os.utime('kept', (0, 0))",
    "removing": "native(libc.unlink(b'kept'))",
    "renaming": "native(libc.rename(b'kept', b'canary'))",
    "a folder": "native(libc.mkdir(b'canary', 0o755))",
    "a link": "native(libc.symlink(b'/etc/passwd', b'canary'))",
    "a hard link": "native(libc.link(b'kept', b'canary'))",
    "a fifo": "native(libc.mkfifo(b'canary', 0o644))",
    "another folder": "os.chdir('/')",
    "chroot": "os.chroot('/')",
    "a TCP socket": "socket.socket()",
    "a unix socket": "socket.socket(socket.AF_UNIX)",
    "a netlink socket": "socket.socket(socket.AF_NETLINK)",
    "a socket pair": "socket.socketpair()",
    "a signal to its parent": "os.kill(os.getppid(), signal.SIGTERM)",
    "a signal to all": "native(libc.kill(-1, 9))",
    "tracing": "native(libc.ptrace(16, os.getppid(), 0, 0))",
    "memory of its parent": "native(libc.syscall(310, os.getppid(), 0, 0, 0, 0, 0))",
    "io_uring": "native(libc.syscall(425, 4, ctypes.create_string_buffer(256)))",
    "memfd": "os.memfd_create('canary')",
    "a new descriptor": "os.dup(0)",
    "root again": "os.setuid(0)",
    "a user namespace": "native(libc.unshare(0x10000000))",
    "mounting": "native(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
    "the keys of the kernel": "native(libc.syscall(250, 0, -3, 1))",
    "higher limits": "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))",
    "more memory": "mmap.mmap(-1, 8 << 30)",
    "bpf": "native(libc.syscall(321, 0, 0, 0))",
    "the environment": "os.environ['CANARY']; raise SystemExit(3)",
}
ESCAPE = """
missing = {confine}
libc = ctypes.CDLL(None, use_errno=True)
def native(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), 'native')
try:
    {attack}
except (OSError, MemoryError, KeyError, ValueError, RuntimeError) as exc:
    print('refused', missing)
"""
CONFINE = "sandbox.confine(memory_bytes=1 << 30, cpu_seconds=20)"


def run(code: str, folder: Path, *, user: int | None = None) -> "subprocess.CompletedProcess[str]":
    """Run code in a process that has loaded the sandbox; as another user from then on, if one is given."""
    become = f"os.setgroups([]); os.setgid({user}); os.setuid({user})\n" if user is not None else ""
    return subprocess.run(
        [sys.executable, "-c", LOAD + become + code],
        cwd=folder,
        env={"CANARY": "secret", "PATH": os.defpath},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A file that whoever runs the attack may do all with, were it not for the walls."""
    tmp_path.chmod(0o777)
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "kept").chmod(0o666)
    os.utime(tmp_path / "kept", (1e9, 1e9))
    return tmp_path


def require_untouched(folder: Path) -> None:
    about = (folder / "kept").stat()
    assert [path.name for path in folder.iterdir()] == ["kept"]
    assert (folder / "kept").read_text() == "kept"
    assert (stat.S_IMODE(about.st_mode), about.st_uid, about.st_mtime) == (0o666, os.getuid(), 1e9)


USERS = pytest.mark.parametrize(
    "user",
    [
        None,
        pytest.param(12345, marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can change user")),
    ],
    ids=["this user", "not root"],
)
NATIVE = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the attacks name x86_64's system calls")


@NATIVE
@USERS
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_the_operating_system_refuses_what_a_reader_does_not_need(kept: Path, attack: str, user: int) -> None:
    done = run(ESCAPE.format(confine=CONFINE, attack=attack), kept, user=user)
    assert done.stdout == "refused {}\n", done.stdout + done.stderr
    require_untouched(kept)


HELD_BY_ONE = {
    "_landlock": ["a secret file", "a file by native code", "writing a file", "removing", "exec"],
    "_seccomp": [name for name in ATTACKS if name not in ("more memory", "higher limits", "the environment")],
}


@NATIVE
@pytest.mark.parametrize(
    ("wall", "name"), [(wall, name) for wall, names in HELD_BY_ONE.items() for name in names]
)
def test_each_wall_holds_by_itself(kept: Path, wall: str, name: str) -> None:
    confine = f"sandbox._no_new_privileges() or sandbox.{wall}() or os.environ.clear() or {{}}"
    done = run(ESCAPE.format(confine=confine, attack=ATTACKS[name]), kept)
    assert done.stdout == "refused {}\n", done.stdout + done.stderr
    require_untouched(kept)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_root_becomes_user_nobody_without_capabilities(tmp_path: Path) -> None:
    code = (
        "status = open('/proc/self/status')\n"
        f"print({CONFINE}, *[one.split()[1:] for one in status if one.startswith(('Uid', 'Gid', 'Groups',"
        " 'CapEff', 'CapPrm', 'NoNewPrivs'))])"
    )
    done = run(code, tmp_path)
    nobody, none = [str(sandbox.NOBODY_ID)] * 4, ["0" * 16]
    # In the order of the file.
    assert done.stdout == f"{{}} {nobody} {nobody} [] {none} {none} {['1']}\n", done.stderr


def test_a_wall_that_the_kernel_does_not_have_is_named_and_the_others_hold(kept: Path) -> None:
    confine = (
        "setattr(sandbox, 'LANDLOCK_CREATE_RULESET', 9999) or setattr(sandbox, 'SECCOMP_NUMBER', {}) or "
        + CONFINE
    )
    done = run(ESCAPE.format(confine=confine, attack="open('canary', 'wb')"), kept)
    assert done.stdout.startswith(
        "refused {'landlock': 'function not implemented', 'seccomp': 'not known for"
    )
    require_untouched(kept)


def test_the_two_tables_of_system_calls_agree() -> None:
    """Every architecture allows the same calls, but for those that only an older one has."""
    ours, theirs = (set(table) for table in sandbox.ALLOWED.values())
    assert ours - theirs == {"time"}
    assert not theirs - ours
    for machine, calls in sandbox.ALLOWED.items():
        assert len(set(calls.values())) == len(calls)
        assert sandbox._filter(machine)


def is_confined(pid: int) -> bool:
    """Whether a process has a seccomp filter, no new privileges, and is not root."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return False
    return "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status and "Uid:\t0" not in status


def test_a_process_that_decodes_images_is_confined_before_the_first() -> None:
    decoder = Decoder(Reading())
    try:
        assert is_confined(decoder._ensure().pid)
    finally:
        decoder.close()


def test_the_process_that_opens_weights_is_confined(tmp_path: Path) -> None:
    torch.save({f"Gene.{i}": torch.ones(1 << 20) for i in range(16)}, tmp_path / "g.pth")
    seen: list[bool] = []
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_weights, tmp_path / "g.pth")
        while not reading.done():
            seen += [is_confined(child.pid) for child in psutil.Process().children()]
    assert len(reading.result()) == 16
    assert True in seen
