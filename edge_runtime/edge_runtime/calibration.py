"""Constants of one person at one microphone, measured on half a minute of ordinary speech.

Means and deviations of log-Mel bands differ between voices, microphones and rooms more than between emotions. A network
that was trained on frames normalised by each speaker's own calm speech (``normalization.personal`` of the recipe) gains
by knowing them. A network that was not loses, so such a one takes no calibration.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.artifact import Artifact
from edge_runtime.errors import UsageError
from edge_runtime.frontend import FrontEnd

FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """What ``ser-edge calibrate`` measured.

    Attributes:
        mean: one value per mel band, dB.
        std: one positive value per mel band, dB.
        front_end: parameters of the spectrogram that was measured.
        seconds: of speech.
        made: when, ISO 8601.
        source: the microphone or recording.

    Example:
        >>> calibration = Calibration(64 * (-40.0,), 64 * (9.0,), FrontEnd(), 30.0, "2026-01-01T12:00:00+00:00", "USB")
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "calibration.json")
        >>> calibration.save(file)
        >>> Calibration.load(file) == calibration
        True
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    front_end: FrontEnd
    seconds: float
    made: str
    source: str

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s of speech from {self.source}, {self.made[:10]}"

    def applied_to(self, artifact: Artifact, where: str) -> Artifact:
        """Return a model's description with these constants in the place of its own.

        Args:
            artifact: of a network that was trained for it.
            where: how to name the model in errors.

        Raises:
            UsageError: the network was not trained for it, or hears another spectrogram.
        """
        refuse_untrained(artifact, where)
        if self.front_end != artifact.front_end:
            raise UsageError(f"{where}: hears another log-Mel spectrogram than was calibrated; run: ser-edge calibrate")
        return replace(artifact, normalization=replace(artifact.normalization, mean=self.mean, std=self.std))

    def save(self, path: Path) -> None:
        """Write the calibration as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            partial.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read :meth:`save` back.

        Raises:
            UsageError: no such file, or not a whole calibration.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{path}: no calibration ({error.strerror}); make one with: ser-edge calibrate") from None
        except (ValueError, RecursionError):
            content = None
        try:
            return _calibration(content)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UsageError(f"{path}: not a calibration of this version; make it again: ser-edge calibrate") from None


def _calibration(content: Any) -> Calibration:
    """Return what JSON holds; any error of a plain type where it is no calibration."""
    if content.pop("format") != FORMAT:
        raise ValueError
    mean, std = (tuple(float(value) for value in content.pop(name)) for name in ("mean", "std"))
    found = Calibration(mean, std, FrontEnd(**content.pop("front_end")), **content)
    bands = found.front_end.mel_bands
    whole = len(mean) == len(std) == bands and np.isfinite([mean, std]).all()
    if not (whole and min(found.std) > 0 and float(found.seconds) > 0 and found.made + found.source):
        raise ValueError
    return found


def refuse_untrained(artifact: Artifact, where: str) -> None:
    """Refuse a model that was not trained to be calibrated.

    Raises:
        UsageError: it was not.
    """
    if not artifact.normalization.personal:
        raise UsageError(
            f"{where}: was not trained to be calibrated and would answer worse for it; leave the calibration out, or "
            "train with normalization.personal above 0"
        )


def default_path() -> Path:
    """Return where the calibration of this installation lies.

    That is ``calibration.json`` in the service's own folder (systemd's STATE_DIRECTORY), else in ``ser-edge`` in
    XDG_STATE_HOME, else in ``~/.local/state/ser-edge``.
    """
    if service := os.environ.get("STATE_DIRECTORY"):
        return Path(service.split(":")[0], "calibration.json")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state", "ser-edge", "calibration.json")
