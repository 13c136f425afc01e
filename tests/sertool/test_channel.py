"""Rooms and lines made of spectrograms, against those that audio goes through."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import signal

from edge_runtime.frontend import FrontEnd, log_mel
from sertool.channel import DIRECT_DB, HIGHEST_HZ, LOWEST_HZ, in_band, in_random_band, in_random_room, in_room
from sertool.degrade import DIRECT_TO_REVERBERANT_DB, reverberate, room_response

FRONT_END = FrontEnd()
RATE = FRONT_END.sample_rate


def bursts() -> np.ndarray:
    """Return 8 s of white noise that comes and goes, and goes for good after 6 s."""
    time = np.arange(8 * RATE) / RATE
    loudness = np.where((time % 1 < 0.4) & (time < 6), 0.1, 1e-4)
    return (loudness * np.random.default_rng(0).normal(size=len(time))).astype(np.float32)


@pytest.mark.parametrize("reverberation_s", [0.3, 0.6, 1.0])
def test_an_echo_is_as_strong_and_lasts_as_long_as_in_audio(reverberation_s: float) -> None:
    expected = log_mel(reverberate(bursts(), room_response(reverberation_s)))
    found = in_room(log_mel(bursts()), reverberation_s, DIRECT_TO_REVERBERANT_DB, FRONT_END)
    # The mean over bands evens out what a single response does to each of them.
    levels = [10 * np.log10((10 ** (frames / 10)).mean(1)) for frames in (found, expected)]
    audible = levels[1] > levels[1].max() - 45
    assert audible.sum() > 200
    differences = (levels[0] - levels[1])[audible]
    assert abs(differences.mean()) < 0.7 and np.abs(differences).mean() < 1.5


def test_without_an_echo_nothing_changes() -> None:
    clean = log_mel(bursts())
    np.testing.assert_allclose(in_room(clean, 0.5, 100.0, FRONT_END), clean, atol=0.02)


@pytest.mark.parametrize(("low_hz", "high_hz", "order"), [(300.0, 3400.0, 4), (100.0, 7000.0, 8), (50.0, 4000.0, 12)])
def test_a_line_takes_from_each_band_what_filters_take_from_audio(low_hz: float, high_hz: float, order: int) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 8 * RATE)
    hz = np.fft.rfftfreq(len(noise), 1 / RATE)
    responses = [
        signal.freqs(*signal.butter(order, edge, kind, analog=True), hz)[1]
        for edge, kind in ((low_hz, "highpass"), (high_hz, "lowpass"))
    ]
    heard = np.fft.irfft(np.fft.rfft(noise) * responses[0] * responses[1]).astype(np.float32)
    expected = log_mel(heard).mean(0)
    found = in_band(log_mel(noise.astype(np.float32)), low_hz, high_hz, order, FRONT_END).mean(0)
    # A band is as wide as the slope of the filter is steep; and what lies far below, the window leaks into.
    near = expected > expected.max() - 12
    assert near.sum() > 35
    np.testing.assert_allclose(found[near], expected[near], atol=5.0)
    assert np.abs(found - expected)[near].mean() < 0.3 and (found[~near] < found.max() - 8).all()


def test_nothing_falls_below_the_floor() -> None:
    silence = np.full((3, 64), -100.0, np.float32)
    np.testing.assert_allclose(in_band(silence, 300.0, 3400.0, 8, FRONT_END), silence)
    np.testing.assert_allclose(in_room(silence, 0.5, 0.0, FRONT_END), silence, atol=1e-4)


def test_training_hears_all_rooms_and_lines_and_the_same_seed_the_same() -> None:
    click = np.full((200, 64), -100.0, np.float32)
    click[0] = 0
    rooms = [in_random_room(click, FRONT_END, np.random.default_rng(seed)) for seed in range(200)]
    direct = [-float(room[0, 0]) for room in rooms]  # what the echo takes from a click, which stays as loud
    least, most = (10 * np.log10(1 + 10 ** (-decibels / 10)) for decibels in reversed(DIRECT_DB))
    assert least <= min(direct) < least + 0.1 and most - 0.5 < max(direct) <= most
    steady = np.zeros((1, 64), np.float32)
    lines = np.stack([in_random_band(steady, FRONT_END, np.random.default_rng(seed))[0] for seed in range(200)])
    bands = (lines > -3).sum(1)
    assert bands.min() < 40 and bands.max() > 60  # of 64; the narrowest passes 500 to 2500 Hz
    assert LOWEST_HZ[0] < 42 < LOWEST_HZ[1] and HIGHEST_HZ[1] > 7703  # centres of the first and the last band
    assert all(np.array_equal(rooms[7], in_random_room(click, FRONT_END, np.random.default_rng(7))) for _ in range(2))
