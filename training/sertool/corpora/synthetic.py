"""A synthetic emotional corpus, spoken by espeak-ng: for demonstrations and tests where no real corpus is at hand.

Emotion is rendered by prosody and vocal effort alone (rate, pitch, pitch range, loudness, spectral slope, tremor),
after the tendencies that Scherer, "Vocal communication of emotion", Speech Communication 40 (2003), compiles for acted
speech. Every clip varies at random around them, in its own recording level and room noise, so that the emotions
overlap as real ones do. Figures measured on it say that a tool chain works, not how well it recognises people.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from edge_runtime.errors import MissingDependencyError, SerError, UsageError, nearest
from sertool.audio import SAMPLE_RATE
from sertool.corpora.manifest import Clip
from sertool.files import atomic_path

Signal = NDArray[np.float64]


@dataclass(frozen=True)
class Prosody:
    """How an emotion changes a voice.

    Attributes:
        rate: factor on the speaking rate.
        pitch: shift of espeak-ng's pitch, whose scale runs from 0 to 100.
        pitch_range: factor on espeak-ng's pitch range.
        level: change of the recording level in dB.
        tilt: change of the spectrum's slope in dB per octave: a tense voice is brighter.
        tremor: depth of a 6 Hz amplitude modulation, 0 to 1.
    """

    rate: float
    pitch: float
    pitch_range: float
    level: float
    tilt: float
    tremor: float


PROSODY = {
    "anger": Prosody(rate=1.15, pitch=6, pitch_range=1.5, level=6, tilt=2.0, tremor=0.0),
    "fear": Prosody(rate=1.25, pitch=16, pitch_range=0.6, level=-1, tilt=0.5, tremor=0.5),
    "happiness": Prosody(rate=1.05, pitch=14, pitch_range=1.8, level=2, tilt=0.5, tremor=0.0),
    "neutral": Prosody(rate=1.0, pitch=0, pitch_range=1.0, level=0, tilt=0.0, tremor=0.0),
    "sadness": Prosody(rate=0.8, pitch=-8, pitch_range=0.5, level=-6, tilt=-2.0, tremor=0.1),
}

# Variants of espeak-ng's voice with formants, breath and roughness of their own, women and men by turns; those with an
# audible echo or with clipped output are left out.
_VOICES = (
    *("f1", "m1", "f2", "m2", "f3", "m3", "f4", "m4", "f5", "m5", "Annie", "m6"),
    *("Alicia", "m7", "Andrea", "Alex", "anika", "Denis", "steph", "Hugo", "aunty", "Lee", "grandma", "adam"),
)
_WOMEN = {"f1", "f2", "f3", "f4", "f5", "Annie", "Alicia", "Andrea", "anika", "steph", "aunty", "grandma"}

# Everyday statements that suit any emotion, ten a language.
SENTENCES = {
    "en": (
        "The train leaves at nine tomorrow morning.",
        "She put the letter on the kitchen table.",
        "They are going to paint the house next week.",
        "I have heard that story before.",
        "The keys are in the left pocket of my coat.",
        "We will be back home around seven.",
        "He closed the door and went upstairs.",
        "There is a message for you at the desk.",
        "The dog is waiting outside the shop.",
        "You should have seen the garden today.",
    ),
    "de": (
        "Der Zug fährt morgen früh um neun.",
        "Sie hat den Brief auf den Küchentisch gelegt.",
        "Nächste Woche streichen sie das Haus.",
        "Diese Geschichte habe ich schon gehört.",
        "Die Schlüssel sind in der linken Manteltasche.",
        "Gegen sieben sind wir wieder zu Hause.",
        "Er machte die Tür zu und ging nach oben.",
        "Am Empfang liegt eine Nachricht für dich.",
        "Der Hund wartet draußen vor dem Laden.",
        "Du hättest heute den Garten sehen sollen.",
    ),
    "it": (
        "Il treno parte domani mattina alle nove.",
        "Ha lasciato la lettera sul tavolo della cucina.",
        "La settimana prossima dipingono la casa.",
        "Questa storia l'ho già sentita.",
        "Le chiavi sono nella tasca sinistra del cappotto.",
        "Torniamo a casa verso le sette.",
        "Ha chiuso la porta ed è salito di sopra.",
        "C'è un messaggio per te alla reception.",
        "Il cane aspetta fuori dal negozio.",
        "Dovevi vedere il giardino oggi.",
    ),
}


def synthesise(root: str | Path, language: str = "en", speakers: int = 12, sentences: int = 6) -> Iterator[Clip]:
    """Speak a corpus: every speaker says every sentence in every emotion of :data:`PROSODY`.

    English and the other languages start from different voices, so that up to 12 speakers of a target language are
    strangers to a teacher trained on English. The same arguments give the same bytes; more speakers or more sentences
    leave the clips that were there as they are.

    Args:
        root: where to write ``speaker/speaker_emotion_sentence.flac``, 16 kHz mono 16 bit.
        language: ``en``, ``de`` or ``it``.
        speakers: 2 to 24, half of them women.
        sentences: 1 to 10.

    Yields:
        The clips as they are written.

    Raises:
        UsageError: a language or a number that is not offered.
        MissingDependencyError: espeakng-loader is not installed.
        SerError: espeak-ng does not run on this machine, or a clip cannot be written.
    """
    if language not in SENTENCES:
        raise UsageError(f"no sentences in language {language!r}; {nearest(language, SENTENCES)}")
    _check_number("speakers", speakers, 2, len(_VOICES))
    _check_number("sentences", sentences, 1, len(SENTENCES[language]))
    if importlib.util.find_spec("espeakng_loader") is None:
        raise MissingDependencyError("a synthetic corpus needs espeak-ng: pip install 'sertool[synthetic]'")
    first = 0 if language == "en" else 12
    voices = [_VOICES[(first + number) % len(_VOICES)] for number in range(speakers)]
    root = Path(root).resolve()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        jobs = [threads.submit(_speak_in_process, root, language, voice, sentences) for voice in voices]
        for voice, job in zip(voices, jobs, strict=True):
            job.result()
            yield from _clips(root, language, voice, sentences)


def _check_number(name: str, number: int, least: int, most: int) -> None:
    if not least <= number <= most:
        raise UsageError(f"{number} {name} cannot be synthesised; give {least} to {most}")


def _clips(root: Path, language: str, voice: str, sentences: int) -> Iterator[Clip]:
    speaker, gender = f"{language}-{voice}", "f" if voice in _WOMEN else "m"
    for number in range(1, sentences + 1):
        for label in PROSODY:
            sentence = f"{language}{number:02d}"
            path = root / speaker / f"{speaker}_{label}_{sentence}.flac"
            yield Clip(str(path), path, speaker, label, gender, language, sentence)


def _speak_in_process(root: Path, language: str, voice: str, sentences: int) -> None:
    # espeak-ng keeps the phases of its oscillators in static variables, even when terminated and started anew: only a
    # fresh process speaks the same twice.
    command = [sys.executable, "-m", __spec__.name, str(root), language, voice, str(sentences)]
    worker = subprocess.run(command, capture_output=True, text=True, check=False)
    if worker.returncode != 0:
        reason = (worker.stderr.strip().splitlines() or [f"exit code {worker.returncode}"])[-1]
        raise SerError(f"{root}: espeak-ng did not speak {language}+{voice}: {reason}")


def _speak(root: Path, language: str, voice: str, sentences: int) -> None:
    espeak = _Espeak(f"{language}+{voice}")
    for clip in _clips(root, language, voice, sentences):
        person = _generator(clip.speaker)
        take = _generator(f"{clip.speaker} {clip.sentence} {clip.label}")
        text = SENTENCES[language][int(clip.sentence.removeprefix(language)) - 1]
        with atomic_path(clip.path) as temporary:
            recording = _record(espeak, text, PROSODY[clip.label], person, take)
            soundfile.write(temporary, recording, SAMPLE_RATE, subtype="PCM_16")


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))


def _record(
    espeak: _Espeak, text: str, prosody: Prosody, person: np.random.Generator, take: np.random.Generator
) -> Signal:
    """Speak one sentence as this person in this mood: (samples,) at 16 kHz."""
    rate = 170 * person.uniform(0.88, 1.12) * prosody.rate * take.normal(1, 0.08)
    pitch = 45 + person.uniform(-8, 8) + prosody.pitch + take.normal(0, 4)
    pitch_range = 50 * person.uniform(0.8, 1.2) * prosody.pitch_range * take.normal(1, 0.2)
    tilt = person.normal(0, 0.5) + prosody.tilt + take.normal(0, 0.7)
    speech = _tilted(espeak.speak(text, rate, pitch, pitch_range), tilt)
    seconds = np.arange(len(speech)) / SAMPLE_RATE
    speech *= 1 - prosody.tremor * (0.5 + 0.5 * np.sin(2 * np.pi * 6 * seconds + take.uniform(0, 2 * np.pi)))
    level = -26 + person.normal(0, 2) + prosody.level + take.normal(0, 2)
    noise = -58 + person.normal(0, 3) + take.normal(0, 2)
    recording = _at_level(speech, level) + _at_level(take.standard_normal(len(speech)), noise)
    loudest = float(np.abs(recording).max())
    return recording / max(1.0, 1.01 * loudest)


def _tilted(signal: Signal, decibels_per_octave: float) -> Signal:
    """Change the slope of the spectrum around 1 kHz; what lies below 100 Hz moves as 100 Hz does."""
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(signal), 1 / SAMPLE_RATE), 100) / 1000)
    return np.fft.irfft(np.fft.rfft(signal) * 10 ** (decibels_per_octave * octaves / 20), len(signal))


def _at_level(signal: Signal, decibels: float) -> Signal:
    gain: float = 10 ** (decibels / 20) / np.sqrt(np.mean(signal**2))
    return signal * gain


class _Espeak:
    """One voice of espeak-ng, through its C interface (speak_lib.h)."""

    _SYNCHRONOUS = 2
    _DONT_EXIT = 0x8000
    _UTF8 = 1
    _RATE, _PITCH, _RANGE = 1, 3, 4

    def __init__(self, voice: str) -> None:
        import espeakng_loader

        try:
            self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        except OSError as error:
            raise SerError(f"espeak-ng cannot be loaded ({error})") from error
        data = espeakng_loader.get_data_path().encode()
        self._rate = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, data, self._DONT_EXIT)
        if self._rate <= 0 or self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SerError(f"espeak-ng has no voice {voice!r}; reinstall espeakng-loader")
        self._library.espeak_ng_SetRandSeed(1)  # else the time of day seeds its breath and flutter
        self._pieces: list[Signal] = []
        receiver = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        # The library keeps the bare pointer: without this reference the callback would be collected.
        self._callback = receiver(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _events: int | None) -> int:
        if count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)) / 32768)
        return 0

    def speak(self, text: str, rate: float, pitch: float, pitch_range: float) -> Signal:
        """Return (samples,) at 16 kHz; out-of-range prosody is moved to the nearest that espeak-ng has."""
        self._library.espeak_SetParameter(self._RATE, round(np.clip(rate, 80, 450)), 0)
        self._library.espeak_SetParameter(self._PITCH, round(np.clip(pitch, 0, 99)), 0)
        self._library.espeak_SetParameter(self._RANGE, round(np.clip(pitch_range, 0, 99)), 0)
        self._pieces.clear()
        utf8 = text.encode()
        self._library.espeak_Synth(utf8, len(utf8) + 1, 0, 0, 0, self._UTF8, None, None)
        resampled: Signal = soxr.resample(np.concatenate(self._pieces), self._rate, SAMPLE_RATE)
        return resampled


if __name__ == "__main__":
    _speak(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
