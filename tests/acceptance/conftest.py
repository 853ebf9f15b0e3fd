"""Fixtures of the acceptance tests: a machine with the installed `ganq`, and pictures to train on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Ganq


@pytest.fixture
def ganq(settings_env: dict[str, str], tmp_path: Path) -> Iterator[Ganq]:
    machine = Ganq(settings_env, tmp_path)
    yield machine
    machine.stop()


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred cartoon faces."""
    from storage.faces import make_faces

    return make_faces(tmp_path_factory.mktemp("pictures") / "faces", count=96, size=24)


@pytest.fixture
def small(faces: Path) -> list[str]:
    """Options of a training that takes a second."""
    return ["--data", str(faces), "--size", "16", "--ngf", "4", "--ndf", "4", "--nz", "8", "--batch", "16"]
