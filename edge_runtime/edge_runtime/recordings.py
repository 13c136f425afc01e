"""Audio that is there already, as files, and audio that another program sends through a pipe."""

from __future__ import annotations

import fcntl
import os
import select
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Event as Signal
from typing import Any, BinaryIO

import numpy as np

from edge_runtime.errors import AudioError, DeviceError, MissingDependencyError, UsageError, nearest
from edge_runtime.events import Reason
from edge_runtime.frontend import FloatArray, as_samples
from edge_runtime.reception import PATIENCE_S, Captured, Reception
from edge_runtime.resample import HIGHEST_RATE, LOWEST_RATE, Resampler
from edge_runtime.settings import MOST_CHANNELS, Settings
from edge_runtime.sources import SAMPLE_RATE, Block, DigitalSilence, Loss, Source, mono, now

# Files ----------------------------------------------------------------------------------------------------------

SECONDS_PER_READ = 1
"""Audio decoded at a time: a two-hour file needs no more memory than a short one."""

WAV_PCM, WAV_FLOAT, WAV_EXTENSIBLE = 1, 3, 0xFFFE
UNKNOWN_LENGTH = 0x7FFFFF00
"""Recorders that write to a pipe put a length from here on: the data last as long as the file."""


class AudioFile:
    """A recording, decoded piece by piece; other rates are resampled.

    WAV (8 to 32 bits, float32, float64) needs nothing but numpy; every other format needs the package soundfile.

    Args:
        path: the file.
        sample_rate: wanted rate, Hz.
        channel: which of its channels to take, from 1; None takes their mean.

    Attributes:
        name: the path.
        live: False: nothing is lost when nobody listens.
        seconds: length of the recording as its header gives it, after :meth:`open`; None where it does not.

    Raises:
        AudioError: by :meth:`open` or :meth:`blocks`: missing, empty, not audio, damaged, truncated, NaN.
        MissingDependencyError: by :meth:`open`: not a WAV file and soundfile is not installed.

    Example:
        >>> recording = AudioFile("speech.wav")
        >>> recording.open()
        >>> recording.seconds, sum(len(block.samples) for block in recording.blocks())
        (3.0, 48000)
        >>> recording.close()
    """

    live = False

    def __init__(self, path: str | Path, sample_rate: int = SAMPLE_RATE, channel: int | None = None) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.seconds: float | None = None
        self._sample_rate = sample_rate
        self._channel = channel
        self._stopped = False
        self._reader: _WavReader | _SoundfileReader | None = None

    def open(self) -> None:
        """Read the header."""
        self._reader = _open_reader(self.path)
        if not LOWEST_RATE <= self._reader.rate <= HIGHEST_RATE:
            raise AudioError(f"{self.path}: sample rate {self._reader.rate} Hz; valid: {LOWEST_RATE} to {HIGHEST_RATE}")
        if self._channel is not None and not 1 <= self._channel <= self._reader.channels:
            raise AudioError(f"{self.path}: no channel {self._channel} in it; valid: 1 to {self._reader.channels}")
        self.seconds = None if self._reader.frames is None else self._reader.frames / self._reader.rate

    def blocks(self) -> Iterator[Block]:
        """Give the recording from its beginning."""
        assert self._reader is not None, "open() comes first"
        resampler = Resampler(self._reader.rate, self._sample_rate)
        position = read = 0
        while not self._stopped and (channels := self._reader.read(self._reader.rate * SECONDS_PER_READ)).size:
            samples = resampler.push(as_samples(mono(channels, self._channel), str(self.path), read))
            read += len(channels)
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


