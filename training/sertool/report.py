"""``report.html``: what runs were, how well they hear and where they err, on one page that needs no other file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from numpy.typing import NDArray

from edge_runtime.errors import UsageError
from sertool.charts import learning_curve, reliability_diagram
from sertool.compare import RunSet, compare, knowledge, load_set, make_set
from sertool.corpora.adapters import CORPORA
from sertool.corpora.join import corpus_of
from sertool.corpora.manifest import Clip
from sertool.evaluate import (
    Known,
    Predictions,
    evaluate_run,
    interval_or_none,
    part_name,
    pool,
    predictions_path,
    save_evaluation,
    summarize,
)
from sertool.features import Progress
from sertool.files import write_text
from sertool.metrics import reliability, unweighted_average_recall
from sertool.networks import count_macs, count_parameters
from sertool.report_graph import describe_graphs, fits
from sertool.run import Run, load_folds, read_metrics, read_parity
from sertool.teacher.embed import Embeddings, load_embeddings

LOSSES = {
    "loss": "Cross entropy",
    "neighbour_loss": "Neighbour loss",
    "distillation_loss": "Distillation",
    "invariance_loss": "Adversary",
}
"""Columns of a history that are drawn where they were trained with, and the titles of their charts."""

MISTAKES = 12
"""Rows of the table of mistakes."""

LENGTHS_S = (1.0, 2.0, 3.0, 5.0, 8.0)
"""Where clips are parted by length; the same for every corpus, so that reports can be compared."""

HEARD = {
    "": "",
    "in-turn": ", each one's clips heard one after the other",
    "calibrated": ", after calibration to each one's calm speech",
}
"""What a page says of :data:`sertool.evaluate.Known`."""


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
        save_report(Result(fold.path, part, [fold], predictions[-1], entry))
    if folds[0].path != path:
        numbers, count = [fold.recipe.data.fold for fold in folds], len(folds[0].split.folds)
        pooled = pool(predictions)
        entry = save_evaluation(path, part, pooled, folds[0].split_hash, numbers, count)
        save_report(Result(path, part, folds, pooled, entry))
    return entry


def report_path(folder: Path, part: str) -> Path:
    """Return where the report on a part is kept: report.html for ``test``, report-PART.html for the others."""
    return folder / ("report.html" if part == "test" else f"report-{part}.html")


@dataclass(frozen=True)
class Result:
    """What a run, or the folds of one, answered to a part of its split.

    Attributes:
        folder: the run, or the folder above its folds; ``metrics.json`` of each fold has this part.
        part: which part was predicted; see :func:`sertool.evaluate.part_name`.
        runs: the run itself, or its folds.
        predictions: the items of all of them.
        metrics: of the items; see :func:`sertool.evaluate.save_evaluation`.
    """

    folder: Path
    part: str
    runs: Sequence[Run]
    predictions: Predictions
    metrics: dict[str, Any]

    @property
    def pooled(self) -> bool:
        """Whether several folds were pooled."""
        return self.runs[0].path != self.folder

    @property
    def chance(self) -> float:
        """UAR of guessing among the labels that are tested."""
        return 1 / sum(recall is not None for recall in self.metrics["recall"].values())

    @cached_property
    def clips(self) -> list[Clip | None]:
        """The manifest's rows of the items; None where the manifest has them no more."""
        clips = {clip.key: clip for clip in self.runs[0].manifest.clips}
        return [clips.get(key) for key in self.predictions.keys]


def save_report(result: Result) -> Path:
    """Write the report on a run, or on the folds of one, that was just evaluated, beside its metrics.

    Returns:
        the file: HTML with everything inline, no script and no link to another machine.

    Raises:
        RunError: ``metrics.json`` is damaged.
    """
    path = report_path(result.folder, result.part)
    _write_page(path, [result], [], [])
    return path


