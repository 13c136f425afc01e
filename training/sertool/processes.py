"""One training in several processes, started by ``torchrun``: a GPU each computes its share of every batch.

Every process draws the whole batch with the same generators, sends its own rows through the network as far as pooling
and learns those of the others. Head and losses are small, look across the batch, and are computed alike in every
process. Each process answers for an equal share of the loss, so the gradient of every weight, before pooling or after
it, is the sum over the processes. What comes out is the training of one process but for rounding.

Not by ``DistributedDataParallel`` (nor accelerate, which wraps it): that takes the mean of losses that every process
computes of its own rows, which is another loss where clips are compared across the batch, or weigh differently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch

# Before there is a group. Imported later, as an optimizer does, its functions keep the group as a default argument and
# so its threads beyond end(), where the interpreter's end now and then aborts the process.
import torch.distributed.nn
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn import functional

from edge_runtime.errors import SerError, UsageError
from sertool.batches import Batch
from sertool.networks import Student

PATIENCE = timedelta(days=7)
"""For process 0 while it computes spectrograms, or for one whose clips are long. One that has died is noticed at once,
because its connections close, and torchrun ends the others."""


def start() -> None:
    """Join the processes that torchrun has started beside this one, and take the GPU of this one's number.

    Raises:
        UsageError: there are GPUs, but fewer than processes.
    """
    if gpus := torch.cuda.device_count():
        own = int(os.environ.get("LOCAL_RANK", "0"))
        if own >= gpus:
            raise UsageError(
                f"{own + 1} processes or more on a machine of {gpus} GPUs; give torchrun --nproc_per_node {gpus}, or "
                "hide the GPUs: CUDA_VISIBLE_DEVICES="
            )
        torch.cuda.set_device(own)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo",
        store=_store(),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=PATIENCE,
    )


def end() -> None:
    """Leave the other processes. A connection left to the interpreter's end now and then aborts it there."""
    if dist.is_initialized():
        dist.destroy_process_group()


@cache
def _store() -> Any:
    """Return what the processes share besides their tensors; torchrun keeps it, so it outlives each of them."""
    store, _, _ = next(iter(rendezvous("env://")))
    return store


def first_to_fail() -> bool:
    """Tell, once, whether this process fails before all others, which then only lose their connection to it."""
    return bool(_store().add("sertool failures", 1) == 1)


def count() -> int:
    """Return how many processes train together; 1 unless :func:`start` was called.

    Example:
        >>> count(), rank()
        (1, 0)
    """
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; 0 prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def total(number: int) -> int:
    """Return the sum of the numbers that all processes give, once all have given one."""
    numbers = torch.tensor(number)
    if count() > 1:
        _add_up(numbers)  # by gloo, wherever the network is
    return int(numbers)


def barrier() -> None:
    """Wait until all processes are here."""
    total(0)


@contextmanager
def zero_first() -> Iterator[None]:
    """Let process 0 do something before all others, which then find it done.

    Example:
        >>> with zero_first():
        ...     "fill a cache"
        'fill a cache'
    """
    if rank():
        barrier()
    yield
    if not rank():
        barrier()


