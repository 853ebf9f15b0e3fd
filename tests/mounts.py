"""A volume over FUSE whose daemon can be stopped: callers wait, as for an NFS server that is gone."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self


def missing() -> str | None:
    """Return why there can be no such volume on this machine."""
    for program in ("bindfs", "fusermount3", "umount"):
        if shutil.which(program) is None:
            return f"no {program} on this machine (apt-get install bindfs fuse3)"
    if os.geteuid() != 0:
        return "only root may mount"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as exc:
        return f"/dev/fuse: {exc.strerror}"
    return None


class HangingMount:
    """
    A folder that shows another one, until hang().

    Args:
        deep: whoever waits cannot be killed either (state D). The outer of two daemons has taken the
            request and waits itself, as a driver or a server that has answered half.
    """

    def __init__(self, source: Path, place: Path, *, deep: bool = False) -> None:
        self.place = place
        self.steps = [(source, place)]
        if deep:
            inner = place.with_name(f"{place.name}-inner")
            self.steps = [(source, inner), (inner, place)]
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            for source, place in self.steps:
                source.mkdir(parents=True, exist_ok=True)
                place.mkdir(parents=True, exist_ok=True)
                # No cache of attributes or names: each look is a question to the daemon.
                options = ["-o", "attr_timeout=0,entry_timeout=0,negative_timeout=0"]
                self.daemons.append(
                    subprocess.Popen(
                        ["bindfs", "-f", *options, str(source), str(place)],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                )
                deadline = time.monotonic() + 20
                while not os.path.ismount(place):
                    assert self.daemons[-1].poll() is None, "bindfs has ended"
                    assert time.monotonic() < deadline, "bindfs does not mount"
                    time.sleep(0.02)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def hang(self) -> None:
        """From now on nothing here answers."""
        self.daemons[0].send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.daemons[0].send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Unmount, whatever state it is in: a killed daemon ends every request that waits for it."""
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        for _, place in reversed(self.steps):
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run(["umount", "-l", str(place)], capture_output=True, timeout=20, check=False)
