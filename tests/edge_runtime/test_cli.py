from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_artifact import tiny_file

from edge_runtime.session import Session
from edge_runtime.settings import Settings

SER_EDGE = str(Path(sys.executable).with_name("ser-edge"))


def ser_edge(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SER_EDGE, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60, **options
    )


def one_line(text: str) -> bool:
    return text.startswith("ser-edge: ") and text.count("\n") == 1


@pytest.fixture(scope="module")
def clip(tmp_path_factory, speech, write_wav) -> Path:
    return write_wav(tmp_path_factory.mktemp("clip") / "clip.wav", speech(2.6))


def test_info_for_people(model):
    done = ser_edge("info", model)
    assert done.returncode == 0
    assert done.stderr == ""
    for shown in (
        "anger, joy, neutral, sadness",
        "2.00 s",
        "64 mel bands",
        "CC0-1.0",
        "fp32",
        "passed",
        "20.0% to 30.0%",
    ):
        assert shown in done.stdout


def test_info_for_programs(model, recognizer):
    shown = json.loads(ser_edge("info", model, "--json").stdout)
    assert shown["bytes"] == model.stat().st_size
    assert shown["self_test"] == "passed"
    assert shown["labels"] == list(recognizer.artifact.labels)
    assert shown["metrics"] == recognizer.artifact.metrics


def test_file_gives_the_answer_of_evaluation(model, recognizer, clip):
    shown = json.loads(ser_edge("file", model, clip, "--json").stdout)
    samples, _ = soundfile.read(clip, dtype="float32")
    expected = recognizer.probabilities(samples)
    assert list(shown["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert shown["label"] == recognizer.artifact.labels[int(expected.argmax())]
    assert shown["probability"] == pytest.approx(float(expected.max()), abs=1e-6)
    assert shown["seconds"] == 2.6


def test_file_gives_the_events_of_a_session(model, recognizer, clip):
    shown = json.loads(ser_edge("file", model, clip, "--json", "--hop", 0.25, "--threshold", 0.9).stdout)
    session = Session(recognizer, Settings(hop=0.25, threshold=0.9))
    samples, _ = soundfile.read(clip, dtype="float32")
    assert shown["events"] == [event.to_dict() for event in session.push(samples) + session.finish()]


def test_file_for_people_is_one_line_a_clip(model, clip):
    lines = ser_edge("file", model, clip, clip).stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].split()[-1] == str(clip)
    assert "2.60 s" in lines[0]


@pytest.mark.parametrize("seconds", [0.1, 3.0])
def test_a_silent_file_is_no_speech(model, tmp_path, write_wav, seconds):
    path = write_wav(tmp_path / "silent.wav", np.zeros(round(16000 * seconds)))
    shown = json.loads(ser_edge("file", model, path, "--json").stdout)
    assert (shown["label"], shown["probability"], shown["probabilities"]) == ("no_speech", None, {})
    assert [event["kind"] for event in shown["events"]] == ["no_speech"]
    assert ser_edge("file", model, path).stdout.split()[0] == "no_speech"


def test_a_bad_file_does_not_stop_the_others(model, clip, tmp_path):
    (tmp_path / "text.wav").write_text("not audio at all")
    done = ser_edge("file", model, tmp_path / "none.wav", clip, tmp_path / "text.wav", clip)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 2
    errors = done.stderr.splitlines()
    assert len(errors) == 2
    assert "none.wav: no such audio file" in errors[0]
    assert "text.wav: not audio" in errors[1]


@pytest.mark.parametrize("command", ["info", "file", "listen"])
@pytest.mark.parametrize(
    ("name", "content", "message", "code"),
    [
        ("none.onnx", None, "no such model file", 1),
        ("empty.onnx", b"", "is empty", 1),
        ("cut.onnx", 1500, "damaged", 1),
        ("text.txt", b"hello", "unknown model format '.txt'; valid: .onnx", 2),
    ],
)
def test_a_bad_model_gives_one_line(tmp_path, model, clip, command, name, content, message, code):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else model.read_bytes()[:content])
    done = ser_edge(command, path, *([clip] if command == "file" else []))
    assert done.returncode == code
    assert one_line(done.stderr)
    assert message in done.stderr
    assert done.stdout == ""


