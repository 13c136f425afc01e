"""A run as one file for the device: convert, quantise, verify, describe, and only then put it in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from errno import ENOSPC
from itertools import islice
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
from onnx import ModelProto

from edge_runtime.artifact import FORMS, METADATA_KEY, Artifact, GoldenVector, golden_signal
from edge_runtime.backends import Backend, load_backend
from edge_runtime.errors import SerError, UsageError, nearest
from edge_runtime.frontend import FloatArray, log_mel, tile_or_cut
from edge_runtime.litert import HEAD, TRUNK, WINDOW
from edge_runtime.model_file import seal
from edge_runtime.recognizer import Recognizer
from sertool.corpora.adapters import CORPORA
from sertool.corpora.manifest import Clip
from sertool.corpora.splits import PARTS
from sertool.export.calibrate import calibrate, predict_as, validation_clips
from sertool.export.card import card_path, model_card, refuse_foreign_card
from sertool.export.half import to_half
from sertool.export.onnx import to_onnx
from sertool.export.parity import (
    INT8_MIN_SNR_DB,
    ExportError,
    Parity,
    check_parity,
    kind_of_file,
    measure_parity,
    proven_parity,
)
from sertool.export.quantize import balanced_choice, fingerprint, quantize, training_clips, with_short_windows
from sertool.export.stream import StreamModel, check_stream, to_file, to_stream
from sertool.export.tflite import to_tflite
from sertool.export.vouch import calibrate_by, vouch, vouched
from sertool.features import Progress
from sertool.files import atomic_path, write_text
from sertool.networks import count_macs, count_parameters, predict
from sertool.run import Run, describe_environment, without_speakers

FORMATS = ("onnx", "tflite")
PRECISIONS = ("fp32", "fp16", "int8")

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
    file_format: str | None = None,
    precision: str = "int8",
    form: str = "window",
    licence: str | None = None,
    calibration_clips: int = 64,
    force: bool = False,
    folds: str | Path | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write a run as one self-describing file.

    The file is compared with the run's network on clips of training speakers and loaded by the device's own
    recogniser before it takes its place; where that fails, nothing is written and an earlier file stays.

    Args:
        run: a finished run, one fold.
        output: the file; replaced if it exists.
        file_format: one of :data:`FORMATS`, on which the file's name must end; what it ends on when None.
        precision: one of :data:`PRECISIONS`.
        form: one of :data:`~edge_runtime.artifact.FORMS`.
        licence: licence of the weights; that of the corpus when None.
        calibration_clips: clips of training speakers that the ranges of int8 activations are measured on.
        force: export a run that was not evaluated on test speakers.
        folds: folder above the folds that vouch for a run on all speakers; see :mod:`sertool.export.vouch`.
        progress: told how many clips are done.

    Raises:
        UsageError: an unknown format, precision or form, another suffix, a run without a test evaluation, a network
            that looks ahead as a stream, or folds that cannot vouch for the run.
        ExportError: the file does not compute what the network computes, or not the same as a stream.
        AudioError: a training clip cannot be read.
        SerError: the file cannot be written.
    """
    output = Path(output)
    _check_request(run, output, file_format, precision, form, force or folds is not None)
    vouching = None if folds is None else vouch(run, folds)
    if vouching and vouching.form != form:
        raise UsageError(f"{folds}: its folds were heard as a {vouching.form}; they vouch for --form {vouching.form}")
    calibration, verification = _choose(run, calibration_clips if precision == "int8" else 0)
    validation, uncalibrated = validation_clips(run)
    provenance = _provenance(run, calibration)
    windows = _windows(run, [*calibration, *verification, *validation], progress)
    network = run.network()
    frames = run.front_end.frames(run.window_samples)
    try:
        with atomic_path(output) as temporary:
            model = to_onnx(network, frames, run.front_end.mel_bands)
            if precision == "fp16":
                model = to_half(model)
            elif calibration:
                model = quantize(model, with_short_windows(islice(windows, len(calibration))))
            temporary.write_bytes(file_content(model, output.suffix, frames))
            backend = load_backend(temporary)
            verified = np.stack(list(islice(windows, len(verification))))
            parity = measure_parity(predict(network, verified), _logits(backend, verified))
            check_parity(parity, precision, str(run.path))
            stream = to_stream(model) if form == "stream" else None
            if stream:
                temporary.write_bytes(file_content(stream, output.suffix, frames))
                window, backend = backend, load_backend(temporary)
                off = check_stream(window, backend, np.concatenate(verified[:2]), precision, str(run.path))
                provenance["export"]["stream"] = {"max_error": off}
            provenance["export"]["parity"] = asdict(parity)
            logits = np.array(
                [
                    predict_as(form, network, window, run.front_end.frames(len(clip.read())))
                    for clip, window in zip(validation, windows, strict=True)
                ]
            )
            calibrated = calibrate_by(vouching) if vouching else calibrate(run, validation, logits, uncalibrated, form)
            provenance["export"]["temperature"] = asdict(calibrated)
            artifact = describe(run, precision, licence, provenance, golden_vector(run, backend, precision), stream)
            if vouching:
                artifact = vouched(artifact, vouching, run.clips("train"))
            proven = proven_parity(run, kind_of_file(output.suffix, precision, form))
            artifact = replace(artifact, card=model_card(artifact, proven))
            content = file_content(stream or model, output.suffix, frames, artifact.to_json())
            temporary.write_bytes(seal(content))
            artifact = _check_on_device(temporary, verification[0], backend.predict(verified[:1])[0])
            size = temporary.stat().st_size
    except OSError as error:
        space = f"; it needs room there and in {gettempdir()}" if error.errno == ENOSPC else ""
        raise SerError(f"{output}: cannot be written ({error.strerror or error}){space}") from error
    write_text(card_path(output), artifact.card)
    return Export(output, size, artifact, parity)


