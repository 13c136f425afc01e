"""Everything that can go wrong at once, at random, many times over: listening must outlive it and tell the truth.

    python tools/fault_campaign.py                     # 100 runs, 10 of them on a real sound server and broker
    python tools/fault_campaign.py --runs 1000 --real 0
    python tools/fault_campaign.py --seed 4711 --runs 1    # one run again

Three kinds of run. ``microphone`` and ``pipe``: a listener on a simulated sound system and its clock
(``tools/simulated_sound.py``), the same events for the same seed, minutes of stream in a second: unplugged, in use,
stalled, late, all at once, zeros, full scale, NaN, PortAudio's flags, a clock that jumps, inference too slow, and the
end at any moment. ``real``: ``ser-edge listen`` on a PulseAudio and with a mosquitto of its own, which are unplugged,
killed, frozen, suspended and muted, and SIGTERM while they are. Seeds count up from ``--seed``.

Each run is examined: it must not hang, crash or leave threads or open files behind; every beginning has its end; in an
outage nothing is said; nothing is said about audio that was lost; what was lost is announced; what was spoken
undisturbed is heard; and at the broker every event arrives or waits in the spool. Nor may the second half of the
simulated runs leave objects behind; resident memory is told and not judged, because the allocator keeps megabytes of
what the listeners' threads give back. Exit code 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from mqtt_broker import MOSQUITTO, MqttBroker
from quick_run import syllables, write_wav
from rich.console import Console
from rich.progress import track
from rich.table import Table
from simulated_sound import LOSING, Fault, Samples, SimulatedSound, repeated
from tiny_artifact import tiny_file
from tiny_stream import tiny_stream_model
from virtual_microphone import VirtualMicrophone

from edge_runtime import recordings as recordings_module
from edge_runtime.errors import DeviceError
from edge_runtime.listener import Listener
from edge_runtime.model_file import seal
from edge_runtime.recognizer import Recognizer
from edge_runtime.recordings import RawAudio
from edge_runtime.settings import Settings
from edge_runtime.sinks.spool import Spool

UTTERANCES = ((2.0, 4.5), (8.0, 9.6), (13.0, 16.0))
"""When somebody speaks, seconds of every :data:`LOOP_S`."""

LOOP_S = 20.0

HANG_S = 60.0
"""Seconds after which a run hangs; none takes a tenth of it."""

MARGIN_S = 0.6
"""How exactly the time of a loss is known: what comes later than 0.3 s is settled 0.5 s afterwards."""

RECOVERY_S = 3.0
"""Seconds before and after a fault in which an utterance may be cut by it, or by what it takes to notice it."""

MOST_LEFT_BEHIND = 50
"""Objects that a run may leave for good: its outcome has a dozen, a listener that is not let go of a thousand."""

FILLS_ONCE = 1000
"""Objects that caches may gain, in however many runs."""

DURATIONS = {
    "gone": (0.5, 20.0),
    "refuse": (0.5, 20.0),
    "stall": (0.1, 12.0),
    "burst": (0.1, 4.0),
    "zeros": (0.1, 12.0),
    "full_scale": (0.1, 5.0),
    "overflow": (0.01, 0.5),
    "sleep": (0.5, 600.0),
    "slow": (0.5, 8.0),
    "damage": (0.05, 4.0),
}
"""Of each fault, seconds."""

FAULTS = {
    "microphone": ("gone", "refuse", "stall", "burst", "zeros", "full_scale", "overflow", "sleep", "slow"),
    "pipe": ("stall", "burst", "zeros", "full_scale", "sleep", "slow", "damage"),
}


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        seed: gives the same run again.
        kind: ``microphone``, ``pipe`` or ``real``.
        faults: what was done to it.
        events: how many there were of each kind.
        wrong: what should not be, a line each.
        seconds: that the run took.
        ending: seconds from SIGTERM to the end, of a ``real`` run.
    """

    seed: int
    kind: str
    faults: list[str] = field(default_factory=list)
    events: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    ending: float | None = None


# What must hold ---------------------------------------------------------------------------------------------------


