from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edge_runtime.service import ServiceManager

SER_EDGE = str(Path(sys.executable).with_name("ser-edge"))


class FakeSystemd:
    """The socket that systemd listens on."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(20)

    def receive(self) -> str:
        return self.socket.recv(4096).decode()

    def receive_until(self, last: str) -> set[str]:
        told = {self.receive()}
        while last not in told:
            told.add(self.receive())
        return told


@pytest.fixture(params=["path", "abstract"])
def address(request, tmp_path) -> str:
    return str(tmp_path / "notify") if request.param == "path" else f"@ser-edge-{os.getpid()}-{tmp_path.name}"


def test_start_signs_of_life_and_end(address):
    systemd = FakeSystemd(address)
    environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "40000"}
    with ServiceManager(lambda: True, environment) as manager:
        manager.ready("listening")
        told = {systemd.receive() for _ in range(3)}
    assert told == {"READY=1\nSTATUS=listening", "WATCHDOG=1"}
    assert systemd.receive_until("STOPPING=1") <= {"WATCHDOG=1", "STOPPING=1"}


def test_a_hung_service_gives_no_sign_of_life(tmp_path):
    systemd = FakeSystemd(str(tmp_path / "notify"))
    asked = threading.Event()

    def hung() -> bool:
        asked.set()
        return False

    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "20000"}
    with ServiceManager(hung, environment) as manager:
        assert asked.wait(20)
        manager.status("still here")
    assert [systemd.receive(), systemd.receive()] == ["STATUS=still here", "STOPPING=1"]


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "/nowhere/at/all"}])
def test_nobody_to_tell_is_no_error(environment):
    with ServiceManager(lambda: True, environment | {"WATCHDOG_USEC": "0"}) as manager:
        manager.ready("listening")


def test_the_command_tells_systemd(model, tmp_path, write_wav, speech):
    systemd = FakeSystemd(str(tmp_path / "notify"))
    environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
    clip = write_wav(tmp_path / "clip.wav", speech(30.0))
    process = subprocess.Popen(
        [SER_EDGE, "listen", model, clip], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        assert systemd.receive().startswith("READY=1\nSTATUS=listening to ")
        assert systemd.receive() == "WATCHDOG=1"
        process.send_signal(signal.SIGTERM)
        assert systemd.receive_until("STOPPING=1") <= {"WATCHDOG=1", "STOPPING=1"}
        assert process.wait(20) == 0
    finally:
        process.kill()
