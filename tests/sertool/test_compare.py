"""Comparison of runs: scikit-learn, scipy's bootstrap, exact fractions and the paper's own p-values as oracles."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap, ttest_1samp, ttest_ind
from sklearn.metrics import accuracy_score, balanced_accuracy_score

import sertool.compare
from edge_runtime.errors import UsageError
from sertool.compare import Answers, RunSet, compare, load_set, mcnemar, seed_interval, z_test
from sertool.evaluate import Predictions, pool, save_evaluation
from sertool.run import RunError

LABELS = ("anger", "joy", "sadness")
PAPER_TEST_CLIPS = 2326


def make_answers(skill: float, seed: int, speakers: int = 8, clips: int = 15, path: str = "run") -> Answers:
    """Three labels in unequal numbers; half of what makes an answer right is the clip, not the seed."""
    count = speakers * clips
    truth = np.random.default_rng(1).choice(3, size=count, p=[0.5, 0.3, 0.2])
    ease = np.random.default_rng(2).normal(size=count) + np.repeat(
        np.random.default_rng(3).normal(size=speakers), clips
    )
    right = ease + np.random.default_rng(100 + seed).normal(size=count) < 2 * skill
    keys = tuple(f"{row:04}.wav" for row in range(count))
    speaker = tuple(f"speaker {row // clips}" for row in range(count))
    fold = np.arange(count) // clips % 2 + 1
    return Answers(Path(path), "0123", LABELS, keys, speaker, fold, truth, np.where(right, truth, (truth + 1) % 3))


def make_set(name: str, skill: float, *seeds: int, **size: int) -> RunSet:
    return RunSet(name, tuple(make_answers(skill, seed, **size) for seed in seeds))


def difference(baseline: RunSet, candidate: RunSet) -> dict[str, Any]:
    (row,) = compare([baseline, candidate])["differences"]
    return dict(row)


def width(interval: list[float]) -> float:
    return interval[1] - interval[0]


# --- scores and intervals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "oracle"), [("uar", balanced_accuracy_score), ("accuracy", accuracy_score)])
def test_mean_and_spread_over_seeds_and_folds_equal_scikit_learn(metric: str, oracle: Callable[..., float]) -> None:
    runs = make_set("a", 0.5, 0, 1, 2)
    score = compare([runs])["sets"][0][metric]
    by_seed = [oracle(run.truth, run.predicted) for run in runs.runs]
    by_fold = [
        statistics.mean(oracle(run.truth[run.folds == fold], run.predicted[run.folds == fold]) for run in runs.runs)
        for fold in (1, 2)
    ]
    assert score["by_seed"] == pytest.approx(by_seed)
    assert score["by_fold"] == pytest.approx(by_fold)
    assert score["mean"] == pytest.approx(statistics.mean(by_seed))
    assert score["seed_deviation"] == pytest.approx(statistics.stdev(by_seed))
    assert score["fold_deviation"] == pytest.approx(statistics.stdev(by_fold))


@pytest.mark.parametrize(("metric", "oracle"), [("uar", balanced_accuracy_score), ("accuracy", accuracy_score)])
def test_intervals_agree_with_the_bootstrap_of_scipy(metric: str, oracle: Callable[..., float]) -> None:
    sets = make_set("a", 0.4, 0, 1, speakers=12), make_set("b", 0.6, 2, 3, speakers=12)
    rows = [np.flatnonzero(np.array(sets[0].runs[0].speakers) == f"speaker {number}") for number in range(12)]

    def mean(runs: RunSet, drawn: np.ndarray) -> float:
        clips = np.concatenate([rows[int(number)] for number in drawn])
        return statistics.mean(oracle(run.truth[clips], run.predicted[clips]) for run in runs.runs)

    def interval(statistic: Callable[[np.ndarray], float]) -> list[float]:
        options = {"n_resamples": 600, "vectorized": False, "method": "percentile", "rng": np.random.default_rng(9)}
        return list(bootstrap((np.arange(12),), statistic, **options).confidence_interval)

    ours = compare(sets)
    assert ours["sets"][1][metric]["interval"] == pytest.approx(interval(lambda drawn: mean(sets[1], drawn)), abs=0.015)
    expected = interval(lambda drawn: mean(sets[1], drawn) - mean(sets[0], drawn))
    assert ours["differences"][0][metric]["interval"] == pytest.approx(expected, abs=0.015)


def test_two_speakers_span_the_interval_of_the_difference() -> None:
    baseline, candidate = make_set("a", 0.3, 0, speakers=2), make_set("b", 0.7, 1, speakers=2)
    by_speaker = [
        float(np.mean(candidate.runs[0].right[clips]) - np.mean(baseline.runs[0].right[clips]))
        for clips in (slice(0, 15), slice(15, 30))
    ]
    assert by_speaker[0] != by_speaker[1]
    row = difference(baseline, candidate)["accuracy"]
    assert row["interval"] == pytest.approx(sorted(by_speaker))
    assert row["difference"] == pytest.approx(statistics.mean(by_speaker))


def test_the_interval_covers_the_true_difference_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sertool.compare, "DRAWS", 300)
    rng = np.random.default_rng(0)
    speakers, clips, trials = 20, 30, 150
    truth = np.tile(np.arange(3), speakers * clips // 3)
    names = tuple(np.repeat([f"{number:02}" for number in range(speakers)], clips))
    keys = tuple(f"{row:04}" for row in range(len(truth)))

    def answer(skill: np.ndarray) -> RunSet:
        right = rng.random(len(truth)) < np.repeat(skill, clips)
        predicted = np.where(right, truth, (truth + 1) % 3)
        folds = np.ones(len(truth), np.int64)
        return RunSet("x", (Answers(Path("x"), "0", LABELS, keys, names, folds, truth, predicted),))

    covered = 0
    for _ in range(trials):
        skill = rng.uniform(0.3, 0.7, speakers)
        low, high = difference(answer(skill), answer(skill + rng.uniform(-0.1, 0.2, speakers)))["uar"]["interval"]
        covered += low <= 0.05 <= high
    # A percentile interval over 20 speakers is known to be a little narrow; 150 trials spread by 0.02.
    assert 0.88 <= covered / trials <= 0.99


def test_a_set_does_not_differ_from_itself() -> None:
    row = difference(make_set("a", 0.5, 0, 1), make_set("a", 0.5, 0, 1))
    for metric in ("uar", "accuracy"):
        assert row[metric] == {"difference": 0.0, "interval": [0.0, 0.0], "seed_interval": [0.0, 0.0]}
    assert row["z_test"] == {"z": 0.0, "p": 0.5}
    assert [pair["p"] for pair in row["mcnemar"]["pairs"]][::3] == [1.0, 1.0]  # each seed with itself


def test_swapping_flips_every_sign() -> None:
    first, second = make_set("a", 0.4, 0, 1), make_set("b", 0.6, 2, 3, 4)
    there, back = difference(first, second), difference(second, first)
    for metric in ("uar", "accuracy"):
        assert there[metric]["difference"] == -back[metric]["difference"] != 0
        low, high = back[metric]["interval"]
        assert there[metric]["interval"] == pytest.approx([-high, -low])
        low, high = back[metric]["seed_interval"]
        assert there[metric]["seed_interval"] == pytest.approx([-high, -low])
    assert there["z_test"]["z"] == -back["z_test"]["z"]
    assert there["z_test"]["p"] == pytest.approx(1 - back["z_test"]["p"])
    assert there["mcnemar"]["p"] == pytest.approx(back["mcnemar"]["p"])


def test_pairing_narrows_the_interval_of_runs_that_find_the_same_speakers_hard() -> None:
    baseline, candidate = make_set("a", 0.4, 0), make_set("b", 0.5, 1)
    comparison = compare([baseline, candidate])
    unpaired = math.hypot(*(width(runs["uar"]["interval"]) for runs in comparison["sets"]))
    assert width(comparison["differences"][0]["uar"]["interval"]) < 0.8 * unpaired


def test_the_interval_over_seeds_is_that_of_scipy() -> None:
    baseline, other = np.array([0.694, 0.664, 0.567]), np.array([0.710, 0.679, 0.636, 0.701])
    expected = ttest_ind(other, baseline, equal_var=False).confidence_interval()
    assert seed_interval(baseline, other) == pytest.approx(list(expected))
    expected = ttest_1samp(other[:3] - baseline, 0).confidence_interval()
    assert seed_interval(baseline, other[:3], paired=True) == pytest.approx(list(expected))


@pytest.mark.parametrize("paired", [False, True])
def test_the_interval_over_seeds_covers_the_true_difference_as_often_as_it_says(paired: bool) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        baseline = rng.normal(0.6, 0.02, 3)
        other = baseline + rng.normal(0.03, 0.01, 3) if paired else rng.normal(0.63, 0.01, 3)
        low, high = seed_interval(baseline, other, paired=paired) or (0.0, 0.0)
        covered += low <= 0.03 <= high
    assert 0.93 <= covered / 1000 <= 0.97  # Welch's is a little narrow for three seeds


def test_what_differs_in_no_seed_has_an_interval_without_width() -> None:
    assert seed_interval(np.array([0.5, 0.5]), np.array([0.75, 0.75, 0.75])) == [0.25, 0.25]
    # One set varies, by 1 around 3: 2.5 ± t of two degrees of freedom, in the printed table, times its standard error.
    found = seed_interval(np.array([0.5, 0.5]), np.array([2.0, 3.0, 4.0]))
    assert found == pytest.approx([2.5 - 4.303 / math.sqrt(3), 2.5 + 4.303 / math.sqrt(3)], abs=1e-3)


def test_the_same_runs_give_the_same_numbers_whatever_stands_beside_them() -> None:
    first, second, third = make_set("a", 0.4, 0), make_set("b", 0.5, 1), make_set("c", 0.7, 2)
    alone, beside = compare([first, third]), compare([first, second, third])
    assert compare([first, third]) == alone
    assert beside["sets"] == [alone["sets"][0], beside["sets"][1], alone["sets"][1]]
    assert beside["differences"][1] == alone["differences"][0]


def test_one_speaker_has_no_interval_and_one_seed_no_spread() -> None:
    comparison = compare([make_set("a", 0.4, 0, speakers=1), make_set("b", 0.6, 1, speakers=1)])
    score = comparison["sets"][0]["uar"]
    assert (score["interval"], score["seed_deviation"], score["fold_deviation"]) == (None, None, None)
    difference = comparison["differences"][0]["uar"]
    assert (difference["interval"], difference["seed_interval"]) == (None, None)
    json.dumps(comparison, allow_nan=False)


# --- tests of significance -----------------------------------------------------------------------------------------


def test_the_z_test_gives_the_p_values_of_the_paper() -> None:
    """Section 3.4 on Table 3: 'p < 0.1', 'p < 0.1', 'p < 0.002'; VGG-15 with three neighbours is not called better."""
    vgg15, resnet9, cnn6 = (
        z_test(base, graph, PAPER_TEST_CLIPS)[1] for base, graph in ((0.772, 0.789), (0.746, 0.763), (0.731, 0.770))
    )
    assert 0.05 < vgg15 < 0.1 and 0.05 < resnet9 < 0.1 and 0.001 < cnn6 < 0.002
    assert z_test(0.772, 0.786, PAPER_TEST_CLIPS)[1] > 0.1


def test_the_z_test_by_hand() -> None:
    # 60 and 70 of 100: pooled 0.65, variance 0.65 * 0.35 * 2 / 100 = 0.00455.
    z, p = z_test(0.6, 0.7, 100)
    assert z == pytest.approx(0.1 / math.sqrt(0.00455))
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)) / 2)
    assert z_test(0.7, 0.6, 100) == pytest.approx((-z, 1 - p))


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_z_test_of_rates_without_variance_finds_nothing(rate: float) -> None:
    assert z_test(rate, rate, 100) == (0.0, 0.5)


@given(only_baseline=st.integers(0, 60), only_other=st.integers(0, 60))
def test_mcnemar_equals_exact_fractions(only_baseline: int, only_other: int) -> None:
    discordant = only_baseline + only_other
    tail = sum(math.comb(discordant, k) for k in range(min(only_baseline, only_other) + 1))
    expected = min(Fraction(1), 2 * Fraction(tail, 2**discordant))
    assert mcnemar(only_baseline, only_other) == pytest.approx(float(expected))


def test_mcnemar_of_many_pairs_nears_chi_squared() -> None:
    chi = (abs(5150 - 4850) - 1) ** 2 / 10000  # with continuity correction
    assert mcnemar(5150, 4850) == pytest.approx(math.erfc(math.sqrt(chi / 2)), rel=0.01)


def test_mcnemar_is_taken_of_every_pair_of_seeds() -> None:
    baseline, candidate = make_set("a", 0.4, 0, 1), make_set("b", 0.6, 2, 3, 4)
    expected = []
    for one, other in product(baseline.runs, candidate.runs):
        outcomes = list(zip(one.truth == one.predicted, other.truth == other.predicted, strict=True))
        expected.append((outcomes.count((True, False)), outcomes.count((False, True))))
    result = difference(baseline, candidate)["mcnemar"]
    assert [(pair["only_baseline"], pair["only_set"]) for pair in result["pairs"]] == expected
    assert result["p"] == pytest.approx(statistics.median(mcnemar(*pair) for pair in expected))


def test_the_z_test_takes_mean_uars_and_counts_each_clip_once() -> None:
    baseline, candidate = make_set("a", 0.4, 0, 1, 2), make_set("b", 0.6, 3, 4, 5)
    means = [
        statistics.mean(balanced_accuracy_score(run.truth, run.predicted) for run in runs.runs)
        for runs in (baseline, candidate)
    ]
    result = difference(baseline, candidate)["z_test"]
    assert (result["z"], result["p"]) == pytest.approx(z_test(*means, 8 * 15))


# --- reading -------------------------------------------------------------------------------------------------------


def make_predictions(skill: float, seed: int, speakers: str = "abcd", clips: int = 12) -> Predictions:
    """What a run of that skill says of the clips of some speakers; two runs differ in skill and seed alone."""
    keys = tuple(f"{speaker}-{clip}.wav" for speaker in speakers for clip in range(clips))
    truth = np.array([clip % 3 for _ in speakers for clip in range(clips)])
    logits = np.random.default_rng(seed).normal(size=(len(keys), 3)) + skill * np.eye(3)[truth]
    probabilities = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    return Predictions(LABELS, keys, tuple(key[0] for key in keys), ("",) * len(keys), truth, probabilities)


def write_run(folder: Path, skill: float, seed: int, part: str = "test", **options: Any) -> dict[str, Any]:
    return save_evaluation(folder, part, make_predictions(skill, seed, **options), "0123")


def write_folds(folder: Path, skill: float, seed: int) -> dict[str, Any]:
    folds = [make_predictions(skill, 10 * seed + number, speakers) for number, speakers in ((2, "cd"), (10, "ab"))]
    for number, fold in zip((2, 10), folds, strict=True):
        save_evaluation(folder / f"fold-{number}", "test", fold, "0123")
    return save_evaluation(folder, "test", pool(folds), "0123")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two seeds of two settings."""
    for seed in (1, 2):
        write_run(tmp_path / f"base-{seed}", 1.0, seed)
        write_run(tmp_path / f"graph-{seed}", 1.5, seed + 10)
    return tmp_path


