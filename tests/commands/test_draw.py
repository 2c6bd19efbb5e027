"""What --mode does, through the command line's own door, mostly within this process."""

import functools
import hashlib
import http.server
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import flagsaver
from PIL import Image

import sphere_ar_jax
from sphere_ar_jax import main
from sphere_ar_jax.commands import checkpoints, evaluate, open_run, train
from sphere_ar_jax.commands import draw as commands_draw
from sphere_ar_jax.config import build, schema
from sphere_ar_jax.data import batches, digits, pixels
from sphere_ar_jax.data.shifted import corruptions
from sphere_ar_jax.evaluation import pictures, tokenizer
from sphere_ar_jax.evaluation.fidelity import inception_weights, protocol
from sphere_ar_jax.flow import plan
from sphere_ar_jax.interop import torch_file, torch_names, torch_sizes
from sphere_ar_jax.models import vae
from sphere_ar_jax.runtime import checkpoint, console, metric_writer, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling import autoencoding, generation, on_mesh
from sphere_ar_jax.sampling.tokens import sample_tokens
from sphere_ar_jax.training import losses, stages
from sphere_ar_jax.training.run import load_config, load_run
from tests import tiny_config
from tests import torch_writer as w
from tests.conftest import GOLDENS, libraries_promote

ROOT = pathlib.Path(__file__).parents[2]
CLASSES = 12  # of the tuned model: two more than the digits


def _main(*arguments):
    """The command line in this process, as `app.run` would call it."""
    with flagsaver.flagsaver():
        rest = main._guarded(main._parse_flags)(['main', *map(str, arguments)])
        main._guarded(main.main)(rest)


def _refused(capsys, *arguments):
    """The one line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        _main(*arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert end.value.code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith('error: '), lines
    return lines[0].removeprefix('error: ')


def _checkpoint(path, tensors):
    """Writes {name: float32 array} as `torch.save({'model': …})` would."""
    value = {n: w.tensor(w.storage(n, t.size, 'Float'), t.shape) for n, t in tensors.items()}
    storages = {n: np.ascontiguousarray(t, np.float32).tobytes() for n, t in tensors.items()}
    path.write_bytes(w.zip_file(w.dictionary({'model': w.dictionary(value)}), storages))


def _processes(code, *arguments):
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    command = [
        sys.executable,
        '-c',
        'import sys; sys.modules["torch"] = None\n' + code,
        *map(str, arguments),
    ]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


# ---- convert and export

_KILLED = """
import os
import signal
from sphere_ar_jax.commands import checkpoints
from sphere_ar_jax.interop import torch_names
whole = torch_names.from_torch
def broken(tensors, shapes, progress):
    if 'proj_in' in shapes:  # the AR model; the tokenizer's weights are there
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(tensors, shapes, progress)
torch_names.from_torch = broken
checkpoints.convert_checkpoint(sys.argv[1], sys.argv[2], heads=2)
"""
_MAIN = 'import runpy; runpy.run_module("sphere_ar_jax.main", run_name="__main__")'


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
    """Workdir of the golden checkpoint's `model`."""
    workdir = tmp_path_factory.mktemp('converted') / 'w'
    checkpoints.convert_checkpoint(str(GOLDENS / 'tiny.pt'), str(workdir), ema=False, heads=2)
    return workdir


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_run_and_can_be_repeated(tmp_path, capsys):
    """In processes without PyTorch; what is read back are the EMA weights, bit for bit."""
    workdir = tmp_path / 'w'
    killed = _processes(_KILLED, GOLDENS / 'tiny.pt', workdir)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (workdir / 'tokenizer' / 'weights').is_dir()
    assert not (workdir / 'config.json').exists()
    for mode in (['sample'], ['export'], ['grid', '--classes=1'], ['evaluate']):
        line = _refused(capsys, f'--workdir={workdir}', f'--mode={mode[0]}', *mode[1:])
        assert line == f'{workdir} has no run: train one, or --mode=convert a checkpoint'
    line = _refused(capsys, f'--workdir={workdir}', '--config=tests/tiny_config.py')
    assert line == f'a conversion into {workdir} broke off: repeat it, or use another --workdir'

    arguments = (
        '--mode=convert',
        f'--checkpoint={GOLDENS}/tiny.pt',
        f'--workdir={workdir}',
        '--heads=2',
    )
    again = _processes(_MAIN, *arguments)
    assert again.returncode == 0, again.stderr
    assert '(ema), grid 4x4' in again.stdout
    run = load_run(str(workdir))
    tensors = torch_sizes.state_dict(torch_file.open_file(GOLDENS / 'tiny.pt'))
    for params in (run.vae_params, run.ar_params):
        jax.tree.map(np.testing.assert_array_equal, params, torch_names.from_torch(tensors, params))
    assert (run.ar.condition.num_classes, run.ar.heads, run.vae.grid) == (10, 2, (4, 4))


