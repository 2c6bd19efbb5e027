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
import optax
import pytest

from sphere_ar_jax.config import build
from sphere_ar_jax.data import batches, digits
from sphere_ar_jax.runtime import checkpoint, sharding
from sphere_ar_jax.runtime.console import Preempted, UserError
from sphere_ar_jax.training import loop, optimizer
from sphere_ar_jax.training.stages import ar_stage
from sphere_ar_jax.training.state import (
    abstract_state,
    jitted_step,
    make_stage,
    quickly_compiled,
    step_for_memory,
)
from tests.conftest import libraries_promote, noted_fingerprint
from tests.tiny_config import LONG, get_config, random_params, stages

pytestmark = pytest.mark.usefixtures('standard_promotion')
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def standard_promotion():
    with libraries_promote():
        yield


def _train(cfg, directory, which=0, mesh=None):
    return loop.train(
        stages(cfg)[which],
        digits.Digits('train', cfg.seed),
        str(directory),
        seed=cfg.seed,
        mesh=mesh or sharding.make_mesh(),
    )


@pytest.mark.slow
@pytest.mark.parametrize('which', [0, 1], ids=['tokenizer', 'ar'])
def test_a_stage_trains_and_logs(tmp_path, which):
    cfg = get_config()
    cfg.tokenizer_training.update(steps=80, log_every=20, checkpoint_every=80, learning_rate=3e-3)
    # The head starts at zero.
    cfg.ar_training.update(steps=80, log_every=20, checkpoint_every=80, learning_rate=3e-2)
    state, seconds = _train(cfg, tmp_path, which)
    assert int(state.step) == 80
    assert seconds > 0
    chex.assert_tree_all_finite(state.params)
    assert len(state.ema) == which
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [20, 40, 60, 80]
    assert lines[-1]['loss'] < 0.9 * lines[0]['loss']
    names = {'loss', 'grad_norm', 'learning_rate', 'images_per_second', 'token_norm'} | (
        {'kappa', 'l1', 'kl'} if which == 0 else set()
    )
    assert names <= set(lines[0])
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert list(tmp_path.glob('events.out.tfevents.*'))


def test_runs_of_other_seeds_have_the_same_program():
    """A seed is an argument, so that a second run finds its program compiled."""
    mesh = sharding.make_mesh()
    batch = {'image': jnp.ones((4, 3)), 'label': jnp.zeros(4, jnp.int32)}

    def loss(params, frozen, batch, keys):
        del frozen
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        return jnp.mean((params['w'] - batch['image'] * noise) ** 2), {}

    results = []
    texts = []
    for seed in (0, 1):
        options = get_config().tokenizer_training
        stage = make_stage('a', options, lambda key: {'w': jnp.ones((1, 3))}, loss, (), ())
        like = abstract_state(stage, mesh)
        step = jitted_step(stage, mesh, like)
        state = stage.init(jax.random.key(0))
        texts.append(step.lower(like, (), batch, np.uint32(seed)).as_text())
        _, alone = stage.step(state, (), batch, seed)
        _, scalars = step(state, (), batch, np.uint32(seed))
        np.testing.assert_allclose(scalars['loss'], alone['loss'], rtol=1e-6)
        results.append(float(scalars['loss']))
    assert texts[0] == texts[1]
    assert results[0] != results[1]


@pytest.mark.parametrize(
    ('limit', 'expected'),
    [
        (2**40, 'activations are kept, which takes '),
        (100, 'activations are computed again (remat): to keep them takes '),
        (None, ''),
    ],
)
def test_the_memory_decides_which_step_is_taken(monkeypatch, limit, expected):
    mesh = sharding.make_mesh(1)
    options = get_config().tokenizer_training
    batch = {'image': jnp.ones((4, 3)), 'label': jnp.zeros(4, jnp.int32)}

    def make(name, **fields):
        def loss(params, frozen, batch, keys):
            del frozen, keys
            return jnp.mean((params['w'] - batch['image']) ** 2), {name: jnp.float32(1)}

        def init(key):
            del key
            return {'w': jnp.ones((1, 3))}

        return make_stage('a', options, init, loss, (), (), **fields)

    stage = make('light', without_remat=make('without'))
    arguments = (abstract_state(stage, mesh), (), batch, np.uint32(0))
    monkeypatch.setattr(sharding, 'memory_limit', lambda device, count: limit)
    chosen = step_for_memory(stage, mesh, arguments)
    assert chosen.text.startswith(expected)
    assert (chosen.text == '') == (limit is None)
    _, scalars = chosen.run(stage.init(jax.random.key(0)), *arguments[1:])
    assert ('without' in scalars) == chosen.without_remat == (limit == 2**40)
    # What a run began with stays.
    if limit is not None:
        assert step_for_memory(stage, mesh, arguments, True).without_remat
    assert not step_for_memory(stage, mesh, arguments, False).without_remat

    def fail(device, count):
        raise AssertionError('a device of another process may not be asked')

    monkeypatch.setattr(sharding, 'memory_limit', fail)
    assert step_for_memory(stage.without_remat, mesh, arguments).text == ''


