"""What a config makes devices compute: each program with its arguments, abstract and laid out on a
mesh.

Nothing is computed here: `compile_ahead` compiles these programs for TPUs, the doctor adds up their
arguments.

Dimensions:
  B  images of the global batch      R  rows of the sampler on one device      E  evaluations of the
  flow head per token
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.evaluation.fidelity import inception
from sphere_ar_jax.measure import costs
from sphere_ar_jax.models import lpips, transformer
from sphere_ar_jax.models.heads.flow import chunk_size
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.sampling import on_mesh
from sphere_ar_jax.sampling.tokens import sample_tokens
from sphere_ar_jax.training import adversarial
from sphere_ar_jax.training.stages import ar_stage, distillation_stage
from sphere_ar_jax.training.state import abstract_state, jitted_step

# Fields of a training state, for people.
NAMES = {'params': 'parameters', 'opt_state': 'optimizer', 'ema': 'EMAs', 'disc_params': 'discriminator',
         'disc_opt_state': 'its optimizer', 'frozen': 'frozen models'}  # fmt: skip


class Work(NamedTuple):
    """A program to compile.

    Attributes:
      name. function: jitted. arguments: abstract, with shardings. groups: {name: the part of the
        arguments}. images: B.
      flops, computed: of B images, the model's, and with what remat computes again.
      steps: how often it runs in a whole training, None if it is none.
      lengths: of `hlo.Program`. devices: that run it together.
    """

    name: str
    function: Any
    arguments: tuple
    groups: dict
    images: int
    flops: float
    computed: float
    steps: int | None = None
    lengths: tuple = ()
    devices: int = 1


def _shapes(model):
    return jax.eval_shape(model.init_params, jax.random.key(0))


def _lpips(options):
    """LPIPS' parameters, as shapes, where the tokenizer's training needs them."""
    if not options.perceptual_weight:
        return ()
    image = jnp.zeros((1, 32, 32, 3))
    return jax.eval_shape(lpips.LPIPS().init, jax.random.key(0), image, image)['params']


def stages(cfg):
    """The trainings that a config asks for: {name: (`state.Stage`, its frozen parameters, as
    shapes)}.
    """
    vae, ar = build.build_vae(cfg), build.build_ar(cfg)
    if cfg.init_from is not None:
        teacher = _shapes(vae), _shapes(ar.clone(head=ar.head.teacher()))
        make = lambda vae_params, ar_params: distillation_stage(
            ar, vae, vae_params, ar_params, cfg.distillation_training, cfg.seed
        )
        init = lambda key: jax.eval_shape(lambda *params: make(*params).init(key), *teacher)
        return {'distillation': (make(*teacher)._replace(init=init), teacher)}
    found = {}
    if cfg.tokenizer_training.steps and cfg.tokenizer is None:
        frozen = _lpips(cfg.tokenizer_training)
        found['tokenizer'] = (
            adversarial.tokenizer_stage(vae, cfg.tokenizer_training, cfg.seed, frozen),
            frozen,
        )
    if cfg.ar_training.steps:
        frozen = _shapes(vae)
        found['ar'] = ar_stage(ar, vae, frozen, cfg.ar_training, cfg.seed), frozen
    return found


def state_bytes(stage, frozen, mesh):
    """{part: bytes on each device} while a stage is trained: its state's fields, gradients and
    frozen parameters.
    """
    state = abstract_state(stage, mesh)
    parts = {
        name: costs.device_bytes(value) for name, value in vars(state).items() if name != 'step'
    }
    return {
        **parts,
        'gradients': parts['params'],
        'frozen': costs.device_bytes(sharding.abstract(mesh, frozen)),
    }


def _rows(mesh, images, *shapes, spec=sharding.BATCH):
    """Abstract arrays (images, …) split over the mesh; shapes: (dtype, the rest of a shape)."""
    split = jax.sharding.NamedSharding(mesh, spec)
    return tuple(
        jax.ShapeDtypeStruct((images, *rest), dtype, sharding=split) for dtype, rest in shapes
    )


def _placed(tree, place):
    """A tree of shapes as abstract arrays under a sharding."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)


def _on_one(mesh, tree):
    """A tree of shapes as abstract arrays of the mesh's first device alone."""
    return _placed(tree, jax.sharding.SingleDeviceSharding(mesh.devices.flat[0]))


