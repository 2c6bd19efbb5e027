"""Trained runs: their samples and reconstructions, and the digits' own protocol of scores.

Dimensions:
  n, m  images of a set     f  features of an image (64 pixels for digits at 8×8)
"""

import collections
import functools
import json
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from sphere_ar_jax import (
    adversarial,
    checkpoint,
    config,
    data,
    fidelity,
    hosts,
    losses,
    perceptual,
    sampling,
    sharding,
    training,
)
from sphere_ar_jax import ar as ar_model


class Run(NamedTuple):
    """A training run as `load_run` reads it: the config, both models and the parameters to sample with."""

    config: Any
    vae: Any
    vae_params: Any
    ar: Any
    ar_params: Any


def load_config(workdir):
    """The config of a run. Raises OSError where there is none, ConfigError for a file that is no config of ours."""
    path = os.path.join(workdir, 'config.json')
    with epath.Path(path).open() as f:
        try:
            return config.from_dict(json.load(f))
        except config.ConfigError:
            raise
        except (ValueError, AttributeError, KeyError, TypeError):
            raise config.ConfigError(f'{path} is no config of ours: use another --workdir') from None


def load_run(workdir, mesh=None, tokenizer_only=False, cfg=None):
    """Reads the newest whole checkpoints of both stages in a workdir of `main`; parameters are EMA where there is one.

    Of a workdir that was converted from a PyTorch checkpoint and not trained since, those. Of a workdir with a
    distilled head, that head, and all else from the workdir that it was distilled from. mesh: where the parameters go,
    all devices if None. tokenizer_only: leave the AR model's parameters None. cfg: in place of the run's own config, of
    the same models. Raises OSError where there is no run, or no checkpoint of a stage yet, ConfigError for a head that
    was distilled from a distilled one, and FrozenError where the tokenizer is another than the AR model's.
    """
    cfg = load_config(workdir) if cfg is None else cfg
    rates, rate = training.ema_decays(cfg.ar_training), cfg.sampling.ema_decay
    chosen = None if rate is None else rates.index(rate)
    vae, ar, mesh = config.build_vae(cfg), config.build_ar(cfg), mesh or sharding.make_mesh()

    def restore(stage):
        checkpoints = checkpoint.Checkpoints(os.path.join(workdir, stage.name, 'checkpoints'), read_only=True)
        like = training.abstract_state(stage, mesh)
        found = checkpoints.restore(like)
        checkpoints.close()
        if found is not None:
            frozen = training.frozen_identity(stage)
            training.check_frozen(stage, frozen, found[1], os.path.join(workdir, stage.name))
            return found[0].ema[chosen] if stage.name == 'ar' and chosen is not None else found[0].eval_params
        weights = training.converted(os.path.join(workdir, stage.name), like.params)
        if weights is None:
            raise FileNotFoundError(f'{workdir} has no checkpoint of the stage {stage.name} yet')
        return weights

    if cfg.init_from is not None:
        if os.path.realpath(cfg.init_from) == os.path.realpath(workdir):
            raise config.ConfigError(f'{workdir} is distilled from itself')
        teacher = load_teacher(cfg.init_from, mesh)
        head = restore(
            training.distillation_stage(
                ar, vae, teacher.vae_params, teacher.ar_params, cfg.distillation_training, cfg.seed
            )
        )
        return Run(cfg, vae, teacher.vae_params, ar, teacher.ar_params | {'head': head})
    if cfg.tokenizer is None:
        vae_params = restore(adversarial.tokenizer_stage(vae, cfg.tokenizer_training, cfg.seed))
    else:
        vae_params = load_run(cfg.tokenizer, mesh, tokenizer_only=True).vae_params
    if tokenizer_only:
        return Run(cfg, vae, vae_params, ar, None)
    return Run(cfg, vae, vae_params, ar, restore(training.ar_stage(ar, vae, vae_params, cfg.ar_training, cfg.seed)))


