"""``ser-edge listen`` on a real sound server: what is played into its microphone is what a file would give."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from quick_run import write_wav
from tiny_artifact import tiny_artifact, tiny_file
from virtual_microphone import VirtualMicrophone

pytestmark = pytest.mark.skipif(not shutil.which("pulseaudio"), reason="needs pulseaudio and pulseaudio-utils")

SER_EDGE = str(Path(sys.executable).with_name("ser-edge"))


@pytest.fixture
def microphone():
    with VirtualMicrophone() as microphone:
        yield microphone


@pytest.fixture(scope="module")
def clip(tmp_path_factory, bursts) -> Path:
    """Two utterances and a pause between them."""
    samples = np.concatenate([bursts(2.3), bursts(1.2, loudness=0, seed=2), bursts(1.4, loudness=2000, seed=3)])
    return write_wav(tmp_path_factory.mktemp("clip") / "clip.wav", samples)


class Listening:
    """A running ``ser-edge listen --json``."""

    def __init__(self, model: Path, microphone: VirtualMicrophone, *options: str) -> None:
        self.process = subprocess.Popen(
            [SER_EDGE, "listen", str(model), "--json", *options], env=microphone.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.status = self.process.stderr.readline()

    def events_until(self, kind: str, count: int = 1) -> list[dict]:
        events = []
        while [event["kind"] for event in events].count(kind) < count:
            line = self.process.stdout.readline()
            assert line, f"ended after {events}: {self.process.stderr.read()}"
            events.append(json.loads(line))
        return events

    def end(self, with_signal: int = signal.SIGTERM) -> tuple[int, list[dict], str]:
        self.process.send_signal(with_signal)
        return self.wait()

    def wait(self) -> tuple[int, list[dict], str]:
        stdout, stderr = self.process.communicate(timeout=30)
        return self.process.returncode, [json.loads(line) for line in stdout.splitlines()], stderr


def events_of_file(model: Path, clip: Path) -> list[dict]:
    done = subprocess.run([SER_EDGE, "file", model, clip, "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["events"]


def test_a_clip_played_into_the_microphone_gives_the_events_of_the_file(model, clip, microphone):
    expected = events_of_file(model, clip)
    assert [event["kind"] for event in expected].count("end") == 2
    listening = Listening(model, microphone)
    assert listening.status.startswith("ser-edge: listening to default")
    microphone.play(clip)
    events = listening.events_until("end", 2)
    code, rest, stderr = listening.end()
    assert (code, rest, stderr) == (0, [], "")

    assert [(event["kind"], event["label"]) for event in events] == [(e["kind"], e["label"]) for e in expected]
    shift = events[0]["start"] - expected[0]["start"]
    for event, same in zip(events, expected, strict=True):
        assert event["start"] - shift == pytest.approx(same["start"], abs=1e-6)
        assert event["end"] - shift == pytest.approx(same["end"], abs=1e-6)
        assert list(event["probabilities"].values()) == pytest.approx(list(same["probabilities"].values()), abs=1e-3)
        assert "wall" in event


@pytest.mark.parametrize("interruption", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_with_a_last_event(model, clip, microphone, interruption):
    listening = Listening(model, microphone)
    player = subprocess.Popen(["paplay", str(clip)], env=microphone.environment)
    listening.events_until("update")
    code, rest, stderr = listening.end(interruption)
    player.wait()
    assert code == 0
    assert rest[-1]["kind"] == "end"
    assert stderr == ""


def test_listening_to_nothing_says_no_speech(model, microphone):
    code, events, _ = Listening(model, microphone).end()
    assert code == 0
    assert [event["kind"] for event in events] == ["no_speech"]


def test_devices_are_listed(microphone):
    shown = subprocess.run(
        [SER_EDGE, "devices", "--json"],
        env=microphone.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    devices = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [device["name"] for device in devices if device["default"]] == ["default"]


def test_a_microphone_that_does_not_exist_lists_those_that_do(model, microphone):
    done = subprocess.run(
        [SER_EDGE, "listen", model, "--device", "Yeti", "--exit-on-loss"], env=microphone.environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no microphone 'Yeti'; valid:" in done.stderr
    assert "'default'" in done.stderr


@pytest.mark.parametrize("command", ["devices", "listen"])
def test_without_a_sound_server_there_is_one_line(model, tmp_path, command):
    arguments = [SER_EDGE, command, *([str(model), "--exit-on-loss"] if command == "listen" else [])]
    environment = {**os.environ, "PULSE_SERVER": f"unix:{tmp_path}/none"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no microphone found" in done.stderr


@pytest.fixture
def trained(tmp_path) -> Path:
    """A model that was trained to be calibrated."""
    artifact = tiny_artifact()
    path = tmp_path / "personal.onnx"
    path.write_bytes(
        tiny_file(artifact=replace(artifact, normalization=replace(artifact.normalization, personal=True)))
    )
    return path


def test_a_microphone_is_calibrated_to_what_its_recording_would_give(trained, tmp_path, bursts, microphone):
    parts = [bursts(3.5, 6000, 1), bursts(1.0, 0, 2), bursts(3.5, 3000, 3), bursts(1.0, 0, 4)]
    talk = write_wav(tmp_path / "talk.wav", np.concatenate(parts))
    command, to_file = [SER_EDGE, "calibrate", str(trained)], ["--json", "-o", str(tmp_path / "calibration.json")]
    recorded = json.loads(subprocess.run([*command, talk, *to_file], capture_output=True, check=True).stdout)
    process = subprocess.Popen(
        [*command, *to_file, "--seconds", "7"], env=microphone.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "talk or read aloud, calmly" in process.stderr.readline()
    microphone.play(talk)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "")
    heard = json.loads(stdout)
    np.testing.assert_allclose(heard["mean"], recorded["mean"], atol=0.05)
    np.testing.assert_allclose(heard["std"], recorded["std"], atol=0.05)
    assert heard["seconds"] == recorded["seconds"]  # nothing said after the invitation is missing


def test_nobody_is_asked_to_talk_to_a_microphone_that_cannot_be_opened(trained, tmp_path):
    environment = {**os.environ, "PULSE_SERVER": f"unix:{tmp_path}/none"}
    done = subprocess.run(
        [SER_EDGE, "calibrate", str(trained)], env=environment, capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no microphone found" in done.stderr


def test_a_microphone_that_hears_nobody_is_given_up(trained, tmp_path, microphone):
    done = subprocess.run(
        [SER_EDGE, "calibrate", str(trained), "--patience", "5", "-o", str(tmp_path / "a.json")],
        env=microphone.environment, capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 1 and "0 s of speech in 5 s, not 30; speak closer to it" in done.stderr
    assert not (tmp_path / "a.json").exists()
