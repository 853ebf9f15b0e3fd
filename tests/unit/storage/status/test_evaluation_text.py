"""Figures of an evaluation that are shown, and those that say nothing yet."""

from typing import Any

import pytest

from storage.status import evaluation_text

GOOD: dict[str, Any] = {
    "image_count": 500,
    "metrics": {"kid/effnet-lite0": {"value": 0.2}},
    "precision": {"value": 0.6, "baseline": 0.8},
    "recall": {"value": 0.0, "baseline": 0.8},
    "diversity": 0.02,
}


def test_a_collapse_is_shown() -> None:
    row = evaluation_text.row(GOOD)
    assert (row["precision"], row["recall"], row["diversity"]) == ("0.60", "0.00", "2%")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_count": 30}, "they need 50 images, and there are 30"),
        ({"metrics": {"kid/effnet-lite0": {"value": 1.4}}}, "far from all real ones"),
        ({"precision": {"value": 0.0, "baseline": 0.8}, "diversity": 1.53}, "hardly any image is close"),
    ],
)
def test_what_says_nothing_yet_is_hidden_with_the_reason(change: dict[str, Any], reason: str) -> None:
    early = {**GOOD, **change}
    assert set(evaluation_text.row(early)) == {"kid/effnet-lite0"}
    (line,) = [line for line in evaluation_text.lines(early) if "too early to say" in line]
    assert reason in line
    assert not [line for line in evaluation_text.lines(early) if line.startswith("diversity")]
