"""Events to an MQTT broker, each at least once, across outages of the broker and ends of this process.

Topics, below one that can be chosen:

- ``event``: one JSON object an event, QoS 1. Beside the event's own fields it carries ``device`` (the same for ever),
  ``boot`` (new for each start of the process) and ``seq`` (counts on from start to start). Messages that agree in
  these three are the same event delivered twice; a ``seq`` that is left out was dropped because the spool was full.
- ``availability``: ``online``, and ``offline`` as the broker's last will; retained.
- ``health``: one JSON object a minute; retained.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime import __version__
from edge_runtime.errors import MissingDependencyError, SinkError, UsageError
from edge_runtime.sinks.fanout import Trouble, in_one_line
from edge_runtime.sinks.spool import MAX_BYTES, Spool

if TYPE_CHECKING:
    from edge_runtime.events import Event

IN_FLIGHT = 20
"""Events sent and not yet acknowledged; so many may arrive twice after this process is killed."""

SYNC_S = 1.0
"""While events wait, they are put onto the medium this often: what a power cut can take."""

HEALTH_S = 60.0
KEEPALIVE_S = 30
"""A connection that is silently gone is noticed after one and a half times this."""

RECONNECT_S = (1, 60)
"""First and longest pause before the next attempt to connect; it doubles in between."""

FLUSH_S = 0.2
"""How long closing waits for the broker to acknowledge the last events; the others stay in the spool."""

SETTLED_S = 5.0
"""A new connection that has held so long is said to work, and sends its first health message."""

LONGEST_TOPIC = 1000
DISCOVERY_PREFIX = "homeassistant"

KEEP_STATE = (
    "('None' if this.state in ['unknown', 'unavailable'] else this.state) "
    "if value_json.kind in ['emotion_begin', 'emotion_end']"
)
"""What Home Assistant evaluates to leave a sensor of the newest answer alone: these two tell of a stretch before it."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Broker:
    """Where an MQTT broker is and how to get in.

    Attributes:
        host: name or address.
        port: TCP port; None takes 1883, or 8883 with TLS.
        user: user name.
        password: needs a user name.
        tls: encrypt, and refuse a broker whose certificate does not hold for ``host``.
        ca: PEM file of the authorities to trust with TLS; None takes the system's.

    Raises:
        UsageError: a value that cannot be.

    Example:
        >>> Broker.parse("broker.local:1884").port
        1884
        >>> Broker.parse("[fe80::1]").host
        'fe80::1'
        >>> Broker.parse("broker:port")
        Traceback (most recent call last):
        edge_runtime.errors.UsageError: MQTT broker 'broker:port': valid: HOST, HOST:PORT or [IPV6]:PORT, ...
    """

    host: str
    port: int | None = None
    user: str | None = None
    password: str | None = None
    tls: bool = False
    ca: Path | None = None

    def __post_init__(self) -> None:
        if not self.host or any(character.isspace() or character in "/@" for character in self.host):
            raise UsageError(f"MQTT broker {self.host!r}: valid: a host's name or address")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise UsageError(f"MQTT broker {self.host}: port {self.port}; valid: 1 to 65535")
        if self.password is not None and self.user is None:
            raise UsageError(f"MQTT broker {self.host}: a password needs a user name")
        if self.ca is not None and not self.tls:
            raise UsageError(f"MQTT broker {self.host}: a certificate authority needs TLS")
        if self.ca is not None and not self.ca.is_file():
            raise UsageError(f"{self.ca}: no such file of certificates")

    @classmethod
    def parse(cls, address: str, **options: Any) -> Broker:
        """Return the broker at ``HOST``, ``HOST:PORT`` or ``[IPV6]:PORT``; for the options see the attributes."""
        found = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+))(?::(\d{1,5}))?", address)
        if not found:
            raise UsageError(f"MQTT broker {address!r}: valid: HOST, HOST:PORT or [IPV6]:PORT, port 1 to 65535")
        return cls(found[1] or found[2], int(found[3]) if found[3] else None, **options)


