"""From samples to events: what is heard of a stream, and what models say of it. No threads, no clock but the samples.

A :class:`Session` is one model's; a :class:`SessionGroup` is several models that hear the same audio.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log10

from edge_runtime.errors import UsageError, nearest
from edge_runtime.events import Event
from edge_runtime.gate import LOWEST_DB
from edge_runtime.recognizer import Recognizer
from edge_runtime.reporter import Reporter, event_at
from edge_runtime.scoring import RecentLogMel
from edge_runtime.segmenter import Segmenter
from edge_runtime.settings import PER_LABEL, Settings
from edge_runtime.vad import SAMPLE_RATE, SileroVad

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


class _Listening:
    """One stream of audio, which is heard once, and the models that answer."""

    def __init__(self, recognizers: Mapping[str | None, Recognizer], settings: Settings | None) -> None:
        settings = settings or Settings()
        self._rate = next(iter(recognizers.values())).artifact.front_end.sample_rate
        self._scores: Counter[str] = Counter()
        self._outage: str | None = None
        self._segmenter = Segmenter(self._rate, settings)
        log_mel = RecentLogMel() if len(recognizers) > 1 else None
        self._reporters = [
            Reporter(recognizer, settings, self._segmenter, self._scores, name, log_mel)
            for name, recognizer in recognizers.items()
        ]
        self._configure(settings, self._voice_detector(settings))

    def _voice_detector(self, settings: Settings) -> SileroVad | None:
        """Do all of taking settings over that can fail and is the same for all models."""
        labels = [label for reporter in self._reporters for label in reporter.recognizer.artifact.labels]
        check_labels(settings, labels)
        if settings.vad is None:
            return None
        if self._rate != SAMPLE_RATE:
            raise UsageError(f"settings: vad hears {SAMPLE_RATE} Hz, the model {self._rate} Hz; leave vad out")
        return SileroVad(settings.vad, settings.vad_threshold)

    def _configure(self, settings: Settings, vad: SileroVad | None) -> None:
        self._settings = settings
        self._segmenter.configure(settings, vad, max(reporter.context for reporter in self._reporters))

    def _restart(self, position: int) -> None:
        self._segmenter.restart(position)
        for reporter in self._reporters:
            reporter.restart(position)

    @property
    def position(self) -> int:
        """Samples of the stream so far, lost ones included."""
        return self._segmenter.position

    @property
    def windows(self) -> int:
        """Scores taken so far, by all models."""
        return self._scores["windows"]

    @property
    def coalesced(self) -> int:
        """Scores left out so far, by all models, because newer audio waited already; see :meth:`push`."""
        return self._scores["coalesced"]

    def hearing(self) -> Hearing:
        """Return what is heard now. For any thread: what it needs is read, or computed from what is kept anyway."""
        segmenter, gate = self._segmenter, self._segmenter.gate
        newest = list(segmenter.blocks)[-PEAK_BLOCKS:]
        peak = max((float(abs(block).max()) for block in newest), default=0.0)
        return Hearing(
            position=self.position / self._rate,
            level=gate.level,
            peak=20.0 * log10(max(peak, 10.0 ** (LOWEST_DB / 20.0))),
            floor=gate.floor,
            threshold=gate.threshold,
            digital_silence=segmenter.digital_silence,
            pause=(segmenter.heard - segmenter.speech_end) / self._rate if segmenter.running else None,
        )

    def push(self, samples: object, coalesce: bool = False) -> list[Event]:
        """Take the next samples.

        Args:
            samples: (n,) at the models' rate, in [-1, 1], any n.
            coalesce: whether to take, of the scores that fall due in these samples, only the newest of each speech
                segment. For a backlog: live audio that waited because inference could not keep up. Segments and their
                ``end`` events stay what they are; the mean of a segment then has fewer windows.

        Returns:
            The events that they complete, in order; of several models, in that of the models.

        Raises:
            AudioError: several channels, or samples that are no audio; all is as before.
        """
        self._segmenter.push(samples)
        self._hear(coalesce)
        return self._events()

    def _hear(self, coalesce: bool = False) -> None:
        while self._segmenter.hear():
            for reporter in self._reporters:
                reporter.hear(coalesce)

    def _events(self) -> list[Event]:
        return [event for reporter in self._reporters for event in reporter.take()]

    def finish(self) -> list[Event]:
        """End the stream: end the running segment. If there was never an answer, say so: ``uncertain`` where the only
        speech was too short to be scored, ``no_speech`` where there was none.

        Returns:
            The last events. The session may then be used for another stream.
        """
        length = self.position
        self._end_audio()
        for reporter in self._reporters:
            reporter.finish(length)
        self._restart(0)
        return self._events()

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
        self._end_audio()
        self._restart(lost_from + samples)
        return [*self._events(), event_at("gap", lost_from, lost_from + samples, self._rate, reason=reason)]

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
        self._end_audio()
        self._restart(position)
        for reporter in self._reporters:
            reporter.lose()
        self._outage = reason
        lost = event_at("source_lost", position, position, self._rate, reason=reason, detail=detail)
        return [*self._events(), lost]

    def restore(self, position: int) -> list[Event]:
        """Note that a lost source is back, and begin afresh.

        Args:
            position: the next sample's number in the stream: what it would be, had nothing been lost.

        Returns:
            One ``source_restored``, from the loss to ``position``.
        """
        event = event_at("source_restored", self.position, position, self._rate, reason=self._outage)
        self._restart(position)
        self._outage = None
        return [event]

    def update(self, settings: Settings) -> list[Event]:
        """Go on with other settings from here. The running segment and the active emotion end, as if the speaker had
        paused; what is known of the room stays. The source's settings (``settings.FIXED``) change nothing here.

        Returns:
            The ``end`` of the running segment and the ``emotion_end`` of the active emotion, where there are.

        Raises:
            SerError: see the class; all is as before.
        """
        recognizers = [reporter.calibrated(settings) for reporter in self._reporters]
        if settings == self._settings and not any(map(Reporter.hears_otherwise, self._reporters, recognizers)):
            return []
        vad = self._voice_detector(settings)
        for reporter, recognizer in zip(self._reporters, recognizers, strict=True):
            reporter.stop()
            reporter.configure(settings, recognizer)
        self._configure(settings, vad)
        return self._events()

    def _end_audio(self) -> None:
        self._segmenter.push_silence()
        self._hear()
        for reporter in self._reporters:
            reporter.stop()


class Session(_Listening):
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

    Example:
        >>> session = Session(Recognizer("model.onnx"), Settings(hop=1.0))
        >>> events = session.push(samples[:32000]) + session.push(samples[32000:]) + session.finish()
        >>> [event.kind for event in events]
        ['begin', 'update', 'update', 'end']
    """

    def __init__(self, recognizer: Recognizer, settings: Settings | None = None) -> None:
        super().__init__({None: recognizer}, settings)

    @property
    def recognizer(self) -> Recognizer:
        """Scores the windows, calibrated where the settings say so."""
        return self._reporters[0].recognizer