@pytest.mark.slow
def test_a_step_that_keeps_activations_gives_the_same_losses(tmp_path, monkeypatch, capsys):
    """Both are the AR model's; the choice is said in a line."""
    cfg = get_config()
    cfg.ar_training.update(steps=4, warmup_steps=1, log_every=1, checkpoint_every=4)
    vae = build.build_vae(cfg)
    cfg.ar.remat = None
    ar = build.build_ar(cfg)
    assert ar.remat
    assert ar.head.remat
    assert not (ar.keeping_activations().remat)
    assert not (ar.keeping_activations().head.remat)
    vae_params = random_params(vae)
    losses = []
    for limit, word in ((2**40, 'kept'), (1, 'again')):
        monkeypatch.setattr(sharding, 'memory_limit', lambda device, count, limit=limit: limit)
        stage = ar_stage(ar, vae, vae_params, cfg.ar_training, choose_remat=True)
        source = digits.Digits('train', cfg.seed)
        mesh = sharding.make_mesh(1)
        loop.train(stage, source, str(tmp_path / word), seed=cfg.seed, mesh=mesh)
        assert f'ar: activations are {"kept" if limit > 1 else "computed again"}' in (
            capsys.readouterr().out
        )
        lines = (tmp_path / word / 'metrics.jsonl').read_text().splitlines()
        losses.append([json.loads(line)['loss'] for line in lines])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.slow
def test_a_prolonged_run_is_one_that_restarted_from_the_beginning(tmp_path):
    """The state at its new end is that of an undisturbed run with the same restart."""
    cfg = get_config()
    cfg.ar_training.update(steps=6, warmup_steps=2, ema_ramp=True)
    _train(cfg, tmp_path / 'a', 1)
    cfg.ar_training.update(steps=12, restarts=(6,))
    states = [_train(cfg, tmp_path / directory, 1)[0] for directory in ('a', 'b')]
    assert [int(state.step) for state in states] == [12, 12]
    chex.assert_trees_all_close(states[0], states[1], atol=1e-6)
    lines = (tmp_path / 'a' / 'metrics.jsonl').read_text().splitlines()
    rates = [json.loads(line)['learning_rate'] for line in lines]
    assert len(rates) == 6
    assert rates[2] < rates[1]
    assert rates[4] > rates[2]


@pytest.mark.parametrize('ramp', [False, True])
def test_the_averages_of_a_stage_follow_their_rates(ramp):
    """Beside a loop in float64 over the same weights: n counts the steps before each one."""
    options = get_config().ar_training
    options.update(ema_decay=0.5, more_ema_decays=(0.9,), ema_ramp=ramp, warmup_steps=0)
    batch = {'image': jnp.ones((4, 3)), 'label': jnp.zeros(4, jnp.int32)}

    def loss(params, frozen, batch, keys):
        del frozen, keys
        return jnp.mean((params['w'] - batch['image']) ** 2), {}

    stage = make_stage('a', options, lambda key: {'w': jnp.ones((1, 3)) * 3}, loss, (), ())
    state = stage.init(jax.random.key(0))
    step = jax.jit(stage.step)
    expected = [np.full((1, 3), 3.0), np.full((1, 3), 3.0)]
    for n in range(12):  # The rate of 0.5 is reached at n = 8.
        state, _ = step(state, (), batch, 0)
        for i, decay in enumerate((0.5, 0.9)):
            rate = min(decay, (1 + n) / (10 + n)) if ramp else decay
            expected[i] = rate * expected[i] + (1 - rate) * np.asarray(state.params['w'], float)
    for ema, by_hand in zip(state.ema, expected, strict=True):
        np.testing.assert_allclose(ema['w'], by_hand, rtol=1e-5)
    chex.assert_trees_all_equal(state.eval_params, state.ema[0])


