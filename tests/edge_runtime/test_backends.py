from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tiny_artifact import tiny_model

from edge_runtime.backends import load_backend
from edge_runtime.errors import ArtifactError, UsageError


def test_logits_equal_the_formula(model):
    windows = np.random.default_rng(0).normal(size=(3, 124, 64)).astype(np.float32)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer}
    expected = windows.mean(axis=1) @ tensors["weights"] + tensors["bias"]
    logits = load_backend(model).predict(windows)
    assert logits.dtype == np.float32
    assert np.allclose(logits, expected, atol=1e-5)


def test_an_unknown_suffix_names_the_valid_ones(tmp_path):
    with pytest.raises(UsageError, match=r"'\.pt'; valid: \.onnx"):
        load_backend(tmp_path / "model.pt")


def test_a_missing_file(tmp_path):
    with pytest.raises(ArtifactError, match=r"no\.onnx: no such model file"):
        load_backend(tmp_path / "no.onnx")


@pytest.mark.parametrize("kept", [0, 1, 100, 2000, -1])
def test_a_truncated_file(tmp_path, model, kept):
    path = tmp_path / "cut.onnx"
    path.write_bytes(model.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"cut\.onnx: .*export it again"):
        load_backend(path)


def test_a_file_that_is_no_onnx(tmp_path):
    path = tmp_path / "text.onnx"
    path.write_text("hello\n" * 1000)
    with pytest.raises(ArtifactError, match="not a whole ONNX model"):
        load_backend(path)


def test_a_network_for_other_windows(tmp_path):
    model = tiny_model()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("logmel", TensorProto.FLOAT, [1, 1, 10, 3]))
    path = tmp_path / "other.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"other\.onnx"):
        load_backend(path).predict(np.zeros((1, 124, 64), np.float32))


def test_without_onnxruntime_the_line_to_type_is_given(model, tmp_path):
    script = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from edge_runtime.backends import load_backend\n"
        f"try: load_backend({str(model)!r})\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", script]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "MissingDependencyError onnxruntime is not installed; run: pip install 'ser-edge[onnx]'" in shown
