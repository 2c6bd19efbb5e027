"""Our side of the benchmark: each part of sampling and training as a compiled program, with its
operations and bytes.

Dimensions:
  B  images      R  rows of the sampler, 2B with guidance      E  evaluations of the flow head per
  token
"""

import jax
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.flow.guidance import Guidance
from sphere_ar_jax.interop import torch_names
from sphere_ar_jax.measure import costs
from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.heads.flow import chunk_size
from sphere_ar_jax.models.vae import draw_tokens
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.sampling import on_mesh
from sphere_ar_jax.training import stages
from sphere_ar_jax.training.state import abstract_state, jitted_step, quickly_compiled

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
    'sample': 'B images, whole, in one program',
}

# Parts that are a start, not a thing that is repeated.
STARTS = ('cold', 'cached')


def positions(num_tokens, n=8):
    """The tokens whose decoding step is timed, evenly spread over the sequence."""
    return sorted({int(k) for k in np.linspace(1, num_tokens - 1, n)})


def inputs(ar, vae, batch):
    """The arrays both sides get, from one seed."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(batch, ar.num_tokens, ar.latent_dim)).astype(np.float32)
    return {
        'images': rng.uniform(-1, 1, (batch, *vae.image_shape)).astype(np.float32),
        'labels': rng.integers(0, ar.condition.num_classes, batch).astype(np.int32),
        'z': z / np.linalg.norm(z, axis=-1, keepdims=True) * ar.latent_dim**0.5,
        'condition': rng.normal(size=(2 * batch, ar.width)).astype(np.float32),
    }  # fmt: skip


def random_params(model, seed):
    """Parameters at which nothing is zero, as in a trained model: their initial values, and noise
    where those are 0.
    """
    params = jax.jit(model.init_params, **quickly_compiled())(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    noise = lambda a: jnp.asarray(0.02 * rng.normal(size=a.shape), jnp.float32)
    return jax.tree.map(lambda a: a if np.any(np.asarray(a[..., :1]) != 0) else noise(a), params)


class Part:
    """Our side of one part: `run()` does it once and returns an array; `flops` and `bytes`, what it
    must at least do.

    Only what the part needs is made; the parameters that training stacks are let go where sampling
    uses them apart.
    """

    def __init__(self, cfg, part, batch, weights=None):
        self.weights = weights  # file of {PyTorch name: array} to use in place of random parameters
        self.part, self.batch, self.cfg = part, batch, cfg
        self.options, self.scale, _ = build.build_sampler(cfg)
        self.ar, self.vae = build.build_ar(cfg), build.build_vae(cfg)
        self.inputs = {k: jnp.asarray(v) for k, v in inputs(self.ar, self.vae, batch).items()}
        self.flops = self.bytes = 0
        self.run = getattr(self, '_' + part)()

    def _params(self, model, seed):
        if self.weights is None:
            return random_params(model, seed)
        with np.load(self.weights) as tensors:
            return torch_names.from_torch(
                tensors, jax.eval_shape(model.init_params, jax.random.key(0))
            )

    def _sampler(self, *without):
        """The AR model as sampling uses it, and its parameters without those named."""
        params = transformer.unstack(
            self._params(self.ar, 1)
        )  # NumPy's views, if from a file: nothing to compile
        params = {name: value for name, value in params.items() if name not in without}
        return self.ar.apart(), jax.tree.map(jnp.asarray, params)

    @property
    def _rows(self):
        """R, with the null rows of guidance."""
        return self.batch * (2 if self.options.guidance else 1)

    def _double(self, x):
        return jnp.concatenate([x, x]) if self.options.guidance else x

    def _count(self, function, *arguments, weights=(), lengths=()):
        self.flops += costs.flops(function, *arguments, lengths=lengths)
        self.bytes += costs.tree_bytes(weights)

    def _compiled(self, function, *arguments, **counted):
        """The function, counted and compiled, as one without arguments."""
        self._count(function, *arguments, **counted)
        compiled = jax.jit(function).lower(*arguments).compile()
        return lambda: compiled(*arguments)

    def _prefill(self, params=None):
        ar, params = (self.ar.apart(), params) if params else self._sampler('head')
        null = jnp.full(1 if self.options.guidance else 0, ar.condition.num_classes)
        run = lambda p, labels: ar.apply({'params': p}, jnp.append(labels, null), method='prefill')[
            0
        ]
        compiled = self._compiled(run, params, self.inputs['labels'], weights=params['stack'])
        rows = np.minimum(np.arange(self._rows), self.batch)
        position = np.asarray(params['pos_for_diff'][:1])
        return lambda: np.asarray(compiled())[rows] - position

    def _transformer(self):
        ar, params = self._sampler('head')
        labels, z = self.inputs['labels'], self.inputs['z']
        rows = self._double(labels).at[self.batch :].set(ar.condition.num_classes)
        self.cache = jax.jit(lambda p: ar.apply({'params': p}, rows, method='prefill'))(params)[1]
        run = lambda p, z, k, cache: ar.apply(
            {'params': p}, self._double(z), k, cache, method='decode_step'
        )
        where, S = positions(ar.num_tokens), ar.condition.length + ar.num_tokens - 1
        self._count(run, params, z[:, 0], jnp.int32(1), self.cache, weights=params['stack'])
        self.bytes += np.mean(
            [costs.tree_bytes(self.cache) * (ar.condition.length + k) / S for k in where]
        )
        before = [(jnp.int32(k), z[:, k - 1]) for k in where]
        step = (
            jax.jit(run, donate_argnums=3)
            .lower(params, z[:, 0], jnp.int32(1), self.cache)
            .compile()
        )
        position = np.asarray(params['pos_for_diff'])[None, where]

        def steps():
            out = []
            for k, z in before:
                c, self.cache = step(params, z, k, self.cache)
                out.append(c)
            return np.stack(out, 1) - position

        return steps

    def _head(self, params=None):
        ar, params = (self.ar.apart(), params) if params else self._sampler()
        head, params = ar.head, params['head']
        plan, R, m = (
            self.options.plan(ar.num_tokens),
            self._rows,
            self.options.num_draws(ar.num_tokens),
        )
        c, k, key = self.inputs['condition'][:R], jnp.int32(1), jax.random.key(0)
        which = jnp.asarray(plan.which)
        guidance = self.options.guidance and Guidance(
            self.scale, jnp.asarray(False), self.options.guidance_interval
        )

        def run(params, c, key, k):
            solver = jax.tree.map(lambda a: a[which[k]], head.prepare(params, plan))
            noise = self._double(jax.random.normal(key, (self.batch, m, ar.latent_dim))).swapaxes(
                0, 1
            )
            return self.vae.posterior.project(head.draw_token(params, c, noise, solver, guidance))

        evaluations, chunk = int(plan.count[plan.which[1]]), chunk_size(plan.tables.t.shape[1], R)
        blocks = {
            n: {m: w for m, w in g.items() if m != 'ada'}
            for n, g in params.items()
            if 'res_groups' in n
        }
        self.bytes += evaluations * costs.tree_bytes(blocks)
        compiled = self._compiled(
            run, params, c, key, k, lengths=costs.head_loops(evaluations, chunk)
        )
        return lambda: np.asarray(compiled())

    def _decode(self):
        params = self._params(self.vae, 2)
        run = lambda p, z: self.vae.apply({'params': p}, z, method='decode')
        compiled = self._compiled(run, params, self.inputs['z'], weights=params['decoder'])
        return lambda: np.asarray(compiled())

    def _encode(self):
        params, keys = self._params(self.vae, 2), jax.random.split(jax.random.key(0), self.batch)

        def run(p, x, keys):
            z, q = draw_tokens(self.vae, p, x, keys)
            return z, q.kl()

        compiled = self._compiled(
            run, params, self.inputs['images'], keys, weights=params['encoder']
        )
        return lambda: np.asarray(compiled()[0])

    def _train(self, stage):
        mesh = sharding.make_mesh(1)
        state = jax.jit(stage.init, **quickly_compiled())(jax.random.key(0))
        batch = {'image': self.inputs['images'], 'label': self.inputs['labels']}
        self._count(stage.step, state, stage.frozen, batch)
        shardings = jax.tree.map(lambda x: x.sharding, abstract_state(stage, mesh))
        self.state, batch = jax.device_put(state, shardings), sharding.place_batch(mesh, batch)
        step = jitted_step(stage, mesh, self.state).lower(self.state, stage.frozen, batch).compile()

        def run():
            self.state, scalars = step(self.state, stage.frozen, batch)
            return np.asarray(scalars['loss'])[None]

        return run

    def _train_tokenizer(self):
        # LPIPS' network comes from files.
        cfg = schema.changed(self.cfg, {'tokenizer_training.perceptual_weight': 0.0})
        return self._train(stages.tokenizer_stage(self.vae, cfg.tokenizer_training, 0))

    def _train_ar(self):
        if self.cfg.init_from is not None:
            raise ValueError('the AR model of a distilled head is frozen: there is no such step')
        vae_params = self._params(self.vae, 2)
        return self._train(stages.ar_stage(self.ar, self.vae, vae_params, self.cfg.ar_training, 0))

    def _program(self, params):
        """A function that draws the images as every command does, by the same two programs,
        compiled.
        """
        mesh = sharding.make_mesh(1)
        tokens, decode = on_mesh.sampling_programs(self.ar.apart(), self.vae, self.options, mesh)
        scale = None if self.scale is None else jnp.float32(self.scale)
        arguments = (
            params,
            self.inputs['labels'],
            jnp.arange(self.batch),
            jax.random.key(0),
            scale,
            jnp.float32(1),
        )
        vae_params = self._params(self.vae, 2)
        draw = tokens.lower(*arguments).compile()
        decode = decode.lower(vae_params, self.inputs['z']).compile()
        return lambda: decode(vae_params, draw(*arguments))

    def _sample(self):
        program = self._program(self._sampler()[1])
        return lambda: np.asarray(program())

    def _cold(self):
        _, params = self._sampler()
        self._program(params)
        prefill, head = self._prefill(params), self._head(params)
        self.flops = self.bytes = 0  # a start has no floor
        prefill()
        return head

    _cached = _cold
