"""What one model says of a stream that is heard: scores, segments' answers, emotions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from edge_runtime.calibration import Calibration
from edge_runtime.emotion import EmotionTracker
from edge_runtime.events import NO_SPEECH, UNCERTAIN, Event, Kind, SegmentAverage, answer
from edge_runtime.frontend import FloatArray
from edge_runtime.gate import BLOCK
from edge_runtime.recognizer import LogMel, Recognizer
from edge_runtime.scoring import StreamScoring, StreamSegment, WindowScoring, WindowSegment
from edge_runtime.segmenter import Segmenter
from edge_runtime.settings import PER_LABEL, Settings

SYLLABLE_S = 0.2
"""Shorter sounds are clicks and knocks; what lasts this long but less than ``min_audio`` may have been speech."""


@dataclass
class _Segment:
    """A stretch of speech; positions are samples of the stream, ``scored`` counts from the segment's beginning."""

    start: int
    onset: int
    next_score: int
    scorer: WindowSegment | StreamSegment
    scored: int = 0
    average: SegmentAverage = field(default_factory=SegmentAverage)


class Reporter:
    """What one model says of a stream that is heard.

    Segments run at the same time for every model. Where exactly one begins is each model's own: not before the end of
    the one that it answered last, and a segment too short for this model leaves no trace.

    Args:
        recognizer: scores the windows.
        settings: see :class:`Session`; what is set for labels that the model lacks does not matter.
        segmenter: hears the stream.
        scores: where ``windows`` and ``coalesced`` are counted, by all models.
        name: what its events carry as ``model``.
        log_mel: what computes the spectrograms of windows, where models share them.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        settings: Settings,
        segmenter: Segmenter,
        scores: Counter[str],
        name: str | None = None,
        log_mel: LogMel | None = None,
    ) -> None:
        self._model = recognizer
        self._segmenter = segmenter
        self._scores = scores
        self._name = name
        self._log_mel = log_mel
        self._emotion = EmotionTracker(recognizer.artifact, settings)
        self._events: list[Event] = []
        self._outlook: tuple[object, ...] = ()
        self.configure(settings, self.calibrated(settings))
        self.forget_stream()

    def calibrated(self, settings: Settings) -> Recognizer:
        """Return the model as settings want it."""
        if settings.calibration is None:
            return self._model
        return self._model.calibrated(Calibration.load(settings.calibration))

    def hears_otherwise(self, recognizer: Recognizer) -> bool:
        """Return whether a calibration changes what the network hears."""
        return recognizer.artifact.normalization != self.recognizer.artifact.normalization

    def configure(self, settings: Settings, recognizer: Recognizer) -> None:
        """Take settings over, and the model as they want it, while no segment is open."""
        self.recognizer = recognizer
        self._settings = self._emotion.settings = _of_labels(settings, recognizer.artifact.labels)
        self._max_segment = self._samples(settings.max_segment)
        self._silence = self._samples(settings.silence)
        outlook = (settings.hop, settings.min_audio, recognizer.artifact.normalization)
        if outlook != self._outlook:
            self._outlook = outlook
            self._scoring = self._new_scoring()  # which has to learn the speaker anew

    def _new_scoring(self) -> WindowScoring | StreamScoring:
        hop, min_audio = self._samples(self._settings.hop), self._samples(self._settings.min_audio)
        if self.recognizer.artifact.form == "stream":
            return StreamScoring(self.recognizer, hop, min_audio)
        return WindowScoring(self.recognizer, hop, min_audio, self._log_mel)

    def _samples(self, seconds: float) -> int:
        return round(seconds * self._segmenter.rate)

    @property
    def context(self) -> int:
        """Samples that a score may look back for: a window, and a hop in a backlog."""
        return self.recognizer.artifact.window_samples + self._scoring.hop

    def forget_stream(self) -> None:
        """Forget everything, the speaker too: what comes is another stream."""
        self._answered = False
        self._too_short: tuple[int, int] | None = None
        self._scoring.reset()
        self._emotion.reset()
        self.restart(0)

    def restart(self, position: int) -> None:
        """Begin afresh at ``position``: what was heard before has nothing to do with what comes."""
        self._segment: _Segment | None = None
        self._segment_end = position
        self._quiet = 0

    def take(self) -> list[Event]:
        """Return what was said since."""
        events, self._events = self._events, []
        return events if self._name is None else [replace(event, model=self._name) for event in events]

    def hear(self, coalesce: bool) -> None:
        """Say what the segmenter's newest block gives rise to."""
        segmenter = self._segmenter
        if not segmenter.speaking:
            if not segmenter.digital_silence:
                self._hear_silence()
            return
        if self._segment is None:
            self._segment = self._open(max(segmenter.segment_start, self._segment_end), segmenter.heard - BLOCK)
        self._follow(self._segment, coalesce)
        if not segmenter.running:
            self._end_segment()

    def stop(self) -> None:
        """End the running segment and the active emotion, where there are."""
        self._end_segment()
        self._events += self._emotion.end()

    def finish(self, length: int) -> None:
        """End a stream of ``length`` samples; see :meth:`edge_runtime.session.Session.finish`."""
        if not self._answered and self._too_short:
            self._say("end", *self._too_short, label=UNCERTAIN)
        elif not self._answered:
            self._say("no_speech", 0, length, label=NO_SPEECH)
        self.forget_stream()

    def lose(self) -> None:
        """Take note that there is audio that was not heard: "nobody spoke" would be more than is known."""
        self._answered = True

    def _hear_silence(self) -> None:
        before, self._quiet = self._quiet, self._quiet + BLOCK
        if before < self._silence <= self._quiet:
            self._answered = True
            self._events += self._emotion.end()
            self._say("no_speech", self._segment_end, self._segmenter.heard, label=NO_SPEECH)

    def _open(self, start: int, onset: int) -> _Segment:
        audio = self._segmenter.segment(start)
        return _Segment(start, onset, start + self._scoring.first, self._scoring.begin(audio))

    def _end_segment(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            self._close(segment, self._segmenter.segment_so_far)

    def _follow(self, segment: _Segment, coalesce: bool) -> None:
        """Give the scores that are due, and cut an endless segment."""
        hop, end = self._scoring.hop, self._segmenter.segment_so_far
        while min(segment.next_score, limit := segment.start + self._max_segment) <= end:
            if segment.next_score <= limit:
                if coalesce and (segment.next_score + hop <= end or segment.next_score < limit <= end):
                    self._scores["coalesced"] += 1
                elif coalesce and self._segmenter.behind:
                    break  # a newer one may fall due in what waits
                else:
                    self._score(segment, segment.next_score)
                segment.next_score += hop
            else:
                self._close(segment, limit)
                self._segment = segment = self._open(limit, limit)
        segment.scorer.keep_up(min(end, segment.next_score) - segment.start)

    def _score(self, segment: _Segment, end: int, closing: bool = False) -> None:
        """Score the last window of the segment's audio up to ``end``."""
        first = not segment.scored
        length = end - segment.start
        probabilities, full = segment.scorer.score(length)
        segment.average.add(probabilities, full)
        news, segment.scored = segment.start + segment.scored, self._scoring.heard(length)
        self._scores["windows"] += 1
        self._answered = True
        if self._settings.mode == "utterance":
            return
        if first or not closing:  # where every score before it was coalesced, the last is the segment's begin
            self._say_of("begin" if first else "update", segment, end)
        self._feel(news, end, probabilities)

    def _close(self, segment: _Segment, end: int) -> None:
        if end < segment.start + self._scoring.shortest:
            if self._segmenter.speech_end - segment.onset >= self._samples(SYLLABLE_S):
                self._too_short = (segment.start, end)
            return
        if self._scoring.heard(end - segment.start) > segment.scored:
            self._score(segment, end, closing=True)
        if self._settings.mode == "utterance":
            self._feel(segment.start, end, segment.average.probabilities)
        self._segment_end = end
        self._quiet = 0
        self._say_of("end", segment, end)

    def _feel(self, start: int, end: int, probabilities: FloatArray) -> None:
        rate = self._segmenter.rate
        self._events += self._emotion.hear(start / rate, end / rate, probabilities)

    def _say_of(self, kind: Kind, segment: _Segment, end: int) -> None:
        fields = answer(segment.average.probabilities, self.recognizer.artifact, self._settings.threshold)
        self._say(kind, segment.start, end, **fields)

    def _say(self, kind: Kind, start: int, end: int, **fields: object) -> None:
        self._events.append(event_at(kind, start, end, self._segmenter.rate, **fields))


def event_at(kind: Kind, start: int, end: int, rate: int, **fields: object) -> Event:
    """Return an event from sample ``start`` to ``end`` of a stream of ``rate`` Hz."""
    return Event(kind, start / rate, end / rate, **fields)  # type: ignore[arg-type]


def _of_labels(settings: Settings, labels: Sequence[str]) -> Settings:
    """Return the settings without what is set for labels that another model has."""
    levels = {setting: getattr(settings, setting) for setting in PER_LABEL}
    own = {
        setting: {label: number for label, number in level.items() if label in labels}
        for setting, level in levels.items()
        if isinstance(level, Mapping)
    }
    return replace(settings, **own)  # type: ignore[arg-type]
