"""What `sphere_ar_jax.load` gives, on a digits run that an earlier version finished."""

import contextlib
import doctest
import io
import pathlib
import re
import time
from concurrent import futures

import chex
import jax
import numpy as np
import pytest
from PIL import Image

import sphere_ar_jax
from sphere_ar_jax import loading
from sphere_ar_jax.commands import checkpoints
from sphere_ar_jax.commands import draw as commands_draw
from sphere_ar_jax.config import build, schema
from sphere_ar_jax.data import pixels
from sphere_ar_jax.evaluation import pictures
from sphere_ar_jax.interop import torch_file, torch_names, torch_sizes
from sphere_ar_jax.runtime import checkpoint
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling import autoencoding, inputs, model, on_mesh
from tests import tiny_config
from tests.conftest import GOLDENS, libraries_promote

ROOT = pathlib.Path(__file__).parents[2]
ROUNDING = 1e-4  # by which programs of other batch sizes differ


@pytest.fixture(scope='module')
def workdir(old_runs):
    return str(old_runs / 'digits')


@pytest.fixture(scope='module')
def run(workdir):
    with libraries_promote():
        yield sphere_ar_jax.load(workdir)


@pytest.fixture(scope='module')
def random_run():
    """Models of the same sizes with random parameters."""
    return tiny_config.random_run()


@pytest.fixture(scope='module')
def lively(random_run):
    """A model whose images depend on everything; those of the run hardly do."""
    return model.Model(random_run)


@pytest.fixture(scope='module')
def measured():
    """What the version that trained the run drew: images of the labels 0 to 5, and their tokens."""
    return dict(np.load(GOLDENS / 'old_runs.npz'))


@contextlib.contextmanager
def _events():
    """A context that lists the programs that JAX traces and compiles in it."""
    seen = []

    def listen(event, duration, **about):
        if event.startswith('/jax/core/compile/'):
            seen.append((event, about.get('fun_name')))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_samples_are_those_of_the_version_that_trained_the_run(run, measured):
    images = run.sample(range(6), seed=0)
    assert images.dtype == np.float32
    assert np.abs(images).max() <= 1
    chex.assert_trees_all_close(images, measured['digits/images'].clip(-1, 1), atol=1e-5)
    drawn = run.sample_tokens(range(6))
    chex.assert_trees_all_close(drawn.z, measured['digits/z'], atol=1e-5)
    norms = run.token_norms(range(6))
    np.testing.assert_allclose(norms[..., None] * drawn.z, 8**0.5 * drawn.raw, atol=1e-4)
    chex.assert_trees_all_close(run.decode(measured['digits/z']), images, atol=1e-5)


@pytest.mark.slow
def test_images_do_not_depend_on_the_others(run, measured):
    images = run.sample([0, '1'], seed=0)
    np.testing.assert_allclose(images, measured['digits/images'][:2].clip(-1, 1), atol=1e-5)


@pytest.mark.slow
def test_images_are_those_of_the_commands(run, workdir, tmp_path, monkeypatch):
    """--mode=grid and --mode=sample draw class 3 twice with the run's seed 0."""
    images = run.sample([3, 3], seed=0)
    assert run.config.seed == 0
    shown = []
    monkeypatch.setattr(pictures, 'save_classes', lambda path, images, *_: shown.append(images))
    commands_draw.grid(workdir, classes='3', columns=2, output=f'{tmp_path}/grid.png')
    np.testing.assert_array_equal(images, shown[0].clip(-1, 1))
    np.savetxt(tmp_path / 'labels.txt', [3, 3], '%d')
    output = f'{tmp_path}/samples.npz'
    labels = f'{tmp_path}/labels.txt'
    commands_draw.sample(workdir, output=output, labels=labels, num_images=2)
    with np.load(output) as file:
        np.testing.assert_array_equal(pixels.to_uint8(images), file['arr_0'])


@pytest.mark.slow
def test_each_image_may_have_its_own_seed_and_scale(lively):
    """It is the image that its seed and scale alone give, with the noise of image 0."""
    both = lively.sample([3, 5], seed=[0, 4], guidance=[1.5, 3.0])
    np.testing.assert_allclose(both[0], lively.sample([3, 5])[0], atol=ROUNDING)
    alone = lively.sample([5, 3], seed=4, guidance=3.0)
    np.testing.assert_allclose(both[1], alone[0], atol=ROUNDING)
    # The other seed and the other scale make other images.
    for arguments in ({'guidance': 3.0}, {'seed': 4}):
        assert np.abs(both[1] - lively.sample([5, 3], **arguments)[0]).max() > 10 * ROUNDING


