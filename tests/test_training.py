import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphere_ar_jax import checkpoint, config, data, sharding, training
from tests.conftest import libraries_promote
from tests.tiny_config import get_config

pytestmark = pytest.mark.usefixtures('standard_promotion')
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def standard_promotion():
    with libraries_promote():
        yield


def _stages(cfg):
    vae, ar = config.build_vae(cfg), config.build_ar(cfg)
    tokenizer = training.tokenizer_stage(vae, cfg.tokenizer_training, cfg.seed)
    vae_params = vae.init_params(jax.random.key(1))
    return tokenizer, training.ar_stage(ar, vae, vae_params, cfg.ar_training, cfg.seed)


def _train(cfg, directory, which=0, mesh=None):
    return training.train(
        _stages(cfg)[which],
        data.Digits('train', cfg.seed),
        str(directory),
        seed=cfg.seed,
        mesh=mesh or sharding.make_mesh(),
    )


@pytest.mark.parametrize('which', [0, 1], ids=['tokenizer', 'ar'])
def test_a_stage_trains_and_logs(tmp_path, which):
    cfg = get_config()
    cfg.tokenizer_training.update(steps=40, log_every=10, learning_rate=3e-3)
    cfg.ar_training.update(steps=40, log_every=10, learning_rate=1e-2)  # the head starts at zero
    state, seconds = _train(cfg, tmp_path, which)
    assert int(state.step) == 40 and seconds > 0
    chex.assert_tree_all_finite(state.params)
    assert (state.ema is None) == (which == 0)
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [10, 20, 30, 40]
    assert lines[-1]['loss'] < 0.9 * lines[0]['loss']
    names = {'loss', 'grad_norm', 'learning_rate', 'images_per_second', 'token_norm'} | (
        {'kappa', 'l1', 'kl'} if which == 0 else set()
    )
    assert names <= set(lines[0])
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert list(tmp_path.glob('events.out.tfevents.*'))


def test_a_step_is_the_recipe(tmp_path):
    """One step by hand: loss, clip, AdamW, EMA, on the keys folded by step and sample."""
    import optax

    from sphere_ar_jax import losses, optimizer

    cfg = get_config()
    stage = _stages(cfg)[1]
    batch = next(data.batches(data.Digits('train', 0), batch_size=16, seed=0))
    state = jax.jit(stage.init)(jax.random.key(0))
    state = state.replace(step=jnp.int32(1))
    new, scalars = jax.jit(stage.step)(state, stage.frozen, batch)

    vae, ar = config.build_vae(cfg), config.build_ar(cfg)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.seed), 1), i))(jnp.arange(16))
    split = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    posterior = vae.apply({'params': stage.frozen}, batch['image'], method='encode')
    z = posterior.sample(losses.posterior_draws(split[:, 0], posterior))
    t_normal, noise = losses.flow_draws(split[:, 1], 2, 16, 8)
    labels = losses.drop_labels(split[:, 2], batch['label'], 10, 0.1)
    (loss, _), gradients = jax.value_and_grad(
        lambda p: losses.flow_loss(ar, p, labels, z, t_normal, noise), has_aux=True
    )(state.params)
    np.testing.assert_allclose(scalars['loss'], loss, rtol=1e-5)
    np.testing.assert_allclose(scalars['grad_norm'], optax.tree.norm(gradients), rtol=1e-4)
    tx = optimizer.adamw(optimizer.learning_rate(1e-3, 2, 6, 1e-5))
    updates, _ = tx.update(gradients, tx.init(state.params), state.params)
    params = optax.apply_updates(state.params, updates)
    chex.assert_trees_all_close(new.params, params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(
        new.ema, jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state.ema, params), rtol=1e-4, atol=1e-6
    )
    assert int(new.step) == 2


