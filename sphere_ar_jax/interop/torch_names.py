"""Our parameter trees ↔ the tensors of the public PyTorch checkpoints: names, layouts, sizes.

In: `torch_file.open_file(path)` → `state_dict` → `sizes`, which the models are built with →
`from_torch` for each of them, which reads one tensor at a time. Out: `export`.

Ours are stacked over layers (leading axes, see `transformer.Stack`), linear kernels are (in, *out),
convolutions HWIO. Theirs are one tensor per layer, linear weights (out, in), convolutions OIHW,
transposed ones IOHW.

Dimensions:
  leading axes of our leaf, one per `{}` in its PyTorch name (for the flow head's blocks two axes,
  group and block, are counted through in one number)
"""

import difflib
import functools
import math
import re

import flax.traverse_util as traverse
import jax
import numpy as np
from safetensors.numpy import save_file

from sphere_ar_jax.models import transformer
from sphere_ar_jax.models.backbones import vit
from sphere_ar_jax.runtime.console import UserError

_BLOCK = {
    'attention/qkv/kernel': 'attention.wqkv.weight',
    'attention/out/kernel': 'attention.wo.weight',
    'mlp/w1/kernel': 'feed_forward.w1.weight',
    'mlp/w2/kernel': 'feed_forward.w2.weight',
    'attention_norm/scale': 'attention_norm.weight',
    'mlp_norm/scale': 'ffn_norm.weight',
}
# (our path, their name, leading stacked axes, kind of tensor); regular expressions, first match wins.
_RULES = (
    *(
        (f'stack/blocks/{ours}', f'layers.{{}}.{theirs}', 1, 'linear')
        for ours, theirs in _BLOCK.items()
    ),
    *(
        (
            rf'(encoder|decoder)/vit/stack/blocks/{ours}',
            rf'vae.\1.layers.{{}}.{theirs}',
            1,
            'linear',
        )
        for ours, theirs in _BLOCK.items()
    ),
    ('cls_embedding', 'cls_embedding.weight', 0, 'plain'),
    ('pos_for_diff', 'pos_for_diff.weight', 0, 'plain'),
    ('(proj_in|emb_norm|norm)/(.*)', r'\1.\2', 0, 'linear'),
    (r'head/time1/(.*)', r'head.net.time_embed.mlp.0.\1', 0, 'linear'),
    (r'head/time2/(.*)', r'head.net.time_embed.mlp.2.\1', 0, 'linear'),
    (r'head/(cond_embed|input_proj)/(.*)', r'head.net.\1.\2', 0, 'linear'),
    (r'head/res_groups/ada/(.*)', r'head.net.ada_ln_blocks.{}.\1', 1, 'linear'),
    (r'head/res_groups/blocks/(norm|w1|w2)/(.*)', r'head.net.res_blocks.{}.\1.\2', 2, 'linear'),
    (r'head/final_ada/(.*)', r'head.net.final_layer.ada_ln_modulation.\1', 0, 'linear'),
    (r'head/final_linear/(.*)', r'head.net.final_layer.linear.\1', 0, 'linear'),
    (r'(quant_proj|post_quant_proj)/(.*)', r'vae.\1.\2', 0, 'linear'),
    (r'(encoder|decoder)/vit/registers', r'vae.\1.register_token.weight', 0, 'plain'),
    (r'encoder/(norm|output)/(.*)', r'vae.encoder.\1.\2', 0, 'linear'),
    (r'encoder/conv_in/kernel', r'vae.encoder.conv_in.weight', 0, 'conv'),
    (r'encoder/down(\d)/norm1/(.*)', r'vae.encoder.patchify.0.net.\1.block.0.\2', 0, 'plain'),
    (r'encoder/down(\d)/conv1/kernel', r'vae.encoder.patchify.0.net.\1.block.2.weight', 0, 'conv'),
    (r'encoder/down(\d)/norm2/(.*)', r'vae.encoder.patchify.0.net.\1.block.3.\2', 0, 'plain'),
    (r'encoder/down(\d)/conv2/kernel', r'vae.encoder.patchify.0.net.\1.block.5.weight', 0, 'conv'),
    (
        r'encoder/down(\d)/shortcut/kernel',
        r'vae.encoder.patchify.0.net.\1.shortcut.weight',
        0,
        'conv',
    ),
    (r'decoder/conv_in/kernel', r'vae.decoder.conv_in.1.weight', 0, 'conv'),
    (r'decoder/up(\d)/norm1/(.*)', r'vae.decoder.unpatchify.1.net.\1.block.0.\2', 0, 'plain'),
    (
        r'decoder/up(\d)/conv1/kernel',
        r'vae.decoder.unpatchify.1.net.\1.block.2.weight',
        0,
        'transposed',
    ),
    (r'decoder/up(\d)/norm2/(.*)', r'vae.decoder.unpatchify.1.net.\1.block.3.\2', 0, 'plain'),
    (r'decoder/up(\d)/conv2/kernel', r'vae.decoder.unpatchify.1.net.\1.block.5.weight', 0, 'conv'),
    (
        r'decoder/up(\d)/shortcut/kernel',
        r'vae.decoder.unpatchify.1.net.\1.shortcut.weight',
        0,
        'transposed',
    ),
    (r'decoder/up(\d)/norm3/(.*)', r'vae.decoder.unpatchify.1.net.\1.block2.0.\2', 0, 'plain'),
    (r'decoder/up(\d)/conv3/kernel', r'vae.decoder.unpatchify.1.net.\1.block2.2.weight', 0, 'conv'),
    (r'decoder/up(\d)/norm4/(.*)', r'vae.decoder.unpatchify.1.net.\1.block2.3.\2', 0, 'plain'),
    (r'decoder/up(\d)/conv4/kernel', r'vae.decoder.unpatchify.1.net.\1.block2.5.weight', 0, 'conv'),
    (r'decoder/norm_out/(.*)', r'vae.decoder.conv_out.0.\1', 0, 'plain'),
    (r'decoder/conv_out/kernel', r'vae.decoder.conv_out.2.weight', 0, 'conv'),
)


