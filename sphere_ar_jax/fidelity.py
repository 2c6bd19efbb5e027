"""Fidelity of image sets: FID, sFID, Inception Score, precision and recall by the ADM protocol, without TensorFlow.

    python -m sphere_ar_jax.fidelity VIRTUAL_imagenet256_labeled.npz samples.npz --weights=classify_image_graph_def.pb

The five scores are those of OpenAI's guided-diffusion `evaluations/evaluator.py` (Dhariwal & Nichol 2021, arXiv
2105.05233), to which published numbers on ImageNet refer. Each step is a function of its own: images → features
(`extract`) → statistics (`statistics`) → scores; `evaluate` does all.

Dimensions:
  n, m  images of a set, uint8 (n, H, W, 3)     f  features of an image (2048 of FID, 2023 of sFID)
  r, c  rows and columns of a block of distances
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import sys
import time
import zipfile
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sphere_ar_jax import console, hosts, inception, sharding, torch_file

IMAGES = 'arr_0'  # the array of images in an npz, as np.savez names it
BLOCK = 10_000  # of the evaluator: one overflow in float16 turns a whole block to float32
CHUNK = 4096  # rows at a time in float64


class ImageSetError(ValueError):
    """Images, features or statistics that cannot be scored; the message says which and why."""


class Statistics(NamedTuple):
    """Mean (f,) and covariance (f, f) of a set's features, float64."""

    mu: Any
    sigma: Any


class Summary(NamedTuple):
    """What the scores need of a set: `inception.Features`, or None without images, and `Statistics` of both kinds."""

    features: Any
    pool: Statistics
    spatial: Statistics


# ---- images


