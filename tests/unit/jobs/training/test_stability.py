"""A run that has diverged or collapsed with finite numbers is reported, and changes no bit of any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from unit.jobs.training.test_train import spec_of, train

from jobs.training import stability


def types(ctx: Any) -> Any:
    return [one["type"] for one in ctx.events]


def test_losses_that_explode_without_nan_are_an_event_and_a_warning(tmp_path: Path) -> None:
    result, ctx = train(
        tmp_path, spec_of(batch=4, epochs=12, lr_g=1.0, lr_d=1.0, loss="hinge", norm_d="none")
    )
    assert abs(result["loss_d"]) + abs(result["loss_g"]) > 1e4
    assert types(ctx).count("diverged") == 1
    assert "diverged: " in result["warning"] or "collapsed: " in result["warning"]


@pytest.mark.parametrize("conditional", [False, True])
def test_a_generator_that_ignores_its_latents_is_noticed(conditional: bool) -> None:
    class Constant(torch.nn.Module):
        def forward(self, latents_BZ11: Any, labels_B: Any = None) -> Any:
            assert (labels_B is not None) == conditional
            return torch.full((len(latents_BZ11), 3, 8, 8), 0.3)

    latents = torch.randn(20, 4, 1, 1)
    assert stability.all_equal(Constant(), latents, conditional=conditional)


def test_a_usual_run_has_no_warning(tmp_path: Path) -> None:
    result, ctx = train(tmp_path, spec_of())
    assert "warning" not in result
    assert not {"diverged", "collapsed"} & set(types(ctx))


@pytest.mark.parametrize(
    ("means", "said"),
    [
        ({"loss_d": 3e12, "loss_g": -1.0}, "loss_d is about 10^12"),
        ({"loss_d": 0.5, "loss_g": -2e7}, "loss_g is about 10^7"),
        ({"loss_d": 999.0, "loss_g": 12.0, "d_real": 1e9}, None),
        ({}, None),
    ],
)
def test_a_loss_beyond_ten_thousand_has_diverged(means: Any, said: Any) -> None:
    assert stability.diverged_loss(means) == said
