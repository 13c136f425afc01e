"""Live audio through PortAudio, and what it takes to hear for months: every way in which capture fails, and back."""

from __future__ import annotations

import atexit
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from edge_runtime.errors import DeviceError, MissingDependencyError, SerError, UsageError
from edge_runtime.events import Reason
from edge_runtime.frontend import FloatArray, as_samples
from edge_runtime.reception import Captured, Reception
from edge_runtime.settings import Settings
from edge_runtime.sources import SAMPLE_RATE, Block, DigitalSilence, Loss, mono, now

# Devices --------------------------------------------------------------------------------------------------------


CARD_NUMBER = re.compile(r" \(hw:\d+,\d+\)$")


def _sounddevice() -> Any:
    """Import sounddevice, which initialises PortAudio: only when a microphone is asked for."""
    try:
        return import_module("sounddevice")
    except ImportError as error:
        raise MissingDependencyError("sounddevice is not installed; run: pip install 'ser-edge[mic]'") from error
    except OSError as error:
        raise MissingDependencyError("PortAudio is not installed; run: apt install libportaudio2") from error
    except Exception as error:  # sounddevice.PortAudioError, which cannot be named when its import fails
        raise DeviceError(
            f"the sound system cannot be reached ({_first_line(error)}); is its server running?"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@dataclass(frozen=True)
class InputDevice:
    """A device that can capture.

    Attributes:
        index: its number, valid until devices are plugged in or out.
        name: its name.
        channels: how many it captures at most.
        default_rate: the rate it prefers, Hz.
        default: whether it is the system's choice.
    """

    index: int
    name: str
    channels: int
    default_rate: int
    default: bool


def input_devices() -> list[InputDevice]:
    """Return every device that can capture.

    Raises:
        MissingDependencyError: sounddevice or PortAudio is not installed.
        DeviceError: the sound system cannot be reached.
    """
    sounddevice = _sounddevice()
    try:
        found = list(sounddevice.query_devices())
    except sounddevice.PortAudioError as error:
        raise DeviceError(f"the sound system cannot be reached ({_first_line(error)})") from error
    chosen = sounddevice.default.device[0]
    return [
        InputDevice(index, d["name"], d["max_input_channels"], round(d["default_samplerate"]), index == chosen)
        for index, d in enumerate(found)
        if d["max_input_channels"] > 0
    ]


def find_device(wanted: int | str | None, devices: list[InputDevice]) -> InputDevice:
    """Choose a device.

    Args:
        wanted: index, a part of the name in any case, or None for the default (else the only one).
        devices: what there is.

    Raises:
        DeviceError: none matches: it may yet be plugged in.
        UsageError: several match.

    Example:
        >>> usb, hdmi = InputDevice(0, "USB Mic", 1, 48000, False), InputDevice(3, "HDMI", 2, 44100, True)
        >>> find_device("usb", [usb, hdmi]).index, find_device(None, [usb, hdmi]).index
        (0, 3)
    """
    if not devices:
        raise DeviceError("no microphone found; plug one in or start the sound server, then run: ser-edge devices")
    listing = ", ".join(f"{device.index} {device.name!r}" for device in devices)
    if wanted is None:
        matching = [device for device in devices if device.default] or devices[:1]
    elif isinstance(wanted, int) or wanted.isdecimal():
        matching = [device for device in devices if device.index == int(wanted)]
    else:
        matching = [device for device in devices if device.name == wanted]
        matching = matching or [device for device in devices if wanted.lower() in device.name.lower()]
    if not matching:
        raise DeviceError(f"no microphone {wanted!r}; valid: {listing}")
    if len(matching) > 1:
        raise UsageError(f"{len(matching)} microphones match {wanted!r}; name one of: {listing}")
    return matching[0]


def find_again(name: str, devices: list[InputDevice]) -> InputDevice:
    """Choose the device that had this name, though ALSA may have given its card another number since.

    Raises:
        DeviceError: it is not there.
        UsageError: several match.

    Example:
        >>> find_again("USB Mic: Audio (hw:1,0)", [InputDevice(4, "USB Mic: Audio (hw:2,0)", 1, 48000, False)]).index
        4
    """
    if any(device.name == name for device in devices):
        return find_device(name, devices)
    return find_device(CARD_NUMBER.sub("", name), devices)


# One stream -----------------------------------------------------------------------------------------------------

SECONDS_PER_BLOCK = 0.032
"""Audio per callback: 512 samples at 16 kHz cost under 1 % of a core and add no delay that anyone notices."""

_portaudio = threading.Lock()
"""PortAudio opens, closes and initialises for one thread at a time."""

_open_streams: set[_Stream] = set()
"""To initialise PortAudio again would close them."""


class RefusedError(DeviceError):
    """A device that is there and cannot be opened."""


class _Stream:
    """An open device. Its callback copies and enqueues, and nothing else: what blocks it loses audio.

    Args:
        device: which.
        sample_rate: wanted rate, Hz; where the device refuses it, its own is taken.
        channel: one channel that must be among those captured, or None.
        buffer: seconds that may wait to be taken; the oldest leave first.
        ready: set when something waits, or when the stream has ended.

    Attributes:
        rate: Hz.
        ended: whether PortAudio ended the stream by itself.

    Raises:
        RefusedError: the device refuses every way to open it.
        UsageError: it has no such channel.
    """

    def __init__(
        self, device: InputDevice, sample_rate: int, channel: int | None, buffer: float, ready: threading.Event
    ) -> None:
        self._waiting: deque[Captured] = deque(maxlen=max(2, round(buffer / SECONDS_PER_BLOCK)))
        self._captured = 0
        self._ready = ready
        sounddevice = _sounddevice()
        refusal: Exception | None = None
        for rate in dict.fromkeys((sample_rate, device.default_rate)):
            for channels in _channel_counts(device, channel):
                self.ended = False
                try:
                    self._stream = sounddevice.InputStream(
                        device=device.index, samplerate=rate, channels=channels, dtype="int16",
                        blocksize=round(rate * SECONDS_PER_BLOCK), latency="low", dither_off=True,
                        callback=self._capture, finished_callback=self._end,
                    )  # fmt: skip
                except (sounddevice.PortAudioError, ValueError) as error:
                    refusal = refusal or error
                    continue
                try:
                    self._stream.start()
                except sounddevice.PortAudioError as error:
                    self._stream.close(ignore_errors=True)
                    refusal = refusal or error
                    continue
                self.rate = rate
                _open_streams.add(self)
                return
        assert refusal is not None
        raise RefusedError(
            f"microphone {device.name!r} cannot be opened ({_first_line(refusal)}); is another program using it?"
        ) from refusal

    def _capture(self, samples: np.ndarray, frames: int, _time: object, status: Any) -> None:
        if status.input_overflow:
            # At least one buffer was lost; how much exactly, PortAudio does not say.
            self._captured += frames
        self._waiting.append(Captured(now(), self._captured, samples.copy()))
        self._captured += frames
        self._ready.set()

    def _end(self) -> None:
        self.ended = True
        self._ready.set()

    def take(self) -> list[Captured]:
        """Return what waits, the oldest first."""
        return [self._waiting.popleft() for _ in range(len(self._waiting))]

    def close(self) -> None:
        """Release the device. It may take as long as the sound server is frozen."""
        self._stream.close(ignore_errors=True)
        _open_streams.discard(self)


def _to_samples(frames: np.ndarray, channel: int | None) -> FloatArray:
    samples = mono(frames, channel)
    return as_samples(samples / 32768 if samples.dtype.kind == "f" else samples)


def _channel_counts(device: InputDevice, channel: int | None) -> Iterable[int]:
    """Return the numbers of channels to try to open a device with."""
    if channel is None:
        return dict.fromkeys((1, device.channels))
    if channel > device.channels:
        raise UsageError(f"microphone {device.name!r} has no channel {channel}; valid: 1 to {device.channels}")
    # A single channel of several would be their mean, and a sound server that claims 32 makes up most of them.
    return dict.fromkeys((min(max(channel, 2), device.channels), device.channels))


# The microphone -------------------------------------------------------------------------------------------------

FIRST_RETRY_S = 0.25

STOP_POLL_S = 0.1
"""How often a device that takes its time to open is left to see whether :meth:`Microphone.stop` was called."""

CLOSE_S = 0.5
"""Time a device has to close before it is left alone: a frozen sound server would hold up the program's end."""


class _Attempt:
    """A call that may hang for as long as a sound server does, on a thread of its own."""

    def __init__(self, call: Callable[[], Any], ready: threading.Event) -> None:
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._call, self._ready = call, ready
        self.thread = threading.Thread(target=self._run, name="ser-edge microphone", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error
        self.done = True
        self._ready.set()


class Microphone:
    """Live audio that comes back.

    A device that refuses the wanted rate or a single channel is opened as it prefers, and converted here. When the
    consumer falls behind by more than ``settings.buffer`` the oldest audio is dropped; positions go by the clock, so
    that this and what is lost elsewhere shows in them. A microphone that is absent, refused, gone, stalled or silent
    to the last bit gives a :class:`Loss`, once, and is opened again by its name, ever more rarely, until it gives
    sound: with PortAudio initialised anew where it knows of no such device, unless another microphone of this
    process is open.

    Args:
        settings: the defaults when None; ``device``, ``channel``, ``buffer``, ``stall``, ``digital_silence``,
            ``retry`` and ``exit_on_loss`` matter here.
        sample_rate: wanted rate, Hz.

    Attributes:
        name: the device's name; before it was ever open, what is wanted.
        live: True.

    Raises:
        MissingDependencyError: by :meth:`open`: sounddevice or PortAudio is not installed.
        UsageError: by :meth:`open`: several devices match, or there is no such channel.
        DeviceError: with ``settings.exit_on_loss``, by :meth:`open` or :meth:`blocks`: absent or lost.

    Example:
        >>> microphone = Microphone(Settings(device="USB"))  # the first one with USB in its name, once it is opened
        >>> microphone.name, microphone.live
        ('USB', True)
    """

    live = True

    def __init__(self, settings: Settings | None = None, sample_rate: int = SAMPLE_RATE) -> None:
        self._settings = settings = settings or Settings()
        self._sample_rate = sample_rate
        self.name = "default" if settings.device is None else str(settings.device)
        self._opened_as: str | None = None
        self._wake = threading.Event()
        self._stopped = False
        self._stream: _Stream | None = None
        self._attempt: _Attempt | None = None
        self._loss: Loss | None = None
        self._position = 0
        self._heard_at = now()

    def open(self) -> None:
        """Open the device and begin to capture; where it is absent, begin to wait for it."""
        self._heard_at = now()
        attempt = self._attempt = _Attempt(self._connect, self._wake)
        while not attempt.done and not self._stopped and now() - self._heard_at < self._settings.stall:
            attempt.thread.join(STOP_POLL_S)
        try:
            self._take_result(attempt)
        except DeviceError as error:
            if self._settings.exit_on_loss:
                raise
            reason = Reason.REFUSED if isinstance(error, RefusedError) else Reason.ABSENT
            self._loss = Loss(reason, str(error))
        if not attempt.done:
            self._loss = Loss(Reason.STALLED, "the sound system does not answer: its server may be frozen")
            if self._settings.exit_on_loss:
                raise DeviceError(self._loss.detail)

    def blocks(self) -> Iterator[Block | Loss]:
        """Give what is heard until :meth:`stop`."""
        captured: list[Captured] = []
        while not self._stopped:
            if self._loss is None:
                self._loss = yield from self._hear(captured)
                continue
            yield self._loss
            if self._settings.exit_on_loss:
                raise DeviceError(self._loss.detail)
            captured = self._recover()
            self._loss = None

    def _hear(self, captured: list[Captured]) -> Generator[Block, None, Loss | None]:
        """Give blocks until something is wrong, and return what; None when stopped. Begins with ``captured``."""
        stream = self._stream
        assert stream is not None
        settings = self._settings
        silence = DigitalSilence(settings.digital_silence, self._sample_rate)
        to_samples = partial(_to_samples, channel=settings.channel)
        reception = Reception(stream.rate, self._position_of(captured), self._sample_rate, to_samples)
        while not self._stopped:
            self._wake.clear()
            ended = stream.ended
            captured = captured + stream.take()
            lost = ended or (not captured and now() - self._heard_at >= settings.stall)
            for block in reception.convert(captured, last=lost):
                silent = silence.push(block.samples)
                yield block
                if silent:
                    lost = True
            self._position = reception.position
            if captured:
                self._heard_at = captured[-1].arrived
            if lost:
                return self._diagnose(ended, zeros=bool(captured))
            captured = []
            self._wake.wait(max(0.0, self._heard_at + settings.stall - now()))
        return None

    def _diagnose(self, ended: bool, zeros: bool) -> Loss:
        """Say what is wrong with a stream that is lost."""
        if ended:
            reason, what = Reason.DEVICE_GONE, "is gone; plug it in or restart the sound server"
        elif zeros:
            for_long = f"nothing but zeros for {self._settings.digital_silence:g} s"
            reason, what = Reason.DIGITAL_SILENCE, f"gives {for_long}: muted, or unplugged behind its server"
        else:
            for_long = f"nothing for {self._settings.stall:g} s"
            reason, what = Reason.STALLED, f"gives {for_long}: suspended, or its server is frozen"
        return Loss(reason, f"microphone {self.name!r} {what}")

    def _position_of(self, captured: list[Captured]) -> int:
        """Return the position of the first frame that comes after a loss: as much later as the clock has gone on."""
        if not captured or self._stream is None:
            return self._position
        # By the last: where all came at once, the first of it is late.
        last = captured[-1]
        began = last.arrived - (last.first + len(last.frames) - captured[0].first) / self._stream.rate
        return self._position + max(0, round((began - self._heard_at) * self._sample_rate))

    def _recover(self) -> list[Captured]:
        """Wait for sound, opening the device again and again, and return the first of it; nothing when stopped."""
        delay = FIRST_RETRY_S
        while not self._stopped:
            if captured := self._await_sound(delay):
                return captured
            if not self._stopped:
                self._reopen()
            delay = min(2 * delay, self._settings.retry)
        return []

    def _await_sound(self, seconds: float) -> list[Captured]:
        """Wait for a sample other than zero, and return what was captured from its callback on."""
        until = now() + seconds
        while not self._stopped:
            self._wake.clear()
            captured = self._stream.take() if self._stream is not None else []
            for i, each in enumerate(captured):
                if mono(each.frames, self._settings.channel).any():
                    return captured[i:]
            if (left := until - now()) <= 0:
                break
            self._wake.wait(left)
        return []

    def _reopen(self) -> None:
        """Close what is open and open it again, for as long as it takes; a failure leaves nothing open."""
        attempt = self._attempt
        if attempt is None or attempt.done:
            stale, self._stream = self._stream, None
            attempt = self._attempt = _Attempt(partial(self._connect, stale), self._wake)
        while not attempt.done and not self._stopped:
            self._wake.wait()
            self._wake.clear()
        try:
            self._take_result(attempt)
        except SerError:
            return  # the outage goes on, whatever its cause is by now

    def _take_result(self, attempt: _Attempt) -> None:
        if attempt.error is not None:
            raise attempt.error
        self._stream = attempt.result

    def _connect(self, stale: _Stream | None = None) -> _Stream | None:
        """Open the device; runs on a thread of its own."""
        with _portaudio:
            if stale is not None:
                stale.close()
            try:
                stream = self._find_and_open()
            except DeviceError:
                if _open_streams or not _initialize_again():
                    raise
                stream = self._find_and_open()
            if self._stopped:
                stream.close()
                return None
            return stream

    def _find_and_open(self) -> _Stream:
        settings = self._settings
        devices = input_devices()
        device = (
            find_device(settings.device, devices) if self._opened_as is None else find_again(self._opened_as, devices)
        )
        stream = _Stream(device, self._sample_rate, settings.channel, settings.buffer, self._wake)
        self.name = device.name
        if settings.device is not None:  # the system's default is whatever it is by then
            self._opened_as = device.name
        return stream

    def stop(self) -> None:
        """Let :meth:`blocks` end."""
        self._stopped = True
        self._wake.set()

    def close(self) -> None:
        """Release the device; one that hangs is left alone."""
        self._stopped = True
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        attempt.thread.join(CLOSE_S)
        if attempt.result is not None:  # the stream that is open, or one that nobody waited for
            attempt = _Attempt(partial(_release, attempt.result), self._wake)
            attempt.thread.join(CLOSE_S)
        if attempt.thread.is_alive():
            # At the interpreter's end sounddevice would wait for PortAudio, and so for the frozen server. It may even
            # hang in its import, which must not be waited for either.
            handler = getattr(sys.modules.get("sounddevice"), "_exit_handler", None)
            if handler is not None:
                atexit.unregister(handler)


def _release(stream: _Stream) -> None:
    with _portaudio:
        stream.close()


def _initialize_again() -> bool:
    """Let PortAudio look for devices afresh: it knows only those that were there when it was initialised."""
    sounddevice = _sounddevice()
    with suppress(sounddevice.PortAudioError):  # it is not initialised, where the last time failed
        sounddevice._terminate()
    try:
        sounddevice._initialize()
    except sounddevice.PortAudioError:
        return False
    return True