class MqttSink:
    """Sends events to a broker. What it takes is on disk before :meth:`send` returns, and stays until acknowledged.

    A broker that is absent, refuses or goes away is said once and tried again for ever.

    Args:
        broker: where to.
        folder: for the spool and the device's name; one process at a time may use it.
        topic: below which messages go; ``ser-edge/`` and the device's name when None.
        discovery: announce the sensors to Home Assistant.
        health: gives further fields for the health message.
        say: takes a line when the connection begins to fail and when it works again.
        max_bytes: bound of the spool.

    Attributes:
        device: the device's name: its host name and a random part, made once and kept in ``folder``.
        topic: below which messages go.

    Raises:
        MissingDependencyError: paho-mqtt is not installed.
        UsageError: a topic or certificate that cannot be used.
        SinkError: the folder is in use.
        OSError: the folder cannot be used.

    Example:
        >>> sink = MqttSink(Broker("broker.local"), "/var/lib/ser-edge")  # doctest: +SKIP
    """

    def __init__(
        self,
        broker: Broker,
        folder: str | Path,
        *,
        topic: str | None = None,
        discovery: bool = False,
        health: Callable[[], dict[str, Any]] = dict,
        say: Callable[[str], None] = _LOGGER.warning,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.name = f"mqtt {broker.host}"
        paho = _paho()
        context = _tls_context(broker.ca) if broker.tls else None
        if topic is not None:
            _check_topic(topic)
        self._spool = Spool(Path(folder), max_bytes)
        self.device = _device_name(Path(folder) / "device")
        self.topic = f"ser-edge/{self.device}" if topic is None else topic
        self._trouble = Trouble(self.name, say)
        self._discovery = discovery
        self._health = health
        self._boot = os.urandom(8).hex()
        self._started = time.monotonic()
        self._connections = 0
        self._connected = self._answered = False
        self._in_flight: dict[int, int] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._closed = threading.Event()
        self._next_sync = self._next_health = 0.0
        self._client = self._new_client(paho, broker, context)
        threading.Thread(target=self._run, name=f"ser-edge {self.name}", daemon=True).start()
        self._client.loop_start()

    def send(self, event: Event) -> None:
        """Take an event for delivery; raises OSError where it cannot be written to disk, then it is lost."""
        if self._closing.is_set():
            raise SinkError("is closed")
        self._spool.append(json.dumps({**event.to_dict(), "device": self.device, "boot": self._boot}).encode())
        self._inbox.put(self._publish_waiting)

    def close(self) -> None:
        """Wait a moment for the last acknowledgements and say goodbye; what is left is sent after the next start."""
        self._closing.set()
        self._inbox.put(lambda: None)
        self._closed.wait(2 * FLUSH_S)

    # paho calls the next three on its own thread, partly with its locks held: they only pass on what they are told.

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self._inbox.put(lambda: self._refused(str(reason)) if reason.is_failure else self._accepted())

    def _on_disconnect(self, _client: Any, _data: Any, _flags: Any, _reason: Any, _properties: Any) -> None:
        self._inbox.put(self._lost)

    def _on_publish(self, _client: Any, _data: Any, message_id: int, _reason: Any, _properties: Any) -> None:
        self._inbox.put(lambda: self._acknowledged(message_id))

    # The rest runs on the sink's own thread alone.

    def _run(self) -> None:
        while not self._closing.is_set():
            with suppress(queue.Empty):
                self._attempt(self._inbox.get(timeout=SYNC_S))
            self._attempt(self._do_what_is_due)
        self._attempt(self._flush)
        self._attempt(self._spool.close)
        self._attempt(self._say_goodbye)
        self._closed.set()

    def _flush(self) -> None:
        self._publish_waiting()
        deadline = time.monotonic() + FLUSH_S
        with suppress(queue.Empty):
            while self._connected and self._spool.waiting:
                self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))()

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._trouble.is_(in_one_line(error))

    def _accepted(self) -> None:
        self._connected = self._answered = True
        self._connections += 1
        self._next_health = time.monotonic() + SETTLED_S
        self._announce("availability", "online")
        if self._discovery:
            for topic, message in discovery_messages(self.device, self.topic).items():
                self._client.publish(topic, json.dumps(message), retain=True)
        self._publish_waiting()

    def _refused(self, reason: str) -> None:
        self._answered = True
        self._trouble.is_(f"the broker refuses the connection: {reason}")

    def _lost(self) -> None:
        # paho connects again, and then sends again what is in flight.
        if self._connected:
            self._trouble.is_("connection lost")
        elif not self._answered:
            self._trouble.is_("connected, but not to an MQTT broker, or not as it wants (is TLS needed?)")
        self._connected = self._answered = False

    def _publish_waiting(self) -> None:
        while self._connected and len(self._in_flight) < IN_FLIGHT and (found := self._spool.read()) is not None:
            number, record = found
            message = json.dumps({**json.loads(record), "seq": number})
            # Without a connection, or losing it now, paho keeps the message and gives it this identifier all the same.
            self._in_flight[self._client.publish(f"{self.topic}/event", message, qos=1).mid] = number

    def _acknowledged(self, message_id: int) -> None:
        if self._in_flight.pop(message_id, None) is not None:
            self._publish_waiting()
            self._spool.acknowledge(min(self._in_flight.values(), default=self._spool.read_up_to + 1) - 1)

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        if now >= self._next_sync:
            self._next_sync = now + SYNC_S
            self._spool.sync()
        if self._connected and now >= self._next_health:
            self._next_health = now + HEALTH_S
            self._announce("health", json.dumps(self._report()))
            self._trouble.is_over()

    def _report(self) -> dict[str, Any]:
        return {
            "v": 1,
            "device": self.device,
            "boot": self._boot,
            "version": __version__,
            "uptime": round(time.monotonic() - self._started, 1),
            "connections": self._connections,
            "waiting": self._spool.waiting,
            "dropped": self._spool.dropped,
            **self._health(),
        }

    def _announce(self, topic: str, message: str) -> None:
        # With QoS 0, because each new connection says it anew; paho would collect what is not acknowledged.
        self._client.publish(f"{self.topic}/{topic}", message, retain=True)

    def _say_goodbye(self) -> None:
        if self._connected:
            self._announce("availability", "offline")
        else:
            self._closed.set()  # paho may be in the middle of an attempt to connect
        self._client.disconnect()
        self._client.loop_stop()

    def _new_client(self, paho: Any, broker: Broker, context: ssl.SSLContext | None) -> Any:
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, f"ser-edge-{self.device}")
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        client.reconnect = self._saying_why(client.reconnect)
        client.username_pw_set(broker.user, broker.password)
        if context is not None:
            client.tls_set_context(context)
        client.will_set(f"{self.topic}/availability", "offline", qos=1, retain=True)
        client.reconnect_delay_set(*RECONNECT_S)
        client.connect_async(broker.host, broker.port or (8883 if broker.tls else 1883), KEEPALIVE_S)
        return client

    def _saying_why(self, reconnect: Callable[[], Any]) -> Callable[[], Any]:
        """Return paho's method of connecting, which keeps errors to itself, with a report of them."""

        def reconnect_or_say_why() -> Any:
            try:
                return reconnect()
            except Exception as error:
                message = f"cannot connect: {in_one_line(error)}"
                self._inbox.put(lambda: self._trouble.is_(message))
                raise OSError(message) from error  # the only kind after which paho tries again

        return reconnect_or_say_why