def test_a_single_run_has_the_numbers_of_its_evaluation(tmp_path: Path) -> None:
    entry = write_run(tmp_path / "run", 1.0, 0)
    score = compare([load_set(str(tmp_path / "run"))])["sets"][0]
    assert (score["uar"]["mean"], score["accuracy"]["mean"]) == pytest.approx((entry["uar"], entry["accuracy"]))
    assert score["uar"]["interval"] == entry["uar_interval"]


def test_folds_are_pooled_and_stand_in_numerical_order(tmp_path: Path) -> None:
    entry = write_folds(tmp_path / "run", 1.0, 0)
    score = compare([load_set(str(tmp_path / "run"))])["sets"][0]
    assert (score["uar"]["mean"], score["accuracy"]["mean"]) == pytest.approx((entry["uar"], entry["accuracy"]))
    assert score["uar"]["interval"] == entry["uar_interval"]
    by_fold = [json.loads((tmp_path / f"run/fold-{number}/metrics.json").read_text())["test"] for number in (2, 10)]
    assert score["accuracy"]["by_fold"] == pytest.approx([fold["accuracy"] for fold in by_fold])


def test_folds_are_those_of_the_evaluation_and_an_incomplete_one_says_so(
    tmp_path: Path, sertool: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    write_folds(run, 1.0, 0)
    (run / "fold-11").mkdir()  # not trained to the end yet
    folds = [make_predictions(1.0, 10 * 0 + number, speakers) for number, speakers in ((2, "cd"), (10, "ab"))]
    save_evaluation(run, "test", pool(folds), "0123", [2, 10], 3)
    outcome = sertool("compare", run, run)
    assert outcome.code == 0
    assert "(seeds: 1, folds: 2 of 3, incomplete: lacks 1, 3)" in outcome.out.replace("\n", "")
    (described,) = compare([load_set(str(run))])["sets"]
    assert (described["folds"], described["folds_of"]) == ([2, 10], 3)
    shutil.rmtree(run / "fold-2")
    with pytest.raises(UsageError, match="fold-2: its test speakers are not evaluated yet"):
        load_set(str(run))


def test_a_run_beside_folds_is_refused(tmp_path: Path) -> None:
    write_folds(tmp_path / "run", 1.0, 0)
    (tmp_path / "run" / "checkpoint.safetensors").touch()
    with pytest.raises(RunError, match="run: holds both a run and fold-10"):
        load_set(str(tmp_path / "run"))


def test_commas_and_patterns_join_seeds(runs: Path) -> None:
    expected = [str(runs / "base-1"), str(runs / "base-2")]
    for name in (",".join(expected), f"{runs}/base-*", f"{runs}/base-[12]", f"{runs}/base-1,{runs}/*e-2"):
        (described,) = compare([load_set(name)])["sets"]
        assert (described["name"], described["runs"]) == (name, expected)


def test_a_folder_may_have_a_comma_or_brackets_in_its_name(tmp_path: Path) -> None:
    for name in ("n=3,alpha=0.1", "base[1]", "me@home"):
        write_run(tmp_path / name, 1.0, 0)
        assert [run.path for run in load_set(str(tmp_path / name)).runs] == [tmp_path / name]


def test_the_order_of_rows_does_not_matter(runs: Path) -> None:
    expected = compare([load_set(f"{runs}/base-1"), load_set(f"{runs}/graph-1")])
    path = runs / "graph-1" / "predictions.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *rows[::-1]]) + "\n")
    assert compare([load_set(f"{runs}/base-1"), load_set(f"{runs}/graph-1")]) == expected


def test_other_parts_are_compared_by_their_own_predictions(runs: Path) -> None:
    entry = write_run(runs / "base-1", 3.0, 5, part="validation", speakers="xyz")
    (described,) = compare([load_set(f"{runs}/base-1", "validation")])["sets"]
    assert described["uar"]["mean"] == pytest.approx(entry["uar"])
    with pytest.raises(UsageError, match=r"base-2: .*; run: sertool evaluate .*base-2 --part validation$"):
        load_set(f"{runs}/base-2", "validation")
    with pytest.raises(UsageError, match="part 'tset' is unknown; did you mean 'test'"):
        load_set(f"{runs}/base-1", "tset")


def test_what_calibration_changes_is_a_set_of_its_own(runs: Path) -> None:
    entry = write_run(runs / "base-1", 3.0, 5, part="test-calibrated")
    before, after = load_set(f"{runs}/base-1"), load_set(f"{runs}/base-1@calibrated")
    assert after.scores["uar"].mean == pytest.approx(entry["uar"]) != before.scores["uar"].mean
    (difference,) = compare([before, after])["differences"]
    assert difference["uar"]["difference"] == pytest.approx(after.scores["uar"].mean - before.scores["uar"].mean)
    scores = (before.scores["uar"].by_seed, after.scores["uar"].by_seed)
    assert difference["uar"]["seed_interval"] == seed_interval(*scores, paired=True)  # the same weights
    with pytest.raises(UsageError, match=r"base-2: .*; run: sertool evaluate .*base-2 --calibrated$"):
        load_set(f"{runs}/base-*@calibrated")
    with pytest.raises(UsageError, match="'calibratd' is unknown; did you mean 'calibrated'"):
        load_set(f"{runs}/base-1@calibratd")


@pytest.mark.parametrize("name", ["base-3", "none-*", "base-1,{runs}/typo", "base-1,"])
def test_a_run_that_is_not_there_is_named(runs: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no such run folder; make one with: sertool train"):
        load_set(f"{runs}/{name.format(runs=runs)}")


def test_a_run_named_twice_in_a_set_is_refused(runs: Path) -> None:
    with pytest.raises(UsageError, match="names a run twice"):
        load_set(f"{runs}/base-1,{runs}/base-*")


@pytest.mark.parametrize("lost", ["predictions.csv", "metrics.json"])
def test_a_fold_that_is_not_evaluated_names_the_command(tmp_path: Path, lost: str) -> None:
    write_folds(tmp_path / "run", 1.0, 0)
    (tmp_path / "run" / "fold-10" / lost).unlink()
    with pytest.raises(UsageError, match=f"fold-10: .* not evaluated yet; run: sertool evaluate {tmp_path}/run$"):
        load_set(str(tmp_path / "run"))


def cut_last_row(text: str) -> str:
    return text[: text.rstrip("\n").rindex("\n") + 1]


@pytest.mark.parametrize(
    "damage",
    [
        cut_last_row,
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.splitlines()[0] + "\n",
        lambda text: text + "\n\n",
        lambda text: text.replace("joy", "boredom"),
        lambda text: text.replace("anger,anger", "anger,joy", 1),
        lambda text: "\0" * 100,
        lambda text: 'file,speaker\n"' + "x" * 200_000,
    ],
)
def test_damaged_predictions_are_refused(runs: Path, damage: Callable[[str], str]) -> None:
    path = runs / "base-1" / "predictions.csv"
    path.write_text(damage(path.read_text()))
    with pytest.raises(RunError, match=r"predictions.csv: damaged, .*; run: sertool evaluate "):
        load_set(f"{runs}/base-1")


@pytest.mark.parametrize("text", ["{", "[]", '{"test": 3}', '{"test": {"labels": ["anger"]}}', '{"test": {}}'])
def test_damaged_metrics_are_refused(runs: Path, text: str) -> None:
    (runs / "base-1" / "metrics.json").write_text(text)
    with pytest.raises(RunError, match="damaged"):
        load_set(f"{runs}/base-1")


def test_predictions_in_another_encoding_are_refused(runs: Path) -> None:
    path = runs / "base-1" / "predictions.csv"
    path.write_bytes(path.read_bytes().replace(b"a-0.wav", b"\xe9-0.wav"))
    with pytest.raises(RunError, match="damaged"):
        load_set(f"{runs}/base-1")


# --- what must not be compared -------------------------------------------------------------------------------------


def assert_refused(runs: Path, other: Predictions, message: str, split_hash: str = "0123") -> None:
    """Refused as another set, and as another seed of one set."""
    save_evaluation(runs / "other", "test", other, split_hash)
    with pytest.raises(UsageError, match=message):
        compare([load_set(f"{runs}/base-1"), load_set(f"{runs}/other")])
    with pytest.raises(UsageError, match=message):
        load_set(f"{runs}/base-1,{runs}/other")


def altered(**values: Any) -> Predictions:
    return Predictions(**(vars(make_predictions(1.0, 9)) | values))


def test_different_splits_are_refused(runs: Path) -> None:
    message = r"base-1 and .*other have different splits \(0123; 4567\) and cannot be compared"
    assert_refused(runs, altered(), message, split_hash="4567")


def test_different_labels_are_refused(runs: Path) -> None:
    message = r"different labels \(anger, joy, sadness; anger, fear, sadness\)"
    assert_refused(runs, altered(labels=("anger", "fear", "sadness")), message)


def test_different_clips_are_refused(runs: Path) -> None:
    keys = altered().keys
    message = r"base-1 answers clip 'a-0.wav', which .*other does not \(4 clips differ\)"
    assert_refused(runs, altered(keys=("y.wav", "z.wav", *keys[2:])), message)


def test_fewer_clips_are_refused(runs: Path) -> None:
    message = r"base-1 answers clip 'd-0.wav', which .*other does not \(12 clips differ\)"
    assert_refused(runs, make_predictions(1.0, 9, speakers="abc"), message)


def test_different_truth_is_refused(runs: Path) -> None:
    truth = altered().truth.copy()
    truth[3] = 2
    message = r"clip 'a-3.wav' is 'anger' by 'a' in .*base-1 but 'sadness' by 'a' in .*other"
    assert_refused(runs, altered(truth=truth), message)


def test_different_speakers_are_refused(runs: Path) -> None:
    speakers = altered().speakers
    message = r"clip 'a-0.wav' is 'anger' by 'a' in .*base-1 but 'anger' by 'x' in .*other"
    assert_refused(runs, altered(speakers=("x", *speakers[1:])), message)


def test_folds_of_different_splits_and_folds_that_overlap_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run" / "fold-1", 1.0, 0)
    write_run(tmp_path / "run" / "fold-2", 1.0, 0)
    with pytest.raises(UsageError, match=r"run: answers clip 'a-0.wav' more than once; compare its folds one by one"):
        load_set(str(tmp_path / "run"))
    save_evaluation(tmp_path / "run" / "fold-2", "test", make_predictions(1.0, 0, speakers="xy"), "4567")
    with pytest.raises(UsageError, match=r"fold-1 and .*fold-2 have different splits"):
        load_set(str(tmp_path / "run"))


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_as_a_process(runs: Path) -> None:
    command = [sys.executable, "-c", "from sertool.cli import main; main()", "compare"]
    result = subprocess.run(
        [*command, "base-*", "graph-1,graph-2", "--json"], cwd=runs, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    comparison = json.loads(result.stdout)
    assert comparison["part"] == "test"
    assert (comparison["clips"], comparison["speakers"], comparison["split_hash"]) == (48, 4, "0123")
    assert [described["runs"] for described in comparison["sets"]] == [["base-1", "base-2"], ["graph-1", "graph-2"]]
    (row,) = comparison["differences"]
    means = [described["uar"]["mean"] for described in comparison["sets"]]
    assert row["uar"]["difference"] == pytest.approx(means[1] - means[0])


def test_the_tables_fit_eighty_columns(
    tmp_path: Path, sertool: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        for name, skill in (("never", -20.0), ("always", 20.0), ("base", 1.0)):
            write_folds(Path(f"{name}-{seed}"), skill, seed)
    outcome = sertool("compare", "never-*", "always-*", "base-*")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in outcome.out
    assert lines[:2] == ["48 test clips of 4 speakers, split 0123", "1: never-* (seeds: 2, folds: 2)"]
    cells = [line.split() for line in lines]
    assert ["2", "UAR", "100.0%", "100.0", "to", "100.0", *2 * ["100.0%", "±", "0.0"]] in cells
    assert ["2", "UAR", "+100.0", "+100.0", "to", "+100.0", "±", "0.0", "z-test,", "9.80", "<0.001"] in cells
    found = ["2", "accuracy", "+100.0", "+100.0", "to", "+100.0", "±", "0.0", "McNemar,", "4", "pairs", "<0.001"]
    assert found in cells


def test_the_table_of_single_runs_counts_the_clips_one_alone_gets_right(
    runs: Path, sertool: Callable[..., Any]
) -> None:
    outcome = sertool("compare", runs / "base-1", runs / "graph-1", "--json")
    (pair,) = json.loads(outcome.out)["differences"][0]["mcnemar"]["pairs"]
    outcome = sertool("compare", runs / "base-1", runs / "graph-1")
    assert f"McNemar, {pair['only_baseline']} : {pair['only_set']} " in outcome.out
    assert f"{pair['p']:.3f}" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{runs}/base-1"], 2, "name the baseline first"),
        (["{runs}/base-1", "{runs}/nothing"], 2, "no such run folder"),
        (["{runs}/base-1", "{runs}/damaged"], 1, "damaged"),
        (["{runs}/base-1", "{runs}/graph-1", "--part", "dev"], 2, "part 'dev' is unknown; valid: test"),
    ],
)
def test_bad_input_is_one_line(
    runs: Path, sertool: Callable[..., Any], arguments: list[str], code: int, message: str
) -> None:
    shutil.copytree(runs / "base-2", runs / "damaged")
    (runs / "damaged" / "metrics.json").write_text("{")
    outcome = sertool("compare", *(argument.format(runs=runs) for argument in arguments))
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.startswith("sertool: ") and outcome.err.count("\n") == 1
    assert message in outcome.err
