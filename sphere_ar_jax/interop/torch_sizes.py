"""The sizes of a model, found from the tensors of a PyTorch checkpoint."""

import functools
import math
import re
from typing import NamedTuple

from sphere_ar_jax.interop import torch_names
from sphere_ar_jax.models import ar, transformer
from sphere_ar_jax.models.backbones import vit
from sphere_ar_jax.runtime.console import UserError


def state_dict(tree, ema=True):
    """{name: tensor} of a checkpoint file's contents, names without leading `module.` and
    `_orig_mod.`.

    Args:
      tree: as `torch_file.open_file` returns it: a dictionary with `ema` or `model`, or a bare
        state_dict.
      ema: prefer `ema`, where there is one, to `model`.
    Returns:
      a dictionary; RoPE tables are still in it, for `sizes`. Raises UserError where tree is none of
        the above.
    """
    entries = tree if isinstance(tree, dict) else {}
    chosen = next((name for name in ('ema', 'model')[not ema :] if entries.get(name)), None)
    entry = entries if chosen is None else entries[chosen]
    if not (
        isinstance(entry, dict)
        and entry
        and all(isinstance(n, str) and hasattr(entry[n], 'shape') for n in entry)
    ):
        where = 'the file' if chosen is None else f'its entry {chosen}'
        found = f'is a {type(tree if chosen is None else entry).__name__}'
        if isinstance(entry, dict) and entry:
            found = 'has the keys ' + ', '.join(ascii(name)[:60] for name in list(entry)[:20])
        wanted = 'ema, model or tensors alone' if ema else 'model or tensors alone'
        raise UserError(
            f'{where} {found}: expected {wanted if chosen is None else "tensors alone"}'
        )
    tensors = {
        re.sub(r'^((module|_orig_mod)\.)+', '', name): tensor for name, tensor in entry.items()
    }
    if len(tensors) < len(entry):
        raise UserError(
            'the checkpoint has tensors of the same name with and without module. or _orig_mod.'
        )
    return tensors


class Sizes(NamedTuple):
    """What a checkpoint's shapes tell. vae, ar: values for the sections of that name in
    `schema.default()`; the S-VAE's has grid and latent_dim, which the AR model shares. ar and
    num_classes are None in a file of the S-VAE alone. name: of the published AR model that it is,
    B, L or H, else None.
    """

    vae: dict
    ar: dict | None = None
    num_classes: int | None = None
    name: str | None = None


def _size(tensors, name, axis):
    shape = getattr(tensors.get(name), 'shape', None)
    if shape is None:
        raise UserError(
            f'the checkpoint is no SphereAR model: it lacks {name}{torch_names.nearest_names(name, tensors)}'
        )
    if axis >= len(shape) or shape[axis] < 1:
        raise UserError(f'the checkpoint is no SphereAR model: {name} has shape {tuple(shape)}')
    return shape[axis]


def _count(tensors, prefix):
    """How many modules are numbered under a prefix: 1 + the largest number there."""
    matches = (re.match(rf'{re.escape(prefix)}\.(\d{{1,9}})\.', name) for name in tensors)
    count = 1 + max((int(match[1]) for match in matches if match), default=-1)
    if not 1 <= count <= 1000:
        raise UserError(f'the checkpoint is no SphereAR model: it has {count} modules {prefix}.…')
    return count


def _agree(what, values):
    """The one value of {source: value or None}, None where no source has one. Raises UserError for
    two.
    """
    known = {source: value for source, value in values.items() if value is not None}
    if len(set(known.values())) > 1:
        raise UserError(
            f'{what} disagree: '
            + ', '.join(f'{value} by {source}' for source, value in known.items())
        )
    return next(iter(known.values()), None)