@pytest.mark.slow
def test_a_step_is_the_recipe():
    """One step by hand: loss, clip, AdamW, EMA, on the keys folded by step and sample."""
    cfg = get_config()
    cfg.ar_training.update(warmup_steps=0, clip_norm=0.05, learning_rate=1e-2, weight_decay=0.5)
    stage = stages(cfg)[1]
    batch = next(batches.batches(digits.Digits('train', 0), batch_size=16, seed=0))
    state = jax.jit(stage.init, **quickly_compiled())(jax.random.key(0))
    state = state.replace(step=jnp.int32(1), ema=(jax.tree.map(lambda p: p + 1, state.params),))
    new, scalars = jax.jit(stage.step)(state, stage.frozen, batch, cfg.seed)

    vae = build.build_vae(cfg)
    ar = build.build_ar(cfg)

    @jax.jit
    def by_hand(params, frozen):
        of_step = jax.random.fold_in(jax.random.key(cfg.seed), 1)
        keys = jax.vmap(lambda i: jax.random.fold_in(of_step, i))(jnp.arange(16))
        split = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
        posterior = vae.apply({'params': frozen}, batch['image'], method='encode')
        z = posterior.sample(posterior.draws(split[:, 0]))
        draws = ar.head.draws(split[:, 1], (2, 16, 8))
        labels = ar.condition.drop(split[:, 2], batch['label'], 0.1)

        def loss(p):
            return ar.apply({'params': p}, labels, z, draws, method='loss')

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, _), gradients = by_hand(state.params, stage.frozen)
    np.testing.assert_allclose(scalars['loss'], loss, rtol=1e-5)
    np.testing.assert_allclose(scalars['grad_norm'], optax.tree.norm(gradients), rtol=1e-4)
    np.testing.assert_allclose(
        scalars['learning_rate'], optimizer.learning_rate(1e-2, 0, 6, 1e-5)(1), rtol=1e-6
    )
    tx = optimizer.adamw(
        optimizer.learning_rate(1e-2, 0, 6, 1e-5), weight_decay=0.5, clip_norm=0.05
    )

    @jax.jit
    def updated(params, gradients):
        updates, _ = tx.update(gradients, tx.init(params), params)
        return optax.apply_updates(params, updates)

    params = updated(state.params, gradients)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), new.params, state.params)
    assert moved['head']['final_linear']['kernel'] > 1e-3
    assert moved['stack']['blocks']['mlp']['w1']['kernel'] > 1e-5
    # Adam divides by the gradient's own size: where it is nearly 0, its rounding shows
    chex.assert_trees_all_close(new.params, params, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(
        new.ema[0],
        jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state.ema[0], new.params),
        rtol=1e-5,
        atol=1e-6,
    )
    assert int(new.step) == 2


@pytest.mark.slow
@pytest.mark.parametrize('which', [0, 1], ids=['tokenizer', 'ar'])
def test_gradients_of_a_batch_in_pieces(which):
    """Four pieces give the step of the whole batch, to rounding.

    They are computed one at a time.
    """
    batch = next(batches.batches(digits.Digits('train', 0), batch_size=16, seed=0))
    found = {}
    for parts in (1, 4):
        cfg = get_config()
        for section in (cfg.tokenizer_training, cfg.ar_training):
            section.update(accumulate=parts, warmup_steps=0)
        stage = stages(cfg)[which]
        state = jax.jit(stage.init, **quickly_compiled())(jax.random.key(0))
        step = jax.jit(stage.step).lower(state, stage.frozen, batch, cfg.seed).compile()
        new, scalars = step(state, stage.frozen, batch, cfg.seed)
        found[parts] = jax.device_get((new, scalars)), step.memory_analysis().temp_size_in_bytes
    (one, scalars), memory = found[1]
    (four, pieces), less = found[4]
    # These are no means over images.
    of_batches = {'psnr', 'spread_min', 'spread_mean', 'dead_share', 'mean_direction'}
    for name in set(scalars) - of_batches:
        np.testing.assert_allclose(pieces[name], scalars[name], rtol=2e-5, err_msg=name)
    # The optimizer's moments are the gradients.
    chex.assert_trees_all_close(four.opt_state, one.opt_state, rtol=1e-3, atol=1e-6)
    assert less < 0.5 * memory


