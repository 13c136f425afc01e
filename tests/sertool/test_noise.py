"""Noise that is added to spectrograms, against noise that is added to audio."""

from __future__ import annotations

import librosa
import numpy as np
import pytest

from edge_runtime.frontend import FrontEnd, log_mel
from sertool import noise as noise_module
from sertool.features import ClipFrames
from sertool.noise import QUIET, SNR_DB, babble, hiss, in_noise, in_random_music, in_random_noise, music

FRONT_END = FrontEnd()
SECONDS = 8


def voice(seed: int) -> np.ndarray:
    """Return syllables of harmonics that rise and fall."""
    random, time = np.random.default_rng(seed), np.arange(SECONDS * 16000) / 16000
    phase = np.cumsum(2 * np.pi * (random.uniform(90, 250) + 20 * np.sin(3 * time)) / 16000)
    harmonics = sum(np.sin(number * phase) / number for number in range(1, 25))
    return (0.1 * harmonics * np.clip(np.sin(2 * np.pi * random.uniform(2, 4) * time), 0, 1)).astype(np.float32)


def powers(decibels: np.ndarray) -> np.ndarray:
    return 10 ** (decibels.astype(np.float64) / 10)


@pytest.mark.parametrize("snr_db", [20.0, 10.0, 0.0])
@pytest.mark.parametrize("kind", ["white", "voices"])
def test_it_is_as_loud_as_noise_added_to_the_audio(kind: str, snr_db: float) -> None:
    speech = voice(0)
    noise = np.random.default_rng(1).normal(size=len(speech)).astype(np.float32) if kind == "white" else voice(1)
    noise *= np.sqrt((speech**2).mean() / (noise**2).mean() / 10 ** (snr_db / 10))
    expected = powers(log_mel(speech + noise))
    # The noise comes at another loudness: only its ratio counts.
    found = powers(in_noise(log_mel(speech), log_mel(noise) + 17, snr_db, FRONT_END))
    # What leaks from strong bands into silent ones is no independent sound.
    heard = expected.mean(0) > 1e-4 * expected.mean(0).max()
    assert heard.sum() > 40
    assert 10 * np.log10(found.mean(0) / expected.mean(0))[heard] == pytest.approx(np.zeros(heard.sum()), abs=1.0)
    assert 10 * np.log10(found.sum() / expected.sum()) == pytest.approx(0, abs=0.25)


def test_hiss_without_tilt_varies_as_white_noise_does() -> None:
    made = hiss(4000, 0.0, FRONT_END, np.random.default_rng(0))
    noise = np.random.default_rng(1).normal(size=4000 * 256)
    mel = librosa.feature.melspectrogram(y=noise, sr=16000, n_fft=512, hop_length=256, n_mels=64, center=False)
    heard = 10 * np.log10(mel.T)
    level = 10 * np.log10(powers(heard).mean())
    assert 10 * np.log10(powers(made).mean(0)) == pytest.approx(np.zeros(64), abs=0.5)
    assert 10 * np.log10(powers(heard).mean(0)) - level == pytest.approx(np.zeros(64), abs=1.0)
    # Neighbouring bins under a window are not quite independent, which the model of it leaves out.
    assert made.std(0) == pytest.approx(heard.std(0), rel=0.35)


def test_tilt_is_that_of_the_highest_band_over_the_lowest() -> None:
    levels = 10 * np.log10(powers(hiss(4000, -24.0, FRONT_END, np.random.default_rng(0))).mean(0))
    slope, level = np.polyfit(np.arange(64), levels, 1)
    assert (63 * slope, level) == (pytest.approx(-24, abs=0.5), pytest.approx(0, abs=0.3))


