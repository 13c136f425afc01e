"""What the board says of itself: model, temperature, throttling, clock and memory, as far as it can be read.

Every probe is best effort: a board that does not tell gives None, never an error.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

THROTTLING = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}
"""Bits of a Raspberry Pi's ``get_throttled`` that hold now; 16 bits higher: that held since it was started
(Raspberry Pi documentation, vcgencmd)."""


@dataclass(frozen=True)
class Board:
    """A snapshot.

    Attributes:
        model: what the firmware calls the board, or the processor's name.
        cores: how many this process may use.
        temperature: of the hottest sensor, degrees Celsius.
        throttled: why the clock is held down now (Raspberry Pi only); empty when it is not, None where unknown.
        throttled_before: the same, since the board was started.
        governor: Linux's policy for the clock, e.g. ``ondemand`` or ``powersave``.
        clock: share of the highest clock at which the first core runs now, in [0, 1].
    """

    model: str | None
    cores: int
    temperature: float | None
    throttled: tuple[str, ...] | None
    throttled_before: tuple[str, ...] | None
    governor: str | None
    clock: float | None


def read_board(root: Path = Path("/")) -> Board:
    """Read what can be read below a root folder.

    Example:
        >>> read_board(Path("/nowhere")).temperature is None
        True
    """
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    now, highest = _number(frequency / "scaling_cur_freq"), _number(frequency / "cpuinfo_max_freq")
    flags = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    bits = _hexadecimal(flags)
    sensors = (_number(path) for path in sorted(root.glob("sys/class/thermal/thermal_zone*/temp")))
    degrees = [sensor / 1000 for sensor in sensors if sensor is not None and 0 < sensor < 150_000]
    return Board(
        model=_text(root / "proc/device-tree/model") or _processor(root),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        temperature=max(degrees, default=None),
        throttled=_reasons(bits),
        throttled_before=_reasons(None if bits is None else bits >> 16),
        governor=_text(frequency / "scaling_governor"),
        clock=now / highest if now and highest else None,
    )


def resident_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of this process that are in memory now, or None where the system does not tell."""
    for line in (_text(root / "proc/self/status") or "").splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _number(path: Path) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None


def _hexadecimal(text: str | None) -> int | None:
    try:
        return int(text or "", 16)
    except ValueError:
        return None


def _reasons(bits: int | None) -> tuple[str, ...] | None:
    return None if bits is None else tuple(reason for bit, reason in THROTTLING.items() if bits >> bit & 1)


def _processor(root: Path) -> str | None:
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"model name", "Model"}:
            return value.strip()
    return None
