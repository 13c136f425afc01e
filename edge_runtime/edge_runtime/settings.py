"""Everything about listening that a user may change, in one frozen object."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from edge_runtime.errors import MissingDependencyError, UsageError, nearest

MOST_CHANNELS = 64

MODES = ("window", "utterance")

HYSTERESIS = 0.15
"""By how much ``exit`` lies below ``enter`` where it is not given; the distance that silero-vad takes, too."""

FIXED = ("device", "channel", "buffer", "stall", "digital_silence", "retry", "exit_on_loss")
"""Settings of the source, which is open: they cannot change while a listener listens."""

PER_LABEL = ("threshold", "enter", "exit")
"""Settings that may be given by label."""

FILES = ("vad", "calibration")
"""Settings that name a file."""

PerLabel: TypeAlias = "float | Mapping[str, float] | None"
"""One number for every label, or one for each label that is named."""


_PROBABILITY = {"range": (0.0, 1.0)}


def _number(default: float | None, low: float, high: float) -> Any:
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class Settings:
    """How to listen. Times are seconds, levels are dB relative to full scale (dBFS).

    Raises:
        UsageError: a value outside its range; the message names the field and the range.

    Example:
        >>> Settings(hop=0.25, device="USB").hop
        0.25
        >>> Settings(hop=0)
        Traceback (most recent call last):
        edge_runtime.errors.UsageError: settings: hop is 0; valid: 0.05 to 60
        >>> Settings(enter={"anger": 0.7}, min_duration=2, refractory=30).enter
        {'anger': 0.7}
    """

    device: int | str | None = None
    """Microphone: its index, a part of its name, or None for the system's default."""
    channel: int | None = None
    """Which of the source's channels to hear, from 1; None takes the mean of all."""
    mode: str = "window"
    """``window``: answers while a speech segment goes on, each ``hop``. ``utterance``: one, at its end; the mean."""
    hop: float = _number(0.5, 0.05, 60.0)
    """Time from one score of a running speech segment to the next."""
    threshold: PerLabel = field(default=None, metadata=_PROBABILITY)
    """Smallest probability of an answer other than ``uncertain``: of every label, or by label (``{"anger": 0.7}``), the
    others' being the model's own; None takes the model's own."""
    enter: PerLabel = field(default=None, metadata=_PROBABILITY)
    """Probability of a score from which an emotion begins (``emotion_begin``): of every label, or by label, and then no
    other label begins; a model's ``neutral`` is a label, too. None gives no such events: what they are worth depends on
    these five settings, which depend on what the application does."""
    exit: PerLabel = field(default=None, metadata=_PROBABILITY)
    """Probability below which an emotion ends (``emotion_end``), at most ``enter``; None is 0.15 below it."""
    min_duration: float = _number(0.0, 0.0, 3600.0)
    """Audio through which an emotion must last before it is said to have begun; a shorter one is never mentioned."""
    refractory: float = _number(0.0, 0.0, 86400.0)
    """Time after an emotion has ended in which the same does not begin again."""
    min_audio: float = _number(0.8, 0.1, 60.0)
    """Audio a speech segment must hold, its padding included, before the first score; a shorter one is no speech."""
    max_segment: float = _number(30.0, 1.0, 3600.0)
    """Longest speech segment; after it the segment ends and a new one begins."""
    padding: float = _number(0.2, 0.0, 5.0)
    """Audio before the first and after the last loud block that belongs to the segment: soft onsets and endings."""
    hangover: float = _number(0.6, 0.05, 10.0)
    """Pause that ends a speech segment."""
    silence: float = _number(5.0, 0.5, 86400.0)
    """Audio without speech after which one ``no_speech`` event says so, and after which no emotion goes on."""
    gate_margin: float = _number(9.0, 1.0, 60.0)
    """How far above the noise floor a block counts as speech, dB."""
    gate_minimum: float = _number(-60.0, -100.0, 0.0)
    """Level below which no block counts as speech, dBFS."""
    vad: str | Path | None = None
    """The model file of Silero VAD (``silero_vad.onnx``), which then judges what is loud enough for the gate: for
    places with sounds that are not speech. None leaves it to the gate."""
    vad_threshold: float = _number(0.5, 0.01, 0.99)
    """Probability of speech from which Silero VAD counts a block as speech."""
    calibration: str | Path | None = None
    """What ``ser-edge calibrate`` measured of the person and the microphone, for a model that was trained for it; None
    leaves the model's own constants. (The command ``ser-edge`` then looks where ``ser-edge calibrate`` writes.)"""
    buffer: float = _number(10.0, 0.5, 600.0)
    """Captured audio that may wait for inference; beyond it the oldest is dropped and a ``gap`` event says so."""
    stall: float = _number(5.0, 0.5, 600.0)
    """Time without a sample from the microphone after which it counts as lost."""
    digital_silence: float = _number(10.0, 0.5, 86400.0)
    """Time of nothing but exact zeros after which the microphone counts as lost: no real one gives them for long."""
    retry: float = _number(30.0, 0.25, 3600.0)
    """Longest time between two attempts to open a lost microphone; they begin at 0.25 s and double."""
    exit_on_loss: bool = False
    """Whether to end with an error when the microphone is absent or lost, instead of waiting for it."""

    @classmethod
    def from_file(cls, path: str | Path, **changes: Any) -> Settings:
        """Read settings from a TOML file: one key a field, tables for what is given by label.

        Args:
            path: the file; relative files that it names count from its folder.
            changes: fields that override the file's.

        Raises:
            UsageError: no such file, not TOML, an unknown key, or a value outside its range.
            MissingDependencyError: Python 3.10 without tomli.

        Example:
            >>> import tempfile
            >>> file = Path(tempfile.mkdtemp(), "settings.toml")
            >>> _ = file.write_text('hop = 0.25\\n[enter]\\nanger = 0.7\\n')
            >>> Settings.from_file(file, hop=1.0)
            Settings(device=None, channel=None, mode='window', hop=1.0, threshold=None, enter={'anger': 0.7}, ...
        """
        content = _read_toml(Path(path))
        for key in content:
            if key not in cls.__dataclass_fields__:
                raise UsageError(f"{path}: unknown setting {key!r}; {nearest(key, cls.__dataclass_fields__)}")
        for name in FILES:
            if isinstance(content.get(name), str):
                content[name] = str(Path(path).parent / content[name])
        try:
            found = cls(**content)
        except UsageError as error:
            raise UsageError(str(error).replace("settings:", f"{path}:", 1)) from None
        return replace(found, **changes)

    def __post_init__(self) -> None:
        self._check_choices()
        for setting in fields(self):
            if "range" in setting.metadata:
                self._check_range(setting.name, *setting.metadata["range"])
        if self.min_audio > self.max_segment:
            raise UsageError(
                f"settings: min_audio is {self.min_audio:g}; valid: at most max_segment, {self.max_segment:g}"
            )
        if self.exit is not None:
            self._check_exit()

    def _check_choices(self) -> None:
        if self.device is not None and (isinstance(self.device, bool) or not isinstance(self.device, (int, str))):
            raise UsageError(f"settings: device is {self.device!r}; valid: an index, a part of a name, or None")
        whole = isinstance(self.channel, int) and not isinstance(self.channel, bool)
        if self.channel is not None and not (whole and 1 <= self.channel <= MOST_CHANNELS):
            raise UsageError(f"settings: channel is {self.channel!r}; valid: 1 to {MOST_CHANNELS}, or None")
        if self.mode not in MODES:
            raise UsageError(f"settings: mode is {self.mode!r}; {nearest(str(self.mode), MODES)}")
        for name in FILES:
            if not isinstance(getattr(self, name), (str, Path, type(None))):
                raise UsageError(f"settings: {name} is {getattr(self, name)!r}; valid: a file, or None")
        if not isinstance(self.exit_on_loss, bool):
            raise UsageError(f"settings: exit_on_loss is {self.exit_on_loss!r}; valid: True, False")

    def _check_range(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if value is None and type(self).__dataclass_fields__[name].default is None:
            return
        given = {name: value}
        if name in PER_LABEL and isinstance(value, Mapping):
            given = {f"{name} of {label!r}": number for label, number in value.items()}
        for what, number in given.items():
            valid = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
            if not (valid and low <= number <= high):
                shown = f"{number:g}" if valid else repr(number)
                raise UsageError(f"settings: {what} is {shown}; valid: {low:g} to {high:g}")

    def _check_exit(self) -> None:
        if self.enter is None:
            raise UsageError("settings: exit is given without enter; give both or none")
        named = [*(level for level in (self.enter, self.exit) if isinstance(level, Mapping))]
        for label in {label for level in named for label in level} or {""}:
            entered, left = (of_label(level, label) for level in (self.enter, self.exit))
            if entered is not None and left is not None and left > entered:
                what = f"exit of {label!r}" if label else "exit"
                raise UsageError(f"settings: {what} is {left:g}; valid: at most its enter, {entered:g}")


def of_label(level: PerLabel, label: str) -> float | None:
    """Return what is set for one label; None where nothing is.

    Example:
        >>> of_label(0.5, "joy"), of_label({"anger": 0.7}, "anger"), of_label({"anger": 0.7}, "joy")
        (0.5, 0.7, None)
    """
    return level.get(label) if isinstance(level, Mapping) else level


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ModuleNotFoundError:
        raise MissingDependencyError(
            f"{path}: settings files need Python 3.11 or tomli; run: pip install tomli"
        ) from None
    try:
        content: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
        return content
    except OSError as error:
        raise UsageError(f"{path}: settings cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UsageError(f"{path}: not TOML ({' '.join(str(error).split())})") from None
