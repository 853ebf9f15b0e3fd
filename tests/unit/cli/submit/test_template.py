"""`ganq submit train --save-as` and `--template`."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ganq as api

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.settings import Settings


def test_a_template_gives_an_equal_spec_and_the_command_line_wins(
    ganq: "Ganq", image_folder: Path, settings: "Settings", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image_folder.parent)
    options = (
        "--epochs",
        7,
        "--size",
        24,
        "--augment",
        "color,cutout",
        "--mirror",
        "--stop-after",
        "1k-images",
    )
    given = (
        "--data",
        "faces",
        *options,
        "--label",
        "k=a=b",
        "--priority",
        3,
        "--name",
        "faces",
        "--note",
        "n",
    )
    first = ganq("submit", "train", *given, "--save-as", "quick", "--json").json()
    monkeypatch.chdir("/")
    again = ganq("submit", "train", "-t", "quick", "--json").json()
    assert (again["spec"], again["labels"], again["priority"]) == (first["spec"], {"k": "a=b"}, 3)
    assert (again["name"], again["note"]) == (None, None), "they are of one job"
    other = ganq("submit", "train", "-t", "quick", "--epochs", 9, "--no-mirror", "--json").json()
    assert (other["spec"]["epochs"], other["spec"]["mirror"], other["spec"]["size"]) == (9, False, 24)
    path = settings.home / "templates" / "quick.toml"
    assert ganq("submit", "-f", path, "--json").json()[0]["spec"] == first["spec"]
    with api.connect() as client:
        assert client.train(template="quick").spec == first["spec"]
        assert client.train(template="quick", size=32).spec["size"] == 32
        with pytest.raises(api.GanqError, match="templates are of kind train"):
            client.generate(template="quick")


def test_a_template_of_a_template_has_the_options_of_both(ganq: "Ganq", image_folder: Path) -> None:
    ganq("submit", "train", "--data", image_folder, "--size", 24, "--save-as", "one")
    ganq("submit", "train", "-t", "one", "--epochs", 5, "--save-as", "two")
    spec = ganq("submit", "train", "-t", "two", "--json").json()["spec"]
    assert (spec["size"], spec["epochs"], spec["data"]) == (24, 5, str(image_folder))


def test_nothing_is_saved_of_a_request_that_is_refused_or_only_planned(
    ganq: "Ganq", image_folder: Path, settings: "Settings"
) -> None:
    assert ganq("submit", "train", "--data", "/nowhere", "--save-as", "bad").code == 3
    assert ganq("submit", "train", "--data", image_folder, "--dry-run", "--save-as", "dry").code == 0
    assert ganq("submit", "train", "--data", image_folder, "--save-as", "../x").code == 2
    assert not (settings.home / "templates").exists()


def test_a_template_that_is_missing_or_damaged_is_named(
    ganq: "Ganq", image_folder: Path, settings: "Settings"
) -> None:
    ganq("submit", "train", "--data", image_folder, "--save-as", "quick")
    said = ganq("submit", "train", "-t", "quik")
    assert (said.code, "templates: quick" in said.err) == (3, True)
    path = settings.home / "templates" / "quick.toml"
    for text in ("nonsense", "[[job]]\nkind = 'generate'", "[[job]]\nkind = 'train'\nepoch = 3", "[[job]\n"):
        path.write_text(text)
        assert ganq("submit", "train", "-t", "quick").code == 2, text
