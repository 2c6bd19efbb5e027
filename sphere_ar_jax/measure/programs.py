"""What a config makes devices compute: each program with its arguments, abstract, on a mesh.

Nothing is computed here. `compile_ahead` compiles these programs for TPUs and GPUs, and the doctor
adds up their arguments.

Dimensions:
  B  images of the global batch
  R  rows of the sampler on one device
  E  evaluations of the flow head for a token
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec, Sharding
from ml_collections import ConfigDict

from sphere_ar_jax.config import build, fine_tuning, schema
from sphere_ar_jax.evaluation.fidelity import inception
from sphere_ar_jax.flow.plan import Options
from sphere_ar_jax.measure import costs
from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.ar import AR
from sphere_ar_jax.models.conditions import Condition
from sphere_ar_jax.models.heads import MeanVelocity
from sphere_ar_jax.models.judges import lpips
from sphere_ar_jax.models.vae import VAE
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sampling import autoencoding, on_mesh
from sphere_ar_jax.sampling.tokens import sample_tokens
from sphere_ar_jax.training import adversarial
from sphere_ar_jax.training.stages import ar_stage, distillation_stage
from sphere_ar_jax.training.state import Stage, abstract_state, jitted_step
from sphere_ar_jax.training.tuning.tuned import tuned_stage

# Fields of a training state → their names for people.
NAMES = {
    'params': 'parameters',
    'opt_state': 'optimizer',
    'ema': 'EMAs',
    'disc_params': 'discriminator',
    'disc_opt_state': 'its optimizer',
    'frozen': 'frozen models',
}


class Work(NamedTuple):
    """A program to compile.

    Attributes:
      name: as it is printed.
      function: jitted.
      arguments: abstract, with shardings.
      groups: {name: a part of the arguments}.
      images: B.
      flops: operations of the model on B images.
      computed: operations that are computed, with what remat computes again.
      steps: how often the program runs in a whole training; None if it is not a training step.
      lengths: those of `hlo.Program`.
      taken: that of `hlo.Program`.
      devices: how many run it together.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    groups: dict[str, PyTree]
    images: int
    flops: float
    computed: float
    steps: int | None = None
    lengths: tuple[float, ...] = ()
    taken: float = 0.5
    devices: int = 1


@functools.cache
def _shapes(model: AR | VAE) -> PyTree:
    """The shapes of a model's parameters, a tokenizer's with the statistics that it needs."""

    def make(key: jax.Array) -> PyTree:
        params = model.init_params(key)
        return model.with_statistics(params) if isinstance(model, VAE) else params

    return jax.eval_shape(make, jax.random.key(0))


def _lpips(options: ConfigDict) -> PyTree:
    """The shapes of LPIPS' parameters; () where the tokenizer's training does not need them."""
    if not options.perceptual_weight:
        return ()
    image = jnp.zeros((1, 32, 32, 3))
    return jax.eval_shape(lpips.LPIPS().init, jax.random.key(0), image, image)['params']


def _distillation(cfg: ConfigDict, ar: AR, vae: VAE) -> tuple[Stage, PyTree]:
    """The distillation stage and the shapes of its frozen models: the tokenizer and the teacher."""
    assert isinstance(ar.head, MeanVelocity)
    teacher = (_shapes(vae), _shapes(ar.clone(head=ar.head.teacher())))
    return distillation_stage(ar, vae, *teacher, cfg.distillation_training), teacher


def stages(cfg: ConfigDict) -> dict[str, tuple[Stage, PyTree]]:
    """The trainings that a config asks for.

    Args:
      cfg: a checked config.

    Returns:
      {name: (the stage, the shapes of its frozen parameters)}.
    """
    vae = build.build_vae(cfg)
    ar = build.build_ar(cfg)
    if cfg.init_from is not None:
        return {'distillation': _distillation(cfg, ar, vae)}
    found = {}
    if cfg.tokenizer_training.steps and cfg.tokenizer is None:
        frozen = _lpips(cfg.tokenizer_training)
        stage = adversarial.tokenizer_stage(vae, cfg.tokenizer_training, frozen)
        found['tokenizer'] = (stage, frozen)
    if cfg.ar_training.steps:
        stage = ar_stage(ar, vae, _shapes(vae), cfg.ar_training)
        tuning = fine_tuning.read(cfg.fine_tuning)
        if tuning != fine_tuning.Tuning():
            stage = tuned_stage(stage, tuning, _shapes(ar))
        found['ar'] = (stage, stage.frozen)
    return found


