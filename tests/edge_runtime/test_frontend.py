from __future__ import annotations

from dataclasses import replace

import librosa
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import AudioError, UsageError
from edge_runtime.frontend import (
    FrontEnd,
    LogMelStream,
    Normalization,
    RunningNormalizer,
    as_samples,
    log_mel,
    mel_filters,
    tile_or_cut,
)


def librosa_log_mel(samples: np.ndarray) -> np.ndarray:
    power = librosa.feature.melspectrogram(
        y=samples.astype(np.float64), sr=16000, n_fft=512, hop_length=256, n_mels=64, center=False, power=2.0
    )
    return 10 * np.log10(np.maximum(power, 1e-10)).T


SIGNALS = {
    "noise": np.random.default_rng(1).normal(0, 0.1, 30000),
    "quiet noise": np.random.default_rng(2).normal(0, 1e-4, 30000),
    "tone": 0.5 * np.sin(2 * np.pi * 1000 * np.arange(30000) / 16000),
    # A sine alone leaves bands 120 dB below it, where any float32 spectrum is rounding noise.
    "chirp in noise": np.sin(2 * np.pi * (50 + 2000 * np.arange(30000) / 16000) * np.arange(30000) / 16000)
    + np.random.default_rng(3).normal(0, 1e-2, 30000),
    "impulse": np.eye(1, 30000, 5000)[0],
    "silence": np.zeros(30000),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_log_mel_equals_librosa(name):
    samples = SIGNALS[name].astype(np.float32)
    assert np.abs(log_mel(samples) - librosa_log_mel(samples)).max() <= 2e-4


def test_log_mel_of_speech_equals_librosa(speech):
    samples = speech(2.0)
    assert np.abs(log_mel(samples) - librosa_log_mel(samples)).max() <= 2e-4


@pytest.mark.parametrize(("mels", "window"), [(64, 512), (40, 512), (80, 1024), (128, 2048)])
def test_mel_filters_equal_librosa(mels, window):
    expected = librosa.filters.mel(sr=16000, n_fft=window, n_mels=mels, htk=False, norm="slaney", dtype=np.float64)
    assert np.allclose(mel_filters(FrontEnd(window=window, mel_bands=mels)), expected, atol=1e-10, rtol=0)


def test_a_band_without_a_bin_is_refused():
    with pytest.raises(UsageError, match=r"mel band \d+ of 200"):
        mel_filters(FrontEnd(mel_bands=200))


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(0, 12000),
    cuts=st.lists(st.integers(0, 12000), max_size=12),
    seed=st.integers(0, 100),
)
def test_any_chunking_gives_the_same_bits(length, cuts, seed):
    samples = np.random.default_rng(seed).normal(0, 0.1, length).astype(np.float32)
    stream = LogMelStream()
    pieces = [stream.push(piece) for piece in np.split(samples, sorted(min(c, length) for c in cuts))]
    assert np.array_equal(np.concatenate(pieces), log_mel(samples))


def test_a_sample_at_a_time_gives_the_same_bits():
    samples = np.random.default_rng(0).normal(0, 0.1, 1300).astype(np.float32)
    stream = LogMelStream()
    assert np.array_equal(np.concatenate([stream.push(s[None]) for s in samples]), log_mel(samples))


def test_reset_starts_afresh():
    samples = np.random.default_rng(0).normal(0, 0.1, 3000).astype(np.float32)
    stream = LogMelStream()
    stream.push(samples[:700])
    stream.reset()
    assert np.array_equal(stream.push(samples), log_mel(samples))


def test_the_paper_window_has_373_frames():
    assert log_mel(np.zeros(95744)).shape == (373, 64)
    assert FrontEnd().samples(373) == 95744


@pytest.mark.parametrize("samples", [0, 1, 511, 512, 767, 768, 769])
def test_frames_count_whole_windows(samples):
    assert len(log_mel(np.zeros(samples))) == sum(1 for s in range(0, samples, 256) if s + 512 <= samples)


