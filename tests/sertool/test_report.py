"""Parses what a browser would show; the look itself was judged by eye, light, dark and on a phone."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sertool.cli import main
from sertool.evaluate import Predictions, evaluate_run, pool, save_evaluation
from sertool.fit import fit
from sertool.recipe import write_recipe
from sertool.report import MISTAKES, report_path, save_report
from sertool.run import load_folds, load_run

pytestmark = pytest.mark.usefixtures("one_thread")

JOY = """<i>joy & "fun"</i> 'n' more"""
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """A page as text by place: ids, cells of tables by class, and everything that could lead elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.by_id: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self._place = self._table = ""
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.tags.append((tag, named))
        if tag not in VOID:
            self.open.append(tag)
        self._place = named.get("id") or ""
        if tag == "table":
            self._table = f"{named['class']} {sum(name.startswith(str(named['class'])) for name in self.tables)}"
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        if tag == "table":
            self._table = ""

    def handle_data(self, data: str) -> None:
        if self._place and self._place not in self.by_id:
            self.by_id[self._place] = data
        if self._table and self.open[-1] in ("td", "th", "small", "a") and self.tables[self._table]:
            self.tables[self._table][-1][-1] += f" {data.strip()}" if self.open[-1] == "small" else data


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def command(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("sys.argv", ["sertool", *map(str, arguments)])
        main()
    assert not stop.value.code


@pytest.fixture(scope="module")
def folder(tones: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds, with a graph, trained for an epoch on labels and into a folder that would be markup."""
    corpus = tmp_path_factory.mktemp("report") / "corpus"
    shutil.copytree(tones.folder, corpus)
    manifest = corpus / "manifest.csv"
    quoted = JOY.replace('"', '""')
    manifest.write_text(manifest.read_text().replace(",joy,", f',"{quoted}",'))
    copy = replace(tones, folder=corpus, graph=corpus / "graph")
    recipe = copy.recipe(graph=True, training__epochs=2, network__width=0.25)
    (corpus / "recipe.toml").write_text(write_recipe(recipe))
    folder = corpus / "R&D <1>"
    command("train", corpus / "recipe.toml", "--fold", "all", "-o", folder)
    runs = load_folds(folder)
    predicted = [with_skill(evaluate_run(run), seed) for seed, run in enumerate(runs)]
    for run, predictions in zip(runs, predicted, strict=True):
        save_evaluation(run.path, "test", predictions, run.split_hash)
        save_report(run.path, "test", [run], predictions)
    save_evaluation(folder, "test", pool(predicted), runs[0].split_hash, [1, 2], 2)
    save_report(folder, "test", runs, pool(predicted))
    return folder


def with_skill(predictions: Predictions, seed: int) -> Predictions:
    """Replace the answers of a network that has learnt nothing yet by some that differ in all they are counted by."""
    rng = np.random.default_rng(seed)
    classes = len(predictions.labels)
    logits = rng.normal(size=(len(predictions.truth), classes)) + 1.5 * np.eye(classes)[predictions.truth]
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return replace(predictions, probabilities=shares.astype(np.float32))


@pytest.fixture(params=["pooled", "fold"])
def evaluated(request: Any, folder: Path) -> Path:
    return folder if request.param == "pooled" else folder / "fold-2"


def test_a_report_stands_alone_and_closes_what_it_opens(evaluated: Path) -> None:
    page = Page(evaluated / "report.html")
    assert not page.open
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
    for outside in ("http:", "https:", "//", "@import", "url("):
        assert outside not in page.text
    links = [named["href"] for tag, named in page.tags if tag == "a"]
    assert links == (["fold-1/report.html", "fold-2/report.html"] if evaluated.name == "R&D <1>" else [])
    assert all((evaluated / str(link)).is_file() for link in links)


def test_markup_in_names_is_shown_as_it_is(evaluated: Path) -> None:
    page = Page(evaluated / "report.html")
    # The only italics are the marks on the scale.
    assert all(named.get("class") in ("between", "chance", "found") for tag, named in page.tags if tag == "i")
    assert JOY in page.tables["confusion 0"][0]
    assert [row[0] for row in page.tables["bars 0"]] == sorted(["anger", JOY, "sadness"])
    assert str(evaluated.parent) not in page.text


def test_the_numbers_are_those_of_the_metrics(evaluated: Path) -> None:
    page, metrics = Page(evaluated / "report.html"), json.loads((evaluated / "metrics.json").read_text())["test"]
    assert page.by_id == {
        "uar": percent(metrics["uar"]),
        "accuracy": percent(metrics["accuracy"]),
        "items": str(metrics["items"]),
        "ece": percent(metrics["ece"]),
    }
    low, high = metrics["uar_interval"]
    assert f"{percent(low)} to {percent(high)}" in page.text
    confusion = np.array(metrics["confusion"])
    shares = confusion / confusion.sum(axis=1, keepdims=True)
    assert page.tables["confusion 0"][1:] == [
        [label, *(f"{count} {100 * share:.0f} %" for count, share in zip(counts, row, strict=True))]
        for label, counts, row in zip(metrics["labels"], confusion, shares, strict=True)
    ]
    for number, kind in enumerate(("recall", "speakers", "genders")):
        assert {row[0]: row[2] for row in page.tables[f"bars {number}"]} == {
            name: percent(share) for name, share in metrics[kind].items()
        }
    clips = {row[0]: int(row[3]) for row in page.tables["bars 1"]}
    assert clips == dict.fromkeys(metrics["speakers"], 12)


def test_folds_are_listed_with_their_own_numbers(folder: Path) -> None:
    rows = Page(folder / "report.html").tables["plain 0"][1:]
    for number, row in enumerate(rows, start=1):
        metrics = json.loads((folder / f"fold-{number}" / "metrics.json").read_text())["test"]
        assert row[0] == str(number)
        assert row[1] == ", ".join(metrics["speakers"])
        assert row[2:5] == [str(metrics["items"]), percent(metrics["uar"]), percent(metrics["accuracy"])]
    assert len(rows) == 2


def test_the_graph_is_that_of_the_runs(folder: Path) -> None:
    page = Page(folder / "report.html")
    assert "Teacher: ideal teacher." in page.text
    for row, number in zip(page.tables["plain 1"][1:], (1, 2), strict=True):
        with (folder / f"fold-{number}" / "graph.csv").open() as file:
            edges = [row for row in csv.DictReader(file) if row["neighbour"]]
        assert row[:3] == [str(number), "48", str(len(edges))]
        same = [edge["clip"].split("-")[1] == edge["neighbour"].split("-")[1] for edge in edges]
        assert row[4] == percent(np.mean(same))
    degrees = page.tables["bars 3"]
    assert sum(int(row[3]) for row in degrees) == 96


def test_the_surest_mistakes_come_first(folder: Path) -> None:
    with (folder / "predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["truth"] != row["predicted"]]
    shown = Page(folder / "report.html").tables["plain 2"][1:]
    assert len(shown) == min(MISTAKES, len(rows)) > 0
    surest = sorted((float(row[row["predicted"]]) for row in rows), reverse=True)
    assert [row[4] for row in shown] == [percent(sure) for sure in surest[: len(shown)]]
    told = {(r["file"], r["speaker"], r["truth"], r["predicted"], percent(float(r[r["truth"]]))) for r in rows}
    assert {(*row[:4], row[5]) for row in shown} <= told


def test_a_single_speaker_of_some_labels_and_no_graph(tones: Any, tmp_path: Path) -> None:
    fit(tones.recipe(training__epochs=2, network__width=0.25), tmp_path / "base")
    run = load_run(tmp_path / "base")
    whole = evaluate_run(run, "validation" if run.fold.validation else "test")
    chosen = [row for row, key in enumerate(whole.keys) if key.startswith("cyd") and "joy" not in key]

    def of(values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(values[row] for row in chosen)

    few: Predictions = replace(
        whole,
        keys=of(whole.keys),
        speakers=of(whole.speakers),
        genders=("",) * len(chosen),
        truth=whole.truth[chosen],
        probabilities=whole.probabilities[chosen],
    )
    save_evaluation(run.path, "test", few, run.split_hash)
    page = Page(save_report(run.path, "test", [run], few))
    assert "no clip tests joy; the UAR is over the other labels." in page.text
    assert "no interval: one speaker" in page.text and "clips of 1 test speaker," in page.text
    assert "Neighbour graph" not in page.text and "Neighbour loss" not in page.text and "UAR by gender" not in page.text
    assert [row[2] for row in page.tables["bars 0"]][1] == "–"
    (curve,) = [named["points"] for tag, named in page.tags if tag == "polyline"]
    assert len(str(curve).split()) == 2  # epochs


def test_the_command_says_where_and_each_part_has_its_own(
    folder: Path, sertool: Callable[..., Any], tmp_path: Path
) -> None:
    copy = tmp_path / "runs"
    shutil.copytree(folder, copy)
    outcome = sertool("evaluate", copy / "fold-1", "--part", "train")
    assert outcome.out.endswith(f"more in {copy / 'fold-1' / 'report-train.html'}\n")
    page = Page(report_path(copy / "fold-1", "train"))
    assert "clips of 4 train speakers" in page.text and "unheard" not in page.text
    assert (copy / "fold-1" / "report.html").read_bytes() == (folder / "fold-1" / "report.html").read_bytes()
    outcome = sertool("evaluate", copy, "--json")
    assert Page(copy / "report.html").by_id["ece"] == percent(json.loads(outcome.out)["ece"])
    assert "more in" not in outcome.out
