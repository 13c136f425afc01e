"""Quantisation-aware fine-tuning: a network computes with the rounding errors that its int8 file will have.

What is rounded, and how, is what :func:`sertool.export.quantize.quantize` makes of the same network: activations to
unsigned 8 bits by one range a tensor (the steps of what is summed in float a little coarser, as there), weights to 7
bits by one scale an output channel, the layer that makes the logits not at all. Weights go to the nearest step, not
together as in :mod:`sertool.export.rounding`, which leaves alone what lies on a step. Gradients pass the rounding as if
it were not there (the straight-through estimator: Bengio et al., 2013; Jacob et al., 2018). What is learnt is to give
the logits that the network gave before, on the same augmented clips: its labels it knows by heart, and a file is held
to what was trained, not to the labels (so the loss of any distillation: Hinton et al., 2015; here squared differences).

Batch normalisation needs no folding here. After training it only scales and shifts a channel, and a symmetric scale of
its own for each channel rounds the scaled weights as it rounds the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from edge_runtime.errors import UsageError
from edge_runtime.frontend import FloatArray
from sertool.export.quantize import step_of_exact_sum, step_of_term
from sertool.export.rounding import WEIGHT_LIMIT

LAYERS = (torch.conv2d, functional.linear)
"""What has weights."""

SUMS = (torch.Tensor.add, torch.add)
"""What the exporter quantises besides the layers; both of its inputs are outputs of layers."""

AVERAGES = (torch.Tensor.mean, torch.mean, functional.adaptive_avg_pool2d)
"""Averages over feature maps (B, C, T, F): computed in float, but of the 8-bit output of the layer before them."""

SMALLEST = torch.finfo(torch.float32).tiny


class RoundedComputation(TorchFunctionMode):
    """Within it, a network's operators read activations and weights as an int8 file holds them.

    Operators are known by their order, so a network must always call them in the same one. Where an operator follows a
    layer at once, its batch normalisation or its ReLU, the exporter makes one operator of them: so it is enough to
    round what layers, sums and averages read.

    Args:
        network: in evaluation mode.
        windows: normalised log-Mel windows (frames, mel_bands) to measure the activations on, of several lengths.

    Example:
        >>> import numpy as np
        >>> from sertool.networks import build_network
        >>> network = build_network("cnn6", 7, width=0.125).eval()
        >>> rounded = RoundedComputation(network, [np.zeros((32, 64), np.float32)])
        >>> rounded.measure()
        >>> with rounded:
        ...     network(torch.zeros(1, 1, 32, 64)).shape
        torch.Size([1, 7])
    """

    def __init__(self, network: nn.Module, windows: Sequence[FloatArray]) -> None:
        super().__init__()
        self._network = network
        self._windows = windows
        self._ranges: list[tuple[float, float]] = []
        self._steps: list[tuple[float, int]] = []
        self._averaged: set[int] = set()
        self._sums: dict[int, int] = {}
        self._layers: list[Tensor] = []
        self._last_layer = 0
        self._measuring = False
        self._position = 0

    def measure(self) -> None:
        """Measure the ranges of the activations with the weights of now: smallest and largest value seen.

        Raises:
            UsageError: the network has nothing that could be quantised.
        """
        self._ranges, self._measuring = [], True
        try:
            with torch.no_grad():
                device = next(self._network.parameters()).device
                for window in self._windows:
                    self._layers = []
                    with self:
                        self._network(torch.from_numpy(window)[None, None].to(device))
        finally:
            self._measuring = False
        if not self._layers:
            raise UsageError(
                f"{type(self._network).__name__} computes without convolutions and linear layers, so there is nothing "
                "to quantise; set training.quantization_aware = false"
            )
        self._steps = self._steps_of_file()

    def _steps_of_file(self) -> list[tuple[float, int]]:
        """Return step and zero point of each activation, as the exporter chooses them."""
        steps = [np.array(max(high - low, SMALLEST * 255) / 255) for low, high in self._ranges]
        zeros = [round(-low / float(step)) for (low, _), step in zip(self._ranges, steps, strict=True)]
        # Backwards: an addition's terms depend on its result's step, which a mean may change.
        for position in reversed(range(len(steps))):
            if position in self._averaged or position == self._last_layer:
                steps[position] = step_of_exact_sum(steps[position])
            elif self._sums.get(position, len(steps)) < len(steps):
                steps[position] = step_of_term(steps[position], steps[self._sums[position]])
        return [(float(step), zero) for step, zero in zip(steps, zeros, strict=True)]

    def round_weights(self) -> None:
        """Round the network's weights for good: quantised again, they stay as they are."""
        self.measure()
        with torch.no_grad():
            for weight in self._layers[:-1]:
                weight.copy_(_round_weight(weight))

    def __enter__(self) -> RoundedComputation:
        self._position = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Compute one operator."""
        kwargs = kwargs or {}
        if func in LAYERS:
            inputs, weight, *others = args
            if self._measuring:
                self._layers.append(weight)
                self._last_layer = self._position
            elif weight is not self._layers[-1]:  # which makes the logits
                weight = _round_weight(weight)
            return func(self._activation(inputs), weight, *others, **kwargs)
        if func in SUMS and all(isinstance(value, Tensor) for value in args):
            result = self._position + len(args)  # is what is read next
            self._sums |= dict.fromkeys(range(self._position, result), result)
            return func(*(self._activation(value) for value in args), **kwargs)
        if func in AVERAGES and args[0].ndim == 4:
            self._averaged.add(self._position)
            return func(self._activation(args[0]), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _activation(self, values: Tensor) -> Tensor:
        position, self._position = self._position, self._position + 1
        if not self._measuring:
            return _round_activation(values, *self._steps[position])
        if position == len(self._ranges):
            self._ranges.append((0.0, 0.0))  # zero, which pads, is always in range
        low, high = self._ranges[position]
        self._ranges[position] = (min(low, float(values.min())), max(high, float(values.max())))
        return values


def _round_activation(values: Tensor, step: float, zero: int) -> Tensor:
    """Round to 256 steps, of which zero is the one that ``zero`` says; clip what lies outside."""
    return torch.fake_quantize_per_tensor_affine(values, step, zero, 0, 255)


def _round_weight(weight: Tensor) -> Tensor:
    """Round the weights (out, ...) of a layer, symmetrically and with one scale an output channel."""
    largest = weight.detach().abs().flatten(1).amax(1)
    scale = largest.clamp(min=SMALLEST * WEIGHT_LIMIT) / WEIGHT_LIMIT
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -WEIGHT_LIMIT, WEIGHT_LIMIT)
