"""Every way to lose a microphone, done to a real sound server, and its return: ``ser-edge listen`` lives on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from quick_run import write_wav
from virtual_microphone import VirtualMicrophone

pytestmark = pytest.mark.skipif(not shutil.which("pulseaudio"), reason="needs pulseaudio and pulseaudio-utils")

SER_EDGE = str(Path(sys.executable).with_name("ser-edge"))

PATIENCE_S = 20.0
"""After which a test fails instead of hanging; each wait takes under 2 s on an idle machine."""


@pytest.fixture(scope="module")
def talk(tmp_path_factory, bursts) -> Path:
    """Speech for longer than any test takes."""
    return write_wav(tmp_path_factory.mktemp("talk") / "talk.wav", bursts(60.0))


class Talker:
    """Somebody who talks into the microphone, and goes on after it was away."""

    def __init__(self, microphone: VirtualMicrophone, talk: Path) -> None:
        self._command = ["paplay", str(talk)]
        self._environment = microphone.environment
        self._player: subprocess.Popen | None = None

    def talk(self) -> None:
        self.stop()
        self._player = subprocess.Popen(self._command, env=self._environment, stderr=subprocess.DEVNULL)

    def stop(self) -> None:
        if self._player is not None:
            self._player.kill()
            self._player.wait()


class Listening:
    """A running ``ser-edge listen --json`` with little patience."""

    def __init__(self, model: Path, microphone: VirtualMicrophone, *options: str) -> None:
        impatient = ("--stall", "1", "--digital-silence", "1", "--retry", "0.5", "--hop", "0.25")
        self.process = subprocess.Popen(
            [SER_EDGE, "listen", str(model), "--json", *impatient, *options], env=microphone.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.events: list[dict] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.status = self.process.stderr.readline()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._more:
                self.events.append(json.loads(line))
                self._more.notify()

    def wait_for(self, kind: str, after: int = 0) -> int:
        """Wait for an event of a kind among those from number ``after`` on, and return its number."""

        def found() -> int | None:
            return next((i for i, e in enumerate(self.events) if i >= after and e["kind"] == kind), None)

        with self._more:
            assert self._more.wait_for(lambda: found() is not None, PATIENCE_S), f"no {kind}: {self.events}"
            return found()

    def end(self) -> str:
        assert self.process.poll() is None, "it ended by itself"
        self.process.send_signal(signal.SIGTERM)
        code, stderr = self.wait()
        assert code == 0
        return stderr

    def wait(self) -> tuple[int, str]:
        """Wait for the end and return the exit code and what was said on standard error."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code, self.process.stderr.read()


@pytest.fixture
def microphone():
    with VirtualMicrophone() as microphone:
        yield microphone


@pytest.fixture
def talker(microphone, talk):
    talker = Talker(microphone, talk)
    yield talker
    microphone.thaw()
    talker.stop()


FAULTS = {
    "unplugged": (lambda m: m.unplug(), lambda m: m.plug(), "device_gone"),
    "server_killed": (lambda m: m.kill(), lambda m: m.start(), "device_gone"),
    "suspended": (lambda m: m.suspend(True), lambda m: m.suspend(False), "stalled"),
    "server_frozen": (lambda m: m.freeze(), lambda m: m.thaw(), "stalled"),
    "muted": (lambda m: m.mute(True), lambda m: m.mute(False), "digital_silence"),
}
PLAYER_DIES = ("unplugged", "server_killed")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_microphone_that_is_lost_comes_back(model, microphone, talker, fault):
    break_it, mend_it, reason = FAULTS[fault]
    listening = Listening(model, microphone)
    talker.talk()
    began = listening.wait_for("begin")
    break_it(microphone)
    lost = listening.wait_for("source_lost", began)
    time.sleep(1.0)  # an outage that outlasts some attempts to reopen
    assert len(listening.events) == lost + 1, "an event while nothing was heard"
    began_to_mend = time.monotonic()
    mend_it(microphone)
    if fault in PLAYER_DIES:
        talker.talk()
    restored = listening.wait_for("source_restored", lost)
    again = listening.wait_for("begin", restored)
    mending = time.monotonic() - began_to_mend
    stderr = listening.end()

    events = listening.events
    assert events[lost]["reason"] == events[restored]["reason"] == reason
    assert [e["kind"] for e in events].count("source_lost") == 1
    assert restored == lost + 1
    # The times go on as the clock does: the outage, which lasted a second and what mending took, shows in them.
    assert events[restored]["start"] == events[lost]["end"]
    assert events[restored]["end"] - events[restored]["start"] == pytest.approx(
        1.0 + mending / 2, abs=0.3 + mending / 2
    )
    # State is reset: what is heard afterwards rests on audio from afterwards alone, and on enough of it.
    assert events[again]["start"] >= events[restored]["end"]
    assert events[again]["end"] - events[again]["start"] == pytest.approx(0.8, abs=0.01)
    told = stderr.splitlines()
    assert len(told) == 2
    assert told[0] == f"ser-edge: {events[lost]['detail']}; waiting for it"
    assert told[1] == "ser-edge: hears default again"


