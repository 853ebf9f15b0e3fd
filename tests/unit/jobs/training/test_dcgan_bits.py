"""The origin keeps its bits: beside the tutorial as a plain loop, and from release to release."""

import json
from typing import Any

import pytest
import torch
from unit.jobs.local_context import LocalContext
from unit.jobs.training import dcgan_reference as reference

import jobs.training.train


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What ganq's own run of the origin ends with."""
    ctx = LocalContext(tmp_path_factory.mktemp("origin"), data=reference.IMAGES)
    with reference.one_thread():
        jobs.training.train.run(reference.SPEC, ctx)
    state = ctx.saved[-1].state
    return {key: value for key, value in state.items() if key.startswith(("g.", "d."))}


@pytest.fixture(scope="module")
def hashes() -> Any:
    return reference.all_hashes()


def test_the_origin_ends_with_the_bits_of_the_tutorial_in_the_same_layout(ours: Any, hashes: Any) -> None:
    assert reference.sha256(ours) == hashes[reference.OURS]


@pytest.mark.parametrize("combination", ["plain, default", "plain, fused", "channels last, default"])
def test_another_layout_or_optimiser_differs_in_the_last_bits_alone(ours: Any, combination: str) -> None:
    with reference.one_thread():
        layout, optimiser = combination.split(", ")
        theirs = reference.the_tutorial(layout, optimiser)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=2e-4, atol=4e-5, msg=key)


def test_the_bits_are_those_that_were_stored_for_this_build(ours: Any, hashes: Any) -> None:
    stored = json.loads(reference.STORED.read_text())
    if reference.build() not in stored:
        reason = (
            f"no bits are stored for {reference.build()}: "
            "PYTHONPATH=tests python -m unit.jobs.training.dcgan_reference --write keeps them"
        )
        print(reason)
        pytest.skip(reason)
    assert hashes == stored[reference.build()]
    assert reference.sha256(ours) == stored[reference.build()][reference.OURS]