def state_bytes(stage: Stage, frozen: PyTree, mesh: Mesh) -> dict[str, int]:
    """Bytes on each device while a stage is trained, without activations.

    Args:
      stage: one of `stages`.
      frozen: the shapes of its frozen parameters.
      mesh: the devices.

    Returns:
      {part: bytes} of the fields of the stage's state, `gradients` and `frozen`.
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


def _rows(
    mesh: Mesh,
    images: int,
    *shapes: tuple[Any, tuple[int, ...]],
    spec: PartitionSpec = sharding.BATCH,
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract arrays (images, …) split over the mesh by `spec`.

    `shapes` has a dtype and the rest of the shape for each array.
    """
    split = jax.sharding.NamedSharding(mesh, spec)
    return tuple(
        jax.ShapeDtypeStruct((images, *rest), dtype, sharding=split) for dtype, rest in shapes
    )


def _placed(tree: PyTree, place: Sharding) -> PyTree:
    """A tree of shapes as abstract arrays under a sharding."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)


def _on_one(mesh: Mesh, tree: PyTree) -> PyTree:
    """A tree of shapes as abstract arrays of the mesh's first device alone."""
    return _placed(tree, jax.sharding.SingleDeviceSharding(mesh.devices.flat[0]))


def _label(condition: Condition) -> tuple[Any, tuple[int, ...]]:
    """The dtype of a label and its shape for one image."""
    example = condition.example()
    return example.dtype, example.shape[1:]


def training_works(cfg: ConfigDict, mesh: Mesh) -> list[Work]:
    """The steps of the trainings that the config asks for, as `loop.train` compiles them.

    Args:
      cfg: a checked config.
      mesh: the devices.
    """
    plain = stages(schema.changed(cfg, {'vae.remat': False, 'ar.remat': False}))
    shape = build.build_vae(cfg).image_shape
    found = []
    for name, (stage, frozen) in stages(cfg).items():
        state = abstract_state(stage, mesh)
        frozen = sharding.abstract(mesh, frozen)
        images = stage.options.batch_size
        image, label = _rows(mesh, images, (jnp.float32, shape), _label(build.build_condition(cfg)))
        batch = {'image': image, 'label': label}
        arguments = (state, frozen, batch, jax.ShapeDtypeStruct((), jnp.uint32))
        computed = costs.flops(stage.step, *arguments)
        flops = computed
        if cfg.vae.remat or build.recomputes(cfg.ar):
            plain_stage, _ = plain[name]
            flops = costs.flops(plain_stage.step, *arguments)
        work = Work(
            name=f'{name} step',
            function=jitted_step(stage, mesh, state),
            arguments=arguments,
            groups=dict(vars(state), frozen=frozen, batch=batch),
            images=images,
            flops=flops,
            computed=computed,
            steps=stage.options.steps,
            devices=mesh.size,
        )
        found.append(work)
    return found


def _guided_share(options: Options, num_tokens: int) -> float:
    """The share of the head's evaluations that read null rows."""
    guided = costs.guided_evaluations(options, num_tokens)
    return float(guided.mean()) / options.plan(num_tokens).evaluations


def _tokens_flops(ar: AR, params: PyTree, batch: int, options: Options) -> float:
    """Operations of drawing the tokens of B = `batch` images, whatever the mesh."""

    def sample(params: PyTree, labels: jax.Array, key: jax.Array) -> jax.Array:
        scale = 1.0 if options.guidance else None
        return sample_tokens(ar, params, labels, jax.random.split(key, batch), options, scale)

    # The shapes are taken without the mesh.
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    dtype, shape = _label(ar.condition)
    labels = jax.ShapeDtypeStruct((batch, *shape), dtype)
    rows = 2 * batch if options.guidance else batch
    plan = options.plan(ar.num_tokens)
    lengths = costs.head_loops(plan, rows, ar.fused)
    taken = _guided_share(options, ar.num_tokens)
    return costs.flops(sample, params, labels, jax.random.key(0), lengths=lengths, taken=taken)


