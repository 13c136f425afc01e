"""Calibration: probabilities that mean what they say, by one temperature fitted on validation speakers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from edge_runtime.frontend import FloatArray
from edge_runtime.recognizer import softmax
from sertool.audio import content_hash
from sertool.corpora.manifest import Clip
from sertool.evaluate import Predictions, predictions_path
from sertool.metrics import IntArray, expected_calibration_error, negative_log_likelihood
from sertool.networks import Student, predict, predict_beginnings
from sertool.run import Run

HOTTEST = 20.0
"""Temperatures from 1/20 to 20 are tried: beyond, a network is either always or never sure."""


BINS = 10
"""Of the expected calibration error: those of ``sertool evaluate``."""


@dataclass(frozen=True)
class Calibration:
    """A temperature and what it does.

    Attributes:
        temperature: divides the logits before the softmax; 1 where none was fitted.
        reason: why none was fitted; empty where one was.
        validation: what it does to validation speakers, see :func:`measure`; None where there are none.
        test: what it does to speakers who had no say in it, see :func:`measure`; None where they were not heard so.
    """

    temperature: float
    reason: str
    validation: dict[str, Any] | None
    test: dict[str, Any] | None


def validation_clips(run: Run) -> tuple[list[Clip], str]:
    """Return the clips that a temperature may be fitted on, and why there are none; never those of a test speaker."""
    if not run.fold.validation:
        return [], "the split has no validation speakers"
    if "validation" in run.recipe.data.parts:
        return [], "the validation speakers were trained on"
    clips = run.clips("validation")
    if any(content_hash(path) in run.heard_audio for path in {clip.path for clip in clips}):
        return [], "the run that it was trained from heard the validation speakers"
    return [clip for clip in clips if clip.label in run.labels], ""


def predict_as(form: str, network: Student, window: FloatArray, frames: int) -> FloatArray:
    """Return the network's logits (classes,) of a clip as a file of a form hears it.

    Args:
        form: ``window``, or ``stream``: once, from its beginning.
        network: causal for a stream.
        window: float32 (frames, mel_bands), the normalised window that the clip is repeated or cut to.
        frames: how many the clip itself has.
    """
    logits: FloatArray = (
        predict(network, window[None])
        if form == "window"
        else predict_beginnings(network, window[None], np.array([frames]))
    )[0]
    return logits


def calibrate(
    run: Run, clips: Sequence[Clip], logits: FloatArray, reason: str = "", form: str = "window"
) -> Calibration:
    """Fit the temperature of a run.

    Args:
        run: evaluated on test speakers or not; what is stored of it tells what the temperature does to them.
        clips: of validation speakers; with none, the temperature is 1.
        logits: (N, classes), the network's answers to them.
        reason: why there are no clips.
        form: in which the clips are heard.
    """
    temperature, validation = 1.0, None
    if clips:
        truth = np.array([run.labels.index(clip.label) for clip in clips])
        temperature, reason = best_temperature(logits, truth)
        validation = measure(softmax(logits), truth, temperature)
    path = predictions_path(run.path, "test")
    heard_alike = run.metrics.get("test", {}).get("form", "window") == form
    test = Predictions.load(path) if path.is_file() and "test" in run.metrics and heard_alike else None
    observed = measure(test.probabilities, test.truth, temperature) if test else None
    return Calibration(temperature, reason, validation, observed)


def best_temperature(logits: FloatArray, truth: IntArray) -> tuple[float, str]:
    """Return the fitted temperature, or 1 and why there is none."""
    if np.array_equal(logits.argmax(axis=1), truth):
        return 1.0, "every validation clip is answered rightly, so that no temperature is too low"
    temperature = fit_temperature(logits, truth)
    if temperature > 0.99 * HOTTEST:
        return 1.0, "validation clips are answered no better than by guessing, so that no temperature is too high"
    return temperature, ""


def fit_temperature(logits: FloatArray, truth: IntArray) -> float:
    """Return the temperature with the least negative log-likelihood (Guo et al., 2017, section 4.2).

    It never changes which label is most probable.

    Args:
        logits: (N, classes).
        truth: (N,) positions of the true labels.

    Returns:
        between 1/20 and 20.

    Example:
        Sure of every answer, and right in three of four:

        >>> logits = np.array([[8.0, 0.0]] * 4, np.float32)
        >>> temperature = fit_temperature(logits, np.array([0, 0, 0, 1]))
        >>> round(float(softmax(logits[0] / temperature)[0]), 3)
        0.75
    """

    def loss(logarithm: float) -> float:
        return negative_log_likelihood(softmax(logits / np.float32(np.exp(logarithm))), truth)

    found = minimize_scalar(loss, bounds=(-np.log(HOTTEST), np.log(HOTTEST)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def sharpened(probabilities: FloatArray, temperature: float) -> FloatArray:
    """Return what probabilities (N, classes) at temperature 1 are at another one.

    Example:
        >>> sharpened(np.array([[0.8, 0.2]]), 2.0).round(3)
        array([[0.667, 0.333]], dtype=float32)
    """
    logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny)) / temperature
    return softmax(logits.astype(np.float32))


def measure(probabilities: FloatArray, truth: IntArray, temperature: float) -> dict[str, Any]:
    """Return how well probabilities (N, classes) at temperature 1 are calibrated, before and after another one.

    Returns:
        ``clips``; ``ece`` and ``nll`` (nats), each a pair; ``bins`` of the ECE.
    """
    pair = [probabilities, sharpened(probabilities, temperature)]
    return {
        "clips": len(truth),
        "ece": [expected_calibration_error(each, truth, BINS) for each in pair],
        "nll": [negative_log_likelihood(each, truth) for each in pair],
        "bins": BINS,
    }