@pytest.mark.slow
def test_images_are_shown_row_by_row(lively):
    shown = []
    images = lively.sample([3, 5], on_token=lambda k, images: shown.append((k, images)))
    assert [k for k, _ in shown] == [4, 8, 12, 16]
    np.testing.assert_array_equal(shown[-1][1], images)
    assert not np.shares_memory(shown[-1][1], images)
    np.testing.assert_allclose(images, lively.sample([3, 5]), atol=ROUNDING)
    tokens = lively.sample_tokens([3, 5]).z
    tokens[:, 8:] = 0
    np.testing.assert_allclose(shown[1][1], lively.decode(tokens), atol=ROUNDING)


@pytest.mark.slow
def test_completion_goes_from_a_sample_to_a_reconstruction(lively, monkeypatch):
    """Nothing kept is a sample, all kept is a reconstruction, and half of the tokens are kept."""
    images = lively.sample([3, 5], seed=1)
    complete = lively.complete(images, [3, 5], keep=0, seed=0)
    np.testing.assert_allclose(complete, lively.sample([3, 5]), atol=ROUNDING)
    whole = lively.complete(images, [3, 5], keep=16)
    np.testing.assert_allclose(whole, lively.reconstruct(images), atol=ROUNDING)
    draw = on_mesh.draw_images
    seen = []

    def drawing(*arguments, **options):
        seen.append(draw(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(on_mesh, 'draw_images', drawing)
    lively.complete(images, 3, keep=0.5)
    tokens = seen[0][1].z
    np.testing.assert_array_equal(tokens[:, :8], lively.encode(images)[:, :8])
    assert np.abs(tokens - lively.encode(images))[:, 8:].max() > 0.1


@pytest.mark.slow
def test_tokens_of_images(lively):
    """The most probable ones, and those that an evaluation of the tokenizer draws."""
    images = lively.sample([3, 5], seed=1)
    frozen = (lively.vae_params, jax.random.key_data(jax.random.key(7)))
    decoded, q = autoencoding.autoencoder(lively.vae)(frozen, (images, np.arange(2)))
    np.testing.assert_allclose(lively.encode(images), 8**0.5 * np.asarray(q.mu), atol=1e-5)
    again = lively.reconstruct(images, seed=7)
    np.testing.assert_allclose(again, np.clip(decoded, -1, 1), atol=ROUNDING)
    tokens = lively.encode(images, seed=7)
    own = lively.encode(images[::-1], seed=[3, 7])
    np.testing.assert_allclose(own[1], tokens[0], atol=1e-5)
    assert np.abs(own[0] - tokens[1]).max() > 0.01


@pytest.mark.slow
def test_interpolation_begins_and_ends_at_the_images(lively):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 1))
    way = lively.interpolate(*images, 6)
    assert way.shape == (6, 16, 16, 1)
    np.testing.assert_allclose(way[[0, -1]], lively.reconstruct(images), atol=ROUNDING)
    steps = np.abs(np.diff(way, axis=0)).mean((1, 2, 3))
    assert steps.min() > 0
    assert steps.max() < np.abs(way[-1] - way[0]).mean()


def test_tokens_in_the_plane_are_interpolated_in_straight_lines(monkeypatch):
    cfg = tiny_config.get_config()
    cfg.vae.posterior = 'gaussian'
    plane = model.Model(tiny_config.random_run(cfg))
    ends = np.random.default_rng(0).normal(size=(2, 16, 8)).astype(np.float32)
    monkeypatch.setattr(plane, 'encode', lambda images: ends)
    monkeypatch.setattr(plane, 'decode', lambda tokens: tokens)
    black = np.zeros((16, 16, 1), np.uint8)
    way = plane.interpolate(black, black, 3)
    np.testing.assert_allclose(way, [ends[0], ends.mean(0), ends[1]], atol=1e-6)
    np.testing.assert_array_equal(way[[0, 2]], ends)


