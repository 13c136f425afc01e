"""How the speech segments of a session are scored: window by window, or as a stream.

Positions and lengths are samples of the segment, from its beginning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np

from edge_runtime.frontend import FloatArray, FrontEnd, RunningNormalizer, log_mel
from edge_runtime.recognizer import LogMel, Recognizer
from edge_runtime.segmenter import SegmentAudio

RECENT_WINDOWS = 4
"""Windows that are remembered: so many scores may fall due at once, when speech resumes after a pause."""


class RecentLogMel:
    """:func:`~edge_runtime.frontend.log_mel`, of whatever several models hear one after another, computed once.

    Example:
        >>> recent = RecentLogMel()
        >>> recent(np.ones(512, np.float32), FrontEnd()) is recent(np.ones(512, np.float32), FrontEnd())
        True
    """

    def __init__(self) -> None:
        self._recent: deque[tuple[FrontEnd, FloatArray, FloatArray]] = deque(maxlen=RECENT_WINDOWS)

    def __call__(self, samples: FloatArray, front_end: FrontEnd) -> FloatArray:
        """Return float32 (frames, mel_bands) in dB of samples (n,)."""
        for known, heard, frames in self._recent:
            if known == front_end and np.array_equal(heard, samples):
                return frames
        frames = log_mel(samples, front_end)
        self._recent.append((front_end, samples, frames))
        return frames


class WindowScoring:
    """Every score hears the last window of the segment as a clip of its own.

    Args:
        recognizer: of either form.
        hop: samples between scores.
        min_audio: samples before the first.
        log_mel: what computes the windows' spectrograms, where models share them.

    Attributes:
        hop: samples from one score to the next.
        first: samples before the first score.
        shortest: samples of a segment that can be scored at its end.
    """

    def __init__(self, recognizer: Recognizer, hop: int, min_audio: int, log_mel: LogMel | None = None) -> None:
        self._probabilities = (
            partial(recognizer.probabilities, log_mel=log_mel) if log_mel else recognizer.probabilities
        )
        self._window = recognizer.artifact.window_samples
        self.hop = hop
        self.first = self.shortest = min_audio

    def heard(self, length: int) -> int:
        """Return how much of a segment of ``length`` a score of it hears the end of: all."""
        return length

    def begin(self, audio: SegmentAudio) -> WindowSegment:
        """Return what scores a new segment."""
        return WindowSegment(self._probabilities, self._window, audio)

    def reset(self) -> None:
        """Do nothing: windows know nothing of each other."""


class WindowSegment:
    """The windows of one segment.

    Args:
        probabilities: of a clip.
        window: samples of one.
        audio: of the segment.
    """

    def __init__(self, probabilities: Callable[[FloatArray], FloatArray], window: int, audio: SegmentAudio) -> None:
        self._probabilities = probabilities
        self._window = window
        self._audio = audio

    def keep_up(self, length: int) -> None:
        """Do nothing: a window is heard when it is scored."""

    def score(self, length: int) -> tuple[FloatArray, bool]:
        """Return the probabilities of a segment so far, and whether they heard a whole window."""
        start = max(0, length - self._window)
        return self._probabilities(self._audio.samples(start, length)), length - start == self._window


class StreamScoring:
    """A segment is a stream that begins from a reset; every score pools the features of its last window.

    Scores fall where a feature is complete, so the hop is the nearest multiple of the stride. What comes after the last
    complete feature of a segment, less than a stride, is not heard: its rest would have to be made up.

    Args:
        recognizer: of a stream.
        hop: samples wished between scores.
        min_audio: samples before the first.

    Attributes:
        hop: samples from one score to the next.
        first: samples before the first score.
        shortest: samples of a segment that can be scored at its end: one feature, at least.
    """

    def __init__(self, recognizer: Recognizer, hop: int, min_audio: int) -> None:
        self._recognizer = recognizer
        front_end, stride = recognizer.artifact.front_end, recognizer.artifact.stride
        self._front_end, self._stride = front_end, stride
        self._normalizer = RunningNormalizer(recognizer.artifact.normalization)
        self.hop = max(1, round(hop / (stride * front_end.hop))) * stride * front_end.hop
        self.shortest = max(min_audio, front_end.samples(stride))
        features = front_end.frames(self.shortest) // stride
        complete = front_end.samples(features * stride) == self.shortest
        self.first = front_end.samples((features if complete else features + 1) * stride)

    def heard(self, length: int) -> int:
        """Return how much of a segment of ``length`` its complete features hear."""
        return self._front_end.samples(self._front_end.frames(length) // self._stride * self._stride)

    def reset(self) -> None:
        """Forget the speaker: what comes is another stream."""
        self._normalizer.reset()

    def begin(self, audio: SegmentAudio) -> StreamSegment:
        """Return what scores a new segment, from a reset; only the statistics of the speech before it go on."""
        self._normalizer.forget()
        return StreamSegment(self._recognizer, self.heard, self._normalizer, audio)


class StreamSegment:
    """The stream of one segment: nothing is computed before a score needs it, and then in one pass.

    Args:
        recognizer: of a stream.
        heard: see :meth:`StreamScoring.heard`.
        normalizer: what all segments are normalised by.
        audio: of the segment.
    """

    def __init__(
        self, recognizer: Recognizer, heard: Callable[[int], int], normalizer: RunningNormalizer, audio: SegmentAudio
    ) -> None:
        self._stream = recognizer.stream(normalizer=normalizer)
        self._front_end = recognizer.artifact.front_end
        self._window = recognizer.artifact.window_samples
        self._window_features = recognizer.artifact.window_features
        self._audio = audio
        self._heard_of = heard
        self._heard = 0

    def keep_up(self, length: int) -> None:
        """Hear the segment up to ``length`` where a window waits: audio is not kept for longer."""
        if self._heard_of(length) - self._heard >= self._window:
            self._hear(length)

    def score(self, length: int) -> tuple[FloatArray, bool]:
        """Return the probabilities of a segment so far, and whether they heard a whole window."""
        self._hear(length)
        return self._stream.probabilities(), self._stream.count >= self._window_features

    def _hear(self, length: int) -> None:
        heard = self._heard_of(length)
        if heard > self._heard:
            first, last = self._front_end.frames(self._heard), self._front_end.frames(heard)
            self._stream.push_frames(self._audio.log_mel(self._front_end, first, last))
            self._heard = heard
