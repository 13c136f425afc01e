"""Sample-rate conversion in numpy: a polyphase windowed-sinc low-pass filter, for whole signals and for streams."""

from __future__ import annotations

from functools import lru_cache
from math import ceil, gcd

import numpy as np

from edge_runtime.errors import AudioError
from edge_runtime.frontend import FloatArray

LOWEST_RATE = 4000
HIGHEST_RATE = 384000

PASS_BAND = 0.9
"""Share of the lower of both Nyquist frequencies that passes unchanged; from the whole of it on nothing passes."""

STOP_BAND_DB = 80.0
"""Attenuation of what would alias; 16-bit audio ends at 96 dB, its noise in a room far above."""

OUTPUTS_PER_BLOCK = 1024
"""Output samples computed per numpy call: bounds the memory without costing speed."""


@lru_cache(maxsize=8)
def polyphase_filters(up: int, down: int) -> FloatArray:
    """Return the low-pass filters for a change of the rate by ``up / down``, one for each fraction of a sample.

    Kaiser's design (Oppenheim and Schafer, Discrete-Time Signal Processing, section 7.6): length and window shape
    follow from the width of the transition band and the attenuation.

    Args:
        up: numerator of the reduced ratio.
        down: denominator of the reduced ratio.

    Returns:
        float32 (up, taps) with taps even; each row has unit gain at 0 Hz.

    Example:
        >>> polyphase_filters(1, 3).shape[0]
        1
    """
    nyquist = min(1.0, up / down)
    transition = np.pi * (1 - PASS_BAND) * nyquist
    half = ceil((STOP_BAND_DB - 8.0) / (2.285 * transition) / 2)
    cutoff = nyquist * (1 + PASS_BAND) / 2
    distance = np.arange(1 - half, half + 1) - np.arange(up)[:, None] / up
    beta = 0.1102 * (STOP_BAND_DB - 8.7)
    window = np.i0(beta * np.sqrt(np.maximum(0.0, 1 - (distance / half) ** 2)))
    filters = np.sinc(cutoff * distance) * window
    return np.asarray(filters / filters.sum(axis=1, keepdims=True), np.float32)


class Resampler:
    """A signal that arrives in pieces, at another rate.

    The output is the same bit for bit however the input is cut, starts at the input's first sample (no delay) and
    treats everything before and after the signal as zero.

    Args:
        source_rate: Hz, whole.
        target_rate: Hz, whole.

    Raises:
        AudioError: a rate outside 4 to 384 kHz.

    Example:
        >>> stream = Resampler(48000, 16000)
        >>> tone = np.sin(np.arange(4800) / 20).astype(np.float32)
        >>> pieces = [stream.push(tone[:1000]), stream.push(tone[1000:]), stream.finish()]
        >>> np.array_equal(np.concatenate(pieces), resample(tone, 48000, 16000))
        True
    """

    def __init__(self, source_rate: int, target_rate: int) -> None:
        for rate in (source_rate, target_rate):
            if not LOWEST_RATE <= rate <= HIGHEST_RATE:
                raise AudioError(f"sample rate {rate} Hz; valid: {LOWEST_RATE} to {HIGHEST_RATE}")
        common = gcd(source_rate, target_rate)
        self._up, self._down = target_rate // common, source_rate // common
        self._filters = polyphase_filters(self._up, self._down)
        self._half = self._filters.shape[1] // 2
        # The filter reaches half - 1 samples back and half samples ahead.
        self._pending = np.zeros(self._half - 1, np.float32)
        self._phase = 0
        self._received = 0
        self._given = 0

    def push(self, samples: FloatArray) -> FloatArray:
        """Take the next samples (n,) and return those at the target rate that they complete, float32."""
        self._received += len(samples)
        return self._convert(samples)

    def finish(self) -> FloatArray:
        """End the signal: return what is left, so that ``ceil(n * target / source)`` samples were given in all."""
        wanted = -(-self._received * self._up // self._down) - self._given
        return self._convert(np.zeros(self._half, np.float32))[:wanted]

    def _convert(self, samples: FloatArray) -> FloatArray:
        if self._up == self._down:
            self._given += len(samples)
            return samples
        pending = np.concatenate([self._pending, samples])
        starts = max(0, len(pending) - 2 * self._half + 1)
        # Output k of this call starts at input (phase + k * down) // up.
        count = max(0, -(-(starts * self._up - self._phase) // self._down))
        ticks = self._phase + self._down * np.arange(count)
        resampled = np.empty(count, np.float32)
        for first in range(0, count, OUTPUTS_PER_BLOCK):
            block = slice(first, first + OUTPUTS_PER_BLOCK)
            windows = np.lib.stride_tricks.sliding_window_view(pending, 2 * self._half)[ticks[block] // self._up]
            # A row-wise sum, not a matrix product: its order of summation does not depend on the number of rows.
            resampled[block] = (windows * self._filters[ticks[block] % self._up]).sum(axis=1)
        next_tick = self._phase + count * self._down
        consumed = min(next_tick // self._up, len(pending))
        self._pending = pending[consumed:].copy()
        self._phase = next_tick - consumed * self._up
        self._given += count
        return resampled


def resample(samples: FloatArray, source_rate: int, target_rate: int) -> FloatArray:
    """Return a whole signal (n,) at another rate, float32 (ceil(n * target / source),); see :class:`Resampler`."""
    resampler = Resampler(source_rate, target_rate)
    return np.concatenate([resampler.push(samples), resampler.finish()])