def test_polar_tokens_are_interpolated_on_great_circles_and_in_length(monkeypatch):
    """A quarter of a circle in the first two numbers; the last one goes straight."""
    cfg = schema.changed(
        tiny_config.get_config(),
        {
            'vae.posterior': 'gaussian',
            'ar.token_space': 'polar',
            'ar.head': 'direction_magnitude',
        },
    )
    polar = model.Model(tiny_config.random_run(cfg))
    ends = np.zeros((2, 16, 9), np.float32)
    ends[0, :, 0] = 8**0.5
    ends[1, :, 1] = 8**0.5
    ends[1, :, 8] = 3
    monkeypatch.setattr(polar, 'encode', lambda images: ends)
    monkeypatch.setattr(polar, 'decode', lambda tokens: tokens)
    black = np.zeros((16, 16, 1), np.uint8)
    way = polar.interpolate(black, black, 3)
    np.testing.assert_array_equal(way[[0, 2]], ends)
    middle = np.array([2, 2, 0, 0, 0, 0, 0, 0, 1.5])
    np.testing.assert_allclose(way[1], np.broadcast_to(middle, (16, 9)), atol=1e-6)


@pytest.mark.slow
def test_other_values_compile_nothing(lively):
    """Labels, seeds, scales, kept tokens and images, written in another way too."""

    def call_all(labels, seed, scale, keep, other):
        images = lively.sample(labels, seed=seed, guidance=scale)
        lively.sample(labels, seed=[seed, other], guidance=[scale, 2])
        lively.sample(labels, seed=other, on_token=lambda k, images: None)
        lively.complete(images, labels, keep=keep, seed=seed)
        lively.interpolate(*images, 2)
        lively.reconstruct(images)
        lively.encode(images, seed=seed)
        lively.token_norms(labels, seed=other)

    call_all([3, 5], 0, 1.5, 4, 9)
    with _events() as seen:
        call_all(np.array([1, 2], np.int8), 5, 3, 0.7, 2)
    assert seen == []
    with _events() as seen:
        lively.sample([3, 5], steps=1)  # so the events are there to be seen
    assert seen  # so the events are there to be seen


def test_only_the_weights_that_are_needed_are_read(workdir, run, monkeypatch):
    """The tokenizer at once, the AR model at first use, and nothing but weights to sample with."""
    read = checkpoint.Checkpoints._read
    seen = []

    def reading(self, step, like):
        found = read(self, step, like)
        leaves = [a for a in jax.tree.leaves(found[0]) if a is not ...]
        seen.append(sum(a.nbytes for a in leaves))
        return found

    monkeypatch.setattr(checkpoint.Checkpoints, '_read', reading)
    where = pathlib.Path(workdir)
    monkeypatch.chdir(where.parent)
    fresh = sphere_ar_jax.load(where.name)
    monkeypatch.chdir('/')

    def size(params):
        return sum(a.nbytes for a in jax.tree.leaves(params)) + 4  # with the step

    assert seen == [size(run.vae_params)]
    fresh.encode(np.zeros((2, 16, 16, 1), np.uint8))
    assert len(seen) == 1
    jax.tree.map(np.testing.assert_array_equal, fresh.ar_params, run.ar_params)
    assert seen[1:] == [size(run.ar_params)]


def test_threads_may_ask_for_the_model_at_once(random_run):
    reads = []

    def read():
        reads.append(1)
        time.sleep(0.05)
        return random_run

    tokenizer = random_run._replace(ar_params=None)
    several = model.Model(tokenizer, read_ar=read)
    with futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: several.ar_params, range(4)))
    assert len(reads) == 1
    assert all(params is found[0] for params in found)


def test_a_tokenizer_alone(random_run):
    alone = model.Model(random_run._replace(ar_params=None))
    with pytest.raises(UserError, match='a tokenizer alone'):
        alone.sample(3)