def write_report(
    names: Sequence[str],
    part: str = "test",
    output: Path | None = None,
    embeddings: Sequence[Path] = (),
    on_results: Callable[[Sequence[Result]], Iterable[Result]] = iter,
) -> Path:
    """Write one page on evaluated runs: how they compare, and all about each.

    Args:
        names: each a run or several, as :func:`sertool.compare.load_set` reads them.
        part: ``test``, ``validation`` or ``train``.
        output: the page; None for the run's own ``report.html``, or one in the current folder for several runs.
        embeddings: folders that graphs were made from; those that lie beside a graph are found without.
        on_results: is given what goes on the page and yields it: the place for a progress bar.

    Returns:
        the page.

    Raises:
        UsageError: what :func:`sertool.compare.load_set` refuses, or embeddings from which no run's graph was made.
        RunError: a run is unfinished or damaged.
    """
    results, sets = [], []
    for name in names:
        named_part = part_name(part, knowledge(name)[1])
        for answers in load_set(name, part).runs:
            results.append(_load_result(answers.path, named_part))
            sets.append(make_set(str(answers.path), [answers]))
    if len({(result.folder.resolve(), result.part) for result in results}) < len(results):
        raise UsageError("a run is named twice; name each once")
    vectors = [load_embeddings(folder) for folder in embeddings]
    runs = [run for result in results for run in result.runs]
    for made in vectors:
        if not any(fits(made, run) for run in runs):
            raise UsageError(f"{made.folder}: no graph of these runs was made from these embeddings; leave them out")
    path = output or (Path("report.html") if len(results) > 1 else report_path(results[0].folder, results[0].part))
    _write_page(path, results, sets, vectors, on_results)
    return path


def _load_result(folder: Path, part: str) -> Result:
    entry = read_metrics(folder)[part]
    runs = [run for run in load_folds(folder) if run.recipe.data.fold in entry.get("folds", [run.recipe.data.fold])]
    predictions = Predictions.load(predictions_path(folder, part))
    # An evaluation of an earlier version lacks what was added since.
    return Result(folder, part, runs, predictions, summarize(predictions) | entry)


def _write_page(
    path: Path,
    results: Sequence[Result],
    sets: Sequence[RunSet],
    embeddings: Sequence[Embeddings],
    on_results: Callable[[Sequence[Result]], Iterable[Result]] = iter,
) -> None:
    titles = _titles(results)
    articles = [
        Markup(_template("report_run.html").render(_content(result, title, number, path.parent, embeddings)))
        for number, (result, title) in enumerate(zip(on_results(results), titles, strict=True), start=1)
    ]
    overview = _overview(results, titles, sets) if len(results) > 1 else None
    title = f"{len(results)} runs" if overview else f"{titles[0]}: {100 * results[0].metrics['uar']:.1f} % UAR"
    write_text(path, _template("report.html").render(title=title, overview=overview, articles=articles) + "\n")


@cache
def _template(name: str) -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string((files("sertool") / name).read_text(encoding="utf-8"))


def _titles(results: Sequence[Result]) -> list[str]:
    """Return as much of the end of each folder's name as tells all of them apart, and not the folders of this machine.

    A run that stands there twice differs in what was known of its speakers.
    """
    parts = [result.folder.resolve().parts for result in results]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    names = ["/".join(part[-depth:]) for part in parts]
    known = [result.part.partition("-")[2] for result in results]
    return [f"{name}@{how}" if how and len(results) > 1 else name for name, how in zip(names, known, strict=True)]


# --- several runs --------------------------------------------------------------------------------------------------


def _overview(results: Sequence[Result], titles: Sequence[str], sets: Sequence[RunSet]) -> dict[str, Any]:
    differences = _differences(sets)
    rows = []
    for number, (result, title) in enumerate(zip(results, titles, strict=True), start=1):
        network, frames = _network(result.runs[0])
        rows.append(
            {
                "name": title,
                "number": number,
                "share": result.metrics["uar"],
                "interval": result.metrics["uar_interval"],
                "chance": result.chance,
                "clips": result.metrics["items"],
                "metrics": result.metrics,
                "parameters": count_parameters(network) / 1e6,
                "macs": count_macs(network, frames) / 1e6,
                "difference": differences[number - 2] if differences and number > 1 else None,
            }
        )
    return {"rows": rows, "compared": differences is not None}