def test_a_model_that_fails_its_self_test_is_refused(tmp_path):
    path = tmp_path / "newer.onnx"
    path.write_bytes(tiny_file(schema=9))
    done = ser_edge("info", path)
    assert (done.returncode, one_line(done.stderr)) == (1, True)
    assert "upgrade ser-edge" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["fly"], "invalid choice: 'fly'"),
        (["file"], "required"),
        (["listen", "m.onnx", "--hop", "soon"], "invalid float value: 'soon'"),
        (["listen", "--threshhold=0.5"], "unknown option '--threshhold=0.5'; did you mean '--threshold'? valid: --and"),
        (["info", "m.onnx", "n.onnx"], "one argument too many: 'n.onnx'; see: ser-edge info --help"),
        (["listen", "m.onnx", "--hop", "0"], "hop is 0; valid: 0.05 to 60"),
        (["file", "m.onnx", "a.wav", "--threshold", "7"], "threshold is 7; valid: 0 to 1"),
    ],
)
def test_wrong_usage_is_2(arguments, message):
    done = ser_edge(*arguments)
    assert (done.returncode, one_line(done.stderr)) == (2, True)
    assert message in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["file", "--help"], ["listen", "--help"]])
def test_help_has_an_example(arguments):
    done = ser_edge(*arguments)
    assert done.returncode == 0
    assert "ser-edge " in done.stdout.split("example")[1]


def test_version_and_module(tmp_path):
    version = ser_edge("--version").stdout
    module = subprocess.run(
        [sys.executable, "-m", "edge_runtime", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert module.stdout == version
    assert version.startswith("ser-edge ")


def test_a_closed_pipe_is_quiet(model, clip):
    process = subprocess.Popen(
        [SER_EDGE, "file", str(model), *[str(clip)] * 50],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 0


def test_a_full_disk_is_one_line(model):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [SER_EDGE, "info", str(model)], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert one_line(done.stderr)
    assert "No space left" in done.stderr


def test_numpy_runs_on_one_thread_unless_told_otherwise(tmp_path, monkeypatch):
    # The environment is read when numpy is imported: it must be set before.
    script = (
        "import sys, os\n"
        "from edge_runtime import cli\n"
        "assert 'numpy' not in sys.modules\n"
        "sys.argv = ['ser-edge', 'info', 'none.onnx']\n"
        "try: cli.main()\n"
        "except SystemExit: print(os.environ['OPENBLAS_NUM_THREADS'])\n"
    )
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    for given, expected in ((None, "1"), ("3", "3")):
        if given:
            monkeypatch.setenv("OPENBLAS_NUM_THREADS", given)
        shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert shown.stdout.split() == [expected]


def test_ctrl_c_during_file_is_one_line(model, tmp_path, write_wav, speech):
    path = write_wav(tmp_path / "long.wav", np.tile(speech(10.0), 20))
    process = subprocess.Popen(
        [SER_EDGE, "file", str(model), *[str(path)] * 50], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    process.stdout.readline()
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == "ser-edge: interrupted\n"


@pytest.mark.parametrize("command", ["devices", "listen"])
@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("raise OSError('PortAudio library not found')", "apt install libportaudio2"),
        ("raise ImportError", "pip install 'ser-edge[mic]'"),
        ("raise RuntimeError('Error initializing PortAudio: Unanticipated host error')", "cannot be reached"),
        (
            "class PortAudioError(Exception): pass\nclass default: device = [-1, -1]\n"
            "def query_devices(): return []\ndef _terminate(): pass\ndef _initialize(): pass\n",
            "no microphone found",
        ),
    ],
)
def test_without_sound_one_line_says_what_to_do(model, tmp_path, command, module, message):
    (tmp_path / "sounddevice.py").write_text(module + "\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = ser_edge(command, *([model, "--exit-on-loss"] if command == "listen" else []), env=environment)
    assert done.returncode == 1
    assert one_line(done.stderr)
    assert message in done.stderr


def raw(path: Path) -> bytes:
    with wave.open(str(path)) as file:
        return file.readframes(file.getnframes())


def events_of(stdout: str | bytes) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "wall"} for line in stdout.splitlines()]


def listen_to(content: bytes, *arguments: object) -> subprocess.CompletedProcess:
    command = [SER_EDGE, "listen", *map(str, arguments)]
    return subprocess.run(command, input=content, capture_output=True, check=False, timeout=60)


def test_a_recording_and_its_samples_through_a_pipe_give_the_events_of_file(model, clip):
    expected = json.loads(ser_edge("file", model, clip, "--json").stdout)["events"]
    assert events_of(ser_edge("listen", model, clip, "--fast", "--json").stdout) == expected
    assert events_of(listen_to(raw(clip), model, "-", "--fast", "--json").stdout) == expected


def test_a_recording_at_its_pace_gives_the_same_answers(model, clip):
    expected = json.loads(ser_edge("file", model, clip, "--json").stdout)["events"]
    given = events_of(ser_edge("listen", model, clip, "--json", "--hop", "5").stdout)
    assert [(e["kind"], e["end"]) for e in given if e["kind"] == "end"] == [
        (e["kind"], e["end"]) for e in expected if e["kind"] == "end"
    ]


def test_the_form_of_the_pipe_is_taken_from_the_options(model, clip):
    expected = json.loads(ser_edge("file", model, clip, "--json").stdout)["events"]
    both = np.repeat(np.frombuffer(raw(clip), "<i2").astype(np.int32) << 16, 2).astype("<i4").tobytes()
    form = ("--channels", 2, "--format", "s32le", "--rate", 16000, "--channel", 2)
    assert events_of(listen_to(both, model, "-", "--fast", "--json", *form).stdout) == expected


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["none.wav"], "none.wav: no such audio file", 1),
        (["-"], "standard input: no audio in it", 1),
        (["-", "--format", "mp3"], "unknown sample format 'mp3'; valid: f32le, s16le", 2),
        (["-", "--rate", "1"], "sample rate 1 Hz; valid: 4000 to 384000", 2),
        (["--rate", "8000"], "describe standard input", 2),
        (["--fast"], "--fast is for recordings and pipes", 2),
        (["-", "--device", "USB"], "both a microphone 'USB' and '-'", 2),
        (["--channel", "0"], "channel is 0; valid: 1 to 64", 2),
    ],
)
def test_a_source_that_cannot_be_gives_one_line(model, tmp_path, arguments, message, code):
    done = listen_to(b"", model, *arguments)
    stderr = done.stderr.decode()
    assert (done.returncode, done.stdout) == (code, b"")
    assert message in stderr.splitlines()[-1]
    assert "Traceback" not in stderr


