"""The errors both distributions raise: one line that says what is wrong, where, and what to do.

A command prints the message alone and exits with the class's ``exit_code``: 2 where the user asked for something
that cannot be, 1 where the work failed. Applications catch :class:`SerError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SerError(Exception):
    """Base of every error that these packages raise on purpose.

    Example:
        >>> SerError("clip.wav: no audio").exit_code
        1
    """

    exit_code = 1


class UsageError(SerError):
    """An option, a recipe key, a column or a name that does not exist.

    Example:
        >>> UsageError("settings: no hop of -1").exit_code
        2
    """

    exit_code = 2


class AudioError(SerError):
    """Audio that cannot be read or cannot be used: missing, empty, truncated, NaN.

    Example:
        >>> from edge_runtime import AudioFile
        >>> AudioFile("none.wav").open()
        Traceback (most recent call last):
        edge_runtime.errors.AudioError: none.wav: no such audio file
    """


class ArtifactError(SerError):
    """A model file that is missing, truncated, foreign, of a newer schema, or that computes something else.

    Example:
        >>> from edge_runtime import Recognizer
        >>> Recognizer("none.onnx")
        Traceback (most recent call last):
        edge_runtime.errors.ArtifactError: none.onnx: no such model file
    """


class DeviceError(SerError):
    """A microphone, or the library that reaches it, that is absent or has failed.

    Example:
        >>> isinstance(DeviceError("no microphone found"), SerError)
        True
    """


class SinkError(SerError):
    """An event that a sink could not deliver, or a sink that another process is using.

    Example:
        >>> SinkError("events.jsonl: the disk is full").exit_code
        1
    """


class MissingDependencyError(SerError):
    """An optional library that the requested work needs is not installed.

    Example:
        >>> MissingDependencyError("listening needs: pip install ser-edge[mic]").exit_code
        1
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """Phrase the valid alternatives to a wrong name, the most similar first.

    Example:
        >>> nearest("resnet", ["vgg15", "resnet9", "cnn6"])
        "did you mean 'resnet9'? valid: cnn6, resnet9, vgg15"
        >>> nearest("x", ["anger"])
        'valid: anger'
    """
    choices = sorted(valid)
    similar = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {similar[0]!r}? " if similar else ""
    return f"{hint}valid: {', '.join(choices)}"
