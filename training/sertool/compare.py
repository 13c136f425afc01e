"""Comparison of runs on the same test clips: intervals over speakers, paired differences and two classical tests."""

from __future__ import annotations

import csv
import glob
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm
from scipy.stats import t as student_t

from edge_runtime.errors import UsageError, nearest
from sertool.corpora.splits import PARTS
from sertool.evaluate import Known, part_name, predictions_path
from sertool.metrics import IntArray, accuracy, unweighted_average_recall
from sertool.run import RunError, read_metrics, refuse_run_beside_folds

FloatArray = NDArray[np.float64]
METRICS: dict[str, Callable[[IntArray], float]] = {"uar": unweighted_average_recall, "accuracy": accuracy}
DRAWS = 2000


@dataclass(frozen=True)
class Answers:
    """What one run answers to the clips of a part of its split; its folds, if it has some, are pooled.

    Attributes:
        path: the run, or the folder above its folds.
        split_hash: of the split that says who was tested.
        labels: class names.
        keys: the clips, sorted.
        speakers: who speaks in each.
        folds: int64 (N,), number of the fold that tests each; 1 for a run without folds.
        truth: int64 (N,), positions of the true labels.
        predicted: int64 (N,), positions of the answers.
        folds_of: how many folds the split has; None for a run without folds, or evaluated before this was written down.
    """

    path: Path
    split_hash: str
    labels: tuple[str, ...]
    keys: tuple[str, ...]
    speakers: tuple[str, ...]
    folds: IntArray
    truth: IntArray
    predicted: IntArray
    folds_of: int | None = None

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each clip is answered correctly (N,)."""
        return np.equal(self.truth, self.predicted)

    def confusions(self, group_of_clip: Sequence[Any] | IntArray) -> IntArray:
        """Return a confusion matrix a group (groups, classes, classes), groups sorted, true classes in rows."""
        groups, positions = np.unique(group_of_clip, return_inverse=True)
        counts = np.zeros((len(groups), len(self.labels), len(self.labels)), np.int64)
        np.add.at(counts, (positions, self.truth, self.predicted), 1)
        return counts


@dataclass(frozen=True)
class Score:
    """One metric of a set of runs.

    Attributes:
        by_seed: float64 (seeds,), all folds pooled.
        by_fold: float64 (folds,), averaged over seeds.
        draws: float64 (2000,), averaged over seeds, of bootstrap draws of speakers; empty for one speaker.
    """

    by_seed: FloatArray
    by_fold: FloatArray
    draws: FloatArray

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(self.by_seed.mean())

    def to_json(self) -> dict[str, Any]:
        """Return mean, interval and spread."""
        return {
            "mean": self.mean,
            "interval": _interval(self.draws),
            "by_seed": self.by_seed.tolist(),
            "seed_deviation": _standard_deviation(self.by_seed),
            "by_fold": self.by_fold.tolist(),
            "fold_deviation": _standard_deviation(self.by_fold),
        }


@dataclass(frozen=True)
class RunSet:
    """Runs of one setting that differ in their seed alone.

    Attributes:
        name: as the user wrote it.
        runs: at least one, all with the same clips.
    """

    name: str
    runs: tuple[Answers, ...]

    @cached_property
    def scores(self) -> dict[str, Score]:
        """``uar`` and ``accuracy``."""
        by_speaker = np.stack([run.confusions(run.speakers) for run in self.runs], axis=1)
        by_fold = np.stack([run.confusions(run.folds) for run in self.runs], axis=1)
        draws = _draw_speakers(by_speaker)
        return {
            name: Score(
                np.array([metric(seed) for seed in by_speaker.sum(axis=0)]),
                _mean_over_seeds(metric, by_fold),
                _mean_over_seeds(metric, draws),
            )
            for name, metric in METRICS.items()
        }


# --- reading -------------------------------------------------------------------------------------------------------


def load_set(name: str, part: str = "test") -> RunSet:
    """Read a run, or several that count as one set.

    Args:
        name: a run folder, the folder above the folds of one, or several of these: joined by commas, matched by a
            pattern (``runs/base-seed*``), or both. With ``@calibrated`` or ``@in-turn`` behind it, what
            ``sertool evaluate`` found with that knowledge of the speakers.
        part: ``test``, ``validation`` or ``train``.

    Raises:
        UsageError: nothing matches, a run is named twice or not evaluated, or the runs do not have the same split,
            labels and clips.
        RunError: predictions.csv or metrics.json is damaged, or a run stands beside folds.
    """
    if part not in PARTS:
        raise UsageError(f"part {part!r} is unknown; {nearest(part, PARTS)}")
    folders, known = knowledge(name)
    paths = _matching(folders)
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError(f"{name!r} names a run twice; each seed counts once")
    return make_set(name, [_read_run(path, part, known) for path in paths])


def make_set(name: str, runs: Sequence[Answers]) -> RunSet:
    """Count runs that were read already as one set.

    Raises:
        UsageError: they do not have the same split, labels and clips.
    """
    for run in runs:
        _require_same_clips(runs[0], run)
    return RunSet(name, tuple(runs))


def knowledge(name: str) -> tuple[str, Known]:
    """Return the folders in a set's name, and what is known of its speakers.

    Raises:
        UsageError: nothing of the kind can be known.

    Example:
        >>> knowledge("runs/device@calibrated")
        ('runs/device', 'calibrated')
    """
    folders, at, known = name.rpartition("@")
    if not at or Path(name).is_dir() or "/" in known:
        return name, "nothing"
    for valid in get_args(Known):
        if known == valid:
            return folders, valid
    raise UsageError(f"{name!r}: {known!r} is unknown; {nearest(known, get_args(Known))}")


def _matching(name: str) -> list[Path]:
    if name and Path(name).is_dir():  # also one whose name holds a comma or a bracket
        return [Path(name)]
    if "," in name:
        return [path for part in name.split(",") for path in _matching(part)]
    matches = map(Path, sorted(glob.glob(name)))  # noqa: PTH207, Path.glob takes no absolute pattern
    folders = [path for path in matches if path.is_dir()]
    if not folders:
        raise UsageError(f"{name!r}: no such run folder; make one with: sertool train")
    return folders


def _read_run(path: Path, part: str, known: Known) -> Answers:
    folders = {
        int(number): folder
        for folder in path.glob("fold-*")
        if (number := folder.name.removeprefix("fold-")).isdecimal()
    }
    refuse_run_beside_folds(path, sorted(folders.values()))
    if not folders:
        return _pool(path, [_read(path, part, known, path, 1)])
    # Where the evaluation of the folds says which it pooled, others are not trained to the end yet.
    entry = read_metrics(path).get(part_name(part, known))
    pooled, count = (entry.get("folds"), entry.get("folds_of")) if isinstance(entry, dict) else (None, None)
    folds = [
        _read(folders.get(number, path / f"fold-{number}"), part, known, path, number)
        for number in sorted(pooled or folders)
    ]
    return _pool(path, folds, count)


def _read(folder: Path, part: str, known: Known, run: Path, fold: int) -> Answers:
    """Read what ``sertool evaluate`` wrote: predictions.csv and metrics.json have to say the same."""
    path = predictions_path(folder, part_name(part, known))
    entry = read_metrics(folder).get(part_name(part, known))
    options = ("" if part == "test" else f" --part {part}") + ("" if known == "nothing" else f" --{known}")
    command = f"sertool evaluate {run}{options}"
    if entry is None or not path.is_file():
        raise UsageError(f"{folder}: its {part} speakers are not evaluated yet; run: {command}")
    try:
        answers = _parse(folder, path.read_text(encoding="utf-8"), entry, fold)
        whole = answers.confusions(answers.folds)[0].tolist() == entry["confusion"]
    except (ValueError, KeyError, TypeError, csv.Error):
        whole = False
    if not whole:
        raise RunError(f"{path}: damaged, or not of the evaluation in metrics.json beside it; run: {command}")
    return answers


def _parse(folder: Path, text: str, entry: dict[str, Any], fold: int) -> Answers:
    _, *rows = csv.reader(io.StringIO(text, newline=""))
    keys, speakers, _, truth, predicted = zip(*(row[:5] for row in rows), strict=True)
    position = {label: position for position, label in enumerate(entry["labels"])}
    return Answers(
        folder,
        entry["split_hash"],
        tuple(position),
        keys,
        speakers,
        np.full(len(keys), fold),
        np.array([position[label] for label in truth]),
        np.array([position[label] for label in predicted]),
    )


def _pool(path: Path, folds: Sequence[Answers], folds_of: int | None = None) -> Answers:
    for fold in folds:
        _require_same_split(folds[0], fold)
    keys = [key for fold in folds for key in fold.keys]
    speakers = [speaker for fold in folds for speaker in fold.speakers]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    for first, second in pairwise(order):
        if keys[first] == keys[second]:
            raise UsageError(f"{path}: answers clip {keys[first]!r} more than once; compare its folds one by one")
    return Answers(
        path,
        folds[0].split_hash,
        folds[0].labels,
        tuple(keys[row] for row in order),
        tuple(speakers[row] for row in order),
        np.concatenate([fold.folds for fold in folds])[order],
        np.concatenate([fold.truth for fold in folds])[order],
        np.concatenate([fold.predicted for fold in folds])[order],
        folds_of,
    )


def _require_same_split(first: Answers, second: Answers) -> None:
    for what, one, other in (
        ("splits", first.split_hash, second.split_hash),
        ("labels", ", ".join(first.labels), ", ".join(second.labels)),
    ):
        if one != other:
            raise UsageError(
                f"{first.path} and {second.path} have different {what} ({one}; {other}) and cannot be compared; "
                "train and evaluate both on the same split and manifest"
            )


def _require_same_clips(first: Answers, second: Answers) -> None:
    _require_same_split(first, second)
    if differing := sorted(set(first.keys) ^ set(second.keys)):
        key = differing[0]
        having, lacking = (first, second) if key in first.keys else (second, first)
        raise UsageError(
            f"{having.path} answers clip {key!r}, which {lacking.path} does not ({len(differing)} clips differ); "
            "evaluate both on the same folds and manifest"
        )
    differs = (first.truth != second.truth) | (np.array(first.speakers) != np.array(second.speakers))
    if differs.any():
        row = int(differs.argmax())
        one, other = (f"{run.labels[run.truth[row]]!r} by {run.speakers[row]!r}" for run in (first, second))
        raise UsageError(
            f"clip {first.keys[row]!r} is {one} in {first.path} but {other} in {second.path}; "
            "evaluate both on the same manifest"
        )


# --- statistics ----------------------------------------------------------------------------------------------------


def compare(sets: Sequence[RunSet]) -> dict[str, Any]:
    """Compare sets of runs with the first of them.

    Every interval is the 95 % percentile interval of 2000 bootstrap draws of speakers. The same draws serve every
    set, so that a difference is paired: a speaker who is hard is hard for both. Within a draw the metric is averaged
    over seeds: such an interval speaks of other speakers, not of other seeds, so that one unlucky run of the baseline
    may pass for an improvement. Every difference therefore has a second interval, over seeds: see
    :func:`seed_interval`. A single run has the interval that ``sertool evaluate`` gives it.

    Returns:
        ``split_hash``, ``clips``, ``speakers``; ``sets``: for each its ``name``, ``runs``, ``folds`` (their numbers),
        ``folds_of`` (how many the split has; None where that is unknown) and for ``uar`` and ``accuracy`` the ``mean``
        over seeds of all folds pooled, its ``interval`` (None for one speaker), ``by_seed``, ``by_fold`` (averaged over
        seeds) and the standard deviations ``seed_deviation`` and ``fold_deviation`` (None for one); ``differences``:
        for each further set its ``difference`` from the baseline, its ``interval`` and ``seed_interval`` (None for one
        seed) in both metrics, :func:`z_test` of the mean UARs, and :func:`mcnemar` of every seed of the set with every
        seed of the baseline, with the median of the p-values.

    Raises:
        UsageError: the sets do not have the same split, labels and clips.
    """
    baseline, *candidates = sets
    first = baseline.runs[0]
    for candidate in candidates:
        _require_same_clips(first, candidate.runs[0])
    return {
        "split_hash": first.split_hash,
        "clips": len(first.keys),
        "speakers": len(set(first.speakers)),
        "sets": [_describe(runs) for runs in sets],
        "differences": [_difference(baseline, candidate) for candidate in candidates],
    }


def z_test(baseline: float, rate: float, clips: int) -> tuple[float, float]:
    """Return z and the one-tailed p-value of the hypothesis that a rate is no higher than the baseline's.

    The test of the paper's section 3.4: two proportions with pooled variance, as if the UAR were a share of so many
    independent clips, and as if the two runs had answered different clips. Neither holds. Clips of one speaker
    resemble each other, which makes p too small; both runs answer the same clips, which makes it too large. It is
    here to be read beside the paper; the interval of the paired difference assumes neither.

    Args:
        baseline: UAR or accuracy in [0, 1].
        rate: what should be higher.
        clips: number of clips that each was measured on.

    Example:
        CNN-6 in the paper's Table 3, without and with three neighbours:

        >>> z, p = z_test(0.731, 0.770, 2326)
        >>> round(z, 2), round(p, 4)
        (3.07, 0.0011)
    """
    pooled = (baseline + rate) / 2
    deviation = math.sqrt(2 * pooled * (1 - pooled) / clips)
    z = (rate - baseline) / deviation if deviation else 0.0
    return z, float(norm.sf(z))


def mcnemar(only_baseline: int, only_other: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: are both runs right equally often?

    Only clips that one run gets right and the other wrong count; if neither is better they fall either way like a
    coin (McNemar, 1947; exact binomial rather than chi-squared, so that few of them are no problem). The test pairs
    clips, yet takes them as independent: with few speakers its p-value is too small.

    Args:
        only_baseline: clips that the baseline alone gets right.
        only_other: clips that the other run alone gets right.

    Example:
        >>> mcnemar(2, 8)
        0.109375
    """
    discordant = only_baseline + only_other
    return float(binomtest(only_baseline, discordant).pvalue) if discordant else 1.0


