import json

import numpy as np
from PIL import Image

from sphere_ar_jax.experiments import frontier
from sphere_ar_jax.flow import plan, solvers


def test_settings_cover_every_solver_and_can_be_built():
    """Every setting's options are accepted, and its name says how many evaluations it makes."""
    found = frontier.settings()
    assert frontier.REFERENCE in found
    assert {options['solver'] for options, _ in found.values()} == set(solvers.STRAIGHT)
    assert {scale for _, scale in found.values()} == {1.0, 1.5, 2.0, 3.0, 4.5}
    # No setting occurs twice.
    assert len({(str(sorted(o.items())), s) for o, s in found.values()}) == len(found)
    plans = {
        name: plan.Options(**options).plan(16).evaluations for name, (options, _) in found.items()
    }
    assert (
        plans[frontier.REFERENCE] == 101
        and plans['heun 5, guidance 1.5'] == plans['ab2 10, guidance 1.5'] == 10
    )
    distilled = frontier.settings((1, 2))
    assert [plan.Options(**options).plan(16).evaluations for options, _ in distilled.values()] == [
        1,
        2,
    ]


def _rows():
    rng = np.random.default_rng(0)
    return [
        {'setting': name, 'workdir': str(seed), 'evaluations': n}
        | {score: float(rng.uniform()) for score in frontier.SCORES}
        for name, n in ((frontier.REFERENCE, 101), ('ab2 10, guidance 1.5', 10), ('distilled 1', 1))
        for seed in range(3)
    ]


def test_summary_and_table(tmp_path):
    rows = _rows()
    summary = frontier.summarize(rows)
    values = [row['samples/frechet'] for row in rows[:3]]
    reference = summary[frontier.REFERENCE]
    assert reference['runs'] == 3 and reference['evaluations'] == 101
    np.testing.assert_allclose(reference['samples/frechet']['mean'], sum(values) / 3)
    np.testing.assert_allclose(reference['samples/frechet']['std'], np.std(values, ddof=1))
    lines = frontier.markdown(summary).splitlines()
    assert [line.split(' | ')[0] for line in lines[2:]] == [
        '| distilled 1',
        '| ab2 10, guidance 1.5',
        f'| {frontier.REFERENCE}',
    ]
    assert f'{sum(values) / 3:.4f}' in lines[4]
    frontier.save_frontier(str(tmp_path / 'f.png'), json.loads(json.dumps(summary)))
    picture = np.asarray(Image.open(tmp_path / 'f.png').convert('L'))
    assert picture.shape[0] > 500 and picture.std() > 10
