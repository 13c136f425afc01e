"""Evaluation of runs on speakers they never saw: UAR, accuracy, confusion, per speaker, per gender, with intervals."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edge_runtime.errors import SerError, UsageError
from edge_runtime.frontend import FloatArray
from edge_runtime.recognizer import softmax
from sertool.batches import hear_in_turn, padded
from sertool.corpora.manifest import Clip
from sertool.features import ClipFrames, Progress, log_mel_clips, log_mel_windows
from sertool.files import write_json, write_text
from sertool.metrics import (
    IntArray,
    accuracy,
    confusion_matrix,
    expected_calibration_error,
    recall,
    speaker_interval,
    unweighted_average_recall,
)
from sertool.networks import Student, feature_stride, predict, predict_beginnings
from sertool.personal import personal_constants
from sertool.run import Run, RunError, read_metrics


@dataclass(frozen=True)
class Predictions:
    """What one or several runs say of test items.

    Attributes:
        labels: class names in the order of the columns of ``probabilities``.
        keys: the clips.
        speakers: who speaks in each.
        genders: ``f``, ``m`` or empty, for each clip.
        truth: int64 (N,), positions of the true labels.
        probabilities: float32 (N, classes).
        streamed: whether each item was heard as a stream hears it, not repeated to a window; see
            :func:`evaluate_run`.
    """

    labels: tuple[str, ...]
    keys: tuple[str, ...]
    speakers: tuple[str, ...]
    genders: tuple[str, ...]
    truth: IntArray
    probabilities: FloatArray
    streamed: bool = False

    @property
    def predicted(self) -> IntArray:
        """Positions of the most probable labels (N,)."""
        return np.asarray(self.probabilities.argmax(axis=1), np.int64)

    def confusion(self, chosen: Sequence[bool] | None = None) -> IntArray:
        """Return the confusion matrix of all items, or of those that ``chosen`` marks."""
        mask = np.ones(len(self.truth), bool) if chosen is None else np.asarray(chosen)
        return confusion_matrix(self.truth[mask], self.predicted[mask], len(self.labels))

    def save(self, path: Path) -> None:
        """Write one row an item: file, speaker, gender, truth, predicted label, one probability a label."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["file", "speaker", "gender", "truth", "predicted", *self.labels])
        for row, key in enumerate(self.keys):
            names = [self.labels[self.truth[row]], self.labels[self.predicted[row]]]
            # All digits that float32 has: temperatures are fitted on the smallest of them.
            shares = [f"{share:.9g}" for share in self.probabilities[row]]
            writer.writerow([key, self.speakers[row], self.genders[row], *names, *shares])
        write_text(path, text.getvalue())

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read :meth:`save` back.

        Raises:
            RunError: the file is missing or damaged.
        """
        try:
            header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
            labels = tuple(header[5:])
            keys, speakers, genders, truth = (tuple(column) for column in zip(*(row[:4] for row in rows), strict=True))
            probabilities = np.array([row[5:] for row in rows], np.float32)
            positions = np.array([labels.index(label) for label in truth])
        except (OSError, ValueError, csv.Error) as error:
            raise RunError(f"{path}: damaged; run sertool evaluate again") from error
        return cls(labels, keys, speakers, genders, positions, probabilities)


Known = Literal["nothing", "in-turn", "calibrated"]
"""What is known of the speaker before a clip is heard. ``in-turn``: the speaker's other clips were heard before, one
after the other in random order, and statistics ran on. ``calibrated``: the device was calibrated to the speaker's calm
speech. Results of one belong in no table of another."""

TURNS_SEED = 0
"""Of the order in which a speaker's clips are heard in turn."""


def evaluate_run(
    run: Run, part: str = "test", on_features: Progress | None = None, *, known: Known = "nothing"
) -> Predictions:
    """Apply a run's network to the clips of a part of its split.

    Each is scored as it is on the device. A network with the paper's padding hears a window, to which the clip is
    repeated or cut. A causal network hears a stream: the clip once, from a reset, with the mean over its own frames, up
    to one window.

    Args:
        run: a finished run.
        part: ``test``, ``validation`` or ``train``.
        on_features: told while log-Mel spectrograms are computed.
        known: what is known of each speaker; what a calibrated device knows is measured on other clips of this part.

    Raises:
        UsageError: a network that was not trained for what is known, a part without speakers, a clip with a label the
            run does not know, or a manifest that no longer agrees with what was trained on (see
            :meth:`sertool.run.Run.clips`).
        AudioError: a clip cannot be read.
        RunError: the network answers with something that is not a finite number.
    """
    clips, network = scored_clips(run, part, known), run.network()
    row_of = {clip.key: row for row, clip in enumerate(run.manifest.clips)}
    rows = [row_of[clip.key] for clip in clips]
    if is_streamed(run):
        stride = feature_stride(network)
        spectrograms = log_mel_clips(run.manifest, run.front_end, stride, on_features, run.window_samples).take(rows)
    else:
        windows = log_mel_windows(run.manifest, run.front_end, run.window_samples, on_features)
        spectrograms = ClipFrames.of_windows(windows).take(rows)
    return score(run, network, clips, spectrograms, known)


