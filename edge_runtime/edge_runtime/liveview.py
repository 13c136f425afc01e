"""``ser-edge listen`` on a terminal: level, gate, probabilities, the last events and health, redrawn in place."""

from __future__ import annotations

import os
import re
import signal
import termios
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from textwrap import wrap
from types import TracebackType
from typing import Any

from edge_runtime.monitor import Monitor, Snapshot
from edge_runtime.sinks.lines import text_line

FRAME_S = 0.1
"""Ten frames a second: a meter that moves, on a line that a slow connection bears."""

FRAMES_PER_REPAINT = 20
"""After so many frames everything is drawn anew, for whatever another program wrote over it."""

END_S = 0.2
"""How long a terminal that takes nothing is given to take the end of the view."""

RETRY_S = 0.02
LINES_LEFT = 10
"""Events that stay on the terminal afterwards."""

UNKNOWN_SIZE = os.terminal_size((80, 24))
"""A terminal that does not tell its size, such as a serial line."""

METER_DB = (-80.0, 0.0)
NAME_COLUMNS, VALUE_COLUMNS, BAR_COLUMNS = 12, 13, 60
"""Widest name of a label, what stands beside a bar, and widest bar."""

EVENT_COLUMNS = 50
"""Narrower terminals get events without the blanks that align them."""

LEAST_EVENTS = 3
ROOMY_ROWS = 20
"""Terminals of so many rows get blank lines between the parts."""

HANGS_S = 1.0
"""Work on one block that lasts longer is worth a word."""

ENTER = "\x1b[?1049h\x1b[?25l"
"""Another screen, which leaves what was on the terminal as it is, and no cursor (xterm's control sequences)."""

LEAVE = "\x1b[0m\x1b[?25h\x1b[?1049l"

NORMAL, BOLD, DIM, RED, GREEN = "", "1", "2", "31", "32"
EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")

Line = list[tuple[str, str]]
"""Pieces of a line, each with its style."""


