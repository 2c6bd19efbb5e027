"""Training losses of the two stages, pure in parameters, data and draws (spec §3, §6, §8).

Dimensions:
  B  images of the global batch     L  tokens of an image     d  latent dimension
  m  noisy copies of every token (diffusion batch multiplier)

The tokenizer's terms are summed in `reconstruction_loss`; the adversarial one joins them in `adversarial.py`.
"""

import math

import jax
import jax.numpy as jnp

from sphere_ar_jax import distributions, flow, solvers


def sample_keys(key, step, batch):
    """One PRNG key per image, folded by step and by global sample index: independent of how the batch is sharded."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), jnp.arange(batch))


def posterior_draws(keys, posterior):
    """The draws of `vae.Posterior.sample`, one key per image: (s (B, L), normal (B, L, d−1))."""
    d = posterior.mu.shape[-1]
    return jax.vmap(lambda key, kappa: distributions.draw(key, kappa, d))(keys, posterior.kappa)


def draw_tokens(vae, params, images, keys):
    """Tokens drawn from the posterior of images (B, H, W, c), one key per image: (z (B, L, d), the `vae.Posterior`)."""
    posterior = vae.apply({'params': params}, images, method='encode')
    return posterior.sample(posterior_draws(keys, posterior)), posterior


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


# A dimension is dead where the tokens' directions spread less than this share of uniform ones' spread.
DEAD = 0.1


def latent_statistics(posterior):
    """How much of the sphere the tokens of a batch use: what `collapse` looks at.

    Args:
      posterior: `vae.Posterior` of (B, L) tokens in d dimensions.
    Returns:
      dict of scalars () float32: kappa (mean); kl (mean, nats per token); spread_min and spread_mean over dimensions
      of √d·std of mu's coordinate over batch and tokens (1 for uniform directions, 0 for equal ones); dead_share, of
      the dimensions with a spread below `DEAD`; mean_direction, the norm of the mean of mu (0 for uniform directions,
      1 for equal ones).
    """
    mu = posterior.mu.reshape(-1, posterior.mu.shape[-1])
    spread = mu.shape[-1] ** 0.5 * jnp.std(mu, axis=0)
    return dict(
        kappa=jnp.mean(posterior.kappa), kl=jnp.mean(posterior.kl()), spread_min=jnp.min(spread),
        spread_mean=jnp.mean(spread), dead_share=jnp.mean((spread < DEAD).astype(jnp.float32)),
        mean_direction=jnp.linalg.norm(jnp.mean(mu, axis=0)),
    )  # fmt: skip


def collapse(scalars):
    """What is wrong with a tokenizer's latents, in one sentence, or None; scalars: of `latent_statistics`, as floats.

    Wrong are: kappa < 1.1 (its floor is 1), KL < 0.1 nats per token, mean_direction > 0.9, any dead dimension. Before
    the first some hundred steps an untrained encoder's tokens look collapsed too.
    """
    kappa, kl, direction, dead = (scalars[name] for name in ('kappa', 'kl', 'mean_direction', 'dead_share'))
    if not all(math.isfinite(value) for value in (kappa, kl, direction, dead)):
        return 'the latents are no numbers'
    wrong = []
    if kappa < 1.1:
        wrong.append(f'kappa is {kappa:.2f}, at its floor of 1: the posterior ignores the image')
    if kl < 0.1:
        wrong.append(f'KL is {kl:.3f} nats, below 0.1: tokens carry next to nothing')
    if direction > 0.9:
        wrong.append(f'all tokens point the same way: their mean direction has norm {direction:.2f}')
    if dead > 0:
        wrong.append(
            f'{dead:.0%} of the dimensions are dead: directions spread there by less than {DEAD} of uniform ones'
        )
    return '; '.join(wrong) or None


def autoencode(vae, params, images, draws):
    """Images (B, H, W, c) through the S-VAE: (reconstructions, tokens z (B, L, d), the `vae.Posterior`).

    draws: of `vae.Posterior.draw` for (B, L) tokens, or a function posterior → draws.
    """
    posterior = vae.apply({'params': params}, images, method='encode')
    z = posterior.sample(draws(posterior) if callable(draws) else draws)
    return vae.apply({'params': params}, z, method='decode'), z, posterior


def reconstruction_loss(images, recon, z, posterior, *, kl_weight, l2_weight, perceptual_weight=0.0, distance=None):
    """mean |x̂ − x| + l2_weight·mean (x̂ − x)² + kl_weight·mean KL(q‖uniform) + perceptual_weight·mean distance(x̂, x), of
    `autoencode`'s results.

    Args:
      distance: function of two batches of images → (B,), as `perceptual.LPIPS`; not called where its weight is 0.
    Returns:
      (loss, scalars): loss () float32; scalars l1, l2, psnr (dB, peak 2), token_norm, `latent_statistics` and, unless
      its weight is 0, perceptual.
    Source: spec §3 and §8.
    """
    error = recon - images
    l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
    scalars = latent_statistics(posterior) | dict(
        l1=l1, l2=l2, psnr=10 * jnp.log10(4 / l2), token_norm=jnp.mean(jnp.linalg.norm(z, axis=-1))
    )
    loss = l1 + l2_weight * l2 + kl_weight * scalars['kl']
    if perceptual_weight:
        scalars['perceptual'] = jnp.mean(distance(recon, images))
        loss += perceptual_weight * scalars['perceptual']
    return loss, scalars


def tokenizer_loss(vae, params, images, draws, **weights):
    """`reconstruction_loss` of the S-VAE with these parameters.

    Args:
      vae: `vae.VAE`. params: its parameters. images: (B, H, W, c) float32 in [−1, 1]. draws: see `autoencode`.
      weights: kl_weight, l2_weight, perceptual_weight and distance, as there.
    Returns:
      (loss, scalars) as there.
    """
    return reconstruction_loss(images, *autoencode(vae, params, images, draws), **weights)


def hinge_loss(real, fake):
    """A discriminator's ½ mean max(0, 1 − real) + ½ mean max(0, 1 + fake), of its logits, any shapes. () float32."""
    return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2


