"""Log-Mel spectrograms in numpy, the same for training and for the device.

The values equal ``10 * log10(max(librosa.feature.melspectrogram(..., center=False, htk=False, norm="slaney"), floor))``
within 2e-4 dB. A stream gives the very same bits as one call on the whole signal, however it is cut into pieces:
every step works on each frame alone, and the mel filters are summed with ``np.add.reduceat``, because a matrix
product may choose another summation order for another number of frames.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import AudioError, UsageError

FloatArray = NDArray[np.float32]

FRAMES_PER_BLOCK = 32
"""Frames transformed per numpy call: larger blocks are hardly faster, smaller ones pay the call overhead."""

LOUDEST = 100.0
"""Floats beyond this, 40 dB over full scale, are integers that nobody scaled; far beyond, float32 would overflow."""


@dataclass(frozen=True)
class FrontEnd:
    """The parameters of the log-Mel spectrogram; the defaults are those of the paper (section 3.2).

    Attributes:
        sample_rate: samples per second, Hz.
        window: samples per frame (and FFT length).
        hop: samples from one frame to the next.
        mel_bands: bands of the Slaney mel scale with Slaney area normalisation.
        min_hz: lower edge of the lowest band, Hz.
        max_hz: upper edge of the highest band, Hz.
        floor: smallest power that is not clipped; 1e-10 is -100 dB.

    Example:
        >>> FrontEnd().frames(95744), FrontEnd().frame_rate
        (373, 62.5)
    """

    sample_rate: int = 16000
    window: int = 512
    hop: int = 256
    mel_bands: int = 64
    min_hz: float = 0.0
    max_hz: float = 8000.0
    floor: float = 1e-10

    @property
    def frame_rate(self) -> float:
        """Frames per second, Hz."""
        return self.sample_rate / self.hop

    def frames(self, samples: int) -> int:
        """Return how many whole frames fit into ``samples`` samples (no padding, no centring)."""
        return max(0, (samples - self.window) // self.hop + 1)

    def samples(self, frames: int) -> int:
        """Return how many samples ``frames`` frames span: the inverse of :meth:`frames`."""
        return self.window + (frames - 1) * self.hop if frames > 0 else 0

    def to_dict(self) -> dict[str, float]:
        """Return the parameters as plain numbers for JSON."""
        return asdict(self)


def mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert mels to Hz on Slaney's scale: linear below 1 kHz, logarithmic above (Auditory Toolbox, 1998)."""
    log_step = np.log(6.4) / 27.0
    return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * np.exp(log_step * (mel - 15.0)))


def hz_to_mel(hz: float) -> float:
    """Convert Hz to mels on Slaney's scale.

    Example:
        >>> round(hz_to_mel(1000.0), 6), round(hz_to_mel(6400.0), 6)
        (15.0, 42.0)
    """
    return hz * 3.0 / 200.0 if hz < 1000.0 else float(15.0 + np.log(hz / 1000.0) * 27.0 / np.log(6.4))


