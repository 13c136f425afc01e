"""A model file as bytes, checked before any inference library sees them.

Inference libraries trust what they load: a damaged file can make them crash. So a file is first read here, whole, and
refused where it is not a model, not one of ours, or not what the exporter wrote, down to the last bit.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.artifact import METADATA_KEY, UNSEALED, Artifact
from edge_runtime.errors import ArtifactError, UsageError
from edge_runtime.onnx_file import read_onnx
from edge_runtime.tflite_file import read_tflite

LARGEST_FILE = 1 << 29
"""Bytes. The largest network here has 60 MB; a file of some GB is none, and would fill a board's memory."""

LARGEST_DESCRIPTION = 1 << 24
"""Characters."""

Reader = Callable[[bytes, str], tuple[dict[str, str], tuple[str, ...]]]
READERS: dict[str, Reader] = {".onnx": read_onnx, ".tflite": read_tflite}
"""By suffix: what takes the whole file and its name, and returns the file's own key-value text and its operators."""

_HASH_KEY = b'"content_hash": "'
_UNSEALED = UNSEALED.encode()


@dataclass(frozen=True)
class ModelFile:
    """A whole file of a known format.

    Attributes:
        path: the file.
        content: all of it.
        metadata: its own key-value text.
        operators: kinds of operators that its network uses.
        content_hash: ``sha256:`` and 64 hex digits, which the content was found to agree with; empty where the file
            carries none.
    """

    path: Path
    content: bytes
    metadata: dict[str, str]
    operators: tuple[str, ...]
    content_hash: str

    def artifact(self) -> Artifact:
        """Return the file's description.

        Raises:
            ArtifactError: it has none, a damaged one or one of a newer schema, or lacks the hash that its schema asks
                for.
        """
        description = self.metadata.get(METADATA_KEY)
        if description is None:
            raise ArtifactError(f"{self.path}: carries no {METADATA_KEY!r} description; make it with: sertool export")
        if len(description) > LARGEST_DESCRIPTION:
            raise ArtifactError(
                f"{self.path}: its description has {len(description)} characters "
                f"(at most {LARGEST_DESCRIPTION}); export it again"
            )
        artifact = Artifact.from_json(description, str(self.path))
        if artifact.content_hash != self.content_hash:
            raise ArtifactError(f"{self.path}: lacks the hash of its content; copy or export it again")
        return artifact


def read_model_file(path: str | Path) -> ModelFile:
    """Read a model file and check that it is whole.

    Args:
        path: the file.

    Raises:
        UsageError: an unknown suffix.
        ArtifactError: no such file, a folder, a pipe, empty, too large, unreadable, of another format than its suffix
            says, damaged, or with an operator that would need code from elsewhere.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise UsageError(f"{path}: unknown model format {path.suffix!r}; valid: {', '.join(READERS)}")
    content = _read(path)
    _check_format(content, path)
    content_hash = check_seal(content, str(path))
    metadata, operators = READERS[path.suffix](content, str(path))
    return ModelFile(path, content, metadata, operators, content_hash)


def _read(path: Path) -> bytes:
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise ArtifactError(f"{path}: is a folder; name the model file in it")
        if not stat.S_ISREG(found.st_mode):  # a pipe would keep us waiting
            raise ArtifactError(f"{path}: not an ordinary file; name a model file")
        if not 0 < found.st_size <= LARGEST_FILE:
            size = f"has {found.st_size / 1e9:.1f} GB, more than any model" if found.st_size else "is empty"
            raise ArtifactError(f"{path}: {size}; copy or export it again")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such model file") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error


def _check_format(content: bytes, path: Path) -> None:
    """Tell a renamed file: TFLite files carry four letters after their first offset, ONNX files none."""
    is_tflite = content[4:8] == b"TFL3"
    if is_tflite and path.suffix != ".tflite":
        raise ArtifactError(f"{path}: is a TFLite file by its content; rename it to {path.stem}.tflite")
    if path.suffix == ".tflite" and not is_tflite:
        raise ArtifactError(f"{path}: not a TFLite file by its content; copy or export it again")


def seal(content: bytes) -> bytes:
    """Return a model file with the hash of its content in the description's ``content_hash``.

    The hash is that of the whole file with zeros in its own place, which :meth:`Artifact.to_json` leaves there; so it
    covers every other bit, in any format that stores the description as it is.

    Args:
        content: the file with one unsealed description.

    Example:
        >>> content = b'weights {"content_hash": "' + UNSEALED.encode() + b'"} weights'
        >>> sealed = seal(content)
        >>> check_seal(sealed)[:7], len(sealed) == len(content)
        ('sha256:', True)
        >>> check_seal(sealed.replace(b"weights", b"weightz"))
        Traceback (most recent call last):
        edge_runtime.errors.ArtifactError: model: damaged: its content does not give the hash it carries; ...
    """
    return content.replace(_HASH_KEY + _UNSEALED, _HASH_KEY + _hash(content), 1)


def check_seal(content: bytes, where: str = "model") -> str:
    """Return the hash that a model file carries; empty where it carries none.

    Args:
        content: the whole file.
        where: how to name the file in errors.

    Raises:
        ArtifactError: the content gives another hash, so a bit of it has changed.
    """
    start = content.find(_HASH_KEY) + len(_HASH_KEY)
    if start < len(_HASH_KEY):
        return ""
    carried = content[start : start + len(_UNSEALED)]
    if _hash(content[:start] + _UNSEALED + content[start + len(carried) :]) != carried:
        raise ArtifactError(f"{where}: damaged: its content does not give the hash it carries; copy or export it again")
    return carried.decode()


def _hash(content: bytes) -> bytes:
    return b"sha256:" + hashlib.sha256(content).hexdigest().encode()
