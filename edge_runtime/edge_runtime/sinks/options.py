"""The sinks' options of ``ser-edge listen``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edge_runtime.errors import UsageError
from edge_runtime.sinks.command import LIMIT_S, CommandSink
from edge_runtime.sinks.fanout import Sink
from edge_runtime.sinks.lines import KEEP, ROTATE_BYTES, FileSink

PASSWORD_VARIABLE = "SER_EDGE_MQTT_PASSWORD"


def add_sink_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where events go beside standard output."""
    lines = parser.add_argument_group("events to a file")
    lines.add_argument("--output", metavar="FILE", help="append them as lines of JSON")
    lines.add_argument(
        "--rotate-mb", metavar="N", type=float, help=f"begin a new file at this size (default {ROTATE_BYTES / 1e6:g})"
    )
    lines.add_argument("--keep", metavar="K", type=int, help=f"old files to keep, FILE.1 and on (default {KEEP})")

    command = parser.add_argument_group("events to a command")
    command.add_argument(
        "--exec", metavar="CMD", help=f"run it for each event, JSON on its standard input, for at most {LIMIT_S:g} s"
    )

    mqtt = parser.add_argument_group("events to an MQTT broker")
    mqtt.add_argument("--mqtt", metavar="HOST[:PORT]", help="the broker (port 1883, or 8883 with TLS)")
    mqtt.add_argument("--mqtt-topic", metavar="T", help="send to T/event, T/availability and T/health")
    mqtt.add_argument("--mqtt-user", metavar="U", help=f"user name; the password is in ${PASSWORD_VARIABLE}")
    mqtt.add_argument("--mqtt-password-file", metavar="FILE", help="or is the first line of a file")
    mqtt.add_argument("--mqtt-tls", action="store_true", help="encrypt, and check the broker's certificate")
    mqtt.add_argument("--mqtt-ca", metavar="FILE", help="authorities to trust, PEM (default: the system's)")
    mqtt.add_argument("--mqtt-discovery", action="store_true", help="announce the sensors to Home Assistant")
    mqtt.add_argument("--mqtt-spool", metavar="DIR", help="keep undelivered events here (default: the state directory)")


def open_sinks(
    arguments: argparse.Namespace, say: Callable[[str], None], health: Callable[[], dict[str, Any]]
) -> Iterator[Sink]:
    """Open the sinks that are asked for, one after the other.

    Args:
        arguments: parsed by a parser that :func:`add_sink_options` was given.
        say: takes a line when a sink begins to fail and when it works again.
        health: further fields of the MQTT health message.

    Raises:
        SerError: an option that cannot be, a folder in use, paho-mqtt missing.
        OSError: a file or folder that cannot be used.
    """
    _refuse_options_alone(arguments, "output", ["rotate_mb", "keep"])
    mqtt_options = [name for name in vars(arguments) if name.startswith("mqtt_")]
    _refuse_options_alone(arguments, "mqtt", mqtt_options)
    _refuse_options_alone(arguments, "mqtt_user", ["mqtt_password_file"])
    _refuse_options_alone(arguments, "mqtt_tls", ["mqtt_ca"])
    if arguments.output:
        yield _file_sink(arguments)
    if arguments.exec is not None:
        # A copy, because the original is taken away from the libraries that write to it unasked.
        yield CommandSink(arguments.exec, messages=os.dup(2))
    if arguments.mqtt is not None:
        yield _mqtt_sink(arguments, say, health)


def _refuse_options_alone(arguments: argparse.Namespace, needed: str, options: list[str]) -> None:
    for option in options:
        if getattr(arguments, option) not in (None, False) and not getattr(arguments, needed):
            raise UsageError(f"{_flag(option)} is given without {_flag(needed)}; give both or none")


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _file_sink(arguments: argparse.Namespace) -> FileSink:
    megabytes = ROTATE_BYTES / 1e6 if arguments.rotate_mb is None else arguments.rotate_mb
    if not 1e-3 <= megabytes <= 1e6:
        raise UsageError(f"--rotate-mb is {megabytes:g}; valid: 0.001 to 1000000")
    return FileSink(arguments.output, round(megabytes * 1e6), KEEP if arguments.keep is None else arguments.keep)


def _mqtt_sink(arguments: argparse.Namespace, say: Callable[[str], None], health: Callable[[], dict[str, Any]]) -> Sink:
    from edge_runtime.sinks.mqtt import Broker, MqttSink

    broker = Broker.parse(
        arguments.mqtt,
        user=arguments.mqtt_user,
        password=_password(arguments),
        tls=arguments.mqtt_tls,
        ca=Path(arguments.mqtt_ca) if arguments.mqtt_ca else None,
    )
    return MqttSink(
        broker,
        Path(arguments.mqtt_spool) if arguments.mqtt_spool else _state_directory() / "mqtt",
        topic=arguments.mqtt_topic,
        discovery=arguments.mqtt_discovery,
        health=health,
        say=say,
    )


def _password(arguments: argparse.Namespace) -> str | None:
    """Return the password, which no option takes because everyone on the machine can read a command line."""
    if not arguments.mqtt_password_file:
        return os.environ.get(PASSWORD_VARIABLE) if arguments.mqtt_user else None
    try:
        with Path(arguments.mqtt_password_file).open(encoding="utf-8") as file:
            return file.readline().rstrip("\r\n")
    except UnicodeDecodeError:
        raise UsageError(f"{arguments.mqtt_password_file}: not a password; it is to be the first line, UTF-8") from None


def _state_directory() -> Path:
    """Return the folder that systemd gives a service, or the one the XDG specification gives a user."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ser-edge"
