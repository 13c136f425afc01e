"""Where events go: one line each, for people or for programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from edge_runtime.events import Event

MARKS = {"begin": ">", "update": ".", "end": "="}


def text_line(event: Event) -> str:
    """Return an event as a line for people.

    Example:
        >>> text_line(Event("end", 1.25, 3.5, label="anger", probability=0.912))
        '     1.25      3.50 s  =  anger         91 %'
        >>> text_line(Event("gap", 3.5, 4.0, reason="overflow"))
        '     3.50      4.00 s  !  gap (overflow)'
    """
    times = f"{event.start:9.2f} {event.end:9.2f} s"
    if event.probability is not None:
        return f"{times}  {MARKS[event.kind]}  {event.label:<12} {event.probability:3.0%}".replace("%", " %")
    if event.reason is not None:
        return f"{times}  !  {event.kind} ({event.reason})"
    return f"{times}  -  {event.label}"


def line_writer(stream: TextIO, as_json: bool) -> Callable[[Event], None]:
    """Return a function that writes each event as a line at once, so that a pipe sees it in time.

    Args:
        stream: where to.
        as_json: JSON lines instead of text.
    """

    def write(event: Event) -> None:
        print(event.to_json() if as_json else text_line(event), file=stream, flush=True)

    return write
