"""Translates between parameter trees and the tensors of the public PyTorch checkpoints.

Names and layouts differ. To read a file, `torch_file.open_file` opens it, `torch_sizes.state_dict`
finds its tensors, and `torch_sizes.sizes` tells which models to build; `from_torch` then fills the
tree of each model, one tensor at a time. `export` writes a file.

Our tensors are stacked over layers (leading axes, see `transformer.Stack`), linear kernels are
(in, *out), convolutions HWIO. PyTorch's are one tensor per layer, linear weights (out, in),
convolutions OIHW, transposed ones IOHW.

Dimensions:
  A leaf of ours has one leading axis for the `{}` in its PyTorch name. Only the flow head's blocks
  have two, group and block, which PyTorch numbers consecutively.
"""

import difflib
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from sphere_ar_jax.models import transformer, vae
from sphere_ar_jax.models.backbones import Hybrid, grid_transformer
from sphere_ar_jax.models.conditions import Classes, Condition
from sphere_ar_jax.models.heads import FlowHead, Head
from sphere_ar_jax.models.posteriors import PowerSpherical
from sphere_ar_jax.runtime.console import UserError, printable
from sphere_ar_jax.runtime.types import PyTree
from sphere_ar_jax.sphere import geometry

Array = TypeVar('Array', np.ndarray, jax.Array)
Shape: TypeAlias = tuple[int, ...]

MOST_NAMED = 20  # names of tensors of one kind in a message
_BLOCK = {
    'attention/qkv/kernel': 'attention.wqkv.weight',
    'attention/out/kernel': 'attention.wo.weight',
    'mlp/w1/kernel': 'feed_forward.w1.weight',
    'mlp/w2/kernel': 'feed_forward.w2.weight',
    'attention_norm/scale': 'attention_norm.weight',
    'mlp_norm/scale': 'ffn_norm.weight',
}
_AR_BLOCKS = tuple(
    (f'stack/blocks/{ours}', f'layers.{{}}.{theirs}', 1, 'linear')
    for ours, theirs in _BLOCK.items()
)
_VAE_BLOCKS = tuple(
    (f'(encoder|decoder)/vit/stack/blocks/{ours}', rf'vae.\1.layers.{{}}.{theirs}', 1, 'linear')
    for ours, theirs in _BLOCK.items()
)
_DOWN = r'vae.encoder.patchify.0.net.\1'
_UP = r'vae.decoder.unpatchify.1.net.\1'
# Each rule is (our path, their name, number of leading stacked axes, kind of tensor). The path is a
# regular expression, and the name its replacement. The first rule that matches counts.
_RULES: tuple[tuple[str, str, int, str], ...] = (
    *_AR_BLOCKS,
    *_VAE_BLOCKS,
    ('cls_embedding', 'cls_embedding.weight', 0, 'plain'),
    ('pos_for_diff', 'pos_for_diff.weight', 0, 'plain'),
    ('(proj_in|emb_norm|norm)/(.*)', r'\1.\2', 0, 'linear'),
    ('head/time1/(.*)', r'head.net.time_embed.mlp.0.\1', 0, 'linear'),
    ('head/time2/(.*)', r'head.net.time_embed.mlp.2.\1', 0, 'linear'),
    ('head/(cond_embed|input_proj)/(.*)', r'head.net.\1.\2', 0, 'linear'),
    ('head/res_groups/ada/(.*)', r'head.net.ada_ln_blocks.{}.\1', 1, 'linear'),
    ('head/res_groups/blocks/(norm|w1|w2)/(.*)', r'head.net.res_blocks.{}.\1.\2', 2, 'linear'),
    ('head/final_ada/(.*)', r'head.net.final_layer.ada_ln_modulation.\1', 0, 'linear'),
    ('head/final_linear/(.*)', r'head.net.final_layer.linear.\1', 0, 'linear'),
    ('(quant_proj|post_quant_proj)/(.*)', r'vae.\1.\2', 0, 'linear'),
    ('(encoder|decoder)/vit/registers', r'vae.\1.register_token.weight', 0, 'plain'),
    ('encoder/(norm|output)/(.*)', r'vae.encoder.\1.\2', 0, 'linear'),
    ('encoder/conv_in/kernel', 'vae.encoder.conv_in.weight', 0, 'conv'),
    (r'encoder/down(\d)/norm1/(.*)', rf'{_DOWN}.block.0.\2', 0, 'plain'),
    (r'encoder/down(\d)/conv1/kernel', f'{_DOWN}.block.2.weight', 0, 'conv'),
    (r'encoder/down(\d)/norm2/(.*)', rf'{_DOWN}.block.3.\2', 0, 'plain'),
    (r'encoder/down(\d)/conv2/kernel', f'{_DOWN}.block.5.weight', 0, 'conv'),
    (r'encoder/down(\d)/shortcut/kernel', f'{_DOWN}.shortcut.weight', 0, 'conv'),
    ('decoder/conv_in/kernel', 'vae.decoder.conv_in.1.weight', 0, 'conv'),
    (r'decoder/up(\d)/norm1/(.*)', rf'{_UP}.block.0.\2', 0, 'plain'),
    (r'decoder/up(\d)/conv1/kernel', f'{_UP}.block.2.weight', 0, 'transposed'),
    (r'decoder/up(\d)/norm2/(.*)', rf'{_UP}.block.3.\2', 0, 'plain'),
    (r'decoder/up(\d)/conv2/kernel', f'{_UP}.block.5.weight', 0, 'conv'),
    (r'decoder/up(\d)/shortcut/kernel', f'{_UP}.shortcut.weight', 0, 'transposed'),
    (r'decoder/up(\d)/norm3/(.*)', rf'{_UP}.block2.0.\2', 0, 'plain'),
    (r'decoder/up(\d)/conv3/kernel', f'{_UP}.block2.2.weight', 0, 'conv'),
    (r'decoder/up(\d)/norm4/(.*)', rf'{_UP}.block2.3.\2', 0, 'plain'),
    (r'decoder/up(\d)/conv4/kernel', f'{_UP}.block2.5.weight', 0, 'conv'),
    ('decoder/norm_out/(.*)', r'vae.decoder.conv_out.0.\1', 0, 'plain'),
    ('decoder/conv_out/kernel', 'vae.decoder.conv_out.2.weight', 0, 'conv'),
)


