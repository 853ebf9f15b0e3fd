"""Adaptive augmentation: what p does to images, what moves p, and that it resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from unit.jobs.augmenting import augment
from unit.jobs.local_context import LocalContext, noise_images, sha256_of

import jobs.training.train
from jobs import rng
from jobs.recipes import RECIPES
from jobs.specs import TrainSpec
from jobs.training.augment import ADA_INTERVAL, AUTO_POLICIES, MAX_COLOR_P, Ada, plan

CPU = torch.device("cpu")
ALL = ("color", "translation", "cutout")


def augmented(batch: Any, policies: Any, p: Any) -> Any:
    chance = None if p is None else torch.tensor(p)
    return augment(batch, policies, rng.generator(0, "test"), chance)


@pytest.mark.parametrize("policy", ALL)
def test_each_image_is_changed_with_its_own_chance_or_left_to_the_last_bit(policy: Any) -> None:
    batch = torch.rand(400, 3, 16, 16) * 2 - 1
    assert torch.equal(augmented(batch, (policy,), 0.0), batch)
    same = (augmented(batch, (policy,), 0.3) == batch).flatten(1).all(1)
    assert 0.6 < same.float().mean().item() < 0.85
    assert augmented(batch, (policy,), 1.0).ne(batch).flatten(1).any(1).float().mean().item() > 0.9


def test_policies_choose_their_images_apart_from_each_other() -> None:
    batch = torch.rand(400, 3, 16, 16) * 2 - 1
    same = (augmented(batch, ("color", "cutout"), 0.5) == batch).flatten(1).all(1)
    assert 0.15 < same.float().mean().item() < 0.4


def test_a_chance_is_differentiable_twice_too() -> None:
    batch = torch.rand(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: augmented(x, ALL, 0.5).square(), (batch,))


def test_auto_changes_all_of_a_small_set_and_none_of_a_large_one() -> None:
    assert plan(("auto",), 1.0, 2_000) == (AUTO_POLICIES, 1.0)
    assert plan(("auto",), 0.5, 60_000) == (AUTO_POLICIES, 0.25)
    assert plan(("auto",), 1.0, 100_000) == ((), 0.0)
    assert plan(("auto", "translation"), 1.0, 60_000) == (("translation",), 0.5)
    assert plan(("cutout",), 1.0, 10**6) == (("cutout",), 1.0)
    assert plan(("cutout",), 0.0, 10) == ((), 0.0)


def steps_of(ada: Any, sign: Any, steps: Any, most: Any = 1.0) -> Any:
    for step in range(steps):
        ada.update(torch.tensor(sign), 64, d_steps=step, max_p=most)
    return ada.p.item()


def test_p_rises_while_d_knows_the_training_images_and_falls_when_it_does_not() -> None:
    ada = Ada(0.6, 64_000, CPU)
    assert ada.p.item() == 0
    assert steps_of(ada, 1.0, ADA_INTERVAL - 1) == 0
    assert steps_of(Ada(0.6, 64_000, CPU), 1.0, 500) == pytest.approx(0.5)
    ada = Ada(0.6, 6_400, CPU)
    assert steps_of(ada, 1.0, 500, most=0.8) == pytest.approx(0.8)
    assert steps_of(ada, -1.0, 40) == pytest.approx(0.4)
    assert steps_of(ada, -1.0, 500) == 0
    half_right = torch.tensor(0.5)  # three quarters of the verdicts right: under the target
    ada.state_3[0] = 0.5
    for step in range(ADA_INTERVAL):
        ada.update(half_right, 64, d_steps=step, max_p=1.0)
    assert ada.p.item() < 0.5


def run(folder: Any, **given: Any) -> Any:
    base = {"size": 16, "nz": 4, "ngf": 2, "ndf": 8, "batch": 4, "seed": 5, "augment": ("color",)}
    options = {
        "recipe": "sngan",
        "epochs": 30,
        "save_every": 30,
        "lr_d": 2e-3,
        "ada_target": 0.6,
        "ada_kimg": 0.5,
    }
    spec = TrainSpec.create(**{"data": "/faces", **base, **options, **given})
    ctx = LocalContext(Path(folder), noise_images(8, 16))
    jobs.training.train.run(spec, ctx)
    return ctx


@pytest.mark.parametrize("recipe", sorted(RECIPES.keys() - {"dcgan"}))
def test_a_recipe_changes_no_image_until_d_knows_them_too_well(recipe: Any) -> None:
    """Recoloured from the start, a quarter of the default's samples had colours that no image has."""
    spec = TrainSpec.create(data="/faces", recipe=recipe)
    assert plan(spec.augment, spec.augment_p, 2_000) == (AUTO_POLICIES, 1.0)
    assert spec.ada_target > 0


