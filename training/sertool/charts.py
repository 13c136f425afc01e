"""Charts of a report: drawn by matplotlib as SVG that stands in the page itself and takes on the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from sertool.metrics import ReliabilityBin

# Okabe and Ito's colours, which the colour-blind tell apart; each goes with a marker of its own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")

# What is drawn in one of these takes the page's own colour, which in dark mode is another one.
INK, QUIET, LINE, ACCENT, MARK, PAGE = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
PAGE_COLOURS = {
    INK: "var(--ink)",
    QUIET: "var(--quiet)",
    LINE: "var(--line)",
    ACCENT: "rgb(var(--accent))",
    MARK: "var(--mark)",
    PAGE: "var(--page)",
}

STYLE: Any = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": QUIET,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "svg.hashsalt": "sertool",  # the same numbers give the same page
    "svg.fonttype": "none",
    "path.simplify": False,
}


def learning_curve(title: str, lines: Sequence[Sequence[float]]) -> Markup:
    """Draw a loss by epoch, one line a run.

    Args:
        title: what the values are.
        lines: the values of each run, from the first epoch on.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 2.4))
        axes = figure.add_axes((0.11, 0.19, 0.87, 0.77))
        for line in lines:
            axes.plot(range(1, len(line) + 1), line, color=ACCENT, linewidth=1.6, alpha=0.75)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y")
        first = lines[0]
        return _inline(figure, f"{title}: from {first[0]:.3g} to {first[-1]:.3g} in {len(first)} epochs")


def reliability_diagram(bins: Sequence[ReliabilityBin]) -> Markup:
    """Draw how often answers of about one probability are right, and below it how many they are."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 4.2))
        rights, counts = figure.add_axes((0.14, 0.31, 0.83, 0.67)), figure.add_axes((0.14, 0.11, 0.83, 0.16))
        low, width = [100 * bin.low for bin in bins], 100 * (bins[0].high - bins[0].low)
        rights.bar(low, [100 * bin.accuracy for bin in bins], width - 1, align="edge", color=ACCENT)
        rights.plot([0, 100], [0, 100], color=MARK, linewidth=1.4, linestyle="--")
        rights.set_ylabel("right, %")
        rights.set_ylim(0, 100)
        rights.grid(axis="y")
        counts.bar(low, [bin.items for bin in bins], width - 1, align="edge", color=ACCENT, alpha=0.45)
        counts.set_ylabel("clips")
        counts.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        counts.set_xlabel("probability of the answer, %")
        for axes in (rights, counts):
            axes.set_xlim(0, 100)
        rights.tick_params(labelbottom=False)
        return _inline(figure, "Share of right answers by the probability of the answer")


def graph_map(
    places: NDArray[np.floating], edges: NDArray[np.int64], labels: NDArray[np.str_], names: Sequence[str]
) -> Markup:
    """Draw a graph's clips at their places, a colour and marker a label, with the edges between them.

    Args:
        places: (N, 2).
        edges: (E, 2) rows of ``places``, each pair once.
        labels: (N,) of the clips.
        names: the labels in the order of the legend.
    """
    with mpl.rc_context(STYLE):
        legend_rows = -(-len(names) // 3)
        height = 4.8 + 0.22 * legend_rows
        figure = Figure(figsize=(4.8, height))
        axes = figure.add_axes((0.0, 1 - 4.8 / height, 1.0, 4.8 / height))
        axes.set_axis_off()
        within = labels[edges[:, 0]] == labels[edges[:, 1]]
        _draw_edges(axes, places[edges[~within]], QUIET, 0.35)
        _draw_edges(axes, places[edges[within]], ACCENT, 0.6)
        for place, name in enumerate(names):
            chosen = places[labels == name]
            colour, marker = _look(place)
            axes.plot(
                *chosen.T,
                marker=marker,
                markersize=5,
                color=colour,
                markeredgecolor=PAGE,
                markeredgewidth=0.5,
                linestyle="",
                label=name.replace("$", r"\$"),
            )
        figure.legend(loc="lower center", ncols=min(len(names), 3), frameon=False)
        return _inline(figure, f"{len(places)} clips and {len(edges)} edges, by label: {', '.join(names)}")


def _draw_edges(axes: Axes, ends: NDArray[np.floating], colour: str, alpha: float) -> None:
    """Draw all edges (E, 2, 2) as one outline: thousands of lines of their own would make a large page."""
    if len(ends):
        codes = np.tile(np.array([Outline.MOVETO, Outline.LINETO], np.uint8), len(ends))
        outline = Outline(ends.reshape(-1, 2), codes)
        axes.add_patch(PathPatch(outline, facecolor="none", edgecolor=colour, linewidth=0.5, alpha=alpha))


def _look(place: int) -> tuple[str, str]:
    """Return colour and marker of a label; no two of the first 36 have both in common."""
    return COLOURS[place % len(COLOURS)], MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]


def _inline(figure: Figure, said: str) -> Markup:
    """Return a figure as an SVG element for a page, which a screen reader announces by ``said``."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    viewbox = re.search(r'viewBox="[^"]*"', svg)
    assert viewbox
    # The page has its own declarations and styles; ids of groups would occur once a figure.
    body = re.sub(r"<style.*?</style>", "", svg[svg.index("<defs>") :], flags=re.S)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    body = re.sub(r' (d|x|y)="[^"]*"', _with_tenths, body)
    for colour, variable in PAGE_COLOURS.items():
        body = body.replace(f": {colour}", f": {variable}")
    return Markup(f'<svg {viewbox[0]} role="img" aria-label="{escape(said)}">\n{body}')


def _with_tenths(coordinates: re.Match[str]) -> str:
    """Drop what nobody sees and what makes half of the page's size."""
    return re.sub(r"(\.\d)\d+", r"\1", coordinates[0])
