"""Log-Mel windows of whole corpora, computed once by the device's own front-end and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

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
    manifest: Manifest, front_end: FrontEnd, window_samples: int, progress: Progress | None = None
) -> FloatArray:
    """Return the log-Mel spectrogram of every clip, tiled or cut to one window.

    The result is cached under a hash of the audio files' contents and of the parameters, so that runs, folds and
    sweeps over one corpus compute it once.

    Args:
        manifest: the clips.
        front_end: parameters of the spectrogram.
        window_samples: samples that each clip is tiled or cut to.
        progress: told how far the work is.

    Returns:
        float32 (clips, frames, mel_bands) in dB, not normalised, in the manifest's order; read-only, from disk.

    Raises:
        AudioError: a clip cannot be read.
        SerError: the cached file is damaged.
    """
    path = cache_folder() / f"log-mel-{_cache_key(manifest, front_end, window_samples)}.npy"
    if not path.is_file():
        _compute(path, manifest, front_end, window_samples, progress)
    try:
        cached: FloatArray = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise SerError(f"{path}: damaged; delete it and run the same command again") from error
    return cached


def _compute(
    path: Path, manifest: Manifest, front_end: FrontEnd, window_samples: int, progress: Progress | None
) -> None:
    shape = (len(manifest), front_end.frames(window_samples), front_end.mel_bands)
    header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": shape}
    # Written, not mapped into memory: where the disk is full, a mapped page kills the process instead of raising.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for row, clip in enumerate(manifest.clips, start=1):
            file.write(log_mel(tile_or_cut(clip.read(), window_samples), front_end).tobytes())
            if progress:
                progress(row, len(manifest))


def _cache_key(manifest: Manifest, front_end: FrontEnd, window_samples: int) -> str:
    contents = [(content_hash(clip.path), clip.start, clip.end) for clip in manifest.clips]
    description = json.dumps([contents, front_end.to_dict(), window_samples])
    return hashlib.sha256(description.encode()).hexdigest()[:16]


def measure_normalization(windows: FloatArray) -> Normalization:
    """Return mean and standard deviation of each mel band over clips and frames.

    Args:
        windows: float32 (clips, frames, mel_bands) of training speakers, dB.

    Returns:
        constants that give each band mean 0 and deviation 1; a band that never changes keeps deviation 1.
    """
    mean = windows.mean(axis=(0, 1), dtype=np.float64)
    std = windows.std(axis=(0, 1), dtype=np.float64)
    # A deviation below 1e-3 dB is a constant band (e.g. above the bandwidth of telephone speech), not information.
    std = np.where(std < 1e-3, 1.0, std)
    return Normalization(tuple(float(x) for x in mean), tuple(float(x) for x in std))