def examine(events: list[dict[str, Any]]) -> list[str]:
    """Return what is wrong with a stream of events by itself: order, pairs, times and numbers."""
    wrong: list[str] = []
    running = lost = False
    silent_until = 0.0
    for event in events:
        kind, start, end = event["kind"], event["start"], event["end"]
        told = f"{kind} at {start:.2f} to {end:.2f} s"
        if lost and kind != "source_restored":
            wrong.append(f"{told}: said in an outage")
        if kind == "source_restored" and not lost:
            wrong.append(f"{told}: nothing was lost")
        too_short = kind == "end" and not running and event.get("label") == "uncertain" and "probability" not in event
        if not too_short and running != (kind in {"update", "end"}):
            wrong.append(f"{told}: {'amid a segment' if running else 'without a beginning'}")
        if start > end + 1e-9 or start < silent_until - 1e-9:
            wrong.append(f"{told}: speaks of audio that was lost, or of none; heard again from {silent_until:.2f} s")
        if not _is_distribution(event.get("probabilities")):
            wrong.append(f"{told}: probabilities {event['probabilities']}")
        running = kind in {"begin", "update"}
        lost = kind == "source_lost"
        if kind in {"gap", "source_restored"}:
            silent_until = end
    return wrong + (["the last segment never ended"] if running else [])


def _is_distribution(probabilities: dict[str, float] | None) -> bool:
    values = list((probabilities or {"none": 1.0}).values())
    return all(0 <= value <= 1 for value in values) and abs(sum(values) - 1) < 1e-4


def compare(events: list[dict[str, Any]], faults: list[Fault], stall: float, retry: float, until: float) -> list[str]:
    """Return where events and what was done to the sound system disagree.

    Args:
        events: of a whole run.
        faults: that it had.
        stall: the setting.
        retry: the setting.
        until: seconds of the clock at which listening ended.
    """
    silent = [(e["start"], e["end"]) for e in events if e["kind"] in {"gap", "source_restored"}]
    lost_at = [e["start"] for e in events if e["kind"] == "source_lost"]
    silent += [(lost_at[-1], until)] if len(lost_at) > sum(e["kind"] == "source_restored" for e in events) else []
    segments = [(e["start"], e["end"]) for e in events if e["kind"] == "end"]
    wrong = []
    for fault in faults:
        lost = (fault.start + MARGIN_S, min(fault.end, until) - MARGIN_S)
        noticed_by = until - stall - 1
        # What falls short of this cannot be told from audio that is late.
        if fault.kind not in LOSING or min(fault.end, noticed_by) - fault.start < 2 * MARGIN_S:
            continue
        if fault.kind == "sleep" and fault.end > noticed_by:  # it is over before the end is asked for, or never
            continue
        if not any(start <= lost[1] and end >= lost[0] for start, end in silent):
            wrong.append(f"{fault.kind} at {fault.start:.2f} to {fault.end:.2f} s: audio was lost and nobody said so")
        wrong += [
            f"end at {start:.2f} to {end:.2f} s: speaks of what {fault.kind} took from {fault.start:.2f} s on"
            for start, end in segments
            if start < lost[1] and end > lost[0]
        ]
    for began, ended in _undisturbed(_disturbances(faults, stall, retry), until):
        if not any(start < began + 0.5 and end > ended - 0.5 for start, end in segments):
            wrong.append(f"speech at {began:.2f} to {ended:.2f} s: nobody heard it")
    return wrong


def _disturbances(faults: list[Fault], stall: float, retry: float) -> list[tuple[float, float]]:
    """Return from when to when faults may keep an utterance from being heard.

    A device is tried again after as long as it has been away, and after ``retry`` at most. One that is away again
    before that was never back: the tries go on as rarely as they had become.
    """
    disturbances: list[tuple[float, float]] = []
    for fault in faults:
        start = fault.start - RECOVERY_S
        if disturbances and start < disturbances[-1][1]:
            start, _ = disturbances.pop()
        away = fault.end - start
        disturbances.append((start, fault.end + min(away, retry) + stall + RECOVERY_S))
    return disturbances


def _undisturbed(disturbances: list[tuple[float, float]], until: float) -> Iterator[tuple[float, float]]:
    """Give each utterance that no disturbance comes near to."""
    for loop in range(int(until / LOOP_S) + 1):
        for start, end in UTTERANCES:
            began, ended = loop * LOOP_S + start, loop * LOOP_S + end
            near = any(first < ended and last > began for first, last in disturbances)
            if not near and ended + RECOVERY_S < until:
                yield began, ended