@pytest.mark.parametrize(
    "recipe", ["rpgan", *(pytest.param(one, marks=pytest.mark.tier2) for one in ("sngan", "r3gan"))]
)
def test_p_rises_when_d_memorises_eight_images_and_the_metrics_show_it(tmp_path: Path, recipe: str) -> None:
    ctx = run(tmp_path, recipe=recipe, epochs=60)
    shown = [record["augment_p"] for record in ctx.records if "augment_p" in record]
    assert shown[0] < 0.1
    assert shown[-1] > shown[0]
    assert max(shown) > 0.15
    assert all(-1 <= record["d_sign"] <= 1 for record in ctx.records if "d_sign" in record)


def test_colours_are_steered_up_to_a_chance_at_which_they_do_not_leak_and_shifts_further() -> None:
    ada = Ada(0.6, 1000, torch.device("cpu"))
    ada.state_3[0] = 0.2
    assert {one: p.item() for one, p in ada.probabilities(ALL).items()} == pytest.approx(
        dict.fromkeys(ALL, 0.2)
    )
    ada.state_3[0] = 0.9
    assert ada.probabilities(ALL)["color"].item() == pytest.approx(MAX_COLOR_P)
    assert ada.probabilities(ALL)["translation"].item() == pytest.approx(0.9)


def test_a_run_changes_colours_no_more_often_than_that(tmp_path: Path) -> None:
    def weights(policy: Any, most: Any) -> Any:
        given = {"ada_target": 0.01, "ada_kimg": 0.02, "epochs": 6, "augment": (policy,), "augment_p": most}
        state = run(tmp_path, **given).saved[-1].state
        assert state["ada.numbers"][0] == pytest.approx(most)
        return sha256_of({name: one for name, one in state.items() if name != "ada.numbers"})

    assert weights("color", 1.0) == weights("color", MAX_COLOR_P)
    assert weights("translation", 1.0) != weights("translation", MAX_COLOR_P)


def test_a_chance_that_is_fixed_is_used_and_one_of_0_changes_nothing(tmp_path: Path) -> None:
    ends = [
        sha256_of(run(tmp_path, ada_target=0.0, epochs=2, **given).saved[-1].state)
        for given in ({"augment": ()}, {"augment_p": 0.0}, {"augment_p": 0.5}, {"augment_p": 1.0})
    ]
    assert ends[0] == ends[1]
    assert len(set(ends)) == 3


def test_a_steered_run_resumes_in_the_middle_of_a_count_to_the_last_bit(tmp_path: Path) -> None:
    base = {"size": 16, "nz": 4, "ngf": 2, "ndf": 8, "batch": 4, "epochs": 8, "save_every": 8}
    steered = {"ada_target": 0.1, "ada_kimg": 0.1, "lr_d": 5e-3}
    spec = TrainSpec.create(data="/x", recipe="sngan", **base, **steered)
    images = noise_images(20, 16)
    straight = LocalContext(Path(tmp_path), images)
    jobs.training.train.run(spec, straight)
    assert straight.saved[-1].state["ada.numbers"][0] > 0
    for at in (5, 7, 18):
        first = LocalContext(Path(tmp_path), images, stop_at={at: "drain"}.get)
        with pytest.raises(BaseException, match="drain"):
            jobs.training.train.run(spec, first)
        second = LocalContext(Path(tmp_path), images, resume_from=first.saved[-1].for_resume())
        jobs.training.train.run(spec, second)
        assert sha256_of(second.saved[-1].state) == sha256_of(straight.saved[-1].state)
