"""Proof that exported files do what the trained network does: on test speakers, by the device's own code."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_runtime.artifact import Artifact
from edge_runtime.backends import Backend, StreamBackend, load_backend
from edge_runtime.errors import SerError, UsageError
from edge_runtime.frontend import FloatArray, log_mel, tile_or_cut
from edge_runtime.recognizer import Recognizer, softmax
from sertool.compare import Answers, RunSet, compare
from sertool.corpora.manifest import Clip
from sertool.export.artifact import export_run
from sertool.export.calibrate import predict_as
from sertool.export.parity import kind_of_file, measure_parity
from sertool.features import Progress
from sertool.files import write_json
from sertool.networks import count_macs, count_parameters, predict
from sertool.run import Run, describe_environment

FLOAT = "float"
"""The trained network itself, among the kinds of files."""

FP32_TARGET = 1e-5
"""Largest difference of a logit from the network's, relative to the largest logit where that exceeds 1."""

UAR_TARGET = 0.005
AGREEMENT_TARGET = 0.99
AGREEMENT_TARGETS = {"mobilenet15": 0.98}
"""Depthwise layers lose more to 8 bits."""

ROUNDS = 40
"""Timed calls of each file."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Fold:
    """What the network of a fold and the files exported from it answer to its test clips.

    Attributes:
        run: the fold.
        clips: of its test speakers.
        files: by kind.
        logits: float32 (clips, classes), by kind.
        expected: by kind, the network's logits for the very frames that a file hears: a stream hears a clip once,
            where a window is filled with it.
    """

    run: Run
    clips: Sequence[Clip]
    files: Mapping[str, Recognizer]
    logits: Mapping[str, FloatArray]
    expected: Mapping[str, FloatArray]

    @property
    def number(self) -> int:
        """Of the fold in its split, from 1."""
        return self.run.recipe.data.fold

    @property
    def truth(self) -> np.ndarray:
        """Positions of the true labels (clips,)."""
        return np.array([self.run.labels.index(clip.label) for clip in self.clips])


def export_folds(runs: Sequence[Run], folder: Path, kinds: Sequence[tuple[str, str, str]], say: Say) -> list[Path]:
    """Export every run in several kinds; see :func:`sertool.export.artifact.export_run`.

    Args:
        runs: a run, or the folds of one.
        folder: for the files.
        kinds: format, precision and form of each.
        say: told what is being done.

    Returns:
        the files.
    """
    files = []
    for done, run in enumerate(runs, start=1):
        for file_format, precision, form in kinds:
            kind = kind_of_file(file_format, precision, form)
            say(f"run {done} of {len(runs)}: exporting {kind}")
            path = folder / f"{done}-{precision}-{form}.{file_format}"
            export_run(run, path, file_format=file_format, precision=precision, form=form, force=True)
            files.append(path)
    return files


def match_files(runs: Sequence[Run], paths: Sequence[Path]) -> dict[Path, dict[str, Recognizer]]:
    """Open exported files and find the run that each comes from.

    Args:
        runs: a run, or the folds of one.
        paths: files written by ``sertool export``.

    Returns:
        for the folder of each run that has any: its files by kind.

    Raises:
        UsageError: a file of another run, two of one kind from one run, or kinds that not the same folds have.
        ArtifactError: a file cannot be loaded.
    """
    by_checkpoint = {run.checkpoint_hash: run.path for run in runs}
    matched: dict[Path, dict[str, Recognizer]] = {}
    for path in paths:
        recognizer = Recognizer(path)
        kind = kind_of(recognizer.artifact, path)
        checkpoint = recognizer.artifact.provenance.get("export", {}).get("checkpoint")
        if checkpoint not in by_checkpoint:
            raise UsageError(
                f"{path}: not exported from the weights of {runs[0].path} or of another fold beside it; "
                "export it again, or name its own run"
            )
        files = matched.setdefault(by_checkpoint[checkpoint], {})
        if kind in files:
            raise UsageError(f"{files[kind].path} and {path} are both {kind} of {by_checkpoint[checkpoint]}; name one")
        files[kind] = recognizer
    every = {kind for files in matched.values() for kind in files}
    for folder, files in matched.items():
        if lacking := sorted(every - files.keys()):
            raise UsageError(
                f"{folder}: has no {lacking[0]} file among those named; name one for each fold, or for none"
            )
    return matched


def kind_of(artifact: Artifact, path: Path) -> str:
    """Name format, precision and, where it is not the window's, form of a file."""
    return kind_of_file(path.suffix, artifact.precision, artifact.form)