# Simulated runs ---------------------------------------------------------------------------------------------------


def talk() -> Callable[[int, int], Samples]:
    """Return what somebody says who speaks in :data:`UTTERANCES`, in a room that is never quite silent."""
    loop = np.random.default_rng(0).integers(5, 15, round(LOOP_S * 16000)).astype(np.int16)
    for number, (start, end) in enumerate(UTTERANCES):
        voice = syllables(end - start, 150 + 100 * number)
        loop[round(start * 16000) : round(start * 16000) + len(voice)] = voice
    return repeated(loop)


def draw_faults(draw: random.Random, kind: str, seconds: float) -> list[Fault]:
    """Return faults one after the other, for as long as they begin within ``seconds``."""
    faults: list[Fault] = []
    start = draw.uniform(0.5, 6.0)
    while start < seconds:
        fault = draw.choice(FAULTS[kind])
        end = start + draw.uniform(*DURATIONS[fault])
        faults.append(Fault(fault, start, end))
        start = end + draw.choice([draw.uniform(0.1, 2.0), draw.uniform(5.0, 40.0)])
        seconds += end - faults[-1].start if fault == "sleep" else 0.0
    return faults


class SimulatedPipe:
    """A pipe that a recorder writes float samples into, as time passes.

    Args:
        sound: the clock, and what is heard.
    """

    PIECE_S = 0.1
    MOST_BYTES = 32768

    def __init__(self, sound: SimulatedSound) -> None:
        self._sound = sound
        self.end, self._start = os.pipe()
        self._waiting = b""
        self._written_until = 0.0

    def select(self, readers: list[int], _writers: object, _errors: object, timeout: float) -> tuple[list[int], ...]:
        """Let time pass until there is something to read; stands for ``select.select``."""
        until = self._sound.time + timeout
        while True:
            self._record()
            if self._waiting and not self._sound.fault("burst"):
                written = os.write(self._start, self._waiting[: self.MOST_BYTES])
                self._waiting = self._waiting[written:]
                return readers, [], []
            if self._sound.time >= until:
                return [], [], []
            self._sound.advance(min(until, self._sound.time + self.PIECE_S))

    def _record(self) -> None:
        """Take down what was spoken meanwhile; a reader that is slow finds all of it."""
        while self._written_until + self.PIECE_S <= self._sound.time:
            began = self._written_until
            self._written_until += self.PIECE_S
            if self._sound.fault("stall", "sleep", at=began):
                continue
            samples = self._sound.captured(began, self.PIECE_S).astype("<f4") / 32768
            if self._sound.fault("damage", at=began):
                samples[::7] = np.nan
            self._waiting += samples.tobytes()

    def close(self) -> None:
        """Close both ends."""
        os.close(self.end)
        os.close(self._start)


def run_simulated(seed: int, recognizers: list[Recognizer]) -> Outcome:
    """Listen on a simulated sound system with faults; see the module."""
    draw = random.Random(seed)
    kind = draw.choice(["microphone", "microphone", "pipe"])
    seconds = draw.uniform(40.0, 150.0)
    faults = draw_faults(draw, kind, seconds)
    until = max([seconds, *(fault.end for fault in faults)]) if draw.random() < 0.5 else seconds
    settings = Settings(
        hop=draw.choice([0.1, 0.25, 0.5, 2.0]), stall=draw.choice([1.0, 5.0]), retry=draw.choice([0.5, 4.0, 30.0]),
        digital_silence=draw.choice([1.0, 10.0]), buffer=draw.choice([1.0, 10.0]), silence=draw.choice([1.0, 5.0]),
        exit_on_loss=draw.random() < 0.1,
    )  # fmt: skip
    sound = SimulatedSound(
        talk(), tuple(faults), rate=draw.choice([16000, 48000]), drift=draw.uniform(-1e-4, 1e-4),
        wakeup=draw.choice([0.0, 0.05, 0.4]),
    )  # fmt: skip
    outcome = Outcome(seed, kind, [fault.kind for fault in faults])
    events: list[dict[str, Any]] = []

    def hear(event: Any) -> None:
        events.append(event.to_dict())
        if slow := sound.fault("slow"):
            sound.advance(min(slow.end, sound.time + draw.uniform(0.1, 3.0)))

    before = _open_things()
    with sound, contextlib.ExitStack() as pipes:
        if kind == "pipe":
            pipe = pipes.enter_context(contextlib.closing(SimulatedPipe(sound)))
            pipes.enter_context(patch.object(recordings_module, "select", SimpleNamespace(select=pipe.select)))
            source: Any = RawAudio(pipe.end, encoding="f32le", settings=settings)
        else:
            source = sound.microphone(settings)
        listener = Listener(draw.choice(recognizers), settings, source=source, on_event=hear)
        sound.at(until, listener.stop)
        outcome.wrong += _listen(listener, settings.exit_on_loss)
        listened_until = min(until, sound.time)
    outcome.wrong += examine(events)
    noticed_after = max(settings.stall, settings.buffer)
    outcome.wrong += compare(events, faults, noticed_after, settings.retry, listened_until)
    outcome.wrong += _counted(listener, events)
    if (after := _open_things()) > before:
        outcome.wrong.append(f"left behind: {after} threads and open files, {before} before")
    outcome.events = dict(Counter(event["kind"] for event in events))
    return outcome


