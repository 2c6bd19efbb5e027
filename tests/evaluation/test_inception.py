import json

import jax
import numpy as np
import pytest
from tensorboardX.proto import graph_pb2  # TensorFlow's own message definitions

from sphere_ar_jax.evaluation.fidelity import inception, inception_record, inception_weights
from sphere_ar_jax.runtime.console import UserError
from tests.conftest import GOLDENS

# [PyTorch name, node of the graph, PyTorch shape]
ROWS = json.loads((GOLDENS / 'inception.json').read_text())
MAPS = {
    'Conv2d_1a_3x3': 'conv',
    'Mixed_5b': 'mixed',
    'Mixed_6a': 'mixed_3',
    'Mixed_6d': 'mixed_6',
    'Mixed_7a': 'mixed_8',
    'Mixed_7b': 'mixed_9',
    'Mixed_7c': 'mixed_10',
}


def image(i, height, width):
    """The goldens' picture number i."""
    y, x, c = np.meshgrid(
        np.arange(height) / height, np.arange(width) / width, np.arange(3), indexing='ij'
    )
    noise = np.random.RandomState(i).standard_normal((height, width, 3))
    return (
        (110 + 90 * np.sin(7 * x + 2 * c + i) * np.cos(9 * y - c) + 25 * noise)
        .clip(0, 255)
        .astype(np.uint8)
    )


@pytest.fixture(scope='module')
def golden():
    return dict(np.load(GOLDENS / 'inception.npz'))


@pytest.fixture(scope='module')
def captured(inception_params):
    """(features, {block: its output}) of the goldens' two pictures; the network is compiled once
    for both.
    """
    resized = [
        np.asarray(jax.jit(inception.resize)(image(i, *hw)[None]))
        for i, hw in ((0, (40, 52)), (1, (299, 299)))
    ]

    @jax.jit
    def run(params, images):
        def chosen(module, _):
            return module.name in MAPS.values() and len(module.path) == 1

        return inception.Inception().apply({'params': params}, images, capture_intermediates=chosen)

    features, state = run(inception_params, np.concatenate(resized))
    return features, {name: value['__call__'][0] for name, value in state['intermediates'].items()}


