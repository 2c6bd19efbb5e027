import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax.evaluation import tokenizer
from sphere_ar_jax.interop.lpips import load, read
from sphere_ar_jax.models.judges.lpips import LPIPS, _unit
from sphere_ar_jax.runtime.console import UserError
from tests import torch_writer
from tests.conftest import GOLDENS, libraries_promote


@pytest.fixture(scope='module')
def pair():
    """Golden LPIPS of the public code and its gradient: (real, fake, distances, gradient for fake),
    images NHWC.
    """
    golden = dict(np.load(GOLDENS / 'lpips.npz'))
    real, fake, gradient = (
        golden[n].transpose(0, 2, 3, 1) for n in ('real_nchw', 'fake_nchw', 'lpips_dfake')
    )
    return real, fake, golden['lpips'].ravel(), gradient


@pytest.fixture(scope='module')
def params(lpips_files):
    return load(*lpips_files)


@pytest.fixture(scope='module')
def measure():
    """Compiled: (parameters, real, fake) → (distances (B,), gradient of their mean for `fake`),
    both NumPy.
    """

    def loss(fake, params, real):
        distances = LPIPS().apply({'params': params}, real, fake)
        return jnp.mean(distances), distances

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def measure(params, real, fake):
        (_, distances), gradient = run(fake, params, real)
        return np.asarray(distances), np.asarray(gradient)

    return measure


def test_lpips_and_its_gradient(measure, params, pair):
    real, fake, golden_distances, golden_gradient = pair
    distances, gradient = measure(params, real, fake)
    np.testing.assert_allclose(distances, golden_distances, rtol=1e-5)
    scale = np.abs(golden_gradient).max()
    np.testing.assert_allclose(gradient / scale, golden_gradient / scale, atol=1e-4)


def test_lpips_of_pixels_without_features(measure, params, pair):
    """A stage whose features are all 0 gives nothing: distance and gradient are those of the other
    stages, not NaN.
    """
    dead = {'conv5_3': params['vgg']['conv5_3'] | {'bias': np.full(512, -1e4, np.float32)}}
    distances, gradient = measure(params | {'vgg': params['vgg'] | dead}, *pair[:2])
    others = measure(params | {'lin4': np.zeros(512, np.float32)}, *pair[:2])
    np.testing.assert_allclose(distances, others[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, others[1], rtol=1e-5, atol=1e-12)
    assert np.any(distances < pair[2])
    assert np.any(gradient)
    slope = jax.grad(lambda x: jnp.sum(_unit(x) * jnp.arange(4.0)))
    for x in (0.0, 1e-30):  # the square of the second is 0 too
        np.testing.assert_allclose(slope(jnp.full(4, x)), 1e10 * np.arange(4), rtol=1e-6)


@pytest.mark.slow
def test_lpips_in_bfloat16(params, pair):
    """Only the convolutions are rounded, to 3 digits; the distance remains float32."""
    distances = jax.jit(LPIPS(jnp.bfloat16).apply)({'params': params}, *pair[:2])
    assert distances.dtype == jnp.float32
    assert np.all(distances != pair[2])
    np.testing.assert_allclose(distances, pair[2], rtol=5e-3)


def test_load_gives_the_tree_of_the_model(params):
    image = jnp.zeros((1, 16, 16, 3))
    expected = jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)['params']
    chex.assert_trees_all_equal_shapes_and_dtypes(params, expected)