def is_streamed(run: Run) -> bool:
    """Say whether a run's network hears clips as a stream, or each as a window; see :func:`evaluate_run`."""
    return run.recipe.network.time_padding == "causal"


def scored_clips(run: Run, part: str, known: Known = "nothing") -> list[Clip]:
    """Return the clips of a part of a run's split, if the run can be scored on them.

    Raises:
        UsageError: see :func:`evaluate_run`.
    """
    clips = run.clips(part)
    unknown = sorted({clip.label for clip in clips} - set(run.labels))
    if unknown:
        raise UsageError(
            f"{run.recipe.data.manifest}: label {unknown[0]!r} was not trained; valid: {', '.join(run.labels)}"
        )
    if known == "in-turn" and not run.normalization.runs:
        raise UsageError(
            f"{run.path}: is normalised by constants, so it makes no difference who was heard before; "
            "leave --in-turn out, or train with normalization.kind = 'running'"
        )
    if known == "calibrated" and not run.normalization.personal:
        raise UsageError(
            f"{run.path}: was not trained to be calibrated; leave --calibrated out, or train with "
            "normalization.personal above 0"
        )
    return clips


def score(
    run: Run,
    network: Student,
    clips: Sequence[Clip],
    spectrograms: ClipFrames,
    known: Known = "nothing",
    excerpts: Sequence[Sequence[FloatArray]] | None = None,
) -> Predictions:
    """Apply a run's network to spectrograms of clips.

    Args:
        run: whose labels, normalisation and window are used.
        network: the run's.
        clips: that are heard.
        spectrograms: of the clips, dB: windows for the paper's padding. Of the speakers' calm ones, where ``known`` is
            ``calibrated``, constants are measured.
        known: what is known of each speaker.
        excerpts: what is heard of each clip instead, one spectrogram (frames, mel_bands), dB, or several, whose
            probabilities are averaged; not with ``in-turn``.

    Raises:
        RunError: the network answers with something that is not a finite number.
    """
    speakers, labels = [clip.speaker for clip in clips], [clip.label for clip in clips]
    if known == "in-turn":
        random = np.random.default_rng(TURNS_SEED)
        heard = [[frames] for frames in hear_in_turn(spectrograms, speakers, run.normalization, random)]
    else:
        constants = [run.normalization] * len(clips)
        if known == "calibrated":
            settings = run.recipe.normalization
            constants = personal_constants(spectrograms, speakers, labels, constants, settings, run.front_end)
        taken = excerpts or [[frames] for frames in spectrograms]
        heard = [[own.apply(frames) for frames in each] for own, each in zip(constants, taken, strict=True)]
    answers = softmax(_logits(run, network, [frames for each in heard for frames in each]))
    counts = np.array([len(each) for each in heard])
    sums = np.add.reduceat(answers, np.cumsum(counts) - counts)
    return Predictions(
        run.labels,
        tuple(clip.key for clip in clips),
        tuple(speakers),
        tuple(clip.gender for clip in clips),
        np.array([run.labels.index(label) for label in labels]),
        np.asarray(sums / counts[:, None], np.float32),
        is_streamed(run),
    )


def _logits(run: Run, network: Student, spectrograms: Sequence[FloatArray]) -> FloatArray:
    """Return the logits (N, classes) of normalised spectrograms: of their beginnings, or of whole windows."""
    if is_streamed(run):
        longest = run.front_end.frames(run.window_samples)
        logits = predict_beginnings(network, *padded([frames[:longest] for frames in spectrograms], longest))
    else:
        logits = predict(network, np.stack(spectrograms))
    if not np.isfinite(logits).all():
        raise RunError(
            f"{run.path}: its network answers with infinite numbers; train again, with a lower learning rate"
        )
    return logits


