"""The light networks of the paper, one file each."""

from __future__ import annotations

from collections.abc import Callable

from edge_runtime.errors import UsageError, nearest
from sertool.networks.cnn6 import CNN6
from sertool.networks.context import (
    Student,
    TimePadding,
    TimeReach,
    count_macs,
    count_parameters,
    predict,
    predict_beginnings,
    time_reach,
)
from sertool.networks.mobilenet15 import MobileNet15
from sertool.networks.resnet9 import ResNet9
from sertool.networks.vgg15 import VGG15

__all__ = [
    "NETWORKS",
    "Student",
    "TimePadding",
    "TimeReach",
    "build_network",
    "count_macs",
    "count_parameters",
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


def build_network(name: str, classes: int, time_padding: TimePadding = "same", width: float = 1.0) -> Student:
    """Return a network with fresh weights.

    Args:
        name: a key of :data:`NETWORKS`.
        classes: number of labels.
        time_padding: ``same`` for the paper's networks, ``causal`` for exact streaming.
        width: factor of the channels; 1 is the reference's network.

    Raises:
        UsageError: an unknown name.

    Example:
        >>> count_parameters(build_network("mobilenet15", classes=7))
        674695
    """
    if name not in NETWORKS:
        raise UsageError(f"network {name!r} is unknown; {nearest(name, NETWORKS)}")
    return NETWORKS[name](classes, time_padding, width)
