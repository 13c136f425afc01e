"""What is wrong with a corpus, found before it spoils a training: every clip decoded, every name compared."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import soundfile

from edge_runtime.errors import SerError
from edge_runtime.frontend import FloatArray
from sertool.audio import SAMPLE_RATE, TruncatedAudioError
from sertool.corpora.manifest import Clip, Manifest, RowFault

# Peak below which a 16-bit recording holds nothing but its dither: -72 dBFS, 8 steps.
SILENCE_PEAK = 8 / 32768
# Equal samples in a row at full scale: two can be a real peak, three are a cut-off one.
FULL_SCALE = 0.99
# Seconds by which annotators' times and the lengths of compressed files differ without harm.
END_TOLERANCE = 0.05

KINDS = {
    "row": "an empty cell, a wrong time, more cells than columns, or a clip listed again; not decoded",
    "unreadable": "missing, empty, damaged, no audio, or NaN samples",
    "truncated": "the file's header promises more audio than the file holds",
    "silent": "no sample above -72 dBFS",
    "too short": "shorter than the shortest clip that is of use",
    "too long": "longer than the longest clip that is of use; not decoded",
    "past the end": "a clip that ends after its file does, and loses the rest",
    "clipped": "three or more samples in a row at full scale",
    "duplicate": "the same audio as another clip",
    "gender": "a speaker with two genders, or a gender that is not f, m or empty",
    "spelling": "labels or speakers that differ in case, spaces, punctuation or leading zeros alone",
    "one speaker": "all clips, or all of one label, by a single speaker",
    "one label": "all clips have one label: there is nothing to tell apart",
    "narrow band": "recorded below 16 kHz: the upper mel bands are empty",
}
# What no training gets past, whether or not the user accepts it.
PREVENTS_TRAINING = frozenset({"row", "unreadable", "truncated", "one label"})


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: a key of :data:`KINDS`.
        subject: the clip's key, or the line, speaker or label it is about.
        detail: what is wrong, in a few words.
    """

    kind: str
    subject: str
    detail: str


@dataclass(frozen=True)
class Report:
    """What a check has found.

    Attributes:
        findings: those on rows first, then those on clips, in the order of the manifest.
        seconds: how much audio was decoded.
    """

    findings: tuple[Finding, ...]
    seconds: float


@dataclass(frozen=True)
class Heard:
    """What listening to one clip tells; a clip that could not be decoded has no digest."""

    findings: tuple[Finding, ...]
    seconds: float = 0.0
    digest: str = ""


