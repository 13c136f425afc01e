"""What listening gives an application: events, and the averaging and thresholds behind their labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Literal

import numpy as np

from edge_runtime.artifact import Artifact
from edge_runtime.frontend import FloatArray
from edge_runtime.settings import PerLabel, of_label

EVENT_VERSION = 1
UNCERTAIN = "uncertain"
NO_SPEECH = "no_speech"

Kind = Literal[
    "begin", "update", "end", "emotion_begin", "emotion_end", "no_speech", "gap", "source_lost", "source_restored"
]


SOURCE_KINDS = ("gap", "source_lost", "source_restored")
"""Kinds of events about the source of the audio."""


class Reason(str, Enum):
    """Why audio is missing: the ``reason`` of an event. A code keeps its name and its meaning from version to version.

    Example:
        >>> str(Reason.STALLED), Reason.STALLED == "stalled"
        ('stalled', True)
    """

    OVERFLOW = "overflow"
    """``gap``: inference or the application fell behind by more than ``Settings.buffer``, or PortAudio said that it
    had lost a buffer. The oldest audio was dropped."""
    DROPOUT = "dropout"
    """``gap``: less audio came than time passed, and nobody said so: lost before it reached this program."""
    DAMAGED = "damaged"
    """``gap``: samples came that are no audio: NaN, infinite, or far beyond full scale."""
    ABSENT = "absent"
    """``source_lost``: no such microphone, or no sound server, when listening began."""
    REFUSED = "refused"
    """``source_lost``: the microphone was there when listening began and could not be opened: in use, or broken."""
    DEVICE_GONE = "device_gone"
    """``source_lost``: the stream ended by itself: unplugged, or the sound server died."""
    STALLED = "stalled"
    """``source_lost``: nothing came for ``Settings.stall`` though the stream is open: suspended, or frozen."""
    DIGITAL_SILENCE = "digital_silence"
    """``source_lost``: nothing but exact zeros for ``Settings.digital_silence``: muted, or unplugged behind a sound
    server that plays zeros in its place."""

    __str__ = str.__str__


@dataclass(frozen=True)
class Event:
    """One line of the answer to "who felt what, when".

    Attributes:
        kind: ``begin`` (first score of a speech segment), ``update`` (each hop), ``end`` (the segment's final
            answer), ``emotion_begin`` and ``emotion_end`` (with ``Settings(enter=...)``: an emotion begins, and ends
            before another begins; see :class:`~edge_runtime.emotion.EmotionTracker`), ``no_speech`` (nobody spoke),
            ``gap`` (audio was lost between start and end; nothing heard before it counts after it), ``source_lost``
            (from here on nothing is heard), ``source_restored`` (it is again; between start and end it was not, and
            nothing heard before counts after it).
        start: beginning of the stretch it speaks of, seconds of the stream.
        end: its end, seconds of the stream.
        label: one of the model's labels, ``uncertain`` or ``no_speech``.
        probability: of the most probable label, in [0, 1]; also given when the answer is ``uncertain``.
        probabilities: of every label.
        reason: for ``gap``, ``source_lost`` and ``source_restored``, one of :class:`Reason`.
        detail: for ``source_lost``, a line for people: what is wrong, where, and what to do.
        health: for ``gap``, ``source_lost`` and ``source_restored`` that a listener gave, what it has been through:
            :class:`~edge_runtime.listener.Health` as a dictionary.
        wall: when a listener gave the event, ISO 8601 with the offset from UTC; None where no clock is involved.
        model: whose answer it is, where several models listen: its file's name.

    Example:
        >>> print(Event("no_speech", 0.0, 2.5, label="no_speech").to_json())
        {"v": 1, "kind": "no_speech", "start": 0.0, "end": 2.5, "label": "no_speech"}
    """

    kind: Kind
    start: float
    end: float
    label: str | None = None
    probability: float | None = None
    probabilities: dict[str, float] | None = None
    reason: str | None = None
    detail: str | None = None
    health: dict[str, Any] | None = None
    wall: str | None = None
    model: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the version and the fields that are set, ready for JSON."""
        present = {name: value for name, value in asdict(self).items() if value is not None}
        return {"v": EVENT_VERSION, **present}

    def to_json(self) -> str:
        """Return the event as one line of JSON."""
        return json.dumps(self.to_dict())


def answer(probabilities: FloatArray, artifact: Artifact, threshold: PerLabel) -> dict[str, Any]:
    """Turn probabilities into a label, or into ``uncertain``.

    Args:
        probabilities: (classes,) that sum to 1.
        artifact: whose labels and thresholds hold.
        threshold: smallest probability for every label, or by label; the artifact's where none is given.

    Returns:
        The fields ``label``, ``probability`` and ``probabilities`` of an :class:`Event`, to six decimals.
    """
    top = int(np.argmax(probabilities))
    label = artifact.labels[top]
    given = of_label(threshold, label)
    needed = artifact.thresholds.get(label, 0.0) if given is None else given
    by_label = rounded(probabilities, artifact.labels)
    return {
        "label": label if probabilities[top] >= needed else UNCERTAIN,
        "probability": by_label[label],
        "probabilities": by_label,
    }


def rounded(probabilities: FloatArray, labels: Sequence[str]) -> dict[str, float]:
    """Return the probability of each label to six decimals.

    Example:
        >>> rounded(np.array([0.75, 0.25], np.float32), ("calm", "joy"))
        {'calm': 0.75, 'joy': 0.25}
    """
    return {label: round(float(p), 6) for label, p in zip(labels, probabilities, strict=True)}


class SegmentAverage:
    """The probabilities of a speech segment from those of its windows.

    While the segment is shorter than the network's window, each score has heard all that the one before it heard,
    and replaces it: a short segment's answer is that of the whole segment, as in training. From the first full
    window on, the answer is the mean of all full windows (soft voting over a segment beats its single windows:
    AES e-lib 22745; Jeon et al.).

    Example:
        >>> average = SegmentAverage()
        >>> average.add(np.array([1.0, 0.0]), full=False)
        >>> average.add(np.array([0.6, 0.4]), full=True)
        >>> average.add(np.array([0.2, 0.8]), full=True)
        >>> average.probabilities
        array([0.4, 0.6])
    """

    def __init__(self) -> None:
        self._partial: Any = None
        self._sum: Any = 0.0
        self._windows = 0

    def add(self, probabilities: FloatArray, full: bool) -> None:
        """Take a score (classes,); ``full`` when it heard a whole window."""
        if full:
            self._sum = self._sum + probabilities.astype(np.float64)
            self._windows += 1
        else:
            self._partial = probabilities

    @property
    def probabilities(self) -> FloatArray:
        """The segment's probabilities so far, (classes,)."""
        mean: FloatArray = self._sum / self._windows if self._windows else self._partial
        return mean
