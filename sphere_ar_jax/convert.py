"""Our parameter trees ↔ the tensors of the public PyTorch checkpoints (spec §9): names, layouts, sizes.

In: `torch_file.open_file(path)` → `state_dict` → `sizes`, which the models are built with → `from_torch` for each of
them, which reads one tensor at a time. Out: `export`.

Ours are stacked over layers (leading axes, see `transformer.Stack`), linear kernels are (in, *out), convolutions
HWIO. Theirs are one tensor per layer, linear weights (out, in), convolutions OIHW, transposed ones IOHW.

Dimensions:
  leading axes of our leaf, one per `{}` in its PyTorch name (for the flow head's blocks two axes, group and
  block, are counted through in one number)
"""

import difflib
import functools
import math
import re
from typing import NamedTuple

import flax.traverse_util as traverse
import numpy as np
from safetensors.numpy import save_file

from sphere_ar_jax import ar, transformer, vae


class ConversionError(ValueError):
    """A checkpoint that does not fit. The first line says what is wrong; a line for each tensor may follow."""


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
    *((f'stack/blocks/{ours}', f'layers.{{}}.{theirs}', 1, 'linear') for ours, theirs in _BLOCK.items()),
    *(
        (rf'(encoder|decoder)/vit/stack/blocks/{ours}', rf'vae.\1.layers.{{}}.{theirs}', 1, 'linear')
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
    (r'encoder/down(\d)/shortcut/kernel', r'vae.encoder.patchify.0.net.\1.shortcut.weight', 0, 'conv'),
    (r'decoder/conv_in/kernel', r'vae.decoder.conv_in.1.weight', 0, 'conv'),
    (r'decoder/up(\d)/norm1/(.*)', r'vae.decoder.unpatchify.1.net.\1.block.0.\2', 0, 'plain'),
    (r'decoder/up(\d)/conv1/kernel', r'vae.decoder.unpatchify.1.net.\1.block.2.weight', 0, 'transposed'),
    (r'decoder/up(\d)/norm2/(.*)', r'vae.decoder.unpatchify.1.net.\1.block.3.\2', 0, 'plain'),
    (r'decoder/up(\d)/conv2/kernel', r'vae.decoder.unpatchify.1.net.\1.block.5.weight', 0, 'conv'),
    (r'decoder/up(\d)/shortcut/kernel', r'vae.decoder.unpatchify.1.net.\1.shortcut.weight', 0, 'transposed'),
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
    raise ConversionError(f'the parameter {path} has no PyTorch name')


def _to_theirs(a, kind):
    """One unstacked convolution kernel in PyTorch's layout."""
    if kind == 'conv':
        return a.transpose(3, 2, 0, 1)
    if kind == 'transposed':
        return a[::-1, ::-1].transpose(2, 3, 0, 1)
    return a


def _to_ours(a, kind):
    if kind == 'conv':
        return a.transpose(2, 3, 1, 0)
    if kind == 'transposed':
        return a.transpose(2, 3, 0, 1)[::-1, ::-1]
    return a


def torch_shapes(params):
    """{PyTorch name: shape} of a parameter tree, abstract or not; no tensor is touched.

    Raises ConversionError for a leaf that has no PyTorch name.
    """
    shapes = {}
    for path, leaf in traverse.flatten_dict(params, sep='/').items():
        name, stacked, kind = _rule(path)
        inner = leaf.shape[stacked:]
        if kind == 'conv':
            inner = (inner[3], inner[2], *inner[:2])
        elif kind == 'transposed':
            inner = (inner[2], inner[3], *inner[:2])
        elif path.endswith('out/kernel'):
            inner = (inner[-1], inner[0] * inner[1])
        elif path.endswith('kernel'):
            inner = (int(np.prod(inner[1:])), inner[0])
        elif path == 'cls_embedding':
            inner = (inner[0], inner[1] * inner[2])
        elif path.endswith('bias'):
            inner = (int(np.prod(inner)),)
        for i in range(int(np.prod(leaf.shape[:stacked]))):
            shapes[name.format(i)] = tuple(inner)
    return shapes


def to_torch(params):
    """{PyTorch name: array in PyTorch's layout} of a parameter tree (AR or S-VAE) of arrays."""
    shapes = torch_shapes(params)
    tensors = {}
    for path, leaf in traverse.flatten_dict(params, sep='/').items():
        name, stacked, kind = _rule(path)
        leaf = np.asarray(leaf)
        for i, a in enumerate(leaf.reshape(-1, *leaf.shape[stacked:])):
            shape = shapes[name.format(i)]
            if path.endswith('kernel') and kind == 'linear':
                a = a.reshape(shape[::-1]).T
            tensors[name.format(i)] = np.ascontiguousarray(_to_theirs(a, kind).reshape(shape))
    return tensors


def _nearest(name, others):
    parts = set(name.split('.'))  # first by common parts, since difflib is slow
    alike = sorted(others, key=lambda other: len(parts & set(other.split('.'))), reverse=True)[:20]
    near = difflib.get_close_matches(name, alike, 1)
    return f' (nearest: {near[0]})' if near else ''


def _require_fit(tensors, shapes):
    """Raises ConversionError, a line for each tensor that is missing, unexpected or of another shape than `shapes`."""
    missing, unexpected = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    shaped = [name for name in shapes if name in tensors and tuple(tensors[name].shape) != shapes[name]]
    lines = [f'missing: {name}{_nearest(name, unexpected)}' for name in missing]
    lines += [f'unexpected: {name}{_nearest(name, missing)}' for name in unexpected]
    lines += [f'shape: {name} has {tuple(tensors[name].shape)}, but the model needs {shapes[name]}' for name in shaped]
    if lines:
        counts = f'{len(missing)} missing, {len(unexpected)} unexpected and {len(shaped)} mis-shaped'
        raise ConversionError('\n'.join([f'the checkpoint does not fit the model: {counts} tensors', *lines]))


def _is_buffer(name):
    """Whether a tensor is a RoPE table: those are computed, never read."""
    return name.split('.')[-1] == 'freqs_cis'


def _empty(shape):
    """float32 array at an address that JAX on a CPU takes over as it is: no copy."""
    size = 4 * math.prod(shape)
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(np.float32).reshape(shape)


def from_torch(tensors, like, progress=lambda done: None):
    """The parameter tree shaped as `like` (abstract or not), float32 NumPy, from {PyTorch name: tensor}.

    Each leaf is made once and filled tensor by tensor: of lazy ones (`torch_file.Tensor`) one at a time is in memory.
    `tensors` may hold S-VAE and AR model, as the published files do: those of the one that `like` is are read, and
    RoPE tables passed over. progress: called with the number of tensors done.

    Raises ConversionError that lists every missing, unexpected and mis-shaped tensor, before any is read.
    """
    shapes = torch_shapes(like)
    of_vae = any(name.startswith('vae.') for name in shapes)
    tensors = {n: t for n, t in tensors.items() if n.startswith('vae.') == of_vae and not _is_buffer(n)}
    _require_fit(tensors, shapes)
    params, done = {}, 0
    for path, leaf in traverse.flatten_dict(like, sep='/').items():
        name, stacked, kind = _rule(path)
        inner = leaf.shape[stacked:]
        params[path] = _empty(leaf.shape)
        for i, part in enumerate(params[path].reshape(-1, *inner)):
            a = np.asarray(tensors[name.format(i)])
            if path.endswith('kernel') and kind == 'linear':
                a = a.T
            part[...] = _to_ours(a, kind).reshape(inner)
            done += 1
            progress(done)
    return traverse.unflatten_dict(params, sep='/')


def state_dict(tree, ema=True):
    """{name: tensor} of a checkpoint file's contents, names without leading `module.` and `_orig_mod.`.

    Args:
      tree: as `torch_file.open_file` returns it: a dictionary with `ema` or `model`, or a bare state_dict.
      ema: prefer `ema`, where there is one, to `model`.
    Returns:
      a dictionary; RoPE tables are still in it, for `sizes`. Raises ConversionError where tree is none of the above.
    """
    entries = tree if isinstance(tree, dict) else {}
    chosen = next((name for name in ('ema', 'model')[not ema :] if entries.get(name)), None)
    entry = entries if chosen is None else entries[chosen]
    if not (
        isinstance(entry, dict) and entry and all(isinstance(n, str) and hasattr(entry[n], 'shape') for n in entry)
    ):
        where = 'the file' if chosen is None else f'its entry {chosen}'
        found = f'is a {type(tree if chosen is None else entry).__name__}'
        if isinstance(entry, dict) and entry:
            found = 'has the keys ' + ', '.join(ascii(name)[:60] for name in list(entry)[:20])
        wanted = 'ema, model or tensors alone' if ema else 'model or tensors alone'
        raise ConversionError(f'{where} {found}: expected {wanted if chosen is None else "tensors alone"}')
    tensors = {re.sub(r'^((module|_orig_mod)\.)+', '', name): tensor for name, tensor in entry.items()}
    if len(tensors) < len(entry):
        raise ConversionError('the checkpoint has tensors of the same name with and without module. or _orig_mod.')
    return tensors


class Sizes(NamedTuple):
    """What a checkpoint's shapes tell. vae, ar: values for the sections of that name in `config.default()`; the
    S-VAE's has grid and latent_dim, which the AR model shares. ar and num_classes are None in a file of the S-VAE
    alone. name: of the published AR model that it is, B, L or H, else None."""

    vae: dict
    ar: dict | None = None
    num_classes: int | None = None
    name: str | None = None


def _size(tensors, name, axis):
    shape = getattr(tensors.get(name), 'shape', None)
    if shape is None:
        raise ConversionError(f'the checkpoint is no SphereAR model: it lacks {name}{_nearest(name, tensors)}')
    if axis >= len(shape) or shape[axis] < 1:
        raise ConversionError(f'the checkpoint is no SphereAR model: {name} has shape {tuple(shape)}')
    return shape[axis]


def _count(tensors, prefix):
    """How many modules are numbered under a prefix: 1 + the largest number there."""
    matches = (re.match(rf'{re.escape(prefix)}\.(\d{{1,9}})\.', name) for name in tensors)
    count = 1 + max((int(match[1]) for match in matches if match), default=-1)
    if not 1 <= count <= 1000:
        raise ConversionError(f'the checkpoint is no SphereAR model: it has {count} modules {prefix}.…')
    return count


def _agree(what, values):
    """The one value of {source: value or None}, None where no source has one. Raises ConversionError for two."""
    known = {source: value for source, value in values.items() if value is not None}
    if len(set(known.values())) > 1:
        raise ConversionError(
            f'{what} disagree: ' + ', '.join(f'{value} by {source}' for source, value in known.items())
        )
    return next(iter(known.values()), None)


def _vae_sizes(tensors, num_tokens, args):
    size = functools.partial(_size, tensors)
    up, down = 'vae.decoder.unpatchify.1.net.{}.block.2.weight', 'vae.encoder.patchify.0.net.{}.block.2.weight'
    stages = _count(tensors, 'vae.encoder.patchify.0.net')
    width = size('vae.post_quant_proj.weight', 0)
    tables = [name for name in ('vae.encoder.freqs_cis', 'vae.decoder.freqs_cis') if name in tensors]
    head_dim = _agree('head dimensions', {name: 2 * size(name, 1) for name in tables}) or 64
    pixels = args.get('image_size')
    L = _agree(
        'numbers of tokens',
        {name: size(name, 0) - vae.NUM_REGISTERS for name in tables}
        | {'pos_for_diff': num_tokens, 'args.image_size': None if pixels is None else (pixels >> stages) ** 2},
    )
    if L is None or L < 1 or math.isqrt(L) ** 2 != L:
        raise ConversionError(
            f'the grid of tokens cannot be told: their number is {"nowhere" if L is None else L}, it must be a square'
        )
    latent_dims = {
        'vae.post_quant_proj.weight': size('vae.post_quant_proj.weight', 1),
        'args.latent_dim': args.get('latent_dim'),
    }
    if width % head_dim:
        raise ConversionError(f"the heads' dimension {head_dim} does not divide the S-VAE's width {width}")
    return dict(
        grid=(math.isqrt(L),) * 2,
        latent_dim=_agree('latent dimensions', latent_dims),
        image_channels=size('vae.encoder.conv_in.weight', 1),
        stem=size('vae.encoder.conv_in.weight', 0),
        channels=(size(up.format(stages - 1), 1), *(size(down.format(i), 0) for i in range(stages))),
        encoder_depth=_count(tensors, 'vae.encoder.layers'),
        decoder_depth=_count(tensors, 'vae.decoder.layers'),
        heads=width // head_dim,
    )


def sizes(tensors, args=None, heads=None):
    """The `Sizes` that a state_dict's shapes tell.

    They do not tell the number of heads. The S-VAE's is its width over the head dimension of its RoPE tables, or over
    64, as in the public code, where there are none. The AR model's is that of the published model with all these sizes,
    for any other `heads`, or its width over 64 where that is None. Nor do they tell height from width: the grid is
    square, as in the public code; of a file of the S-VAE alone its size is that of the RoPE tables or of args.

    Args:
      tensors: {name: anything with a shape}, as `state_dict` returns it. args: the checkpoint's `args`, if any: what it
        says of sizes must agree with the shapes. heads: of an AR model that was not published.
    Raises:
      ConversionError: a tensor that is needed here is missing, or two sources disagree.
    """
    args = args if isinstance(args, dict) else getattr(args, '__dict__', {})
    args = {k: v for k, v in args.items() if type(v) is int or k == 'model'}
    if not any(name.startswith('vae.') for name in tensors):
        raise ConversionError(
            f'the checkpoint is no SphereAR model: it has no tensor vae.…, but {", ".join(list(tensors)[:5])}'
        )
    if all(name.startswith('vae.') for name in tensors):
        return Sizes(_vae_sizes(tensors, None, args))
    size = functools.partial(_size, tensors)
    vae_sizes = _vae_sizes(tensors, size('pos_for_diff.weight', 0), args)
    width = size('proj_in.weight', 0)
    found = dict(
        depth=_count(tensors, 'layers'),
        width=width,
        head_depth=_count(tensors, 'head.net.res_blocks'),
        head_width=size('head.net.input_proj.weight', 0),
        head_groups=_count(tensors, 'head.net.ada_ln_blocks'),
    )
    name = next((name for name, variant in ar.VARIANTS.items() if found.items() <= variant.items()), None)
    said = re.fullmatch(r'SphereAR-([BLH])', str(args.get('model')))
    _agree('models', {'shapes': name or 'none that was published', 'args.model': said and said[1]})
    heads = _agree('numbers of heads', {'heads': heads, f'SphereAR-{name}': name and ar.VARIANTS[name]['heads']})
    heads = heads or max(width // 64, 1)
    try:
        transformer.head_dim(width, heads)
    except ValueError as error:
        raise ConversionError(f'the number of heads is not {heads}: {error}; give heads') from None
    _agree('latent dimensions', {'proj_in.weight': size('proj_in.weight', 1), 'the S-VAE': vae_sizes['latent_dim']})
    classes = {'cls_embedding.weight': size('cls_embedding.weight', 0) - 1, 'args.num_classes': args.get('num_classes')}
    tokens = {
        'cls_embedding.weight': size('cls_embedding.weight', 1) // width,
        'args.cls_token_num': args.get('cls_token_num'),
    }
    found |= dict(heads=heads, class_tokens=_agree('numbers of class tokens', tokens))
    return Sizes(vae_sizes, found, _agree('numbers of classes', classes), name)


def export(path, model, vae_params, ar_params=None):
    """Writes parameters under the public names to a safetensors file, float32, as the published files have them: the
    S-VAE `model` with its RoPE tables, and the AR model if given. Raises ConversionError for a distilled head."""
    tensors = to_torch(vae_params) | ({} if ar_params is None else to_torch(ar_params))
    head_dim = transformer.head_dim(model.channels[-1], model.heads)
    angles = transformer.rope_table(*model.grid, vae.NUM_REGISTERS, head_dim)
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    tensors |= {f'vae.{part}.freqs_cis': table.copy() for part in ('encoder', 'decoder')}
    save_file(tensors, path, metadata={'format': 'pt'})