@pytest.mark.slow
def test_the_converted_model_is_the_golden_one(converted, golden, tiny_vae, tiny_ar):
    run = load_run(str(converted))
    assert run.vae == tiny_vae[0]
    # The recipe recomputes blocks; what is stored does not.
    stored = run.ar.clone(remat=False, head=run.ar.head.clone(remat=False))
    assert stored == tiny_ar[0]
    for params, expected in ((run.vae_params, tiny_vae[1]), (run.ar_params, tiny_ar[1])):
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    tokens = golden['sample/cfg1/tokens']
    decode = jax.jit(lambda params, z: run.vae.apply({'params': params}, z, method='decode'))
    np.testing.assert_allclose(
        decode(run.vae_params, tokens), golden['sample/cfg1/images'], rtol=1e-4, atol=1e-4
    )
    noise = golden['sample/cfg1/noise_token0'], golden['sample/cfg1/noise']
    options = plan.Options(num_steps=5, guidance=None)
    drawn = jax.jit(
        lambda p: sample_tokens(run.ar, p, golden['class_id'], None, options, noise=noise)
    )
    np.testing.assert_allclose(drawn(run.ar_params), tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_export_is_what_was_converted(converted, torch_tensors, capsys):
    _main('--mode=export', f'--workdir={converted}', f'--output={converted}/sub/a.safetensors')
    written = safetensors.numpy.load_file(converted / 'sub' / 'a.safetensors')
    assert set(written) == set(torch_tensors)
    for name, tensor in written.items():
        close = dict(atol=1e-6) if 'freqs_cis' in name else dict(rtol=0, atol=0)
        np.testing.assert_allclose(
            tensor, np.asarray(torch_tensors[name], np.float32), **close, err_msg=name
        )
    assert os.listdir(converted / 'sub') == ['a.safetensors']


def test_what_convert_refuses(converted, tmp_path, capsys):
    arguments = '--mode=convert', f'--workdir={tmp_path}/w'
    golden = f'--checkpoint={GOLDENS}/tiny.pt'
    (tmp_path / 'text.pt').write_text('no checkpoint')
    _checkpoint(tmp_path / 'other.pt', {'weight': np.zeros((2, 2))})
    for more, message in (
        ([], 'give --checkpoint=FILE.pt or hf://OWNER/REPOSITORY/FILE'),
        ([f'--checkpoint={tmp_path}/none.pt'], 'there is no file'),
        ([f'--checkpoint={tmp_path}/text.pt'], 'text.pt'),
        (
            [f'--checkpoint={tmp_path}/other.pt'],
            'the checkpoint is no SphereAR model: it has no tensor vae.',
        ),
        (['--checkpoint=hf://owner'], 'hf://owner must be hf://OWNER/REPOSITORY/FILE'),
        ([golden, '--heads=3'], 'the number of heads is not 3'),
        (
            [golden, '--heads=2', '--config=tests/tiny_config.py'],
            'holds another model than --config (vae.image_channels 1 → 3; vae.stem 4 → 64',
        ),
        ([golden, '--labels=uniform'], '--labels is for --mode=sample or pack, not for convert'),
    ):
        assert message in _refused(capsys, *arguments, *more)
        assert not (tmp_path / 'w' / 'config.json').exists()
    line = _refused(capsys, '--mode=convert', f'--workdir={converted}', golden, '--heads=2')
    assert line == f'{converted} has a run already: use another --workdir'
    assert 'Not a directory' in _refused(
        capsys, '--mode=convert', '--workdir=/dev/null/x', golden, '--heads=2'
    )


class _Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks for of the file tiny.pt in guolinke/SphereAR.

    All else is not found.
    """

    def do_HEAD(self):
        content = (GOLDENS / 'tiny.pt').read_bytes()
        found = self.path == '/guolinke/SphereAR/resolve/main/tiny.pt'
        self.send_response(200 if found else 404)
        self.send_header('Content-Length', str(len(content) if found else 0))
        self.send_header('ETag', f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header('X-Repo-Commit', 'a' * 40)
        if not found:
            self.send_header('X-Error-Code', 'EntryNotFound')
        self.end_headers()
        return content if found else b''

    def do_GET(self):
        self.wfile.write(self.do_HEAD())

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_checkpoint_from_the_hub(converted, tmp_path):
    """Fetched by Hugging Face's own client from a server of this machine.

    A file that is not there is named.
    """
    pytest.importorskip('huggingface_hub')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {
        'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'HF_HOME': str(tmp_path / 'hub'),
        'HF_HUB_OFFLINE': '0', 'PYTHONPATH': str(ROOT),
    }  # fmt: skip
    for name in ('no_proxy', 'NO_PROXY'):
        env[name] = '127.0.0.1'

    def convert(file):
        source = f'hf://guolinke/SphereAR/{file}'
        command = [
            sys.executable,
            '-m',
            'sphere_ar_jax.main',
            '--mode=convert',
            f'--checkpoint={source}',
        ]
        command += [f'--workdir={tmp_path / file}', '--no-ema', '--heads=2']
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    done = convert('tiny.pt')
    assert done.returncode == 0, done.stderr
    chex.assert_trees_all_equal(
        *(load_run(str(path)).ar_params for path in (tmp_path / 'tiny.pt', converted))
    )
    missing = convert('other.pt')
    server.shutdown()
    assert missing.returncode == 2
    assert missing.stderr.startswith('error: hf://guolinke/SphereAR/other.pt: ')
    assert '404' in missing.stderr
    assert len(missing.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_tokenizer_alone(torch_tensors, converted, tmp_path, capsys):
    """It converts, is scored and exported; there is nothing to sample."""
    tensors = {n: np.asarray(t) for n, t in torch_tensors.items() if n.startswith('vae.')}
    _checkpoint(tmp_path / 'vae.pt', tensors)
    workdir = tmp_path / 'w'
    # A broken conversion of a whole model leaves this.
    shutil.copytree(converted / 'ar', workdir / 'ar')
    _main('--mode=convert', f'--checkpoint={tmp_path}/vae.pt', f'--workdir={workdir}')
    assert 'a tokenizer, ' in capsys.readouterr().out
    assert not (workdir / 'ar' / 'weights').exists()
    run = load_run(str(workdir), tokenizer_only=True)
    jax.tree.map(
        np.testing.assert_array_equal,
        run.vae_params,
        torch_names.from_torch(tensors, run.vae_params),
    )
    assert 'has no checkpoint of the stage ar yet' in _refused(
        capsys, '--mode=sample', f'--workdir={workdir}'
    )

    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    np.savez(tmp_path / 'real.npz', arr_0=images)
    _main('--mode=evaluate', f'--workdir={workdir}', f'--images={tmp_path}/real.npz')
    written = json.loads((workdir / 'evaluation.json').read_text())
    expected = tokenizer.score_tokenizer(run, [images[:2], images[2:]])
    assert written['tokenizer'].pop('parameters') == generation.parameters_crc(run)
    assert written['tokenizer'].pop('dtype') == run.config.dtype
    assert set(written) == {'tokenizer'}
    assert written['tokenizer'] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    with pytest.raises(UserError, match="no path to torchvision's vgg16"):
        evaluate.evaluate(str(workdir), images=f'{tmp_path}/real.npz', lpips=f'{tmp_path}/vae.pt')
    real = images.astype(np.float32) / 127.5 - 1
    key = jax.random.key(0)
    decoded, found = autoencoding.reconstruct(
        run.vae, run.vae_params, real, key, 3, sharding.make_mesh()
    )
    scores = written['tokenizer']
    np.testing.assert_allclose(
        [scores['psnr'], scores['kl'], scores['kappa']],
        [tokenizer.psnr(decoded, real), found['kl'], found['kappa']],
        rtol=1e-5,
    )
    rounded = np.clip(127.5 * decoded + 128, 0, 255).astype(np.uint8).astype(np.float64)
    mse = ((rounded - images) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(
        scores['image_psnr'], np.mean(10 * np.log10(255**2 / mse)), rtol=1e-4
    )
    assert -1 < scores['ssim'] < 1

    np.savez(tmp_path / 'small.npz', arr_0=images[:, :32])
    line = _refused(
        capsys, '--mode=evaluate', f'--workdir={workdir}', f'--images={tmp_path}/small.npz'
    )
    assert line == 'images of (32, 64, 3), but the tokenizer takes (64, 64, 3)'


# ---- fine-tuning, then everything of a digits run


def _tuning(**options):
    cfg = tiny_config.get_config()
    cfg.data.num_classes = CLASSES
    cfg.tokenizer_training.update(steps=0, warmup_steps=0)
    cfg.ar_training.update(log_every=1)
    cfg.update_from_flattened_dict(options)
    return cfg


@pytest.fixture(scope='module')
def digits_run(tmp_path_factory):
    """Workdir of a digits model that was converted from a file."""
    workdir = tmp_path_factory.mktemp('digits') / 'w'
    first = tiny_config.random_run()
    params = tiny_config.random_params(build.build_ar(_tuning()), seed=7)
    torch_names.export(f'{workdir}.safetensors', first.vae, first.vae_params, params)
    _checkpoint(
        pathlib.Path(f'{workdir}.pt'), safetensors.numpy.load_file(f'{workdir}.safetensors')
    )
    checkpoints.convert_checkpoint(f'{workdir}.pt', str(workdir), heads=2)
    jax.tree.map(np.testing.assert_array_equal, load_run(str(workdir)).ar_params, params)
    return workdir


@pytest.fixture(scope='module')
def tuned(digits_run, tmp_path_factory):
    """(workdir of that model, trained on; the model as it was converted; metrics)."""
    workdir = tmp_path_factory.mktemp('tuned') / 'w'
    shutil.copytree(digits_run, workdir)
    settings = (workdir / 'config.json').read_text()
    for wrong, message in (
        ({'data.num_classes': 10}, 'data.num_classes 12 → 10'),
        ({'ar.width': 32}, 'ar.width 16 → 32'),
    ):
        with pytest.raises(console.UserError, match=message):
            train.train(_tuning(**wrong), str(workdir), '', time.perf_counter())
        assert (workdir / 'config.json').read_text() == settings
    with libraries_promote():
        metrics = train.train(_tuning(), str(workdir), 'the command', time.perf_counter())
    return workdir, load_run(str(digits_run)), metrics


@pytest.mark.slow
def test_training_goes_on_from_converted_weights(tuned):
    workdir, before, _ = tuned
    cfg = _tuning()
    lines = metric_writer.read_scalars(f'{workdir}/ar/metrics.jsonl')
    assert [line['step'] for line in lines] == [1, 2, 3, 4, 5, 6]
    stage = stages.ar_stage(before.ar, before.vae, before.vae_params, cfg.ar_training)
    batch = next(
        batches.batches(
            digits.Digits('train', cfg.seed, cfg.data.holdout), batch_size=16, seed=cfg.seed
        )
    )
    keys = losses.sample_keys(jax.random.key(cfg.seed), 0, 16)
    posterior, flows, drops = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)

    @jax.jit
    def loss(ar_params, vae_params, image, label):
        z, _ = vae.draw_latents(before.vae, vae_params, image, posterior)
        draws = before.ar.head.draws(flows, (2, *z.shape[1:]))
        label = before.ar.condition.drop(drops, label, cfg.ar_training.label_dropout)
        return before.ar.apply({'params': ar_params}, label, z, draws, method='loss')[0]

    expected = loss(before.ar_params, before.vae_params, batch['image'], batch['label'])
    np.testing.assert_allclose(lines[0]['loss'], expected, rtol=1e-5)
    run = load_run(str(workdir))
    assert stage.name == 'ar'
    assert run.ar.clone(remat=True, head=run.ar.head.clone(remat=True)) == before.ar
    assert run.ar.condition.num_classes == CLASSES
    jax.tree.map(np.testing.assert_array_equal, run.vae_params, before.vae_params)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), run.ar_params, before.ar_params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.02  # six steps of 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('transformer', [False, True])
def test_a_head_is_distilled_from_converted_weights(digits_run, tmp_path, transformer):
    """A published model, whatever it was trained on, teaches a head, and a transformer if asked to.

    All else stays as it was converted.
    """
    before = load_run(str(digits_run))
    cfg = tiny_config.get_config('distilled')
    cfg.distillation_training.transformer = transformer
    cfg.data.num_classes = CLASSES
    cfg.init_from = str(digits_run)
    with libraries_promote():
        metrics = train.train(cfg, str(tmp_path / 'w'), 'the command', time.perf_counter())
    assert np.isfinite(metrics['samples/frechet'])
    run = load_run(str(tmp_path / 'w'))
    head = run.ar_params.pop('head')
    rest = {k: v for k, v in before.ar_params.items() if k != 'head'}
    if transformer:
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), run.ar_params, rest)
        assert 0 < max(jax.tree.leaves(moved['stack'])) < 0.02
    else:
        chex.assert_trees_all_equal(run.ar_params, rest)
    chex.assert_trees_all_equal(run.vae_params, before.vae_params)
    for name in ('cond_embed', 'final_linear'):
        moved = np.abs(head[name]['kernel'] - before.ar_params['head'][name]['kernel']).max()
        assert 0 < moved < 0.02  # six steps of 1e-3

    cfg.data.num_classes = CLASSES + 1
    with pytest.raises(
        console.UserError, match=f'has another model .data.num_classes {CLASSES} → {CLASSES + 1}'
    ):
        train.train(cfg, str(tmp_path / 'x'), 'the command', time.perf_counter())


def test_no_tokenizer_to_keep(tmp_path, capsys):
    """Refused, and the workdir is still free for another config."""
    (tmp_path / 'c.py').write_text(
        'from tests.commands.test_draw import _tuning\ndef get_config():\n    return _tuning()\n'
    )
    line = _refused(capsys, f'--config={tmp_path}/c.py', f'--workdir={tmp_path}/w')
    assert line.startswith(
        'tokenizer_training.steps is 0, but no tokenizer was converted into the workdir: give --co'
    )
    assert os.listdir(tmp_path / 'w') == []


@pytest.mark.slow
def test_digits_are_scored_again(tuned, capsys):
    """--mode=evaluate repeats the scores of the training's own end."""
    workdir, _, metrics = tuned
    with libraries_promote():
        _main('--mode=evaluate', f'--workdir={workdir}')
    written = json.loads((workdir / 'evaluation.json').read_text())
    assert written.pop('seed') == json.loads((workdir / 'config.json').read_text())['seed']
    assert written.pop('sampling')['num_steps'] == 2
    assert written.pop('dtype') == 'float32'
    assert written.pop('parameters') == generation.parameters_crc(load_run(str(workdir)))
    assert written == {
        name: value for name, value in metrics.items() if not name.startswith(('wall_s', 'peak'))
    }
    assert {'vae/psnr', 'samples/accuracy', 'samples/frechet'} <= set(written)
    assert 'samples/frechet' in capsys.readouterr().out


def test_pictures_of_other_samples_are_not_mixed_in(tmp_path):
    for name in ('000000.png', '000003.png', 'grid.png'):
        (tmp_path / name).touch()
    commands_draw._require_no_pngs(str(tmp_path), 4)
    commands_draw._require_no_pngs(str(tmp_path / 'new'), 1)
    with pytest.raises(UserError, match=r'has pictures of other samples, as 000003\.png: give'):
        commands_draw._require_no_pngs(str(tmp_path), 3)


@pytest.mark.slow
def test_samples_as_a_file_and_as_pictures(digits_run, tmp_path, capsys):
    workdir = digits_run
    _main(
        '--mode=sample', f'--workdir={workdir}', f'--output={tmp_path}/s/a.npz', '--num_images=14',
        '--labels=balanced', f'--png={tmp_path}/png',
    )  # fmt: skip
    with np.load(tmp_path / 's' / 'a.npz') as file:
        images = file['arr_0']
        labels = file['arr_1']
    assert labels.tolist() == [*range(12), 0, 1]
    assert images.shape == (14, 16, 16, 1)
    assert sorted(os.listdir(tmp_path / 'png')) == [f'{i:06d}.png' for i in range(14)]
    for i, image in enumerate(images):
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / 'png' / f'{i:06d}.png')), image[..., 0]
        )
    assert '14 images in ' in capsys.readouterr().out
    run = load_run(str(workdir))
    sampler = build.build_sampler(run.config)
    expected, _ = on_mesh.draw_images(run, sampler, labels, seed=run.config.seed)
    assert np.abs(np.asarray(pixels.to_uint8(expected), int) - images).max() <= 1
    _main(
        '--mode=sample',
        f'--workdir={workdir}',
        f'--output={tmp_path}/s/a.npz',
        '--num_images=14',
        '--labels=balanced',
    )
    assert 'a.npz: was there' in capsys.readouterr().out


