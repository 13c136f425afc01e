"""Conditions under which a device may hear a voice, applied to clean clips in memory: noise, rooms, channels, lengths.

Everything takes and returns float32 samples at 16 kHz and keeps their number. What is random follows from a name and a
clip's key alone, so that a clip sounds the same whatever else is degraded, in which order, and at every level of noise.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray
from scipy import signal

from edge_runtime.errors import SerError, UsageError, nearest
from edge_runtime.frontend import FloatArray, tile_or_cut
from sertool.audio import SAMPLE_RATE

SEED = 0
"""Of everything random here."""

SNRS_DB = (20, 10, 5)
REVERBERATION_TIMES_S = (0.3, 0.6, 1.0)

DIRECT_TO_REVERBERANT_DB = 0.0
"""The voice is as far away as makes its reverberation as loud as itself: the critical distance."""

FIRST_REFLECTION_S = 0.005
"""From the direct path to the reverberation: a detour of 1.7 m."""

TELEPHONE_BAND_HZ = (300.0, 3400.0)
TELEPHONE_RATE = 8000
TELEPHONE_ORDER = 8
"""Of the Butterworth filter at each edge: 48 dB an octave."""

OPUS_LOWEST = 1.0
"""soundfile's compression level for 6 kbit/s, the least that Opus has."""

MP3_LOWEST = 0.99
"""soundfile's compression level for 8 kbit/s, the least that MP3 has at 16 kHz; libsndfile 1.2 refuses 1.0."""

MP3_DELAY = 576 + 529
"""Samples by which LAME's encoder and every decoder delay; only files with a variable rate say so themselves."""

TILT_BAND_HZ = (50.0, 8000.0)

SLIDING_WINDOW_S, SLIDING_HOP_S = 2.0, 0.5
"""The hop is the device's default; its window is longer than most acted clips."""

BABBLING_VOICES = 6
MUSIC_S = 60.0

SMALLEST_POWER = 2.0**-126
"""What silence counts for where a power divides; its root still has a reciprocal in float32."""

Random = np.random.Generator
Voices = Callable[[Random, int], list[FloatArray]]
"""Gives so many clips of other people, drawn by the generator."""


# --- signals -------------------------------------------------------------------------------------------------------