GREY = np.zeros((2, 16, 16, 1), np.float32)
WRONG = {
    'a class above': (lambda r: r.sample([3, 10]), 'labels must lie between 0 and 9'),
    'a class below': (lambda r: r.sample(-1), 'labels must lie between 0 and 9'),
    'no class': (lambda r: r.sample([]), 'there are no labels'),
    'a fraction': (lambda r: r.sample(2.5), 'labels must be whole numbers'),
    'a name': (lambda r: r.sample('owl'), "'owl' is no class: this model knows the numbers 0 to 9"),
    'seeds': (lambda r: r.sample([3, 1], seed=[1, 2, 3]), 'or one for each of 2 image'),
    'a seed below 0': (lambda r: r.sample(3, seed=-1), 'seed must be a whole number'),
    'half a seed': (lambda r: r.sample(3, seed=0.5), 'seed must be a whole number'),
    'no scale': (lambda r: r.sample(3, guidance=np.nan), 'guidance must be finite'),
    'scales': (lambda r: r.sample([3, 1], guidance=[[1.0, 2.0]]), 'guidance must be a number'),
    'no steps': (lambda r: r.sample(3, steps=0), 'steps must be a whole number of at least 1'),
    'half steps': (lambda r: r.sample(3, steps=2.5), 'steps must be a whole number of at least 1'),
    'height': (lambda r: r.encode(GREY[:, :15]), r'images must be \(n, 16, 16, 1\), .* \(2, 15,'),
    'colours': (lambda r: r.encode(GREY.repeat(3, 3)), r'images must be \(n, 16, 16, 1\)'),
    'no image': (lambda r: r.encode(GREY[:0]), r'images must be \(n, 16, 16, 1\)'),
    'NaN': (lambda r: r.encode(GREY + np.nan), 'images must be finite, but 512 of 512 numbers'),
    'bytes as floats': (lambda r: r.encode(GREY + 255), r'must lie in \[-1, 1\], but go from 255'),
    'whole numbers': (lambda r: r.encode(GREY.astype(int)), 'images must be uint8 or floats'),
    'ragged': (lambda r: r.encode([[1, 2], [3]]), 'images must all have the same shape'),
    'tokens': (lambda r: r.decode(np.zeros((2, 15, 8))), r'tokens must be \(n, 16, 8\)'),
    'endless tokens': (lambda r: r.decode(np.full((16, 8), np.inf)), 'tokens must be finite'),
    'tokens of words': (lambda r: r.decode(np.full((16, 8), 'a')), 'tokens must be floats'),
    'kept': (lambda r: r.complete(GREY, 3, keep=17), 'keep must be a whole number of tokens from'),
    'rows kept': (lambda r: r.complete(GREY, 3, keep='5rows'), 'up to 4rows'),
    'all kept': (lambda r: r.complete(GREY, 3, keep=1.0), 'or a share between 0 and 1'),
    'labels for images': (lambda r: r.complete(GREY, [1, 2, 3]), 'labels must be one for all 2'),
    'one image': (lambda r: r.interpolate(GREY[0], GREY[1], 1), 'n must be a whole number of at'),
    'several images': (lambda r: r.interpolate(GREY, GREY[0], 3), 'from one image to one'),
}  # fmt: skip


@pytest.mark.parametrize('what', WRONG)
def test_what_the_model_cannot_take_is_one_line(run, what):
    call, message = WRONG[what]
    with pytest.raises(UserError, match=message) as error:
        call(run)
    assert isinstance(error.value, ValueError)
    assert '\n' not in str(error.value)


def test_more_images_than_a_batch_are_not_shown_row_by_row(random_run):
    small = model.Model(random_run, batch_size=1)
    with pytest.raises(UserError, match='at most batch_size = 1 images, not 2'):
        small.sample([3, 5], on_token=lambda k, images: None)
    with pytest.raises(UserError, match='batch_size must be a whole number of at least 1'):
        model.Model(random_run, batch_size=0)


def test_a_run_without_guidance_takes_no_scale(random_run):
    cfg = schema.changed(random_run.config, {'sampling.guidance': None})
    plain = model.Model(random_run._replace(config=cfg))
    with pytest.raises(UserError, match='samples without guidance'):
        plain.sample(3, guidance=2.0)


def test_steps_are_those_of_the_config(run):
    assert run._sampler(None) == build.build_sampler(run.config)
    assert run._sampler(7).options.num_steps == 7
    assert run.config.sampling.num_steps == 2
    fewer = {'sampling.num_steps': 12, 'sampling.final_steps': 4, 'sampling.annealing': 'linear'}
    annealed = schema.changed(run.config, fewer)
    assert model.other_sampler(annealed, annealed.sampling.solver, 12).options.final_steps == 4
    # The number that was asked for is that of every token.
    options = model.other_sampler(annealed, annealed.sampling.solver, 5).options
    assert (options.num_steps, options.final_steps, options.annealing) == (5, None, None)


