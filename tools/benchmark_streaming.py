"""What a hop costs as a stream and as a window: milliseconds, ratio, and CPU seconds for each second of audio.

The networks have random weights, which cost what trained ones cost. All of a network's variants are run in turn, many
rounds, on one thread whose own time is taken, and the quickest tenth counts, so that whatever else the machine does
hardly matters; read the ratios.

    python tools/benchmark_streaming.py
    python tools/benchmark_streaming.py --networks cnn6 --precisions int8 fp32 --json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto
from rich.console import Console
from rich.table import Table

from edge_runtime.backends import StreamBackend, load_backend
from edge_runtime.frontend import FloatArray, FrontEnd
from sertool.export.onnx import to_onnx
from sertool.export.quantize import quantize, with_short_windows
from sertool.export.stream import to_file, to_stream
from sertool.networks import NETWORKS, build_network
from sertool.recipe import PAPER_WINDOW_SAMPLES

FRONT_END = FrontEnd()
FRAMES = FRONT_END.frames(PAPER_WINDOW_SAMPLES)
FRAMES_A_SECOND = FRONT_END.sample_rate / FRONT_END.hop


@dataclass(frozen=True)
class Cost:
    """What one hop costs.

    Attributes:
        network: its name.
        precision: of the file.
        hop: seconds.
        window: milliseconds of CPU time of a whole window, as each hop costs without a stream.
        stream: milliseconds of the hop as a stream, the head over a window of features included.
        ratio: of window to stream.
    """

    network: str
    precision: str
    hop: float
    window: float
    stream: float
    ratio: float

    @property
    def load(self) -> tuple[float, float]:
        """CPU seconds for each second of audio, as windows and as a stream."""
        return self.window / 1000 / self.hop, self.stream / 1000 / self.hop


def noise(frames: int) -> FloatArray:
    return np.random.default_rng(0).normal(size=(frames, FRONT_END.mel_bands)).astype(np.float32)


def window_model(name: str, precision: str) -> ModelProto:
    """Return a causal network of random weights as a window model."""
    torch.manual_seed(0)
    model = to_onnx(build_network(name, 7, "causal").eval(), FRAMES, FRONT_END.mel_bands)
    return quantize(model, with_short_windows([noise(FRAMES)] * 3)) if precision == "int8" else model


def measure(name: str, precision: str, rounds: int) -> Iterator[Cost]:
    """Time hops of one and of two strides."""
    with tempfile.TemporaryDirectory() as folder:
        window_file, stream_file = Path(folder) / "window.onnx", Path(folder) / "stream.onnx"
        model = window_model(name, precision)
        onnx.save(model, window_file)
        onnx.save(to_file(to_stream(model)), stream_file)
        window, stream = load_backend(window_file), load_backend(stream_file)
    assert isinstance(stream, StreamBackend)
    stride = stream.stride
    whole = noise(FRAMES)[None]
    hops = {strides: hop_of(stream, strides * stride, FRAMES // stride) for strides in (1, 2)}
    quick = interleaved({0: lambda: window.predict(whole), **hops}, rounds)
    for strides in (1, 2):
        hop = strides * stride / FRAMES_A_SECOND
        yield Cost(name, precision, hop, quick[0], quick[strides], quick[0] / quick[strides])


def hop_of(stream: StreamBackend, frames: int, window_features: int) -> Callable[[], object]:
    """Return one hop: the trunk over the new frames, the head over a window of features."""
    hop = noise(frames)
    features, states = stream.advance(noise(window_features * stream.stride), stream.start())

    def advance_and_classify() -> FloatArray:
        new, _ = stream.advance(hop, states)
        return stream.classify(np.concatenate([features[:, new.shape[1] :], new], axis=1))

    return advance_and_classify


def interleaved(variants: dict[int, Callable[[], object]], rounds: int) -> dict[int, float]:
    """Return the milliseconds of CPU time of each variant in its quickest tenth of rounds, after three to warm up."""
    times: dict[int, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 3):
        for name, call in variants.items():
            began = time.thread_time()
            call()
            times[name].append(1000 * (time.thread_time() - began))
    return {name: float(np.percentile(measured[3:], 10)) for name, measured in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--precisions", nargs="+", choices=["int8", "fp32"], default=["int8"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print JSON, one line a hop")
    options = parser.parse_args()

    table = Table(
        "network", "precision", "hop s", "window ms", "stream ms", "ratio", "CPU s a second: window", "stream"
    )
    for name in options.networks:
        for precision in options.precisions:
            for cost in measure(name, precision, options.rounds):
                if options.json:
                    print(json.dumps(asdict(cost)), flush=True)
                window, stream = cost.load
                table.add_row(
                    name, precision, f"{cost.hop:.3f}", f"{cost.window:.2f}", f"{cost.stream:.3f}", f"{cost.ratio:.1f}",
                    f"{window:.4f}", f"{stream:.4f}",
                )  # fmt: skip
    if not options.json:
        Console().print(table)


if __name__ == "__main__":
    main()