def test_a_microphone_that_is_absent_at_the_start_is_waited_for(model, microphone, talker):
    microphone.kill()
    listening = Listening(model, microphone)
    lost = listening.wait_for("source_lost")
    time.sleep(1.0)
    microphone.start()
    talker.talk()
    begin = listening.wait_for("begin", listening.wait_for("source_restored", lost))
    stderr = listening.end()
    assert (lost, listening.events[lost]["reason"], listening.events[lost]["start"]) == (0, "absent", 0.0)
    assert listening.events[begin]["start"] >= 1.0
    assert "no microphone found" in stderr


def test_a_name_that_is_not_there_yet_is_waited_for(model, microphone):
    listening = Listening(model, microphone, "--device", "Yeti")
    lost = listening.wait_for("source_lost")
    assert listening.events[lost]["reason"] == "absent"
    assert "no microphone 'Yeti'; valid:" in listening.end()
    assert len(listening.events) == 1


def test_a_short_pause_of_the_device_is_a_gap(model, microphone, talker):
    listening = Listening(model, microphone, "--stall", "10")
    talker.talk()
    began = listening.wait_for("begin")
    microphone.suspend(True)
    time.sleep(1.5)
    microphone.suspend(False)
    gap = listening.wait_for("gap", began)
    again = listening.wait_for("begin", gap)
    listening.end()
    events = listening.events
    assert events[gap]["reason"] == "dropout"
    assert events[gap]["end"] - events[gap]["start"] == pytest.approx(1.5, abs=0.5)
    assert events[gap - 1]["kind"] == "end"
    assert events[again]["start"] >= events[gap]["end"]


def test_a_frozen_server_does_not_hold_up_the_end(model, microphone, talker):
    listening = Listening(model, microphone)
    talker.talk()
    listening.wait_for("begin")
    microphone.freeze()
    listening.wait_for("source_lost")
    listening.end()
    assert listening.events[-1]["kind"] == "source_lost"


def test_a_server_that_is_frozen_at_the_start_holds_up_nothing(model, microphone, talker):
    microphone.freeze()
    listening = Listening(model, microphone)
    lost = listening.wait_for("source_lost")
    assert listening.events[lost]["reason"] == "stalled"
    microphone.thaw()
    talker.talk()
    begin = listening.wait_for("begin", listening.wait_for("source_restored", lost))
    assert listening.events[begin]["start"] >= 1.0
    listening.end()


def test_the_end_comes_while_a_server_is_frozen_since_the_start(model, microphone, talker):
    microphone.freeze()
    listening = Listening(model, microphone)
    listening.wait_for("source_lost")
    listening.end()


@pytest.mark.parametrize(("fault", "message"), [("server_killed", "is gone"), ("suspended", "gives nothing for 1 s")])
def test_a_loss_is_the_end_where_that_was_asked_for(model, microphone, talker, fault, message):
    listening = Listening(model, microphone, "--exit-on-loss")
    talker.talk()
    listening.wait_for("begin")
    FAULTS[fault][0](microphone)
    code, stderr = listening.wait()
    assert code == 1
    assert [event["kind"] for event in listening.events[-2:]] == ["end", "source_lost"]
    assert stderr.startswith("ser-edge: microphone 'default'")
    assert message in stderr
    assert stderr.count("\n") == 1


def test_a_recorder_pipes_its_microphone_to_the_listener(model, microphone, talker):
    recorder = subprocess.Popen(
        ["parec", "--raw", "--rate=16000", "--channels=1", "--format=s16le", "--latency-msec=50"],
        env=microphone.environment, stdout=subprocess.PIPE,
    )  # fmt: skip
    listener = subprocess.Popen(
        [SER_EDGE, "listen", str(model), "-", "--json"], stdin=recorder.stdout, stdout=subprocess.PIPE, text=True,
        env=os.environ,
    )  # fmt: skip
    recorder.stdout.close()
    talker.talk()
    first = json.loads(listener.stdout.readline())
    recorder.kill()
    recorder.wait()
    rest, _ = listener.communicate(timeout=PATIENCE_S)
    assert first["kind"] == "begin"
    assert json.loads(rest.splitlines()[-1])["kind"] == "end"
    assert listener.returncode == 0
