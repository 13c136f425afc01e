"""``report.html``: what a run was, how well it hears and where it errs, on one page that needs no other file."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined, Template

from sertool.corpora.adapters import CORPORA
from sertool.evaluate import Known, Predictions, evaluate_run, part_name, pool, save_evaluation
from sertool.features import Progress
from sertool.files import write_text
from sertool.graph import diagnose, load_graph
from sertool.metrics import reliability, unweighted_average_recall
from sertool.networks import count_macs, count_parameters
from sertool.run import Run, load_folds, read_metrics

LOSSES = {
    "loss": "Cross entropy",
    "neighbour_loss": "Neighbour loss",
    "distillation_loss": "Distillation",
    "invariance_loss": "Adversary",
}
"""Columns of a history that are drawn where they were trained with, and the titles of their charts."""

MISTAKES = 12
"""Rows of the table of mistakes."""

BINS = 10
"""Of the reliability diagram."""


def evaluate_folder(
    path: Path,
    part: str = "test",
    on_features: Progress | None = None,
    on_folds: Callable[[Sequence[Run]], Iterable[Run]] = iter,
    *,
    known: Known = "nothing",
) -> dict[str, Any]:
    """Evaluate a run, or every finished fold below a folder and all of them pooled; write metrics, items and report.

    Args:
        path: a run, or the folder above the folds of one.
        part: ``test``, ``validation`` or ``train``.
        on_features: told while log-Mel spectrograms are computed.
        on_folds: is given the runs and yields them: the place for a progress bar.
        known: what is known of each speaker; unless it is nothing, results are kept as those of another part, e.g.
            ``test-in-turn``.

    Returns:
        the entry of this part in ``metrics.json`` of ``path``; see :func:`sertool.evaluate.save_evaluation`.

    Raises:
        SerError: what :func:`sertool.run.load_folds` and :func:`sertool.evaluate.evaluate_run` raise.
    """
    folds = load_folds(path)
    predictions, speakers_of = [], part
    part = part_name(part, known)
    for fold in on_folds(folds):
        predictions.append(evaluate_run(fold, speakers_of, on_features, known=known))
        entry = save_evaluation(fold.path, part, predictions[-1], fold.split_hash)
        save_report(fold.path, part, [fold], predictions[-1])
    if folds[0].path != path:
        numbers, count = [fold.recipe.data.fold for fold in folds], len(folds[0].split.folds)
        pooled = pool(predictions)
        entry = save_evaluation(path, part, pooled, folds[0].split_hash, numbers, count)
        save_report(path, part, folds, pooled)
    return entry


def report_path(folder: Path, part: str) -> Path:
    """Return where the report on a part is kept: report.html for ``test``, report-PART.html for the others."""
    return folder / ("report.html" if part == "test" else f"report-{part}.html")


def save_report(folder: Path, part: str, runs: Sequence[Run], predictions: Predictions) -> Path:
    """Write the report on a run, or on the folds of one, that was just evaluated.

    Args:
        folder: the run, or the folder above its folds; ``metrics.json`` of it and of each run has this part.
        part: which part was predicted.
        runs: the run itself, or its folds.
        predictions: the items of all of them.

    Returns:
        the file: HTML with everything inline, no script and no link to another machine.

    Raises:
        RunError: ``metrics.json`` is damaged.
    """
    path = report_path(folder, part)
    write_text(path, _template().render(_content(folder, part, runs, predictions)) + "\n")
    return path


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string((files("sertool") / "report.html").read_text(encoding="utf-8"))


def _content(folder: Path, part: str, runs: Sequence[Run], predictions: Predictions) -> dict[str, Any]:
    first = runs[0]
    metrics = read_metrics(folder)[part]
    pooled = first.path != folder
    with_graph = [run for run in runs if run.recipe.neighbours.graph]
    teacher = first.provenance["teacher"]
    graphs = [_graph(run) for run in with_graph]
    present = sum(recall is not None for recall in metrics["recall"].values())
    return {
        "title": folder.resolve().name,
        "what": _what(first, len(runs) if pooled else 0),
        "part": part,
        "metrics": metrics,
        "chance": 1 / present,
        "remarks": _remarks(metrics),
        "confusion": _confusion(metrics),
        "groups": _groups(first, metrics, predictions, 1 / present),
        "folds": [_fold(run, part) for run in runs] if pooled else [],
        "reliability": _reliability(predictions),
        "curves": _curves(runs),
        "graphs": graphs,
        "degrees": _degrees(graphs),
        "teacher": teacher["name"] if teacher else "",
        "mistakes": _mistakes(predictions),
        "recipe": first.recipe,
        "facts": _facts(first),
        "recipe_text": json.dumps(first.provenance["recipe"], indent=2, ensure_ascii=False),
    }


def _what(run: Run, folds: int) -> str:
    recipe = run.recipe
    padding = "causal" if recipe.network.time_padding == "causal" else "the paper's padding"
    width = f", {recipe.network.width:g} times the channels" if recipe.network.width != 1 else ""
    graph = "with a neighbour graph" if recipe.neighbours.graph else "without a graph"
    graph += " and with distillation" if recipe.distillation.embeddings else ""
    graph += f" and an adversary that hides the {recipe.invariance.to}" if recipe.invariance.weight else ""
    labels = f"{recipe.data.labelled_share:.0%} of the labels, " if recipe.data.labelled_share < 1 else ""
    fold = f"{folds} folds" if folds else f"fold {recipe.data.fold} of {len(run.split.folds)}"
    return (
        f"{recipe.network.name} ({padding}{width}) trained {graph} on {recipe.data.corpus or run.manifest.path.name}, "
        f"{labels}{fold} ({run.split.protocol}), {recipe.training.epochs} epochs, seed {recipe.training.seed}"
    )


def _remarks(metrics: dict[str, Any]) -> list[str]:
    remarks = []
    absent = [label for label, recall in metrics["recall"].items() if recall is None]
    if absent:
        remarks.append(f"no clip tests {', '.join(absent)}; the UAR is over the other labels.")
    missing = sorted(set(range(1, (metrics.get("folds_of") or 0) + 1)) - set(metrics.get("folds", [])))
    if missing:
        remarks.append(f"incomplete, fold {', '.join(map(str, missing))} is lacking.")
    if metrics["uar_interval"] and len(metrics["speakers"]) < 10:
        remarks.append("with fewer than ten speakers the interval is itself rough.")
    return remarks


def _confusion(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "label": label,
            "place": place,
            "cells": [{"count": count, "share": count / max(sum(row), 1)} for count in row],
        }
        for place, (label, row) in enumerate(zip(metrics["labels"], metrics["confusion"], strict=True))
    ]


def _groups(run: Run, metrics: dict[str, Any], predictions: Predictions, chance: float) -> list[dict[str, Any]]:
    """Return bars of recall by label, and of UAR by speaker, gender and language where there are several."""
    clips = {
        "speakers": Counter(predictions.speakers),
        "genders": Counter(predictions.genders),
    }
    groups = [
        {
            "title": "Recall by label",
            "chance": chance,
            "rows": [
                {"name": label, "share": recall, "clips": sum(row)}
                for (label, recall), row in zip(metrics["recall"].items(), metrics["confusion"], strict=True)
            ],
        }
    ]
    for kind, counts in clips.items():
        rows = [{"name": name, "share": uar, "clips": counts[name]} for name, uar in metrics[kind].items()]
        groups.append({"title": f"UAR by {kind[:-1]}", "chance": chance, "rows": rows})
    language_of = {clip.key: clip.language for clip in run.manifest.clips}
    languages = np.array([language_of.get(key, "") for key in predictions.keys])
    rows = [
        {
            "name": language or "unknown",
            "share": unweighted_average_recall(predictions.confusion(languages == language)),
            "clips": int(np.sum(languages == language)),
        }
        for language in sorted(set(languages.tolist()))
    ]
    if len(rows) > 1:
        groups.append({"title": "UAR by language", "chance": chance, "rows": rows})
    return [group for group in groups if group["rows"]]


def _fold(run: Run, part: str) -> dict[str, Any]:
    return {
        "number": run.recipe.data.fold,
        "speakers": run.fold.part(part.partition("-")[0]),
        "metrics": read_metrics(run.path)[part],
        "link": f"{run.path.name}/{report_path(run.path, part).name}",
    }


def _reliability(predictions: Predictions) -> list[dict[str, float]]:
    bins = reliability(predictions.probabilities, predictions.truth, BINS)
    most = max(bin.items for bin in bins)
    return [
        {
            "low": bin.low,
            "width": bin.high - bin.low,
            "clips": bin.items,
            "share": bin.items / most,
            "confidence": bin.confidence,
            "right": bin.accuracy,
        }
        for bin in bins
    ]


def _curves(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a chart of each loss that was trained with: one line a run, in the coordinates of the drawing."""
    histories = [_history(run.path / "history.csv") for run in runs]
    charts = []
    for column, title in LOSSES.items():
        losses = [values for history in histories if (values := history.get(column)) and any(values)]
        if losses:
            charts.append(_chart(title, losses))
    return charts


