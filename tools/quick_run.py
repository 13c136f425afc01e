"""Train a network within seconds on tones: for what needs a model file whose answers mean something, not good ones.

python tools/quick_run.py resnet9 folder        # the run is folder/run
sertool export folder/run --force -o resnet9.onnx
"""

from __future__ import annotations

import json
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RATE = 16000
LABELS = ("anger", "joy", "neutral", "sadness")
SPEAKERS = 4

RECIPE = """\
[data]
manifest = "{folder}/manifest.csv"
split = "{folder}/split.json"
window_samples = {window_samples}
[network]
name = "{network}"
time_padding = "causal"
[training]
epochs = {epochs}
threads = 1
"""


def syllables(seconds: float, pitch: float, seed: int = 0) -> NDArray[np.int16]:
    """Return a tone in noise that swells twice a second; never exactly zero, as no microphone is."""
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(size=len(time))
    loudness = 4000 * (0.02 + np.maximum(0, np.sin(2 * np.pi * 2 * time + 0.5)))
    samples = np.round(loudness * (np.sin(2 * np.pi * pitch * time) + 0.3 * noise)).astype(np.int16)
    samples[samples == 0] = 1
    return samples


def write_wav(path: Path, samples: NDArray[np.int16]) -> Path:
    """Write 16 kHz mono samples and return the file."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    return path


def quick_run(folder: Path, network: str, window_samples: int = 24576, takes: int = 3, epochs: int = 3) -> Path:
    """Train a causal network, which every form can be exported from, to tell four pitches apart.

    Args:
        folder: an empty one; takes the clips too.
        network: its name in a recipe.
        window_samples: length of its input.
        takes: clips of each of four labels and four speakers.
        epochs: of training.

    Returns:
        The run, to be exported with ``--force``: nobody evaluates it.
    """
    rows = ["file,speaker,label"]
    for seed, (speaker, take, label) in enumerate(np.ndindex(SPEAKERS, takes, len(LABELS))):
        clip = write_wav(folder / f"{speaker}-{take}-{LABELS[label]}.wav", syllables(1.6, 150 + 200 * label, seed))
        rows.append(f"{clip.name},{speaker},{LABELS[label]}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    fold = {"train": ["0", "1", "2"], "test": ["3"]}
    (folder / "split.json").write_text(json.dumps({"folds": [fold]}), encoding="utf-8")
    recipe = RECIPE.format(folder=folder, network=network, window_samples=window_samples, epochs=epochs)
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    run = folder / "run"
    subprocess.run([sys.executable, "-m", "sertool", "train", folder / "recipe.toml", "-o", run], check=True)
    return run


if __name__ == "__main__":
    corpus = Path(sys.argv[2]).absolute()
    corpus.mkdir(parents=True, exist_ok=True)
    quick_run(corpus, sys.argv[1])
