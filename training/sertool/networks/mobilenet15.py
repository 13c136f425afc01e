"""MobileNet-15: a 3x3 convolution, six depthwise separable blocks, two linear layers (0.67 M for 7 classes)."""

from __future__ import annotations

from torch import nn

from sertool.networks.context import Head, Student, TimeConv2d, TimePadding

BLOCKS = ((128, 1), (128, 2), (256, 1), (256, 2), (512, 1), (512, 2))
"""Output channels and stride of each block."""


class MobileNet15(Student):
    """The reference's MobileNet-15, after MobileNet (Howard et al., 2017).

    Args:
        classes: number of labels.
        time_padding: see :mod:`sertool.networks.context`.
    """

    def __init__(self, classes: int, time_padding: TimePadding) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            TimeConv2d(1, 64, 3, stride=2, time_padding=time_padding),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        ]
        channels = 64
        for out, stride in BLOCKS:
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
