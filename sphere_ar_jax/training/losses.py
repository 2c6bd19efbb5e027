"""The tokenizer's losses, pure in parameters, data and draws.

Dimensions:
  B  images of the global batch     L  tokens of an image     d  latent dimension
"""

import jax
import jax.numpy as jnp


def sample_keys(key, step, batch):
    """One PRNG key per image, folded by step and by global sample index: independent of how the
    batch is sharded.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), jnp.arange(batch))


def reconstruction_loss(
    images, recon, z, posterior, *, kl_weight, l2_weight, perceptual_weight=0.0, distance=None
):
    """mean |x̂ − x| + l2_weight·mean (x̂ − x)² + kl_weight·mean KL(q‖uniform) +
    perceptual_weight·mean distance(x̂, x), of `autoencode`'s results.

    Args:
      distance: function of two batches of images → (B,), as `lpips.LPIPS`; not called where its
        weight is 0.
    Returns:
      (loss, scalars): loss () float32; scalars l1, l2, psnr (dB, peak 2), token_norm, the
        posterior's
      `statistics` and, unless its weight is 0, perceptual.
    Source: paper §3, and the public SphereAR code for the weights.
    """
    error = recon - images
    l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
    scalars = posterior.statistics() | dict(
        l1=l1, l2=l2, psnr=10 * jnp.log10(4 / l2), token_norm=jnp.mean(jnp.linalg.norm(z, axis=-1))
    )
    loss = l1 + l2_weight * l2 + kl_weight * scalars['kl']
    if perceptual_weight:
        scalars['perceptual'] = jnp.mean(distance(recon, images))
        loss += perceptual_weight * scalars['perceptual']
    return loss, scalars
