"""The environment that a runner gets from its supervisor."""

import pytest

from worker.warm_runner import CHOICES, thread_policy


def test_threads_that_wait_take_no_core_from_their_neighbours():
    assert thread_policy({}) == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_of_the_user_stands(name):
    assert thread_policy({name: "whatever"}) == {}
