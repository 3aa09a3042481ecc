"""The style of all figures, on paper and in the browser: one colour and marker for each backbone."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter


@dataclass(frozen=True)
class Look:
    """Colour and marker of one backbone."""

    color: str
    marker: str  # matplotlib's name
    symbol: str  # plotly's name of the same marker


BACKBONES = {
    "unet": Look("#0b6bb0", "o", "circle"),
    "edm2": Look("#35a3d8", "s", "square"),
    "uvit": Look("#0f8a60", "^", "triangle-up"),
    "rin": Look("#c8500a", "D", "diamond"),
    "dit": Look("#b04f93", "v", "triangle-down"),
    "jit": Look("#b98400", "P", "cross"),
    "hdit": Look("#6b4a3a", "X", "x"),
}
"""Okabe & Ito's colours, darkened until text in them reads on white."""
_OTHERS = [
    Look("#5b5f97", "h", "hexagon"),
    Look("#7a7a1e", "p", "pentagon"),
    Look("#a02c3c", "*", "star"),
    Look("#4f6d7a", "<", "triangle-left"),
    Look("#8a5fbf", ">", "triangle-right"),
]
INK, GREY, FAINT = "#1b1f24", "#777e86", "#9aa1a9"
DASHES = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1))]
WIDTH, HEIGHT = 6.6, 4.3
"""Inches: a text column of a paper in one column."""

_SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555b63",
    "axes.linewidth": 0.7,
    "axes.labelcolor": INK,
    "xtick.color": "#555b63",
    "ytick.color": "#555b63",
    "text.color": INK,
    "axes.grid": True,
    "grid.color": "#e6e9ec",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.hashsalt": "diffscale",
    "pdf.fonttype": 42,
    "axes.unicode_minus": True,
    "font.family": "DejaVu Sans",
    "mathtext.fontset": "dejavusans",
}


def looks(models: Iterable[str]) -> dict[str, Look]:
    """Return a look for each model: known backbones keep theirs, others (peers) take the rest in alphabetical order."""
    names = sorted(set(models))
    unknown = [name for name in names if name not in BACKBONES]
    others = {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(unknown)}
    return {name: BACKBONES.get(name) or others[name] for name in names}


@contextmanager
def style() -> Iterator[None]:
    """Apply the figures' matplotlib settings within a block."""
    with mpl.rc_context(_SETTINGS):
        yield


def plain(text: str) -> str:
    """Escape a user's text (names of runs, datasets), in which matplotlib would read `$` as mathematics."""
    return text.replace("$", r"\$")


@dataclass(frozen=True)
class End:
    """A line's last point in data coordinates, and its label."""

    x: float
    y: float
    text: str
    color: str
    size: float = 8.0


def finish(axes: Axes, title: str, text: str, ends: list[End] | None = None) -> None:
    """Draw a bold title, a caption in small print and labels at the lines' ends, and make room for them.

    Call it last, when the limits of the axes are final.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(text, 130)
    figure.text(0.012, 1 - 0.10 / height, plain(title), weight="bold", size=10, va="top", ha="left")
    figure.text(
        0.012,
        0.06 / height,
        plain("\n".join(lines)),
        size=6.8,
        color="#555b63",
        va="bottom",
        ha="left",
        linespacing=1.3,
    )
    label = max((len(line) * end.size for end in ends or [] for line in end.text.split("\n")), default=0) * 0.6 / 72
    right = 1 - min(label + 0.2, 0.4 * width) / width
    figure.subplots_adjust(top=1 - 0.38 / height, bottom=(0.55 + 0.135 * len(lines)) / height, left=0.095, right=right)
    _label_ends(axes, ends or [])


def log_axis(axis: Axis, low: float, high: float) -> None:
    """Set ticks at 1, 2, 5 within two decades and at powers of ten beyond, written out below 100,000."""
    decades = np.log10(high / low) if low > 0 else 1.0
    few = decades < 2.2
    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=20))
    if decades < 0.5:
        axis.set_major_locator(LogLocator(base=10, subs=tuple(np.arange(1.0, 10.0)), numticks=30))
    if decades < 0.12:
        axis.set_major_locator(mpl.ticker.MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axis.set_minor_formatter(NullFormatter())


def tick(value: float) -> str:
    """Format a value of an axis."""
    if value <= 0:
        return f"{value:g}"
    if 1e-3 <= value < 1e5:
        return f"{value:,.6g}"
    exponent = int(np.floor(np.log10(value) + 1e-9))
    factor = value / 10.0**exponent
    head = "" if abs(factor - 1) < 1e-6 else rf"{factor:.3g}{{\cdot}}"
    return rf"${head}10^{{{exponent}}}$"


def _label_ends(axes: Axes, ends: list[End]) -> None:
    """Write each end's text right of the axes with a leader line, moving texts apart that would overlap."""
    dots = axes.figure.dpi / 72
    heights = [axes.transData.transform((end.x, end.y))[1] / dots for end in ends]
    order = sorted(range(len(ends)), key=heights.__getitem__)
    sizes = [ends[i].size * 1.3 * (1 + ends[i].text.count("\n")) for i in order]
    places = _spread([heights[i] for i in order], sizes, axes.get_window_extent().y0 / dots)
    for i, place in zip(order, places, strict=True):
        end = ends[i]
        axes.annotate(
            plain(end.text),
            (end.x, end.y),
            xytext=(1.015, axes.transAxes.inverted().transform((0, place * dots))[1]),
            textcoords="axes fraction",
            color=end.color,
            size=end.size,
            va="center",
            ha="left",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": end.color, "lw": 0.6, "alpha": 0.45, "shrinkA": 1, "shrinkB": 3},
        )


def _spread(wanted: list[float], sizes: list[float], lowest: float) -> list[float]:
    """Return ascending centres of labels near the wanted ones. Labels that touch form one block."""
    blocks: list[tuple[float, list[float]]] = []
    for position, size in zip(wanted, sizes, strict=True):
        blocks.append((position, [size]))
        while len(blocks) > 1:
            (low, lower), (high, upper) = blocks[-2], blocks[-1]
            if low + sum(lower) / 2 <= high - sum(upper) / 2:
                break
            middle = (low * len(lower) + high * len(upper)) / (len(lower) + len(upper))
            blocks[-2:] = [(middle, lower + upper)]
    centres: list[float] = []
    edge = lowest
    for middle, members in blocks:
        edge = max(edge, middle - sum(members) / 2)
        for size in members:
            centres.append(edge + size / 2)
            edge += size
    return centres
