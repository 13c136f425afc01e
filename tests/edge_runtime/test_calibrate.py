"""Calibration: what is measured, what it changes, and through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_artifact import tiny_artifact, tiny_file
from tiny_stream import tiny_stream_artifact, tiny_stream_model

from edge_runtime.calibrate import Calibrator
from edge_runtime.calibration import Calibration
from edge_runtime.errors import AudioError, UsageError
from edge_runtime.frontend import log_mel
from edge_runtime.model_file import seal
from edge_runtime.recognizer import Recognizer
from edge_runtime.session import Session
from edge_runtime.settings import Settings

SER_EDGE = str(Path(sys.executable).with_name("ser-edge"))
RATE = 16000


def personal(artifact):
    return replace(artifact, normalization=replace(artifact.normalization, personal=True))


@pytest.fixture(scope="module", params=["window", "stream"])
def trained(request, tmp_path_factory) -> Path:
    """A model that was trained to be calibrated, in both forms."""
    path = tmp_path_factory.mktemp("personal") / f"{request.param}.onnx"
    if request.param == "window":
        path.write_bytes(tiny_file(artifact=personal(tiny_artifact())))
    else:
        path.write_bytes(seal(tiny_stream_model(personal(tiny_stream_artifact())).SerializeToString()))
    return path


@pytest.fixture
def talk(speech, room) -> np.ndarray:
    """Three stretches of speech with pauses between them: some 12 s of speech."""
    pause = room(2.0, -80)
    parts = [pause, speech(4.0, 1), pause, speech(5.0, 2), pause, speech(3.0, 3), pause]
    return np.concatenate(parts).clip(-1, 1)


def calibrated(trained: Path, samples: np.ndarray, piece: int = 4000) -> Calibration:
    calibrator = Calibrator(Recognizer(trained))
    for first in range(0, len(samples), piece):
        calibrator.push(samples[first : first + piece])
    calibrator.end()
    return calibrator.calibration("test")


def test_what_is_measured_is_the_speech_that_a_session_answers_for(trained, talk):
    session = Session(Recognizer(trained), Settings(mode="utterance"))
    ends = [event for event in session.push(talk) + session.finish() if event.kind == "end"]
    assert len(ends) == 3
    segments = [talk[round(event.start * RATE) : round(event.end * RATE)] for event in ends]
    frames = np.concatenate([log_mel(segment).astype(np.float64) for segment in segments])
    found = calibrated(trained, talk)
    np.testing.assert_allclose(found.mean, frames.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.std, frames.std(axis=0).clip(1.0), atol=1e-6)
    assert found.seconds == pytest.approx(sum(map(len, segments)) / RATE, abs=0.01)


def test_pieces_of_any_size_give_the_same(trained, talk):
    whole = calibrated(trained, talk, len(talk))
    for piece in (700, 16000):
        assert replace(calibrated(trained, talk, piece), made=whole.made) == whole


def test_a_gap_in_the_audio_neither_counts_nor_shifts_what_follows(trained, talk, speech):
    """Lost samples move all positions after them; speech on either side is measured as it is."""
    calibrator = Calibrator(Recognizer(trained))
    calibrator.push(talk)
    calibrator.gap(123_456)
    calibrator.push(talk)
    calibrator.end()
    found, once = calibrator.calibration("test"), calibrated(trained, talk)
    np.testing.assert_allclose([found.mean, found.std], [once.mean, once.std], atol=1e-6)
    assert found.seconds == pytest.approx(2 * once.seconds, abs=0.02)


def test_calibration_makes_up_for_a_louder_microphone(trained, talk, speech):
    """A gain adds the same to every band of every frame, in dB, and so to the mean."""
    recognizer, clip = Recognizer(trained), speech(2.0, 5)
    quiet, loud = (recognizer.calibrated(calibrated(trained, gain * talk)) for gain in (0.5, 2.0))
    np.testing.assert_allclose(loud.logits(2.0 * clip), quiet.logits(0.5 * clip), atol=0.05)
    assert np.abs(recognizer.logits(2.0 * clip) - recognizer.logits(0.5 * clip)).max() > 0.2


def test_a_session_answers_by_the_calibration_in_its_settings_and_changes_it_while_it_runs(trained, talk, tmp_path):
    recognizer, file = Recognizer(trained), tmp_path / "calibration.json"
    measured = calibrated(trained, 0.3 * talk)
    measured.save(file)

    def events(session: Session):
        return session.push(talk) + session.finish()

    expected = events(Session(recognizer.calibrated(measured)))
    session = Session(recognizer, Settings(calibration=file))
    assert events(session) == expected
    plain = events(Session(recognizer))
    assert plain != expected
    session.update(Settings())
    assert events(session) == plain
    session.update(Settings(calibration=str(file)))
    assert events(session) == expected
    # The file changed, its name did not.
    calibrated(trained, talk).save(file)
    session.update(Settings(calibration=str(file)))
    assert events(session) == events(Session(recognizer, Settings(calibration=file))) != expected


def test_a_model_that_was_not_trained_for_it_takes_no_calibration(model, trained, talk, tmp_path):
    calibrated(trained, talk).save(tmp_path / "calibration.json")
    for refused in (
        lambda: Session(Recognizer(model), Settings(calibration=tmp_path / "calibration.json")),
        lambda: Calibrator(Recognizer(model)),
    ):
        with pytest.raises(UsageError, match=r"tiny\.onnx: was not trained to be calibrated and would answer worse"):
            refused()


def test_too_little_speech_is_no_calibration(trained, speech):
    with pytest.raises(AudioError, match=r"test: [0-9.]+ s of speech are too little .* needed: 5 s, better 30 s"):
        calibrated(trained, speech(3.0))


def broken(content: dict, **changes) -> str:
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: "",
        lambda content: "[]",
        lambda content: json.dumps(content)[:-40],
        lambda content: broken(content, format=2),
        lambda content: broken(content, mean=content["mean"][:63]),
        lambda content: broken(content, std=[float("nan")] * 64),
        lambda content: broken(content, std=[0.0] * 64),
        lambda content: broken(content, seconds="long"),
        lambda content: broken(content, front_end={"mel_bands": 64, "colour": 1}),
        lambda content: broken(content, surplus=1),
        lambda content: "[" * 100_000,
    ],
)
def test_a_file_that_is_no_calibration_is_one_line(trained, talk, tmp_path, spoil):
    file = tmp_path / "calibration.json"
    calibrated(trained, talk).save(file)
    file.write_text(spoil(json.loads(file.read_text())))
    with pytest.raises(UsageError, match=r"calibration\.json: not a calibration of this version; make it again"):
        Calibration.load(file)


def test_another_spectrogram_than_the_models_is_refused(trained, talk, tmp_path):
    found = calibrated(trained, talk)
    with pytest.raises(UsageError, match="hears another log-Mel spectrogram than was calibrated"):
        Recognizer(trained).calibrated(replace(found, front_end=replace(found.front_end, max_hz=4000.0)))


@pytest.fixture
def ser_edge(tmp_path):
    """Run the command where nothing was calibrated before."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [SER_EDGE, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={"PATH": "/usr/bin:/bin", "XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)},
        )

    return run


