"""Names of ganq 0.2 that have a standard name now: specs, networks and sweeps that still say the old ones."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import all_errors
from jobs.networks.dcgan import Architecture
from jobs.recipes import RECIPES
from jobs.renamed import (
    ERROR_CODES,
    EVENTS,
    FIELDS,
    OUTCOMES,
    RESULT_KEYS,
    VALUES,
    renamed,
    renamed_event,
    renamed_result,
)
from jobs.specs import TrainSpec, check_same_run
from jobs.states import Outcome

OF_0_2 = {"origin": "dcgan", "plus": "sngan", "pairs": "rpgan", "r3": "r3gan"}


@pytest.mark.parametrize(("old", "new"), OF_0_2.items())
def test_a_recipe_by_its_old_name_is_the_same_recipe(old: Any, new: Any) -> None:
    assert TrainSpec.create(data="/p", recipe=old) == TrainSpec.create(data="/p", recipe=new)


def test_a_stored_spec_of_0_2_is_read_under_the_new_names() -> None:
    spec = TrainSpec.create(data="/p", recipe="r3gan").to_json()
    stored = {**spec, "recipe": "r3", "arch": "residual", "noise": "fresh"}
    del stored["fake_reuse"]
    assert TrainSpec.from_json(stored).to_json() == spec


def test_a_run_of_0_2_continues_under_the_new_names() -> None:
    spec = TrainSpec.create(data="/p", recipe="rpgan")
    saved = {**spec.to_json(), "recipe": "pairs", "arch": "even", "noise": "fresh"}
    del saved["fake_reuse"]
    check_same_run(saved, spec)


@pytest.mark.parametrize(("old", "new"), VALUES["arch"].items())
def test_a_checkpoint_of_0_2_describes_the_same_networks(old: Any, new: Any) -> None:
    arch = Architecture(size=48, ngf=4, ndf=4, norm_d="none", arch=new)
    assert Architecture.from_json({**arch.to_json(), "arch": old}) == arch


def test_the_new_name_of_a_field_wins_over_the_old_one() -> None:
    both = {"fake_reuse": "none", "noise": "stale"}
    assert renamed(both) == renamed(dict(reversed(both.items()))) == {"fake_reuse": "none"}


def test_every_new_name_exists_and_no_old_one_does() -> None:
    assert set(VALUES["recipe"].values()) == set(RECIPES)
    assert not set(FIELDS) & set(TrainSpec.model_fields)
    for values in VALUES.values():
        assert not set(values) & set(values.values())


def test_no_new_name_in_a_row_is_an_old_one() -> None:
    for names in (EVENTS, OUTCOMES, ERROR_CODES):
        assert not set(names) & set(names.values())
    assert set(OUTCOMES.values()) <= set(Outcome)
    assert not set(ERROR_CODES) & {one.code for one in all_errors()}


def test_the_details_of_an_event_are_renamed_by_its_type() -> None:
    assert renamed_event("asked_to_yield", {"to": 7}) == ("preempt_requested", {"waiting_job": 7})
    assert renamed_event("rolled_back", {"step": 9, "to": 5, "now": "a", "why": "b"}) == (
        "rolled_back",
        {"step": 9, "to_step": 5, "action": "a", "reason": "b"},
    )
    assert renamed_event("released", None) == ("requeued", None)


def test_a_stored_result_of_0_2_is_read_under_the_new_names() -> None:
    measured = {"value": 0.1, "floor": 0.02}
    evaluation = {"pictures": 60, "metrics": {"kid/random": measured}, "recall": {"value": 0.5, "best": 0.9}}
    assert renamed_result({**evaluation, "variety": 0.8, "copying": {"words": "none", "line": 0.4}}) == {
        "image_count": 60,
        "metrics": {"kid/random": {"value": 0.1, "baseline": 0.02}},
        "recall": {"value": 0.5, "baseline": 0.9},
        "diversity": 0.8,
        "copying": {"summary": "none", "threshold": 0.4},
    }
    assert renamed_result({"metric": {"best": 0.1, "floor": 0.0}, "files": [{"name": "neighbours.png"}]}) == {
        "metric": {"best": 0.1, "baseline": 0.0},
        "files": [{"name": "neighbours.png"}],
    }
    assert not set(RESULT_KEYS) & set(RESULT_KEYS.values())


@given(st.dictionaries(st.sampled_from(["noise", "fake_reuse", "recipe", "arch", "seed"]), st.text()))
def test_a_second_translation_changes_nothing(data: Any) -> None:
    assert renamed(renamed(data)) == renamed(data)
