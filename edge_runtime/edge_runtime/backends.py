"""Inference libraries behind one small protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from edge_runtime.errors import ArtifactError, MissingDependencyError, UsageError
from edge_runtime.frontend import FloatArray

SUFFIXES = (".onnx",)


class Backend(Protocol):
    """A loaded network.

    Attributes:
        metadata: the file's own key-value text.
    """

    metadata: dict[str, str]

    def predict(self, log_mel: FloatArray) -> FloatArray:
        """Map normalised log-Mel windows (N, frames, mel_bands) to logits (N, classes), both float32."""
        ...


class OnnxBackend:
    """ONNX Runtime on the CPU, one thread, without the busy waiting that would cost a board its power.

    Args:
        path: the ``.onnx`` file.
        threads: threads per inference.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ArtifactError: onnxruntime cannot load the file.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
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
            self._session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error
        except Exception as error:  # onnxruntime raises its own undocumented classes, one per kind of damage
            raise ArtifactError(f"{path}: not a whole ONNX model; copy or export it again") from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise ArtifactError(f"{path}: has {len(inputs)} inputs instead of one log-Mel window; export it again")
        self._path = path
        self._input = inputs[0].name
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def predict(self, log_mel: FloatArray) -> FloatArray:
        """Map normalised log-Mel windows (N, frames, mel_bands) to logits (N, classes)."""
        try:
            logits: FloatArray = self._session.run(None, {self._input: log_mel[:, None]})[0]
        except Exception as error:  # see above
            raise ArtifactError(f"{self._path}: its network does not take windows of {log_mel.shape[1:]}") from error
        return logits


def load_backend(path: str | Path, threads: int = 1) -> Backend:
    """Open a model file with the library that its suffix names.

    Args:
        path: the model file.
        threads: threads per inference.

    Raises:
        UsageError: an unknown suffix.
        ArtifactError: a missing or unreadable file.
        MissingDependencyError: the library is not installed.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: unknown model format {path.suffix!r}; valid: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ArtifactError(f"{path}: no such model file")
    return OnnxBackend(path, threads)
