"""The stages: tokenizer, AR model, distilled head."""

import jax
import jax.numpy as jnp

from sphere_ar_jax.flow import guidance
from sphere_ar_jax.models import lpips
from sphere_ar_jax.models.heads import mean_velocity
from sphere_ar_jax.models.vae import autoencode, draw_tokens
from sphere_ar_jax.training import losses, state


def tokenizer_weights(vae, options, lpips_params):
    """The weights of `losses.reconstruction_loss`, and LPIPS, computed in the S-VAE's dtype.

    Raises ValueError where LPIPS has a weight but no parameters.
    """
    if options.perceptual_weight and lpips_params is None:
        raise ValueError(
            'there are no lpips_params for the perceptual loss: give them, or perceptual_weight=0'
        )
    return dict(
        kl_weight=options.kl_weight, l2_weight=options.l2_weight, perceptual_weight=options.perceptual_weight,
        distance=lambda a, b: lpips.LPIPS(vae.dtype).apply({'params': lpips_params}, a, b),
    )  # fmt: skip


def tokenizer_stage(vae, options, seed, lpips_params=None):
    """Trains the S-VAE by `losses.reconstruction_loss`; lpips_params: of `lpips.LPIPS`, where it
    has a weight.
    """

    def loss(params, lpips_params, batch, keys):
        weights = tokenizer_weights(vae, options, lpips_params)
        images = batch['image']
        return losses.reconstruction_loss(
            images, *autoencode(vae, params, images, lambda q: q.draws(keys)), **weights
        )

    return state.make_stage(
        'tokenizer', options, seed, vae.init_params, loss, lpips_params, ('loss', 'psnr', *vae.posterior.shown),
        about='LPIPS network', warn=vae.posterior.faults,
    )  # fmt: skip


def ar_stage(ar, vae, vae_params, options, seed):
    """Trains the AR model by its head's loss on tokens drawn afresh at each step from the frozen
    S-VAE.

    With options.encoder_dtype the S-VAE computes in that; its tokens are float32 all the same.
    """
    if options.encoder_dtype:
        vae = vae.computing_in(getattr(jnp, options.encoder_dtype))

    def loss(params, vae_params, batch, keys):
        posterior_keys, flow_keys, label_keys = jax.vmap(
            lambda key: jax.random.split(key, 3), out_axes=1
        )(keys)
        z, _ = draw_tokens(vae, vae_params, batch['image'], posterior_keys)
        draws = ar.head.draws(flow_keys, (options.copies, *z.shape[1:]))
        labels = ar.condition.drop(label_keys, batch['label'], options.label_dropout)
        return ar.apply({'params': params}, labels, z, draws, method='loss')

    shown = 'loss', 'grad_norm', 'token_norm'
    return state.make_stage(
        'ar', options, seed, ar.init_params, loss, vae_params, shown, about='tokenizer', model=vae
    )


def distillation_stage(ar, vae, vae_params, ar_params, options, seed):
    """Train a head of few evaluations by `mean_velocity.distillation_loss`, from the head of a
    frozen AR model.

    ar: with the new head. ar_params: of the trained model, with `head.teacher()`. The state holds
    the new head alone.
    """

    def init_head(key):
        return (
            ar.init_params(key)['head'] | ar_params['head']
        )  # only the embedding of the step's width is new

    def loss(head, frozen, batch, keys):
        vae_params, ar_params = frozen
        posterior_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        z, _ = draw_tokens(vae, vae_params, batch['image'], posterior_keys)
        noise = ar.head.draws(noise_keys, (1, *z.shape[1:]))
        scales = guidance.guidance_scales(options.guidance_scale, ar.num_tokens, options.guidance)
        return mean_velocity.distillation_loss(
            ar,
            head,
            ar_params,
            batch['label'],
            z,
            noise,
            scales,
            options.levels,
            options.teacher_steps,
        )

    frozen, shown = (vae_params, ar_params), ('loss', 'one_step')
    return state.make_stage(
        'distillation', options, seed, init_head, loss, frozen, shown, about='tokenizer or teacher'
    )
