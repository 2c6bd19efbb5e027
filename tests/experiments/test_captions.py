"""Experiments on captions: which guidance is best, and what the page shows."""

import json

import pytest
from PIL import Image

from sphere_ar_jax.config import experiments, packaged
from sphere_ar_jax.experiments import report
from sphere_ar_jax.experiments.kinds import captions


def _lines(row, seed):
    """What `captions.measure` returns, with chosen numbers."""
    lead = 0.1 if row == 'power_spherical' else 0.0
    first = {'guidance': None, 'psnr': 30.0 + seed, 'kl': 9.0}
    first |= {f'real/{group}': 0.95 for group in captions.GROUPS}
    if row.startswith('joint'):
        first |= {f'captions/{group}': 0.9 for group in captions.GROUPS}
        first |= {'captions/nats': 1.5, 'captions/nats_alone': 12.5}
    samples = []
    for scale, seen, held_out in ((1.0, 0.6, 0.2), (3.5, 0.7, 0.4), (5.0, 0.8, 0.1)):
        shares = {'seen': seen + lead, 'held_out': held_out + lead + 0.01 * seed, 'rows': 0.5}
        samples.append({'guidance': scale, **shares})
    return [first, *samples]


def test_the_best_guidance_is_that_of_both_kinds_of_pairs():
    c = experiments.check(packaged.load('experiments/text'))
    scores = captions.summarize(c, _lines('gaussian', 0))
    assert scores['best_guidance_read'] == 3.5
    assert (scores['seen_best'], scores['held_out_best'], scores['rows_best']) == (0.7, 0.4, 0.5)
    assert scores['held_out_common'] == 0.4
    assert scores['held_out_real'] == 0.95
    of_joint = captions.summarize(c, _lines('joint_gaussian', 0))
    assert of_joint['captions_held_out'] == 0.9
    assert of_joint['captions_nats'] == 1.5
    assert of_joint['captions_nats_alone'] == 12.5
    assert set(of_joint) >= {words.split()[2] for words in c.comparisons}


def test_the_page_of_captions(tmp_path):
    c = experiments.check(packaged.load('experiments/text'))
    by_row = {
        row: {seed: captions.summarize(c, _lines(row, seed)) for seed in c.seeds} for row in c.rows
    }
    verdicts = report.verdicts(c, by_row)
    assert verdicts[0]['verdict'] == 'reproduced'
    assert verdicts[0]['advantage']['mean'] == pytest.approx(0.1)
    found = {
        'rows': report.table(c, by_row),
        'verdicts': verdicts,
        'measured': [
            {'row': row, 'seed': seed, 'lines': _lines(row, seed)}
            for row in c.rows
            for seed in c.seeds
        ],
        'seconds': {'training': 60.0, 'measuring': 5.0},
        'command': 'COMMAND',
    }
    report.write(captions.KIND, c, json.loads(json.dumps(found)), str(tmp_path))
    page = (tmp_path / 'page.md').read_text()
    assert '| row | best guidance | pairs trained on | of real images | held-out pairs |' in page
    assert 'held-out pairs, best guidance' in page
    table = page[page.index('Texts written for real images') :]
    assert '| joint_gaussian | 0.9' in table
    assert '| gaussian |' not in table.split('\n\n')[1]
    assert '1.5' in table
    assert '12.5' in table
    with Image.open(tmp_path / 'captions.png') as picture:
        assert picture.size[0] > 800
