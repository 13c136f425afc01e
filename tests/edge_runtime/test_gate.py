from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.gate import BLOCK, FLOOR_BLOCKS, Gate, level_db


def judge(gate: Gate, samples: np.ndarray) -> list[bool]:
    return [gate.is_speech(samples[i : i + BLOCK]) for i in range(0, len(samples) - BLOCK + 1, BLOCK)]


@pytest.fixture
def gate() -> Gate:
    return Gate(margin=9.0, minimum=-60.0)


@pytest.mark.parametrize("level", [-3.0, -20.0, -60.0])
def test_the_level_of_noise_is_its_power(room, level):
    assert level_db(room(10.0, level)) == pytest.approx(level, abs=0.1)


def test_a_constant_offset_is_no_level(room):
    noise = room(1.0, -50.0)
    assert level_db(noise + np.float32(0.3)) == pytest.approx(level_db(noise), abs=0.01)
    assert level_db(np.full(BLOCK, 0.3, np.float32)) == -100


@pytest.mark.parametrize("level", [-60.0, -45.0, -30.0, -15.0])
def test_steady_noise_is_no_speech_after_half_a_second(gate, room, level):
    assert not any(judge(gate, room(20.0, level))[17:])


def test_speech_in_a_quiet_room_is_speech_from_its_first_block(gate, speech):
    assert judge(gate, speech(1.0)[2000:])[0]


@pytest.mark.parametrize("level", [-70.0, -55.0, -45.0])
def test_speech_in_noise_is_found_and_its_end_too(gate, room, speech, level):
    before, during, after = room(5.0, level), speech(3.0) + room(3.0, level, seed=1), room(5.0, level, seed=2)
    decisions = judge(gate, np.concatenate([before, during, after]))
    loud = [level_db(during[i : i + BLOCK]) > level + 12 for i in range(0, len(during) - BLOCK, BLOCK)]
    first = len(before) // BLOCK
    assert not any(decisions[20 : first - 1])
    assert np.mean(np.array(decisions[first : first + len(loud)])[loud]) > 0.9
    assert not any(decisions[first + len(loud) + 2 :])


def test_digital_silence_leaves_the_floor_alone(gate, room):
    judge(gate, room(5.0, -40.0))
    floor = gate.floor
    assert not any(judge(gate, np.zeros(10 * 16000, np.float32)))
    assert gate.floor == floor
    assert not any(judge(gate, room(5.0, -40.0, seed=1)))


def test_silence_then_noise_then_speech(gate, room, speech):
    judge(gate, np.zeros(32000, np.float32))
    assert not any(judge(gate, room(5.0, -55.0)))
    assert any(judge(gate, speech(1.0)))


def test_louder_noise_becomes_the_floor_within_its_memory(gate, room):
    judge(gate, room(10.0, -60.0))
    decisions = judge(gate, room(10.0, -30.0, seed=1))
    assert decisions[0]
    assert not any(decisions[FLOOR_BLOCKS:])


def test_long_speech_stays_speech(gate, speech):
    decisions = judge(gate, speech(60.0))
    seconds = [any(decisions[i : i + 31]) for i in range(0, len(decisions) - 31, 31)]
    assert all(seconds)


def test_reset_forgets_the_room(gate, room, speech):
    signal = np.concatenate([room(1.0), speech(2.0)])
    first = judge(gate, signal)
    judge(gate, room(10.0, -20.0))
    gate.reset()
    assert judge(gate, signal) == first
