"""TFLite files, run by LiteRT (formerly TensorFlow Lite) on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ArtifactError, MissingDependencyError, UsageError
from edge_runtime.frontend import FloatArray
from edge_runtime.model_file import ModelFile

WINDOW, TRUNK, HEAD = "window", "trunk", "head"
"""Names of a file's signatures: a window's network has one, a stream's two."""

States = tuple[NDArray[Any], ...]


class LiteRtBackend:
    """A window's network.

    Args:
        path: the file, for errors.
        interpreter: what it was opened as.
    """

    def __init__(self, path: Path, interpreter: Any) -> None:
        self._window = _Signature(path, interpreter, WINDOW, Lock(), "logmel", "logits")

    def predict(self, log_mel: FloatArray) -> FloatArray:
        """Map normalised log-Mel windows (N, frames, mel_bands) to logits (N, classes), one after the other."""
        return np.concatenate([self._window(logmel=window[None, :, :, None])["logits"] for window in log_mel])


class LiteRtStreamBackend:
    """A stream's trunk and head.

    Args:
        path: the file, for errors.
        interpreter: what it was opened as.

    Attributes:
        stride: frames per feature.
    """

    def __init__(self, path: Path, interpreter: Any) -> None:
        lock = Lock()
        self._path = path
        self._trunk = _Signature(path, interpreter, TRUNK, lock, "logmel", "features")
        self._head = _Signature(path, interpreter, HEAD, lock, "features", "logits")
        inputs = dict(self._trunk.inputs)
        self.stride = int(inputs.pop("logmel")["shape"][1])
        self._names = list(inputs)
        self._trunk.check_names(*(f"next_{name}" for name in self._names))
        # What is 0 as a real number is the zero point as 8 bits.
        self._reset = tuple(np.full(one["shape"], one["quantization"][1], one["dtype"]) for one in inputs.values())

    def start(self) -> States:
        """Return the states of a stream that has heard nothing."""
        return self._reset

    def advance(self, log_mel: FloatArray, states: States) -> tuple[FloatArray, States]:
        """Map the next frames (n * stride, mel_bands) to features (channels, n) and new states."""
        if not len(log_mel) or len(log_mel) % self.stride:
            raise UsageError(f"{self._path}: advances by {self.stride} frames or a multiple, not by {len(log_mel)}")
        given = dict(zip(self._names, states, strict=True))
        found = self._trunk(logmel=log_mel[None, :, :, None], **given)
        return found["features"][0].T, tuple(found[f"next_{name}"] for name in self._names)

    def classify(self, features: FloatArray) -> FloatArray:
        """Map features (channels, n) to the logits (classes,) of their mean."""
        logits: FloatArray = self._head(features=np.ascontiguousarray(features.T)[None])["logits"][0]
        return logits

    def predict(self, log_mel: FloatArray) -> FloatArray:
        """Map normalised log-Mel windows (N, frames, mel_bands) to logits (N, classes)."""
        whole = log_mel.shape[1] // self.stride * self.stride
        return np.stack([self.classify(self.advance(window[:whole], self.start())[0]) for window in log_mel])


class _Signature:
    """A function of a model file: arrays by name to arrays by name, of any length in time.

    The interpreter resizes its buffers where a length differs from that of the call before, and only then.

    Args:
        path: the file, for errors.
        interpreter: what it was opened as.
        name: of the signature.
        lock: held while the interpreter runs; it crashes where two threads use it at once.
        names: inputs and outputs that it must have.

    Attributes:
        inputs: the interpreter's description of each.
    """

    def __init__(self, path: Path, interpreter: Any, name: str, lock: Lock, *names: str) -> None:
        self._path = path
        self._name = name
        self._lock = lock
        try:
            self._run = interpreter.get_signature_runner(name)
        except ValueError as error:
            raise ArtifactError(f"{path}: has no network for a {name}; export it again") from error
        self.inputs: dict[str, dict[str, Any]] = self._run.get_input_details()
        self.check_names(*names)

    def check_names(self, *names: str) -> None:
        """Raise ArtifactError where it lacks an input or output."""
        if not {*self.inputs, *self._run.get_output_details()}.issuperset(names):
            raise ArtifactError(f"{self._path}: its {self._name} has other inputs or outputs; export it again")

    def __call__(self, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        shapes = {name: values.shape for name, values in inputs.items()}
        try:
            # The interpreter itself would take any shape, and compute with what lies beyond the end of a smaller one.
            if not all(_fits(shape, self.inputs[name]["shape_signature"]) for name, shape in shapes.items()):
                raise ValueError
            with self._lock:
                found: dict[str, NDArray[Any]] = self._run(**inputs)
        except (RuntimeError, ValueError) as error:
            one = ", ".join(f"{name} of {shape[1:]}" for name, shape in shapes.items())
            raise ArtifactError(f"{self._path}: its network does not take {one}") from error
        return found


def _fits(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Return whether a shape is the expected one, where -1 stands for any length but 0."""
    lengths = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(one == two or (two == -1 and one > 0) for one, two in lengths)


def open_litert(model: ModelFile, threads: int = 1) -> LiteRtBackend | LiteRtStreamBackend:
    """Hand a ``.tflite`` file to LiteRT.

    Args:
        model: the file, checked: LiteRT follows its offsets blindly.
        threads: threads per inference.

    Raises:
        MissingDependencyError: neither ai-edge-litert nor tflite-runtime is installed.
        ArtifactError: LiteRT cannot load the file.
    """
    make = _interpreter_class()
    try:
        with _no_chatter():
            interpreter = make(model_content=model.content, num_threads=threads)
            interpreter.allocate_tensors()
    except SystemError as error:
        raise MissingDependencyError(
            f"tflite-runtime does not work with numpy {np.__version__}; run: pip install 'ser-edge[tflite]'"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ArtifactError(f"{model.path}: LiteRT cannot load it; copy or export it again") from error
    kind = LiteRtStreamBackend if TRUNK in interpreter.get_signature_list() else LiteRtBackend
    return kind(model.path, interpreter)


def _interpreter_class() -> Callable[..., Any]:
    """Return LiteRT's interpreter, or the frozen older package's on boards that have only that."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ModuleNotFoundError:
        try:
            from tflite_runtime.interpreter import Interpreter
        except ImportError as error:
            raise MissingDependencyError(
                "ai-edge-litert is not installed; run: pip install 'ser-edge[tflite]'"
            ) from error
    except ImportError as error:  # installed, but e.g. for a newer C library than this system's
        raise MissingDependencyError(f"ai-edge-litert is installed but cannot be loaded ({error})") from error
    interpreter: Callable[..., Any] = Interpreter
    return interpreter


@contextmanager
def _no_chatter() -> Iterator[None]:
    """Silence standard error: on every start LiteRT says from C++ that it uses the CPU, and no setting prevents it."""
    try:
        kept = os.dup(2)
    except OSError:  # a service may have closed it
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
