"""The tutorial's generator, trained for small data sets."""

from jobs.recipes import Recipe

RECIPE = Recipe(
    "sngan",
    "spectral norm, hinge loss, 1:1 steps, EMA and adaptive augmentation",
    {
        # For short runs with few steps; docs/quality.md has the measurements.
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
        # Adaptive, so off until D overfits: augmentation from the start costs colour and time.
        "augment": ("auto",),
        "ada_target": 0.6,
        "patience": 10,
    },
)
