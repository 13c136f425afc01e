"""Where audio comes from: what a listener and its sources say to each other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np

from edge_runtime.events import Reason
from edge_runtime.frontend import FloatArray

SAMPLE_RATE = 16000


@dataclass(frozen=True)
class Block:
    """Samples that follow each other; from a live source, all that wait to be heard.

    Attributes:
        position: the first one's number in the stream; a jump from one block to the next is lost audio.
        samples: float32 (n,) in [-1, 1].
        gap: why audio is lost, where ``position`` jumps.
    """

    position: int
    samples: FloatArray
    gap: Reason = Reason.OVERFLOW


@dataclass(frozen=True)
class Loss:
    """The source gives nothing any more; the next :class:`Block` says that it does again, and where in the stream.

    Attributes:
        reason: a code for programs.
        detail: a line for people.
    """

    reason: Reason
    detail: str


class Source(Protocol):
    """What a listener listens to.

    Attributes:
        name: what to call it in messages.
        live: whether audio is lost that nobody takes in time; a listener that falls behind then leaves out scores.
    """

    name: str
    live: bool

    def open(self) -> None:
        """Begin to capture, or check that there is something to read."""

    def blocks(self) -> Iterator[Block | Loss]:
        """Give blocks until the source ends or :meth:`stop` is called; wait where none is there yet.

        Raises:
            DeviceError: the source is lost and will not come back; a :class:`Loss` came before.
        """
        ...

    def stop(self) -> None:
        """Let :meth:`blocks` end soon; may be called from any thread and from a signal handler, and twice."""

    def close(self) -> None:
        """Release the device or the file."""


def now() -> float:
    """Return the seconds of a clock that nobody sets and that, where the system has one, counts its sleep too."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


def wall_time() -> str:
    """Return what time it is: ISO 8601 to the millisecond, with the offset from UTC."""
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def mono(channels: np.ndarray, channel: int | None) -> np.ndarray:
    """Return one channel of samples (n, channels): number ``channel``, from 1, or the mean of all in float32.

    Example:
        >>> mono(np.array([[2, 4]], np.int16), 1), mono(np.array([[2, 4]], np.int16), None)
        (array([2], dtype=int16), array([3.], dtype=float32))
    """
    if channel is not None or channels.shape[1] == 1:
        return np.asarray(channels[:, (channel or 1) - 1])
    return np.asarray(channels.mean(axis=1, dtype=np.float32))


class DigitalSilence:
    """Notices that nothing but exact zeros come: no microphone in any room gives them for long.

    Args:
        limit: seconds of zeros that are too many.
        sample_rate: Hz.

    Example:
        >>> silence = DigitalSilence(limit=1.0, sample_rate=4)
        >>> [silence.push(np.array(samples)) for samples in ([0, 0, 0], [0, 0.1, 0], [0, 0, 0])]
        [False, False, True]
    """

    def __init__(self, limit: float, sample_rate: int) -> None:
        self.limit = limit
        self._samples = round(limit * sample_rate)
        self._zeros = 0

    def push(self, samples: np.ndarray) -> bool:
        """Take the next samples (n,) and return whether too many zeros came since the last other one."""
        sound = np.flatnonzero(samples)
        self._zeros = len(samples) - 1 - int(sound[-1]) if sound.size else self._zeros + len(samples)
        return self._zeros >= self._samples

    def reset(self) -> None:
        """Begin to count afresh."""
        self._zeros = 0
