"""The training stages: the tokenizer, the AR model and the distilled head."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sphere_ar_jax.flow import guidance
from sphere_ar_jax.models.ar import AR
from sphere_ar_jax.models.heads import mean_velocity
from sphere_ar_jax.models.judges import lpips
from sphere_ar_jax.models.vae import VAE, autoencode, draw_batch_tokens
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.training import losses, state


def reconstruct(
    vae: VAE,
    options: ConfigDict,
    params: PyTree,
    lpips_params: PyTree | None,
    images: jax.Array,
    keys: jax.Array,
) -> tuple[jax.Array, state.Scalars, jax.Array]:
    """Reconstructs images, and weighs the terms of the loss as a stage's options say.

    Args:
      vae: the tokenizer. LPIPS computes in its dtype.
      options: the stage's section of the config.
      params: the tokenizer's parameters.
      lpips_params: parameters of `lpips.LPIPS`; None where it has no weight.
      images: (B, H, W, c) in [−1, 1].
      keys: one PRNG key for each image, (B,).

    Returns:
      (loss and scalars of `losses.reconstruction_loss`, reconstructions (B, H, W, c)).

    Raises:
      ValueError: LPIPS has a weight but no parameters.
    """
    if options.perceptual_weight and lpips_params is None:
        raise ValueError(
            'there are no lpips_params for the perceptual loss: give them, or perceptual_weight=0'
        )

    def distance(a: jax.Array, b: jax.Array) -> jax.Array:
        return lpips.LPIPS(vae.dtype).apply({'params': lpips_params}, a, b)

    recon, z, posterior = autoencode(vae, params, images, lambda q: q.draws(keys))
    loss, scalars = losses.reconstruction_loss(
        images,
        recon,
        z,
        posterior,
        kl_weight=options.kl_weight,
        l2_weight=options.l2_weight,
        perceptual_weight=options.perceptual_weight,
        distance=distance,
    )
    return loss, scalars, recon


def tokenizer_loss(vae: VAE, options: ConfigDict) -> state.Loss:
    """The loss of the S-VAE without an adversarial term, see `losses.reconstruction_loss`.

    Args:
      vae: the tokenizer.
      options: the stage's section of the config.

    Returns:
      A function (params, LPIPS' parameters or None, batch, keys) → (loss, scalars).
    """

    def loss(params, lpips_params, batch, keys):
        loss, scalars, _ = reconstruct(vae, options, params, lpips_params, batch['image'], keys)
        return loss, scalars

    return loss


def tokenizer_stage(
    vae: VAE, options: ConfigDict, lpips_params: PyTree | None = None
) -> state.Stage:
    """The training of the S-VAE by `losses.reconstruction_loss`.

    See `docs/method.md`, "Tokenizer losses".

    Args:
      vae: the tokenizer.
      options: the stage's section of the config.
      lpips_params: parameters of `lpips.LPIPS`; None where it has no weight.

    Returns:
      The stage.
    """
    # The statistics of pieces of a batch may look like faults that the batch has not.
    warn = vae.posterior.faults if options.accumulate == 1 else state.no_warning
    return state.make_stage(
        'tokenizer',
        options,
        vae.init_params,
        tokenizer_loss(vae, options),
        frozen=lpips_params,
        shown=('loss', 'psnr', *vae.posterior.shown),
        about='LPIPS network',
        warn=warn,
    )


def ar_stage(
    ar: AR,
    vae: VAE,
    vae_params: PyTree,
    options: ConfigDict,
    choose_remat: bool = False,
) -> state.Stage:
    """The training of the AR model by its head's loss.

    Its tokens are drawn anew at each step from the posterior of the frozen S-VAE
    (`docs/method.md`, "Flow loss" and "Training"). Batches have images or their latents, see
    `vae.batch_posterior`.

    Args:
      ar: the AR model.
      vae: the tokenizer. It computes in options.encoder_dtype, if that is given. Tokens are float32
        in any case.
      vae_params: the tokenizer's parameters.
      options: the stage's section of the config.
      choose_remat: whether the stage gets a `Stage.without_remat`, so that the memory decides.

    Returns:
      The stage.
    """
    without_remat = None
    if choose_remat:
        without_remat = ar_stage(ar.keeping_activations(), vae, vae_params, options)
    if options.encoder_dtype:
        vae = vae.computing_in(getattr(jnp, options.encoder_dtype))

    def split(key):
        return jax.random.split(key, 3)

    def loss(params, vae_params, batch, keys):
        posterior_keys, flow_keys, label_keys = jax.vmap(split, out_axes=1)(keys)
        z = draw_batch_tokens(vae, vae_params, batch, posterior_keys)
        draws = ar.head.draws(flow_keys, (options.copies, *z.shape[1:]))
        labels = ar.condition.drop(label_keys, batch['label'], options.label_dropout)
        return ar.apply({'params': params}, labels, z, draws, method='loss')

    return state.make_stage(
        'ar',
        options,
        ar.init_params,
        loss,
        frozen=vae_params,
        shown=(
            'loss',
            'grad_norm',
            'token_norm',
            'magnitude_loss',
            'angle',
            'flow_loss',
            'text_loss',
        ),
        about='tokenizer',
        model=vae,
        without_remat=without_remat,
    )


def student_params(ar_params: PyTree, trained: PyTree, options: ConfigDict) -> PyTree:
    """Parameters of an AR model after a distillation.

    Args:
      ar_params: the teacher's parameters.
      trained: what the distillation trains, see `distillation_stage`.
      options: the stage's section of the config.
    """
    return trained if options.transformer else ar_params | {'head': trained}


def distillation_stage(
    ar: AR, vae: VAE, vae_params: PyTree, ar_params: PyTree, options: ConfigDict
) -> state.Stage:
    """The training of a head of few evaluations, from the head of a frozen AR model.

    Its loss is `mean_velocity.distillation_loss` (`docs/method.md`, "Mean-velocity distillation").
    The state holds the new head alone, or with options.transformer the whole AR model, which begins
    as the teacher.

    Args:
      ar: the AR model with the new head.
      vae: the tokenizer.
      vae_params: its parameters.
      ar_params: parameters of the trained model, whose head is `ar.head.teacher()`.
      options: the stage's section of the config.

    Returns:
      The stage.
    """

    def init(key):
        # It does not read the teacher: a compiled program cannot hold arrays of other hosts.
        fresh = ar.init_params(key)
        return fresh if options.transformer else fresh['head']

    def begin(params):
        # Copies, since the step takes the memory of its state.
        copied = jax.tree.map(jnp.copy, ar_params if options.transformer else ar_params['head'])
        if not options.transformer:
            return params | copied
        # Only the embedding of the step's width is new.
        return copied | {'head': params['head'] | copied['head']}

    def loss(params, frozen, batch, keys):
        vae_params, ar_params = frozen
        posterior_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        z = draw_batch_tokens(vae, vae_params, batch, posterior_keys)
        noise = ar.head.draws(noise_keys, (1, *z.shape[1:]))
        scales = guidance.guidance_scales(options.guidance_scale, ar.num_tokens, options.guidance)
        return mean_velocity.distillation_loss(
            ar,
            student_params(ar_params, params, options),
            ar_params,
            batch['label'],
            z,
            noise,
            scales,
            options.levels,
            options.teacher_steps,
            shift=options.teacher_shift,
            transformer=options.transformer,
        )

    return state.make_stage(
        'distillation',
        options,
        init,
        loss,
        frozen=(vae_params, ar_params),
        shown=('loss', 'one_step'),
        about='tokenizer or teacher',
        begin=begin,
    )