def _decode_24_bits(content: bytes) -> FloatArray:
    padded = np.zeros((len(content) // 3, 4), np.uint8)
    padded[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
    return as_samples(padded.view("<i4")[:, 0])


def _narrow(samples: np.ndarray) -> FloatArray:
    with np.errstate(over="ignore"):  # what becomes infinite is refused with the infinite ones
        return samples.astype(np.float32)


DECODERS: dict[tuple[int, int], Callable[[bytes], FloatArray]] = {
    (WAV_PCM, 8): lambda content: ((np.frombuffer(content, np.uint8) - 128.0) / 128.0).astype(np.float32),
    (WAV_PCM, 16): lambda content: as_samples(np.frombuffer(content, "<i2")),
    (WAV_PCM, 24): _decode_24_bits,
    (WAV_PCM, 32): lambda content: as_samples(np.frombuffer(content, "<i4")),
    (WAV_FLOAT, 32): lambda content: np.frombuffer(content, "<f4").astype(np.float32),
    (WAV_FLOAT, 64): lambda content: _narrow(np.frombuffer(content, "<f8")),
}
"""From an encoding and its bits to the function from bytes to float32 samples in [-1, 1]."""


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
        if (code, bits) not in DECODERS:
            raise AudioError(
                f"{path}: WAV encoding {code} with {bits} bits; valid: PCM of 8 to 32 bits, float of 32, 64"
            )
        self._decode = DECODERS[code, bits]
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
        self.rate, self.channels = int(self._file.samplerate), int(self._file.channels)
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


class RealTime:
    """A recording as if it were captured now: what would have been spoken by now, and waits for the rest.

    Args:
        recording: the source to slow down.
        sample_rate: its rate, Hz.

    Attributes:
        name: the recording's.
        live: True.

    Example:
        >>> source = RealTime(AudioFile("speech.wav"))
        >>> source.name, source.live
        ('speech.wav', True)
    """

    live = True

    def __init__(self, recording: Source, sample_rate: int = SAMPLE_RATE) -> None:
        self.name = recording.name
        self._recording = recording
        self._sample_rate = sample_rate
        self._stopped = Signal()

    def open(self) -> None:
        """Open the recording."""
        self._recording.open()

    def blocks(self) -> Iterator[Block | Loss]:
        """Give the recording, each sample when its time has come."""
        began = now()
        for whole in self._recording.blocks():
            assert isinstance(whole, Block), "a recording is never lost"
            given = 0
            while given < len(whole.samples) and not self._stopped.is_set():
                due = min(round((now() - began) * self._sample_rate) - whole.position, len(whole.samples))
                if due > given:
                    yield Block(whole.position + given, whole.samples[given:due])
                    given = due
                self._stopped.wait(SECONDS_PER_STEP)

    def stop(self) -> None:
        """Let :meth:`blocks` end."""
        self._stopped.set()
        self._recording.stop()

    def close(self) -> None:
        """Close the recording."""
        self._recording.close()


SECONDS_PER_STEP = 0.032
"""Time between two blocks of a recording in real time, as between two callbacks of a microphone."""


# Pipes ----------------------------------------------------------------------------------------------------------

ENCODINGS = {
    "u8": (WAV_PCM, 8),
    "s16le": (WAV_PCM, 16),
    "s24le": (WAV_PCM, 24),
    "s32le": (WAV_PCM, 32),
    "f32le": (WAV_FLOAT, 32),
}
"""Names of sample formats, as ffmpeg and sox write them."""

PIPE_BYTES = 1 << 16
"""What a Linux pipe holds, and what is read of it at a time."""

MOST_PIPE_BYTES = 1 << 20
"""What it may be made to hold by anybody."""

STOP_POLL_S = 0.1
"""How often a pipe that gives nothing is left to see whether :meth:`RawAudio.stop` was called."""


class RawAudio:
    """Headerless PCM that another program writes into a pipe: ``arecord -q -t raw -f S16_LE -r 16000 | ...``.

    A pipe that gives nothing for ``settings.stall``, or nothing but zeros for ``settings.digital_silence``, is lost
    until it gives sound again. What is no audio amid a live pipe (NaN, far beyond full scale) is left out, with what
    was read with it, and is a gap. It ends where it is closed.

    A pipe tells neither when its samples were captured nor whether some are missing. From the times at which they
    come it can be known that 0.3 s or more are missing, and how much: less came than time passed, and no burst makes
    up for it. That is a gap, and the positions after it, and after a loss, are those of the clock; what is late and
    comes at once has lost nothing. It cannot be known where exactly: a writer that had to wait because the pipe was
    full lost what came after the pipe's content, and the gap is put before it; the pipe is made to hold
    ``settings.buffer`` (1 MiB at most), so that it seldom has to. Nor can a loss before the first sample be known, or
    one that a writer fills with samples of its own. And a writer that is slower than time loses audio, as far as
    anyone can tell: give it ``live=False`` (``--fast``).

    Args:
        file: descriptor to read from.
        sample_rate: wanted rate, Hz.
        rate: the pipe's rate, Hz.
        channels: how many are interleaved; ``settings.channel`` chooses one, else their mean is taken.
        encoding: one of ``ENCODINGS``.
        settings: the defaults when None.
        live: whether the samples are captured as they come. False for what comes as fast as it is read: nothing is
            then left out when inference is slow, and pauses and zeros mean nothing.
        name: what to call it in messages.

    Raises:
        UsageError: an encoding, a rate or a channel that does not exist.
        AudioError: by :meth:`blocks`: no audio at all, a WAV header, samples that are no audio from the beginning
            or, where ``live`` is False, anywhere.
        DeviceError: by :meth:`blocks`: lost, and ``settings.exit_on_loss``.

    Example:
        >>> import os
        >>> reading, writing = os.pipe()
        >>> with open(writing, "wb") as pipe:
        ...     written = pipe.write((32767 * samples[:1600]).astype("<i2").tobytes())
        >>> source = RawAudio(reading, live=False)
        >>> source.open()
        >>> sum(len(block.samples) for block in source.blocks())
        1600
        >>> source.close()
    """

    def __init__(
        self,
        file: int = 0,
        sample_rate: int = SAMPLE_RATE,
        *,
        rate: int = SAMPLE_RATE,
        channels: int = 1,
        encoding: str = "s16le",
        settings: Settings | None = None,
        live: bool = True,
        name: str = "standard input",
    ) -> None:
        if encoding not in ENCODINGS:
            raise UsageError(f"{name}: unknown sample format {encoding!r}; {nearest(encoding, ENCODINGS)}")
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise UsageError(f"{name}: sample rate {rate} Hz; valid: {LOWEST_RATE} to {HIGHEST_RATE}")
        settings = settings or Settings()
        if not max(1, settings.channel or 1) <= channels <= MOST_CHANNELS:
            raise UsageError(f"{name}: {channels} channels; valid: {settings.channel or 1} to {MOST_CHANNELS}")
        self.name = name
        self.live = live
        self._file = file
        self._rate, self._sample_rate = rate, sample_rate
        self._channels, self._channel = channels, settings.channel
        self._decode = DECODERS[ENCODINGS[encoding]]
        self._frame_bytes = channels * ENCODINGS[encoding][1] // 8
        self._buffer = settings.buffer
        self._stall = settings.stall
        self._exit_on_loss = settings.exit_on_loss
        self._silence = DigitalSilence(settings.digital_silence, sample_rate)
        self._most_bytes = PIPE_BYTES
        self._half_frame = b""
        self._frames = 0
        self._heard = self._lost = False
        self._looked_at = self._heard_at = 0.0
        self._ended = False
        self._stopped = False

    def open(self) -> None:
        """Refuse a terminal: nobody types samples. Let a live pipe hold what may wait."""
        if os.isatty(self._file):
            raise UsageError(
                f"{self.name} is a terminal; pipe audio into it: arecord -q -t raw -f S16_LE -r 16000 | ..."
            )
        wanted = round(self._buffer * self._rate) * self._frame_bytes
        if self.live and wanted > PIPE_BYTES:
            with suppress(OSError, AttributeError):  # it is no pipe, or this is not Linux
                self._most_bytes = fcntl.fcntl(self._file, fcntl.F_SETPIPE_SZ, min(wanted, MOST_PIPE_BYTES))

    def blocks(self) -> Iterator[Block | Loss]:
        """Give what comes until the pipe is closed."""
        self._reception = Reception(self._rate, 0, self._sample_rate, np.ravel, Reason.DAMAGED)
        self._looked_at = self._heard_at = now()
        while not self._stopped and not self._ended:
            asked = now()
            captured = self._read()
            overslept = now() - asked >= self._stall  # the board did
            if overslept or (not captured and now() - self._heard_at >= self._stall):
                yield from self._reception.convert([], last=True)
                yield from self._lose(Reason.STALLED, f"has given nothing for {self._stall:g} s")
            for block in self._placed(captured):
                silent = self._silence.push(block.samples)
                yield block
                if silent:
                    what = f"has given nothing but zeros for {self._silence.limit:g} s"
                    yield from self._lose(Reason.DIGITAL_SILENCE, what)
        if not self._stopped and not self._frames:
            raise AudioError(f"{self.name}: no audio in it; did the program that writes it fail?")
        if not self._stopped and not self._lost:
            yield from self._reception.finish(self._frames)

    def _placed(self, captured: Captured | None) -> Iterator[Block]:
        """Give what came, or what waited for it, where it belongs in the stream; zeros do not end a loss."""
        if captured and (captured.frames.any() or not self._lost):
            self._lost, self._heard_at = False, now()
        heard = [captured] if captured and not self._lost else []
        yield from self._reception.convert(heard, last=now() - self._heard_at >= PATIENCE_S)

    def _read(self) -> Captured | None:
        """Return what comes; None where for a moment nothing does, or what is no audio."""
        looked_before, waited = self._looked_at, not select.select([self._file], [], [], 0)[0]
        came = not waited or select.select([self._file], [], [], STOP_POLL_S)[0]
        self._looked_at = now()
        if not came:
            return None
        content = os.read(self._file, self._most_bytes)
        self._ended = not content
        if not self._frames and content.startswith(b"RIFF"):
            raise AudioError(f"{self.name}: begins with a WAV header; send samples alone: arecord -t raw")
        first, samples = self._frames, self._samples(content)
        if not len(samples):
            return None
        self._heard = True
        if not self.live:  # each piece comes when its last frame is due, however long it is: nothing is ever late
            return Captured((first + len(samples)) / self._rate, first, samples)
        # What was there before anyone looked may have come at any time since the last look.
        return Captured(self._looked_at, first, samples, None if waited else looked_before)

    def _samples(self, content: bytes) -> FloatArray:
        """Return the frames that are complete, (n,); of what is no audio none."""
        content = self._half_frame + content
        frames, first = len(content) // self._frame_bytes, self._frames
        self._frames += frames
        whole, self._half_frame = content[: frames * self._frame_bytes], content[frames * self._frame_bytes :]
        try:
            return as_samples(mono(self._decode(whole).reshape(-1, self._channels), self._channel), self.name, first)
        except AudioError:
            if not (self.live and self._heard):  # from the beginning: not a moment's damage, but another format
                raise
            return np.zeros(0, np.float32)

    def _lose(self, reason: Reason, what: str) -> Iterator[Loss]:
        if self._lost or not self.live:
            return
        detail = f"{self.name} {what}"
        self._lost = True
        self._silence.reset()
        yield Loss(reason, detail)
        if self._exit_on_loss:
            raise DeviceError(detail)

    def stop(self) -> None:
        """Let :meth:`blocks` end."""
        self._stopped = True

    def close(self) -> None:
        """Leave the descriptor to whoever opened it."""
