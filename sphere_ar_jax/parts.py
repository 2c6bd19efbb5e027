"""Our side of the benchmark: each part of sampling and training as a compiled program, with its operations and bytes.

Dimensions:
  B  images      R  rows of the sampler, 2B with guidance      E  evaluations of the flow head per token
"""

import jax
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax import config, convert, costs, sampling, sharding, training, transformer

# part → what one run of it does
PARTS = {
    'cold': 'process start → sampler compiled, its first token drawn; nothing compiled before',
    'cached': "the same, a second time: with what the first start left in the compilers' caches",
    'prefill': 'class tokens of B images and the null class',
    'transformer': 'one decoding step of 2B rows, mean over the sequence',
    'head': 'one token of B guided images, all evaluations',
    'decode': 'B images from their tokens',
    'encode': 'tokens of B images',
    'train_tokenizer': 'one optimizer step of the S-VAE, without adversarial and perceptual terms',
    'train_ar': 'one optimizer step of the AR model, encoding included',
    'sample': 'B images, whole, in one program',
}
SCALE = 4.5


def positions(num_tokens, n=8):
    """The tokens whose decoding step is timed, evenly spread over the sequence."""
    return sorted({int(k) for k in np.linspace(1, num_tokens - 1, n)})


def inputs(ar, vae, batch):
    """The arrays both sides get, from one seed."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(batch, ar.num_tokens, ar.latent_dim)).astype(np.float32)
    return {
        'images': rng.uniform(-1, 1, (batch, *vae.image_shape)).astype(np.float32),
        'labels': rng.integers(0, ar.num_classes, batch).astype(np.int32),
        'z': z / np.linalg.norm(z, axis=-1, keepdims=True) * ar.latent_dim**0.5,
        'condition': rng.normal(size=(2 * batch, ar.width)).astype(np.float32),
    }  # fmt: skip


def random_params(model, seed):
    """Parameters at which nothing is zero, as in a trained model: their initial values, and noise where those are 0."""
    params = jax.jit(model.init_params)(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    noise = lambda a: jnp.asarray(0.02 * rng.normal(size=a.shape), jnp.float32)
    return jax.tree.map(lambda a: a if np.any(np.asarray(a[..., :1]) != 0) else noise(a), params)


class Part:
    """Our side of one part: `run()` does it once and returns an array; `flops` and `bytes`, what it must at least do.

    Only what the part needs is made; the parameters that training stacks are let go where sampling uses them apart.
    """

    def __init__(self, cfg, part, batch, weights=None):
        self.weights = weights  # file of {PyTorch name: array} to use in place of random parameters
        self.part, self.batch, self.cfg = part, batch, cfg
        self.ar, self.vae = config.build_ar(cfg), config.build_vae(cfg)
        self.inputs = {k: jnp.asarray(v) for k, v in inputs(self.ar, self.vae, batch).items()}
        self.flops = self.bytes = self.count = 0
        self.run = getattr(self, '_' + part)()

    def _params(self, model, seed):
        if self.weights is None:
            return random_params(model, seed)
        with np.load(self.weights) as tensors:
            return convert.from_torch(tensors, jax.eval_shape(model.init_params, jax.random.key(0)))

    def _sampler(self):
        if not hasattr(self, '_apart'):
            params = transformer.unstack(self._params(self.ar, 1))  # NumPy's views, if from a file: nothing to compile
            self._apart = self.ar.clone(scan=False), jax.tree.map(jnp.asarray, params)
        return self._apart

    def _costs(self, function, *arguments, weights=(), times=1):
        self.flops += times * costs.flops(function, *arguments)
        self.bytes += times * costs.tree_bytes(weights)

    def _prefill(self):
        ar, params = self._sampler()
        run = lambda p, labels: ar.apply({'params': p}, jnp.append(labels, ar.num_classes), method='prefill')[0]
        self._costs(run, params, self.inputs['labels'], weights=params['stack'])
        compiled = jax.jit(run).lower(params, self.inputs['labels']).compile()
        rows = np.minimum(np.arange(2 * self.batch), self.batch)
        position = np.asarray(params['pos_for_diff'][:1])
        return lambda: np.asarray(compiled(params, self.inputs['labels']))[rows] - position

    def _transformer(self):
        ar, params = self._sampler()
        labels, z = self.inputs['labels'], self.inputs['z']
        rows = jnp.concatenate([labels, jnp.full_like(labels, ar.num_classes)])
        self.cache = jax.jit(lambda p: ar.apply({'params': p}, rows, method='prefill'))(params)[1]
        run = lambda p, z, k, cache: ar.apply({'params': p}, jnp.concatenate([z, z]), k, cache, method='decode_step')
        where = positions(ar.num_tokens)
        self._costs(run, params, z[:, 0], 1, self.cache, weights=params['stack'])
        S = ar.class_tokens + ar.num_tokens - 1
        self.bytes += np.mean([costs.tree_bytes(self.cache) * (ar.class_tokens + k) / S for k in where])
        step = jax.jit(run, donate_argnums=3)
        self.count = len(where)

        def steps():
            out = []
            for k in where:
                c, self.cache = step(params, z[:, k - 1], k, self.cache)
                out.append(np.asarray(c - params['pos_for_diff'][k][None]))
            return np.stack(out, 1)

        return steps

    def _head(self):
        ar, params = self._sampler()
        options = sampling.Options(**self._options())
        head = {'params': {name: params[name] for name in ('head', 'cls_embedding', 'pos_for_diff')}}
        plan, R = options.plan(ar.num_tokens), 2 * self.batch
        c, k = self.inputs['condition'], jnp.int32(1)
        noise = jax.random.normal(jax.random.key(0), (options.num_draws(ar.num_tokens), R, ar.latent_dim))

        def run(variables, c, noise, k):
            embed = jnp.asarray(plan.tables.t)
            t_emb = ar.apply(variables, embed, method='embed_time')
            return sampling._token(ar, variables, options, k, t_emb, SCALE, 1.0, c, noise, jnp.asarray(False))

        apply = lambda method: lambda v, *a: ar.apply(v, *a, method=method)
        t_emb = jnp.zeros((plan.tables.t.shape[1], ar.head_width))
        c_emb = jnp.zeros((R, ar.head_width))
        modulation = jax.eval_shape(apply('modulation'), head, t_emb, c_emb)
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), modulation)
        blocks = {n: {m: w for m, w in g.items() if m != 'ada'} for n, g in params['head'].items() if 'res_groups' in n}
        self._costs(apply('modulation'), head, t_emb, c_emb)
        self._costs(apply('velocity'), head, noise[0], one, weights=blocks, times=len(t_emb))
        compiled = jax.jit(run).lower(head, c, noise, k).compile()
        return lambda: np.asarray(compiled(head, c, noise, k))

    def _options(self):
        return dict(num_steps=self.cfg.sampling.num_steps, guidance='constant')

    def _decode(self):
        params = self._params(self.vae, 2)
        run = lambda p, z: self.vae.apply({'params': p}, z, method='decode')
        self._costs(run, params, self.inputs['z'], weights=params['decoder'])
        compiled = jax.jit(run).lower(params, self.inputs['z']).compile()
        return lambda: np.asarray(compiled(params, self.inputs['z']))

    def _encode(self):
        params = self._params(self.vae, 2)
        run = lambda p, x: self.vae.apply({'params': p}, x, method='encode').mu
        self._costs(run, params, self.inputs['images'], weights=params['encoder'])
        compiled = jax.jit(run).lower(params, self.inputs['images']).compile()
        return lambda: np.asarray(compiled(params, self.inputs['images']))

    def _train(self, stage):
        mesh = sharding.make_mesh()
        state = jax.jit(stage.init)(jax.random.key(0))
        batch = {'image': self.inputs['images'], 'label': self.inputs['labels']}
        self._costs(stage.step, state, stage.frozen, batch)
        shardings = jax.tree.map(lambda x: x.sharding, training.abstract_state(stage, mesh))
        step = jax.jit(stage.step, donate_argnums=0, out_shardings=(shardings, None))
        self.state, batch = jax.device_put(state, shardings), sharding.place_batch(mesh, batch)

        def run():
            self.state, scalars = step(self.state, stage.frozen, batch)
            return np.asarray(scalars['loss'])[None]

        return run

    def _train_tokenizer(self):
        return self._train(training.tokenizer_stage(self.vae, self.cfg.tokenizer_training, 0))

    def _train_ar(self):
        vae_params = self._params(self.vae, 2)
        return self._train(training.ar_stage(self.ar, self.vae, vae_params, self.cfg.ar_training, 0))

    def _program(self):
        """The whole sampler, compiled, and its arguments."""
        ar, params = self._sampler()
        options = sampling.Options(**self._options())
        arguments = (
            params, self._params(self.vae, 2), self.inputs['labels'], jnp.arange(self.batch), jax.random.key(0),
            jnp.float32(SCALE), jnp.float32(1),
        )  # fmt: skip
        return sampling._images.lower(ar, self.vae, options, *arguments).compile(), arguments

    def _sample(self):
        program, arguments = self._program()
        return lambda: np.asarray(program(*arguments)[0])

    def _cached(self):
        return self._cold()

    def _cold(self):
        self._program()
        prefill, head = self._prefill(), self._head()
        prefill()
        return head
