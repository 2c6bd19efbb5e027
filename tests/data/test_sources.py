"""Sources of images: every byte as tarfile or the file system has it.

What is damaged is said in one line.
"""

import concurrent.futures
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time

import filelock
import numpy as np
import pytest
from PIL import Image, ImageOps

from sphere_ar_jax.data import imagenet, sources, stand_in
from sphere_ar_jax.data.files import listing
from sphere_ar_jax.runtime.console import UserError

ROOT = pathlib.Path(__file__).parents[2]
SYNSETS = ('n02099601', 'n01440764', 'n04243546')  # not sorted
FORMATS = {'ustar': tarfile.USTAR_FORMAT, 'gnu': tarfile.GNU_FORMAT, 'pax': tarfile.PAX_FORMAT}


def _tar(files, format=tarfile.USTAR_FORMAT):
    """A tar in memory of {name: bytes}, or of (name, bytes) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w', format=format) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


SMALL = {
    'n01.tar': _tar({'n01_1.JPEG': b'one', 'n01_2.JPEG': b'2' * 700}),
    'n02.tar': _tar({'n02_1.JPEG': b''}),
}


def _truth(path):
    """[(synset, name, bytes)] of a tar of tars, as `tarfile` extracts them."""
    found = []
    with tarfile.open(path) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                synset = member.name.removesuffix('.tar')
                found += [(synset, m.name, inner.extractfile(m).read()) for m in inner if m.isreg()]
    return found


def _contents(source):
    return [
        (source[i]['image'], int(source[i]['label']), source.name(i)) for i in range(len(source))
    ]


def _refusal(make, *arguments, **options):
    """The line that a call is refused with."""
    with pytest.raises(UserError) as caught:
        make(*arguments, **options)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope='module')
def stand_in_tar(tmp_path_factory):
    path = tmp_path_factory.mktemp('imagenet') / 'ILSVRC2012_img_train.tar'
    stand_in.write_tar(path, SYNSETS, images=8, seed=0, broken=2)
    return path


@pytest.fixture
def path(tmp_path):
    """Where a test writes a tar of its own."""
    return tmp_path / 'train.tar'


# ---- the stand-in


def test_odd_files_are_what_the_json_says(stand_in_tar):
    odd = json.loads(pathlib.Path(f'{stand_in_tar}.json').read_text())
    assert sorted(odd.values()) == sorted([*stand_in.ODD, *stand_in.BROKEN])
    for synset, name, content in _truth(stand_in_tar):
        kind = odd.get(f'{synset}/{name}')
        if kind in stand_in.BROKEN:
            assert (kind == 'empty') == (content == b'')
            with pytest.raises(OSError):
                Image.open(io.BytesIO(content)).load()
            continue
        image = Image.open(io.BytesIO(content))
        image.load()
        assert image.format == ('PNG' if kind == 'png' else 'JPEG')
        assert image.mode == {'grey': 'L', 'cmyk': 'CMYK'}.get(kind, 'RGB')
        assert bool(image.info.get('progressive')) == (kind == 'progressive')
        assert (ImageOps.exif_transpose(image).size == image.size[::-1] != image.size) == (
            kind == 'rotated'
        )
        assert 60 <= min(image.size) <= max(image.size) <= 600


def test_a_rotated_file_shows_upright():
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :30] = 255
    shown = ImageOps.exif_transpose(
        Image.open(io.BytesIO(stand_in._encode(Image.fromarray(upright), 'rotated')))
    )
    # The tolerance allows for JPEG's error at the edges.
    np.testing.assert_allclose(np.asarray(shown, float), upright, atol=60)


def test_the_stand_in_is_a_function_of_its_seed(tmp_path):
    def write(seed, broken=2):
        odd = stand_in.write_tar(tmp_path / 'a.tar', SYNSETS[:2], 3, seed, broken)
        return (tmp_path / 'a.tar').read_bytes(), odd

    assert write(5) == write(5)
    assert write(5)[0] != write(6)[0]
    assert list(write(5, broken=0)[1].values()).count('truncated') == 0
    assert len(write(5, broken=3)[1]) == 6  # as many as there are images; the broken ones first
    assert sorted(write(5, broken=6)[1].values()) == ['empty'] * 3 + ['truncated'] * 3


def test_the_stand_in_by_its_command(tmp_path):
    words = ['--synsets=4', '--images=2', '--seed=3', '--broken=1']
    stand_in.main(['stand_in', str(tmp_path / 'new'), *words])
    source = sources.ImageNetTar(tmp_path / 'new' / 'ILSVRC2012_img_train.tar')
    assert len(source) == 8
    assert set(source.class_names) < {synset for synset, _ in imagenet.classes()}
    for wrong, message in (
        ('--synsets=1001', 'in the range'),
        ('--images=0', '--images=0'),
        ('--broken=61', 'must lie between 0 and 60'),
        ('--seed=-1', '--seed=-1'),
    ):
        with pytest.raises(UserError, match=message):
            stand_in.main(['stand_in', str(tmp_path), wrong])


# ---- ImageNet's tar


def test_every_byte_is_what_tarfile_extracts(stand_in_tar):
    source = sources.ImageNetTar(stand_in_tar)
    truth = _truth(stand_in_tar)
    assert source.class_names == tuple(sorted(SYNSETS))
    assert source.num_classes == 3
    rank = {synset: k for k, synset in enumerate(sorted(SYNSETS))}
    assert _contents(source) == [
        (content, rank[synset], f'{synset}/{name}') for synset, name, content in truth
    ]
    assert len(source) == 24
    assert source[5]['label'].dtype == np.int32


@pytest.mark.parametrize('format', FORMATS)
def test_tars_of_all_formats_and_strange_names(path, format):
    names = [
        'a b\n.JPEG',
        'é.JPEG',
        "it's\\.JPEG",
        '../../up.JPEG',
        '/root.JPEG',
        'x.JPEG',
        'x.JPEG',
        'no_suffix',
    ]
    names += [] if format == 'ustar' else ['long' * 60 + '.JPEG']
    inner = _tar([(name, b'%d' % i * i * 300) for i, name in enumerate(names)], FORMATS[format])
    path.write_bytes(_tar({'./dir/n\t7.tar': inner, 'n01440764.tar': inner}, FORMATS[format]))
    source = sources.ImageNetTar(path)
    assert [source[i]['image'] for i in range(len(source))] == [
        content for _, name, content in _truth(path) if name != 'no_suffix'
    ]
    assert source.left_out == '2 file(s) that are no images (no suffix 2)'
    assert source.class_names == ('n01440764', 'n\\t7')
    assert source.name(0) == 'n\\t7/a b\\n.JPEG'
    assert source.name(1) == ('n\\t7/?.JPEG' if format == 'pax' else 'n\\t7/é.JPEG')
    assert all(source.name(i).isprintable() for i in range(len(source)))


def test_a_tar_that_gnu_tar_made(tmp_path):
    if not shutil.which('tar'):
        pytest.skip('no tar command')
    for synset in SYNSETS:
        folder = tmp_path / 'work' / synset
        (folder / 'below').mkdir(parents=True)
        for i in range(3):
            (folder / f'{synset}_{i}.JPEG').write_bytes(os.urandom(700 * i))
        (folder / 'below' / f'{"y" * 140}.png').write_bytes(b'deep')
        subprocess.run(['tar', '-cf', f'../{synset}.tar', '.'], cwd=folder, check=True)
    outer = tmp_path / 'outer.tar'
    subprocess.run(
        ['tar', '-cf', outer, *(f'{s}.tar' for s in SYNSETS)], cwd=tmp_path / 'work', check=True
    )
    source = sources.ImageNetTar(outer)
    assert [source[i]['image'] for i in range(len(source))] == [
        content for *_, content in _truth(outer)
    ]
    assert len(source) == 12


def test_all_of_imagenet_has_imagenets_ids(path):
    tars = {
        f'{synset}.tar': _tar({f'{synset}_1.JPEG': synset.encode()})
        for synset, _ in imagenet.classes()
    }
    path.write_bytes(_tar(dict(reversed(tars.items()))))
    source = sources.ImageNetTar(path)
    for i in (0, 1, 500, 999):
        assert imagenet.find(source[i]['image'].decode()) == source[i]['label'] == 999 - i
    tars['n00000000.tar'] = tars.pop('n02099601.tar')
    path.write_bytes(_tar(tars))
    assert 'n00000000 is none of them' in _refusal(sources.ImageNetTar, path)


def test_the_index_is_made_once(path):
    path.write_bytes(_tar(SMALL))
    told = []
    before = _contents(sources.ImageNetTar(path, progress=lambda *x: told.append(x)))
    size = path.stat().st_size
    assert told == sorted(told)
    assert len(told) == 3
    assert told[-1] == (size, size)
    assert sorted(os.listdir(path.parent)) == ['train.tar', 'train.tar.index.npz']
    again = []
    assert _contents(sources.ImageNetTar(path, progress=lambda *x: again.append(x))) == before
    assert not again

    index = pathlib.Path(f'{path}.index.npz')
    whole = index.read_bytes()
    with np.load(index) as file:
        kept = dict(file)
    flipped = bytearray(whole)
    flipped[whole.index(kept['offsets'].tobytes())] ^= 1
    shorter = bytearray(whole)  # an array that says it is shorter, so that no CRC is checked
    place = whole.index(b"'shape': (3,)")
    shorter[place + 10 : place + 11] = b'2'
    for wrong in (whole[:300], flipped, shorter, b'', b'no', pickle.dumps([1])):
        index.write_bytes(wrong)
        again.clear()
        assert _contents(sources.ImageNetTar(path, progress=lambda *x: again.append(x))) == before
        assert again
    np.savez(index, **kept | {'version': 0})
    again.clear()
    assert _contents(sources.ImageNetTar(path, progress=lambda *x: again.append(x))) == before
    assert again


def test_no_flipped_bit_of_an_index_is_believed(path):
    """Each leaves the index as good as it was, or has it made anew; never an error."""
    path.write_bytes(_tar(SMALL))
    before = _contents(sources.ImageNetTar(path))
    index = pathlib.Path(f'{path}.index.npz')
    whole = index.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(whole), 150, replace=False).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        index.write_bytes(damaged)
        assert _contents(sources.ImageNetTar(path)) == before, place


def test_an_interrupted_index_leaves_nothing(path):
    path.write_bytes(_tar(SMALL))

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sources.ImageNetTar(path, progress=stop)
    assert os.listdir(path.parent) == ['train.tar']


def test_a_tar_that_changes_while_the_index_is_made_is_refused(path):
    path.write_bytes(_tar(SMALL))
    assert 'changed while it was read' in _refusal(
        sources.ImageNetTar, path, progress=lambda *_: os.utime(path, (0, 0))
    )
    assert os.listdir(path.parent) == ['train.tar']


def test_a_changed_tar_has_a_new_index(path):
    def rewrite(files, stat=None):
        path.write_bytes(_tar(files))
        if stat:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return path.stat()

    def check():
        source = sources.ImageNetTar(path)
        assert [source[i]['image'] for i in range(len(source))] == [
            content for *_, content in _truth(path)
        ]
        return source.class_names

    stat = rewrite(SMALL)
    assert check() == ('n01', 'n02')
    later = rewrite(SMALL | {'n03.tar': SMALL['n01.tar']})
    assert later.st_size == stat.st_size or check() == ('n01', 'n02', 'n03')
    # same size and time, other synsets: only the headers tell
    stat = rewrite(SMALL)
    check()
    renamed = {name.replace('n01', 'n07'): content for name, content in SMALL.items()}
    assert rewrite(renamed, stat).st_size == stat.st_size
    assert check() == ('n02', 'n07')
    # same size and synsets, other images: the time tells
    swapped = _tar({'n01_1.JPEG': b'2' * 700, 'n01_2.JPEG': b'one'})
    rewrite(renamed | {'n07.tar': swapped})
    check()


def test_a_change_while_in_use_is_noticed(path):
    path.write_bytes(_tar(SMALL))
    source = sources.ImageNetTar(path)
    good = path.read_bytes()
    # The places and sizes stay the same.
    renamed = _tar(SMALL | {'n01.tar': _tar({'n01_1.JPEG': b'one', 'n01_9.JPEG': b'3' * 700})})
    moved = _tar(
        {
            'n01.tar': _tar({'n01_2.JPEG': b'2' * 700, 'n01_1.JPEG': b'one'}),
            'n02.tar': SMALL['n02.tar'],
        }
    )
    for changed in (good[: source._offsets[1] + 5], bytes(len(good)), moved, renamed):
        path.write_bytes(changed)
        assert 'has changed' in _refusal(lambda: source[1])
        assert isinstance(source.name(1), str)
    path.write_bytes(good)
    assert source[1]['image'] == b'2' * 700
    state = pickle.dumps(source)
    path.unlink()
    assert 'cannot be read' in _refusal(pickle.loads, state)


def test_every_cut_is_noticed_or_harmless(path):
    whole = _tar(SMALL)
    path.write_bytes(whole)
    truth = _contents(sources.ImageNetTar(path))
    harmless = 0
    for cut in [*range(0, len(whole), 512), *range(1, len(whole), 1013)]:
        path.write_bytes(whole[:cut])
        try:
            assert _contents(sources.ImageNetTar(path)) == truth
            harmless += 1
        except UserError as error:
            assert re.search('cut off|damaged', str(error))
    zeros = len(whole) - len(whole.rstrip(b'\0'))
    assert 0 < harmless <= zeros // 512 - 1  # cuts into what fills the last record


def test_every_damaged_header_is_noticed(path):
    whole = _tar(SMALL)
    path.write_bytes(whole)
    with tarfile.open(path) as outer:
        headers = [m.offset for m in outer]
    headers += [o - 512 for o in sources.ImageNetTar(path)._offsets.tolist()]
    assert len(headers) == 5
    for header in headers:
        # These bytes lie in: name, mode, size, checksum, kind, magic, padding.
        for byte in (0, 100, 124, 150, 156, 257, 511):
            damaged = bytearray(whole)
            damaged[header + byte] ^= 3
            path.write_bytes(damaged)
            assert re.search('damaged|no uncompressed tar', _refusal(sources.ImageNetTar, path))


def _link(name):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as archive:
        member = tarfile.TarInfo(name)
        member.type = tarfile.SYMTYPE
        member.linkname = '/etc/passwd'
        archive.addfile(member)
    return buffer.getvalue()


def _gzip(content):
    import gzip

    return gzip.compress(content)


def test_what_systems_leave_in_tars_is_no_image(path):
    """AppleDouble files, Thumbs.db and their like, in the outer tar and in the inner ones."""
    inner = {
        'n01_1.JPEG': b'one',
        '._n01_1.JPEG': b'double',
        './.DS_Store': b'x',
        'Thumbs.db': b'x',
        '__MACOSX/n01_1.JPEG': b'x',
        'in/n01_2.png': b'two',
        'notes.txt': b'x',
    }
    outer = {
        '._n01.tar': b'double',
        '.DS_Store': b'x',
        '__MACOSX/._n01.tar': b'x',
        'README': b'x',
        'n01.tar': _tar(inner),
        'n02.tar': _tar({'notes.TXT': b'x'}),
        'n03.tar': _tar({'n03_1.JPEG': b'three'}),
    }
    path.write_bytes(_tar(outer))
    for _ in range(2):  # the second time from the index
        source = sources.ImageNetTar(path)
        assert [(image, label) for image, label, _ in _contents(source)] == [
            (b'one', 0),
            (b'two', 0),
            (b'three', 2),
        ]
        assert source.class_names == ('n01', 'n02', 'n03')
        assert source.left_out == (
            '3 file(s) that are no images (.txt 2, no suffix 1); 7 hidden file(s); '
            'classes without images: n02'
        )


def _with_header(kind, size, content=b''):
    """A tar whose second header is an extension of the given kind that says it has `size` bytes."""
    member = tarfile.TarInfo('n01_0.JPEG')
    header = tarfile.TarInfo('x')
    header.type = kind
    header.size = size
    whole = member.tobuf(tarfile.GNU_FORMAT) + header.tobuf(tarfile.GNU_FORMAT) + content
    return whole + bytes(-len(whole) % 512) + bytes(1024)


@pytest.mark.parametrize('size', [2**62, 2**40, -512])
@pytest.mark.parametrize(
    'kind', [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK]
)
def test_headers_of_absurd_size_are_refused_in_one_line(path, kind, size):
    inner = _with_header(kind, size)
    for content in (inner, _tar({'n01.tar': inner}), inner[512:], _tar({'n01.tar': inner[512:]})):
        path.write_bytes(content)
        line = _refusal(sources.ImageNetTar, path)
        assert str(path) in line
        assert line.isprintable()
        assert len(line) < 500


def test_names_are_shown_printable_and_cut(path):
    hostile = '\x1b[31m' + 'n' * 300
    long_name = 'm' * 5_000_000
    for content in (
        _tar({f'{hostile}.tar': SMALL['n01.tar']}, tarfile.PAX_FORMAT),
        _tar({f'{long_name}.tar': SMALL['n01.tar']}, tarfile.GNU_FORMAT),
        _tar({'n01.tar': _link(f'{hostile}.JPEG')}),
    ):
        path.write_bytes(content)
        line = _refusal(sources.ImageNetTar, path)
        assert line.isprintable()
        assert len(line) < 700
    inner = _tar({'a.JPEG': b'1', f'b.{hostile}': b'2', f'{long_name}.c': b'3'}, tarfile.GNU_FORMAT)
    path.write_bytes(_tar({'n01.tar': inner}))
    left_out = sources.ImageNetTar(path).left_out
    assert left_out.startswith('2 file(s) that are no images')
    assert left_out.isprintable()
    assert len(left_out) < 200


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'does not end as an uncompressed tar'),
        (b'text' * 1000, 'does not end as an uncompressed tar'),
        (b'text' * 1024 + bytes(1024), 'is no uncompressed tar'),
        (bytes(10240), 'holds no tars'),
        (_gzip(_tar(SMALL)), 'does not end as an uncompressed tar'),
        (
            _tar({f'ILSVRC2012_val_{i:08d}.JPEG': b'x' for i in range(3)}),
            'ILSVRC2012_img_train.tar is needed',
        ),
        (_tar({'README': b'x', '._n01.tar': b'x'}), 'holds no tars, but must hold one for each'),
        (_tar({'n01.tar': b'text' * 200}), r'n01.tar is no uncompressed tar'),
        (_tar({'n01.tar': b''}), r'n01.tar is no uncompressed tar'),
        (_tar({'n01.tar': _gzip(SMALL['n01.tar'])}), r'n01.tar is no uncompressed tar'),
        (_tar({'n01.tar': _tar({})}), r'holds no images \(classes without images: n01\)'),
        (_tar({'n01.tar': SMALL['n01.tar'][:1700]}), r'n01.tar is damaged'),
        (_tar([('n01.tar', SMALL['n01.tar'])] * 2), 'holds n01.tar twice'),
        (_tar({'n01.tar': _link('n01_1.JPEG')}), 'n01_1.JPEG, which is no plain file'),
        (_link('n01.tar'), 'n01.tar, which is no plain file'),
    ],
    ids=range(15),  # the contents themselves would be the names
)
def test_what_is_no_tar_of_tars_is_refused(path, content, message):
    path.write_bytes(content)
    line = _refusal(sources.ImageNetTar, path)
    assert re.search(message, line)
    assert str(path) in line
    assert os.listdir(path.parent) == ['train.tar']


def test_what_is_not_there_is_refused(tmp_path):
    for make, message in (
        (sources.ImageNetTar, 'cannot be read: No such file'),
        (sources.ImageFolder, 'cannot be read: No such file'),
        (sources.ArrayRecords, 'has no images.json'),
    ):
        line = _refusal(make, tmp_path / 'nowhere')
        assert message in line
        assert 'nowhere' in line
    assert 'Is a directory' in _refusal(sources.ImageNetTar, tmp_path)


_AS_ANYONE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from sphere_ar_jax.data import sources
from sphere_ar_jax.runtime.console import UserError
sources.ImageNetTar(sys.argv[4])  # whatever is imported late is so now, as others may not read it
if os.getuid() == 0:  # who may write anywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
os.environ['XDG_CACHE_HOME'] = sys.argv[3]
try:
    print(len(sources.ImageNetTar(sys.argv[2])), os.path.exists(sys.argv[2] + '.index.npz'))
except UserError as error:
    print(error)
"""


