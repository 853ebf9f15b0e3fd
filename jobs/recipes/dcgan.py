"""The recipe of the tutorial, with its exact semantics."""

from jobs.recipes import Recipe

RECIPE = Recipe(
    "dcgan",
    "the tutorial's DCGAN, exactly: BCE, BatchNorm, G on every 5th batch",
    {
        "batch": 256,
        "epochs": 400,
        "lr_g": 2e-4,
        "lr_d": 2e-4,
        "beta1": 0.5,
        "beta2": 0.999,
        "d_every": 1,
        "g_every": 5,
        "loss": "bce",
        "norm_d": "batch",
        "fake_reuse": "until-g-step",
        "ema_half_life_kimg": 0.0,
        "augment": (),
    },
)
