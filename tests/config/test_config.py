import importlib.util
import json
import pathlib

import chex
import jax
import numpy as np
import pytest

from sphere_ar_jax.config import build, checks, packaged, recipes, schema
from sphere_ar_jax.data import batches, digits
from sphere_ar_jax.models.conditions import Text
from sphere_ar_jax.models.heads import HEADS
from sphere_ar_jax.models.joint import Joint
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training import stages
from tests.conftest import libraries_promote
from tests.tiny_config import get_config

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def _load(name, argument):
    spec = importlib.util.spec_from_file_location('a_config', CONFIGS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


@pytest.mark.slow
@libraries_promote()
def test_the_digits_are_built_and_traced():
    """Models, sampler and a step of both stages, as shapes: the slow tests run them.

    :smoke has the same models.
    """
    cfg = checks.check(_load('digits', ''))
    smoke = checks.check(_load('digits', 'smoke'))
    assert (cfg.vae, cfg.ar) == (
        smoke.vae,
        smoke.ar,
    )
    assert smoke.ar_training.steps < cfg.ar_training.steps
    # Both stages run on 8 devices.
    assert cfg.tokenizer_training.batch_size % 8 == cfg.ar_training.batch_size % 8 == 0
    vae = build.build_vae(cfg)
    ar = build.build_ar(cfg)
    build.build_sampler(cfg)
    source = digits.Digits('train', cfg.seed, cfg.data.holdout)
    vae_params = jax.eval_shape(vae.init_params, jax.random.key(0))
    for stage in (
        stages.tokenizer_stage(vae, cfg.tokenizer_training),
        stages.ar_stage(ar, vae, vae_params, cfg.ar_training),
    ):
        batch = next(batches.batches(source, batch_size=stage.options.batch_size, seed=0))
        state = jax.eval_shape(stage.init, jax.random.key(0))
        after, scalars = jax.eval_shape(stage.step, state, stage.frozen, batch, cfg.seed)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        chex.assert_shape(list(scalars.values()), ())


def test_the_riemannian_head_of_the_digits():
    """Its word sets head and solver; what geodesics cannot do is refused in one line."""
    cfg = checks.check(_load('digits', 'riemannian'))
    assert isinstance(build.build_ar(cfg).head, HEADS['riemannian'])
    assert build.build_sampler(cfg).options.solver == 'ab2'
    for changes, message in (
        ({'sampling.solver': 'heun'}, 'use euler, ab2, mixing'),
        ({'ar.head': 'flow', 'sampling.solver': 'mixing'}, 'use euler, heun'),
        ({'sampling.solver': 'mixing', 'sampling.noise_scale': 1.5}, 'between 0 and 1'),
        ({'sampling.temperature': 0.9}, 'leave it at 1'),
        ({'vae.posterior': 'gaussian'}, 'use ar.token_space projected'),
        ({'ar.token_space': 'standardised'}, 'use ar.token_space projected'),
    ):
        with pytest.raises(UserError, match=message) as refused:
            checks.check(schema.changed(cfg, changes))
        assert '\n' not in str(refused.value)
    projected = {'vae.posterior': 'gaussian', 'ar.token_space': 'projected'}
    checks.check(schema.changed(cfg, projected))


def test_a_direction_and_a_length_go_together():
    """The token space, its head and posteriors of free length; all else is one line."""
    polar = {
        'vae.posterior': 'gaussian',
        'ar.token_space': 'polar',
        'ar.head': 'direction_magnitude',
    }
    cfg = checks.check(schema.changed(get_config(), polar))
    ar = build.build_ar(cfg)
    assert isinstance(ar.head, HEADS['direction_magnitude'])
    assert ar.latent_dim == ar.head.latent_dim == cfg.vae.latent_dim + 1
    for changes, message in (
        ({'ar.head': 'flow'}, 'ar.head is flow: use direction_magnitude'),
        ({'ar.head': 'riemannian'}, 'use ar.token_space projected'),
        ({'ar.token_space': 'standardised'}, 'ar.token_space is standardised: use polar'),
        ({'vae.posterior': 'vmf'}, 'have all the same: use another posterior, as gaussian'),
        ({'ar.magnitude_weight': 0.0}, 'must be above 0'),
        (
            {
                'init_from': 'a',
                'sampling.solver': 'euler',
                'sampling.guidance': None,
                'sampling.guidance_scale': None,
            },
            'no head can be distilled from ar.head direction_magnitude: take a run',
        ),
    ):
        with pytest.raises(UserError, match=message) as refused:
            checks.check(schema.changed(cfg, changes))
        assert '\n' not in str(refused.value)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'data.brightness': (1.0, 0.2)}, 'two numbers in order between 0 and 1'),
        ({'data.brightness': (0.2, 1.5)}, 'two numbers in order between 0 and 1'),
        ({'data.brightness': (0.2,)}, 'two numbers in order between 0 and 1'),
        ({'data.brightness': ('a', 'b')}, 'two numbers in order between 0 and 1'),
        ({'data.name': 'folder', 'data.brightness': (0.2, 1.0)}, 'is for digits and idx'),
    ],
)
def test_impossible_brightness_is_refused(changes, message):
    with pytest.raises(UserError, match=message) as refused:
        checks.check(schema.changed(get_config(), changes))
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize('name', ['ar_b', 'ar_l', 'ar_h'])
@pytest.mark.parametrize('argument', ['', 'fast'])
def test_the_published_configs(name, argument):
    """Valid, of the published sizes, with the published sampler or the fast one; and read back the
    same.
    """
    cfg = checks.check(_load(name, argument))
    model = build.build_ar(cfg)
    sampler = build.build_sampler(cfg).options
    shapes = jax.eval_shape(model.init_params, jax.random.key(0))
    counts = {'ar_b': 204_499_216, 'ar_l': 476_380_176, 'ar_h': 943_854_096}
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == counts[name]
    evaluations = {'': 101, 'fast': 10}[argument]
    assert sampler.plan(256).evaluations == evaluations
    assert sampler.guidance == 'linear'
    assert cfg.sampling.guidance_scale == (4.6 if name == 'ar_l' else 4.5)
    assert cfg.ar_training.steps == 400 * (1_281_167 // 512)
    again = checks.from_dict(json.loads(cfg.to_json_best_effort()))
    assert not schema.differences(
        json.loads(cfg.to_json_best_effort()), json.loads(again.to_json_best_effort())
    )
    with pytest.raises(ValueError, match='no variant'):
        _load(name, 'huge')


def test_the_published_tokenizer():
    cfg = checks.check(_load('vae', ''))
    shapes = jax.eval_shape(build.build_vae(cfg).init_params, jax.random.key(0))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == 75_393_297
    t = cfg.tokenizer_training
    assert (t.batch_size, t.learning_rate, t.final_learning_rate, t.ema_decay, t.steps) == (
        256,
        1e-4,
        1e-4,
        0,
        500_400,
    )
    with pytest.raises(ValueError, match='no variant'):
        _load('vae', 'fast')


@pytest.mark.parametrize('name', ['vae', 'ar_b', 'ar_l', 'ar_h'])
@libraries_promote()
def test_arguments_of_the_published_configs(name):
    """Batch size, data, precision and resolution; the epochs stay what they were."""
    section, epochs = ('tokenizer_training', 100) if name == 'vae' else ('ar_training', 400)
    cfg = checks.check(_load(name, 'batch=64,data=folder:/some/images,dtype=bfloat16,512'))
    assert (cfg.data.name, cfg.data.path, cfg.dtype) == ('folder', '/some/images', 'bfloat16')
    assert cfg[section].batch_size == 64
    assert cfg[section].steps == epochs * (1_281_167 // 64)
    assert build.build_vae(cfg).image_shape == (512, 512, 3)
    if name != 'vae':
        with pytest.raises(UserError, match='say how many classes'):
            build.build_ar(cfg)
        cfg.data.num_classes = 7
        model = build.build_ar(cfg)
        shapes = jax.eval_shape(model.init_params, jax.random.key(0))
        assert model.num_tokens == 1024
        assert shapes['pos_for_diff'].shape[0] == 1024
        assert shapes['cls_embedding'].shape[0] == 8
    assert checks.check(_load(name, 'data=/a:b/x.tar')).data.path == '/a:b/x.tar'
    assert checks.check(_load(name, 'data=tfds:imagenet2012')).data.name == 'tfds'
    with pytest.raises(ValueError, match=r'^/tmp is a directory: write data=folder:/tmp$'):
        _load(name, 'data=/tmp')
    for wrong in ('huge', 'batch', 'size=3', 'smoke=1'):
        with pytest.raises(ValueError, match='no variant'):
            _load(name, wrong)


@pytest.mark.parametrize('name', ['vae', 'ar_b', 'ar_l', 'ar_h'])
def test_what_slices_of_tpus_want(name):
    """As BUILD_NOTES.md, "The TPU compiler", has it; on other machines, and for a smoke test, a
    mesh of any size.
    """
    plain, tpu, smoke = (
        checks.check(_load(name, argument)) for argument in ('', 'tpu', 'tpu,smoke,dtype=float32')
    )
    assert (plain.dtype, tpu.dtype, smoke.dtype) == ('float32', 'bfloat16', 'float32')
    assert (plain.mesh.fsdp, tpu.mesh.fsdp) == (1, 1 if name == 'vae' else 4)
    assert (plain.ar.remat, tpu.ar.remat) == ((None, True) if name != 'vae' else (False, False))
    assert build.recomputes(plain.ar) == (name != 'vae')
    assert not smoke.ar.remat


@pytest.mark.parametrize('name', ['vae', 'ar_b', 'ar_l', 'ar_h'])
def test_what_gpus_want(name):
    """Bfloat16, and the sampler's own kernels, as docs/speed.md has it."""
    plain, gpu = (checks.check(_load(name, argument)) for argument in ('', 'gpu'))
    assert (plain.dtype, gpu.dtype) == ('float32', 'bfloat16')
    assert not plain.ar.fused
    assert gpu.ar.fused == (name != 'vae')
    assert build.build_head(gpu).fused == gpu.ar.fused


@pytest.mark.parametrize('name', ['vae', 'ar_b', 'ar_l', 'ar_h'])
def test_smoke_is_small(name):
    """20 steps; less than 10 GB of parameters, gradients, moments and EMA, for a laptop."""
    cfg = checks.check(_load(name, 'smoke'))
    section = cfg.tokenizer_training if name == 'vae' else cfg.ar_training
    assert section.steps == 20
    assert section.batch_size == 8
    model = build.build_vae(cfg) if name == 'vae' else build.build_ar(cfg)
    shapes = jax.eval_shape(model.init_params, jax.random.key(0))
    assert sum(4 * int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) * 5 < 10e9
    assert _load('vae', 'smoke').vae == _load(name, 'smoke').vae  # so that one tokenizer serves all


def test_variants_of_the_digits():
    """The fast sampler makes 10 evaluations.

    The distilled head wants to be told of its teacher, and then is built.
    """
    assert (
        build.build_sampler(checks.check(_load('digits', 'fast'))).options.plan(16).evaluations
        == 10
    )
    cfg = _load('digits', 'distilled')
    with pytest.raises(UserError, match='give --config'):
        checks.check(cfg)
    cfg.init_from = '/somewhere'
    assert isinstance(build.build_ar(checks.check(cfg)).head, HEADS['mean_velocity'])
    assert build.build_sampler(cfg).options.plan(16).evaluations == 2
    for name, arg in (
        ('digits', 'fast,distilled'),
        ('digits', 'smoke,distilled'),
        ('fashion', 'distilled'),
        ('fashion', 'fast,distilled,smoke'),
    ):
        other = _load(name, arg)
        other.init_from = '/somewhere'
        other = checks.check(other)
        assert build.build_sampler(other).options.plan(16).evaluations == 2
        assert (other.distillation_training.steps < 100) == ('smoke' in arg)
    geodesic = _load('digits', 'riemannian,distilled')
    geodesic.init_from = '/somewhere'
    head = build.build_ar(checks.check(geodesic)).head
    assert isinstance(head.teacher(), HEADS['riemannian'])
    geodesic.ar.head = 'flow'
    with pytest.raises(UserError, match='is flow: use mean_velocity'):
        checks.check(geodesic)
    cfg.ar.head = 'riemannian'
    with pytest.raises(UserError, match='is riemannian: use geodesic_mean_velocity'):
        checks.check(cfg)
    cfg.ar.head = 'flow'
    joint = {'ar.condition': 'text', 'ar.text_weight': 0.1, 'data.captions': 'beside'}
    three_equal = {
        'distillation_training.teacher_steps': 3,
        'distillation_training.teacher_shift': 1.0,
    }
    for wrong, message in (
        ({'sampling.num_steps': 3}, r'num_steps is 3, .* of \(1, 2\)'),
        ({'sampling.shift': 1.5}, 'shift is 1.5, .* set it to None'),
        (three_equal, 't = 0.5, but 3 steps have none; change'),
        ({'distillation_training.teacher_steps': 8}, 't = 0.5, but 8 .* shift 1.5 have none'),
        ({'distillation_training.teacher_shift': 0.0}, 'must be above 0'),
        ({'distillation_training.levels': (1, 2.5)}, 'must be numbers of steps'),
        ({'distillation_training.teacher_steps': 0}, 'at least 1'),
        ({'sampling.solver': 'ab2'}, 'plain steps'),
        ({'distillation_training.transformer': True, **joint}, 'forget to write texts: give'),
    ):  # fmt: skip
        changed = cfg.copy_and_resolve_references()
        changed.update_from_flattened_dict(wrong)
        with pytest.raises(UserError, match=message):
            checks.check(changed)


@pytest.mark.parametrize('arg', ['', 'smoke', 'fast,data=idx:/elsewhere'])
def test_the_config_of_fashion(arg):
    """8×8 tokens of 32×32 grey pixels; the words are joined as those of the published configs."""
    cfg = checks.check(_load('fashion', arg))
    assert build.build_vae(cfg).image_shape == (32, 32, 1)
    assert tuple(cfg.vae.grid) == (8, 8)
    assert cfg.data.name == 'idx'
    assert cfg.vae.latent_dim in (8, 16)
    assert (cfg.data.path == '/elsewhere') == ('elsewhere' in arg)
    assert cfg.sampling.solver == 'ab2'
    assert cfg.vae.backbone == 'vit'
    assert cfg.sampling.num_steps == (10 if arg else 20)
    with pytest.raises(ValueError, match="no variant 'huge'"):
        _load('fashion', 'huge')
    for values, message in (
        ({'vae.image_channels': 3}, 'data idx is grey: set it to 1'),
        ({'vae.grid': (8, 4)}, 'give two equal sizes'),
    ):
        with pytest.raises(UserError, match=message):
            checks.check(schema.changed(cfg, values))


@pytest.mark.parametrize('arg', ['', 'smoke', 'joint', 'joint,smoke'])
def test_the_config_of_composed_digits(arg):
    cfg = checks.check(_load('composed', arg))
    ar = build.build_ar(cfg)
    assert isinstance(ar, Joint) == ('joint' in arg)
    if isinstance(ar, Joint):
        assert (ar.text_weight, ar.alone_weight) == (0.05, 0.0)
    assert ar.condition == Text(vocabulary_size=32, length=10, width=128, heads=4)
    assert build.build_vae(cfg).image_shape == (32, 32, 1)
    with pytest.raises(ValueError, match="no variant 'huge'"):
        _load('composed', 'huge')


def test_composed_digits_are_scored_for_three_kinds_of_captions():
    cfg = _load('composed', 'smoke')
    cfg.sampling.num_images = 2
    with pytest.raises(UserError, match='must be at least one for each of three kinds of captions'):
        checks.check(cfg)


def test_a_class_of_its_own_needs_images_for_precision_and_recall():
    cfg = _load('digits', 'smoke')
    cfg.data.classes = (3,)
    cfg.data.num_classes = 1
    cfg.sampling.num_images = 4
    checks.check(cfg)
    cfg.sampling.num_images = 3
    with pytest.raises(UserError, match='num_images is 3, but must be at least 4'):
        checks.check(cfg)


def test_configs_are_all_tested_here():
    assert {path.stem for path in CONFIGS.glob('*.py')} == {
        'digits',
        'fashion',
        'composed',
        'emoji',  # in test_emoji.py
        'own',  # in test_own.py
        'vae',
        'ar_b',
        'ar_l',
        'ar_h',
    }


def test_default_is_the_published_model():
    """Sizes, optimizers and loss weights; steps, data and sampling are for a config file to set."""
    cfg = schema.default()

    def count(model):
        return sum(
            int(np.prod(leaf.shape))
            for leaf in jax.tree.leaves(jax.eval_shape(model.init_params, jax.random.key(0)))
        )

    assert count(build.build_vae(cfg)) == 75_393_297
    t = cfg.ar_training
    assert (t.batch_size, t.learning_rate, t.final_learning_rate, t.warmup_steps) == (
        512,
        3e-4,
        1e-5,
        20_000,
    )
    assert (t.ema_decay, t.weight_decay, t.b1, t.b2, t.clip_norm) == (0.9999, 0.05, 0.9, 0.95, 1.0)
    assert (t.copies, t.label_dropout) == (4, 0.1)
    t = cfg.tokenizer_training
    assert (t.batch_size, t.learning_rate, t.final_learning_rate, t.kl_weight) == (
        256,
        1e-4,
        1e-4,
        0.004,
    )


def test_unknown_keys_and_wrong_types_are_refused():
    cfg = schema.default()
    with pytest.raises(AttributeError, match='width'):
        cfg.ar.widht = 3
    with pytest.raises(TypeError):
        cfg.ar.width = 'wide'


def test_an_old_config_with_an_empty_text_or_broken_epochs_is_read():
    """An empty text meant the same as none. On the command line it is refused now."""
    cfg = get_config()
    values = json.loads(cfg.to_json_best_effort())
    values['data'] |= {'data_dir': '', 'crop_until': [0.5, 1.5]}
    again = checks.from_dict(values)
    assert again.data.data_dir is None
    assert again.data.crop_until == (0.5, 1.5)


WRONG = [
    ('ar.heads', 3, '3 heads do not divide the width 16'),
    ('ar.width', 12, 'must be a multiple of 4'),
    ('ar.head_groups', 3, 'ar.head flow: 3 adaLN groups do not divide the 2 blocks'),
    ('ar.class_tokens', 0, 'ar.class_tokens is 0'),
    ('vae.heads', 3, '3 heads do not divide'),
    ('vae.grid', (8, 8), r'vae makes images of \(32, 32, 1\)'),
    ('vae.channels', (4, 'x', 16), 'whole numbers'),
    ('vae.stem', 3, 'cannot be normalised'),
    ('vae.latent_dim', 1, 'must be at least 2'),
    ('dtype', 'float8', 'float32, bfloat16'),
    ('data.name', 'imagenett', 'one of digits, idx, imagenet'),
    ('data.max_broken', 0.0, r'lie in .0, 1.'),
    ('data.workers', -1, 'at least 0'),
    ('data.num_classes', -3, 'at least 0'),
    ('data.crop_until', ('a', 'b'), 'two epochs in order'),
    ('data.crop_until', (375, 350), 'two epochs in order'),
    ('tokenizer_training.discriminator', 'biggan', 'patchgan, stylegan'),
    ('tokenizer_training.disc_loss', 'wasserstein', 'hinge, vanilla'),
    ('tokenizer_training.disc_weight', -1.0, 'not be negative'),
    ('tokenizer_training.perceptual_weight', 1.0, 'LPIPS is for 3 channels, not 1'),
    ('tokenizer_training.disc_weight', 0.5, 'at least 24×24 pixels, not 16×16; set it to 0'),
    ('tokenizer_training.accumulate', 3, 'must divide the batch size 16'),
    ('ar_training.more_ema_decays', (0.9, 1), 'between 0 and 1'),
    ('tokenizer_training.ema_ramp', True, 'no average to ramp up; give an ema_decay'),
    ('ar_training.restarts', (5,), 'further apart than the warm-up of 2'),
    ('ar_training.restarts', (9,), 'ascending steps below 6'),
    ('ar_training.restarts', ('5',), 'ascending steps below 6'),
    ('ar_training.encoder_dtype', 'float16', 'use float32, bfloat16'),
    ('sampling.ema_decay', 0.5, r'ar_training keeps \[0.9\]'),
    ('watch.every', -1, 'not be negative'),
    ('watch.fid_images', 100, 'needs watch.inception'),
    ('data.classifier_steps', 0, 'at least 1'),
    ('data.enlarge', 0, 'at least 1'),
    ('data.enlarge', 2, r'makes images of \(16, 16, 1\) .* digits has \(32, 32, 1\)'),
    ('data.holdout', 1.0, r'between 0\.01 and 0\.9'),
    ('data.holdout_files', 0.1, 'data digits has a held-out part of its own'),
    ('data.holdout_files', 1.0, r'between 0 and 0\.9'),
    ('seed', -1, 'seed is -1'),
    ('tokenizer_training.kl_weight', -1.0, 'not be negative'),
    ('tokenizer_training.steps', -1, 'at least 0'),
    ('ar_training.steps', -1, 'at least 0'),
    ('distillation_training.steps', 0, 'at least 1'),
    ('tokenizer_training.learning_rate', -1.0, 'above 0'),
    ('ar_training.ema_decay', 1.0, r'\[0, 1\)'),
    ('ar_training.warmup_steps', 7, 'more than its 6 steps'),
    ('ar_training.label_dropout', 1.5, r'\[0, 1\)'),
    ('ar_training.label_dropout', 0.0, 'null class'),
    ('ar_training.copies', 0, 'at least 1'),
    ('sampling.solver', 'midpoint', 'euler, heun'),
    ('sampling.guidance', 'cosine', 'linear or constant'),
    ('sampling.guidance_scale', None, 'guidance_scale'),
    ('sampling.last_step', 2.0, 'between 0 and 1'),
    ('sampling.temperature', -1.0, 'negative'),
    ('sampling.num_images', 9, 'one for each of 10 classes'),
]


def test_a_data_set_without_its_kind_is_advised(tmp_path, monkeypatch):
    assert recipes.data_set('folder:~/a') == ('folder', '~/a')
    assert recipes.data_set('digits') == ('digits', '')
    assert recipes.data_set('/no/such.tar') == ('imagenet', '/no/such.tar')
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'birds').mkdir()
    for text in (str(tmp_path / 'birds'), '~/birds'):
        with pytest.raises(UserError, match=f'^{text} is a directory: write data=folder:{text}$'):
            recipes.data_set(text)
    (tmp_path / 'birds' / 't10k-images-idx3-ubyte.gz').write_text('')
    with pytest.raises(UserError, match='write data=idx:~/birds'):
        recipes.data_set('~/birds')
    (tmp_path / 'birds' / 'images.json').write_text('')
    with pytest.raises(UserError, match='write data=array_records:~/birds'):
        recipes.data_set('~/birds')
    with pytest.raises(UserError, match=r"no kind of data 'foldr': .* array_records, tfds, hf"):
        recipes.data_set('foldr:/data/birds')
    for text, message in (
        ('folder:', 'data=folder: names no place: write data=folder:PATH'),
        ('', 'data= names no place: write data=KIND:PATH'),
        ('digits:/tmp', 'data digits has no path: write data=digits'),
    ):
        with pytest.raises(UserError, match=f'^{message}$'):
            recipes.data_set(text)


def test_packaged_configs_do_not_depend_on_the_directory(tmp_path, monkeypatch):
    """A workdir may have the name of a config; a file of that name is a config of the user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'digits').mkdir()
    assert packaged.find('digits:smoke').endswith('/configs/digits.py:smoke')
    assert packaged.load('digits').data.name == 'digits'
    (tmp_path / 'fashion').write_text('')
    assert packaged.find('fashion') == 'fashion'
    monkeypatch.setenv('HOME', '/home/me')
    assert packaged.find('~/my.py:word') == '/home/me/my.py:word'
    assert packaged.load('fashion').data.name == 'idx'
    with pytest.raises(FileNotFoundError, match='there is no packaged config nothing'):
        packaged.load('nothing')


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'vae.image_channels': 4}, 'vae.image_channels is 4, but must be 3 for colour or 1 for'),
        (
            {'watch.fid_images': 9, 'watch.inception': 'a', 'watch.reference': 'b'},
            'watch.fid_images: FID is for 3 channels, not 1; set it to 0',
        ),
        ({'data.enlarge': 2}, 'data.enlarge is for digits and idx'),
        ({'vae.grid': (4, 8)}, r'makes images of 16 × 32 pixels .* give two equal sizes'),
    ],
)
def test_images_of_files_are_square_and_grey_or_in_colour(values, message):
    cfg = get_config()
    cfg.data.update(name='folder', path='/images')
    checks.check(cfg)  # grey
    checks.check(schema.changed(cfg, {'vae.image_channels': 3}))
    with pytest.raises(UserError, match=message):
        checks.check(schema.changed(cfg, values))


def test_the_samplers_own_kernels_take_whole_heads():
    cfg = get_config()
    cfg.ar.fused = True
    checks.check(cfg)
    cfg.mesh.tensor = 2
    with pytest.raises(UserError, match=r'ar\.fused: its kernels take whole heads'):
        checks.check(cfg)


def test_a_learning_rate_does_not_rise_to_its_end():
    """A run that was trained so is opened all the same."""
    values = {'ar_training.learning_rate': 1e-4, 'ar_training.final_learning_rate': 2e-4}
    cfg = checks.check(schema.changed(get_config(), values))
    with pytest.raises(UserError, match=r'final_learning_rate is 0\.0002, above its learning_rate'):
        checks.check_training(cfg)
    checks.check_training(schema.changed(cfg, {'ar_training.steps': 0}))


def test_each_number_has_one_rule():
    """The rules name keys that there are. Other numbers have none, or are checked elsewhere."""
    values = schema.leaves(schema.default().to_dict())
    trainings = ('tokenizer_training', 'ar_training', 'distillation_training')
    with_rule = []
    for rule in checks._NUMBERS:
        for key in rule.keys:
            name = key.removeprefix('*.')
            found = [f'{training}.{name}' for training in trainings] if name != key else [key]
            assert set(found) <= set(values), key
            with_rule += found
    assert len(with_rule) == len(set(with_rule))
    numbers = {key for key, value in values.items() if type(value) in (int, float)}
    assert numbers - set(with_rule) == {
        'distillation_training.guidance_scale',
        'fine_tuning.lora_rank',
        'mesh.data',
        'mesh.fsdp',
        'mesh.tensor',
        'sampling.num_images',
        'sampling.num_steps',
    }


@pytest.mark.parametrize(('key', 'value', 'message'), WRONG)
def test_impossible_values_are_one_line(key, value, message):
    cfg = get_config()
    checks.check(cfg)
    with cfg.ignore_type():
        cfg.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message) as caught:
        checks.check(cfg)
    assert '\n' not in str(caught.value)


def test_euler_takes_no_last_step():
    cfg = get_config()
    cfg.sampling.update(solver='euler', last_step=0.1)
    with pytest.raises(UserError, match='only for the solver euler_maruyama'):
        checks.check(cfg)


def test_json_round_trip():
    cfg = get_config()
    again = checks.from_dict(json.loads(cfg.to_json_best_effort()))
    assert again.to_dict() == cfg.to_dict()
    assert build.build_vae(again) == build.build_vae(cfg)


def test_differences():
    old = get_config()
    new = get_config()
    new.ar.width = 32
    new.sampling.num_steps = 7
    new.ar_training.log_every = 1
    new.ar.unroll = 4
    assert schema.differences(old.to_dict(), new.to_dict()) == ['ar.width 16 → 32']


def test_what_the_trainings_amount_to():
    """Epochs by hand, and the share that an average keeps of its start: 0.9999⁸⁰⁰ = 92%."""
    cfg = get_config()
    cfg.data.update(name='folder', path='/images')
    cfg.ar_training.update(steps=800, batch_size=32, ema_decay=0.9999)
    cfg.tokenizer_training.update(steps=10, batch_size=32)
    tokenizer, ar, share = checks.advice(cfg, 64)
    assert tokenizer.startswith('tokenizer_training: 10 steps of 32 images are 5.0 epochs; crops')
    assert 'are 400.0 epochs; crops are random up to epoch 350, and all central from 375' in ar
    assert share == (
        'ar_training: after 800 steps the average of rate 0.9999 is still 92% initialisation: '
        'lower --config.ar_training.ema_decay, give --config.ar_training.ema_ramp=True, '
        'or sample the weights themselves by --config.sampling.ema_decay=0'
    )
    cfg.ar_training.ema_ramp = True
    assert len(checks.advice(cfg, 64)) == 2
    # 0.1 · 2/11 · 3/12, which is 1/C(12, 9).
    assert np.isclose(checks.share_of_start(0.9999, 3, ramp=True), 1 / 220)
    assert np.isclose(checks.share_of_start(0.15, 3, ramp=True), 0.1 * 0.15 * 0.15)
    assert 'configs/own.py' not in ar
    _, many = checks.advice(cfg, 12)
    assert many.endswith('; configs/own.py derives shorter trainings from the number of images')
    cfg.ar_training.update(ema_decay=0.99, ema_ramp=False)
    cfg.tokenizer = '/trained'
    assert len(checks.advice(cfg, 64)) == 1


def test_numbers_must_be_finite():
    """Wherever a number may stand, in tuples too."""
    for key in (
        'sampling.temperature',
        'ar_training.learning_rate',
        'tokenizer_training.kl_weight',
    ):
        for value in (float('nan'), float('inf'), -float('inf')):
            cfg = get_config()
            cfg.update_from_flattened_dict({key: value})
            with pytest.raises(UserError, match=f'{key} is'):
                checks.check(cfg)
    cfg = get_config()
    cfg.sampling.guidance_interval = (0.0, float('nan'))
    with pytest.raises(UserError, match=r'guidance_interval is .* but must be finite'):
        checks.check(cfg)


def test_data_that_would_not_be_read_are_no_training():
    """An old run with such keys is opened all the same."""
    digits = _load('digits', '')
    folder = schema.changed(packaged.load('ar_b'), {'data.name': 'folder', 'data.path': '/images'})
    for cfg, changes, message in (
        (folder, {'data.split': 'val'}, 'data.split and data.data_dir are for tfds and hf'),
        (folder, {'data.data_dir': '/x'}, 'of data folder name the files or the directory'),
        (digits, {'data.path': '/x'}, 'data.path is /x, but data digits has no path: leave it out'),
    ):
        checks.check_training(cfg)
        changed = checks.check(schema.changed(cfg, changes))
        with pytest.raises(UserError, match=message):
            checks.check_training(changed)
    watched = {'watch.fid_images': 1, 'watch.inception': '/i', 'watch.reference': '/r'}
    with pytest.raises(UserError, match='fid_images is 1, but FID needs at least 2 images'):
        checks.check(schema.changed(folder, watched))