def seed_interval(baseline: FloatArray, other: FloatArray, *, paired: bool = False) -> list[float] | None:
    """Return the 95 % interval of the difference that other seeds would show on the same speakers.

    By Welch's t-test (1947), which does not take both to vary alike; wide for two or three seeds, as it should be.

    Args:
        baseline: score of each seed (n,).
        other: score of each seed (m,).
        paired: scores of the same weights, seed by seed, that were evaluated in two ways: Student's paired interval.

    Returns:
        lower and upper end of other minus baseline; None where either has one seed.

    Example:
        Three seeds of ResNet-9, of which the last had bad luck, and the same with a graph:

        >>> half_width(seed_interval(np.array([0.694, 0.664, 0.567]), np.array([0.710, 0.679, 0.636])))
        '± 13.6'
    """
    if min(len(baseline), len(other)) < 2:
        return None
    samples = (other - baseline,) if paired else (other, baseline)
    difference = float(other.mean() - baseline.mean())
    counts = np.array([len(sample) for sample in samples])
    squares = np.array([sample.var(ddof=1) for sample in samples]) / counts  # of the standard error of each mean
    if not squares.any():
        return [difference, difference]
    freedom = squares.sum() ** 2 / (squares**2 / (counts - 1)).sum()
    reach = float(student_t.ppf(0.975, freedom) * np.sqrt(squares.sum()))
    return [difference - reach, difference + reach]


