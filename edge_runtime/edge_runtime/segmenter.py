"""Where speech runs in a stream of audio: blocks, energy gate, VAD, and what is heard of each speech segment.

All of it is the same for every model that hears the stream, and so is computed once for all of them.
"""

from __future__ import annotations

from collections import deque
from math import ceil
from weakref import WeakValueDictionary

import numpy as np

from edge_runtime.frontend import FloatArray, FrontEnd, LogMelStream, as_samples
from edge_runtime.gate import BLOCK, Gate
from edge_runtime.settings import Settings
from edge_runtime.vad import LATENCY_BLOCKS, SileroVad


class Segmenter:
    """Judges a stream block by block: is it speech, and does a speech segment run.

    Exact digital zeros are no audio: after a block of them outside a segment, the stream is cut into blocks afresh from
    the first other sample on. Positions are samples of the stream, lost ones included.

    Args:
        rate: of the stream, Hz.
        settings: see :meth:`configure`.

    Attributes:
        rate: see above.
        gate: the energy gate.
        vad: what judges the blocks that are loud enough for it, or None.
        blocks: the newest blocks, as many as may be needed.
        kept: the most samples that are in them.
        heard: where the newest block ends.
        sound_end: where the newest sound ends: the last sample that was not zero.
        speech_end: where the newest block of speech ends.
        speaking: whether the newest block belongs to a speech segment.
        running: whether that segment goes on after it.
        digital_silence: whether nothing but exact zeros comes, or nothing has come yet.
    """

    def __init__(self, rate: int, settings: Settings) -> None:
        self.rate = rate
        self.gate = Gate(settings.gate_margin, settings.gate_minimum)
        self.blocks: deque[FloatArray] = deque()
        self.configure(settings)
        self.restart(0)

    def configure(self, settings: Settings, vad: SileroVad | None = None, context: int = 0) -> None:
        """Take settings over and end the running segment; what is known of the room stays.

        Args:
            settings: of gate, hangover and padding.
            vad: what judges the blocks that are loud enough, or None.
            context: samples before the end of a segment that a model may ask for.
        """
        self.gate.margin, self.gate.minimum = settings.gate_margin, settings.gate_minimum
        self.vad = vad
        self._padding = round(settings.padding * self.rate)
        self._hangover = round(settings.hangover * self.rate)
        # A score may be taken up to a hangover late, when speech resumes after a pause.
        kept = ceil((context + self._hangover + self._padding) / BLOCK) + 2
        self.blocks = deque(self.blocks, kept)
        self.kept = kept * BLOCK
        self.running = False

    def restart(self, position: int) -> None:
        """Forget everything heard; the next sample is the stream's sample number ``position``."""
        self.gate.reset()
        if self.vad is not None:
            self.vad.reset()
        self.blocks.clear()
        self._segments: WeakValueDictionary[int, SegmentAudio] = WeakValueDictionary()
        self._pending = np.zeros(0, np.float32)
        self.heard = self.sound_end = self.speech_end = position
        self.speaking = self.running = False
        self.digital_silence = True

    @property
    def position(self) -> int:
        """Samples of the stream so far."""
        return self.heard + len(self._pending)

    @property
    def behind(self) -> bool:
        """Whether a whole block waits."""
        return len(self._pending) >= BLOCK

    @property
    def segment_so_far(self) -> int:
        """Where the running segment would end if nothing more were heard."""
        return min(self.speech_end + self._padding, self.sound_end)

    @property
    def segment_start(self) -> int:
        """How far back a segment reaches that opens with the newest block."""
        contiguous = self.heard - len(self.blocks) * BLOCK
        late = 0 if self.vad is None else LATENCY_BLOCKS * BLOCK
        return max(contiguous, self.heard - BLOCK - late - self._padding)

    def push(self, samples: object) -> None:
        """Take the next samples (n,), which :meth:`hear` then hears.

        Raises:
            AudioError: several channels, or samples that are no audio; nothing was taken.
        """
        self._pending = np.concatenate([self._pending, as_samples(samples)])

    def push_silence(self) -> None:
        """Take digital silence that ends whatever runs."""
        self.push(np.zeros(self._hangover + 2 * BLOCK, np.float32))

    def hear(self) -> bool:
        """Judge the next block; return whether there was a whole one."""
        if self.digital_silence:
            self._skip_zeros()
        if len(self._pending) < BLOCK:
            return False
        block, self._pending = self._pending[:BLOCK], self._pending[BLOCK:]
        sound = _length_of_sound(block)
        if sound:
            self.sound_end = self.heard + sound
        self.heard += BLOCK
        self.blocks.append(block)
        speech = self.gate.is_speech(block)
        if self.vad is not None:
            speech = self.vad.is_speech(block, loud=speech)
        if speech:
            self.speech_end = self.heard
        self.speaking = speech or self.running
        self.running = self.speaking and self.heard - self.speech_end < self._hangover
        if not self.speaking and not sound:
            self.digital_silence = True
            self.blocks.clear()
        return True

    def _skip_zeros(self) -> None:
        sound = np.flatnonzero(self._pending)
        skipped = int(sound[0]) if sound.size else len(self._pending)
        self._pending = self._pending[skipped:]
        self.heard += skipped
        self.digital_silence = not sound.size

    def segment(self, start: int) -> SegmentAudio:
        """Return what is heard of the segment from ``start`` on: the same object to all while one of them holds it."""
        segment = self._segments.get(start)
        if segment is None:
            self._segments[start] = segment = SegmentAudio(self, start)
        return segment


