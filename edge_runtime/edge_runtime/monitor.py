"""What a listener hears, decides and has been through, as one small object that every live view shows.

Nothing is computed before a view asks; until then each event is kept, in the place of the one that it continues.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from edge_runtime.events import Event
from edge_runtime.gate import LOWEST_DB
from edge_runtime.listener import Health, Listener
from edge_runtime.session import Hearing
from edge_runtime.sources import now, wall_time

TIMELINE_S = 300.0
"""How long ago an event may be to be shown still."""

MOST_ENTRIES = 500

CLIPPING_DB = -0.01
"""Peak from which a converter has reached its limit: 0.999 of full scale."""

STRETCHES = {"segment": ("begin", "update", "end"), "emotion": ("emotion_begin", "emotion_end")}
"""Kinds of events that speak of one stretch of the stream, the later of more of it."""

Gate = Literal["waiting", "lost", "closed", "open"]


@dataclass(frozen=True)
class Entry:
    """The newest of what was found about one stretch of the stream, or a message.

    Attributes:
        number: of the stretch or message, in the order in which they began.
        revision: grows with each event and message; no two have the same.
        end: second of the stream up to which it goes, or at which it was said.
        what: an event (for speech, the segment's newest), or what was said.
        wall: when that was, ISO 8601 with the offset from UTC.
    """

    number: int
    revision: int
    end: float
    what: Event | str
    wall: str

    def to_dict(self) -> dict[str, Any]:
        """Return the number, the time, and the ``event`` or the ``message``, ready for JSON."""
        found = {"message": self.what} if isinstance(self.what, str) else {"event": self.what.to_dict()}
        return {"number": self.number, "wall": self.wall, **found}


@dataclass(frozen=True)
class Snapshot:
    """Everything that a view shows, but for the entries. Levels are dBFS.

    Attributes:
        source: what is listened to.
        labels: the model's.
        position: seconds of the stream so far; they go on while the source is lost.
        level: of the newest audio.
        floor: the room's.
        threshold: from which audio may be speech.
        clipping: whether the newest audio reaches full scale.
        gate: ``waiting`` (no audio yet), ``lost`` (the source is), ``closed`` (no speech) or ``open`` (speech).
        reason: why, for people.
        answer: the newest ``begin``, ``update`` or ``end``; None before the first.
        health: what the listener has been through.
        undelivered: by sink, events that did not reach it; those without any are left out.
    """

    source: str
    labels: tuple[str, ...]
    position: float
    level: float
    floor: float
    threshold: float
    clipping: bool
    gate: Gate
    reason: str
    answer: Event | None
    health: Health
    undelivered: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        answer = None if self.answer is None else self.answer.to_dict()
        return {**vars(self), "answer": answer, "health": self.health.to_dict()}


class Monitor:
    """Knows what a listener does now and what it found in the last minutes.

    Args:
        ear: the listener.
        labels: the model's.
        undelivered: by sink, events that did not reach it.
        model: name of the one whose answers are shown as bars, where several listen.

    Example:
        >>> from edge_runtime import AudioFile, Listener
        >>> with Listener("model.onnx", source=AudioFile("speech.wav")) as ear:
        ...     monitor = Monitor(ear, ("anger", "joy"))
        ...     for event in ear:
        ...         monitor.note(event)
    """

    def __init__(
        self,
        ear: Listener,
        labels: tuple[str, ...],
        undelivered: Callable[[], dict[str, int]] = dict,
        model: str | None = None,
    ) -> None:
        self._ear = ear
        self._model = model
        self._labels = labels
        self._undelivered = undelivered
        self._entries: dict[tuple[str, float], Entry] = {}
        self._numbers = self._revision = 0
        self._answer: Event | None = None
        self._outage = ""
        self._lost_at = 0.0
        self._lock = threading.Lock()

    def note(self, event: Event) -> None:
        """Take the listener's next event."""
        stretch = next((name for name, kinds in STRETCHES.items() if event.kind in kinds), event.kind)
        if stretch == "segment" and event.model == self._model:
            self._answer = event
        if event.kind == "source_lost":
            self._outage = event.detail or ""
            self._lost_at = now()
        self._put((f"{stretch} {event.model}", event.start), event.end, event, event.wall or wall_time())

    def say(self, message: str) -> None:
        """Take a message of the program's."""
        self._put((message, self._revision), self._ear.hearing().position, message, wall_time())

    def _put(self, key: tuple[str, float], end: float, what: Event | str, wall: str) -> None:
        with self._lock:
            self._revision += 1
            known = self._entries.get(key)
            if known is None:
                self._numbers += 1
            number = self._numbers if known is None else known.number
            self._entries[key] = Entry(number, self._revision, end, what, wall)
            oldest = next(iter(self._entries))
            while self._entries[oldest].end < end - TIMELINE_S or len(self._entries) > MOST_ENTRIES:
                del self._entries[oldest]
                oldest = next(iter(self._entries))

    def entries(self, after: int = 0) -> list[Entry]:
        """Return what the last minutes gave and is newer than a revision, in the order of beginning."""
        with self._lock:
            return [entry for entry in self._entries.values() if entry.revision > after]

    def snapshot(self) -> Snapshot:
        """Return the state of this moment. For any thread."""
        hearing, health = self._ear.hearing(), self._ear.health()
        gate, reason = _gate(hearing, health.source_lost, self._outage)
        lost_for = now() - self._lost_at if gate == "lost" and self._lost_at else 0.0
        return Snapshot(
            source=self._ear.source.name,
            labels=self._labels,
            position=hearing.position + lost_for,
            level=LOWEST_DB if gate == "lost" else hearing.level,
            floor=hearing.floor,
            threshold=hearing.threshold,
            clipping=hearing.peak >= CLIPPING_DB,
            gate=gate,
            reason=reason,
            answer=self._answer,
            health=health,
            undelivered={name: count for name, count in self._undelivered().items() if count},
        )


def _gate(hearing: Hearing, source_lost: str | None, outage: str) -> tuple[Gate, str]:
    """Say whether audio passes on to the network, and why."""
    if source_lost is not None:
        return "lost", f"{source_lost}: {outage}"
    if hearing.position == 0.0:
        return "waiting", "no audio yet"
    if hearing.pause is None and hearing.digital_silence:
        return "closed", "digital silence: nothing but exact zeros"
    if hearing.pause is None:
        above = hearing.threshold - hearing.floor
        quiet = f"quieter than speech, which begins at {hearing.threshold:.0f} dB, {above:.0f} above the room"
        return "closed", quiet if hearing.level < hearing.threshold else "loud, but no voice"
    if hearing.level >= hearing.threshold:
        return "open", f"speech, {hearing.level - hearing.threshold:.0f} dB more than it needs"
    return "open", f"a pause of {hearing.pause:.1f} s in speech"
