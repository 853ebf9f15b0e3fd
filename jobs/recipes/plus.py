"""The tutorial's generator at the same cost, trained so that few pictures are enough."""

from jobs.recipes import Recipe

RECIPE = Recipe(
    "plus",
    "spectral norm, hinge loss, 1:1 steps, EMA and DiffAugment: faces from few pictures",
    {
        "batch": 64,
        "epochs": 400,
        "lr_g": 2e-4,
        "lr_d": 2e-4,
        "beta1": 0.0,
        "beta2": 0.999,
        "d_every": 1,
        "g_every": 1,
        "loss": "hinge",
        "norm_d": "spectral",
        "noise": "fresh",
        "ema_half_life_kimg": 20.0,
        "augment": ("auto",),
        "patience": 10,
    },
)