def _history(path: Path) -> dict[str, list[float]]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {column: [float(row[column]) for row in rows] for column in LOSSES if rows and rows[0].get(column)}


def _chart(title: str, lines: Sequence[Sequence[float]]) -> dict[str, Any]:
    left, right, top, bottom = 44.0, 412.0, 10.0, 176.0
    epochs = max(map(len, lines))
    step = _tick_step(max(map(max, lines)))
    highest = step * math.ceil(max(map(max, lines)) / step)

    def x(epoch: int) -> float:
        return left + (right - left) * epoch / max(epochs - 1, 1)

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / highest

    values = [step * number for number in range(round(highest / step) + 1)]
    return {
        "title": title,
        "said": f"from {lines[0][0]:.3g} to {lines[0][-1]:.3g} in {epochs} epochs",
        "epochs": epochs,
        "ticks": [{"y": round(y(value), 1), "text": f"{value:.3g}"} for value in values],
        "lines": [" ".join(f"{x(epoch):.1f},{y(value):.1f}" for epoch, value in enumerate(line)) for line in lines],
    }


def _tick_step(highest: float) -> float:
    """Return a step of 1, 2 or 5 times a power of ten that divides a scale into two to five.

    Example:
        >>> [_tick_step(highest) for highest in (1.4, 0.21, 30.0)]
        [0.5, 0.05, 10.0]
    """
    power = 10.0 ** math.floor(math.log10(highest))
    return next(step for step in (power / 5, power / 2, power, 2 * power) if highest / step <= 5)


