import json

import jax
import numpy as np
import pytest
import scipy.linalg

from sphere_ar_jax import fidelity
from sphere_ar_jax.evaluation.fidelity import (
    image_sets,
    inception,
    precision_recall,
    protocol,
    statistics,
)
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.runtime.console import UserError
from tests.evaluation.test_inception import graph_def, image


def rotation(n, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


# ---- Fréchet distance


def test_frechet_of_diagonal_and_of_commuting_covariances():
    """|Δμ|² + Σ(σ₁ − σ₂)² in any basis, also with directions that one of the two or both lack."""
    scale1 = np.array([1.0, 2, 0.5, 1, 3, 0, 0])
    scale2 = np.array([1.0, 1, 4, 0, 1e-3, 2, 0])
    mu = np.array([0, 1, 0, -2, 0, 0.5, 3])
    expected = np.sum(mu**2) + np.sum((scale1 - scale2) ** 2)
    # a variance of 0 that rounding made 1e-16 has the root 1e-8: no method can know better
    for basis, rtol in ((np.eye(7), 1e-13), (rotation(7, 0), 1e-7)):
        sigma1, sigma2 = ((basis * s**2) @ basis.T for s in (scale1, scale2))
        found = statistics.frechet_distance(0 * mu, sigma1, mu, sigma2)
        np.testing.assert_allclose(found, expected, rtol=rtol)
        np.testing.assert_allclose(
            statistics.frechet_distance(mu, sigma2, 0 * mu, sigma1), expected, rtol=rtol
        )


def test_frechet_in_one_dimension():
    found = statistics.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]])
    np.testing.assert_allclose(found, (1 - 3) ** 2 + (2 - 3) ** 2, rtol=1e-14)


def test_frechet_of_rank_one():
    """Σ = aaᵀ, bbᵀ: the root of their product has the trace |a·b|."""
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    found = statistics.frechet_distance(0 * a, np.outer(a, a), 0 * b, np.outer(b, b))
    np.testing.assert_allclose(found, a @ a + b @ b - 2 * abs(a @ b), rtol=1e-7)


def test_frechet_of_a_set_and_itself_with_fewer_images_than_features():
    """0, and |shift|² after a shift; the root of the product has rank 19 of 43."""
    rng = np.random.default_rng(2)
    a = np.concatenate([rng.normal(size=(20, 40)), np.zeros((20, 3))], axis=1)
    of_a = statistics.statistics(a)
    np.testing.assert_allclose(statistics.frechet_distance(*of_a, *of_a), 0, atol=1e-12)
    np.testing.assert_allclose(
        statistics.frechet_distance(*of_a, *statistics.statistics(a + 1)), 43, rtol=1e-12
    )


def test_frechet_against_scipys_root_of_the_product():
    """As the evaluator computes it, where that is sound; condition numbers up to 1e8."""
    rng = np.random.default_rng(1)
    for spread in (0, 4):
        mix = rotation(10, 3) * np.logspace(-spread, 0, 10)
        a = rng.normal(size=(400, 10)) @ mix
        b = rng.normal(size=(300, 10)) @ mix + 0.3
        mu1, sigma1 = statistics.statistics(a)
        mu2, sigma2 = statistics.statistics(b)
        root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
        expected = (
            np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)
        )
        np.testing.assert_allclose(
            statistics.frechet_distance(mu1, sigma1, mu2, sigma2), expected, rtol=1e-7
        )


def test_statistics_are_computed_in_float64():
    x = np.random.default_rng(0).normal(size=(8199, 5)).astype(np.float32) + 100
    mu, sigma = statistics.statistics(x)
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, x.astype(np.float64).mean(0), rtol=1e-13)
    centred = x - x.astype(np.float64).mean(0)
    np.testing.assert_allclose(sigma, centred.T @ centred / 8198, rtol=1e-9, atol=1e-12)


def test_statistics_that_do_not_belong_together():
    one = (np.zeros(3), np.eye(3))
    other = (np.zeros(4), np.eye(4))
    with pytest.raises(UserError, match=r'\(3,\), \(3, 3\), \(4,\), \(4, 4\)'):
        statistics.frechet_distance(*one, *other)
    with pytest.raises(UserError, match='finite'):
        statistics.frechet_distance(*one, np.zeros(3), np.full((3, 3), np.nan))
    with pytest.raises(UserError, match='at least 2'):
        statistics.statistics(np.zeros((1, 3)))


# ---- Inception Score


