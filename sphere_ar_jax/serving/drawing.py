"""What the page of `--mode=serve` asks of a run, without the page: controls, images, plots.

Dimensions:
  n  images of a drawing
  H, W, c   height, width and channels of the model's images
  L  tokens of an image
"""

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from sphere_ar_jax.config import build, schema
from sphere_ar_jax.data import pixels
from sphere_ar_jax.evaluation import class_names
from sphere_ar_jax.evaluation.pictures import subplots
from sphere_ar_jax.flow import solvers
from sphere_ar_jax.runtime.console import UserError, printable
from sphere_ar_jax.sampling import inputs, on_mesh
from sphere_ar_jax.sampling.model import Model, other_sampler, sphere_radius
from sphere_ar_jax.sampling.tokens import Prefix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUNTS = (1, 2, 4, 8, 16)  # numbers of images; each has a program of its own
MOST_STEPS = 200
MOST_GUIDANCE = 20.0
_LEAST_SIDE = 320  # of the picture with the line, in pixels
_LINE = (230, 60, 40)
_GREY = 128


class Controls(NamedTuple):
    """What can be chosen for a run, and what the run itself has.

    Attributes:
      classes: titles of the classes in the order of their numbers, None where the run draws for
        texts.
      guidance: the guidance scale, None where the run has no guidance.
      solvers: the words of the solvers that the run's head takes.
      solver: the run's own.
      steps: its steps for a token.
      rows: rows of tokens of an image.
    """

    classes: tuple[str, ...] | None
    guidance: float | None
    solvers: tuple[str, ...]
    solver: str
    steps: int
    rows: int


class Wish(NamedTuple):
    """What is to be drawn.

    Attributes:
      label: number of the class, or the text.
      n: number of images, one of `COUNTS`.
      seed: image i has the noise of image i of `--mode=sample` with this seed.
      guidance: the guidance scale, None where the run has no guidance.
      solver: one of `Controls.solvers`.
      steps: the solver's steps for a token, at most `most_steps`.
      picture: what is completed, None to draw whole images.
      kept: rows of tokens that are kept of the picture, below `Controls.rows`.
    """

    label: int | str
    n: int
    seed: int
    guidance: float | None
    solver: str
    steps: int
    picture: inputs.Picture | None = None
    kept: int = 0


class Drawing(NamedTuple):
    """What was drawn.

    Attributes:
      images: (n, H, W, c) uint8.
      norms: (n, L) norms of the tokens as the head drew them, before projection. In the place of
        kept tokens these are what the head would have drawn there.
      kept: number of tokens that were kept.
      radius: R, the norm after projection; None where tokens lie on no sphere.
      words: a sentence that says what was drawn, and how long it took.
    """

    images: np.ndarray
    norms: np.ndarray
    kept: int
    radius: float | None
    words: str


def _takes(config: ConfigDict, solver: str) -> bool:
    """Whether the run can be sampled by a solver."""
    try:
        other_sampler(config, solver, config.sampling.num_steps)
    except ValueError:
        return False
    return True


def controls(model: Model) -> Controls:
    """The controls of a run."""
    s = model.config.sampling
    classes = None
    if not build.has_captions(model.config):
        known = schema.num_classes(model.config)
        assert known is not None  # the model was built with it
        classes = tuple(class_names.titles(range(known), model.class_names))
    return Controls(
        classes=classes,
        guidance=None if s.guidance is None else s.guidance_scale,
        solvers=tuple(name for name in solvers.SOLVERS if _takes(model.config, name)),
        solver=s.solver,
        steps=s.num_steps,
        rows=model.vae.grid[0],
    )


def first_wish(model: Model) -> Wish:
    """What the page draws at first: four images of class 0, as the run itself draws them.

    Where the run draws for texts, the text is empty, which `draw` refuses.
    """
    s = model.config.sampling
    guidance = None if s.guidance is None else s.guidance_scale
    label = '' if build.has_captions(model.config) else 0
    return Wish(label, 4, model.config.seed, guidance, s.solver, s.num_steps)


def warm_up(model: Model) -> None:
    """Compiles all that `first_wish` needs, with a picture and without one."""
    height, width, _ = model.image_shape
    wish = first_wish(model)._replace(picture=Image.new('L', (width, height)))
    _draw(model, wish, np.asarray(model.ar.condition.example()[0]))


def most_steps(own: int) -> int:
    """The most steps that may be asked for, of a run that takes `own` steps itself."""
    return max(MOST_STEPS, own)


def _check(wish: Wish, rows: int, most: int) -> None:
    """Raises UserError for numbers beyond the page's limits; `most` is that of the steps."""
    if wish.n not in COUNTS:
        raise UserError(f'images must be one of {", ".join(map(str, COUNTS))}, not {wish.n}')
    if not 1 <= wish.steps <= most:
        raise UserError(f'steps must lie between 1 and {most}, not {wish.steps}')
    if wish.picture is not None and not 0 <= wish.kept < rows:
        raise UserError(f'kept rows must lie between 0 and {rows - 1}, not {wish.kept}')


def draw(model: Model, wish: Wish) -> Drawing:
    """Draws images, or completes a picture n times with the noise of n images.

    Both are one program, in which no token or some tokens are given. A number of images, a solver
    and a number of steps compile a program of their own when they are first asked for. Other
    classes, seeds, scales, pictures and lines compile nothing.

    Args:
      model: the run.
      wish: what is to be drawn.

    Raises:
      UserError: the run cannot draw it, or it is beyond the page's limits; one line.
    """
    if isinstance(wish.label, str):
        return _draw(model, wish, build.encode_prompt(model.config, wish.label))
    return _draw(model, wish, np.asarray(wish.label, np.int32))


