"""The tutorial's generator at the same cost, trained so that few pictures are enough."""

from jobs.recipes import Recipe

RECIPE = Recipe(
    "sngan",
    "spectral norm, hinge loss, 1:1 steps, EMA and adaptive augmentation",
    {
        # A run of minutes has few steps: docs/quality.md has what these were chosen by.
        "batch": 32,
        "epochs": 400,
        "lr_g": 4e-4,
        "lr_d": 4e-4,
        "beta1": 0.0,
        "beta2": 0.999,
        "d_every": 1,
        "g_every": 1,
        "loss": "hinge",
        "norm_d": "spectral",
        "fake_reuse": "none",
        "ema_half_life_kimg": 20.0,
        # Off until D knows the pictures too well: from the start it costs colour and time.
        "augment": ("auto",),
        "ada_target": 0.6,
        "patience": 10,
    },
)
