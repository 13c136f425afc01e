"""Metrics against scikit-learn, and intervals that know speakers from clips."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binned_statistic
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, recall_score
from sklearn.metrics import confusion_matrix as sklearn_confusion

from sertool.metrics import (
    accuracy,
    confusion_matrix,
    expected_calibration_error,
    negative_log_likelihood,
    recall,
    reliability,
    speaker_interval,
    unweighted_average_recall,
)

ITEMS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


@settings(deadline=None)
@given(items=ITEMS)
def test_equals_scikit_learn_on_any_items(items: list[tuple[int, int]]) -> None:
    truth, predicted = np.array(items).T
    confusion = confusion_matrix(truth, predicted, 5)
    assert np.array_equal(confusion, sklearn_confusion(truth, predicted, labels=range(5)))
    assert accuracy(confusion) == pytest.approx(accuracy_score(truth, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of predicted classes that do not occur
        expected = balanced_accuracy_score(truth, predicted)
    assert unweighted_average_recall(confusion) == pytest.approx(expected)


def test_no_items_give_nan() -> None:
    nothing = np.zeros((3, 3), int)
    assert np.isnan(unweighted_average_recall(nothing)) and np.isnan(accuracy(nothing))


def test_a_perfect_classifier_scores_one_although_batches_lack_classes() -> None:
    # Averaged over batches of 16, with 0 for a class that a batch lacks, the same answers score less.
    truth = np.random.default_rng(0).integers(7, size=500)
    by_batch = [
        np.mean([np.mean(batch == label) > 0 for label in range(7)])
        for batch in np.array_split(truth, len(truth) // 16)
    ]
    assert np.mean(by_batch) < 0.95
    assert unweighted_average_recall(confusion_matrix(truth, truth, 7)) == 1.0


def speakers_of_skill(skills: list[float], clips: int = 60) -> list[np.ndarray]:
    """Return the confusion of speakers, each of whom the classifier gets right with a probability of their own."""
    rng = np.random.default_rng(0)
    matrices = []
    for skill in skills:
        truth = np.repeat(np.arange(3), clips // 3)
        right = rng.random(clips) < skill
        matrices.append(confusion_matrix(truth, np.where(right, truth, (truth + 1) % 3), 3))
    return matrices


def clip_interval(matrices: list[np.ndarray]) -> tuple[float, float]:
    """The too narrow alternative: resample clips as if each were spoken by someone else."""
    pooled = sum(matrices)
    rng = np.random.default_rng(0)
    draws = rng.multinomial(pooled.sum(), (pooled / pooled.sum()).ravel(), size=2000).reshape(-1, *pooled.shape)
    return tuple(np.quantile([unweighted_average_recall(draw) for draw in draws], [0.025, 0.975]))


def test_interval_is_wider_than_one_over_clips_when_speakers_differ() -> None:
    matrices = speakers_of_skill([0.95, 0.9, 0.85, 0.5, 0.4, 0.3, 0.9, 0.35])
    low, high = speaker_interval(matrices)
    clip_low, clip_high = clip_interval(matrices)
    assert low < unweighted_average_recall(sum(matrices)) < high
    assert high - low > 1.5 * (clip_high - clip_low)


def test_interval_shrinks_when_speakers_are_alike_and_when_there_are_more() -> None:
    def width(skills: list[float]) -> float:
        low, high = speaker_interval(speakers_of_skill(skills))
        return high - low

    assert width([0.6] * 8) < width([0.95, 0.25] * 4)
    assert width([0.95, 0.25] * 20) < width([0.95, 0.25] * 4)


def test_interval_is_the_same_every_time_and_follows_its_level() -> None:
    matrices = speakers_of_skill([0.9, 0.5, 0.7, 0.6])
    assert speaker_interval(matrices) == speaker_interval(matrices)
    low, high = speaker_interval(matrices, level=0.5)
    wide_low, wide_high = speaker_interval(matrices, level=0.95)
    assert wide_low < low < high < wide_high


def test_interval_of_two_speakers_is_spanned_by_them() -> None:
    sure, never = speakers_of_skill([1.0, 0.0])
    assert speaker_interval([sure, never]) == (0.0, 1.0)


def test_interval_covers_the_uar_of_all_speakers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(150):
        heard = rng.binomial(20, rng.beta(4, 2, size=(24, 1)), size=(24, 3))
        # Of 20 clips of each of three labels by each of 24 speakers; 2 / 3 is the mean of Beta(4, 2).
        matrices = [np.diag(right) + np.diag(20 - right)[:, [2, 0, 1]] for right in heard]
        low, high = speaker_interval(matrices, draws=1000)
        covered += low <= 2 / 3 <= high
    # A percentile interval over 24 speakers is a little narrow; 150 trials spread by 0.02.
    assert 0.86 <= covered / 150 <= 0.98


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_speakers_have_no_interval(count: int) -> None:
    assert np.isnan(speaker_interval(speakers_of_skill([0.8] * count))).all()


def test_negative_log_likelihood_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    probabilities, truth = rng.dirichlet([0.4] * 4, size=300), rng.integers(4, size=300)
    expected = log_loss(truth, probabilities, labels=range(4))
    assert negative_log_likelihood(probabilities, truth) == pytest.approx(expected)
    assert np.isfinite(negative_log_likelihood(np.eye(3)[[0, 1]], np.array([1, 0])))


def test_recall_of_a_class_equals_scikit_learn_and_has_an_interval() -> None:
    rng = np.random.default_rng(0)
    truth, predicted, speaker = rng.integers(3, size=(3, 400))
    expected = recall_score(truth, predicted, average=None)
    confusion = confusion_matrix(truth, predicted, 3)
    assert [recall(confusion, row) for row in range(3)] == pytest.approx(expected.tolist())
    matrices = [confusion_matrix(truth[speaker == s], predicted[speaker == s], 3) for s in range(3)]
    low, high = speaker_interval(matrices, metric=lambda matrix: recall(matrix, 1))
    alone = sorted(recall(matrix, 1) for matrix in matrices)
    assert alone[0] <= low < expected[1] < high <= alone[-1]


def test_draws_without_the_class_are_left_out() -> None:
    # The second speaker never shows class 1: a draw of that speaker alone says nothing of its recall.
    matrices = [np.array([[1, 0], [1, 3]]), np.array([[2, 0], [0, 0]])]
    assert speaker_interval(matrices, metric=lambda matrix: recall(matrix, 1)) == (0.75, 0.75)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 5), st.integers(1, 12))
def test_reliability_equals_binned_statistics_of_scipy(seed: int, items: int, classes: int, bins: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(classes, 0.5), items)
    truth = rng.integers(classes, size=items)
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    edges = np.linspace(0, 1, bins + 1)
    counts, means, accuracies = (
        binned_statistic(sure, values, statistic, bins=edges).statistic
        for values, statistic in ((sure, "count"), (sure, "mean"), (right, "mean"))
    )
    found = reliability(probabilities, truth, bins)
    assert [bin.items for bin in found] == counts.astype(int).tolist()
    np.testing.assert_allclose([bin.confidence for bin in found], np.nan_to_num(means))
    np.testing.assert_allclose([bin.accuracy for bin in found], np.nan_to_num(accuracies))
    expected = np.nansum(counts * np.abs(means - accuracies)) / items
    assert expected_calibration_error(probabilities, truth, bins) == pytest.approx(expected)


def test_certain_answers_are_in_the_last_bin_and_no_items_have_no_error() -> None:
    certain = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert reliability(certain, np.array([0, 1]))[-1].items == 2
    assert expected_calibration_error(certain, np.array([0, 1])) == 0
    assert expected_calibration_error(certain, np.array([1, 0])) == 1
    assert np.isnan(expected_calibration_error(np.empty((0, 2)), np.empty(0, np.int64)))
