"""docs/fault-matrix.md is true: fifty faults, each with tests that exist, in the tier that it says."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
PAGES = TESTS.parent / "docs"
FAULTS = [f"F{number}" for number in range(1, 51)]
ROW = re.compile(r"^### (F\d+)\n(.*?)(?=^### |\Z)", re.MULTILINE | re.DOTALL)
TEST = re.compile(r"^- ([123]) `([\w/]+\.py)::(test_\w+)`$", re.MULTILINE)


def rows() -> dict[str, str]:
    found = ROW.findall((PAGES / "fault-matrix.md").read_text())
    assert [name for name, _ in found] == FAULTS, "each fault once, in order"
    return dict(found)


@cache
def listed_in(file: str) -> dict[str, str]:
    """Name of each test of a file → its tier, by its marks."""
    tree = ast.parse((TESTS / file).read_text())
    whole = [one for one in tree.body if isinstance(one, ast.Assign) and _names(one, "pytestmark")]
    shared = " ".join(map(ast.unparse, whole))
    return {
        one.name: _tier(shared, *map(ast.unparse, one.decorator_list))
        for one in tree.body
        if isinstance(one, ast.FunctionDef) and one.name.startswith("test_")
    }


def _names(one: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in one.targets)


def _tier(*marks: str) -> str:
    # One of the parameters may be of tier 2, by marks= or tier2_on(); the test is of tier 1 then.
    own = [mark for mark in marks if "marks=" not in mark and "tier2_on" not in mark]
    return next((tier for tier in "32" if any(f"mark.tier{tier}" in mark for mark in own)), "1")


def named(body: str) -> Iterator[tuple[str, str, str]]:
    yield from TEST.findall(body)


def test_every_fault_names_tests_that_exist_in_their_tier() -> None:
    for fault, body in rows().items():
        found = list(named(body))
        assert found, f"{fault} has no test"
        assert len(found) == body.count("\n- "), f"{fault} has a line that names no test"
        for tier, file, test in found:
            assert (TESTS / file).is_file(), f"{fault}: {file}"
            assert test in listed_in(file), f"{fault}: {file} has no {test}"
            assert listed_in(file)[test] == tier, f"{fault}: {test} is of tier {listed_in(file)[test]}"


def test_every_test_that_is_named_after_a_fault_is_listed_under_it() -> None:
    listed = {(fault, test) for fault, body in rows().items() for _, _, test in named(body)}
    for file in sorted(TESTS.glob("chaos/test_*.py")):
        for test in listed_in(f"chaos/{file.name}"):
            for number in re.findall(r"(?<=_)f(\d\d)(?=_)", test):
                assert (f"F{int(number)}", test) in listed, f"{file.name}: {test}"


def test_every_invariant_of_the_checker_is_among_the_guarantees() -> None:
    told = re.findall(r"^\| \*\*(I\d+)\*\* \|", (PAGES / "guarantees.md").read_text(), re.MULTILINE)
    assert told == [f"I{number}" for number in range(1, 11)]
    for file in ("invariants.py", "invariants_volume.py"):
        text = (TESTS / "chaos" / file).read_text()
        assert set(re.findall(r"\"(I\d+): ", text)) <= set(told)