def _check_request(run: Run, output: Path, file_format: str | None, precision: str, form: str, force: bool) -> None:
    file_format = file_format or output.suffix.removeprefix(".")
    if file_format not in FORMATS:
        raise UsageError(f"--format {file_format!r} is not offered; {nearest(file_format, FORMATS)}")
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision!r} is not offered; {nearest(precision, PRECISIONS)}")
    if form not in FORMS:
        raise UsageError(f"--form {form!r} is not offered; {nearest(form, FORMS)}")
    padding = run.recipe.network.time_padding
    if form == "stream" and padding != "causal":
        raise UsageError(
            f"{run.path}: trained with network.time_padding = {padding!r}, it looks ahead as no stream can; "
            "export it with --form window, or train it with --set network.time_padding=causal"
        )
    if output.suffix != f".{file_format}":
        raise UsageError(f"{output}: the name of the file must end in .{file_format}")
    if output.is_dir():
        raise UsageError(f"{output}: is a folder; give the name of a file in it")
    refuse_foreign_card(card_path(output))
    if "test" not in run.metrics and not force:
        raise UsageError(
            f"{run.path}: not evaluated on test speakers, so nobody could know how good the file is; "
            f"run: sertool evaluate {run.path}; or export it all the same with --force"
        )


def file_content(network: ModelProto | StreamModel, suffix: str, frames: int, description: str = "") -> bytes:
    """Return the file of a network in the format that a suffix names, not sealed yet.

    Args:
        network: as a window's or as a stream's.
        suffix: one of :data:`FORMATS`, after a dot.
        frames: length of the window.
        description: what the artifact says of itself.
    """
    metadata = {METADATA_KEY: description} if description else {}
    stream = network if isinstance(network, StreamModel) else None
    if suffix == ".tflite":
        signatures = {TRUNK: (stream.trunk, stream.stride), HEAD: (stream.head, 1)} if stream else None
        return to_tflite(signatures or {WINDOW: (network, frames)}, metadata)
    model = ModelProto()
    model.CopyFrom(to_file(stream) if stream else network)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return bytes(model.SerializeToString())


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


