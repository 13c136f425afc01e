"""What the live views show: the session's hearing, and the monitor that keeps the last minutes."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import numpy as np
import pytest

from edge_runtime.events import Event
from edge_runtime.listener import Health
from edge_runtime.monitor import MOST_ENTRIES, TIMELINE_S, Monitor
from edge_runtime.session import Hearing, Session

HEALTH = Health(12.0, 3, 0, 0, 0.0, 0, None, 0.0, None, None, None)
QUIET = Hearing(2.0, -60.0, -50.0, -61.0, -52.0, False, None)


def changed(frozen, **fields):
    return type(frozen)(**{**vars(frozen), **fields})


def monitor_of(hearing: Hearing = QUIET, health: Health = HEALTH) -> Monitor:
    ear = SimpleNamespace(hearing=lambda: hearing, health=lambda: health, source=SimpleNamespace(name="porch"))
    return Monitor(ear, ("anger", "joy"), lambda: {"mqtt": 2, "output": 0})


def answer(kind: str, start: float, end: float) -> Event:
    return Event(kind, start, end, "joy", 0.75, {"anger": 0.25, "joy": 0.75})


# Hearing


def test_before_anything_comes(recognizer):
    heard = Session(recognizer).hearing()
    assert (heard.position, heard.digital_silence, heard.pause) == (0.0, True, None)
    assert (heard.level, heard.peak) == (-100.0, -100.0)


def test_a_room(recognizer, room):
    session = Session(recognizer)
    session.push(room(4.0, level_db=-70.0))
    heard = session.hearing()
    assert heard.position == 4.0
    # White noise of a known power; its quietest block of 512 samples is within a decibel of it.
    assert heard.level == pytest.approx(-70.0, abs=1.0)
    assert heard.floor == pytest.approx(-70.5, abs=0.5)
    assert heard.threshold == max(heard.floor + 9.0, -60.0)
    assert not heard.digital_silence
    assert heard.pause is None


def test_speech_and_the_pause_after_it(recognizer, speech, room):
    session = Session(recognizer)
    session.push(speech(2.2))
    assert session.hearing().pause < 0.3
    assert session.hearing().level > session.hearing().threshold
    session.push(room(0.4, level_db=-70.0))
    assert session.hearing().pause == pytest.approx(0.4, abs=0.3)
    session.push(room(1.0, level_db=-70.0))
    assert session.hearing().pause is None


@pytest.mark.parametrize(("largest", "peak"), [(1.0, 0.0), (-0.5, -6.02), (0.1, -20.0)])
def test_the_peak_is_that_of_the_newest_audio(recognizer, room, largest, peak):
    samples = room(1.0)
    samples[100] = 0.9  # long ago
    samples[-1000] = largest
    session = Session(recognizer)
    session.push(samples)
    assert session.hearing().peak == pytest.approx(peak, abs=0.01)


def test_digital_silence(recognizer, speech):
    session = Session(recognizer)
    session.push(np.concatenate([speech(2.0), np.zeros(16000, np.float32)]))
    heard = session.hearing()
    assert (heard.level, heard.peak, heard.digital_silence) == (-100.0, -100.0, True)
    assert heard.position == 3.0


def test_to_look_changes_nothing_and_may_be_done_while_audio_comes(recognizer, speech, room):
    samples = np.concatenate([room(1.0), speech(3.0), np.zeros(8000, np.float32), speech(2.0, seed=1)])
    alone, watched = Session(recognizer), Session(recognizer)
    expected = alone.push(samples) + alone.finish()
    done, errors = threading.Event(), []

    def look():
        while not done.is_set():
            try:
                watched.hearing()
            except Exception as error:
                errors.append(error)

    looking = threading.Thread(target=look)
    looking.start()
    events = [event for start in range(0, len(samples), 512) for event in watched.push(samples[start : start + 512])]
    events += watched.finish()
    done.set()
    looking.join()
    assert errors == []
    assert events == expected


# Monitor


@pytest.mark.parametrize(
    ("hearing", "health", "gate", "reason"),
    [
        ({"position": 0.0}, {}, "waiting", "no audio yet"),
        ({}, {}, "closed", "quieter than speech, which begins at -52 dB, 9 above the room"),
        ({"digital_silence": True}, {}, "closed", "digital silence: nothing but exact zeros"),
        ({"pause": 0.0, "level": -30.0}, {}, "open", "speech, 22 dB more than it needs"),
        ({"pause": 0.3}, {}, "open", "a pause of 0.3 s in speech"),
        ({}, {"source_lost": "stalled"}, "lost", "stalled: the porch is quiet"),
    ],
)
def test_the_gate_and_why(hearing, health, gate, reason):
    monitor = monitor_of(changed(QUIET, **hearing), changed(HEALTH, **health))
    monitor.note(Event("source_lost", 2.0, 2.0, reason="stalled", detail="the porch is quiet"))
    snapshot = monitor.snapshot()
    assert (snapshot.gate, snapshot.reason) == (gate, reason)


def test_time_goes_on_while_the_source_is_lost(monkeypatch):
    clock = [50.0]
    monkeypatch.setattr("edge_runtime.monitor.now", lambda: clock[0])
    monitor = monitor_of(health=changed(HEALTH, source_lost="stalled"))
    assert monitor.snapshot().position == 2.0, "its event has not come yet"
    monitor.note(Event("source_lost", 2.0, 2.0, reason="stalled", detail="quiet"))
    clock[0] = 57.5
    assert (monitor.snapshot().position, monitor.snapshot().level) == (9.5, -100.0)


@pytest.mark.parametrize(("peak", "clipping"), [(0.0, True), (-0.005, True), (-0.1, False)])
def test_clipping(peak, clipping):
    assert monitor_of(changed(QUIET, peak=peak)).snapshot().clipping is clipping


def test_a_segment_is_one_entry_with_its_newest_event():
    monitor = monitor_of()
    for event in (answer("begin", 1.0, 2.0), answer("update", 1.0, 2.5), Event("no_speech", 0.0, 1.0, "no_speech")):
        monitor.note(event)
    before = monitor.entries()
    assert [entry.what.kind for entry in before] == ["update", "no_speech"]
    last = answer("end", 1.0, 2.7)
    monitor.note(last)
    assert [entry.what.kind for entry in monitor.entries()] == ["end", "no_speech"]
    assert monitor.snapshot().answer is last
    (fresh,) = monitor.entries(after=max(entry.revision for entry in before))
    assert (fresh.what, fresh.number) == (last, before[0].number)


def test_what_goes_wrong_is_among_the_entries():
    monitor = monitor_of()
    monitor.note(Event("gap", 1.0, 1.5, reason="overflow"))
    monitor.say("mqtt: connection lost; listening goes on")
    monitor.say("mqtt: connection lost; listening goes on")
    assert [entry.to_dict().get("message") for entry in monitor.entries()] == [
        None, "mqtt: connection lost; listening goes on", "mqtt: connection lost; listening goes on",
    ]  # fmt: skip
    assert monitor.entries()[0].to_dict()["event"]["reason"] == "overflow"
    said = datetime.fromisoformat(monitor.entries()[2].to_dict()["wall"])
    assert abs(datetime.now(timezone.utc) - said) < timedelta(minutes=1)
    assert monitor.snapshot().undelivered == {"mqtt": 2}


def test_only_the_last_minutes_are_kept():
    monitor = monitor_of()
    monitor.note(answer("end", 0.0, 1.0))
    monitor.note(answer("end", TIMELINE_S, TIMELINE_S + 0.9))
    assert len(monitor.entries()) == 2
    monitor.note(answer("end", TIMELINE_S + 1.0, TIMELINE_S + 1.1))
    assert [entry.what.start for entry in monitor.entries()] == [TIMELINE_S, TIMELINE_S + 1.0]
    for second in range(2 * MOST_ENTRIES):
        monitor.note(answer("end", TIMELINE_S + second / 1e6, TIMELINE_S + 2.0))
    assert len(monitor.entries()) == MOST_ENTRIES
