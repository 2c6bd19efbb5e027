"""--mode=sample, --mode=grid, --mode=complete and --mode=caption: images and texts of a run."""

import os
import re
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from sphere_ar_jax.commands import open_run
from sphere_ar_jax.config import build, schema
from sphere_ar_jax.data import sources
from sphere_ar_jax.data.captions import features
from sphere_ar_jax.data.captions import files as captions
from sphere_ar_jax.data.files import listing
from sphere_ar_jax.data.shifted import corruptions, folders
from sphere_ar_jax.evaluation import class_names, pictures
from sphere_ar_jax.evaluation.fidelity import image_sets
from sphere_ar_jax.runtime import console, hosts
from sphere_ar_jax.runtime.console import UserError
from sphere_ar_jax.runtime.files import write_bytes
from sphere_ar_jax.sampling import captioning, generation, inputs, on_mesh
from sphere_ar_jax.sampling.model import Model
from sphere_ar_jax.training.run import apart


def _num_classes(config: ConfigDict) -> int:
    """The number of classes that the AR model of an opened run knows."""
    count = schema.num_classes(config)
    assert count is not None  # the model was built with it
    return count


def _classes(workdir: str, config: ConfigDict, text: str) -> tuple[list[int], list[str]]:
    """The numbers and titles of classes whose names or numbers a text has between semicolons.

    Raises:
      UserError: the model does not know one of them.
    """
    names = class_names.of_run(workdir, config)
    known = _num_classes(config)
    wanted = [name.strip() for name in text.split(';') if name.strip()]
    numbers = [class_names.find(name, names, known) for name in wanted]
    return numbers, class_names.titles(numbers, names)


class _Asked(NamedTuple):
    """What rows of a picture are drawn for.

    Attributes:
      labels: the label of each row.
      titles: the title of each row.
    """

    labels: np.ndarray
    titles: list[str]


def _require_captions(config: ConfigDict) -> None:
    """Raises UserError for a run that knows classes in place of prompts."""
    if not build.has_captions(config):
        raise UserError(
            "this run draws for classes, not for texts: give --classes='golden retriever; 388', "
            'or --labels in --mode=sample'
        )


def _prompts(config: ConfigDict, texts: list[str]) -> _Asked:
    """Rows for prompts.

    Raises:
      UserError: the run knows classes in place of prompts, or it cannot read one.
    """
    _require_captions(config)
    labels = np.stack([build.encode_prompt(config, text) for text in texts])
    return _Asked(labels, [console.printable(text, 80) for text in texts])


def _features(config: ConfigDict, path: str) -> _Asked:
    """Rows for the texts of a file of features, see `features.TextFeatures`.

    Raises:
      UserError: the run does not read features, or those of the file do not fit.
    """
    _require_captions(config)
    if not build.reads_features(config):
        raise UserError(
            f'--prompts={path} has features of texts, which this run does not read: give a file '
            'with a text in each line'
        )
    if not os.path.isfile(os.path.expanduser(path)):
        raise UserError(f'--prompts={path} is not there: give an npz of texts and their features')
    given = schema.changed(config, {'ar.features': path})
    return _prompts(given, list(features.open_features(path).texts))


def _asked(
    workdir: str, config: ConfigDict, classes: str | None, prompt: list[str], prompts: str | None
) -> _Asked:
    """What the flags --classes, --prompt and --prompts ask for.

    Raises:
      UserError: it is nothing, or nothing that the run can draw.
    """
    if prompts is not None and prompts.endswith('.npz'):
        if prompt or classes is not None:
            raise UserError('--prompts=FILE.npz has texts and their features: give it alone')
        return _features(config, prompts)
    texts = [*prompt, *(captions.read_prompts(prompts) if prompts else [])]
    if texts and classes is not None:
        raise UserError('give --classes, or else --prompt and --prompts: a run draws for one kind')
    if texts:
        return _prompts(config, texts)
    if build.has_captions(config):
        raise UserError(
            "this run draws for texts: give --prompt='what the image shows', or a file with a text "
            'in each line as --prompts=FILE'
        )
    if classes is None or not classes.strip(' ;'):
        raise UserError("give --classes='golden retriever; 388; n02099601'")
    numbers, titles = _classes(workdir, config, classes)
    return _Asked(np.asarray(numbers), titles)


