"""``ser-edge listen`` from a microphone to a file, a command and a broker that goes away in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import wave
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from mqtt_broker import MOSQUITTO, MqttBroker
from quick_run import write_wav
from virtual_microphone import VirtualMicrophone

pytestmark = pytest.mark.skipif(
    not shutil.which("pulseaudio") or MOSQUITTO is None, reason="needs pulseaudio, pulseaudio-utils and mosquitto"
)


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def received():
    """``received(port)`` collects the events that a broker passes on."""
    from paho.mqtt import client as paho

    clients = []

    def received(port: int) -> list[dict]:
        events: list[dict] = []
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, "collector", clean_session=False)
        client.on_connect = lambda *_: client.subscribe("porch/event", 1)
        client.on_message = lambda _client, _data, message: events.append(json.loads(message.payload))
        client.reconnect_delay_set(1, 1)
        client.connect("127.0.0.1", port)
        client.loop_start()
        clients.append(client)
        return events

    yield received
    for client in clients:
        client.disconnect()
        client.loop_stop()


@pytest.fixture(scope="module")
def clip(tmp_path_factory, bursts) -> Path:
    """An utterance."""
    return write_wav(tmp_path_factory.mktemp("clip") / "clip.wav", bursts(1.5))


def start_listening(microphone: VirtualMicrophone, *options: object, **streams: object) -> subprocess.Popen:
    listening = subprocess.Popen(
        [sys.executable, "-m", "edge_runtime", "listen", *map(str, options)], env=microphone.environment, text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
    )  # fmt: skip
    assert listening.stderr.readline().startswith("ser-edge: listening to")
    return listening


def without_numbers(message: dict) -> dict:
    return {name: value for name, value in message.items() if name not in ("device", "boot", "seq")}


def test_every_sink_gets_every_event_though_the_broker_is_killed(model, clip, tmp_path, received):
    output, commanded = tmp_path / "events.jsonl", tmp_path / "commanded.jsonl"
    with VirtualMicrophone() as microphone, MqttBroker() as broker:
        events = received(broker.port)
        listening = start_listening(
            microphone, model, "--json", "--output", output, "--exec", f"tee -a '{commanded}'",
            "--mqtt", f"127.0.0.1:{broker.port}", "--mqtt-topic", "porch", "--mqtt-spool", tmp_path / "spool",
        )  # fmt: skip
        microphone.play(clip)
        wait_until(lambda: any(event["kind"] == "end" for event in events))
        broker.kill()
        microphone.play(clip)
        wait_until(lambda: [event["kind"] for event in lines(output)].count("end") == 2)
        broker.start()
        before = lines(output)
        wait_until(lambda: len({event["seq"] for event in events}) >= len(before) <= len(lines(commanded)))
        os.kill(listening.pid, signal.SIGTERM)
        stdout, stderr = listening.communicate(timeout=30)
    assert listening.returncode == 0
    expected = [json.loads(line) for line in stdout.splitlines()]
    assert lines(output) == expected
    # What came with the end itself may be still in the spool, or have been too late for the command.
    distinct = [without_numbers(event) for event in {event["seq"]: event for event in events}.values()]
    for found in (distinct, lines(commanded)):
        assert len(found) >= len(before)
        assert found == expected[: len(found)]
    said = [line for line in stderr.splitlines() if line.startswith("ser-edge: mqtt")]
    assert len(said) == len(set(said)) <= 3
    assert "connection lost" in said[0]


def test_a_reader_that_has_seen_enough_ends_listening_quietly(model, clip):
    with VirtualMicrophone() as microphone:
        listening = start_listening(microphone, model, "--json")
        microphone.play(clip)
        listening.stdout.readline()
        listening.stdout.close()
        microphone.play(clip)
        assert listening.wait(30) == 0
        assert listening.stderr.read() == ""


def test_a_reader_that_reads_nothing_holds_up_neither_the_other_sinks_nor_the_end(model, clip, tmp_path):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    output = tmp_path / "events.jsonl"
    with VirtualMicrophone() as microphone:
        listening = start_listening(microphone, model, "--output", output, stdout=writing)
        microphone.play(clip)
        wait_until(lambda: any(event["kind"] == "end" for event in lines(output)))
        listening.terminate()
        assert listening.wait(30) == 0
    os.close(reading)
    os.close(writing)


def test_the_health_message_says_what_listening_has_been_through(model, clip, tmp_path):
    from paho.mqtt import client as paho

    found: list[dict] = []
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, "collector")
    client.on_message = lambda _client, _data, message: found.append(json.loads(message.payload))
    with MqttBroker() as broker:
        client.connect("127.0.0.1", broker.port)
        client.subscribe("porch/health")
        client.loop_start()
        listening = subprocess.Popen(
            [sys.executable, "-m", "edge_runtime", "listen", str(model), "-", "--stall", "60", "--mqtt",
             f"127.0.0.1:{broker.port}", "--mqtt-topic", "porch", "--mqtt-spool", str(tmp_path / "spool")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        with wave.open(str(clip)) as file:
            listening.stdin.write(file.readframes(file.getnframes()))
        listening.stdin.flush()
        wait_until(lambda: found)
        listening.terminate()
        listening.communicate(timeout=30)
    client.loop_stop()
    health = found[0]
    assert health["windows"] >= 1
    assert 0 < health["latency_p50"] <= health["latency_p95"] <= health["latency_p99"]
    assert (health["gaps"], health["lost"], health["outages"]) == (0, 0.0, 0)
    assert health["undelivered"] == {"output": 0, "mqtt 127.0.0.1": 0}