def test_load_lists_all_faults_at_once(lpips_files):
    lin = dict(lpips_files[0])
    vgg = dict(lpips_files[1])
    del lin['lin3.model.1.weight'], vgg['features.0.bias']
    lin['lin0.model.1.weight'] = np.zeros((1, 65, 1, 1))
    vgg['features.28.weight'] = {}
    lin['lin5.model.1.weight'] = vgg['features.30.weight'] = np.zeros(1)
    with pytest.raises(UserError) as error:
        load(lin, vgg)
    message = str(error.value)
    for fault in (
        'vgg.pth lacks lin3.model.1.weight;', 'vgg16-397923af.pth lacks features.0.bias;',
        'vgg.pth has unexpected lin5.model.1.weight;',
        'vgg16-397923af.pth has unexpected features.30.weight',
        'lin0.model.1.weight has shape (1, 65, 1, 1), not (1, 64, 1, 1);',
        'features.28.weight has shape (), not (512, 512, 3, 3);',
    ):  # fmt: skip
        assert fault in message, fault
    assert '\n' not in message
    assert 'classifier' not in message
    with pytest.raises(
        UserError, match=r'\bvgg\.pth lacks lin0.*has unexpected .*features\.0\.weight'
    ):
        load(*lpips_files[::-1])  # swapped


def _write(path, tensors):
    """The tensors as a file of PyTorch's."""
    arrays = {name: np.asarray(a, np.float32) for name, a in tensors.items()}

    def stored(name, a):
        return torch_writer.tensor(torch_writer.storage(name, a.size, 'Float'), a.shape)

    content = torch_writer.dictionary({name: stored(name, a) for name, a in arrays.items()})
    path.write_bytes(
        torch_writer.zip_file(content, {name: a.tobytes() for name, a in arrays.items()})
    )
    return path


def test_read_gives_what_load_gives(lpips_files, params, tmp_path):
    paths = [
        _write(tmp_path / name, tensors)
        for name, tensors in zip(('vgg.pth', 'b.pth'), lpips_files, strict=True)
    ]
    chex.assert_trees_all_equal(read(*paths), params)
    with pytest.raises(UserError, match='lacks lin0'):
        read(*paths[::-1])


def test_read_says_where_the_files_come_from(tmp_path):
    there, no_dict, no_file = (tmp_path / name for name in ('vgg.pth', 'list.pth', 'text.pth'))
    _write(there, {'lin0.model.1.weight': np.zeros((1, 64, 1, 1))})
    no_dict.write_bytes(torch_writer.zip_file(torch_writer.numbers([1, 2])))
    no_file.write_text('weights')
    for paths, missing in (
        (
            (None, None),
            "no path to taming-transformers' vgg.pth "
            "and no path to torchvision's vgg16-397923af.pth",
        ),
        ((there, None), "there is no path to torchvision's vgg16-397923af.pth:"),
        ((tmp_path / 'absent.pth', there), f'there is no file {tmp_path}/absent.pth:'),
    ):
        with pytest.raises(UserError) as error:
            read(*paths)
        message = str(error.value)
        for part in (
            missing, 'vgg.pth (https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1)',
            'vgg16-397923af.pth (https://download.pytorch.org/models/vgg16-397923af.pth)',
            'perceptual_weight=0',
        ):  # fmt: skip
            assert part in message
        assert '\n' not in message
    with pytest.raises(UserError, match='holds a tuple, but must hold tensors by name'):
        read(no_dict, there)
    with pytest.raises(UserError, match='no file of PyTorch'):
        read(there, no_file)


# Made once with scikit-image 0.26.0, for images as (…, 3) float64 with pixels in [0, 255]:
# structural_similarity(a, b, data_range=255, gaussian_weights=True, sigma=1.5,
# use_sample_covariance=False, channel_axis=-1) and peak_signal_noise_ratio(a, b, data_range=255)
BYTES = dict(
    ssim=(0.8572083717560033, 0.29671012372468325), psnr=(19.6777556318162, 13.324697067515723)
)


def _bytes():
    """Two pairs of images by formula, (2, 40, 33, 3) uint8: waves, dimmed and with little noise, or
    with much noise.
    """
    y, x = np.mgrid[:40, :33]
    rng = np.random.RandomState(0)
    a = np.empty((2, 40, 33, 3))
    for k in range(2):
        for c in range(3):
            waves = np.sin(x / (3 + k + c)) * np.cos(y / (4 + c))
            a[k, :, :, c] = 127.5 + 100 * waves + 27 * rng.uniform(-1, 1, x.shape)
    noise = rng.standard_normal(a[0].shape), rng.standard_normal(a[1].shape)
    b = np.stack([a[0] * 0.7 + 20 + 10 * noise[0], a[1] + 60 * noise[1]])
    return a.clip(0, 255).astype(np.uint8), b.clip(0, 255).astype(np.uint8)