def test_a_run_is_opened_with_values_of_its_config_changed(workdir):
    values = {'sampling.num_steps': 3, 'dtype': 'bfloat16'}
    with libraries_promote():
        other = sphere_ar_jax.load(workdir, config=values)
    assert other._sampler(None).options.num_steps == 3
    assert other.vae.dtype == jax.numpy.bfloat16
    with pytest.raises(UserError, match='num_steps is 0, but a solver needs'):
        sphere_ar_jax.load(workdir, config={'sampling.num_steps': 0})
    with pytest.raises(UserError, match=r'ar\.width is fixed here'):
        sphere_ar_jax.load(workdir, config={'ar.width': 8})


def test_names_of_classes():
    """Names stand for their numbers, one by one and beside numbers."""
    numbers = {'owl': 3, 'wren': 4}
    assert inputs.labels('owl', numbers.__getitem__) == [3]
    assert inputs.labels(['wren', 7, 'owl'], numbers.__getitem__) == [4, 7, 3]
    assert inputs.labels(np.array(['wren', 'owl']), numbers.__getitem__) == [4, 3]
    column = np.array(['wren', 'owl'], object)  # as a table of pandas has them
    assert inputs.labels(column, numbers.__getitem__) == [4, 3]
    for nothing in ([], (), np.array([], object), np.zeros(0, np.int32)):
        with pytest.raises(UserError, match='there are no labels: give one for each image'):
            inputs.labels(nothing)
    with pytest.raises(UserError, match="'owl' is a name, but this model knows"):
        inputs.labels('owl')
    tree = (np.zeros(3), np.ones(3))  # of a condition with other labels than classes
    assert inputs.labels(tree, is_tree=True) is tree
    chex.assert_trees_all_equal(inputs.labels(tree), list(tree))  # encoded texts, one by one
    assert inputs.labels((4, 'owl'), numbers.__getitem__) == [4, 3]


def test_the_largest_seeds():
    """One for all images and one for each are the same key."""
    for seed in (0, 2**31 - 1, 2**31, 2**32 - 2):
        alone = jax.random.key_data(on_mesh.sampling_key(inputs.seeds(seed, 1)))
        own = jax.vmap(on_mesh.sampling_key)(inputs.seeds([seed], 1))
        np.testing.assert_array_equal(jax.random.key_data(own)[0], alone)
        keys = [autoencoding.reading_keys(inputs.seeds(given, 1), 1) for given in (seed, [seed])]
        np.testing.assert_array_equal(*map(jax.random.key_data, keys))
    for seed in (2**32 - 1, [0, 2**32]):
        with pytest.raises(UserError, match='seed must be a whole number from 0 to 4294967294'):
            inputs.seeds(seed, 2)


def test_pictures_are_cropped_as_for_an_evaluation(tmp_path):
    """Files and images of PIL, in colour or grey; the squares' middle is what arrays hold."""
    rng = np.random.default_rng(0)
    square = rng.integers(0, 256, (16, 16, 3), np.uint8)
    wide = np.pad(square, ((0, 0), (5, 5), (0, 0)))
    Image.fromarray(wide).save(tmp_path / 'a.png')
    expected = pixels.to_float(square[None])
    for given in (
        square,
        tmp_path / 'a.png',
        str(tmp_path / 'a.png'),
        Image.fromarray(wide),
        [tmp_path / 'a.png'],
        expected,
        expected.astype(np.float64),
    ):
        np.testing.assert_allclose(inputs.images(given, (16, 16, 3)), expected, atol=1e-6)
    grey = np.asarray(Image.fromarray(square).convert('L'))[None, ..., None]
    both = inputs.images([tmp_path / 'a.png', Image.fromarray(wide)], (16, 16, 1))
    np.testing.assert_array_equal(both, pixels.to_float(grey.repeat(2, 0)))
    clear = Image.new('RGBA', (16, 16), (0, 0, 0, 0))
    np.testing.assert_array_equal(inputs.images(clear, (16, 16, 3)), 1.0)  # on white
    (tmp_path / 'b.png').write_bytes(b'no image')
    with pytest.raises(UserError, match=r'b\.png: it is no whole image'):
        inputs.images(tmp_path / 'b.png', (16, 16, 3))
    content = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(content, 'JPEG')
    cut = Image.open(io.BytesIO(content.getvalue()[:1000]))
    with pytest.raises(UserError, match=r'cannot be read \(image file is truncated.* a whole one$'):
        inputs.images(cut, (16, 16, 3))
    with pytest.raises(UserError, match='16 × 8 pixels: give arrays'):
        inputs.images(tmp_path / 'a.png', (16, 8, 3))


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match='has no run: train one, or --mode=convert a checkpoint'):
        sphere_ar_jax.load(tmp_path)
    path = GOLDENS / 'tiny.pt'
    with pytest.raises(UserError, match=re.escape(f'--mode=convert --checkpoint={path}')) as error:
        sphere_ar_jax.load(path)
    assert '\n' not in str(error.value)