def logistic_loss(real, fake):
    """A discriminator's −½ mean log σ(real) − ½ mean log(1 − σ(fake)), of its logits, any shapes. () float32."""
    return (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))) / 2


# Name: the discriminator's loss of its logits of (real, fake) images, and the generator's of those of its own images.
# The public code's non-saturating losses have logits and targets swapped. Set right, its discriminator's is the vanilla
# one; with that and with hinge its generator raises the logits themselves.
ADVERSARIAL = {
    'hinge': (hinge_loss, lambda fake: -jnp.mean(fake)),
    'vanilla': (logistic_loss, lambda fake: -jnp.mean(fake)),
    'non_saturating': (logistic_loss, lambda fake: jnp.mean(jax.nn.softplus(-fake))),
}


def flow_loss(ar, params, class_id, z, t_normal, noise):
    """Rectified-flow loss of every token given the ones before it: mean (v(x_t, t, c) − (z − noise))², float32.

    t = sigmoid(t_normal), x_t = (1 − t)·noise + t·z; each condition c is used for m noisy copies.

    Args:
      ar: `ar.AR`. params: its parameters. class_id: (B,) int32, labels already dropped. z: (B, L, d) tokens, no
      gradient flows into them. t_normal: (m, B, L), noise: (m, B, L, d): see `flow_draws`.
    Returns:
      (loss, scalars): loss () float32; scalars token_norm, the mean norm of the predicted data point
      x_t + (1 − t)·v before projection (a mean over possible tokens: within the sphere).
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


def mean_velocity_targets(velocity, noise, levels, num_steps):
    """Mean velocities of a flow over the segments that samplers of few steps take, by solving it.

    For every n of `levels` and every segment [i/n, (i + 1)/n]: u = (x at its end − x at its start)·n, along one
    trajectory from x₀ = noise, solved by Adams–Bashforth in num_steps equal steps.

    Args:
      velocity: function (x (N, d), t ()) → (N, d). noise: (N, d). levels: ints that divide num_steps.
    Returns:
      (x (P, N, d), t (P,), h (P,), u (P, N, d)) for P = Σ levels segments: start, time, width, mean velocity.
    Raises ValueError where a level does not divide num_steps. Source: u of MeanFlow (arXiv 2505.13447, eq. 3).
    """
    if any(num_steps % n for n in levels):
        raise ValueError(f'levels {tuple(levels)} must divide the {num_steps} steps of the teacher')
    table = solvers.table('ab2', num_steps)

    def advance(state, inputs):
        t, w = inputs
        state = solvers.step(w, *state, velocity(state[0], t))
        return state, state[0]

    _, path = jax.lax.scan(advance, (noise, jnp.zeros_like(noise)), (jnp.asarray(table.t), jnp.asarray(table.weights)))
    path = jnp.concatenate([noise[None], path])
    ends = [(i * num_steps // n, (i + 1) * num_steps // n) for n in levels for i in range(n)]
    start, end = (jnp.array(column) for column in zip(*ends, strict=True))
    h = (end - start).astype(jnp.float32) / num_steps
    u = (path[end] - path[start]) / h[:, None, None]
    return path[start], start.astype(jnp.float32) / num_steps, h, u


def distillation_loss(ar, head, teacher, class_id, z, noise, scales, levels, num_steps):
    """Teaches a flow head the mean velocity of a teacher's guided flow: mean (u(x, t, h, c) − its targets)².

    The AR model is frozen; the teacher's guidance, s_k at token k, becomes part of the head, which needs no null rows.

    Args:
      ar: `ar.AR` with average=True. head: its flow head's parameters, the only ones trained. teacher: parameters of the
      same model with average=False. class_id: (B,) int32. z: (B, L, d) tokens. noise: (B, L, d). scales: (L,) s_k.
      levels, num_steps: see `mean_velocity_targets`.
    Returns:
      (loss, scalars): loss () float32; scalars one_step, the part of the loss of the step from noise to data in one.
    """
    B, L, d = z.shape
    null = jnp.full_like(class_id, ar.num_classes)
    c = ar.clone(average=False).apply(
        {'params': teacher}, jnp.append(class_id, null), jnp.concatenate([z, z]), method='condition'
    )
    c = c.reshape(2 * B * L, -1)
    evaluate = lambda model, params, *arguments: model.apply(
        {'params': teacher | {'head': params}}, *arguments, method=lambda m, *a: m.head.velocity(*a)
    )

    def guided(x, t):
        v = evaluate(ar.clone(average=False), teacher['head'], jnp.concatenate([x, x]), jnp.full(len(c), t), c)
        return flow.guide(*jnp.split(v, 2), jnp.tile(scales, B)[:, None])

    targets = mean_velocity_targets(guided, noise.reshape(B * L, d), levels, num_steps)
    x, t, h, u = jax.lax.stop_gradient(targets)
    P, N = u.shape[:2]
    rows = lambda a: jnp.repeat(a, N)
    predicted = evaluate(
        ar, head, x.reshape(P * N, d), rows(t), jnp.tile(jax.lax.stop_gradient(c[:N]), (P, 1)), rows(h)
    )
    errors = jnp.mean(jnp.square(predicted.reshape(u.shape) - u), axis=(1, 2))
    whole = jnp.asarray([n == 1 for n in levels for _ in range(n)])
    return jnp.mean(errors), dict(one_step=jnp.sum(jnp.where(whole, errors, 0.0)) / max(1, sum(n == 1 for n in levels)))
