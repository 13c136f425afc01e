"""One stream of events to many sinks, none of which can hold up listening or the others."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from edge_runtime.events import Event


EVENTS_WAITING = 1000
"""Events that may wait for one sink; beyond it the oldest is dropped, or :meth:`Fanout.send` waits."""

PATIENCE_POLL_S = 0.1
"""How soon a :class:`Fanout` that waits for its sinks notices that it is to wait no longer."""

DRAIN_S = 0.5
"""How long sinks may take for what still waits when listening ends."""

_LOGGER = logging.getLogger(__name__)


class Sink(Protocol):
    """Where events go. ``send`` and ``close`` may block and may fail: a :class:`Fanout` bears it.

    Attributes:
        name: what messages call it.
    """

    name: str

    def send(self, event: Event) -> None:
        """Deliver an event; whatever it raises means that the event was not delivered."""

    def close(self) -> None:
        """Release what is held. It may come twice, and from another thread while ``send`` runs, to end that."""


class Trouble:
    """Says that something fails, each way of failing once until it works again, and then that it works again.

    Args:
        name: of what may fail.
        say: takes each message.

    Example:
        >>> trouble = Trouble("mqtt", print)
        >>> for _ in range(3):
        ...     trouble.is_("connection refused")
        mqtt: connection refused; listening goes on
        >>> trouble.is_over()
        mqtt: works again
        >>> trouble.is_over()
    """

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._name = name
        self._say = say
        self._said: set[str] = set()

    def is_(self, message: str) -> None:
        """Say what fails, unless it was said since it last worked."""
        if message not in self._said:
            self._said.add(message)
            self._say(f"{self._name}: {message}; listening goes on")

    def is_over(self) -> None:
        """Say that it works again, if it did not."""
        if self._said:
            self._said.clear()
            self._say(f"{self._name}: works again")


class Fanout:
    """Sends events to sinks, each on a thread of its own with a bounded queue.

    Args:
        sinks: where to; :meth:`add` takes more.
        say: takes a line when a sink begins to fail and when it works again; a logger's warning by default.
        patient: see the attribute.

    Attributes:
        patient: whether :meth:`send` and :meth:`close` wait for slow sinks instead of dropping events. For a recording,
            which waits, too; what is spoken does not. May be set from anywhere, also a signal handler, to end a wait.

    Example:
        >>> from edge_runtime import AudioFile, Listener
        >>> from edge_runtime.sinks import FileSink
        >>> with Fanout([FileSink("events.jsonl")]) as fanout:
        ...     with Listener("model.onnx", source=AudioFile("speech.wav"), on_event=fanout.send) as ear:
        ...         ear.wait()
    """

    def __init__(
        self, sinks: Iterable[Sink] = (), say: Callable[[str], None] = _LOGGER.warning, patient: bool = False
    ) -> None:
        self._say = say
        self.patient = patient
        self._outlets: list[_Outlet] = []
        for sink in sinks:
            self.add(sink)

    def __enter__(self) -> Fanout:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Deliver what waits, for a moment, and close the sinks; see :meth:`close`."""
        self.close()

    def add(self, sink: Sink, on_error: Callable[[Exception], None] | None = None) -> None:
        """Send to one more sink from now on.

        Args:
            sink: closed by :meth:`close`.
            on_error: called on the sink's thread with each error, which then is not said.
        """
        self._outlets.append(_Outlet(sink, Trouble(sink.name, self._say), on_error))

    def send(self, event: Event) -> None:
        """Hand an event to every sink's queue; never fails, and never blocks unless ``patient``."""
        for outlet in self._outlets:
            while self.patient and not outlet.wait_for_place(PATIENCE_POLL_S):
                pass
            outlet.put(event)

    @property
    def dropped(self) -> dict[str, int]:
        """By sink, how many events it was too slow to take or failed to deliver."""
        return {outlet.sink.name: outlet.dropped for outlet in self._outlets}

    def close(self) -> None:
        """Give the sinks half a second for what waits, if ``patient`` all they need, and close them; twice is fine."""
        for outlet in self._outlets:
            outlet.end()
        for outlet in self._outlets:
            while self.patient and not outlet.wait_for_end(PATIENCE_POLL_S):
                pass
        deadline = time.monotonic() + DRAIN_S
        for outlet in self._outlets:
            outlet.join(deadline)


class _Outlet:
    """A sink, its queue and its thread."""

    def __init__(self, sink: Sink, trouble: Trouble, on_error: Callable[[Exception], None] | None) -> None:
        self.sink = sink
        self.dropped = 0
        self._trouble = trouble
        self._on_error = on_error
        self._waiting: deque[Event] = deque()
        self._changed = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name=f"ser-edge {sink.name}", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        with self._changed:
            if len(self._waiting) == EVENTS_WAITING:
                self._waiting.popleft()
                self.dropped += 1
                self._trouble.is_("too slow, the oldest events are dropped")
            self._waiting.append(event)
            self._changed.notify()

    def wait_for_place(self, seconds: float) -> bool:
        """Wait for so long at most; return whether there is one."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._waiting) < EVENTS_WAITING, seconds)

    def wait_for_end(self, seconds: float) -> bool:
        """Wait for so long at most; return whether everything is delivered."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def end(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify()

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self.dropped += len(self._waiting)
            self._waiting.clear()
            self.sink.close()

    def _run(self) -> None:
        while (event := self._next()) is not None:
            try:
                self.sink.send(event)
            except Exception as error:
                self._failed(error)
            else:
                self._trouble.is_over()
        self.sink.close()

    def _next(self) -> Event | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ending)
            self._changed.notify_all()
            return self._waiting.popleft() if self._waiting else None

    def _failed(self, error: Exception) -> None:
        self.dropped += 1
        if self._on_error:
            self._on_error(error)
        else:
            self._trouble.is_(in_one_line(error))


def in_one_line(error: Exception) -> str:
    """Return what is wrong, without the numbers and names that an operating system puts around it.

    Example:
        >>> in_one_line(OSError(28, "No space left on device"))
        'No space left on device'
        >>> in_one_line(KeyError())
        'KeyError'
    """
    described = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(described.split()) or type(error).__name__
