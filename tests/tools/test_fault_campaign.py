"""A few runs of the fault campaign, and that its examination finds what it is there to find."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from fault_campaign import Memory, campaign, compare, examine, left_behind
from mqtt_broker import MOSQUITTO
from simulated_sound import Fault

TOOLS = Path(__file__).parents[2] / "tools"


def test_listening_outlives_what_is_done_to_it_and_tells_the_truth() -> None:
    outcomes = list(campaign(seed=1, runs=6, real=0))
    assert {outcome.kind for outcome in outcomes} == {"microphone", "pipe"}
    assert [(outcome.seed, line) for outcome in outcomes for line in outcome.wrong] == []
    assert sum(len(outcome.faults) for outcome in outcomes) > 15


def test_a_seed_gives_its_run_again() -> None:
    (once,), (again,) = list(campaign(2, 1, 0)), list(campaign(2, 1, 0))
    assert (once.kind, once.faults, once.events) == (again.kind, again.faults, again.events)


@pytest.mark.skipif(
    not shutil.which("pulseaudio") or MOSQUITTO is None, reason="needs pulseaudio, pulseaudio-utils and mosquitto"
)
def test_a_real_sound_server_and_a_real_broker() -> None:
    (outcome,) = campaign(seed=1, runs=1, real=1)
    assert outcome.wrong == []
    assert outcome.events["begin"] >= 2


def test_the_command_prints_a_line_a_run() -> None:
    command = [sys.executable, TOOLS / "fault_campaign.py", "--runs", "2", "--real", "0", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def event(kind: str, start: float, end: float, **more: object) -> dict:
    return {"kind": kind, "start": start, "end": end, **more}


BEGIN, END = event("begin", 1.0, 2.0), event("end", 1.0, 3.0)
LOST, RESTORED = event("source_lost", 4.0, 4.0), event("source_restored", 4.0, 9.0)


@pytest.mark.parametrize(
    ("events", "named"),
    [
        ([BEGIN, event("update", 1.0, 2.5), END, LOST, RESTORED], ""),
        ([BEGIN, BEGIN], "amid a segment"),
        ([END], "without a beginning"),
        ([BEGIN], "never ended"),
        ([LOST, BEGIN, END], "said in an outage"),
        ([LOST, LOST], "said in an outage"),
        ([RESTORED], "nothing was lost"),
        ([LOST, RESTORED, event("no_speech", 8.0, 10.0)], "speaks of audio that was lost"),
        ([event("gap", 4.0, 9.0), event("begin", 8.0, 10.0), event("end", 8.0, 11.0)], "speaks of audio that was lost"),
        ([event("gap", 4.0, 3.0)], "of none"),
        ([event("no_speech", 0.0, 1.0, probabilities={"joy": 0.5, "anger": 0.4})], "probabilities"),
        ([event("no_speech", 0.0, 1.0, probabilities={"joy": float("nan"), "anger": 0.4})], "probabilities"),
    ],
)
def test_a_wrong_stream_of_events_is_named(events: list[dict], named: str) -> None:
    wrong = examine(events)
    assert bool(wrong) == bool(named)
    assert named in "".join(wrong)


HEARD = [event("end", 1.8, 4.9), event("end", 7.8, 10.0), event("end", 12.8, 16.2)]


@pytest.mark.parametrize(
    ("events", "faults", "named"),
    [
        (HEARD, [], ""),
        (HEARD[1:], [], "speech at 2.00 to 4.50 s: nobody heard it"),
        ([*HEARD, event("gap", 24.0, 29.0)], [Fault("stall", 24.0, 29.0)], ""),
        ([*HEARD, event("source_lost", 24.0, 24.0)], [Fault("gone", 24.0, 29.0)], ""),
        (HEARD, [Fault("stall", 24.0, 29.0)], "audio was lost and nobody said so"),
        (HEARD, [Fault("burst", 24.0, 29.0)], ""),
        ([*HEARD, event("end", 26.0, 27.0)], [Fault("gone", 24.0, 29.0)], "speaks of what gone took"),
    ],
)
def test_events_that_disagree_with_what_was_done_are_named(events: list[dict], faults: list, named: str) -> None:
    until = 40.0 if faults else 20.0
    wrong = compare(events, faults, 1.0, 30.0, until)
    assert bool(wrong) == bool(named)
    assert named in "".join(wrong)


def test_a_device_that_is_gone_again_before_it_was_tried_counts_as_gone_from_the_first_time() -> None:
    events = [*HEARD, event("source_lost", 18.0, 18.0)]
    gone, refused = Fault("gone", 18.0, 26.0), Fault("refuse", 27.0, 30.0)
    unheard = ["speech at 42.00 to 44.50 s: nobody heard it"]
    assert compare(events, [gone], 1.0, 30.0, until=50.0) == unheard
    assert compare(events, [gone, refused], 1.0, 30.0, until=50.0) == []
    assert compare(events, [gone, refused], 1.0, 1.0, until=50.0) == unheard


def test_objects_that_runs_leave_behind_are_named() -> None:
    kept: list[dict] = []
    before = Memory.now()
    kept += [{} for _ in range(2000)]
    after = Memory.now()
    assert left_behind(before, after, runs=10) == [f"{after.objects - before.objects} objects left behind by 10 runs"]
    assert left_behind(before, after, runs=100) == []
    assert left_behind(after, before, runs=10) == []
