"""The count of false alarms, against what the device's own command says of each clip."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "false_alarms.py"
MODEL = ROOT / "models" / "emodb" / "ser_edge_emodb" / "model.onnx"
RATE = 16000


def syllables(seconds: float, pitch: float, loudness: float) -> np.ndarray:
    """Return bursts of harmonics, four a second, which the gate takes for speech."""
    time = np.arange(round(seconds * RATE)) / RATE
    voice = sum(np.sin(2 * np.pi * pitch * harmonic * time) / harmonic for harmonic in range(1, 12))
    return loudness * voice * np.clip(np.sin(2 * np.pi * 4 * time), 0, 1)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a manifest of two speakers, with six calm clips, one of rest, and two of anger each."""
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    rows = []
    for speaker, pitch in {"low": 110.0, "high": 230.0}.items():
        for number, label in enumerate(["neutral"] * 6 + ["calm"] + ["anger"] * 2):
            seconds, loudness = random.uniform(2.0, 3.5), 0.1 if label == "anger" else 0.02
            name = f"{speaker}-{number}.wav"
            samples = syllables(seconds, pitch * random.uniform(0.8, 1.2), loudness) + random.normal(
                0, 1e-4, round(seconds * RATE)
            )
            with wave.open(str(folder / name), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(RATE)
                file.writeframes(np.round(samples * 32767).astype("<i2").tobytes())
            rows.append({"file": name, "speaker": speaker, "label": label})
    path = folder / "clips.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def counted(manifest: Path, *options: str) -> dict:
    done = subprocess.run([sys.executable, TOOL, MODEL, manifest, "--json", *options], capture_output=True, check=True)
    return json.loads(done.stdout)


def told(manifest: Path) -> dict[str, list[str]]:
    """Return what ``ser-edge file`` answers to each clip, by label."""
    rows = list(csv.DictReader(manifest.open()))
    files = [manifest.parent / row["file"] for row in rows]
    command = [Path(sys.executable).with_name("ser-edge"), "file", MODEL, *files, "--json", "--no-calibration"]
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    found: dict[str, list[str]] = {}
    for row, line in zip(rows, lines, strict=True):
        found.setdefault(row["label"], []).append(json.loads(line)["label"])
    return found


def test_it_counts_what_the_device_says_of_each_clip(manifest: Path) -> None:
    found, expected = counted(manifest), told(manifest)
    assert {label: (row["clips"], row["right"]) for label, row in found.items()} == {
        label: (len(answers), answers.count(label)) for label, answers in expected.items()
    }
    silent = {"neutral", "uncertain", "no_speech"}
    assert {label: row["answered"] for label, row in found.items()} == {
        label: sum(answer not in silent for answer in answers) for label, answers in expected.items()
    }
    assert {answer for answers in expected.values() for answer in answers} - silent, "some clip is an alarm"


def test_clips_that_calibrate_are_not_counted(manifest: Path) -> None:
    found = counted(manifest, "--rename", "calm=neutral", "--calibrated")
    assert {label: row["clips"] for label, row in found.items()} == {"anger": 4, "neutral": 8}


def test_louder_clips_are_heard_as_such(manifest: Path) -> None:
    assert counted(manifest, "--gain", "-80")["anger"]["answered"] == 0


def test_a_manifest_without_calm_speech_is_refused_in_one_line(manifest: Path) -> None:
    command = [sys.executable, TOOL, MODEL, manifest, "--rename", "neutral=boredom"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"false_alarms: {manifest}: no clip is labelled 'neutral'; rename one: --rename OLD=neutral"
    ]
