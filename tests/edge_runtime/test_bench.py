from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.bench import Bench, bench
from edge_runtime.board import read_board
from edge_runtime.settings import Settings

SER_EDGE = str(Path(sys.executable).with_name("ser-edge"))


def ser_edge(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([SER_EDGE, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)


def test_speech_is_scored_at_every_hop_and_silence_is_not(model):
    measured = bench(model, Settings(hop=0.25), seconds=5)
    assert 3 <= measured.scores <= 4.2  # the first comes after min_audio, then four a second
    assert 0 < measured.silence < measured.speech
    assert all(0 < stage.median <= stage.p95 and stage.calls >= 20 for stage in measured.stages)
    assert measured.load > 0
    assert measured.memory > 10e6


def test_fewer_scores_are_fewer(model):
    assert bench(model, Settings(hop=1.0), seconds=5).scores < bench(model, Settings(hop=0.25), seconds=5).scores / 2


@pytest.mark.parametrize(
    ("speech", "keeps_up", "beginning"),
    [(0.02, True, "keeps up: 2.0 %"), (0.7, False, "barely keeps up"), (1.4, False, "too slow: 140.0 %")],
)
def test_verdict(speech, keeps_up, beginning):
    measured = Bench(0.1, (), speech, 0.001, 2.0, None, read_board())
    assert measured.keeps_up is keeps_up
    assert measured.verdict.startswith(beginning)


def test_command_for_people_and_for_scripts(model):
    told = ser_edge("bench", model, "--seconds", 2)
    assert told.returncode == 0
    assert told.stderr == ""
    assert "a second of silence" in told.stdout
    assert re.search(r"\d ms of CPU \(real-time factor 0\.\d{4}\)", told.stdout)
    assert told.stdout.splitlines()[-1].split(":")[0] in {"keeps up", "barely keeps up", "too slow"}
    found = json.loads(ser_edge("bench", model, "--seconds", 2, "--json").stdout)
    assert found["stages"][0]["name"] == "log-Mel of 1 s"
    assert found["real_time_factor"] == found["speech"] > 0
    assert found["board"]["cores"] >= 1
    assert isinstance(found["keeps_up"], bool)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--seconds", "0"], "--seconds 0; valid: 1 to 3600"),
        (["--seconds", "nan"], "--seconds nan; valid: 1 to 3600"),
        (["--threads", "-1"], "--threads -1; valid: 1 to 3600"),
    ],
)
def test_a_wrong_length_is_named(model, arguments, complaint):
    done = ser_edge("bench", model, *arguments)
    assert (done.returncode, done.stderr) == (2, f"ser-edge: {complaint}\n")


def test_a_missing_model_is_named(tmp_path):
    done = ser_edge("bench", tmp_path / "none.onnx")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no such model file" in done.stderr
