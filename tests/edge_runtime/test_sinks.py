from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from edge_runtime.errors import SinkError, UsageError
from edge_runtime.events import Event
from edge_runtime.sinks import CommandSink, Fanout, FileSink, LineSink, fanout, text_line


def event(second: int) -> Event:
    return Event("end", float(second), second + 1.0, "joy", 0.75, {"joy": 0.75, "anger": 0.25})


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class ListSink:
    """Takes what it is told to take, when it is told to."""

    def __init__(self, name: str = "list") -> None:
        self.name = name
        self.taken: list[Event] = []
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.closed = 0

    def send(self, event: Event) -> None:
        self.entered.set()
        self.gate.wait()
        if self.error:
            raise self.error
        self.taken.append(event)

    def close(self) -> None:
        self.closed += 1


# Lines


@pytest.mark.parametrize(("as_json", "expected"), [(True, event(1).to_json()), (False, "=  joy")])
def test_a_line_is_written_at_once(as_json, expected):
    reading, writing = os.pipe()
    LineSink(writing, as_json).send(event(1))
    line = os.read(reading, 1000).decode()
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert expected in line


def test_a_closed_pipe_is_an_error_of_the_sink():
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        LineSink(writing, True).send(event(1))


# File


def seconds_in(*paths: Path) -> list[float]:
    return [json.loads(line)["start"] for path in paths for line in path.read_text().splitlines()]


def test_a_file_rotates_by_size_and_keeps_the_newest(tmp_path):
    path = tmp_path / "events.jsonl"
    length = len(event(10).to_json()) + 1
    sink = FileSink(path, rotate_bytes=3 * length, keep=2)
    for second in range(10, 24):
        sink.send(event(second))
    sink.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events.jsonl", "events.jsonl.1", "events.jsonl.2"]
    assert seconds_in(Path(f"{path}.2"), Path(f"{path}.1"), path) == list(range(16, 24))
    assert all(file.stat().st_size <= 3 * length for file in tmp_path.iterdir())


def test_a_file_with_no_old_ones_kept(tmp_path):
    path = tmp_path / "events.jsonl"
    sink = FileSink(path, rotate_bytes=1, keep=0)
    for second in range(3):
        sink.send(event(second))
    assert seconds_in(path) == [2]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_continued_after_a_torn_line(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text(event(1).to_json() + "\n" + '{"v": 1, "ki')
    sink = FileSink(path)
    sink.send(event(2))
    lines = path.read_text().splitlines()
    assert [lines[0], lines[2]] == [event(1).to_json(), event(2).to_json()]
    assert len(lines) == 3


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    sink = FileSink(path)
    sink.send(event(1))
    real_write, calls = os.write, []

    def full_disk(descriptor: int, content: bytes) -> int:
        calls.append(content)
        if len(calls) == 1:
            return real_write(descriptor, content[:7])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full_disk)
    with pytest.raises(OSError, match="No space"):
        sink.send(event(2))
    monkeypatch.undo()
    sink.send(event(3))
    assert seconds_in(path) == [1, 3]


@pytest.mark.parametrize(("size", "keep"), [(0, 1), (-5, 1), (10, -1)])
def test_a_file_that_cannot_be_bounded_is_refused(tmp_path, size, keep):
    with pytest.raises(UsageError, match="valid: at least 1 and 0"):
        FileSink(tmp_path / "events.jsonl", size, keep)


# Command


def test_a_command_gets_the_event_as_a_line_on_its_input(tmp_path):
    sink = CommandSink(f"tee -a '{tmp_path}/out file'")
    sink.send(event(1))
    sink.send(event(2))
    assert (tmp_path / "out file").read_text() == f"{event(1).to_json()}\n{event(2).to_json()}\n"


def test_no_shell_reads_an_event(tmp_path):
    sink = CommandSink(f"tee {tmp_path}/out")
    label = f"$(touch {tmp_path}/harm); `touch {tmp_path}/harm`"
    sink.send(Event("end", 0.0, 1.0, label))
    assert json.loads((tmp_path / "out").read_text())["label"] == label
    assert not (tmp_path / "harm").exists()


def test_a_command_that_reads_nothing_is_no_failure():
    CommandSink("true").send(event(1))


def test_a_command_that_hangs_is_killed_with_all_it_started(tmp_path):
    sink = CommandSink(f"sh -c 'sleep 60 & echo $! >{tmp_path}/pid; wait'", limit=0.5)
    begin = time.monotonic()
    with pytest.raises(SinkError, match="took longer than"):
        sink.send(event(1))
    assert time.monotonic() - begin < 30  # not when it ended by itself
    child = int((tmp_path / "pid").read_text())
    wait_until(
        lambda: not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text()
    )


def test_closing_ends_a_command_that_runs():
    sink = CommandSink("sleep 60")
    errors = []

    def send() -> None:
        try:
            sink.send(event(1))
        except SinkError as error:
            errors.append(str(error))

    thread = threading.Thread(target=send)
    thread.start()
    wait_until(lambda: sink._running is not None)
    sink.close()
    sink.close()
    thread.join(10)
    assert errors == ["ended with status -9"]


