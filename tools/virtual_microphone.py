"""A microphone without hardware: a private PulseAudio server whose default input hears what is played to it.

Works as root and without D-Bus, systemd or a sound card. Needs the Debian packages ``libportaudio2 pulseaudio
pulseaudio-utils libasound2-plugins``. A program that starts with ``PULSE_SERVER`` set captures the very samples that
:meth:`VirtualMicrophone.play` plays.

    python tools/virtual_microphone.py ser-edge devices
    python tools/virtual_microphone.py --play clip.wav ser-edge listen model.onnx
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

START_SECONDS = 10.0
"""PulseAudio is up in 0.1 s on an idle machine."""

# Without norewinds=1 the null sink works in blocks of 2 s, loses the beginning of a sound and alters samples.
SINK = "module-null-sink sink_name=speaker rate=16000 channels=1 format=s16le norewinds=1"
CONFIGURATION = """\
load-module module-native-protocol-unix socket={folder}/native auth-anonymous=1
load-module {sink}
set-default-sink speaker
set-default-source speaker.monitor
"""


class VirtualMicrophone:
    """A running server; use it as a context manager.

    Attributes:
        environment: what a process needs to reach it: this process's environment and ``PULSE_SERVER``.
        process: the server.

    Raises:
        RuntimeError: on entering: PulseAudio is not installed or does not come up.
    """

    def __enter__(self) -> VirtualMicrophone:
        """Start the server."""
        if not shutil.which("pulseaudio"):
            raise RuntimeError("pulseaudio is not installed (installing pipewire-pulse removes it)")
        self._folder = Path(tempfile.mkdtemp(prefix="virtual-microphone-"))
        self.environment = {**os.environ, "PULSE_SERVER": f"unix:{self._folder}/native"}
        self.start()
        return self

    def start(self) -> None:
        """Start the server; after :meth:`kill` it answers at the same place."""
        folder = str(self._folder)
        configuration = self._folder / "server.pa"
        configuration.write_text(CONFIGURATION.format(folder=folder, sink=SINK))
        private = {
            "HOME": folder,
            "XDG_RUNTIME_DIR": folder,
            "PULSE_RUNTIME_PATH": folder,
            "PULSE_STATE_PATH": folder,
        }
        self.process = subprocess.Popen(
            [
                "pulseaudio",
                "-n",
                "-F",
                configuration,
                "--daemonize=no",
                "--exit-idle-time=-1",
                "--use-pid-file=no",
            ],
            env={**os.environ, **private, "DBUS_SESSION_BUS_ADDRESS": "disabled:"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._await_server()

    def _await_server(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(["pactl", "info"], env=self.environment, capture_output=True, check=False).returncode:
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.close()
                raise RuntimeError("pulseaudio did not come up")
            time.sleep(0.05)

    def play(self, path: str | Path) -> None:
        """Play a 16 kHz mono WAV file into the microphone; returns when it has been played."""
        subprocess.run(["paplay", path], env=self.environment, check=True)

    def unplug(self) -> None:
        """Take the device away from the server."""
        self._pactl("unload-module", "module-null-sink")

    def plug(self) -> None:
        """Give the server its device back."""
        self._pactl("load-module", *SINK.split())
        self._pactl("set-default-source", "speaker.monitor")

    def suspend(self, suspended: bool) -> None:
        """Let the server keep the device and give nothing, or go on."""
        self._pactl("suspend-sink", "speaker", str(int(suspended)))

    def mute(self, muted: bool) -> None:
        """Let the device give zeros, or go on."""
        self._pactl("set-source-mute", "speaker.monitor", str(int(muted)))

    def _pactl(self, *words: str) -> None:
        subprocess.run(["pactl", *words], env=self.environment, check=True, stdout=subprocess.DEVNULL)

    def freeze(self) -> None:
        """Let the server hang: it answers nobody and gives nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Let the server die as if it had crashed."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End the server and remove its files."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the server."""
        self.close()


def main() -> None:
    """Run a command that finds the virtual microphone, and optionally play a file once it had time to start."""
    parser = argparse.ArgumentParser(description="Run a command with a virtual microphone.")
    parser.add_argument("--play", metavar="WAV", help="16 kHz mono file to play after --delay")
    parser.add_argument("--delay", type=float, default=2.0, help="seconds from the command's start to playing")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("no command to run")
    with VirtualMicrophone() as microphone:
        if arguments.play:
            threading.Timer(arguments.delay, microphone.play, [arguments.play]).start()
        sys.exit(subprocess.run(arguments.command, env=microphone.environment, check=False).returncode)


if __name__ == "__main__":
    main()