def half_width(interval: Sequence[float] | None) -> str:
    """Say how far a :func:`seed_interval` goes to either side, in points.

    Example:
        >>> half_width([-0.11, 0.18]), half_width(None)
        ('± 14.5', 'one seed')
    """
    return "one seed" if interval is None else f"± {50 * (interval[1] - interval[0]):.1f}"


def _describe(runs: RunSet) -> dict[str, Any]:
    scores = {name: score.to_json() for name, score in runs.scores.items()}
    first = runs.runs[0]
    return {
        "name": runs.name,
        "runs": [str(run.path) for run in runs.runs],
        "folds": np.unique(first.folds).tolist(),
        "folds_of": first.folds_of,
        **scores,
    }


def _difference(baseline: RunSet, candidate: RunSet) -> dict[str, Any]:
    pairs = {name: (score, candidate.scores[name]) for name, score in baseline.scores.items()}
    same_weights = [run.path for run in baseline.runs] == [run.path for run in candidate.runs]
    z, p = z_test(baseline.scores["uar"].mean, candidate.scores["uar"].mean, len(baseline.runs[0].keys))
    return {
        "baseline": baseline.name,
        "set": candidate.name,
        **{
            name: {
                "difference": other.mean - first.mean,
                "interval": _interval(other.draws - first.draws),
                "seed_interval": seed_interval(first.by_seed, other.by_seed, paired=same_weights),
            }
            for name, (first, other) in pairs.items()
        },
        "z_test": {"z": z, "p": p},
        "mcnemar": _mcnemar_of_seeds(baseline, candidate),
    }


