from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge_runtime.errors import SinkError
from edge_runtime.sinks.spool import HEADER, SEGMENTS, Spool


def rest_of(spool: Spool) -> list[tuple[int, bytes]]:
    return list(iter(spool.read, None))


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.segment"))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in segments(folder))


class SpoolAgainstModel(RuleBasedStateMachine):
    """A spool does what two lists do, whatever the order of appending, reading, acknowledging and crashing."""

    MAX_BYTES = SEGMENTS * 64

    @initialize()
    def start(self) -> None:
        self.folder = Path(os.environ["SPOOL_TEST_FOLDER"]) / os.urandom(8).hex()
        self.spool = Spool(self.folder, self.MAX_BYTES)
        self.records: dict[int, bytes] = {}  # all that was ever appended and not dropped
        self.acknowledged = 0
        self.read_up_to = 0
        self.last = 0

    def forget_dropped(self, before: int) -> None:
        """Take over how much the spool has dropped, having checked that it is the oldest, and not before it is full."""
        dropped = self.spool.dropped - before
        if dropped:
            assert size_of(self.folder) > self.MAX_BYTES * (SEGMENTS - 3) / SEGMENTS
            self.acknowledged += dropped
            self.read_up_to = max(self.read_up_to, self.acknowledged)

    @rule(record=st.binary(min_size=1, max_size=50))
    def append(self, record: bytes) -> None:
        before = self.spool.dropped
        self.last += 1
        assert self.spool.append(record) == self.last
        self.records[self.last] = record
        self.forget_dropped(before)

    @rule(count=st.integers(20, 60))
    def append_many(self, count: int) -> None:
        for index in range(count):
            self.append(b"%020d" % index)

    @rule()
    def read(self) -> None:
        # Dropping may have removed whole segments beyond what was read: the next record is the oldest that is left.
        found = self.spool.read()
        if self.read_up_to == self.last:
            assert found is None
        else:
            self.read_up_to += 1
            assert found == (self.read_up_to, self.records[self.read_up_to])

    @precondition(lambda self: self.read_up_to > self.acknowledged)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        self.acknowledged = data.draw(st.integers(self.acknowledged + 1, self.read_up_to))
        self.spool.acknowledge(self.acknowledged)

    @rule(
        torn=st.one_of(st.just(b""), st.binary(max_size=HEADER.size - 1), st.just(bytes(40)), st.just(b"\x14\0\0\0ab"))
    )
    def crash_and_open(self, torn: bytes) -> None:
        # A copy is what the disk holds at this moment, as after SIGKILL, with a last record that was not finished.
        copy = self.folder.with_name(os.urandom(8).hex())
        shutil.copytree(self.folder, copy)
        with segments(copy)[-1].open("ab") as file:
            file.write(torn)
        self.spool.close()
        shutil.rmtree(self.folder)
        self.folder = copy
        self.spool = Spool(self.folder, self.MAX_BYTES)
        self.read_up_to = self.acknowledged

    @invariant()
    def it_is_bounded_and_counts(self) -> None:
        if hasattr(self, "spool"):
            assert size_of(self.folder) <= self.MAX_BYTES
            assert self.spool.waiting == self.last - self.acknowledged

    def teardown(self) -> None:
        if hasattr(self, "spool"):
            self.spool.close()
            assert [number for number, _ in rest_of(Spool(self.folder, self.MAX_BYTES))] == list(
                range(self.acknowledged + 1, self.last + 1)
            )
            shutil.rmtree(self.folder)


def test_a_spool_against_a_model(tmp_path, monkeypatch):
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setenv("SPOOL_TEST_FOLDER", str(tmp_path))
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and no crash of a process shows what it is for
    run_state_machine_as_test(
        SpoolAgainstModel, settings=settings(max_examples=40, stateful_step_count=40, deadline=None)
    )


def test_a_full_spool_drops_the_oldest_and_says_how_many(tmp_path):
    spool = Spool(tmp_path / "spool", SEGMENTS * 100)
    for number in range(1, 1001):
        spool.append(b"%04d" % number)
    left = rest_of(spool)
    assert left[-1] == (1000, b"1000")
    assert [number for number, _ in left] == list(range(1001 - len(left), 1001))
    assert spool.dropped == 1000 - len(left)
    assert size_of(tmp_path / "spool") <= SEGMENTS * 100


def test_acknowledged_segments_leave_the_disk(tmp_path):
    spool = Spool(tmp_path, SEGMENTS * 100)
    for _ in range(100):
        spool.append(b"0123456789")
    rest_of(spool)
    assert len(segments(tmp_path)) > 10
    spool.acknowledge(100)
    assert len(segments(tmp_path)) == 1


