"""Live listening: a source and a session, with a thread between them and the application."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edge_runtime.errors import SerError, UsageError, nearest
from edge_runtime.events import SOURCE_KINDS, Event
from edge_runtime.microphone import Microphone
from edge_runtime.recognizer import Recognizer
from edge_runtime.session import Hearing, Session, SessionGroup
from edge_runtime.settings import FIXED, Settings
from edge_runtime.sources import Block, Loss, Source, now, wall_time

EVENTS_WAITING = 1000
"""Events that may wait for a slow application; then inference waits too, and audio it misses is a ``gap`` event."""

LATENCIES = 1000
"""Newest scores whose latency is known; at two a second of speech, those of eight minutes of it."""

DELIVERY_POLL_S = 0.1
"""How often a full queue is tried again, and so how soon :meth:`Listener.close` ends the wait for it."""

SIGNAL_POLL_S = 1.0
"""A wait ends this often to look for signals: one that the system gives to another thread, or that comes just before
the wait, does not end it."""


@dataclass(frozen=True)
class Health:
    """What a listener has been through.

    Attributes:
        uptime: seconds since it began.
        windows: scores taken.
        coalesced: scores left out because inference could not keep up; see :meth:`Session.push`.
        gaps: how often audio was lost while the source was there.
        lost: seconds of audio lost in them.
        outages: how often the source was lost.
        source_lost: why it is lost now, one of :class:`~edge_runtime.events.Reason`; None while it is heard.
        busy: seconds that the newest audio has been worked on so far; 0 while there is none to work on. If this grows,
            inference hangs, or the application takes no events.
        latency_p50: seconds from a block of audio to the scores that it completed; half took no longer. Of the newest
            1000; None before the first.
        latency_p95: so long or less took nineteen of twenty.
        latency_p99: so long or less took ninety-nine of a hundred.

    Example:
        >>> from edge_runtime import AudioFile
        >>> with Listener("model.onnx", source=AudioFile("speech.wav")) as ear:
        ...     events = list(ear)
        >>> ear.health().windows, ear.health().gaps, ear.health().outages
        (6, 0, 0)
    """

    uptime: float
    windows: int
    coalesced: int
    gaps: int
    lost: float
    outages: int
    source_lost: str | None
    busy: float
    latency_p50: float | None
    latency_p95: float | None
    latency_p99: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, ready for JSON; times to the millisecond."""
        return {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in asdict(self).items()
            if value is not None
        }


