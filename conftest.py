"""What the examples in the docstrings of edge_runtime hear: models and a recording, made by hand."""

from __future__ import annotations

import sys
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.frontend import FloatArray

sys.path.insert(0, str(Path(__file__).parent / "tools"))

RATE = 16000


def _speech(seconds: float) -> FloatArray:
    """Return syllables, two a second, in a quiet room."""
    time = np.arange(round(seconds * RATE)) / RATE
    voice = sum(np.sin(2 * np.pi * 120 * harmonic * time) / harmonic for harmonic in range(1, 30))
    envelope = np.maximum(0, np.sin(2 * np.pi * 2 * time + 0.3)) ** 2
    noise = np.random.default_rng(0).normal(0, 0.0007, len(time))
    return (0.15 * envelope * voice + noise).astype(np.float32)


@pytest.fixture(scope="session")
def _example_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_artifact import tiny_artifact, tiny_file

    folder = tmp_path_factory.mktemp("examples")
    for name in ("model.onnx", "mood.onnx", "stress.onnx"):
        (folder / name).write_bytes(tiny_file())
    artifact = tiny_artifact()
    personal = replace(artifact, normalization=replace(artifact.normalization, personal=True))
    (folder / "personal.onnx").write_bytes(tiny_file(artifact=personal))
    with wave.open(str(folder / "speech.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.round(_speech(3.0) * 32767).astype("<i2").tobytes())
    return folder


@pytest.fixture(autouse=True)
def _examples(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each example in a folder with these files, with three seconds of speech in ``samples``."""
    if isinstance(request.node, pytest.DoctestItem) and "edge_runtime" in request.node.path.parts:
        monkeypatch.chdir(request.getfixturevalue("_example_folder"))
        request.getfixturevalue("doctest_namespace")["samples"] = _speech(3.0)