def _rule(path: str) -> tuple[str, int, str]:
    """Finds the rule for a parameter of ours, or raises UserError.

    Returns:
      (PyTorch name with a `{}` where a layer's number stands, number of stacked axes, kind).
    """
    for ours, theirs, stacked, kind in _RULES:
        match = re.fullmatch(ours, path)
        if match:
            name = match.expand(theirs)
            return re.sub(r'\.(kernel|scale)$', '.weight', name), stacked, kind
    raise UserError(f'the parameter {path} has no PyTorch name')


def _to_theirs(a: Array, path: str, kind: str) -> Array:
    """Brings one layer's tensor into PyTorch's layout."""
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


def _to_ours(a: np.ndarray, path: str, kind: str) -> np.ndarray:
    """Inverts `_to_theirs`, but leaves axes joined that it has joined."""
    if kind == 'conv':
        return a.transpose(2, 3, 1, 0)
    if kind == 'transposed':
        return a.transpose(2, 3, 0, 1)[::-1, ::-1]
    return a.T if path.endswith('kernel') else a


def torch_shapes(params: PyTree) -> dict[str, Shape]:
    """Gives the shapes that a parameter tree has in PyTorch; no tensor is touched.

    Args:
      params: parameters of the AR model or the S-VAE, abstract or not.

    Returns:
      {PyTorch name: shape}.

    Raises:
      UserError: a leaf has no PyTorch name.
    """
    shapes = {}
    for path, leaf in traverse.flatten_dict(params, sep='/').items():
        name, stacked, kind = _rule(path)
        layer = jax.ShapeDtypeStruct(leaf.shape[stacked:], leaf.dtype)
        shape = jax.eval_shape(functools.partial(_to_theirs, path=path, kind=kind), layer).shape
        for i in range(math.prod(leaf.shape[:stacked])):
            shapes[name.format(i)] = shape
    return shapes


