"""Which link is broken between a microphone and an answer: one line and one remedy each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from edge_runtime.bench import bench
from edge_runtime.board import Board, read_board
from edge_runtime.errors import SerError
from edge_runtime.frontend import FloatArray
from edge_runtime.gate import level_db
from edge_runtime.microphone import Microphone, find_device, input_devices
from edge_runtime.settings import Settings
from edge_runtime.sources import SAMPLE_RATE, Loss, now

Verdict = Literal["ok", "warning", "broken"]

LIBRARIES = ("onnxruntime", "ai_edge_litert", "tflite_runtime")
"""Inference libraries, by the names that they are imported by."""

HEAR_S = 3.0
"""Long enough to hear a room, short enough to wait for."""

FAINT_DBFS = -75.0
"""A room with a live microphone is louder: quieter means a muted input or one turned down to nothing."""

RATE_TOLERANCE = 0.05
"""A device that runs at 44.1 kHz where 48 kHz is believed is off by 8 %; no clock of a working one by 1 %."""

CLIPPED = 0.999
CLIPPED_SHARE = 0.001
SEE_DEVICES = "see: ser-edge devices"

HOT_CELSIUS = 80.0
"""A Raspberry Pi slows down from here on."""

BENCH_S = 4.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        check: what was looked at; the same word in every version.
        verdict: ``ok``, ``warning`` (it works, not as it should) or ``broken``.
        found: what was found.
        remedy: what to do; empty when all is well.
    """

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        """Return the finding as one line.

        Example:
            >>> print(Finding("microphone", "broken", "none found", "plug one in"))
            broken   microphone   none found: plug one in
        """
        return f"{self.verdict:<8} {self.check:<12} {self.found}" + (f": {self.remedy}" if self.remedy else "")

    def to_dict(self) -> dict[str, str]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def examine(
    model: str | Path | None = None,
    settings: Settings | None = None,
    *,
    microphone: bool = True,
    board: Callable[[], Board] = read_board,
) -> Iterator[Finding]:
    """Look at everything that must work before an answer comes, in the order in which it is needed.

    A broken link does not end the examination: what does not depend on it is still looked at. The microphone is heard
    for three seconds; what it hears is measured and forgotten.

    Args:
        model: the model file to be run; None leaves it out.
        settings: whose ``device``, ``channel`` and ``hop`` are to be used; the defaults when None.
        microphone: whether one is to be used at all.
        board: reads the board.
    """
    settings = settings or Settings()
    yield _inference_library()
    if model is not None:
        yield _model(model, settings)
    if microphone:
        yield from _microphone(settings)
    yield from _board(board())


def _inference_library() -> Finding:
    found = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    if found:
        return Finding("inference", "ok", ", ".join(found))
    return Finding("inference", "broken", "no inference library", "run: pip install 'ser-edge[onnx]'")


def _model(model: str | Path, settings: Settings) -> Finding:
    try:
        measured = bench(model, settings, BENCH_S)
    except SerError as error:
        return Finding("model", "broken", *_split(error, "copy or export it again"))
    if measured.keeps_up:
        return Finding("model", "ok", f"passes its self-test and {measured.verdict}")
    return Finding("model", "warning", measured.verdict, "see: ser-edge bench")


def _microphone(settings: Settings) -> Iterator[Finding]:
    try:
        device = find_device(settings.device, input_devices())
    except SerError as error:
        yield Finding("microphone", "broken", *_split(error, SEE_DEVICES))
        return
    found = f"{device.index} {device.name!r}, {device.default_rate} Hz"
    if device.default_rate < SAMPLE_RATE:
        yield Finding("microphone", "warning", f"{found}: telephone quality", SEE_DEVICES)
    else:
        yield Finding("microphone", "ok", found)
    # By its number: the name may be that of several.
    heard = _hear(replace(settings, device=device.index, exit_on_loss=True))
    if isinstance(heard, SerError):
        yield Finding("sound", "broken", *_split(heard, SEE_DEVICES))
        return
    samples, rate = heard
    yield judge_rate(rate)
    yield judge_sound(samples)


