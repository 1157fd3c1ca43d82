"""Draw a view of a clip: its frames, where patches move, and what the decoder attends to.

T frames, P patches (grid Hp x Wp, row by row), S pixels.
Colours are those of Okabe and Ito and of the map `cividis`, which colour-blind people can tell apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evl_cache.errors import UsageError
from evl_cache.lettering import Lettering

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PER_ROW = 8  # frames side by side
_ARROW, _PATCHES, _CLASS_TOKENS = "#E69F00", "#0072B2", "#D55E00"
_LONGEST = 1.6  # patches that the longest arrow covers
_SMALLEST = 0.15  # share of the longest arrow; shorter ones are left out
_DPI = 110


@dataclass(frozen=True, kw_only=True)
class ViewPicture:
    """What is drawn.

    Attributes:
        title: the clip.
        subtitle: its label and what the head predicts, or nothing.
        frames: as the tower saw them, uint8 (T, S, S, 3); None where the video is not there.
        frame_names: a name for each of the T frames, such as `frame 12`.
        grid: patches (Hp, Wp).
        motion: from frame t to t+1, down and right in patches, floating (T-1, P, 2); None without maps.
        attention: floating (T, 1+P), class token first, with a sum of one; None for a head that has none.
        notes: lines below the picture.
    """

    title: str
    subtitle: str
    frames: np.ndarray | None
    frame_names: Sequence[str]
    grid: tuple[int, int]
    motion: np.ndarray | None
    attention: np.ndarray | None
    notes: Sequence[str] = ()


def draw_view(picture: ViewPicture, path: Path) -> None:
    """Write a picture as a PNG file. Raises: UsageError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            "pictures are drawn by matplotlib, which is not installed; pip install 'evl-cache[show]'"
        ) from error
    lettering = Lettering.of([picture.title, picture.subtitle, *picture.notes])
    lettering.tell()
    T = len(picture.frame_names)
    columns, strips = min(T, PER_ROW), -(-T // PER_ROW)
    kinds = ["frames"] + (["attention", "shares"] if picture.attention is not None else [])
    heights = [{"frames": 1.0, "attention": 1.0, "shares": 0.45}[kind] for kind in kinds] * strips
    cell, gap, top, bottom = 1.75, 0.08, 0.9, 0.45 + 0.2 * len(_notes(picture))  # inches
    room = 0.26  # between rows
    width = (cell + gap) * columns + 1.6
    height = sum(heights) * cell + room * (len(heights) - 1) + top + bottom
    figure = Figure(figsize=(width, height), dpi=_DPI)
    axes = figure.subplots(
        len(heights),
        columns,
        squeeze=False,
        gridspec_kw={
            "height_ratios": heights,
            "left": 0.95 / width,
            "right": 1 - 0.65 / width,
            "top": 1 - top / height,
            "bottom": bottom / height,
            "wspace": gap / cell,
            "hspace": room * len(heights) / (sum(heights) * cell),
        },
    )

    def write(up: float, line: str, **how: Any) -> None:
        """Write a line, whose names may hold anything, `$` too, at inches from the bottom."""
        how |= {"parse_math": False, "fontfamily": lettering.families}
        figure.text(0.15 / width, up / height, lettering.written(line), **how)

    write(height - 0.28, picture.title, fontsize=12, weight="bold", va="center")
    write(height - 0.54, picture.subtitle, fontsize=10, va="center")
    for number, note in enumerate(reversed(_notes(picture))):
        write(0.12 + 0.2 * number, note, fontsize=8, color="#333333")
    for strip in range(strips):
        for place, kind in enumerate(kinds):
            row = axes[strip * len(kinds) + place]
            _label_row(row[0], kind)
            for column in range(columns):
                t = strip * PER_ROW + column
                if t >= T:
                    row[column].axis("off")
                else:
                    {"frames": _draw_frame, "attention": _draw_attention, "shares": _draw_shares}[kind](
                        row[column], picture, t
                    )
    if picture.attention is not None:
        _colour_bar(figure, axes[kinds.index("attention")], picture)
    figure.savefig(path, format="png")


def _notes(picture: ViewPicture) -> list[str]:
    out = list(picture.notes)
    if picture.motion is not None:
        longest = _longest(picture.motion)
        out.append(
            f"Arrows: where a patch is in the next frame, by adjacent-frame attention; the longest means {longest:.2g} "
            f"patches, those below {100 * _SMALLEST:.0f} % of it are left out."
        )
    if picture.attention is not None:
        out.append(
            "Colours: the decoder's attention to a patch, in times an even share; mean of heads and layers."
        )
    return out


def _longest(motion: np.ndarray) -> float:
    return float(np.linalg.norm(motion, axis=-1).max())


def _label_row(axis: "Axes", kind: str) -> None:
    text = {
        "frames": "frames,\nmotion",
        "attention": "decoder's\nattention",
        "shares": "share of\nattention",
    }[kind]
    axis.text(
        -0.12 if kind != "shares" else -0.42,
        0.5,
        text,
        transform=axis.transAxes,
        rotation=90,
        ha="center",
        va="center",
        fontsize=8,
    )


def _bare(axis: "Axes", extent: tuple[int, int]) -> None:
    axis.set_xlim(0, extent[1])
    axis.set_ylim(extent[0], 0)
    axis.set_xticks([])
    axis.set_yticks([])


def _show_picture(axis: "Axes", picture: ViewPicture, t: int, *, grey: bool) -> None:
    """Draw frame t, or grey where there is none, on axes whose unit is a patch."""
    height, width = picture.grid
    if picture.frames is None:
        axis.set_facecolor("#DDDDDD")
    else:
        frame: Any = picture.frames[t]
        if grey:
            frame = np.repeat((frame @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=-1).astype(
                np.uint8
            )
        axis.imshow(frame, extent=(0, width, height, 0), interpolation="bilinear", aspect="auto")
    _bare(axis, (height, width))


def _draw_frame(axis: "Axes", picture: ViewPicture, t: int) -> None:
    _show_picture(axis, picture, t, grey=False)
    axis.set_title(picture.frame_names[t], fontsize=8, pad=2)
    if picture.motion is None or t >= len(picture.motion) or not _longest(picture.motion):
        return
    height, width = picture.grid
    moves = picture.motion[t]
    lengths = np.linalg.norm(moves, axis=-1)
    kept = lengths >= _SMALLEST * _longest(picture.motion)
    down, right = (moves[kept] * (_LONGEST / _longest(picture.motion))).T
    y, x = (np.stack(np.divmod(np.arange(height * width), width), axis=-1)[kept] + 0.5).T
    axis.quiver(
        x, y, right, down, color=_ARROW, angles="xy", scale_units="xy", scale=1, width=0.018, headwidth=4,
        headlength=4.5, headaxislength=4, edgecolor="black", linewidth=0.7,
    )  # fmt: skip


def _heat(picture: ViewPicture) -> tuple[np.ndarray, float]:
    """Return the attention to patches as multiples of an even share, (T, Hp, Wp), and the end of its scale."""
    assert picture.attention is not None
    heat = (picture.attention[:, 1:] * picture.attention.size).reshape(len(picture.attention), *picture.grid)
    return heat, max(2.0, float(np.quantile(heat, 0.995)))


def _draw_attention(axis: "Axes", picture: ViewPicture, t: int) -> None:
    _show_picture(axis, picture, t, grey=True)
    heat, end = _heat(picture)
    height, width = picture.grid
    strength = np.clip(heat[t] / end, 0, 1)
    axis.imshow(
        heat[t], extent=(0, width, height, 0), cmap="cividis", vmin=0, vmax=end, aspect="auto",
        alpha=0.35 + 0.5 * strength, interpolation="nearest",
    )  # fmt: skip
    _bare(axis, picture.grid)


def _draw_shares(axis: "Axes", picture: ViewPicture, t: int) -> None:
    assert picture.attention is not None
    patches, class_token = 100 * picture.attention[t, 1:].sum(), 100 * picture.attention[t, 0]
    end = 1.18 * 100 * float(picture.attention.sum(axis=1).max())
    axis.bar([0], [patches], color=_PATCHES, width=0.55, label="patches")
    axis.bar([0], [class_token], bottom=[patches], color=_CLASS_TOKENS, width=0.55, label="class token")
    axis.text(
        0, patches + class_token, f"{patches + class_token:.0f} %", ha="center", va="bottom", fontsize=8
    )
    axis.set_xlim(-0.75, 0.75)
    axis.set_ylim(0, end)
    axis.set_xticks([])
    axis.spines[["top", "right"]].set_visible(False)
    if t % PER_ROW:
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
    else:
        axis.tick_params(labelsize=7)
        axis.yaxis.set_major_formatter("{x:.0f} %")
    if t == 0:
        axis.legend(fontsize=6.5, frameon=False, loc="upper left", bbox_to_anchor=(-0.02, -0.02), ncols=2)


def _colour_bar(figure: "Figure", row: Sequence["Axes"], picture: ViewPicture) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    box = row[-1].get_position()
    width = figure.get_size_inches()[0]
    place = figure.add_axes((box.x1 + 0.1 / width, box.y0, 0.1 / width, box.height))
    scale = ScalarMappable(Normalize(0, _heat(picture)[1]), cmap="cividis")
    bar = figure.colorbar(scale, cax=place, ticks=MaxNLocator(nbins=6, integer=True))
    bar.ax.tick_params(labelsize=7)
    bar.ax.yaxis.set_major_formatter("{x:.0f}×")
