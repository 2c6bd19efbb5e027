"""Our side of the benchmark: each part of sampling and training as a compiled program.

Each part knows its operations and the bytes that it must at least read.

Dimensions:
  B  images
  R  rows of the sampler, 2B with guidance
  E  evaluations of the flow head for a token
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.flow.guidance import Guidance
from sphere_ar_jax.interop import torch_names
from sphere_ar_jax.measure import costs
from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.ar import AR
from sphere_ar_jax.models.vae import VAE, draw_latents
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sampling import on_mesh
from sphere_ar_jax.training import stages
from sphere_ar_jax.training.state import (
    Stage,
    abstract_state,
    initialise,
    quickly_compiled,
    step_for_memory,
)

# part → what one run of it does
PARTS = {
    'cold': 'process start → sampler compiled, its first token drawn; nothing compiled before',
    'cached': "the same, a second time: with what the first start left in the compilers' caches",
    'prefill': 'class tokens of B images and the null class',
    'transformer': 'one decoding step, mean over the sequence',
    'head': 'one token of B images, all evaluations, guided if the sampler is',
    'decode': 'B images from their tokens',
    'encode': 'tokens of B images, drawn from the posterior, and its KL',
    'train_tokenizer': 'one optimizer step of the S-VAE, without adversarial and perceptual terms',
    'train_ar': 'one optimizer step of the AR model, encoding included',
    'sample': 'B images, whole: their tokens, then their pixels',
}

# These parts are starts, which are not repeated.
STARTS = ('cold', 'cached')


def positions(num_tokens: int, n: int = 8) -> list[int]:
    """The tokens whose decoding step is timed, evenly spread over the sequence."""
    return sorted({int(k) for k in np.linspace(1, num_tokens - 1, n)})


def inputs(ar: AR, vae: VAE, batch: int) -> dict[str, np.ndarray]:
    """The arrays that both sides get, from one seed.

    Args:
      ar: the AR model.
      vae: the tokenizer.
      batch: B.

    Returns:
      `images` (B, H, W, c) in [−1, 1], `labels` (B,), captions (B, T) or features (B, T, F),
        tokens `z` (B, L, d) as the sampler feeds them back, and `condition` (2B, D). Labels and
        captions are int32, all else is float32.
    """
    rng = np.random.default_rng(0)
    example = ar.condition.example()
    shape = (batch, *example.shape[1:])
    if jnp.issubdtype(example.dtype, jnp.floating):
        labels = rng.normal(size=shape).astype(np.float32)
    else:
        # Labels are below the number that stands for none.
        labels = rng.integers(0, int(ar.condition.null(example).max()), shape).astype(np.int32)
    z = rng.normal(size=(batch, ar.num_tokens, ar.latent_dim)).astype(np.float32)
    return {
        'images': rng.uniform(-1, 1, (batch, *vae.image_shape)).astype(np.float32),
        'labels': labels,
        'z': np.asarray(vae.project(jnp.asarray(z))),
        'condition': rng.normal(size=(2 * batch, ar.width)).astype(np.float32),
    }


def random_params(model: AR | VAE, seed: int) -> PyTree:
    """Random parameters none of which is zero, as in a trained model.

    They are the initial values. A leaf that starts at 0 gets noise of standard deviation 0.02
    instead.
    """
    params = jax.jit(model.init_params, **quickly_compiled())(jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def filled(a: jax.Array) -> jax.Array:
        if np.any(np.asarray(a[..., :1]) != 0):
            return a
        return jnp.asarray(0.02 * rng.normal(size=a.shape), jnp.float32)

    return jax.tree.map(filled, params)


def _compile(jitted: jax.stages.Wrapped, *arguments: PyTree) -> Callable[..., Any]:
    """A jitted function, compiled for arguments of these shapes."""
    return jitted.lower(*arguments).compile()


class Part:
    """Our side of one part.

    Only what the part needs is made. Where sampling uses the layers' parameters apart, the stacked
    ones of training are released.

    Attributes:
      run: does the part once and returns an array.
      flops: operations of one run, 0 for a start and for `sample`.
      bytes: bytes that one run must at least read, 0 where they are not counted.
    """

    run: Callable[[], np.ndarray]
    flops: float
    bytes: float

    def __init__(
        self,
        cfg: ConfigDict,
        part: str,
        batch: int,
        weights: str | os.PathLike[str] | None = None,
    ):
        """Prepares a part: makes its parameters, counts its operations and compiles it.

        Args:
          cfg: a checked config.
          part: a key of `PARTS`.
          batch: B.
          weights: a .npz file of {PyTorch name: array}; None takes `random_params`.
        """
        self.weights = weights
        self.part = part
        self.batch = batch
        self.cfg = cfg
        self.options, self.scale, _ = build.build_sampler(cfg)
        self.ar = build.build_ar(cfg)
        self.vae = build.build_vae(cfg)
        arrays = inputs(self.ar, self.vae, batch)
        self.inputs = {name: jnp.asarray(array) for name, array in arrays.items()}
        self.flops = 0
        self.bytes = 0
        # What one run leaves for the next: the cache of `transformer`, the state of a training.
        self.cache: PyTree = None
        self.state: PyTree = None
        self.run = getattr(self, '_' + part)()

    def _params(self, model: AR | VAE, seed: int) -> PyTree:
        if self.weights is None:
            params = random_params(model, seed)
            return model.with_statistics(params) if isinstance(model, VAE) else params
        with np.load(self.weights) as tensors:
            return torch_names.from_torch(
                tensors, jax.eval_shape(model.init_params, jax.random.key(0))
            )

    def _sampler(self, *without: str) -> tuple[AR, PyTree]:
        """The AR model as sampling uses it, and its parameters without those named."""
        # Parameters from a file are unstacked as NumPy's views: nothing is compiled for that.
        params = transformer.unstack(self._params(self.ar, 1))
        params = {name: value for name, value in params.items() if name not in without}
        return self.ar.apart(), jax.tree.map(jnp.asarray, params)

    @property
    def _rows(self) -> int:
        """R, with the null rows of guidance."""
        return self.batch * (2 if self.options.guidance else 1)

    def _double(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, x]) if self.options.guidance else x

    def _count(
        self,
        function: Callable[..., Any],
        *arguments: PyTree,
        weights: PyTree = (),
        **counting: Any,
    ) -> None:
        """Adds a function's operations, and the bytes of the weights that it reads.

        `counting` are `lengths` and `taken` of `costs.flops`.
        """
        self.flops += costs.flops(function, *arguments, **counting)
        self.bytes += costs.tree_bytes(weights)

    def _compiled(
        self, function: Callable[..., Any], *arguments: PyTree, **counted: Any
    ) -> Callable[[], Any]:
        """The function, counted and compiled, as one without arguments."""
        self._count(function, *arguments, **counted)
        compiled = _compile(jax.jit(function), *arguments)
        return lambda: compiled(*arguments)

    def _prefill(self, params: PyTree = None) -> Callable[[], np.ndarray]:
        if params is None:
            ar, params = self._sampler('head')
        else:
            ar = self.ar.apart()
        nulls = 1 if self.options.guidance else 0

        def run(p: PyTree, labels: jax.Array) -> jax.Array:
            rows = jnp.concatenate([labels, ar.condition.null(labels[:nulls])])
            c, _ = ar.apply({'params': p}, rows, method='prefill')
            return c

        compiled = self._compiled(run, params, self.inputs['labels'], weights=params['stack'])
        rows = np.minimum(np.arange(self._rows), self.batch)
        position = np.asarray(params['pos_for_diff'][:1])
        return lambda: np.asarray(compiled())[rows] - position

    def _transformer(self) -> Callable[[], np.ndarray]:
        ar, params = self._sampler('head')
        labels = self.inputs['labels']
        z = self.inputs['z']
        nulls = ar.condition.null(labels if self.options.guidance else labels[:0])
        rows = jnp.concatenate([labels, nulls])

        def prefill(p: PyTree) -> tuple[jax.Array, PyTree]:
            return ar.apply({'params': p}, rows, method='prefill')

        def decode_step(
            p: PyTree, z: jax.Array, k: jax.Array, cache: PyTree
        ) -> tuple[jax.Array, PyTree]:
            return ar.apply({'params': p}, self._double(z), k, cache, method='decode_step')

        _, self.cache = jax.jit(prefill)(params)
        where = positions(ar.num_tokens)
        length = ar.front + ar.num_tokens - 1
        example = (params, z[:, 0], jnp.int32(1), self.cache)
        self._count(decode_step, *example, weights=params['stack'])
        # The step of token k reads the cache up to that token.
        cache_bytes = costs.tree_bytes(self.cache)
        reads = [cache_bytes * (ar.front + k) / length for k in where]
        self.bytes += float(np.mean(reads))
        before = [(jnp.int32(k), z[:, k - 1]) for k in where]
        step = _compile(jax.jit(decode_step, donate_argnums=3), *example)
        position = np.asarray(params['pos_for_diff'])[None, where]

        def steps() -> np.ndarray:
            out = []
            for k, token in before:
                c, self.cache = step(params, token, k, self.cache)
                out.append(c)
            return np.stack(out, 1) - position

        return steps

    def _head(self, params: PyTree = None) -> Callable[[], np.ndarray]:
        if params is None:
            ar, params = self._sampler()
        else:
            ar = self.ar.apart()
        head = ar.head
        params = params['head']
        plan = self.options.plan(ar.num_tokens)
        num_draws = self.options.num_draws(ar.num_tokens)
        c = self.inputs['condition'][: self._rows]
        which = jnp.asarray(plan.which)
        guidance = None
        if self.options.guidance:
            scale = jnp.float32(self.scale)
            guidance = Guidance(scale, jnp.asarray(False), self.options.guidance_interval)

        def run(params: PyTree, c: jax.Array, key: jax.Array, k: jax.Array) -> jax.Array:
            solver = jax.tree.map(lambda a: a[which[k]], head.prepare(params, plan))
            noise = jax.random.normal(key, (self.batch, num_draws, ar.latent_dim))
            noise = self._double(noise).swapaxes(0, 1)
            return self.vae.project(head.draw_token(params, c, noise, solver, guidance))

        evaluations = int(plan.count[plan.which[1]])
        # Each evaluation reads the residual blocks; a chunk of evaluations shares the modulations.
        blocks = {
            name: {module: weights for module, weights in group.items() if module != 'ada'}
            for name, group in params.items()
            if 'res_groups' in name
        }
        self.bytes += evaluations * costs.tree_bytes(blocks)
        lengths = costs.head_loops(plan, self._rows, ar.fused, evaluations)
        guided = costs.guided_evaluations(self.options, ar.num_tokens)
        taken = int(guided[1]) / evaluations
        key = jax.random.key(0)
        compiled = self._compiled(run, params, c, key, jnp.int32(1), lengths=lengths, taken=taken)
        return lambda: np.asarray(compiled())

    def _decode(self) -> Callable[[], np.ndarray]:
        params = self._params(self.vae, 2)

        def run(p: PyTree, z: jax.Array) -> jax.Array:
            return self.vae.apply({'params': p}, z, method='decode')

        z = self.inputs['z'][..., : self.vae.latent_dim]
        compiled = self._compiled(run, params, z, weights=params['decoder'])
        return lambda: np.asarray(compiled())

    def _encode(self) -> Callable[[], np.ndarray]:
        params = self._params(self.vae, 2)
        keys = jax.random.split(jax.random.key(0), self.batch)

        def run(p: PyTree, x: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
            z, q = draw_latents(self.vae, p, x, keys)
            return z, q.kl()

        compiled = self._compiled(
            run, params, self.inputs['images'], keys, weights=params['encoder']
        )
        return lambda: np.asarray(compiled()[0])

    def _train(self, stage: Stage) -> Callable[[], np.ndarray]:
        mesh = sharding.make_mesh(1)
        abstract = abstract_state(stage, mesh)
        self.state = initialise(stage, abstract, 0)
        batch = {'image': self.inputs['images'], 'label': self.inputs['labels']}
        batch = sharding.place_batch(mesh, batch)
        arguments = (stage.frozen, batch, np.uint32(0))
        chosen = step_for_memory(stage, mesh, (self.state, *arguments))
        if chosen.text:
            print(f'{stage.name}: {chosen.text}', flush=True)
        timed = stage.without_remat if chosen.without_remat else stage
        assert timed is not None  # `step_for_memory` chose it
        self._count(timed.step, abstract, *arguments)
        step = chosen.run
        if not chosen.without_remat:
            step = _compile(step, self.state, *arguments)

        def run() -> np.ndarray:
            self.state, scalars = step(self.state, *arguments)
            return np.asarray(scalars['loss'])[None]

        return run

    def _train_tokenizer(self) -> Callable[[], np.ndarray]:
        # The parameters of LPIPS come from files, which the benchmark does not ask for.
        cfg = schema.changed(self.cfg, {'tokenizer_training.perceptual_weight': 0.0})
        return self._train(stages.tokenizer_stage(self.vae, cfg.tokenizer_training))

    def _train_ar(self) -> Callable[[], np.ndarray]:
        if self.cfg.init_from is not None:
            raise ValueError('the AR model of a distilled head is frozen: there is no such step')
        vae_params = self._params(self.vae, 2)
        choose_remat = self.cfg.ar.remat is None
        return self._train(
            stages.ar_stage(self.ar, self.vae, vae_params, self.cfg.ar_training, choose_remat)
        )

    def _program(self, params: PyTree) -> Callable[[], jax.Array]:
        """A function that draws the images by the two programs of every command, compiled."""
        mesh = sharding.make_mesh(1)
        tokens, decode = on_mesh.sampling_programs(self.ar.apart(), self.vae, self.options, mesh)
        arguments = (
            params,
            self.inputs['labels'],
            jnp.arange(self.batch),
            jax.random.key(0),
            None if self.scale is None else jnp.float32(self.scale),
            jnp.float32(1),
        )
        vae_params = self._params(self.vae, 2)
        draw = _compile(tokens, *arguments)
        to_pixels = _compile(decode, vae_params, self.inputs['z'])
        return lambda: to_pixels(vae_params, draw(*arguments).z)

    def _sample(self) -> Callable[[], np.ndarray]:
        _, params = self._sampler()
        program = self._program(params)
        return lambda: np.asarray(program())

    def _cold(self) -> Callable[[], np.ndarray]:
        _, params = self._sampler()
        self._program(params)
        prefill = self._prefill(params)
        head = self._head(params)
        # A start has no least time.
        self.flops = 0
        self.bytes = 0
        prefill()
        return head

    _cached = _cold
