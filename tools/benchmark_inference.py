"""What inference costs as windows and as a stream: milliseconds, ratio, CPU seconds for each second of audio.

The networks have random weights. All variants of a network are run in turn, many rounds, in one process, on one thread
whose own time is taken, and the quickest tenth counts, so that whatever else the machine does hardly matters; read the
ratios. Each timed call follows one like it, as in a program that does little else; with --cold it follows a walk
through memory that leaves nothing of the network in the caches, as on a machine that does much else.

    python tools/benchmark_inference.py
    python tools/benchmark_inference.py --networks cnn6 --by "onnx int8" torch --cold --json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_networks import FRAMES, FRAMES_A_SECOND, KINDS, noise, random_network, write_files
from rich.console import Console
from rich.table import Table
from torch import Tensor

from edge_runtime.backends import StreamBackend, load_backend
from edge_runtime.frontend import FloatArray
from sertool.networks import NETWORKS, Student, predict
from sertool.networks.context import TimeConv2d, TimeMaxPool2d, time_reach, with_past

LARGER_THAN_CACHES = 1 << 26
"""Bytes."""

HOPS = (16, 32)
"""Frames from one score to the next: 0.25 and 0.5 s."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Cost:
    """What a network costs, in milliseconds of CPU time.

    Attributes:
        network: its name.
        by: what computes it: ``torch``, or library and precision.
        stride: frames of the smallest hop of its stream.
        window: a whole window.
        hop: the smallest hop of the stream, the head over a window of features included.
        two_hops: a hop of two strides.
    """

    network: str
    by: str
    stride: int
    window: float
    hop: float
    two_hops: float

    @property
    def ratios(self) -> tuple[float, float]:
        """How many times a window costs what a hop, and what a hop of two strides costs."""
        return self.window / self.hop, self.window / self.two_hops

    @property
    def loads(self) -> dict[str, list[float | None]]:
        """CPU seconds for each second of audio at each of :data:`HOPS`; None where a stream has no feature so often."""
        streams = {self.stride: self.hop, 2 * self.stride: self.two_hops}
        return {
            "window": [self.window / 1000 * FRAMES_A_SECOND / frames for frames in HOPS],
            "stream": [
                streams[frames] / 1000 * FRAMES_A_SECOND / frames if frames in streams else None for frames in HOPS
            ],
        }


class TorchStream:
    """A causal network in torch as a :class:`StreamBackend`: where its layers pad the past with zeros, it remembers.

    Args:
        network: left as it is.

    Attributes:
        stride: frames per feature.
    """

    def __init__(self, network: Student) -> None:
        self.stride = time_reach(network).stride
        self._network = deepcopy(network)
        layers = [layer for layer in self._network.modules() if isinstance(layer, TimeConv2d | TimeMaxPool2d)]
        self._past = {layer: layer.past for layer in layers if layer.past > 0}
        self._given: Iterator[Tensor | None] = iter(())
        self._kept: list[Tensor] = []
        for layer in self._past:
            layer.past = 0
            layer.register_forward_pre_hook(self._look_back)

    def _look_back(self, layer: TimeConv2d | TimeMaxPool2d, inputs: tuple[Tensor]) -> tuple[Tensor]:
        given, past = next(self._given), self._past[layer]
        joined = with_past(inputs[0], past) if given is None else torch.cat([given, inputs[0]], dim=2)
        self._kept.append(joined[:, :, -past:])
        return (joined,)

    def start(self) -> tuple[Any, ...]:
        """Return the states of a stream that has heard nothing."""
        return (None,) * len(self._past)

    def advance(self, log_mel: FloatArray, states: tuple[Any, ...]) -> tuple[FloatArray, tuple[Any, ...]]:
        """Map the next frames (n * stride, mel_bands) to features (channels, n) and new states."""
        self._given, self._kept = iter(states), []
        with torch.inference_mode():
            features: FloatArray = self._network.features(torch.from_numpy(log_mel)[None, None])[0].numpy()
        return features, tuple(self._kept)

    def classify(self, features: FloatArray) -> FloatArray:
        """Map features (channels, n) to the logits (classes,) of their mean."""
        with torch.inference_mode():
            logits: FloatArray = self._network.head(torch.from_numpy(features)[None].mean(2))[0].numpy()
        return logits


