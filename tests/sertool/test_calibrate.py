"""Calibration: the temperature is the best one, is fitted on validation speakers alone, and is 1 where none can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.special

from edge_runtime.frontend import FrontEnd, Normalization
from sertool.corpora.manifest import load_manifest
from sertool.corpora.splits import Fold, Split
from sertool.export.calibrate import calibrate, fit_temperature, sharpened, validation_clips
from sertool.recipe import parse_recipe, write_recipe
from sertool.run import Run, StudentDescription, describe_clips, save_trained


def draw(temperature: float, items: int = 20000) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and truths that are right as often as softmax(logits / temperature) says."""
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(items, 4)).astype(np.float32)
    chances = scipy.special.softmax(logits / temperature, axis=1)
    return logits, (chances.cumsum(axis=1) < rng.random((items, 1))).sum(axis=1).clip(max=3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5, 8.0])
def test_the_temperature_that_made_the_truths_is_found(temperature: float) -> None:
    assert fit_temperature(*draw(temperature)) == pytest.approx(temperature, rel=0.05)


def test_no_other_temperature_is_better() -> None:
    logits, truth = draw(2.0, items=60)
    grid = np.geomspace(0.1, 10, 400)
    losses = [-scipy.special.log_softmax(logits / t, axis=1)[np.arange(60), truth].mean() for t in grid]
    assert fit_temperature(logits, truth) == pytest.approx(grid[int(np.argmin(losses))], rel=0.02)


def test_probabilities_are_reheated_as_their_logits_would_be() -> None:
    logits, _ = draw(1.0, items=50)
    warm = sharpened(scipy.special.softmax(logits, axis=1), 1.7)
    np.testing.assert_allclose(warm, scipy.special.softmax(logits / 1.7, axis=1), atol=1e-6)


def run_of(tones, folder: Path, fold: Fold, parts: list[str]) -> Run:
    Split("by hand", 0, (fold,)).save(folder / "split.json")
    recipe = parse_recipe({"data": {"manifest": str(tones.manifest), "split": "split.json", "parts": parts}})
    (folder / "recipe.toml").write_text(write_recipe(recipe))
    trained = [clip for clip in load_manifest(tones.manifest).clips if clip.speaker in fold.train]
    save_trained(folder, describe_clips(trained))
    student = StudentDescription(("anger", "joy", "sadness"), FrontEnd(), Normalization((0.0,) * 64, (1.0,) * 64), 8448)
    return Run(folder, recipe, student)


VALIDATED = Fold(train=("ada", "dov"), validation=("bea", "eli"), test=("cyd", "fox"))
PLAIN = Fold(train=("ada", "dov"), validation=(), test=("cyd", "fox"))


def test_only_validation_speakers_are_heard(tones, tmp_path: Path) -> None:
    clips, reason = validation_clips(run_of(tones, tmp_path, VALIDATED, ["train"]))
    assert ({clip.speaker for clip in clips}, len(clips), reason) == ({"bea", "eli"}, 24, "")


@pytest.mark.parametrize(
    ("fold", "parts", "reason"),
    [(PLAIN, ["train"], "no validation speakers"), (VALIDATED, ["train", "validation"], "were trained on")],
)
def test_without_them_the_card_can_say_why(tones, tmp_path: Path, fold: Fold, parts: list[str], reason: str) -> None:
    run = run_of(tones, tmp_path, fold, parts)
    clips, why = validation_clips(run)
    assert clips == [] and reason in why
    calibration = calibrate(run, clips, np.zeros((0, 3), np.float32), why)
    assert (calibration.temperature, calibration.reason) == (1.0, why)
    assert calibration.validation is None and calibration.test is None


@pytest.mark.parametrize("right", [True, False])
def test_all_right_or_all_wrong_gives_no_temperature(tones, tmp_path: Path, right: bool) -> None:
    run = run_of(tones, tmp_path, VALIDATED, ["train"])
    clips, _ = validation_clips(run)
    truth = np.array([run.labels.index(clip.label) for clip in clips])
    logits = 5 * np.eye(3, dtype=np.float32)[truth if right else (truth + 1) % 3]
    calibration = calibrate(run, clips, logits)
    assert calibration.temperature == 1.0
    assert ("rightly" if right else "by guessing") in calibration.reason
