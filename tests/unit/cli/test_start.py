"""The entry point: it starts fast, every command loads, and the docs say what the help says."""

import subprocess
import sys
from pathlib import Path

import click
import pytest

from cli.main import COMMANDS, main, root
from cli.reference import PAGE, commands, page
from cli.ui.lazy import LazyGroup

HEAVY = ("torch", "celery", "sqlalchemy", "redis", "pydantic", "rich", "numpy", "alembic", "platformdirs")


def modules_after(*argv: str) -> list[str]:
    """The modules that a fresh Python holds after one command."""
    program = (
        "import sys\nfrom cli.main import main\n"
        f"code = main({list(argv)!r})\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2), done.stderr
    return done.stderr.splitlines()


def loaded_after(*argv: str) -> set[str]:
    """The packages of those modules."""
    return {name.split(".")[0] for name in modules_after(*argv)}


@pytest.mark.parametrize("argv", [("--help",), ("submit", "--help"), ("--version",), ("statsu",)])
def test_help_and_a_typo_load_nothing_heavy(argv: tuple[str, ...]) -> None:
    assert loaded_after(*argv).isdisjoint(HEAVY)


def test_status_loads_no_torch_no_celery_and_off_a_terminal_no_rich(ganq: object) -> None:
    assert loaded_after("status").isdisjoint({"torch", "celery", "redis", "rich", "pydantic", "numpy"})


def test_on_sqlite_nothing_of_postgres_is_loaded(ganq: object, backend: str, image_folder: Path) -> None:
    for argv in (("status",), ("submit", "train", "--data", str(image_folder), "--hold")):
        loaded = modules_after(*argv)
        assert f"sqlalchemy.dialects.{'sqlite' if backend == 'sqlite' else 'postgresql'}" in loaded
        assert backend != "sqlite" or "sqlalchemy.dialects.postgresql" not in loaded


def test_a_short_command_never_looks_for_garbage_not_even_at_its_end(ganq: object) -> None:
    program = (
        "import atexit, gc, sys\nfrom cli.main import main\n"
        "looked = lambda: sum(one['collections'] for one in gc.get_stats())\n"
        "before = looked()\n"
        # What was registered first is called last.
        "atexit.register(lambda: print(looked() - before, gc.get_freeze_count() > 50_000, file=sys.stderr))\n"
        "sys.argv = ['ganq', 'status']\nsys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["0", "True"]


def all_commands() -> list[tuple[tuple[str, ...], click.Command]]:
    return list(commands())


@pytest.mark.parametrize("entry", COMMANDS, ids=lambda entry: entry.name)
def test_every_row_of_the_table_loads_and_has_the_name_it_is_listed_by(entry: object) -> None:
    assert isinstance(root, LazyGroup)
    command = root.get_command(click.Context(root), entry.name)  # type: ignore[attr-defined]
    assert command is not None
    assert command.name == entry.name  # type: ignore[attr-defined]


def test_every_command_has_help_and_an_example_of_itself() -> None:
    for path, command in all_commands():
        name = " ".join(path)
        assert command.help, name
        if isinstance(command, click.Group):
            continue  # its commands have theirs
        shown = (command.epilog or "") + command.help
        assert name in shown, f"{name} has no example in its help"


def test_the_reference_is_what_the_commands_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m cli.reference"


def test_help_groups_the_commands_in_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [
        line for line in out.splitlines() if line in ("Work:", "Watch:", "Data and models:", "Run:", "Admin:")
    ]
    assert out.index("Work:") < out.index("Watch:") < out.index("Admin:")


def test_no_command_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "submit" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_and_how_to_install_it(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# To install it: ")
    assert "_GANQ_COMPLETE" in out