@pytest.mark.slow
def test_tokens_encoded_in_bfloat16():
    """The loss moves by what bfloat16 loses; the AR model itself stays in float32."""
    batch = next(batches.batches(digits.Digits('train', 0), batch_size=16, seed=0))
    found = []
    for dtype in ('', 'bfloat16'):
        cfg = get_config()
        cfg.ar_training.encoder_dtype = dtype
        stage = stages(cfg)[1]
        start = jax.jit(stage.init, **quickly_compiled())(jax.random.key(0))
        state, scalars = jax.jit(stage.step)(start, stage.frozen, batch, cfg.seed)
        chex.assert_trees_all_equal_dtypes(state.params, jax.tree.map(jnp.float32, state.params))
        found.append(float(scalars['loss']))
    assert 0 < abs(found[1] - found[0]) < 0.02 * found[0]


@pytest.mark.slow
def test_another_tokenizer_is_refused(tmp_path):
    """A checkpoint of the AR model names the tokenizer that it was trained on, by all bits of its
    weights.
    """
    cfg = get_config()
    stage = stages(cfg)[1]
    source = digits.Digits('train', 0)
    mesh = sharding.make_mesh()
    loop.train(stage, source, str(tmp_path), seed=0, mesh=mesh)
    leaves, tree = jax.tree.flatten(jax.device_get(stage.frozen))
    leaves[-1] = leaves[-1].copy()
    leaves[-1].view(np.uint32).flat[0] ^= 1
    refusal = r'was trained on another tokenizer than is given .weights [0-9a-f]{8} → [0-9a-f]{8}.$'
    with pytest.raises(UserError, match=refusal):
        loop.train(
            stage._replace(frozen=tree.unflatten(leaves)), source, str(tmp_path), seed=0, mesh=mesh
        )
    loop.train(stage, source, str(tmp_path), seed=0, mesh=mesh)
    other = stage._replace(model=stage.model.clone(backbone=stage.model.backbone.clone(heads=1)))
    with pytest.raises(UserError, match='; heads 2 → 1'):
        loop.train(other, source, str(tmp_path), seed=0, mesh=mesh)
    noted = json.loads((tmp_path / 'checkpoints' / '6' / 'data' / 'metadata').read_text())['frozen']
    assert noted['model']['latent_dim'] == 8
    assert noted['model']['grid'] == [4, 4]


@pytest.mark.slow
def test_a_look_at_the_model_changes_nothing(tmp_path):
    """It is called at its steps with the parameters to sample with.

    The training is the same bit for bit.
    """
    cfg = get_config()
    calls = []
    stage = stages(cfg)[1]
    source = digits.Digits('train', 0)
    mesh = sharding.make_mesh()
    plain, _ = loop.train(stage, source, str(tmp_path / 'plain'), seed=0, mesh=mesh)

    def look(step, state, writer):
        calls.append((step, jax.device_get(state.eval_params)))
        writer.write(step, {'seen': 1.0}, ('seen',))

    watch = loop.Watch(3, look)
    watched, _ = loop.train(
        stage, source, str(tmp_path / 'watched'), seed=0, mesh=mesh, watch=watch
    )
    assert [step for step, _ in calls] == [3, 6]
    chex.assert_trees_all_equal(jax.device_get(watched), jax.device_get(plain))
    chex.assert_trees_all_equal(calls[1][1], jax.device_get(watched.ema[0]))
    lines = [
        json.loads(line)
        for line in (tmp_path / 'watched' / 'metrics.jsonl').read_text().splitlines()
    ]
    assert [line['step'] for line in lines if 'seen' in line] == [3, 6]


