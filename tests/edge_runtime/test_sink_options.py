"""The sinks' options of ``ser-edge listen``, and that nothing but events comes out of any sink."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.cli import _parser
from edge_runtime.errors import UsageError
from edge_runtime.events import Event
from edge_runtime.session import Session
from edge_runtime.sinks import CommandSink, Fanout, FileSink
from edge_runtime.sinks.mqtt import Broker, MqttSink
from edge_runtime.sinks.options import open_sinks
from edge_runtime.sinks.spool import Spool


def sinks_for(*options: str) -> list:
    arguments = _parser().parse_args(["listen", "model.onnx", *options])
    return list(open_sinks(arguments, print, dict))


def test_without_options_there_are_no_sinks():
    assert sinks_for() == []


def test_each_option_gives_its_sink(tmp_path, monkeypatch):
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path}/state:/elsewhere")
    sinks = sinks_for("--output", f"{tmp_path}/events.jsonl", "--exec", "cat", "--mqtt", "127.0.0.1:1")
    assert [type(sink) for sink in sinks] == [FileSink, CommandSink, MqttSink]
    assert (tmp_path / "state" / "mqtt" / "device").exists()
    for sink in sinks:
        sink.close()


@pytest.mark.parametrize(
    ("environment", "folder"),
    [({"XDG_STATE_HOME": "{}/xdg"}, "xdg/ser-edge/mqtt"), ({"HOME": "{}"}, ".local/state/ser-edge/mqtt")],
)
def test_the_spool_is_where_state_belongs(tmp_path, monkeypatch, environment, folder):
    for variable in ("STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value.format(tmp_path))
    sinks_for("--mqtt", "127.0.0.1:1")[0].close()
    assert list((tmp_path / folder).glob("*.segment"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "3"], "--keep is given without --output"),
        (["--mqtt-tls"], "--mqtt-tls is given without --mqtt"),
        (["--mqtt-spool", "x"], "--mqtt-spool is given without --mqtt"),
        (["--mqtt", "h", "--mqtt-password-file", "x"], "--mqtt-password-file is given without --mqtt-user"),
        (["--mqtt", "h", "--mqtt-ca", "x"], "--mqtt-ca is given without --mqtt-tls"),
        (["--mqtt", "h:0", "--mqtt-spool", "{tmp}/s"], "port 0; valid: 1 to 65535"),
        (["--mqtt", ""], "MQTT broker ''"),
        (["--mqtt", "h", "--mqtt-topic", "a/#", "--mqtt-spool", "{tmp}/s"], "MQTT topic 'a/#'"),
        (["--output", "{tmp}/x", "--rotate-mb", "nan"], "--rotate-mb is nan"),
        (["--output", "{tmp}/x", "--rotate-mb", "-1"], "--rotate-mb is -1"),
        (["--output", "{tmp}/x", "--keep", "-1"], "keep -1 old files"),
        (["--exec", ""], "command ''"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, message):
    with pytest.raises(UsageError) as caught:
        sinks_for(*(option.format(tmp=tmp_path) for option in options))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "file", "password"),
    [("from-variable", None, "from-variable"), (None, "from file\nrest", "from file"), ("v", "f\r\n", "f")],
)
def test_the_password_is_never_on_the_command_line(tmp_path, monkeypatch, variable, file, password):
    if variable:
        monkeypatch.setenv("SER_EDGE_MQTT_PASSWORD", variable)
    options = ["--mqtt", "127.0.0.1:1", "--mqtt-user", "pi", "--mqtt-spool", f"{tmp_path}/spool"]
    if file:
        (tmp_path / "password").write_bytes(file.encode())
        options += ["--mqtt-password-file", f"{tmp_path}/password"]
    given = []
    monkeypatch.setattr("edge_runtime.sinks.mqtt.MqttSink", lambda broker, *_, **__: given.append(broker))
    sinks_for(*options)
    assert given == [Broker("127.0.0.1", 1, "pi", password)]


def listen(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "edge_runtime", "listen", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--exec", "no-such-program"], 2, "no program 'no-such-program'"),
        (["--output", "/no/such/folder/events"], 1, "/no/such/folder/events: No such file or directory"),
        (["--mqtt", "h", "--mqtt-user", "u", "--mqtt-password-file", "/none"], 1, "/none: No such file"),
        (["--mqtt", "h", "--mqtt-spool", "/proc/spool"], 1, "/proc/spool: "),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(model, tmp_path, options, code, message):
    done = listen(model, *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("ser-edge: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_without_paho_the_command_says_how_to_install_it(model, tmp_path):
    (tmp_path / "paho").mkdir()
    (tmp_path / "paho" / "__init__.py").write_text("raise ImportError\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = listen(model, "--mqtt", "h", "--mqtt-spool", tmp_path / "spool", env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 1
    assert done.stderr == "ser-edge: MQTT needs paho-mqtt 2.1 or later; run: pip install 'ser-edge[mqtt]'\n"


def test_no_sink_gets_anything_of_the_audio(recognizer, speech, tmp_path):
    """Words from fixed lists and a few numbers in [0, 1] or of seconds: there is no room for sound."""
    session = Session(recognizer)
    samples = np.concatenate([speech(3.0), np.zeros(16000, np.float32), speech(2.0, seed=3)])
    events = [*session.push(samples), *session.gap(16000, "overflow"), *session.push(samples), *session.finish()]
    assert len(events) > 10
    mqtt = MqttSink(Broker("127.0.0.1", 1), tmp_path / "mqtt", say=lambda _: None)
    with Fanout([FileSink(tmp_path / "file"), CommandSink(f"tee -a {tmp_path}/command"), mqtt]) as fanout:
        for event in events:
            fanout.send(event)
        while not (tmp_path / "command").exists() or (tmp_path / "command").read_bytes().count(b"\n") < len(events):
            time.sleep(0.02)
    spool = Spool(tmp_path / "mqtt")
    lines = {
        "file": (tmp_path / "file").read_text().splitlines(),
        "command": (tmp_path / "command").read_text().splitlines(),
        "mqtt": [record.decode() for _, record in iter(spool.read, None)],
    }
    words = {"overflow", *recognizer.artifact.labels, "uncertain", "no_speech", "begin", "update", "end", "gap"}
    allowed = {field.name for field in fields(Event)} | {"v", "device", "boot"}
    for sink, written in lines.items():
        assert len(written) == len(events), sink
        for line in written:
            message = json.loads(line)
            assert message.keys() <= allowed
            probabilities = message.pop("probabilities", {})
            assert probabilities.keys() <= set(recognizer.artifact.labels)
            assert all(isinstance(value, float) and 0 <= value <= 1 for value in probabilities.values())
            assert {message.get(name) for name in ("kind", "label", "reason")} <= words | {None}
            assert {type(message[name]) for name in ("start", "end")} == {float}
            assert len(line) < 600
    files = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < samples.nbytes / 10