def _place(picture, part):
    """(row, column) at which `part` (h, w) lies, pixel for pixel, in a picture (H, W), or None."""
    h, width = part.shape
    for y, x in zip(
        *np.nonzero(picture[: len(picture) - h + 1, : picture.shape[1] - width + 1] == part[0, 0]),
        strict=True,
    ):
        if np.array_equal(picture[y : y + h, x : x + width], part):
            return int(y), int(x)
    return None


@pytest.mark.slow
def test_grid(digits_run, tmp_path, capsys):
    """Every image is in the picture, pixel for pixel: rows are classes, columns keys, alike in all
    rows.
    """
    workdir = digits_run
    _main(
        '--mode=grid',
        f'--workdir={workdir}',
        '--classes=3; 11;3',
        '--columns=2',
        f'--output={tmp_path}/new/grid.png',
    )
    run = load_run(str(workdir))
    sampler = build.build_sampler(run.config)
    images, _ = on_mesh.draw_images(
        run, sampler, [3, 3, 11, 11, 3, 3], seed=run.config.seed, index=np.array([0, 1] * 3)
    )
    images = np.asarray(pixels.to_uint8(images))[..., 0]
    np.testing.assert_array_equal(images[:2], images[4:])
    assert (images[0] != images[1]).any()
    assert (images[0] != images[2]).any()
    enlarged = images.repeat(8, 1).repeat(8, 2)  # 128 pixels
    picture = np.asarray(Image.open(tmp_path / 'new' / 'grid.png').convert('L'))
    top, left = _place(picture, enlarged[0])
    for i, image in enumerate(enlarged):
        y = top + i // 2 * 132
        x = left + i % 2 * 132
        np.testing.assert_array_equal(picture[y : y + 128, x : x + 128], image, err_msg=str(i))
    # The picture has no more of them.
    assert (picture[:, left + 268 :] >= 96).all()
    assert (picture[top + 400 :] == 255).all()
    for more, message in (
        ([], "give --classes='golden retriever; 388'"),
        (['--classes=;'], "give --classes='golden retriever; 388; n02099601'"),
        (['--classes=12'], "'12' is no class: this model knows the numbers 0 to 11"),
        (['--classes=2;goldfish'], "'goldfish' is no class: this model knows the numbers 0 to 11"),
        (['--classes=2', '--columns=0'], 'columns'),
    ):
        assert message in _refused(capsys, '--mode=grid', f'--workdir={workdir}', *more)