def _require_no_pngs(directory: str, n: int) -> None:
    """Refuses a directory with a picture that is none of n samples, as one of more samples has."""
    for name in os.listdir(directory) if os.path.isdir(directory) else ():
        found = re.fullmatch(r'(\d{6,})\.png', name)
        if found and int(found[1]) >= n:
            raise UserError(
                f'--png={directory} has pictures of other samples, as {name}: give another '
                'directory, or remove them'
            )


def _save_pngs(path: str, directory: str, n: int) -> None:
    """Writes each of the n images of an npz as DIRECTORY/NUMBER.png."""
    os.makedirs(directory, exist_ok=True)
    show = console.bar(n, 'PNG files')
    for i, image in enumerate(generation.images(path)):
        Image.fromarray(image.squeeze()).save(os.path.join(directory, f'{i:06d}.png'))
        show(i + 1)
    print(f'{directory}: {n} PNG files')


def sample(
    workdir: str,
    *,
    output: str | None = None,
    labels: str | None = None,
    prompt: list[str] | None = None,
    prompts: str | None = None,
    png: str | None = None,
    num_images: int | None = None,
    like: ConfigDict | None = None,
) -> None:
    """Draws images of a run to an npz, see `generation.generate`.

    If it is stopped, the same call goes on from there.

    Args:
      workdir: the directory of the run.
      output: the npz, WORKDIR/samples.npz if None.
      labels: 'uniform', 'balanced' or a file of whole numbers, see `generation.draw_labels`; None
        stands for 'uniform'. Runs that draw for texts have none.
      prompt: texts, which are drawn in turn, for runs that draw for texts.
      prompts: a file with more of them, one in each line. An npz has the features of its texts, for
        runs that read those; see `features.TextFeatures`.
      png: a directory in which every image becomes a PNG file, too; None writes none.
      num_images: number of images. None stands for that of the config, or for one of each text
        where there are more texts.
      like: a config whose sampler is taken, see `open_run.open_run`.
    """
    path = output or f'{workdir}/samples.npz'
    run, mesh = open_run.open_run(workdir, like)
    s = run.config.sampling
    seed = run.config.seed
    n = num_images or s.num_images
    numbers = None
    if prompt or prompts is not None or build.has_captions(run.config):
        if labels is not None:
            raise UserError(
                '--labels are classes: leave them out where --prompt or --prompts says what to draw'
            )
        texts = _asked(workdir, run.config, None, prompt or [], prompts).labels
        if num_images is None:
            n = max(n, len(texts))
        elif n < len(texts):
            print(f'--num_images={n} draws for the first {n} of {len(texts)} texts', flush=True)
        rows = np.arange(n) % len(texts)
        asked = texts[rows]
        if build.reads_features(run.config):
            numbers = rows.astype(np.int32)
    else:
        asked = generation.draw_labels(labels or 'uniform', n, _num_classes(run.config), seed)
    if png is not None:
        _require_no_pngs(png, n)
    guided = 'no guidance' if s.guidance is None else f'{s.guidance} guidance {s.guidance_scale}'
    print(
        f'{n} images: {s.solver}, {s.num_steps} steps, {guided}, {mesh.size} device(s)', flush=True
    )
    started = time.perf_counter()
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    parameters = generation.parameters_crc(run)
    run = apart(run)
    drawn = generation.generate(
        run,
        asked,
        seed,
        path,
        numbers=numbers,
        parameters=parameters,
        batch_size=s.batch_size,
        mesh=mesh,
        progress=console.bar(n, 'samples'),
    )
    seconds = time.perf_counter() - started
    if drawn:
        rate = drawn / seconds
        print(f'{path}: {drawn} images in {seconds:.1f} s, {rate:.2f} images/s with compiling')
    else:
        print(f'{path}: was there')
    if png is not None and hosts.is_first():
        _save_pngs(path, png, n)