def test_inception_score_of_hand_computed_cases():
    """Sure of one of two classes, evenly: 2. Always the same answer: 1. p = (¾, ¼) and (¼, ¾):
    2·(¾^¾·¼^¼).
    """
    sure = np.log(np.array([[1, 1e-300], [1e-300, 1]]))
    np.testing.assert_allclose(statistics.inception_score(sure), 2, rtol=1e-12)
    np.testing.assert_allclose(
        statistics.inception_score(np.tile([3.0, 1, 5], (7, 1))), 1, rtol=1e-12
    )
    quarters = np.log(np.array([[3.0, 1], [1, 3]])) + 7  # a constant does not matter
    np.testing.assert_allclose(
        statistics.inception_score(quarters), 2 * 0.75**0.75 * 0.25**0.25, rtol=1e-12
    )
    far = np.array([[1000.0, -1000], [-1000, 1000]])  # where a softmax underflows
    np.testing.assert_allclose(statistics.inception_score(far), 2, rtol=1e-12)


def test_inception_score_takes_the_mean_over_splits():
    """The evaluator's lines in plain NumPy; the last split is shorter and has the same weight."""
    logits = np.random.default_rng(0).normal(size=(25, 6)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    parts = [
        np.exp(np.mean(np.sum(q * (np.log(q) - np.log(q.mean(0, keepdims=True))), 1)))
        for q in (p[:10], p[10:20], p[20:])
    ]
    np.testing.assert_allclose(statistics.inception_score(logits, 10), np.mean(parts), rtol=1e-12)
    assert abs(np.mean(parts) - statistics.inception_score(logits)) > 0.01
    with pytest.raises(UserError):
        statistics.inception_score(logits[:0])


def test_inception_score_splits_are_of_5000():
    logits = np.random.default_rng(0).normal(size=(10_001, 2)) * 3
    whole = np.mean(
        [statistics.inception_score(logits[i : i + 5000], 10**6) for i in (0, 5000, 10_000)]
    )
    np.testing.assert_allclose(statistics.inception_score(logits), whole, rtol=1e-12)


# ---- precision and recall


def on_manifold(x, of, k):
    """Share of points of x within some ball around a point of `of`, by loops over Euclidean
    distances in float64.
    """
    hits = 0
    for point in x:
        for i, center in enumerate(of):
            others = sorted(np.linalg.norm(np.delete(of, i, 0) - center, axis=1))
            if np.linalg.norm(point - center) <= others[k - 1]:
                hits += 1
                break
    return hits / len(x)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('block, k', [(7, 3), (25, 3), (1000, 1)])
def test_precision_recall_against_brute_force(dtype, block, k):
    rng = np.random.default_rng(0)
    real = rng.normal(size=(60, 2))
    fake = rng.normal(size=(50, 2)) * 0.9 + 1
    seen = []

    def progress(done, total):
        seen.append((done, total))

    found = precision_recall.precision_recall(
        real, fake, k, dtype=dtype, block=block, progress=progress
    )
    assert found == (on_manifold(fake, real, k), on_manifold(real, fake, k))
    assert len({0, 1, *found}) == 4  # neither trivial nor the same
    assert seen[-1][0] == seen[-1][1] == len(seen)


def half_distances(u, v):
    """Squared distances as the evaluator has them, in NumPy's own float16; float32 for a block that
    overflows.
    """
    with np.errstate(over='ignore', invalid='ignore'):
        a = u.astype(np.float16)
        b = v.astype(np.float16)
        norms = [(x * x).astype(np.float64).sum(1).astype(np.float16) for x in (a, b)]
        product = (a.astype(np.float64) @ b.T.astype(np.float64)).astype(np.float16)
        square = (norms[0][:, None] - np.float16(2) * product) + norms[1][None]
    assert square.dtype == np.float16
    if np.isfinite(square).all():
        return np.maximum(square, 0).astype(np.float32)
    u = u.astype(np.float32)
    v = v.astype(np.float32)
    return np.maximum((u * u).sum(1)[:, None] - 2 * u @ v.T + (v * v).sum(1)[None], 0)


def half_precision_recall(real, fake, k, block):
    def all_distances(a, b):
        def parts(x):
            return [x[i : i + block] for i in range(0, len(x), block)]

        return np.block([[half_distances(u, v) for v in parts(b)] for u in parts(a)])

    radii = [np.sort(all_distances(x, x), axis=1)[:, k] for x in (real, fake)]
    between = all_distances(real, fake)
    return (between <= radii[0][:, None]).any(0).mean(), (between <= radii[1][None]).any(1).mean()


def features(n, seed):
    """Like `pool_3`: not negative, squared norms of some hundreds. Multiples of 1/16: sums of
    products are exact.
    """
    x = 2 + 0.3 * np.random.default_rng(seed).normal(size=(n, 8)).repeat(8, axis=1)
    return (np.round(np.abs(x) * 16) / 16).astype(np.float32)


def test_precision_recall_in_the_evaluators_float16():
    """Equal to the last point; and float16 does matter: exact distances give other numbers."""
    real = features(300, 0)
    fake = features(200, 1)
    found = precision_recall.precision_recall(real, fake, block=100)
    assert found == half_precision_recall(real, fake, 3, 100)
    assert found != precision_recall.precision_recall(real, fake, dtype=np.float64)
    assert 0 < found[0] < 1
    assert 0 < found[1] < 1


def test_a_block_that_overflows_float16_is_done_in_float32():
    """One point with a squared norm beyond 65504 moves its blocks, and only these, to float32."""
    real = features(100, 0)
    fake = features(100, 1)
    real[5] += 64
    assert (real[5] ** 2).sum() > 65504
    found = precision_recall.precision_recall(real, fake, block=50)
    assert found == half_precision_recall(real, fake, 3, 50)
    assert half_precision_recall(real, fake, 3, 50) != half_precision_recall(real, fake, 3, 100)


def test_precision_recall_extremes():
    real = np.random.default_rng(0).normal(size=(50, 2))
    for dtype in (np.float16, np.float32, np.float64):
        assert precision_recall.precision_recall(real, real, dtype=dtype) == (1, 1)
        assert precision_recall.precision_recall(real, real + 100, dtype=dtype) == (0, 0)
    with pytest.raises(UserError, match='more than 3 images'):
        precision_recall.precision_recall(real, real[:3])
    with pytest.raises(UserError, match=r'\(50, 1\)'):
        precision_recall.precision_recall(real, real[:, :1])


# ---- images and features


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_images_are_read_in_batches(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (11, 4, 5, 3), dtype=np.uint8)
    save(tmp_path / 'a.npz', labels=np.arange(11), arr_0=images)
    batches = list(image_sets.read_images(tmp_path / 'a.npz', 4))
    assert [len(a) for a in batches] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(batches), images)


