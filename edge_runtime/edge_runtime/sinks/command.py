"""A command of the user's for each event."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING

from edge_runtime.errors import SinkError, UsageError

if TYPE_CHECKING:
    from edge_runtime.events import Event

LIMIT_S = 10.0
"""How long a command may take for one event."""


class CommandSink:
    """Runs a command for each event, one after the other, with the event as a line of JSON on its standard input.

    No shell is involved: the line is split as a shell would split it, and an event can never become a command. What
    the command writes goes to our standard error.

    Args:
        command: program and arguments.
        limit: seconds after which the command, with all it started, is killed.
        messages: file descriptor for what the command writes; our standard error when None.

    Raises:
        UsageError: an empty command, an unclosed quotation mark, or a program that does not exist.

    Example:
        >>> from edge_runtime.events import Event
        >>> sink = CommandSink("sh -c 'cat >/dev/null; exit 3'")
        >>> sink.send(Event("no_speech", 0.0, 5.0, label="no_speech"))
        Traceback (most recent call last):
        edge_runtime.errors.SinkError: ended with status 3
    """

    def __init__(self, command: str, limit: float = LIMIT_S, messages: int | None = None) -> None:
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"command {command!r}: {str(error).lower()}") from None
        if not self._words:
            raise UsageError("command '': is empty; name a program")
        if shutil.which(self._words[0]) is None:
            raise UsageError(f"command {command!r}: no program {self._words[0]!r}; give its path or install it")
        self.name = f"command {self._words[0]!r}"
        self._limit = limit
        self._messages = 2 if messages is None else messages
        self._running: subprocess.Popen | None = None
        self._closed = False

    def send(self, event: Event) -> None:
        """Run the command and wait for it.

        Raises:
            SinkError: it ended with another status than 0, or not in time.
            OSError: it cannot be started.
        """
        if self._closed:
            raise SinkError("is closed")
        self._running = process = subprocess.Popen(
            self._words, stdin=subprocess.PIPE, stdout=self._messages, stderr=self._messages, start_new_session=True
        )
        try:
            process.communicate(f"{event.to_json()}\n".encode(), timeout=self._limit)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.wait()
            raise SinkError(f"took longer than {self._limit:g} s and was killed") from None
        if process.returncode:
            raise SinkError(f"ended with status {process.returncode}")

    def close(self) -> None:
        """Kill the command if it runs; twice is fine."""
        self._closed = True
        if self._running is not None and self._running.poll() is None:
            _kill(self._running)


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