def _picture(output: str | None, workdir: str, name: str) -> str:
    """The path of a picture, WORKDIR/NAME.png if there is no `output`.

    Raises:
      UserError: it is no PNG file.
    """
    path = output or f'{workdir}/{name}.png'
    if not path.endswith('.png') or os.path.isdir(path):
        raise UserError(f'--output is {path}, but must be a file that ends in .png')
    return path


def grid(
    workdir: str,
    *,
    classes: str | None = None,
    prompt: list[str] | None = None,
    prompts: str | None = None,
    columns: int = 4,
    output: str | None = None,
    like: ConfigDict | None = None,
) -> None:
    """Draws a picture with a row of images for each class or prompt.

    The images of a column share their noise: it depends on the run's seed and the column alone.

    Args:
      workdir: the directory of the run.
      classes: names of the run's own classes, or numbers, separated by semicolons; for ImageNet
        also synsets and English names. See `class_names.find`.
      prompt: texts to draw, for runs that draw for texts.
      prompts: a file with more of them, one in each line; or see `sample`.
      columns: number of images of each row.
      output: the PNG file, WORKDIR/grid.png if None.
      like: a config whose sampler is taken, see `open_run.open_run`.

    Raises:
      UserError: the model does not know a class or cannot read a prompt, or there is nothing to
        draw.
    """
    path = _picture(output, workdir, 'grid')
    if columns < 1:
        raise UserError(f'--columns is {columns}, but must be at least 1')
    run, mesh = open_run.open_run(workdir, like)
    run = apart(run)
    asked = _asked(workdir, run.config, classes, prompt or [], prompts)
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    labels = np.repeat(asked.labels, columns, axis=0)
    images, _ = on_mesh.draw_images(
        run,
        build.build_sampler(run.config),
        labels,
        seed=run.config.seed,
        index=np.tile(np.arange(columns), len(asked.titles)),
        batch_size=run.config.sampling.batch_size,
        mesh=mesh,
        progress=console.bar(len(labels), 'samples'),
    )
    pictures.save_classes(path, images, columns, asked.titles)
    print(f'wrote {path}')


def _number_or_rows(keep: str) -> float | str:
    """The value of --keep: a whole number, a share, or rows as they are."""
    if keep.endswith('rows'):
        return keep
    try:
        return float(keep) if '.' in keep else int(keep)
    except ValueError:
        raise UserError(
            f'--keep is {keep}: give a number of tokens, rows as 4rows, or a share as 0.5'
        ) from None


def _kept_part(image: np.ndarray, grid: tuple[int, int], count: int) -> np.ndarray:
    """An image (H, W, c) whose pixels are grey but for those of its first tokens."""
    is_kept = inputs.kept_pixels(count, grid, image.shape)
    return np.where(is_kept[..., None], image, 0)


# Rows of a picture. More would make it too high for the program that draws it.
_MOST_ROWS = 200


def _in_folders_of_classes(workdir: str, config: ConfigDict, images: str) -> folders.Pictures:
    """The pictures of a directory that has a directory for each class."""
    names = class_names.of_run(workdir, config)
    known = _num_classes(config)
    if not os.path.isdir(images):
        raise UserError(f"give --classes='golden retriever', the class of {images}")
    return folders.labelled(images, lambda name: class_names.find(name, names, known))


def _files(images: str) -> list[str]:
    """A picture, or those of a directory."""
    return image_sets.list_images(images) if os.path.isdir(images) else [images]


def _originals(
    workdir: str,
    config: ConfigDict,
    images: str,
    classes: str | None,
    prompt: list[str],
    prompts: str | None,
    num_images: int | None,
) -> tuple[folders.Pictures, list[str]]:
    """The pictures to complete, and a title for each; the arguments are those of `complete`."""
    has_captions = build.has_captions(config)
    asked = None
    if classes is None and not (prompt or prompts or has_captions):
        found = _in_folders_of_classes(workdir, config, images)
    else:
        files = _files(images)
        asked = _asked(workdir, config, classes, prompt, prompts)
        count = len(asked.titles)
        if count not in (1, len(files)):
            what = 'prompts are given' if has_captions else 'classes are named'
            raise UserError(
                f'{count} {what} for {len(files)} images: give one for all, or one for each'
            )
        found = folders.Pictures(files, [i % count for i in range(len(files))])
    rows = min(num_images or len(found.files), len(found.files))
    if rows > _MOST_ROWS:
        raise UserError(
            f'{images}: a picture has at most {_MOST_ROWS} rows, not {rows}: give --num_images=16'
        )
    chosen = folders.spread(found, rows)
    if asked is not None:
        labels = [asked.labels[i] for i in chosen.labels]
        return chosen._replace(labels=labels), [asked.titles[i] for i in chosen.labels]
    return chosen, class_names.titles(chosen.labels, class_names.of_run(workdir, config))


