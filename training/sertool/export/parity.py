"""How closely an exported file computes what the trained network computes, and how closely it must."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_runtime.errors import SerError
from edge_runtime.frontend import FloatArray
from sertool.run import Run, read_parity

FP32_MAX_ERROR = 1e-4
"""Largest accepted difference of a logit, relative to the largest one where that exceeds 1. The same sums in another
order differ by about 1e-6 of the value; a wrong padding or a lost layer differs in the first digit."""

INT8_MIN_SNR_DB = 20.0
"""Smallest accepted ratio of the logits' energy to that of their error. Sound 8-bit networks of this kind reach 30 to
55 dB; a clipped or badly scaled layer falls below 20 dB (an error of a tenth)."""

INT8_MIN_AGREEMENT = 0.9
"""Smallest accepted share of clips with the same most probable label. Sound networks reach 0.97 and more, and differ at
near ties only; the bound leaves room for one that is unsure everywhere."""


class ExportError(SerError):
    """An exported file that does not compute what the run computes."""


@dataclass(frozen=True)
class Parity:
    """Agreement of an exported file with the float network.

    Attributes:
        clips: how many clips of training speakers were compared.
        max_error: largest difference of a logit.
        largest: largest magnitude of the float network's logits.
        agreement: share of clips with the same most probable label.
        snr_db: energy of the logits over that of their error, dB; at most 138, float32's own resolution.
    """

    clips: int
    max_error: float
    largest: float
    agreement: float
    snr_db: float


def measure_parity(expected: FloatArray, computed: FloatArray) -> Parity:
    """Compare logits (N, classes) of the exported file with those of the float network.

    Example:
        >>> parity = measure_parity(np.array([[3.0, 4.0]], np.float32), np.array([[3.0, 3.5]], np.float32))
        >>> parity.agreement, parity.max_error, round(parity.snr_db, 6)
        (1.0, 0.5, 20.0)
    """
    # Infinite logits give a NaN here, which check_parity refuses in one line; numpy's warnings would precede it.
    with np.errstate(all="ignore"):
        error = computed.astype(np.float64) - expected
        signal = np.maximum(np.sum(expected.astype(np.float64) ** 2), np.finfo(np.float64).tiny)
        # fmax would hide a NaN; maximum keeps it.
        noise = np.maximum(np.sum(error**2), signal * np.finfo(np.float32).eps ** 2)
        return Parity(
            clips=len(expected),
            max_error=float(np.abs(error).max()),
            largest=float(np.abs(expected).max()),
            agreement=float(np.mean(expected.argmax(axis=1) == computed.argmax(axis=1))),
            snr_db=float(10.0 * np.log10(signal / noise)),
        )


def check_parity(parity: Parity, precision: str, where: str = "export") -> None:
    """Refuse a file that computes something else.

    Args:
        parity: as measured.
        precision: ``fp32``, ``fp16`` or ``int8``.
        where: how to name the run in the error.

    Raises:
        ExportError: a bound of this module is not met, or a logit is not a number.
    """
    if not np.isfinite(parity.largest):  # no bound relative to it would refuse anything
        raise ExportError(
            f"{where}: its network answers with infinite numbers; nothing was written; "
            "train again, with a lower learning rate"
        )
    if precision == "fp32":
        allowed = FP32_MAX_ERROR * max(1.0, parity.largest)
        if not parity.max_error <= allowed:
            raise ExportError(
                f"{where}: the exported file's logits differ from the network's by {parity.max_error:.2g} "
                f"(at most {allowed:.2g}); "
                "nothing was written; the installed torch, onnx or onnxruntime computes this network wrongly"
            )
    elif not (parity.snr_db >= INT8_MIN_SNR_DB and parity.agreement >= INT8_MIN_AGREEMENT):
        raise ExportError(
            f"{where}: {precision} loses too much: {parity.agreement:.1%} of {parity.clips} clips keep their label "
            f"(at least {INT8_MIN_AGREEMENT:.0%}), logits at {parity.snr_db:.0f} dB (at least {INT8_MIN_SNR_DB:.0f}); "
            "nothing was written; give more --calibration-clips, train longer, or use --precision fp32"
        )


def kind_of_file(suffix: str, precision: str, form: str = "window") -> str:
    """Name what tells exports of one run apart.

    Example:
        >>> kind_of_file(".onnx", "int8"), kind_of_file(".tflite", "fp32", "stream")
        ('onnx int8', 'tflite fp32 stream')
    """
    return " ".join([suffix.lstrip("."), precision, *([form] if form != "window" else [])])


def proven_parity(run: Run, kind: str) -> dict[str, Any] | None:
    """Return what ``sertool parity`` measured on test speakers for a kind of file of this very run, or None.

    The folder above the run is asked first: there the folds are pooled.
    """
    for folder in (run.path.parent, run.path):
        measured = read_parity(folder)
        files: dict[str, dict[str, Any]] = {file["kind"]: file for file in measured.get("files", [])}
        if kind in files and run.checkpoint_hash in measured["checkpoints"].values():
            return {name: measured[name] for name in ("clips", "speakers", "folds")} | files[kind]
    return None