def check_manifest(
    manifest: Manifest,
    shortest: float = 0.3,
    longest: float = 300.0,
    track: Callable[[Iterator[Heard]], Iterable[Heard]] = iter,
    faults: Sequence[RowFault] = (),
) -> Report:
    """Decode every clip and compare every name; nothing stops at the first finding.

    Args:
        manifest: the corpus.
        shortest: seconds below which a clip is too short.
        longest: seconds above which a clip is too long, and is not decoded.
        track: wraps the iteration over the clips, for a progress bar.
        faults: the rows that :func:`sertool.corpora.manifest.read_manifest` left out.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        heard = list(track(threads.map(lambda clip: _listen(clip, shortest, longest), manifest.clips)))
    findings = [Finding("row", f"line {fault.line}", fault.detail) for fault in faults]
    findings += [finding for one in heard for finding in one.findings]
    findings += _duplicates(manifest, [one.digest for one in heard])
    findings += _gender_findings(manifest)
    findings += _spelling_findings("speaker", manifest.speakers)
    findings += _spelling_findings("label", manifest.labels)
    findings += _one_speaker_findings(manifest)
    if len(manifest.labels) == 1:
        findings.append(Finding("one label", manifest.labels[0], KINDS["one label"]))
    return Report(tuple(findings), sum(one.seconds for one in heard))


def _listen(clip: Clip, shortest: float, longest: float) -> Heard:
    duration = _duration(clip)
    length = min(duration, clip.end or duration) - (clip.start or 0.0)
    findings = []
    if clip.end is not None and clip.end > duration + END_TOLERANCE:
        findings.append(Finding("past the end", clip.key, f"end {clip.end:g} s, but the file lasts {duration:.2f} s"))
    if length > longest:
        detail = f"{length:.0f} s, at most {longest:g} s; cut it with the columns start and end"
        return Heard((Finding("too long", clip.key, detail), *findings))
    try:
        samples = clip.read()
        recorded, rate = _recorded(clip)
    except TruncatedAudioError:
        return Heard((Finding("truncated", clip.key, KINDS["truncated"]),))
    except (SerError, OSError, soundfile.LibsndfileError) as error:
        return Heard((Finding("unreadable", clip.key, str(error).removeprefix(f"{clip.path}: ")),))
    seconds = len(samples) / SAMPLE_RATE
    if np.abs(samples).max(initial=0) < SILENCE_PEAK:
        findings.append(Finding("silent", clip.key, KINDS["silent"]))
    if seconds < shortest:
        findings.append(Finding("too short", clip.key, f"{seconds:.2f} s, at least {shortest:g} s"))
    if _is_clipped(recorded):
        findings.append(Finding("clipped", clip.key, KINDS["clipped"]))
    if rate < SAMPLE_RATE:
        findings.append(Finding("narrow band", clip.key, f"recorded at {rate} Hz: nothing above {rate // 2} Hz"))
    return Heard(tuple(findings), seconds, hashlib.sha256(samples.tobytes()).hexdigest())


def _duration(clip: Clip) -> float:
    try:
        return float(soundfile.info(clip.path).duration)
    except (OSError, soundfile.LibsndfileError):
        return 0.0  # reading it says why


def _recorded(clip: Clip) -> tuple[FloatArray, int]:
    """Decode a clip as it was recorded, for resampling hides clipping: float32 (samples, channels), rate in Hz."""
    with soundfile.SoundFile(clip.path) as file:
        rate = file.samplerate
        file.seek(round((clip.start or 0.0) * rate))
        samples = -1 if clip.end is None else round((clip.end - (clip.start or 0.0)) * rate)
        return file.read(samples, dtype="float32", always_2d=True), rate


def _is_clipped(recorded: FloatArray) -> bool:
    repeats = (recorded[1:] == recorded[:-1]) & (np.abs(recorded[1:]) >= FULL_SCALE)
    return bool((repeats[1:] & repeats[:-1]).any())


def _duplicates(manifest: Manifest, digests: list[str]) -> Iterator[Finding]:
    first: dict[str, Clip] = {}
    for clip, digest in zip(manifest.clips, digests, strict=True):
        other = first.setdefault(digest, clip)
        if not digest or other is clip:
            continue
        conflicts = [
            f"{column} {getattr(other, column)!r} there, {getattr(clip, column)!r} here"
            for column in ("speaker", "label")
            if getattr(other, column) != getattr(clip, column)
        ]
        yield Finding("duplicate", clip.key, "; ".join([f"the same audio as {other.key}", *conflicts]))


def _gender_findings(manifest: Manifest) -> Iterator[Finding]:
    genders: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for clip in manifest.clips:
        genders[clip.speaker][clip.gender] += 1
    for speaker, counts in sorted(genders.items()):
        strange = sorted(set(counts) - {"f", "m", ""})
        if strange:
            yield Finding("gender", speaker, f"gender {strange[0]!r}; write f, m or nothing")
        elif len(counts) > 1:
            listed = ", ".join(f"{gender or 'none'} in {n} clips" for gender, n in sorted(counts.items()))
            yield Finding("gender", speaker, f"more than one gender: {listed}")


def _spelling_findings(what: str, names: list[str]) -> Iterator[Finding]:
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        letters = re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name).casefold())
        alike[re.sub(r"0+(?=\d)", "", letters)].append(name)
    for variants in alike.values():
        if len(variants) > 1:
            yield Finding("spelling", variants[0], f"{what}s {', '.join(map(repr, variants))}: one or several?")


def _one_speaker_findings(manifest: Manifest) -> Iterator[Finding]:
    if len(manifest.speakers) == 1:
        yield Finding("one speaker", manifest.speakers[0], "the only speaker: nobody is left to test on")
        return
    speakers: defaultdict[str, set[str]] = defaultdict(set)
    for clip in manifest.clips:
        speakers[clip.label].add(clip.speaker)
    for label, names in sorted(speakers.items()):
        if len(names) == 1:
            detail = f"the label of speaker {min(names)!r} alone: it cannot be learnt and tested"
            yield Finding("one speaker", label, detail)