def _differences(sets: Sequence[RunSet]) -> list[dict[str, Any]] | None:
    """Return how each further run differs from the first in UAR; None where they did not answer the same clips."""
    try:
        return [entry["uar"] for entry in compare(sets)["differences"]]
    except UsageError:
        return None


# --- one run -------------------------------------------------------------------------------------------------------


def _content(
    result: Result, title: str, number: int, page_folder: Path, embeddings: Sequence[Embeddings]
) -> dict[str, Any]:
    first = result.runs[0]
    part, _, known = result.part.partition("-")
    return {
        "title": title,
        "number": number,
        "what": _what(first, len(result.runs) if result.pooled else 0),
        "part": part,
        "heard": HEARD[known],
        "metrics": result.metrics,
        "chance": result.chance,
        "remarks": _remarks(result.metrics),
        "confusion": _confusion(result.metrics),
        "groups": _groups(result),
        "folds": [_fold(run, result.part, page_folder) for run in result.runs] if result.pooled else [],
        "reliability": _reliability(result.predictions),
        "curves": _curves(result.runs),
        "graphs": describe_graphs(result.runs, embeddings),
        "mistakes": _mistakes(result.predictions),
        "recipe": first.recipe,
        "facts": _facts(result),
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


def _groups(result: Result) -> list[dict[str, Any]]:
    """Return bars of recall by label, and of UAR by what else tells clips apart, where it does."""
    metrics, predictions = result.metrics, result.predictions
    labels = [
        {"name": label, "share": recall, "interval": metrics["recall_interval"][label], "clips": sum(row)}
        for (label, recall), row in zip(metrics["recall"].items(), metrics["confusion"], strict=True)
    ]
    speakers = _by(result, np.array(predictions.speakers), with_interval=False)
    genders = _by(result, np.array(predictions.genders))
    languages = _by(result, np.array([clip.language if clip else "" for clip in result.clips]))
    corpora = _by(result, np.array([corpus_of(clip) if clip else "" for clip in result.clips]))
    groups = {
        "Recall by label": labels,
        "UAR by speaker": speakers,
        "UAR by gender": [row for row in genders if row["name"] != "unknown"],
        "UAR by language": languages if len(languages) > 1 else [],
        "UAR by corpus": corpora if len(corpora) > 1 else [],
        "UAR by length of the clip": _by_length(result),
    }
    return [
        {"title": title, "rows": [row | {"chance": result.chance} for row in rows]}
        for title, rows in groups.items()
        if rows
    ]


def _by(result: Result, groups: NDArray[np.str_], with_interval: bool = True) -> list[dict[str, Any]]:
    """Return the UAR of each group of clips, sorted, over the labels that occur in it."""
    predictions, speakers = result.predictions, np.array(result.predictions.speakers)
    rows = []
    for group in np.unique(groups):
        chosen = groups == group
        matrices = [predictions.confusion(chosen & (speakers == name)) for name in np.unique(speakers[chosen])]
        rows.append(
            {
                "name": str(group) or "unknown",
                "share": unweighted_average_recall(predictions.confusion(chosen)),
                "interval": interval_or_none(matrices) if with_interval else None,
                "clips": int(np.sum(chosen)),
            }
        )
    return rows


def _by_length(result: Result) -> list[dict[str, Any]]:
    """Return the UAR by how long clips are; nothing where their audio is no longer there."""
    try:
        seconds = [_seconds(clip) for clip in result.clips if clip]
    except (OSError, soundfile.LibsndfileError):
        return []
    if len(seconds) < len(result.clips):
        return []
    bins = np.digitize(seconds, LENGTHS_S, right=True)
    names = [f"to {end:g} s" for end in LENGTHS_S] + [f"over {LENGTHS_S[-1]:g} s"]
    rows = _by(result, bins.astype(str))
    return [row | {"name": names[int(row["name"])]} for row in rows]


def _seconds(clip: Clip) -> float:
    duration = float(soundfile.info(clip.path).duration)
    return min(clip.end or duration, duration) - (clip.start or 0.0)


def _fold(run: Run, part: str, page_folder: Path) -> dict[str, Any]:
    report = report_path(run.path, part)
    beside = run.path.parent.resolve() == page_folder.resolve() and report.is_file()
    return {
        "number": run.recipe.data.fold,
        "speakers": run.fold.part(part.partition("-")[0]),
        "metrics": read_metrics(run.path)[part],
        "link": f"{run.path.name}/{report.name}" if beside else "",
    }


def _reliability(predictions: Predictions) -> dict[str, Any]:
    bins = reliability(predictions.probabilities, predictions.truth)
    return {"chart": reliability_diagram(bins), "bins": [bin for bin in bins if bin.items]}


def _curves(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a chart of each loss that was trained with: one line a run."""
    histories = [_history(run.path / "history.csv") for run in runs]
    charts = []
    for column, title in LOSSES.items():
        losses = [values for history in histories if (values := history.get(column)) and any(values)]
        if losses:
            charts.append({"title": title, "svg": learning_curve(title, losses)})
    return charts


def _history(path: Path) -> dict[str, list[float]]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {column: [float(row[column]) for row in rows] for column in LOSSES if rows and rows[0].get(column)}


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


def _facts(result: Result) -> dict[str, str]:
    run = result.runs[0]
    provenance = run.provenance
    network, frames = _network(run)
    seconds = run.window_samples / run.front_end.sample_rate
    labelled = sum(bool(clip["label"]) for clip in run.trained.values())
    facts = {
        "corpora and licences": ", ".join(map(_licensed, provenance["corpora"])),
        "manifest": f"{run.manifest.path.name}, {len(run.manifest)} clips, {len(run.manifest.speakers)} speakers",
        "split": f"{run.split.protocol}, seed {run.split.seed}, hash {run.split_hash}",
        "trained on": f"{len(run.trained)} clips of {len({clip['speaker'] for clip in run.trained.values()})} speakers"
        f" (fold {run.recipe.data.fold})"
        + (f", {labelled} of them with their label" if labelled < len(run.trained) else ""),
        "began with": _origin(provenance["from"]) if provenance["from"] else "random weights",
        "teacher": _teacher(provenance["teacher"]) if provenance["teacher"] else "none",
        "network": f"{count_parameters(network) / 1e6:.2f} M parameters, {count_macs(network, frames) / 1e6:,.0f} M "
        f"multiply-adds for a window of {seconds:.2f} s",
        "sizes": _sizes(result),
        "versions": ", ".join(f"{name} {version}" for name, version in provenance["versions"].items()),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _network(run: Run) -> tuple[Any, int]:
    """Return a run's network, and of how many frames its window is."""
    return run.network(), run.front_end.frames(run.window_samples)


def _licensed(corpus: dict[str, str]) -> str:
    name = corpus["name"]
    known = CORPORA[name].licence if name in CORPORA else "licence not stated"
    return f"{name or 'own clips'} ({corpus['licence'] or known})"


def _origin(earlier: dict[str, Any]) -> str:
    """Say of which run's weights a run began, and of which that one did."""
    recipe = earlier["recipe"]
    corpora = ", ".join(corpus["name"] or "own clips" for corpus in earlier["corpora"])
    before = f", which began with {_origin(earlier['from'])}" if earlier.get("from") else ""
    trained = f"{recipe['network']['name']} trained on {earlier['speakers']} speakers of {corpora}"
    hashes = f"split {earlier['split_hash']}, weights {earlier['sha256'][:12]}"
    return f"{trained} for {recipe['training']['epochs']} epochs ({hashes}){before}"


def _teacher(teacher: dict[str, Any]) -> str:
    licence = f" ({teacher['licence']})" if teacher.get("licence") else ""
    corpora = [corpus["name"] if isinstance(corpus, dict) else corpus for corpus in teacher.get("corpora") or ()]
    tuned = f", tuned on {', '.join(corpora)}" if any(corpora) else ""
    return f"{teacher['name']}{licence}{tuned}"


def _sizes(result: Result) -> str:
    run = result.runs[0]
    sizes = {"checkpoint": (run.path / "checkpoint.safetensors").stat().st_size}
    parity = read_parity(result.folder)
    if run.checkpoint_hash in parity.get("checkpoints", {}).values():  # else files of another training
        sizes |= {f"{file['kind']} file": file["bytes"] for file in parity["files"]}
    return ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items())
