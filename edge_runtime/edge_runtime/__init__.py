"""Listen for emotion in speech: one model file, numpy and one inference library.

The names below load their modules on first use, so that ``import edge_runtime`` costs next to nothing and needs
neither an inference library nor a sound system until one is asked for.

Example:
    >>> import edge_runtime
    >>> edge_runtime.Settings(hop=0.25).hop
    0.25
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import (
    ArtifactError,
    AudioError,
    DeviceError,
    MissingDependencyError,
    SerError,
    SinkError,
    UsageError,
)

if TYPE_CHECKING:
    from edge_runtime.artifact import Artifact
    from edge_runtime.calibrate import Calibrator
    from edge_runtime.calibration import Calibration
    from edge_runtime.events import Event, Reason
    from edge_runtime.listener import Health, Listener
    from edge_runtime.microphone import Microphone
    from edge_runtime.recognizer import Recognizer
    from edge_runtime.recordings import AudioFile, RawAudio, RealTime
    from edge_runtime.session import Session, SessionGroup
    from edge_runtime.settings import Settings

# From 1.29 on onnxruntime reports every session to its maker, and keeps what it has not sent yet in the user's cache
# folder. It reads this once, when it is imported; who sets it to 0 has asked for that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

_MODULE_OF = {
    "Artifact": "artifact",
    "AudioFile": "recordings",
    "Calibration": "calibration",
    "Calibrator": "calibrate",
    "Event": "events",
    "Health": "listener",
    "Listener": "listener",
    "Microphone": "microphone",
    "RawAudio": "recordings",
    "RealTime": "recordings",
    "Reason": "events",
    "Recognizer": "recognizer",
    "Session": "session",
    "SessionGroup": "session",
    "Settings": "settings",
}

__all__ = [
    "Artifact",
    "ArtifactError",
    "AudioError",
    "AudioFile",
    "Calibration",
    "Calibrator",
    "DeviceError",
    "Event",
    "Health",
    "Listener",
    "Microphone",
    "MissingDependencyError",
    "RawAudio",
    "RealTime",
    "Reason",
    "Recognizer",
    "SerError",
    "Session",
    "SessionGroup",
    "Settings",
    "SinkError",
    "UsageError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'edge_runtime' has no attribute {name!r}")
    return getattr(import_module(f"edge_runtime.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