@pytest.mark.parametrize(
    ("command", "message"),
    [("", "is empty"), ("no-such-program --x", "no program 'no-such-program'"), ("echo 'open", "no closing quotation")],
)
def test_a_command_that_cannot_run_is_refused_at_once(command, message):
    with pytest.raises(UsageError, match=message):
        CommandSink(command)


# Fanout


def test_every_sink_gets_every_event_in_order():
    sinks = [ListSink(), ListSink()]
    events = [event(second) for second in range(200)]
    with Fanout(sinks) as out:
        for each in events:
            out.send(each)
    assert [sink.taken for sink in sinks] == [events, events]
    assert [sink.closed for sink in sinks] == [1, 1]


def test_a_sink_that_blocks_holds_up_nobody_and_loses_the_oldest(monkeypatch):
    monkeypatch.setattr(fanout, "EVENTS_WAITING", 5)
    said = []
    stuck, fine = ListSink("stuck"), ListSink("fine")
    stuck.gate.clear()
    with Fanout([stuck, fine], said.append) as out:
        out.send(event(0))
        stuck.entered.wait(10)
        for second in range(1, 21):
            out.send(event(second))
            wait_until(lambda second=second: len(fine.taken) == second + 1)
        assert out.dropped == {"stuck": 15, "fine": 0}
        stuck.gate.set()
        wait_until(lambda: len(stuck.taken) == 6)
    assert [each.start for each in stuck.taken] == [0, 16, 17, 18, 19, 20]
    assert said == ["stuck: too slow, the oldest events are dropped; listening goes on", "stuck: works again"]


def test_a_failure_is_said_once_and_its_end_too():
    said: list[str] = []
    sink = ListSink()
    with Fanout([sink], said.append) as out:
        sink.error = SinkError("broken")
        for second in range(5):
            out.send(event(second))
        wait_until(lambda: out.dropped == {"list": 5})
        sink.error = OSError(28, "No space left on device")
        out.send(event(5))
        wait_until(lambda: out.dropped == {"list": 6})
        sink.error = None
        out.send(event(6))
    assert said == [
        "list: broken; listening goes on",
        "list: No space left on device; listening goes on",
        "list: works again",
    ]
    assert [each.start for each in sink.taken] == [6]


def test_closing_does_not_wait_for_a_sink_that_hangs(monkeypatch):
    monkeypatch.setattr(fanout, "DRAIN_S", 0.05)
    sink = ListSink()
    sink.gate.clear()
    out = Fanout([sink])
    for second in range(3):
        out.send(event(second))
    sink.entered.wait(10)
    out.close()
    assert sink.closed == 1
    assert out.dropped == {"list": 2}
    sink.gate.set()


def test_a_failure_can_be_taken_instead_of_said():
    said, errors = [], []
    sink = ListSink()
    sink.error = BrokenPipeError()
    with Fanout(say=said.append) as out:
        out.add(sink, errors.append)
        out.send(event(1))
    assert errors == [sink.error]
    assert said == []


# Patience


def test_a_patient_fanout_waits_for_a_slow_sink_and_drops_nothing(monkeypatch):
    monkeypatch.setattr(fanout, "EVENTS_WAITING", 2)
    monkeypatch.setattr(fanout, "DRAIN_S", 0.0)
    sink = ListSink()
    sink.gate.clear()
    fan = Fanout([sink], patient=True)
    sender = threading.Thread(target=lambda: [fan.send(event(second)) for second in range(20)] and fan.close())
    sender.start()
    sink.entered.wait(10)
    sender.join(0.3)
    assert sender.is_alive()
    sink.gate.set()
    sender.join(10)
    assert [taken.start for taken in sink.taken] == list(range(20))
    assert (fan.dropped, sink.closed) == ({"list": 0}, 1)


def test_patience_may_end_while_it_waits(monkeypatch):
    monkeypatch.setattr(fanout, "EVENTS_WAITING", 2)
    sink = ListSink()
    sink.gate.clear()
    fan = Fanout([sink], say=lambda line: None, patient=True)
    sender = threading.Thread(target=lambda: [fan.send(event(second)) for second in range(20)] and fan.close())
    sender.start()
    sink.entered.wait(10)
    fan.patient = False
    sender.join(10)
    assert not sender.is_alive()
    assert fan.dropped == {"list": 19}
    sink.gate.set()


def test_lines_of_emotions_and_of_several_models():
    begin = Event("emotion_begin", 1.0, 2.0, "anger", 0.8, model="a.onnx")
    assert text_line(begin) == "     1.00      2.00 s  [  anger        80 %  a.onnx"
    assert text_line(Event("no_speech", 1.0, 2.0, label="no_speech", model="a")).endswith("-  no_speech           a")
    assert text_line(Event("no_speech", 1.0, 2.0, label="no_speech")).endswith("-  no_speech")
