"""The MQTT sink against a real broker that is killed and restarted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from mqtt_broker import MOSQUITTO, MqttBroker

from edge_runtime.errors import MissingDependencyError, SinkError, UsageError
from edge_runtime.events import Event
from edge_runtime.sinks import mqtt
from edge_runtime.sinks.mqtt import Broker, MqttSink, discovery_messages

needs_broker = pytest.mark.skipif(MOSQUITTO is None, reason="needs mosquitto")

DEVICE = """
import sys, time
from edge_runtime.events import Event
from edge_runtime.sinks import mqtt
mqtt.RECONNECT_S = (0.2, 0.2)
folder, port, first, last = sys.argv[1], *map(int, sys.argv[2:])
sink = mqtt.MqttSink(mqtt.Broker("127.0.0.1", port), folder, topic="t", say=print)
for number in range(first, last):
    sink.send(Event("end", float(number), number + 1.0, "joy", 0.5, {"joy": 0.5}))
    print("sent", number, flush=True)
    time.sleep(0.002)
time.sleep(60)
"""


def event(second: int) -> Event:
    return Event("end", float(second), second + 1.0, "joy", 0.75, {"joy": 0.75, "anger": 0.25})


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class Subscriber:
    """Collects what a broker passes on."""

    def __init__(self, port: int, name: str = "subscriber") -> None:
        from paho.mqtt import client as paho

        self.messages: list[tuple[str, bytes, bool]] = []
        self.ready = threading.Event()
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, name, clean_session=False)
        self.client.on_connect = lambda client, *_: client.subscribe([("#", 1)])
        self.client.on_subscribe = lambda *_: self.ready.set()
        self.client.on_message = lambda _client, _data, m: self.messages.append((m.topic, m.payload, m.retain))
        self.client.reconnect_delay_set(0.2, 0.2)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        assert self.ready.wait(10)

    def on(self, topic: str) -> list[str]:
        return [payload.decode() for found, payload, _ in list(self.messages) if found == topic]

    def events(self) -> list[dict]:
        return [json.loads(message) for message in self.on("t/event")]

    def seconds(self) -> set[float]:
        return {event["start"] for event in self.events()}

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(mqtt, "RECONNECT_S", (0.2, 0.2))
    monkeypatch.setattr(mqtt, "SETTLED_S", 0.0)


@pytest.fixture
def broker():
    with MqttBroker() as broker:
        yield broker


@pytest.fixture
def subscriber(broker):
    subscriber = Subscriber(broker.port)
    yield subscriber
    subscriber.close()


@pytest.fixture
def connect(tmp_path):
    """``connect(port, **options)`` gives a sink whose messages are in its ``said``."""
    sinks = []

    def connect(port: int, **options) -> MqttSink:
        said: list[str] = []
        options = {"topic": "t", "folder": tmp_path / "mqtt", **options}
        place = options.pop("broker", None) or Broker("127.0.0.1", port)
        sink = MqttSink(place, options.pop("folder"), say=said.append, **options)
        sink.said = said
        sinks.append(sink)
        return sink

    yield connect
    for sink in sinks:
        sink.close()


def identity(message: dict) -> tuple:
    return message["device"], message["boot"], message["seq"]


@needs_broker
def test_events_arrive_as_they_are_with_a_number(broker, subscriber, connect):
    sink = connect(broker.port)
    for second in range(50):
        sink.send(event(second))
    wait_until(lambda: len(subscriber.events()) == 50)
    for second, message in enumerate(subscriber.events()):
        assert identity(message) == (sink.device, sink._boot, second + 1)
        rest = {name: value for name, value in message.items() if name not in ("device", "boot", "seq")}
        assert rest == event(second).to_dict()
    wait_until(lambda: sink._spool.waiting == 0)
    assert sink.said == []


@needs_broker
def test_nothing_is_lost_when_the_broker_is_killed(broker, subscriber, connect):
    sink = connect(broker.port)
    for second in range(300):
        sink.send(event(second))
        if second == 100:
            wait_until(lambda: len(subscriber.events()) > 50)
            broker.kill()
        if second == 200:
            broker.start()
    wait_until(lambda: subscriber.seconds() == set(range(300)) and sink._spool.waiting == 0)
    by_identity = {identity(message): message for message in subscriber.events()}
    assert len(by_identity) == 300
    assert sorted(message["seq"] for message in by_identity.values()) == list(range(1, 301))
    assert sink.said[0] == "mqtt 127.0.0.1: connection lost; listening goes on"
    assert len(sink.said) == len(set(sink.said)) <= 3


@needs_broker
def test_nothing_is_lost_when_device_and_broker_are_killed(broker, subscriber, tmp_path):
    def device(first: int, last: int) -> subprocess.Popen:
        command = [sys.executable, "-c", DEVICE, tmp_path / "mqtt", broker.port, first, last]
        return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, cwd="/")

    def read_until(process: subprocess.Popen, line: str) -> None:
        while process.stdout.readline() != line:
            assert process.poll() is None

    process = device(0, 10000)
    read_until(process, "sent 60\n")
    broker.kill()
    read_until(process, "sent 120\n")
    os.kill(process.pid, signal.SIGKILL)
    # What it said it had sent before it died, and no more, must arrive.
    lines = [line.split() for line in process.stdout.read().split("\n")[:-1]]
    last = max([int(line[1]) for line in lines if line[0] == "sent"], default=120)
    process.wait()

    process = device(10000, 10050)  # starts while the broker is away
    read_until(process, "sent 10049\n")
    broker.start()
    expected = set(range(last + 1)) | set(range(10000, 10050))
    wait_until(lambda: expected <= subscriber.seconds())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    assert subscriber.seconds() - expected <= {last + 1}  # on disk, but not yet said
    first_boot, second_boot = dict.fromkeys(message["boot"] for message in subscriber.events())
    by_identity: dict[tuple, dict] = {}
    for message in subscriber.events():
        assert by_identity.setdefault(identity(message), message) == message
    assert {boot for _, boot, _ in by_identity} == {first_boot, second_boot}
    assert len({device for device, _, _ in by_identity}) == 1
    assert sorted(seq for _, _, seq in by_identity) == list(range(1, len(by_identity) + 1))
    assert len(by_identity) == len(subscriber.seconds())


def test_an_event_stays_until_all_before_it_are_acknowledged(connect):
    sink = connect(1)
    for second in range(4):
        sink.send(event(second))
    sink._in_flight = {message: sink._spool.read()[0] for message in (7, 8, 9)}
    waiting = []
    for message in (8, 9, 9, 5, 7):
        sink._acknowledged(message)
        waiting.append(sink._spool.waiting)
    assert waiting == [4, 4, 4, 4, 1]


@needs_broker
def test_a_broker_that_is_absent_at_first_gets_everything_later(broker, connect):
    broker.kill()
    sink = connect(broker.port)
    for second in range(30):
        sink.send(event(second))
    wait_until(lambda: sink.said)
    assert sink.said == ["mqtt 127.0.0.1: cannot connect: Connection refused; listening goes on"]
    broker.start()
    wait_until(lambda: sink._spool.waiting == 0)
    wait_until(lambda: sink.said[-1] == "mqtt 127.0.0.1: works again")
    assert len(sink.said) == 2


@needs_broker
def test_birth_last_will_and_goodbye(broker, subscriber, connect, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", DEVICE, str(tmp_path / "other"), str(broker.port), "0", "1"],
        stdout=subprocess.DEVNULL, cwd="/",
    )  # fmt: skip
    wait_until(lambda: subscriber.on("t/availability") == ["online"])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: subscriber.on("t/availability") == ["online", "offline"])

    sink = connect(broker.port)
    wait_until(lambda: subscriber.on("t/availability")[2:] == ["online"])
    sink.close()
    wait_until(lambda: subscriber.on("t/availability")[2:] == ["online", "offline"])

    late = Subscriber(broker.port, "late")
    wait_until(lambda: ("t/availability", b"offline", True) in late.messages)
    late.close()


@needs_broker
def test_closing_delivers_what_was_just_sent(broker, subscriber, connect, monkeypatch):
    monkeypatch.setattr(mqtt, "FLUSH_S", 10.0)
    sink = connect(broker.port)
    wait_until(lambda: subscriber.on("t/availability"))
    for second in range(100):
        sink.send(event(second))
    sink.close()
    sink.close()
    wait_until(lambda: subscriber.on("t/availability") == ["online", "offline"])
    assert subscriber.seconds() == set(range(100))
    with pytest.raises(SinkError, match="is closed"):
        sink.send(event(1))


@needs_broker
def test_health_says_what_waits(broker, subscriber, connect):
    sink = connect(broker.port, health=lambda: {"windows": 12})
    wait_until(lambda: subscriber.on("t/health"))
    health = json.loads(subscriber.on("t/health")[0])
    assert (health["device"], health["connections"], health["waiting"], health["dropped"]) == (sink.device, 1, 0, 0)
    assert health["windows"] == 12
    assert health["uptime"] >= 0


@needs_broker
def test_home_assistant_finds_retained_descriptions(broker, connect):
    sink = connect(broker.port, discovery=True)
    sink.send(event(1))
    wait_until(lambda: sink._spool.waiting == 0)  # and so what was sent before has arrived
    subscriber = Subscriber(broker.port)
    wait_until(lambda: len([m for m in subscriber.messages if m[0].startswith("homeassistant/")]) == 3)
    found = {
        topic: (json.loads(payload), retained) for topic, payload, retained in subscriber.messages if "ass" in topic
    }
    for topic, (config, retained) in found.items():
        _, component, node, name, last = topic.split("/")
        assert (component, last, retained) == ("sensor", "config", True)
        assert config["unique_id"] == f"{node}_{name}"
        assert config["availability_topic"] == "t/availability"
    subscriber.close()


def test_home_assistant_templates_do_not_keep_a_stale_emotion():
    """The expressions Home Assistant evaluates, evaluated by the template engine that it uses."""
    jinja2 = pytest.importorskip("jinja2")
    configs = {c["unique_id"].rsplit("_", 1)[1]: c for c in discovery_messages("ünsafe/#+ name", "t").values()}
    assert all(t.isascii() and set("#+ ").isdisjoint(t) for t in discovery_messages("ünsafe/#+ name", "t"))

    def shown(sensor: str, value: dict, before: str = "") -> str:
        template = jinja2.Template(configs[sensor]["value_template"])
        return template.render(value_json=value, this={"state": before})

    assert (shown("emotion", event(1).to_dict()), shown("probability", event(1).to_dict())) == ("joy", "75.0")
    lost = Event("source_lost", 1.0, 1.0, reason="device_gone").to_dict()
    assert (shown("emotion", lost), shown("probability", lost)) == ("None", "None")
    assert shown("waiting", {"waiting": 3}) == "3"
    # What began or ended a while ago is not the newest answer.
    ended = Event("emotion_end", 1.0, 2.0, "anger", 0.9, {"anger": 0.9}).to_dict()
    assert (shown("emotion", ended, before="joy"), shown("probability", ended, before="75.0")) == ("joy", "75.0")
    assert (shown("emotion", ended, before="unknown"), shown("probability", ended, "unavailable")) == ("None", "None")


@needs_broker
def test_a_wrong_password_is_said_once_and_tried_again(connect, tmp_path):
    (tmp_path / "users").write_text("")
    mosquitto_passwd = shutil.which("mosquitto_passwd") or "/usr/bin/mosquitto_passwd"
    subprocess.run([mosquitto_passwd, "-b", tmp_path / "users", "pi", "right"], check=True, capture_output=True)
    with MqttBroker("allow_anonymous false", f"password_file {tmp_path}/users") as broker:
        wrong = connect(broker.port, broker=Broker("127.0.0.1", broker.port, "pi", "wrong"))
        wait_until(lambda: (broker.folder / "log").read_text().count("not authorised") >= 2)
        assert wrong.said == ["mqtt 127.0.0.1: the broker refuses the connection: Not authorized; listening goes on"]
        right = connect(broker.port, broker=Broker("127.0.0.1", broker.port, "pi", "right"), folder=tmp_path / "right")
        right.send(event(1))
        wait_until(lambda: right._connections == 1 and right._spool.waiting == 0)
        assert right.said == []


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """An authority, a certificate of 127.0.0.1 by it, and an authority that nobody asked."""
    folder = tmp_path_factory.mktemp("tls")
    authority = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    for name in ("ca", "other"):
        openssl(folder, "req", *authority, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    openssl(folder, "req", "-newkey", "rsa:2048", "-nodes", "-keyout", "key", "-out", "request", "-subj", "/CN=broker")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names"]
    openssl(folder, "x509", "-req", "-in", "request", *signing, "-out", "certificate")
    return folder


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@needs_broker
def test_tls_with_an_authority_of_ones_own(certificates, connect, tmp_path):
    with MqttBroker(f"certfile {certificates}/certificate", f"keyfile {certificates}/key") as broker:

        def sink(host: str, ca: str) -> MqttSink:
            place = Broker(host, broker.port, tls=True, ca=certificates / ca)
            return connect(broker.port, broker=place, folder=tmp_path / f"{host}-{ca}")

        good, foreign, misnamed = (
            sink("127.0.0.1", "ca.pem"),
            sink("127.0.0.1", "other.pem"),
            sink("localhost", "ca.pem"),
        )
        good.send(event(1))
        wait_until(lambda: good._connections == 1 and good._spool.waiting == 0)
        assert good.said == []
        for sink, reason in ((foreign, "unable to get local issuer"), (misnamed, "not valid for 'localhost'")):
            wait_until(lambda sink=sink: sink.said)
            assert "certificate verify failed" in sink.said[0]
            assert reason in sink.said[0]
            assert "\n" not in sink.said[0]
        time.sleep(1)  # more attempts
        assert (len(foreign.said), len(misnamed.said)) == (1, 1)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        bytes(range(256)) * 9,
        b"\x20\xff\xff\xff\xff",  # a length without end
        b"\x20\x01\x00",  # an answer to CONNECT that is too short
        b"\x20\x02\x00\x63",  # refused for a reason that does not exist
        b"\x20\x02\x00\x00\x40\x00\x90\x00",  # accepted, then broken packets
    ],
)
def test_what_is_no_broker_is_said_once_and_tried_again(connect, monkeypatch, answer):
    """Closed at once, silent, or an answer that makes no sense: the sink is told once and does not give up."""
    monkeypatch.setattr(mqtt, "KEEPALIVE_S", 1)
    monkeypatch.setattr(mqtt, "SETTLED_S", 60.0)
    attempts = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                attempts.append(connection)
                with suppress(OSError):  # the sink may hang up first
                    if answer is not None:
                        connection.sendall(answer)
                        connection.shutdown(socket.SHUT_WR)

    threading.Thread(target=serve, daemon=True).start()
    sink = connect(server.getsockname()[1])
    sink.send(event(1))
    wait_until(lambda: len(attempts) >= 3 and sink.said)
    assert sink._spool.waiting == 1
    assert len(sink.said) == len(set(sink.said)) <= 2
    sink.close()
    server.close()


def test_a_full_spool_keeps_the_newest_and_counts(connect):
    sink = connect(1, max_bytes=16 * 400)
    for second in range(100):
        sink.send(event(second))
    size = sum(path.stat().st_size for path in sink._spool._folder.glob("*.segment"))
    assert size <= 16 * 400
    assert sink._report()["dropped"] == 100 - sink._spool.waiting > 0
    sink.close()


def test_closing_without_a_broker_is_quick_and_keeps_the_events(connect):
    sink = connect(1)
    for second in range(5):
        sink.send(event(second))
    begin = time.monotonic()
    sink.close()
    assert time.monotonic() - begin < 10
    again = connect(1)
    assert again._spool.waiting == 5


def test_a_folder_in_use_is_refused(connect):
    connect(1)
    with pytest.raises(SinkError, match="in use by another ser-edge"):
        connect(1)


def test_the_device_has_one_name_for_ever(connect, tmp_path):
    first = connect(1)
    first.close()
    second = connect(1, topic=None)
    assert second.device == first.device
    assert second._boot != first._boot
    assert second.topic == f"ser-edge/{first.device}"
    second.close()
    (tmp_path / "mqtt" / "device").write_text("kitchen/#\n")
    with pytest.raises(UsageError, match="valid: up to 64 letters"):
        connect(1)


@pytest.mark.parametrize("topic", ["", "a/#", "+/b", "/a", "a/", "$SYS/a", "a\0b", "a" * 2000])
def test_topics_that_cannot_be_are_refused(connect, topic, tmp_path):
    with pytest.raises(UsageError, match=r"MQTT topic .*valid: "):
        connect(1, topic=topic)
    assert not (tmp_path / "mqtt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": ""}, "valid: a host's name or address"),
        ({"host": "mqtt://broker"}, "valid: a host's name or address"),
        ({"host": "broker", "port": 0}, "port 0; valid: 1 to 65535"),
        ({"host": "broker", "password": "x"}, "needs a user name"),
        ({"host": "broker", "ca": Path("ca.pem")}, "needs TLS"),
        ({"host": "broker", "tls": True, "ca": Path("none.pem")}, "none.pem: no such file"),
    ],
)
def test_brokers_that_cannot_be_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Broker(**options)


@pytest.mark.parametrize("address", ["", "a:b", "a:1:2", "::1", "[::1", "a:", "a:123456"])
def test_addresses_that_cannot_be_are_refused(address):
    with pytest.raises(UsageError, match="MQTT broker"):
        Broker.parse(address)


def test_a_certificate_that_is_none_is_refused(connect, tmp_path):
    (tmp_path / "ca.pem").write_text("not a certificate")
    with pytest.raises(UsageError, match=r"ca\.pem: not a PEM file"):
        connect(1, broker=Broker("127.0.0.1", tls=True, ca=tmp_path / "ca.pem"))


def test_without_paho_one_line_says_what_to_do(connect, monkeypatch):
    monkeypatch.setitem(sys.modules, "paho.mqtt", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'ser-edge\[mqtt\]'"):
        connect(1)