def test_integers_and_their_floats_give_the_same():
    integers = np.random.default_rng(0).integers(-32768, 32767, 2000).astype(np.int16)
    assert np.array_equal(log_mel(integers), log_mel(integers / 32768))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((2, 100)), r"one channel.*\(2, 100\)"),
        ([0.0, np.nan], "sample 1 is nan"),
        ([np.inf], "sample 0 is inf"),
        ([0.0, -20000.0], "sample 1 is -20000"),
        (np.zeros(3, np.uint8), "uint8.*signed integers"),
        (np.zeros(3, np.int64), "int64"),
        (["a"], "valid: floats"),
        (None, "one channel"),
    ],
)
def test_what_is_no_signal_is_refused_in_one_line(samples, message):
    with pytest.raises(AudioError, match=message) as caught:
        as_samples(samples, "clip")
    assert "\n" not in str(caught.value)


@given(length=st.integers(1, 50), wanted=st.integers(1, 200))
def test_tiling_repeats_and_cutting_keeps_the_beginning(length, wanted):
    samples = np.arange(length, dtype=np.float32)
    filled = tile_or_cut(samples, wanted)
    assert [filled[i] for i in range(wanted)] == [samples[i % length] for i in range(wanted)]


def test_nothing_cannot_be_tiled():
    with pytest.raises(AudioError, match="empty clip"):
        tile_or_cut(np.zeros(0, np.float32), 5)


def test_normalization_subtracts_and_divides():
    frames = np.array([[1.0, 10.0], [3.0, 30.0]], np.float32)
    normalized = Normalization((2.0, 20.0), (1.0, 10.0)).apply(frames)
    assert normalized.tolist() == [[-1, -1], [1, 1]]
    assert normalized.dtype == np.float32


RUNNING = Normalization(tuple(np.linspace(-60.0, -20.0, 64)), (12.0,) * 64, prior_frames=5, memory_frames=40)


def levels(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(-45, 15, (frames, 64)).astype(np.float32)


def test_running_statistics_are_those_of_all_frames_so_far_and_of_the_imagined_ones():
    # An imagined history of 5 frames with exactly the constants' mean and deviation, band by band.
    offsets = np.array([-1.0, 1.0, -1.0, 1.0, 0.0]) * np.sqrt(5 / 4)
    imagined = np.asarray(RUNNING.mean) + offsets[:, None] * np.asarray(RUNNING.std)
    frames = levels(30)
    expected = []
    for count in range(1, 31):
        heard = np.concatenate([imagined, frames[:count].astype(np.float64)])
        expected.append((frames[count - 1] - heard.mean(0)) / heard.std(0))
    assert RUNNING.apply(frames) == pytest.approx(np.array(expected), abs=1e-5)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_running_normalisation_of_any_pieces_gives_the_same_bits(cuts):
    frames = levels(60)
    normalizer = RunningNormalizer(RUNNING)
    pieces = np.split(frames, np.cumsum(cuts).clip(max=60))
    assert np.array_equal(np.concatenate([normalizer.push(piece) for piece in pieces]), RUNNING.apply(frames))


def test_several_clips_at_once_are_normalised_each_as_if_alone():
    clips = np.stack([levels(20, seed) for seed in range(3)])
    assert np.array_equal(RUNNING.apply(clips), np.stack([RUNNING.apply(clip) for clip in clips]))


def test_what_is_forgotten_counts_for_the_memory_alone():
    normalizer = RunningNormalizer(RUNNING)
    normalizer.push(levels(200) + 20)
    normalizer.forget()
    remembered = normalizer.push(np.full((1, 64), -30, np.float32))
    # 40 frames with the statistics of the 205 before, and the new one.
    imagined = np.asarray(RUNNING.mean) + np.array([[-1.0], [1.0], [-1.0], [1.0], [0.0]]) * np.sqrt(5 / 4) * 12.0
    past = np.concatenate([imagined, (levels(200) + 20).astype(np.float64)])
    mean = (40 * past.mean(0) - 30) / 41
    power = (40 * (past**2).mean(0) + 900) / 41
    assert remembered[0] == pytest.approx((-30 - mean) / np.sqrt(power - mean**2), abs=1e-4)
    normalizer.reset()
    assert np.array_equal(normalizer.push(levels(9)), RUNNING.apply(levels(9)))


def test_a_silent_line_is_not_blown_up():
    assert np.abs(RUNNING.apply(np.full((2000, 64), -100, np.float32))[-1]).max() < 8


def test_constants_stay_whatever_was_heard():
    constant = replace(RUNNING, prior_frames=0)
    normalizer = RunningNormalizer(constant)
    normalizer.push(levels(50))
    assert np.array_equal(normalizer.push(levels(5)), (levels(5) - np.float32(constant.mean)) / np.float32(12))
