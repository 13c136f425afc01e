import hashlib
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.signal
import soundfile

from edge_runtime.errors import AudioError
from sertool.audio import content_hash, read_audio


def tone(rate: int, hertz: float, seconds: float = 1.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize(("suffix", "subtype"), [("wav", "PCM_16"), ("wav", "FLOAT"), ("flac", "PCM_24")])
def test_16_khz_mono_comes_back_as_it_was_written(tmp_path, suffix, subtype):
    samples = tone(16000, 440).astype(np.float32)
    soundfile.write(tmp_path / f"a.{suffix}", samples, 16000, subtype=subtype)
    read = read_audio(tmp_path / f"a.{suffix}")
    assert read.dtype == np.float32
    step = {"PCM_16": 2**-15, "PCM_24": 2**-23, "FLOAT": 0}[subtype]
    np.testing.assert_allclose(read, samples, rtol=0, atol=step)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(rate, 440), rate, subtype="FLOAT")
    read = read_audio(tmp_path / "a.wav")
    assert len(read) == 16000
    np.testing.assert_allclose(read[2000:-2000], tone(16000, 440)[2000:-2000], atol=1e-3)


def test_resampling_agrees_with_scipy_and_does_not_alias(tmp_path):
    noise = 0.1 * np.random.default_rng(0).standard_normal(48000)
    band = scipy.signal.sosfiltfilt(scipy.signal.butter(8, 6000, fs=48000, output="sos"), noise)
    soundfile.write(tmp_path / "band.wav", band, 48000, subtype="FLOAT")
    expected = scipy.signal.resample_poly(band, 1, 3)
    np.testing.assert_allclose(read_audio(tmp_path / "band.wav")[100:-100], expected[100:-100], atol=2e-3)
    soundfile.write(tmp_path / "high.wav", tone(48000, 11000), 48000, subtype="FLOAT")
    assert np.abs(read_audio(tmp_path / "high.wav")[100:-100]).max() < 1e-3


def test_channels_are_averaged(tmp_path):
    left, right = tone(16000, 440), tone(16000, 1000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right, 0 * left], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), (left + right) / 3, atol=1e-6)


def test_a_stretch_is_a_slice_of_the_whole(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16000, 440, 2.0), 16000, subtype="FLOAT")
    whole = read_audio(tmp_path / "a.wav")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", 0.25, 1.5), whole[4000:24000])
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", 1.5, 9.0), whole[24000:])


@pytest.mark.parametrize(("start", "end"), [(3.0, None), (2.0, 3.0), (1.0, 0.5), (0.5, 0.5)])
def test_a_stretch_outside_the_file_is_refused(tmp_path, start, end):
    soundfile.write(tmp_path / "a.wav", tone(16000, 440, 2.0), 16000)
    with pytest.raises(AudioError, match=r"a\.wav: no audio.*lasts 2\.00 s"):
        read_audio(tmp_path / "a.wav", start, end)


def test_files_without_usable_audio_are_refused(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is no audio")
    (tmp_path / "folder.wav").mkdir()
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), 16000)
    broken = tone(16000, 440)
    broken[5000] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "cut.flac", tone(16000, 440), 16000)
    whole = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    for name in ("absent.wav", "empty.wav", "text.wav", "folder.wav", "nothing.wav", "nan.wav", "cut.flac"):
        with pytest.raises(AudioError, match=name) as caught:
            read_audio(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_content_hash_is_the_sha256_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert content_hash(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(AudioError, match="no such audio file"):
        content_hash(tmp_path / "b")


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files that are hashed from here on."""
    names = []
    digest = hashlib.file_digest

    def counted(file, algorithm):
        names.append(Path(file.name).name)
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


def an_hour_later(monkeypatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)


def test_a_file_that_has_not_changed_is_read_once(tmp_path, monkeypatch, reads):
    (tmp_path / "a").write_bytes(b"abc")
    an_hour_later(monkeypatch)
    expected = hashlib.sha256(b"abc").hexdigest()
    assert [content_hash(tmp_path / "a") for _ in range(3)] == [expected] * 3
    monkeypatch.chdir(tmp_path)
    assert content_hash("a") == expected
    assert reads == ["a"]


@pytest.mark.parametrize("age", [0, 3600])
def test_a_replacement_of_the_same_size_within_the_clocks_grain_is_noticed(tmp_path, monkeypatch, age):
    changed = time.time()
    modified = changed - age  # as cp -p sets it
    stamp = {"st_mtime": modified, "st_mtime_ns": int(modified * 1e9)}
    stamp |= {"st_ctime": changed, "st_ctime_ns": int(changed * 1e9)}
    monkeypatch.setattr(Path, "stat", lambda _: SimpleNamespace(st_size=3, st_dev=1, st_ino=1, **stamp))
    for content in (b"abc", b"abd"):
        (tmp_path / "a").write_bytes(content)
        assert content_hash(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("written", ["a", "b"])
def test_a_replacement_with_the_size_and_time_of_the_old_file_is_noticed(tmp_path, monkeypatch, reads, written):
    (tmp_path / "a").write_bytes(b"abc")
    state = (tmp_path / "a").stat()
    with monkeypatch.context() as later:
        an_hour_later(later)
        content_hash(tmp_path / "a")
    time.sleep(0.02)  # the clock's real grain
    (tmp_path / written).write_bytes(b"abd")
    os.utime(tmp_path / written, ns=(state.st_atime_ns, state.st_mtime_ns))
    (tmp_path / written).rename(tmp_path / "a")
    an_hour_later(monkeypatch)
    assert content_hash(tmp_path / "a") == hashlib.sha256(b"abd").hexdigest()
    assert reads == ["a", "a"]
