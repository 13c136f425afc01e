"""Noise in log-Mel spectrograms: what a device hears beside a speaker.

Powers of independent sounds add up, on average, in every mel band as they do in the air, so training clips can be put
into noise without their audio. Loudness is that of the power summed over all bands, each weighted by its width.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edge_runtime.frontend import FloatArray, FrontEnd, hz_to_mel, mel_filters, mel_to_hz
from sertool.features import ClipFrames

SNR_DB = (0.0, 30.0)
"""Signal-to-noise ratios in training, from those in which people raise their voices to those of a quiet room."""

TILT_DB = (-30.0, 5.0)
"""By how much hiss is louder in the highest mel band than in the lowest: from traffic and fans to the noise of a cheap
microphone; white noise is 0."""

VOICES = 4
"""Most voices of a babble: with more it becomes hiss."""

STROKE_S = (0.12, 0.8)
"""Time between the strokes of music: from a fast dance to a slow song."""

TONES = 4
"""Most tones of a stroke."""

TONE_HZ, DRUM_HZ = (55.0, 1000.0), (100.0, 8000.0)
"""Lowest partials of tones, from a bass to a flute; and where the spectrum of a drum ends."""

TONE_S, DRUM_S = (0.1, 2.0), (0.02, 0.15)
"""In which a stroke falls by a factor of e: from plucked to bowed tones, and drums."""

PARTIALS = np.arange(1, 17)
PARTIALS_FALL = (0.5, 2.0)
"""The amplitude of partial ``h`` is ``h ** -fall``: from a brass instrument to a flute."""

QUIET = 1e-6
"""Power in each band between the strokes, beside tones of 0.1 to 1: music is never quite silent."""


def in_noise(speech: FloatArray, noise: FloatArray, snr_db: float, front_end: FrontEnd) -> FloatArray:
    """Return a clip with noise at a signal-to-noise ratio.

    Args:
        speech: float32 (frames, mel_bands), dB.
        noise: of the same shape, dB, of any loudness.
        snr_db: power of the clip over that of the noise, dB.
        front_end: of both.

    Returns:
        float32 (frames, mel_bands), dB.

    Example:
        >>> silence = np.zeros((5, 64), np.float32)
        >>> np.unique(in_noise(silence, silence - 40, 0.0, FrontEnd())).round(2)
        array([3.01], dtype=float32)
    """
    widths = _bands(front_end)[0]
    powers, noise_powers = (10 ** (frames.astype(np.float64) / 10) for frames in (speech, noise))
    share = (powers @ widths).mean() / (noise_powers @ widths).mean() / 10 ** (snr_db / 10)
    return _decibels(powers + share * noise_powers)


def hiss(frames: int, tilt_db: float, front_end: FrontEnd, random: np.random.Generator) -> FloatArray:
    """Return steady noise: the power of Gaussian noise in a band varies like a sum of the squares of its FFT bins.

    Args:
        frames: how many.
        tilt_db: level in the highest band over that in the lowest; 0 for white noise.
        front_end: of the spectrogram.
        random: source of the draws.

    Returns:
        float32 (frames, mel_bands), dB.

    Example:
        >>> noise = hiss(1000, -20.0, FrontEnd(), np.random.default_rng(0))
        >>> noise.shape, float((noise[:, -1] - noise[:, 0]).mean()) < -18
        ((1000, 64), True)
    """
    bins = _bands(front_end)[1]
    powers = random.gamma(bins, 1 / bins, (frames, len(bins)))
    # A draw may be 0 where a band has hardly one bin.
    return _decibels(np.maximum(powers, 1e-6) * 10 ** (np.linspace(0, tilt_db, len(bins)) / 10))


def babble(frames: int, clips: ClipFrames, random: np.random.Generator) -> FloatArray:
    """Return clips of the corpus that are heard at once, each repeated from a random place to the length needed.

    Returns:
        float32 (frames, mel_bands), dB.
    """
    powers = np.zeros((frames, clips.frames.shape[1]))
    for row in random.integers(0, len(clips), random.integers(1, VOICES + 1)):
        voice = clips[row]
        powers += 10 ** (voice[(random.integers(len(voice)) + np.arange(frames)) % len(voice)] / 10)
    return _decibels(powers)


def music(frames: int, front_end: FrontEnd, random: np.random.Generator) -> FloatArray:
    """Return tones of random pitch, struck together in a steady beat, half of the time with drums.

    Made by formula, so that no recording has to be had; without voices, and in no key.

    Args:
        frames: how many.
        front_end: of the spectrogram.
        random: source of the draws.

    Returns:
        float32 (frames, mel_bands), dB.

    Example:
        >>> music(200, FrontEnd(), np.random.default_rng(0)).shape
        (200, 64)
    """
    # Begun before it is heard, as no music waits for a speaker.
    strokes = np.arange(-2.0, frames / front_end.frame_rate, random.uniform(*STROKE_S))
    begin = np.repeat(strokes, random.integers(1, TONES + 1))
    spectra = _tones(_uniform_in_logarithm(TONE_HZ, len(begin), random), random.uniform(*PARTIALS_FALL), front_end)
    decay_s = _uniform_in_logarithm(TONE_S, len(begin), random)
    if random.random() < 0.5:
        begin = np.concatenate([begin, strokes])
        spectra = np.concatenate([spectra, _drums(len(strokes), front_end, random)])
        decay_s = np.concatenate([decay_s, _uniform_in_logarithm(DRUM_S, len(strokes), random)])
    elapsed = np.arange(frames)[:, None] / front_end.frame_rate - begin
    ringing = np.where(elapsed < 0, 0, np.exp(-2 * np.maximum(elapsed, 0) / decay_s))
    loudness = 10 ** random.uniform(-1, 0, len(begin))
    return _decibels(ringing @ (loudness[:, None] * spectra) + QUIET)


def _tones(pitch_hz: NDArray[np.float64], fall: float, front_end: FrontEnd) -> NDArray[np.float64]:
    """Return the spectrum (tones, mel_bands) of each tone, of power 1."""
    hz = pitch_hz[:, None] * PARTIALS
    powers = np.where(hz < front_end.max_hz, PARTIALS ** (-2 * fall), 0)
    bins = np.rint(np.minimum(hz, front_end.max_hz) * front_end.window / front_end.sample_rate).astype(int)
    shares = powers / powers.sum(1, keepdims=True)
    spectra: NDArray[np.float64] = np.einsum("tp,tpm->tm", shares, _bins_in_bands(front_end)[bins])
    return spectra


def _drums(count: int, front_end: FrontEnd, random: np.random.Generator) -> NDArray[np.float64]:
    """Return the spectrum (count, mel_bands) of each of some drums, of power 1: even up to a frequency."""
    bins = _bins_in_bands(front_end)
    hz = np.arange(len(bins)) * front_end.sample_rate / front_end.window
    heard = hz <= _uniform_in_logarithm(DRUM_HZ, count, random)[:, None]
    spectra: NDArray[np.float64] = heard / heard.sum(1, keepdims=True) @ bins
    return spectra


@lru_cache(maxsize=8)
def _bins_in_bands(front_end: FrontEnd) -> NDArray[np.float64]:
    """Return a tone at each FFT bin as every mel band hears it (bins, mel_bands), which Hann's window spreads."""
    filters = mel_filters(front_end).astype(np.float64)
    around = np.pad(filters, ((0, 0), (1, 1)), mode="edge")
    spread: NDArray[np.float64] = ((around[:, :-2] + 4 * filters + around[:, 2:]) / 6).T
    return spread


