"""What a sweep found: Table 3 of the paper with ours beside it, what each graph does, and the statistics of both.

All numbers are those of :mod:`sertool.compare`, so ``sertool compare`` on the folders of two rows says the same.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.errors import SerError
from sertool.compare import Answers, RunSet, compare, half_width, load_set, make_set
from sertool.files import write_json, write_text
from sertool.paper.sweep import Cell, Setting, Sweep
from sertool.run import read_metrics

TITLES = {"vgg15": "VGG-15", "resnet9": "ResNet-9", "cnn6": "CNN-6", "mobilenet15": "MobileNet-15"}

PAPER_SETTINGS = ((0, 0.0), (3, 0.01), (6, 0.1), (9, 0.1))
PAPER_TABLE_3: dict[tuple[str, str], tuple[tuple[float, float], ...]] = {
    ("vgg15", "validation"): ((71.0, 66.4), (80.3, 73.6), (74.9, 70.0), (75.4, 69.5)),
    ("vgg15", "test"): ((84.0, 77.2), (86.0, 78.6), (85.9, 78.9), (86.3, 78.6)),
    ("resnet9", "validation"): ((79.4, 73.9), (78.3, 73.0), (74.5, 67.8), (74.8, 68.5)),
    ("resnet9", "test"): ((81.7, 74.6), (83.8, 76.3), (81.6, 74.5), (83.0, 76.2)),
    ("cnn6", "validation"): ((68.4, 65.3), (78.2, 72.6), (80.7, 74.9), (77.8, 73.0)),
    ("cnn6", "test"): ((80.7, 73.1), (84.2, 77.0), (83.1, 76.0), (84.1, 76.9)),
}
"""Accuracy and UAR in % on DEMoS (the paper's Table 3), by network and part: base, then the settings of n and alpha."""

NOTES = """\
- UAR and accuracy: all folds pooled, averaged over seeds; ± is the standard deviation over seeds.
- Brackets hold 95 % intervals by bootstrap over speakers; with fewer than ten speakers they are rough. Differences are
  in percentage points, paired (same speakers drawn for both sides, same seeds).
- z-test: the paper's, one-tailed, as if the UAR were a share of independent clips; clips of one speaker are alike, so
  trust the interval rather than this p. McNemar: exact, two-sided, the median over all pairs of seeds.
- Over seeds: how far the difference of other seeds may lie, in 95 of 100 cases (Welch). A graph helps or hurts where
  its difference is beyond both intervals.
- No p and no interval is corrected for the number of comparisons.
- The paper's numbers are of DEMoS, with a wav2vec 2.0 teacher tuned on RAVDESS and one seed.
"""

GRAPH_NOTE = """\
Edges a clip and shares are means over folds; in parentheses: of clips drawn at random. The effect is that of all
settings of n and alpha together, so that none was chosen by its score."""


def paper_scores(network: str, part: str, count: int, alpha: float) -> tuple[float, float] | None:
    """Return accuracy and UAR in % of the paper's Table 3, or None for a cell it does not have.

    Example:
        >>> paper_scores("resnet9", "test", 3, 0.01)
        (83.8, 76.3)
    """
    row = PAPER_TABLE_3.get((network, part))
    if row is None or (count, alpha) not in PAPER_SETTINGS:
        return None
    return row[PAPER_SETTINGS.index((count, alpha))]


def collect(sweep: Sweep, cells: Sequence[Cell]) -> dict[str, Any]:
    """Compare what is evaluated so far with the base form of the same network.

    A row is compared over the seeds that it and its base both have.

    Returns:
        ``corpus``; ``rows``: for each setting with an evaluated cell its ``part``, ``network``, ``width``, ``graph``,
        ``n``, ``alpha``, ``distance``, ``layer``, ``name``, ``seeds``, ``of`` (how many seeds it will have), what
        :func:`sertool.compare.compare` says of the set (``uar``, ``accuracy``, ``folds``, ``folds_of``, ``runs``), the
        ``paper``'s accuracy and UAR, and the ``difference`` from the base (None for the base, or where there is no
        base), likewise, with the ``paper``'s; ``clips``, ``speakers`` and ``split_hash``. ``graphs``: what each joins,
        and its ``effects`` on each network, over all its settings. ``seconds`` of training; ``problems``: what could
        not be read.
    """
    problems: list[str] = []
    answers = _read(cells, problems)
    by_setting = {
        setting: [cell for cell in cells if cell.setting == setting] for setting in (c.setting for c in cells)
    }
    runs = {
        setting: {cell.seed: answers[cell] for cell in of_setting if cell in answers}
        for setting, of_setting in by_setting.items()
    }
    compared = _Comparisons(runs, problems)
    rows = []
    for setting, of_setting in by_setting.items():
        try:
            rows += [_row(setting, len(of_setting), compared)] if runs[setting] else []
        except SerError as error:  # its seeds were not tested on the same clips
            problems.append(str(error))
    return {
        "corpus": sweep.data.corpus,
        "rows": rows,
        "graphs": _graphs(list(answers), compared),
        "seconds": sum(_training_seconds(cell) for cell in answers),
        "problems": list(dict.fromkeys(problems)),
    }


def _read(cells: Iterable[Cell], problems: list[str]) -> dict[Cell, Answers]:
    found = {}
    for cell in cells:
        try:
            if cell.setting.part in read_metrics(cell.folder):
                found[cell] = load_set(str(cell.folder), cell.setting.part).runs[0]
        except SerError as error:
            problems.append(str(error))
    return found


class _Comparisons:
    """Sets of runs and their comparison with the base form of the same network."""

    def __init__(self, runs: Mapping[Setting, Mapping[int, Answers]], problems: list[str]) -> None:
        self.runs = runs
        self._problems = problems
        self._bases: dict[tuple[Setting, tuple[int, ...]], RunSet] = {}

    def base_of(self, setting: Setting) -> Setting | None:
        same = (setting.part, setting.network, setting.width)
        bases = [other for other in self.runs if not other.graph and (other.part, other.network, other.width) == same]
        return next((base for base in bases if self.runs[base]), None)

    def with_base(self, name: str, settings: Sequence[Setting]) -> tuple[list[int], dict[str, Any] | None]:
        """Compare the runs of some settings with their base; return the seeds that all have, and what was found."""
        base = self.base_of(settings[0])
        if base is None:
            return [], None
        seeds = sorted(set(self.runs[base]).intersection(*(self.runs[setting] for setting in settings)))
        if not seeds:
            return [], None
        try:
            of_base = self._base(base, tuple(seeds))
            runs = make_set(name, [self.runs[setting][seed] for setting in settings for seed in seeds])
            (difference,) = compare([of_base, runs])["differences"]
        except SerError as error:
            self._problems.append(str(error))
            return seeds, None
        return seeds, difference

    def _base(self, base: Setting, seeds: tuple[int, ...]) -> RunSet:
        if (base, seeds) not in self._bases:
            self._bases[base, seeds] = make_set(base.name, [self.runs[base][seed] for seed in seeds])
        return self._bases[base, seeds]


def _row(setting: Setting, planned: int, compared: _Comparisons) -> dict[str, Any]:
    runs = compared.runs[setting]
    seeds = sorted(runs)
    (described,) = compare([make_set(setting.name, [runs[seed] for seed in seeds])])["sets"]
    difference = None
    if setting.graph:
        common, found = compared.with_base(setting.name, [setting])
        difference = found and {**found, "seeds": common, "paper": _paper_difference(setting)}
    return {
        "part": setting.part,
        "network": setting.network,
        "width": setting.width,
        "graph": setting.graph,
        "n": setting.count,
        "alpha": setting.alpha,
        "distance": setting.distance,
        "layer": setting.layer,
        "seeds": seeds,
        "of": planned,
        **described,
        "speakers": len(set(runs[seeds[0]].speakers)),
        "clips": len(runs[seeds[0]].keys),
        "split_hash": runs[seeds[0]].split_hash,
        "paper": _paper(setting),
        "difference": difference,
    }


def _paper(setting: Setting) -> tuple[float, float] | None:
    """Return the paper's scores, which are of the cosine and of FC1."""
    if setting.graph and _special(setting.distance, setting.layer):
        return None
    return paper_scores(setting.network, setting.part, setting.count, setting.alpha)


def _paper_difference(setting: Setting) -> tuple[float, float] | None:
    """Return by how many points the paper's accuracy and UAR differ from its base."""
    scores, base = _paper(setting), paper_scores(setting.network, setting.part, 0, 0.0)
    return (scores[0] - base[0], scores[1] - base[1]) if scores and base else None


def _graphs(cells: Sequence[Cell], compared: _Comparisons) -> list[dict[str, Any]]:
    """Describe the graphs that evaluated cells were trained with, and what each did to every network."""
    described = []
    for part, name in dict.fromkeys((cell.setting.part, cell.setting.graph) for cell in cells if cell.setting.graph):
        of_graph = [cell for cell in cells if (cell.setting.part, cell.setting.graph) == (part, name)]
        settings = list(dict.fromkeys(cell.setting for cell in of_graph))
        effects = []
        for network, width in dict.fromkeys((setting.network, setting.width) for setting in settings):
            same = [setting for setting in settings if (setting.network, setting.width) == (network, width)]
            seeds, difference = compared.with_base(name, same)
            if difference is not None:
                effects.append(
                    {
                        "network": network,
                        "width": width,
                        "settings": len(same),
                        "seeds": seeds,
                        "uar": difference["uar"],
                        "accuracy": difference["accuracy"],
                        "verdict": verdict(difference["uar"]),
                    }
                )
        described.append({"name": name, "part": part, **_describe_graph(of_graph[0]), "effects": effects})
    return described


def verdict(found: Mapping[str, Any]) -> str:
    """Say what the intervals of a difference allow to say: neither other speakers nor other seeds may undo it.

    Example:
        >>> verdict({"interval": [0.004, 0.051], "seed_interval": [0.001, 0.054]})
        'helps'
        >>> verdict({"interval": [0.004, 0.051], "seed_interval": [-0.11, 0.18]})
        'no difference shown'
    """
    intervals = (found["interval"], found["seed_interval"])
    for interval, lack in zip(intervals, ("one speaker: no interval", "one seed: no interval"), strict=True):
        if interval is None:
            return lack
    if all(low > 0 for low, _ in intervals):
        return "helps"
    return "hurts" if all(high < 0 for _, high in intervals) else "no difference shown"


def _describe_graph(cell: Cell) -> dict[str, Any]:
    """Return what a graph joins, averaged over the folds that a cell was trained on."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(cell.folder.glob("fold-*/graph.json"))]
    first = reports[0]
    measured = [report["graph"] for report in reports]
    names = ("homophily", "homophily_by_chance", "same_speaker", "same_speaker_by_chance", "isolated")
    return {
        "teacher": first["teacher"]["name"],
        **{key: first[key] for key in ("threshold", "neighbours", "centre", "mutual")},
        **{name: float(np.mean([graph[name] for graph in measured])) for name in names},
        "edges": float(np.mean([graph["edges"] / graph["clips"] for graph in measured])),
    }


def _training_seconds(cell: Cell) -> float:
    return sum(seconds for path in cell.folder.glob("fold-*/history.csv") for seconds in epoch_seconds(path))


def epoch_seconds(history: Path) -> list[float]:
    """Return how long each epoch took, by a run's ``history.csv``; empty where there is none."""
    if not history.is_file():
        return []
    with history.open(newline="", encoding="utf-8") as file:
        return [float(row["seconds"]) for row in csv.DictReader(file)]


# --- writing -------------------------------------------------------------------------------------------------------


def save_tables(folder: Path, results: Mapping[str, Any], title: str) -> None:
    """Write results.json, results.md, table-3.csv and graphs.csv."""
    write_json(folder / "results.json", results)
    write_text(folder / "results.md", to_markdown(results, title))
    write_text(folder / "table-3.csv", _to_csv(map(_flat_row, results["rows"])))
    write_text(folder / "graphs.csv", _to_csv(flat for graph in results["graphs"] for flat in _flat_graph(graph)))


def to_markdown(results: Mapping[str, Any], title: str) -> str:
    """Return all tables as Markdown."""
    rows = results["rows"]
    if not rows:
        return f"# {title}\n\nNo cell is evaluated yet.\n"
    lines = [f"# {title}", ""]
    for part in dict.fromkeys(row["part"] for row in rows):
        first = next(row for row in rows if row["part"] == part)
        lines.append(f"- {part}: {first['clips']} clips of {first['speakers']} speakers, split {first['split_hash']}")
    lines += [f"- training: {describe_time(results['seconds'])} in all", ""]
    lines += ["## Table 3: accuracy / UAR in %, beside the paper's", "", *_table_3(rows), ""]
    if any(row["difference"] for row in rows):
        lines += ["![Difference from the base](table-3.svg)", ""]
        lines += ["## Difference from the base, in points of UAR", "", *_table_of_differences(rows), ""]
    if results["graphs"]:
        lines += ["## Where the graph helps, hurts or does nothing", "", *_table_of_graphs(results["graphs"]), ""]
        lines += [GRAPH_NOTE, ""]
        lines += ["## Figure 2: UAR by n, alpha and graph", "", "![UAR by n, alpha and graph](figure-2.svg)", ""]
    lines += ["## How to read this", "", NOTES]
    lines += [f"- Not in these tables: {problem}" for problem in results["problems"]]
    return "\n".join(lines).rstrip("\n") + "\n"


def _table_3(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the paper's form: settings in rows, networks and parts in columns, ours and then the paper's."""
    columns = list(dict.fromkeys((row["network"], row["width"], row["part"]) for row in rows))
    keys = list(dict.fromkeys(_row_key(row) for row in rows))
    keys.sort(key=lambda key: key[0] != "")  # the base stands first; else as planned
    cell = {(_row_key(row), (row["network"], row["width"], row["part"])): row for row in rows}
    printed = [column for column in columns if (column[0], column[2]) in PAPER_TABLE_3]
    head = [f"{network_title(name, width)} {part}" for name, width, part in columns]
    lines = _markdown_head(
        ["graph", "n", "alpha", *head, *(f"paper: {TITLES[name]} {part}" for name, _, part in printed)]
    )
    for key in keys:
        ours = [cell.get((key, column)) for column in columns]
        paper = [(cell.get((key, column)) or {}).get("paper") for column in printed]
        theirs = [f"{scores[0]:.1f} / {scores[1]:.1f}" if scores else "" for scores in paper]
        lines.append(_markdown_row([*_setting_cells(*key), *map(_scores, ours), *theirs]))
    return lines


def _row_key(row: Mapping[str, Any]) -> tuple[str, int, float]:
    return graph_title(row), row["n"], row["alpha"]


def graph_title(row: Mapping[str, Any]) -> str:
    """Return the graph of a row, with what the paper does otherwise; empty for the base.

    Example:
        >>> graph_title({"graph": "raw", "distance": "l1", "layer": "fc1"})
        'raw (l1)'
    """
    special = _special(row["distance"], row["layer"])
    return f"{row['graph']} ({special})" if row["graph"] and special else str(row["graph"])


def _special(distance: str, layer: str) -> str:
    words = [distance] if distance != "cosine" else []
    return ", ".join([*words, *([f"student's {layer}"] if layer != "fc1" else [])])


def _setting_cells(graph: str, count: int, alpha: float) -> list[str]:
    return [graph, str(count), f"{alpha:g}"] if graph else ["base", "-", "-"]


def _scores(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    texts = []
    for metric in ("accuracy", "uar"):
        deviation = row[metric]["seed_deviation"]
        texts.append(f"{100 * row[metric]['mean']:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}"))
    return " / ".join(texts) + _incomplete(row)


def _incomplete(row: Mapping[str, Any]) -> str:
    missing = [f"{len(row['seeds'])} of {row['of']} seeds"] if len(row["seeds"]) < row["of"] else []
    folds, count = row["folds"], row["folds_of"]
    missing += [f"{len(folds)} of {count} folds"] if count and len(folds) < count else []
    return f" ({', '.join(missing)})" if missing else ""


def _table_of_differences(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = _markdown_head(
        [
            "network",
            "part",
            "graph",
            "n",
            "alpha",
            "seeds",
            "UAR",
            "difference",
            "over seeds",
            "z-test p",
            "McNemar p",
            "accuracy",
            "paper",
        ]
    )
    for row in rows:
        found = row["difference"]
        if found is None:
            continue
        cells = [
            network_title(row["network"], row["width"]),
            row["part"],
            *_setting_cells(*_row_key(row)),
            str(len(found["seeds"])),
            f"{100 * row['uar']['mean']:.1f} {_interval(row['uar']['interval'], '.1f')}",
            _difference(found["uar"]),
            half_width(found["uar"]["seed_interval"]),
            _p_value(found["z_test"]["p"]),
            _p_value(found["mcnemar"]["p"]),
            _difference(found["accuracy"]),
            "" if found["paper"] is None else f"{found['paper'][1]:+z.1f}",
        ]
        lines.append(_markdown_row(cells))
    return lines


def _table_of_graphs(graphs: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = _markdown_head(
        [
            "graph",
            "teacher",
            "edges",
            "edges a clip",
            "without",
            "in one label",
            "in one speaker",
            "network",
            "part",
            "cells",
            "effect on UAR",
            "over seeds",
            "",
        ]
    )
    for graph in graphs:
        for effect in graph["effects"]:
            cells = [
                graph["name"],
                graph["teacher"],
                describe_edges(graph),
                f"{graph['edges']:.1f}",
                f"{graph['isolated']:.0%}",
                f"{graph['homophily']:.0%} ({graph['homophily_by_chance']:.0%})",
                f"{graph['same_speaker']:.0%} ({graph['same_speaker_by_chance']:.0%})",
                network_title(effect["network"], effect["width"]),
                graph["part"],
                str(effect["settings"] * len(effect["seeds"])),
                _difference(effect["uar"]),
                half_width(effect["uar"]["seed_interval"]),
                effect["verdict"],
            ]
            lines.append(_markdown_row(cells))
    return lines


def describe_edges(graph: Mapping[str, Any]) -> str:
    """Say in a few words what makes two clips neighbours."""
    words = [f"cosine of {graph['threshold']:g} or more"]
    words += ["mutual"] if graph["mutual"] else []
    words += ["centred"] if graph["centre"] else []
    return ", ".join(words)


def network_title(name: str, width: float) -> str:
    """Return how the paper calls a network, with its width where it is not the paper's."""
    return TITLES.get(name, name) + ("" if width == 1 else f" x{width:g}")


def _difference(found: Mapping[str, Any]) -> str:
    return f"{100 * found['difference']:+z.1f} {_interval(found['interval'], '+z.1f')}"


def _interval(interval: Sequence[float] | None, style: str) -> str:
    return "" if interval is None else "[" + ", ".join(format(100 * end, style) for end in interval) + "]"


def _p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def describe_time(seconds: float) -> str:
    """Return a duration as people say it.

    Example:
        >>> describe_time(42), describe_time(8000)
        ('42 s', '2 h 13 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _markdown_head(columns: Sequence[str]) -> list[str]:
    return [_markdown_row(columns), _markdown_row(["---"] * len(columns))]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _to_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    table = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def _flat_row(row: Mapping[str, Any]) -> dict[str, Any]:
    found = row["difference"] or {}
    flat = {key: row[key] for key in ("part", "network", "width", "graph", "n", "alpha", "distance", "layer")}
    flat |= {"seeds": len(row["seeds"]), "folds": len(row["folds"]), "clips": row["clips"]}
    for metric in ("uar", "accuracy"):
        low, high = row[metric]["interval"] or (None, None)
        flat |= {metric: row[metric]["mean"], f"{metric}_seed_deviation": row[metric]["seed_deviation"]}
        flat |= {f"{metric}_low": low, f"{metric}_high": high}
        difference = found.get(metric, {})
        low, high = difference.get("interval") or (None, None)
        flat |= {f"{metric}_difference": difference.get("difference")}
        flat |= {f"{metric}_difference_low": low, f"{metric}_difference_high": high}
        low, high = difference.get("seed_interval") or (None, None)
        flat |= {f"{metric}_difference_seeds_low": low, f"{metric}_difference_seeds_high": high}
    flat |= {"z": found.get("z_test", {}).get("z"), "z_test_p": found.get("z_test", {}).get("p")}
    flat |= {"mcnemar_p": found.get("mcnemar", {}).get("p")}
    paper = row["paper"] or (None, None)
    return flat | {"paper_accuracy": paper[0], "paper_uar": paper[1]}


def _flat_graph(graph: Mapping[str, Any]) -> list[dict[str, Any]]:
    facts = {key: value for key, value in graph.items() if key != "effects"}
    flat = []
    for effect in graph["effects"]:
        low, high = effect["uar"]["interval"] or (None, None)
        seeds_low, seeds_high = effect["uar"]["seed_interval"] or (None, None)
        flat.append(
            facts
            | {"network": effect["network"], "width": effect["width"], "settings": effect["settings"]}
            | {"seeds": len(effect["seeds"]), "uar_difference": effect["uar"]["difference"]}
            | {"uar_difference_low": low, "uar_difference_high": high}
            | {"uar_difference_seeds_low": seeds_low, "uar_difference_seeds_high": seeds_high}
            | {"verdict": effect["verdict"]}
        )
    return flat
