"""--mode=pack: copies a data set to ArrayRecord files."""

from sphere_ar_jax.config import recipes
from sphere_ar_jax.data import digits, sources
from sphere_ar_jax.runtime import console


def pack(data, output, *, shards=128, split='train', data_dir=None):
    """Copies images to sharded ArrayRecord files, which training then reads as array_records:OUTPUT.

    Args:
      data: KIND:PATH, see `recipes.data_set`. split, data_dir: of tfds.
    """
    kind, path = recipes.data_set(data)
    show = console.bar(None, 'reading the tar', 'byte')
    source = digits.Digits('all', 0) if kind == 'digits' else sources.open_source(kind, path, split, data_dir, show)
    sources.pack(source, output, shards, console.bar(len(source), 'packed'))
    print(f'{output}: {len(source)} images of {source.num_classes} classes')
