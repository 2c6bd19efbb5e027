"""`--mode=serve`: the page, by gradio. What its buttons do is in `drawing`."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from sphere_ar_jax.commands import open_run
from sphere_ar_jax.evaluation import class_names
from sphere_ar_jax.runtime.console import UserError, said
from sphere_ar_jax.sampling.model import Model
from sphere_ar_jax.serving import drawing

_WAITING = 8  # drawings that may wait while one is drawn
_UPLOAD = '20mb'  # the largest picture
_KEPT = 3600  # seconds that images which were shown stay on the disk
# Small images are shown in whole squares of pixels, and fonts are those of the system.
_CSS = """
.pixels img {image-rendering: pixelated; object-fit: contain; width: 100%}
#images .grid-wrap {min-height: 0; max-height: none}
#images .grid-container {grid-template-columns: repeat(4, 1fr)}
"""
_FONTS = ('system-ui', 'sans-serif')
# The browser asks nobody but this server, whatever gradio's page would load.
_POLICY = (
    "default-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:"
)
_HEIGHT = 340  # of the pictures that are completed, in pixels
_LOCAL = ('127.0.0.1', 'localhost')


def _require_gradio() -> None:
    """Imports gradio, which then sends no statistics.

    Raises:
      UserError: it is not installed.
    """
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UserError("the page needs gradio: pip install 'sphere_ar_jax[serve]'") from None


def _require_free(host: str, port: int) -> None:
    """Raises UserError unless a server can listen at a host and a port."""
    if port > 65535:
        raise UserError(f'--port={port}: give a number from 1 to 65535')
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else 'that is no name of a host'
        raise UserError(
            f'port {port} of {host} cannot be used ({why}): give another --port, or --host'
        ) from None


class _Policy:
    """An ASGI application that adds `_POLICY` to every answer of another one."""

    def __init__(self, app: Callable[..., Any]) -> None:
        """Wraps an application."""
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request."""

        async def with_policy(message: Any) -> None:
            if message['type'] == 'http.response.start':
                header = (b'content-security-policy', _POLICY.encode())
                message['headers'] = [*message['headers'], header]
            await send(message)

        await self._app(scope, receive, with_policy)


class _Buttons:
    """What the page computes when something is clicked or changed."""

    def __init__(self, model: Model) -> None:
        """Makes the functions of a run."""
        self._model = model
        self._controls = drawing.controls(model)

    def draw(self, *values: Any) -> tuple[Any, ...]:
        """The images, the sentence and the plot of what the controls of `_add_controls` say.

        Two further values are the file of a picture to complete, and the rows that are kept.
        """
        label, count, seed, guidance, solver, steps, *completed = values
        is_text = self._controls.classes is None
        if label is None and not is_text:
            raise UserError('choose a class')
        if guidance is None:
            guidance = self._controls.guidance
        wish = drawing.Wish(
            str(label or '') if is_text else int(label),
            int(count or 0),
            int(seed or 0),
            None if self._controls.guidance is None else float(guidance),
            solver,
            int(steps or 0),
            *completed,
        )
        drawn = drawing.draw(self._model, wish)
        images = [image.squeeze() for image in drawn.images]
        return images, drawn.words, drawing.plot_norms(drawn)

    def complete(self, *values: Any) -> tuple[Any, ...]:
        """As `draw`, with a picture."""
        *others, picture, kept = values
        if picture is None:
            raise UserError('give a picture, or click an image that was drawn')
        return self.draw(*others, picture, int(kept or 0))

    def line(self, picture: Any, kept: Any) -> Any:
        """The picture with its line, None without a picture."""
        return None if picture is None else drawing.with_line(self._model, picture, int(kept or 0))

    def row(self, y: float) -> int:
        """The kept rows above a point of the picture with the line."""
        return drawing.row_at(y, drawing.shown_side(self._model), self._controls.rows)


def _add_controls(model: Model) -> list[Any]:
    """Adds the controls of a drawing to a page, in the order that `_Buttons.draw` knows."""
    import gradio as gr

    c = drawing.controls(model)
    first = drawing.first_wish(model)
    most = max(drawing.MOST_GUIDANCE, c.guidance or 0)
    if c.classes is None:
        label = gr.Textbox(label='Text', placeholder='what the image shows', elem_id='text')
    else:
        classes = [(title, k) for k, title in enumerate(c.classes)]
        label = gr.Dropdown(
            classes, value=first.label, label='Class', elem_id='class', visible=len(classes) > 1
        )
    return [
        label,
        gr.Radio(drawing.COUNTS, value=first.n, label='Images', elem_id='count'),
        gr.Number(first.seed, label='Seed', precision=0, minimum=0, elem_id='seed'),
        gr.Slider(
            0, most, c.guidance, step=0.1, label='Guidance scale', visible=c.guidance is not None
        ),
        gr.Dropdown(list(c.solvers), value=c.solver, label='Solver'),
        gr.Slider(1, drawing.most_steps(c.steps), c.steps, step=1, label='Steps for a token'),
    ]


