from __future__ import annotations

import asyncio
import signal as signals
import threading
import time
from datetime import datetime

import numpy as np
import pytest

from edge_runtime import listener as listener_module
from edge_runtime.errors import ArtifactError, AudioError, DeviceError, SerError, UsageError
from edge_runtime.events import Reason
from edge_runtime.listener import Listener
from edge_runtime.session import Session
from edge_runtime.settings import Settings
from edge_runtime.sources import Block, Loss


class FakeSource:
    """Gives blocks, then ends, fails, or waits to be stopped."""

    name = "fake"

    def __init__(
        self, blocks: list[Block | Loss], error: Exception | None = None, endless: bool = False, live: bool = False
    ) -> None:
        self.live = live
        self._blocks = blocks
        self._error = error
        self._endless = endless
        self._stopped = threading.Event()
        self.closed = 0

    def open(self) -> None:
        pass

    def blocks(self):
        yield from self._blocks
        if self._error:
            raise self._error
        if self._endless:
            self._stopped.wait()

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        self.closed += 1


def blocks_of(samples: np.ndarray, start: int = 0, size: int = 777) -> list[Block]:
    return [Block(start + i, samples[i : i + size]) for i in range(0, len(samples), size)]


def without_wall(events: list) -> list[dict]:
    return [{k: v for k, v in event.to_dict().items() if k != "wall"} for event in events]


@pytest.fixture
def signal(speech, room) -> np.ndarray:
    return np.concatenate([room(1.0), speech(2.0), room(2.0, seed=1)])


@pytest.fixture
def expected(recognizer, signal) -> list[dict]:
    session = Session(recognizer)
    return without_wall(session.push(signal) + session.finish())


def test_iteration_gives_the_events_of_the_session(recognizer, signal, expected):
    source = FakeSource(blocks_of(signal))
    with Listener(recognizer, source=source) as ear:
        events = list(ear)
    assert without_wall(events) == expected
    assert source.closed == 1
    assert all(datetime.fromisoformat(event.wall).tzinfo for event in events)


def test_a_path_is_loaded(model, signal, expected):
    with Listener(model, source=FakeSource(blocks_of(signal))) as ear:
        assert without_wall(list(ear)) == expected


def test_a_bad_model_is_refused_before_anything_opens(tmp_path):
    with pytest.raises(ArtifactError):
        Listener(tmp_path / "none.onnx")


def test_asynchronous_iteration(recognizer, signal, expected):
    async def collect() -> list:
        with Listener(recognizer, source=FakeSource(blocks_of(signal))) as ear:
            return [event async for event in ear]

    assert without_wall(asyncio.run(collect())) == expected


def test_leaving_an_asynchronous_iteration_ends_the_program(recognizer, signal):
    async def first() -> str:
        with Listener(recognizer, source=FakeSource(blocks_of(signal), endless=True)) as ear:
            async for event in ear:
                return event.kind
        return "none"

    assert asyncio.run(asyncio.wait_for(first(), 10)) == "begin"


def test_cancelling_an_asynchronous_wait_does_not_hang(recognizer):
    async def wait_for_events() -> None:
        with Listener(recognizer, source=FakeSource([], endless=True)) as ear:
            await asyncio.wait_for(anext(aiter(ear)), 0.1)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(wait_for_events())


def test_the_callback_runs_on_the_listeners_thread(recognizer, signal, expected):
    heard = []
    source = FakeSource(blocks_of(signal))
    with Listener(recognizer, source=source, on_event=lambda e: heard.append((e, threading.current_thread()))) as ear:
        ear.wait()
    assert without_wall([event for event, _ in heard]) == expected
    assert {thread.name for _, thread in heard} == {"ser-edge listener"}


def test_the_settings_hold(recognizer, signal):
    with Listener(recognizer, Settings(threshold=1.0), source=FakeSource(blocks_of(signal))) as ear:
        assert {event.label for event in ear} == {"uncertain"}


def test_a_lost_device_ends_the_segment_and_is_raised_after_the_events(recognizer, speech):
    lost = Loss(Reason.DEVICE_GONE, "microphone 'x' is gone")
    source = FakeSource([*blocks_of(speech(2.0)), lost], error=DeviceError("microphone 'x' is gone"))
    events = []
    with Listener(recognizer, source=source) as ear, pytest.raises(DeviceError, match="is gone"):
        events.extend(ear)
    assert [event.kind for event in events[-2:]] == ["end", "source_lost"]
    assert events[-1].reason == "device_gone"
    assert events[-1].detail == "microphone 'x' is gone"
    assert events[-1].start == 2.0
    assert source.closed == 1