def answer_test_clips(run: Run, files: Mapping[str, Recognizer], progress: Progress | None = None) -> Fold:
    """Let the network of a run, and files exported from it, answer the clips of the run's test speakers.

    Args:
        run: a finished run.
        files: by kind.
        progress: told how many clips are done.

    Raises:
        AudioError: a clip cannot be read.
        UsageError: a clip of a label that was not trained.
    """
    clips = run.clips("test")
    unknown = sorted({clip.label for clip in clips} - set(run.labels))
    if unknown:
        raise UsageError(f"{run.manifest.path}: label {unknown[0]!r} was not trained; valid: {', '.join(run.labels)}")
    network = run.network()
    forms = {recognizer.artifact.form for recognizer in files.values()}
    logits: dict[str, list[FloatArray]] = {kind: [] for kind in files}
    expected: dict[str, list[FloatArray]] = {kind: [] for kind in files}
    for done, clip in enumerate(clips, start=1):
        samples = clip.read()
        window, frames = _window(run, samples), run.front_end.frames(len(samples))
        by_form = {form: predict_as(form, network, window, frames) for form in forms}
        for kind, recognizer in files.items():
            logits[kind].append(recognizer.logits(samples))
            expected[kind].append(by_form[recognizer.artifact.form])
        if progress:
            progress(done, len(clips))
    return Fold(run, clips, files, _stacked(logits), _stacked(expected))


def _stacked(rows: Mapping[str, list[FloatArray]]) -> dict[str, FloatArray]:
    return {kind: np.stack(of_kind) for kind, of_kind in rows.items()}


def _window(run: Run, samples: FloatArray) -> FloatArray:
    return run.normalization.apply(log_mel(tile_or_cut(samples, run.window_samples), run.front_end))


def prove(folds: Sequence[Fold]) -> dict[str, Any]:
    """Compare files with the networks they come from, folds pooled; time and weigh those of the first fold.

    Returns:
        ``network``, ``parameters``, ``macs``, ``split_hash``, ``clips``, ``speakers``, ``folds`` (their numbers),
        ``folds_of``, ``checkpoints`` (hash of the weights by fold), ``float_latency_ms`` and ``files``: for each its
        ``kind``; ``uar``, ``uar_interval``; ``float_uar`` and ``float_uar_interval`` of the network on the same frames;
        ``difference`` from the float
        network's UAR and ``difference_interval``, paired; ``agreement``: share of clips with the same most probable
        label; ``max_probability_difference``, calibrated; ``max_error`` of a logit, the ``largest`` logit, ``snr_db``
        of the logits; ``bytes``; ``latency_ms`` (``median``, ``p95``) of an
        answer, see :func:`measure_latency`; ``load_seconds`` and ``memory_bytes`` of a fresh process that listens with
        it; ``targets``. And ``versions``.
    """
    first = folds[0]
    latency = measure_latency(first.run, first.files)
    compared = {kind: compare([_set(folds, kind, FLOAT), _set(folds, kind, kind)]) for kind in first.files}
    files = []
    for kind, found in compared.items():
        network_score, score = (each["uar"] for each in found["sets"])
        change = found["differences"][0]["uar"]
        entry = {
            "kind": kind,
            "uar": score["mean"],
            "uar_interval": score["interval"],
            "float_uar": network_score["mean"],
            "float_uar_interval": network_score["interval"],
            "difference": change["difference"],
            "difference_interval": change["interval"],
            **_closeness(folds, kind),
            "bytes": first.files[kind].path.stat().st_size,
            "latency_ms": latency[kind],
            **measure_footprint(first.files[kind].path),
        }
        files.append(entry | {"targets": targets(first.run.recipe.network.name, kind, entry)})
    network = first.run.network()
    return {
        "network": first.run.recipe.network.name,
        "parameters": count_parameters(network),
        "macs": count_macs(
            network, first.run.front_end.frames(first.run.window_samples), first.run.front_end.mel_bands
        ),
        "split_hash": first.run.split_hash,
        "clips": sum(len(fold.clips) for fold in folds),
        "speakers": len({clip.speaker for fold in folds for clip in fold.clips}),
        "folds": [fold.number for fold in folds],
        "folds_of": len(first.run.split.folds),
        "checkpoints": {str(fold.number): fold.run.checkpoint_hash for fold in folds},
        "float_latency_ms": latency[FLOAT],
        "files": files,
        "versions": describe_environment()["versions"],
    }


def _set(folds: Sequence[Fold], kind: str, by: str) -> RunSet:
    """Return the answers of a kind of file, or by :data:`FLOAT` those of the network to what such a file hears."""
    logits = [fold.expected[kind] if by == FLOAT else fold.logits[kind] for fold in folds]
    first = folds[0].run
    answers = Answers(
        first.path,
        first.split_hash,
        first.labels,
        tuple(clip.key for fold in folds for clip in fold.clips),
        tuple(clip.speaker for fold in folds for clip in fold.clips),
        np.concatenate([np.full(len(fold.clips), fold.number) for fold in folds]),
        np.concatenate([fold.truth for fold in folds]),
        np.concatenate([of_fold.argmax(axis=1) for of_fold in logits]),
        len(first.split.folds),
    )
    return RunSet(by, (answers,))


