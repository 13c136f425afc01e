from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_artifact import tiny_file, tiny_model

from edge_runtime.backends import load_backend
from edge_runtime.errors import ArtifactError
from edge_runtime.model_file import read_model_file
from edge_runtime.recognizer import Recognizer

SER_EDGE = str(Path(sys.executable).with_name("ser-edge"))


@pytest.fixture(scope="module")
def tflite_model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.tflite"
    path.write_bytes(tiny_file(".tflite"))
    return path


def formula(windows: np.ndarray) -> np.ndarray:
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in tiny_model().graph.initializer}
    return windows.mean(axis=1) @ tensors["weights"] + tensors["bias"]


def test_logits_equal_the_formula_at_any_length_and_batch(tflite_model):
    backend = load_backend(tflite_model)
    for frames, count in ((124, 3), (32, 1), (500, 2), (124, 1)):
        windows = np.random.default_rng(frames).normal(size=(count, frames, 64)).astype(np.float32)
        logits = backend.predict(windows)
        assert logits.dtype == np.float32
        assert np.allclose(logits, formula(windows), atol=1e-5)
        assert np.array_equal(logits, np.concatenate([backend.predict(window[None]) for window in windows]))


@pytest.mark.parametrize("shape", [(1, 124, 63), (1, 124, 65), (1, 0, 64)])
def test_other_windows_are_refused_and_do_no_harm(tflite_model, shape):
    backend = load_backend(tflite_model)
    windows = np.ones((1, 124, 64), np.float32)
    before = backend.predict(windows)
    with pytest.raises(ArtifactError, match=r"tiny\.tflite: its network does not take logmel of"):
        backend.predict(np.ones(shape, np.float32))
    assert np.array_equal(backend.predict(windows), before)


def test_threads_may_share_it(tflite_model):
    backend = load_backend(tflite_model)
    windows = [np.random.default_rng(n).normal(size=(1, 40 + n, 64)).astype(np.float32) for n in range(40)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(backend.predict, windows))
    assert all(np.allclose(found, formula(w), atol=1e-5) for found, w in zip(together, windows, strict=True))


def test_both_formats_of_one_network_answer_alike(model, tflite_model, speech):
    samples = speech(2.5)
    first, second = (Recognizer(path) for path in (model, tflite_model))
    assert first.artifact.labels == second.artifact.labels
    assert np.allclose(first.logits(samples), second.logits(samples), atol=1e-5)


def test_the_commands_take_it_and_say_nothing_else(tflite_model, tmp_path, speech, write_wav):
    clip = write_wav(tmp_path / "clip.wav", speech(2.6))
    for arguments in (["info", tflite_model, "--json"], ["verify", tflite_model], ["file", tflite_model, clip]):
        done = subprocess.run([SER_EDGE, *arguments], capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    assert (
        "FULLY_CONNECTED, MEAN"
        in subprocess.run([SER_EDGE, "verify", tflite_model], capture_output=True, text=True, check=True).stdout
    )


def test_it_loads_where_standard_error_is_closed(tflite_model):
    script = f"from edge_runtime.backends import load_backend; load_backend({str(tflite_model)!r}); print('loaded')"
    command = ["sh", "-c", 'exec "$@" 2>&-', "-", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "loaded\n"


@pytest.mark.parametrize("kept", [1, 100, 2000, -1])
def test_a_truncated_file(tmp_path, tflite_model, kept):
    path = tmp_path / "cut.tflite"
    path.write_bytes(tflite_model.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"^.*cut\.tflite: .*export it again$"):
        load_backend(path)


def test_a_network_of_another_name(tmp_path, tflite_model):
    content = tflite_model.read_bytes()
    path = tmp_path / "other.tflite"
    path.write_bytes(tiny_file(".tflite", description="none").replace(b"logmel", b"pixels"))
    assert b"logmel" in content
    with pytest.raises(ArtifactError, match=r"other\.tflite: its window has other inputs or outputs"):
        load_backend(path)


def shown_without(modules: str, tflite_model: Path, tmp_path: Path, before: str = "") -> str:
    script = (
        f"import sys\n{before}\n"
        f"for name in {modules.split()!r}: sys.modules[name] = None\n"
        "from edge_runtime.backends import load_backend\n"
        f"try: print(type(load_backend({str(tflite_model)!r})).__name__)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout


def test_without_a_library_the_line_to_type_is_given(tflite_model, tmp_path):
    shown = shown_without("ai_edge_litert ai_edge_litert.interpreter tflite_runtime", tflite_model, tmp_path)
    assert shown == "MissingDependencyError ai-edge-litert is not installed; run: pip install 'ser-edge[tflite]'\n"


def test_the_older_package_does_where_the_newer_is_missing(tflite_model, tmp_path):
    stand_in = (
        "import types; from ai_edge_litert import interpreter\n"
        "sys.modules['tflite_runtime'] = types.ModuleType('tflite_runtime')\n"
        "sys.modules['tflite_runtime.interpreter'] = interpreter"
    )
    shown = shown_without("ai_edge_litert ai_edge_litert.interpreter", tflite_model, tmp_path, stand_in)
    assert shown == "LiteRtBackend\n"


def test_the_older_package_with_a_numpy_too_new_for_it_is_told(tflite_model, tmp_path):
    stand_in = (
        "import types\n"
        "def Interpreter(**_): raise SystemError('initialization failed')\n"
        "fake = types.ModuleType('tflite_runtime.interpreter'); fake.Interpreter = Interpreter\n"
        "sys.modules['tflite_runtime'] = types.ModuleType('tflite_runtime')\n"
        "sys.modules['tflite_runtime.interpreter'] = fake"
    )
    shown = shown_without("ai_edge_litert ai_edge_litert.interpreter", tflite_model, tmp_path, stand_in)
    assert shown.startswith("MissingDependencyError tflite-runtime does not work with numpy 2")


def test_the_metadata_is_the_description(tflite_model):
    found = read_model_file(tflite_model)
    assert json.loads(found.metadata["ser_artifact"])["network"] == "tiny"
    assert found.artifact().content_hash.startswith("sha256:")
