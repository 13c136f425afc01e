"""Events as lines, for people or for programs: on standard output, or in a file that does not grow without end."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.errors import UsageError

if TYPE_CHECKING:
    from edge_runtime.events import Event

ROTATE_BYTES = 10_000_000
KEEP = 5
MARKS = {"begin": ">", "update": ".", "end": "=", "emotion_begin": "[", "emotion_end": "]"}


def text_line(event: Event) -> str:
    """Return an event as a line for people.

    Example:
        >>> from edge_runtime.events import Event
        >>> text_line(Event("end", 1.25, 3.5, label="anger", probability=0.912))
        '     1.25      3.50 s  =  anger         91 %'
        >>> text_line(Event("gap", 3.5, 4.0, reason="overflow"))
        '     3.50      4.00 s  !  gap (overflow)'
    """
    times = f"{event.start:9.2f} {event.end:9.2f} s"
    if event.probability is not None:
        share = f"{event.probability:3.0%}".replace("%", " %")
        return f"{times}  {MARKS[event.kind]}  {event.label:<12} {share}{_of(event.model)}"
    if event.reason is not None:
        return f"{times}  !  {event.kind} ({event.reason})"
    return f"{times}  -  {event.label:<18}{_of(event.model)}".rstrip()


def _of(model: str | None) -> str:
    return f"  {model}" if model else ""


class LineSink:
    """Writes each event as a line, at once, so that a pipe sees it in time.

    It writes to the descriptor itself: a thread that waits inside a buffered stream would keep Python from exiting.

    Args:
        descriptor: an open file descriptor, which stays open: ``sys.stdout.fileno()``.
        as_json: JSON lines instead of text.
    """

    name = "output"

    def __init__(self, descriptor: int, as_json: bool) -> None:
        self._descriptor = descriptor
        self._as_json = as_json

    def send(self, event: Event) -> None:
        """Write an event's line; raises OSError, ``BrokenPipeError`` where nobody reads any more."""
        _write(self._descriptor, event.to_json() if self._as_json else text_line(event))

    def close(self) -> None:
        """Do nothing: the descriptor is not ours."""


class FileSink:
    """Appends each event to a file as a line of JSON; old files keep numbers, ``FILE.1`` being the newest of them.

    A line that a power cut or a full disk left unfinished is ended or removed, so that all others stay readable.

    Args:
        path: the file; continued if it exists.
        rotate_bytes: size at which a new file is begun.
        keep: old files to keep; the oldest is deleted beyond it.

    Raises:
        UsageError: a size or number that is none.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from edge_runtime.events import Event
        >>> folder = tempfile.TemporaryDirectory()
        >>> sink = FileSink(Path(folder.name, "events.jsonl"), rotate_bytes=100, keep=1)
        >>> for second in range(3):
        ...     sink.send(Event("no_speech", second, second + 1, label="no_speech"))
        >>> sink.close()
        >>> sorted(path.name for path in Path(folder.name).iterdir())
        ['events.jsonl', 'events.jsonl.1']
    """

    def __init__(self, path: str | Path, rotate_bytes: int = ROTATE_BYTES, keep: int = KEEP) -> None:
        if rotate_bytes < 1 or keep < 0:
            raise UsageError(f"{path}: rotate at {rotate_bytes} bytes, keep {keep} old files; valid: at least 1 and 0")
        self.name = str(path)
        self._path = Path(path)
        self._rotate_bytes = rotate_bytes
        self._keep = keep
        self._descriptor = self._open()

    def send(self, event: Event) -> None:
        """Append an event; raises OSError, and then the file is as it was."""
        line = event.to_json()
        size = os.fstat(self._descriptor).st_size
        if size and size + len(line) + 1 > self._rotate_bytes:
            self._rotate()
            size = 0
        try:
            _write(self._descriptor, line)
        except OSError:
            with suppress(OSError):  # a device such as a pipe has no length
                os.ftruncate(self._descriptor, size)
            raise

    def close(self) -> None:
        """Close the file; twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> int:
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            _write(descriptor, "")
        return descriptor

    def _rotate(self) -> None:
        files = [self._path, *(Path(f"{self._path}.{number}") for number in range(1, self._keep + 1))]
        for older, newer in reversed(list(zip(files[1:], files[:-1], strict=True))):
            with suppress(FileNotFoundError):
                newer.replace(older)
        if not self._keep:
            self._path.unlink()
        full, self._descriptor = self._descriptor, self._open()
        os.close(full)


def _write(descriptor: int, line: str) -> None:
    content = f"{line}\n".encode()
    while content:
        content = content[os.write(descriptor, content) :]
