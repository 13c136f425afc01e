"""What a listening process does to the world, as the kernel sees it: it writes no audio and opens no connection."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from mqtt_broker import MOSQUITTO, MqttBroker
from quick_run import syllables, write_wav
from virtual_microphone import VirtualMicrophone

pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")

CALLS = "open,openat,creat,socket,connect,bind,memfd_create,mkdir,mkdirat,rename,renameat,renameat2,link,mknod"

OF_THE_SOUND_SYSTEM = (
    r"/pulse(-\w+)?(/|$)|/dev/shm/(pulse-shm-|jack)|/jack|\.config/pulse|\.pulse-cookie|^/dev/snd/|^pulseaudio$"
)
"""PulseAudio's and JACK's client libraries, which PortAudio loads, keep a cookie and shared memory of their own."""

BYTECODE = r"__pycache__"


class Traced:
    """``ser-edge listen`` under strace."""

    def __init__(self, folder: Path, *options: object, **streams: object) -> None:
        self._log = folder / "strace.log"
        command = [sys.executable, "-m", "edge_runtime", "listen", *map(str, options)]
        self.process = subprocess.Popen(
            ["strace", "-f", "-qq", "-s", "300", "-e", f"trace={CALLS}", "-o", self._log, *command],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **streams,
        )  # fmt: skip

    def end(self) -> None:
        subprocess.run(["kill", f"-{signal.SIGTERM.value}", self._child()], check=True)
        self.process.communicate(timeout=60)

    def _child(self) -> str:
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return child

    def _calls(self) -> list[str]:
        lines = self._log.read_text(errors="replace").splitlines()
        # A call that another thread's interrupts is told in two lines.
        return [line for line in lines if "resumed>" not in line and " = -1 ENOENT" not in line]

    def written(self) -> set[str]:
        """Return the paths that were opened to be written, made or renamed."""
        found = set()
        for line in self._calls():
            call, *_ = re.findall(r"^\d+ +(\w+)\(", line) or [""]
            paths = re.findall(r'"([^"]*)"', line)
            writes = re.search(r"O_WRONLY|O_RDWR|O_CREAT", line) or call not in {"open", "openat", "socket", "connect"}
            if paths and writes and call != "bind":
                found.update(paths)
        return {path for path in found if not re.search(BYTECODE, path)}

    def reached(self) -> set[str]:
        """Return the sockets connected to or bound: a path, or an address with its port."""
        found = set()
        for line in self._calls():
            if re.search(r"^\d+ +(connect|bind)\(", line):
                path = re.search(r'sun_path=@?"([^"]*)"', line)
                port, address = re.search(r"port=htons\((\d+)\)", line), re.search(r'"([\d.:a-f]+)"', line)
                found.add(path[1] if path else f"{address and address[1]}:{port and port[1]}")
        return found

    def open_to_others(self) -> set[str]:
        """Return the TCP sockets, while it runs, that others could connect to."""
        process = Path(f"/proc/{self._child()}")
        links = {str(entry.readlink()) for entry in (process / "fd").iterdir()}
        rows = [
            row.split() for table in ("tcp", "tcp6") for row in (process / "net" / table).read_text().splitlines()[1:]
        ]
        return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links}


def test_a_recording_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    clip = write_wav(tmp_path / "clip.wav", np.concatenate([syllables(2.0, 150)] * 2))
    traced = Traced(tmp_path, model, clip, "--fast", "--json")
    stdout, _ = traced.process.communicate(timeout=120)
    assert '"end"' in stdout
    assert traced.written() <= {"/dev/null"}
    assert traced.reached() == set()


@pytest.mark.skipif(
    not shutil.which("pulseaudio") or MOSQUITTO is None, reason="needs pulseaudio, pulseaudio-utils and mosquitto"
)
def test_a_microphone_is_heard_and_only_what_was_asked_for_is_written_or_reached(model: Path, tmp_path: Path) -> None:
    clip = write_wav(tmp_path / "clip.wav", syllables(3.0, 150))
    output, spool = tmp_path / "events.jsonl", tmp_path / "spool"
    with VirtualMicrophone() as microphone, MqttBroker() as broker:
        traced = Traced(
            tmp_path, model, "--json", "--output", output, "--mqtt", f"127.0.0.1:{broker.port}", "--mqtt-spool", spool,
            env=microphone.environment,
        )  # fmt: skip
        assert "listening to" in traced.process.stderr.readline()
        microphone.play(clip)
        assert "begin" in traced.process.stdout.readline()
        open_to_others = traced.open_to_others()
        traced.end()
        server = microphone.environment["PULSE_SERVER"].removeprefix("unix:")
    told = {path for path in traced.written() if not path.startswith((str(output), str(spool)))}
    assert {path for path in told if not re.search(OF_THE_SOUND_SYSTEM, path)} <= {"/dev/null"}
    connected = traced.reached()
    assert {server, f"127.0.0.1:{broker.port}"} <= connected
    others = {path for path in connected - {server} if not re.search(OF_THE_SOUND_SYSTEM, path)}
    # paho wakes its own thread through a pair of sockets, which it connects over the loopback, then closed to others.
    pair = {address for address in others if address.startswith("127.0.0.1:")} - {f"127.0.0.1:{broker.port}"}
    assert others - pair - {"0.0.0.0:0"} == {f"127.0.0.1:{broker.port}"}
    assert len(pair - {"127.0.0.1:0"}) <= 1
    assert open_to_others == set()
    # A minute of speech would be two megabytes; a line of JSON has a few hundred bytes.
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path != clip]
    assert sum(path.stat().st_size for path in kept if path.name != "strace.log") < 20_000
    assert b"RIFF" not in b"".join(path.read_bytes() for path in kept)
