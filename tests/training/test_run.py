"""Runs that are read from their workdirs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from sphere_ar_jax.runtime import checkpoint, sharding
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.training import run, state, workdir
from tests.tiny_config import get_config, random_arrays

HOSTILE = {
    'brackets': b'[' * 100_000,
    'braces': b'{"a":' * 100_000,
    'no text': bytes(range(256)),
    'nothing': b'',
    'half': b'{"vae": {"grid": [4,',
    'a list': b'[1, 2]',
    'a number': b'1' * 10_000,
    'not a number': b'NaN',
    'other sections': b'{"vae": 7}',
    'a flipped key': b'{"vaf": {}}',
}


@pytest.mark.parametrize('name', HOSTILE)
def test_a_config_that_is_none_is_one_line(tmp_path, name):
    (tmp_path / 'config.json').write_bytes(HOSTILE[name])
    for read in (run.load_config, lambda path: workdir.claim(get_config(), path)):
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000


def _stage():
    """A stage whose model is two arrays, with two EMAs."""
    options = ConfigDict({'ema_decay': 0.9, 'more_ema_decays': (0.5,)})

    def init(key):
        params = {'a': jax.random.normal(key, (30, 40)), 'b': jnp.zeros(7)}
        moments = optax.adam(0.1).init(params)
        ema = state.copies(params, state.ema_decays(options))
        return state.TrainState(jnp.int32(0), params, moments, ema)

    return state.Stage('ar', options, init, None, {}, ())


@pytest.mark.parametrize('rate', [None, 0.9, 0.5, 0.0])
def test_sampling_reads_the_chosen_parameters_and_nothing_else(tmp_path, monkeypatch, rate):
    """An EMA by its rate, the first one, or the weights themselves."""
    mesh = sharding.make_mesh()
    like = state.abstract_state(_stage(), mesh)
    arrays = random_arrays(like).replace(step=np.int32(6))
    arrays = jax.tree.map(lambda x, a: jax.device_put(a.astype(x.dtype), x.sharding), like, arrays)
    checkpoints = checkpoint.Checkpoints(tmp_path / 'ar' / 'checkpoints')
    checkpoints.save(6, arrays, {}, 1.0)
    checkpoints.close()
    read = checkpoint.Checkpoints._read
    seen = []

    def reading(self, step, like):
        found = read(self, step, like)
        seen.append(sum(a.nbytes for a in jax.tree.leaves(found[0]) if a is not ...))
        return found

    monkeypatch.setattr(checkpoint.Checkpoints, '_read', reading)
    stage = _stage()
    params = run._restore(stage, tmp_path, mesh, run._of_rate(stage.options, rate))
    first, second = arrays.ema
    expected = {None: first, 0.9: first, 0.5: second, 0.0: arrays.params}[rate]
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert seen == [4 * (30 * 40 + 7) + 4]  # with the step
