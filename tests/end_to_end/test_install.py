"""The device's distribution in an empty environment: what it brings, and that it works there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["onnx", "tflite"])
def test_an_empty_environment_gets_what_is_needed_and_no_more(extra: str) -> None:
    tool = TOOLS / "check_edge_install.py"
    done = subprocess.run([sys.executable, tool, extra], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "self-test    passed" in done.stdout