def test_without_permission():
    """Nothing can be written beside the tar: the index goes to the cache, if that can be; or the
    tar cannot be read.
    """

    def run(cache):
        pathlib.Path(f'{other}.index.npz').unlink(missing_ok=True)
        command = [sys.executable, '-c', _AS_ANYONE, str(ROOT), str(tar), str(cache), str(other)]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    with tempfile.TemporaryDirectory() as root:
        data = pathlib.Path(root, 'data')
        cache = pathlib.Path(root, 'cache')
        tar = pathlib.Path(root, 'data', 'a.tar')
        data.mkdir()
        cache.mkdir()
        other = pathlib.Path(root, 'other.tar')
        tar.write_bytes(_tar(SMALL))
        other.write_bytes(_tar(SMALL))
        os.chmod(root, 0o755)
        data.chmod(0o555)
        cache.chmod(0o777)
        assert run(cache) == '3 False'
        (kept,) = os.listdir(cache / 'sphere_ar_jax')
        assert re.fullmatch(r'a\.tar\.[0-9a-f]{8}\.index\.npz', kept)
        assert run(data).endswith('(Permission denied)')
        tar.chmod(0)
        assert run(cache).endswith('a.tar cannot be read: Permission denied')
        data.chmod(0o755)


# ---- many threads and processes


