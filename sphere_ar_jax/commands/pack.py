"""--mode=pack: copies a data set to ArrayRecord files."""

from sphere_ar_jax.config import recipes
from sphere_ar_jax.data import small, sources
from sphere_ar_jax.evaluation import class_names
from sphere_ar_jax.runtime import console
from sphere_ar_jax.runtime.console import UserError


def pack(
    data: str,
    output: str,
    *,
    shards: int = 128,
    split: str = 'train',
    data_dir: str | None = None,
) -> None:
    """Copies images to sharded ArrayRecord files.

    A training reads them with --config.data.name=array_records and --config.data.path=OUTPUT.

    Args:
      data: KIND:PATH, see `recipes.data_set`.
      output: the directory to write.
      shards: the number of files.
      split: the split of tfds.
      data_dir: the directory of tfds, None for its default.

    Raises:
      UserError: the images are a small data set or cannot be read, or the directory exists or
        cannot be written.
    """
    kind, path = recipes.data_set(data)
    if kind in small.KINDS:
        raise UserError(small.KINDS[kind].unpackable)
    bar = console.bar(None, 'reading the tar', 'byte')
    source = sources.open_source(kind, path, split, data_dir, bar)
    sources.pack(source, output, shards, console.bar(len(source), 'packed'))
    classes = class_names.describe(source.num_classes, source.class_names)
    print(f'{output}: {len(source)} images of {classes}')
    if source.left_out:
        print(f'left out: {source.left_out}')