def test_babble_is_a_sum_of_clips_from_anywhere_in_them() -> None:
    frames = np.repeat(np.arange(3, dtype=np.float32)[:, None] * 10, 64, axis=1)
    clips = ClipFrames(frames, np.array([1, 2, 3]))  # clips of one frame: 0, 10 and 20 dB
    random, counts = np.random.default_rng(0), set()
    for _ in range(200):
        noise = powers(babble(7, clips, random))
        assert np.ptp(noise) < 1e-3
        total = round(noise[0, 0])
        voices = [total % 10, total // 10 % 10, total // 100]
        assert 1 <= sum(voices) <= 4
        counts.add(sum(voices))
    assert counts == {1, 2, 3, 4}
    ramp = ClipFrames(np.repeat(np.arange(50, dtype=np.float32)[:, None], 64, axis=1), np.array([50]))
    begun = {round(float(babble(1, ramp, random)[0, 0])) for _ in range(500)}
    assert len(begun) > 40


@pytest.fixture
def _struck_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice a second a tone of 440 Hz, whose partials' amplitudes are 1/h, and that falls by e in 0.2 s."""
    monkeypatch.setattr(noise_module, "TONES", 1)
    for name, value in (("STROKE_S", 0.5), ("TONE_HZ", 440.0), ("TONE_S", 0.2), ("PARTIALS_FALL", 1.0)):
        monkeypatch.setattr(noise_module, name, (value, value))


class Even(np.random.Generator):
    """Draws whether there are drums as told, and all loudness alike."""

    def __init__(self, drums: bool) -> None:
        super().__init__(np.random.PCG64(0))
        self._drums = drums

    def random(self) -> float:  # type: ignore[override]
        return 0.0 if self._drums else 1.0

    def uniform(self, low: float, high: float, size: int | None = None) -> np.ndarray | float:  # type: ignore[override]
        return high if size is None else np.full(size, high)


@pytest.mark.usefixtures("_struck_alike")
def test_music_is_that_of_tones_in_audio() -> None:
    since = np.arange(8000) / 16000
    tone = sum(np.sin(2 * np.pi * 440 * part * since + part) / part for part in range(1, 17)) * np.exp(-since / 0.2)
    expected = powers(log_mel(np.tile(tone, 16).astype(np.float32)))[62:]  # the first two seconds are struck before
    found = powers(music(len(expected), FRONT_END, Even(drums=False)))
    spectra = [10 * np.log10(heard.mean(0) / heard.sum(1).mean()) for heard in (found, expected)]
    strong = spectra[1] > spectra[1].max() - 25
    assert strong.sum() > 15
    assert np.abs(spectra[0] - spectra[1])[strong].mean() < 1
    # In 0.4 s a tone falls by e² in amplitude, which is 17.4 dB, and then the next is struck.
    level = 10 * np.log10((found - QUIET).sum(1))
    assert level[0] - level[25] == pytest.approx(17.37, abs=0.01)
    assert np.argmax(level[20:50]) + 20 == pytest.approx(0.5 * FRONT_END.frame_rate, abs=1)


@pytest.mark.usefixtures("_struck_alike")
def test_drums_are_even_in_frequency_and_over_at_once() -> None:
    drums = powers(music(30, FRONT_END, Even(drums=True))) - powers(music(30, FRONT_END, Even(drums=False)))
    assert drums[0] == pytest.approx(np.full(64, drums[0].mean()), rel=0.15)
    after = round(0.15 * FRONT_END.frame_rate)  # the longest, in which it falls by a factor of e, its power by e²
    assert drums[0].sum() / drums[after].sum() == pytest.approx(np.e**2, rel=0.2)


def test_music_goes_on_where_a_pause_is_long_and_every_clip_has_another() -> None:
    pieces = [music(200, FRONT_END, np.random.default_rng(seed)) for seed in range(100)]
    assert all(np.isfinite(piece).all() and piece.shape == (200, 64) and piece.dtype == np.float32 for piece in pieces)
    assert len({piece.tobytes() for piece in pieces}) == 100
    assert np.array_equal(music(200, FRONT_END, np.random.default_rng(3)), pieces[3])


@pytest.mark.parametrize("kind", ["noise", "music"])
def test_training_hears_every_ratio_in_its_range_and_the_same_seed_the_same(kind: str) -> None:
    speech = log_mel(voice(0))
    clips = ClipFrames(np.concatenate([speech, log_mel(voice(1))]), np.cumsum([len(speech)] * 2))

    def heard_in(seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        if kind == "music":
            return in_random_music(speech, FRONT_END, random)
        return in_random_noise(speech, clips, FRONT_END, random)

    widths = np.diff(librosa.mel_frequencies(n_mels=66, fmin=0, fmax=8000))
    widths = (widths[1:] + widths[:-1]) / 2
    heard = []
    for seed in range(300):
        noise = powers(heard_in(seed)) - powers(speech)
        heard.append(10 * np.log10((powers(speech) @ widths).mean() / (noise @ widths).mean()))
    low, high = SNR_DB
    assert low - 0.1 <= min(heard) < low + 2 and high - 2 < max(heard) <= high + 0.1
    assert np.array_equal(heard_in(7), heard_in(7))