def test_a_source_that_gives_no_audio_ends_the_segment_too(recognizer, speech):
    source = FakeSource(blocks_of(speech(2.0)), error=AudioError("standard input: sample 0 is nan"))
    events = []
    with Listener(recognizer, source=source) as ear, pytest.raises(AudioError, match="is nan"):
        events.extend(ear)
    assert (events[-1].kind, events[-1].end) == ("end", 2.0)


def test_a_source_that_comes_back_begins_afresh_where_the_clock_is(recognizer, speech):
    lost = Loss(Reason.STALLED, "microphone 'x' gives nothing")
    blocks = [*blocks_of(speech(2.0)), lost, *blocks_of(speech(2.0, seed=1), start=80000)]
    with Listener(recognizer, source=FakeSource(blocks)) as ear:
        events = list(ear)
        health = ear.health()
    kinds = [event.kind for event in events]
    at = kinds.index("source_lost")
    assert kinds[at - 1 : at + 3] == ["end", "source_lost", "source_restored", "begin"]
    restored = events[at + 1]
    assert (restored.start, restored.end, restored.reason) == (2.0, 5.0, "stalled")
    assert all(event.start >= 5.0 for event in events[at + 2 :])
    alone = Session(recognizer)
    fresh = without_wall(alone.push(speech(2.0, seed=1)) + alone.finish())
    assert [e.get("probabilities") for e in without_wall(events[at + 2 :])] == [e.get("probabilities") for e in fresh]
    assert (health.outages, health.gaps, health.source_lost) == (1, 0, None)


def test_a_source_that_never_came_says_nothing_of_speech(recognizer):
    with Listener(recognizer, source=FakeSource([Loss(Reason.ABSENT, "no microphone")])) as ear:
        assert [event.kind for event in ear] == ["source_lost"]
        assert ear.health().source_lost == "absent"


class SlowRecognizer:
    """Takes so long for each score that more audio waits afterwards than a hop."""

    def __init__(self, recognizer) -> None:
        self.artifact = recognizer.artifact
        self.scored = 0

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        self.scored += 1
        return np.full(len(self.artifact.labels), 1 / len(self.artifact.labels), np.float32)


class MicrophoneBehind(FakeSource):
    """Gives in one block what was spoken while the recognizer was busy: a second for each score."""

    def __init__(self, samples: np.ndarray, recognizer: SlowRecognizer) -> None:
        super().__init__([], live=True)
        self._samples, self._recognizer = samples, recognizer

    def blocks(self):
        given = 0
        while given < len(self._samples):
            before = self._recognizer.scored
            spoken = 512 if given == 0 or not self._scored else self._scored * 16000
            yield Block(given, self._samples[given : given + spoken])
            given += spoken
            self._scored = self._recognizer.scored - before

    _scored = 0


def test_a_backlog_is_one_inference_and_counted(recognizer, speech):
    recognizer = SlowRecognizer(recognizer)
    with Listener(recognizer, Settings(hop=0.1), source=MicrophoneBehind(speech(10.0), recognizer)) as ear:
        events = list(ear)
        health = ear.health()
    assert [event.kind for event in events if event.kind != "update"] == ["begin", "end"]
    assert recognizer.scored == health.windows
    assert health.windows <= 13  # one a second, where there would have been 93
    assert health.windows + health.coalesced == pytest.approx(93, abs=2)
    assert (health.gaps, health.lost) == (0, 0.0)


def test_an_error_of_the_callback_reaches_whoever_waits(recognizer, signal):
    def fail(_event) -> None:
        raise RuntimeError("the application's fault")

    source = FakeSource(blocks_of(signal), endless=True)
    with (
        Listener(recognizer, source=source, on_event=fail) as ear,
        pytest.raises(RuntimeError, match="fault"),
    ):
        ear.wait()
    assert source.closed == 1


def test_lost_audio_is_a_gap(recognizer, speech):
    blocks = blocks_of(speech(2.0)) + blocks_of(speech(2.0), start=48000)
    with Listener(recognizer, source=FakeSource(blocks)) as ear:
        events = list(ear)
    gap = next(event for event in events if event.kind == "gap")
    assert (gap.start, gap.end, gap.reason) == (2.0, 3.0, "overflow")
    assert (ear.health().gaps, ear.health().lost) == (1, 1.0)
    after = events[events.index(gap) + 1 :]
    assert after[0].kind == "begin"
    assert all(event.start == 3.0 for event in after)


def test_stop_still_gives_the_last_events(recognizer, speech):
    with Listener(recognizer, source=FakeSource(blocks_of(speech(2.0)), endless=True)) as ear:
        events = []
        for event in ear:
            events.append(event)
            if len(events) == 2:
                ear.stop()
    assert events[-1].kind == "end"
    assert events[-1].end == 2.0


