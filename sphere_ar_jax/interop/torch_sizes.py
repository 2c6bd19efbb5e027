"""The sizes of a model, found from the tensors of a PyTorch checkpoint."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from sphere_ar_jax.interop import torch_names
from sphere_ar_jax.models import ar, transformer
from sphere_ar_jax.models.backbones import grid_transformer
from sphere_ar_jax.runtime.console import UserError, printable

Value = TypeVar('Value')

MAX_SIDE = 256  # tokens along a side of the grid; the published grids have 16
MAX_STAGES = 12  # halvings of an image's side; the published S-VAE has 4


def _is_state_dict(entry: Any) -> bool:
    """Tells whether something is a dictionary of tensors by name, and not empty."""
    if not isinstance(entry, dict) or not entry:
        return False
    return all(isinstance(name, str) and hasattr(entry[name], 'shape') for name in entry)


def state_dict(tree: Any, ema: bool = True) -> dict[str, Any]:
    """Finds the tensors in a checkpoint file's contents.

    Args:
      tree: as `torch_file.open_file` returns it: a dictionary with `ema` or `model`, or a bare
        state_dict.
      ema: whether to prefer `ema`, where there is one, to `model`.

    Returns:
      {name: tensor}, the names without a leading `module.` and without `_orig_mod.`, as wrapped and
      compiled models have them, and without the count that an average of weights has. RoPE tables
      stay in it, since `sizes` reads them.

    Raises:
      UserError: `tree` is none of the above.
    """
    entries = tree if isinstance(tree, dict) else {}
    candidates = ('ema', 'model') if ema else ('model',)
    chosen = next((name for name in candidates if entries.get(name)), None)
    if chosen is None:
        where = 'the file'
        entry = tree
        wanted = ', '.join(candidates) + ' or tensors alone'
    else:
        where = f'its entry {chosen}'
        entry = entries[chosen]
        wanted = 'tensors alone'
    if not _is_state_dict(entry):
        found = f'is a {type(entry).__name__}'
        if isinstance(entry, dict) and entry:
            found = 'has the keys ' + ', '.join(ascii(name)[:60] for name in list(entry)[:20])
        raise UserError(f'{where} {found}: expected {wanted}')
    return plain(entry)


def plain(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by the names that they have in the models themselves.

    Raises:
      UserError: two of them then have the same name.
    """
    kept = {name: tensor for name, tensor in tensors.items() if name != 'n_averaged'}
    found = {
        re.sub(r'^(module\.)+', '', name.replace('_orig_mod.', '')): tensor
        for name, tensor in kept.items()
    }
    if len(found) < len(kept):
        raise UserError(
            'the checkpoint has tensors of the same name with and without module. or _orig_mod.'
        )
    return found


class Sizes(NamedTuple):
    """The sizes of the models in a checkpoint.

    Attributes:
      vae: values for the section `vae` of `schema.default()`. It has grid and latent_dim, which the
        AR model shares.
      ar: values for the section `ar`; None in a file of the S-VAE alone.
      num_classes: the number of classes; None in a file of the S-VAE alone.
      name: B, L or H for a published AR model, else None.
    """

    vae: dict[str, Any]
    ar: dict[str, Any] | None = None
    num_classes: int | None = None
    name: str | None = None


def _size(tensors: Mapping[str, Any], name: str, axis: int) -> int:
    """Gives the length of a tensor's axis. Raises UserError if there is none, or it is empty.

    A tensor with numbers cannot be larger than its file, so that no size found here is.
    """
    shape = getattr(tensors.get(name), 'shape', None)
    if shape is None:
        nearest = torch_names.nearest_names(name, tensors)
        raise UserError(f'the checkpoint is no SphereAR model: it lacks {name}{nearest}')
    if axis >= len(shape) or 0 in shape:
        raise UserError(f'the checkpoint is no SphereAR model: {name} has shape {tuple(shape)}')
    return shape[axis]


def _count(tensors: Mapping[str, Any], prefix: str, most: int = 1000) -> int:
    """Counts the modules that are numbered under a prefix: 1 + the largest number there.

    Raises UserError if there are none, or more than `most`.
    """
    matches = (re.match(rf'{re.escape(prefix)}\.(\d{{1,9}})\.', name) for name in tensors)
    count = 1 + max((int(match[1]) for match in matches if match), default=-1)
    if not 1 <= count <= most:
        raise UserError(f'the checkpoint is no SphereAR model: it has {count} modules {prefix}.…')
    return count


