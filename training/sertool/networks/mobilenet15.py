"""MobileNet-15: a 3x3 convolution, six depthwise separable blocks, two linear layers (0.67 M for 7 classes)."""

from __future__ import annotations

from torch import nn

from sertool.networks.context import Head, Student, TimeConv2d, TimePadding, scaled

BLOCKS = ((128, 1), (128, 2), (256, 1), (256, 2), (512, 1), (512, 2))
"""Output channels and stride of each block."""


class MobileNet15(Student):
    """The reference's MobileNet-15, after MobileNet (Howard et al., 2017).

    Args:
        classes: number of labels.
        time_padding: see :mod:`sertool.networks.context`.
        width: factor of all channels of the trunk; 1 is the reference's network.
    """

    def __init__(self, classes: int, time_padding: TimePadding, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled(64, width)
        layers: list[nn.Module] = [
            TimeConv2d(1, channels, 3, stride=2, time_padding=time_padding),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
        for wide, stride in BLOCKS:
            out = scaled(wide, width)
            layers += [
                TimeConv2d(channels, channels, 3, stride, time_padding=time_padding, groups=channels),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                TimeConv2d(channels, out, 1, time_padding=time_padding),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
            channels = out
        self.trunk = nn.Sequential(*layers)
        self.head = Head(channels, classes, rectified_embedding=True, dropout=0.2)
