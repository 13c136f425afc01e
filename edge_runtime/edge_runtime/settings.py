"""Everything about listening that a user may change, in one frozen object."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from edge_runtime.errors import UsageError

MOST_CHANNELS = 64


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
    """

    device: int | str | None = None
    """Microphone: its index, a part of its name, or None for the system's default."""
    channel: int | None = None
    """Which of the source's channels to hear, from 1; None takes the mean of all."""
    hop: float = _number(0.5, 0.05, 60.0)
    """Time from one score of a running speech segment to the next."""
    threshold: float | None = _number(None, 0.0, 1.0)
    """Smallest probability of an answer other than ``uncertain``; None takes the model's own per label."""
    min_audio: float = _number(0.8, 0.1, 60.0)
    """Audio a speech segment must hold, its padding included, before the first score; a shorter one is no speech."""
    max_segment: float = _number(30.0, 1.0, 3600.0)
    """Longest speech segment; after it the segment ends and a new one begins."""
    padding: float = _number(0.2, 0.0, 5.0)
    """Audio before the first and after the last loud block that belongs to the segment: soft onsets and endings."""
    hangover: float = _number(0.6, 0.05, 10.0)
    """Pause that ends a speech segment."""
    silence: float = _number(5.0, 0.5, 86400.0)
    """Audio without speech after which one ``no_speech`` event says so."""
    gate_margin: float = _number(9.0, 1.0, 60.0)
    """How far above the noise floor a block counts as speech, dB."""
    gate_minimum: float = _number(-60.0, -100.0, 0.0)
    """Level below which no block counts as speech, dBFS."""
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

    def __post_init__(self) -> None:
        if self.device is not None and (isinstance(self.device, bool) or not isinstance(self.device, (int, str))):
            raise UsageError(f"settings: device is {self.device!r}; valid: an index, a part of a name, or None")
        whole = isinstance(self.channel, int) and not isinstance(self.channel, bool)
        if self.channel is not None and not (whole and 1 <= self.channel <= MOST_CHANNELS):
            raise UsageError(f"settings: channel is {self.channel!r}; valid: 1 to {MOST_CHANNELS}, or None")
        if not isinstance(self.exit_on_loss, bool):
            raise UsageError(f"settings: exit_on_loss is {self.exit_on_loss!r}; valid: True, False")
        for setting in fields(self):
            if "range" in setting.metadata:
                self._check_range(setting.name, *setting.metadata["range"])
        if self.min_audio > self.max_segment:
            raise UsageError(
                f"settings: min_audio is {self.min_audio:g}; valid: at most max_segment, {self.max_segment:g}"
            )

    def _check_range(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if value is None and type(self).__dataclass_fields__[name].default is None:
            return
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not (number and low <= value <= high):
            shown = f"{value:g}" if number else repr(value)
            raise UsageError(f"settings: {name} is {shown}; valid: {low:g} to {high:g}")
