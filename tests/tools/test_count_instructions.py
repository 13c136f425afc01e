"""The budget of instructions: what is off it is named. Counting itself is tested with the emulated board."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from arm_root import PROCESSORS
from count_instructions import BUDGET, LISTENING, QUICK, off_budget
from random_networks import KINDS

from sertool.networks import NETWORKS

WRITTEN = json.loads(BUDGET.read_text(encoding="utf-8"))


def test_the_budget_holds_every_library_and_precision_on_every_processor() -> None:
    """Of a network all or, where no test counts it and nobody has yet, nothing."""
    for network in NETWORKS:
        written = {name for name in WRITTEN["calls"] if name.startswith(f"{network} ")}
        if written or network in QUICK:
            assert written == {f"{network} {kind} {cpu}" for kind in KINDS for cpu in PROCESSORS}
    files = [f"{network} {file}" for network, files in LISTENING.items() for file in files]
    assert set(WRITTEN["listening"]) == {f"{file} {cpu}" for file in files for cpu in PROCESSORS}


@pytest.mark.parametrize(("change", "named"), [(1.0, False), (1.029, False), (1.031, True), (0.969, True)])
@pytest.mark.parametrize(
    ("section", "what"),
    [("calls", "window"), ("calls", "hop"), ("calls", "two_hops"), ("listening", "silence"), ("listening", "speech")],
)
def test_more_than_three_percent_either_way_are_named(section: str, what: str, change: float, named: bool) -> None:
    counted = copy.deepcopy(WRITTEN) | {"versions": {"numpy": "9"}}
    name = next(iter(counted[section]))
    counted[section][name][what] = round(counted[section][name][what] * change)
    lines = off_budget(counted)
    assert [line.split(":")[0] for line in lines[:1]] == ([name] if named else [])
    assert not named or (what in lines[0] and "--update" in lines[-1] and "'numpy': '9'" in lines[-2])


def test_a_file_that_only_one_has_is_named() -> None:
    counted = copy.deepcopy(WRITTEN)
    name, _ = counted["calls"].popitem()
    assert off_budget(counted)[0] == f"{name}: only in one of budget and counts"


def test_networks_that_were_not_counted_are_not_asked_for() -> None:
    calls = {name: count for name, count in WRITTEN["calls"].items() if name.split()[0] in QUICK}
    counted = WRITTEN | {"calls": calls}
    assert not off_budget(counted, QUICK)
    assert off_budget(counted)


def test_silence_costs_less_than_six_million() -> None:
    assert max(count["silence"] for count in WRITTEN["listening"].values()) < 6_000_000


@pytest.mark.parametrize(("network", "least"), [("cnn6", 15), ("mobilenet15", 15), ("resnet9", 6)])
def test_a_hop_costs_a_fraction_of_a_window(network: str, least: float) -> None:
    counts = [count for name, count in WRITTEN["calls"].items() if name.startswith(f"{network} ") and "int8" in name]
    assert min(count["window"] / count["hop"] for count in counts) >= least