def to_torch(params: PyTree) -> dict[str, np.ndarray]:
    """Translates a parameter tree to PyTorch's names and layouts.

    Args:
      params: parameters of the AR model or the S-VAE.

    Returns:
      {PyTorch name: array in PyTorch's layout}.

    Raises:
      UserError: a leaf has no PyTorch name.
    """
    tensors = {}
    for path, leaf in traverse.flatten_dict(params, sep='/').items():
        name, stacked, kind = _rule(path)
        for i, a in enumerate(np.asarray(leaf).reshape(-1, *leaf.shape[stacked:])):
            tensors[name.format(i)] = np.ascontiguousarray(_to_theirs(a, path, kind))
    return tensors


def nearest_names(name: str, others: Iterable[str]) -> str:
    """Gives ' (nearest: NAME)' for the name most like this one, '' where none is like it.

    Names without end, which no model has, are like none.
    """
    if len(name) > 200:
        return ''
    parts = set(name.split('.'))

    def common_parts(other: str) -> int:
        return len(parts & set(other.split('.')))

    # difflib is slow, so it sees only the names with most parts in common.
    others = (other for other in others if len(other) <= 200)
    alike = sorted(others, key=common_parts, reverse=True)[:20]
    near = difflib.get_close_matches(name, alike, 1)
    return f' (nearest: {printable(near[0])})' if near else ''