def test_a_checkpoint_of_hugging_face_is_converted_once(tmp_path, monkeypatch):
    """Each revision has a workdir of its own."""
    calls = []
    fetched = f'{tmp_path}/hub/models--a--b/snapshots/{{}}/x.pt'
    revision = 'r1'

    def convert(source, workdir):
        calls.append((source, workdir))
        pathlib.Path(workdir).mkdir(parents=True)
        pathlib.Path(workdir, 'config.json').write_text('{}')

    monkeypatch.setenv('XDG_CACHE_HOME', f'{tmp_path}/cache')
    monkeypatch.setattr(checkpoints, '_local', lambda source: fetched.format(revision))
    monkeypatch.setattr(checkpoints, 'convert_checkpoint', convert)
    first = checkpoints.converted_once('hf://a/b/x.pt')
    assert checkpoints.converted_once('hf://a/b/x.pt') == first
    assert calls == [(fetched.format('r1'), first)]
    assert first.startswith(f'{tmp_path}/cache/')
    revision = 'r2'
    assert checkpoints.converted_once('hf://a/b/x.pt') not in (first, None)
    assert len(calls) == 2


@pytest.mark.slow
def test_a_checkpoint_of_hugging_face_is_opened(tmp_path, monkeypatch):
    """The file is one of the public code's kind, as the hub's own cache would have it."""
    fetched = tmp_path / 'hub' / 'models--a--b' / 'snapshots' / 'r1' / 'tiny.pt'
    fetched.parent.mkdir(parents=True)
    fetched.write_bytes((GOLDENS / 'tiny.pt').read_bytes())
    monkeypatch.setenv('XDG_CACHE_HOME', f'{tmp_path}/cache')
    monkeypatch.setattr(checkpoints, '_local', lambda source: str(fetched))
    opened = sphere_ar_jax.load('hf://a/b/tiny.pt')
    assert repr(opened) == '<Model: images (64, 64, 3), tokens (16, 8), 10 classes>'
    tensors = torch_sizes.state_dict(torch_file.open_file(GOLDENS / 'tiny.pt'))
    for params in (opened.vae_params, opened._read_ar().ar_params):
        jax.tree.map(np.testing.assert_array_equal, params, torch_names.from_torch(tensors, params))


def _blocks(document):
    """The Python of a document."""
    return re.findall(r'```python\n(.*?)```', (ROOT / document).read_text(), re.S)


def _run_blocks(document, workdir):
    """Runs the Python of a document on a run. Returns what it printed and the names it made."""
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in _blocks(document):
            code = block.replace("'/tmp/digits'", repr(workdir))
            exec(compile(code, document, 'exec'), names)
    return out.getvalue(), names


@libraries_promote()
def test_the_python_of_the_readme(workdir):
    out, names = _run_blocks('README.md', workdir)
    assert names['images'].shape == (6, 16, 16, 1)
    assert out == '(6, 16, 16, 1)\n'


@pytest.mark.slow
@libraries_promote()
@pytest.mark.parametrize('owner', [loading.load, model.Model], ids=lambda owner: owner.__name__)
def test_the_examples_of_docstrings(workdir, owner):
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    for case in finder.find(owner, owner.__name__, globs={}):
        for example in case.examples:
            example.source = example.source.replace("'/tmp/digits'", repr(workdir))
        runner.run(case)
    done = runner.summarize()
    assert done.failed == 0
    assert done.attempted >= 3


@pytest.mark.slow
@libraries_promote()
def test_the_python_of_the_page(workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_images = _run_blocks('docs/python.md', workdir)[1]['images']
    assert np.isfinite(run_images).all()
