from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

# A shell that starts the tests in the background has them ignore Ctrl-C, nohup a terminal that goes away, and so would
# the commands that are tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid model file with a window of 2 s, made by hand; shared and therefore never changed."""
    from tiny_artifact import tiny_file

    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    path.write_bytes(tiny_file())
    return path
