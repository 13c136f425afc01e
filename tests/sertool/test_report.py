"""Parses what a browser would show; the look itself was judged by eye, light, dark and on a phone."""

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import balanced_accuracy_score

from sertool import report
from sertool.cli import main
from sertool.evaluate import Predictions, evaluate_run, pool, save_evaluation
from sertool.fit import fit
from sertool.recipe import write_recipe
from sertool.report import MISTAKES, Result, report_path, save_report, write_report
from sertool.report_graph import choose_clips, principal_components
from sertool.run import load_folds, load_run

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from browser import CHROMIUM, Browser

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
        entry = save_evaluation(run.path, "test", predictions, run.split_hash)
        save_report(Result(run.path, "test", [run], predictions, entry))
    entry = save_evaluation(folder, "test", pool(predicted), runs[0].split_hash, [1, 2], 2)
    save_report(Result(folder, "test", runs, pool(predicted), entry))
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
    for outside in ("http:", "https:", "//", "@import"):
        assert outside not in page.text
    # Within a drawing, parts refer to each other.
    assert all(place.startswith("#") for place in re.findall(r"url\(([^)]*)", page.text))
    ids = [named["id"] for _, named in page.tags if "id" in named]
    assert {named["href"] for tag, named in page.tags if tag == "use"} <= {f"#{name}" for name in ids}
    links = [named["href"] for tag, named in page.tags if tag == "a"]
    assert links == (["fold-1/report.html", "fold-2/report.html"] if evaluated.name == "R&D <1>" else [])
    assert all((evaluated / str(link)).is_file() for link in links)


def test_markup_in_names_is_shown_as_it_is(evaluated: Path) -> None:
    page = Page(evaluated / "report.html")
    # The only italics are the marks on the scales.
    marks = ("between", "chance", "found", "interval")
    assert all(named.get("class") in marks for tag, named in page.tags if tag == "i")
    assert JOY in page.tables["confusion 0"][0]
    assert [row[0] for row in page.tables["bars 0"]] == sorted(["anger", JOY, "sadness"])
    assert str(evaluated.parent) not in page.text


def test_the_numbers_are_those_of_the_metrics(evaluated: Path) -> None:
    page, metrics = Page(evaluated / "report.html"), json.loads((evaluated / "metrics.json").read_text())["test"]
    assert {name: text for name, text in page.by_id.items() if name.endswith("-1")} == {
        "run-1": "\n",
        "uar-1": percent(metrics["uar"]),
        "accuracy-1": percent(metrics["accuracy"]),
        "items-1": str(metrics["items"]),
        "ece-1": percent(metrics["ece"]),
    }
    for low, high in (metrics["uar_interval"], metrics["accuracy_interval"]):
        assert f"{percent(low)} to {percent(high)})" in page.text
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
    for row, number in zip(page.tables["plain 2"][1:], (1, 2), strict=True):
        with (folder / f"fold-{number}" / "graph.csv").open() as file:
            edges = [row for row in csv.DictReader(file) if row["neighbour"]]
        assert row[:3] == [str(number), "48", str(len(edges))]
        same = [edge["clip"].split("-")[1] == edge["neighbour"].split("-")[1] for edge in edges]
        assert row[4] == percent(np.mean(same))
        assert page.text.count("clips are not drawn") == 1
    by_label, degrees = page.tables["bars 4"], page.tables["bars 5"]
    assert {row[0]: int(row[3]) for row in by_label} == dict.fromkeys(("anger", JOY, "sadness"), 32)
    assert sum(int(row[3]) for row in degrees) == 96


def test_the_surest_mistakes_come_first(folder: Path) -> None:
    with (folder / "predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["truth"] != row["predicted"]]
    shown = Page(folder / "report.html").tables["plain 3"][1:]
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
    entry = save_evaluation(run.path, "test", few, run.split_hash)
    page = Page(save_report(Result(run.path, "test", [run], few, entry)))
    assert "no clip tests joy; the UAR is over the other labels." in page.text
    assert "no interval: one speaker" in page.text and "clips of 1 test speaker," in page.text
    assert "Neighbour graph" not in page.text and "Neighbour loss" not in page.text and "UAR by gender" not in page.text
    assert [row[2] for row in page.tables["bars 0"]][1] == "–"


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
    assert Page(copy / "report.html").by_id["ece-1"] == percent(json.loads(outcome.out)["ece"])
    assert "more in" not in outcome.out


# --- the map of the graph ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mapped(tones: Any, ear: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose graph was made from embeddings that do not lie beside it."""
    folder = tmp_path_factory.mktemp("mapped")
    options = ["--manifest", tones.manifest, "--split", tones.split, "--threshold", 0, "--neighbours", 3]
    command("graph", ear, *options, "-o", folder / "graph")
    values = {"neighbours__graph": str(folder / "graph"), "neighbours__alpha": 1.0, "training__epochs": 1}
    fit(tones.recipe(network__width=0.25, **values), folder / "run")
    command("evaluate", folder / "run")
    return folder / "run"


def drawings(page: Page) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page.text, flags=re.S)