def _agree(what: str, values: Mapping[str, Value | None]) -> Value | None:
    """Gives the value on which all sources agree, or raises UserError.

    Args:
      what: names the values in the message.
      values: {source: its value, or None where it has none}.

    Returns:
      The value; None where no source has one.
    """
    known = {source: value for source, value in values.items() if value is not None}
    if len(set(known.values())) > 1:
        said = ', '.join(
            f'{printable(str(value), 40)} by {source}' for source, value in known.items()
        )
        raise UserError(f'{what} disagree: {said}')
    return next(iter(known.values()), None)


def _side(tensors: Mapping[str, Any], num_tokens: int | None, pixels: int | None) -> int:
    """Finds H = W of the token grid.

    Three sources may tell it, and must agree: the RoPE tables in `tensors`, the AR model's number
    of tokens, and the side of an image in pixels that `args` has. The last two are None where they
    are not known. Nothing is allocated by this number before it was compared with MAX_SIDE.
    """
    by_source: dict[str, int | None] = {
        name: _size(tensors, name, 0) - grid_transformer.NUM_REGISTERS
        for name in _rope_tables(tensors)
    }
    by_source['pos_for_diff'] = num_tokens
    if pixels is not None:
        stages = _count(tensors, 'vae.encoder.patchify.0.net', MAX_STAGES)
        if not 0 < pixels >> stages <= MAX_SIDE:
            raise UserError(
                f'args.image_size is {printable(str(pixels), 40)}, but an image has '
                f'{1 << stages} to {MAX_SIDE << stages} pixels a side'
            )
        by_source['args.image_size'] = (pixels >> stages) ** 2
    L = _agree('numbers of tokens', by_source)
    if L is None or L < 1 or math.isqrt(L) ** 2 != L:
        number = 'nowhere' if L is None else L
        raise UserError(
            f'the grid of tokens cannot be told: their number is {number}, it must be a square'
        )
    if L > MAX_SIDE**2:
        raise UserError(f'the grid has {L} tokens, but may have {MAX_SIDE}×{MAX_SIDE}')
    return math.isqrt(L)


def _rope_tables(tensors: Mapping[str, Any]) -> list[str]:
    """Names the RoPE tables that a state_dict has."""
    names = ('vae.encoder.freqs_cis', 'vae.decoder.freqs_cis')
    return [name for name in names if name in tensors]


def _vae_sizes(
    tensors: Mapping[str, Any], num_tokens: int | None, args: Mapping[str, Any]
) -> dict[str, Any]:
    """Finds the sizes of the S-VAE; num_tokens is that of the AR model, or None."""
    size = functools.partial(_size, tensors)
    up = 'vae.decoder.unpatchify.1.net.{}.block.2.weight'
    down = 'vae.encoder.patchify.0.net.{}.block.2.weight'
    stages = _count(tensors, 'vae.encoder.patchify.0.net', MAX_STAGES)
    width = size('vae.post_quant_proj.weight', 0)
    head_dims = {name: 2 * size(name, 1) for name in _rope_tables(tensors)}
    head_dim = _agree('head dimensions', head_dims)
    if head_dim is None:
        head_dim = 64
    side = _side(tensors, num_tokens, args.get('image_size'))
    latent_dims = {
        'vae.post_quant_proj.weight': size('vae.post_quant_proj.weight', 1),
        'args.latent_dim': args.get('latent_dim'),
    }
    if width % head_dim:
        raise UserError(
            f"the heads' dimension {head_dim} does not divide the S-VAE's width {width}"
        )
    return {
        'grid': (side, side),
        'latent_dim': _agree('latent dimensions', latent_dims),
        'image_channels': size('vae.encoder.conv_in.weight', 1),
        'stem': size('vae.encoder.conv_in.weight', 0),
        'channels': (
            size(up.format(stages - 1), 1),
            *(size(down.format(i), 0) for i in range(stages)),
        ),
        'encoder_depth': _count(tensors, 'vae.encoder.layers'),
        'decoder_depth': _count(tensors, 'vae.decoder.layers'),
        'heads': width // head_dim,
    }