def _build_together(path, me, others):
    """Opens a tar, but goes on only when all processes are in the midst of it."""

    def wait(done, total):
        pathlib.Path(f'{path}.{me}').touch()
        deadline = time.monotonic() + 60
        while not all(os.path.exists(f'{path}.{i}') for i in range(others)):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    return _contents(sources.ImageNetTar(path, progress=wait))


@pytest.fixture(scope='module')
def spawned():
    """Processes that share nothing with this one."""
    with concurrent.futures.ProcessPoolExecutor(3, multiprocessing.get_context('spawn')) as pool:
        yield pool


def test_processes_may_build_the_index_at_once(path, spawned):
    path.write_bytes(_tar(SMALL))
    futures = [spawned.submit(_build_together, str(path), i, 3) for i in range(3)]
    results = [future.result(timeout=120) for future in futures]
    left = {name for name in os.listdir(path.parent) if not re.fullmatch(r'train\.tar\.\d', name)}
    assert left == {'train.tar', 'train.tar.index.npz'}
    told = []
    assert results == [_contents(sources.ImageNetTar(path, progress=lambda *x: told.append(x)))] * 3
    assert not told


@pytest.fixture(scope='module')
def folder(stand_in_tar, tmp_path_factory):
    root = tmp_path_factory.mktemp('folder')
    for synset, name, content in _truth(stand_in_tar):
        (root / synset).mkdir(exist_ok=True)
        (root / synset / name).write_bytes(content)
    return root


