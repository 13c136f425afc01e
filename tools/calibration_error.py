"""Whether probabilities can be believed: ECE of evaluated runs, before and after a temperature.

The temperature of a speaker's answers is fitted on those of the other test speakers, none of whom the network that
answered was trained on either: what a maintainer has who keeps speakers back to calibrate by.

    python tools/calibration_error.py runs/emodb-0 runs/emodb-1
    python tools/calibration_error.py runs/emodb-0 --calibrated
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from edge_runtime.errors import SerError
from sertool.evaluate import Predictions, part_name, predictions_path
from sertool.export.calibrate import best_temperature, sharpened
from sertool.metrics import expected_calibration_error


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="evaluated runs, or the folders above their folds")
    parser.add_argument("--calibrated", action="store_true", help="as sertool evaluate --calibrated found them")
    arguments = parser.parse_args()
    part = part_name("test", "calibrated" if arguments.calibrated else "nothing")
    for run in arguments.runs:
        try:
            predictions = Predictions.load(predictions_path(run, part))
        except SerError as error:
            raise SystemExit(str(error)) from error
        after, temperatures = with_temperature_of_others(predictions)
        errors = [expected_calibration_error(found, predictions.truth) for found in (predictions.probabilities, after)]
        print(
            f"{run}: ECE {errors[0]:.1%} of {len(after)} clips, {errors[1]:.1%} after a temperature of "
            f"{min(temperatures):.2f} to {max(temperatures):.2f}"
        )


def with_temperature_of_others(predictions: Predictions) -> tuple[np.ndarray, list[float]]:
    """Return each speaker's probabilities (N, classes) at the temperature of all others, and these temperatures."""
    speakers = np.array(predictions.speakers)
    logits = np.log(np.maximum(predictions.probabilities, np.finfo(np.float32).tiny))
    after, temperatures = predictions.probabilities.copy(), []
    for speaker in dict.fromkeys(predictions.speakers):
        own = speakers == speaker
        temperature, _ = best_temperature(logits[~own], predictions.truth[~own])
        after[own] = sharpened(predictions.probabilities[own], temperature)
        temperatures.append(temperature)
    return after, temperatures


if __name__ == "__main__":
    main()