@pytest.mark.slow
def test_completions(digits_run, tmp_path, capsys):
    """Rows of the picture are an image, what is kept of it, and the completions of `Model`."""
    held_out = digits.Digits('heldout', 0)
    images = np.asarray(pixels.to_uint8(np.stack([held_out[i]['image'] for i in (0, 1)])))
    directory = tmp_path / 'images'
    directory.mkdir()
    for name, image in zip('ab', images, strict=True):
        Image.fromarray(image[..., 0]).save(directory / f'{name}.png')
    arguments = ('--mode=complete', f'--workdir={digits_run}', f'--images={directory}')
    output = tmp_path / 'new' / 'complete.png'
    _main(*arguments, '--classes=3; 11', '--keep=6', '--columns=2', f'--output={output}')
    run = sphere_ar_jax.load(str(digits_run))
    seed = run.config.seed
    drawn = run.complete(images.repeat(2, 0), [3, 3, 11, 11], keep=6, seed=seed)
    kept = images.copy()
    kept[:, 8:] = 128
    kept[:, 4:8, 8:] = 128
    rows = [[images[i], kept[i], *pixels.to_uint8(drawn[2 * i : 2 * i + 2])] for i in (0, 1)]
    rows = np.asarray(rows)[..., 0].repeat(8, -1).repeat(8, -2)
    picture = np.asarray(Image.open(output).convert('L'))
    top, left = _place(picture, rows[0, 0])
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            y = top + i * 132
            x = left + j * 132
            np.testing.assert_array_equal(picture[y : y + 128, x : x + 128], image)
    for more, message in (
        (['--classes=1;2;3'], '3 classes are named for 2 images: give one for all'),
        (
            ['--classes=1', '--keep=half'],
            '--keep is half: give a number of tokens, rows as 4rows',
        ),
        (['--classes=1', '--corruption=blurred:1'], "'blurred:1' is no corruption: write WORD"),
        (
            ['--classes=1', '--keep=5rows'],
            "up to 4rows, or a share between 0 and 1, but is '5rows'",
        ),
        (['--classes=1', '--keep=17'], 'keep must be a whole number of tokens from 0 to 16'),
        ([], "'images' is no class: this model knows the numbers 0 to 11; or give --classes"),
    ):
        assert message in _refused(capsys, *arguments, *more)