@pytest.fixture(scope='module')
def packed(stand_in_tar, tmp_path_factory):
    directory = tmp_path_factory.mktemp('packed') / 'images'
    sources.pack(sources.ImageNetTar(stand_in_tar), directory, shards=5)
    return directory


def _prepare(directory, entries, keys, supervised_keys):
    """Prepares a TFDS data set 'stand_in' in a directory without TensorFlow; entries: [(class or
    −1, name, file)].
    """
    tfds = pytest.importorskip('tensorflow_datasets')

    class StandIn(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            kinds = (
                tfds.features.Image(),
                tfds.features.ClassLabel(names=sorted(SYNSETS)),
                tfds.features.Image(),
            )
            features = tfds.features.FeaturesDict(dict(zip((*keys, 'mask'), kinds, strict=True)))
            return tfds.core.DatasetInfo(
                builder=self, features=features, supervised_keys=supervised_keys
            )

        def _split_generators(self, _):
            return {'train': self._generate_examples()}

        def _generate_examples(self):
            for synset, name, content in entries:
                values = io.BytesIO(content), synset, io.BytesIO(content)
                yield name, dict(zip((*keys, 'mask'), values, strict=True))

    StandIn(data_dir=directory, file_format='array_record').download_and_prepare()
    return directory


@pytest.fixture(scope='module')
def tfds_dir(stand_in_tar, tmp_path_factory):
    """A TFDS data set of the stand-in's images, but for the empty one."""
    entries = [entry for entry in _truth(stand_in_tar) if entry[2]]
    return _prepare(tmp_path_factory.mktemp('tfds'), entries, ('image', 'label'), None)


@pytest.fixture(scope='module')
def samples(stand_in_tar, tmp_path_factory):
    """The stand-in's images as two tars of WebDataset, with the synsets as labels."""
    directory = tmp_path_factory.mktemp('samples')
    files = []
    for synset, name, content in _truth(stand_in_tar):
        key = name.removesuffix('.JPEG')
        files += [(f'{key}.jpg', content), (f'{key}.cls', synset.encode())]
    for number, part in enumerate((files[:20], files[20:])):
        (directory / f'{number:05d}.tar').write_bytes(_tar(part))
    return directory


@pytest.fixture(scope='module')
def hub_dir(stand_in_tar, tmp_path_factory):
    """A repository of Parquet files as `datasets` writes it, but for the empty image.

    What the library prepares goes to a directory of the tests.
    """
    datasets = pytest.importorskip('datasets')
    entries = [entry for entry in _truth(stand_in_tar) if entry[2]]
    columns = {
        'image': [{'bytes': content, 'path': name} for _, name, content in entries],
        'label': [sorted(SYNSETS).index(synset) for synset, *_ in entries],
    }
    names = datasets.ClassLabel(names=sorted(SYNSETS))
    features = datasets.Features({'image': datasets.Image(decode=False), 'label': names})
    shown = datasets.Features({'image': datasets.Image(), 'label': names})
    table = datasets.Dataset.from_dict(columns, features=features).cast(shown)
    directory = tmp_path_factory.mktemp('hub') / 'birds'
    for number in range(2):
        path = directory / 'data' / f'train-{number:05d}-of-00002.parquet'
        path.parent.mkdir(parents=True, exist_ok=True)
        table.shard(2, number, contiguous=True).to_parquet(path, batch_size=5)
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp('cache'))
        patch.setattr(datasets.config, 'HF_DATASETS_CACHE', pathlib.Path(cache))
        yield directory


