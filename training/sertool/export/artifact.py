"""A run as one file for the device: convert, quantise, verify, describe, and only then put it in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from errno import ENOSPC
from itertools import islice
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import onnx
from onnx import helper

from edge_runtime.artifact import METADATA_KEY, Artifact, GoldenVector, golden_signal
from edge_runtime.backends import Backend, load_backend
from edge_runtime.errors import SerError, UsageError, nearest
from edge_runtime.frontend import FloatArray, log_mel, tile_or_cut
from edge_runtime.recognizer import Recognizer
from sertool.corpora.adapters import CORPORA
from sertool.corpora.manifest import Clip
from sertool.export.onnx import to_onnx
from sertool.export.parity import INT8_MIN_SNR_DB, ExportError, Parity, check_parity, measure_parity
from sertool.export.quantize import balanced_choice, fingerprint, quantize, training_clips, with_short_windows
from sertool.features import Progress
from sertool.files import atomic_path
from sertool.networks import Student, count_macs, count_parameters, predict
from sertool.run import Run, describe_environment

FORMATS = ("onnx",)
PRECISIONS = ("fp32", "int8")

UNSPECIFIED_LICENCE = "unspecified: ask the owners of the training data"

VERIFICATION_CLIPS = 64
"""Clips on which the file is compared with the network; one disagreement is 1.6 % of them."""


@dataclass(frozen=True)
class Export:
    """A written artifact.

    Attributes:
        path: the file.
        size_bytes: its size.
        artifact: the description it carries.
        parity: how closely it computes what the run's network computes.
    """

    path: Path
    size_bytes: int
    artifact: Artifact
    parity: Parity


def export_run(
    run: Run,
    output: str | Path,
    *,
    file_format: str = "onnx",
    precision: str = "int8",
    licence: str | None = None,
    calibration_clips: int = 64,
    force: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Write a run as one self-describing file.

    The file is compared with the run's network on clips of training speakers and loaded by the device's own
    recogniser before it takes its place; where that fails, nothing is written and an earlier file stays.

    Args:
        run: a finished run, one fold.
        output: the file, ending in ``.onnx``; replaced if it exists.
        file_format: one of :data:`FORMATS`.
        precision: one of :data:`PRECISIONS`.
        licence: licence of the weights; that of the corpus when None.
        calibration_clips: clips of training speakers that the ranges of int8 activations are measured on.
        force: export a run that was not evaluated on test speakers.
        progress: told how many clips are done.

    Raises:
        UsageError: an unknown format or precision, another suffix, or a run without a test evaluation.
        ExportError: the file does not compute what the network computes.
        AudioError: a training clip cannot be read.
        SerError: the file cannot be written.
    """
    output = Path(output)
    _check_request(run, output, file_format, precision, force)
    calibration, verification = _choose(run, calibration_clips if precision == "int8" else 0)
    provenance = _provenance(run, calibration)
    windows = _windows(run, [*calibration, *verification], progress)
    network = run.network()
    try:
        with atomic_path(output) as temporary:
            model = to_onnx(network, run.front_end.frames(run.window_samples), run.front_end.mel_bands)
            if calibration:
                model = quantize(model, with_short_windows(islice(windows, len(calibration))))
            onnx.save(model, temporary)
            backend = load_backend(temporary)
            expected, computed = _logits(network, backend, windows)
            parity = measure_parity(expected, computed)
            check_parity(parity, precision, str(run.path))
            provenance["export"]["parity"] = asdict(parity)
            artifact = describe(run, precision, licence, provenance, golden_vector(run, backend, precision))
            helper.set_model_props(model, {METADATA_KEY: artifact.to_json()})
            onnx.save(model, temporary)
            _check_on_device(temporary, verification[0], computed[0])
            size = temporary.stat().st_size
    except OSError as error:
        space = f"; it needs room there and in {gettempdir()}" if error.errno == ENOSPC else ""
        raise SerError(f"{output}: cannot be written ({error.strerror or error}){space}") from error
    return Export(output, size, artifact, parity)


def _check_request(run: Run, output: Path, file_format: str, precision: str, force: bool) -> None:
    if file_format not in FORMATS:
        raise UsageError(f"--format {file_format!r} is not offered; {nearest(file_format, FORMATS)}")
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision!r} is not offered; {nearest(precision, PRECISIONS)}")
    if output.suffix != f".{file_format}":
        raise UsageError(f"{output}: the name of the file must end in .{file_format}")
    if output.is_dir():
        raise UsageError(f"{output}: is a folder; give the name of a file in it")
    if "test" not in run.metrics and not force:
        raise UsageError(
            f"{run.path}: not evaluated on test speakers, so nobody could know how good the file is; "
            f"run: sertool evaluate {run.path}; or export it all the same with --force"
        )


