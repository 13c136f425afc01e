from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import AudioError
from edge_runtime.resample import Resampler, polyphase_filters, resample

RATES = [8000, 11025, 22050, 32000, 44100, 48000, 96000]


def tone(hz: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def middle(samples: np.ndarray) -> np.ndarray:
    return samples[len(samples) // 4 : -len(samples) // 4]


@pytest.mark.parametrize("rate", RATES)
def test_it_agrees_with_soxr_in_the_pass_band(rate):
    random = np.random.default_rng(0)
    highest = 0.85 * min(rate, 16000) / 2
    signal = sum(0.1 * tone(hz, rate) for hz in random.uniform(50, highest, 10)).astype(np.float32)
    ours, reference = resample(signal, rate, 16000), soxr.resample(signal, rate, 16000, quality="VHQ")
    length = min(len(ours), len(reference))
    assert np.abs(middle(ours[:length]) - middle(reference[:length])).max() < 5e-4


@pytest.mark.parametrize("rate", [22050, 44100, 48000, 96000])
@pytest.mark.parametrize("hz", [8001, 9000, 10500])
def test_what_would_alias_is_80_db_down(rate, hz):
    aliased = middle(resample(tone(hz, rate), rate, 16000))
    assert 20 * np.log10(np.sqrt(2 * np.mean(aliased**2))) < -75


def test_upsampling_leaves_no_image():
    spectrum = np.abs(np.fft.rfft(middle(resample(tone(3000, 8000, 2.0), 8000, 16000)) * np.hanning(16000)))
    assert spectrum[4100:].max() < 2e-4 * spectrum.max()


@pytest.mark.parametrize(("up", "down"), [(1, 3), (160, 441), (2, 1), (320, 441)])
def test_each_phase_has_unit_gain_and_a_flat_pass_band(up, down):
    filters = polyphase_filters(up, down)
    assert np.allclose(filters.sum(axis=1), 1, atol=1e-6)
    # All phases interleaved are one filter at `up` times the source rate.
    prototype = np.zeros(filters.size)
    for phase in range(up):
        prototype[(np.arange(filters.shape[1]) * up - phase) % filters.size] = filters[phase] / up
    frequency, response = scipy.signal.freqz(prototype, worN=8192, fs=2 * max(1.0, up))
    level = 20 * np.log10(np.maximum(np.abs(response), 1e-9))
    nyquist = min(1.0, up / down)
    assert np.abs(level[frequency <= 0.9 * nyquist]).max() < 0.01
    assert level[frequency >= nyquist].max() < -78


@settings(max_examples=60, deadline=None)
@given(
    rate=st.sampled_from(RATES),
    length=st.integers(0, 6000),
    cuts=st.lists(st.integers(0, 6000), max_size=8),
)
def test_any_chunking_gives_the_same_bits(rate, length, cuts):
    signal = np.random.default_rng(length).normal(0, 0.1, length).astype(np.float32)
    stream = Resampler(rate, 16000)
    pieces = [stream.push(piece) for piece in np.split(signal, sorted(min(c, length) for c in cuts))]
    streamed = np.concatenate([*pieces, stream.finish()])
    assert np.array_equal(streamed, resample(signal, rate, 16000))
    assert len(streamed) == -(-length * 16000 // rate)


def test_a_sample_at_a_time_gives_the_same_bits():
    signal = np.random.default_rng(0).normal(0, 0.1, 1500).astype(np.float32)
    stream = Resampler(44100, 16000)
    pieces = [stream.push(sample[None]) for sample in signal]
    assert np.array_equal(np.concatenate([*pieces, stream.finish()]), resample(signal, 44100, 16000))


@pytest.mark.parametrize("rate", RATES)
def test_there_is_no_delay(rate):
    pulse = np.exp(-0.5 * ((np.arange(rate) / rate - 0.5) / 0.001) ** 2).astype(np.float32)
    resampled = resample(pulse, rate, 16000)
    centre = (resampled * np.arange(len(resampled))).sum() / resampled.sum() / 16000
    assert abs(centre - 0.5) < 1e-6


def test_the_same_rate_changes_nothing():
    signal = np.random.default_rng(0).normal(0, 0.1, 1000).astype(np.float32)
    assert np.array_equal(resample(signal, 16000, 16000), signal)


@pytest.mark.parametrize("rate", [0, 3999, 400000])
def test_an_absurd_rate_is_refused(rate):
    with pytest.raises(AudioError, match=f"sample rate {rate} Hz; valid: 4000 to 384000"):
        Resampler(rate, 16000)