def _vae_sizes(tensors, num_tokens, args):
    size = functools.partial(_size, tensors)
    up, down = (
        'vae.decoder.unpatchify.1.net.{}.block.2.weight',
        'vae.encoder.patchify.0.net.{}.block.2.weight',
    )
    stages = _count(tensors, 'vae.encoder.patchify.0.net')
    width = size('vae.post_quant_proj.weight', 0)
    tables = [
        name for name in ('vae.encoder.freqs_cis', 'vae.decoder.freqs_cis') if name in tensors
    ]
    head_dim = _agree('head dimensions', {name: 2 * size(name, 1) for name in tables}) or 64
    pixels = args.get('image_size')
    L = _agree(
        'numbers of tokens',
        {name: size(name, 0) - vit.NUM_REGISTERS for name in tables}
        | {
            'pos_for_diff': num_tokens,
            'args.image_size': None if pixels is None else (pixels >> stages) ** 2,
        },
    )
    if L is None or L < 1 or math.isqrt(L) ** 2 != L:
        raise UserError(
            f'the grid of tokens cannot be told: their number is {"nowhere" if L is None else L}, it must be a square'
        )
    latent_dims = {
        'vae.post_quant_proj.weight': size('vae.post_quant_proj.weight', 1),
        'args.latent_dim': args.get('latent_dim'),
    }
    if width % head_dim:
        raise UserError(
            f"the heads' dimension {head_dim} does not divide the S-VAE's width {width}"
        )
    return dict(
        grid=(math.isqrt(L),) * 2,
        latent_dim=_agree('latent dimensions', latent_dims),
        image_channels=size('vae.encoder.conv_in.weight', 1),
        stem=size('vae.encoder.conv_in.weight', 0),
        channels=(
            size(up.format(stages - 1), 1),
            *(size(down.format(i), 0) for i in range(stages)),
        ),
        encoder_depth=_count(tensors, 'vae.encoder.layers'),
        decoder_depth=_count(tensors, 'vae.decoder.layers'),
        heads=width // head_dim,
    )


def sizes(tensors, args=None, heads=None):
    """The `Sizes` that a state_dict's shapes tell.

    They do not tell the number of heads. The S-VAE's is its width over the head dimension of its
    RoPE tables, or over 64, as in the public code, where there are none. The AR model's is that of
    the published model with all these sizes, for any other `heads`, or its width over 64 where that
    is None. Nor do they tell height from width: the grid is square, as in the public code; of a
    file of the S-VAE alone its size is that of the RoPE tables or of args.

    Args:
      tensors: {name: anything with a shape}, as `state_dict` returns it. args: the checkpoint's
        `args`, if any: what it says of sizes must agree with the shapes. heads: of an AR model that
        was not published.
    Raises:
      UserError: a tensor that is needed here is missing, or two sources disagree.
    """
    args = args if isinstance(args, dict) else getattr(args, '__dict__', {})
    args = {k: v for k, v in args.items() if type(v) is int or k == 'model'}
    if not any(name.startswith('vae.') for name in tensors):
        raise UserError(
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
    name = next(
        (name for name, variant in ar.VARIANTS.items() if found.items() <= variant.items()), None
    )
    said = re.fullmatch(r'SphereAR-([BLH])', str(args.get('model')))
    _agree('models', {'shapes': name or 'none that was published', 'args.model': said and said[1]})
    heads = _agree(
        'numbers of heads',
        {'heads': heads, f'SphereAR-{name}': name and ar.VARIANTS[name]['heads']},
    )
    heads = heads or max(width // 64, 1)
    try:
        transformer.head_dim(width, heads)
    except ValueError as error:
        raise UserError(f'the number of heads is not {heads}: {error}; give heads') from None
    _agree(
        'latent dimensions',
        {'proj_in.weight': size('proj_in.weight', 1), 'the S-VAE': vae_sizes['latent_dim']},
    )
    classes = {
        'cls_embedding.weight': size('cls_embedding.weight', 0) - 1,
        'args.num_classes': args.get('num_classes'),
    }
    tokens = {
        'cls_embedding.weight': size('cls_embedding.weight', 1) // width,
        'args.cls_token_num': args.get('cls_token_num'),
    }
    found |= dict(heads=heads, class_tokens=_agree('numbers of class tokens', tokens))
    return Sizes(vae_sizes, found, _agree('numbers of classes', classes), name)
