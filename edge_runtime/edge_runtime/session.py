"""From samples to events: gate, recogniser and averaging, without threads, devices or any clock but the samples.

A :class:`Session` is one model's; a :class:`SessionGroup` is several models that hear the same audio.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, log10

import numpy as np

from edge_runtime.calibration import Calibration
from edge_runtime.emotion import EmotionTracker
from edge_runtime.errors import UsageError, nearest
from edge_runtime.events import NO_SPEECH, UNCERTAIN, Event, Kind, SegmentAverage, answer
from edge_runtime.frontend import FloatArray, as_samples
from edge_runtime.gate import BLOCK, LOWEST_DB, Gate
from edge_runtime.recognizer import Recognizer
from edge_runtime.scoring import Audio, StreamScoring, StreamSegment, WindowScoring
from edge_runtime.settings import PER_LABEL, Settings
from edge_runtime.vad import LATENCY_BLOCKS, SAMPLE_RATE, SileroVad

SYLLABLE_S = 0.2
"""Shorter sounds are clicks and knocks; what lasts this long but less than ``min_audio`` may have been speech."""

PEAK_BLOCKS = 4
"""Blocks in which a view looks for the largest sample: as many as come from one look to the next."""


@dataclass(frozen=True)
class Hearing:
    """What a session hears at this moment, for a view that shows it. Levels are dBFS.

    Attributes:
        position: seconds of the stream so far, lost ones included.
        level: of the newest block; -100 in digital silence.
        peak: the largest sample of the newest blocks; 0 is full scale, where a microphone clips.
        floor: the room's.
        threshold: from which a block is speech.
        digital_silence: whether nothing but exact zeros comes, or nothing has come yet.
        pause: seconds since the running speech segment's last loud block; None while no segment runs.
    """

    position: float
    level: float
    peak: float
    floor: float
    threshold: float
    digital_silence: bool
    pause: float | None


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

    With ``mode="utterance"`` a segment gives its ``end`` alone, which is the same. With ``enter``, the scores (in that
    mode: the answers) also say where emotions begin and end; what ends listening ends an emotion first.

    Args:
        recognizer: scores the windows.
        settings: the defaults when None.

    Raises:
        UsageError: a setting by label names a label that the model lacks, or ``calibration`` is none for this model.
        ArtifactError: ``vad`` is not Silero VAD.

    Attributes:
        recognizer: scores the windows, calibrated where the settings say so.
        windows: scores taken so far.
        coalesced: scores left out so far because newer audio waited already; see :meth:`push`.

    Example:
        >>> session = Session(recognizer, Settings(hop=0.25))  # doctest: +SKIP
        >>> for block in blocks:  # doctest: +SKIP
        ...     for event in session.push(block):
        ...         print(event.label)
    """

    def __init__(self, recognizer: Recognizer, settings: Settings | None = None) -> None:
        settings = settings or Settings()
        self._model = recognizer
        self.recognizer = self._calibrated(settings)
        self._rate = recognizer.artifact.front_end.sample_rate
        self._gate = Gate(settings.gate_margin, settings.gate_minimum)
        self._emotion = EmotionTracker(recognizer.artifact, settings)
        self._blocks: deque[FloatArray] = deque()
        self._answered = False
        self._too_short: tuple[int, int] | None = None
        self._outage: str | None = None
        self._coalesce = False
        self.windows = 0
        self.coalesced = 0
        self._scoring = self._new_scoring(settings)
        self._configure(settings, self._voice_detector(settings))
        self._restart(0)

    def _calibrated(self, settings: Settings) -> Recognizer:
        if settings.calibration is None:
            return self._model
        return self._model.calibrated(Calibration.load(settings.calibration))

    def _voice_detector(self, settings: Settings) -> SileroVad | None:
        """Do all of taking settings over that can fail."""
        check_labels(settings, self.recognizer.artifact.labels)
        if settings.vad is None:
            return None
        if self._rate != SAMPLE_RATE:
            raise UsageError(f"settings: vad hears {SAMPLE_RATE} Hz, the model {self._rate} Hz; leave vad out")
        return SileroVad(settings.vad, settings.vad_threshold)

    def _new_scoring(self, settings: Settings) -> WindowScoring | StreamScoring:
        scoring = StreamScoring if self.recognizer.artifact.form == "stream" else WindowScoring
        return scoring(self.recognizer, self._samples(settings.hop), self._samples(settings.min_audio))

    def _configure(self, settings: Settings, vad: SileroVad | None) -> None:
        """Take settings over, while no segment is open."""
        self._settings = self._emotion.settings = settings
        self._vad = vad
        self._hop = self._scoring.hop
        self._max_segment = self._samples(settings.max_segment)
        self._padding = self._samples(settings.padding)
        self._hangover = self._samples(settings.hangover)
        self._silence = self._samples(settings.silence)
        # A score may be taken up to a hangover late, when speech resumes after a pause, and a hop in a backlog.
        kept = self.recognizer.artifact.window_samples + self._hangover + self._padding + self._hop
        self._blocks = deque(self._blocks, ceil(kept / BLOCK) + 2)

    def _samples(self, seconds: float) -> int:
        return round(seconds * self._rate)

    def _restart(self, position: int) -> None:
        """Forget everything heard; the next sample is the stream's sample number ``position``."""
        self._gate.reset()
        if self._vad is not None:
            self._vad.reset()
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

    def hearing(self) -> Hearing:
        """Return what is heard now. For any thread: what it needs is read, or computed from what is kept anyway."""
        newest = list(self._blocks)[-PEAK_BLOCKS:]
        peak = max((float(abs(block).max()) for block in newest), default=0.0)
        return Hearing(
            position=self.position / self._rate,
            level=self._gate.level,
            peak=20.0 * log10(max(peak, 10.0 ** (LOWEST_DB / 20.0))),
            floor=self._gate.floor,
            threshold=self._gate.threshold,
            digital_silence=self._digital_silence,
            pause=(self._heard - self._speech_end) / self._rate if self._segment else None,
        )

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
        self._emotion.reset()
        self._restart(0)
        return events

    def gap(self, samples: int, reason: str) -> list[Event]:
        """Note that audio was lost: end the running segment there and start afresh after it.

        Args:
            samples: how many were lost.
            reason: a stable word for the event, e.g. ``overflow``.

        Returns:
            The ``end`` of the running segment and the ``emotion_end`` of the active emotion, where there are, and the
            ``gap``.
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
            The ``end`` of the running segment and the ``emotion_end`` of the active emotion, where there are, and
                ``source_lost``.
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

    def update(self, settings: Settings) -> list[Event]:
        """Go on with other settings from here. The running segment and the active emotion end, as if the speaker had
        paused; what is known of the room stays. The source's settings (``settings.FIXED``) change nothing here.

        Returns:
            The ``end`` of the running segment and the ``emotion_end`` of the active emotion, where there are.

        Raises:
            SerError: see :class:`Session`; the session is as before.
        """
        recognizer = self._calibrated(settings)
        learn_anew = recognizer.artifact.normalization != self.recognizer.artifact.normalization
        if settings == self._settings and not learn_anew:
            return []
        vad = self._voice_detector(settings)
        events = [*self._end_segment(), *self._emotion.end()]
        self.recognizer = recognizer
        self._gate.margin, self._gate.minimum = settings.gate_margin, settings.gate_minimum
        if learn_anew or (settings.hop, settings.min_audio) != (self._settings.hop, self._settings.min_audio):
            self._scoring = self._new_scoring(settings)  # which has to learn the speaker anew
        self._configure(settings, vad)
        return events

    def _end_audio(self) -> list[Event]:
        return self.push(np.zeros(self._hangover + 2 * BLOCK, np.float32)) + self._emotion.end()

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
        if self._vad is not None:
            speech = self._vad.is_speech(block, loud=speech)
        if self._segment is None and not speech:
            return self._hear_silence(digital=not sound.size)
        if self._segment is None:
            contiguous = self._heard - len(self._blocks) * BLOCK
            late = 0 if self._vad is None else LATENCY_BLOCKS * BLOCK
            start = max(contiguous, block_start - late - self._padding, self._segment_end)
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
        return [*self._emotion.end(), self._event("no_speech", self._segment_end, self._heard, label=NO_SPEECH)]

    def _open(self, start: int, onset: int) -> _Segment:
        return _Segment(start, onset, start + self._scoring.first, self._scoring.begin())

    @property
    def _segment_so_far(self) -> int:
        """Where the running segment would end if nothing more were heard."""
        return min(self._speech_end + self._padding, self._sound_end)

    def _end_segment(self) -> list[Event]:
        segment, self._segment = self._segment, None
        return [] if segment is None else self._close(segment, self._segment_so_far)

    def _follow(self, segment: _Segment) -> list[Event]:
        """Give the scores that are due, cut an endless segment, and end one after the hangover."""
        events: list[Event] = []
        end = self._segment_so_far
        while min(segment.next_score, limit := segment.start + self._max_segment) <= end:
            if segment.next_score <= limit:
                if self._coalesce and (segment.next_score + self._hop <= end or segment.next_score < limit <= end):
                    self.coalesced += 1
                elif self._coalesce and len(self._pending) >= BLOCK:
                    break  # a newer one may fall due in what waits
                else:
                    events += self._score(segment, segment.next_score)
                segment.next_score += self._hop
            else:
                events += self._close(segment, limit)
                self._segment = segment = self._open(limit, limit)
        segment.scorer.keep_up(min(end, segment.next_score) - segment.start, self._audio_of(segment))
        if self._heard - self._speech_end >= self._hangover:
            events += self._end_segment()
        return events

    def _score(self, segment: _Segment, end: int) -> list[Event]:
        """Score the last window of the segment's audio up to ``end``."""
        kind: Kind = "update" if segment.scored else "begin"
        length = end - segment.start
        probabilities, full = segment.scorer.score(length, self._audio_of(segment))
        segment.average.add(probabilities, full)
        news, segment.scored = segment.start + segment.scored, self._scoring.heard(length)
        self.windows += 1
        self._answered = True
        if self._settings.mode == "utterance":
            return []
        return [self._segment_event(kind, segment, end), *self._feel(news, end, probabilities)]

    def _feel(self, start: int, end: int, probabilities: FloatArray) -> list[Event]:
        return self._emotion.hear(start / self._rate, end / self._rate, probabilities)

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
            # Where every score before it was coalesced, it is the segment's begin; else ``end`` says what it says.
            events = [event for event in self._score(segment, end) if event.kind != "update"]
        if self._settings.mode == "utterance":
            events += self._feel(segment.start, end, segment.average.probabilities)
        self._segment_end = end
        self._quiet = 0
        return [*events, self._segment_event("end", segment, end)]

    def _segment_event(self, kind: Kind, segment: _Segment, end: int) -> Event:
        fields = answer(segment.average.probabilities, self.recognizer.artifact, self._settings.threshold)
        return self._event(kind, segment.start, end, **fields)

    def _event(self, kind: Kind, start: int, end: int, **fields: object) -> Event:
        return Event(kind, start / self._rate, end / self._rate, **fields)  # type: ignore[arg-type]