def test_the_map_has_every_clip_and_its_edges(mapped: Path, ear: Path, tmp_path: Path) -> None:
    command("report", mapped, "--embeddings", ear, "-o", tmp_path / "page.html")
    *_, drawing = drawings(Page(tmp_path / "page.html"))
    with (mapped / "graph.csv").open() as file:
        edges = {frozenset((row["clip"], row["neighbour"])) for row in csv.DictReader(file) if row["neighbour"]}
    assert f'aria-label="48 clips and {len(edges)} edges, by label: anger, joy, sadness"' in drawing
    assert drawing.count("<use ") == 48 + 3  # and the legend
    lines = sum(path.count("L") for path in re.findall(r'<path d="(M[^"]*)"[^>]*stroke-width: 0.5', drawing))
    assert lines == len(edges)
    page = Page(tmp_path / "page.html")
    assert "clips are not drawn" not in page.text and "Teacher: ear." in page.text


def test_the_map_needs_the_embeddings_that_the_graph_was_made_from(
    mapped: Path, folder: Path, ear: Path, sertool: Callable[..., Any], tmp_path: Path
) -> None:
    assert sertool("report", mapped, "-o", tmp_path / "page.html").code == 0
    assert "clips are not drawn" in Page(tmp_path / "page.html").text
    outcome = sertool("report", folder, "--embeddings", ear)
    assert outcome.code == 2 and "no graph of these runs was made from these embeddings" in outcome.err
    shutil.copytree(ear, mapped.parent / "embeddings")  # where they usually lie
    assert sertool("report", mapped, "-o", tmp_path / "page.html").code == 0
    assert "clips are not drawn" not in Page(tmp_path / "page.html").text


