"""A sound system on a clock of its own: days of listening in minutes, faults at will, and the same in every run.

It stands in for the library ``sounddevice`` and for the clock, so that the listener itself is the real one, from the
callback to the event. The thread that waits for audio drives it: while it waits, time passes, and what is spoken in
that time is captured.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace, TracebackType
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from edge_runtime import listener as listener_module
from edge_runtime import microphone as microphone_module
from edge_runtime import recordings as recordings_module
from edge_runtime.microphone import Microphone
from edge_runtime.settings import Settings

Samples = NDArray[np.int16]

DEVICE = "Simulated microphone"

LOSING = ("gone", "stall", "sleep", "refuse")
"""Faults in which what is spoken is not captured."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with the sound system for a while.

    Attributes:
        kind: ``gone`` (unplugged), ``refuse`` (unplugged, then in use by another program), ``stall`` (open and silent,
            what is spoken is lost), ``burst`` (late, all of it at once), ``zeros``, ``full_scale``, ``overflow`` (flags
            of PortAudio's), ``sleep`` (the clock jumps over it), ``damage`` (of a pipe: NaN).
        start: seconds since the clock began.
        end: likewise.
    """

    kind: str
    start: float
    end: float


def repeated(loop: Samples) -> Callable[[int, int], Samples]:
    """Return what gives so many samples, at most a loop's length, from any position of a loop without end.

    Example:
        >>> repeated(np.array([1, 2, 3], np.int16))(5, 2)
        array([3, 1], dtype=int16)
    """
    twice = np.concatenate([loop, loop])
    return lambda position, count: twice[position % len(loop) :][:count]


class PortAudioError(Exception):
    """What sounddevice raises."""


class SimulatedSound:
    """One microphone, its faults, and the clock; use it as a context manager around everything that listens.

    Args:
        spoken: gives int16 samples (count,) at 16 kHz from a position on, as counted from the clock's beginning.
        faults: what goes wrong, and when.
        rate: the only one that the device takes, Hz: 16000 or a multiple.
        drift: by which the device's clock is faster than ours: 1e-4 is much for a quartz.
        wakeup: seconds for which a waiting listener is left asleep though audio has come.

    Attributes:
        time: seconds since the clock began.
        reopened: how often the device was opened after the first time.
    """

    def __init__(
        self,
        spoken: Callable[[int, int], Samples],
        faults: tuple[Fault, ...] = (),
        *,
        rate: int = 16000,
        drift: float = 0.0,
        wakeup: float = 0.0,
    ) -> None:
        self.time = 0.0
        self.reopened = -1
        self._spoken = spoken
        self._faults = faults
        self._rate, self._drift, self._wakeup = rate, drift, wakeup
        self._stream: _SimulatedStream | None = None
        self._alarms: list[tuple[float, Callable[[], None]]] = []
        self._patches = ExitStack()

    def __enter__(self) -> SimulatedSound:
        """Take the place of sounddevice and of the clock, in this whole process."""
        library = SimpleNamespace(
            PortAudioError=PortAudioError,
            default=SimpleNamespace(device=[0, -1]),
            query_devices=self._query_devices,
            InputStream=self._open,
            _terminate=lambda: None,
            _initialize=lambda: None,
            _exit_handler=lambda: None,
        )
        self._patches.enter_context(patch.dict(sys.modules, {"sounddevice": library}))
        self._patches.enter_context(patch.object(microphone_module, "_open_streams", set()))
        for module in (microphone_module, listener_module, recordings_module):
            self._patches.enter_context(patch.object(module, "now", lambda: self.time))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the clock back."""
        self._patches.close()

    def microphone(self, settings: Settings) -> Microphone:
        """Return the source to listen to."""
        microphone = Microphone(settings)
        microphone._wake = _Signal(self)
        return microphone

    def at(self, time: float, alarm: Callable[[], None]) -> None:
        """Let something be called at a time, on the thread that drives the clock."""
        self._alarms.append((time, alarm))

    def fault(self, *kinds: str, at: float | None = None) -> Fault | None:
        """Return the fault of one of these kinds that there is now, or was at a time."""
        time = self.time if at is None else at
        return next((f for f in self._faults if f.kind in kinds and f.start <= time < f.end), None)

    def advance(self, until: float, awake: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, up to ``until`` or as soon as ``awake`` says so."""
        asleep_until = self.time + self._wakeup
        while self.time < until and not (awake() and self.time >= asleep_until):
            self._step(min(until, asleep_until) if awake() else until)

    def captured(self, start: float, seconds: float) -> Samples:
        """Return what a microphone without faults but ``zeros`` and ``full_scale`` hears, at 16 kHz."""
        samples = self._spoken(round(start * 16000), round(seconds * 16000))
        if self.fault("zeros", at=start):
            return np.zeros_like(samples)
        if self.fault("full_scale", at=start):
            return np.where(samples % 2 == 0, np.int16(-32768), np.int16(32767))
        return samples

    def _step(self, until: float) -> None:
        stream = self._stream
        self.time = until if stream is None else max(self.time, min(until, stream.next_at))
        if sleep := self.fault("sleep"):
            self.time = sleep.end
        due = [alarm for time, alarm in self._alarms if time <= self.time]
        self._alarms = [(time, alarm) for time, alarm in self._alarms if time > self.time]
        for alarm in due:
            alarm()
        if stream is not None and self.fault("gone", "refuse"):
            self._stream = None
            stream.finish()
        elif stream is not None and self.time >= stream.next_at:
            stream.capture()

    def _query_devices(self) -> list[dict[str, Any]]:
        if self.fault("gone"):
            return []
        return [{"name": DEVICE, "max_input_channels": 2, "default_samplerate": float(self._rate)}]

    def _open(self, **options: Any) -> _SimulatedStream:
        if self.fault("gone", "refuse") or options["samplerate"] != self._rate:
            raise PortAudioError("Error opening InputStream: Device unavailable [PaErrorCode -9985]")
        self.reopened += 1
        self._stream = _SimulatedStream(self, options, self._rate, self._drift)
        return self._stream

    def closed(self, stream: _SimulatedStream) -> None:
        """Forget a stream."""
        if self._stream is stream:
            self._stream = None


class _SimulatedStream:
    """What sounddevice calls an ``InputStream``."""

    def __init__(self, sound: SimulatedSound, options: dict[str, Any], rate: int, drift: float) -> None:
        self._sound = sound
        self._callback, self._finished = options["callback"], options["finished_callback"]
        self._channels, self._frames = options["channels"], options["blocksize"]
        self._repeats = rate // 16000
        self._seconds = self._frames / rate / (1 + drift)
        self._late: list[Samples] = []
        self._overflown = False
        self._flag = SimpleNamespace(input_overflow=False)
        self.next_at = sound.time + self._seconds

    def start(self) -> None:
        """Capture from now on."""

    def capture(self) -> None:
        """Capture what was spoken since the last time."""
        began = self.next_at - self._seconds
        self.next_at += self._seconds
        if self._sound.time - began > 2 * self._seconds:  # the clock has jumped: nothing was captured meanwhile
            self.next_at = self._sound.time + self._seconds
            return
        if self._sound.fault("stall"):
            return
        self._overflown = self._sound.fault("overflow") is not None and not self._overflown
        if self._overflown:  # this block is lost, and the next one's flag says so
            self._flag.input_overflow = True
            return
        samples = self._sound.captured(began, self._frames / self._repeats / 16000)
        self._late.append(np.repeat(samples, self._repeats)[:, None].repeat(self._channels, axis=1))
        if self._sound.fault("burst"):
            return
        late, self._late = self._late, []
        for samples in late:
            self._callback(samples, len(samples), None, self._flag)
            self._flag.input_overflow = False

    def finish(self) -> None:
        """End by itself."""
        self._finished()

    def close(self, ignore_errors: bool) -> None:  # noqa: ARG002
        """End, as asked."""
        self._sound.closed(self)


class _Signal(threading.Event):
    """An event, to wait for which lets the simulated time pass."""

    def __init__(self, sound: SimulatedSound) -> None:
        super().__init__()
        self._sound = sound

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for simulated seconds; without a limit, for what another thread does in no time."""
        if timeout is None:
            return super().wait()
        # Rounding may leave nothing to wait for, a moment before the time has come: a real clock goes on by itself.
        self._sound.advance(self._sound.time + max(timeout, 1e-6), self.is_set)
        return self.is_set()
