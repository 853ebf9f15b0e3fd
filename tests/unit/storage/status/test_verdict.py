"""What `ganq status` says of a training in a word."""

import pytest

from storage.status.verdict import verdict


def evaluations(*values: float, diversity: float = 1.0, spread: float = 0.02) -> list[dict[str, object]]:
    return [
        {"epoch": 10 * (i + 1), "metric": value, "spread": spread, "diversity": diversity}
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.9,), "too early to say: evaluated once"),
        ((0.9, 0.5), "too early to say: evaluated twice"),
        ((0.9, 0.5, 0.3), "improving"),
        ((0.9, 0.5, 0.3, 0.31), "improving"),
        ((0.9, 0.5, 0.3, 0.31, 0.295), "flat since epoch 30"),
        ((0.9, 0.5, 0.3, 0.4, 0.5, 0.6), "flat since epoch 30"),
        ((0.9, 0.5, 0.3, 0.4, 0.5, 0.2), "improving"),
        ((0.5, 0.5, 0.5), "flat since epoch 10"),
    ],
)
def test_a_trend_needs_three_evaluations_and_more_than_their_noise(
    values: tuple[float, ...], expected: str
) -> None:
    assert verdict(evaluations(*values)) == expected


def test_images_that_are_all_alike_are_a_collapse_only_after_they_were_not() -> None:
    alike = evaluations(0.9, 0.8, 0.7, diversity=0.1)
    assert verdict(alike) == "too early to say: its images are still almost identical"
    fell = [*evaluations(0.9, 0.5, 0.3), {**alike[-1], "epoch": 40}]
    assert verdict(fell) == "collapsed: at epoch 40 its images are almost identical"


def test_what_the_run_reported_comes_before_its_figures() -> None:
    known = evaluations(0.9, 0.5, 0.3)
    assert verdict(known, diverged="loss_g exploded at step 9") == "diverged: loss_g exploded at step 9"
    assert verdict(known, collapsed="all images are equal") == "collapsed: all images are equal"


def test_a_run_without_evaluations_is_too_early_unless_none_was_requested() -> None:
    assert verdict([], spec={"metric": "kid"}) == "too early to say: not evaluated yet"
    assert verdict([], spec={"metric": "none"}) is None