def test_what_is_calibrated_is_what_the_other_commands_hear_with(ser_edge, trained, talk, write_wav, tmp_path):
    person, clip = write_wav(tmp_path / "person.wav", 0.3 * talk), write_wav(tmp_path / "clip.wav", talk)
    before = ser_edge("file", trained, clip, "--json").stdout
    assert "none; make one with: ser-edge calibrate" in ser_edge("info", trained).stdout
    done = ser_edge("calibrate", trained, person)
    file = tmp_path / "state" / "ser-edge" / "calibration.json"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{file}: {Calibration.load(file)}\n"
    assert str(Calibration.load(file)) in ser_edge("info", trained).stdout
    after = ser_edge("file", trained, clip, "--json").stdout
    assert json.loads(after)["probabilities"] != json.loads(before)["probabilities"]
    assert ser_edge("file", trained, clip, "--json", "--no-calibration").stdout == before
    assert ser_edge("file", trained, clip, "--json", "--calibration", file).stdout == after
    listening = ser_edge("listen", trained, clip, "--fast", "--json")
    assert f"; calibrated on {Calibration.load(file)}; end with" in listening.stderr
    heard = [json.loads(line)["probabilities"] for line in listening.stdout.splitlines()]
    assert heard == [event["probabilities"] for event in json.loads(after)["events"]]


def test_a_signal_takes_a_new_calibration_over_without_a_settings_file(trained, talk, tmp_path):
    file = tmp_path / "ser-edge" / "calibration.json"
    calibrated(trained, talk).save(file)
    command = [SER_EDGE, "listen", str(trained), "-", "--fast"]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert b"calibrated on" in process.stderr.readline()
        file.write_text("{}")
        process.send_signal(signal.SIGHUP)
        assert b"not a calibration of this version; make it again" in process.stderr.readline()
        calibrated(trained, 0.3 * talk).save(file)
        process.send_signal(signal.SIGHUP)
        assert process.stderr.readline().decode() == f"ser-edge: listens with the settings in {file}\n"
        process.stdin.write(bytes(3200))
        process.stdin.close()
        assert process.wait(timeout=10) == 0


def test_a_model_that_was_not_trained_for_it_does_not_mind_that_another_was(
    ser_edge, model, trained, talk, write_wav, tmp_path
):
    clip = write_wav(tmp_path / "clip.wav", talk)
    before = ser_edge("file", model, clip, "--json").stdout
    assert ser_edge("calibrate", trained, clip).returncode == 0
    assert ser_edge("file", model, clip, "--json").stdout == before
    assert "not trained for it" in ser_edge("info", model).stdout


def test_what_cannot_be_calibrated_on_leaves_the_earlier_one_alone(
    ser_edge, trained, model, talk, speech, write_wav, tmp_path
):
    person, brief = write_wav(tmp_path / "person.wav", talk), write_wav(tmp_path / "brief.wav", speech(2.0))
    assert ser_edge("calibrate", trained, person).returncode == 0
    file = tmp_path / "state" / "ser-edge" / "calibration.json"
    kept = file.read_bytes()
    for arguments, code, message in (
        ([trained, brief], 1, "are too little to calibrate on"),
        ([trained, tmp_path / "none.wav"], 1, "none.wav: no such audio file"),
        ([model, person], 2, "was not trained to be calibrated"),
        ([trained, person, "--device", "USB"], 2, "choose one"),
        ([trained, person, "--seconds", "0"], 2, "--seconds 0; valid: 5 to 3600"),
    ):
        done = ser_edge("calibrate", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert message in done.stderr
    assert file.read_bytes() == kept
    assert [path.name for path in file.parent.iterdir()] == ["calibration.json"]


def test_clipped_speech_is_told(ser_edge, trained, talk, write_wav, tmp_path):
    loud = write_wav(tmp_path / "loud.wav", (20 * talk).clip(-1, 32767 / 32768))
    done = ser_edge("calibrate", trained, loud)
    assert done.returncode == 0 and "of the speech is at full scale: turn" in done.stderr
