"""What one more model on the same stream costs: CPU milliseconds a minute of audio, for one, two, ... model files.

    python tools/benchmark_group.py models/emodb/ser_edge_emodb/model.onnx models/multi/ser_edge_multi/model.onnx
    python tools/benchmark_group.py model.onnx model.onnx model.onnx --json

Beside each group: what as many sessions of their own cost, in the same process, the quickest of several rounds;
read the ratios. The audio is that of ``benchmark_listener.py``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_listener import SECONDS, room, speech_minute
from numpy.typing import NDArray

from edge_runtime.recognizer import Recognizer
from edge_runtime.session import Session, SessionGroup

PIECE = 1600
"""Samples that come at once: 0.1 s."""


def load(paths: Sequence[Path]) -> list[Recognizer]:
    """Load the files, of which some may be the same: a group tells its models apart by name."""
    models = []
    for number, path in enumerate(paths, start=1):
        model = copy(Recognizer(path))
        model.path = path.with_name(f"{number}-{path.name}")
        models.append(model)
    return models


def cost(listen: Callable[[NDArray[np.float32]], object], samples: NDArray[np.float32]) -> float:
    """Return the CPU milliseconds that a minute takes."""
    began = time.process_time()
    for start in range(0, len(samples), PIECE):
        listen(samples[start : start + PIECE])
    return 1000 * (time.process_time() - began)


def measure(models: Sequence[Recognizer], samples: NDArray[np.float32], rounds: int) -> dict[str, float]:
    """Return the cost of a group and of as many sessions, in ms."""
    together, apart = [], []
    for _ in range(rounds):
        group, sessions = SessionGroup(models), [Session(model) for model in models]
        together.append(cost(group.push, samples))
        apart.append(sum(cost(session.push, samples) for session in sessions))
    return {"together": min(together), "apart": min(apart)}


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description="Measure what several models on one stream cost.")
    parser.add_argument("models", nargs="+", type=Path, metavar="FILE", help="model files; one may be named twice")
    parser.add_argument("--rounds", type=int, default=5, help="of which the quickest counts (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    models = load(options.models)
    with tempfile.TemporaryDirectory() as folder:
        speech = speech_minute(Path(folder)).astype(np.float32) / np.float32(32768)
    audio: dict[str, NDArray[np.float32]] = {"speech": speech, "quiet room": room(SECONDS, 2)}
    rows: list[dict[str, Any]] = [
        {"audio": kind, "models": count, **measure(models[:count], samples, options.rounds)}
        for kind, samples in audio.items()
        for count in range(1, len(models) + 1)
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        "| audio | models | together, ms a minute | in sessions of their own | ratio |\n| --- | --- | --- | --- | --- |"
    )
    for row in rows:
        ratio = row["together"] / row["apart"]
        print(f"| {row['audio']} | {row['models']} | {row['together']:.0f} | {row['apart']:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