def training_works(cfg, mesh):
    """The steps of the trainings that the config asks for, as `loop.train` compiles them."""
    plain = stages(schema.changed(cfg, {'vae.remat': False, 'ar.remat': False}))
    shape = build.build_vae(cfg).image_shape
    found = []
    for name, (stage, frozen) in stages(cfg).items():
        state, frozen = abstract_state(stage, mesh), sharding.abstract(mesh, frozen)
        B, steps = stage.options.batch_size, stage.options.steps
        image, label = _rows(mesh, B, (jnp.float32, shape), (jnp.int32, ()))
        arguments = state, frozen, {'image': image, 'label': label}
        step = jitted_step(stage, mesh, state)
        groups = dict(vars(state), frozen=frozen, batch=arguments[2])
        computed = costs.flops(stage.step, *arguments)
        flops = (
            costs.flops(plain[name][0].step, *arguments)
            if cfg.vae.remat or cfg.ar.remat
            else computed
        )
        found.append(
            Work(
                f'{name} step',
                step,
                arguments,
                groups,
                B,
                flops,
                computed,
                steps,
                devices=mesh.size,
            )
        )
    return found


def _tokens_flops(ar, params, B, options):
    """Operations of drawing B images' tokens, whatever the mesh."""

    def sample(params, labels, key):
        scale = 1.0 if options.guidance else None
        return sample_tokens(ar, params, labels, jax.random.split(key, B), options, scale)

    params = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params
    )  # without the mesh
    labels = jax.ShapeDtypeStruct((B,), jnp.int32)
    plan = options.plan(ar.num_tokens)
    chunk = chunk_size(plan.tables.t.shape[1], 2 * B if options.guidance else B)
    return costs.flops(
        sample, params, labels, jax.random.key(0), lengths=costs.head_loops(plan.evaluations, chunk)
    )


def sampling_works(cfg, mesh):
    """The sampler's two programs: tokens, of all devices together, and the decoder, of each device
    alone.
    """
    stacked = build.build_ar(cfg)
    ar = stacked.apart()
    vae = build.build_vae(cfg)
    options = build.build_sampler(cfg).options
    unstacked = jax.eval_shape(transformer.unstack, _shapes(stacked))
    params = sharding.abstract(mesh, unstacked)
    B = sharding.whole_rows(mesh, cfg.sampling.batch_size)
    labels, index = _rows(mesh, B, (jnp.int32, ()), (jnp.int32, ()))
    whole = sharding.whole(mesh)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    tokens, decode = on_mesh.sampling_programs(ar, vae, options, mesh)
    arguments = params, labels, index, key, number if options.guidance else None, number
    flops = _tokens_flops(ar, params, B, options)
    # The loops over tokens, over chunks of evaluations and within one, as `sampling` and
    # `solvers.integrate` make them.
    E, R = (
        options.plan(ar.num_tokens).evaluations,
        B // sharding.batch_parts(mesh) * (2 if options.guidance else 1),
    )
    rounds = -(-E // chunk_size(E, R))
    found = [
        Work('tokens', tokens, arguments, {'params': params, 'rows': (labels, index)}, B, flops, flops,
             lengths=(ar.num_tokens, rounds, E / rounds), devices=mesh.size)
    ]  # fmt: skip
    b = B // mesh.size
    params, z = _on_one(
        mesh, (_shapes(vae), jax.ShapeDtypeStruct((b, ar.num_tokens, ar.latent_dim), jnp.float32))
    )
    flops = costs.flops(decode, params, z)
    return [
        *found,
        Work('decode', decode, (params, z), {'params': params, 'rows': z}, b, flops, flops),
    ]


def evaluation_works(cfg, mesh):
    """The evaluator's programs: Inception's features, of colour images, and the tokenizer's
    reconstructions.
    """
    vae, whole, found = build.build_vae(cfg), sharding.whole(mesh), []
    B = sharding.whole_rows(mesh, cfg.sampling.batch_size)
    shape = vae.image_shape
    if shape[-1] == 3:
        image = jnp.zeros((1, inception.SIZE, inception.SIZE, 3))
        params = jax.eval_shape(inception.Inception().init, jax.random.key(0), image)['params']
        params = _placed(params, whole)
        (images,) = _rows(mesh, B, (jnp.uint8, shape), spec=sharding.ROWS)
        features, groups = jax.jit(inception.features), {'params': params, 'rows': images}
        flops = costs.flops(features, params, images)
        found = [
            Work('features', features, (params, images), groups, B, flops, flops, devices=mesh.size)
        ]
    b, key = B // mesh.size, jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    images, index = (
        jax.ShapeDtypeStruct((b, *shape), jnp.float32),
        jax.ShapeDtypeStruct((b,), jnp.int32),
    )
    arguments = params, rows = _on_one(mesh, ((_shapes(vae), key), (images, index)))
    reconstruct, groups = on_mesh.autoencoder(vae), {'params': params, 'rows': rows}
    flops = costs.flops(reconstruct, *arguments)
    return [*found, Work('reconstruct', reconstruct, arguments, groups, b, flops, flops)]


# Part of a run → its programs, a function of (config, mesh).
WORKS = {'train': training_works, 'sample': sampling_works, 'evaluate': evaluation_works}
