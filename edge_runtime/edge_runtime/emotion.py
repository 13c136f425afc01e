"""Where emotions begin and end: hysteresis, least duration and refractory time over the scores of a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_runtime.artifact import Artifact
from edge_runtime.events import Event, Kind, rounded
from edge_runtime.frontend import FloatArray
from edge_runtime.settings import HYSTERESIS, Settings, of_label


@dataclass
class _Emotion:
    """One that is active, or that has not lasted long enough to be said; times are seconds of the stream."""

    label: int
    start: float
    end: float
    begun: bool = False
    total: Any = 0.0
    scores: int = 0


class EmotionTracker:
    """Turns the scores of a stream into emotions, of which one at a time is active.

    A label's emotion begins with the score in which it is the most probable and reaches its ``enter``, and goes on,
    also over pauses shorter than ``silence``, until a score gives it less than its ``exit``. Each score accounts for
    the audio since the one before it, so emotions do not overlap. One that ends before ``min_duration`` is never
    mentioned. For ``refractory`` after its end the same label does not begin again; another one may.

    Args:
        artifact: whose labels the scores are of.
        settings: ``enter``, ``exit``, ``min_duration``, ``refractory`` and ``silence``; may be changed as an attribute
            while no emotion is active.

    Example:
        >>> from types import SimpleNamespace
        >>> artifact = SimpleNamespace(labels=("anger", "calm"))
        >>> tracker = EmotionTracker(artifact, Settings(enter={"anger": 0.7}, exit=0.5))
        >>> for second, anger in enumerate([0.6, 0.8, 0.6, 0.4]):
        ...     for event in tracker.hear(second, second + 1, np.array([anger, 1 - anger])):
        ...         print(event.kind, event.start, event.end, event.label, event.probability)
        emotion_begin 1 2 anger 0.8
        emotion_end 1 3 anger 0.7
    """

    def __init__(self, artifact: Artifact, settings: Settings) -> None:
        self._labels = artifact.labels
        self.settings = settings
        self._now: _Emotion | None = None
        self._may_begin: dict[int, float] = {}

    def hear(self, start: float, end: float, probabilities: FloatArray) -> list[Event]:
        """Take the score (classes,) that accounts for the audio from ``start`` to ``end``, in the order of time."""
        events: list[Event] = []
        now = self._now
        if now is not None and (start - now.end >= self.settings.silence or self._is_left(now.label, probabilities)):
            events += self.end()
        if self._now is None:
            self._now = self._entered(start, probabilities)
        if self._now is not None:
            events += self._go_on(self._now, end, probabilities)
        return events

    def end(self) -> list[Event]:
        """End the emotion that is active, if one is: nothing is known of what follows."""
        emotion, self._now = self._now, None
        if emotion is None or not emotion.begun:
            return []
        self._may_begin[emotion.label] = emotion.end + self.settings.refractory
        return [self._event("emotion_end", emotion, emotion.total / emotion.scores)]

    def reset(self) -> None:
        """Forget everything: what comes is another stream."""
        self._now = None
        self._may_begin = {}

    def _entered(self, start: float, probabilities: FloatArray) -> _Emotion | None:
        top = int(np.argmax(probabilities))
        needed = of_label(self.settings.enter, self._labels[top])
        if needed is None or probabilities[top] < needed or start < self._may_begin.get(top, start):
            return None
        return _Emotion(top, start, start)

    def _is_left(self, label: int, probabilities: FloatArray) -> bool:
        name = self._labels[label]
        needed = of_label(self.settings.exit, name)
        if needed is None:
            needed = (of_label(self.settings.enter, name) or 0.0) - HYSTERESIS
        return bool(probabilities[label] < needed)

    def _go_on(self, emotion: _Emotion, end: float, probabilities: FloatArray) -> list[Event]:
        emotion.end = end
        emotion.total = emotion.total + probabilities.astype(np.float64)
        emotion.scores += 1
        if emotion.begun or round(end - emotion.start, 6) < self.settings.min_duration:
            return []
        emotion.begun = True
        return [self._event("emotion_begin", emotion, probabilities)]

    def _event(self, kind: Kind, emotion: _Emotion, probabilities: FloatArray) -> Event:
        by_label = rounded(probabilities, self._labels)
        label = self._labels[emotion.label]
        return Event(kind, emotion.start, emotion.end, label, by_label[label], by_label)
