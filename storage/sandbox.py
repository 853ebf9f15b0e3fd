"""
Confine a process that reads untrusted bytes: the kernel refuses what the reader does not need.

The processes that open foreign weights (unpickle.py), images (decode_worker.py) and archives
(archive_process.py) call confine() once all their modules are loaded. Their input is an open file or a pipe,
their output another, and after confine() they can only read, compute and write to those. The layers are
independent of each other:

    limits       address space, CPU time, file size, no new descriptors, no new processes
    user         nobody, where the process is root; no capabilities
    landlock     no path of any file system can be opened; no TCP; no signals to other processes
    seccomp      a list of allowed system calls; every other call fails with EPERM

A layer that the kernel lacks is named in the result, and `ganq doctor` reports it. This module imports
nothing of ganq and is loaded by its path: see docs/decisions/0015.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Callable

NOBODY_ID = 65534
PR_SET_NO_NEW_PRIVS = 38

LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446  # the same number on all architectures
LANDLOCK_VERSION = 1
# Rights by version of the interface (linux/landlock.h): all that exist are handled, and none is granted.
LANDLOCK_FILES = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
LANDLOCK_TCP = 0x3  # bind and connect, from version 4 on
LANDLOCK_SCOPES = 0x3  # abstract unix sockets and signals, from version 6 on

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_TSYNC = 1  # for every thread
SECCOMP_RET_ALLOW, SECCOMP_RET_EPERM = 0x7FFF0000, 0x00050001
BPF_LOAD, BPF_JUMP_EQ, BPF_RETURN = 0x20, 0x15, 0x06
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16  # in struct seccomp_data
AT_EMPTY_PATH = 0x1000

# Reading and writing open files, memory, time, and exit.
ALLOWED = {
    "x86_64": {
        **{"read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10},
        **{"munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15},
        **{"pread64": 17, "readv": 19, "writev": 20, "sched_yield": 24, "mremap": 25, "madvise": 28},
        **{"nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "gettimeofday": 96, "getrusage": 98},
        **{"getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "sigaltstack": 131},
        **{"gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "restart_syscall": 219},
        **{"clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231},
        **{"set_robust_list": 273, "getcpu": 309, "getrandom": 318, "membarrier": 324, "rseq": 334},
    },
    "aarch64": {
        **{"read": 63, "write": 64, "close": 57, "fstat": 80, "lseek": 62, "mmap": 222, "mprotect": 226},
        **{"munmap": 215, "brk": 214, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139},
        **{"pread64": 67, "readv": 65, "writev": 66, "sched_yield": 124, "mremap": 216, "madvise": 233},
        **{"nanosleep": 101, "getpid": 172, "exit": 93, "uname": 160, "gettimeofday": 169},
        **{"getrusage": 165, "getuid": 174, "getgid": 176, "geteuid": 175, "getegid": 177},
        **{"sigaltstack": 132, "gettid": 178, "futex": 98, "sched_getaffinity": 123},
        **{"restart_syscall": 128, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115},
        **{"exit_group": 94, "set_robust_list": 99, "getcpu": 168, "getrandom": 278, "membarrier": 283},
        "rseq": 293,
    },
}
# System calls that are allowed if one argument has one value: name → (number, argument, value).
# fstat() of newer C libraries is newfstatat() with an empty path; a process may move its own limits down.
CONDITIONAL = {
    "x86_64": {"newfstatat": (262, 3, AT_EMPTY_PATH), "prlimit64": (302, 0, 0)},
    "aarch64": {"newfstatat": (79, 3, AT_EMPTY_PATH), "prlimit64": (261, 0, 0)},
}
AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SECCOMP_NUMBER = {"x86_64": 317, "aarch64": 277}
CAPSET_NUMBER = {"x86_64": 126, "aarch64": 91}
CAPABILITIES_V3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def confine(*, memory_bytes: int, cpu_seconds: int | None, file_bytes: int = 0) -> dict[str, str]:
    """
    Drop irrevocably all rights that a reader of untrusted bytes does not need.

    No module can be imported afterwards. Call it with a single thread: others keep their Landlock domain.

    Args:
        memory_bytes: address space beyond what is in use now.
        cpu_seconds: beyond what was used so far; None leaves that limit to the caller.
        file_bytes: how large a file that is open for writing may become.

    Returns:
        The missing layers: name → reason. Empty if none is missing.
    """
    os.environ.clear()
    limit(memory_bytes=memory_bytes, cpu_seconds=cpu_seconds, file_bytes=file_bytes)
    missing: dict[str, str] = {}
    # In this order: Landlock needs a descriptor; without root, it and seccomp need no_new_privs; the
    # limit on processes applies only after the change of user.
    for name, build in (
        ("no_new_privs", _no_new_privileges),
        ("landlock", _landlock),
        ("user", _other_user),
        ("limits", _limit_processes_and_files),
        ("seccomp", _seccomp),
    ):
        try:
            build()
        except (OSError, KeyError, AttributeError, ValueError) as exc:
            missing[name] = _why(exc)
    return missing


def limit(*, memory_bytes: int, cpu_seconds: int | None, file_bytes: int = 0) -> None:
    """Set resource limits; lower limits of the environment remain."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    _lower_limit(resource.RLIMIT_AS, used + memory_bytes)
    _lower_limit(resource.RLIMIT_FSIZE, file_bytes)
    _lower_limit(resource.RLIMIT_CORE, 0)
    if cpu_seconds is not None:
        spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        _lower_limit(resource.RLIMIT_CPU, int(spent) + 1 + cpu_seconds)