def _logits(backend: Backend, windows: FloatArray) -> FloatArray:
    """Return the logits (N, classes) of the exported file for windows (N, frames, mel_bands), one by one."""
    return np.concatenate([backend.predict(window[None]) for window in windows])


def golden_vector(run: Run, backend: Backend, precision: str) -> GoldenVector:
    """Return the self-test: what the exported file computes for the golden signal.

    A CPU that rounds otherwise may move an 8-bit activation by one step, so an int8 file is allowed the error that
    quantisation itself is allowed; float files keep the format's own tolerance.
    """
    frames = log_mel(golden_signal(run.window_samples, run.front_end.sample_rate), run.front_end)
    logits = backend.predict(run.normalization.apply(frames)[None])[0]
    golden = GoldenVector(_numbers(frames.mean(axis=0)), _numbers(logits))
    if precision != "int8":
        return golden
    allowed = float(np.sqrt(np.mean(logits**2))) * 10 ** (-INT8_MIN_SNR_DB / 20)
    return replace(golden, logits_tolerance=max(golden.logits_tolerance, allowed))


def _numbers(values: FloatArray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def describe(
    run: Run,
    precision: str,
    licence: str | None,
    provenance: dict[str, Any],
    golden: GoldenVector,
    stream: StreamModel | None = None,
) -> Artifact:
    """Return the description of a run that its exported file carries.

    Args:
        run: a finished run.
        precision: of the file.
        licence: of the weights; that of the corpus when None.
        provenance: where the weights come from and how they were exported.
        golden: the file's self-test.
        stream: what the file holds, where it is no window.
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
        temperature=provenance["export"]["temperature"]["temperature"],
        macs=count_macs(network, run.front_end.frames(run.window_samples), run.front_end.mel_bands),
        provenance=provenance,
        metrics=without_speakers({part: run.metrics[part] for part in ("test",) if part in run.metrics}),
        form="stream" if stream else "window",
        stride=stream.stride if stream else 0,
        context_frames=stream.context_frames if stream else 0,
        receptive_field=stream.receptive_field if stream else 0,
    )


def corpus_licence(run: Run) -> str:
    """Return what the run's corpora allow: its own, and those of the runs whose weights it began with."""
    return "; ".join(dict.fromkeys(_licence(corpus) for corpus in run.provenance["corpora"]))


def _licence(corpus: dict[str, str]) -> str:
    """Return a corpus's licence: as the recipe says, else as known of a published corpus."""
    known = CORPORA[corpus["name"]].licence if corpus["name"] in CORPORA else ""
    return corpus["licence"] or known or UNSPECIFIED_LICENCE


def _provenance(run: Run, calibration: Sequence[Clip]) -> dict[str, Any]:
    """Return the run's provenance with the licence of its corpora and with what this export adds."""
    clips = {"clips": len(calibration), "sha256": fingerprint(calibration)} if calibration else None
    corpora = [corpus | {"licence": _licence(corpus)} for corpus in run.provenance["corpora"]]
    export = {
        "versions": describe_environment()["versions"],
        "checkpoint": run.checkpoint_hash,
        "calibration": clips,
    }
    split = {"protocol": run.split.protocol, "fold": run.recipe.data.fold, "folds": len(run.split.folds)}
    split |= {f"{part}_speakers": len(run.fold.part(part)) for part in PARTS}
    return without_speakers(run.provenance) | {"corpora": corpora, "split": split, "export": export}


def _check_on_device(path: Path, clip: Clip, logits: FloatArray) -> Artifact:
    """Load the file as a device does, self-test included, compare its answer for a window, and return what it says."""
    recognizer = Recognizer(path)
    recognized = recognizer.logits(tile_or_cut(clip.read(), recognizer.artifact.window_samples))
    if not np.array_equal(recognized, logits):
        raise ExportError(f"{path}: loaded again, the file gives other logits; nothing was written")
    return recognizer.artifact