def _require_fit(tensors: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Raises UserError unless the tensors have the names and shapes of `shapes`.

    Its message has a line for each tensor that is missing, unexpected or of another shape, up to
    MOST_NAMED of each kind.
    """
    missing = sorted(set(shapes) - set(tensors))
    unexpected = sorted(set(tensors) - set(shapes))
    found = {name: tuple(tensors[name].shape) for name in shapes if name in tensors}
    misshaped = [name for name, shape in found.items() if shape != shapes[name]]
    lines = [f'missing: {name}{nearest_names(name, unexpected)}' for name in missing[:MOST_NAMED]]
    lines += [
        f'unexpected: {printable(name)}{nearest_names(name, missing)}'
        for name in unexpected[:MOST_NAMED]
    ]
    lines += [
        f'shape: {name} has {found[name]}, but the model needs {shapes[name]}'
        for name in misshaped[:MOST_NAMED]
    ]
    if lines:
        summary = (
            f'the checkpoint does not fit the model: {len(missing)} missing, '
            f'{len(unexpected)} unexpected and {len(misshaped)} mis-shaped tensors'
        )
        raise UserError('\n'.join([summary, *lines]))


def _empty(shape: Shape) -> np.ndarray:
    """Allocates a float32 array at an address that JAX on a CPU takes over without a copy."""
    size = 4 * math.prod(shape)
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(np.float32).reshape(shape)


def numbers_of(name: str, tensors: Mapping[str, Any]) -> np.ndarray:
    """The numbers of a tensor.

    Raises:
      UserError: they are no floats, or not all finite.
    """
    numbers = np.asarray(tensors[name])
    if not jnp.issubdtype(numbers.dtype, jnp.floating):
        raise UserError(f'{name} holds {numbers.dtype}, but must hold floats')
    if not np.isfinite(numbers).all():
        raise UserError(f'{name} has numbers that are not finite')
    return numbers


def from_torch(
    tensors: Mapping[str, Any],
    like: PyTree,
    progress: Callable[[int], None] = lambda done: None,
) -> PyTree:
    """Translates PyTorch's tensors to a parameter tree.

    Each leaf is allocated once and filled tensor by tensor, so that only one lazy tensor
    (`torch_file.Tensor`) at a time is in memory. `tensors` may hold the S-VAE and the AR model, as
    the published files do. Only those of the model that `like` belongs to are read; RoPE tables are
    passed over.

    Args:
      tensors: {PyTorch name: tensor}.
      like: a parameter tree of the wanted structure and shapes, abstract or not.
      progress: called with the number of tensors done.

    Returns:
      A tree like `like` of float32 NumPy arrays.

    Raises:
      UserError: tensors are missing, unexpected or mis-shaped. The message counts them and names
        the first; nothing has been read then. Or a tensor has no finite floats.
    """
    shapes = torch_shapes(like)
    of_vae = any(name.startswith('vae.') for name in shapes)
    chosen = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith('vae.') == of_vae and name.split('.')[-1] != 'freqs_cis'
    }
    _require_fit(chosen, shapes)
    params = {}
    done = 0
    for path, leaf in traverse.flatten_dict(like, sep='/').items():
        name, stacked, kind = _rule(path)
        inner = leaf.shape[stacked:]
        params[path] = _empty(leaf.shape)
        for i, part in enumerate(params[path].reshape(-1, *inner)):
            numbers = numbers_of(name.format(i), chosen)
            part[...] = _to_ours(numbers, path, kind).reshape(inner)
            done += 1
            progress(done)
    return traverse.unflatten_dict(params, sep='/')


def _not_public(key: str, public: object, found: object) -> UserError:
    """The error of a run that has something else than the public code's only choice for a key."""
    return UserError(
        f'the public PyTorch code has the {key} {public} alone, not {found}: such a run can be '
        'neither exported nor compared with it'
    )


def require_public(
    model: vae.VAE, head: Head | None = None, condition: Condition | None = None
) -> None:
    """Checks that models are made of the parts that the public code has.

    Args:
      model: the tokenizer.
      head: the head of the AR model, None where there is no AR model.
      condition: the condition of the AR model, likewise.

    Raises:
      UserError: the tokenizer has another backbone, posterior, radius, kappa_scale or token space,
        or the head is another one or starts from other noise, or images are not drawn for classes.
    """
    parts = [
        ('vae.backbone', model.backbone, Hybrid),
        ('vae.posterior', model.posterior, PowerSpherical),
    ]
    for key, part, public in parts:
        if not isinstance(part, public):
            raise _not_public(key, public.__name__, type(part).__name__)
    d = model.latent_dim
    if geometry.radius(d, model.radius) != geometry.radius(d):
        raise _not_public('vae.radius', f'√{d}', model.radius)
    posterior = model.posterior
    if isinstance(posterior, PowerSpherical) and posterior.kappa_scale != 1:
        raise _not_public('vae.kappa_scale', 1, posterior.kappa_scale)
    if condition is not None and not isinstance(condition, Classes):
        raise _not_public('ar.condition', 'classes', type(condition).__name__.lower())
    # Other heads are classes of their own below FlowHead, with the same parameters.
    if head is not None and type(head) is not FlowHead:
        raise _not_public('ar.head', FlowHead.__name__, type(head).__name__)
    if isinstance(head, FlowHead) and head.prior_scale != 1:
        raise _not_public('ar.prior_scale', 1, head.prior_scale)
    if model.num_statistics:
        # The other spaces change nothing on the sphere.
        raise UserError(
            f'the public PyTorch code has no ar.token_space {model.token_space}: such a run can be '
            'neither exported nor compared with it'
        )


# The key of a safetensors file's metadata for the attention heads of the AR model.
AR_HEADS = 'ar_heads'


def export(
    path: str | os.PathLike[str],
    model: vae.VAE,
    vae_params: PyTree,
    ar_params: PyTree | None = None,
    heads: int | None = None,
) -> None:
    """Writes parameters under the public names to a safetensors file.

    As in the published files, all tensors are float32, and the S-VAE has its RoPE tables with it.
    The metadata has the number of the AR model's heads, where it is not the width over 64 that
    `torch_sizes.sizes` takes. It has one key, since safetensors writes several in any order.

    Args:
      path: the file to write.
      model: the S-VAE.
      vae_params: the parameters of the S-VAE.
      ar_params: the parameters of the AR model; None writes the S-VAE alone.
      heads: the attention heads of the AR model, None where they are not known.

    Raises:
      UserError: the S-VAE has a part that the public code lacks, or a parameter has no PyTorch
        name, as in a distilled head.
    """
    require_public(model)
    tensors = to_torch(vae_params)
    if ar_params is not None:
        tensors |= to_torch(ar_params)
    backbone = model.backbone
    assert isinstance(backbone, Hybrid)  # `require_public` has checked this
    head_dim = transformer.head_dim(backbone.width, backbone.heads)
    angles = transformer.rope_table(*model.grid, grid_transformer.NUM_REGISTERS, head_dim)
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    for part in ('encoder', 'decoder'):
        tensors[f'vae.{part}.freqs_cis'] = table.copy()
    metadata = {'format': 'pt'}
    if heads is not None and heads != len(tensors['proj_in.weight']) // 64:
        metadata = {AR_HEADS: str(heads)}
    save_file(tensors, path, metadata=metadata)