def pool(parts: Sequence[Predictions]) -> Predictions:
    """Put the test items of several folds together, as if one run had predicted them all.

    Raises:
        SerError: the runs have different labels, or test one clip twice.
    """
    first = parts[0]
    if any(part.streamed != first.streamed for part in parts):
        raise SerError("some of these runs are causal and some are not; evaluate them one by one")
    if any(part.labels != first.labels for part in parts):
        raise SerError("these runs were trained on different labels and cannot be pooled; evaluate them one by one")
    keys = tuple(key for part in parts for key in part.keys)
    if len(set(keys)) < len(keys):
        raise SerError("these runs test the same clip more than once and cannot be pooled; evaluate them one by one")
    return Predictions(
        first.labels,
        keys,
        tuple(speaker for part in parts for speaker in part.speakers),
        tuple(gender for part in parts for gender in part.genders),
        np.concatenate([part.truth for part in parts]),
        np.concatenate([part.probabilities for part in parts]),
        first.streamed,
    )


def summarize(predictions: Predictions) -> dict[str, Any]:
    """Return the metrics of pooled items.

    Returns:
        ``items``, ``form`` (how each was heard: ``window`` or ``stream``), ``uar``, ``uar_interval`` (95 %, resampling
        speakers; None for one speaker), ``accuracy``, ``accuracy_interval``, ``labels``, ``confusion`` (true classes in
        rows), ``recall`` and ``recall_interval`` by label, ``speakers`` and ``genders`` (UAR of each over the classes
        that occur there), ``gender_interval``, ``ece`` (of the probabilities as they are, before a temperature). UAR
        equals scikit-learn's ``balanced_accuracy_score``.
    """
    confusion = predictions.confusion()
    speakers = np.array(predictions.speakers)
    genders = np.array(predictions.genders)
    by_speaker = {name: predictions.confusion(speakers == name) for name in sorted(set(predictions.speakers))}
    by_gender = {name: predictions.confusion(genders == name) for name in sorted(set(predictions.genders)) if name}
    matrices = list(by_speaker.values())
    return {
        "items": len(predictions.keys),
        "form": "stream" if predictions.streamed else "window",
        "uar": unweighted_average_recall(confusion),
        "uar_interval": interval_or_none(matrices),
        "accuracy": accuracy(confusion),
        "accuracy_interval": interval_or_none(matrices, accuracy),
        "labels": list(predictions.labels),
        "confusion": confusion.tolist(),
        "recall": {
            label: recall(confusion, row) if confusion[row].any() else None
            for row, label in enumerate(predictions.labels)
        },
        "recall_interval": {
            label: interval_or_none(matrices, partial(recall, row=row)) if confusion[row].any() else None
            for row, label in enumerate(predictions.labels)
        },
        "speakers": {name: unweighted_average_recall(matrix) for name, matrix in by_speaker.items()},
        "genders": {name: unweighted_average_recall(matrix) for name, matrix in by_gender.items()},
        "gender_interval": {
            name: interval_or_none([by_speaker[speaker] for speaker in sorted(set(speakers[genders == name]))])
            for name in by_gender
        },
        "ece": expected_calibration_error(predictions.probabilities, predictions.truth),
    }


def interval_or_none(
    matrices: Sequence[IntArray], metric: Callable[[IntArray], float] = unweighted_average_recall
) -> list[float] | None:
    """Return :func:`sertool.metrics.speaker_interval` for JSON, which knows no NaN."""
    low, high = speaker_interval(matrices, metric=metric)
    return None if np.isnan(low) else [low, high]


def part_name(part: str, known: Known) -> str:
    """Return under what name results are kept: the part's, and what was known of the speakers.

    Example:
        >>> part_name("test", "nothing"), part_name("test", "calibrated")
        ('test', 'test-calibrated')
    """
    return part if known == "nothing" else f"{part}-{known}"


def predictions_path(folder: Path, part: str) -> Path:
    """Return where the items of a part are kept: predictions.csv for ``test``, predictions-PART.csv for the others."""
    return folder / ("predictions.csv" if part == "test" else f"predictions-{part}.csv")


def save_evaluation(
    folder: Path,
    part: str,
    predictions: Predictions,
    split_hash: str,
    folds: Sequence[int] = (),
    folds_of: int | None = None,
) -> dict[str, Any]:
    """Write the predictions (see :func:`predictions_path`) and this part's entry of ``metrics.json``; return the entry.

    Args:
        folder: the run, or the folder above its folds.
        part: which part was predicted.
        predictions: the items.
        split_hash: of the split that says who was tested.
        folds: numbers of the folds pooled here; none for a single run.
        folds_of: how many the split has, so that a pooled result says itself whether it is complete.
    """
    predictions.save(predictions_path(folder, part))
    entry = summarize(predictions) | {"split_hash": split_hash}
    if folds:
        entry |= {"folds": list(folds), "folds_of": folds_of}
    write_json(folder / "metrics.json", read_metrics(folder) | {part: entry})
    return entry