def discovery_messages(device: str, topic: str) -> dict[str, dict[str, Any]]:
    """Return what announces the device's sensors to Home Assistant: by topic, the message to retain.

    The emotion and its probability become unknown where audio is lost, rather than stay what they were. See
    https://www.home-assistant.io/integrations/mqtt/#mqtt-discovery.

    Args:
        device: the device's name.
        topic: below which the events are.

    Example:
        >>> messages = discovery_messages("porch pi", "house/porch")
        >>> list(messages)[0]
        'homeassistant/sensor/ser_edge_porch_pi/emotion/config'
        >>> messages["homeassistant/sensor/ser_edge_porch_pi/emotion/config"]["state_topic"]
        'house/porch/event'
    """
    node = f"ser_edge_{re.sub(r'[^A-Za-z0-9_-]', '_', device)}"
    sensors = {
        "emotion": {
            "name": "Emotion",
            "icon": "mdi:account-voice",
            "state_topic": f"{topic}/event",
            "value_template": f"{{{{ {KEEP_STATE} else value_json.label | default('None') }}}}",
            "json_attributes_topic": f"{topic}/event",
        },
        "probability": {
            "name": "Probability",
            "unit_of_measurement": "%",
            "state_topic": f"{topic}/event",
            "value_template": f"{{{{ {KEEP_STATE} else (100 * value_json.probability) | round(1) "
            "if 'probability' in value_json else 'None' }}",
        },
        "waiting": {
            "name": "Undelivered events",
            "entity_category": "diagnostic",
            "state_topic": f"{topic}/health",
            "value_template": "{{ value_json.waiting }}",
        },
    }
    common = {
        "availability_topic": f"{topic}/availability",
        "device": {"identifiers": [node], "name": f"Emotion in speech ({device})", "sw_version": __version__},
        "origin": {"name": "ser-edge", "sw_version": __version__},
    }
    return {
        f"{DISCOVERY_PREFIX}/sensor/{node}/{sensor}/config": {"unique_id": f"{node}_{sensor}", **fields, **common}
        for sensor, fields in sensors.items()
    }


def _paho() -> Any:
    try:
        from paho.mqtt import client, enums  # noqa: F401 (paho 1, which has no enums, is too old)
    except ImportError:
        raise MissingDependencyError("MQTT needs paho-mqtt 2.1 or later; run: pip install 'ser-edge[mqtt]'") from None
    return client


def _tls_context(ca: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise UsageError(f"{ca}: not a PEM file of certificates ({in_one_line(error)})") from None


def _check_topic(topic: str) -> None:
    if not topic or any(character in "+#" or ord(character) < 32 for character in topic) or topic[0] in "/$":
        raise UsageError(
            f"MQTT topic {topic!r}: valid: words joined by '/', none of them '+' or '#', no '/' or '$' first"
        )
    if topic.endswith("/") or len(topic.encode()) > LONGEST_TOPIC:
        raise UsageError(f"MQTT topic {topic!r}: valid: up to {LONGEST_TOPIC} bytes, no '/' at the end")


def _device_name(path: Path) -> str:
    """Return the name in a file, or invent one and keep it there."""
    name = path.read_text().strip() if path.exists() else ""
    if not name:
        host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]
        name = f"{host}-{os.urandom(3).hex()}"
        with path.open("w") as file:
            file.write(f"{name}\n")
            file.flush()
            os.fsync(file.fileno())
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise UsageError(f"{path}: device name {name[:80]!r}; valid: up to 64 letters, digits, '-' and '_'")
    return name