def grant_seconds(seconds: int) -> None:
    """Allow `seconds` more of CPU time; then SIGXCPU ends the process."""
    spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(spent) + seconds
    resource.setrlimit(
        resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )


def _lower_limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _why(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.errno:
        return os.strerror(exc.errno).lower()
    return f"not known for {platform.machine()}" if isinstance(exc, KeyError) else str(exc)


def _require_success(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _call(number: int, *arguments: "int | ctypes.c_void_p | None") -> int:
    wide = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return _require_success(int(_libc.syscall(ctypes.c_long(number), *wide)))


def _pointer(data: "ctypes.Array[ctypes.c_char]") -> ctypes.c_void_p:
    return ctypes.cast(data, ctypes.c_void_p)


# --- the layers --------------------------------------------------------------------------------


def _no_new_privileges() -> None:
    zero = ctypes.c_ulong(0)
    _require_success(int(_libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero)))


def _landlock() -> None:
    version = _call(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION)
    handled = struct.pack("<Q", LANDLOCK_FILES[min(version, max(LANDLOCK_FILES))])
    if version >= 4:
        handled += struct.pack("<Q", LANDLOCK_TCP)
    if version >= 6:
        handled += struct.pack("<Q", LANDLOCK_SCOPES)
    rules = _call(
        LANDLOCK_CREATE_RULESET, _pointer(ctypes.create_string_buffer(handled, len(handled))), len(handled), 0
    )
    try:
        _call(LANDLOCK_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)


def _other_user() -> None:
    """Switch to the user nobody if root, and drop all capabilities."""
    try:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY_ID, NOBODY_ID, NOBODY_ID)
            os.setresuid(NOBODY_ID, NOBODY_ID, NOBODY_ID)
    finally:
        header = struct.pack("<Ii", CAPABILITIES_V3, 0)
        nothing = ctypes.create_string_buffer(24)
        _call(
            CAPSET_NUMBER[platform.machine()],
            _pointer(ctypes.create_string_buffer(header, len(header))),
            _pointer(nothing),
        )


def _limit_processes_and_files() -> None:
    _lower_limit(resource.RLIMIT_NPROC, 0)
    _lower_limit(resource.RLIMIT_NOFILE, 0)


def _seccomp() -> None:
    program = _filter(platform.machine())
    # struct sock_fprog: the number of instructions, and where they are.
    code = ctypes.create_string_buffer(program, len(program))
    about = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _call(
        SECCOMP_NUMBER[platform.machine()],
        SECCOMP_SET_MODE_FILTER,
        SECCOMP_FILTER_FLAG_TSYNC,
        _pointer(ctypes.create_string_buffer(about, len(about))),
    )


def _filter(machine: str) -> bytes:
    """Return the filter as instructions of classic BPF; x32 and 32-bit calls match nothing, and fail."""
    code: list[bytes] = []

    def add(operation: int, value: int, *, if_true: int = 0, if_false: int = 0) -> None:
        code.append(struct.pack("<HBBI", operation, if_true, if_false, value))

    add(BPF_LOAD, ARCHITECTURE_AT)
    add(BPF_JUMP_EQ, AUDIT_ARCHITECTURE[machine], if_true=1)
    add(BPF_RETURN, SECCOMP_RET_EPERM)
    add(BPF_LOAD, NUMBER_AT)
    for number in ALLOWED[machine].values():
        add(BPF_JUMP_EQ, number, if_false=1)
        add(BPF_RETURN, SECCOMP_RET_ALLOW)
    for number, argument, value in CONDITIONAL[machine].values():
        add(BPF_JUMP_EQ, number, if_false=4)
        # These arguments are ints: the kernel reads the lower half alone.
        add(BPF_LOAD, ARGUMENTS_AT + 8 * argument)
        add(BPF_JUMP_EQ, value, if_false=1)
        add(BPF_RETURN, SECCOMP_RET_ALLOW)
        add(BPF_RETURN, SECCOMP_RET_EPERM)
    add(BPF_RETURN, SECCOMP_RET_EPERM)
    return b"".join(code)


# --- self-test for doctor -------------------------------------------------------------------------


def _refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return True
    return False


def main() -> None:
    """Confine this process, try what must fail, and print what is missing as JSON."""
    import json

    missing = confine(memory_bytes=256 << 20, cpu_seconds=10)
    for name, attempt in (
        ("a file can be opened", lambda: os.open(sys.executable, os.O_RDONLY)),
        ("a process can be started", lambda: os._exit(0) if os.fork() == 0 else None),
    ):
        if not _refused(attempt):
            missing[name] = "it must be refused"
    print(json.dumps(missing))


if __name__ == "__main__":
    main()
