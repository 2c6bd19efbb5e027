"""Training losses of the two stages, pure in parameters, data and draws (spec §3, §6, §8).

Dimensions:
  B  images of the global batch     L  tokens of an image     d  latent dimension
  m  noisy copies of every token (diffusion batch multiplier)

The tokenizer's terms are summed in `tokenizer_loss`: adversarial and perceptual terms belong there too.
"""

import jax
import jax.numpy as jnp

from sphere_ar_jax import distributions, flow


def sample_keys(key, step, batch):
    """One PRNG key per image, folded by step and by global sample index: independent of how the batch is sharded."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), jnp.arange(batch))


def posterior_draws(keys, posterior):
    """The draws of `vae.Posterior.sample`, one key per image: (s (B, L), normal (B, L, d−1))."""
    d = posterior.mu.shape[-1]
    return jax.vmap(lambda key, kappa: distributions.draw(key, kappa, d))(keys, posterior.kappa)


def flow_draws(keys, copies, num_tokens, d):
    """The draws of `flow_loss`, one key per image: (t_normal (m, B, L), noise (m, B, L, d)), standard normal."""

    def draw(key):
        key_t, key_noise = jax.random.split(key)
        return (
            jax.random.normal(key_t, (copies, num_tokens)),
            jax.random.normal(key_noise, (copies, num_tokens, d)),
        )

    return jax.vmap(draw, out_axes=1)(keys)


def drop_labels(keys, class_id, null_class, probability):
    """class_id (B,) with each label replaced by the null class with the given probability; keys (B,). Spec §8."""
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
    return jnp.where(dropped, null_class, class_id)


def tokenizer_loss(vae, params, images, draws, *, kl_weight, l2_weight):
    """Reconstruction and KL of the S-VAE: mean |x̂ − x| + l2_weight·mean (x̂ − x)² + kl_weight·mean KL(q‖uniform).

    Args:
      vae: `vae.VAE`. params: its parameters. images: (B, H, W, c) float32 in [−1, 1].
      draws: of `vae.Posterior.draw` for (B, L) tokens, or a function posterior → draws.
    Returns:
      (loss, scalars): loss () float32; scalars l1, l2, kl (nats per token), kappa, psnr (dB, peak 2).
    Source: spec §3 and §8.
    """
    variables = {'params': params}
    posterior = vae.apply(variables, images, method='encode')
    z = posterior.sample(draws(posterior) if callable(draws) else draws)
    error = vae.apply(variables, z, method='decode') - images
    l1, l2, kl = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error)), jnp.mean(posterior.kl())
    scalars = dict(
        l1=l1, l2=l2, kl=kl, kappa=jnp.mean(posterior.kappa), psnr=10 * jnp.log10(4 / l2),
        token_norm=jnp.mean(jnp.linalg.norm(z, axis=-1)),
    )  # fmt: skip
    return l1 + l2_weight * l2 + kl_weight * kl, scalars


def flow_loss(ar, params, class_id, z, t_normal, noise):
    """Rectified-flow loss of every token given the ones before it: mean (v(x_t, t, c) − (z − noise))², float32.

    t = sigmoid(t_normal), x_t = (1 − t)·noise + t·z; each condition c is used for m noisy copies.

    Args:
      ar: `ar.AR`. params: its parameters. class_id: (B,) int32, labels already dropped. z: (B, L, d) tokens, no
      gradient flows into them. t_normal: (m, B, L), noise: (m, B, L, d): see `flow_draws`.
    Returns:
      (loss, scalars): loss () float32; scalars token_norm, the mean norm of the predicted data point
      x_t + (1 − t)·v before projection (√d where the model has learned the sphere's scale).
    Source: spec §6.
    """
    z = jax.lax.stop_gradient(z)
    t = jax.nn.sigmoid(t_normal)
    copies = jnp.broadcast_to(z, noise.shape)
    x_t = flow.interpolate(noise, copies, t)
    v = ar.apply({'params': params}, class_id, z, x_t, t)
    loss = jnp.mean(jnp.square(v - flow.target_velocity(noise, copies)))
    predicted = x_t + (1 - t[..., None]) * v
    return loss, dict(token_norm=jnp.mean(jnp.linalg.norm(predicted, axis=-1)))
