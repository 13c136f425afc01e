"""A model for release: trained on all speakers, vouched for by folds of its recipe."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_artifact import tiny_artifact

from edge_runtime.errors import UsageError
from edge_runtime.recognizer import Recognizer, softmax
from sertool.evaluate import Predictions
from sertool.export.vouch import Vouching, calibrate_by, fit_threshold, vouch, vouched
from sertool.fit import fit
from sertool.report import evaluate_folder
from sertool.run import load_run

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"network__name": "resnet9", "network__width": 0.125, "training__epochs": 2}


@pytest.fixture(scope="module")
def vouched_run(tones: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run on three speakers of two folds' six, and folds that test them once."""
    from sertool.corpora.manifest import load_manifest
    from sertool.corpora.splits import make_split

    folder = tmp_path_factory.mktemp("vouch")
    manifest = load_manifest(tones.manifest)
    make_split(manifest, "kfold:2").save(folder / "kfold.json")
    make_split(manifest, "release").save(folder / "release.json")
    for fold in (1, 2):
        fit(
            tones.recipe(**SMALL, data__split=str(folder / "kfold.json"), data__fold=fold),
            folder / f"folds/fold-{fold}",
        )
    fit(tones.recipe(**SMALL, data__split=str(folder / "release.json")), folder / "release")
    evaluate_folder(folder / "folds")
    return SimpleNamespace(run=folder / "release", folds=folder / "folds")


def test_a_release_hears_everyone_and_tests_nobody(vouched_run: SimpleNamespace, sertool: Any) -> None:
    assert len({clip["speaker"] for clip in load_run(vouched_run.run).trained.values()}) == 6
    outcome = sertool("evaluate", vouched_run.run)
    assert outcome.code == 2 and "has no test speakers" in outcome.err


def test_folds_give_a_release_its_results_and_its_temperature(
    vouched_run: SimpleNamespace, sertool: Any, tmp_path: Path
) -> None:
    file = tmp_path / "model.onnx"
    refused = sertool("export", vouched_run.run, "-o", file)
    assert refused.code == 2 and "not evaluated on test speakers" in refused.err
    outcome = sertool("export", vouched_run.run, "-o", file, "--folds", vouched_run.folds)
    assert outcome.code == 0, outcome.err
    artifact = Recognizer(file).artifact
    pooled = json.loads((vouched_run.folds / "metrics.json").read_text())["test"]
    assert artifact.metrics["test"]["uar"] == pooled["uar"]
    assert artifact.metrics["test"]["speakers"] == 6
    predictions = Predictions.load(vouched_run.folds / "predictions.csv")
    hotter, colder = (replaced_nll(predictions, artifact.temperature * factor) for factor in (1.05, 0.95))
    best = replaced_nll(predictions, artifact.temperature)
    assert best <= hotter and best <= colder
    card = (tmp_path / "model.onnx.md").read_text()
    assert "pooled results of 2 networks of the same recipe (seed 0)" in card
    assert "passed for an emotion" not in card, "nothing is labelled neutral"


def replaced_nll(predictions: Predictions, temperature: float) -> float:
    logits = np.log(np.maximum(predictions.probabilities.astype(np.float64), 1e-38)) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    right = logits[np.arange(len(logits)), predictions.truth]
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - right))


def test_folds_of_another_recipe_cannot_vouch(vouched_run: SimpleNamespace, tones: Any, tmp_path: Path) -> None:
    other = load_run(vouched_run.run)
    changed = other.recipe.model_copy(update={"training": other.recipe.training.model_copy(update={"epochs": 7})})
    with pytest.raises(UsageError, match=r"its training\.epochs is 2, not 7"):
        vouch(replace(other, recipe=changed), vouched_run.folds)


