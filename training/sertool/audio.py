"""Audio files in, 16 kHz mono float32 out."""

from __future__ import annotations

import hashlib
import re
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import soxr

from edge_runtime.errors import AudioError
from edge_runtime.frontend import FloatArray, as_samples

SAMPLE_RATE = 16000

CLOCK_GRAIN = 2.0
"""Seconds within which a file's times may not tell two changes apart: those of FAT, the coarsest in use."""


class TruncatedAudioError(AudioError):
    """A file that promises more audio than it holds, e.g. after a broken transfer."""


def read_audio(path: str | Path, start: float | None = None, end: float | None = None) -> FloatArray:
    """Decode a file, or a stretch of it, to 16 kHz mono.

    Channels are averaged; other rates are resampled by soxr in its high quality.

    Args:
        path: any file that libsndfile reads (WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF, ...).
        start: first second to read; the beginning when None.
        end: last second to read; the end of the file when None, or when the file ends earlier.

    Returns:
        float32 (samples,) in [-1, 1], at least one sample.

    Raises:
        TruncatedAudioError: the file ends before its audio does.
        AudioError: the file is missing, empty, not audio, damaged, or holds NaN or infinite samples, or the
            stretch lies outside it or is too short to be resampled.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"{path}: no such audio file")
    try:
        with soundfile.SoundFile(path) as file:
            if _is_truncated(file.extra_info):
                raise TruncatedAudioError(f"{path}: truncated, it ends before its audio does; copy it again")
            rate = file.samplerate
            first = round((start or 0.0) * rate)
            last = file.frames if end is None else min(round(end * rate), file.frames)
            if not 0 <= first < last:
                span = f" between {start or 0:g} s and {end:g} s" if end is not None else ""
                raise AudioError(f"{path}: no audio{span} (the file lasts {file.frames / rate:.2f} s)")
            file.seek(first)
            channels = file.read(last - first, dtype="float32", always_2d=True)
            if len(channels) < last - first:
                raise AudioError(f"{path}: truncated, {len(channels)} of {last - first} samples could be read")
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: not audio that libsndfile reads ({error.error_string})") from error
    samples = as_samples(channels.mean(axis=1), str(path))
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE).astype(np.float32)
    if not len(samples):
        raise AudioError(f"{path}: too short, not one sample at {SAMPLE_RATE} Hz")
    return samples


def _is_truncated(log: str) -> bool:
    """Read libsndfile's log: it decodes what is there of a WAV, AIFF, AU or Ogg file, and mentions the rest here."""
    size = re.search(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    # Programs that write to a pipe cannot know the size: they promise the largest there is.
    cut = size is not None and int(size[2]) < int(size[1]) < 0x7FFFF000
    return cut or "lacks an end-of-stream" in log


def content_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal text; caches are keyed by it.

    A file that has not changed since this process hashed it is not read again. What proves that are its size, inode
    and times of change; within the grain of the clock two contents may share them all (what git calls "racily
    clean"), so that a file this young is always read.

    Raises:
        AudioError: the file is missing.
    """
    path = Path(path)
    try:
        now, state = time.time(), path.stat()
        # The inode's own time cannot be set back, as cp -p and rsync -t do with the other.
        if now - max(state.st_mtime, state.st_ctime) < CLOCK_GRAIN:
            return _hash_bytes(path)
        return _remembered_hash(
            path.absolute(), state.st_size, state.st_dev, state.st_ino, state.st_mtime_ns, state.st_ctime_ns
        )
    except FileNotFoundError as error:
        raise AudioError(f"{path}: no such audio file") from error


@lru_cache(maxsize=1 << 18)
def _remembered_hash(path: Path, *_identity: int) -> str:
    return _hash_bytes(path)


def _hash_bytes(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
