"""Relativistic loss with R1 and R2 penalties, on the tutorial's networks with balanced widths."""

from jobs.recipes import Recipe

RECIPE = Recipe(
    "rpgan",
    "relativistic pairs with R1 and R2, evenly spread channels, EMA and adaptive augmentation: "
    "for small data sets",
    {
        # For short runs with few steps; docs/quality.md has the measurements.
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
        # Adaptive, so off until D overfits: augmentation from the start costs colour and time.
        "augment": ("auto",),
        "ada_target": 0.6,
        "patience": 10,
    },
    # Three times as fast as with patches of 2×2. At the rates of 96 pixels the losses jumped after 11,000
    # images, and no face was left. docs/decisions/0029-patch-size.md has the measurements.
    by_size={
        256: {
            "patch_size": 4,
            "antialias": True,
            "lr_g": 4e-4,
            "lr_d": 4e-4,
            "r1_gamma": 4.0,
            "r2_gamma": 4.0,
        },
    },
)
