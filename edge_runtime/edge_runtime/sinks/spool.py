"""A bounded queue of records on disk that survives the end of the process and of the power.

Layout of the folder, which one process at a time may open:

- ``<number of its first record>.segment``: records one after the other, each its length and CRC-32 (little-endian
  uint32) and its content. Written by appending only; records are numbered from 1 without gaps.
- ``acknowledged``: the number up to which records are done, and its CRC-32 in hexadecimal.

What is durable: a record is in the operating system's hands when :meth:`Spool.append` returns, so SIGKILL loses none.
It is on the medium after the next :meth:`Spool.sync`, which does nothing when all records are acknowledged: while
records leave as fast as they come, a memory card is not worn by a sync for each of them. The marker of what is
acknowledged is never synced: after a power cut it may be behind, and some records are read a second time.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.errors import SinkError

MAX_BYTES = 16 * 2**20
"""About 60,000 events: eight hours of uninterrupted speech at two events a second."""

SEGMENTS = 16
"""So many segments fill the spool; then the oldest is dropped as a whole."""

SUFFIX = ".segment"
HEADER = struct.Struct("<II")


class Spool:
    """A first-in, first-out queue on disk; for any threads of one process.

    Args:
        folder: where to keep it; made if missing, then readable by its owner only.
        max_bytes: bound of all segments together; beyond it the oldest segment is dropped. At most a sixteenth of it
            is the size of one record.

    Attributes:
        dropped: unacknowledged records dropped since the spool was opened, because it was full or they were damaged.
        read_up_to: number of the last record that was read or skipped; everything up to it was acknowledged if none
            was read.

    Raises:
        SinkError: the spool is open elsewhere.
        OSError: the folder cannot be made, read or written.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> spool = Spool(Path(folder.name))
        >>> spool.append(b"first"), spool.append(b"second")
        (1, 2)
        >>> spool.read()
        (1, b'first')
        >>> spool.acknowledge(1)
        >>> spool.close()
        >>> spool = Spool(Path(folder.name))
        >>> spool.read()
        (2, b'second')
        >>> spool.close()
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.dropped = 0
        self._folder = folder
        self._max_bytes = max_bytes
        self._segment_bytes = max_bytes // SEGMENTS
        self._access = threading.Lock()
        self._synced = True
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory = _lock(folder)
        self._marker = os.open(folder / "acknowledged", os.O_RDWR | os.O_CREAT, 0o600)
        self._acknowledged = _decode_marker(os.read(self._marker, 64))
        self._sizes = {int(path.stem): path.stat().st_size for path in folder.glob(f"*{SUFFIX}") if path.stem.isdigit()}
        self._open_last_segment()
        self._acknowledged = max(self._acknowledged, min(self._sizes) - 1)
        self.read_up_to = self._acknowledged
        self._cursor = self._locate(self._acknowledged + 1)

    @property
    def waiting(self) -> int:
        """Records that are not acknowledged."""
        return self._last - self._acknowledged

    def append(self, record: bytes) -> int:
        """Add a record and return its number.

        Raises:
            SinkError: an empty record, or one that is larger than a segment.
            OSError: the record cannot be written; the spool is as it was.
        """
        size = HEADER.size + len(record)
        if not record or size > self._segment_bytes:
            valid = self._segment_bytes - HEADER.size
            raise SinkError(f"{self._folder}: a record of {len(record)} bytes; valid: 1 to {valid}")
        with self._access:
            if self._sizes[self._writing] + size > self._segment_bytes:
                os.fsync(self._writer)  # from now on, sync sees only the next segment
                os.close(self._writer)
                self._begin_segment(self._last + 1)
            while sum(self._sizes.values()) + size > self._max_bytes and len(self._sizes) > 1:
                self._drop_oldest()
            self._write(HEADER.pack(len(record), zlib.crc32(record)) + record)
            self._last += 1
            self._synced = False
            return self._last

    def read(self) -> tuple[int, bytes] | None:
        """Return the number and content of the next record, None if there is none yet.

        The first record after opening is the oldest that is not acknowledged; each is read once until the next opening.
        """
        with self._access:
            while self.read_up_to < self._last:
                segment, offset = self._cursor
                if self.read_up_to >= self._end_of(segment):
                    self._cursor = (self._following(segment), 0)
                    continue
                record = next(_records(self._path(segment), offset), None)
                if record is None:
                    self._skip_rest_of(segment)
                    continue
                self.read_up_to += 1
                self._cursor = (segment, offset + HEADER.size + len(record))
                return self.read_up_to, record
            return None

    def acknowledge(self, number: int) -> None:
        """Forget all records up to this number; one that was acknowledged or dropped before changes nothing."""
        with self._access:
            if self._acknowledged < number <= self._last:
                self._acknowledged = number
                os.pwrite(self._marker, _encode_marker(number), 0)
                for segment in sorted(self._sizes)[:-1]:
                    if self._end_of(segment) <= min(number, self.read_up_to):
                        self._remove(segment)

    def sync(self) -> None:
        """Put unacknowledged records onto the medium, so that a power cut cannot take them."""
        with self._access:
            if not self._synced and self.waiting:
                os.fsync(self._writer)
                os.fsync(self._directory)
                self._synced = True

    def close(self) -> None:
        """Sync and release the spool, which cannot be used from then on."""
        self.sync()
        for descriptor in (self._writer, self._marker, self._directory):
            os.close(descriptor)

    def _path(self, segment: int) -> Path:
        return self._folder / f"{segment:020d}{SUFFIX}"

    def _end_of(self, segment: int) -> int:
        """Return the number of a segment's last record."""
        return min((other for other in self._sizes if other > segment), default=self._last + 1) - 1

    def _following(self, segment: int) -> int:
        return min(other for other in self._sizes if other > segment)

    def _open_last_segment(self) -> None:
        """Make ready to append, after what of the last segment is whole; a torn record was never appended."""
        last = max(self._sizes, default=1)
        whole = [len(record) + HEADER.size for record in _records(self._path(last), 0)] if self._sizes else []
        self._last = last + len(whole) - 1
        if not self._sizes or self._last < self._acknowledged:
            # Numbers are given once: what was acknowledged but lost with the power is not given again.
            self._last = max(self._last, self._acknowledged)
            for segment in list(self._sizes):
                self._remove(segment)
            self._begin_segment(self._last + 1)
            return
        self._writing = last
        self._writer = os.open(self._path(last), os.O_WRONLY | os.O_APPEND)
        os.ftruncate(self._writer, sum(whole))
        self._sizes[last] = sum(whole)

    def _begin_segment(self, first: int) -> None:
        self._writer = os.open(self._path(first), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o600)
        self._writing = first
        self._sizes[first] = 0

    def _write(self, content: bytes) -> None:
        size = self._sizes[self._writing]
        try:
            written = os.write(self._writer, content)
            if written < len(content):
                # The medium is full: the rest of the record would say so, by the error that is to be raised.
                os.write(self._writer, content[written:])
        except OSError:
            os.ftruncate(self._writer, size)
            raise
        self._sizes[self._writing] = size + len(content)

    def _locate(self, number: int) -> tuple[int, int]:
        """Return the segment and the offset at which a record begins, or at which damage hides it."""
        segment = max((first for first in self._sizes if first <= number), default=min(self._sizes))
        offset = 0
        for _, record in zip(range(segment, number), _records(self._path(segment), 0), strict=False):
            offset += HEADER.size + len(record)
        return segment, offset

    def _skip_rest_of(self, segment: int) -> None:
        end = self._end_of(segment)
        self.dropped += end - self.read_up_to
        self.read_up_to = end
        self._cursor = (segment, self._sizes[segment])

    def _drop_oldest(self) -> None:
        oldest = min(self._sizes)
        end = self._end_of(oldest)
        self.dropped += max(0, end - self._acknowledged)
        self._acknowledged = max(self._acknowledged, end)
        if self.read_up_to < end or self._cursor[0] == oldest:
            self.read_up_to = max(self.read_up_to, end)
            self._cursor = (self._following(oldest), 0)
        self._remove(oldest)

    def _remove(self, segment: int) -> None:
        self._path(segment).unlink()
        del self._sizes[segment]


def _lock(folder: Path) -> int:
    """Open a folder for this process alone; the system ends the lock with the process, however that ends."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(directory)
        raise SinkError(f"{folder}: in use by another ser-edge; give each its own folder") from None
    return directory


def _records(path: Path, offset: int) -> Iterator[bytes]:
    """Give the records of a segment from an offset on, up to its end or the first that is not whole."""
    with path.open("rb") as file:
        file.seek(offset)
        while len(header := file.read(HEADER.size)) == HEADER.size:
            length, checksum = HEADER.unpack(header)
            record = file.read(min(length, MAX_BYTES))
            # A power cut can leave zeros, and the checksum of nothing is zero.
            if not record or len(record) != length or zlib.crc32(record) != checksum:
                return
            yield record


def _encode_marker(number: int) -> bytes:
    digits = f"{number:020d}".encode()
    return digits + f" {zlib.crc32(digits):08x}\n".encode()


def _decode_marker(content: bytes) -> int:
    """Return the number, or 0 where a power cut has left something else."""
    digits = content[:20]
    return int(digits) if digits.isdigit() and content == _encode_marker(int(digits)) else 0
