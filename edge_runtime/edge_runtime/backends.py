"""Inference libraries behind two small protocols: one for whole windows, one for streams."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ArtifactError, MissingDependencyError, UsageError
from edge_runtime.frontend import FloatArray
from edge_runtime.litert import open_litert
from edge_runtime.model_file import ModelFile, read_model_file
from edge_runtime.onnx_file import read_onnx

STREAM_KEY = "ser_stream"
"""Metadata key of a stream's JSON: ``stride``, ``reset`` (the value of each state's elements after a reset) and
``head`` (the head's ONNX model in base64)."""

States = tuple[NDArray[Any], ...]
"""What a stream carries from call to call. Never changed in place: to keep one is to have a snapshot."""


class Backend(Protocol):
    """A loaded network."""

    def predict(self, log_mel: FloatArray) -> FloatArray:
        """Map normalised log-Mel windows (N, frames, mel_bands) to logits (N, classes), both float32."""
        ...


@runtime_checkable
class StreamBackend(Backend, Protocol):
    """A loaded network that computes every frame of a stream once.

    It keeps nothing between calls, so that any number of streams can share it. ``predict`` takes a window as a stream
    from its beginning, without the last frames where they fill no stride.

    Attributes:
        stride: frames per feature.
    """

    stride: int

    def start(self) -> States:
        """Return the states of a stream that has heard nothing."""
        ...

    def advance(self, log_mel: FloatArray, states: States) -> tuple[FloatArray, States]:
        """Map the next normalised frames (n * stride, mel_bands), n >= 1, to n features (channels, n) and new states.

        Raises:
            UsageError: another number of frames.
        """
        ...

    def classify(self, features: FloatArray) -> FloatArray:
        """Map features (channels, n), n >= 1, to the logits (classes,) of their mean. Any of a stream will do: those
        of a shorter or longer window, or those of its loud frames alone."""
        ...


class OnnxBackend:
    """A window's network in ONNX Runtime.

    Args:
        path: the file, for errors.
        session: what it was opened as.

    Raises:
        ArtifactError: it does not take one log-Mel window.
    """

    def __init__(self, path: Path, session: Any) -> None:
        inputs = session.get_inputs()
        if len(inputs) != 1:
            raise ArtifactError(f"{path}: has {len(inputs)} inputs instead of one log-Mel window; export it again")
        self._path = path
        self._session = session
        self._input = inputs[0].name

    def predict(self, log_mel: FloatArray) -> FloatArray:
        """Map normalised log-Mel windows (N, frames, mel_bands) to logits (N, classes)."""
        logits: FloatArray = _run(self._session, {self._input: log_mel[:, None]}, self._path)[0]
        return logits


class OnnxStreamBackend:
    """A stream's trunk and head in ONNX Runtime.

    Args:
        model: the file.
        trunk: what it was opened as.
        threads: threads per inference.

    Raises:
        ArtifactError: the head, or what is said of the states, is damaged.
    """

    def __init__(self, model: ModelFile, trunk: Any, threads: int = 1) -> None:
        path = self._path = model.path
        self._trunk = trunk
        self._input, *states = trunk.get_inputs()
        self._names = [state.name for state in states]
        try:
            form = json.loads(model.metadata[STREAM_KEY])
            self.stride = int(form["stride"])
            head = base64.b64decode(form["head"], validate=True)
            # The runtime names the types as "tensor(uint8)" and "tensor(float)".
            self._reset = tuple(
                np.full(state.shape, value, np.uint8 if "uint8" in state.type else np.float32)
                for state, value in zip(states, form["reset"], strict=True)
            )
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ArtifactError(f"{path}: its {STREAM_KEY!r} description is damaged; export it again") from error
        read_onnx(head, str(path))  # what holds for the trunk must hold for the head
        self._head = open_session(head, path, threads)

    def start(self) -> States:
        """Return the states of a stream that has heard nothing."""
        return self._reset

    def advance(self, log_mel: FloatArray, states: States) -> tuple[FloatArray, States]:
        """Map the next frames (n * stride, mel_bands) to features (channels, n) and new states."""
        if not len(log_mel) or len(log_mel) % self.stride:
            raise UsageError(f"{self._path}: advances by {self.stride} frames or a multiple, not by {len(log_mel)}")
        inputs = dict(zip(self._names, states, strict=True))
        features, *after = _run(self._trunk, {self._input.name: log_mel[None, None], **inputs}, self._path)
        return features[0], tuple(after)

    def classify(self, features: FloatArray) -> FloatArray:
        """Map features (channels, n) to the logits (classes,) of their mean."""
        logits: FloatArray = _run(self._head, {"features": features[None]}, self._path)[0][0]
        return logits

    def predict(self, log_mel: FloatArray) -> FloatArray:
        """Map normalised log-Mel windows (N, frames, mel_bands) to logits (N, classes)."""
        whole = log_mel.shape[1] // self.stride * self.stride
        return np.stack([self.classify(self.advance(window[:whole], self.start())[0]) for window in log_mel])


def open_session(content: bytes, path: Path, threads: int) -> Any:
    """Open a model in ONNX Runtime on the CPU, without the busy waiting that would cost a board its power.

    It is given bytes, no path, and no library of custom operators is registered: neither another file nor code of the
    model's can be loaded.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ArtifactError: onnxruntime cannot load the model.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingDependencyError("onnxruntime is not installed; run: pip install 'ser-edge[onnx]'") from error
    except ImportError as error:  # installed, but e.g. for a newer C library than this system's
        raise MissingDependencyError(f"onnxruntime is installed but cannot be loaded ({error})") from error
    # Its start-up probes print warnings about absent GPUs on every board; only fatal messages matter here.
    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        # Without enable_fallback=0 it would try a damaged model twice, and say so on standard output.
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime raises its own undocumented classes, one per kind of damage
        unknown = re.search(r"No Op registered for (\w+)|(\w+)\(-?\d+\) is not a registered", str(error))
        if unknown:
            raise ArtifactError(
                f"{path}: operator {unknown[1] or unknown[2]!r} is unknown to onnxruntime "
                f"{onnxruntime.__version__}; upgrade it, or export the file again"
            ) from error
        raise ArtifactError(f"{path}: not a whole ONNX model; copy or export it again") from error


def _run(session: Any, inputs: dict[str, NDArray[Any]], path: Path) -> list[Any]:
    try:
        outputs: list[Any] = session.run(None, inputs)
    except Exception as error:  # see above
        shape = next(iter(inputs.values())).shape[1:]
        raise ArtifactError(f"{path}: its network does not take input of {shape}") from error
    return outputs


def load_backend(path: str | Path, threads: int = 1) -> Backend:
    """Open a model file with the library that its suffix names, described or not; see :func:`open_backend`.

    Raises:
        UsageError: an unknown suffix.
        ArtifactError: see :func:`edge_runtime.model_file.read_model_file`.
        MissingDependencyError: the library is not installed.
    """
    return open_backend(read_model_file(path), threads)


def open_backend(model: ModelFile, threads: int = 1) -> Backend:
    """Hand a model file to the library that its suffix names.

    Args:
        model: the file.
        threads: threads per inference.

    Raises:
        ArtifactError: the library cannot load it.
        MissingDependencyError: the library is not installed.
    """
    if model.path.suffix == ".tflite":
        return open_litert(model, threads)
    session = open_session(model.content, model.path, threads)
    if STREAM_KEY in model.metadata:
        return OnnxStreamBackend(model, session, threads)
    return OnnxBackend(model.path, session)
