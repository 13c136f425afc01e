"""What a run still hears under noise, in rooms and over channels that its test clips do not have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.errors import UsageError
from edge_runtime.frontend import FloatArray, log_mel, tile_or_cut
from sertool import __version__
from sertool.corpora.manifest import Clip
from sertool.degrade import CONDITIONS, SEED, Condition, Random, Scene
from sertool.evaluate import (
    Known,
    Predictions,
    interval_or_none,
    is_streamed,
    part_name,
    pool,
    score,
    scored_clips,
    summarize,
)
from sertool.features import ClipFrames, log_mel_clip, longest_samples
from sertool.files import write_json
from sertool.metrics import IntArray, unweighted_average_recall
from sertool.networks import feature_stride
from sertool.run import Run, RunError, describe_clips, load_folds, read_robustness

OnCondition = Callable[[str, int, int], None]
"""Told the name of the condition that begins, how many are done, and how many there are."""


def measure_robustness(
    path: Path,
    conditions: Sequence[Condition],
    part: str = "test",
    on_condition: OnCondition | None = None,
    *,
    known: Known = "nothing",
) -> dict[str, Any]:
    """Score a run, or all finished folds below a folder pooled, under conditions; keep the results.

    Degraded audio exists in memory only. Each result is written to ``robustness.json`` of ``path`` as soon as it is
    there; one that is in it already, of the same weights, clips and condition, is not computed again.

    Args:
        path: a run, or the folder above the folds of one.
        conditions: ``clean`` first; see :func:`sertool.degrade.chosen_conditions`.
        part: ``test``, ``validation`` or ``train``.
        on_condition: told which condition begins.
        known: ``nothing`` or ``calibrated``: then a speaker's calm speech goes through the same condition, uncut.

    Returns:
        ``part``, ``known``, ``split_hash``, ``clips`` and ``speakers`` (numbers), ``labels``, ``folds`` (their
        numbers), ``folds_of``, ``form`` (how each clip is heard, see :func:`sertool.evaluate.summarize`), and
        ``conditions``: for each by name its ``text``, ``uar``, ``uar_interval``, ``recall`` by label, ``difference``
        of its UAR from that of ``clean``, ``difference_interval`` (95 %, the same resampled speakers on both sides;
        None for one speaker), ``confusion`` by speaker, and ``key``, which follows what it was computed from.

    Raises:
        SerError: what :func:`sertool.run.load_folds` and :func:`sertool.evaluate.evaluate_run` raise; a
            ``robustness.json`` that is damaged.
    """
    hearings = [Hearing(run, part, known) for run in load_folds(path)]
    origin = json.dumps([__version__, SEED, part, known, [hearing.identity() for hearing in hearings]])
    section = part_name(part, known)
    about = _describe(hearings) | {"part": part, "known": known}
    kept = _kept(path, section, origin)
    for done, condition in enumerate(conditions):
        if on_condition:
            on_condition(condition.name, done, len(conditions))
        if condition.name not in kept:
            predictions = pool([hearing.predictions(condition) for hearing in hearings])
            kept[condition.name] = _result(predictions, condition, kept.get("clean")) | {"key": _key(origin, condition)}
            ordered = {name: kept[name] for name in CONDITIONS if name in kept}
            # Read again: a command on other speakers, or with other knowledge, may have written meanwhile.
            write_json(path / "robustness.json", read_robustness(path) | {section: about | {"conditions": ordered}})
    return about | {"conditions": {condition.name: kept[condition.name] for condition in conditions}}


class Hearing:
    """A run that hears the clips of a part of its split under conditions.

    Args:
        run: a finished run.
        part: ``test``, ``validation`` or ``train``.
        known: what is known of each speaker.

    Raises:
        UsageError: see :func:`sertool.evaluate.evaluate_run`.
    """

    def __init__(self, run: Run, part: str, known: Known) -> None:
        self.run = run
        self.clips = scored_clips(run, part, known)
        self._known = known
        self._network = run.network()
        self._voices = run.clips("train")

    def identity(self) -> list[Any]:
        """Return what decides the answers, for JSON."""
        normalization = self.run.recipe.normalization.model_dump(mode="json")
        return [self.run.checkpoint_hash, normalization, describe_clips(self.clips), describe_clips(self._voices)]

    def predictions(self, condition: Condition) -> Predictions:
        """Return what the run says of its clips under a condition.

        Raises:
            AudioError: a clip cannot be read.
            UsageError: nobody else was trained on, of whom voices could be taken.
            RunError: the network answers with something that is not a finite number.
        """
        spectrograms, excerpts = [], []
        longest = longest_samples(self.run.front_end, self.run.window_samples)
        for clip in self.clips:
            samples = condition.degrade(clip.read()[:longest], Scene(clip.key, partial(self._draw, clip)))
            spectrograms.append(self._spectrogram(samples))
            if condition.excerpts:
                excerpts.append([self._spectrogram(excerpt) for excerpt in condition.excerpts(samples)])
        return score(self.run, self._network, self.clips, ClipFrames.of(spectrograms), self._known, excerpts)

    def _spectrogram(self, samples: FloatArray) -> FloatArray:
        if is_streamed(self.run):
            return log_mel_clip(samples, self.run.front_end, feature_stride(self._network))
        return log_mel(tile_or_cut(samples, self.run.window_samples), self.run.front_end)

    def _draw(self, clip: Clip, random: Random, count: int) -> list[FloatArray]:
        """Return clips of training speakers other than the one of a clip."""
        others = [voice for voice in self._voices if voice.speaker != clip.speaker]
        if not others:
            raise UsageError(
                f"{self.run.path}: no training speaker but {clip.speaker!r}, so there are no voices for babble; "
                "choose other --conditions"
            )
        return [_read(others[row]) for row in random.choice(len(others), count, replace=len(others) < count)]


@lru_cache(maxsize=256)
def _read(clip: Clip) -> FloatArray:
    return clip.read()


def _key(origin: str, condition: Condition) -> str:
    return hashlib.sha256(f"{origin} {condition.name} {condition.text}".encode()).hexdigest()[:16]


def _kept(path: Path, section: str, origin: str) -> dict[str, Any]:
    """Return the results in ``robustness.json`` that would be the same if they were computed again."""
    try:
        results = read_robustness(path).get(section, {"conditions": {}})["conditions"]
        return {
            name: result
            for name, result in results.items()
            if name in CONDITIONS and result["key"] == _key(origin, CONDITIONS[name])
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise RunError(f"{path / 'robustness.json'}: damaged; delete it and run the same command again") from error


def _describe(hearings: Sequence[Hearing]) -> dict[str, Any]:
    first = hearings[0].run
    clips = [clip for hearing in hearings for clip in hearing.clips]
    return {
        "split_hash": first.split_hash,
        "clips": len(clips),
        "speakers": len({clip.speaker for clip in clips}),
        "labels": list(first.labels),
        "folds": [hearing.run.recipe.data.fold for hearing in hearings],
        "folds_of": len(first.split.folds),
        "form": "stream" if is_streamed(first) else "window",
    }


def _result(predictions: Predictions, condition: Condition, clean: dict[str, Any] | None) -> dict[str, Any]:
    """Return an entry of ``conditions`` but for its key; ``clean`` is that of the clean clips, None for themselves."""
    speakers = np.array(predictions.speakers)
    confusion = {name: predictions.confusion(speakers == name) for name in sorted(set(predictions.speakers))}
    baseline = confusion if clean is None else {name: np.array(clean["confusion"][name]) for name in confusion}
    pairs = [np.stack([baseline[name], confusion[name]]) for name in confusion]
    summary = summarize(predictions)
    return {
        "text": condition.text,
        **{name: summary[name] for name in ("uar", "uar_interval", "recall")},
        "difference": _difference(np.sum(pairs, axis=0)),
        "difference_interval": interval_or_none(pairs, _difference),
        "confusion": {name: matrix.tolist() for name, matrix in confusion.items()},
    }


def _difference(pair: IntArray) -> float:
    """Return by how much the UAR of the second of two confusion matrices (2, classes, classes) is the higher one."""
    first, second = pair
    return unweighted_average_recall(second) - unweighted_average_recall(first)
