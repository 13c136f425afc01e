"""Commands of ours as a user runs them, and what is spoken into a microphone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray


@pytest.fixture(scope="session")
def run() -> Callable[[Path, str], str]:
    """``run(folder, command)`` runs a command of ours in a folder and returns what it prints."""

    def run(folder: Path, command: str) -> str:
        program, *words = command.split()
        done = subprocess.run(
            [Path(sys.executable).with_name(program), *words], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def bursts() -> Callable[..., NDArray[np.int16]]:
    """``bursts(seconds, loudness=6000, seed=1)`` gives noise that swells twice a second at 16 kHz, never zero."""

    def bursts(seconds: float, loudness: float = 6000.0, seed: int = 1) -> NDArray[np.int16]:
        time = np.arange(round(seconds * 16000)) / 16000
        envelope = loudness * np.maximum(0, np.sin(2 * np.pi * 2 * time + 0.5)) + 10
        samples = np.round(np.random.default_rng(seed).normal(0, 1, len(time)) * envelope).astype(np.int16)
        samples[samples == 0] = 1
        return samples

    return bursts
