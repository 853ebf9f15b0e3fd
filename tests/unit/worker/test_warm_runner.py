"""The environment that a runner gets from its supervisor."""

import pytest

from worker.warm_runner import CHOICES, thread_policy


def test_threads_look_for_work_a_moment_before_they_sleep():
    assert 0 < int(thread_policy({})["GOMP_SPINCOUNT"]) < 300_000, "libgomp's own number starves neighbours"


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_of_the_user_stands(name):
    assert thread_policy({name: "whatever"}) == {}