def test_a_signal_that_another_thread_got_ends_a_wait(recognizer):
    with Listener(recognizer, source=FakeSource([], endless=True)) as ear:
        before = signals.signal(signals.SIGUSR1, lambda *_: ear.stop())  # runs on this thread, which waits
        sender = threading.Timer(0.2, lambda: signals.pthread_kill(threading.get_ident(), signals.SIGUSR1))
        rescue = threading.Timer(20.0, ear.stop)
        try:
            sender.start()
            rescue.start()
            assert [event.kind for event in ear] == ["no_speech"]
            assert rescue.is_alive()
        finally:
            rescue.cancel()
            sender.join()
            signals.signal(signals.SIGUSR1, before)


def test_close_may_come_twice_from_any_thread_and_before_the_start(recognizer):
    Listener(recognizer, source=FakeSource([])).close()
    with Listener(recognizer, source=FakeSource([], endless=True)) as ear:
        closers = [threading.Thread(target=ear.close) for _ in range(4)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(10)
        ear.close()
        assert list(ear) == []


def test_close_from_the_callback(recognizer, speech):
    heard = []

    def once(event) -> None:
        heard.append(event.kind)
        ear.close()

    ear = Listener(recognizer, source=FakeSource(blocks_of(speech(2.0)), endless=True), on_event=once)
    with ear:
        ear.wait()
    assert heard[0] == "begin"


def test_an_application_that_takes_no_events_cannot_block_the_end(recognizer, signal, monkeypatch):
    monkeypatch.setattr(listener_module, "EVENTS_WAITING", 1)
    source = FakeSource(blocks_of(signal))
    with Listener(recognizer, source=source):
        time.sleep(0.3)
    assert source.closed == 1


def test_an_error_while_opening_is_raised_on_entering(recognizer):
    source = FakeSource([])
    source.open = lambda: (_ for _ in ()).throw(DeviceError("no microphone found"))
    with pytest.raises(DeviceError, match="no microphone"), Listener(recognizer, source=source):
        pass


def test_events_of_a_listener_that_was_not_entered(recognizer):
    with pytest.raises(UsageError, match="with Listener"):
        next(iter(Listener(recognizer, source=FakeSource([]))))


def test_a_listener_listens_once(recognizer):
    with Listener(recognizer, source=FakeSource([])) as ear:
        ear.wait()
    with pytest.raises(UsageError, match="a listener listens once"), ear:
        pass


class Steered(FakeSource):
    """Gives its blocks one by one, and before each does what is asked at its number."""

    def __init__(self, blocks: list[Block | Loss], actions: dict) -> None:
        super().__init__(blocks)
        self._actions = actions

    def blocks(self):
        for number, block in enumerate(self._blocks):
            if number in self._actions:
                self._actions[number]()
            yield block


def test_settings_change_while_listening(recognizer, speech):
    blocks = blocks_of(speech(4.0), size=16000)
    ear = Listener(recognizer, source=Steered(blocks, {2: lambda: ear.update(threshold=1.0, hop=0.25)}))
    with ear:
        events = list(ear)
    session = Session(recognizer)
    expected = session.push(speech(4.0)[:32000]) + session.update(Settings(threshold=1.0, hop=0.25))
    assert without_wall(events) == without_wall(expected + session.push(speech(4.0)[32000:]) + session.finish())
    assert ear.settings == Settings(threshold=1.0, hop=0.25)


def test_changes_add_up_and_whole_settings_replace(recognizer):
    ear = Listener(recognizer, Settings(hop=1.0), source=FakeSource([]))
    ear.update(padding=0.5)
    assert ear.settings == Settings(hop=1.0, padding=0.5)
    ear.update(Settings(silence=2.0), hop=0.3)
    assert ear.settings == Settings(silence=2.0, hop=0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "USB"}, "device cannot change from None to 'USB' while listening; restart"),
        ({"channel": 2}, "channel cannot change"), ({"buffer": 2}, "buffer cannot change"),
        ({"stall": 2}, "stall cannot change"), ({"digital_silence": 2}, "digital_silence cannot change"),
        ({"retry": 2}, "retry cannot change"), ({"exit_on_loss": True}, "exit_on_loss cannot change"),
        ({"treshold": 1}, "unknown setting 'treshold'; did you mean 'threshold'"),
        ({"hop": 0}, "hop is 0; valid"), ({"threshold": {"angr": 0.5}}, "threshold of 'angr'"),
        ({"vad": "none.onnx"}, "none.onnx: no such model file"),
    ],
)  # fmt: skip
def test_a_change_that_cannot_be_changes_nothing(recognizer, speech, change, message):
    failed = []

    def change_nothing() -> None:
        with pytest.raises(SerError, match=message) as raised:
            ear.update(**{"hop": 0.25, **change})
        failed.append("\n" not in str(raised.value))

    ear = Listener(recognizer, source=Steered(blocks_of(speech(2.0), size=16000), {1: change_nothing}))
    with ear:
        events = list(ear)
    session = Session(recognizer)
    assert failed == [True]
    assert without_wall(events) == without_wall(session.push(speech(2.0)) + session.finish())