def test_originals_of_a_folder_of_synsets(tmp_path, monkeypatch):
    """A folder of some synsets, as ImageNet-R, has the labels of all 1,000; corrupted if asked."""
    run = tiny_config.random_run()
    run.config.data.update(name='imagenet', num_classes=1000)
    seen = {}

    def completed(model, images, labels, *, keep, seed):
        seen.update(images=images, labels=labels.tolist(), keep=keep)
        return np.zeros_like(images)

    monkeypatch.setattr(open_run, 'open_run', lambda *_: (run, sharding.make_mesh()))
    monkeypatch.setattr(commands_draw.Model, 'complete', completed)
    monkeypatch.setattr(
        pictures, 'save_classes', lambda *a: seen.update(picture=a[1], titles=a[3], title=a[4])
    )
    folder = tmp_path / 'imagenet-r'
    for place, synset in enumerate(('n02099601', 'n01443537', 'n12267677')):
        (folder / synset).mkdir(parents=True)
        for name in ('cartoon_1.jpg', 'graffiti_0.png'):
            Image.new('L', (20, 16), 50 * place + 9).save(folder / synset / name)
    (folder / 'README.txt').write_text('about')
    (folder / 'n99999999').mkdir()  # It has no images.
    draw = functools.partial(commands_draw.complete, str(tmp_path), output=f'{tmp_path}/a.png')
    draw(images=str(folder), columns=1)
    assert seen['labels'] == [1, 1, 207, 207, 988, 988]
    assert seen['keep'] == 8
    assert seen['titles'][::2] == ['1 goldfish', '207 golden retriever', '988 acorn']
    chex.assert_shape(seen['images'], (6, 16, 16, 1))
    np.testing.assert_allclose(seen['images'][:, 0, 0, 0] * 127.5 + 127.5, [59, 59, 9, 9, 109, 109])
    draw(images=str(folder), columns=2, num_images=3, corruption='noisy:3')
    assert seen['labels'] == [1, 1, 207, 207, 988, 988]  # each twice
    assert seen['title'] == 'image, noisy (severity 3), its first 8 of 16 tokens, completions'
    clean = np.full((3, 16, 16, 1), np.array([59, 9, 109], np.uint8)[:, None, None, None])
    noisy = corruptions.corrupt(clean, corruptions.Shift('noisy', 3), run.config.seed)
    np.testing.assert_array_equal(seen['images'][::2], pixels.to_float(noisy))
    np.testing.assert_array_equal(seen['picture'][::5], pixels.to_float(clean))
    np.testing.assert_array_equal(seen['picture'][1::5], pixels.to_float(noisy))
    draw(images=str(folder), classes='388', num_images=2, keep='3rows')
    assert seen['keep'] == 12
    assert seen['labels'] == [388] * 8
    monkeypatch.setattr(commands_draw, '_MOST_ROWS', 5)
    Image.new('L', (20, 16)).save(folder / 'n99999999' / 'a.png')
    for arguments, message in (
        ({'classes': '388'}, 'a picture has at most 5 rows, not 7: give --num_images=16'),
        ({}, "imagenet-r: ImageNet has no class 'n99999999': .*; or give --classes, one for"),
        ({'images': str(folder / 'n12267677' / 'cartoon_1.jpg')}, "give --classes='golden retr"),
    ):
        with pytest.raises(UserError, match=message) as error:
            draw(**{'images': str(folder)} | arguments)
        assert '\n' not in str(error.value)