def test_folds_that_were_not_all_evaluated_cannot_vouch(vouched_run: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(vouched_run.folds, tmp_path / "folds")
    (tmp_path / "folds" / "fold-2" / "metrics.json").unlink()
    with pytest.raises(UsageError, match="not evaluated on every fold; run: sertool evaluate"):
        vouch(load_run(vouched_run.run), tmp_path / "folds")
    shutil.rmtree(tmp_path / "folds" / "fold-2")
    with pytest.raises(UsageError, match="lacks folds of its split"):
        vouch(load_run(vouched_run.run), tmp_path / "folds")


def test_folds_vouch_for_what_hears_as_they_did(vouched_run: SimpleNamespace) -> None:
    assert vouch(load_run(vouched_run.run), vouched_run.folds).form == "window"


def test_a_network_that_is_very_sure_loses_no_digits_that_its_temperature_needs(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(scale=25.0, size=(300, 3))
    truth = (logits / 9 + random.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from softmax(logits / 9)
    names = tuple(f"{row}.wav" for row in range(300))
    sure = Predictions(("a", "b", "c"), names, names, names, truth, softmax(logits.astype(np.float32)))
    sure.save(tmp_path / "p.csv")
    found = calibrate_by(Vouching({}, Predictions.load(tmp_path / "p.csv"), {}))
    assert found.temperature == pytest.approx(calibrate_by(Vouching({}, sure, {})).temperature, rel=0.01)
    assert found.temperature == pytest.approx(9, rel=0.25)


LABELS = ("anger", "neutral")


def answers_of(neutral: list[float], anger: list[float], hours: float) -> tuple[Vouching, list[Any]]:
    """Return what folds answer to neutral and angry clips that have these probabilities of anger, and the clips."""
    share = np.array(neutral + anger, np.float32)
    truth = np.array([1] * len(neutral) + [0] * len(anger))
    names = tuple(f"{row}.wav" for row in range(len(share)))
    predictions = Predictions(LABELS, names, names, names, truth, np.stack([share, 1 - share], axis=1))
    samples = np.zeros(round(hours * 3600 * 16000 / len(neutral)), np.float32)
    clips = [
        SimpleNamespace(key=name, label=LABELS[row], read=lambda: samples)
        for name, row in zip(names, truth, strict=True)
    ]
    return Vouching({}, predictions, {}), clips


def alarms_of(neutral: list[float], anger: list[float], hours: float) -> Any:
    vouching, clips = answers_of(neutral, anger, hours)
    return fit_threshold(vouching, 1.0, clips)


def test_the_threshold_is_the_lowest_that_leaves_few_enough_false_alarms() -> None:
    found = alarms_of([0.2, 0.62, 0.713, 0.9], [0.72, 0.95, 0.6], hours=1 / 6)
    # 6 an hour are 1 in ten minutes: the clip at .90 may stay, the one at .713 may not.
    assert found.threshold == pytest.approx(0.72)
    assert (found.false_alarms, found.per_hour, found.neutral_clips) == (1, pytest.approx(6.0), 4)
    assert found.recall == {"anger": pytest.approx(2 / 3)}


def test_no_threshold_is_needed_where_neutral_speech_stays_neutral() -> None:
    found = alarms_of([0.2, 0.4], [0.7, 0.6], hours=0.1)
    assert (found.threshold, found.false_alarms, found.recall) == (0.0, 0, {"anger": 1.0})


def test_neutral_speech_that_is_surely_an_emotion_is_counted() -> None:
    found = alarms_of([1.0, 0.2], [1.0, 0.9], hours=0.01)
    assert (found.threshold, found.false_alarms, found.recall) == (1.0, 1, {"anger": 0.5})


def test_a_little_neutral_speech_allows_no_false_alarm() -> None:
    assert alarms_of([0.3, 0.811], [0.9, 0.8], hours=0.01).threshold == pytest.approx(0.82)


@pytest.mark.parametrize(("neutral", "thresholds"), [(0.811, {"anger": 0.82}), (0.2, {})])
def test_emotions_get_the_threshold_that_neutral_speech_needs(neutral: float, thresholds: dict[str, float]) -> None:
    artifact = replace(tiny_artifact(), labels=LABELS, temperature=1.0, provenance={"export": {"form": "window"}})
    given = vouched(artifact, *answers_of([0.3, neutral], [0.9, 0.8], hours=0.01))
    assert given.thresholds == pytest.approx(thresholds)
    alarms = given.provenance["export"]["alarms"]
    assert (alarms["threshold"], alarms["neutral_clips"]) == (pytest.approx(thresholds.get("anger", 0.0)), 2)


def test_without_a_neutral_label_no_emotion_has_a_threshold() -> None:
    vouching, clips = answers_of([0.3], [0.9], hours=0.01)
    renamed = replace(vouching, predictions=replace(vouching.predictions, labels=("anger", "joy")))
    given = vouched(replace(tiny_artifact(), provenance={"export": {}}), renamed, clips)
    assert given.thresholds == {}
    assert given.provenance["export"]["alarms"] is None
