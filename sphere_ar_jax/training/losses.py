"""The tokenizer's losses, pure in parameters, data and draws.

Dimensions:
  B  images of the global batch     L  tokens of an image     d  latent dimension
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sphere_ar_jax.models.posteriors import Distribution
from sphere_ar_jax.models.vae import image_keys


def sample_keys(key: jax.Array, step: jax.Array | int, batch: int) -> jax.Array:
    """Folds a key by the step and by each image's row in the global batch.

    So the keys do not depend on how the batch is split (`docs/method.md`, "Random numbers").

    Args:
      key: the key of the training.
      step: ().
      batch: B.

    Returns:
      Keys (B,), one for each image.
    """
    return image_keys(jax.random.fold_in(key, step), jnp.arange(batch))


def reconstruction_loss(
    images: jax.Array,
    recon: jax.Array,
    z: jax.Array,
    posterior: Distribution,
    *,
    kl_weight: float,
    l2_weight: float,
    perceptual_weight: float = 0.0,
    distance: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The tokenizer's loss without its adversarial term, from the results of `vae.autoencode`.

    It is mean |x̂ − x| + l2_weight·mean (x̂ − x)² + kl_weight·mean KL(q‖prior) +
    perceptual_weight·mean distance(x̂, x). See paper §3 and `docs/method.md`, "Tokenizer losses".
    The term of l2_weight is not in the public SphereAR code.

    Args:
      images: x, (B, H, W, c) in [−1, 1].
      recon: x̂, the reconstructions (B, H, W, c).
      z: the tokens (B, L, d).
      posterior: the posterior of the tokens.
      kl_weight: weight of the KL divergence.
      l2_weight: weight of the squared error.
      perceptual_weight: weight of the distance.
      distance: function of two batches of images → (B,), such as `lpips.LPIPS`. It is not called
        where its weight is 0.

    Returns:
      (loss () float32, scalars). The scalars are l1, l2, psnr (in dB, for a peak of 2), token_norm
        (mean ‖z‖), the posterior's `statistics` and, unless its weight is 0, perceptual.

    Raises:
      ValueError: perceptual_weight is not 0, but there is no distance.
    """
    error = recon - images
    l1 = jnp.mean(jnp.abs(error))
    l2 = jnp.mean(jnp.square(error))
    scalars = posterior.statistics() | dict(
        l1=l1, l2=l2, psnr=10 * jnp.log10(4 / l2), token_norm=jnp.mean(jnp.linalg.norm(z, axis=-1))
    )
    loss = l1 + l2_weight * l2 + kl_weight * scalars['kl']
    if perceptual_weight:
        if distance is None:
            raise ValueError('there is no distance for perceptual_weight')
        scalars['perceptual'] = jnp.mean(distance(recon, images))
        loss += perceptual_weight * scalars['perceptual']
    return loss, scalars