def test_grid_names_of_imagenet(tmp_path, monkeypatch):
    """A model of 1000 classes takes names, synsets and numbers, and titles its rows with both."""
    run = tiny_config.random_run()
    run.config.data.update(name='imagenet', num_classes=1000)
    run.config.sampling.num_images = 1000
    seen = {}
    monkeypatch.setattr(open_run, 'open_run', lambda *_: (run, sharding.make_mesh()))
    monkeypatch.setattr(
        on_mesh,
        'draw_images',
        lambda *a, **k: seen.update(labels=a[2], index=k['index']) or (None, None),
    )
    monkeypatch.setattr(pictures, 'save_classes', lambda *a: seen.update(titles=a[3], columns=a[2]))
    commands_draw.grid(
        str(tmp_path),
        output=f'{tmp_path}/a.png',
        classes='Golden_Retriever; 388;n01440764',
        columns=2,
    )
    assert seen['labels'].tolist() == [207, 207, 388, 388, 0, 0]
    assert seen['index'].tolist() == [0, 1] * 3
    assert seen['titles'] == ['207 golden retriever', '388 giant panda', '0 tench']
    assert seen['columns'] == 2
    with pytest.raises(console.UserError, match="'1000' is no class"):
        commands_draw.grid(str(tmp_path), output=f'{tmp_path}/a.png', classes='1000')
    for wrong in ('retriever', 'n00000000'):
        with pytest.raises(UserError, match=f"ImageNet has no class '{wrong}'") as error:
            commands_draw.grid(str(tmp_path), output=f'{tmp_path}/a.png', classes=wrong)
        assert '\n' not in str(error.value)
    # The names that the workdir keeps go before ImageNet's.
    own = [f'bird {k}' for k in range(999)] + ['2']
    (tmp_path / 'classes.json').write_text(json.dumps(own))
    commands_draw.grid(str(tmp_path), output=f'{tmp_path}/a.png', classes='2; Bird 3;4', columns=1)
    assert seen['labels'].tolist() == [999, 3, 4]
    assert seen['titles'] == ['2', 'bird 3', 'bird 4']
    with pytest.raises(UserError, match=r"'bird3' is no class of this run: .* bird 3"):
        commands_draw.grid(str(tmp_path), output=f'{tmp_path}/a.png', classes='bird3')