class SessionGroup:
    """Several models that hear the same audio, each in a :class:`Session` of its own.

    It is used as a session is. What is answered carries the name of the model's file as ``model``; what happens to the
    audio (``gap``, ``source_lost``, ``source_restored``) is said once, after the answers that it ends.

    Each has a gate and a spectrogram of its own: a stream's comes in its network's strides, with its speaker's
    statistics, and takes a sixth (ResNet-9) or a ninth (CNN-6) of what a session costs, too little to share.

    Args:
        recognizers: at least one, of the same sample rate and of files that differ in name.
        settings: of them all; what is set by label holds for the models that have the label.

    Raises:
        UsageError: models that cannot be told apart or hear different rates, or a label that none of them has.
        ArtifactError: ``vad`` is not Silero VAD.

    Example:
        >>> group = SessionGroup([Recognizer("mood.onnx"), Recognizer("stress.onnx")])  # doctest: +SKIP
        >>> [event.model for event in group.push(samples)]  # doctest: +SKIP
        ['mood.onnx', 'stress.onnx']
    """

    def __init__(self, recognizers: Sequence[Recognizer], settings: Settings | None = None) -> None:
        _check_group(recognizers)
        settings = settings or Settings()
        self._labels = {recognizer.name: recognizer.artifact.labels for recognizer in recognizers}
        self._check_labels(settings)
        self._sessions = {
            recognizer.name: Session(recognizer, _of_labels(settings, recognizer.artifact.labels))
            for recognizer in recognizers
        }

    @property
    def position(self) -> int:
        """Samples of the stream so far, lost ones included."""
        return next(iter(self._sessions.values())).position

    def hearing(self) -> Hearing:
        """Return what is heard now, which is the same for all: see :meth:`Session.hearing`."""
        return next(iter(self._sessions.values())).hearing()

    @property
    def windows(self) -> int:
        """Scores taken so far, by all."""
        return sum(session.windows for session in self._sessions.values())

    @property
    def coalesced(self) -> int:
        """Scores left out so far, by all."""
        return sum(session.coalesced for session in self._sessions.values())

    def push(self, samples: object, coalesce: bool = False) -> list[Event]:
        """Take the next samples; see :meth:`Session.push`."""
        return self._of_all(lambda _, session: session.push(samples, coalesce))

    def finish(self) -> list[Event]:
        """End the stream; see :meth:`Session.finish`."""
        return self._of_all(lambda _, session: session.finish())

    def gap(self, samples: int, reason: str) -> list[Event]:
        """Note that audio was lost; see :meth:`Session.gap`."""
        return self._of_all(lambda _, session: session.gap(samples, reason))

    def lose(self, reason: str, detail: str | None = None) -> list[Event]:
        """Note that the source is lost; see :meth:`Session.lose`."""
        return self._of_all(lambda _, session: session.lose(reason, detail))

    def restore(self, position: int) -> list[Event]:
        """Note that a lost source is back; see :meth:`Session.restore`."""
        return self._of_all(lambda _, session: session.restore(position))

    def update(self, settings: Settings) -> list[Event]:
        """Go on with other settings from here; see :meth:`Session.update`."""
        self._check_labels(settings)
        return self._of_all(lambda name, session: session.update(_of_labels(settings, self._labels[name])))

    def _check_labels(self, settings: Settings) -> None:
        check_labels(settings, [label for labels in self._labels.values() for label in labels])

    def _of_all(self, ask: Callable[[str, Session], list[Event]]) -> list[Event]:
        events = [(name, event) for name, session in self._sessions.items() for event in ask(name, session)]
        answers = [replace(event, model=name) for name, event in events if event.label is not None]
        first = next(iter(self._sessions))
        return answers + [event for name, event in events if event.label is None and name == first]


