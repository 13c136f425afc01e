"""The whole chain through the real commands: two synthetic corpora in, one file out, the same answers on the device."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Run = Callable[[Path, str], str]

RECIPE = """\
[data]
manifest = "target/manifest.csv"
split = "target/split.json"
window_samples = 24576
[network]
name = "mobilenet15"
[training]
epochs = 3
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """Return the folder in which the chain has run."""
    folder = tmp_path_factory.mktemp("chain")
    for part, language in (("source", "en"), ("target", "de")):
        run(
            folder,
            f"sertool corpus make synthetic --language {language} --speakers 4 --sentences 2 "
            f"--root {part}/audio -o {part}/manifest.csv",
        )
        run(folder, f"sertool split make {part}/manifest.csv --protocol kfold:2 -o {part}/split.json")
        (folder / part / "recipe.toml").write_text(RECIPE.replace("target", part), encoding="utf-8")
    run(folder, "sertool train source/recipe.toml -o teacher")
    run(folder, "sertool embed target/manifest.csv --teacher teacher -o embeddings")
    run(
        folder,
        "sertool graph embeddings --manifest target/manifest.csv --split target/split.json "
        "--centre --threshold 0 --neighbours 3 -o graph",
    )
    run(folder, "sertool train target/recipe.toml -o run --set neighbours.graph=graph")
    run(folder, "sertool evaluate run")
    run(folder, "sertool export run --precision int8 -o int8.onnx")
    run(folder, "sertool export run --precision fp32 -o fp32.onnx")
    return folder


def predictions(folder: Path) -> list[dict[str, str]]:
    with (folder / "run" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def recognised(folder: Path, model: str, run: Run) -> list[dict[str, object]]:
    files = " ".join(row["file"] for row in predictions(folder))
    return [json.loads(line) for line in run(folder, f"ser-edge file {model} {files} --json").splitlines()]


def probabilities(answers: list[dict[str, object]], labels: list[str]) -> np.ndarray:
    return np.array([[answer["probabilities"][label] for label in labels] for answer in answers])  # type: ignore[index]


@pytest.mark.parametrize(("model", "tolerance"), [("fp32.onnx", 1e-4), ("int8.onnx", 0.15)])
def test_the_device_answers_as_the_evaluation_did(finished: Path, model: str, tolerance: float, run: Run) -> None:
    rows = predictions(finished)
    labels = json.loads(run(finished, f"ser-edge info {model} --json"))["labels"]
    expected = np.array([[float(row[label]) for label in labels] for row in rows])
    found = probabilities(recognised(finished, model, run), labels)
    assert np.abs(found - expected).max() < tolerance
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.9


def test_test_speakers_are_in_no_graph_and_in_no_training(finished: Path) -> None:
    tested = {row["speaker"] for row in predictions(finished)}
    graph = (finished / "run" / "graph.csv").read_text(encoding="utf-8")
    assert tested
    assert not any(f"/{speaker}_" in graph or f"/{speaker}/" in graph for speaker in tested)


def test_metrics_travel_with_the_file(finished: Path, run: Run) -> None:
    metrics = json.loads((finished / "run" / "metrics.json").read_text(encoding="utf-8"))["test"]
    carried = json.loads(run(finished, "ser-edge info int8.onnx --json"))["metrics"]["test"]
    assert carried["uar"] == metrics["uar"]
    assert carried["split_hash"] == json.loads((finished / "target" / "split.json").read_text())["hash"]
