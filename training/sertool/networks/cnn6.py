"""CNN-6: four 5x5 convolutions, two linear layers (4.44 M parameters for 7 classes)."""

from __future__ import annotations

from torch import nn

from sertool.networks.context import Head, Student, TimeConv2d, TimeMaxPool2d, TimePadding, scaled

CHANNELS = (64, 128, 256, 512)


class CNN6(Student):
    """The reference's CNN-6, after PANNs' CNN6 (Kong et al., 2020) with max-pooling.

    Args:
        classes: number of labels.
        time_padding: see :mod:`sertool.networks.context`.
        width: factor of all channels of the trunk; 1 is the reference's network.
    """

    def __init__(self, classes: int, time_padding: TimePadding, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for out in (scaled(wide, width) for wide in CHANNELS):
            layers += [
                TimeConv2d(channels, out, 5, time_padding=time_padding),
                nn.BatchNorm2d(out),
                nn.ReLU(),
                TimeMaxPool2d(2, time_padding=time_padding),
            ]
            channels = out
        self.trunk = nn.Sequential(*layers)
        self.head = Head(channels, classes, rectified_embedding=False)