def test_samples_are_scored(tmp_path, monkeypatch, capsys):
    """What --samples, --reference and --inception give to `protocol.evaluate`, and where its scores
    go. The workdir needs no run.
    """
    seen = []

    def scores(*arguments, progress):
        for done in (0, 1, 2):
            progress('samples', done, 2)
        seen.append(arguments)
        return {'fid': 1.5}

    monkeypatch.setattr(protocol, 'evaluate', scores)
    monkeypatch.setattr(inception_weights, 'load', lambda path: f'weights of {path}')
    flags = ['--samples=s.npz', '--reference=r.npz', '--inception=i.pb']
    _main('--mode=evaluate', f'--workdir={tmp_path}/new', *flags)
    assert seen == [('s.npz', 'r.npz', 'weights of i.pb')]
    assert json.loads((tmp_path / 'new' / 'evaluation.json').read_text()) == {'fid': 1.5}
    assert 'samples: 2 of 2' in capsys.readouterr().out


# What is wrong with the arguments of a command, and what its one line says.
REFUSALS = [
    (
        ['--mode=evaluate', '--workdir={run}'],
        'for scores by a classifier, --config.data.path of the imagenet data',
    ),
    (
        ['--mode=evaluate', '--workdir={run}', '--samples=a.npz'],
        'give --samples=NPZ and --reference=NPZ together',
    ),
    (
        ['--mode=evaluate', '--workdir={run}', '--reference=a.npz'],
        'give --samples=NPZ and --reference=NPZ together',
    ),
    (
        ['--mode=evaluate', '--workdir={run}', '--reference=a.npz', '--samples=b.npz'],
        'give --inception=',
    ),
    (
        ['--mode=evaluate', '--workdir={run}', '--inception=a.pb'],
        '--inception is for --samples and --reference, or for --im',
    ),
    (
        ['--mode=evaluate', '--workdir={run}', '--images=a.npz', '--lpips=b'],
        'give --lpips, --vgg and --images together',
    ),
    (
        ['--mode=evaluate', '--workdir={run}', '--lpips=a', '--vgg=b'],
        'give --lpips, --vgg and --images together',
    ),
    (
        ['--mode=evaluate', '--workdir={run}', '--images={tmp}/a.npz'],
        'a.npz has no array arr_0, only b',
    ),
    (['--mode=evaluate', '--workdir={run}', '--images={tmp}/none.npz'], 'there is no file'),
    (
        ['--mode=evaluate', '--workdir={run}', '--images=a.npz', '--inception={tmp}/text.pb'],
        'is not a GraphDef',
    ),
    (
        ['--mode=evaluate', '--workdir={run}', '--images=a.npz', '--inception={tmp}/weights.pth'],
        'must hold tensors by',
    ),
    (
        ['--mode=sample', '--workdir={run}', '--output=a.png'],
        '--output is a.png, but must end in .npz',
    ),
    (
        ['--mode=sample', '--workdir={run}', '--labels=unifrom'],
        'there is no file unifrom; labels are uniform, balanced, or',
    ),
    (['--mode=sample', '--workdir={run}', '--num_images=0'], 'num_images'),
    (
        ['--mode=sample', '--workdir={run}', '--heads=2'],
        '--heads is for --mode=convert, not for sample',
    ),
    (
        ['--mode=sample', '--workdir={run}', '--config=tests/tiny_config.py'],
        'holds another model than --config (vae.',
    ),
    (
        ['--mode=sample', '--workdir={tmp}'],
        'has no run: train one, or --mode=convert a checkpoint',
    ),
    (
        ['--mode=sample', '--workdir={tmp}/bad'],
        'config.json is not a sphere_ar_jax config',
    ),
    (
        ['--mode=export', '--workdir={run}', '--classes=3'],
        '--classes is for --mode=grid or complete, not for export',
    ),
    (['--mode=export'], 'give --workdir=DIR'),
    (['--mode=experiment', '--workdir={run}'], 'give --config=configs/experiments/NAME.py'),
    (
        ['--mode=experiment', '--workdir={run}', '--config=tests/tiny_config.py'],
        'this is the config of a run: give --config=configs/experiments/NAME.py',
    ),
    (
        ['--mode=sample', '--workdir={run}', '--config=experiments/guidance'],
        'this is the config of an experiment: give --mode=experiment',
    ),
    (
        ['--mode=sample', '--workdir={run}', '--seeds=1'],
        '--seeds is for --mode=experiment, not for',
    ),
    (['--mode=sampel', '--workdir={run}'], 'mode'),
]


