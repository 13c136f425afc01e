"""From what arrives to blocks at the wanted rate, with the losses that nobody tells of: by the times of arrival."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from edge_runtime.events import Reason
from edge_runtime.frontend import FloatArray
from edge_runtime.resample import Resampler
from edge_runtime.sources import Block


@dataclass(frozen=True)
class Captured:
    """What arrived at once.

    Attributes:
        arrived: when, seconds of :func:`~edge_runtime.sources.now`.
        first: number of the first frame in its stream, lost ones included where the stream tells.
        frames: (n, channels), or (n,) of one channel.
        waiting_since: when it may have arrived already, for all that is known; None where ``arrived`` is exact.
    """

    arrived: float
    first: int
    frames: np.ndarray
    waiting_since: float | None = None


LATE_S = 0.3
"""Audio that comes later than this may have followed a loss; no scheduler of an idle board is this late."""

PATIENCE_S = 0.5
"""A backlog comes faster than real time: when nothing made up for the delay in this time, the rest is lost."""

PROGRESS_S = 0.032
"""By how much less late audio must become to have made up for anything: callbacks jitter by a block."""

MOST_HELD_S = 60.0
"""Of a longer burst the oldest audio is dropped."""

BASELINE_S = 10.0
"""Time in which the device's clock and ours cannot drift apart noticeably: 0.1 % of it is 10 ms."""


class DropoutDetector:
    """Tells audio that is late from audio that is lost, by the times at which it arrives.

    PortAudio's overflow flag stays silent where audio is lost in a sound server, and a pipe has no such flag. The lag
    of a frame is its arrival minus the time that its number stands for; the least lag of late is what it costs to
    capture. A frame that lags by ``LATE_S`` more is held back until a burst has made up for it, or has not: then so
    much is missing before it. What waited for its reader counts as late by no more than it must be.

    Args:
        rate: Hz.

    Example:
        >>> detector = DropoutDetector(rate=1000)
        >>> frames = np.zeros((100, 1), np.int16)
        >>> times = [*np.arange(0, 2, 0.1), *np.arange(5, 7, 0.1)]
        >>> found = [detector.push(Captured(t, 100 * i, frames)) for i, t in enumerate(times)]
        >>> [missing for released in found for missing, _ in released if missing]
        [3000]
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._missing = 0.0
        self._held: deque[Captured] = deque()
        self._least = self._least_before = float("inf")
        self._baseline_at = 0.0
        self._excess = 0.0
        self._improved_at = 0.0

    def push(self, captured: Captured) -> list[tuple[int, Captured]]:
        """Take what came and return what is settled, each with the number of frames lost before it."""
        due = (captured.first + len(captured.frames)) / self._rate + self._missing
        lag = captured.arrived - due
        waiting_since = captured.arrived if captured.waiting_since is None else captured.waiting_since
        excess = waiting_since - due - min(self._least, self._least_before)
        if self._held:
            self._hold(captured)
            if excess < self._excess - PROGRESS_S:
                self._excess, self._improved_at = excess, captured.arrived
            settled = self._excess < LATE_S / 2 or captured.arrived - self._improved_at >= PATIENCE_S
            return self.settle() if settled else []
        if excess > LATE_S:
            self._hold(captured)
            self._excess, self._improved_at = excess, captured.arrived
            return []
        self._follow(lag, captured.arrived)
        return [(0, captured)]

    def settle(self) -> list[tuple[int, Captured]]:
        """Return what is held back: nothing more will come that could make up for the delay."""
        held, self._held = self._held, deque()
        lost = self._excess if held and self._excess > LATE_S / 2 else 0.0
        self._missing += lost
        return [(round(lost * self._rate) if i == 0 else 0, captured) for i, captured in enumerate(held)]

    def _hold(self, captured: Captured) -> None:
        self._held.append(captured)
        while captured.first - self._held[0].first > MOST_HELD_S * self._rate:
            self._held.popleft()

    def _follow(self, lag: float, arrived: float) -> None:
        if arrived - self._baseline_at >= BASELINE_S:
            self._least_before, self._least, self._baseline_at = self._least, lag, arrived
        self._least = min(self._least, lag)


class Reception:
    """What a stream captures, as blocks at the wanted rate.

    Args:
        rate: of the stream, Hz.
        position: of the first sample that comes.
        sample_rate: wanted, Hz.
        to_samples: makes float32 (n,) in [-1, 1] of frames.
        gap: why frames are missing where their numbers jump.

    Attributes:
        position: of the next sample.
    """

    def __init__(
        self,
        rate: int,
        position: int,
        sample_rate: int,
        to_samples: Callable[[np.ndarray], FloatArray],
        gap: Reason = Reason.OVERFLOW,
    ) -> None:
        self.position = position
        self._rate, self._sample_rate, self._to_samples, self._gap = rate, sample_rate, to_samples, gap
        self._dropouts = DropoutDetector(rate)
        self._resampler = Resampler(rate, sample_rate)
        self._start = position
        self._first: int | None = None
        self._missing = 0
        self._expected = 0

    def convert(self, captured: Iterable[Captured], last: bool = False) -> Iterator[Block]:
        """Give one block for each stretch without a loss; ``last`` when nothing more will come."""
        settled = [pair for each in captured for pair in self._dropouts.push(each)]
        if last:
            settled += self._dropouts.settle()
        stretch: list[np.ndarray] = []
        gap = self._gap
        for missing, each in settled:
            if self._first is None:
                self._first = self._expected = each.first
            if missing or each.first != self._expected:
                yield from self._block(stretch, gap)
                stretch, gap = [], Reason.DROPOUT if missing else self._gap
                self._missing += missing
                self._resampler = Resampler(self._rate, self._sample_rate)
                frames = each.first - self._first + self._missing
                self.position = self._start + round(frames * self._sample_rate / self._rate)
            stretch.append(each.frames)
            self._expected = each.first + len(each.frames)
        yield from self._block(stretch, gap)

    def _block(self, stretch: list[np.ndarray], gap: Reason) -> Iterator[Block]:
        if not stretch:
            return
        samples = self._resampler.push(self._to_samples(np.concatenate(stretch)))
        if len(samples):
            yield Block(self.position, samples, gap)
            self.position += len(samples)

    def finish(self, frames: int) -> Iterator[Block]:
        """End a stream of so many frames, and give what is left of it; the last of them may be missing."""
        yield from self.convert([], last=True)
        rest = self._resampler.finish()
        yield Block(self.position, rest)
        if missing := frames - self._expected:
            position = self.position + len(rest) + round(missing * self._sample_rate / self._rate)
            yield Block(position, np.zeros(0, np.float32), self._gap)
