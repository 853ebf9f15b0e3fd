"""What the pages say is what the code does: commands parse, links resolve, tables are complete."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path

import click
import pytest

from cli.main import COMMANDS, root
from jobs import errors
from jobs.errors import all_errors
from jobs.recipes import DEFAULT_RECIPE, RECIPES
from jobs.specs import TrainSpec
from jobs.states import TRANSITIONS, JobState, Outcome, StopReason
from storage.settings import RENAMED, SECRETS, Settings

ROOT = Path(__file__).parent.parent
WRITTEN = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BY_HAND = [page for page in WRITTEN if page.name != "cli.md"]  # that one is made from the help itself
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`(ganq [^`]+)`")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text()) if language in languages]


def rows(page: Path, header: str) -> list[list[str]]:
    """The cells of the table whose first row begins with this, without its backquotes."""
    lines = page.read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(header)]
    assert starts, f"{page.name} has no table {header}"
    found = []
    for start in starts:
        for line in lines[start + 2 :]:
            if not line.startswith("|"):
                break
            found.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return found


def words(cell: str) -> set[str]:
    """What stands between backquotes or commas in a cell."""
    return {word.strip(" `") for word in cell.split(",")} - {"none", ""}


def test_the_changelogs_newest_version_is_the_one_that_is_built() -> None:
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    titles = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(title for title in titles if title != "Unreleased") == built
    assert "Unreleased" not in titles[1:]


# --- commands -----------------------------------------------------------------------------


def shell_lines(page: Path) -> Iterator[str]:
    """Each command of the page's shell blocks; pipes, lists and substitutions taken apart."""
    for body in blocks(page, "sh", "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            whole = re.sub(r"\s#.*", "", line)
            yield from re.findall(r"\$\(([^()]*)\)", whole)
            yield from re.split(r"\s*(?:&&|\|\||[|;])\s*", re.sub(r"\$\([^()]*\)", "X", whole))


def parse(words: list[str]) -> None:
    """Parse a command line as click would, without running it."""
    group: click.Command = root
    ctx = click.Context(root, info_name="ganq", help_option_names=["-h", "--help"])
    rest = words[1:]
    while isinstance(group, click.Group):
        assert rest, f"{' '.join(words)} names no command"
        if group is not root and rest[0].startswith("-"):  # options of the group itself: ganq submit -f FILE
            group.make_context(group.name, rest, parent=ctx)
            return
        name, *rest = rest
        found = group.get_command(ctx, name)
        assert found is not None, f"there is no command {name!r} in: {' '.join(words)}"
        group = found
        if not isinstance(group, click.Group):
            with suppress(click.exceptions.Exit):  # an option that answers by itself
                group.make_context(name, rest, parent=ctx)


COMMAND_LINES = [
    (page_name(page), line)
    for page in BY_HAND
    for line in shell_lines(page)
    if line.split()[:1] == ["ganq"] or re.match(r"(?:[A-Z_]+=\S* )+ganq ", line)
]


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_every_command_in_a_code_block_parses(page: str, line: str) -> None:
    parts = shlex.split(line)
    parse(parts[parts.index("ganq") :])


def test_the_pages_show_commands_at_all() -> None:
    shown = {page for page, _ in COMMAND_LINES}
    assert {"README.md", "docs/quickstart.md", "docs/operations.md"} <= shown


def test_every_command_in_the_text_exists() -> None:
    for page in BY_HAND:
        for said in INLINE.findall(page.read_text().replace("\n", " ")):
            group: click.Command = root
            for word in said.split()[1:]:
                if not isinstance(group, click.Group) or word.startswith("-"):
                    break
                found = group.get_command(click.Context(group), word)
                assert found is not None, f"{page.name}: `{said}`"
                group = found


def test_the_readme_names_every_command_with_its_place_in_the_reference() -> None:
    text = (ROOT / "README.md").read_text()
    for entry in COMMANDS:
        assert f"docs/cli.md#ganq-{entry.name}" in text, f"README.md does not name ganq {entry.name}"


def test_every_target_of_make_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in BY_HAND:
        inline = re.findall(r"`make (\w+)`", page.read_text())
        shell = [line.split()[1] for line in shell_lines(page) if line.startswith("make ")]
        assert set(inline + shell) <= targets, page.name


# --- links --------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", WRITTEN, ids=page_name)
def test_every_link_to_a_file_resolves(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        assert there.is_relative_to(ROOT), f"{page.name} links outside the project: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name} links to {target}"


SOURCE = re.compile(r"`((?:cli|ganq|worker|storage|jobs|tests|benchmarks)/[\w/]+\.py)`")


def test_every_source_file_that_a_page_names_exists() -> None:
    for page in (one for one in BY_HAND if one.parent.name != "decisions"):  # those are of their day
        missing = [name for name in SOURCE.findall(page.read_text()) if not (ROOT / name).is_file()]
        assert set(missing) <= {"cli/NAME.py", "cli/submit/NAME.py"}, f"{page.name}: {missing}"


def test_every_decision_is_one_page_with_context_choice_and_price() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04d}" for number in range(1, len(pages) + 1)]
    for page in pages:
        text = page.read_text()
        assert len(text.splitlines()) <= 60, page.name
        for part in ("**Context.**", "**Choice.**", "**Price.**"):
            assert part in text, f"{page.name} has no {part}"


# --- settings -----------------------------------------------------------------------------

OPERATIONS = ROOT / "docs" / "operations.md"


def test_the_settings_table_names_each_setting_with_its_default() -> None:
    told = {row[0]: row[1] for row in rows(OPERATIONS, "| variable |")}
    assert set(told) == {f"GANQ_{f.name.upper()}" for f in fields(Settings)}
    for f in fields(Settings):
        if isinstance(f.default, float):
            assert float(told[f"GANQ_{f.name.upper()}"]) == f.default, f.name
        elif f.default not in (MISSING, None, ""):
            assert told[f"GANQ_{f.name.upper()}"] == f.default, f.name


def test_every_variable_that_a_page_names_is_read() -> None:
    settings = {f"GANQ_{f.name.upper()}" for f in fields(Settings)}
    known = settings | {f"GANQ_{name.upper()}_FILE" for name in SECRETS} | {"GANQ_CONFIG", "GANQ_DEBUG"}
    known |= {f"GANQ_{name.upper()}" for name in RENAMED}
    known |= {"GANQ_ENABLE_FAILPOINTS", "GANQ_GUARDS_OFF"}  # that only tests set, as docs/guarantees.md says
    for page in BY_HAND:
        named = set(re.findall(r"\bGANQ_[A-Z_]+\b", page.read_text()))
        assert named <= known, f"{page.name}: {named - known}"


def test_the_example_of_a_configuration_file_is_one(tmp_path: Path) -> None:
    (example,) = blocks(OPERATIONS, "toml")
    home = tmp_path / "home"
    home.mkdir()
    (home / "ganq.toml").write_text(example)
    settings = Settings.load({"GANQ_HOME": str(home)})
    for name, value in tomllib.loads(example).items():
        assert str(getattr(settings, name)) == value


# --- states and errors --------------------------------------------------------------------

STATES = ROOT / "docs" / "states.md"


def test_the_table_of_states_is_that_of_the_code() -> None:
    told = {row[0]: words(row[2]) for row in rows(STATES, "| state |")}
    assert told == {str(state): {str(new) for new in then} for state, then in TRANSITIONS.items()}


def test_the_tables_of_outcomes_and_reasons_are_those_of_the_code() -> None:
    assert [row[0] for row in rows(STATES, "| outcome |")] == [str(one) for one in Outcome]
    assert [row[0] for row in rows(STATES, "| reason |")] == [str(one) for one in StopReason]


def test_stop_requests_are_columns_of_the_job_table() -> None:
    from storage.db.tables import job

    assert {row[0] for row in rows(STATES, "| column |")} <= set(job.c.keys())


def test_the_table_of_errors_has_each_code_with_its_exit_and_policy() -> None:
    told = {row[0]: (int(row[1]), row[2]) for row in rows(STATES, "| code | exit |")}
    ours = [one for one in all_errors() if one.__module__ == errors.__name__]
    assert told == {one.code: (one.exit_code, str(one.retry)) for one in ours}


def strings(path: str, name: str) -> set[str]:
    """Every string that a module gives to this function's second place, dictionary key or index."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        values: list[ast.expr | None] = []
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name:
            values = [*node.args[2:3]]
        elif isinstance(node, ast.Dict):
            values = [v for k, v in zip(node.keys, node.values, strict=True) if _is(k, name)]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            values = [node.value] if _is(node.targets[0].slice, name) else []
        for value in values:
            for part in ast.walk(value) if value is not None else ():
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    found.add(part.value)
    return found


def _is(node: ast.expr | None, name: str) -> bool:
    return isinstance(node, ast.Constant) and node.value == name


def test_the_codes_that_only_the_job_table_gives_are_named() -> None:
    told = {row[0] for row in rows(STATES, "| code | what")}
    assert told == strings("storage/db/store/transitions.py", "error_code") - {"error_code"}


def test_the_table_of_events_has_each_event() -> None:
    told = {row[0] for row in rows(STATES, "| event |")}
    recorded = strings("storage/gc/scan.py", "record_event")
    for chapter in (ROOT / "storage" / "db" / "store").glob("*.py"):
        recorded |= strings(str(chapter.relative_to(ROOT)), "record_event")
    for source in (*(ROOT / "jobs").rglob("*.py"), ROOT / "worker" / "runner" / "context.py"):
        recorded |= {
            str(call.args[0].value)
            for call in ast.walk(ast.parse(source.read_text()))
            if isinstance(call, ast.Call)
            and getattr(call.func, "attr", None) == "event"
            and call.args
            and isinstance(call.args[0], ast.Constant)
        }
    ends = {str(state) for state in JobState if state.terminal}
    steps = {str(one) for one in Outcome} - ends
    assert told == recorded | ends | steps


def test_a_webhook_can_ask_for_each_event() -> None:
    from storage.db.webhooks import EVENTS

    assert sorted(EVENTS) == sorted(row[0] for row in rows(STATES, "| event |"))


# --- recipes, faces -----------------------------------------------------------------------


def test_the_table_of_recipes_has_each_option_in_which_they_differ() -> None:
    def cell(value: object) -> str:
        return (",".join(value) or "none") if isinstance(value, tuple) else str(value)

    specs = [TrainSpec.create(data="/p", recipe=name) for name in RECIPES]
    options = {option for one in RECIPES.values() for option in one.defaults}
    differ = {
        "--" + option.replace("_", "-"): [cell(getattr(spec, option)) for spec in specs]
        for option in options
        if len({cell(getattr(spec, option)) for spec in specs}) > 1
    }
    page = ROOT / "docs" / "recipes.md"
    assert {row[0]: row[1:] for row in rows(page, "| option |")} == differ
    assert f"`{DEFAULT_RECIPE}` is the default" in " ".join(page.read_text().split())


def test_the_artists_of_the_faces_are_named_with_their_licence() -> None:
    """CC BY requires it, and the README shows images of a model that was trained on the demo's faces."""
    from cli.dataset import make
    from cli.demo import STYLE
    from storage.datasets.synthetic import styles

    default = next(param.default for param in make.params if param.name == "style")
    text = " ".join((ROOT / "docs" / "credits.md").read_text().split())
    assert "docs/credits.md" in (ROOT / "README.md").read_text()
    for style in styles():
        if style.name in (STYLE, default):
            for part in (style.title, style.creator, style.source, style.licence, style.licence_url):
                assert part in text, f"docs/credits.md does not name {style.name}'s {part}"