def test_the_same_on_many_devices(tmp_path):
    """Losses on all devices equal those on one, to rounding (a real check only where there are several)."""
    cfg = get_config()
    one, _ = _train(cfg, tmp_path / 'one', 1, sharding.make_mesh(1))
    every, _ = _train(cfg, tmp_path / 'all', 1, sharding.make_mesh(-1))
    chex.assert_trees_all_close(jax.device_get(one.params), jax.device_get(every.params), rtol=1e-3, atol=1e-5)


def test_a_finished_stage_is_only_read(tmp_path):
    cfg = get_config()
    first, seconds = _train(cfg, tmp_path)
    before = sorted((p, p.stat().st_mtime) for p in tmp_path.rglob('*') if p.is_file())
    again, stated = _train(cfg, tmp_path)
    chex.assert_trees_all_equal(first.params, again.params)
    assert sorted((p, p.stat().st_mtime) for p in tmp_path.rglob('*') if p.is_file()) == before
    assert 0 < stated <= seconds


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    cfg = get_config()
    _train(cfg, tmp_path)
    good = checkpoint.fingerprint(_train(cfg, tmp_path)[0])
    cfg.tokenizer_training.update(steps=12, learning_rate=1e30, warmup_steps=0, checkpoint_every=1)
    with pytest.raises(
        training.NonFiniteError, match=r'step [78]; the last good checkpoint is step [67].*learning_rate'
    ):
        _train(cfg, tmp_path)
    cfg = get_config()
    cfg.tokenizer_training.steps = 6
    steps = sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit())
    assert 6 in steps and max(steps) <= 7
    if max(steps) == 6:
        assert checkpoint.fingerprint(_train(cfg, tmp_path)[0]) == good


DRIVER = """
import sys, time
from sphere_ar_jax import config, data, sharding, training
from tests.tiny_config import get_config
cfg = get_config()
cfg.tokenizer_training.update(steps=60, checkpoint_every=1, log_every=1)
stage = training.tokenizer_stage(config.build_vae(cfg), cfg.tokenizer_training, cfg.seed)
training.train(stage, data.Digits('train', 0), sys.argv[1], seed=0, mesh=sharding.make_mesh())
"""


def _spawn(directory, cache):
    environment = os.environ | {
        'JAX_COMPILATION_CACHE_DIR': str(cache),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    return subprocess.Popen(
        [sys.executable, '-c', DRIVER, str(directory)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _final(directory):
    cfg = get_config()
    cfg.tokenizer_training.steps = 60
    state, _ = _train(cfg, directory)
    assert int(state.step) == 60
    return state


def test_kill_9_at_any_moment_changes_nothing(tmp_path):
    """A process saving at every step is killed at random moments, then left alone: bit for bit the undisturbed run."""
    undisturbed = _spawn(tmp_path / 'whole', tmp_path / 'cache')
    assert undisturbed.wait(300) == 0
    rng, kills, reached = random.Random(0), 0, []
    for _ in range(12):
        process = _spawn(tmp_path / 'killed', tmp_path / 'cache')
        for line in process.stdout:  # wait until it trains
            if '/60,' in line:
                break
        time.sleep(rng.uniform(0, 0.6))  # saves take tens of milliseconds each: many kills fall into one
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        process.stdout.close()
        kills += killed
        with contextlib.suppress(FileNotFoundError):
            reached.append(
                max([int(n) for n in os.listdir(tmp_path / 'killed' / 'checkpoints') if n.isdigit()], default=0)
            )
        if kills == 5 or not killed:
            break
    assert kills >= 3 and reached[0] < 60
    assert _spawn(tmp_path / 'killed', tmp_path / 'cache').wait(300) == 0
    whole, killed = _final(tmp_path / 'whole'), _final(tmp_path / 'killed')
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(killed))
    losses = [
        {
            line['step']: line['loss']
            for line in map(json.loads, (tmp_path / name / 'metrics.jsonl').read_text().splitlines())
        }
        for name in ('whole', 'killed')
    ]
    assert len(losses[1]) >= 55 and all(losses[0][step] == value for step, value in losses[1].items())