def _npz(path, **arrays):
    np.savez(path, **arrays)
    return path.read_bytes()


def test_files_that_hold_no_images(tmp_path):
    path = tmp_path / 'a.npz'
    images = np.zeros((3, 4, 5, 3), np.uint8)
    whole = _npz(path, arr_0=images)
    wrong = {
        'uint8': _npz(path, arr_0=images.astype(np.float32)),
        r'\(3, 4, 5, 4\)': _npz(path, arr_0=np.zeros((3, 4, 5, 4), np.uint8)),
        'Fortran': _npz(path, arr_0=np.asfortranarray(images)),
        'object': _npz(path, arr_0=np.array([{}])),
        r'\(0, 4, 5, 3\)': _npz(path, arr_0=images[:0]),
        'no array arr_0, only labels': _npz(path, labels=np.arange(3)),
        'not a whole npz': whole[: len(whole) // 2],
        'not a whole npz file': b'neither',
        'npz': whole.replace(b'NUMPY', b'NIMPY'),
        'npz file': whole.replace(bytes(180), bytes(179) + b'\1'),  # its checksum is another
    }
    for message, content in wrong.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            list(image_sets.read_images(path))
        assert str(path) in str(caught.value)
        assert '\n' not in str(caught.value)
    with pytest.raises(OSError):
        list(image_sets.read_images(tmp_path / 'nowhere.npz'))


@pytest.mark.slow
def test_features_do_not_depend_on_the_batches(inception_params):
    """Three images in batches of any sizes, on one device and on all."""
    images = np.stack([image(i, 20, 24) for i in range(3)])
    expected = inception.features(inception_params, images[[0, 1]])
    done = []
    for batches in ([images], [images[:1], images[:0], images[1:]]):
        found = protocol.extract(
            batches,
            inception_params,
            batch_size=2,
            mesh=sharding.make_mesh(1),
            progress=done.append,
        )
        assert [a.shape for a in found] == [(3, 2048), (3, 2023), (3, 1008)]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a[:2], b, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            found.pool[2], inception.features(inception_params, images[[2, 2]]).pool[0], atol=1e-6
        )
    assert done == [2, 3] * 2
    if jax.device_count() > 1:
        for a, b in zip(
            protocol.extract([images], inception_params, batch_size=2), found, strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_batches_that_are_no_images():
    images = np.zeros((2, 4, 5, 3), np.uint8)
    cases = {
        'uint8': [images / 255],
        r'\(4, 5, 3\)': images,
        'no images': [],
        r'\(4, 5\) and \(5, 4\)': [images, images.transpose(0, 2, 1, 3)],
    }
    for message, batches in cases.items():
        with pytest.raises(UserError, match=message):
            protocol.extract(batches, {}, batch_size=64, mesh=sharding.make_mesh(1))


def reference_arrays(seed):
    """Statistics as the npz of ADM has them: mu, sigma, mu_s, sigma_s."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for suffix, width in (('', 2048), ('_s', 2023)):
        arrays[f'mu{suffix}'] = rng.normal(size=width)
        arrays[f'sigma{suffix}'] = np.diag(rng.uniform(size=width))
    return arrays


@pytest.mark.slow
def test_statistics_of_a_file_come_before_those_of_its_images(tmp_path, inception_params):
    arrays = reference_arrays(0)
    path = tmp_path / 'reference.npz'
    images = np.stack([image(i, 20, 24) for i in range(2)])
    np.savez(path, arr_0=images, **arrays)
    seen = []
    both = protocol.summarize(
        path, inception_params, progress=lambda *a: seen.append(a), batch_size=2
    )
    np.savez(path, **arrays)
    alone = protocol.summarize(path, inception_params, batch_size=2)
    for found in (both, alone):
        np.testing.assert_array_equal(found.pool.sigma, arrays['sigma'])
        np.testing.assert_array_equal(found.spatial.mu, arrays['mu_s'])
    assert alone.features is None
    assert seen == [(2, 2)]
    np.savez(path, arr_0=images)
    computed = protocol.summarize(path, inception_params, batch_size=2)
    for a, b in zip(both.features, computed.features, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(computed.spatial.sigma, np.cov(both.features.spatial.T), atol=1e-9)
    np.testing.assert_allclose(computed.pool.mu, both.features.pool.mean(0), atol=1e-6)


def test_statistics_that_cannot_be_used(tmp_path):
    path = tmp_path / 'reference.npz'
    arrays = reference_arrays(0)
    cases = {
        'no sigma_s': {k: v for k, v in arrays.items() if k != 'sigma_s'},
        r'mu_s must be floats \(2023,\), but is float64 \(2048,\)': arrays | {'mu_s': arrays['mu']},
        'int64': arrays | {'mu': np.arange(2048)},
        'neither images': {'labels': np.arange(3)},
    }
    for message, content in cases.items():
        np.savez(path, **content)
        with pytest.raises(UserError, match=message):
            protocol.summarize(path, None)


def summary(n, seed):
    rng = np.random.default_rng(seed)
    pool = features(n, seed)
    spatial = rng.normal(size=(n, 8))
    found = inception.Features(pool, spatial, rng.normal(size=(n, 5)))
    return protocol.Summary(found, statistics.statistics(pool), statistics.statistics(spatial))


def test_evaluate_puts_the_scores_together():
    samples = summary(60, 0)
    reference = summary(80, 1)
    parts = []
    found = protocol.evaluate(samples, reference, None, progress=lambda *a: parts.append(a))
    expected = {
        'fid': statistics.frechet_distance(*reference.pool, *samples.pool),
        'sfid': statistics.frechet_distance(*reference.spatial, *samples.spatial),
        'inception_score': statistics.inception_score(samples.features.logits),
    }
    shares = precision_recall.precision_recall(reference.features.pool, samples.features.pool)
    expected |= dict(zip(('precision', 'recall'), shares, strict=True))
    seconds = found.pop('seconds')
    said = {key: found.pop(key) for key in ('samples', 'reference', 'settings', 'note')}
    assert (said['samples'], said['reference']) == ({'images': 60}, {'images': 80})
    assert said['settings']['batch_size'] == 64
    assert said['note'].startswith('FID of 60 images is biased upwards')
    assert set(seconds) == {'fid', 'sfid', 'inception_score', 'precision_recall'}
    assert min(seconds.values()) >= 0
    assert found == pytest.approx(expected, rel=1e-9)
    assert expected['precision'] != expected['recall']
    assert parts[-1] == ('precision_recall', 3, 3)
    without = protocol.evaluate(samples, reference._replace(features=None), None)
    assert without['reference'] == {'images': None}
    assert {k: v for k, v in without.items() if isinstance(v, float)} == {
        k: found[k] for k in ('fid', 'sfid', 'inception_score')
    }


@pytest.mark.parametrize(
    'counts, number',
    [((10,), 10), ((9_999,), 9_999), ((10_000,), None), ((50_000, None), None), ((None,), None),
     ((50_000, 5_000), 5_000)],
)  # fmt: skip
def test_a_note_where_images_are_few(counts, number):
    note = statistics.note(*counts)
    if number is None:
        assert note is None
    else:
        assert note.startswith(f'FID of {number} images is biased upwards and cannot be compared')


def _fake_features(batches, params, *, batch_size, progress):
    """Features of the protocol's widths, without a network."""
    images = np.concatenate(list(batches))
    rng = np.random.default_rng(len(images))
    return inception.Features(
        rng.normal(size=(len(images), inception.POOL)),
        rng.normal(size=(len(images), inception.SPATIAL)),
        rng.normal(size=(len(images), 8)),
    )


def test_a_result_says_what_it_was_taken_from(tmp_path, monkeypatch):
    """Number of images, files, and the seed and sampler that lie beside samples."""
    monkeypatch.setattr(protocol, 'extract', _fake_features)
    monkeypatch.setattr(statistics, 'frechet_distance', lambda *moments: 1.5)
    path = tmp_path / 's.npz'
    np.savez(path, arr_0=np.zeros((6, 4, 4, 3), np.uint8))
    real = tmp_path / 'r.npz'
    np.savez(real, arr_0=np.zeros((5, 4, 4, 3), np.uint8))
    sampling = {'num_images': 6, 'guidance_scale': 1.5}
    about = {'seed': 3, 'dtype': 'float32', 'sampling': sampling, 'labels': 1}
    (tmp_path / 's.npz.json').write_text(json.dumps(about))
    found = protocol.evaluate(path, real, None)
    del about['labels']
    assert found['samples'] == {'images': 6, 'file': str(path), **about}
    assert found['reference'] == {'images': 5, 'file': str(real)}
    assert found['note'].startswith('FID of 5 images')
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    'beside, said',
    [('{"seed": 3, "sampling": {"num_images": 7}}', 0), ('[]', 0), ('{"seed": ', 1)],
)
def test_settings_of_other_samples_are_left_out(tmp_path, monkeypatch, capsys, beside, said):
    monkeypatch.setattr(protocol, 'extract', _fake_features)
    path = tmp_path / 's.npz'
    np.savez(path, arr_0=np.zeros((6, 4, 4, 3), np.uint8))
    (tmp_path / 's.npz.json').write_text(beside)
    assert protocol.summarize(path, None).describe() == {'images': 6, 'file': str(path)}
    assert len(capsys.readouterr().err.splitlines()) == said


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    (tmp_path / 'weights.pb').write_bytes(b'no graph')
    np.savez(tmp_path / 'a.npz', arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    command = [
        'fidelity',
        str(tmp_path / 'a.npz'),
        str(tmp_path / 'a.npz'),
        f'--weights={tmp_path / "weights.pb"}',
    ]
    with pytest.raises(UserError, match=r'weights\.pb is not a GraphDef'):
        fidelity.main(command)


@pytest.mark.slow
def test_the_command_scores_two_files(tmp_path, capsys):
    """From files to the five scores.

    A set against itself has the distances 0, precision and recall 1.
    """
    (tmp_path / 'weights.pb').write_bytes(graph_def(fill=0.01).SerializeToString())
    np.savez(tmp_path / 'a.npz', arr_0=np.stack([image(i, 20, 24) for i in range(5)]))
    command = [
        'fidelity',
        str(tmp_path / 'a.npz'),
        str(tmp_path / 'a.npz'),
        f'--weights={tmp_path / "weights.pb"}',
    ]
    fidelity.main([*command, '--batch_size=2'])
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith('FID of 5 images is biased upwards')
    scores = json.loads(shown.out)
    assert scores['samples']['images'] == 5
    assert scores['fid'] == pytest.approx(0, abs=1e-6)
    assert scores['sfid'] == pytest.approx(0, abs=1e-6)
    assert scores['precision'] == scores['recall'] == 1
    assert scores['inception_score'] == pytest.approx(1, abs=1e-3)
