"""report.html can be read on a wide and a narrow screen, in light and in dark."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from sphere_ar_jax.evaluation import page, pictures
from sphere_ar_jax.models.posteriors import POSTERIORS, PowerSpherical


@pytest.fixture
def html(tmp_path):
    """The page of a run with a small grid of samples, a wide one of reconstructions, and curves."""
    for name, width in (('samples', 300), ('reconstructions', 3000), ('curves', 1600)):
        Image.fromarray(np.zeros((10, width, 3), np.uint8)).save(tmp_path / f'{name}.png')
    metrics = {'samples/accuracy': 0.99, 'wall_s/ar': 12.3, 'wall_s/total': 45.6}
    texts = ('a <b> & c', 'All is well.', metrics, '{}', 'run <it>')
    page.save_page(str(tmp_path), *texts, PowerSpherical())
    return (tmp_path / 'report.html').read_text()


def _kinds(html):
    """The class of each picture by its alternative text."""
    return {alt: kind for kind, alt in re.findall(r'<img class="(\w+)" alt="([^"]*)"', html)}


def test_only_small_pictures_keep_their_pixels(html):
    """Curves have thin lines; a picture that is shrunk must not lose lines of pixels."""
    assert _kinds(html) == {
        'a grid of samples': 'pixels',
        'originals and reconstructions': 'plot',
        'training curves': 'plot',
    }
    rules = re.findall(r'([^{}\n]+)\{[^{}]*image-rendering: pixelated', html)
    assert [rule.strip() for rule in rules] == ['img.pixels']


def test_narrow_screens(html):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    wide = re.findall(r'<div class="wide"><(\w+)', html)
    assert wide == ['img', 'img', 'table', 'img']
    assert '.wide { overflow-x: auto; }' in html


def test_nothing_comes_from_outside(html):
    """Pictures are in the page itself, and nothing in it asks for another file."""
    sources = re.findall(r'\b(?:src|href)\s*=\s*"([^"]*)"', html)
    assert len(sources) == 3
    assert all(s.startswith('data:image/png;base64,') for s in sources)
    assert not re.search(r'https?:|//\w|@import|url\(|<(?:script|link|iframe)\b', html)


def test_seconds_and_units_are_explained(html):
    rows = dict(re.findall(r'<code>(wall_s/\w+)</code></td>.*?<td>(.*?)</td>', html))
    assert set(rows) == {'wall_s/ar', 'wall_s/total'}
    assert all(text.endswith(', s') for text in rows.values())
    assert html.count('is time on the clock in seconds') == 1
    assert html.index('wall_s/…') < html.index('<table>') < html.index('over training steps')


def _luminance(colour):
    """Relative luminance of '#rgb' or '#rrggbb', by the Web Content Accessibility Guidelines 2."""
    digits = colour.lstrip('#')
    if len(digits) == 3:
        digits = ''.join(2 * digit for digit in digits)
    parts = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_light_and_dark_have_colours_of_their_own(html):
    """Text has the contrast of at least 7 that those guidelines ask for; pictures stay on white."""
    assert 'color-scheme: light dark' in html
    themes = [
        dict(re.findall(r'--(\w+): (#\w+)', block))
        for block in re.findall(r':root \{([^}]*)', html)
    ]
    assert [_luminance(theme['ground']) > 0.5 for theme in themes] == [True, False]
    for theme in themes:
        assert set(theme) == {'ground', 'text', 'line', 'code'}
        for ground in (theme['ground'], theme['code']):
            light, dark = sorted((_luminance(ground), _luminance(theme['text'])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 7
    assert re.search(r'img \{[^}]*background: #fff;', html)


def test_texts_are_escaped(html):
    assert 'a &lt;b&gt; &amp; c' in html
    assert 'run &lt;it&gt;' in html
    assert '<b>' not in html
    assert '{' + '{' not in html


def test_no_curves_are_no_picture(tmp_path):
    (tmp_path / 'ar').mkdir()
    (tmp_path / 'ar' / 'metrics.jsonl').write_bytes(b'\xff\n')
    page.save_curves(tmp_path / 'curves.png', str(tmp_path), PowerSpherical())
    assert not (tmp_path / 'curves.png').exists()


@pytest.mark.parametrize('word', POSTERIORS)
def test_numbers_of_a_posterior_are_explained_in_its_own_words(tmp_path, word):
    posterior = POSTERIORS[word]()
    metrics = {f'vae/{name}': 0.5 for name in posterior.shown}
    page.save_page(str(tmp_path), 'a', 'b', metrics, '{}', 'c', posterior)
    rows = re.findall(
        r'<code>vae/(\w+)</code></td>.*?<td>(.*?)</td>', (tmp_path / 'report.html').read_text()
    )
    assert dict(rows) == posterior.shown


@pytest.mark.parametrize('word', POSTERIORS)
def test_a_posterior_has_one_curve_for_each_label(tmp_path, word, monkeypatch):
    posterior = POSTERIORS[word]()
    (tmp_path / 'tokenizer').mkdir()
    line = {'step': 1, 'psnr': 20.0, **dict.fromkeys(posterior.labels, 2.0)}
    (tmp_path / 'tokenizer' / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
    figures = []
    monkeypatch.setattr(page, 'save_figure', lambda figure, path: figures.append(figure))
    page.save_curves(tmp_path / 'curves.png', str(tmp_path), posterior)
    titles = [axis.get_title() for axis in figures[0].axes if axis.get_title()]
    expected = [f'tokenizer: {label}' for label in posterior.labels.values()]
    assert titles == ['tokenizer: PSNR of the batch, dB', *expected]


def test_a_dollar_in_a_caption_is_a_dollar(tmp_path):
    """matplotlib would read what stands between two of them as a formula."""
    images = np.zeros((3, 8, 8, 1), np.float32)
    captions = ['$_$ face', 'from $5 to $10', 'save 50% $5 #1 $10']
    pictures.save_classes(str(tmp_path / 'rows.png'), images, 1, captions)
    pictures.save_captioned(str(tmp_path / 'titles.png'), images, captions)
    for name in ('rows', 'titles'):
        with Image.open(tmp_path / f'{name}.png') as picture:
            assert (np.asarray(picture.convert('L')) < 128).any()


def test_letters_that_the_font_lacks_are_no_warning(tmp_path, recwarn):
    images = np.zeros((2, 8, 8, 1), np.float32)
    pictures.save_classes(str(tmp_path / 'rows.png'), images, 1, ['中文', 'مرحبا'])
    assert not recwarn.list