def test_ssim_and_psnr_against_scikit_image():
    psnr, ssim = tokenizer.likeness(*_bytes())
    assert psnr.dtype == ssim.dtype == jnp.float32
    np.testing.assert_allclose(ssim, BYTES['ssim'], rtol=1e-4)
    np.testing.assert_allclose(psnr, BYTES['psnr'], rtol=1e-5)


def test_ssim_against_its_definition():
    """Every window by itself, in float64.

    One pair is almost white and flat, where float32 cancels most.
    """
    a, b = (x[:, :15, :13, :2] for x in _bytes())
    a, b = (np.concatenate([x, 253 + x[:1] // 128]) for x in (a, b))
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    expected = np.zeros(3)
    for k, i, j, c in np.ndindex(3, 5, 3, 2):
        x, y = (image[k, i : i + 11, j : j + 11, c] / 255 for image in (a, b))
        mx = np.sum(weights * x)
        my = np.sum(weights * y)
        vx, vy, cov = (
            np.sum(weights * p * q)
            for p, q in ((x - mx, x - mx), (y - my, y - my), (x - mx, y - my))
        )
        luminance = (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4)
        expected[k] += luminance * (2 * cov + 9e-4) / (vx + vy + 9e-4) / (5 * 3 * 2)
    np.testing.assert_allclose(tokenizer.likeness(a, b)[1], expected, rtol=1e-4)


def test_equal_images():
    """They have the PSNR of images that differ in one value by one level, and no infinite one."""
    a = _bytes()[0]
    psnr, ssim = tokenizer.likeness(a, a)
    np.testing.assert_allclose(ssim, 1, rtol=1e-6)
    b = a.copy()
    b[:, 20, 10, 1] ^= 1
    np.testing.assert_allclose(psnr, 10 * np.log10(255**2 * 40 * 33 * 3), rtol=1e-6)
    np.testing.assert_allclose(tokenizer.likeness(a, b)[0], psnr, rtol=1e-4)


def test_images_smaller_than_the_windows_have_no_ssim():
    a = np.zeros((2, 8, 8, 1), np.uint8)
    scores = tokenizer._compare(a, a / 127.5 - 1, a + np.uint8(51), None)
    assert set(scores) == {'image_psnr'}
    np.testing.assert_allclose(scores['image_psnr'], 13.9794, rtol=1e-5)


def test_psnr_of_each_image_and_of_all_pixels():
    """51 of 255 off is 13.98 dB, 5 off is 34.15: the mean is 24.07.

    All pixels together are below it.
    """
    a = np.zeros((2, 11, 11, 1), np.uint8)
    b = a + np.array([51, 5], np.uint8)[:, None, None, None]
    np.testing.assert_allclose(tokenizer.likeness(a, b)[0], (13.9794, 34.1514), rtol=1e-5)
    of_all = tokenizer.psnr(a / 127.5 - 1, b / 127.5 - 1)
    np.testing.assert_allclose(
        of_all, 10 * np.log10(4 / np.mean([0.4**2, (10 / 255) ** 2])), rtol=1e-5
    )
    assert of_all < 17


@libraries_promote()
def test_shapes_are_checked():
    def lpips(a, b):
        return jax.eval_shape(LPIPS().init, jax.random.key(0), a, b)

    good = np.zeros((2, 16, 17, 3), np.float32)
    lpips(good, good)
    for a, b in (
        (good, good[:, :, 1:]), (good, good[:1]), (good[0], good[0]), (good[:, 1:], good[:, 1:]),
        (good[:, :, 2:], good[:, :, 2:]), (good[..., :1], good[..., :1]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r'needs two batches \(B, H, W, '):
            lpips(a, b)
