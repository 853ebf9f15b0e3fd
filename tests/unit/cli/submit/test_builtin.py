"""`--init-from builtin:NAME`: networks that come with ganq."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors import safe_open

from ganq import builtin
from ganq.builtin import SHA256, Builtin
from jobs.networks.weights import split
from storage.weights.load import read_tensors

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.db.queries import Queries

START = ("submit", "train", "--init-from", "builtin:faces", "--batch", 2, "--data")


def no_job(ganq: "Ganq") -> bool:
    empty: bool = json.loads(ganq("status", "--json").out) == []
    return empty


def test_the_networks_are_imported_once_and_each_training_starts_from_them(
    ganq: "Ganq", queries: "Queries", image_folder: Path
) -> None:
    first = json.loads(ganq(*START, image_folder, "--json").out)
    second = json.loads(ganq(*START, image_folder, "--seed", 1, "--json").out)
    assert first["spec"]["init_from"] == second["spec"]["init_from"]
    imported = queries.get(first["spec"]["init_from"])
    assert (imported.kind, imported.name) == ("import", f"builtin-faces-{SHA256['faces'][:8]}")
    assert (first["spec"]["recipe"], first["spec"]["size"], first["spec"]["ngf"]) == ("rpgan", 96, 32)


@pytest.mark.parametrize("name", sorted(SHA256))
def test_each_model_says_where_it_is_from_and_has_both_networks(name: str) -> None:
    folder = Builtin(name).folder
    assert "licence of the training images: CC0 1.0" in (folder / "README.md").read_text()
    netg, netd = split(read_tensors(folder / "model.safetensors"))
    assert netg
    assert netd
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert all(file.get_tensor(key).isfinite().all() for key in file.keys())  # noqa: SIM118
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 8_000_000


def test_a_dry_run_imports_nothing(ganq: "Ganq", image_folder: Path) -> None:
    plan = json.loads(ganq(*START, image_folder, "--dry-run", "--json").out)
    assert (plan["spec"]["ngf"], plan["spec"]["init_from"]) == (32, "builtin:faces")
    assert no_job(ganq)


@pytest.mark.parametrize(
    "option", ["--size 48", "--ngf 64", "--arch dcgan", "--skips", "--full-res-conv", "--antialias"]
)
def test_options_that_contradict_the_networks_are_refused_and_nothing_is_imported(
    option: str, ganq: "Ganq", image_folder: Path
) -> None:
    said = ganq(*START, image_folder, *option.split())
    assert said.code == 2
    assert f"the networks of builtin:faces do not fit {option}" in said.err
    assert no_job(ganq)


def test_progressive_resolution_is_refused_with_what_the_networks_lack(
    ganq: "Ganq", image_folder: Path
) -> None:
    said = ganq(*START, image_folder, "--progressive", "8k,24k")
    assert said.code == 2
    assert "those of builtin:faces have none" in said.err
    assert "omit --progressive" in said.err
    assert no_job(ganq)


def test_a_name_that_ganq_does_not_bring_is_refused_with_those_that_it_does(
    ganq: "Ganq", image_folder: Path
) -> None:
    said = ganq("submit", "train", "--init-from", "builtin:cats", "--data", image_folder)
    assert said.code == 3
    assert "there is no builtin:cats" in said.err
    assert "builtin:faces" in said.err


def test_a_file_that_was_changed_is_not_imported(
    ganq: "Ganq", image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "models" / "faces"
    shutil.copytree(Builtin("faces").folder, changed)
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    monkeypatch.setattr(builtin, "MODELS", tmp_path / "models")
    said = ganq(*START, image_folder)
    assert said.code != 0
    assert "builtin:faces has been changed" in said.err
    assert "pip install --force-reinstall" in said.err
    assert no_job(ganq)