def load_teacher(workdir, mesh=None):
    """`load_run` of a run to distil from. Raises ConfigError as well where its head is a distilled one itself."""
    run = load_run(workdir, mesh)
    if run.ar.average:
        raise config.ConfigError(f'{workdir} has a distilled head: distil from the run that trained it')
    return run


def distances(a, b):
    """Euclidean distances (n, m) between the rows of a (n, f) and b (m, f), float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    square = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(square.clip(0))


def memorisation(samples, train, heldout):
    """How near samples lie to training images, beside how near held-out real images do.

    Args:
      samples, train, heldout: (·, f).
    Returns:
      dict: median nearest-training distance of samples and of held-out images, and the share of samples nearer to a
      training image than the nearest 5% of held-out images are (0.05 where samples are as new as real images).
    """
    of_samples, of_heldout = distances(samples, train).min(1), distances(heldout, train).min(1)
    return {
        'memorisation/samples_to_train': float(np.median(of_samples)),
        'memorisation/heldout_to_train': float(np.median(of_heldout)),
        'memorisation/nearer_than_5pct_of_heldout': float(np.mean(of_samples < np.quantile(of_heldout, 0.05))),
    }


def _in_batches(run, arrays, batch_size, mesh, progress=lambda done: None):
    """Applies `run` to whole batches of arrays (n, …), rows split over the mesh (batch_size is rounded up to a multiple
    of its devices); the last batch is filled up and cut.

    Of several processes all call it, with the same arrays.

    Returns the results, a tuple of NumPy arrays (n, …), whole in each process.
    """
    n, parts = len(arrays[0]), []
    batch_size = -(-batch_size // mesh.size) * mesh.size
    for start in range(0, n, batch_size):
        rows = np.arange(start, start + batch_size) % n  # whole batches only: one compilation
        rows = rows[sharding.local_rows(mesh, batch_size)]
        results = run(*sharding.place_batch(mesh, tuple(a[rows] for a in arrays)))
        parts.append([hosts.gather(result)[: n - start] for result in results])
        progress(min(start + batch_size, n))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


@functools.cache
def autoencoder(vae):
    """For one device, the compiled ((params, key's data), (images, index)) → results (b, …) of `reconstruct`."""

    def run(frozen, rows):
        (params, key), (images, index) = frozen, rows
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.wrap_key_data(key), index)
        z, posterior = losses.draw_tokens(vae, params, images, keys)
        return vae.apply({'params': params}, z, method='decode'), posterior.kl(), posterior.kappa

    return jax.jit(run)


def reconstruct(vae, params, images, key, batch_size, mesh, first=0):
    """Autoencodes images (n, H, W, c) with posterior samples, one key per image folded by `first` + its index.

    Every device its own rows, by a program of its own: libtpu 0.0.52 aborts on the decoder with rows split by `BATCH`.

    Returns:
      (reconstructions (n, H, W, c), mean KL in nats per token, mean kappa).
    """
    key = np.asarray(jax.random.key_data(key))  # keys themselves cannot be put on other processes' devices
    frozen = jax.device_put((params, key), sharding.whole(mesh))  # once for all batches
    run = lambda *rows: sharding.on_each_device(autoencoder(vae), mesh, frozen, rows)
    recon, kl, kappa = _in_batches(run, (images, first + np.arange(len(images))), batch_size, mesh)
    return recon, float(kl.mean()), float(kappa.mean())


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images in [−1, 1] (peak 2), over all pixels together."""
    return float(10 * np.log10(4 / np.mean((np.asarray(a) - np.asarray(b)) ** 2)))


@jax.jit
def _likeness(a, b):
    """(PSNR, SSIM) of pairs of uint8 images, each (b,)."""
    return perceptual.image_psnr(a, b, (0, 255)), perceptual.ssim(a, b, (0, 255))


@jax.jit
def _lpips(params, a, b):
    return perceptual.LPIPS().apply({'params': params}, a, b)


def score_tokenizer(run, batches, *, network=None, lpips=None, seed=0, progress=lambda done: None):
    """What a tokenizer loses: scores of reconstructions of real images, decoded from posterior samples.

    Args:
      run: `Run`. batches: iterable of uint8 (b, H, W, c), one of which is in memory at a time. network: `inception`
        parameters, for rFID, or None. lpips: `perceptual` parameters or None. seed: of the posterior samples.
      progress: called with the number of images done.
    Returns:
      dict: psnr (all pixels together), image_psnr and ssim (means over images), lpips, rfid, mean kappa, kl in nats a
      token. Reconstructions are rounded to bytes as samples are, but for psnr. Raises ImageSetError for another size.
    """
    mesh, size, key = sharding.make_mesh(**run.config.mesh), run.vae.image_shape, jax.random.key(seed)
    vae_params = jax.device_put(run.vae_params, sharding.whole(mesh))  # once for all batches
    count, totals, features = 0, collections.Counter(), ([], [])
    for images in batches:
        if images.shape[1:] != size:
            raise fidelity.ImageSetError(f'images of {images.shape[1:]}, but the tokenizer takes {size}')
        real = images.astype(np.float32) / 127.5 - 1
        decoded, kl, kappa = reconstruct(run.vae, vae_params, real, key, len(images), mesh, count)
        rounded = np.asarray(sampling.to_uint8(decoded))
        pairs = dict(zip(('image_psnr', 'ssim'), _likeness(rounded, images), strict=True))
        if lpips is not None:
            pairs['lpips'] = _lpips(lpips, rounded.astype(np.float32) / 127.5 - 1, real)
        means = {name: float(np.mean(value)) for name, value in pairs.items()}
        means |= {'kappa': kappa, 'kl': kl, 'error': float(np.mean((decoded - real) ** 2))}
        for name, value in means.items():
            totals[name] += value * len(images)
        if network is not None:
            for found, x in zip(features, (images, rounded), strict=True):
                found.append(fidelity.extract([x], network, batch_size=len(images), mesh=mesh).pool)
        count += len(images)
        progress(count)
    if not count:
        raise fidelity.ImageSetError('there are no images to score')
    scores = {name: value / count for name, value in totals.items()}
    scores['psnr'] = float(10 * np.log10(4 / scores.pop('error')))
    if network is not None:
        of_real, of_decoded = (fidelity.statistics(np.concatenate(found)) for found in features)
        scores['rfid'] = fidelity.frechet_distance(*of_decoded, *of_real)
    return scores


def sampling_programs(ar, vae, options, mesh):
    """The two programs of `sampler`, not compiled yet.

    Returns:
      (tokens, of all devices: (ar_params, labels, index, key, guidance_scale, temperature) → (B, L, d); decode, of one
      device and its rows: (vae_params, tokens) → images).
    """

    def rows(ar_params, labels, index, key, guidance_scale, temperature):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        return sampling.sample_tokens(ar, ar_params, labels, keys, options, guidance_scale, temperature)

    whole, split = sharding.P(), sharding.BATCH
    specs = (whole, split, split, whole, whole, whole)
    by_rows = {'data', 'fsdp'}  # along 'tensor' the compiler splits, as the parameters are
    tokens = jax.jit(
        jax.shard_map(rows, mesh=mesh, in_specs=specs, out_specs=split, axis_names=by_rows, check_vma=False)
    )
    return tokens, jax.jit(lambda params, z: vae.apply({'params': params}, z, method='decode'))


@functools.cache
def sampler(ar, vae, options, mesh):
    """`sampling.sample_images` for the rows of a mesh: every device draws and decodes its own.

    The compiler's own split of conditional and null rows would send data between devices at every token; this way none
    is sent but along the axis 'tensor', along which the devices share the heads and the cache of their rows. Parameters
    that are split along 'fsdp' are gathered once a batch. Where each device gets equally many rows and 'tensor' is 1,
    the images are the same bit for bit on any number of devices (seen on CPUs in float32); the decoder is a program of
    each device for that, since XLA fuses its loops otherwise where it compiles for several at once.
    ar: see `ar.unstacked`. options: `sampling.Options`.

    Returns:
      function of (ar_params, vae_params, labels (B,) int32, index (B,) int32, key, guidance_scale, temperature) →
      (images (B, H, W, c) float32, tokens (B, L, d)); labels and index as `sharding.place_batch` lays them out.
    """
    tokens, decode = sampling_programs(ar, vae, options, mesh)

    def draw(ar_params, vae_params, labels, index, key, guidance_scale, temperature):
        z = tokens(ar_params, labels, index, key, guidance_scale, temperature)
        return sharding.on_each_device(decode, mesh, vae_params, z), z

    return draw


def sample_images(
    ar,
    vae,
    ar_params,
    vae_params,
    labels,
    key,
    options,
    *,
    batch_size,
    mesh,
    guidance_scale,
    temperature,
    index=None,
    progress=lambda done: None,
):
    """Draws one image per label, `batch_size` at a time; image i's key is folded from i alone, or from index[i].

    Args:
      labels: (n,) ints. key: PRNG key. options: `sampling.Options`. index: (n,) ints or None.
      progress: called with the number of images done.
    Returns:
      images (n, H, W, c) float32, about [−1, 1], the same for any batch size and mesh up to rounding; see `sampler`.
    """
    ar, ar_params = ar_model.unstacked(ar, ar_params)
    draw = sampler(ar, vae, options, mesh)
    vae_params = jax.device_put(vae_params, sharding.whole(mesh))  # once for all batches
    run = lambda *rows: draw(ar_params, vae_params, *rows, key, guidance_scale, temperature)
    index = np.arange(len(labels)) if index is None else index
    arrays = np.asarray(labels, np.int32), np.asarray(index, np.int32)
    return _in_batches(run, arrays, batch_size, mesh, progress)[0]


def digit_pixels(images):
    """Model images (n, 16, 16, 1) in [−1, 1] → (n, 64) pixels of the 8×8 scans in [0, 1]."""
    return data.shrink(np.clip((np.asarray(images) + 1) / 2, 0, 1)).reshape(len(images), 64)


def score_digits(samples, labels, train, heldout):
    """The digits' protocol on 8×8 pixels in [0, 1].

    Args:
      samples: (n, 64) drawn for `labels` (n,). train, heldout: `data.Digits`, the second never trained on.
    Returns:
      dict of floats: accuracy with which an SVC trained on `train` reads the labels back (and its own on `heldout`),
      Fréchet distances, precision, recall, memorisation.
    """
    from sklearn.svm import SVC  # slow to import: only where digits are scored

    flat = lambda source: source.pixels.reshape(len(source), 64)
    real = np.concatenate([flat(train), flat(heldout)])
    classifier = SVC(gamma=0.256, C=10).fit(flat(train), train.labels)
    read = classifier.predict(samples)
    precision, recall = fidelity.precision_recall(real, samples, dtype=np.float64)
    frechet = lambda a, b: fidelity.frechet_distance(*fidelity.statistics(a), *fidelity.statistics(b))
    return {
        'classifier/accuracy': float(classifier.score(flat(heldout), heldout.labels)),
        'samples/accuracy': float(np.mean(read == labels)),
        'samples/classes_drawn': len(np.unique(read)),
        'samples/frechet': frechet(samples, real),
        'samples/frechet_heldout': frechet(samples, flat(heldout)),
        'real/frechet': frechet(flat(train), flat(heldout)),
        'samples/precision': precision,
        'samples/recall': recall,
        **memorisation(samples, flat(train), flat(heldout)),
    }
