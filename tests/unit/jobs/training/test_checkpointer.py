"""What a checkpoint holds while training goes on beside its writing."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from unit.jobs.local_context import LocalContext, noise_images, sha256_of

import jobs.training.train
from jobs.specs import TrainSpec
from jobs.training.checkpointer import StagingBuffers
from jobs.training.state import all_finite

IMAGES = noise_images(21, 16)


def spec_of(recipe: Any, **given: Any) -> Any:
    small = {"size": 16, "nz": 4, "ngf": 3, "ndf": 3, "batch": 4, "epochs": 5, "save_every": 2, "seed": 5}
    return TrainSpec.create(data="/faces", recipe=recipe, **small, **given)


@dataclass
class LateContext(LocalContext):
    """Writes a checkpoint as late as it may, on a thread of its own."""

    late = None

    def save_checkpoint(self, **what: Any) -> None:
        assert self.late is None, "wait_for_save() first"
        self.late = what

    def is_saving(self) -> bool:
        return self.late is not None

    def wait_for_save(self) -> None:
        what, self.late = self.late, None
        if what is not None:
            thread = threading.Thread(target=super().save_checkpoint, kwargs=what)
            thread.start()
            thread.join()


@pytest.mark.parametrize("recipe", ["dcgan", "sngan", "rpgan"])
def test_a_checkpoint_that_is_written_late_holds_what_the_run_was_when_it_was_due(
    tmp_path: Path, recipe: str
) -> None:
    at_once = LocalContext(tmp_path, data=IMAGES)
    late = LateContext(tmp_path, data=IMAGES)
    for ctx in (at_once, late):
        jobs.training.train.run(spec_of(recipe), ctx)
    assert [one.step for one in late.saved] == [one.step for one in at_once.saved] == [10, 20, 25]
    for ours, theirs in zip(late.saved, at_once.saved, strict=True):
        assert sha256_of(ours.state) == sha256_of(theirs.state)
        assert sha256_of(ours.generator) == sha256_of(theirs.generator)
    assert late.samples.keys() == at_once.samples.keys()
    assert all(np.array_equal(late.samples[name], at_once.samples[name]) for name in late.samples)


def test_copies_keep_their_place_in_memory() -> None:
    live = {"w": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), "n": torch.tensor(1)}
    staging = StagingBuffers()
    first = staging.copy(live)
    expected = {name: tensor.clone() for name, tensor in live.items()}
    live["w"].zero_()
    live["n"].add_(1)
    assert all(torch.equal(first[name], expected[name]) for name in live)
    second = staging.copy(live)
    assert torch.equal(second["w"], torch.zeros(4, 3, 2, 2))
    assert second["w"].data_ptr() == first["w"].data_ptr()


def test_room_that_was_made_before_is_used() -> None:
    live = {"w": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)}
    staging = StagingBuffers()
    staging.prepare(lambda: live)
    staging.prepare(lambda: pytest.fail("once is enough"))
    assert staging._allocation is not None
    staging._allocation.join()
    place = staging._buffers["w"].data_ptr()
    taken = staging.copy(live)
    assert taken["w"].data_ptr() == place
    assert torch.equal(taken["w"], live["w"])


def test_a_tensor_of_another_form_is_copied_all_the_same() -> None:
    staging = StagingBuffers()
    staging.copy({"w": torch.ones(4), "gone": torch.ones(1)})
    assert staging.copy({"w": torch.ones(2, 3)})["w"].shape == (2, 3)
    assert set(staging.copy({"w": torch.ones(2, 3)})) == {"w"}


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([1.0, -2.0], True),
        ([3e38, 3e38], True),
        ([float("inf"), float("-inf")], False),
        ([1.0, float("nan")], False),
    ],
)
def test_numbers_are_finite_each_for_itself(values: Any, finite: bool) -> None:
    assert all_finite([torch.ones(3), torch.tensor(values), torch.tensor(2)]) is finite


def test_the_longest_wait_for_a_checkpoint_is_reported(tmp_path: Path) -> None:
    result = jobs.training.train.run(spec_of("sngan"), LocalContext(tmp_path, data=IMAGES))
    assert 0 < result["longest_stall_s"] < result["seconds"]
