"""Stream time without end: a short soak whose memory is counted, and positions beyond 2^31 samples."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from fault_campaign import LOOP_S, make_models, talk
from simulated_sound import Fault, SimulatedSound
from soak import _missing, soak

from edge_runtime.listener import Listener
from edge_runtime.recognizer import Recognizer
from edge_runtime.settings import Settings

BEYOND_S = 6800 * LOOP_S
"""37.8 hours."""


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory: pytest.TempPathFactory) -> Recognizer:
    return Recognizer(make_models(tmp_path_factory.mktemp("models"))[1])


def test_minutes_leave_no_object_behind(recognizer: Recognizer) -> None:
    soak(0.0005, recognizer)
    tracemalloc.start()
    try:
        result = soak(0.003, recognizer)
        gc.collect()
        after, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The resident memory is that of this whole process, which other tests fill.
    assert [line for line in result.wrong if not line.startswith("memory grew")] == []
    assert result.events["end"] == 39
    assert after < 500_000  # the audio itself is 16 MB; libraries fill caches of their own
    assert most < 5_000_000  # the sound itself, and what a window needs


def ends_after_an_outage(recognizer: Recognizer, outage: float) -> list[dict]:
    """Return the ends in three loops of talk after an outage from the beginning, in seconds from its end."""
    events: list[dict] = []
    settings = Settings(retry=LOOP_S)
    with SimulatedSound(talk(), (Fault("gone", 0.0, outage),)) as sound:
        microphone = sound.microphone(settings)
        listener = Listener(recognizer, settings, source=microphone, on_event=lambda e: events.append(e.to_dict()))
        sound.at(outage + 3 * LOOP_S, listener.stop)
        with listener:
            listener.wait()
    assert [event["kind"] for event in events[:2]] == ["source_lost", "source_restored"]
    return [event | {"start": event["start"] - outage} for event in events if event["kind"] == "end"]


def test_positions_beyond_32_bits_change_no_answer(recognizer: Recognizer) -> None:
    assert BEYOND_S * 16000 > 2**31
    # The microphone is found again as late after both: attempts are LOOP_S apart by then.
    early, late = (ends_after_an_outage(recognizer, outage) for outage in (20 * LOOP_S, BEYOND_S))
    assert len(early) >= 5
    for one, same in zip(late, early, strict=True):
        assert one["start"] == pytest.approx(same["start"], abs=1e-3)
        assert one["label"] == same["label"]
        assert one["probabilities"] == pytest.approx(same["probabilities"], abs=0.01)


@pytest.mark.parametrize(
    ("counts", "position", "named"),
    [
        ({"begin": 90, "end": 90}, 3600 * 16000, ""),
        ({"begin": 80, "end": 80}, 3600 * 16000, "expected 90 of each"),
        ({"begin": 90, "end": 90, "gap": 1}, 3600 * 16000, "1 gap, expected 0"),
        ({"begin": 90, "end": 90}, 3590 * 16000, "-10.0 s off"),
    ],
)
def test_what_is_missing_is_named(counts: dict, position: int, named: str) -> None:
    assert named in "".join(_missing(Counter(counts), 3600.0, 0, position))
    assert bool(_missing(Counter(counts), 3600.0, 0, position)) == bool(named)