def _rule(path):
    for ours, theirs, stacked, kind in _RULES:
        match = re.fullmatch(ours, path)
        if match:
            name = match.expand(theirs)
            return re.sub(r'\.(kernel|scale)$', '.weight', name), stacked, kind
    raise UserError(f'the parameter {path} has no PyTorch name')


def _to_theirs(a, path, kind):
    """One layer's tensor in PyTorch's layout."""
    if kind == 'conv':
        return a.transpose(3, 2, 0, 1)
    if kind == 'transposed':
        return a[::-1, ::-1].transpose(2, 3, 0, 1)
    if path.endswith('out/kernel'):
        return a.reshape(-1, a.shape[-1]).T
    if path.endswith('kernel'):
        return a.reshape(len(a), -1).T
    if path == 'cls_embedding':
        return a.reshape(len(a), -1)
    return a.ravel() if path.endswith('bias') else a


def _to_ours(a, path, kind):
    """The inverse of `_to_theirs`, but for axes that stay joined."""
    if kind == 'conv':
        return a.transpose(2, 3, 1, 0)
    if kind == 'transposed':
        return a.transpose(2, 3, 0, 1)[::-1, ::-1]
    return a.T if path.endswith('kernel') else a


def torch_shapes(params):
    """{PyTorch name: shape} of a parameter tree, abstract or not; no tensor is touched.

    Raises UserError for a leaf that has no PyTorch name.
    """
    shapes = {}
    for path, leaf in traverse.flatten_dict(params, sep='/').items():
        name, stacked, kind = _rule(path)
        layer = jax.ShapeDtypeStruct(leaf.shape[stacked:], leaf.dtype)
        shape = jax.eval_shape(functools.partial(_to_theirs, path=path, kind=kind), layer).shape
        shapes |= {name.format(i): shape for i in range(math.prod(leaf.shape[:stacked]))}
    return shapes


