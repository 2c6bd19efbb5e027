"""The optimizer of all stages: clipped AdamW with a decay mask, and its schedule.

The defaults are those of the public SphereAR code. See `docs/method.md`, "Optimizer".
"""

from collections.abc import Sequence

import jax
import optax

from sphere_ar_jax.runtime.types import PyTree

# Names of layers and parameters without weight decay, though these have two dimensions or more.
NO_DECAY_NAMES = (
    'proj_in',
    'cls_embedding',
    'text_embedding',
    'text_positions',
    'begin_tokens',
    'features_proj',
    'features_empty',
    'features_positions',
)


def learning_rate(
    peak: float,
    warmup_steps: int,
    total_steps: int,
    final: float,
    restarts: Sequence[int] = (),
) -> optax.Schedule:
    """The schedule of the learning rate: a linear warm-up, then a cosine.

    With warmup_steps = 0 and final = peak the rate is constant, which is the S-VAE's recipe. See
    `docs/method.md`, "Schedule".

    Args:
      peak: the rate at the end of the warm-up.
      warmup_steps: number of steps in which the rate rises from 0 to `peak`.
      total_steps: the step at which the rate reaches `final`, or warmup_steps + 1 if that is later.
      final: the last rate.
      restarts: steps at which the rate has reached `final` too, and from which it rises to `peak`
        and falls again; ascending, below total_steps.

    Returns:
      A function step () int → learning rate () float32. Up to the first restart r it is what it is
        without restarts and with total_steps = r.
    """
    parts = []
    start = 0
    for end in (*restarts, total_steps):
        steps = max(end - start, warmup_steps + 1)
        lowest = final if start else 0.0
        parts.append(optax.warmup_cosine_decay_schedule(lowest, peak, warmup_steps, steps, final))
        start = end
    if len(parts) == 1:
        return parts[0]
    return optax.join_schedules(parts, list(restarts))


def decay_mask(params: PyTree) -> PyTree:
    """Which leaves have weight decay: matrices, kernels and embeddings, except `NO_DECAY_NAMES`.

    Every leaf decays but those named scale or bias and those with a name of `NO_DECAY_NAMES` in
    their path. The number of dimensions would not tell, since stacking gives the scales and biases
    of layers a second one.

    Args:
      params: parameters, nested dictionaries.

    Returns:
      A tree of booleans in the structure of the parameters.
    """

    def decays(path, _):
        names = [entry.key for entry in path]
        if names[-1] in ('scale', 'bias'):
            return False
        return not any(name in names for name in NO_DECAY_NAMES)

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW with decoupled decay on `decay_mask`, after the gradient was clipped.

    Args:
      schedule: the learning rate of a step.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: the decay, multiplied by the learning rate.
      clip_norm: the largest global norm of a gradient.

    Returns:
      The optimizer.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask),
    )
