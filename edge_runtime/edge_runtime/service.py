"""What a service manager wants to know: that we are ready, alive, and when we end. systemd's protocol, by hand.

One datagram a message to the socket that ``NOTIFY_SOCKET`` names (sd_notify(3)); outside a service nothing happens.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType


class ServiceManager:
    """systemd, if it started us with ``Type=notify``.

    Use it as a context manager: on leaving, it says that we are stopping.

    Args:
        alive: asked before every sign of life that ``WatchdogSec`` demands; None is sent while it returns False, and
            systemd starts the service again.
        environment: where ``NOTIFY_SOCKET`` and ``WATCHDOG_USEC`` are looked up.

    Example:
        >>> with ServiceManager(alive=lambda: True, environment={}) as manager:  # not a service: nothing happens
        ...     manager.ready("listening to USB Mic")
    """

    def __init__(self, alive: Callable[[], bool], environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        # An @ stands for the zero byte of Linux's abstract sockets.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        self._alive = alive
        watchdog = environment.get("WATCHDOG_USEC", "")
        # Half of the time that systemd waits, as sd_watchdog_enabled(3) recommends.
        self._interval = int(watchdog) / 2e6 if watchdog.isdecimal() and int(watchdog) else None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._give_signs_of_life, name="ser-edge watchdog", daemon=True)

    def __enter__(self) -> ServiceManager:
        """Begin to give signs of life."""
        if self._socket and self._interval:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say that the service ends."""
        self._stopping.set()
        self._send("STOPPING=1")
        if self._thread.is_alive():
            self._thread.join()
        if self._socket:
            self._socket.close()

    def ready(self, status: str) -> None:
        """Say that the service has started, and in one line what it does (``systemctl status`` shows it)."""
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """Say in one line what the service does now."""
        self._send(f"STATUS={status}")

    def _give_signs_of_life(self) -> None:
        while not self._stopping.wait(self._interval):
            if self._alive():
                self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if self._socket:
            with suppress(OSError):  # a service manager that restarts must not end what it manages
                self._socket.sendto(message.encode(), self._address)