def test_a_settings_file_holds_and_options_override_it(model, recognizer, clip, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("hop = 0.25\npadding = 0.1\nexit_on_loss = true\n[threshold]\nanger = 0.9\n")
    shown = json.loads(ser_edge("file", model, clip, "--json", "--settings", file, "--padding", 0).stdout)
    session = Session(recognizer, Settings(hop=0.25, padding=0, threshold={"anger": 0.9}))
    samples, _ = soundfile.read(clip, dtype="float32")
    assert shown["events"] == [event.to_dict() for event in session.push(samples) + session.finish()]


def test_a_recordings_channel_is_that_of_the_settings(model, clip, tmp_path, write_wav):
    samples, _ = soundfile.read(clip, dtype="float32")
    path = tmp_path / "both.wav"
    soundfile.write(path, np.stack([np.zeros_like(samples), samples], axis=1), 16000)
    file = tmp_path / "settings.toml"
    file.write_text("channel = 1\n")
    expected = json.loads(ser_edge("file", model, clip, "--json").stdout)["events"]
    assert json.loads(ser_edge("file", model, path, "--json", "--channel", 2).stdout)["events"] == expected
    silent = json.loads(ser_edge("file", model, path, "--json", "--settings", file).stdout)
    assert silent["label"] == "no_speech"


def test_every_deciding_option_reaches_the_settings(model, recognizer, clip):
    options = ["--mode", "utterance", "--enter", "anger=0.01,joy=0.02", "--exit", "0", "--min-duration", "0.1"]
    options += ["--refractory", "2", "--min-audio", "0.5", "--max-segment", "1.5", "--hangover", "0.1"]
    shown = json.loads(ser_edge("file", model, clip, "--json", *options).stdout)
    settings = Settings(
        mode="utterance", enter={"anger": 0.01, "joy": 0.02}, exit=0, min_duration=0.1, refractory=2, min_audio=0.5,
        max_segment=1.5, hangover=0.1,
    )  # fmt: skip
    session = Session(recognizer, settings)
    samples, _ = soundfile.read(clip, dtype="float32")
    assert shown["events"] == [event.to_dict() for event in session.push(samples) + session.finish()]
    assert shown["probability"] is not None
    assert {event["kind"] for event in shown["events"]} <= {"end", "emotion_begin", "emotion_end"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", "none.toml"], "none.toml: settings cannot be read"),
        (["--threshold", "angr=0.5"], "threshold of 'angr', which the model lacks; did you mean 'anger'?"),
        (["--threshold", "anger=much"], "--threshold: 'anger=much'; valid: 0.7, or by label: anger=0.7,joy=0.8"),
        (["--mode", "x"], "mode is 'x'; valid: utterance, window"),
        (["--exit", "0.5"], "exit is given without enter"),
    ],
)
def test_settings_that_cannot_be_are_2(model, clip, arguments, message):
    done = ser_edge("listen", model, clip, *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_a_file_that_is_no_vad_is_one_line(model, clip):
    done = ser_edge("listen", model, clip, "--vad", model)
    assert (done.returncode, one_line(done.stderr)) == (1, True)
    assert "not Silero VAD" in done.stderr


def test_several_models_answer_for_one_source(model, stream_model, clip):
    alone = {
        path.name: json.loads(ser_edge("file", path, clip, "--json").stdout)["events"] for path in (model, stream_model)
    }
    given = events_of(ser_edge("listen", model, clip, "--and", stream_model, "--fast", "--json").stdout)
    for name, expected in alone.items():
        assert [{k: v for k, v in e.items() if k != "model"} for e in given if e["model"] == name] == expected
    done = ser_edge("listen", model, clip, "--and", model, "--fast")
    assert (done.returncode, one_line(done.stderr)) == (2, True)
    assert "2 models are named 'tiny.onnx'" in done.stderr


def test_a_signal_rereads_the_settings_and_a_broken_file_changes_nothing(model, clip, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("hop = 0.5\n")
    content = np.frombuffer(raw(clip), "<i2")
    command = [SER_EDGE, "listen", str(model), "-", "--fast", "--json", "--settings", str(file)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def hear_until(kind: str) -> dict:
        process.stdin.write(content.tobytes() + bytes(64000))
        process.stdin.flush()
        while (event := json.loads(process.stdout.readline()))["kind"] != kind:
            pass
        return event

    def reread(text: str) -> str:
        file.write_text(text)
        os.kill(process.pid, signal.SIGHUP)
        return process.stderr.readline().decode()

    try:
        assert b"listening to" in process.stderr.readline()
        assert hear_until("end")["label"] != "uncertain"
        assert reread("threshold = 1.0\n") == f"ser-edge: listens with the settings in {file}\n"
        assert hear_until("end")["label"] == "uncertain"
        broken = reread("treshold = 0.0\n")
        assert broken.startswith(f"ser-edge: {file}: unknown setting 'treshold'; did you mean 'threshold'?")
        assert broken.endswith("; listening goes on with the settings of before\n")
        assert "device cannot change" in reread('device = "USB"\n')
        assert hear_until("end")["label"] == "uncertain"
        _, stderr = process.communicate(timeout=30)
        assert (process.returncode, stderr) == (0, b"")
    finally:
        process.kill()


@pytest.mark.parametrize(("wrapper", "ends"), [([], True), (["nohup"], False)])
def test_a_terminal_that_goes_away_ends_listening_with_its_last_events(model, clip, wrapper, ends):
    command = [*wrapper, SER_EDGE, "listen", str(model), "-", "--fast", "--json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while b"listening to" not in process.stderr.readline():
            pass
        process.stdin.write(raw(clip))
        process.stdin.flush()
        while json.loads(process.stdout.readline())["kind"] != "update":
            pass
        process.send_signal(signal.SIGHUP)
        if ends:
            assert process.wait(timeout=10) == 0
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=1)
        assert events_of(process.communicate(timeout=10)[0])[-1]["kind"] == "end"


@pytest.fixture
def unread(model, tmp_path, write_wav, speech):
    """A process that has written more events than wait, and waits until somebody reads them."""
    path = write_wav(tmp_path / "long.wav", np.tile(speech(10.0), 6))
    command = [SER_EDGE, "listen", str(model), str(path), "--fast", "--json", "--hop", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)  # some twenty events
        assert b"listening to" in process.stderr.readline()
        spent = -1.0
        while process.poll() is None and spent != (spent := cpu_seconds(process.pid)):
            time.sleep(0.7)
        yield process
        process.kill()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_nothing_of_a_recording_is_lost_to_a_slow_reader(unread):
    stdout, stderr = unread.communicate(timeout=60)
    scores = [event["end"] for event in events_of(stdout) if event["kind"] != "end"]
    assert (unread.returncode, stderr) == (0, b"")
    assert len(scores) > 1100
    assert np.diff(scores).max() < 1.0


def test_ctrl_c_ends_a_recording_whose_events_nobody_reads(unread):
    assert unread.poll() is None
    os.kill(unread.pid, signal.SIGINT)
    assert unread.wait(10) == 0


def test_an_installed_model_is_known_by_name_and_taken_by_default(clip):
    """The project's own model, which the tests install, on a recording."""
    by_name = ser_edge("file", "emodb", clip, "--json")
    assert by_name.returncode == 0, by_name.stderr
    assert set(json.loads(by_name.stdout.splitlines()[0])["probabilities"]) >= {"anger", "neutral"}
    shown = ser_edge("info", "--json")
    assert shown.returncode == 0 and json.loads(shown.stdout)["licence"] == "CC0-1.0"
    misspelt = ser_edge("info", "emodbb")
    assert misspelt.returncode == 2 and "did you mean 'emodb'" in misspelt.stderr


@pytest.mark.parametrize("words", ["{m} --fast {c} --json", "--fast {m} --json {c}", "--json --fast {m} {c}"])
def test_options_stand_anywhere(model, clip, words):
    done = ser_edge("listen", *words.format(m=model, c=clip).split())
    expected = events_of(ser_edge("listen", model, clip, "--fast", "--json").stdout)
    assert events_of(done.stdout) == expected and expected