@contextlib.contextmanager
def _reading(path):
    """The archive of an npz; damage of any kind becomes one ImageSetError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except ImageSetError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise ImageSetError(f'{path} is not a whole npz file: {error}') from None


def _names(archive):
    return [name.removesuffix('.npy') for name in archive.namelist()]


def _header(path, name, f):
    """(shape, Fortran order, dtype) of an open .npy file, which is left at its first number."""
    version = np.lib.format.read_magic(f)
    if version not in ((1, 0), (2, 0)):
        raise ImageSetError(f'{path}: {name} has version {version} of the npy format, but must have 1.0 or 2.0')
    return (np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0)(f)


def _numbers(path, name, f, shape, dtype):
    """The next numbers of an open .npy file."""
    wanted = int(np.prod(shape, dtype=object)) * dtype.itemsize
    content = f.read(wanted)
    if len(content) < wanted:
        raise ImageSetError(f'{path} is cut off: {name} ends too early')
    return np.frombuffer(content, dtype).reshape(shape)


@contextlib.contextmanager
def _open_images(path):
    with _reading(path) as archive:
        if IMAGES not in _names(archive):
            raise ImageSetError(f'{path} has no array {IMAGES}, only {", ".join(_names(archive)) or "nothing"}')
        with archive.open(f'{IMAGES}.npy') as f:
            shape, fortran, dtype = _header(path, IMAGES, f)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or fortran:
                order = ' in Fortran order' if fortran else ''
                raise ImageSetError(f'{path}: {IMAGES} must be uint8 (n, H, W, 3), but is {dtype} {shape}{order}')
            yield f, shape


def read_images(path, batch_size=64):
    """Yields the images `arr_0` of an npz as uint8 (≤ batch_size, H, W, 3), never more than a batch in memory.

    The npz may be compressed or not. Raises OSError without a file and ImageSetError, where it is read, for a file that
    is damaged or holds anything but uint8 (n, H, W, 3).
    """
    with _open_images(path) as (f, shape):
        for start in range(0, shape[0], batch_size):
            yield _numbers(path, IMAGES, f, (min(batch_size, shape[0] - start), *shape[1:]), np.dtype(np.uint8))


def _whole_batches(batches, size):
    """Regroups batches into (size, H, W, 3), with the number of images that count: the last is filled up."""
    rest = None
    for images in batches:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ImageSetError(f'batches must be uint8 (n, H, W, 3), but one is {images.dtype} {images.shape}')
        if rest is not None and rest.shape[1:] != images.shape[1:]:
            raise ImageSetError(f'images of {rest.shape[1:3]} and {images.shape[1:3]} pixels in one set')
        rest = images if rest is None else np.concatenate([rest, images])
        while len(rest) >= size:
            yield rest[:size], size
            rest = rest[size:]
    if rest is not None and len(rest):
        yield rest[np.arange(size) % len(rest)], len(rest)


def extract(batches, params, *, batch_size=64, mesh=None, progress=lambda n: None):
    """`inception.Features` of a set of images, NumPy float32: 4 · (2048 + 2023 + 1008) bytes an image.

    Args:
      batches: iterable of uint8 (b, H, W, 3), any b, one H × W. params: of `inception.load_graph_def` or `from_torch`.
      batch_size: images at a time, rounded up to a multiple of the mesh's devices, among which they are split.
      mesh: of `sharding.make_mesh`, all devices if None; of several processes all call it, with the same images.
      progress: called with the number of images just done.
    Raises ImageSetError for anything but such images, and for none at all.
    """
    mesh = mesh or sharding.make_mesh()
    params = jax.device_put(params, sharding.whole(mesh))
    size, parts, running = -(-batch_size // mesh.size) * mesh.size, [], None
    mine = sharding.local_rows(mesh, size, sharding.ROWS)

    def fetch(results, count):
        parts.append([hosts.gather(a)[:count] for a in results])
        progress(count)

    for images, count in _whole_batches(batches, size):
        results = inception.features(params, sharding.place_batch(mesh, images[mine], sharding.ROWS))
        if running:
            fetch(*running)  # the one before, while the devices work on this one
        running = results, count
    if running is None:
        raise ImageSetError('there are no images to score')
    fetch(*running)
    return inception.Features(*(np.concatenate(column) for column in zip(*parts, strict=True)))


# ---- statistics and their distance


def statistics(x):
    """`Statistics` of features x (n, f), n ≥ 2: mean and unbiased covariance (n − 1), accumulated in float64 by chunks.

    The evaluator's mean is float32; this one is not.
    """
    n, width = np.shape(x)
    if n < 2:
        raise ImageSetError(f'a covariance needs at least 2 images, but there are {n}')
    chunks = [slice(start, start + CHUNK) for start in range(0, n, CHUNK)]
    mu = sum(np.sum(x[rows], axis=0, dtype=np.float64) for rows in chunks) / n
    sigma = np.zeros((width, width))
    for rows in chunks:
        centred = x[rows] - mu
        sigma += centred.T @ centred
    return Statistics(mu, sigma / (n - 1))


def _root(sigma):
    """A with A·Aᵀ = Σ, from the eigenvalues of the symmetric Σ ≥ 0; what rounding made negative counts as 0."""
    values, vectors = np.linalg.eigh(sigma)
    return vectors * np.sqrt(values.clip(0))


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Fréchet distance of two normal distributions: |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½).

    With Σᵢ = AᵢAᵢᵀ the trace of the root is the sum of the singular values of A₁ᵀA₂: real and not negative also for
    singular covariances (fewer images than features, or features that never change), where the evaluator's
    scipy.linalg.sqrtm of the product may fail and then adds 1e-6 to both diagonals.

    Args:
      mu1, mu2: (f,). sigma1, sigma2: (f, f), symmetric, positive semidefinite.
    Returns:
      float ≥ 0 up to rounding, float64 throughout. Source: Heusel et al. 2017, eq. 6. Raises ImageSetError for shapes
      that do not belong together and for numbers that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if not (mu1.ndim == 1 and mu1.shape == mu2.shape and sigma1.shape == sigma2.shape == 2 * mu1.shape):
        shapes = ', '.join(str(a.shape) for a in (mu1, sigma1, mu2, sigma2))
        raise ImageSetError(f'means and covariances of two sets must be (f,), (f, f), (f,), (f, f), but are {shapes}')
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ImageSetError('a mean or a covariance is not finite')
    overlap = np.linalg.svd(_root(sigma1).T @ _root(sigma2), compute_uv=False).sum()
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap)


# ---- Inception Score


def inception_score(logits, split_size=5000):
    """exp(mean over images of KL(p(y|x) ‖ p(y))), p the softmax of logits, averaged over splits of consecutive images.

    Args:
      logits: (n, classes), of `inception.Features`. split_size: images of a split, over which p(y) is the mean; the
        last split may be shorter and counts as much as the others.
    Returns:
      float ≥ 1, float64 throughout. Source: Salimans et al. 2016, with the splits of the evaluator.
    """
    scores = []
    for start in range(0, len(logits), split_size):
        log_p = np.asarray(logits[start : start + split_size], np.float64)
        log_p = log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True)
        log_mean = np.logaddexp.reduce(log_p, axis=0, keepdims=True) - np.log(len(log_p))
        scores.append(np.exp(np.sum(np.exp(log_p) * (log_p - log_mean), axis=1).mean()))
    if not scores:
        raise ImageSetError('an Inception Score needs at least one image')
    return float(np.mean(scores))


# ---- precision and recall


class _Points(NamedTuple):
    """Features as they come, as they are multiplied, and the squared norms of the latter, all (r, …)."""

    exact: Any
    rows: Any
    norms: Any

    def blocks(self, size):
        return [_Points(*(a[start : start + size] for a in self)) for start in range(0, len(self.rows), size)]


def _points(x, dtype):
    """float16: rows are rounded to it, and so are their squares and the (float32) sum of these."""
    x = np.asarray(x)
    with np.errstate(over='ignore'):  # infinite: the caller takes float32 then
        rows = x.astype(dtype)
        norms = np.square(rows).sum(1, dtype=np.promote_types(dtype, np.float32)).astype(dtype)
    return _Points(x, rows, norms.astype(np.promote_types(dtype, np.float32)))


@jax.jit
def _block_distances(rows_u, norms_u, rows_v, norms_v):
    """(squared distances (r, c), whether all are finite); every result is rounded to float16 where rows are float16."""
    rounded = lambda a: a
    if rows_u.dtype == jnp.float16:
        # not astype: XLA may leave a conversion there and back out
        rounded = functools.partial(jax.lax.reduce_precision, exponent_bits=5, mantissa_bits=10)
    rows_u, rows_v = rows_u.astype(norms_u.dtype), rows_v.astype(norms_v.dtype)
    product = jnp.matmul(rows_u, rows_v.T, precision=jax.lax.Precision.HIGHEST)
    square = rounded(rounded(norms_u[:, None] - rounded(2 * product)) + norms_v[None])
    return jnp.maximum(square, 0), jnp.isfinite(square).all()


def _squared_distances(u, v):
    """Squared distances (r, c) between two blocks of `_Points`, on the device."""
    square, finite = _block_distances(u.rows, u.norms, v.rows, v.norms)
    if u.rows.dtype == np.float16 and not finite:
        return _squared_distances(_points(u.exact, np.float32), _points(v.exact, np.float32))
    return square


@jax.jit
def _smallest(found, square):
    """The smallest of every row, as many as `found` (r, k + 1) has, among these and `square` (r, c); ascending."""
    return -jax.lax.top_k(-jnp.concatenate([found, square], 1), found.shape[1])[0]


@jax.jit
def _inside(square, radii_u, radii_v):
    """Whether each u lies in some ball around a v, and each v in some around a u."""
    return (square <= radii_v[None]).any(1), (square <= radii_u[:, None]).any(0)


def _radii(blocks, k, done):
    """Squared distance of each point to its k-th neighbour, one array per block; the point itself is the 0-th."""
    radii = []
    for u in blocks:
        found = jnp.full((len(u.rows), k + 1), jnp.inf, u.norms.dtype)
        for v in blocks:
            found = _smallest(found, _squared_distances(u, v))
            done()
        radii.append(found[:, k])
    return radii


def _device_with(dtype):
    """A context in which `dtype` can be computed with: float64 on the host, accelerators may have none."""
    context = contextlib.ExitStack()
    if dtype == np.float64:
        context.enter_context(jax.enable_x64(True))
        context.enter_context(jax.default_device(jax.local_devices(backend='cpu')[0]))
    return context


def precision_recall(real, fake, k=3, *, dtype=np.float16, block=BLOCK, progress=lambda done, total: None):
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    A point lies on a set's manifold if it is at most as far from some point of the set as that point's k-th neighbour
    within the set (itself not counted). Squared distances |u|² − 2u·v + |v|² are compared, block by block.

    Args:
      real: (n, f), fake: (m, f). k: neighbours, < n and < m.
      dtype: arithmetic of the distances. float16 is the evaluator's: features, norms, products and their sums are
        rounded to it (sums within a norm or a product are float32), and a block of distances in which one overflows is
        done in float32. float32 and float64 are more exact, the latter is computed on the host.
      block: points of a block; memory is about 12·block² bytes.
      progress: called after every block with how many are done, of how many.
    Returns:
      (precision, recall): the share of fake points on the real manifold, and of real ones on the fake. Raises
      ImageSetError for sets that are too small or of different features.
    """
    if min(len(real), len(fake)) <= k or np.shape(real)[1:] != np.shape(fake)[1:] or np.ndim(real) != 2:
        shapes = f'{np.shape(real)} and {np.shape(fake)}'
        raise ImageSetError(f'precision and recall need two sets (n, f), (m, f) of more than {k} images, not {shapes}')
    real, fake = (_points(x, dtype).blocks(block) for x in (real, fake))
    total, steps = len(real) ** 2 + len(fake) ** 2 + len(real) * len(fake), itertools.count(1)
    done = lambda: progress(next(steps), total)
    with _device_with(dtype):
        real_radii, fake_radii = _radii(real, k, done), _radii(fake, k, done)
        real_hit, fake_hit = ([np.zeros(len(u.rows), bool) for u in blocks] for blocks in (real, fake))
        for i, u in enumerate(real):
            for j, v in enumerate(fake):
                of_u, of_v = _inside(_squared_distances(u, v), real_radii[i], fake_radii[j])
                real_hit[i] |= np.asarray(of_u)
                fake_hit[j] |= np.asarray(of_v)
                done()
    return float(np.concatenate(fake_hit).mean()), float(np.concatenate(real_hit).mean())