def test_updates_from_many_threads_and_from_the_callback_break_nothing(recognizer, speech):
    heard = []

    def callback(event) -> None:
        heard.append(event)
        ear.update(padding=0.1 + 0.01 * (len(heard) % 7))

    def keep_changing(number: int) -> None:
        while not over.is_set():
            ear.update(hangover=0.3 + 0.1 * number)
            over.wait(0.002)

    over = threading.Event()
    ear = Listener(recognizer, source=FakeSource(blocks_of(speech(6.0))), on_event=callback)
    changers = [threading.Thread(target=keep_changing, args=(number,)) for number in range(3)]
    with ear:
        for changer in changers:
            changer.start()
        ear.wait()
        over.set()
        for changer in changers:
            changer.join(10)
    running = False
    for event in heard:
        assert (event.kind == "update") <= running
        running = event.kind in ("begin", "update")
    assert not running


def test_several_models_listen_to_one_source(recognizer, stream_recognizer, model, stream_model, signal, expected):
    with Listener([model, stream_recognizer], source=FakeSource(blocks_of(signal))) as ear:
        events = without_wall(list(ear))
    alone = Session(stream_recognizer)
    streamed = without_wall(alone.push(signal) + alone.finish())
    for name, own in ((model.name, expected), (stream_model.name, streamed)):
        assert [event for event in events if event["model"] == name] == [{**event, "model": name} for event in own]


def test_a_lost_source_is_one_event_for_several_models(recognizer, stream_recognizer, speech):
    blocks = [*blocks_of(speech(2.0)), Loss(Reason.STALLED, "nothing"), *blocks_of(speech(0.1), start=80000)]
    with Listener([recognizer, stream_recognizer], source=FakeSource(blocks)) as ear:
        kinds = [event.kind for event in ear]
    at = kinds.index("source_lost")
    assert kinds[at - 2 : at + 2] == ["end", "end", "source_lost", "source_restored"]
    assert kinds.count("source_lost") == 1


def test_the_latency_of_scores_is_known_once_there_are_some(recognizer, signal):
    with Listener(recognizer, source=FakeSource([], endless=True)) as ear:
        health = ear.health()
    assert (health.latency_p50, health.latency_p95, health.latency_p99) == (None, None, None)
    assert "latency_p50" not in health.to_dict()
    blocks = [Block(0, signal[:16000]), Block(16000, signal[16000:])]
    with Listener(recognizer, source=FakeSource(blocks)) as ear:
        list(ear)
        taken = list(ear._latencies)
        assert len(taken) == 1, "the first second is silent: only what gave scores counts"
        assert ear.health().latency_p50 == taken[0] > 0
        ear._latencies.extend(np.arange(1, 1000) / 1000 + 1)
        ear._latencies.append(3.0)
        health = ear.health()
    assert health.latency_p50 == pytest.approx(1.5, abs=0.002)
    assert health.latency_p95 == pytest.approx(1.95, abs=0.002)
    assert health.latency_p99 == pytest.approx(1.99, abs=0.002)
    assert health.to_dict()["latency_p95"] == round(health.latency_p95, 3)


def test_events_about_the_source_say_what_the_listener_has_been_through(recognizer, speech):
    lost = Loss(Reason.STALLED, "microphone 'x' gives nothing")
    blocks = [*blocks_of(speech(2.0)), *blocks_of(speech(2.0), start=40000), lost, *blocks_of(speech(1.0), start=80000)]
    with Listener(recognizer, source=FakeSource(blocks)) as ear:
        events = list(ear)
    health = {event.kind: event.health for event in events}
    assert health["gap"]["gaps"] == 1
    assert health["gap"]["lost"] == 0.5
    assert health["gap"]["windows"] > 0
    assert (health["source_lost"]["outages"], health["source_lost"]["source_lost"]) == (1, "stalled")
    assert "source_lost" not in health["source_restored"]
    assert {kind for kind, found in health.items() if found is None} == {"begin", "update", "end"}
