"""Relativistic pairs held by two penalties, on the tutorial's networks with evenly spread channels."""

from jobs.recipes import Recipe

RECIPE = Recipe(
    "rpgan",
    "relativistic pairs with R1 and R2, evenly spread channels, EMA and adaptive augmentation: "
    "for small data sets",
    {
        # A run of minutes has few steps: docs/quality.md has what these were chosen by.
        "batch": 32,
        "epochs": 400,
        "lr_g": 8e-4,
        "lr_d": 8e-4,
        "beta1": 0.0,
        "beta2": 0.99,
        "d_every": 1,
        "g_every": 1,
        "arch": "balanced",
        "loss": "relativistic",
        "norm_d": "none",
        "r1_gamma": 1.0,
        "r2_gamma": 1.0,
        "penalty_every": 4,
        "fake_reuse": "none",
        "ema_half_life_kimg": 20.0,
        # Off until D knows the pictures too well: from the start it costs colour and time.
        "augment": ("auto",),
        "ada_target": 0.6,
        "patience": 10,
    },
)