@pytest.fixture(scope='module')
def refused_files(tmp_path_factory):
    """A directory of files that no command can use."""
    directory = tmp_path_factory.mktemp('refused')
    (directory / 'bad').mkdir()
    (directory / 'bad' / 'config.json').write_text('{"vae": 3')
    (directory / 'text.pb').write_bytes(b'\x07 no graph')
    _checkpoint(directory / 'weights.pth', {'x': np.zeros(2)})
    np.savez(directory / 'a.npz', b=np.zeros(3))
    return directory


@pytest.mark.parametrize(('arguments', 'message'), REFUSALS)
def test_one_plain_line_each(converted, refused_files, capsys, arguments, message):
    words = [word.format(run=converted, tmp=refused_files) for word in arguments]
    assert message in _refused(capsys, *words)
    assert not (converted / 'samples.npz').exists()


def test_a_mesh_of_too_many_devices_is_refused(converted, tmp_path):
    meshed = schema.changed(load_config(str(converted)), {'mesh.data': 999})
    with pytest.raises(console.UserError, match=r'mesh\.data 999, .*not possible with'):
        commands_draw.sample(str(converted), output=f'{tmp_path}/a.npz', like=meshed)


def test_sampler_seed_and_mesh_are_those_of_the_config_given(converted):
    """`like` changes how is drawn, never what was trained."""
    like = schema.changed(
        load_config(str(converted)),
        {
            'sampling.num_steps': 7,
            'seed': 3,
            'data.holdout': 0.5,
            'dtype': 'bfloat16',
            'ar.fused': True,
            'mesh.data': 1,
        },
    )
    with libraries_promote():
        run, mesh = open_run.open_run(str(converted), like)
    assert (run.config.sampling.num_steps, run.config.seed, run.config.data.holdout) == (7, 3, 0.2)
    assert run.vae.dtype == run.ar.dtype == jax.numpy.bfloat16
    assert mesh.size == 1
    assert run.ar.fused
    assert run.ar.head.fused
    assert not load_run(str(converted)).ar.fused
    assert checkpoint.fingerprint(run.ar_params) == checkpoint.fingerprint(
        load_run(str(converted)).ar_params
    )


def test_hostile_args_of_a_checkpoint(torch_tensors):
    """`args` of any kind, and a RoPE table of too few rows: sizes, or one UserError."""
    for args in (3, 'text', [1], {'lr': 0.1}):
        assert torch_sizes.sizes(torch_tensors, args).ar['heads'] == 1
    with pytest.raises(UserError, match='latent dimensions disagree'):
        torch_sizes.sizes(torch_tensors, {'latent_dim': 5})
    tensors = {n: t for n, t in torch_tensors.items() if n.startswith('vae.')}
    short = {f'vae.{part}.freqs_cis': np.zeros((2, 32, 2)) for part in ('encoder', 'decoder')}
    with pytest.raises(
        UserError, match=re.escape('the grid of tokens cannot be told: their number is -')
    ):
        torch_sizes.sizes(tensors | short)


def test_a_picture_is_a_png_file(tmp_path):
    """What is drawn is not lost for its name: it is refused before the run is opened."""
    for output in (tmp_path, tmp_path / 'a.jpg', tmp_path / 'png'):
        for asked in (
            lambda: commands_draw.grid('/no/run', classes='1', output=str(output)),
            lambda: commands_draw.complete('/no/run', images='a.png', output=str(output)),
        ):
            with pytest.raises(UserError, match=r'must be a file that ends in \.png'):
                asked()
    (tmp_path / 'd.png').mkdir()
    with pytest.raises(UserError, match=r'must be a file that ends in \.png'):
        commands_draw.grid('/no/run', classes='1', output=str(tmp_path / 'd.png'))


class _Writer:
    """A model whose text for an image names its brightness and its seed."""

    image_shape = (4, 4, 1)

    def __init__(self, *_, **__):
        self.sizes = []

    def caption(self, images, top_p, seed):
        self.sizes.append(len(images))
        if len(self.sizes) == 3:
            raise UserError('text 2 is not finite')
        levels = np.asarray(pixels.to_uint8(images))[:, 0, 0, 0]
        return [f'{level}  {s}' for level, s in zip(levels, seed, strict=True)]


def test_texts_are_written_in_equal_batches_and_kept(tmp_path, monkeypatch, capsys):
    """Batches are filled up, so that one program serves all. An error takes no text away."""
    for i in range(7):
        Image.new('L', (4, 4), 30 * i).save(tmp_path / f'{i}.png')
    (tmp_path / '1.png').write_bytes(b'broken')
    writer = _Writer()
    cfg = tiny_config.get_config()
    cfg.sampling.batch_size = 3
    run = mock.Mock(config=cfg)
    monkeypatch.setattr(commands_draw.open_run, 'open_run', lambda *_: (run, None))
    monkeypatch.setattr(commands_draw.captioning, 'writer', lambda ar: ar)
    monkeypatch.setattr(commands_draw, 'Model', lambda run, mesh: writer)
    output = tmp_path / 't.tsv'
    with pytest.raises(UserError, match='text 2 is not finite'):
        commands_draw.caption('/w', images=str(tmp_path), output=str(output))
    expected = [f'{i}.png\t{30 * i} {cfg.seed + i}' for i in (0, 2, 3, 4, 5)]
    assert output.read_text().splitlines() == expected
    assert writer.sizes == [3, 3, 3]
    assert '1.png is left out' in capsys.readouterr().err
