"""Released models: whole, what their cards and recipes say, and the same in both formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tomllib

from edge_runtime.artifact import golden_signal
from edge_runtime.recognizer import Recognizer
from edge_runtime.verify import verify
from sertool.corpora.adapters import CORPORA
from sertool.recipe import decisive, load_recipe, parse_recipe
from sertool.run import without_speakers

ROOT = Path(__file__).parents[2]
MODELS = sorted(path for path in (ROOT / "models").glob("*/*/model.*") if path.suffix != ".md")
FOLDERS = sorted({path.parents[1] for path in MODELS})


def identify(path: Path) -> str:
    return f"{path.parents[1].name}{path.suffix}"


def test_there_is_a_model() -> None:
    assert {path.suffix for path in MODELS} == {".onnx", ".tflite"}


@pytest.mark.parametrize("path", MODELS, ids=identify)
def test_a_model_is_whole_and_its_card_is_the_one_beside_it(path: Path) -> None:
    assert all(check.passed for check in verify(str(path)))
    artifact = Recognizer(path).artifact
    assert artifact.card == path.with_name(f"{path.name}.md").read_text()
    for place in (b"/tmp/", b"/home/", b"/root/", b"/work/"):
        assert place not in path.read_bytes(), "no path of the machine that made it"


@pytest.mark.parametrize("path", MODELS, ids=identify)
def test_a_model_carries_the_recipe_the_results_and_the_licence_of_its_folder(path: Path) -> None:
    folder, artifact = path.parents[1], Recognizer(path).artifact
    # Keys that came to recipes later have their defaults in both.
    made, recipe = parse_recipe(artifact.provenance["recipe"]), load_recipe(folder / "recipe.toml")
    assert decisive(made) == decisive(recipe)
    results = json.loads((folder / "folds.json").read_text())
    assert artifact.metrics == results == without_speakers(results)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert artifact.licence == project["license"]
    texts = {CORPORA[corpus["name"]].licence for corpus in artifact.provenance["corpora"]}
    names = {text.partition(",")[0].replace(" ", "-") for text in texts}  # as SPDX writes them
    # Public domain binds nobody; beside it there may be one licence, which then holds for the weights.
    assert artifact.licence in names and names <= {"CC0-1.0", artifact.licence}
    assert results["test"]["uar"] == pytest.approx(np.mean(list(results["test"]["recall"].values())))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_both_formats_give_the_same_answers(folder: Path) -> None:
    onnx, tflite = (Recognizer(next(folder.glob(f"*/model{suffix}"))) for suffix in (".onnx", ".tflite"))
    for seconds in (0.3, 2.0, 7.5):
        clip = golden_signal(round(seconds * 16000)) + np.random.default_rng(0).normal(0, 0.01, round(seconds * 16000))
        assert np.array_equal(onnx.logits(clip), tflite.logits(clip))