def _closeness(folds: Sequence[Fold], kind: str) -> dict[str, float]:
    expected = np.concatenate([fold.expected[kind] for fold in folds])
    computed = np.concatenate([fold.logits[kind] for fold in folds])
    parity = measure_parity(expected, computed)
    return {
        "agreement": parity.agreement,
        "max_probability_difference": max(_probability_difference(fold, kind) for fold in folds),
        "max_error": parity.max_error,
        "largest": parity.largest,
        "snr_db": parity.snr_db,
    }


def _probability_difference(fold: Fold, kind: str) -> float:
    temperature = np.float32(fold.files[kind].artifact.temperature)
    expected, computed = (softmax(logits[kind] / temperature) for logits in (fold.expected, fold.logits))
    return float(np.abs(computed - expected).max())


def targets(network: str, kind: str, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say which of the bounds that a file of its kind should keep it does keep.

    Args:
        network: name of the architecture.
        kind: of the file.
        measured: an entry of ``files`` of :func:`prove`.

    Returns:
        for each bound its ``name``, the ``value`` and the ``bound`` as text, and whether it is ``met``.

    Example:
        >>> found = {"difference": -0.002, "agreement": 0.985, "max_error": 0.5, "largest": 8.0}
        >>> [(target["name"], target["met"]) for target in targets("resnet9", "onnx int8", found)]
        [('UAR', True), ('same label', False)]
    """
    if "fp32" in kind.split():
        relative = measured["max_error"] / max(1.0, measured["largest"])
        return [_target("logits", f"{relative:.1e} off", f"at most {FP32_TARGET:g}", relative <= FP32_TARGET)]
    change, agreement = measured["difference"], measured["agreement"]
    least = AGREEMENT_TARGETS.get(network, AGREEMENT_TARGET)
    within = f"at most {100 * UAR_TARGET:g} points off"
    return [
        _target("UAR", f"{100 * change:+.2f} points", within, abs(change) <= UAR_TARGET + 1e-9),
        _target("same label", f"{agreement:.2%}", f"at least {least:.0%}", agreement >= least),
    ]


def _target(name: str, value: str, bound: str, met: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "bound": bound, "met": bool(met)}


def measure_latency(run: Run, files: Mapping[str, Recognizer]) -> dict[str, dict[str, float]]:
    """Time an answer of the network and of files at one thread, in turns, so that a noisy moment hits all alike.

    An answer is a whole window; of a stream, its smallest hop.

    Returns:
        by kind: ``median`` and ``p95``, milliseconds.
    """
    network = run.network()
    window = _window(run, np.random.default_rng(0).normal(0, 0.05, run.window_samples).astype(np.float32))
    calls: dict[str, Callable[[], object]] = {FLOAT: lambda: predict(network, window[None])}
    for kind, recognizer in files.items():
        calls[kind] = _one_answer(load_backend(recognizer.path), window)
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(3 + ROUNDS):
            for kind, call in calls.items():
                began = time.perf_counter()
                call()
                times[kind].append(1000 * (time.perf_counter() - began))
    finally:
        torch.set_num_threads(threads)
    return {
        kind: {"median": float(np.median(spent[3:])), "p95": float(np.percentile(spent[3:], 95))}
        for kind, spent in times.items()
    }


def _one_answer(backend: Backend, window: FloatArray) -> Callable[[], object]:
    """Return what one score costs the device: a window, or a stream's smallest hop and the head over a window."""
    if not isinstance(backend, StreamBackend):
        return lambda: backend.predict(window[None])
    whole = len(window) // backend.stride * backend.stride
    features, states = backend.advance(window[:whole], backend.start())

    def hop() -> FloatArray:
        backend.advance(window[: backend.stride], states)
        return backend.classify(features)

    return hop


def measure_footprint(path: Path) -> dict[str, Any]:
    """Return seconds to load a file and bytes in memory after use, in a process that does nothing else.

    Raises:
        SerError: the process failed.
    """
    command = [sys.executable, "-m", "edge_runtime", "bench", str(path), "--seconds", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SerError(f"{path}: cannot be measured in a process of its own ({done.stderr.strip()})")
    found = json.loads(done.stdout)
    return {"load_seconds": found["load"], "memory_bytes": found["memory"]}


def save_proof(path: Path, found: dict[str, Any]) -> Path:
    """Write parity.json into a run, or into the folder above its folds; return the file."""
    file = path / "parity.json"
    write_json(file, found)
    return file
