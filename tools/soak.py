"""Days of listening in minutes: nothing grows, nothing drifts, and no number is too large.

    python tools/soak.py                        # two days of stream time: positions beyond 2^31 samples
    python tools/soak.py --days 7 --json

A real listener on a simulated sound system and its clock (``tools/simulated_sound.py``), with a device whose clock is
faster than ours as quartzes are. Somebody speaks three times every 20 s for ten minutes of each hour; every six hours
the microphone is unplugged for a minute. Exit code 1 where an event is wrong, one is missing, audio counts as lost that
was not, or the memory grew by more than :data:`MOST_GROWTH_MB` after the first tenth.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fault_campaign import LOOP_S, UTTERANCES, examine, make_models, resident, talk
from rich.console import Console
from rich.progress import Progress
from simulated_sound import Fault, Samples, SimulatedSound, repeated

from edge_runtime.events import Event
from edge_runtime.listener import Listener
from edge_runtime.recognizer import Recognizer
from edge_runtime.settings import Settings

HOUR_S = 3600.0
TALK_S = 600.0
"""Of each hour, seconds in which somebody speaks."""

OUTAGE_EVERY_S = 6 * HOUR_S
OUTAGE_S = 60.0
"""An outage begins half an hour after the hour, when nobody speaks."""

DRIFT = 5e-5
MOST_GROWTH_MB = 3.0


@dataclass
class Result:
    """What a soak came to.

    Attributes:
        days: of stream time.
        samples: position at the end.
        seconds: that it took.
        memory: resident, MB, after a tenth of it, and at the end.
        events: how many there were of each kind.
        wrong: what should not be, a line each.
    """

    days: float
    samples: int
    seconds: float
    memory: tuple[float, float]
    events: dict[str, int]
    wrong: list[str]


def spoken() -> Callable[[int, int], Samples]:
    """Return what is heard: talk at the beginning of each hour, else the room."""
    talking = talk()
    room = repeated(np.random.default_rng(1).integers(5, 15, 1 << 16).astype(np.int16))
    return lambda position, count: (talking if position / 16000 % HOUR_S < TALK_S else room)(position, count)


def soak(days: float, recognizer: Recognizer, progress: Callable[[float], None] = lambda _done: None) -> Result:
    """Listen for days.

    Args:
        days: of stream time, at least 0.01.
        recognizer: scores.
        progress: called with the seconds heard so far, now and then.
    """
    seconds, began = days * 86400, time.monotonic()
    outages = [at + HOUR_S / 2 for at in np.arange(0, seconds - HOUR_S, OUTAGE_EVERY_S)]
    faults = tuple(Fault("gone", float(at), float(at) + OUTAGE_S) for at in outages)
    counts, wrong, memory = Counter[str](), [], [0.0]
    segment: list[dict[str, Any]] = []

    def hear(event: Event) -> None:
        counts[event.kind] += 1
        segment.append(event.to_dict())
        if event.kind not in {"begin", "update", "source_lost"}:  # else something is to follow
            wrong.extend(examine(segment))
            segment.clear()
            progress(event.end)
        if not memory[0] and event.end > seconds / 10:
            memory[0] = resident()

    with SimulatedSound(spoken(), faults, drift=DRIFT, wakeup=0.5) as sound:
        listener = Listener(recognizer, Settings(hop=2.0), source=sound.microphone(Settings()), on_event=hear)
        sound.at(seconds, listener.stop)
        with listener:
            listener.wait()
    position = listener.source._position  # type: ignore[attr-defined]
    memory.append(resident())
    wrong += _missing(counts, seconds, len(outages), position)
    if memory[1] - memory[0] > MOST_GROWTH_MB:
        wrong.append(f"memory grew from {memory[0]:.1f} to {memory[1]:.1f} MB")
    return Result(days, position, time.monotonic() - began, (memory[0], memory[1]), dict(counts), wrong)


def _missing(counts: Counter[str], seconds: float, outages: int, position: int) -> list[str]:
    """Return which events there should have been, and were not."""
    talking = int(seconds // HOUR_S) * TALK_S + min(seconds % HOUR_S, TALK_S)
    utterances = round(talking / LOOP_S) * len(UTTERANCES)
    expected = {"source_lost": outages, "source_restored": outages, "gap": 0}
    wrong = [f"{counts[kind]} {kind}, expected {number}" for kind, number in expected.items() if counts[kind] != number]
    # One may be cut by the end, and one by each hour's end of talking.
    if abs(counts["end"] - utterances) > 1 + seconds / HOUR_S or counts["end"] != counts["begin"]:
        wrong.append(f"{counts['begin']} begin and {counts['end']} end, expected {utterances} of each")
    if abs(position / 16000 / seconds - 1) > 2 * DRIFT + 1 / seconds:
        wrong.append(f"position {position} after {seconds:.0f} s: {position / 16000 - seconds:+.1f} s off")
    return wrong


def main() -> None:
    """Soak and print what came of it."""
    parser = argparse.ArgumentParser(description="Listen for days of stream time, in minutes.")
    parser.add_argument("--days", type=float, default=2.0)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if not 0.01 <= arguments.days <= 3650:
        parser.error(f"--days {arguments.days:g}; valid: 0.01 to 3650")
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("stream time", total=arguments.days * 86400)
        recognizer = Recognizer(make_models(Path(folder))[1])
        result = soak(arguments.days, recognizer, lambda done: bar.update(task, completed=done))
    if arguments.json:
        print(json.dumps(asdict(result)))
    else:
        grown = f"memory {result.memory[0]:.1f} MB after a tenth, {result.memory[1]:.1f} MB at the end"
        print(f"{result.days:g} days ({result.samples} samples) in {result.seconds:.0f} s, {grown}")
        print(", ".join(f"{number} {kind}" for kind, number in result.events.items()))
    for line in result.wrong:
        print(f"soak: {line}", file=sys.stderr)
    sys.exit(bool(result.wrong))


if __name__ == "__main__":
    main()