def to_torch(params):
    """{PyTorch name: array in PyTorch's layout} of a parameter tree (AR or S-VAE) of arrays."""
    tensors = {}
    for path, leaf in traverse.flatten_dict(params, sep='/').items():
        name, stacked, kind = _rule(path)
        for i, a in enumerate(np.asarray(leaf).reshape(-1, *leaf.shape[stacked:])):
            tensors[name.format(i)] = np.ascontiguousarray(_to_theirs(a, path, kind))
    return tensors


def nearest_names(name, others):
    """' (nearest: NAME)' for the name most like this one, '' where none is like it."""
    parts = set(name.split('.'))  # first by common parts, since difflib is slow
    alike = sorted(others, key=lambda other: len(parts & set(other.split('.'))), reverse=True)[:20]
    near = difflib.get_close_matches(name, alike, 1)
    return f' (nearest: {near[0]})' if near else ''


def _require_fit(tensors, shapes):
    """Raises UserError, a line for each tensor that is missing, unexpected or of another shape than
    `shapes`.
    """
    missing, unexpected = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    shaped = [
        name for name in shapes if name in tensors and tuple(tensors[name].shape) != shapes[name]
    ]
    lines = [f'missing: {name}{nearest_names(name, unexpected)}' for name in missing]
    lines += [f'unexpected: {name}{nearest_names(name, missing)}' for name in unexpected]
    lines += [
        f'shape: {name} has {tuple(tensors[name].shape)}, but the model needs {shapes[name]}'
        for name in shaped
    ]
    if lines:
        counts = (
            f'{len(missing)} missing, {len(unexpected)} unexpected and {len(shaped)} mis-shaped'
        )
        raise UserError(
            '\n'.join([f'the checkpoint does not fit the model: {counts} tensors', *lines])
        )


def _empty(shape):
    """float32 array at an address that JAX on a CPU takes over as it is: no copy."""
    size = 4 * math.prod(shape)
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(np.float32).reshape(shape)


def from_torch(tensors, like, progress=lambda done: None):
    """The parameter tree shaped as `like` (abstract or not), float32 NumPy, from {PyTorch name:
    tensor}.

    Each leaf is made once and filled tensor by tensor: of lazy ones (`torch_file.Tensor`) one at a
    time is in memory. `tensors` may hold S-VAE and AR model, as the published files do: those of
    the one that `like` is are read, and RoPE tables passed over. progress: called with the number
    of tensors done.

    Raises UserError that lists every missing, unexpected and mis-shaped tensor, before any is read.
    """
    shapes = torch_shapes(like)
    of_vae = any(name.startswith('vae.') for name in shapes)
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith('vae.') == of_vae and name.split('.')[-1] != 'freqs_cis'
    }
    _require_fit(tensors, shapes)
    params, done = {}, 0
    for path, leaf in traverse.flatten_dict(like, sep='/').items():
        name, stacked, kind = _rule(path)
        inner = leaf.shape[stacked:]
        params[path] = _empty(leaf.shape)
        for i, part in enumerate(params[path].reshape(-1, *inner)):
            part[...] = _to_ours(np.asarray(tensors[name.format(i)]), path, kind).reshape(inner)
            done += 1
            progress(done)
    return traverse.unflatten_dict(params, sep='/')


def export(path, model, vae_params, ar_params=None):
    """Writes parameters under the public names to a safetensors file, float32, as the published
    files have them: the S-VAE `model` with its RoPE tables, and the AR model if given. Raises
    UserError for a distilled head.
    """
    tensors = to_torch(vae_params) | ({} if ar_params is None else to_torch(ar_params))
    head_dim = transformer.head_dim(model.backbone.width, model.backbone.heads)
    angles = transformer.rope_table(*model.grid, vit.NUM_REGISTERS, head_dim)
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    tensors |= {f'vae.{part}.freqs_cis': table.copy() for part in ('encoder', 'decoder')}
    save_file(tensors, path, metadata={'format': 'pt'})
