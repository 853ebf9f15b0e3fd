"""Trainings that `--stop-after` ends: where they end, with which bits, and how they go on."""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.jobs.local_context import LocalContext, noise_images, sha256_of

import jobs.training.train
from jobs.budgets import Budget, read_budget
from jobs.errors import SpecError, StopRequested
from jobs.specs import TrainSpec
from jobs.states import StopReason

IMAGES = noise_images(21, 16)
PER_EPOCH, EPOCHS, BATCH = 5, 4, 4


def spec_of(recipe: Any = "dcgan", **given: Any) -> Any:
    small = {"size": 16, "nz": 4, "ngf": 3, "ndf": 3, "batch": BATCH, "epochs": EPOCHS, "save_every": 2}
    return TrainSpec.create(**{"data": "/faces", "recipe": recipe, "metric": "swd", **small, **given})


def train(folder: Any, spec: Any, **given: Any) -> Any:
    ctx = LocalContext(folder=Path(folder), data=IMAGES, **given)
    with suppress(StopRequested):
        return jobs.training.train.run(spec, ctx), ctx
    return None, ctx


@pytest.mark.parametrize(
    ("given", "stored", "unit", "amount"),
    [
        ("10m", "10m", "s", 600),
        (" 2H30M ", "2h30m", "s", 9000),
        ("200k-images", "200k-images", "images", 200_000),
        ("1.5M-images", "1500k-images", "images", 1_500_000),
        ("1234-images", "1234-images", "images", 1234),
        (50, "50-epochs", "epochs", 50),
        ("1-epoch", "1-epochs", "epochs", 1),
    ],
)
def test_each_form_is_read_and_written(given: Any, stored: str, unit: str, amount: float) -> None:
    assert spec_of(epochs=60, stop_after=given).stop_after == stored
    assert read_budget(stored) == Budget(unit, amount)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", ["", "0", "10", "-3", "1.5", "0.5-images", "10k", "0s", "40y", "5-steps", "nan-images", "9" * 30]
)
def test_what_is_no_budget_is_refused_in_one_line(given: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec_of(epochs=9, stop_after=given)
    assert "--stop-after" in caught.value.message
    assert "\n" not in caught.value.message


@given(
    budget=st.builds(Budget, st.just("s"), st.integers(1, 10**9).map(float))
    | st.builds(Budget, st.sampled_from(["images", "epochs"]), st.integers(1, 10**12))
)
def test_a_written_budget_is_read_as_the_same(budget: Budget) -> None:
    assert read_budget(str(budget)) == budget


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    recipe=st.sampled_from(["dcgan", "sngan", "rpgan"]),
    images=st.integers(1, (EPOCHS * PER_EPOCH - 1) * BATCH),
    kills=st.lists(st.integers(0, 14), max_size=2),
)
def test_a_run_ends_at_its_images_and_continues_to_the_bits_of_one_that_was_not_stopped(
    recipe: str, images: int, kills: list[int]
) -> None:
    spec = spec_of(recipe, stop_after=f"{images}-images")
    end = -(-images // BATCH)
    with tempfile.TemporaryDirectory() as folder:
        straight = train(folder, spec_of(recipe))[1].saved[-1]
        snapshot = None
        for kill in kills:
            stop = {"stop_at": lambda asked, at=kill: StopReason.DRAIN if asked >= at else None}
            ctx = train(folder, spec, resume_from=snapshot, **stop)[1]
            snapshot = ctx.saved[-1].for_resume() if ctx.saved else snapshot
        result, ctx = train(folder, spec, resume_from=snapshot)
        last = ctx.saved[-1]
        assert (last.kind, last.step, last.epoch) == ("final", end, end // PER_EPOCH)
        assert (result["step"], result["stop_after"]) == (end, spec.stop_after)
        assert f"epoch-{-(-end // PER_EPOCH):04d}" in ctx.samples
        assert last.meta["evaluations"][-1]["step"] == end, "it is evaluated at its end"
        assert ctx.reports[-1]["total"] == end * BATCH
        longer = spec.model_copy(update={"stop_after": None, "continue_from": 1})
        rest = train(folder, longer, resume_from=last.for_resume())[1].saved[-1]
    assert rest.step == straight.step
    assert sha256_of(rest.state) == sha256_of(straight.state)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, EPOCHS * PER_EPOCH - 1), killed_at=st.integers(0, EPOCHS * PER_EPOCH - 1))
def test_each_attempt_after_the_time_has_passed_ends_at_the_same_step(at: int, killed_at: int) -> None:
    spec = spec_of("sngan", stop_after="10m")
    up = {"stop_at": lambda asked: StopReason.STOP_AFTER if asked >= at else None}
    with tempfile.TemporaryDirectory() as folder:
        result, first = train(folder, spec, **up)
        end = first.pinned_step
        assert end == max(1, at)
        assert (first.saved[-1].kind, first.saved[-1].step, result["step"]) == ("final", end, end)
        # Its worker died before that checkpoint was registered; the next attempt has an older one, or none.
        early = {"stop_at": lambda asked: StopReason.DRAIN if asked >= min(killed_at, end) else None}
        older = train(folder, spec, **early)[1].saved
        again = train(
            folder,
            spec,
            resume_from=older[-1].for_resume() if older else None,
            pinned_step=end,
            stop_at=lambda asked: StopReason.STOP_AFTER,
        )[1]
    assert again.saved[-1].step == end
    assert sha256_of(again.saved[-1].state) == sha256_of(first.saved[-1].state)


def test_a_budget_beyond_the_end_changes_nothing(tmp_path: Path) -> None:
    result, ctx = train(tmp_path, spec_of(stop_after="1M-images"))
    assert (result["step"], result["stopped"]) == (EPOCHS * PER_EPOCH, None)
    assert not any(one["type"] == "budget_reached" for one in ctx.events)
    with pytest.raises(SpecError, match="more than --epochs 4"):
        spec_of(stop_after=5)


def test_the_history_says_where_it_ended_and_how_to_repeat_that(tmp_path: Path) -> None:
    result, ctx = train(tmp_path, spec_of(stop_after=2))
    (event,) = [one for one in ctx.events if one["type"] == "budget_reached"]
    assert (event["step"], event["budget"]) == (10, "2-epochs")
    assert result["stopped"] == "stopped after 2-epochs, at epoch 2 of 4, step 10"