def sampling_works(cfg: ConfigDict, mesh: Mesh) -> list[Work]:
    """The sampler's two programs: tokens, of all devices together, and the decoder, of each alone.

    Args:
      cfg: a checked config.
      mesh: the devices.
    """
    stacked = build.build_ar(cfg)
    ar = stacked.apart()
    vae = build.build_vae(cfg)
    options = build.build_sampler(cfg).options
    images = sharding.whole_rows(mesh, cfg.sampling.batch_size)
    tokens, decode = on_mesh.sampling_programs(ar, vae, options, mesh)

    unstacked = jax.eval_shape(transformer.unstack, _shapes(stacked))
    params = sharding.abstract(mesh, unstacked)
    labels, index = _rows(mesh, images, _label(ar.condition), (jnp.int32, ()))
    whole = sharding.whole(mesh)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    flops = _tokens_flops(ar, params, images, options)
    # The loops run over tokens, over chunks of evaluations and within one chunk, as `sample_tokens`
    # and `solvers.integrate` make them.
    rows = images // sharding.batch_parts(mesh) * (2 if options.guidance else 1)
    loops = costs.head_loops(options.plan(ar.num_tokens), rows, ar.fused)
    tokens_work = Work(
        name='tokens',
        function=tokens,
        arguments=(params, labels, index, key, number if options.guidance else None, number),
        groups={'params': params, 'rows': (labels, index)},
        images=images,
        flops=flops,
        computed=flops,
        lengths=(ar.num_tokens, *loops),
        taken=_guided_share(options, ar.num_tokens),
        devices=mesh.size,
    )

    own = images // mesh.size
    z_shape = jax.ShapeDtypeStruct((own, ar.num_tokens, ar.latent_dim), jnp.float32)
    params, z = _on_one(mesh, (_shapes(vae), z_shape))
    flops = costs.flops(decode, params, z)
    decode_work = Work(
        name='decode',
        function=decode,
        arguments=(params, z),
        groups={'params': params, 'rows': z},
        images=own,
        flops=flops,
        computed=flops,
    )
    return [tokens_work, decode_work]


def _features_work(mesh: Mesh, images: int, shape: tuple[int, ...]) -> Work:
    """Inception's features of colour images (`images`, *shape), of all devices together."""
    example = jnp.zeros((1, inception.SIZE, inception.SIZE, 3))
    params = jax.eval_shape(inception.Inception().init, jax.random.key(0), example)['params']
    params = _placed(params, sharding.whole(mesh))
    (pixels,) = _rows(mesh, images, (jnp.uint8, shape), spec=sharding.ROWS)
    features = jax.jit(inception.features)
    flops = costs.flops(features, params, pixels)
    return Work(
        name='features',
        function=features,
        arguments=(params, pixels),
        groups={'params': params, 'rows': pixels},
        images=images,
        flops=flops,
        computed=flops,
        devices=mesh.size,
    )


def _reconstruct_work(mesh: Mesh, images: int, vae: VAE) -> Work:
    """The tokenizer's reconstructions of so many images, of each device alone."""
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    pixels = jax.ShapeDtypeStruct((images, *vae.image_shape), jnp.float32)
    index = jax.ShapeDtypeStruct((images,), jnp.int32)
    frozen, rows = _on_one(mesh, ((_shapes(vae), key), (pixels, index)))
    reconstruct = autoencoding.autoencoder(vae)
    flops = costs.flops(reconstruct, frozen, rows)
    return Work(
        name='reconstruct',
        function=reconstruct,
        arguments=(frozen, rows),
        groups={'params': frozen, 'rows': rows},
        images=images,
        flops=flops,
        computed=flops,
    )


def evaluation_works(cfg: ConfigDict, mesh: Mesh) -> list[Work]:
    """The evaluator's programs: Inception's features, of colour images only, and reconstructions.

    Args:
      cfg: a checked config.
      mesh: the devices.
    """
    vae = build.build_vae(cfg)
    images = sharding.whole_rows(mesh, cfg.sampling.batch_size)
    found = []
    if vae.image_shape[-1] == 3:
        found.append(_features_work(mesh, images, vae.image_shape))
    found.append(_reconstruct_work(mesh, images // mesh.size, vae))
    return found


# Part of a run → its programs, a function of (config, mesh).
WORKS: dict[str, Callable[[ConfigDict, Mesh], list[Work]]] = {
    'train': training_works,
    'sample': sampling_works,
    'evaluate': evaluation_works,
}
