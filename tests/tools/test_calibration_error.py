"""The error of calibration after a temperature, on answers whose true probabilities are known."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sertool.evaluate import Predictions, predictions_path
from sertool.export.calibrate import sharpened

TOOL = Path(__file__).parents[2] / "tools" / "calibration_error.py"
CLIPS = 2000


def measure(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, check=False)


def write_answers(run: Path, temperatures: Sequence[float]) -> None:
    """Write answers of one speaker a temperature, at which they would be right as often as they claim."""
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.ones(3), (len(temperatures), CLIPS)).astype(np.float32)
    truth = np.array([random.choice(3, p=share / share.sum()) for share in shares.reshape(-1, 3).astype(np.float64)])
    claimed = [sharpened(share, 1 / temperature) for share, temperature in zip(shares, temperatures, strict=True)]
    speakers = tuple(np.repeat([f"speaker {number}" for number in range(len(temperatures))], CLIPS).tolist())
    keys = tuple(f"{row:05}.wav" for row in range(len(truth)))
    run.mkdir()
    predictions = Predictions(("anger", "joy", "sadness"), keys, speakers, ("",) * len(keys), truth, np.vstack(claimed))
    predictions.save(predictions_path(run, "test"))


@pytest.mark.parametrize(
    ("temperatures", "least", "most"),
    [
        ([2.0, 2.0, 2.0], 0.0, 2.0),
        # Each has the temperature of the other, which is no help; its own would be.
        ([2.0, 0.5], 5.0, 40.0),
    ],
)
def test_a_speaker_is_calibrated_by_the_others(
    tmp_path: Path, temperatures: list[float], least: float, most: float
) -> None:
    write_answers(tmp_path / "run", temperatures)
    result = measure(tmp_path / "run")
    found = re.search(r"ECE (\S+)% of (\d+) clips, (\S+)% after a temperature of (\S+) to (\S+)$", result.stdout)
    assert found, result.stderr
    before, clips, after, lowest, highest = map(float, found.groups())
    assert before > 8 and clips == CLIPS * len(temperatures)
    assert least <= after <= most
    assert (lowest, highest) == pytest.approx((min(temperatures), max(temperatures)), rel=0.1)


def test_a_run_that_is_not_evaluated_is_one_line(tmp_path: Path) -> None:
    result = measure(tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1 and "run sertool evaluate" in result.stderr
