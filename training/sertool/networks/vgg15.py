"""VGG-15: thirteen 3x3 convolutions in five blocks, two linear layers (14.86 M parameters for 7 classes)."""

from __future__ import annotations

from torch import nn

from sertool.networks.context import Head, Student, TimeConv2d, TimeMaxPool2d, TimePadding, scaled

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG15(Student):
    """The reference's VGG-15, after VGG-16 (Simonyan and Zisserman, 2015) with global pooling.

    Args:
        classes: number of labels.
        time_padding: see :mod:`sertool.networks.context`.
        width: factor of all channels of the trunk; 1 is the reference's network.
    """

    def __init__(self, classes: int, time_padding: TimePadding, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for block in BLOCKS:
            for out in (scaled(wide, width) for wide in block):
                layers += [
                    TimeConv2d(channels, out, 3, time_padding=time_padding),
                    nn.BatchNorm2d(out),
                    nn.ReLU(),
                ]
                channels = out
            layers.append(TimeMaxPool2d(2, time_padding=time_padding))
        self.trunk = nn.Sequential(*layers)
        self.head = Head(channels, classes, rectified_embedding=False)
