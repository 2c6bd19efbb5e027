"""The S-VAE's published training, in which a discriminator is trained along.

Its loss has reconstruction, KL, LPIPS and an adversarial term. See `docs/method.md`, "Adversarial
training". A step follows the order of the public code. Both networks see the same reconstructions,
which the S-VAE makes before its update:
  1. The S-VAE descends l1 + kl_weight·KL + perceptual_weight·LPIPS + w·(the generator's adversarial
    loss).
  2. The discriminator descends w·(its own loss) on the images and on those reconstructions.
Each has an AdamW of its own with the same options, after its gradient was clipped by its own norm.
The weight w is 0 before step number `disc_start` (the first step has number 1) and `disc_weight`
from it on. With w = 0 the discriminator's gradient is 0, not absent: its AdamW counts steps and its
kernels decay.

Three things differ from the public code:
  - BatchNorm takes the statistics of the whole batch. In the public code they are those of each
    GPU's 32 images.
  - BatchNorm keeps no running statistics. The public code updates them and never reads them.
  - LPIPS is deterministic. It has a dropout of ½ before its linear weights, which is meant for
    fitting them. In the public code `gan_model.train()` turns that on again, which adds noise of
    mean 0 to the distance.

Dimensions:
  B  images of the global batch; `batch` is {'image': (B, H, W, c), 'label': (B,)}
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from sphere_ar_jax.models.judges import discriminators
from sphere_ar_jax.models.vae import VAE
from sphere_ar_jax.runtime.console import pick
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.training import losses, stages
from sphere_ar_jax.training import state as training_state


class AdversarialState(training_state.TrainState):
    """`state.TrainState` of the S-VAE, and the discriminator's part.

    Attributes:
      disc_params: the discriminator's parameters.
      disc_opt_state: the state of its optimizer.
    """

    disc_params: Any
    disc_opt_state: Any


def tokenizer_stage(
    vae: VAE, options: ConfigDict, lpips_params: PyTree | None = None
) -> training_state.Stage:
    """The training of the S-VAE against a discriminator.

    With disc_weight 0 it is `stages.tokenizer_stage`. The scalars of a step are those of
    `losses.reconstruction_loss` and
      loss                          of the S-VAE
      adversarial, discriminator    the unweighted terms
      logits_real, logits_fake      means
      grad_norm, disc_grad_norm     before clipping
      learning_rate                 of both networks

    Args:
      vae: the tokenizer. The discriminator and LPIPS compute in its dtype.
      options: the stage's section of the config. Here it needs discriminator, one of
        `discriminators.KINDS`, disc_loss, one of `discriminators.ADVERSARIAL`, disc_start,
        disc_weight, perceptual_weight, l2_weight and kl_weight.
      lpips_params: parameters of `lpips.LPIPS`, on the devices of the mesh. None where
        perceptual_weight is 0, or for a stage whose state is to be read and not trained.

    Returns:
      The stage.

    Raises:
      UserError: there is no discriminator or loss of that name, or the discriminator cannot judge
        images of that size.
    """
    if not options.disc_weight:
        return stages.tokenizer_stage(vae, options, lpips_params)
    discriminator = discriminators.build(options.discriminator, vae.image_shape, vae.dtype)
    discriminator_term, generator_term = pick(
        discriminators.ADVERSARIAL, 'disc_loss', options.disc_loss
    )
    decays = training_state.ema_decays(options)
    schedule, tx = training_state.build_optimizer(options)

    def init(key: jax.Array) -> AdversarialState:
        params = vae.init_params(key)
        variables = discriminator.init(jax.random.fold_in(key, 1), jnp.zeros((1, *vae.image_shape)))
        disc_params = variables['params']
        return AdversarialState(
            step=jnp.int32(0),
            params=params,
            opt_state=tx.init(params),
            ema=training_state.copies(params, len(decays)),
            disc_params=disc_params,
            disc_opt_state=tx.init(disc_params),
        )

    def generator_loss(params, state, lpips_params, images, keys, weight):
        loss, scalars, recon = stages.reconstruct(vae, options, params, lpips_params, images, keys)
        fake = discriminator.apply({'params': state.disc_params}, recon)
        scalars['adversarial'] = generator_term(fake)
        return loss + weight * scalars['adversarial'], (scalars, recon)

    def discriminator_loss(params, images, recon, weight):
        real = discriminator.apply({'params': params}, images)
        fake = discriminator.apply({'params': params}, recon)
        loss = discriminator_term(real, fake)
        scalars = dict(discriminator=loss, logits_real=jnp.mean(real), logits_fake=jnp.mean(fake))
        return weight * loss, scalars

    def update(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def step(
        state: AdversarialState,
        lpips_params: PyTree,
        batch: training_state.Batch,
        seed: ArrayLike,
    ) -> tuple[AdversarialState, training_state.Scalars]:
        images = batch['image']
        keys = losses.sample_keys(jax.random.key(seed), state.step, len(images))
        weight = jnp.where(state.step + 1 < options.disc_start, 0.0, options.disc_weight)

        descend = jax.value_and_grad(generator_loss, has_aux=True)
        (loss, (scalars, recon)), grads = descend(
            state.params, state, lpips_params, images, keys, weight
        )
        params, opt_state = update(state.params, state.opt_state, grads)
        rates = training_state.rates_now(options, state.step)
        ema = training_state.update_emas(state.ema, params, rates)

        judge = jax.value_and_grad(discriminator_loss, has_aux=True)
        (_, more), disc_grads = judge(state.disc_params, images, recon, weight)
        disc_params, disc_opt_state = update(state.disc_params, state.disc_opt_state, disc_grads)

        scalars |= more
        scalars |= dict(
            loss=loss,
            grad_norm=optax.tree.norm(grads),
            disc_grad_norm=optax.tree.norm(disc_grads),
            learning_rate=schedule(state.step),
        )
        state = AdversarialState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=ema,
            disc_params=disc_params,
            disc_opt_state=disc_opt_state,
        )
        return state, scalars

    return training_state.Stage(
        'tokenizer',
        options,
        init,
        step,
        frozen=lpips_params,
        shown=('loss', 'psnr', 'kl', 'discriminator', 'logits_real', 'logits_fake'),
        about='LPIPS network',
        warn=vae.posterior.faults,
        loss=stages.tokenizer_loss(vae, options),
    )