class SessionGroup(_Listening):
    """Several models that hear the same audio.

    It is used as a session is, and each model answers as in a :class:`Session` of its own. What is answered carries the
    name of the model's file as ``model``; what happens to the audio (``gap``, ``source_lost``, ``source_restored``) is
    said once, after the answers that it ends.

    What the models hear alike is computed once: the gate and the VAD, and the log-Mel frames of a speech segment for
    all streams of one front-end. Windows are clips of their own: those of one front-end and one length share theirs.
    Normalisation and network are each model's own.

    Two things differ from sessions of their own. :meth:`update` ends the running segment of all models, also where the
    change is for the labels of one. And a segment that begins right after an update to longer ``padding`` reaches back
    as far as there is audio, which is kept for the model that needs most.

    Args:
        recognizers: at least one, of the same sample rate and of files that differ in name.
        settings: of them all; what is set by label holds for the models that have the label.

    Raises:
        UsageError: models that cannot be told apart or hear different rates, a label that none of them has, or
            ``calibration`` is none for one of them.
        ArtifactError: ``vad`` is not Silero VAD.

    Example:
        >>> group = SessionGroup([Recognizer("mood.onnx"), Recognizer("stress.onnx")])
        >>> [event.model for event in group.push(samples) + group.finish() if event.kind == "end"]
        ['mood.onnx', 'stress.onnx']
    """

    def __init__(self, recognizers: Sequence[Recognizer], settings: Settings | None = None) -> None:
        _check_group(recognizers)
        super().__init__({recognizer.name: recognizer for recognizer in recognizers}, settings)


def check_labels(settings: Settings, labels: Sequence[str]) -> None:
    """Raise UsageError where something is set for a label that is none of ``labels``."""
    for setting in PER_LABEL:
        level = getattr(settings, setting)
        for label in level if isinstance(level, Mapping) else ():
            if label not in labels:
                raise UsageError(f"settings: {setting} of {label!r}, which the model lacks; {nearest(label, labels)}")


def _check_group(recognizers: Sequence[Recognizer]) -> None:
    if not recognizers:
        raise UsageError("no model to listen with; give at least one")
    name, times = Counter(recognizer.name for recognizer in recognizers).most_common(1)[0]
    if times > 1:
        raise UsageError(f"{times} models are named {name!r}, and events could not say whose they are; rename one")
    rates = sorted({recognizer.artifact.front_end.sample_rate for recognizer in recognizers})
    if len(rates) > 1:
        raise UsageError(f"models that hear {' and '.join(map(str, rates))} Hz cannot share a source; choose one rate")