def seeded(*names: str) -> Random:
    """Return a generator that follows from names alone.

    Example:
        >>> first, again = seeded("white", "a.wav"), seeded("white", "a.wav")
        >>> bool(first.integers(1000) == again.integers(1000))
        True
    """
    digest = hashlib.sha256("\0".join((str(SEED), *names)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def add_noise(samples: FloatArray, noise: FloatArray, snr_db: float) -> FloatArray:
    """Add noise at a signal-to-noise ratio over the powers of the whole clip and of the whole noise.

    Silence stays silent, and silent noise changes nothing. What exceeds full scale is not clipped.

    Args:
        samples: (n,).
        noise: (n,).
        snr_db: ``10 log10(power of the samples / power of the noise in the mixture)``.

    Example:
        >>> add_noise(np.array([1.0, -1.0], np.float32), np.array([5.0, 5.0], np.float32), 20.0)
        array([ 1.1, -0.9], dtype=float32)
    """
    wanted = _power(samples) / 10.0 ** (snr_db / 10.0)
    return samples + noise * np.float32(np.sqrt(wanted / max(_power(noise), SMALLEST_POWER)))


def babble(voices: Iterable[FloatArray], length: int, random: Random) -> FloatArray:
    """Return several voices at once, equally loud, each repeated from a random place of its own.

    Args:
        voices: at least one, none empty.
        length: samples of the result.
        random: source of the places.

    Example:
        >>> babble([np.array([1, -1], np.float32)], 4, seeded("babble")).tolist() in ([1, -1, 1, -1], [-1, 1, -1, 1])
        True
    """
    mixture = np.zeros(length, np.float32)
    for voice in voices:
        turned = np.roll(voice, random.integers(len(voice)))
        mixture += tile_or_cut(turned, length) / np.sqrt(max(_power(voice), SMALLEST_POWER))
    return mixture


@cache
def music() -> FloatArray:
    """Return a minute of plucked chords, made by formula, because no recorded music is at hand that may be passed on.

    Twice a second a triad of C major, and its root an octave lower, is struck. A tone has eight harmonics of amplitude
    ``1 / h``, dies away by ``exp(-t / 0.6 s)``, and its pitch swings by 0.5 % five times a second (vibrato). Recorded
    music has voices, drums and much else.

    Returns:
        float32 (960000,).

    Example:
        >>> music().shape
        (960000,)
    """
    random, stroke, ringing = seeded("music"), SAMPLE_RATE // 2, 2 * SAMPLE_RATE
    time = np.arange(ringing) / SAMPLE_RATE
    vibrato = time + 0.005 / (2 * np.pi * 5.0) * (1 - np.cos(2 * np.pi * 5.0 * time))
    envelope = np.exp(-time / 0.6) * np.minimum(1.0, time / 0.01)
    scale = np.array([0, 2, 4, 5, 7, 9, 11])
    piece = np.zeros(round(MUSIC_S * SAMPLE_RATE) + ringing)
    for start in range(0, len(piece) - ringing, stroke):
        degrees = random.integers(7) + np.array([0, 2, 4])
        triad = scale[degrees % 7] + 12 * (degrees // 7)
        for semitones in (triad[0] - 12, *triad):
            phase = 2 * np.pi * 261.63 * 2 ** (semitones / 12) * vibrato
            tone = sum(np.sin(h * phase + random.uniform(0, 2 * np.pi)) / h for h in range(1, 9))
            piece[start : start + ringing] += envelope * tone
    return piece[: round(MUSIC_S * SAMPLE_RATE)].astype(np.float32)


@cache
def room_response(reverberation_time_s: float) -> FloatArray:
    """Return the response of a room: a direct path, and noise that decays by 60 dB in the reverberation time.

    Polack's model (La transmission de l'énergie sonore dans les salles, 1988): ``h(t) = b(t) exp(-3 ln(10) t / RT60)``
    with white Gaussian noise ``b``, the same for every clip, scaled to :data:`DIRECT_TO_REVERBERANT_DB`. Real rooms
    have single early reflections, and low notes die away later than high ones.

    Args:
        reverberation_time_s: RT60.

    Returns:
        float32 (n,), as long as the reverberation time; 1 at the direct path.

    Example:
        >>> room_response(0.3)[0], len(room_response(0.3)) / 16000
        (np.float32(1.0), 0.3)
    """
    count, first = round(reverberation_time_s * SAMPLE_RATE), round(FIRST_REFLECTION_S * SAMPLE_RATE)
    time = np.arange(count - first) / SAMPLE_RATE
    noise = seeded("room", str(reverberation_time_s)).standard_normal(len(time))
    tail = noise * np.exp(-3 * np.log(10) * time / reverberation_time_s)
    tail *= 10 ** (-DIRECT_TO_REVERBERANT_DB / 20) / np.sqrt(np.sum(tail**2))
    response = np.zeros(count, np.float32)
    response[0] = 1.0
    response[first:] = tail
    return response


def reverberate(samples: FloatArray, response: FloatArray) -> FloatArray:
    """Return what is heard through a response, as loud as without; what rings on after the clip is cut.

    Example:
        >>> reverberate(np.array([1, 0, 0], np.float32), np.array([0, 1], np.float32)).round(6) + 0
        array([0., 1., 0.], dtype=float32)
    """
    heard = signal.fftconvolve(samples, response)[: len(samples)]
    return np.asarray(heard * np.sqrt(_power(samples) / max(_power(heard), SMALLEST_POWER)), np.float32)


def telephone(samples: FloatArray) -> FloatArray:
    """Return a clip as a telephone carries it: 300 to 3400 Hz (3 dB down at the edges), through 8 kHz.

    Example:
        >>> abs(telephone(np.ones(16000, np.float32))[4000:12000]).max().round(3)  # nothing below 300 Hz
        np.float32(0.0)
    """
    narrow = soxr.resample(samples, SAMPLE_RATE, TELEPHONE_RATE)
    passes = signal.butter(TELEPHONE_ORDER, TELEPHONE_BAND_HZ, "bandpass", fs=TELEPHONE_RATE, output="sos")
    return _of_length(soxr.resample(signal.sosfilt(passes, narrow), TELEPHONE_RATE, SAMPLE_RATE), len(samples))


def opus(samples: FloatArray) -> FloatArray:
    """Return a clip after Opus at its lowest rate: 6 kbit/s asked for, about 9 with the container.

    Example:
        >>> opus(np.zeros(16001, np.float32)).shape
        (16001,)
    """
    return _through_file(samples, format="OGG", subtype="OPUS", compression_level=OPUS_LOWEST)


def mp3(samples: FloatArray) -> FloatArray:
    """Return a clip after MP3 at its lowest rate, 8 kbit/s constant, without the delay.

    Example:
        >>> mp3(np.zeros(16001, np.float32)).shape
        (16001,)
    """
    flushed = np.pad(samples, (0, MP3_DELAY))
    encoding = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": "CONSTANT"}
    return _of_length(_through_file(flushed, **encoding, compression_level=MP3_LOWEST)[MP3_DELAY:], len(samples))


def change_level(samples: FloatArray, decibels: float) -> FloatArray:
    """Return a clip louder or softer.

    Example:
        >>> change_level(np.array([0.5, -1.0], np.float32), -20.0)
        array([ 0.05, -0.1 ], dtype=float32)
    """
    return samples * np.float32(10 ** (decibels / 20))


def tilt(samples: FloatArray, decibels: float) -> FloatArray:
    """Return a clip through another microphone: a gain that rises by so much, evenly in octaves, from 50 Hz to 8 kHz.

    The gain is 0 dB at the geometric mean of the two (632 Hz), without a change of phase. Below 50 Hz it is what it
    is there.

    Args:
        samples: (n,).
        decibels: how much louder 8 kHz becomes than 50 Hz.

    Example:
        >>> tilt(np.ones(16000, np.float32), 6.0)[8000].round(3)  # of what lies below 50 Hz: -3 dB
        np.float32(0.708)
    """
    # Twice as long with zeros, so that the response cannot reach around the end.
    spectrum = np.fft.rfft(samples, 2 * len(samples))
    hertz = np.fft.rfftfreq(2 * len(samples), 1 / SAMPLE_RATE)
    low, high = np.log(TILT_BAND_HZ)
    place = (np.log(np.maximum(hertz, TILT_BAND_HZ[0])) - low) / (high - low)
    gain = 10 ** (decibels * (place - 0.5) / 20)
    return np.fft.irfft(spectrum * gain, 2 * len(samples))[: len(samples)].astype(np.float32)


def slide(samples: FloatArray) -> list[FloatArray]:
    """Return the windows of 2 s that begin every 0.5 s and lie within a clip; a shorter clip as it is.

    Example:
        >>> [len(window) for window in slide(np.zeros(45000, np.float32))]
        [32000, 32000]
    """
    window, hop = round(SLIDING_WINDOW_S * SAMPLE_RATE), round(SLIDING_HOP_S * SAMPLE_RATE)
    return [samples[start : start + window] for start in range(0, max(1, len(samples) - window + 1), hop)]


def _power(samples: NDArray[np.floating]) -> float:
    return float(np.mean(np.square(samples, dtype=np.float64)))


def _of_length(samples: NDArray[np.floating], length: int) -> FloatArray:
    """Cut what resampling or coding added, or add what it lost."""
    return np.pad(samples[:length], (0, max(0, length - len(samples)))).astype(np.float32)


def _through_file(samples: FloatArray, **encoding: object) -> FloatArray:
    file = io.BytesIO()
    try:
        soundfile.write(file, samples, SAMPLE_RATE, **encoding)
    except soundfile.LibsndfileError as error:
        raise SerError(
            f"libsndfile {soundfile.__libsndfile_version__} does not write {encoding['subtype']} "
            f"({error.error_string}); install soundfile from PyPI, which brings one that does, or choose other "
            "--conditions"
        ) from error
    file.seek(0)
    decoded: FloatArray = soundfile.read(file, dtype="float32")[0]
    return decoded


# --- conditions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Where a clip is heard.

    Attributes:
        key: of the clip.
        voices: of other people.
    """

    key: str
    voices: Voices


@dataclass(frozen=True)
class Condition:
    """One way in which clips are heard.

    Attributes:
        name: stable: results are kept under it.
        group: names several conditions at once.
        text: what it is.
        degrade: gives the samples that arrive, as many as there are.
        excerpts: gives what is heard of these, the answer being the mean over several; all of it when None.
    """

    name: str
    group: str
    text: str
    degrade: Callable[[FloatArray, Scene], FloatArray] = lambda samples, _: samples
    excerpts: Callable[[FloatArray], list[FloatArray]] | None = None


def _white(samples: FloatArray, scene: Scene) -> FloatArray:
    return seeded("white", scene.key).standard_normal(len(samples), np.float32)


def _babble(samples: FloatArray, scene: Scene) -> FloatArray:
    random = seeded("babble", scene.key)
    return babble(scene.voices(random, BABBLING_VOICES), len(samples), random)


def _music(samples: FloatArray, scene: Scene) -> FloatArray:
    start = seeded("music", scene.key).integers(len(music()))
    return tile_or_cut(np.roll(music(), -start), len(samples))


def _noisy(name: str, what: str, noise: Callable[[FloatArray, Scene], FloatArray], snr_db: int) -> Condition:
    return Condition(
        f"{name}-{snr_db}",
        "noise",
        f"{what} at {snr_db} dB signal-to-noise ratio",
        lambda samples, scene: add_noise(samples, noise(samples, scene), snr_db),
    )


def _room(reverberation_time_s: float) -> Condition:
    return Condition(
        f"room-{reverberation_time_s}",
        "room",
        f"a room with a reverberation time of {reverberation_time_s} s",
        lambda samples, _: reverberate(samples, room_response(reverberation_time_s)),
    )


def _tilted(decibels: int) -> Condition:
    return Condition(
        f"tilt{decibels:+d}",
        "microphone",
        f"a microphone that tilts the spectrum by {decibels:+d} dB from 50 Hz to 8 kHz",
        lambda samples, _: tilt(samples, decibels),
    )


def _beginning(seconds: int) -> Condition:
    return Condition(
        f"first-{seconds}s",
        "length",
        f"the first {seconds} s of each clip",
        excerpts=lambda samples: [samples[: seconds * SAMPLE_RATE]],
    )


def _all_conditions() -> list[Condition]:
    noises = {
        "white": ("white noise", _white),
        "babble": (f"{BABBLING_VOICES} voices of training speakers", _babble),
        "music": ("music made by formula", _music),
    }
    return [
        Condition("clean", "clean", "as recorded"),
        *(_noisy(name, what, noise, snr_db) for name, (what, noise) in noises.items() for snr_db in SNRS_DB),
        *map(_room, REVERBERATION_TIMES_S),
        Condition("telephone", "telephone", "300 to 3400 Hz, 8 kHz", lambda samples, _: telephone(samples)),
        Condition("opus", "codec", "Opus at its lowest rate, 6 kbit/s", lambda samples, _: opus(samples)),
        Condition("mp3", "codec", "MP3 at its lowest rate, 8 kbit/s", lambda samples, _: mp3(samples)),
        Condition("level-20", "level", "20 dB softer", lambda samples, _: change_level(samples, -20.0)),
        *map(_tilted, (6, -6)),
        *map(_beginning, (1, 2, 3)),
        Condition(
            "sliding",
            "sliding",
            f"mean over windows of {SLIDING_WINDOW_S:g} s, one each {SLIDING_HOP_S:g} s",
            excerpts=slide,
        ),
    ]


CONDITIONS = {condition.name: condition for condition in _all_conditions()}
"""By their names, ``clean`` first."""


def chosen_conditions(text: str = "") -> list[Condition]:
    """Return conditions named by groups or by names, in their usual order, and ``clean`` before them.

    Args:
        text: names joined by commas; empty for all.

    Raises:
        UsageError: a name that is neither of a group nor of a condition.

    Example:
        >>> [condition.name for condition in chosen_conditions("codec, room-0.3")]
        ['clean', 'room-0.3', 'opus', 'mp3']
    """
    groups = {condition.group for condition in CONDITIONS.values()}
    valid = groups | CONDITIONS.keys()
    names = [name.strip() for name in text.split(",")] if text else [*groups]
    for name in names:
        if name not in valid:
            raise UsageError(f"--conditions {name!r} is unknown; {nearest(name, valid)}")
    wanted = {"clean", *names}
    return [condition for condition in CONDITIONS.values() if {condition.name, condition.group} & wanted]
