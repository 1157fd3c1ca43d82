"""Draw a report's plots: narrow panels that a phone shows whole and a desktop side by side.

E epochs, K classes.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evl_cache.errors import UsageError
from evl_cache.lettering import Lettering
from evl_cache.report.data import Group, ReportData
from evl_cache.runs import spread_text

# Okabe and Ito's palette, for all kinds of colour vision; black comes first, and yellow is too pale for a line.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # for those who see no colours
PANEL_INCHES = 4.4
CURVES = {"train_loss": "training loss", "val_loss": "validation loss", "top1": "top-1, %"}
_MOST_LETTERS = 60  # of a name; the tables have it whole
_NUMBERED_CLASSES = 15  # with more classes the matrix shows no numbers
_NAMED_CLASSES = 40  # with more classes it shows no names
_STYLE = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.hashsalt": "evl-cache",
    "svg.fonttype": "path",  # the same letters on every machine
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a name may hold two dollars
}

Figure = Any


def draw_plots(data: ReportData) -> dict[str, Figure]:
    """Return every plot by the name of its file. Raises: UsageError where matplotlib is not installed."""
    matplotlib = _matplotlib()
    lettering = lettering_of(data)
    lettering.tell()
    with matplotlib.rc_context({**_STYLE, "font.family": lettering.families}):
        plots = {
            f"curve-{name}": _curves(data.groups, name, text, lettering) for name, text in CURVES.items()
        }
        if len(data.groups) > 1:
            plots["ablation"] = _bars(data.groups, lettering)
        run = data.best
        plots["confusion"] = _confusion(run.confusion, lettering.names(run.config.classes))
    return plots


def lettering_of(data: ReportData) -> Lettering:
    """Return how the names of a report's groups and classes are drawn."""
    classes = data.best.config.classes
    named = classes if len(classes) <= _NAMED_CLASSES else ()
    return Lettering.of([*(group.name for group in data.groups), *named])


def as_bytes(figure: Figure, kind: str) -> bytes:
    """Return a figure as the bytes of an `svg` or `png` file."""
    file = io.BytesIO()
    with _matplotlib().rc_context(_STYLE):
        metadata: Mapping[str, Any] = {"Date": None} if kind == "svg" else {}
        figure.savefig(file, format=kind, dpi=200, metadata=metadata)
    return file.getvalue()


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(
            f"report draws with matplotlib, which is not installed ({error}); pip install 'evl-cache[report]'"
        ) from error
    return matplotlib


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure as NewFigure  # not pyplot: no windows, no state

    figure = NewFigure(figsize=(width, height))
    return figure, figure.subplots()


def _curves(groups: Sequence[Group], name: str, label: str, lettering: Lettering) -> Figure:
    """Draw a line for each group: the mean over seeds, and a band from the smallest to the largest."""
    coloured, others = groups[: len(COLOURS)], groups[len(COLOURS) :]
    legend_lines = len(coloured) + bool(others)
    figure, axes = _figure(PANEL_INCHES, 3.0 + 0.21 * legend_lines)
    for group in others:
        axes.plot(*_line(group, name), color="#BBBBBB", linewidth=0.8, zorder=1)
    for place, group in enumerate(coloured):
        epochs, mean = _line(group, name)
        every = max(1, len(epochs) // 8)
        axes.plot(
            epochs, mean, color=COLOURS[place], marker=MARKERS[place], markevery=every, markersize=5,
            linewidth=1.6, label=_named(group, lettering), zorder=3,
        )  # fmt: skip
        if len(group.runs) > 1:
            found = group.curve(name)
            axes.fill_between(
                epochs, found.min(0), found.max(0), color=COLOURS[place], alpha=0.12, linewidth=0
            )
    if others:
        axes.plot([], [], color="#BBBBBB", label=f"{len(others)} others")
    axes.set_xlabel("epoch")
    axes.set_title(label, fontsize=11, loc="left")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if name == "top1":
        axes.set_ylim(0, 100)
    figure.legend(loc="outside lower left", fontsize=9.5, frameon=False, ncols=1)
    return figure


def _named(group: Group, lettering: Lettering) -> str:
    """Return a name of one line that fits: all that tells a group from others may be longer than the picture is wide."""
    name = lettering.written(group.name)
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…"


def _line(group: Group, name: str) -> tuple[np.ndarray, np.ndarray]:
    found = group.curve(name)  # (runs,E)
    return np.arange(1, found.shape[1] + 1), found.mean(0)


def _bars(groups: Sequence[Group], lettering: Lettering) -> Figure:
    """Draw the top-1 of every group with its deviation, or the interval of one run, the best on top."""
    figure, axes = _figure(PANEL_INCHES, 0.9 + 0.42 * len(groups))
    places = np.arange(len(groups))[::-1]
    whiskers = np.asarray([group.whisker for group in groups])  # (groups,2)
    top1 = np.asarray([group.top1 for group in groups])
    spread = np.stack([top1 - whiskers[:, 0], whiskers[:, 1] - top1]).clip(0.0)
    axes.barh(places, top1, height=0.34, color="#0072B2", zorder=2, align="edge")
    axes.errorbar(
        top1,
        places + 0.17,
        xerr=spread,
        fmt="none",
        ecolor="black",
        capsize=3,
        zorder=3,
    )
    for place, group in zip(places, groups, strict=True):
        value = f"{group.top1:.1f}{spread_text(group.deviation, group.interval)}"
        axes.text(0, place - 0.03, f" {_named(group, lettering)}: {value}", va="top", ha="left", fontsize=8.5)
    axes.set_yticks([])
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.55, len(groups) - 0.4)
    axes.set_xlabel("top-1, %")
    axes.grid(axis="y", visible=False)
    return figure


def _confusion(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw the shares of each class's clips (rows) by class predicted (columns); `matrix` is int64 (K, K)."""
    K = len(matrix)
    side = (
        PANEL_INCHES
        if K <= _NUMBERED_CLASSES
        else PANEL_INCHES + 0.08 * (min(K, _NAMED_CLASSES) - _NUMBERED_CLASSES)
    )
    figure, axes = _figure(side, side)
    shares = 100 * matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    axes.grid(visible=False)
    if K <= _NAMED_CLASSES:
        size = 9 if K <= _NUMBERED_CLASSES else 7
        shown = [name if len(name) <= 20 else f"{name[:19]}…" for name in classes]
        axes.set_xticks(range(K), shown, rotation=90, fontsize=size)
        axes.set_yticks(range(K), shown, fontsize=size)
    if K <= _NUMBERED_CLASSES:
        for row in range(K):
            for column in range(K):
                if matrix[row, column]:
                    colour = "black" if shares[row, column] > 55 else "white"
                    axes.text(
                        column, row, matrix[row, column], ha="center", va="center", color=colour, fontsize=8
                    )
    axes.set_xlabel("said")
    axes.set_ylabel("class")
    return figure