def _draw(model: Model, wish: Wish, label: np.ndarray) -> Drawing:
    """Draws what `draw` says for the label () of all images, or their text's (T,) or (T, F)."""
    height, width = model.vae.grid
    _check(wish, height, most_steps(model.config.sampling.num_steps))
    started = time.perf_counter()
    sampler = other_sampler(model.config, wish.solver, wish.steps)
    if sampler.options.guidance is not None and wish.guidance is not None:
        scale = inputs.scales(wish.guidance, wish.n)
        sampler = sampler._replace(guidance_scale=scale)
    tokens = np.zeros((1, model.num_tokens, model.vae.token_dim), np.float32)
    kept = 0
    if wish.picture is not None:
        tokens = model.encode(inputs.images(wish.picture, model.image_shape))
        kept = wish.kept * width
    images, drawn = on_mesh.draw_images(
        model,
        sampler,
        np.repeat(label[None], wish.n, axis=0),
        seed=inputs.seeds(wish.seed, wish.n),
        prefix=Prefix(np.repeat(tokens, wish.n, axis=0), kept),
        batch_size=wish.n,
        mesh=model.mesh,
    )
    seconds = time.perf_counter() - started
    evaluations = sampler.options.plan(model.num_tokens).evaluations
    return Drawing(
        images=np.asarray(pixels.to_uint8(np.clip(images, -1, 1))),
        norms=np.linalg.norm(drawn.raw[..., : model.vae.latent_dim], axis=-1),
        kept=kept,
        radius=sphere_radius(model.vae),
        words=_words(model, wish, sampler, evaluations, seconds),
    )


def _words(
    model: Model, wish: Wish, sampler: build.Sampler, evaluations: float, seconds: float
) -> str:
    """The sentence of a drawing."""
    if isinstance(wish.label, str):
        title = f"'{printable(wish.label.strip(), 60)}'"
    else:
        (title,) = class_names.titles([wish.label], model.class_names)
    images = '1 image' if wish.n == 1 else f'{wish.n} images'
    guided = 'no guidance'
    if sampler.options.guidance is not None:
        guided = f'{sampler.options.guidance} guidance {sampler.guidance_scale:g}'
    return (
        f'{images} of {title}, seed {wish.seed}, {guided}, {wish.solver} with {evaluations:g} '
        f'evaluations for a token: {seconds:.1f} s'
    )


# ---- the picture that is completed


def row_at(y: float, height: int, rows: int) -> int:
    """The number of rows of tokens above a point of a picture, below `rows`.

    Args:
      y: the point's distance from the upper edge.
      height: the height of the picture, in the unit of y.
      rows: rows of tokens of an image.
    """
    return min(max(round(y / height * rows), 0), rows - 1)


def shown_side(model: Model) -> int:
    """The side S of the picture with the line, in pixels: a multiple of the images' own."""
    height = model.image_shape[0]
    return -(-_LEAST_SIDE // height) * height


def with_line(model: Model, picture: inputs.Picture, kept: int) -> np.ndarray:
    """Shows the square that the model sees of a picture, with a line below the rows that are kept.

    What lies below the line is faded.

    Args:
      model: the run.
      picture: a file, or an image of PIL.
      kept: rows of tokens that are kept.

    Returns:
      (S, S, 3) uint8, see `shown_side`.

    Raises:
      UserError: the picture cannot be read; one line.
    """
    (image,) = np.asarray(pixels.to_uint8(inputs.images(picture, model.image_shape)))
    scale = shown_side(model) // len(image)
    large = np.broadcast_to(image, (*image.shape[:2], 3)).repeat(scale, 0).repeat(scale, 1)
    y = len(large) * kept // model.vae.grid[0]
    shown = large.copy()
    shown[y:] = large[y:] // 3 + _GREY * 2 // 3
    shown[max(y - 2, 0) : y + 2] = _LINE
    return shown


# ---- the plot


def plot_norms(drawing: Drawing) -> 'Figure':
    """Plots the norms of the tokens before projection by their position.

    There is a line for each image, and one for their mean. Kept tokens lie on a grey ground. A
    dashed line shows R, where tokens lie on a sphere.
    """
    figure, axes = subplots(1, 1, (7, 2.8))
    figure.set_layout_engine('constrained')
    axis = axes[0, 0]
    norms = drawing.norms
    position = np.arange(norms.shape[1])
    axis.plot(position, norms.T, color='tab:blue', alpha=0.35, linewidth=0.8)
    axis.plot(position, norms.mean(0), color='tab:blue', linewidth=2, label='mean of the images')
    if drawing.radius is not None:
        label = f'R = {drawing.radius:.3g}'
        axis.axhline(drawing.radius, color='black', linestyle='--', label=label)
    if drawing.kept:
        axis.axvspan(-0.5, drawing.kept - 0.5, color='0.88', label='kept')
    axis.set_xlim(-0.5, norms.shape[1] - 0.5)
    axis.set_xlabel('token, in raster order')
    axis.set_ylabel('norm before projection')
    axis.grid(alpha=0.3)
    figure.legend(loc='outside upper center', ncols=3, frameon=False)
    return figure