def _graph(run: Run) -> dict[str, Any]:
    clips = {clip.key: clip for clip in run.manifest.clips}
    graph = load_graph(run.path / "graph.csv")
    return diagnose(graph, [clips[key] for key in graph.keys]) | {"fold": run.recipe.data.fold}


def _degrees(graphs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    counts: Counter[int] = Counter()
    for graph in graphs:
        counts.update(dict(enumerate(graph["degrees"])))
    total = max(counts.total(), 1)
    return [{"name": degree, "share": counts[degree] / total, "clips": counts[degree]} for degree in sorted(counts)]


def _mistakes(predictions: Predictions) -> list[dict[str, Any]]:
    """Return the wrong answers that the network was surest of."""
    rows = np.arange(len(predictions.truth))
    sure = predictions.probabilities[rows, predictions.predicted]
    wrong = rows[predictions.predicted != predictions.truth]
    return [
        {
            # The manifest may be written with the absolute paths of this machine.
            "clip": "/".join(predictions.keys[row].split("/")[-2:]),
            "speaker": predictions.speakers[row],
            "truth": predictions.labels[predictions.truth[row]],
            "heard": predictions.labels[predictions.predicted[row]],
            "sure": float(sure[row]),
            "of_truth": float(predictions.probabilities[row, predictions.truth[row]]),
        }
        for row in wrong[np.argsort(-sure[wrong], kind="stable")][:MISTAKES]
    ]


def _facts(run: Run) -> dict[str, str]:
    data = run.recipe.data
    known = "; ".join(CORPORA[name].licence if name in CORPORA else "not stated" for name in data.corpora)
    network = run.network()
    frames = run.front_end.frames(run.window_samples)
    seconds = run.window_samples / run.front_end.sample_rate
    versions = run.provenance["versions"]
    labelled = sum(bool(clip["label"]) for clip in run.trained.values())
    return {
        "corpus": data.corpus or run.manifest.path.name,
        "licence of the corpus": data.licence or known,
        "manifest": f"{run.manifest.path.name}, {len(run.manifest)} clips, {len(run.manifest.speakers)} speakers",
        "split": f"{run.split.protocol}, seed {run.split.seed}, hash {run.split_hash}",
        "trained on": f"{len(run.trained)} clips of {len({clip['speaker'] for clip in run.trained.values()})} speakers"
        f" (fold {data.fold})" + (f", {labelled} of them with their label" if labelled < len(run.trained) else ""),
        "network": f"{count_parameters(network) / 1e6:.2f} M parameters, {count_macs(network, frames) / 1e6:,.0f} M "
        f"multiply-adds for a window of {seconds:.2f} s",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