# ---- all of it


def _read_statistics(path, archive):
    """The two `Statistics` of an npz that has `mu`."""
    widths = {'mu': inception.POOL, 'sigma': inception.POOL, 'mu_s': inception.SPATIAL, 'sigma_s': inception.SPATIAL}
    arrays = []
    for name, width in widths.items():
        if name not in _names(archive):
            raise ImageSetError(f'{path} has mu but no {name}; it needs mu, sigma, mu_s and sigma_s')
        with archive.open(f'{name}.npy') as f:
            shape, _, dtype = _header(path, name, f)  # covariances are the same in C and in Fortran order
            expected = (width,) if name.startswith('mu') else (width, width)
            if shape != expected or dtype.kind != 'f':
                raise ImageSetError(f'{path}: {name} must be floats {expected}, but is {dtype} {shape}')
            arrays.append(_numbers(path, name, f, shape, dtype).astype(np.float64))
    return Statistics(*arrays[:2]), Statistics(*arrays[2:])


def summarize(source, params, *, batch_size=64, mesh=None, progress=lambda done, total: None):
    """The `Summary` of a set of images.

    Args:
      source: path of an npz with `arr_0`, uint8 images, or `mu`, `sigma`, `mu_s`, `sigma_s`, or both (as ADM's
        VIRTUAL_imagenet256_labeled.npz: then the statistics are taken from the file, although its images are fewer);
        or batches as `extract` takes them.
      params, batch_size, mesh: see `extract`. progress: called with the images done and their number, None if unknown.
    Raises OSError, ImageSetError.
    """
    found, total = None, None
    if isinstance(source, str | os.PathLike):
        path = source
        with _reading(path) as archive:
            names = _names(archive)
            found = _read_statistics(path, archive) if 'mu' in names else None
        if IMAGES not in names:
            if found is None:
                raise ImageSetError(f'{path} has neither images ({IMAGES}) nor statistics (mu, sigma, mu_s, sigma_s)')
            return Summary(None, *found)
        with _open_images(path) as (_, shape):
            total = shape[0]
        source = read_images(path, batch_size)
    count = 0

    def advance(n):
        nonlocal count
        count += n
        progress(count, total)

    features = extract(source, params, batch_size=batch_size, mesh=mesh, progress=advance)
    return Summary(features, *(found or (statistics(features.pool), statistics(features.spatial))))


