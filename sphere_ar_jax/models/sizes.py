"""Constants of the published models (paper, table 5), without JAX so that configs read quickly."""

# Added to the variance in RMSNorm and LayerNorm.
EPS = 1e-6

# Arguments of `ar.sphere_ar`; those that are not here keep their defaults.
VARIANTS: dict[str, dict[str, int]] = {
    'B': {
        'depth': 24,
        'heads': 12,
        'width': 768,
        'head_depth': 6,
        'head_width': 768,
        'head_groups': 2,
    },
    'L': {
        'depth': 32,
        'heads': 16,
        'width': 1024,
        'head_depth': 8,
        'head_width': 1024,
        'head_groups': 2,
    },
    'H': {
        'depth': 40,
        'heads': 20,
        'width': 1280,
        'head_depth': 12,
        'head_width': 1280,
        'head_groups': 3,
    },
}
