from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_runtime.board import read_board, resident_memory


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


PI = {
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "sys/class/thermal/thermal_zone0/temp": "48312\n",
    "sys/class/thermal/thermal_zone1/temp": "61500\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "600000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "1500000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    # 0x50005: under-voltage and throttled, now and before.
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
}


def test_a_raspberry_pi_tells_everything(tmp_path):
    board = read_board(plant(tmp_path, PI))
    assert board.model == "Raspberry Pi 4 Model B Rev 1.4"
    assert board.temperature == 61.5
    assert board.throttled == board.throttled_before == ("under-voltage", "throttled")
    assert (board.governor, board.clock) == ("ondemand", 0.4)
    assert board.cores == len(os.sched_getaffinity(0))


def test_what_is_over_is_told_apart_from_what_is(tmp_path):
    flags = {"sys/devices/platform/soc/soc:firmware/get_throttled": "80000"}
    board = read_board(plant(tmp_path, flags))
    assert (board.throttled, board.throttled_before) == ((), ("soft temperature limit",))


@pytest.mark.parametrize("garbage", ["", "N/A", "-40000", "999999"])
def test_a_sensor_that_makes_no_sense_is_left_out(tmp_path, garbage):
    files = {"sys/class/thermal/thermal_zone0/temp": garbage, "sys/class/thermal/thermal_zone1/temp": "40000"}
    assert read_board(plant(tmp_path, files)).temperature == 40.0


def test_a_board_that_tells_nothing_is_no_error(tmp_path):
    board = read_board(tmp_path)
    assert board.model is board.temperature is board.throttled is board.governor is board.clock is None
    assert resident_memory(tmp_path) is None


def test_any_other_computer_is_known_by_its_processor(tmp_path):
    text = "processor\t: 0\nmodel name\t: Cortex-A57\n\nprocessor\t: 1\nmodel name\t: Cortex-A57\n"
    assert read_board(plant(tmp_path, {"proc/cpuinfo": text})).model == "Cortex-A57"


def test_memory_is_that_of_this_process():
    resource = pytest.importorskip("resource")
    before = resident_memory()
    block = bytearray(os.urandom(1024)) * (64 * 1024)  # 64 MiB, written to
    grown = resident_memory() - before
    assert len(block) == 64 << 20
    assert 60 << 20 < grown < 80 << 20
    assert resident_memory() <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + (4 << 20)