def test_the_axes_of_the_map_are_principal_components() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 8)) * np.arange(1, 9) + 3
    places, variance = principal_components(vectors)
    oracle = PCA(2).fit(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    expected = oracle.transform(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    np.testing.assert_allclose(np.abs(places), np.abs(expected), atol=1e-9)
    assert variance == pytest.approx(oracle.explained_variance_ratio_.sum())
    np.testing.assert_allclose(principal_components(5 * vectors)[0], places, atol=1e-9)


def test_a_sample_of_the_graph_keeps_edges(mapped: Path) -> None:
    from sertool.graph import load_graph

    graph = load_graph(mapped / "graph.csv")
    for count in (1, 10, 47, 48, 400):
        chosen = choose_clips(graph, count)
        assert len(chosen) == min(count, 48) == len(set(chosen.tolist()))
    ends = graph.edges[np.isin(graph.edges, choose_clips(graph, 20)).all(axis=1)]
    assert len(ends) >= 30  # 20 of 48 at random have 24 of 144 edges among them, or fewer where edges are mutual


def test_a_graph_whose_clips_are_gone(mapped: Path, sertool: Callable[..., Any], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(mapped, copy)
    (copy / "graph.csv").write_text((mapped / "graph.csv").read_text().replace("ada-joy-1.wav", "gone.wav"))
    outcome = sertool("report", copy)
    assert (outcome.code, outcome.out) == (2, "")
    assert "clip 'gone.wav' of the graph" in outcome.err and outcome.err.count("\n") == 1


# --- several runs, and what a run began with -----------------------------------------------------------------------


def test_several_runs_are_compared_with_the_first(folder: Path, sertool: Callable[..., Any], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder / "fold-1", other)
    (run,) = load_folds(other)
    save_evaluation(other, "test", with_skill(evaluate_run(run), 9), run.split_hash)
    outcome = sertool("report", folder / "fold-1", other, "-o", tmp_path / "both.html")
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'both.html'}\n")
    page = Page(tmp_path / "both.html")
    compared = json.loads(sertool("compare", folder / "fold-1", other, "--json").out)
    (found,) = [entry["uar"] for entry in compared["differences"]]
    first, second = page.tables["overall 0"][1:]
    assert [first[0], second[0]] == ["fold-1", "other"] and first[4] == ""
    low, high = (100 * end for end in found["interval"])
    assert second[4].replace("  ", " ") == f"{100 * found['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
    metrics = json.loads((other / "metrics.json").read_text())["test"]
    assert second[2] == page.by_id["uar-2"] == percent(metrics["uar"])
    links = [named["href"] for tag, named in page.tags if tag == "a"]
    assert links == ["#run-1", "#run-2"] and {"run-1", "run-2"} <= set(page.by_id)


def test_runs_of_other_clips_are_shown_but_not_compared(folder: Path, tmp_path: Path) -> None:
    page = Page(write_report([str(folder / "fold-1"), str(folder / "fold-2")], output=tmp_path / "both.html"))
    assert "did not answer the same clips" in page.text
    assert len(page.tables["overall 0"]) == 3 and "difference" not in "".join(page.tables["overall 0"][0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fold-1", "fold-1"], "named twice"),
        (["nowhere"], "nowhere"),
        (["fold-1", "--part", "tset"], "'tset' is unknown"),
        (["fold-1", "--part", "validation"], "sertool evaluate"),
        (["fold-1", "--embeddings", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_reported(folder: Path, sertool: Callable[..., Any], arguments: list[str], said: str) -> None:
    before = sorted(folder.rglob("*"))
    outcome = sertool("report", *(folder / text if text[:4] in ("fold", "nowh") else text for text in arguments))
    assert outcome.code in (1, 2) and said in outcome.err and outcome.err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_weights_that_began_elsewhere_are_of_both_licences(tones: Any, tmp_path: Path) -> None:
    values = {"network__width": 0.25, "training__epochs": 1}
    fit(tones.recipe(**values, data__corpus="ravdess"), tmp_path / "first")
    second = tones.recipe(**values, data__licence="CC0-1.0", training__start=str(tmp_path / "first"))
    fit(second, tmp_path / "second")
    command("evaluate", tmp_path / "second")
    facts = dict(Page(tmp_path / "second" / "report.html").tables["plain 2"])
    assert facts["corpora and licences"] == "tones (CC0-1.0), ravdess (CC BY-NC-SA 4.0, non-commercial)"
    assert facts["began with"].startswith("mobilenet15 trained on 4 speakers of ravdess for 1 epochs (split ")


def test_uar_by_length_is_that_of_its_clips(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LENGTHS_S", (0.2, 0.4))
    run = load_run(folder / "fold-1")
    predictions = Predictions.load(folder / "fold-1" / "predictions.csv")
    result = Result(run.path, "test", [run], predictions, run.metrics["test"])
    cut = [replace(clip, start=0.1, end=0.3 + 0.3 * (row % 2)) for row, clip in enumerate(result.clips) if clip]
    result.__dict__["clips"] = cut
    short, long = report._by_length(result)
    assert (short["name"], short["clips"], long["name"], long["clips"]) == ("to 0.2 s", 12, "over 0.4 s", 12)
    for row, rows in ((short, slice(0, None, 2)), (long, slice(1, None, 2))):
        truth, predicted = predictions.truth[rows], predictions.predicted[rows]
        assert row["share"] == pytest.approx(balanced_accuracy_score(truth, predicted))


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_fits_a_phone_and_a_desk_by_day_by_night_and_on_paper(mapped: Path, ear: Path, tmp_path: Path) -> None:
    page = write_report([str(mapped)], output=tmp_path / "page.html", embeddings=[ear])
    colour = "getComputedStyle(document.querySelector('svg text')).fill"
    colours = {}
    with Browser() as browser:
        for width in (380, 1100):
            for scheme, medium in (("light", "screen"), ("dark", "screen"), ("light", "print"), ("dark", "print")):
                browser.look(width, 900, scheme, medium)
                browser.open(page.as_uri())
                assert browser.evaluate("document.documentElement.scrollWidth") <= width
                heights = browser.evaluate("[...document.querySelectorAll('svg')].map(s => s.clientHeight)")
                assert len(heights) == 4 and min(heights) > 100
                colours[scheme, medium] = browser.evaluate(colour)
                assert browser.complaints == []
    assert colours["light", "screen"] != colours["dark", "screen"]
    assert colours["light", "print"] == colours["dark", "print"]  # paper is white whatever the screen is
