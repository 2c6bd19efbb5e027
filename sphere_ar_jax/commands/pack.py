"""--mode=pack: copies a data set to ArrayRecord files."""

from sphere_ar_jax.config import recipes
from sphere_ar_jax.data import sources
from sphere_ar_jax.runtime import console
from sphere_ar_jax.runtime.console import UserError


def pack(data, output, *, shards=128, split='train', data_dir=None):
    """Copies images to sharded ArrayRecord files, which training then reads as
    array_records:OUTPUT.

    Args:
      data: KIND:PATH, see `recipes.data_set`. split, data_dir: of tfds.
    """
    kind, path = recipes.data_set(data)
    if kind == 'digits':
        raise UserError('the digits are part of scikit-learn: there is nothing to pack')
    source = sources.open_source(
        kind, path, split, data_dir, console.bar(None, 'reading the tar', 'byte')
    )
    sources.pack(source, output, shards, console.bar(len(source), 'packed'))
    print(f'{output}: {len(source)} images of {source.num_classes} classes')