def complete(
    workdir: str,
    *,
    images: str,
    classes: str | None = None,
    prompt: list[str] | None = None,
    prompts: str | None = None,
    keep: str = '0.5',
    corruption: str | None = None,
    num_images: int | None = None,
    columns: int = 4,
    output: str | None = None,
    like: ConfigDict | None = None,
) -> None:
    """Draws a picture of images, of the part of each that is kept, and of completions.

    Tokens are in raster order, so that half of them is the upper half of an image. The completions
    of a row differ by their noise alone. Corrupted images stand behind the images as they were.

    Args:
      workdir: the directory of the run.
      images: a picture, or a directory of pictures, of any size; see `inputs.images`.
      classes: the class of all images, or one for each, see `grid`. If None, the images lie in
        directories that have the names of their classes, as those of ImageNet-Sketch and
        ImageNet-R do; see `folders.labelled`.
      prompt: the text of all images, or one for each, for runs that draw for texts.
      prompts: a file with more of them, one in each line; or see `sample`.
      keep: a whole number of tokens, rows of them as 4rows, or a share, see `inputs.kept`.
      corruption: what is done to the images first, see `corruptions.parse`; None leaves them as
        they are.
      num_images: number of images, evenly spread over those there are; all if None.
      columns: completions of each image.
      output: the PNG file, WORKDIR/complete.png if None.
      like: a config whose sampler is taken, see `open_run.open_run`.

    Raises:
      UserError: a picture cannot be read, or classes, tokens to keep or the corruption are not
        possible.
      OSError: likewise for a file.
    """
    path = _picture(output, workdir, 'complete')
    share = _number_or_rows(keep)
    shift = None if corruption is None else corruptions.parse(corruption)
    run, mesh = open_run.open_run(workdir, like)
    originals, titles = _originals(
        workdir, run.config, images, classes, prompt or [], prompts, num_images
    )
    seed = run.config.seed
    model = Model(run, mesh=mesh)
    del run  # It would keep the parameters in memory twice.
    count = inputs.kept(share, model.vae.grid)
    clean = inputs.images(originals.files, model.image_shape)
    given = clean
    if shift is not None:
        given = corruptions.corrupt_floats(clean, shift, seed)
    drawn = model.complete(
        np.repeat(given, columns, axis=0),
        np.repeat(originals.labels, columns, axis=0),
        keep=count,
        seed=seed,
    )
    rows = []
    for i, image in enumerate(given):
        rows += [image] if shift is None else [clean[i], image]
        rows += [_kept_part(image, model.vae.grid, count)]
        rows += [*drawn[i * columns : (i + 1) * columns]]
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    noun = 'image' if shift is None else f'image, {shift.word} (severity {shift.severity})'
    title = f'{noun}, its first {count} of {model.num_tokens} tokens, completions'
    pictures.save_classes(path, np.stack(rows), len(rows) // len(given), titles, title)
    print(f'wrote {path}')


def _read(path: str, name: str, shape: tuple[int, int, int]) -> np.ndarray | None:
    """A picture as the model takes it, (H, W, c); None if it is broken, which a line says."""
    try:
        return inputs.images(path, shape)[0]
    except (UserError, OSError) as error:
        reason = console.first_line(error)
        print(f'{listing.shown(name)} is left out: {reason}', file=sys.stderr, flush=True)
        return None


def _write_texts(
    model: Model,
    files: Sequence[str],
    names: Sequence[str],
    seeds: np.ndarray,
    share: float | None,
    size: int,
) -> dict[str, str]:
    """The texts for pictures, {name: text}, without those of pictures that cannot be read.

    `size` is the number of images that the model reads at once.
    """
    read = [_read(file, name, model.image_shape) for file, name in zip(files, names, strict=True)]
    good = [i for i, image in enumerate(read) if image is not None]
    if not good:
        return {}
    images = np.stack([image for image in read if image is not None])
    # Filled up by the same ones again, so that all batches share one compiled program.
    filled = np.arange(size) % len(good)
    written = model.caption(images[filled], top_p=share, seed=seeds[good][filled])[: len(good)]
    return {names[i]: ' '.join(text.split()) for i, text in zip(good, written, strict=True)}


def _print_texts(texts: dict[str, str]) -> None:
    """Prints a line of 'PATH<tab>TEXT' for each text, {path: text}."""
    for name, text in texts.items():
        print(f'{listing.shown(name)}\t{console.printable(text, 1000)}')


def _write_table(output: str, texts: dict[str, str]) -> None:
    """Writes these lines to a file."""
    table = (f'{name}\t{text}\n' for name, text in texts.items())
    write_bytes(output, ''.join(table).encode())
    print(f'wrote {output}: {len(texts)} texts')


def caption(
    workdir: str,
    *,
    images: str,
    top_p: str | None = None,
    num_images: int | None = None,
    output: str | None = None,
    like: ConfigDict | None = None,
) -> None:
    """Writes a text for each of some images.

    Lines of 'PATH<tab>TEXT' go to the screen, or to a file, which `data.captions` takes. Where a
    directory is given, the path is that below it. Pictures that cannot be read are named and left
    out.

    Args:
      workdir: the directory of a run that writes texts.
      images: a picture, or a directory of pictures, of any size; see `inputs.images`.
      top_p: the share of the probability that the likeliest tokens need to be drawn from, in (0,
        1]; the likeliest token is taken if None.
      num_images: number of images, evenly spread over those there are; all if None.
      output: the file, .tsv; the screen if None.
      like: a config whose seed, dtype and mesh are taken, see `open_run.open_run`.

    Raises:
      UserError: the run writes no texts, an argument is not possible, or no image can be read.
    """
    try:
        share = None if top_p is None else float(top_p)
    except ValueError:
        raise UserError(f'--top_p is {top_p}: give a share as 0.9') from None
    if output is not None and not output.endswith('.tsv'):
        raise UserError(f'--output is {output}, but must end in .tsv')
    files = _files(images)
    places = sources.spread(len(files), num_images or len(files))
    chosen = [files[i] for i in places]
    names = chosen
    if os.path.isdir(images):
        names = [os.path.relpath(path, images) for path in chosen]
    unfit = [name for name in names if not name.isprintable()]
    if output is not None and unfit:
        raise UserError(f'a table cannot name {listing.shown(unfit[0])}: rename the file')
    run, mesh = open_run.open_run(workdir, like)
    captioning.writer(run.ar)  # before any image is read
    # Each image has the seed of its place among all, so that it does not matter with which others
    # it is read.
    seeds = (run.config.seed + np.array(places)) % 2**31
    size = min(run.config.sampling.batch_size, len(chosen))
    model = Model(run, mesh=mesh)
    del run  # It would keep the parameters in memory twice.
    if output is not None:
        epath.Path(output).parent.mkdir(parents=True, exist_ok=True)
    show = console.bar(len(chosen), 'texts', lines=sys.stderr)
    texts: dict[str, str] = {}
    try:
        # A directory may have more images than memory holds.
        for start in range(0, len(chosen), size):
            rows = slice(start, start + size)
            found = _write_texts(model, chosen[rows], names[rows], seeds[rows], share, size)
            texts |= found
            if output is None:
                _print_texts(found)
            show(min(start + size, len(chosen)))
    finally:
        # Whatever ends the loop, the texts so far are kept.
        if output is not None and texts:
            _write_table(output, texts)
    if not texts:
        raise UserError(f'none of {len(chosen)} images in {images} can be read')
