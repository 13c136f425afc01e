"""Conditions for test clips: what is measured in the degraded audio is what was asked for."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from scipy import signal
from scipy.stats import linregress

import sertool.degrade
from edge_runtime.errors import SerError, UsageError
from edge_runtime.frontend import FloatArray
from sertool.degrade import (
    CONDITIONS,
    MP3_LOWEST,
    OPUS_LOWEST,
    Scene,
    add_noise,
    babble,
    change_level,
    chosen_conditions,
    mp3,
    music,
    opus,
    reverberate,
    room_response,
    seeded,
    slide,
    telephone,
    tilt,
)

RATE = 16000


def voices(random: np.random.Generator, count: int) -> list[FloatArray]:
    return [random.standard_normal(5000).astype(np.float32) for _ in range(count)]


def speech_like(seconds: float = 2.0, seed: int = 0) -> FloatArray:
    """Syllables of noise with most of its power below 1 kHz."""
    random = np.random.default_rng(seed)
    noise = signal.lfilter([1.0], [1.0, -0.9], random.standard_normal(round(seconds * RATE)))
    time = np.arange(len(noise)) / RATE
    return (0.05 * noise * (1 + np.sin(2 * np.pi * 4 * time))).astype(np.float32)


def degraded(name: str, samples: FloatArray, key: str = "a.wav") -> FloatArray:
    return CONDITIONS[name].degrade(samples, Scene(key, voices))


def decibels(power: float) -> float:
    return float(10 * np.log10(power))


def gains_db(response: FloatArray, hertz: list[float]) -> FloatArray:
    """Return the gain of a system at some frequencies from what it makes of an impulse."""
    return 20 * np.log10(np.abs(signal.freqz(response, worN=hertz, fs=RATE)[1]))


def impulse(length: int = 32000, place: int = 16000) -> FloatArray:
    samples = np.zeros(length, np.float32)
    samples[place] = 1.0
    return samples


# --- noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snr_db", [20, 10, 5])
@pytest.mark.parametrize("kind", ["white", "babble", "music"])
def test_the_mixture_has_the_ratio_that_was_asked_for(kind: str, snr_db: int) -> None:
    clean = speech_like().astype(np.float64)
    noise = degraded(f"{kind}-{snr_db}", speech_like()) - clean
    assert decibels(np.mean(clean**2) / np.mean(noise**2)) == pytest.approx(snr_db, abs=0.01)


@pytest.mark.parametrize("kind", ["white", "babble", "music"])
def test_a_clip_meets_the_same_noise_at_every_level_and_another_clip_other_noise(kind: str) -> None:
    clean = speech_like()
    loud, soft = (degraded(f"{kind}-{snr_db}", clean) - clean for snr_db in (5, 20))
    assert loud * 10 ** (-15 / 20) == pytest.approx(soft, abs=1e-5)
    other = degraded(f"{kind}-5", clean, "b.wav") - clean
    assert abs(np.corrcoef(loud, other)[0, 1]) < 0.5


def test_silence_stays_silent_and_silent_noise_changes_nothing() -> None:
    clean, silence = speech_like(0.1), np.zeros(1600, np.float32)
    assert not add_noise(silence, clean, 5.0).any()
    assert np.array_equal(add_noise(clean, silence, 5.0), clean)


def test_voices_of_babble_are_equally_loud() -> None:
    time, hertz = np.arange(RATE) / RATE, [200, 400, 800, 1600, 3200, 6400]
    tones = [level * np.sin(2 * np.pi * f * time).astype(np.float32) for level, f in enumerate(hertz, start=1)]
    spectrum = np.abs(np.fft.rfft(babble(tones, RATE, seeded("test"))))
    assert spectrum[hertz] == pytest.approx(spectrum[hertz].mean(), rel=1e-3)
    assert np.sum(spectrum[hertz] ** 2) == pytest.approx(np.sum(spectrum**2))


def test_short_voices_of_babble_are_repeated_from_another_place() -> None:
    (voice,) = voices(np.random.default_rng(0), 1)
    mixture = babble([voice], 12000, seeded("test"))
    assert np.array_equal(mixture[:7000], mixture[5000:])
    place = int(np.argmax(np.correlate(np.tile(voice, 2), mixture[:5000])))
    assert place > 0
    assert np.tile(voice, 2)[place : place + 5000] / voice.std() == pytest.approx(mixture[:5000], rel=1e-3, abs=1e-3)


def test_music_keeps_to_c_major_and_never_stops() -> None:
    seconds = music().reshape(60, RATE)
    assert (seconds.std(axis=1) > 0.3 * music().std()).all()
    strongest = np.abs(np.fft.rfft(seconds * np.hanning(RATE), 8 * RATE)).argmax(axis=1) / 8
    semitones = 12 * np.log2(strongest / 261.63)
    assert np.abs(semitones - semitones.round()).max() < 0.25
    assert set(semitones.round() % 12) <= {0, 2, 4, 5, 7, 9, 11}


# --- rooms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverberation_time_s", [0.3, 0.6, 1.0])
def test_a_room_decays_in_its_reverberation_time(reverberation_time_s: float) -> None:
    response = room_response(reverberation_time_s).astype(np.float64)
    first = int(np.flatnonzero(response[1:])[0]) + 1
    assert first == 0.005 * RATE
    tail = response[first:]
    assert np.sum(tail**2) == pytest.approx(response[0] ** 2)
    # Schroeder's backward integration; the slope from -5 to -25 dB (T20).
    decay = 10 * np.log10(np.cumsum(tail[::-1] ** 2)[::-1] / np.sum(tail**2))
    measured = (decay < -5) & (decay > -25)
    slope = linregress(np.flatnonzero(measured) / RATE, decay[measured]).slope
    assert -60 / slope == pytest.approx(reverberation_time_s, rel=0.05)


def test_a_room_is_a_convolution_that_keeps_level_and_length() -> None:
    clean, response = speech_like(0.5), room_response(0.3)
    heard = reverberate(clean, response)
    assert len(heard) == len(clean)
    assert heard.std() == pytest.approx(clean.std(), rel=1e-3)
    expected = np.convolve(clean, response)[: len(clean)]
    assert np.corrcoef(heard, expected)[0, 1] == pytest.approx(1.0, abs=1e-6)
    assert np.array_equal(heard, degraded("room-0.3", clean))


# --- channels ------------------------------------------------------------------------------------------------------


def test_a_telephone_passes_its_band_alone() -> None:
    response = telephone(impulse())
    assert gains_db(response, [300, 3400]) == pytest.approx([-3.0, -3.0], abs=0.3)
    assert gains_db(response, [400, 600, 1000, 2000, 3000]) == pytest.approx(0.0, abs=0.5)
    assert gains_db(response, [50, 100, 150, 4300, 6000, 7500]).max() < -40


@pytest.mark.parametrize("codec", [opus, mp3])
@pytest.mark.parametrize("length", [1, 1000, 15999, 32000])
def test_a_codec_keeps_length_and_time_but_not_the_samples(codec: object, length: int) -> None:
    clean = speech_like()[:length]
    heard = codec(clean)  # type: ignore[operator]
    assert heard.shape == clean.shape and heard.dtype == np.float32
    if length > 1000:
        lag = signal.correlation_lags(length, length)[signal.correlate(heard, clean).argmax()]
        assert abs(lag) <= 2
        assert 0.5 < np.corrcoef(heard, clean)[0, 1] < 0.999


@pytest.mark.parametrize(
    ("encoding", "kbits"),
    [
        ({"format": "OGG", "subtype": "OPUS", "compression_level": OPUS_LOWEST}, (6, 10)),
        (
            {
                "format": "MP3",
                "subtype": "MPEG_LAYER_III",
                "compression_level": MP3_LOWEST,
                "bitrate_mode": "CONSTANT",
            },
            (7.9, 8.4),
        ),
    ],
)
def test_codecs_run_at_their_lowest_rates(encoding: dict[str, object], kbits: tuple[float, float]) -> None:
    file = io.BytesIO()
    soundfile.write(file, speech_like(10.0), RATE, **encoding)
    assert kbits[0] <= 8 * len(file.getvalue()) / 10.0 / 1000 <= kbits[1]


def test_a_codec_that_the_library_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sertool.degrade, "MP3_LOWEST", 1.0)  # which libsndfile 1.2 refuses
    with pytest.raises(
        SerError, match=r"libsndfile \S+ does not write MPEG_LAYER_III \(.+\); install soundfile"
    ) as error:
        mp3(speech_like())
    assert "\n" not in str(error.value)


def test_a_softer_clip() -> None:
    clean = speech_like()
    assert decibels(np.mean(degraded("level-20", clean) ** 2) / np.mean(clean**2)) == pytest.approx(-20.0, abs=1e-3)
    assert np.array_equal(change_level(clean, 0.0), clean)


@pytest.mark.parametrize("whole_db", [6, -6])
def test_a_tilted_microphone_gains_evenly_in_octaves(whole_db: int) -> None:
    response = degraded(f"tilt{whole_db:+d}", impulse())
    hertz = [50.0, 100.0, 632.5, 1265.0, 7900.0]
    expected = [whole_db * (np.log2(f / 50) / np.log2(8000 / 50) - 0.5) for f in hertz]
    assert gains_db(response, hertz) == pytest.approx(expected, abs=0.1)
    # Without a change of phase what was symmetric stays so.
    assert response[15000:16000] == pytest.approx(response[16001:17001][::-1], abs=1e-6)
    assert tilt(tilt(speech_like(), 6.0), -6.0)[4000:-4000] == pytest.approx(speech_like()[4000:-4000], abs=1e-3)


# --- excerpts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "starts"),
    [(31999, [0]), (32000, [0]), (39999, [0]), (40000, [0, 8000]), (56000, [0, 8000, 16000, 24000])],
)
def test_windows_slide_within_a_clip(length: int, starts: list[int]) -> None:
    windows = slide(np.arange(length, dtype=np.float32))
    assert [int(window[0]) for window in windows] == starts
    assert {len(window) for window in windows} == {min(length, 32000)}


@pytest.mark.parametrize(("name", "length"), [("first-1s", 16000), ("first-2s", 32000), ("first-3s", 40000)])
def test_the_beginning_of_a_clip(name: str, length: int) -> None:
    clip = np.arange(40000, dtype=np.float32)
    beginning = CONDITIONS[name].excerpts
    assert beginning is not None
    (heard,) = beginning(clip)
    assert np.array_equal(heard, clip[:length])


# --- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_clip_sounds_the_same_whatever_else_is_degraded(name: str) -> None:
    first, second = speech_like(0.3), speech_like(0.4, seed=1)
    alone = degraded(name, first)
    degraded(name, second, "b.wav")
    assert np.array_equal(degraded(name, first), alone)
    assert np.array_equal(first, speech_like(0.3))  # what was given is not written into
    assert np.array_equal(alone, first) == (CONDITIONS[name].group in ("clean", "length", "sliding"))


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("samples", [np.zeros(8000, np.float32), speech_like()[:3]])
def test_silent_and_very_short_clips_are_no_trouble(name: str, samples: FloatArray) -> None:
    heard = degraded(name, samples)
    assert heard.shape == samples.shape and heard.dtype == np.float32
    assert np.isfinite(heard).all() and (samples.any() or np.abs(heard).max() < 1e-3)


def test_conditions_are_chosen_by_group_and_by_name_in_one_order() -> None:
    assert chosen_conditions() == [*CONDITIONS.values()] and len(CONDITIONS) == 23
    assert [each.name for each in chosen_conditions("sliding,white-5, room")] == [
        "clean", "white-5", "room-0.3", "room-0.6", "room-1.0", "sliding",
    ]  # fmt: skip
    assert [each.name for each in chosen_conditions("clean")] == ["clean"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nose", r"^--conditions 'nose' is unknown; did you mean 'noise'\? valid: babble-10, "),
        ("noise,room-0.5", r"^--conditions 'room-0.5' is unknown; did you mean 'room-0"),
        ("noise,", "^--conditions '' is unknown; valid: babble-10, "),
    ],
)
def test_unknown_conditions_name_the_valid_ones(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chosen_conditions(text)
