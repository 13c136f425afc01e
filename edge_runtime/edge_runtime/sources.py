"""Where audio comes from: a microphone or a file, as blocks of mono samples at the model's rate."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Event as Signal
from typing import Any, BinaryIO, Protocol

import numpy as np

from edge_runtime.errors import AudioError, DeviceError, MissingDependencyError, UsageError
from edge_runtime.frontend import FloatArray, as_samples
from edge_runtime.resample import HIGHEST_RATE, LOWEST_RATE, Resampler

SAMPLE_RATE = 16000


@dataclass(frozen=True)
class Block:
    """Samples that follow each other.

    Attributes:
        position: the first one's number in the stream; a jump from one block to the next is lost audio.
        samples: float32 (n,) in [-1, 1].
    """

    position: int
    samples: FloatArray


class Source(Protocol):
    """What a listener listens to.

    Attributes:
        name: what to call it in messages, known once it is open.
    """

    name: str

    def open(self) -> None:
        """Begin to capture, or check that there is something to read."""

    def blocks(self) -> Iterator[Block]:
        """Give blocks until the source ends or :meth:`stop` is called; wait where none is there yet."""
        ...

    def stop(self) -> None:
        """Let :meth:`blocks` end soon; may be called from any thread and from a signal handler, and twice."""

    def close(self) -> None:
        """Release the device or the file."""


# Files ----------------------------------------------------------------------------------------------------------

SECONDS_PER_READ = 1
"""Audio decoded at a time: a two-hour file needs no more memory than a short one."""

WAV_PCM, WAV_FLOAT, WAV_EXTENSIBLE = 1, 3, 0xFFFE
UNKNOWN_LENGTH = 0x7FFFFF00
"""Recorders that write to a pipe put a length from here on: the data last as long as the file."""


class AudioFile:
    """A recording, decoded piece by piece; channels are averaged, other rates resampled.

    WAV (8 to 32 bits, float32, float64) needs nothing but numpy; every other format needs the package soundfile.

    Args:
        path: the file.
        sample_rate: wanted rate, Hz.

    Attributes:
        seconds: length of the recording as its header gives it, after :meth:`open`; None where it does not.

    Raises:
        AudioError: by :meth:`open` or :meth:`blocks`: missing, empty, not audio, damaged, truncated, NaN.
        MissingDependencyError: by :meth:`open`: not a WAV file and soundfile is not installed.
    """

    def __init__(self, path: str | Path, sample_rate: int = SAMPLE_RATE) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.seconds: float | None = None
        self._sample_rate = sample_rate
        self._stopped = False
        self._reader: _WavReader | _SoundfileReader | None = None

    def open(self) -> None:
        """Read the header."""
        self._reader = _open_reader(self.path)
        if not LOWEST_RATE <= self._reader.rate <= HIGHEST_RATE:
            raise AudioError(f"{self.path}: sample rate {self._reader.rate} Hz; valid: {LOWEST_RATE} to {HIGHEST_RATE}")
        self.seconds = None if self._reader.frames is None else self._reader.frames / self._reader.rate

    def blocks(self) -> Iterator[Block]:
        """Give the recording from its beginning."""
        assert self._reader is not None, "open() comes first"
        resampler = Resampler(self._reader.rate, self._sample_rate)
        position = 0
        while not self._stopped and (channels := self._reader.read(self._reader.rate * SECONDS_PER_READ)).size:
            samples = resampler.push(as_samples(channels.mean(axis=1), str(self.path)))
            yield Block(position, samples)
            position += len(samples)
        if not self._stopped:
            yield Block(position, resampler.finish())

    def stop(self) -> None:
        """Let :meth:`blocks` end."""
        self._stopped = True

    def close(self) -> None:
        """Close the file."""
        if self._reader is not None:
            self._reader.close()


class _WavReader:
    """RIFF/WAVE: chunks of (name, length, content); ``fmt`` describes the samples in ``data``."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        chunk = self._find(b"fmt ")
        if len(chunk) < 16:
            raise AudioError(f"{path}: damaged WAV header")
        code, self.channels, self.rate, _, self._frame_bytes, bits = struct.unpack("<HHIIHH", chunk[:16])
        if code == WAV_EXTENSIBLE and len(chunk) >= 26:
            code = int.from_bytes(chunk[24:26], "little")
        self._decode = _wav_decoder(path, code, bits)
        if not self.channels or self._frame_bytes != self.channels * bits // 8:
            raise AudioError(f"{path}: damaged WAV header ({self.channels} channels of {bits} bits)")
        self._left = self._enter_data()
        self.frames: int | None = self._left // self._frame_bytes
        if not self.frames:
            raise AudioError(f"{path}: no audio in it")

    def _next_chunk(self) -> tuple[bytes, int]:
        header = self._file.read(8)
        if len(header) < 8:
            raise AudioError(f"{self._path}: damaged WAV file, it ends before its audio")
        return header[:4], int.from_bytes(header[4:], "little")

    def _find(self, wanted: bytes) -> bytes:
        while True:
            name, length = self._next_chunk()
            if name == wanted:
                return self._file.read(length + length % 2)[:length]
            self._file.seek(length + length % 2, 1)

    def _enter_data(self) -> int:
        """Go to the samples and return how many bytes they have."""
        while True:
            name, length = self._next_chunk()
            if name == b"data":
                break
            self._file.seek(length + length % 2, 1)
        here = self._file.tell()
        there = self._file.seek(0, 2) - here
        self._file.seek(here)
        if there < length < UNKNOWN_LENGTH:
            raise AudioError(f"{self._path}: truncated, {there} of {length} bytes of audio are there")
        return min(length, there)

    def read(self, frames: int) -> FloatArray:
        """Return the next frames, float32 (n, channels); n is 0 at the end."""
        wanted = min(frames, self._left // self._frame_bytes) * self._frame_bytes
        self._left -= wanted
        content = self._file.read(wanted)
        if len(content) < wanted:
            raise AudioError(f"{self._path}: became shorter while it was read")
        return self._decode(content).reshape(-1, self.channels)

    def close(self) -> None:
        self._file.close()


def _wav_decoder(path: Path, code: int, bits: int) -> Callable[[bytes], FloatArray]:
    """Return the function from bytes to float32 samples in [-1, 1]."""
    decoders: dict[tuple[int, int], Callable[[bytes], FloatArray]] = {
        (WAV_PCM, 8): lambda content: ((np.frombuffer(content, np.uint8) - 128.0) / 128.0).astype(np.float32),
        (WAV_PCM, 16): lambda content: as_samples(np.frombuffer(content, "<i2")),
        (WAV_PCM, 24): _decode_24_bits,
        (WAV_PCM, 32): lambda content: as_samples(np.frombuffer(content, "<i4")),
        (WAV_FLOAT, 32): lambda content: np.frombuffer(content, "<f4").astype(np.float32),
        (WAV_FLOAT, 64): lambda content: _narrow(np.frombuffer(content, "<f8")),
    }
    if (code, bits) not in decoders:
        raise AudioError(f"{path}: WAV encoding {code} with {bits} bits; valid: PCM of 8 to 32 bits, float of 32 or 64")
    return decoders[code, bits]


def _decode_24_bits(content: bytes) -> FloatArray:
    padded = np.zeros((len(content) // 3, 4), np.uint8)
    padded[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
    return as_samples(padded.view("<i4")[:, 0])


def _narrow(samples: np.ndarray) -> FloatArray:
    with np.errstate(over="ignore"):  # what becomes infinite is refused with the infinite ones
        return samples.astype(np.float32)


class _SoundfileReader:
    """Whatever libsndfile decodes."""

    def __init__(self, path: Path) -> None:
        try:
            soundfile = import_module("soundfile")
        except (ImportError, OSError) as error:
            raise MissingDependencyError(
                f"{path}: not a WAV file; convert it to WAV, or to read other formats run: pip install soundfile"
            ) from error
        self._path = path
        self._error: type[Exception] = soundfile.LibsndfileError
        try:
            self._file: Any = soundfile.SoundFile(path)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{path}: not audio that libsndfile reads ({error.error_string})") from error
        self.rate = int(self._file.samplerate)
        self.frames: int | None = self._file.frames if 0 < self._file.frames < 2**62 else None
        if not self._file.frames:
            raise AudioError(f"{path}: no audio in it")

    def read(self, frames: int) -> FloatArray:
        """Return the next frames, float32 (n, channels); n is 0 at the end."""
        try:
            channels: FloatArray = self._file.read(frames, dtype="float32", always_2d=True)
        except self._error as error:
            raise AudioError(f"{self._path}: damaged ({error})") from error
        return channels

    def close(self) -> None:
        self._file.close()


def _open_reader(path: Path) -> _WavReader | _SoundfileReader:
    if not path.exists():
        raise AudioError(f"{path}: no such audio file")
    try:
        file = path.open("rb")
    except OSError as error:
        raise AudioError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        head = file.read(12)
        if not head:
            raise AudioError(f"{path}: the file is empty")
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            return _WavReader(path, file)
    except BaseException:
        file.close()
        raise
    file.close()
    return _SoundfileReader(path)


# Microphones ----------------------------------------------------------------------------------------------------

SECONDS_PER_BLOCK = 0.032
"""Audio per callback: 512 samples at 16 kHz cost under 1 % of a core and add no delay that anyone notices."""


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
        DeviceError: there is no device at all.
        UsageError: none or several match.

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
        raise UsageError(f"no microphone {wanted!r}; valid: {listing}")
    if len(matching) > 1:
        raise UsageError(f"{len(matching)} microphones match {wanted!r}; name one of: {listing}")
    return matching[0]


class Microphone:
    """Live audio through PortAudio.

    The capture callback only copies and enqueues, since what blocks it loses audio. When the consumer falls behind by
    more than ``buffer`` seconds the oldest audio is dropped; the positions of the blocks show it. A device that
    refuses the wanted rate or a single channel is opened as it prefers, and resampled and averaged here.

    Args:
        device: index, a part of the name, or None for the default.
        sample_rate: wanted rate, Hz.
        buffer: seconds that may wait to be read.
        stall: seconds without a sample after which the device counts as gone. PortAudio reports an unplugged
            microphone by silence of its callbacks, at best.

    Attributes:
        name: the device's name, after :meth:`open`.

    Raises:
        MissingDependencyError: by :meth:`open`: sounddevice or PortAudio is not installed.
        DeviceError: by :meth:`open`: no device, or it cannot be opened; by :meth:`blocks`: it is gone.
        UsageError: by :meth:`open`: no such device.
    """

    def __init__(
        self,
        device: int | str | None = None,
        sample_rate: int = SAMPLE_RATE,
        buffer: float = 10.0,
        stall: float = 5.0,
    ) -> None:
        self.name = ""
        self._wanted = device
        self._sample_rate = sample_rate
        self._stall = stall
        self._queue: deque[tuple[int, np.ndarray]] = deque(maxlen=max(2, round(buffer / SECONDS_PER_BLOCK)))
        self._captured = 0
        self._ready = Signal()
        self._stopped = False
        self._gone = False
        self._stream: Any = None

    def open(self) -> None:
        """Open the device and begin to capture."""
        sounddevice = _sounddevice()
        device = find_device(self._wanted, input_devices())
        self.name = device.name
        refusal: Exception | None = None
        for rate in dict.fromkeys((self._sample_rate, device.default_rate)):
            for channels in dict.fromkeys((1, device.channels)):
                try:
                    self._stream = sounddevice.InputStream(
                        device=device.index, samplerate=rate, channels=channels, dtype="int16",
                        blocksize=round(rate * SECONDS_PER_BLOCK), latency="low", dither_off=True,
                        callback=self._capture, finished_callback=self._end,
                    )  # fmt: skip
                    self._stream.start()
                    self._rate = rate
                    return
                except (sounddevice.PortAudioError, ValueError) as error:
                    self.close()
                    refusal = refusal or error
        assert refusal is not None
        raise DeviceError(
            f"microphone {device.name!r} cannot be opened ({_first_line(refusal)}); is another program using it?"
        ) from refusal

    def _capture(self, samples: np.ndarray, frames: int, _time: object, status: Any) -> None:
        if status.input_overflow:
            # At least one buffer was lost; how much exactly, PortAudio does not say.
            self._captured += frames
        self._queue.append((self._captured, samples.copy()))
        self._captured += frames
        self._ready.set()

    def _end(self) -> None:
        self._gone = True
        self._ready.set()

    def blocks(self) -> Iterator[Block]:
        """Give live blocks until :meth:`stop`; raise :class:`DeviceError` when the device is gone."""
        resampler = Resampler(self._rate, self._sample_rate)
        expected, position = 0, 0
        while not self._stopped:
            if not self._queue:
                self._wait()
                continue
            captured_at, captured = self._queue.popleft()
            if captured_at != expected:
                resampler = Resampler(self._rate, self._sample_rate)
                position = round(captured_at * self._sample_rate / self._rate)
            expected = captured_at + len(captured)
            mono = captured[:, 0] if captured.shape[1] == 1 else captured.mean(axis=1, dtype=np.float32) / 32768
            samples = resampler.push(as_samples(mono))
            yield Block(position, samples)
            position += len(samples)

    def _wait(self) -> None:
        self._ready.clear()
        if self._queue or self._stopped:
            return
        if self._gone:
            raise DeviceError(f"microphone {self.name!r} is gone; plug it in or restart the sound server")
        if not self._ready.wait(self._stall):
            raise DeviceError(f"microphone {self.name!r} has given nothing for {self._stall:g} s; is it still there?")

    def stop(self) -> None:
        """Let :meth:`blocks` end."""
        self._stopped = True
        self._ready.set()

    def close(self) -> None:
        """Release the device."""
        if self._stream is not None:
            self._stream.close(ignore_errors=True)
            self._stream = None