@pytest.fixture(scope='module')
def parquet(stand_in_tar, tmp_path_factory):
    """The stand-in's images in Parquet files of small row groups, with the synsets as texts."""
    pa = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    directory = tmp_path_factory.mktemp('parquet')
    entries = _truth(stand_in_tar)
    for number, part in enumerate((entries[:7], entries[7:])):
        columns = {'label': [e[0] for e in part], 'jpeg': [e[2] for e in part]}
        parquet.write_table(pa.table(columns), directory / f'{number}.parquet', row_group_size=3)
    return directory


# Packages of emoji have images of their own, see test_emoji.py.
@pytest.fixture(params=[kind for kind in sources.KINDS if kind != 'emoji'])
def source(request):
    """One of each kind, of the same images."""
    fixture = {
        'imagenet': 'stand_in_tar',
        'folder': 'folder',
        'array_records': 'packed',
        'tfds': 'tfds_dir',
        'hf': 'hub_dir',
        'webdataset': 'samples',
        'parquet': 'parquet',
    }
    where = request.getfixturevalue(fixture[request.param])
    arguments = ('stand_in', 'train', str(where)) if request.param == 'tfds' else (where,)
    return sources.KINDS[request.param](*arguments)


def test_every_source_is_one(source, stand_in_tar):
    truth = {content: sorted(SYNSETS).index(synset) for synset, _, content in _truth(stand_in_tar)}
    contents = _contents(source)
    assert {(image, label) for image, label, _ in contents} == set(truth.items()) - (
        {(b'', truth[b''])} if isinstance(source, sources.TFDS | sources.HuggingFace) else set()
    )
    assert len({name for *_, name in contents}) == len(source) == len(contents)
    assert source.num_classes == 3
    assert source.class_names == tuple(sorted(SYNSETS))
    assert source[0]['label'].dtype == np.int32
    assert source[0]['label'].shape == ()
    assert source[np.int64(3)]['image'] == source[3]['image'] == source[3 - len(source)]['image']
    for i in (len(source), -len(source) - 1):
        with pytest.raises(IndexError):
            source[i]


def test_threads_share_a_source(source):
    truth = _contents(source)
    order = np.random.default_rng(0).integers(len(source), size=2000).tolist()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for i, entry in zip(order, pool.map(source.__getitem__, order), strict=True):
            assert (entry['image'], entry['label']) == truth[i][:2]


def test_sources_go_to_other_processes(source, spawned):
    assert spawned.submit(_contents, source).result(timeout=120) == _contents(source)


# ---- directories


def test_folders_are_read_in_order(tmp_path):
    files = [
        'b/2.png', 'b/10.JPG', 'b/in/deep/1.webp', 'a/x.Jpeg', 'a/é\n.bmp', 'a/.hidden.jpg',
        'a/notes.txt', 'b/.git/1.png', '.cache/1.png', 'top.jpg',
    ]  # fmt: skip
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(file.encode())
    os.symlink(tmp_path / 'a', tmp_path / 'c')
    source = sources.ImageFolder(tmp_path)
    expected = ['a/x.Jpeg', 'a/é\n.bmp', 'b/10.JPG', 'b/2.png', 'b/in/deep/1.webp']
    images = [image.decode() for image, _, _ in _contents(source)]
    assert images == [*expected, 'a/x.Jpeg', 'a/é\n.bmp']
    assert [label for _, label, _ in _contents(source)] == [0, 0, 1, 1, 1, 2, 2]
    assert source.class_names == ('a', 'b', 'c')
    assert source.name(1) == 'a/é\\n.bmp'
    (tmp_path / 'b/2.png').unlink()
    assert 'b/2.png cannot be read: No such file' in _refusal(lambda: source[3])