@dataclass(frozen=True)
class Style:
    """What a terminal can show.

    Attributes:
        unicode: more than ASCII.
        colour: colours; bold and dim in any case.
    """

    unicode: bool
    colour: bool

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Style:
        """Return what the locale and ``NO_COLOR`` (no-color.org) say.

        Example:
            >>> Style.of({"LANG": "de_DE.UTF-8", "NO_COLOR": "1"})
            Style(unicode=True, colour=False)
        """
        locale = next((environment[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if environment.get(name)), "")
        return cls(bool(re.search("utf-?8", locale, re.IGNORECASE)), not environment.get("NO_COLOR"))


def is_fit(terminal: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a descriptor is a terminal on which a live view can be drawn: no pipe, and not a dumb one."""
    return os.isatty(terminal) and environment.get("TERM", "dumb") != "dumb" and _in_foreground(terminal)


def _in_foreground(terminal: int) -> bool:
    """Return whether the shell has left the terminal to us; one that is not our session's is nobody else's."""
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return True


def _without_waiting(terminal: int) -> int:
    """Open a terminal once more, so that a write fails where it would wait, and only ours."""
    try:
        return os.open(f"/proc/self/fd/{terminal}", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:  # it belongs to another user, or this is not Linux
        return os.dup(terminal)


class LiveView:
    """Draws on a terminal, on a thread of its own, while it is entered; then the terminal is as it was.

    On leaving, the last events stay as lines. While the program is in the background nothing is drawn.

    Args:
        monitor: what to show.
        terminal: descriptor of the terminal, for which :func:`is_fit`.
        note: last line: how to end, where else to look.
        on_error: called once, on another thread, when the terminal is gone.
        environment: where ``NO_COLOR`` and the locale are looked up.

    Example:
        >>> with LiveView(monitor, 1, "end with Ctrl-C", on_error=print):  # doctest: +SKIP
        ...     for event in ear:
        ...         monitor.note(event)
    """

    def __init__(
        self,
        monitor: Monitor,
        terminal: int,
        note: str,
        on_error: Callable[[Exception], None],
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._monitor = monitor
        self._terminal = terminal
        self._note = note
        self._on_error = on_error
        self._style = Style.of(environment)
        self._shown: list[str] = []
        self._size = os.terminal_size((0, 0))
        self._entered = False
        self._drawing = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ser-edge live view", daemon=True)

    def __enter__(self) -> LiveView:
        """Take the terminal."""
        self._attributes = termios.tcgetattr(self._terminal)
        self._output = _without_waiting(self._terminal)
        self._on_suspend = signal.signal(signal.SIGTSTP, self._suspend)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the terminal back, however slow it is; the last events stay on it."""
        signal.signal(signal.SIGTSTP, self._on_suspend)
        self._ending.set()
        self._thread.join(3 * END_S)
        if not self._thread.is_alive():
            os.close(self._output)
        self._restore_attributes()

    def _run(self) -> None:
        try:
            try:
                self._draw_until_the_end()
            finally:
                self._leave()
            lines = [_printable(line, self._style) for line in self._lines()[-LINES_LEFT:]]
            self._write("".join(f"{line}\n" for line in lines))
        except Exception as error:
            self._on_error(error)

    def _draw_until_the_end(self) -> None:
        frames = 0
        while not self._ending.wait(FRAME_S):
            if _in_foreground(self._terminal):
                with self._drawing:
                    self._draw(anew=frames % FRAMES_PER_REPAINT == 0)
                frames += 1

    def _draw(self, anew: bool) -> None:
        """Write the lines that have changed, or all."""
        begun = ""
        if not self._entered:
            self._keep_keys_away()
            self._entered = True
            begun = ENTER
        size = os.get_terminal_size(self._terminal)
        size = size if all(size) else UNKNOWN_SIZE
        anew = anew or bool(begun) or size != self._size
        lines = screen(self._monitor.snapshot(), self._lines(), self._note, size, self._style)
        changed = [
            f"\x1b[{row + 1};1H{line}\x1b[K" for row, line in enumerate(lines) if anew or line != self._shown[row]
        ]
        self._write(begun + "".join(changed))
        self._shown, self._size = lines, size

    def _lines(self) -> list[str]:
        found = [entry.what for entry in self._monitor.entries()]
        return [f"! {what}" if isinstance(what, str) else text_line(what) for what in found]

    def _write(self, text: str) -> None:
        """Write as the terminal takes it; at the end only for a moment, and instead of what it has not taken."""
        content = text.encode(errors="replace")
        give_up = time.monotonic() + END_S
        while content:
            try:
                content = content[os.write(self._output, content) :]
            except BlockingIOError:
                if self._ending.is_set():
                    if time.monotonic() > give_up:
                        return
                    with suppress(termios.error):
                        termios.tcflush(self._terminal, termios.TCOFLUSH)
                time.sleep(RETRY_S)

    def _leave(self) -> None:
        if self._entered:
            self._write(LEAVE)
            self._entered = False

    def _keep_keys_away(self) -> None:
        """Neither show what is typed nor let Ctrl-S stop the view; Ctrl-C and Ctrl-Z work as ever."""
        changed = list(self._attributes)
        changed[0] &= ~termios.IXON
        changed[3] &= ~termios.ECHO
        with suppress(termios.error):
            termios.tcsetattr(self._terminal, termios.TCSANOW, changed)

    def _restore_attributes(self) -> None:
        with suppress(termios.error):  # the terminal is gone
            if _in_foreground(self._terminal):
                termios.tcsetattr(self._terminal, termios.TCSANOW, self._attributes)
                termios.tcflush(self._terminal, termios.TCIFLUSH)

    def _suspend(self, _signal: int, _frame: Any) -> None:
        """Give the terminal back before Ctrl-Z stops us; once we go on, in the foreground, it is taken again."""
        drawn = self._drawing.acquire(timeout=END_S)  # a terminal that takes nothing must not keep us from stopping
        if drawn:
            with suppress(OSError):
                self._leave()
        self._restore_attributes()
        os.kill(os.getpid(), signal.SIGSTOP)
        if drawn:
            self._drawing.release()


def screen(snapshot: Snapshot, events: list[str], note: str, size: os.terminal_size, style: Style) -> list[str]:
    """Return what to draw: as many lines as the terminal has, with its control sequences for styles.

    Args:
        snapshot: what holds now.
        events: lines, the newest last.
        note: last line.
        size: of the terminal.
        style: what it can show.
    """
    columns = max(1, size.columns - 1)  # what is written into the last column makes some terminals begin a new line
    gap: list[Line] = [[]] if size.lines >= ROOMY_ROWS else []
    head = [_title(snapshot, columns), *gap, _meter(snapshot, columns, style), *_gate(snapshot, columns), *gap]
    foot = [
        *gap,
        *_side_by_side(_health(snapshot), columns),
        *([(DIM, line)] for line in wrap(note, columns, break_on_hyphens=False)),
    ]
    left = max(0, size.lines - len(head) - len(foot))
    found = _answer(snapshot, columns, max(2, left - LEAST_EVENTS), style)
    left -= len(found) + len(gap)
    shown = events[-left:] if left > 0 else []
    if columns < EVENT_COLUMNS:
        shown = [" ".join(line.split()) for line in shown]
    lines = [*head, *found, *gap, *([(NORMAL, line)] for line in shown)]
    lines += [[]] * (size.lines - len(lines) - len(foot))
    return [_drawn(line, columns, style) for line in [*lines, *foot][: size.lines]]


def _title(snapshot: Snapshot, columns: int) -> Line:
    uptime = str(timedelta(seconds=int(snapshot.health.uptime)))
    room = max(0, columns - len("ser-edge  ") - len(uptime) - 1)
    return [(BOLD, "ser-edge  "), (NORMAL, _fit(snapshot.source, room)), (DIM, f" {uptime}")]


def _meter(snapshot: Snapshot, columns: int, style: Style) -> Line:
    low, high = METER_DB
    width = _bar_columns(columns)

    def share(level: float) -> float:
        return min(max((level - low) / (high - low), 0.0), 1.0)

    bar = _bar(share(snapshot.level), width, style)
    mark = min(int(share(snapshot.threshold) * width), width - 1)
    bar = bar[:mark] + ("│" if style.unicode else "|") + bar[mark + 1 :]
    spans = [(NORMAL, _fit("level", _name_columns(columns))), (GREEN, bar), (NORMAL, f" {snapshot.level:4.0f} dB")]
    return [*spans, (RED, " CLIP")] if snapshot.clipping else spans


def _gate(snapshot: Snapshot, columns: int) -> list[Line]:
    colour = {"open": GREEN, "lost": RED}.get(snapshot.gate, NORMAL)
    return [[(colour, line)] for line in wrap(f"gate {snapshot.gate}: {snapshot.reason}", columns)]


def _answer(snapshot: Snapshot, columns: int, rows: int, style: Style) -> list[Line]:
    """Return at most ``rows`` lines: the answer, and the probabilities behind it, the least of them left out."""
    answer = snapshot.answer
    given = {} if answer is None else answer.probabilities or {}
    likely = sorted(snapshot.labels, key=lambda label: -given.get(label, 0.0))[: rows - 1]
    going_on = answer is not None and answer.kind != "end"
    if answer is None:
        title = [(NORMAL, "no answer yet")]
    else:
        age = "now" if going_on else f"{max(0.0, snapshot.position - answer.end):.0f} s ago"
        title = [(NORMAL, f"{age}: "), (BOLD, f"{answer.label} {_percent(answer.probability or 0.0)}")]
    bars: list[Line] = []
    for label in (label for label in snapshot.labels if label in likely):
        top = bool(given) and label == likely[0]
        name = _fit(f"{'> ' if top else '  '}{label}", _name_columns(columns))
        bar = _bar(given.get(label, 0.0), _bar_columns(columns), style)
        emphasis = BOLD if top and going_on else NORMAL if going_on else DIM
        bars.append([(emphasis, f"{name}{bar} {_percent(given.get(label, 0.0)) if given else ''}")])
    return [title, *bars]


def _percent(probability: float) -> str:
    return f"{100 * probability:3.0f} %"


def _health(snapshot: Snapshot) -> list[str]:
    health = snapshot.health
    parts = [f"{health.windows} scores", f"{health.coalesced} left out"]
    if health.latency_p50 is not None and health.latency_p95 is not None:
        parts.append(f"latency {1000 * health.latency_p50:.0f} ms, p95 {1000 * health.latency_p95:.0f} ms")
    parts += [f"{health.gaps} gaps, {health.lost:.1f} s lost", f"{health.outages} outages"]
    parts += [f"{count} undelivered to {sink}" for sink, count in snapshot.undelivered.items()]
    return [*parts, f"busy for {health.busy:.0f} s"] if health.busy > HANGS_S else parts


def _side_by_side(parts: list[str], columns: int) -> Iterator[Line]:
    """Put parts side by side, in as many lines as they need."""
    line = ""
    for part in parts:
        if line and _columns(line) + 3 + _columns(part) > columns:
            yield [(NORMAL, line)]
            line = ""
        line += f"{' | ' if line else ''}{part}"
    yield [(NORMAL, line)]


def _name_columns(columns: int) -> int:
    return min(NAME_COLUMNS, columns // 3) + 1


def _bar_columns(columns: int) -> int:
    return min(BAR_COLUMNS, max(1, columns - _name_columns(columns) - VALUE_COLUMNS))


def _bar(share: float, columns: int, style: Style) -> str:
    """Return a bar, filled by a share in [0, 1], and blanks up to its width.

    Example:
        >>> _bar(0.5, 5, Style(unicode=True, colour=True)), _bar(0.5, 5, Style(unicode=False, colour=True))
        ('██▌  ', '##   ')
    """
    whole, eighths = divmod(round(share * columns * 8), 8)
    filled = "█" * whole + EIGHTHS[eighths] if style.unicode else "#" * whole
    return filled.ljust(columns)


def _drawn(line: Line, columns: int, style: Style) -> str:
    """Return a line with control sequences for its styles, cut to so many columns."""
    drawn = ""
    for look, text in line:
        shown = _cut(_printable(text, style), columns)
        columns -= _columns(shown)
        coloured = style.colour or look in (BOLD, DIM)
        drawn += f"\x1b[{look}m{shown}\x1b[0m" if look and shown and coloured else shown
    return drawn


def _printable(text: str, style: Style) -> str:
    """Replace what a terminal would obey or could not show: names come from files and devices."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if style.unicode else shown.encode("ascii", "replace").decode()


def _columns(text: str) -> int:
    """Return how many columns a text takes.

    Example:
        >>> _columns("joy"), _columns("喜び")
        (3, 4)
    """
    return sum(_width(character) for character in text)


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _cut(text: str, columns: int) -> str:
    """Return as much of a text as so many columns hold."""
    for end, character in enumerate(text):
        columns -= _width(character)
        if columns < 0:
            return text[:end]
    return text


def _fit(text: str, columns: int) -> str:
    """Return a text cut or filled up to so many columns."""
    cut = _cut(text, columns)
    return cut + " " * (columns - _columns(cut))