def check_labels(settings: Settings, labels: Sequence[str]) -> None:
    """Raise UsageError where something is set for a label that is none of ``labels``."""
    for setting in PER_LABEL:
        level = getattr(settings, setting)
        for label in level if isinstance(level, Mapping) else ():
            if label not in labels:
                raise UsageError(f"settings: {setting} of {label!r}, which the model lacks; {nearest(label, labels)}")


def _of_labels(settings: Settings, labels: Sequence[str]) -> Settings:
    """Return the settings without what is set for labels that another model has."""
    levels = {setting: getattr(settings, setting) for setting in PER_LABEL}
    own = {
        setting: {label: number for label, number in level.items() if label in labels}
        for setting, level in levels.items()
        if isinstance(level, Mapping)
    }
    return replace(settings, **own)  # type: ignore[arg-type]


def _check_group(recognizers: Sequence[Recognizer]) -> None:
    if not recognizers:
        raise UsageError("no model to listen with; give at least one")
    name, times = Counter(recognizer.name for recognizer in recognizers).most_common(1)[0]
    if times > 1:
        raise UsageError(f"{times} models are named {name!r}, and events could not say whose they are; rename one")
    rates = sorted({recognizer.artifact.front_end.sample_rate for recognizer in recognizers})
    if len(rates) > 1:
        raise UsageError(f"models that hear {' and '.join(map(str, rates))} Hz cannot share a source; choose one rate")