def _choose(run: Run, calibration_clips: int) -> tuple[list[Clip], list[Clip]]:
    """Return clips of training speakers to calibrate and to verify with; a small corpus lends some to both."""
    chosen = balanced_choice(training_clips(run), calibration_clips + VERIFICATION_CLIPS)
    return chosen[:calibration_clips], chosen[-VERIFICATION_CLIPS:]


def _windows(run: Run, clips: Sequence[Clip], progress: Progress | None) -> Iterator[FloatArray]:
    """Give the normalised log-Mel window (frames, mel_bands) of each clip and count those that are done with."""
    for done, clip in enumerate(clips, start=1):
        frames = log_mel(tile_or_cut(clip.read(), run.window_samples), run.front_end)
        yield run.normalization.apply(frames)
        if progress:
            progress(done, len(clips))


def _logits(network: Student, backend: Backend, windows: Iterable[FloatArray]) -> tuple[FloatArray, FloatArray]:
    """Return the logits (N, classes) of the network and of the exported file."""
    together = np.stack(list(windows))
    computed = [backend.predict(window[None]) for window in together]
    return predict(network, together), np.concatenate(computed)


def golden_vector(run: Run, backend: Backend, precision: str) -> GoldenVector:
    """Return the self-test: what the exported file computes for the golden signal.

    A CPU that rounds otherwise may move an 8-bit activation by one step, so an int8 file is allowed the error that
    quantisation itself is allowed; fp32 files keep the format's own tolerance.
    """
    frames = log_mel(golden_signal(run.window_samples, run.front_end.sample_rate), run.front_end)
    logits = backend.predict(run.normalization.apply(frames)[None])[0]
    golden = GoldenVector(_numbers(frames.mean(axis=0)), _numbers(logits))
    if precision == "fp32":
        return golden
    allowed = float(np.sqrt(np.mean(logits**2))) * 10 ** (-INT8_MIN_SNR_DB / 20)
    return replace(golden, logits_tolerance=max(golden.logits_tolerance, allowed))


def _numbers(values: FloatArray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def describe(
    run: Run, precision: str, licence: str | None, provenance: dict[str, Any], golden: GoldenVector
) -> Artifact:
    """Return the description of a run that its exported file carries.

    Args:
        run: a finished run.
        precision: of the file.
        licence: of the weights; that of the corpus when None.
        provenance: where the weights come from and how they were exported.
        golden: the file's self-test.
    """
    network = run.network()
    return Artifact(
        labels=run.labels,
        front_end=run.front_end,
        normalization=run.normalization,
        window_samples=run.window_samples,
        network=run.recipe.network.name,
        precision=precision,
        licence=licence or corpus_licence(run),
        golden=golden,
        parameters=count_parameters(network),
        macs=count_macs(network, run.front_end.frames(run.window_samples), run.front_end.mel_bands),
        provenance=provenance,
        metrics=_anonymous({part: run.metrics[part] for part in ("test",) if part in run.metrics}),
    )


def corpus_licence(run: Run) -> str:
    """Return what the run's corpora allow: its own, and those of the runs whose weights it began with."""
    return "; ".join(dict.fromkeys(_licence(corpus) for corpus in run.provenance["corpora"]))


def _licence(corpus: dict[str, str]) -> str:
    """Return a corpus's licence: as the recipe says, else as known of a published corpus."""
    known = CORPORA[corpus["name"]].licence if corpus["name"] in CORPORA else ""
    return corpus["licence"] or known or UNSPECIFIED_LICENCE


def _anonymous(content: dict[str, Any]) -> dict[str, Any]:
    """Replace every list or table of speakers by their number: a file for distribution names nobody."""
    plain = {key: _anonymous(value) if isinstance(value, dict) else value for key, value in content.items()}
    if isinstance(plain.get("speakers"), list | dict):
        plain["speakers"] = len(plain["speakers"])
    return plain


def _provenance(run: Run, calibration: Sequence[Clip]) -> dict[str, Any]:
    """Return the run's provenance with the licence of its corpora and with what this export adds."""
    clips = {"clips": len(calibration), "sha256": fingerprint(calibration)} if calibration else None
    corpora = [corpus | {"licence": _licence(corpus)} for corpus in run.provenance["corpora"]]
    export = {"versions": describe_environment()["versions"], "calibration": clips}
    return _anonymous(run.provenance) | {"corpora": corpora, "export": export}


def _check_on_device(path: Path, clip: Clip, logits: FloatArray) -> None:
    """Load the file as a device does, self-test included, and compare its answer for a clip with the one expected."""
    recognized = Recognizer(path).logits(clip.read())
    if not np.array_equal(recognized, logits):
        raise ExportError(f"{path}: loaded again, the file gives other logits; nothing was written")
