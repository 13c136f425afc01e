"""A model to give away is trained on every speaker, so nobody is left to test it: folds of its recipe vouch for it.

Each fold was trained without the speakers that it is tested on. Their answers, pooled, stand for what the released
network does with unknown speakers; they are also what its temperature and its thresholds are fitted on.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.artifact import Artifact
from edge_runtime.errors import UsageError
from sertool.corpora.manifest import Clip
from sertool.evaluate import Predictions, part_name, pool, predictions_path, summarize
from sertool.export.calibrate import Calibration, best_temperature, measure, sharpened
from sertool.metrics import IntArray
from sertool.recipe import decisive
from sertool.run import Run, load_folds, without_speakers

FALSE_ALARMS_PER_HOUR = 6.0
"""Of neutral speech: how often it may pass for an emotion."""

NEUTRAL = "neutral"

ROUNDED_UP = 100
"""Thresholds are multiples of a hundredth."""


@dataclass(frozen=True)
class Vouching:
    """What folds say of a network that was trained like them, on all their speakers.

    Attributes:
        metrics: the pooled entries of ``metrics.json``, by part.
        predictions: the pooled items as the device hears them: in turn, where statistics run on.
        description: which folds, for the record.
    """

    metrics: dict[str, Any]
    predictions: Predictions
    description: dict[str, Any]

    @property
    def form(self) -> str:
        """How the folds heard: as a ``window`` or a ``stream``."""
        return "stream" if self.predictions.streamed else "window"


def vouch(run: Run, folder: str | Path) -> Vouching:
    """Let the folds below a folder vouch for a run.

    Raises:
        UsageError: the folds are of another recipe, other clips or other labels, or were not all evaluated.
    """
    folder = Path(folder)
    folds = load_folds(folder)
    _refuse_other_recipe(run, folds)
    part = part_name("test", "in-turn" if run.normalization.runs else "nothing")
    numbers = [fold.recipe.data.fold for fold in folds]
    if sorted(numbers) != list(range(1, len(folds[0].split.folds) + 1)):
        raise UsageError(f"{folder}: lacks folds of its split; train the others: sertool train --fold all")
    # Of the folds' own items, which vanish with them, not of the pooled ones above them.
    names = dict.fromkeys(["test", part, part_name("test", "calibrated")])
    evaluated = [name for name in names if all(name in fold.metrics for fold in folds)]
    if part not in evaluated:
        turns = " --in-turn" if run.normalization.runs else ""
        raise UsageError(f"{folder}: not evaluated on every fold; run: sertool evaluate {folder}{turns}")
    pooled = {name: _pooled(folds, name) for name in evaluated}
    predictions = pooled[part]
    if set(predictions.keys) != set(run.trained) or predictions.labels != run.labels:
        raise UsageError(f"{folder}: its folds test other clips or labels than {run.path} was trained on")
    description = {
        "folds": len(folds),
        "protocol": folds[0].split.protocol,
        "split_hash": folds[0].split_hash,
        "seeds": sorted({fold.recipe.training.seed for fold in folds}),
        "heard": part,
    }
    metrics = {name: summarize(items) | {"split_hash": folds[0].split_hash} for name, items in pooled.items()}
    return Vouching(metrics, predictions, description)


def _pooled(folds: list[Run], part: str) -> Predictions:
    streamed = folds[0].recipe.network.time_padding == "causal"
    return replace(pool([Predictions.load(predictions_path(fold.path, part)) for fold in folds]), streamed=streamed)


def _refuse_other_recipe(run: Run, folds: list[Run]) -> None:
    ours = _comparable(run)
    for fold in folds:
        theirs = _comparable(fold)
        for section, values in ours.items():
            for key, value in values.items():
                if theirs[section][key] != value:
                    raise UsageError(
                        f"{fold.path}: cannot vouch for {run.path}: its {section}.{key} is "
                        f"{theirs[section][key]!r}, not {value!r}"
                    )


def _comparable(run: Run) -> dict[str, dict[str, Any]]:
    values = decisive(run.recipe)
    del values["data"]["fold"], values["training"]["seed"]
    # Which run a fold begins with differs from fold to fold; that there is one does not.
    values["training"]["start"] = bool(values["training"]["start"])
    return values


def calibrate_by(vouching: Vouching) -> Calibration:
    """Fit the temperature on speakers that each fold had not heard."""
    predictions = vouching.predictions
    logits = np.log(np.maximum(predictions.probabilities, np.finfo(np.float32).tiny))
    temperature, reason = best_temperature(logits, predictions.truth)
    return Calibration(temperature, reason, measure(predictions.probabilities, predictions.truth, temperature), None)


@dataclass(frozen=True)
class Alarms:
    """What a threshold does to neutral speech, and to emotions.

    Attributes:
        threshold: smallest probability at which an emotion is named.
        neutral_clips: clips of neutral speech.
        neutral_hours: their length.
        false_alarms: how many of them pass for an emotion.
        recall: share of each emotion's clips that is still named.
    """

    threshold: float
    neutral_clips: int
    neutral_hours: float
    false_alarms: int
    recall: dict[str, float]

    @property
    def per_hour(self) -> float:
        """False alarms in an hour of neutral speech."""
        return self.false_alarms / self.neutral_hours


def fit_threshold(vouching: Vouching, temperature: float, clips: list[Clip]) -> Alarms | None:
    """Return the lowest threshold of all emotions at which neutral speech raises few enough false alarms.

    One for all: what a corpus of acted speech has of neutral clips does not bear one a label.

    Args:
        vouching: answers to unknown speakers.
        temperature: of the probabilities.
        clips: those that the run was trained on; their lengths make the hours.

    Returns:
        None where no label is called ``neutral``.
    """
    predictions = vouching.predictions
    if NEUTRAL not in predictions.labels:
        return None
    neutral = predictions.labels.index(NEUTRAL)
    probabilities = sharpened(predictions.probabilities, temperature)
    seconds = {clip.key: len(clip.read()) / 16000 for clip in clips if clip.label == NEUTRAL}
    hours = sum(seconds.values()) / 3600
    answered = probabilities.argmax(axis=1)
    alarms = probabilities.max(axis=1)[(predictions.truth == neutral) & (answered != neutral)]
    allowed = int(FALSE_ALARMS_PER_HOUR * hours)
    highest = np.sort(alarms)[::-1]
    # Just above the first alarm that is one too many.
    threshold = 0.0
    if len(highest) > allowed:
        threshold = min((math.floor(float(highest[allowed]) * ROUNDED_UP) + 1) / ROUNDED_UP, 1.0)
    named = np.where(probabilities.max(axis=1) >= threshold, answered, -1)
    return Alarms(
        threshold,
        len(seconds),
        hours,
        int(((named >= 0) & (named != neutral))[predictions.truth == neutral].sum()),
        _recalls(named, predictions, neutral),
    )


def _recalls(named: IntArray, predictions: Predictions, neutral: int) -> dict[str, float]:
    return {
        label: float((named == row)[predictions.truth == row].mean())
        for row, label in enumerate(predictions.labels)
        if row != neutral and (predictions.truth == row).any()
    }


def vouched(artifact: Artifact, vouching: Vouching, clips: list[Clip]) -> Artifact:
    """Return an artifact with the results and the thresholds that folds give it.

    Args:
        artifact: with the temperature that they give it.
        vouching: the folds.
        clips: those that the run was trained on.
    """
    alarms = fit_threshold(vouching, artifact.temperature, clips)
    threshold = alarms.threshold if alarms else 0.0
    export = artifact.provenance["export"] | {
        "vouched_by": vouching.description,
        "alarms": asdict(alarms) if alarms else None,
    }
    return replace(
        artifact,
        metrics=without_speakers(vouching.metrics),
        thresholds={label: threshold for label in artifact.labels if threshold and label != NEUTRAL},
        provenance=artifact.provenance | {"export": export},
    )
