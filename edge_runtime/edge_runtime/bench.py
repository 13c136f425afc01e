"""What a model costs on this board: each stage, a second of speech, a second of silence, and a verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.board import Board, read_board, resident_memory
from edge_runtime.frontend import FloatArray, log_mel
from edge_runtime.gate import BLOCK
from edge_runtime.recognizer import Recognizer
from edge_runtime.session import Session
from edge_runtime.settings import Settings

KEEPS_UP = 0.5
"""Share of a core, in speech without a pause, up to which a model may be called safe: the rest is for a hot day, for
the sound server and for whatever the board is there for."""

WARM_UP = 3
CALLS = 30


@dataclass(frozen=True)
class Stage:
    """One kind of work.

    Attributes:
        name: what was done.
        median: milliseconds.
        p95: milliseconds; nineteen of twenty calls took no longer.
        calls: how many were timed.
    """

    name: str
    median: float
    p95: float
    calls: int


@dataclass(frozen=True)
class Bench:
    """What a model costs.

    Attributes:
        load: seconds to open, verify and self-test the file.
        stages: times of single calls.
        speech: CPU seconds for each second of speech without a pause: the real-time factor, and the share of one core.
        silence: the same for a quiet room.
        scores: a second of speech.
        memory: bytes of the process in memory at the end; None where the system does not tell.
        board: as it was at the end.
    """

    load: float
    stages: tuple[Stage, ...]
    speech: float
    silence: float
    scores: float
    memory: int | None
    board: Board

    @property
    def keeps_up(self) -> bool:
        """Whether speech without a pause leaves the core idle for at least half of the time."""
        return self.speech <= KEEPS_UP

    @property
    def verdict(self) -> str:
        """One line for people.

        Example:
            >>> board = read_board(Path("/nowhere"))
            >>> Bench(0.3, (), 0.02, 0.001, 2.0, None, board).verdict
            'keeps up: 2.0 % of one core while someone speaks, 0.1 % in silence'
        """
        share = f"{self.speech:.1%} of one core while someone speaks, {self.silence:.1%} in silence".replace("%", " %")
        if self.keeps_up:
            return f"keeps up: {share}"
        if self.speech < 1:
            return f"barely keeps up: {share}; a longer --hop or a smaller network leaves room"
        return f"too slow: {share}; scores will be left out; take a longer --hop or a smaller network"

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return asdict(self) | {"real_time_factor": self.speech, "keeps_up": self.keeps_up, "verdict": self.verdict}


def bench(model: str | Path, settings: Settings | None = None, seconds: float = 20.0, threads: int = 1) -> Bench:
    """Measure a model on this board.

    Args:
        model: the model file.
        settings: as it would listen; the defaults when None.
        seconds: of speech, and again of silence, to listen to, at least 1; as fast as the board can.
        threads: threads per inference.

    Raises:
        ArtifactError: the file is missing, damaged or fails its self-test.
    """
    began = time.perf_counter()
    recognizer = Recognizer(model, threads)
    load = time.perf_counter() - began
    rate = recognizer.artifact.front_end.sample_rate
    second = _speech(1.0, rate)
    clip = _speech(recognizer.artifact.window_seconds, rate)
    stages = (
        _time("log-Mel of 1 s", lambda: log_mel(second, recognizer.artifact.front_end)),
        _time("a whole window, from samples to probabilities", lambda: recognizer.probabilities(clip)),
    )
    settings = settings or Settings()
    speaking = Session(recognizer, settings)
    speech = _listen(speaking, _speech(seconds, rate)) / seconds
    silence = _listen(Session(recognizer, settings), _room(seconds, rate)) / seconds
    return Bench(load, stages, speech, silence, speaking.windows / seconds, resident_memory(), read_board())


def _time(name: str, call: Callable[[], object]) -> Stage:
    times = []
    for _ in range(WARM_UP + CALLS):
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    counted = times[WARM_UP:]
    return Stage(name, float(np.median(counted)), float(np.percentile(counted, 95)), CALLS)


def _listen(session: Session, samples: FloatArray) -> float:
    """Return the CPU seconds that a stream costs; of this thread and of those that the inference library starts."""
    blocks = _blocks(samples)
    session.push(next(blocks))  # what the first call loads is no running cost
    began = time.process_time()
    for block in blocks:
        session.push(block)
    spent = time.process_time() - began
    session.finish()
    return spent


def _blocks(samples: FloatArray) -> Iterator[FloatArray]:
    return (samples[start : start + BLOCK] for start in range(0, len(samples), BLOCK))


def _speech(seconds: float, rate: int) -> FloatArray:
    """Return voiced syllables, four a second, in a quiet room: to the gate, speech that never pauses."""
    moments = np.arange(round(seconds * rate)) / rate
    voice = sum(np.sin(2 * np.pi * 120 * harmonic * moments) / harmonic for harmonic in range(1, 30))
    syllables = np.maximum(0.0, np.sin(2 * np.pi * 2 * moments + 0.3)) ** 2
    return (0.15 * syllables * voice).astype(np.float32) + _room(seconds, rate)


def _room(seconds: float, rate: int) -> FloatArray:
    """Return the noise of a quiet room, -63 dBFS."""
    return np.random.default_rng(0).normal(0, 0.0007, round(seconds * rate)).astype(np.float32)