def _uniform_in_logarithm(ends: tuple[float, float], count: int, random: np.random.Generator) -> NDArray[np.float64]:
    drawn: NDArray[np.float64] = np.exp(random.uniform(np.log(ends[0]), np.log(ends[1]), count))
    return drawn


def in_random_music(speech: FloatArray, front_end: FrontEnd, random: np.random.Generator) -> FloatArray:
    """Return a clip beside :func:`music`, at a ratio of :data:`SNR_DB`; see :func:`in_noise`."""
    return in_noise(speech, music(len(speech), front_end, random), random.uniform(*SNR_DB), front_end)


def in_random_noise(
    speech: FloatArray, clips: ClipFrames, front_end: FrontEnd, random: np.random.Generator
) -> FloatArray:
    """Return a clip in hiss or babble, at a ratio of :data:`SNR_DB`; see :func:`in_noise`."""
    if random.random() < 0.5:
        noise = hiss(len(speech), random.uniform(*TILT_DB), front_end, random)
    else:
        noise = babble(len(speech), clips, random)
    return in_noise(speech, noise, random.uniform(*SNR_DB), front_end)


def _decibels(powers: NDArray[np.float64]) -> FloatArray:
    decibels: FloatArray = (10 * np.log10(powers)).astype(np.float32)
    return decibels


@lru_cache(maxsize=8)
def _bands(front_end: FrontEnd) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the width of each mel band in Hz, and how many FFT bins its power is a mean of."""
    filters = mel_filters(front_end)
    lowest, highest = hz_to_mel(front_end.min_hz), hz_to_mel(front_end.max_hz)
    edges = mel_to_hz(np.linspace(lowest, highest, front_end.mel_bands + 2))
    return (edges[2:] - edges[:-2]) / 2, filters.sum(1) ** 2 / (filters**2).sum(1)
