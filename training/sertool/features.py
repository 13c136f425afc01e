"""Log-Mel windows of whole corpora, computed once by the device's own front-end and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import SerError
from edge_runtime.frontend import FloatArray, FrontEnd, Normalization, log_mel, tile_or_cut
from sertool.audio import content_hash
from sertool.corpora.manifest import Manifest
from sertool.files import atomic_path

Progress = Callable[[int, int], None]
"""Called with the number of clips done and the number of all clips."""


def cache_folder() -> Path:
    """Return where log-Mel windows are kept: SERTOOL_CACHE, else ``sertool`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sertool"
    return Path(os.environ.get("SERTOOL_CACHE") or default)


def log_mel_windows(
    manifest: Manifest,
    front_end: FrontEnd,
    window_samples: int,
    progress: Progress | None = None,
    context_frames: int = 0,
) -> FloatArray:
    """Return the log-Mel spectrogram of every clip, tiled or cut to one window.

    The result is cached under a hash of the audio files' contents and of the parameters, so that runs, folds and
    sweeps over one corpus compute it once.

    Args:
        manifest: the clips.
        front_end: parameters of the spectrogram.
        window_samples: samples that each clip is tiled or cut to.
        progress: told how far the work is.
        context_frames: frames put before each window, of the clip as if it had been repeated before it too.

    Returns:
        float32 (clips, context_frames + frames, mel_bands) in dB, not normalised, in the manifest's order; read-only,
        from disk.

    Raises:
        AudioError: a clip cannot be read.
        SerError: the cached file is damaged.
    """
    past = context_frames * front_end.hop

    def compute(row: int) -> FloatArray:
        # Rolled by the context, the repeated clip has its beginning where the window begins.
        samples = np.roll(manifest.clips[row].read(), past)
        return log_mel(tile_or_cut(samples, past + window_samples), front_end)

    lengths = [window_samples, context_frames] if context_frames else [window_samples]
    name = f"log-mel-{cache_key(manifest, front_end.to_dict(), *lengths)}"
    return cached_rows(name, len(manifest), compute, progress)


LONGEST_CLIP_S = 30.0
"""What is taken of a clip that is heard as it is: as much as the device takes for one segment of speech."""


class ClipFrames:
    """The log-Mel frames of clips of different lengths, in one array that may be on disk.

    Args:
        frames: float32 (total, mel_bands), dB.
        ends: int64 (N,), where each clip ends.
        starts: int64 (N,), where each clip begins; where the one before it ends when None.

    Example:
        >>> clips = ClipFrames(np.zeros((5, 64), np.float32), np.array([2, 5]))
        >>> len(clips), clips[1].shape, clips.longest
        (2, (3, 64), 3)
    """

    def __init__(self, frames: FloatArray, ends: NDArray[np.int64], starts: NDArray[np.int64] | None = None) -> None:
        self.frames = frames
        self._ends = ends
        self._starts = np.concatenate([[0], ends[:-1]]) if starts is None else starts

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> FloatArray:
        return self.frames[self._starts[row] : self._ends[row]]

    def __iter__(self) -> Iterator[FloatArray]:
        return (self[row] for row in range(len(self)))

    @property
    def longest(self) -> int:
        """Frames of the longest clip."""
        return int((self._ends - self._starts).max())

    def take(self, rows: Sequence[int]) -> ClipFrames:
        """Return some of the clips, in this order, without copying them."""
        return ClipFrames(self.frames, self._ends[rows], self._starts[rows])

    @classmethod
    def of(cls, clips: Sequence[FloatArray]) -> ClipFrames:
        """Put clips (n_i, mel_bands), at least one, one after the other."""
        return cls(np.concatenate(clips), np.cumsum([len(clip) for clip in clips]))

    @classmethod
    def of_windows(cls, windows: FloatArray, skip: int = 0) -> ClipFrames:
        """Take windows (N, frames, mel_bands) from frame ``skip`` on as clips, without copying them."""
        count, frames, bands = windows.shape
        starts = np.arange(count) * frames
        return cls(windows.reshape(-1, bands), starts + frames, starts + skip)


def longest_samples(front_end: FrontEnd, window_samples: int = 0) -> int:
    """Return how many samples of a clip are taken: :data:`LONGEST_CLIP_S`, or the window where that is longer.

    Example:
        >>> longest_samples(FrontEnd(), 95744)
        480000
    """
    return max(round(LONGEST_CLIP_S * front_end.sample_rate), window_samples)


def log_mel_clip(samples: FloatArray, front_end: FrontEnd, shortest_frames: int) -> FloatArray:
    """Return the log-Mel spectrogram (frames, mel_bands), dB, of a clip as it is.

    A clip of fewer frames than ``shortest_frames`` is repeated to as many, as the device does.
    """
    return log_mel(tile_or_cut(samples, max(front_end.samples(shortest_frames), len(samples))), front_end)


def log_mel_clips(
    manifest: Manifest,
    front_end: FrontEnd,
    shortest_frames: int,
    progress: Progress | None = None,
    window_samples: int = 0,
) -> ClipFrames:
    """Return the log-Mel spectrogram of every clip as it is, up to :data:`LONGEST_CLIP_S`; cached, and read from disk.

    Args:
        manifest: the clips.
        front_end: parameters of the spectrogram.
        shortest_frames: a clip of fewer is repeated to as many, as the device does.
        progress: told how far the work is.
        window_samples: as much of a clip is kept in any case.

    Returns:
        dB, not normalised, in the manifest's order.

    Raises:
        AudioError: a clip cannot be read.
        SerError: the cached file is damaged.
    """
    longest = longest_samples(front_end, window_samples)
    key = cache_key(manifest, front_end.to_dict(), "clips", longest, shortest_frames)
    frames_path, ends_path = (cache_folder() / f"log-mel-{key}.{suffix}" for suffix in ("f32", "npy"))
    if not ends_path.is_file():
        ends, end = [], 0
        with atomic_path(frames_path) as temporary, temporary.open("wb") as file:
            for row, clip in enumerate(manifest.clips, start=1):
                frames = log_mel_clip(clip.read()[:longest], front_end, shortest_frames)
                file.write(frames.tobytes())
                ends.append(end := end + len(frames))
                if progress:
                    progress(row, len(manifest))
        with atomic_path(ends_path) as temporary, temporary.open("wb") as file:
            np.save(file, np.array(ends))
    try:
        known = np.load(ends_path, allow_pickle=False)
        mapped = np.asarray(np.memmap(frames_path, np.float32, "r")).reshape(-1, front_end.mel_bands)
        whole = known.ndim == 1 and len(known) == len(manifest) and len(mapped) == known[-1]
    except (ValueError, EOFError, FileNotFoundError):
        whole = False
    if not whole:
        raise SerError(f"{ends_path}: damaged; delete it and run the same command again")
    return ClipFrames(mapped, known)


def cached_rows(
    name: str, count: int, compute: Callable[[int], FloatArray], progress: Progress | None = None
) -> FloatArray:
    """Return an array whose rows are computed once and kept on disk.

    Args:
        name: of the file in :func:`cache_folder`, without its suffix; says what decides the content.
        count: number of rows, at least one.
        compute: gives a row, float32, all of one shape.
        progress: told how far the work is.

    Returns:
        float32 (count, ...), read-only, from disk.

    Raises:
        SerError: the cached file is damaged.
    """
    path = cache_folder() / f"{name}.npy"
    if not path.is_file():
        _compute(path, count, compute, progress)
    try:
        cached: FloatArray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise SerError(f"{path}: damaged; delete it and run the same command again") from error
    return cached


def _compute(path: Path, count: int, compute: Callable[[int], FloatArray], progress: Progress | None) -> None:
    first = compute(0)
    header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": (count, *first.shape)}
    # Written, not mapped into memory: where the disk is full, a mapped page kills the process instead of raising.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for row in range(count):
            file.write((compute(row) if row else first).tobytes())
            if progress:
                progress(row + 1, count)


def cache_key(manifest: Manifest, *parameters: Any) -> str:
    """Return 16 hexadecimal digits that follow the content of all clips and of parameters that JSON can hold.

    Raises:
        AudioError: the file of a clip is missing.
    """
    contents = [(content_hash(clip.path), clip.start, clip.end) for clip in manifest.clips]
    return hashlib.sha256(json.dumps([contents, *parameters]).encode()).hexdigest()[:16]


def measure_normalization(clips: FloatArray | ClipFrames) -> Normalization:
    """Return mean and standard deviation of each mel band over clips and frames.

    Args:
        clips: of training speakers, dB: float32 (clips, frames, mel_bands), or clips of any lengths. Read one by one:
            they may be more than memory holds.

    Returns:
        constants that give each band mean 0 and deviation 1; a band that never changes keeps deviation 1.
    """
    frames = sum(map(len, clips))
    mean = sum(clip.sum(0, dtype=np.float64) for clip in clips) / frames
    std = np.sqrt(sum(np.square(clip - mean).sum(0) for clip in clips) / frames)
    # A deviation below 1e-3 dB is a constant band (e.g. above the bandwidth of telephone speech), not information.
    std = np.where(std < 1e-3, 1.0, std)
    return Normalization(tuple(float(x) for x in mean), tuple(float(x) for x in std))