def _listen(listener: Listener, may_be_lost: bool) -> list[str]:
    """Listen to the end, on a thread that can be seen to hang."""
    wrong: list[str] = []

    def listen() -> None:
        try:
            with listener:
                listener.wait()
        except DeviceError as error:
            if not may_be_lost:
                wrong.append(f"ended: {error}")
        except BaseException as error:
            wrong.append(f"crashed: {type(error).__name__}: {error}")

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    thread.join(HANG_S)
    return [*wrong, *(["hangs"] if thread.is_alive() else [])]


def _counted(listener: Listener, events: list[dict[str, Any]]) -> list[str]:
    health, kinds = listener.health(), Counter(event["kind"] for event in events)
    counts = {"gaps": (health.gaps, kinds["gap"]), "outages": (health.outages, kinds["source_lost"])}
    return [f"health counts {told} {name}, {said} were said" for name, (told, said) in counts.items() if told != said]


def _open_things() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208


# Real runs --------------------------------------------------------------------------------------------------------

BREAK_AND_MEND: dict[str, tuple[Callable[[Any], None], Callable[[Any], None]]] = {
    "unplugged": (lambda board: board.microphone.unplug(), lambda board: board.microphone.plug()),
    "server killed": (lambda board: board.microphone.kill(), lambda board: board.microphone.start()),
    "suspended": (lambda board: board.microphone.suspend(True), lambda board: board.microphone.suspend(False)),
    "server frozen": (lambda board: board.microphone.freeze(), lambda board: board.microphone.thaw()),
    "muted": (lambda board: board.microphone.mute(True), lambda board: board.microphone.mute(False)),
    "broker killed": (lambda board: board.broker.kill(), lambda board: board.broker.start()),
}


