"""Model files made by hand and sounds made by formula: these tests need neither torch nor a corpus."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
from tiny_stream import tiny_stream_model

from edge_runtime.model_file import seal
from edge_runtime.recognizer import Recognizer

RATE = 16000


@pytest.fixture(scope="session")
def recognizer(model: Path) -> Recognizer:
    return Recognizer(model)


@pytest.fixture(scope="session")
def stream_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid model file of a stream: a feature every 16 frames, with a window of 2 s."""
    path = tmp_path_factory.mktemp("stream") / "tiny-stream.onnx"
    path.write_bytes(seal(tiny_stream_model().SerializeToString()))
    return path


@pytest.fixture(scope="session")
def stream_recognizer(stream_model: Path) -> Recognizer:
    return Recognizer(stream_model)


def _speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Voiced syllables, four a second, over a quiet room: float32 of exact 16-bit values, never zero."""
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = 120 + 20 * np.sin(2 * np.pi * 0.7 * time + seed)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    voice = sum(np.sin(k * phase) / k for k in range(1, 30))
    envelope = np.maximum(0, np.sin(2 * np.pi * 2 * time + 0.3)) ** 2
    noise = np.random.default_rng(seed).normal(0, 0.0007, len(time))
    integers = np.round(32768 * (0.15 * envelope * voice + noise))
    integers[integers == 0] = 1
    return (integers / 32768).astype(np.float32)


@pytest.fixture(scope="session")
def speech():
    """``speech(seconds, seed=0)`` gives a speech-like signal at 16 kHz."""
    return _speech


@pytest.fixture(scope="session")
def room():
    """``room(seconds, level_db=-60, seed=0)`` gives white noise of that level."""

    def room(seconds: float, level_db: float = -60.0, seed: int = 0) -> np.ndarray:
        noise = np.random.default_rng(seed).normal(0, 10 ** (level_db / 20), round(seconds * RATE))
        return noise.astype(np.float32)

    return room


@pytest.fixture(scope="session")
def write_wav():
    """``write_wav(path, samples, rate=16000)`` writes mono 16-bit PCM."""

    def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(np.round(samples * 32768).astype("<i2").tobytes())
        return path

    return write_wav