def measure(name: str, by: Sequence[str], rounds: int, cold: bool) -> Iterator[Cost]:
    """Time a network as a window and as hops of one and of two strides."""
    network = random_network(name)
    whole = noise(FRAMES)[None]
    calls: dict[tuple[str, str], Call] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(network, Path(folder))
        for kind in by:
            stream, window = _opened(kind, network, files)
            calls[kind, "window"] = partial(window, whole)
            calls[kind, "hop"] = hop_of(stream, 1)
            calls[kind, "two_hops"] = hop_of(stream, 2)
    spent = interleaved(calls, rounds, cold)
    for kind in by:
        times = {form: spent[kind, form] for form in ("window", "hop", "two_hops")}
        yield Cost(name, kind, stream.stride, **times)


def _opened(
    kind: str, network: Student, files: Mapping[str, tuple[Path, Path]]
) -> tuple[StreamBackend | TorchStream, Callable[[FloatArray], FloatArray]]:
    """Return what computes a hop, and what maps windows (N, frames, mel_bands) to logits (N, classes)."""
    if kind == "torch":
        return TorchStream(network), partial(predict, network)
    window, stream = (load_backend(file) for file in files[kind])
    assert isinstance(stream, StreamBackend)
    return stream, window.predict


def hop_of(stream: StreamBackend | TorchStream, strides: int) -> Call:
    """Return one hop: the trunk over the new frames, the head over a window of features."""
    hop = noise(strides * stream.stride)
    new, states = stream.advance(hop[: stream.stride], stream.start())
    features = np.repeat(new, FRAMES // stream.stride, axis=1)

    def advance_and_classify() -> FloatArray:
        new, _ = stream.advance(hop, states)
        return stream.classify(np.concatenate([features[:, new.shape[1] :], new], axis=1))

    return advance_and_classify


def interleaved(calls: dict[tuple[str, str], Call], rounds: int, cold: bool) -> dict[tuple[str, str], float]:
    """Return the milliseconds of CPU time of each call in its quickest tenth of rounds, after one to warm up."""
    memory = np.zeros(LARGER_THAN_CACHES, np.uint8)
    times: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            if cold:
                memory += 1
            else:
                call()
            began = time.thread_time()
            call()
            times[name].append(1000 * (time.thread_time() - began))
    return {name: float(np.percentile(measured[1:], 10)) for name, measured in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    by = ["torch", *KINDS]
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--by", nargs="+", choices=by, default=by, help="default: all")
    parser.add_argument("--rounds", type=int, default=20, help="default: 20")
    parser.add_argument("--cold", action="store_true", help="empty the caches before each call")
    parser.add_argument("--json", action="store_true", help="print JSON, one line a network and what computes it")
    options = parser.parse_args()
    torch.set_num_threads(1)

    hops = [f"{frames / FRAMES_A_SECOND:.2f} s" for frames in HOPS]
    table = Table("network", "by", "window ms", "hop ms", "2 hops ms", "window / hop", "window / 2 hops")
    for form in ("window", "stream"):
        for hop in hops:
            table.add_column(f"CPU s a s: {form}, {hop}")
    for name in options.networks:
        for cost in measure(name, options.by, options.rounds, options.cold):
            if options.json:
                print(json.dumps(asdict(cost) | {"ratios": cost.ratios, "loads": cost.loads}), flush=True)
            table.add_row(
                name, cost.by, f"{cost.window:.2f}", f"{cost.hop:.3f}", f"{cost.two_hops:.3f}",
                *(f"{ratio:.1f}" for ratio in cost.ratios),
                *("-" if load is None else f"{load:.4f}" for loads in cost.loads.values() for load in loads),
            )  # fmt: skip
    if not options.json:
        Console(width=max(120, Console().width)).print(table)


if __name__ == "__main__":
    main()