def _fill(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(file.encode())


def test_what_a_folder_leaves_out_is_counted(tmp_path):
    _fill(
        tmp_path,
        'cat/1.png', 'cat/._1.png', 'cat/.DS_Store', 'cat/Thumbs.db', 'cat/desktop.ini',
        'cat/__MACOSX/._1.png', 'cat/@eaDir/1.png', 'cat/photo.HEIC', 'cat/notes.txt',
        'dog/2.png', 'top.jpg', 'second.gif', 'README', '__MACOSX/cat/1.png', '.git/1.png',
    )  # fmt: skip
    (tmp_path / 'owl').mkdir()
    os.mkfifo(tmp_path / 'dog' / 'pipe.png')
    source = sources.ImageFolder(tmp_path)
    assert [image for image, *_ in _contents(source)] == [b'cat/1.png', b'dog/2.png']
    # A class without images keeps the labels of the others where they are.
    assert source.class_names == ('cat', 'dog', 'owl')
    assert source.num_classes == 3
    assert source.left_out == (
        '2 image(s) beside the directories of the classes; '
        '3 file(s) that are no images (no suffix 1, .heic 1, .txt 1); '
        '8 hidden file(s); classes without images: owl'
    )
    plain = tmp_path / 'plain'
    _fill(plain, 'a/1.png')
    assert sources.ImageFolder(plain).left_out == ''


def test_links_to_directories_are_followed_without_end(tmp_path):
    elsewhere = tmp_path / 'elsewhere'
    root = tmp_path / 'root'
    _fill(elsewhere, '3.png', 'deep/4.png')
    _fill(root, 'cat/1.png', 'dog/2.png')
    for link, target in (
        ('cat/more', elsewhere),
        ('cat/again', elsewhere),  # the same images are not taken twice
        ('cat/up', root),
        ('cat/self', root / 'cat'),
        ('dog/cats', root / 'cat'),
    ):
        os.symlink(target, root / link)
    source = sources.ImageFolder(root)
    assert [(image, label) for image, label, _ in _contents(source)] == [
        (b'cat/1.png', 0),
        (b'3.png', 0),
        (b'deep/4.png', 0),
        (b'dog/2.png', 1),
        (b'cat/1.png', 1),
        (b'3.png', 1),
        (b'deep/4.png', 1),
    ]


@pytest.mark.parametrize(
    ('parts', 'advised'),
    [
        (('train', 'val'), 'train'),
        (('test', 'train', 'validation'), 'train'),
        (('Train', 'Test'), 'Train'),
        (('test', 'val'), 'test'),
        (('train',), 'train'),
        (('train2017', 'val2017'), 'train2017'),
    ],
)
def test_the_parts_of_a_data_set_are_no_classes(tmp_path, parts, advised):
    _fill(tmp_path, *(f'{part}/cat/1.png' for part in parts))
    line = _refusal(sources.ImageFolder, tmp_path)
    assert f'holds {" and ".join(sorted(parts))}, parts of a data set' in line
    assert f'--config.data.path={tmp_path}/{advised} ' in line
    assert sources.ImageFolder(tmp_path / advised).class_names == ('cat',)
    # A directory without images beside them is no class.
    _fill(tmp_path, 'annotations/1.json')
    assert f'holds {" and ".join(sorted(parts))}, parts' in _refusal(sources.ImageFolder, tmp_path)
    _fill(tmp_path, 'dog/1.png')  # beside other directories they are classes
    assert sources.ImageFolder(tmp_path).num_classes == len(parts) + 2


def test_numbered_directories_are_classes(tmp_path):
    names = ('test1', 'test2', 'train')
    _fill(tmp_path, *(f'{name}/1.png' for name in names[:2]))
    assert sources.ImageFolder(tmp_path).class_names == names[:2]


@pytest.mark.parametrize(
    ('names', 'advised'),
    [
        (('train-0.tar', 'val-0.tar'), 'train*.tar'),
        (('imagenet1k-train-0000.tar', 'imagenet1k-validation-00.tar'), '*train*.tar'),
        (('a_test.tar', 'a_val.tar'), '*test*.tar'),
        (('Train-0.tar', 'Val-0.tar'), 'Train*.tar'),
        (('train-1.tar', 'train-2.tar'), None),
        (('test-train-0.tar', 'test-train-1.tar'), None),
        (('latest.tar', 'trained.tar', 'train.tar'), None),
    ],
)
def test_files_of_several_parts_of_a_data_set_are_refused(tmp_path, names, advised):
    for name in names:
        (tmp_path / name).touch()
    if advised is None:
        found = listing.data_files(str(tmp_path), '.tar', 'webdataset')
        assert found == [str(tmp_path / name) for name in sorted(names)]
        return
    with pytest.raises(UserError) as error:
        listing.data_files(str(tmp_path), '.tar', 'webdataset')
    assert f'as data=webdataset:{tmp_path}/{advised} ' in str(error.value)
    training = listing.data_files(f'{tmp_path}/{advised}', '.tar', 'webdataset')
    assert len(training) == 1


@pytest.mark.parametrize('name', ['split', 'data_dir'])
def test_a_split_is_for_data_sets_that_have_a_name(name):
    given = {'split': None, 'data_dir': None} | {name: 'test'}
    with pytest.raises(UserError, match=f'--{name} is for tfds and hf: of data parquet name'):
        sources.check_split('parquet', **given)
    sources.check_split('hf', **given)
    sources.check_split('parquet', None, None)


def test_a_folder_without_directories_is_one_class(tmp_path):
    birds = tmp_path / 'birds'
    _fill(birds, 'b.png', 'a.JPG', 'notes.txt', '.DS_Store', '.git/1.png')
    source = sources.ImageFolder(birds)
    assert _contents(source) == [(b'a.JPG', 0, 'a.JPG'), (b'b.png', 0, 'b.png')]
    assert source.class_names == ('birds',)
    assert source.num_classes == 1
    assert source.left_out == '1 file(s) that are no images (.txt 1); 2 hidden file(s)'
    _fill(birds, 'owl/1.png')  # beside a directory they are no class
    assert sources.ImageFolder(birds).class_names == ('owl',)


def test_an_image_stays_on_its_side_when_others_come(tmp_path):
    """By a hash of its path, whatever the folder is called and whatever else lies in it."""
    names = [f'{kind}/{i}.png' for kind in ('cat', 'dog') for i in range(150)]
    _fill(tmp_path / 'old', *names[::2])
    _fill(tmp_path / 'new', *names, 'ant/1.png')

    def sides(root):
        parts = sources.split(sources.ImageFolder(root), 0.2)
        return [{part.name(i) for i in range(len(part))} for part in parts]

    train, out = sides(tmp_path / 'old')
    assert train | out == set(names[::2])
    assert not train & out
    assert 15 <= len(out) <= 45  # 30 expected, ± 3 standard deviations
    more_train, more_out = sides(tmp_path / 'new')
    assert train <= more_train
    assert out <= more_out
    for name in out:
        # The rule itself: the first 8 bytes of BLAKE2b, as a share of 2⁶⁴.
        digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        assert int(digest, 16) / 16**16 < 0.2
    _, part = sources.split(sources.ImageFolder(tmp_path / 'old'), 0.2)
    again = pickle.loads(pickle.dumps(part))
    assert _contents(again) == _contents(part)
    assert again.class_names == ('cat', 'dog')
    assert all(image.decode() == name for image, _, name in _contents(part))


def test_nothing_is_held_out_of_few_images_or_by_a_share_of_0(tmp_path):
    _fill(tmp_path, 'cat/1.png')
    source = sources.ImageFolder(tmp_path)
    for share in (0.0, 0.01, 0.9):
        assert sources.split(source, share) == (source, None)


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / 'top.txt').write_text('')
    assert 'must have one for each class' in _refusal(sources.ImageFolder, tmp_path)
    (tmp_path / 'top.txt').rename(tmp_path / 'top.jpg')
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'notes.txt').write_text('')
    line = _refusal(sources.ImageFolder, tmp_path)
    assert 'holds no images (1 image(s) beside the directories' in line
    assert '.txt 1' in line
    assert 'Not a directory; a tar like' in _refusal(sources.ImageFolder, tmp_path / 'top.jpg')


