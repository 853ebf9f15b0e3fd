"""Residual networks without normalisation, relativistic loss, R1 and R2 penalties: after R3GAN."""

from jobs.recipes import Recipe

RECIPE = Recipe(
    "r3gan",
    "residual networks, relativistic pairs with R1 and R2, schedules and EMA: after R3GAN",
    {
        "batch": 64,
        "epochs": 400,
        # R3GAN has 2e-4, for days on many GPUs. In two minutes on one core that gave blurs and this
        # outlines of heads: one run at 32 pixels, not measured.
        "lr_g": 1e-3,
        "lr_d": 1e-3,
        "lr_end": 0.25,
        "beta1": 0.0,
        "beta2": 0.9,
        "beta2_end": 0.99,
        "d_every": 1,
        "g_every": 1,
        "arch": "resnet",
        "loss": "relativistic",
        "norm_d": "none",
        "r1_gamma": 1.0,
        "r2_gamma": 1.0,
        "gamma_end": 0.1,
        "penalty_every": 4,
        "fake_reuse": "none",
        "ema_half_life_kimg": 20.0,
        "augment": ("auto",),
        "ada_target": 0.6,
        "patience": 10,
    },
)