class Board:
    """A running ``ser-edge listen`` with its sound server and its broker.

    Args:
        folder: for its files.
        model: file.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder, self._model = folder, model
        self._things = contextlib.ExitStack()
        self.received: list[dict[str, Any]] = []

    def __enter__(self) -> Board:
        """Start all of it."""
        self.microphone = self._things.enter_context(VirtualMicrophone())
        self.broker = self._things.enter_context(MqttBroker())
        self._collect()
        self._said = self._things.enter_context((self._folder / "said").open("w"))
        self._complained = self._things.enter_context((self._folder / "complained").open("w"))
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "edge_runtime",
            "listen",
            self._model,
            "--json",
            "--hop",
            "0.25",
        ]
        command += ["--stall", "1", "--digital-silence", "1", "--retry", "0.5"]
        command += ["--mqtt", f"127.0.0.1:{self.broker.port}", "--mqtt-topic", "x", "--mqtt-spool", self._folder]
        self.process = subprocess.Popen(
            command, env=self.microphone.environment, stdout=self._said, stderr=self._complained
        )
        self._things.callback(self.process.kill)
        self.speak()
        return self

    def __exit__(self, *_: object) -> None:
        """End all of it."""
        self._things.close()

    def _collect(self) -> None:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        def subscribe(*_: object) -> None:
            client.subscribe("x/event", 1)

        client = Client(CallbackAPIVersion.VERSION2, "collector", clean_session=False)
        client.on_connect = subscribe
        client.on_message = lambda _client, _data, message: self.received.append(json.loads(message.payload))
        client.reconnect_delay_set(1, 1)
        client.connect("127.0.0.1", self.broker.port)
        client.loop_start()
        self._things.callback(client.loop_stop)
        self._things.callback(client.disconnect)

    def speak(self) -> None:
        """Let somebody speak, from now on."""
        clip = self._folder / "speech.wav"
        if not clip.exists():
            write_wav(clip, np.concatenate([talk()(0, 320000)] * 6))
        player = subprocess.Popen(["paplay", clip], env=self.microphone.environment, stderr=subprocess.DEVNULL)
        self._things.callback(player.wait)
        self._things.callback(player.kill)

    def said(self) -> list[dict[str, Any]]:
        """Return the events that it printed."""
        lines = (self._folder / "said").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def complaints(self) -> str:
        """Return what it printed on standard error."""
        return (self._folder / "complained").read_text(encoding="utf-8")

    def threads_and_files(self) -> int:
        """Return how many threads and open files the process has."""
        process = Path(f"/proc/{self.process.pid}")
        return len(list((process / "task").iterdir())) + len(list((process / "fd").iterdir()))

    def await_event(self, after: int) -> bool:
        """Wait until it has printed more events than ``after``; return whether it has."""
        deadline = time.monotonic() + HANG_S / 2
        while len(self.said()) <= after and time.monotonic() < deadline:
            time.sleep(0.1)
        return len(self.said()) > after

    def terminate(self) -> float:
        """End the process by SIGTERM and return the seconds it took."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(HANG_S / 2)
        return time.monotonic() - began

    def undelivered(self) -> list[dict[str, Any]]:
        """Return the events that wait in the spool, once the process has ended."""
        with contextlib.closing(Spool(self._folder, 1 << 24)) as spool:
            return [{**json.loads(record), "seq": number} for number, record in iter(spool.read, None)]


def run_real(seed: int, model: Path) -> Outcome:
    """Listen with ``ser-edge`` on a real sound server and a real broker; see the module."""
    draw = random.Random(seed)
    outcome = Outcome(seed, "real", draw.choices(list(BREAK_AND_MEND), k=3))
    with tempfile.TemporaryDirectory() as name, Board(Path(name), model) as board:
        if not board.await_event(0):
            outcome.wrong.append("hears nothing")
        before = board.threads_and_files()
        for number, fault in enumerate(outcome.faults):
            break_it, mend_it = BREAK_AND_MEND[fault]
            time.sleep(draw.uniform(0.0, 2.0))
            break_it(board)
            time.sleep(draw.uniform(0.2, 3.0))
            if number == 2 and draw.random() < 0.5:  # the end comes amid the fault
                break
            mend_it(board)
            board.speak()
            if not board.await_event(len(board.said())):
                outcome.wrong.append(f"hears nothing again after {fault}")
        else:
            mend_it = _nothing
            if (after := board.threads_and_files()) > before + 4:  # a broker's and a device's may have come since
                outcome.wrong.append(f"threads and open files grew from {before} to {after}")
        if board.process.poll() is not None:
            outcome.wrong.append(f"ended by itself with {board.process.returncode}")
        outcome.ending = board.terminate()
        mend_it(board)
        outcome.wrong += _examine_real(board)
        outcome.events = dict(Counter(event["kind"] for event in board.said()))
    return outcome


def _nothing(_board: Board) -> None:
    """Mend nothing."""


def _examine_real(board: Board) -> list[str]:
    events, complaints = board.said(), board.complaints()
    wrong = examine(events)
    if board.process.returncode != 0 or "Traceback" in complaints:
        wrong.append(f"ended with {board.process.returncode}: {complaints.strip().splitlines()[-1:]}")
    time.sleep(1.5)  # what the broker holds for the collector
    numbered = {event["seq"]: event for event in [*board.received, *board.undelivered()]}
    if sorted(numbered) != list(range(1, len(numbered) + 1)):
        wrong.append(f"numbers missing at the broker and in the spool: {sorted(numbered)}")
    arrived = [(numbered[number]["kind"], numbered[number]["end"]) for number in sorted(numbered)]
    if arrived != [(event["kind"], event["end"]) for event in events]:
        wrong.append(f"{len(events)} events were printed, {len(arrived)} arrived or wait in the spool")
    return wrong