def _add_results() -> list[Any]:
    """Adds what a drawing shows to a page, in the order that `_Buttons.draw` knows."""
    import gradio as gr

    gr.Markdown('Click an image to complete it.')
    return [
        gr.Gallery(
            label='Images',
            show_label=False,
            columns=4,
            height='auto',
            buttons=['download'],
            format='png',
            type='filepath',
            allow_preview=False,
            elem_id='images',
            elem_classes='pixels',
        ),
        gr.Markdown(elem_id='words'),
        gr.Plot(label='Norms of the tokens', show_label=False, format='png', elem_id='norms'),
    ]


def build(model: Model) -> Any:
    """Lays the page out.

    Args:
      model: the run.

    Returns:
      The `gradio.Blocks`, with a queue of bounded length in which one drawing is drawn at a time.

    """
    import gradio as gr

    buttons = _Buttons(model)
    height, width, _ = model.image_shape
    rows = model.vae.grid[0]

    def told(function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose errors the page tells in one line."""

        def telling(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except (ValueError, OverflowError, OSError) as error:
                raise gr.Error(said(error), print_exception=False) from None

        return telling

    def clicked(event: gr.SelectData) -> int:
        """The kept rows above a clicked point."""
        return buttons.row(event.index[1])

    def chosen(images: Any, event: gr.SelectData) -> Any:
        """The file of a clicked image."""
        return images[event.index][0]

    with gr.Blocks(title='SphereAR', analytics_enabled=False, delete_cache=(_KEPT, _KEPT)) as page:
        gr.Markdown(f'## SphereAR\n{height}×{width} pixels, {model.num_tokens} tokens of an image')
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                values = _add_controls(model)
                draw = gr.Button('Draw', variant='primary', elem_id='draw')
            with gr.Column(scale=2, min_width=320):
                results = _add_results()
        gr.Markdown('## Complete a picture\nWhat lies below the line is drawn anew.')
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                gr.Markdown('A picture, of which the square in the middle is taken.')
                picture = gr.Image(
                    label='Picture',
                    show_label=False,
                    height=_HEIGHT,
                    buttons=[],
                    type='filepath',
                    image_mode=None,
                    format='png',
                    sources=['upload', 'clipboard'],
                    elem_id='picture',
                    elem_classes='pixels',
                )
            with gr.Column(scale=2, min_width=320):
                gr.Markdown('Click to draw the line.')
                shown = gr.Image(
                    label='What is kept',
                    show_label=False,
                    height=_HEIGHT,
                    buttons=[],
                    interactive=False,
                    format='png',
                    elem_id='line',
                    elem_classes='pixels',
                )
                kept = gr.Slider(
                    0, rows - 1, rows // 2, step=1, label='Rows of tokens kept', elem_id='kept'
                )
                complete = gr.Button('Complete', variant='primary', elem_id='complete')
        one: dict[str, Any] = dict(concurrency_id='devices', concurrency_limit=1)
        draw.click(told(buttons.draw), values, results, api_name='draw', **one)
        completed = [*values, picture, kept]
        complete.click(told(buttons.complete), completed, results, api_name='complete', **one)
        # These compute nothing on the devices.
        quick: dict[str, Any] = dict(queue=False, show_progress='hidden', api_name=False)
        results[0].select(chosen, results[0], picture, **quick)
        shown.select(clicked, None, kept, **quick)
        for changed in (picture, kept):
            changed.change(told(buttons.line), [picture, kept], shown, **quick)
    return page.queue(max_size=_WAITING, default_concurrency_limit=1)


def _opened(workdir: str, like: ConfigDict | None) -> Model:
    """The run of a workdir, see `serve`."""
    run, mesh = open_run.open_run(workdir, like)
    return Model(run, mesh=mesh, class_names=class_names.of_run(workdir, run.config))


def serve(
    workdir: str,
    *,
    host: str = '127.0.0.1',
    port: int = 7860,
    like: ConfigDict | None = None,
) -> None:
    """Serves the page until Ctrl-C.

    Args:
      workdir: the directory of the run.
      host: the address to listen at. Only this machine reaches the default.
      port: the port to listen at.
      like: a config whose sampler is what the page has at first, see `open_run.open_run`.

    Raises:
      UserError: gradio is missing, the port is taken, or there is no run.
    """
    open_run.config_of(workdir)  # Whether there is a run, before gradio is imported for seconds.
    if ':' in host:
        raise UserError(
            f'--host={host}: the page cannot listen at an address of IPv6, give a name or an '
            'address of IPv4'
        )
    _require_gradio()
    import gradio as gr
    from starlette.middleware import Middleware

    _require_free(host, port)
    model = _opened(workdir, like)
    print('compiling what the page draws first', flush=True)
    drawing.warm_up(model)
    page = build(model)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
        max_file_size=_UPLOAD,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        mcp_server=False,
        theme=gr.themes.Default(font=_FONTS, font_mono=('monospace',)),
        css=_CSS,
        app_kwargs={'middleware': [Middleware(_Policy)]},
    )
    if host not in _LOCAL:
        print(f'whoever reaches port {port} of this machine can draw: there is no password')
    print(f'http://{host}:{port} is ready; Ctrl-C closes it', flush=True)
    is_over = threading.Event()

    def stop(*_: Any) -> None:
        is_over.set()

    # Gradio removes the pictures that it showed when this process ends by itself.
    signal.signal(signal.SIGTERM, stop)
    try:
        is_over.wait()
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)
    print('closed', flush=True)
