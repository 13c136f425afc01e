"""ResNet-9: a 7x7 convolution, three residual blocks, two linear layers (4.96 M parameters for 7 classes)."""

from __future__ import annotations

from torch import Tensor, nn

from sertool.networks.context import Head, Student, TimeConv2d, TimeMaxPool2d, TimePadding, scaled


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a strided 1x1 shortcut; the shortcut has no batch normalisation, as in the reference.

    Args:
        channels: of the input.
        out: channels of the output, at half the rate in time and frequency.
        time_padding: see :mod:`sertool.networks.context`.
    """

    def __init__(self, channels: int, out: int, time_padding: TimePadding) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            TimeConv2d(channels, out, 3, stride=2, time_padding=time_padding),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            TimeConv2d(out, out, 3, time_padding=time_padding),
            nn.BatchNorm2d(out),
        )
        self.shortcut = TimeConv2d(channels, out, 1, stride=2, time_padding=time_padding)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, T, F) to (B, out, T / 2, F / 2)."""
        total: Tensor = self.residual(x) + self.shortcut(x)
        return total.relu()


class ResNet9(Student):
    """The reference's ResNet-9.

    Args:
        classes: number of labels.
        time_padding: see :mod:`sertool.networks.context`.
        width: factor of all channels of the trunk; 1 is the reference's network.
    """

    def __init__(self, classes: int, time_padding: TimePadding, width: float = 1.0) -> None:
        super().__init__()
        first, second, third, last = (scaled(channels, width) for channels in (64, 128, 256, 512))
        self.trunk = nn.Sequential(
            TimeConv2d(1, first, 7, stride=2, time_padding=time_padding),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            TimeMaxPool2d(3, time_padding=time_padding),
            ResidualBlock(first, second, time_padding),
            ResidualBlock(second, third, time_padding),
            ResidualBlock(third, last, time_padding),
        )
        self.head = Head(last, classes, rectified_embedding=True)
