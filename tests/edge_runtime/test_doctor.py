from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import doctor
from edge_runtime.board import Board
from edge_runtime.doctor import examine, judge_sound
from edge_runtime.errors import MissingDependencyError
from edge_runtime.microphone import InputDevice
from edge_runtime.sources import Block

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from virtual_microphone import VirtualMicrophone

SER_EDGE = str(Path(sys.executable).with_name("ser-edge"))
COOL = Board("Raspberry Pi 5", 4, 50.0, (), (), "ondemand", 1.0)


def ser_edge(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SER_EDGE, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60, **options
    )


@pytest.mark.parametrize(
    ("level", "verdict", "found"),
    [(0.0, "broken", "digital silence"), (1e-5, "warning", "faint, at -100"), (0.01, "ok", "-40 dBFS")],
)
def test_sound(level, verdict, found):
    finding = judge_sound((level * np.random.default_rng(0).normal(size=48000)).astype(np.float32))
    assert finding.verdict == verdict
    assert found in finding.found
    assert bool(finding.remedy) == (verdict != "ok")


def test_clipped_sound():
    loud = np.clip(np.random.default_rng(0).normal(size=48000), -1, 1).astype(np.float32)
    assert judge_sound(loud).found.startswith("clipped")
    assert judge_sound(0.5 * loud).verdict == "ok"


@pytest.mark.parametrize(
    ("state", "verdict", "remedy"),
    [
        ({}, "ok", ""),
        ({"throttled": ("under-voltage", "throttled")}, "warning", "use a stronger power supply"),
        ({"throttled": ("soft temperature limit",)}, "warning", "cool the board"),
        ({"temperature": 85.0}, "warning", "cool the board"),
        ({"throttled_before": ("throttled",)}, "warning", "check power supply and cooling"),
        ({"governor": "powersave"}, "warning", "choose governor ondemand"),
        ({"model": None, "temperature": None, "throttled": None, "throttled_before": None}, "ok", ""),
    ],
)
def test_board(state, verdict, remedy):
    *_, finding = examine(microphone=False, board=lambda: replace(COOL, **state))
    assert (finding.check, finding.verdict, finding.remedy) == ("board", verdict, remedy)


def test_no_inference_library(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)
    first, *_ = examine(microphone=False)
    assert str(first) == "broken   inference    no inference library: run: pip install 'ser-edge[onnx]'"


def test_a_good_model_without_a_microphone(model):
    done = ser_edge("doctor", model, "--no-microphone", "--json")
    findings = [json.loads(line) for line in done.stdout.splitlines()]
    assert [finding["check"] for finding in findings] == ["inference", "model", "board"]
    assert findings[1]["verdict"] == "ok"
    assert done.returncode == 0


def test_a_broken_model_does_not_end_the_examination(tmp_path, model):
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(model.read_bytes()[:-100])
    done = ser_edge("doctor", damaged, "--no-microphone")
    assert done.returncode == 1
    assert [line.split()[:2] for line in done.stdout.splitlines()][1] == ["broken", "model"]
    assert len(done.stdout.splitlines()) == 3


def test_the_library_that_a_model_needs_is_missing(monkeypatch, model):
    def bench(*_):
        raise MissingDependencyError("onnxruntime is not installed; run: pip install 'ser-edge[onnx]'")

    monkeypatch.setattr(doctor, "bench", bench)
    _, finding, _ = examine(model, microphone=False, board=lambda: COOL)
    assert str(finding) == "broken   model        onnxruntime is not installed: run: pip install 'ser-edge[onnx]'"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("raise OSError('PortAudio library not found')", "PortAudio is not installed: run: apt install libportaudio2"),
        ("raise ImportError", "sounddevice is not installed: run: pip install 'ser-edge[mic]'"),
        (
            "class default: device = [-1, -1]\ndef query_devices(): return []",
            "no microphone found: plug one in or start the sound server, then run: ser-edge devices",
        ),
    ],
)  # fmt: skip
def test_no_way_to_a_microphone(tmp_path, module, line):
    (tmp_path / "sounddevice.py").write_text(f"class PortAudioError(Exception): pass\n{module}\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = ser_edge("doctor", env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 1
    assert f"broken   microphone   {line}\n" in done.stdout


class FakeMicrophone:
    """Gives a room's noise, of which so many samples come in a second of the clock."""

    rate = 16000.0
    clock = 100.0

    def __init__(self, *_) -> None:
        self.random = np.random.default_rng(0)

    def open(self) -> None:
        pass

    close = open

    def blocks(self):
        for number in range(1000):
            type(self).clock += 512 / self.rate
            if number == 50:  # one that came late, with the next one right behind it
                type(self).clock += 0.1
            yield Block(512 * number, self.random.normal(0, 0.01, 512).astype(np.float32))
            if number == 50:
                type(self).clock -= 0.1


@pytest.mark.parametrize(
    ("device_rate", "rate", "microphone", "verdict"),
    [(48000, 16000, "ok", "ok"), (8000, 16000, "warning", "ok"), (48000, 14700, "ok", "warning"),
     (48000, 17415, "ok", "warning"), (16000, 16100, "ok", "ok")],
)  # fmt: skip
def test_a_wrong_rate(monkeypatch, device_rate, rate, microphone, verdict):
    device = InputDevice(3, "USB Mic", 1, device_rate, True)
    monkeypatch.setattr(doctor, "input_devices", lambda: [device])
    monkeypatch.setattr(doctor, "Microphone", FakeMicrophone)
    monkeypatch.setattr(doctor, "now", lambda: FakeMicrophone.clock)
    monkeypatch.setattr(FakeMicrophone, "rate", rate)
    findings = {finding.check: finding for finding in examine(board=lambda: COOL)}
    assert findings["microphone"].verdict == microphone
    assert findings["rate"].verdict == verdict
    assert int(findings["rate"].found.split()[0]) == pytest.approx(rate, rel=2e-3)
    assert findings["sound"].verdict == "ok"
    assert all(finding.remedy for finding in findings.values() if finding.verdict != "ok")


def test_no_sound_system(tmp_path):
    nowhere = os.environ | {"PULSE_SERVER": f"unix:{tmp_path}/none"}
    done = ser_edge("doctor", env=nowhere)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if "microphone" in line.split()]
    assert line.startswith("broken")


@pytest.mark.skipif(not shutil.which("pulseaudio"), reason="needs pulseaudio and pulseaudio-utils")
class TestMicrophone:
    def test_a_muted_one_and_a_live_one(self, tmp_path, write_wav, speech):
        talk = write_wav(tmp_path / "talk.wav", speech(20.0))
        with VirtualMicrophone() as microphone:
            muted = ser_edge("doctor", env=microphone.environment)
            player = subprocess.Popen(["paplay", str(talk)], env=microphone.environment)
            try:
                live = ser_edge("doctor", env=microphone.environment)
                wrong = ser_edge("doctor", "--device", "USB", env=microphone.environment)
            finally:
                player.kill()
                player.wait()
        assert muted.returncode == 1
        assert "nothing but digital silence: unmute it" in muted.stdout
        assert live.returncode == 0
        assert "dBFS" in live.stdout
        assert wrong.returncode == 1
        assert "no microphone 'USB': valid: " in wrong.stdout
