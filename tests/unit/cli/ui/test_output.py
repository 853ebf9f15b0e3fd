"""How numbers, times and foreign text are written."""

from typing import Any

import pytest

from cli.compare import _headings
from cli.ui import output


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0, "0 s"),
        (59.4, "59 s"),
        (61, "1 min 01 s"),
        (720, "12 min"),
        (3 * 3600 + 300, "3 h 05 min"),
        (2 * 86400 + 4 * 3600, "2 d 4 h"),
        (-3, "0 s"),
    ],
)
def test_durations(seconds: Any, text: str) -> None:
    assert output.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (3_580_000, "3.6 MB"), (2.5e9, "2.5 GB"), (7e12, "7.0 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert output.size(count) == text


def test_foreign_text_is_one_line_without_control_characters_or_passwords() -> None:
    assert output.clean("a\x1b[31m\nb\tc\x07") == "a[31m b c"
    assert output.clean("redis://user:geheim@host") == "redis://user:***@host"
    assert output.clean(None) == ""


def test_a_plain_table_is_aligned_with_numbers_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("ID", "NAME"), [["7", "faces"], ["12", "x"]], right=("ID",))
    assert capsys.readouterr().out == "ID  NAME\n 7  faces\n12  x\n"


def test_a_narrow_terminal_loses_columns_before_it_breaks_lines() -> None:
    headers = ("ID", "NAME", "STATE", "RATE", "AGE")
    rows = [["1", "a-very-long-name", "running", "410/s", "2 d"]]
    assert list(output._fit_columns(headers, rows, 80)) == list(headers)
    narrow = output._fit_columns(headers, rows, 22)
    assert "AGE" not in narrow
    assert "ID" in narrow
    assert narrow["NAME"] == 6


def test_what_compare_shows_keeps_its_numbers_on_eighty_columns() -> None:
    numbers = _headings(["kid/net", "fid/net", "swd", "precision", "recall", "diversity", "copies"])
    row = [
        "104",
        "/home/ada/images",
        "2,000",
        "0.628",
        "307.1",
        "22.7",
        "0.00",
        "0.01",
        "127%",
        "20.0% !",
    ]
    widths = output._fit_columns(("ID", "OF", "IMAGES", *numbers), [row], 80)
    assert [widths[name] for name in numbers] == [
        max(map(len, one)) for one in zip(numbers, row[3:], strict=True)
    ]
    assert "IMAGES" in widths, "what was evaluated gives way first"
    assert sum(widths.values()) + 2 * (len(widths) - 1) <= 80


def test_a_long_name_is_shortened_in_its_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "overflow", lambda: "ellipsis")
    names = [output._shorten(f"rates-lr-g-0.0001-seed-{seed}", 10) for seed in (1, 2)]
    assert names == ["rat…seed-1", "rat…seed-2"]
    assert output._shorten("faces", 10) == "faces"