class _Sum(torch.autograd.Function):
    """Sum over processes. Each element of it enters every process's share of the loss, so gradients are summed too."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        return _summed(values)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return _summed(gradients[0])


def _summed(values: Tensor) -> Tensor:
    # In logical order: the strides of two processes may differ, and what is sent is memory.
    values = values.clone(memory_format=torch.contiguous_format)
    _add_up(values)
    return values


def _add_up(values: Tensor) -> None:
    """Replace contiguous values by their sum over processes."""
    try:
        dist.all_reduce(values)
    except RuntimeError as error:  # the connection is closed
        raise SerError("another process of this command has ended, so all do; see what torchrun says of it") from error


def own_rows(rows: int) -> slice:
    """Return which of so many rows this process computes; with fewer rows than processes it may have none.

    Example:
        >>> own_rows(7)
        slice(0, 7, None)
    """
    first, end = (rows * number // count() for number in (rank(), rank() + 1))
    return slice(first, end)


def together(own: Tensor, rows: int) -> Tensor:
    """Return the rows (rows, C) of all processes, of which this one has computed its :func:`own_rows` (n, C).

    Example:
        >>> together(torch.ones(7, 2), rows=7).shape
        torch.Size([7, 2])
    """
    if count() == 1:
        return own
    place = own_rows(rows)
    padded = functional.pad(own, (0, 0, place.start, rows - place.stop))
    whole: Tensor = _Sum.apply(padded)  # type: ignore[no-untyped-call]
    return whole


def pool(network: Student, batch: Batch) -> Tensor:
    """Return the pooled features (B, C) of a batch, of which each process computes its own rows.

    Args:
        network: prepared by :func:`share_statistics`.
        batch: the same in every process.

    Raises:
        UsageError: several processes, and a network that draws random numbers before pooling.

    Example:
        >>> from sertool.networks import build_network
        >>> network = build_network("cnn6", 7, width=0.125)
        >>> pool(network, Batch(torch.zeros(3, 1, 32, 64))).shape
        torch.Size([3, 64])
    """
    if count() == 1:
        return network.pool(batch.inputs, batch.skip, batch.features)
    own = own_rows(len(batch.inputs))
    features = None if batch.features is None else batch.features[own]
    state = _random_state(batch.inputs.device)
    pooled = network.pool(batch.inputs[own], batch.skip, features)
    if not torch.equal(_random_state(batch.inputs.device), state):
        raise UsageError(
            f"{type(network).__name__} draws random numbers before pooling, others in every process, so several do not "
            "train as one does; train it in one process"
        )
    return together(pooled, len(batch.inputs))


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def backward(loss: Tensor, weights: Sequence[Tensor]) -> None:
    """Compute the gradients of weights from the loss of the whole batch, a scalar that all processes have.

    Example:
        >>> weight = torch.tensor(3.0, requires_grad=True)
        >>> backward(weight**2, [weight])
        >>> weight.grad
        tensor(6.)
    """
    if count() == 1:
        loss.backward()  # type: ignore[no-untyped-call]
        return
    (loss / count()).backward()  # type: ignore[no-untyped-call]
    reached = _summed(torch.tensor([float(weight.grad is not None) for weight in weights], device=loss.device))
    weights = [weight for weight, processes in zip(weights, reached.tolist(), strict=True) if processes]
    for weight in weights:  # a process may have dropped a layer that another has not
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    # At once: every message costs its way, whatever its length.
    summed = _summed(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = torch.split(summed, [gradient.numel() for gradient in gradients])
    for gradient, new in zip(gradients, parts, strict=True):
        gradient.copy_(new.view_as(gradient))


def share_statistics(network: Student) -> None:
    """Make a network's batch normalisation before the head use the rows of all processes, where there are several.

    Other layers that look across the rows of a batch are not known here.
    """
    if count() == 1:
        return
    for name, module in network.named_modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and not name.startswith("head."):
            module.__class__ = SharedBatchNorm  # it keeps its weights, its statistics and its name


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the rows of all processes, as ``torch.nn.SyncBatchNorm``, which knows GPUs only.

    Also for a process without rows.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise (B, C, ...)."""
        if not self.training:
            return super().forward(inputs)
        with torch.no_grad():
            rows, mean, variance = _statistics(inputs)
            if self.running_mean is not None and self.running_var is not None:
                assert self.num_batches_tracked is not None
                self.num_batches_tracked += 1
                share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * rows / (rows - 1), share)
        normalized: Tensor = _Normalization.apply(  # type: ignore[no-untyped-call]
            inputs, self.weight, self.bias, mean, variance, rows, self.eps
        )
        return normalized


def _statistics(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return, over all processes, how many values a channel has (), their mean (C,) and variance (C,), float32."""
    values, axes = inputs.float(), _all_but_channels(inputs)
    rows = inputs.numel() // inputs.shape[1]
    mean = values.sum(axes) / max(rows, 1)
    deviations = (values - _channels(mean, inputs)).square().sum(axes).double()
    mean = mean.double()  # else the variance would be the small difference of two rounded numbers
    sums = torch.stack([torch.full_like(mean, rows), rows * mean, deviations + rows * mean.square()])
    _add_up(sums)
    mean, squares = sums[1:] / sums[0]
    return sums[0, 0].float(), mean.float(), (squares - mean.square()).clamp(min=0).float()


class _Normalization(torch.autograd.Function):
    """Batch normalisation by mean and variance (C,) of ``rows`` values a channel in all processes."""

    @staticmethod
    def forward(
        context: Any,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        rows: Tensor,
        eps: float,
    ) -> Tensor:
        scale = (variance + eps).rsqrt()
        context.save_for_backward(inputs, weight, mean, scale, rows)
        return functional.batch_norm(inputs, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, scale, rows = context.saved_tensors
        axes, gradient = _all_but_channels(inputs), gradients[0].float()
        centred = inputs.float() - _channels(mean, inputs)
        of_bias, of_weight = gradient.sum(axes), (gradient * centred).sum(axes) * scale
        # Mean and variance take their share of every process's gradient (Ioffe and Szegedy, 2015, section 3).
        mean_bias, mean_weight = _summed(torch.stack([of_bias, of_weight])) / rows
        gradient = gradient - _channels(mean_bias, inputs) - centred * _channels(mean_weight * scale, inputs)
        gradient = gradient * _channels(scale if weight is None else scale * weight, inputs)
        gradient = gradient.to(inputs.dtype)
        return (gradient, *((None, None) if weight is None else (of_weight, of_bias)), None, None, None, None)


def _all_but_channels(inputs: Tensor) -> list[int]:
    return [0, *range(2, inputs.ndim)]


def _channels(values: Tensor, inputs: Tensor) -> Tensor:
    """Return one value a channel (C,) in a shape to be combined with inputs (B, C, ...)."""
    return values.view(-1, *[1] * (inputs.ndim - 2))
