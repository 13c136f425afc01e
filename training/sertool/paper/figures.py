"""The figures of a sweep: what each setting changes, and UAR by n, alpha and graph (the paper's Figure 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sertool.charts import COLOURS, MARKERS
from sertool.files import atomic_path
from sertool.paper.tables import graph_title, network_title

PAPER_COLOUR = "#555555"
PANELS_A_ROW = 3
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "svg.hashsalt": "sertool",  # the same numbers give the same file
    "svg.fonttype": "none",
}

Row = Mapping[str, Any]


def save_figures(folder: Path, results: Mapping[str, Any]) -> None:
    """Draw table-3 and figure-2 as PNG and SVG, where there is a setting to draw."""
    rows = [row for row in results["rows"] if row["difference"]]
    if not rows:
        return
    with mpl.rc_context(STYLE):
        _save(_differences(rows, results["rows"]), folder / "table-3")
        _save(_by_neighbours(rows, results), folder / "figure-2")


def _save(figure: Figure, path: Path) -> None:
    for suffix, options in ((".png", {"dpi": 160}), (".svg", {"metadata": {"Date": None}})):
        with atomic_path(path.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, **options)


def _differences(rows: Sequence[Row], every: Sequence[Row]) -> Figure:
    """Draw each setting's difference from the base with its interval, a panel a network and part."""
    panels = list(dict.fromkeys(_panel(row) for row in rows))
    graphs = list(dict.fromkeys(graph_title(row) for row in rows))
    highest = max(_places([row for row in rows if _panel(row) == panel])[-1] for panel in panels)
    columns = min(len(panels), PANELS_A_ROW)
    lines = -(-len(panels) // columns)
    size = (1.9 + 2.9 * columns, 0.6 + lines * (1.1 + 0.25 * highest))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        of_panel = [row for row in rows if _panel(row) == panel]
        base = next(row for row in every if _panel(row) == panel and not row["graph"])
        places = _places(of_panel)
        for place, row in zip(places, of_panel, strict=True):
            _draw_difference(axes, place, row, graphs.index(graph_title(row)))
        axes.axvline(0, color="black", linewidth=0.8)
        axes.tick_params(labelbottom=True)
        axes.set_yticks(places, [_setting(row) for row in of_panel])
        axes.set_ylim(places[-1] + 0.6, -0.6)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_title(f"{network_title(*panel[:2])}\n{panel[2]}, base {100 * base['uar']['mean']:.1f} %")
        axes.set_xlabel("difference in UAR, points")
    handles = [_handle(place, graph) for place, graph in enumerate(graphs)]
    if any(row["difference"]["paper"] for row in rows):
        handles.append(Line2D([], [], color=PAPER_COLOUR, marker="x", linestyle="", label="paper, on DEMoS"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    return figure


def _places(rows: Sequence[Row]) -> list[float]:
    """Return heights that leave a gap between graphs."""
    graphs = list(dict.fromkeys(graph_title(row) for row in rows))
    return [place + 0.6 * graphs.index(graph_title(row)) for place, row in enumerate(rows)]


def _draw_difference(axes: Axes, place: float, row: Row, graph: int) -> None:
    found = row["difference"]
    value, interval = 100 * found["uar"]["difference"], found["uar"]["interval"]
    if interval:
        axes.plot([100 * end for end in interval], [place, place], color=COLOURS[graph % len(COLOURS)], linewidth=1.6)
    axes.plot(value, place, color=COLOURS[graph % len(COLOURS)], marker=MARKERS[graph % len(MARKERS)], markersize=6)
    if found["paper"]:
        axes.plot(found["paper"][1], place, color=PAPER_COLOUR, marker="x", markersize=6, linestyle="")


def _by_neighbours(rows: Sequence[Row], results: Mapping[str, Any]) -> Figure:
    """Draw UAR against n, a colour an alpha, a column of panels a graph, a row a network and part."""
    panels = list(dict.fromkeys(_panel(row) for row in rows))
    graphs = list(dict.fromkeys(graph_title(row) for row in rows))
    alphas = sorted({row["alpha"] for row in rows})
    counts = sorted({row["n"] for row in rows})
    figure = Figure(figsize=(1.4 + 2.5 * len(graphs), 1.1 + 2.1 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), len(graphs), squeeze=False, sharex=True, sharey="row")
    for axes, graph in zip(grid[0], graphs, strict=True):
        axes.set_title(f"graph {graph}")
    for axes in grid[-1]:
        axes.set_xlabel("n, at most so many neighbours")
    for line, panel in zip(grid, panels, strict=True):
        base = next(row for row in results["rows"] if _panel(row) == panel and not row["graph"])
        for axes, graph in zip(line, graphs, strict=True):
            _draw_base(axes, base, len(counts))
            of_panel = [row for row in rows if _panel(row) == panel and graph_title(row) == graph]
            for row in of_panel:
                _draw_uar(axes, row, counts, alphas, results["corpus"] == "demos")
            axes.set_xticks(range(len(counts)), [str(count) for count in counts])
            axes.set_xlim(-0.5, len(counts) - 0.5)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        line[0].set_ylabel(f"{network_title(*panel[:2])}\nUAR on {panel[2]}, %")
    handles = [_handle(place, f"alpha = {alpha:g}") for place, alpha in enumerate(alphas)]
    handles.append(Line2D([], [], color="black", linestyle="--", label="base (band: ± over seeds)"))
    if results["corpus"] == "demos":
        handles.append(Line2D([], [], color=PAPER_COLOUR, marker="x", linestyle="", label="paper"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    return figure


def _draw_base(axes: Axes, base: Row, width: int) -> None:
    mean, deviation = 100 * base["uar"]["mean"], 100 * (base["uar"]["seed_deviation"] or 0.0)
    axes.axhline(mean, color="black", linestyle="--", linewidth=1)
    axes.fill_between([-0.5, width - 0.5], mean - deviation, mean + deviation, color="black", alpha=0.08, linewidth=0)


def _draw_uar(axes: Axes, row: Row, counts: Sequence[int], alphas: Sequence[float], with_paper: bool) -> None:
    """Draw the mean, filled, with its deviation over seeds, and every seed, faint."""
    alpha = alphas.index(row["alpha"])
    place = counts.index(row["n"]) + 0.2 * (alpha - (len(alphas) - 1) / 2)
    colour, marker = COLOURS[alpha % len(COLOURS)], MARKERS[alpha % len(MARKERS)]
    seeds = [100 * value for value in row["uar"]["by_seed"]]
    axes.plot([place] * len(seeds), seeds, color=colour, marker=marker, markersize=3, alpha=0.4, linestyle="")
    deviation = 100 * (row["uar"]["seed_deviation"] or 0.0)
    axes.errorbar(place, 100 * row["uar"]["mean"], deviation, color=colour, marker=marker, markersize=6, linewidth=1.4)
    if with_paper and row["paper"]:
        axes.plot(place, row["paper"][1], color=PAPER_COLOUR, marker="x", markersize=6, linestyle="")


def _handle(place: int, label: str) -> Line2D:
    return Line2D([], [], color=COLOURS[place % len(COLOURS)], marker=MARKERS[place % len(MARKERS)], label=label)


def _panel(row: Row) -> tuple[str, float, str]:
    return row["network"], row["width"], row["part"]


def _setting(row: Row) -> str:
    return f"n = {row['n']}, alpha = {row['alpha']:g}"