def mel_filters(front_end: FrontEnd) -> NDArray[np.float64]:
    """Return the triangular mel filters, each of unit area in Hz.

    Args:
        front_end: the parameters.

    Returns:
        float64 array (mel_bands, window // 2 + 1), equal to ``librosa.filters.mel(htk=False, norm="slaney")``.

    Raises:
        UsageError: a band is so narrow that no FFT bin falls into it.
    """
    edges_mel = np.linspace(hz_to_mel(front_end.min_hz), hz_to_mel(front_end.max_hz), front_end.mel_bands + 2)
    edges = mel_to_hz(edges_mel)
    bins = np.arange(front_end.window // 2 + 1) * (front_end.sample_rate / front_end.window)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))[:, None]
    empty = np.flatnonzero(~filters.any(axis=1))
    if empty.size:
        raise UsageError(
            f"front-end: mel band {empty[0]} of {front_end.mel_bands} is narrower than one FFT bin; "
            f"use fewer mel_bands or a longer window than {front_end.window}"
        )
    return filters


@lru_cache(maxsize=8)
def _tables(front_end: FrontEnd) -> tuple[FloatArray, NDArray[np.intp], FloatArray, NDArray[np.intp]]:
    """Return the window and the mel filters as (window, FFT bins, weights, first entry of each band)."""
    window = np.hanning(front_end.window + 1)[:-1].astype(np.float32)
    filters = mel_filters(front_end)
    band, bins = np.nonzero(filters)
    return (
        window,
        bins,
        filters[band, bins].astype(np.float32),
        np.searchsorted(band, np.arange(len(filters))),
    )


def _transform(frames: FloatArray, front_end: FrontEnd) -> FloatArray:
    """Turn raw frames (n, window) into log-Mel values (n, mel_bands), in dB."""
    window, bins, weights, first = _tables(front_end)
    spectrum = np.fft.rfft(frames * window, axis=1)
    # numpy 1.x transforms in float64 whatever it is given; from here on both versions agree.
    real, imaginary = spectrum.real.astype(np.float32), spectrum.imag.astype(np.float32)
    power = real * real + imaginary * imaginary
    mel = np.add.reduceat(power[:, bins] * weights, first, axis=1)
    return (10.0 * np.log10(np.maximum(mel, np.float32(front_end.floor)))).astype(np.float32)


def as_samples(samples: object, what: str = "audio", first: int = 0) -> FloatArray:
    """Check that ``samples`` is one channel of finite numbers and return it as float32.

    Args:
        samples: anything numpy can turn into a one-dimensional array; signed integers of 8 to 32 bits are scaled to
            [-1, 1), floats are taken as they are.
        what: how to name the signal in the error, e.g. a file name.
        first: number of the first of them in it.

    Raises:
        AudioError: more than one dimension, another kind of number, or samples that are NaN, infinite or far beyond
            full scale.

    Example:
        >>> as_samples(np.array([-32768, 16384], np.int16))
        array([-1. ,  0.5], dtype=float32)
    """
    array = np.asarray(samples)
    if array.ndim != 1:
        raise AudioError(f"{what}: expected one channel of samples, got an array of shape {array.shape}")
    if array.dtype.kind == "i" and array.dtype.itemsize <= 4:
        return (array / -float(np.iinfo(array.dtype).min)).astype(np.float32)
    if array.dtype.kind != "f":
        raise AudioError(f"{what}: samples of type {array.dtype}; valid: floats, or signed integers of 8 to 32 bits")
    outside = ~(np.abs(array) <= LOUDEST)
    if outside.any():
        at = int(np.argmax(outside))
        raise AudioError(f"{what}: sample {first + at} is {array[at]:g}; valid: finite numbers in [-1, 1]")
    return array.astype(np.float32, copy=False)


class LogMelStream:
    """Log-Mel frames of a signal that arrives in pieces of any size.

    Example:
        >>> stream = LogMelStream()
        >>> signal = np.sin(np.arange(2000) / 7).astype(np.float32)
        >>> pieces = [stream.push(signal[:700]), stream.push(signal[700:])]
        >>> np.array_equal(np.concatenate(pieces), log_mel(signal))
        True
    """

    def __init__(self, front_end: FrontEnd | None = None) -> None:
        self.front_end = front_end or FrontEnd()
        self._pending = np.zeros(0, np.float32)

    def reset(self) -> None:
        """Forget everything heard: the next frame starts at the next sample."""
        self._pending = np.zeros(0, np.float32)

    def push(self, samples: object) -> FloatArray:
        """Take the next samples and return the frames they complete.

        Args:
            samples: (n,) samples in [-1, 1], see :func:`as_samples`.

        Returns:
            float32 (frames, mel_bands) in dB; empty while less than one window is pending.

        Raises:
            AudioError: samples that are not finite or not one channel.
        """
        front_end = self.front_end
        pending = np.concatenate([self._pending, as_samples(samples)])
        count = front_end.frames(len(pending))
        self._pending = pending[count * front_end.hop :]
        if not count:
            return np.zeros((0, front_end.mel_bands), np.float32)
        frames = np.lib.stride_tricks.sliding_window_view(pending, front_end.window)[:: front_end.hop]
        blocks = [
            _transform(frames[start : start + FRAMES_PER_BLOCK], front_end)
            for start in range(0, count, FRAMES_PER_BLOCK)
        ]
        return np.concatenate(blocks)


def log_mel(samples: object, front_end: FrontEnd | None = None) -> FloatArray:
    """Return the log-Mel spectrogram of a whole signal.

    Args:
        samples: (n,) samples in [-1, 1].
        front_end: the parameters; the paper's when None.

    Returns:
        float32 (frames, mel_bands) in dB, frame ``i`` covering samples ``i * hop`` to ``i * hop + window``.

    Raises:
        AudioError: samples that are not finite or not one channel.

    Example:
        >>> log_mel(np.zeros(95744)).shape
        (373, 64)
    """
    return LogMelStream(front_end).push(samples)


def tile_or_cut(samples: FloatArray, length: int) -> FloatArray:
    """Bring a clip to ``length`` samples: repeat it from its beginning, or cut its end (paper, section 3.2).

    Args:
        samples: (n,) with n >= 1.
        length: wanted number of samples.

    Returns:
        (length,) of the same dtype.

    Raises:
        AudioError: an empty clip, which nothing can be repeated from.

    Example:
        >>> tile_or_cut(np.array([1, 2, 3], np.float32), 7)
        array([1., 2., 3., 1., 2., 3., 1.], dtype=float32)
    """
    if not len(samples):
        raise AudioError("cannot fill a window from an empty clip")
    return np.resize(samples, length)


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per mel band: constants, or where statistics that run on begin.

    A device cannot know a speaker's statistics beforehand. It can let them run: every frame is normalised by the mean
    and the deviation of all frames so far, itself included, beginning with ``prior_frames`` imagined ones that have the
    constants' statistics. No frame waits for a later one, so a stream stays exact.

    Attributes:
        mean: one value per mel band, dB, measured on the training speakers.
        std: one positive value per mel band, dB, likewise.
        prior_frames: how many frames heard the constants count for; 0 for constants that stay.
        memory_frames: frames after which older ones begin to count less, see :meth:`RunningNormalizer.forget`;
            0 for none.
        personal: whether the network was also trained on frames normalised by the constants of their speaker's own calm
            speech, so that constants measured on a device may stand in the place of these.

    Example:
        >>> Normalization((1.0,), (2.0,)).apply(np.array([[5.0]], np.float32))
        array([[2.]], dtype=float32)
        >>> Normalization((1.0,), (2.0,), prior_frames=1).apply(np.array([[5.0]], np.float32)).round(3)
        array([[0.816]], dtype=float32)
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    prior_frames: int = 0
    memory_frames: int = 0
    personal: bool = False

    @property
    def runs(self) -> bool:
        """Whether the statistics run on."""
        return self.prior_frames > 0

    def apply(self, frames: FloatArray) -> FloatArray:
        """Return frames (..., n, mel_bands) normalised, float32, where nothing was heard before each first one."""
        if self.runs:
            return RunningNormalizer(self).push(frames)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return ((frames - mean) / std).astype(np.float32)


SMALLEST_STD = 1.0
"""Deviation of running statistics, dB, that is not fallen below: a constant band carries no information."""


class RunningNormalizer:
    """The statistics of one speaker, or of whoever is heard, frame by frame; see :class:`Normalization`.

    However the frames are cut into pieces, the result is the same to the bit: sums are formed one frame after another.

    Args:
        normalization: constant or running; constants stay what they are.

    Example:
        >>> normalizer = RunningNormalizer(Normalization((0.0,), (1.0,), prior_frames=2))
        >>> normalizer.push(np.array([[3.0], [3.0]], np.float32)).round(2)
        array([[1.22],
               [0.9 ]], dtype=float32)
        >>> normalizer.frames
        2
    """

    def __init__(self, normalization: Normalization) -> None:
        self._normalization = normalization
        self.reset()

    def reset(self) -> None:
        """Forget who was heard: back to the constants."""
        mean, std = np.asarray(self._normalization.mean), np.asarray(self._normalization.std)
        prior, memory = self._normalization.prior_frames, self._normalization.memory_frames
        self._weight = float(min(prior, memory) if memory else prior)
        self._sums = self._weight * np.stack([mean, std**2 + mean**2])
        self.frames = 0

    def push(self, frames: FloatArray) -> FloatArray:
        """Take the next frames (..., n, mel_bands) in dB and return them normalised, float32.

        With leading dimensions each is a stream of its own that goes on from the same past, and nothing is remembered.
        """
        if not self._normalization.runs:
            return self._normalization.apply(frames)
        values = np.stack([frames, np.square(frames, dtype=np.float64)])
        first = values[..., :1, :] + np.expand_dims(self._sums, tuple(range(1, values.ndim - 1)))
        sums = np.cumsum(np.concatenate([first, values[..., 1:, :]], axis=-2), axis=-2)
        weights = self._weight + np.arange(1, frames.shape[-2] + 1)[:, None]
        mean, power = sums / weights
        std = np.sqrt(np.maximum(power - mean**2, SMALLEST_STD**2))
        if frames.ndim == 2 and len(frames):
            self._sums, self._weight = sums[:, -1], float(weights[-1, 0])
            self.frames += len(frames)
        normalized: FloatArray = ((frames - mean) / std).astype(np.float32)
        return normalized

    def forget(self) -> None:
        """Let all frames heard so far count for at most ``memory_frames``; called where a stretch of speech begins.

        Not frame by frame, which would cost the device more than it can gain within seconds.
        """
        memory = self._normalization.memory_frames
        if memory and self._weight > memory:
            self._sums *= memory / self._weight
            self._weight = float(memory)
