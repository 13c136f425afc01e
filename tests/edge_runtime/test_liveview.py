"""The live view: as a drawing, and through the real command on a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyte
import pytest
from wcwidth import wcswidth

from edge_runtime.events import Event
from edge_runtime.listener import Health
from edge_runtime.liveview import ENTER, LEAVE, Style, screen
from edge_runtime.monitor import Snapshot
from edge_runtime.sinks import text_line

PLAIN = Style(unicode=True, colour=False)
HEALTH = Health(3725.0, 120, 3, 2, 1.25, 1, None, 0.0, 0.012, 0.03, 0.04)
ANSWER = Event("update", 1.0, 3.0, "anger", 0.625, {"anger": 0.625, "joy": 0.25, "neutral": 0.125})
SNAPSHOT = Snapshot(
    "USB Mic", ("anger", "joy", "neutral"), 4.0, -40.0, -61.0, -52.0, False, "open", "speech", ANSWER, HEALTH, {}
)
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def drawn(columns: int = 81, rows: int = 24, style: Style = PLAIN, events: tuple = (), **fields) -> list[str]:
    snapshot = Snapshot(**{**vars(SNAPSHOT), **fields})
    lines = screen(snapshot, list(events), "end with Ctrl-C", os.terminal_size((columns, rows)), style)
    return [CONTROL.sub("", line) for line in lines]


# Drawing


def test_what_is_shown():
    lines = drawn(events=("first", "last"), undelivered={"mqtt": 7})
    assert lines[0].startswith("ser-edge  USB Mic")
    assert lines[0].endswith(" 1:02:05")
    # 54 columns of bar for 80 dB: half of them for -40 dB, and the threshold's mark at -52 dB, 35 % of them.
    assert lines[2] == "level        " + "█" * 18 + "│" + "█" * 8 + " " * 27 + "  -40 dB"
    assert lines[3] == "gate open: speech"
    assert lines[5] == "now: anger  62 %"
    assert lines[6] == "> anger      " + "█" * 33 + "▊" + " " * 20 + "  62 %"
    assert lines[7] == "  joy        " + "█" * 13 + "▌" + " " * 40 + "  25 %"
    assert lines[10:12] == ["first", "last"]
    assert " ".join(lines[-4:]).split(" | ") == [
        " 120 scores",
        "3 left out",
        "latency 12 ms, p95 30 ms",
        "2 gaps, 1.2 s lost 1 outages",
        "7 undelivered to mqtt end with Ctrl-C",
    ]


def test_an_answer_that_is_over_says_how_old_it_is():
    assert drawn(answer=Event(**{**vars(ANSWER), "kind": "end"}), position=15.2)[5] == "12 s ago: anger  62 %"
    assert drawn(answer=None)[5] == "no answer yet"


def test_clipping_is_said_in_words():
    assert " CLIP" in drawn(clipping=True)[2]
    assert " CLIP" not in drawn()[2]


@pytest.mark.parametrize("columns", [1, 2, 7, 20, 39, 60, 200])
@pytest.mark.parametrize("rows", [1, 2, 6, 11, 24, 80])
@pytest.mark.parametrize("style", [PLAIN, Style(unicode=False, colour=True)])
def test_it_fits_on_every_terminal(columns, rows, style):
    labels = tuple(f"label {number} 喜び" for number in range(12))
    given = Event("end", 1.0, 3.0, labels[11], 0.5, dict.fromkeys(labels, 1 / 12) | {labels[11]: 0.5})
    lines = drawn(
        columns, rows, style, events=tuple(f"event {n}" for n in range(99)), labels=labels, answer=given,
        source="microphone " * 9, reason="because " * 20, undelivered={"a broker far away": 12},
    )  # fmt: skip
    assert len(lines) == rows
    assert all(wcswidth(line) < max(columns, 2) for line in lines)
    if rows >= 24 and columns >= 39:
        assert any("50 %" in line for line in lines), "the answer is there"
        assert any("event 98" in line for line in lines), "and the newest event"
        assert "event 97" in " ".join(lines)


def test_where_rows_are_few_the_least_probable_labels_are_left_out():
    lines = drawn(60, 10)
    assert any(line.startswith("> anger") for line in lines)
    assert not any("neutral" in line for line in lines)


def test_names_cannot_command_the_terminal():
    lines = screen(
        Snapshot(**{**vars(SNAPSHOT), "source": "\x1b[2Jmicrophone\r\x07", "labels": ("a\x1b]0;x\x07",)}),
        ["\x1b[31m"], "", os.terminal_size((80, 24)), Style(unicode=True, colour=True),
    )  # fmt: skip
    rest = re.sub(r"\x1b\[(1|2|31|32|0)m", "", "".join(lines).replace("?[31m", ""))
    assert rest.isprintable()


@pytest.mark.parametrize(
    ("environment", "unicode"),
    [
        ({"LANG": "en_GB.UTF-8"}, True),
        ({"LANG": "en_GB.UTF-8", "LC_ALL": "C"}, False),
        ({"LANG": "C", "LC_CTYPE": "C.utf8"}, True),
        ({"LANG": "de_DE.ISO-8859-1"}, False),
        ({}, False),
    ],
)
def test_the_locale_decides_on_unicode(environment, unicode):
    assert Style.of(environment).unicode is unicode
    lines = drawn(style=Style.of(environment), source="Mikrofon für alle")
    assert "".join(lines).isascii() is not unicode


# The command on a terminal


def start_on(slave: int, script: str, *words: object, stdin: int | None = None, **environment) -> subprocess.Popen:
    """Run a shell's script as the leader of a session, whose terminal is the one that it opens first."""
    return subprocess.Popen(
        ["sh", "-c", f": <{os.ttyname(slave)}; {script}", *map(str, words)],
        stdin=slave if stdin is None else stdin, stdout=slave, stderr=slave, start_new_session=True,
        env={**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8", **environment},
    )  # fmt: skip


class Terminal:
    """``ser-edge`` on a pseudo-terminal, which a terminal emulator reads."""

    def __init__(self, *arguments, rows=24, columns=80, reading=True, stdin=None, before="", environment=None):
        self.master, self.slave = os.openpty()
        self.screen = pyte.Screen(columns, rows)
        self.resize(columns, rows)
        self.before = termios.tcgetattr(self.slave)
        self.content = b""

        self.process = start_on(
            self.slave, f'{before} exec "$0" -m edge_runtime listen "$@"', sys.executable, *arguments,
            stdin=stdin, **(environment or {}),
        )  # fmt: skip
        self._emulator = pyte.ByteStream(self.screen)
        self._thread = threading.Thread(target=self._read, daemon=True)
        if reading:
            self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for descriptor in (self.slave, self.master):
            with suppress(OSError):
                os.close(descriptor)

    def _read(self) -> None:
        with suppress(OSError):
            while content := os.read(self.master, 65536):
                self.content += content
                self._emulator.feed(content)

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def wait_until(self, condition, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain; the screen is\n{self}"
            time.sleep(0.02)

    def shows(self, *texts: str) -> None:
        self.wait_until(lambda: all(text in str(self) for text in texts))

    def end(self) -> str:
        """Wait for the end; return what was written after the view was left."""
        self.process.wait(30)
        self.wait_until(self._is_drained)
        return self.content.decode().rpartition(LEAVE)[2].replace("\r\n", "\n")

    def _is_drained(self) -> bool:
        before = len(self.content)
        time.sleep(0.1)
        return len(self.content) == before

    @property
    def attributes(self) -> list:
        return termios.tcgetattr(self.slave)

    def __str__(self) -> str:
        return "\n".join(self.screen.display)


@pytest.fixture(scope="module")
def talk(tmp_path_factory, speech, room, write_wav) -> Path:
    """Two utterances in a minute that is else quiet."""
    samples = np.concatenate([room(0.5), speech(1.5), room(1.2, seed=1), speech(1.5, seed=2), room(55.0, seed=3)])
    return write_wav(tmp_path_factory.mktemp("talk") / "talk.wav", samples)


def test_it_shows_what_is_heard_and_ctrl_c_gives_the_terminal_back(model, recognizer, talk):
    with Terminal(model, talk) as terminal:
        terminal.shows("ser-edge  ", "gate closed: quieter than speech", "no answer yet", "0 scores")
        terminal.shows("gate open: speech", "now: ")
        assert not terminal.attributes[3] & termios.ECHO
        terminal.shows("s ago: ", *(f" {label} " for label in recognizer.artifact.labels), " =  ", "latency")
        terminal.type(b"\x03")
        left = terminal.end()
        assert terminal.process.returncode == 0
        assert terminal.attributes == terminal.before
    assert terminal.content.count(ENTER.encode()) == terminal.content.count(LEAVE.encode()) == 1
    (line,) = left.splitlines()
    assert re.fullmatch(r" +0\.\d\d +\d\.\d\d s  =  \w+ +\d+ %", line)


def test_the_answers_that_stay_are_those_of_the_recording(model, recognizer, tmp_path, speech, write_wav):
    clip = write_wav(tmp_path / "clip.wav", speech(1.6))
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", "listen", str(model), str(clip), "--fast"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    with Terminal(model, clip) as terminal:
        left = terminal.end()
    assert left.splitlines() == [line for line in done.stdout.splitlines() if "  =  " in line]


def test_raw_samples_from_a_pipe(model, speech):
    reading, writing = os.pipe()
    with Terminal(model, "-", stdin=reading) as terminal, os.fdopen(writing, "wb") as pipe:
        os.close(reading)
        terminal.shows("ser-edge  standard input", "gate waiting: no audio yet")
        pipe.write((32767 * speech(2.1)).astype("<i2").tobytes())
        pipe.flush()
        terminal.shows("gate open", "now: ")
        pipe.close()
        assert "  =  " in terminal.end()
        assert terminal.process.returncode == 0
        assert terminal.attributes == terminal.before


def test_it_follows_the_size_of_the_terminal(model, talk):
    with Terminal(model, talk, rows=30, columns=100) as terminal:
        terminal.shows("s ago: ")
        assert terminal.screen.display[29].rstrip() == "end with Ctrl-C"
        terminal.resize(44, 16)
        terminal.wait_until(lambda: terminal.screen.display[15].rstrip() == "end with Ctrl-C")
        terminal.shows("ser-edge  ", "gate closed", "s ago: ")
        terminal.resize(100, 30)
        terminal.wait_until(lambda: terminal.screen.display[29].rstrip() == "end with Ctrl-C")
        terminal.wait_until(lambda: str(terminal).count("Ctrl-C") == 1)
        terminal.type(b"\x03")
        terminal.end()


def test_sigterm_ends_it_though_the_terminal_takes_nothing(model, talk):
    with Terminal(model, talk, reading=False) as terminal:
        terminal.wait_until(
            lambda: struct.unpack("i", fcntl.ioctl(terminal.master, termios.FIONREAD, bytes(4)))[0] > 300
        )
        stuck = os.open(os.ttyname(terminal.slave), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
        with suppress(BlockingIOError):
            while True:
                os.write(stuck, bytes(1024))
        os.close(stuck)
        time.sleep(0.5)  # frames that find no room
        terminal.process.terminate()
        assert terminal.process.wait(10) == 0
        assert terminal.attributes == terminal.before
        os.set_blocking(terminal.master, False)
        with suppress(BlockingIOError):
            while True:
                terminal.content += os.read(terminal.master, 65536)
        assert LEAVE.encode() in terminal.content


def test_ctrl_s_does_not_stop_it(model, talk):
    with Terminal(model, talk) as terminal:
        terminal.shows("gate")
        terminal.type(b"\x13")
        terminal.shows("gate open")
        terminal.process.terminate()
        terminal.end()
        assert terminal.process.returncode == 0
        assert terminal.content.count(LEAVE.encode()) == 1


def test_an_error_is_said_on_the_terminal_as_it_was(model):
    reading, writing = os.pipe()
    with Terminal(model, "-", "--digital-silence", 1, "--exit-on-loss", stdin=reading) as terminal:
        os.close(reading)
        terminal.shows("gate waiting")
        os.write(writing, bytes(64000))
        assert terminal.end().splitlines()[-1].startswith("ser-edge: standard input has given nothing but zeros for")
        assert terminal.process.returncode == 1
        assert terminal.attributes == terminal.before
    os.close(writing)


def test_a_lost_source_is_shown_and_messages_do_not_spoil_the_screen(model):
    reading, writing = os.pipe()
    with Terminal(model, "-", "--stall", 0.5, stdin=reading) as terminal:
        terminal.shows("gate lost: stalled: standard input has given nothing", "! standard input has given nothing")
        os.write(writing, np.full(8000, 100, "<i2").tobytes())
        terminal.shows("! hears standard input again", "1 outages")
        os.close(reading)
        os.close(writing)
        assert "! hears standard input again" in terminal.end()


def test_a_terminal_that_hangs_up_ends_listening(model, talk):
    with Terminal(model, talk, before="trap '' HUP;") as terminal:
        terminal.shows("gate")
        os.close(terminal.slave)
        os.close(terminal.master)
        assert terminal.process.wait(30) > 0


def test_ctrl_z_gives_the_terminal_back_until_the_program_goes_on(model, talk):
    with Terminal(model, talk) as terminal:
        terminal.shows("gate")
        terminal.type(b"\x1a")
        os.waitpid(terminal.process.pid, os.WUNTRACED)
        terminal.wait_until(lambda: terminal.content.endswith(LEAVE.encode()))
        assert terminal.attributes == terminal.before
        os.kill(terminal.process.pid, signal.SIGCONT)
        terminal.wait_until(lambda: terminal.content.count(ENTER.encode()) == 2)
        terminal.type(b"\x03")
        terminal.end()
        assert terminal.process.returncode == 0
        assert terminal.attributes == terminal.before


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        (["--plain"], {}),
        (["--json"], {}),
        (["--fast"], {}),
        (["--exec", "cat"], {}),
        ([], {"TERM": "dumb"}),
        ([], {"TERM": ""}),
    ],
)
def test_lines_where_a_live_view_is_not_wanted_or_not_possible(
    model, tmp_path, speech, write_wav, options, environment
):
    clip = write_wav(tmp_path / "clip.wav", speech(1.0))
    with Terminal(model, clip, *options, environment=environment) as terminal:
        said = terminal.end()
        assert terminal.process.returncode == 0
    assert "\x1b" not in said
    assert '"end"' in said if {"--json", "--exec"} & set(options) else "  =  " in said


def test_nothing_is_drawn_in_the_background(model, tmp_path, speech, write_wav):
    clip = write_wav(tmp_path / "clip.wav", speech(1.0))
    master, slave = os.openpty()
    shell = start_on(slave, 'set -m; "$0" -m edge_runtime listen "$@" & wait', sys.executable, model, clip)
    assert shell.wait(30) == 0
    said = os.read(master, 65536).decode()
    os.close(slave)
    os.close(master)
    assert "  =  " in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("environment", "ascii_only", "coloured"),
    [({"LC_ALL": "C"}, True, True), ({"NO_COLOR": "1"}, False, False)],
)
def test_plain_characters_and_no_colours_where_asked_for(model, talk, environment, ascii_only, coloured):
    with Terminal(model, talk, environment=environment) as terminal:
        terminal.shows("gate open")
        assert str(terminal).isascii() is ascii_only
        assert (b"\x1b[32m" in terminal.content) is coloured
        terminal.type(b"\x03")
        terminal.end()


def test_lines_and_the_view_call_events_the_same():
    assert text_line(ANSWER) in drawn(events=(text_line(ANSWER),))
