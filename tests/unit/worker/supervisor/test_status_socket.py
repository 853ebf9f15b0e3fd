"""The status socket of a supervisor and its files in the temporary folder."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from worker.supervisor import status_socket


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gq-") as short:
        yield Path(short)


def test_files_in_the_temporary_folder_stay_young_and_come_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_socket, "TOUCH_EVERY_S", 0.05)
    supervisor = cast(Any, SimpleNamespace(identity=SimpleNamespace(name="w1")))
    one = status_socket.StatusSocket(supervisor, folder / "live-7.sock")
    mine = [folder / "live-7.sock", folder / "wake-7.sock", folder]
    others = folder / "wake-77.sock"
    for path in (mine[1], others):
        path.touch()
    for path in (*mine, others):
        os.utime(path, (1e9, 1e9))
    (folder / "live-7.json").unlink()
    os.utime(folder, (1e9, 1e9))
    one.start()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not (folder / "live-7.json").exists():
        time.sleep(0.01)
    one.stop()
    one.join(timeout=5)
    assert not one.is_alive()
    assert all(path.stat().st_mtime > 1e9 for path in mine[1:])
    assert others.stat().st_mtime == 1e9