def _mcnemar_of_seeds(baseline: RunSet, candidate: RunSet) -> dict[str, Any]:
    pairs = []
    for first, other in product(baseline.runs, candidate.runs):
        only_baseline = int(np.sum(first.right & ~other.right))
        only_set = int(np.sum(other.right & ~first.right))
        pairs.append({"only_baseline": only_baseline, "only_set": only_set, "p": mcnemar(only_baseline, only_set)})
    return {"p": float(np.median([pair["p"] for pair in pairs])), "pairs": pairs}


def _draw_speakers(by_speaker: IntArray) -> IntArray:
    """Resample the first axis of (speakers, seeds, classes, classes), drawn as ``speaker_interval`` draws."""
    if len(by_speaker) < 2:
        return by_speaker[:0]
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(by_speaker), size=(DRAWS, len(by_speaker)))
    return np.stack([by_speaker[draw].sum(axis=0) for draw in chosen])


def _mean_over_seeds(metric: Callable[[IntArray], float], confusions: IntArray) -> FloatArray:
    return np.array([np.mean([metric(seed) for seed in seeds]) for seeds in confusions])


def _interval(draws: FloatArray) -> list[float] | None:
    if not len(draws):
        return None
    low, high = np.quantile(draws, [0.025, 0.975])
    return [float(low), float(high)]


def _standard_deviation(values: FloatArray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None
