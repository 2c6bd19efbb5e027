"""The page of --mode=serve: its functions, its errors, and itself in a real browser."""

import functools
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request

import chex
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from sphere_ar_jax import main
from sphere_ar_jax.config import build, checks, schema
from sphere_ar_jax.data import pixels
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.sampling.model import Model
from sphere_ar_jax.serving import drawing, page
from tests import tiny_config
from tests.conftest import GOLDENS

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def model():
    """A model with random parameters, whose images depend on everything."""
    return Model(tiny_config.random_run())


def test_a_drawing_is_a_completion_by_the_model(model):
    """Beside `Model.complete`; other classes, seeds, scales and lines compile nothing."""
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    c = drawing.controls(model)
    assert c.classes == tuple('0123456789')
    assert (c.rows, c.guidance) == (4, 1.5)
    assert {'euler_maruyama', 'heun', 'ab2'} <= set(c.solvers)
    wish = drawing.first_wish(model)._replace(n=2, label=3, seed=7, picture=picture, kept=2)
    drawn = drawing.draw(model, wish)
    expected = model.complete([picture] * 2, 3, keep=8, seed=7)
    chex.assert_shape(drawn.images, (2, 16, 16, 1))
    np.testing.assert_array_equal(drawn.images, pixels.to_uint8(expected))
    assert drawn.kept == 8
    assert drawn.radius == pytest.approx(np.sqrt(8))
    chex.assert_shape(drawn.norms, (2, 16))
    assert 'seed 7' in drawn.words
    assert 'linear guidance 1.5' in drawn.words

    compiled = []

    def listen(event, duration, **about):
        if event.startswith('/jax/core/compile/'):
            compiled.append(about.get('fun_name'))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        other = wish._replace(label=5, seed=8, guidance=4.0, picture=None, kept=0)
        whole = drawing.draw(model, other)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    assert whole.kept == 0
    assert not np.array_equal(whole.images, drawn.images)
    (axis,) = drawing.plot_norms(drawn).axes
    np.testing.assert_allclose(axis.lines[2].get_ydata(), drawn.norms.mean(0))
    assert axis.lines[3].get_label() == 'R = 2.83'


def test_what_is_beyond_the_limits_is_one_line(model):
    wish = drawing.first_wish(model)
    blank = Image.new('L', (9, 9))
    for change, message in (
        (dict(n=17), 'images must be one of 1, 2, 4, 8, 16, not 17'),
        (dict(steps=10**6), 'steps must lie between 1 and 200'),
        (dict(picture=blank, kept=4), 'kept rows must lie between 0 and 3'),
        (dict(solver='magic'), "solver 'magic'"),
        (dict(label=10), 'labels must lie between 0 and 9'),
        (dict(seed=-1), 'seed must be a whole number'),
        (dict(guidance=float('nan')), 'guidance must be finite'),
    ):
        with pytest.raises(ValueError, match=message) as error:
            drawing.draw(model, wish._replace(**change))
        assert '\n' not in str(error.value)


def test_a_drawing_for_a_text():
    """Beside `Model.sample`, and what cannot be drawn."""
    cfg = tiny_config.get_config()
    cfg.data.name = 'composed'
    cfg.vae.channels = (4, 4, 8, 16)
    cfg.ar.update(condition='text', text_tokens=24)
    cfg = checks.check(cfg)
    find = functools.partial(build.encode_prompt, cfg)
    model = Model(tiny_config.random_run(cfg), find=find)
    assert drawing.controls(model).classes is None
    drawing.warm_up(model)
    wish = drawing.first_wish(model)._replace(label=' a one above a two ', n=2, seed=5)
    drawn = drawing.draw(model, wish)
    expected = model.sample(['a one above a two'] * 2, seed=5)
    np.testing.assert_allclose(drawn.images, pixels.to_uint8(expected), atol=1)
    assert drawn.words.startswith("2 images of 'a one above a two', seed 5, linear guidance 1.5")
    for label, message in (
        ('', 'a prompt is empty: say what the image shows'),
        ('x' * 25, 'too long: it has 25 tokens, and this model reads 24'),
    ):
        with pytest.raises(UserError, match=message):
            drawing.draw(model, wish._replace(label=label))


def test_the_line_lies_between_rows_of_tokens(model):
    side = drawing.shown_side(model)
    assert side == 320
    assert [drawing.row_at(y, side, 4) for y in (0, 39, 41, 161, 320)] == [
        0,
        0,
        1,
        2,
        3,
    ]
    shown = drawing.with_line(model, Image.new('L', (30, 20), 255), 1)
    chex.assert_shape(shown, (320, 320, 3))
    assert (shown[:78] == 255).all()
    assert (shown[82:] < 180).all()
    assert (shown[78:82] == (230, 60, 40)).all()


def _refused(capsys, *arguments):
    """The one line with which a command ends."""
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as end:
        rest = main._guarded(main._parse_flags)(['main', '--mode=serve', *map(str, arguments)])
        main._guarded(main.main)(rest)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert end.value.code == 2, lines
    assert len(lines) == 1, lines
    return lines[0]