class Listener:
    """Turns a microphone into events, on a thread of its own.

    A microphone that is absent or lost is waited for, and ``source_lost`` and ``source_restored`` say so, unless
    ``Settings(exit_on_loss=True)``. Inference that cannot keep up leaves out scores, and takes the newest.

    Iterate over it, iterate asynchronously, or give ``on_event``; in all three an error of the source is raised to
    whoever waits: by the iteration, or by :meth:`wait`.

    Args:
        model: an artifact, or one that is loaded; or a list of them, whose events then carry the file's name as
            ``model`` (see :class:`~edge_runtime.session.SessionGroup`).
        settings: the defaults when None; ``Settings(device=...)`` chooses the microphone.
        source: what to listen to instead of a microphone.
        on_event: called with each event, on the listener's thread.

    Raises:
        ArtifactError: the model file is missing or damaged.
        UsageError: on entering a second time.
        DeviceError: with ``exit_on_loss``, no microphone (on entering), or it is lost (while waiting for events).

    Example:
        >>> from edge_runtime import AudioFile
        >>> with Listener("model.onnx", source=AudioFile("speech.wav")) as ear:  # without a source: the microphone
        ...     kinds = [event.kind for event in ear]
        >>> kinds
        ['begin', 'update', 'update', 'update', 'update', 'end']
    """

    def __init__(
        self,
        model: str | Path | Recognizer | Sequence[str | Path | Recognizer],
        settings: Settings | None = None,
        *,
        source: Source | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        several = isinstance(model, (list, tuple))
        models: Sequence[Any] = model if several else [model]  # type: ignore[assignment]
        recognizers = [Recognizer(each) if isinstance(each, (str, Path)) else each for each in models]
        self._settings = settings = settings or Settings()
        self._session = SessionGroup(recognizers, settings) if several else Session(recognizers[0], settings)
        self._rate = recognizers[0].artifact.front_end.sample_rate
        self.source: Source = source or Microphone(settings, self._rate)
        self._updating = threading.Lock()
        self._update_events: list[Event] = []
        self._began = now()
        self._gaps = self._lost = self._outages = 0
        self._source_lost: str | None = None
        self._busy_since: float | None = None
        self._latencies: deque[float] = deque(maxlen=LATENCIES)
        self._events: queue.Queue[Event | None] = queue.Queue(EVENTS_WAITING)
        self._deliver = on_event or self._enqueue
        self._stopping = threading.Event()
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._listen, name="ser-edge listener", daemon=True)

    def __enter__(self) -> Listener:
        """Open the source and begin to listen."""
        if self._thread.ident is not None:
            raise UsageError("a listener listens once; make another: with Listener(model) as ear: ...")
        self._began = now()
        try:
            self.source.open()
        except BaseException:
            self.source.close()
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening; see :meth:`close`."""
        self.close()

    def stop(self) -> None:
        """Let listening end soon: the last events still arrive. For any thread and for signal handlers."""
        self._stopping.set()
        self.source.stop()

    def close(self) -> None:
        """Stop listening and release the source; events nobody took are dropped. For any thread, and twice is fine."""
        self._closing.set()
        self.stop()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def hearing(self) -> Hearing:
        """Return what is heard now. For any thread."""
        return self._session.hearing()

    def health(self) -> Health:
        """Return what happened so far. For any thread."""
        latencies = list(self._latencies)
        p50, p95, p99 = np.percentile(latencies, (50, 95, 99)).tolist() if latencies else (None, None, None)
        return Health(
            uptime=now() - self._began,
            windows=self._session.windows,
            coalesced=self._session.coalesced,
            gaps=self._gaps,
            lost=self._lost / self._rate,
            outages=self._outages,
            source_lost=self._source_lost,
            busy=0.0 if (since := self._busy_since) is None else now() - since,
            latency_p50=p50,
            latency_p95=p95,
            latency_p99=p99,
        )

    @property
    def settings(self) -> Settings:
        """How it listens now."""
        return self._settings

    def update(self, settings: Settings | None = None, **changes: Any) -> None:
        """Listen in another way from now on: between two blocks of audio. For any thread.

        The running speech segment and the active emotion end there; their events come with the next audio. What is
        known of the room stays.

        Args:
            settings: all of them; those of now when None.
            changes: fields that differ from them.

        Raises:
            UsageError: a setting that does not exist, that cannot be, or that cannot change while listening (those of
                the source, ``settings.FIXED``); then nothing changes.
            ArtifactError: ``vad`` is not Silero VAD's model; the same.

        Example:
            >>> from edge_runtime import AudioFile
            >>> with Listener("model.onnx", source=AudioFile("speech.wav")) as ear:
            ...     ear.update(threshold={"anger": 0.8}, gate_margin=12)
        """
        for name in changes:
            if name not in Settings.__dataclass_fields__:
                raise UsageError(f"unknown setting {name!r}; {nearest(name, Settings.__dataclass_fields__)}")
        with self._updating:
            wanted = replace(settings or self._settings, **changes)
            for name in FIXED:
                old, new = getattr(self._settings, name), getattr(wanted, name)
                if old != new:
                    raise UsageError(f"settings: {name} cannot change from {old!r} to {new!r} while listening; restart")
            self._update_events += self._session.update(wanted)
            self._settings = wanted

    def wait(self) -> None:
        """Wait until listening ends; raises the error that ended it. For use with ``on_event``."""
        for _ in self:
            pass

    def __iter__(self) -> Iterator[Event]:
        while (event := self._next()) is not None:
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        import asyncio  # half of the time that this module takes to import; who iterates so has imported it

        while (event := await asyncio.to_thread(self._next)) is not None:
            yield event

    def _next(self) -> Event | None:
        if self._thread.ident is None:
            raise UsageError("the listener is not listening; write: with Listener(model) as ear: ...")
        event = self._wait()
        if event is None:
            self._events.put(None)  # for whoever else waits, now or later
            if self._error is not None:
                raise self._error
        return event

    def _wait(self) -> Event | None:
        while True:
            with suppress(queue.Empty):
                return self._events.get(timeout=SIGNAL_POLL_S)

    def _listen(self) -> None:
        try:
            self._listen_to_source()
        except BaseException as error:
            self._error = error
        finally:
            self.source.close()
            self._end()

    def _listen_to_source(self) -> None:
        try:
            for heard in self.source.blocks():
                self._busy_since = now()
                self._give(self._answer(self._lose if isinstance(heard, Loss) else self._hear, heard))
                self._busy_since = None
        except SerError:
            if self._session.position:  # else nothing was heard, and that is not silence
                self._give(self._answer(self._session.finish))
            raise
        self._give(self._answer(self._session.finish))

    def _answer(self, listen: Callable[..., list[Event]], *heard: Block | Loss) -> list[Event]:
        """Return the events of the last update and of what is heard, which no update may interrupt."""
        with self._updating:
            events, self._update_events = self._update_events, []
            return events + listen(*heard)

    def _lose(self, loss: Loss) -> list[Event]:
        self._outages += 1
        self._source_lost = loss.reason
        return self._session.lose(loss.reason, loss.detail)

    def _hear(self, block: Block) -> list[Event]:
        events: list[Event] = []
        missing = block.position - self._session.position
        if self._source_lost is not None:
            self._source_lost = None
            events = self._session.restore(block.position)
        elif missing:
            self._gaps += 1
            self._lost += missing
            events = self._session.gap(missing, block.gap)
        began, scored = now(), self._session.windows
        events += self._session.push(block.samples, coalesce=self.source.live)
        if self._session.windows > scored:
            self._latencies.append(now() - began)
        return events

    def _give(self, events: list[Event]) -> None:
        for event in events:
            health = self.health().to_dict() if event.kind in SOURCE_KINDS else None
            self._deliver(replace(event, health=health, wall=wall_time()))

    def _enqueue(self, event: Event | None) -> None:
        while not self._closing.is_set():
            with suppress(queue.Full):
                self._events.put(event, timeout=DELIVERY_POLL_S)
                return

    def _end(self) -> None:
        """Tell whoever waits for events that there are no more."""
        self._enqueue(None)
        if self._closing.is_set():
            with self._events.mutex:
                self._events.queue.clear()
            self._events.put(None)