def test_a_source_of_another_kind_is_advised(packed, folder):
    assert f'data=array_records:{packed}' in _refusal(sources.ImageFolder, packed)
    assert f'data=folder:{folder}' in _refusal(sources.ImageNetTar, folder)


def test_paths_may_begin_with_the_home_directory(folder, packed, stand_in_tar, monkeypatch):
    for kind, place in (('folder', folder), ('array_records', packed), ('imagenet', stand_in_tar)):
        monkeypatch.setenv('HOME', str(place.parent))
        assert sources.open_source(kind, f'~/{place.name}').num_classes == 3


# ---- ArrayRecord


class Files:
    """Ten short files; reading entry `fails` is an error."""

    num_classes = 7
    class_names = None
    fails = None

    def __len__(self):
        return 10

    def __getitem__(self, i):
        if i == self.fails:
            raise UserError('it fails')
        return {'image': b'file %d' % i, 'label': np.int32(i % 7)}

    def name(self, i):
        return f'number {i}'


def test_packed_is_the_same(stand_in_tar, packed):
    from array_record.python import array_record_module

    assert _contents(sources.ArrayRecords(packed)) == _contents(sources.ImageNetTar(stand_in_tar))
    files = sorted(packed.glob('*.array_record'))
    assert len(files) == 5
    assert sorted(os.listdir(packed)) == [
        *(f.name for f in files),
        'images.json',
        'names.json',
    ]
    readers = [array_record_module.ArrayRecordReader(str(file)) for file in files]
    assert [reader.num_records() for reader in readers] == [4, 5, 5, 5, 5]
    # With larger groups every read would take a whole group.
    assert all('group_size:1,' in reader.writer_options_string() for reader in readers)


def test_names_of_packed_images_need_no_record(packed, tmp_path, monkeypatch):
    """A table of captions asks for all of them. Directories of earlier versions have no file."""
    directory = tmp_path / 'packed'
    shutil.copytree(packed, directory)
    source = sources.ArrayRecords(directory)
    names = [source.name(i) for i in range(len(source))]
    assert pickle.loads(pickle.dumps(source)).name(3) == names[3]
    source = sources.ArrayRecords(directory)
    with monkeypatch.context() as patched:
        patched.setattr(type(source._records), '__getitem__', None)
        assert [source.name(i) for i in range(len(source))] == names
    (directory / 'names.json').write_text('["a"]')
    assert 'names.json is damaged: remove it' in _refusal(sources.ArrayRecords(directory).name, 0)
    (directory / 'names.json').unlink()
    old = sources.ArrayRecords(directory)
    assert [old.name(i) for i in range(len(old))] == names


def test_packing_tells_how_far_it_is(tmp_path):
    told = []
    sources.pack(Files(), tmp_path / 'out', shards=100, progress=lambda *x: told.append(x))
    source = sources.ArrayRecords(tmp_path / 'out')
    assert len(source) == 10
    assert source.num_classes == 7
    assert source.class_names is None
    assert told == [(i + 1, 10) for i in range(10)]
    assert _contents(source) == _contents(Files())


def test_packing_starts_again_after_an_end(tmp_path):
    broken = Files()
    broken.fails = 6
    assert _refusal(sources.pack, broken, tmp_path / 'out', shards=3) == 'it fails'
    assert os.listdir(tmp_path) == ['out.partial']
    (tmp_path / 'out.partial' / 'images-00007-of-00009.array_record').write_bytes(
        b'of another start'
    )
    for directory in ('out', 'out.partial'):
        assert 'has no images.json: it was not packed, or not to the end' in _refusal(
            sources.ArrayRecords, tmp_path / directory
        )
    sources.pack(Files(), tmp_path / 'out', shards=3)
    assert os.listdir(tmp_path) == ['out']
    assert len(os.listdir(tmp_path / 'out')) == 5
    assert len(sources.ArrayRecords(tmp_path / 'out')) == 10
    assert 'out exists' in _refusal(sources.pack, Files(), tmp_path / 'out')