def test_a_page_that_cannot_be_served_says_why(capsys, monkeypatch, old_runs, tmp_path):
    assert 'has no run: train one' in _refused(capsys, f'--workdir={tmp_path}')
    monkeypatch.setitem(sys.modules, 'gradio', None)  # no such module
    line = _refused(capsys, f'--workdir={old_runs / "digits"}')
    assert "pip install 'sphere_ar_jax[serve]'" in line
    with socket.create_server(('127.0.0.1', 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(UserError, match=f'port {taken} of 127.0.0.1 cannot be used'):
            page._require_free('127.0.0.1', taken)
    with pytest.raises(UserError, match='give a number from 1 to 65535'):
        page._require_free('127.0.0.1', 65536)
    line = _refused(capsys, f'--workdir={old_runs / "digits"}', '--host=::1')
    assert '--host=::1: the page cannot listen at an address of IPv6' in line
    with pytest.raises(UserError, match=r'of a\.\.b cannot be used \(that is no name of a host'):
        page._require_free('a..b', 7860)


def test_a_run_of_many_steps_is_drawn_as_it_is():
    cfg = schema.changed(tiny_config.get_config(), {'sampling.num_steps': 250})
    wish = drawing.first_wish(Model(tiny_config.random_run(cfg)))
    drawing._check(wish, 4, drawing.most_steps(250))
    with pytest.raises(UserError, match='steps must lie between 1 and 250, not 251'):
        drawing._check(wish._replace(steps=251), 4, drawing.most_steps(250))


# ---- in a browser

CHROMIUM = shutil.which('chromium')
DRIVER = shutil.which('chromedriver')
FLAGS = (
    'headless=new', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run',
    'disable-background-networking', 'disable-component-update', 'disable-sync',
    'window-size=1200,1500',
)  # fmt: skip


@pytest.fixture
def served(old_runs):
    """The address of the page of an old run, and its process."""
    pytest.importorskip('gradio', reason="needs pip install '.[serve]'")
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    words = ['--mode=serve', f'--workdir={old_runs / "digits"}', f'--port={port}']
    process = subprocess.Popen(
        [sys.executable, '-m', 'sphere_ar_jax.main', *words],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        lines = []
        while not lines or 'is ready' not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], f'the page was not served: {lines}'
        yield f'http://127.0.0.1:{port}', process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def browser(tmp_path):
    """Chromium without a window, which notes what it asks for and what it says."""
    webdriver = pytest.importorskip('selenium.webdriver', reason='needs pip install selenium')
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f'user-data-dir={tmp_path}'):
        options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL', 'browser': 'ALL'})
    service = webdriver.ChromeService(DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def _pixels(address):
    """The pixels of an image of the page."""
    with urllib.request.urlopen(address) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert('L')).astype(int)


@pytest.mark.slow
def test_the_page_in_a_browser(browser, served):
    """A class is chosen and drawn, an image is completed below a line, and norms are plotted."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    address, process = served
    wait = WebDriverWait(browser, 60)

    def found(selector, count=1):
        return wait.until(
            lambda b: len(all := b.find_elements(By.CSS_SELECTOR, selector)) >= count and all
        )

    def files():
        images = 'document.querySelectorAll("#images img")'
        return browser.execute_script(f'return Array.from({images}, image => image.src)')

    def drawn_after(button):
        before = files()
        browser.find_element(By.ID, button).click()
        wait.until(lambda b: len(files()) == 4 and not set(files()) & set(before))
        return [_pixels(file) for file in files()]

    browser.get(address)
    found('#draw')
    found('#class input')[0].click()
    found('[role=option]', 10)[3].click()
    images = drawn_after('draw')
    wait.until(lambda b: found('#words')[0].text.startswith('4 images of 3, seed 0'))
    # Image 3 of the class 3 is what the version that trained the run drew.
    measured = np.load(GOLDENS / 'old_runs.npz')['digits/images'][3]
    expected = np.asarray(pixels.to_uint8(measured)).astype(int).squeeze()
    chex.assert_shape(images, (16, 16))
    assert np.abs(images[3] - expected).max() <= 1
    wait.until(lambda b: int(found('#norms img')[0].get_attribute('naturalWidth')) > 500)

    found('#images img')[1].click()
    (line,) = found('#line img')
    # A quarter of the picture below its middle: three of four rows are kept.
    ActionChains(browser).move_to_element(line).move_by_offset(
        0, line.size['height'] // 4
    ).click().perform()
    (rows,) = found('#kept input[type=number]')
    wait.until(lambda b: rows.get_attribute('value') == '3')
    # They share three rows of tokens, so that they differ below the line most.
    spread = np.stack(drawn_after('complete')).std(0)
    assert spread[:4].mean() < spread[12:].mean()

    asked = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    urls = [
        event['params']['request']['url']
        for event in asked
        if event['method'] == 'Network.requestWillBeSent'
    ]
    outside = [url for url in urls if url.startswith('http') and not url.startswith(address)]
    assert len(urls) > 10
    assert outside == []
    assert [e for e in browser.get_log('browser') if e['level'] == 'SEVERE'] == []
    process.send_signal(signal.SIGINT)
    assert process.stdout.read() == 'closed\n'
    assert process.wait(timeout=30) == 0
