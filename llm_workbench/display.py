"How the notebooks show things: one plot style, explorers with a picture for readers without a kernel, progress."
import io
import os
from collections.abc import Callable, Iterable

STYLE = {
    "figure.figsize": (7, 3.5), "figure.dpi": 100, "savefig.dpi": 100, "figure.constrained_layout.use": True,
    "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 11, "axes.titlelocation": "left", "image.cmap": "viridis", "font.size": 10,
    "lines.linewidth": 1.8, "legend.frameon": False,
}


def set_style() -> None:
    "Use the project's matplotlib style: the Okabe-Ito colours, light grid, 100 dpi."
    import matplotlib as mpl
    mpl.rcParams.update(STYLE)
    black, orange, sky, green, _yellow, blue, vermilion, purple = mpl.color_sequences["okabe_ito"]  # yellow: too pale
    mpl.rcParams["axes.prop_cycle"] = mpl.cycler(color=[blue, orange, green, purple, sky, vermilion, black])


def png(figure) -> bytes:
    "`figure` drawn as a PNG; the figure is closed."
    import matplotlib.pyplot as plt
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def controls(figure: Callable, **widgets):  # figure(**values) -> matplotlib Figure
    "A box of `widgets` (name=ipywidget) over the picture that `figure` draws for their values."
    import ipywidgets as W
    draw = lambda: png(figure(**{name: w.value for name, w in widgets.items()}))
    image = W.Image(value=draw(), format="png", layout=W.Layout(max_width="100%", align_self="flex-start"))
    for name, widget in widgets.items():
        if not widget.description: widget.description = name.replace("_", " ")
        widget.style.description_width = "9em"
        widget.observe(lambda _: setattr(image, "value", draw()), "value")
    return W.VBox([*widgets.values(), image])


def explorer(figure: Callable,  # figure(**values) -> matplotlib Figure, a pure function of the widgets' values
             alt: str,          # what the picture shows, for readers who cannot see it
             **widgets) -> None:  # ipywidgets by parameter name
    "Show `figure` with sliders where a kernel runs, and as a plain picture everywhere else (GitHub, the site)."
    from IPython.display import display
    box = controls(figure, **widgets)
    data = {**box._repr_mimebundle_(), "image/png": bytes(box.children[-1].value), "text/plain": alt}
    display(data, raw=True, metadata={"image/png": {"alt": alt}})


def progress(items: Iterable, description: str = "", **options) -> Iterable:
    "`items` with a progress bar when the work lasts more than half a second; silent where notebooks are tested."
    from tqdm.auto import tqdm
    return tqdm(items, desc=description, delay=0.5, disable=bool(os.environ.get("IN_TEST")), **options)
