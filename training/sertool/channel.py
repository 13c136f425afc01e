"""Rooms and lines in log-Mel spectrograms: what lies between a speaker and the device.

As :mod:`sertool.noise`, on the powers of mel bands, so that training clips need no audio: an echo adds power to the
frames that follow, and a narrow line takes it from the bands it does not carry.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from edge_runtime.frontend import FloatArray, FrontEnd, hz_to_mel, mel_to_hz

REVERBERATION_S = (0.2, 1.2)
"""Time in which the echo of a room falls by 60 dB: from a furnished study to a stairwell."""

DIRECT_DB = (-5.0, 15.0)
"""Power of what comes straight from the speaker over that of the echo: from the far end of a table to an arm's
length."""

LOWEST_HZ, HIGHEST_HZ = (20.0, 500.0), (2500.0, 8000.0)
"""Where the band of a line begins and ends: telephones carry 300 to 3400 Hz, wireless headsets and codecs up to 4 or
7 kHz."""

ORDER = (4, 16)
"""Of the filter: from an analogue line to a codec, which ends sharply."""


def in_room(speech: FloatArray, reverberation_s: float, direct_db: float, front_end: FrontEnd) -> FloatArray:
    """Return a clip with the echo of a room, as loud as before.

    The power of the echo falls exponentially (Polack, La transmission de l'énergie sonore dans les salles, 1988). It
    is added to that of the direct sound, with which it does not cohere.

    Args:
        speech: float32 (frames, mel_bands), dB.
        reverberation_s: time in which the echo falls by 60 dB.
        direct_db: power of the direct sound over that of its whole echo.
        front_end: of the spectrogram.

    Returns:
        float32 (frames, mel_bands), dB.

    Example:
        >>> click = np.full((4, 64), -100, np.float32)
        >>> click[0] = 0
        >>> hop_s = 256 / 16000
        >>> in_room(click, reverberation_s=6 * hop_s, direct_db=0.0, front_end=FrontEnd())[:, 0].round(1).tolist()
        [-3.0, -3.5, -13.5, -23.5]
    """
    kept = 10 ** (-6 / (reverberation_s * front_end.frame_rate))  # of the echo's power, from frame to frame
    powers = 10 ** (speech.astype(np.float64) / 10)
    echo = lfilter([0, 1 - kept], [1, -kept], powers, axis=0)
    share = 10 ** (-direct_db / 10)
    return _decibels((powers + share * echo) / (1 + share), front_end)


def in_band(speech: FloatArray, low_hz: float, high_hz: float, order: int, front_end: FrontEnd) -> FloatArray:
    """Return a clip as a line carries it that passes a band of frequencies.

    Args:
        speech: float32 (frames, mel_bands), dB.
        low_hz: 3 dB are lost here, and more below.
        high_hz: 3 dB are lost here, and more above.
        order: of the Butterworth high-pass and low-pass: 6 dB an octave each.
        front_end: of the spectrogram, below whose floor nothing falls.

    Returns:
        float32 (frames, mel_bands), dB.

    Example:
        >>> heard = in_band(np.zeros((1, 64), np.float32), 300.0, 3400.0, 8, FrontEnd())[0]
        >>> heard[[0, 20, 63]].round().tolist()  # 42, 879 and 7703 Hz
        [-100.0, -0.0, -56.0]
    """
    edges = np.linspace(hz_to_mel(front_end.min_hz), hz_to_mel(front_end.max_hz), front_end.mel_bands + 2)
    centres = mel_to_hz(edges)[1:-1]
    passed = 1 / (1 + (low_hz / centres) ** (2 * order)) / (1 + (centres / high_hz) ** (2 * order))
    return _decibels(10 ** (speech.astype(np.float64) / 10) * passed, front_end)


def in_random_room(speech: FloatArray, front_end: FrontEnd, random: np.random.Generator) -> FloatArray:
    """Return a clip in a room of :data:`REVERBERATION_S` and :data:`DIRECT_DB`; see :func:`in_room`."""
    return in_room(speech, random.uniform(*REVERBERATION_S), random.uniform(*DIRECT_DB), front_end)


def in_random_band(speech: FloatArray, front_end: FrontEnd, random: np.random.Generator) -> FloatArray:
    """Return a clip over a line between :data:`LOWEST_HZ` and :data:`HIGHEST_HZ`; see :func:`in_band`."""
    low, high = (float(np.exp(random.uniform(*np.log(edges)))) for edges in (LOWEST_HZ, HIGHEST_HZ))
    return in_band(speech, low, high, int(random.integers(*ORDER, endpoint=True)), front_end)


def _decibels(powers: NDArray[np.float64], front_end: FrontEnd) -> FloatArray:
    decibels: FloatArray = (10 * np.log10(np.maximum(powers, front_end.floor))).astype(np.float32)
    return decibels