def _split(error: SerError, otherwise: str) -> tuple[str, str]:
    """Divide an error's line into what was found and what to do."""
    found, _, remedy = str(error).partition("; ")
    return found, remedy or otherwise


def _hear(settings: Settings) -> tuple[FloatArray, float] | SerError:
    """Return the next three seconds of a microphone and how many samples came a second, or why there are none."""
    source = Microphone(settings, SAMPLE_RATE)
    heard: list[FloatArray] = []
    arrived: list[float] = []
    wanted = round(HEAR_S * SAMPLE_RATE)
    try:
        source.open()
        for block in source.blocks():
            if isinstance(block, Loss):
                return SerError(block.detail)
            heard.append(block.samples)
            arrived.append(now())
            wanted -= len(block.samples)
            if wanted <= 0:
                break
    except SerError as error:
        return error
    finally:
        source.close()
    # The slope of a line through all arrivals: one that is late, on a board with other work, hardly turns it.
    counts = np.cumsum([len(samples) for samples in heard])
    rate = float(np.polyfit(np.array(arrived) - arrived[0], counts, 1)[0]) if len(heard) > 1 else float(SAMPLE_RATE)
    return np.concatenate(heard), rate


def judge_rate(rate: float) -> Finding:
    """Say whether as many samples a second come as are asked for.

    Example:
        >>> judge_rate(14700.0).found
        '14700 samples a second instead of 16000'
    """
    if abs(rate / SAMPLE_RATE - 1) <= RATE_TOLERANCE:
        return Finding("rate", "ok", f"{rate:.0f} samples a second")
    found = f"{rate:.0f} samples a second instead of {SAMPLE_RATE}"
    return Finding("rate", "warning", found, "the device's clock or its sound server's rate is wrong, or audio is lost")


def judge_sound(samples: FloatArray) -> Finding:
    """Say whether what a microphone gives can be a room.

    Args:
        samples: float32 (n,) in [-1, 1], n >= 1.

    Example:
        >>> judge_sound(np.zeros(16000, np.float32)).found
        'nothing but digital silence'
    """
    if not samples.any():
        return Finding("sound", "broken", "nothing but digital silence", "unmute it, e.g. with: alsamixer -V capture")
    level = level_db(samples)
    if np.mean(np.abs(samples) >= CLIPPED) > CLIPPED_SHARE:
        return Finding("sound", "warning", f"clipped, at {level:.0f} dBFS", "lower the gain: alsamixer -V capture")
    if level < FAINT_DBFS:
        return Finding("sound", "warning", f"faint, at {level:.0f} dBFS", "raise the gain: alsamixer -V capture")
    return Finding("sound", "ok", f"{level:.0f} dBFS")


def _board(board: Board) -> Iterator[Finding]:
    name = board.model or "unknown board"
    if board.throttled:
        remedy = "use a stronger power supply" if "under-voltage" in board.throttled else "cool the board"
        yield Finding("board", "warning", f"{name}: {', '.join(board.throttled)}", remedy)
    elif board.temperature is not None and board.temperature >= HOT_CELSIUS:
        yield Finding("board", "warning", f"{name}: {board.temperature:.0f} °C", "cool the board")
    elif board.throttled_before:
        since = ", ".join(board.throttled_before)
        yield Finding("board", "warning", f"{name}: {since} since it was started", "check power supply and cooling")
    elif board.governor == "powersave":
        yield Finding("board", "warning", f"{name}: its clock stays low (powersave)", "choose governor ondemand")
    else:
        degrees = "" if board.temperature is None else f", {board.temperature:.0f} °C"
        yield Finding("board", "ok", f"{name}, {board.cores} cores{degrees}")