def _length_of_sound(block: FloatArray) -> int:
    """Return the samples of a block up to its last one that is not zero."""
    if block[-1]:  # nearly always, and a twentieth of the time
        return len(block)
    sound = block.nonzero()[0]
    return int(sound[-1]) + 1 if sound.size else 0


class SegmentAudio:
    """The newest samples of a speech segment and their log-Mel frames, each computed once for all who ask.

    Positions are samples, or frames, from the segment's beginning.

    Args:
        segmenter: what hears the stream.
        start: where in it the segment begins.
    """

    def __init__(self, segmenter: Segmenter, start: int) -> None:
        self._segmenter = segmenter
        self._start = start
        self._spectrograms: dict[FrontEnd, _Spectrogram] = {}

    def samples(self, first: int, last: int) -> FloatArray:
        """Return the samples from ``first`` to ``last``; at least the last window of them is there."""
        kept = np.concatenate(self._segmenter.blocks)
        offset = self._start - (self._segmenter.heard - len(kept))
        return kept[offset + first : offset + last]

    def log_mel(self, front_end: FrontEnd, first: int, last: int) -> FloatArray:
        """Return the frames from ``first`` to ``last`` in dB, float32 (last - first, mel_bands).

        Whoever asks begins with 0 and goes on where it left off, so that none is left out. As many are kept as there is
        audio for: whoever lags behind the others finds here what it would find there.
        """
        spectrogram = self._spectrograms.get(front_end)
        if spectrogram is None:
            spectrogram = _Spectrogram(front_end, front_end.frames(self._segmenter.kept))
            self._spectrograms[front_end] = spectrogram
        if last > spectrogram.count:
            spectrogram.push(self.samples(front_end.samples(spectrogram.count), front_end.samples(last)))
        return spectrogram.frames(first, last)


class _Spectrogram:
    """The newest ``keep`` log-Mel frames of a segment; ``count`` is of all so far."""

    def __init__(self, front_end: FrontEnd, keep: int) -> None:
        self._log_mel = LogMelStream(front_end)
        self._kept = np.zeros((0, front_end.mel_bands), np.float32)
        self._keep = keep
        self.count = 0

    def push(self, samples: FloatArray) -> None:
        frames = self._log_mel.push(samples)
        self._kept = np.concatenate([self._kept, frames])[-self._keep :]
        self.count += len(frames)

    def frames(self, first: int, last: int) -> FloatArray:
        oldest = self.count - len(self._kept)
        return self._kept[first - oldest : last - oldest]