@pytest.mark.slow
def test_a_look_that_fails_loses_no_steps(tmp_path):
    cfg = get_config()
    cfg.ar_training.checkpoint_every = 3
    stage = stages(cfg)[1]
    looked = []

    def look(step, state, writer):
        looked.append(step)
        raise OSError('the disk is full')

    def run():
        mesh = sharding.make_mesh()
        source = digits.Digits('train', 0)
        watch = loop.Watch(3, look)
        return loop.train(stage, source, str(tmp_path), seed=0, mesh=mesh, watch=watch)

    for _ in range(2):
        with pytest.raises(OSError, match='the disk is full'):
            run()
    assert looked == [3, 6]
    state, _ = run()
    assert int(state.step) == 6


def test_the_same_on_many_devices(tmp_path):
    """Losses on all devices equal those on one, to rounding."""
    if jax.device_count() == 1:
        pytest.skip('one device')
    cfg = get_config()
    one, _ = _train(cfg, tmp_path / 'one', 1, sharding.make_mesh(1))
    every, _ = _train(cfg, tmp_path / 'all', 1, sharding.make_mesh(-1))
    chex.assert_trees_all_close(
        jax.device_get(one.params), jax.device_get(every.params), rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
def test_a_signal_while_the_last_state_is_saved_is_not_lost(tmp_path, monkeypatch):
    cfg = get_config()
    wait = checkpoint.Checkpoints.wait

    def terminated(checkpoints):
        monkeypatch.undo()
        signal.raise_signal(signal.SIGTERM)
        wait(checkpoints)

    monkeypatch.setattr(checkpoint.Checkpoints, 'wait', terminated)
    with pytest.raises(
        Preempted, match=r'^SIGTERM: saved at step 6 of 6; the same command goes on$'
    ):
        _train(cfg, tmp_path, 1)
    assert int(_train(cfg, tmp_path, 1)[0].step) == 6
    assert checkpoint.Checkpoints.wait is wait


@pytest.mark.slow
def test_a_resume_starts_at_its_place_in_the_data(tmp_path):
    """What `reading` gives reaches the batches, which begin with the epoch of the step.

    A finished stage is only read. Other data are refused.
    """
    cfg = get_config()
    epochs = []
    source = digits.Digits('train', 0, holdout=0.99)
    reading = {'transform': lambda record, epoch, rng: epochs.append(epoch) or record, 'threads': 1}

    def run():
        return loop.train(
            stages(cfg)[1],
            source,
            str(tmp_path),
            seed=0,
            mesh=sharding.make_mesh(),
            reading=reading,
        )

    def files():
        return sorted((p, p.stat().st_mtime) for p in tmp_path.rglob('*') if p.is_file())

    first, seconds = run()
    assert min(epochs) == 0
    epochs.clear()
    before = files()
    again, stated = run()
    assert files() == before
    assert not epochs
    assert 0 < stated <= seconds
    chex.assert_trees_all_equal(first.params, again.params)
    cfg.ar_training.update(steps=8)
    run()
    assert min(epochs) == 6 * 16 // len(source) > 0
    cfg.ar_training.update(steps=10, batch_size=32)
    with pytest.raises(UserError, match='the checkpoint belongs to other data'):
        run()


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    """The run stops and names the last good checkpoint, which is left as it was; what came of it
    later is set aside. The same directory then goes on with a sane learning rate.
    """
    cfg = get_config()
    good = checkpoint.fingerprint(_train(cfg, tmp_path, 1)[0])
    cfg.ar_training.update(steps=12, learning_rate=1e30, warmup_steps=0, checkpoint_every=1)
    with pytest.raises(
        loop.NonFiniteError,
        match=r'at step \d+; the last good checkpoint, step 6, was not touched .*learning_rate',
    ):
        _train(cfg, tmp_path, 1)
    cfg.ar_training.update(steps=6)
    assert checkpoint.fingerprint(_train(cfg, tmp_path, 1)[0]) == good
    assert (
        sorted(p.name for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit())[-1] == '6'
    )
    cfg.ar_training.update(steps=12, learning_rate=1e-3)
    state, _ = _train(cfg, tmp_path, 1)
    assert int(state.step) == 12
    chex.assert_tree_all_finite(state.params)


def test_the_message_about_a_loss_that_is_no_number(tmp_path):
    """A rate that falls to nothing is lowered alone. One that is constant has two keys."""
    stage = stages(get_config())[1]
    scalars = {'loss': np.float32('nan'), 'grad_norm': np.float32(1)}
    said = []
    for rates in (
        {'learning_rate': 1e-3, 'final_learning_rate': 0.0},
        {'final_learning_rate': 1e-3},
    ):
        stage.options.update(rates)
        checkpoints = checkpoint.Checkpoints(tmp_path)
        checkpoints.save(4, {'a': jnp.ones(2)}, {}, 0.0)
        checkpoints.wait()
        with pytest.raises(loop.NonFiniteError) as caught:
            loop._check_finite(scalars, 5, checkpoints, stage)
        checkpoints.close()
        said.append(str(caught.value))
    # A discriminator that diverges would be saved with the rest.
    scalars = {'loss': np.float32(1), 'grad_norm': np.float32(1)}
    loop._check_finite(scalars, 5, checkpoints, stage)
    scalars |= {'discriminator': np.float32(2), 'disc_grad_norm': np.float32('inf')}
    checkpoints = checkpoint.Checkpoints(tmp_path)
    with pytest.raises(
        loop.NonFiniteError, match=r"loss 2\.0, discriminator's gradient norm inf at"
    ):
        loop._check_finite(scalars, 5, checkpoints, stage)
    checkpoints.close()
    lower = 'Try the same command with a lower --config.ar_training.learning_rate'
    assert 'no checkpoint to go on from (that of step 4 has the weights that failed, and' in said[0]
    assert said[0].endswith(lower)
    assert said[1].endswith(
        f'{lower}, and a --config.ar_training.final_learning_rate that is not above it'
    )


DRIVER = """
import sys
from sphere_ar_jax.data import digits
from sphere_ar_jax.runtime import sharding
from sphere_ar_jax.training import loop
from tests.tiny_config import long_config, stages
directory, checkpoint_every = sys.argv[1], int(sys.argv[2])
_, stage = stages(long_config(checkpoint_every))
loop.train(stage, digits.Digits('train', 0), directory, seed=0, mesh=sharding.make_mesh())
"""


def _spawn(directory, cache, checkpoint_every=1):
    """A process that trains the AR model in a directory."""
    environment = os.environ | {
        'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, '-c', DRIVER, str(directory), str(checkpoint_every)], cwd=ROOT,
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _await_training(process, last):
    """Waits for four steps, when the first two are saved: each save waits for the one before."""
    steps = 0
    for line in process.stdout:
        steps += f'/{last}' in line
        if steps == 4:
            return


def _await_save(process, last, checkpoints):
    """Waits for a checkpoint to be half written. Returns whether one was seen."""
    _await_training(process, last)
    end = time.monotonic() + 20
    while time.monotonic() < end and process.poll() is None:
        if any('orbax-checkpoint-tmp' in name for name in os.listdir(checkpoints)):
            return True
    return False


def _logged(directory):
    """What was logged, but for times."""
    lines = (directory / 'metrics.jsonl').read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if 'second' not in k} for line in lines]


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_bit_for_bit(tmp_path):
    """A process that saves at every step is killed: in the middle of a save, at random moments of
    training, by SIGTERM too. Left alone in the end, it has the very state of the undisturbed run,
    and the same log.
    """
    cache = tmp_path / 'cache'
    checkpoints = tmp_path / 'killed' / 'checkpoints'
    last_step = LONG[1]
    whole = _spawn(tmp_path / 'whole', cache, last_step)
    assert whole.wait(300) == 0, whole.stdout.read()
    rng = random.Random(1)
    in_a_save = 0
    for moment in ('save', 'training', 'term', 'save'):
        process = _spawn(tmp_path / 'killed', cache)
        if moment == 'save':
            in_a_save += _await_save(process, last_step, checkpoints)
        else:
            _await_training(process, last_step)
            time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGTERM if moment == 'term' else signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode != 0, f'{moment}: the run was over before it was killed'
    assert in_a_save >= 1
    last = _spawn(tmp_path / 'killed', cache)
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output
    assert 'goes on from step' in output, output
    assert 'cannot be read' not in output, output
    assert not list(checkpoints.glob('damaged-*'))  # every save was whole or not there
    killed, undisturbed = (noted_fingerprint(tmp_path / n, last_step) for n in ('killed', 'whole'))
    assert killed == undisturbed
    logs = [_logged(tmp_path / name) for name in ('whole', 'killed')]
    assert len(logs[0]) == last_step
    assert logs[0] == logs[1]