def _published_name(found: dict[str, int], model: Any) -> str | None:
    """Names the published AR model with the sizes `found`, None if there is none.

    Raises UserError if the checkpoint's `args.model`, as 'SphereAR-B', names another one.
    """
    published = (name for name, variant in ar.VARIANTS.items() if found.items() <= variant.items())
    name = next(published, None)
    said = re.fullmatch(r'SphereAR-([BLH])', str(model))
    by_source = {
        'shapes': name or 'none that was published',
        'args.model': said[1] if said else None,
    }
    _agree('models', by_source)
    return name


def _ar_heads(name: str | None, heads: int | None, width: int) -> int:
    """Finds the AR model's number of heads, see `sizes`; name is that of a published model or None.

    Raises UserError if the published number and the caller's `heads` differ, or the number does not
    fit the width.
    """
    published = None if name is None else ar.VARIANTS[name]['heads']
    found = _agree('numbers of heads', {'heads': heads, f'SphereAR-{name}': published})
    if not found:
        found = max(width // 64, 1)
    try:
        transformer.head_dim(width, found)
    except ValueError as error:
        raise UserError(f'the number of heads is not {found}: {error}; give heads') from None
    return found


def sizes(tensors: Mapping[str, Any], args: Any = None, heads: int | None = None) -> Sizes:
    """Finds the sizes of the models that a state_dict belongs to.

    Shapes do not tell the number of heads. For the S-VAE it is the width over the head dimension.
    The RoPE tables tell that dimension; without tables it is 64, as in the public code. An AR model
    with the sizes of a published one has the published number of heads. Any other AR model has
    `heads`, or its width over 64 where that is None.

    Shapes do not tell height from width either: the grid is taken as square, as in the public code.
    In a file of the S-VAE alone, the RoPE tables or `args` tell the size of the grid.

    Args:
      tensors: {name: anything with a shape}, as `state_dict` returns it.
      args: the checkpoint's `args`, if any: a dictionary or a Namespace. What they say of sizes
        must agree with the shapes.
      heads: number of heads of an AR model that was not published.

    Returns:
      The `Sizes`.

    Raises:
      UserError: a tensor that is needed here is missing, two sources disagree, or a size is
        impossible.
    """
    given = args if isinstance(args, dict) else getattr(args, '__dict__', {})
    said = {key: value for key, value in given.items() if type(value) is int or key == 'model'}
    if not any(name.startswith('vae.') for name in tensors):
        first = ', '.join(printable(name, 60) for name in list(tensors)[:5])
        raise UserError(f'the checkpoint is no SphereAR model: it has no tensor vae.…, but {first}')
    if all(name.startswith('vae.') for name in tensors):
        return Sizes(_vae_sizes(tensors, None, said))
    size = functools.partial(_size, tensors)
    vae_sizes = _vae_sizes(tensors, size('pos_for_diff.weight', 0), said)
    width = size('proj_in.weight', 0)
    found = {
        'depth': _count(tensors, 'layers'),
        'width': width,
        'head_depth': _count(tensors, 'head.net.res_blocks'),
        'head_width': size('head.net.input_proj.weight', 0),
        'head_groups': _count(tensors, 'head.net.ada_ln_blocks'),
    }
    name = _published_name(found, said.get('model'))
    found['heads'] = _ar_heads(name, heads, width)
    latent_dims = {
        'proj_in.weight': size('proj_in.weight', 1),
        'the S-VAE': vae_sizes['latent_dim'],
    }
    _agree('latent dimensions', latent_dims)
    classes = {
        'cls_embedding.weight': size('cls_embedding.weight', 0) - 1,
        'args.num_classes': said.get('num_classes'),
    }
    class_tokens = {
        'cls_embedding.weight': size('cls_embedding.weight', 1) // width,
        'args.cls_token_num': said.get('cls_token_num'),
    }
    ar_sizes = found | {'class_tokens': _agree('numbers of class tokens', class_tokens)}
    return Sizes(vae_sizes, ar_sizes, _agree('numbers of classes', classes), name)
