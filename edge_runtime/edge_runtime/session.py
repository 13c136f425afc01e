"""From samples to events: gate, recogniser and averaging, without threads, devices or any clock but the samples."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil

import numpy as np

from edge_runtime.events import NO_SPEECH, UNCERTAIN, Event, Kind, SegmentAverage, answer
from edge_runtime.frontend import FloatArray, as_samples
from edge_runtime.gate import BLOCK, Gate
from edge_runtime.recognizer import Recognizer
from edge_runtime.scoring import Audio, StreamScoring, StreamSegment, WindowScoring
from edge_runtime.settings import Settings

SYLLABLE_S = 0.2
"""Shorter sounds are clicks and knocks; what lasts this long but less than ``min_audio`` may have been speech."""


@dataclass
class _Segment:
    """A stretch of speech; positions are samples of the stream, ``scored`` counts from the segment's beginning."""

    start: int
    onset: int
    next_score: int
    scorer: WindowScoring | StreamSegment
    scored: int = 0
    average: SegmentAverage = field(default_factory=SegmentAverage)


class Session:
    """One stream of audio and the events it gives.

    A speech segment opens at the first loud block, reaches back by ``padding`` and ends when ``hangover`` has passed
    without a loud block; its audio ends ``padding`` after the last one. Once it holds ``min_audio``, the last window
    of it is scored every ``hop``, and once more at its end; :mod:`edge_runtime.scoring` says how, and on what grid a
    stream's scores fall.

    Exact digital zeros are no audio: they neither begin nor prolong a segment, and after a block of them the stream
    is cut into blocks afresh from the first other sample on. So a clip gives the same events wherever it stands
    between digital zeros, and the end of a stream counts as digital silence without end. However the stream is cut
    into pieces, the events are the same.

    Args:
        recognizer: scores the windows.
        settings: the defaults when None.

    Attributes:
        windows: scores taken so far.
        coalesced: scores left out so far because newer audio waited already; see :meth:`push`.

    Example:
        >>> session = Session(recognizer, Settings(hop=0.25))  # doctest: +SKIP
        >>> for block in blocks:  # doctest: +SKIP
        ...     for event in session.push(block):
        ...         print(event.label)
    """

    def __init__(self, recognizer: Recognizer, settings: Settings | None = None) -> None:
        self._recognizer = recognizer
        self._settings = settings = settings or Settings()
        self._rate = recognizer.artifact.front_end.sample_rate
        window = recognizer.artifact.window_samples
        scoring = StreamScoring if recognizer.artifact.form == "stream" else WindowScoring
        self._scoring = scoring(recognizer, self._samples(settings.hop), self._samples(settings.min_audio))
        self._hop = self._scoring.hop
        self._max_segment = self._samples(settings.max_segment)
        self._padding = self._samples(settings.padding)
        self._hangover = self._samples(settings.hangover)
        self._silence = self._samples(settings.silence)
        self._gate = Gate(settings.gate_margin, settings.gate_minimum)
        # A score may be taken up to a hangover late, when speech resumes after a pause, and a hop in a backlog.
        kept = window + self._hangover + self._padding + self._hop
        self._blocks: deque[FloatArray] = deque(maxlen=ceil(kept / BLOCK) + 2)
        self._answered = False
        self._too_short: tuple[int, int] | None = None
        self._outage: str | None = None
        self._coalesce = False
        self.windows = 0
        self.coalesced = 0
        self._restart(0)

    def _samples(self, seconds: float) -> int:
        return round(seconds * self._rate)

    def _restart(self, position: int) -> None:
        """Forget everything heard; the next sample is the stream's sample number ``position``."""
        self._gate.reset()
        self._blocks.clear()
        self._pending = np.zeros(0, np.float32)
        self._heard = position
        self._segment: _Segment | None = None
        self._sound_end = position
        self._speech_end = position
        self._segment_end = position
        self._quiet = 0
        self._digital_silence = True

    @property
    def position(self) -> int:
        """Samples of the stream so far, lost ones included."""
        return self._heard + len(self._pending)

    def push(self, samples: object, coalesce: bool = False) -> list[Event]:
        """Take the next samples.

        Args:
            samples: (n,) at the model's rate, in [-1, 1], any n.
            coalesce: whether to take, of the scores that fall due in these samples, only the newest of each speech
                segment. For a backlog: live audio that waited because inference could not keep up. Segments and their
                ``end`` events stay what they are; the mean of a segment then has fewer windows.

        Returns:
            The events that they complete, in order.

        Raises:
            AudioError: several channels, or samples that are no audio; the session is as before.
        """
        self._pending = np.concatenate([self._pending, as_samples(samples)])
        self._coalesce = coalesce
        events: list[Event] = []
        while (block := self._next_block()) is not None:
            events += self._hear(block)
        return events

    def finish(self) -> list[Event]:
        """End the stream: end the running segment. If there was never an answer, say so: ``uncertain`` where the only
        speech was too short to be scored, ``no_speech`` where there was none.

        Returns:
            The last events. The session may then be used for another stream.
        """
        length = self.position
        events = self._end_audio()
        if not self._answered:
            too_short = self._too_short
            events.append(
                self._event("end", *too_short, label=UNCERTAIN)
                if too_short
                else self._event("no_speech", 0, length, label=NO_SPEECH)
            )
        self._answered = False
        self._too_short = None
        self._scoring.reset()
        self._restart(0)
        return events

    def gap(self, samples: int, reason: str) -> list[Event]:
        """Note that audio was lost: end the running segment there and start afresh after it.

        Args:
            samples: how many were lost.
            reason: a stable word for the event, e.g. ``overflow``.

        Returns:
            The running segment's ``end``, if there was one, and the ``gap``.
        """
        lost_from = self.position
        events = [*self._end_audio(), self._event("gap", lost_from, lost_from + samples, reason=reason)]
        self._restart(lost_from + samples)
        return events

    def lose(self, reason: str, detail: str | None = None) -> list[Event]:
        """Note that the source is lost: end the running segment here. What is heard next follows :meth:`restore`.

        Args:
            reason: one of :class:`~edge_runtime.events.Reason`, or a stable word of the application's.
            detail: a line for people.

        Returns:
            The running segment's ``end``, if there was one, and ``source_lost``.
        """
        position = self.position
        events = [*self._end_audio(), self._event("source_lost", position, position, reason=reason, detail=detail)]
        self._restart(position)
        self._answered = True  # "nobody spoke" would be more than is known
        self._outage = reason
        return events

    def restore(self, position: int) -> list[Event]:
        """Note that a lost source is back, and begin afresh.

        Args:
            position: the next sample's number in the stream: what it would be, had nothing been lost.

        Returns:
            One ``source_restored``, from the loss to ``position``.
        """
        event = self._event("source_restored", self.position, position, reason=self._outage)
        self._restart(position)
        self._outage = None
        return [event]

    def _end_audio(self) -> list[Event]:
        return self.push(np.zeros(self._hangover + 2 * BLOCK, np.float32))

    def _next_block(self) -> FloatArray | None:
        if self._digital_silence:
            sound = np.flatnonzero(self._pending)
            skipped = int(sound[0]) if sound.size else len(self._pending)
            self._pending = self._pending[skipped:]
            self._heard += skipped
            self._digital_silence = not sound.size
        if len(self._pending) < BLOCK:
            return None
        block, self._pending = self._pending[:BLOCK], self._pending[BLOCK:]
        return block

    def _hear(self, block: FloatArray) -> list[Event]:
        block_start = self._heard
        self._heard += BLOCK
        self._blocks.append(block)
        sound = np.flatnonzero(block)
        if sound.size:
            self._sound_end = block_start + int(sound[-1]) + 1
        speech = self._gate.is_speech(block)
        if self._segment is None and not speech:
            return self._hear_silence(digital=not sound.size)
        if self._segment is None:
            contiguous = self._heard - len(self._blocks) * BLOCK
            start = max(contiguous, block_start - self._padding, self._segment_end)
            self._segment = self._open(start, block_start)
        if speech:
            self._speech_end = self._heard
        return self._follow(self._segment)

    def _hear_silence(self, digital: bool) -> list[Event]:
        if digital:
            self._digital_silence = True
            self._blocks.clear()
            return []
        before, self._quiet = self._quiet, self._quiet + BLOCK
        if not before < self._silence <= self._quiet:
            return []
        self._answered = True
        return [self._event("no_speech", self._segment_end, self._heard, label=NO_SPEECH)]

    def _open(self, start: int, onset: int) -> _Segment:
        return _Segment(start, onset, start + self._scoring.first, self._scoring.begin())

    def _follow(self, segment: _Segment) -> list[Event]:
        """Give the scores that are due, cut an endless segment, and end one after the hangover."""
        events: list[Event] = []
        end = min(self._speech_end + self._padding, self._sound_end)
        while min(segment.next_score, limit := segment.start + self._max_segment) <= end:
            if segment.next_score <= limit:
                if self._coalesce and (segment.next_score + self._hop <= end or segment.next_score < limit <= end):
                    self.coalesced += 1
                elif self._coalesce and len(self._pending) >= BLOCK:
                    break  # a newer one may fall due in what waits
                else:
                    events.append(self._score(segment, segment.next_score))
                segment.next_score += self._hop
            else:
                events += self._close(segment, limit)
                self._segment = segment = self._open(limit, limit)
        segment.scorer.keep_up(min(end, segment.next_score) - segment.start, self._audio_of(segment))
        if self._heard - self._speech_end >= self._hangover:
            events += self._close(segment, end)
            self._segment = None
        return events

    def _score(self, segment: _Segment, end: int) -> Event:
        """Score the last window of the segment's audio up to ``end``."""
        kind: Kind = "update" if segment.scored else "begin"
        length = end - segment.start
        probabilities, full = segment.scorer.score(length, self._audio_of(segment))
        segment.average.add(probabilities, full)
        segment.scored = self._scoring.heard(length)
        self.windows += 1
        self._answered = True
        return self._segment_event(kind, segment, end)

    def _audio_of(self, segment: _Segment) -> Audio:
        def audio(first: int, last: int) -> FloatArray:
            kept = np.concatenate(self._blocks)
            offset = segment.start - (self._heard - len(kept))
            return kept[offset + first : offset + last]

        return audio

    def _close(self, segment: _Segment, end: int) -> list[Event]:
        if end < segment.start + self._scoring.shortest:
            if self._speech_end - segment.onset >= self._samples(SYLLABLE_S):
                self._too_short = (segment.start, end)
            return []
        events: list[Event] = []
        if self._scoring.heard(end - segment.start) > segment.scored:
            last = self._score(segment, end)
            if last.kind == "begin":  # every score before it was coalesced; no segment ends without having begun
                events.append(last)
        self._segment_end = end
        self._quiet = 0
        return [*events, self._segment_event("end", segment, end)]

    def _segment_event(self, kind: Kind, segment: _Segment, end: int) -> Event:
        fields = answer(segment.average.probabilities, self._recognizer.artifact, self._settings.threshold)
        return self._event(kind, segment.start, end, **fields)

    def _event(self, kind: Kind, start: int, end: int, **fields: object) -> Event:
        return Event(kind, start / self._rate, end / self._rate, **fields)  # type: ignore[arg-type]
