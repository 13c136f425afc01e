"""The budget of instructions: what is off it is named. Counting itself is tested with the emulated board."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from arm_root import PROCESSORS
from count_instructions import BUDGET, FORMS, off_budget

WRITTEN = json.loads(BUDGET.read_text(encoding="utf-8"))


def test_the_budget_holds_every_file_on_every_processor() -> None:
    files = [f"{network} {file}" for network, files in FORMS.items() for file in files]
    assert set(WRITTEN["counts"]) == {f"{file} {cpu}" for file in files for cpu in PROCESSORS}


@pytest.mark.parametrize(("change", "named"), [(1.0, False), (1.029, False), (1.031, True), (0.969, True)])
@pytest.mark.parametrize("state", ["silence", "speech"])
def test_more_than_three_percent_either_way_are_named(state: str, change: float, named: bool) -> None:
    counts = copy.deepcopy(WRITTEN["counts"])
    name = next(iter(counts))
    counts[name][state] = round(counts[name][state] * change)
    lines = off_budget(counts, {"numpy": "9"})
    assert [line.split(":")[0] for line in lines[:1]] == ([name] if named else [])
    assert not named or ("--update" in lines[-1] and "'numpy': '9'" in lines[-2])


def test_a_file_that_only_one_has_is_named() -> None:
    name, *_ = WRITTEN["counts"]
    counts = {key: value for key, value in WRITTEN["counts"].items() if key != name}
    assert off_budget(counts, {})[0] == f"{name}: only in one of budget and counts"


def test_silence_costs_less_than_six_million() -> None:
    assert max(count["silence"] for count in WRITTEN["counts"].values()) < 6_000_000