@pytest.mark.slow
def test_network_against_torch_fidelity(captured, golden):
    for name, found in captured[0]._asdict().items():
        np.testing.assert_allclose(found, golden[name], rtol=1e-5, atol=3e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize('theirs, ours', MAPS.items())
def test_blocks_against_torch_fidelity(captured, golden, theirs, ours):
    found = np.asarray(captured[1][ours])
    step = -(-found.shape[1] // 4)
    some = found[:, step // 2 :: step, step // 3 :: step, :: max(1, found.shape[3] // 48)]
    np.testing.assert_allclose(some, golden[f'map/{theirs}'], rtol=1e-5, atol=3e-6)


def tf1_resize(image, size):
    """TensorFlow 1's rule, pixel by pixel; coordinates are float32 there, as here."""
    height, width, _ = image.shape
    out = np.empty((size, size, 3))
    step_y, step_x = (np.float32(length) / np.float32(size) for length in (height, width))
    for i in range(size):
        y = float(np.float32(i) * step_y)
        for j in range(size):
            x = float(np.float32(j) * step_x)
            top = int(y)
            left = int(x)
            bottom = min(top + 1, height - 1)
            right = min(left + 1, width - 1)
            fy = y - top
            fx = x - left
            upper = (1 - fx) * image[top, left] + fx * image[top, right]
            lower = (1 - fx) * image[bottom, left] + fx * image[bottom, right]
            out[i, j] = (1 - fy) * upper + fy * lower
    return out


@pytest.mark.parametrize('height, width, size', [(5, 7, 12), (40, 9, 17), (6, 6, 6), (1, 2, 5)])
def test_resize_against_tensorflows_rule(height, width, size):
    a = image(3, height, width)
    found = inception.resize(a[None], size)
    assert found.shape == (1, size, size, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], tf1_resize(a.astype(float), size), atol=1e-4)


@pytest.mark.parametrize('i, height, width', [(2, 40, 52), (3, 400, 330)])
def test_resize_against_torch_fidelity(golden, i, height, width):
    found = np.asarray(inception.resize(image(i, height, width)[None]))[0, ::23, ::23]
    np.testing.assert_allclose(found, golden[f'resized{i - 2}'], atol=1e-4)


@pytest.mark.slow
def test_features_of_bytes_and_floats_agree(inception_params, golden):
    """Through the front door: uint8 of any size, and to rounding the same as float32, which is
    another program.
    """
    pictures = np.stack([image(0, 40, 52)] * 2)
    found = inception.features(inception_params, pictures)
    np.testing.assert_allclose(found.pool, np.stack([golden['pool'][0]] * 2), rtol=1e-5, atol=3e-6)
    for a, b in zip(
        found, inception.features(inception_params, pictures.astype(np.float32)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6)


def graph_def(fill=None, scaled=True, epsilon=1e-3, skip=(), shapes=(), extra=()):
    """A GraphDef with the published one's constants: random, or each a single repeated number."""
    graph = graph_pb2.GraphDef()
    output_size = graph.node.add(name='ResizeBilinear/size', op='Const')
    output_size.attr['value'].tensor.dtype = 3  # an int32
    rows = [(node, shape) for _, node, shape in ROWS] + [(name, [4]) for name in extra]
    for i, (name, shape) in enumerate(rows):
        if name in skip:
            continue
        shape = dict(shapes).get(
            name, [shape[k] for k in {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[len(shape)]]
        )
        tensor = graph.node.add(name=name, op='Const').attr['value'].tensor
        tensor.dtype = 1
        for size in shape:
            tensor.tensor_shape.dim.add(size=size)
        if fill is not None:
            tensor.float_val.append(fill)
        elif len(shape) == 1 and i % 2:
            tensor.float_val.extend(np.random.default_rng(i).normal(size=shape))
        else:
            tensor.tensor_content = (
                np.random.default_rng(i).standard_normal(shape, np.float32).tobytes()
            )
        if name.endswith('/beta'):
            node = graph.node.add(
                name=name.removesuffix('/beta'), op='BatchNormWithGlobalNormalization'
            )
            node.attr['scale_after_normalization'].b = scaled
            node.attr['variance_epsilon'].f = epsilon
    return graph


def write(tmp_path, graph):
    path = tmp_path / 'graph.pb'
    path.write_bytes(graph.SerializeToString())
    return path


def test_graph_def_and_torch_lead_to_the_same_parameters(tmp_path):
    """One random network, in both layouts and by both lists of names."""
    torch_tensors = {}
    for i, (name, _, shape) in enumerate(ROWS):
        rng = np.random.default_rng(i)
        if len(shape) == 1 and i % 2:
            torch_tensors[name] = rng.normal(size=shape).astype(np.float32)
        else:
            ours = {4: [2, 3, 1, 0], 2: [1, 0], 1: [0]}[len(shape)]
            back = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(shape)]
            a = rng.standard_normal([shape[k] for k in ours], np.float32)
            torch_tensors[name] = a.transpose(back)
    from_torch = inception_weights.from_torch(
        torch_tensors | {'Mixed_5b.branch1x1.bn.num_batches_tracked': np.array(0)}
    )
    path = write(tmp_path, graph_def())
    jax.tree.map(np.testing.assert_array_equal, inception_weights.load_graph_def(path), from_torch)
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal([3, 3, 3, 32], np.float32)
    np.testing.assert_array_equal(from_torch['conv']['kernel'], kernel)


def test_graph_def_of_repeated_numbers_and_without_scale(tmp_path):
    params = inception_weights.load_graph_def(write(tmp_path, graph_def(fill=2.5, scaled=False)))
    np.testing.assert_array_equal(
        params['mixed_9']['tower']['mixed']['conv_1']['kernel'], np.full((3, 1, 384, 384), 2.5)
    )
    np.testing.assert_array_equal(params['conv']['gamma'], np.ones(32))
    np.testing.assert_array_equal(params['conv']['beta'], np.full(32, 2.5))


def test_all_faults_of_a_graph_are_named_at_once(tmp_path):
    graph = graph_def(
        fill=1.0, skip=['mixed_6/conv/batchnorm/beta', 'softmax/weights'],
        shapes=[('conv_1/conv2d_params', [3, 3, 32, 33])], extra=['mixed_11/conv/batchnorm/gamma'],
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        inception_weights.load_graph_def(write(tmp_path, graph))
    message = str(caught.value)
    assert '2 missing: mixed_6/conv/batchnorm/beta, softmax/weights' in message
    assert '\n' not in message
    assert (
        '1 misshapen: conv_1/conv2d_params of shape (3, 3, 32, 33) instead of (3, 3, 32, 32)'
        in message
    )
    assert '1 unexpected: mixed_11/conv/batchnorm/gamma' in message


def test_all_faults_of_torch_tensors_are_named_at_once():
    tensors = {name: np.broadcast_to(np.float32(1), shape) for name, _, shape in ROWS}
    tensors['AuxLogits.fc.bias'] = tensors.pop('Conv2d_2b_3x3.bn.running_var')
    tensors['Mixed_7b.branch3x3_2a.conv.weight'] = np.zeros((384, 384, 3, 1))
    with pytest.raises(UserError) as caught:
        inception_weights.from_torch(tensors)
    message = str(caught.value)
    assert 'missing: Conv2d_2b_3x3.bn.running_var' in message
    assert 'unexpected: AuxLogits.fc.bias' in message
    assert (
        'Mixed_7b.branch3x3_2a.conv.weight of shape (384, 384, 3, 1) instead of (384, 384, 1, 3)'
        in message
    )


def test_an_epsilon_of_another_network_is_refused(tmp_path):
    with pytest.raises(UserError, match='epsilon'):
        inception_weights.load_graph_def(write(tmp_path, graph_def(fill=1.0, epsilon=1e-5)))


def test_files_that_are_no_graph(tmp_path):
    """Cut, changed or random bytes end in UserError, never in an error of something inside."""
    whole = graph_def(fill=1.0).SerializeToString()
    rng = np.random.default_rng(0)
    path = tmp_path / 'broken.pb'
    damaged = [whole[:cut] for cut in rng.integers(1, len(whole), 20)]
    damaged += [rng.bytes(2000) for _ in range(20)]
    for at in rng.integers(0, len(whole), 150):
        damaged.append(whole[:at] + rng.bytes(3) + whole[at + 3 :])
    refused = 0
    for content in [b'', b'\x80\x04K\x01.', *damaged]:
        path.write_bytes(content)
        try:
            # A changed number within a constant is no fault of the file's form.
            inception_weights.load_graph_def(path)
        except UserError as error:
            refused += 1
            assert '\n' not in str(error)
            assert len(str(error)) < 3000
    assert refused > 100
    tensor = graph_pb2.GraphDef()
    value = tensor.node.add(name='conv/conv2d_params', op='Const').attr['value'].tensor
    value.dtype = 1
    value.tensor_content = bytes(4)
    for _ in range(4):
        value.tensor_shape.dim.add(size=2**40)  # must not be believed
    with pytest.raises(UserError, match='shape'):
        inception_weights.load_graph_def(write(tmp_path, tensor))
    with open(path, 'wb') as f:
        f.truncate(2**30)
    with pytest.raises(UserError, match='larger'):
        inception_weights.load_graph_def(path)
    with pytest.raises(OSError):
        inception_weights.load_graph_def(tmp_path / 'nowhere.pb')


def test_a_published_name_tells_the_hash(tmp_path):
    """PyTorch's convention: a file under the name must have it, and another name tells nothing."""
    for name, message in (
        ('pt_inception-2015-12-05-6726825d.pth', 'is damaged: its SHA-256 begins with ba7816bf, '),
        ('inception.pth', 'no file of PyTorch'),
    ):
        (tmp_path / name).write_bytes(b'abc')  # FIPS 180's own example
        with pytest.raises(UserError, match=message):
            inception_weights.load(tmp_path / name)


def test_the_fingerprint_sees_names_shapes_and_every_bit():
    tree = {'a': {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)}, 'b': np.zeros(2)}
    before = inception_weights.fingerprint(tree)
    assert before == inception_weights.fingerprint(jax.tree.map(np.asfortranarray, tree))
    assert len(before) == 64
    flipped = tree['a']['kernel'].copy()
    flipped.view(np.uint32)[1, 2] ^= 1
    for other in (
        {'a': {'kernel': flipped}, 'b': tree['b']},
        {'a': {'kernel': tree['a']['kernel'].reshape(3, 2)}, 'b': tree['b']},
        {'a': {'beta': tree['a']['kernel']}, 'b': tree['b']},
    ):
        assert inception_weights.fingerprint(other) != before


def test_a_record_is_written_once_and_then_compared(tmp_path, monkeypatch, capsys):
    """The network's outputs are stood in for: `captured` holds them to torch-fidelity."""
    drawn = {'scale': 1.0}

    def features(params, images):
        assert images.shape == (1, 64, 64, 3)
        assert images.dtype == np.uint8
        values = drawn['scale'] * images.astype(np.float32).reshape(1, -1) + params['a']
        return inception.Features(values[:, 5:9], values[:, 10:12], values[:, 20:23])

    monkeypatch.setattr(inception, 'features', features)
    params = {'a': np.ones((), np.float32)}
    monkeypatch.setattr(inception_weights, 'load', lambda path: params)
    (tmp_path / 'w.pb').write_bytes(b'abc')
    argv = ['', str(tmp_path / 'w.pb'), str(tmp_path / 'r.json')]
    inception_record.main(argv)
    record = json.loads((tmp_path / 'r.json').read_text())
    assert record['file'].startswith('ba7816bf')
    assert len(record['activations']) == 3
    inception_record.main(argv)
    assert 'the same tensors and activations' in capsys.readouterr().out
    drawn['scale'] = 1.01
    with pytest.raises(UserError, match=r'^the activation \w+ is .* in the record$'):
        inception_record.main(argv)
    params['a'] = np.zeros((), np.float32)
    with pytest.raises(UserError, match=r'^the tensors differ: their SHA-256 is '):
        inception_record.main(argv)
    for damaged, message in (('[]', 'is no record'), (json.dumps({}), 'the tensors differ')):
        (tmp_path / 'r.json').write_text(damaged)
        with pytest.raises(UserError, match=message):
            inception_record.main(argv)
    assert (tmp_path / 'r.json').read_text() == '{}'
