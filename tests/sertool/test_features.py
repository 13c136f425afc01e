"""Log-Mel windows: the device's own numbers, computed once, never half a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile

from edge_runtime.errors import AudioError, SerError
from edge_runtime.frontend import FrontEnd, Normalization, log_mel, tile_or_cut
from sertool.corpora.manifest import Clip, Manifest
from sertool.features import cache_folder, log_mel_windows, measure_normalization

FRONT_END = FrontEnd()
SAMPLES = 8448


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SERTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path: Path) -> Manifest:
    """Three clips: shorter than the window, longer, and a stretch of a file at another rate."""
    rng = np.random.default_rng(0)
    for name, rate, length in (("short.wav", 16000, 3000), ("long.wav", 16000, 20000), ("rate.flac", 44100, 88200)):
        soundfile.write(tmp_path / name, rng.uniform(-0.5, 0.5, length), rate)
    return Manifest(
        (
            Clip("short.wav", tmp_path / "short.wav", "ada", "joy"),
            Clip("long.wav", tmp_path / "long.wav", "ada", "anger"),
            Clip("rate.flac", tmp_path / "rate.flac", "bob", "joy", start=0.5, end=1.5),
        ),
        tmp_path / "manifest.csv",
    )


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """List the clips that are decoded."""
    read, files = Clip.read, []

    def counting(clip: Clip) -> np.ndarray:
        files.append(clip.file)
        return read(clip)

    monkeypatch.setattr(Clip, "read", counting)
    return files


def test_windows_are_those_of_the_device(corpus: Manifest) -> None:
    windows = log_mel_windows(corpus, FRONT_END, SAMPLES)
    assert (windows.shape, windows.dtype) == ((3, 32, 64), np.float32)
    for window, clip in zip(windows, corpus.clips, strict=True):
        assert np.array_equal(window, log_mel(tile_or_cut(clip.read(), SAMPLES), FRONT_END))


def test_windows_are_those_of_librosa(corpus: Manifest) -> None:
    samples = np.resize(soundfile.read(corpus.clips[0].path, dtype="float32")[0], SAMPLES)
    power = librosa.feature.melspectrogram(
        y=samples, sr=16000, n_fft=512, hop_length=256, n_mels=64, center=False, fmax=8000
    )
    expected = librosa.power_to_db(power, amin=1e-10, top_db=None).T
    assert np.abs(log_mel_windows(corpus, FRONT_END, SAMPLES)[0] - expected).max() < 2e-4


@pytest.mark.parametrize("context", [1, 48])
def test_context_is_the_clip_repeated_before_its_beginning(corpus: Manifest, context: int) -> None:
    longer = log_mel_windows(corpus, FRONT_END, SAMPLES, context_frames=context)
    assert np.array_equal(longer[:, context:], log_mel_windows(corpus, FRONT_END, SAMPLES))
    for frames, clip in zip(longer, corpus.clips, strict=True):
        samples = clip.read()
        past = np.tile(samples, 8)[len(samples) * 8 - context * 256 :]
        signal = np.concatenate([past, np.tile(samples, 8)[:SAMPLES]])
        assert np.array_equal(frames, log_mel(signal, FRONT_END))


def test_a_second_call_decodes_nothing(corpus: Manifest, decoded: list[str]) -> None:
    first = np.array(log_mel_windows(corpus, FRONT_END, SAMPLES))
    assert decoded == ["short.wav", "long.wav", "rate.flac"]
    assert np.array_equal(log_mel_windows(corpus, FRONT_END, SAMPLES), first)
    assert len(decoded) == 3


def test_moved_and_renamed_audio_is_found_again(corpus: Manifest, decoded: list[str], tmp_path: Path) -> None:
    first = np.array(log_mel_windows(corpus, FRONT_END, SAMPLES))
    moved = [
        replace(clip, file=f"moved-{clip.file}", path=clip.path.rename(tmp_path / f"moved-{clip.file}"))
        for clip in corpus.clips
    ]
    assert np.array_equal(log_mel_windows(Manifest(tuple(moved), corpus.path), FRONT_END, SAMPLES), first)
    assert len(decoded) == 3


@pytest.mark.parametrize("change", ["audio", "start", "window", "front-end", "order"])
def test_whatever_decides_the_numbers_makes_them_anew(corpus: Manifest, decoded: list[str], change: str) -> None:
    before = np.array(log_mel_windows(corpus, FRONT_END, SAMPLES))
    clips, front_end, samples = list(corpus.clips), FRONT_END, SAMPLES
    if change == "audio":
        soundfile.write(clips[0].path, np.random.default_rng(9).uniform(-0.5, 0.5, 3000), 16000)
    elif change == "start":
        clips[1] = Clip("long.wav", clips[1].path, "ada", "anger", start=0.1)
    elif change == "window":
        samples = SAMPLES + 256
    elif change == "front-end":
        front_end = FrontEnd(max_hz=7000.0)
    else:
        clips.reverse()
    after = log_mel_windows(Manifest(tuple(clips), corpus.path), front_end, samples)
    assert len(decoded) == 6
    assert after.shape != before.shape or not np.array_equal(after, before)


def test_progress_counts_the_clips(corpus: Manifest) -> None:
    told: list[tuple[int, int]] = []
    log_mel_windows(corpus, FRONT_END, SAMPLES, lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("error", [AudioError("damaged"), KeyboardInterrupt()])
def test_an_interruption_leaves_nothing_and_the_next_call_is_whole(
    corpus: Manifest, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    read = Clip.read

    def failing(clip: Clip) -> np.ndarray:
        if clip.file == "rate.flac":
            raise error
        return read(clip)

    with monkeypatch.context() as patch:
        patch.setattr(Clip, "read", failing)
        with pytest.raises(type(error)):
            log_mel_windows(corpus, FRONT_END, SAMPLES)
    assert not list(cache.glob("*"))
    assert log_mel_windows(corpus, FRONT_END, SAMPLES).shape == (3, 32, 64)
    assert [path.suffix for path in cache.iterdir()] == [".npy"]


def test_a_truncated_cache_is_named(corpus: Manifest, cache: Path) -> None:
    log_mel_windows(corpus, FRONT_END, SAMPLES)
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SerError, match=rf"{path.name}: damaged; delete it"):
        log_mel_windows(corpus, FRONT_END, SAMPLES)


def test_a_missing_clip_is_named(corpus: Manifest) -> None:
    corpus.clips[1].path.unlink()
    with pytest.raises(AudioError, match=r"long\.wav: no such audio file"):
        log_mel_windows(corpus, FRONT_END, SAMPLES)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SERTOOL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sertool"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "sertool"


# --- normalisation -------------------------------------------------------------------------------------------------


def test_normalised_windows_have_mean_zero_and_deviation_one_in_each_band() -> None:
    rng = np.random.default_rng(0)
    windows = (rng.normal(size=(20, 30, 64)) * rng.uniform(1, 20, 64) + rng.uniform(-90, 0, 64)).astype(np.float32)
    normalised = measure_normalization(windows).apply(windows).astype(np.float64)
    assert normalised.mean(axis=(0, 1)) == pytest.approx(np.zeros(64), abs=1e-4)
    assert normalised.std(axis=(0, 1)) == pytest.approx(np.ones(64), abs=1e-4)


def test_a_band_that_never_changes_is_not_blown_up() -> None:
    windows = np.random.default_rng(0).normal(size=(5, 30, 64)).astype(np.float32)
    windows[..., 60:] = -100.0  # above the bandwidth of a telephone
    normalization = measure_normalization(windows)
    assert normalization.std[60:] == (1.0,) * 4 and normalization.mean[60:] == (-100.0,) * 4
    assert isinstance(normalization, Normalization)
    assert np.array_equal(normalization.apply(windows)[..., 60:], np.zeros((5, 30, 4)))
