"""Losses that nobody tells of, by the times at which audio arrives."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.events import Reason
from edge_runtime.reception import MOST_HELD_S, Captured, DropoutDetector, Reception


class Arrivals:
    """Frames of 0.1 s at 1 kHz that arrive when the test says."""

    def __init__(self) -> None:
        self.detector = DropoutDetector(rate=1000)
        self.number = 0
        self.missing: list[int] = []
        self.released = 0

    def arrive(self, *times: float) -> None:
        for time in times:
            captured = Captured(time, 100 * self.number, np.zeros((100, 1), np.int16))
            self.number += 1
            for missing, _ in self.detector.push(captured):
                self.missing += [missing] if missing else []
                self.released += 1


def test_a_burst_makes_up_for_a_delay():
    arrivals = Arrivals()
    arrivals.arrive(*np.arange(0.1, 3.0, 0.1), *(5.0 + 0.02 * np.arange(25)), *np.arange(5.5, 8.0, 0.1))
    assert arrivals.missing == []
    assert arrivals.released == arrivals.number


def test_what_a_burst_does_not_make_up_for_is_missing():
    arrivals = Arrivals()
    arrivals.arrive(*np.arange(0.1, 3.05, 0.1), *(6.1 + 0.02 * np.arange(10)), *np.arange(6.4, 9.0, 0.1))
    assert arrivals.missing == [pytest.approx(3000 - 9 * 80, abs=40)]
    assert arrivals.released == arrivals.number


def test_clocks_that_drift_apart_and_late_callbacks_lose_nothing():
    arrivals = Arrivals()
    jitter = np.random.default_rng(0).uniform(0, 0.2, 36000)
    arrivals.arrive(*(np.arange(36000) * 0.1 * 1.001 + jitter))
    assert arrivals.missing == []
    assert arrivals.released == 36000


def test_settling_where_nothing_is_held_loses_nothing():
    arrivals = Arrivals()
    arrivals.arrive(*np.arange(0.1, 3.05, 0.1), *np.arange(5.1, 7.0, 0.1))
    assert arrivals.missing == [pytest.approx(2000, abs=1)]
    assert arrivals.detector.settle() == []
    arrivals.arrive(*np.arange(7.0, 9.0, 0.1))
    assert len(arrivals.missing) == 1


def test_what_waited_for_its_reader_is_late_by_no_more_than_it_must_be():
    frames = np.zeros((100, 1), np.int16)
    detector = DropoutDetector(rate=1000)
    found = [detector.push(Captured(0.1 * number, 100 * number, frames)) for number in range(20)]
    found.append(detector.push(Captured(3.0, 2000, frames, waiting_since=1.9)))
    assert [missing for released in found for missing, _ in released] == [0] * 21
    assert detector.push(Captured(4.0, 2100, frames)) == [], "this one is late for certain"


def test_of_an_endless_burst_the_newest_is_kept():
    detector = DropoutDetector(rate=100)
    frames = np.zeros(100, np.float32)
    detector.push(Captured(1.0, 0, frames))
    for number in range(1, 200):
        assert detector.push(Captured(1000.0 + number / 1000, 100 * number, frames)) == []
    held = detector.settle()
    assert len(held) == MOST_HELD_S + 1
    assert held[-1] == (0, held[-1][1])
    assert held[-1][1].first == 19900
    assert held[0][0] == pytest.approx(100 * (1000.199 - 200), abs=1)


def test_positions_after_a_dropped_burst_are_those_of_the_clock():
    reception = Reception(4000, 0, 4000, np.ravel, Reason.DAMAGED)
    second = np.ones(4000, np.float32)
    assert [block.position for block in reception.convert([Captured(1.0, 0, second)])] == [0]
    for number in range(1, 200):
        assert list(reception.convert([Captured(1000.0 + number / 1000, 4000 * number, second)])) == []
    (burst,) = reception.convert([], last=True)
    assert burst.position + len(burst.samples) == pytest.approx(4000 * 1000.199, abs=1)
    assert (len(burst.samples), burst.gap) == (4000 * (MOST_HELD_S + 1), "dropout")
