"""The light networks of the paper, one file each, and those that other packages bring.

A package brings a network by an entry point of the group ``sertool.networks`` (see :mod:`sertool.plugins`): a callable
that takes the number of classes, the time padding (``same`` or ``causal``) and the width (factor of the channels), and
returns a :class:`Student`. Only its trunk is free; the mean over time and the :class:`Head` are part of the method::

    class MyNet(Student):
        def __init__(self, classes: int, time_padding: TimePadding, width: float = 1.0) -> None:
            super().__init__()
            self.trunk = nn.Sequential(
                TimeConv2d(1, 32, 5, stride=2, time_padding=time_padding),
                nn.BatchNorm2d(32),
                nn.ReLU(),
            )
            self.head = Head(32, classes, rectified_embedding=True)

With ``time_padding = "causal"`` no feature may depend on a later frame: :class:`TimeConv2d` and :class:`TimeMaxPool2d`
see to that. Nothing may be normalised over a window, or a stream could not compute it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch

from edge_runtime.errors import UsageError, nearest
from sertool.networks.cnn6 import CNN6
from sertool.networks.context import (
    Head,
    Student,
    TimeConv2d,
    TimeMaxPool2d,
    TimePadding,
    TimeReach,
    count_macs,
    count_parameters,
    feature_stride,
    predict,
    predict_beginnings,
    time_reach,
)
from sertool.networks.mobilenet15 import MobileNet15
from sertool.networks.resnet9 import ResNet9
from sertool.networks.vgg15 import VGG15
from sertool.plugins import network_names, network_plugins

__all__ = [
    "NETWORKS",
    "Head",
    "Student",
    "TimeConv2d",
    "TimeMaxPool2d",
    "TimePadding",
    "TimeReach",
    "build_network",
    "count_macs",
    "count_parameters",
    "feature_stride",
    "find_fault",
    "predict",
    "predict_beginnings",
    "time_reach",
]

NETWORKS: dict[str, Callable[[int, TimePadding, float], Student]] = {
    "vgg15": VGG15,
    "resnet9": ResNet9,
    "cnn6": CNN6,
    "mobilenet15": MobileNet15,
}
"""The paper's."""


def build_network(name: str, classes: int, time_padding: TimePadding = "same", width: float = 1.0) -> Student:
    """Return a network with fresh weights.

    Args:
        name: one of :func:`sertool.plugins.network_names`.
        classes: number of labels.
        time_padding: ``same`` for the paper's networks, ``causal`` for exact streaming.
        width: factor of the channels; 1 is the reference's network.

    Raises:
        UsageError: an unknown name, or a network of another package that cannot be made or is not what it must be.

    Example:
        >>> count_parameters(build_network("mobilenet15", classes=7))
        674695
    """
    if name in NETWORKS:
        return NETWORKS[name](classes, time_padding, width)
    plugins = network_plugins()
    if name not in plugins:
        raise UsageError(f"network {name!r} is unknown; {nearest(name, network_names())}")
    entry = plugins[name]
    try:
        network = entry.load()(classes, time_padding, width)
        fault = find_fault(network, classes, time_padding)
    except Exception as error:  # a package of others may raise anything
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise UsageError(f"network {name!r} ({entry.value}): {' '.join(fault.split())}")
    return network  # type: ignore[no-any-return]


def find_fault(network: object, classes: int, time_padding: TimePadding) -> str:
    """Say what keeps a network from being trained and run as one of the paper's; empty when nothing does.

    It is tried on two random windows of 128 frames, without a draw from torch's generator.
    """
    if not isinstance(network, Student):
        return f"is a {type(network).__name__}; needed: a subclass of sertool.networks.Student"
    if not isinstance(getattr(network, "head", None), Head):
        return "its head is no sertool.networks.Head"
    windows = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 1, 128, 64)).astype(np.float32))
    with torch.inference_mode():
        probed = deepcopy(network).eval()
        features, logits = probed.features(windows), probed(windows)
        windows[:, :, 64:] *= -1
        changed = probed.features(windows)
    half = features.shape[-1] // 2
    faults = {
        f"features of 2 windows are {tuple(features.shape)}; needed: (2, channels, frames)": features.ndim != 3,
        f"logits of 2 windows are {tuple(logits.shape)}; needed: (2, {classes})": logits.shape != (2, classes),
        "answers with numbers that are not finite before it is trained": not torch.isfinite(logits).all(),
        "is not causal, a feature changes with later frames; see TimeConv2d and TimeMaxPool2d": (
            time_padding == "causal" and not torch.allclose(features[..., :half], changed[..., :half], atol=1e-4)
        ),
    }
    return next((fault for fault, found in faults.items() if found), "")