def evaluate(samples, reference, params, *, batch_size=64, mesh=None, progress=lambda part, done, total: None):
    """The ADM scores of `samples` against `reference`.

    Args:
      samples, reference: each a `Summary`, or what `summarize` takes. Published ImageNet numbers are those of 50,000
        samples against VIRTUAL_imagenet256_labeled.npz. params, batch_size, mesh: see `extract`.
      progress: called with the part ('samples', 'reference', 'precision_recall'), how much of it is done and of how
        much (None if unknown): images, or blocks of distances.
    Returns:
      dict of floats `fid`, `sfid`, `inception_score`, `precision`, `recall` (the last three only where there are images
      to take them from) and `seconds`, a dict of the parts' times. Raises OSError, ImageSetError.
    """
    seconds, scores = {}, {}
    for source in (reference, samples):
        if isinstance(source, str | os.PathLike):
            open(source, 'rb').close()  # not there: said before hours of work, not after

    def timed(name, run, *args, **kwargs):
        started = time.perf_counter()
        result = run(*args, **kwargs)
        seconds[name] = time.perf_counter() - started
        return result

    def summary(name, source):
        if isinstance(source, Summary):
            return source
        report = functools.partial(progress, name)
        return timed(name, summarize, source, params, batch_size=batch_size, mesh=mesh, progress=report)

    reference, samples = summary('reference', reference), summary('samples', samples)
    scores['fid'] = timed('fid', frechet_distance, *samples.pool, *reference.pool)
    scores['sfid'] = timed('sfid', frechet_distance, *samples.spatial, *reference.spatial)
    if samples.features is not None:
        scores['inception_score'] = timed('inception_score', inception_score, samples.features.logits)
        if reference.features is not None:
            report = functools.partial(progress, 'precision_recall')
            scores['precision'], scores['recall'] = timed(
                'precision_recall', precision_recall, reference.features.pool, samples.features.pool, progress=report
            )
    return scores | {'seconds': seconds}


def main():
    """Scores two npz files; what the user can put right ends it with one line."""
    parser = argparse.ArgumentParser('python -m sphere_ar_jax.fidelity')
    parser.add_argument('reference', help='npz of reference images or statistics')
    parser.add_argument('samples', help='npz with the samples, arr_0')
    parser.add_argument('--weights', required=True, help='classify_image_graph_def.pb, or a .pth file')
    parser.add_argument('--batch_size', type=int, default=64, help='images at a time')
    arguments = parser.parse_args()
    try:
        params = inception.load(arguments.weights)
        scores = evaluate(
            arguments.samples,
            arguments.reference,
            params,
            batch_size=arguments.batch_size,
            progress=console.bars(sys.stderr),
        )
    except (OSError, ImageSetError, inception.WeightsError, torch_file.FileError) as error:
        sys.exit(f'error: {error}')
    print(json.dumps(scores, indent=2))


if __name__ == '__main__':
    main()
