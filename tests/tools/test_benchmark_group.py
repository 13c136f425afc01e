"""The tool runs as its first lines say, on released files."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_groups_of_one_and_two_beside_sessions_of_their_own() -> None:
    model = ROOT / "models" / "emodb" / "ser_edge_emodb" / "model.onnx"
    command = [sys.executable, ROOT / "tools" / "benchmark_group.py", model, model, "--rounds", "1", "--json"]
    rows = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert [(row["audio"], row["models"]) for row in rows] == [
        (audio, count) for audio in ("speech", "quiet room") for count in (1, 2)
    ]
    assert all(row["together"] > 0 and row["apart"] > 0 for row in rows)
