"""Convolution and pooling whose context in time comes from one place.

``same`` pads a window with zeros on both sides in time, as the reference's networks do. ``causal`` pads only the past,
by ``kernel - stride`` frames, so that an output never waits for a frame to come and a stream can replace the padding by
the frames before it. Frequency is always padded on both sides.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.compiler import is_exporting
from torch.nn import functional

from edge_runtime.errors import UsageError
from edge_runtime.frontend import FloatArray

TimePadding = Literal["causal", "same"]


def with_past(x: Tensor, frames: int) -> Tensor:
    """Put ``frames`` zero frames before a (B, C, T, F) tensor; a negative number drops that many instead."""
    if frames < 0 and is_exporting():
        # The exporter would fold the padding into the convolution's, which cannot be negative in ONNX.
        return x[:, :, -frames:]
    # Also to drop: the gradient of a slice is laid out channels first, and copying it back and forth took a third of a
    # training step of ResNet-9 on CPU.
    return functional.pad(x, (0, 0, frames, 0))


def scaled(channels: int, width: float) -> int:
    """Return a number of channels scaled by a width, as a multiple of 8, the granule of SIMD kernels.

    Example:
        >>> scaled(64, 0.5), scaled(64, 0.1)
        (32, 8)
    """
    return max(8, round(channels * width / 8) * 8)


class TimeConv2d(nn.Conv2d):
    """A convolution without bias over (B, C, T, F) with square kernel and stride.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: size in time and frequency, odd.
        stride: step in time and frequency.
        time_padding: where the context in time comes from.
        groups: as in :class:`torch.nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        *,
        time_padding: TimePadding,
        groups: int = 1,
    ) -> None:
        both = kernel // 2
        padding = (both, both) if time_padding == "same" else (0, both)
        super().__init__(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
        self.past = kernel - stride if time_padding == "causal" else 0

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, T, F)."""
        return super().forward(with_past(x, self.past) if self.past else x)


class TimeMaxPool2d(nn.MaxPool2d):
    """Max-pooling over (B, C, T, F) with stride 2; its input must not be negative (it follows a ReLU).

    Args:
        kernel: 2, or 3 for overlapping pooling.
        time_padding: where the context in time comes from.
    """

    def __init__(self, kernel: int, *, time_padding: TimePadding) -> None:
        both = (kernel - 1) // 2
        super().__init__(kernel, 2, (both, both) if time_padding == "same" else (0, both))
        self.past = kernel - 2 if time_padding == "causal" else 0

    def forward(self, x: Tensor) -> Tensor:
        """Pool (B, C, T, F)."""
        pooled: Tensor = super().forward(with_past(x, self.past) if self.past else x)
        return pooled


class Head(nn.Module):
    """The two linear layers after the mean over time: ``fc1`` (256), ReLU, ``fc2`` (classes).

    Args:
        channels: of the pooled features.
        classes: number of labels.
        rectified_embedding: whether the embedding that a neighbour loss compares is taken after the ReLU, as in the
            reference's ResNet-9 and MobileNet-15, or before it, as in its VGG-15 and CNN-6.
        dropout: share of pooled features dropped in training.
    """

    def __init__(self, channels: int, classes: int, *, rectified_embedding: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc1 = nn.Linear(channels, 256)
        self.fc2 = nn.Linear(256, classes)
        self.rectified_embedding = rectified_embedding

    def embed(self, pooled: Tensor) -> Tensor:
        """Return the embedding (B, 256) of pooled features (B, channels)."""
        hidden: Tensor = self.fc1(self.dropout(pooled))
        return hidden.relu() if self.rectified_embedding else hidden

    def classify(self, embedding: Tensor) -> Tensor:
        """Return the logits (B, classes) of an embedding (B, 256)."""
        logits: Tensor = self.fc2(embedding if self.rectified_embedding else embedding.relu())
        return logits

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the logits (B, classes) of pooled features (B, channels)."""
        return self.classify(self.embed(pooled))


class Student(nn.Module):
    """A light network: a trunk, usually of convolutions, mean over frequency, mean over time, :class:`Head`.

    A network of your own is a subclass that sets ``trunk`` and ``head``, or also overrides :meth:`features`.

    Attributes:
        trunk: maps (B, 1, T, mel_bands) to (B, C, T', F').
        head: maps the mean over time (B, C) to logits.
    """

    trunk: nn.Module
    head: Head

    def features(self, log_mel: Tensor) -> Tensor:
        """Return the features in time (B, C, T') of normalised log-Mel windows (B, 1, T, mel_bands)."""
        maps: Tensor = self.trunk(log_mel)
        return maps.mean(3)

    def pool(self, log_mel: Tensor, skip: int = 0, count: Tensor | None = None) -> Tensor:
        """Return the features of windows (B, 1, T, mel_bands), averaged over time, (B, C).

        Args:
            log_mel: the windows.
            skip: features at the beginning that do not count.
            count: int64 (B,), how many features of each window count, from there on; all when None.
        """
        features = self.features(log_mel)[:, :, skip:]
        if count is None:
            return features.mean(2)
        count = count.clamp(max=features.shape[2])[:, None]
        counts = torch.arange(features.shape[2], device=features.device) < count
        return (features * counts[:, None]).sum(2) / count

    def embed(self, log_mel: Tensor) -> Tensor:
        """Return the ``fc1`` embeddings (B, 256) of windows (B, 1, T, mel_bands)."""
        return self.head.embed(self.pool(log_mel))

    def forward(self, log_mel: Tensor) -> Tensor:
        """Return the logits (B, classes) of windows (B, 1, T, mel_bands)."""
        logits: Tensor = self.head(self.pool(log_mel))
        return logits


def predict(network: Student, windows: FloatArray, batch_size: int = 64) -> FloatArray:
    """Return the logits of normalised log-Mel windows, in float32.

    Args:
        network: in evaluation mode, on the CPU.
        windows: float32 (N, frames, mel_bands).
        batch_size: windows a pass.

    Returns:
        float32 (N, classes).
    """
    with torch.inference_mode():
        batches = [
            network(torch.from_numpy(windows[start : start + batch_size])[:, None])
            for start in range(0, len(windows), batch_size)
        ]
        logits: FloatArray = torch.cat(batches).numpy()
    return logits


def predict_beginnings(
    network: Student, windows: FloatArray, frames: NDArray[np.int64], batch_size: int = 64
) -> FloatArray:
    """Return the logits of beginnings of windows, as a stream gives them after a reset.

    A causal network's features do not know what follows: those of the whole window are cut instead of the window.

    Args:
        network: causal, in evaluation mode, on the CPU.
        windows: float32 (N, frames, mel_bands).
        frames: (N,) how many frames of each window to hear; the first feature counts in any case.
        batch_size: windows a pass.

    Returns:
        float32 (N, classes).
    """
    logits = []
    with torch.inference_mode():
        stride = feature_stride(network, windows.shape[2])
        for start in range(0, len(windows), batch_size):
            batch = torch.from_numpy(windows[start : start + batch_size])[:, None]
            complete = torch.from_numpy(frames[start : start + batch_size] // stride).clamp(min=1)
            logits.append(network.head(network.pool(batch, count=complete)))
    together: FloatArray = torch.cat(logits).numpy()
    return together


@dataclass(frozen=True)
class TimeReach:
    """How a causal network sees time, in frames of its input.

    Attributes:
        stride: frames from one feature to the next.
        context: frames before a window that its features depend on, rounded up to whole strides.
    """

    stride: int
    context: int


PROBED_FRAMES = 256
"""A multiple of every stride that halvings make; odd lengths leave frames over."""

LONGEST_REACH = 4096
"""Frames (65 s) after which a network that still remembers is taken to remember for ever."""


def time_reach(network: Student, mel_bands: int = 64) -> TimeReach:
    """Measure stride and context of a causal network of any layers.

    Not a number spreads from one frame to exactly the features that depend on it. In float64, because the kernels that
    float32 takes may compute neighbouring outputs together.

    Args:
        network: left as it is.
        mel_bands: bands of the spectrogram.

    Raises:
        UsageError: the last feature of :data:`LONGEST_REACH` frames still depends on the first ones.

    Example:
        >>> from sertool.networks import build_network
        >>> time_reach(build_network("cnn6", 7, "causal", width=0.125))
        TimeReach(stride=16, context=64)
    """
    probed = deepcopy(network).cpu().double().eval()
    stride = feature_stride(probed, mel_bands)
    frames = PROBED_FRAMES
    while frames <= LONGEST_REACH:
        disturbed = torch.zeros(1, 1, frames, mel_bands, dtype=torch.float64)
        disturbed[:, :, stride - 1] = torch.nan  # the last frame before the second feature's own
        with torch.inference_mode():
            touched = probed.features(disturbed).isnan().any(1)[0]
        if not touched[-1]:
            return TimeReach(stride, stride * (int(touched.sum()) - 1))
        frames *= 2
    raise UsageError(
        f"{type(network).__name__} remembers more than {LONGEST_REACH} frames, so no context can replace its past; "
        "set training.context = 0"
    )


def feature_stride(network: Student, mel_bands: int = 64) -> int:
    """Return how many frames a causal network moves on from one feature to the next.

    Example:
        >>> from sertool.networks import build_network
        >>> feature_stride(build_network("cnn6", 7, "causal", width=0.125))
        16
    """
    weight = next(network.parameters())
    frames = torch.zeros(1, 1, PROBED_FRAMES, mel_bands, dtype=weight.dtype)
    with torch.inference_mode():
        return PROBED_FRAMES // int(network.features(frames).shape[2])


def count_parameters(network: nn.Module) -> int:
    """Return the number of weights, including the running statistics of batch normalisation, as Keras counts them."""
    trained = sum(parameter.numel() for parameter in network.parameters())
    return trained + sum(buffer.numel() for buffer in network.buffers() if buffer.is_floating_point())


def count_macs(network: nn.Module, frames: int, mel_bands: int = 64) -> int:
    """Return the multiply-accumulate operations of convolutions and linear layers for one window.

    Args:
        network: any module that takes (1, 1, frames, mel_bands).
        frames: length of the window.
        mel_bands: bands of the spectrogram.
    """
    total = 0

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        total += weight[0].numel() * output.numel()  # type: ignore[index,operator,union-attr]

    hooks = [
        module.register_forward_hook(count) for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 1, frames, mel_bands))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return total