def test_numbers_are_never_given_twice(tmp_path):
    spool = Spool(tmp_path, SEGMENTS * 100)
    for _ in range(20):
        spool.append(b"0123456789")
    rest_of(spool)
    spool.acknowledge(20)
    spool.close()
    for segment in segments(tmp_path):  # as if never synced before the power went
        segment.write_bytes(b"")
    spool = Spool(tmp_path, SEGMENTS * 100)
    assert (spool.append(b"next"), spool.waiting) == (21, 1)
    assert rest_of(spool) == [(21, b"next")]


@pytest.mark.parametrize("marker", [b"", b"garbage", bytes(30), b"00000000000000000001 00000000\n"])
def test_a_damaged_marker_means_again_not_lost(tmp_path, marker):
    spool = Spool(tmp_path)
    spool.append(b"one")
    spool.append(b"two")
    rest_of(spool)
    spool.acknowledge(2)
    spool.close()
    (tmp_path / "acknowledged").write_bytes(marker)
    assert rest_of(Spool(tmp_path)) == [(1, b"one"), (2, b"two")]


def test_damage_in_the_middle_costs_no_more_than_its_segment(tmp_path):
    spool = Spool(tmp_path, SEGMENTS * 60)  # three records of 18 bytes to a segment
    for number in range(1, 10):
        spool.append(b"record %03d" % number)
    spool.close()
    middle = segments(tmp_path)[1]
    content = bytearray(middle.read_bytes())
    content[18 + HEADER.size] ^= 1  # in the second record
    middle.write_bytes(content)
    spool = Spool(tmp_path, SEGMENTS * 60)
    assert [number for number, _ in rest_of(spool)] == [1, 2, 3, 4, 7, 8, 9]
    assert spool.dropped == 2
    spool.acknowledge(spool.read_up_to)
    assert spool.waiting == 0


def test_a_spool_is_for_one_process(tmp_path):
    spool = Spool(tmp_path)
    with pytest.raises(SinkError, match="in use by another ser-edge"):
        Spool(tmp_path)
    spool.close()
    Spool(tmp_path)


@pytest.mark.parametrize("record", [b"", bytes(100)])
def test_records_have_a_size(tmp_path, record):
    with pytest.raises(SinkError, match="valid: 1 to 92"):
        Spool(tmp_path, SEGMENTS * 100).append(record)


def test_a_write_that_fails_leaves_the_spool_whole(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    spool.append(b"before")
    real_write, written = os.write, []

    def full_disk(descriptor: int, content: bytes) -> int:
        written.append(content)
        if len(written) == 1:
            return real_write(descriptor, content[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full_disk)
    with pytest.raises(OSError, match="No space"):
        spool.append(b"half-written")
    monkeypatch.undo()
    assert spool.append(b"after") == 2
    assert rest_of(spool) == [(1, b"before"), (2, b"after")]
    spool.close()
    assert rest_of(Spool(tmp_path)) == [(1, b"before"), (2, b"after")]


def test_sync_spares_the_medium_when_all_is_acknowledged(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    spool = Spool(tmp_path)
    spool.append(b"one")
    spool.read()
    spool.acknowledge(1)
    spool.sync()
    assert synced == []
    spool.append(b"two")
    spool.sync()
    spool.sync()
    assert len(synced) == 2  # the segment and its folder, once


def test_a_segment_that_is_full_is_synced_before_the_next_begins(tmp_path, monkeypatch):
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    spool = Spool(tmp_path, SEGMENTS * 100)
    for _ in range(20):
        spool.append(b"0123456789")
    assert synced == segments(tmp_path)[:-1]


def test_sigkill_loses_nothing_that_was_appended(tmp_path):
    script = (
        "import sys, pathlib\n"
        "from edge_runtime.sinks.spool import Spool\n"
        f"spool = Spool(pathlib.Path({str(tmp_path)!r}))\n"
        "while True:\n"
        "    number = spool.append(b'x' * 100)\n"
        "    sys.stdout.write(f'{number}\\n'); sys.stdout.flush()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd="/")
    for _ in range(200):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    seen = 200 + len([line for line in process.stdout.read().split("\n") if line])
    process.wait()
    left = rest_of(Spool(tmp_path))
    assert len(left) >= seen - 1  # the last line may be cut
    assert left == [(number, b"x" * 100) for number in range(1, len(left) + 1)]
