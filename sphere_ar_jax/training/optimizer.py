"""The optimizer of both stages: clipped AdamW with a decay mask, its schedules, and the EMA.

Trees of parameters have any shapes; leading axes of stacked layers do not make a vector a matrix
here. Source: the public SphereAR code.
"""

import jax
import optax

# Tensors without weight decay though they have two dimensions or more.
NO_DECAY_NAMES = ('proj_in', 'cls_embedding')


def learning_rate(peak, warmup_steps, total_steps, final):
    """Linear warm-up from 0 to `peak` over warmup_steps, then a cosine to `final` at total_steps.

    With warmup_steps = 0 and final = peak the rate is constant (the S-VAE's recipe).

    Returns:
      schedule: step () int → learning rate () float32.
    """
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup_steps, max(total_steps, warmup_steps + 1), final
    )


def decay_mask(params):
    """True for the leaves with weight decay: matrices, kernels and embeddings, except
    `NO_DECAY_NAMES`.

    Told by name, since stacked layers give norm scales and biases a second dimension: every leaf
    decays but those named scale or bias and those with a name of NO_DECAY_NAMES in their path.
    """

    def decays(path, _):
        names = [entry.key for entry in path]
        return names[-1] not in ('scale', 'bias') and not any(
            name in names for name in NO_DECAY_NAMES
        )

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(schedule, *, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, clip_norm=1.0):
    """Global-norm clip, then AdamW with decoupled decay on `decay_mask`; the rate is
    schedule(step).
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask),
    )