def test_where_nothing_can_be_packed(tmp_path):
    (tmp_path / 'file').write_text('')
    assert 'cannot be written: Not a directory' in _refusal(
        sources.pack, Files(), tmp_path / 'file' / 'out'
    )
    assert 'into 0 files' in _refusal(sources.pack, Files(), tmp_path / 'out', shards=0)
    (tmp_path / 'out.partial').mkdir()
    with filelock.FileLock(tmp_path / 'out.partial' / 'lock'):
        (tmp_path / 'out.partial' / 'theirs').write_text('')
        assert 'another process is writing' in _refusal(sources.pack, Files(), tmp_path / 'out')
    assert (tmp_path / 'out.partial' / 'theirs').exists()


def test_damaged_records_are_refused(packed, tmp_path):
    directory = tmp_path / 'copy'
    shutil.copytree(packed, directory)
    shard = sorted(directory.glob('*.array_record'))[2]
    content = bytearray(shard.read_bytes())
    source = sources.ArrayRecords(directory)
    image = source[10]['image']
    content[content.find(image[100:200])] ^= 1
    shard.write_bytes(content)
    assert 'record 10 is damaged' in _refusal(lambda: sources.ArrayRecords(directory)[10])
    shard.write_bytes(content[:-1])
    assert f'{shard.name} has not the' in _refusal(sources.ArrayRecords, directory)
    shard.write_bytes(bytes(len(content)))
    assert 'cannot be read' in _refusal(sources.ArrayRecords, directory)
    shard.unlink()
    assert 'cannot be read: No such file' in _refusal(sources.ArrayRecords, directory)
    about = json.loads((directory / 'images.json').read_text())
    for wrong, message in (
        ('{', 'images.json is damaged'),
        ('[]', 'images.json is damaged'),
        ('[' * 100_000, 'images.json is damaged'),
        (json.dumps(about | {'files': [1]}), 'images.json is damaged'),
        (json.dumps(about | {'class_names': 3}), 'images.json is damaged'),
        (json.dumps({'format': 'x'}), 'images.json is damaged'),
        (json.dumps(about | {'format': 'other'}), "is of the format 'other'"),
    ):
        (directory / 'images.json').write_text(wrong)
        assert message in _refusal(sources.ArrayRecords, directory)


# ---- TFDS


def test_tfds_gives_the_bytes_that_went_in(tfds_dir, stand_in_tar):
    source = sources.TFDS('stand_in', 'train', str(tfds_dir))
    assert 'tensorflow' not in sys.modules
    assert sorted(image for image, _, _ in _contents(source)) == sorted(
        c for *_, c in _truth(stand_in_tar) if c
    )
    half = sources.TFDS('stand_in:1.0.0', 'train[:50%]', str(tfds_dir))
    assert len(half) == round(len(source) / 2)
    assert half[1]['image'] == source[1]['image']


def test_tfds_takes_the_supervised_keys_and_wants_labels(tmp_path):
    entries = [('n01440764', 'a', b'first'), (-1, 'b', b'second')]
    directory = _prepare(tmp_path, entries, ('picture', 'kind'), ('picture', 'kind'))
    source = sources.TFDS('stand_in', 'train', str(directory))
    labelled = 0 if source._data[0]['kind'] == 0 else 1
    assert source[labelled] == {'image': b'first', 'label': 0}
    assert _refusal(lambda: source[1 - labelled]) == f'stand_in train [{1 - labelled}] has no label'


def test_tfds_tells_damage(tfds_dir, tmp_path):
    shutil.copytree(tfds_dir, tmp_path / 'copy')
    (file,) = (tmp_path / 'copy').glob('stand_in/1.0.0/*array_record*')
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    source = sources.TFDS('stand_in', 'train', str(tmp_path / 'copy'))
    lines = []
    for i in range(len(source)):
        try:
            source[i]
        except UserError as error:
            lines.append(str(error))
    assert len(lines) == 1
    assert re.match(r'stand_in train \[\d+\] is damaged: ', lines[0])


def _changed(tfds_dir, to, changes):
    """A copy of the data set with lines of its description replaced."""
    directory = to / 'stand_in' / '1.0.0'
    shutil.copytree(tfds_dir / 'stand_in' / '1.0.0', directory)
    for name, old, new in changes:
        text = (directory / name).read_text()
        assert old in text
        (directory / name).write_text(text.replace(old, new))
    return str(to)


def test_tfds_data_of_other_kinds_are_refused(tfds_dir, tmp_path):
    def refusal(*a):
        return _refusal(sources.TFDS, *a)

    assert 'Dataset nosuch not found' in refusal('nosuch', 'train', str(tmp_path))
    assert re.search(
        r"mnist is not prepared in .*file_format='array_record'.* where TensorFlow",
        refusal('mnist', 'train', str(tmp_path)),
    )
    assert "Unknown split 'test'" in refusal('stand_in', 'test', str(tfds_dir))
    as_tfrecord = _changed(
        tfds_dir, tmp_path / 'a', [('dataset_info.json', '"array_record"', '"tfrecord"')]
    )
    assert 'is not stored as array_record' in refusal('stand_in', 'train', as_tfrecord)
    unlabelled = _changed(tfds_dir, tmp_path / 'b', [('features.json', '"label"', '"other"')])
    assert 'has no uint8 image with a class label, but' in refusal('stand_in', 'train', unlabelled)
    deep = _changed(
        tfds_dir, tmp_path / 'c', [('features.json', '"dtype": "uint8"', '"dtype": "uint16"')]
    )
    assert 'has no uint8 image' in refusal('stand_in', 'train', deep)


def test_without_tfds(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
    assert 'TFDS cannot be imported' in _refusal(sources.TFDS, 'mnist')
