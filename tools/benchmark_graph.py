"""How long the neighbour graph of a large corpus takes, how much memory, and how many true neighbours it holds.

    python tools/benchmark_graph.py
    python tools/benchmark_graph.py --clips 100000 --json

The embeddings are drawn: a large common part, speakers, labels and what is left, with a spectrum that falls as that of
speech models does. Whoever searches independent noise finds nothing, in cells or elsewhere. Recall is of a sample's ten
nearest, against comparing it with all.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from sertool.graph import find_nearest, load_graph

SPEAKER_CLIPS = 500
LABELS = 8
PIECE = 50_000


def draw(clips: int, dimension: int) -> NDArray[np.float32]:
    """Return embeddings (clips, dimension)."""
    random = np.random.default_rng(0)
    spectrum = (1.0 + np.arange(dimension)) ** -0.5
    speakers = random.normal(size=(max(1, clips // SPEAKER_CLIPS), dimension))
    labels = 0.7 * random.normal(size=(LABELS, dimension))
    vectors = np.empty((clips, dimension), np.float32)
    for start in range(0, clips, PIECE):
        piece = vectors[start : start + PIECE]
        of_speaker = speakers[random.integers(0, len(speakers), len(piece))]
        of_label = labels[random.integers(0, LABELS, len(piece))]
        piece[:] = 3.0 + spectrum * (of_speaker + of_label + 0.8 * random.normal(size=piece.shape))
    return vectors


def measure(clips: int, dimension: int) -> dict[str, Any]:
    """Build, write and read a graph, telling on stderr how far it is."""
    console = Console(stderr=True)
    seconds: dict[str, float] = {}
    began = time.monotonic()

    def lap(name: str) -> None:
        nonlocal began
        now = time.monotonic()
        seconds[name], began = now - began, now
        console.print(f"{name}: {seconds[name]:.0f} s")

    vectors, keys = draw(clips, dimension), [f"part-{row // 1000:04d}/clip-{row:07d}.wav" for row in range(clips)]
    lap("draw")
    nearest = find_nearest(keys, vectors, count=10, centre=True)
    lap("search")
    graph = nearest.joined(threshold=0.0, mutual=True)
    lap("join")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.csv"
        graph.save(path)
        lap("write")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        same = np.array_equal(load_graph(path).neighbours[:, : graph.neighbours.shape[1]], graph.neighbours)
        lap("read")
    if not same:
        raise SystemExit("benchmark_graph: the graph that was read is not the one that was written")
    minutes = sum(seconds[name] for name in ("search", "join", "write")) / 60
    return {
        "clips": clips, "dimension": dimension, "edges": len(graph.edges), **nearest.search, "minutes": minutes,
        "seconds": seconds, "peak_gb": peak / 1e9, "cores": os.cpu_count(),
    }  # fmt: skip


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="Measure what the neighbour graph of a large corpus costs.")
    parser.add_argument("--clips", type=int, default=1_000_000, help="how many embeddings (default: 1000000)")
    parser.add_argument("--dimension", type=int, default=256, help="of each (default: 256)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found = measure(options.clips, options.dimension)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(
        f"{found['clips']:,} embeddings of {found['dimension']} dimensions on {found['cores']} cores: {found['index']}"
    )
    print(f"{found['minutes']:.1f} minutes, {found['peak_gb']:.1f} GB at most, recall at 10 {found['recall']:.1%}")


if __name__ == "__main__":
    main()