# The campaign -----------------------------------------------------------------------------------------------------


def make_models(folder: Path) -> list[Path]:
    """Write a window's and a stream's model file."""
    window, stream = folder / "window.onnx", folder / "stream.onnx"
    window.write_bytes(tiny_file())
    stream.write_bytes(seal(tiny_stream_model().SerializeToString()))
    return [window, stream]


def campaign(seed: int, runs: int, real: int) -> Iterator[Outcome]:
    """Give the outcome of each run; the last ``real`` of them are on a real sound server."""
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        recognizers = [Recognizer(model) for model in models]
        for number in range(seed, seed + runs):
            began = time.monotonic()
            is_real = number >= seed + runs - real
            outcome = run_real(number, models[number % 2]) if is_real else run_simulated(number, recognizers)
            outcome.seconds = round(time.monotonic() - began, 2)
            yield outcome


def resident() -> float:
    """Return this process's resident memory, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@dataclass(frozen=True)
class Memory:
    """What this process holds.

    Attributes:
        resident: MB.
        objects: blocks of memory that Python objects have, once the garbage is collected.
    """

    resident: float
    objects: int

    @classmethod
    def now(cls) -> Memory:
        """Return what it holds now."""
        gc.collect()
        return cls(resident(), sys.getallocatedblocks())


def left_behind(middle: Memory, end: Memory, runs: int) -> list[str]:
    """Return what is wrong with the memory after so many more runs."""
    grown = end.objects - middle.objects
    return [f"{grown} objects left behind by {runs} runs"] if grown > FILLS_ONCE + MOST_LEFT_BEHIND * runs else []


def print_table(outcomes: list[Outcome]) -> None:
    table = Table("kind", "runs", "faults", "events", "outages", "gaps", "slowest end s", "wrong")
    for kind in ("microphone", "pipe", "real"):
        some = [outcome for outcome in outcomes if outcome.kind == kind]
        ends = [outcome.ending for outcome in some if outcome.ending is not None]
        counts = Counter[str]()
        for outcome in some:
            counts.update(outcome.events)
        table.add_row(
            kind, str(len(some)), str(sum(len(outcome.faults) for outcome in some)), str(counts.total()),
            str(counts["source_lost"]), str(counts["gap"]), f"{max(ends):.2f}" if ends else "",
            str(sum(bool(outcome.wrong) for outcome in some)),
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    """Run the campaign and print what came of it."""
    parser = argparse.ArgumentParser(
        description="Inject faults into listening, at random.",
        epilog="example:\n  python tools/fault_campaign.py --runs 20 --real 2 --json > outcomes.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--real", type=int, help="of these, on a real sound server and broker (default a tenth)")
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the others count up from it")
    parser.add_argument("--json", action="store_true", help="print JSON, one line a run")
    arguments = parser.parse_args()
    can_be_real = shutil.which("pulseaudio") and MOSQUITTO
    real = arguments.runs // 10 if arguments.real is None else arguments.real
    if real and not can_be_real:
        print("fault_campaign: no runs on a real board: needs pulseaudio, pulseaudio-utils, mosquitto", file=sys.stderr)
        real = 0
    outcomes: list[Outcome] = []
    middle = end = Memory.now()
    runs, simulated = campaign(arguments.seed, arguments.runs, real), arguments.runs - real
    half = (simulated + 1) // 2
    for outcome in track(runs, "runs", arguments.runs, console=Console(stderr=True)):
        outcomes.append(outcome)
        if arguments.json:
            print(json.dumps(asdict(outcome)), flush=True)
        for line in outcome.wrong:
            print(f"fault_campaign: seed {outcome.seed} ({outcome.kind}): {line}", file=sys.stderr)
        if len(outcomes) == half:
            middle = Memory.now()
        if len(outcomes) == simulated:  # what is real runs in another process
            end = Memory.now()
    if not arguments.json:
        print_table(outcomes)
        print(f"memory: {middle.resident:.1f} MB after half of the simulated runs, {end.resident:.1f} MB after all")
        print(f"objects: {middle.objects} after half of the simulated runs, {end.objects} after all")
    leaks = left_behind(middle, end, simulated - half)
    for line in leaks:
        print(f"fault_campaign: {line}", file=sys.stderr)
    sys.exit(bool(leaks) or any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    main()
