"""Measuring a :class:`~edge_runtime.calibration.Calibration` from speech that comes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
from numpy.typing import NDArray

from edge_runtime.calibration import Calibration, refuse_untrained
from edge_runtime.errors import AudioError
from edge_runtime.events import Event, Reason
from edge_runtime.frontend import SMALLEST_STD, FloatArray, Normalization, as_samples, log_mel
from edge_runtime.recognizer import Recognizer
from edge_runtime.session import Session
from edge_runtime.settings import Settings
from edge_runtime.sources import Loss, Source

ENOUGH_S = 30.0
"""Speech to measure; docs/results.md has what less is worth."""

LEAST_S = 5.0
"""Speech below which nothing is said of a person."""

FULL_SCALE = 0.999
"""From here on a sample counts as clipped."""

SpeechProgress = Callable[[float, float], None]
"""Called with the seconds of speech measured and those that are enough."""


class Calibrator:
    """Measures the stretches of speech that a session would answer for. Audio is forgotten once it is measured.

    Args:
        recognizer: a model trained for it.
        settings: what is speech; the defaults when None.

    Raises:
        UsageError: the model was not trained for it.

    Example:
        >>> from pathlib import Path
        >>> calibrator = Calibrator(Recognizer("personal.onnx"))
        >>> while calibrator.seconds < 30:
        ...     calibrator.push(samples)
        >>> calibrator.calibration("my microphone").save(Path("calibration.json"))
    """

    def __init__(self, recognizer: Recognizer, settings: Settings | None = None) -> None:
        refuse_untrained(recognizer.artifact, str(recognizer.path))
        settings = settings or Settings()
        own = replace(settings, mode="utterance", enter=None, exit=None, calibration=None)
        self._session = Session(recognizer, own)
        self._front_end = recognizer.artifact.front_end
        # A segment that still goes on reaches back no further than this.
        self._longest = round(
            (settings.max_segment + settings.padding + settings.hangover + 1.0) * self._front_end.sample_rate
        )
        self._kept = np.zeros(0, np.float32)
        self._kept_from = 0
        self._samples = self._full_scale = self._frames = 0
        self._sums = np.zeros((2, self._front_end.mel_bands))

    @property
    def seconds(self) -> float:
        """Seconds of speech measured so far."""
        return self._samples / self._front_end.sample_rate

    @property
    def clipped(self) -> float:
        """Share of the samples measured that are at full scale: what a microphone cuts off is lost."""
        return self._full_scale / max(1, self._samples)

    def push(self, samples: object) -> None:
        """Take the next samples (n,), at the model's rate, in [-1, 1].

        Raises:
            AudioError: several channels, or samples that are no audio.
        """
        heard = as_samples(samples)
        self._kept = np.concatenate([self._kept, heard])
        self._measure(self._session.push(heard))

    def gap(self, samples: int) -> None:
        """Note that so many samples were lost."""
        self._measure(self._session.gap(samples, Reason.OVERFLOW))
        self._forget(self._session.position)

    def end(self) -> None:
        """Measure the speech that still goes on; what is pushed then is another recording."""
        self.gap(0)

    def hear(self, source: Source, enough: float, patience: float, on_progress: SpeechProgress) -> None:
        """Listen to an open source until enough speech is measured, or until it ends.

        Args:
            source: a microphone, or a recording.
            enough: seconds of speech, those of earlier sources included.
            patience: seconds of audio after which to give up.
            on_progress: called after each block.

        Raises:
            DeviceError: the microphone is lost, where its settings say not to wait for it.
            AudioError: the recording cannot be read.
        """
        began = self._session.position
        for heard in source.blocks():
            if isinstance(heard, Loss):
                continue  # what comes next says how much is missing
            if missing := heard.position - (self._session.position - began):
                self.gap(missing)
            self.push(heard.samples)
            on_progress(self.seconds, enough)
            if self.seconds >= enough or heard.position > patience * self._front_end.sample_rate:
                break
        self.end()

    def calibration(self, source: str) -> Calibration:
        """Return what was measured.

        Args:
            source: what was listened to.

        Raises:
            AudioError: too little speech to measure, less than 5 s.
        """
        if self.seconds < LEAST_S:
            raise AudioError(
                f"{source}: {self.seconds:.1f} s of speech are too little to calibrate on; needed: {LEAST_S:g} s, "
                f"better {ENOUGH_S:g} s"
            )
        constants = constants_of(self._sums, self._frames)
        made = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return Calibration(constants.mean, constants.std, self._front_end, round(self.seconds, 2), made, source)

    def _measure(self, events: list[Event]) -> None:
        """Measure the segments that ended, and forget the audio up to there."""
        for event in events:
            if event.kind == "end" and event.probability is not None:
                start, end = (round(time * self._front_end.sample_rate) for time in (event.start, event.end))
                self._add(self._kept[start - self._kept_from : end - self._kept_from])
                self._forget(end)
        self._forget(self._kept_from + len(self._kept) - self._longest)

    def _forget(self, position: int) -> None:
        """Forget the audio before a sample of the stream."""
        if position > self._kept_from:
            self._kept, self._kept_from = self._kept[position - self._kept_from :], position

    def _add(self, speech: FloatArray) -> None:
        frames = log_mel(speech, self._front_end)
        self._sums += sums_of(frames)
        self._frames += len(frames)
        self._samples += len(speech)
        self._full_scale += int((np.abs(speech) >= FULL_SCALE).sum())


def sums_of(frames: FloatArray) -> NDArray[np.float64]:
    """Return the sums (2, mel_bands) of frames (n, mel_bands) and of their squares.

    Example:
        >>> sums_of(np.array([[1.0], [3.0]], np.float32)).tolist()
        [[4.0], [10.0]]
    """
    values = frames.astype(np.float64)
    return np.stack([values.sum(axis=0), np.square(values).sum(axis=0)])


def constants_of(sums: NDArray[np.float64], frames: int) -> Normalization:
    """Return mean and standard deviation of so many frames from their sums; at least 1 dB, as of statistics that run.

    Example:
        >>> constants_of(np.array([[4.0], [10.0]]), 2)
        Normalization(mean=(2.0,), std=(1.0,), prior_frames=0, memory_frames=0, personal=False)
    """
    mean, power = sums / frames
    std = np.sqrt(np.maximum(power - mean**2, SMALLEST_STD**2))
    return Normalization(tuple(mean.tolist()), tuple(std.tolist()))
