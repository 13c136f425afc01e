"""Evaluation: scikit-learn computes the same from the predictions that were written."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, recall_score

from edge_runtime.errors import SerError, UsageError
from edge_runtime.frontend import log_mel, tile_or_cut
from sertool.evaluate import Predictions, evaluate_run, pool, save_evaluation, summarize
from sertool.fit import fit
from sertool.metrics import speaker_interval
from sertool.run import RunError, load_run

pytestmark = pytest.mark.usefixtures("one_thread")


def make_predictions(seed: int = 0, items: int = 60, prefix: str = "clip") -> Predictions:
    rng = np.random.default_rng(seed)
    truth = rng.integers(3, size=items)
    logits = rng.normal(size=(items, 3)) + 1.5 * np.eye(3)[truth]
    return Predictions(
        ("anger", "joy", "sadness"),
        tuple(f"{prefix}-{number}.wav" for number in range(items)),
        tuple(f"speaker {number % 4}" for number in range(items)),
        tuple(["f", "m", "f", ""][number % 4] for number in range(items)),
        truth,
        (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32),
    )


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_equals_scikit_learn(entry: dict[str, Any], rows: list[dict[str, str]]) -> None:
    truth, predicted = [row["truth"] for row in rows], [row["predicted"] for row in rows]
    labels = entry["labels"]
    assert entry["items"] == len(rows)
    assert entry["uar"] == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert entry["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert entry["confusion"] == confusion_matrix(truth, predicted, labels=labels).tolist()
    recalls = recall_score(truth, predicted, labels=labels, average=None)
    assert list(entry["recall"].values()) == pytest.approx(recalls.tolist())
    for kind, column in (("speakers", "speaker"), ("genders", "gender")):
        assert set(entry[kind]) == {row[column] for row in rows if row[column]}
        for name, uar in entry[kind].items():
            chosen = [row for row in rows if row[column] == name]
            expected = balanced_accuracy_score([row["truth"] for row in chosen], [row["predicted"] for row in chosen])
            assert uar == pytest.approx(expected)


def test_the_summary_equals_scikit_learn(tmp_path: Path) -> None:
    predictions = make_predictions()
    entry = save_evaluation(tmp_path, "test", predictions, "0123")
    rows = table(tmp_path / "predictions.csv")
    assert_equals_scikit_learn(entry, rows)
    assert [max(("anger", "joy", "sadness"), key=lambda label: float(row[label])) for row in rows] == [
        row["predicted"] for row in rows
    ]
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"test": entry}
    assert entry["split_hash"] == "0123"


def test_the_interval_is_that_over_speakers() -> None:
    predictions = make_predictions()
    speakers = np.array(predictions.speakers)
    matrices = [predictions.confusion(speakers == name) for name in sorted(set(predictions.speakers))]
    assert tuple(summarize(predictions)["uar_interval"]) == speaker_interval(matrices)


def test_one_speaker_has_no_interval_and_an_absent_class_no_recall() -> None:
    probabilities = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]], np.float32)
    entry = summarize(
        Predictions(("a", "b", "c"), ("1", "2"), ("ada", "ada"), ("", ""), np.array([0, 0]), probabilities)
    )
    assert (entry["uar"], entry["uar_interval"], entry["genders"]) == (0.5, None, {})
    assert entry["recall"] == {"a": 0.5, "b": None, "c": None}
    json.dumps(entry, allow_nan=False)


def test_parts_are_kept_beside_each_other(tmp_path: Path) -> None:
    test, train = make_predictions(0), make_predictions(1)
    save_evaluation(tmp_path, "test", test, "0123")
    save_evaluation(tmp_path, "train", train, "0123")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["test"]["uar"] == summarize(test)["uar"] != metrics["train"]["uar"]
    assert len(table(tmp_path / "predictions-train.csv")) == len(table(tmp_path / "predictions.csv")) == 60


def test_pooled_folds_are_scored_as_one() -> None:
    first, second = make_predictions(0, 20, "a"), make_predictions(1, 50, "b")
    pooled = pool([first, second])
    truth = np.concatenate([first.truth, second.truth])
    predicted = np.concatenate([first.predicted, second.predicted])
    uar = summarize(pooled)["uar"]
    assert uar == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert uar != pytest.approx((summarize(first)["uar"] + summarize(second)["uar"]) / 2)


def test_folds_that_do_not_belong_together_are_not_pooled() -> None:
    first = make_predictions(0)
    with pytest.raises(SerError, match="test the same clip more than once"):
        pool([first, make_predictions(1)])
    other = Predictions(("anger", "joy", "fear"), *list(vars(make_predictions(1, prefix="b")).values())[1:])
    with pytest.raises(SerError, match="trained on different labels"):
        pool([first, other])
    with pytest.raises(SerError, match="some of these runs are causal and some are not"):
        pool([first, replace(make_predictions(1, prefix="b"), streamed=True)])


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folds(tones: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "folds"
    for number in (1, 2):
        fit(tones.recipe(data__fold=number, training__epochs=6, training__batch_size=4), folder / f"fold-{number}")
    return folder


@pytest.fixture
def own(folds: Path, tmp_path: Path) -> Path:
    """A copy, for a test that damages it."""
    return Path(shutil.copytree(folds, tmp_path / "own"))


def test_a_prediction_is_what_the_network_says_of_the_clip(folds: Path) -> None:
    run = load_run(folds / "fold-1")
    predictions = evaluate_run(run)
    assert set(predictions.speakers) == {"cyd", "fox"}
    for row in (0, 13, 23):
        (clip,) = [clip for clip in run.manifest.clips if clip.key == predictions.keys[row]]
        window = run.normalization.apply(log_mel(tile_or_cut(clip.read(), run.window_samples), run.front_end))
        with torch.no_grad():
            expected = run.network()(torch.from_numpy(window)[None, None]).softmax(1)[0]
        assert predictions.probabilities[row] == pytest.approx(expected.numpy(), abs=1e-5)
        assert run.labels[predictions.truth[row]] == clip.label
        assert (predictions.speakers[row], predictions.genders[row]) == (clip.speaker, clip.gender)


def test_a_causal_network_hears_each_clip_once_from_its_beginning(
    own_tones: Any, tmp_path: Path, sertool: Callable[..., Any]
) -> None:
    samples, rate = soundfile.read(own_tones.folder / "cyd-joy-0.wav", dtype="float32")
    soundfile.write(own_tones.folder / "cyd-joy-0.wav", np.tile(samples, 3), rate)  # longer than the window
    soundfile.write(own_tones.folder / "cyd-joy-1.wav", samples[:3000], rate)  # shorter than the first feature
    causal = {"network__time_padding": "causal", "data__window_samples": 16640, "training__epochs": 1}
    fit(own_tones.recipe(**causal), tmp_path / "run")
    run = load_run(tmp_path / "run")
    predictions = evaluate_run(run)
    heard = {"cyd-joy-0.wav": 64, "cyd-joy-1.wav": 16, "cyd-joy-2.wav": 36}
    for key, frames in heard.items():
        (clip,) = [clip for clip in run.manifest.clips if clip.key == key]
        spectrogram = log_mel(tile_or_cut(clip.read(), run.window_samples), run.front_end)[:frames]
        with torch.no_grad():
            logits = run.network()(torch.from_numpy(run.normalization.apply(spectrogram))[None, None])
        assert predictions.probabilities[predictions.keys.index(key)] == pytest.approx(
            logits.softmax(1)[0].numpy(), abs=1e-5
        )
    outcome = sertool("evaluate", tmp_path / "run")
    assert "of 24 clips, each heard once, as a stream from its beginning\n" in outcome.out
    assert run.metrics["test"]["form"] == "stream"


def test_the_command_pools_folds(folds: Path, sertool: Callable[..., Any]) -> None:
    outcome = sertool("evaluate", folds, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    entry = json.loads(outcome.out)
    rows = table(folds / "predictions.csv")
    assert len({row["file"] for row in rows}) == 48
    assert_equals_scikit_learn(entry, rows)
    assert json.loads((folds / "metrics.json").read_text())["test"] == entry
    parts = [table(folds / name / "predictions.csv") for name in ("fold-1", "fold-2")]
    assert [*parts[0], *parts[1]] == rows
    assert (entry["folds"], entry["folds_of"]) == ([1, 2], 2)
    assert "folds" not in load_run(folds / "fold-1").metrics["test"]
    for name, part in zip(("fold-1", "fold-2"), parts, strict=True):
        assert_equals_scikit_learn(load_run(folds / name).metrics["test"], part)


def test_the_command_prints_what_a_person_reads(folds: Path, sertool: Callable[..., Any]) -> None:
    outcome = sertool("evaluate", folds / "fold-1")
    entry = load_run(folds / "fold-1").metrics["test"]
    assert outcome.code == 0
    assert f"UAR {entry['uar']:.1%}, 95 % interval " in outcome.out
    assert f"accuracy {entry['accuracy']:.1%} of 24 clips" in outcome.out
    for name in ("anger", "joy", "sadness", "cyd ", "fox ", "f ", "m "):
        assert name in outcome.out


def test_folds_to_come_are_named(own: Path, sertool: Callable[..., Any]) -> None:
    (own / "fold-2" / "checkpoint.safetensors").unlink()
    outcome = sertool("evaluate", own)
    assert outcome.code == 0 and "accuracy" in outcome.out
    assert outcome.err == "this result lacks fold 2: not trained to the end yet\n"
    assert "folds: 1 of 2, incomplete: lacks 2\n" in outcome.out
    entry = json.loads((own / "metrics.json").read_text())["test"]
    assert (entry["folds"], entry["folds_of"]) == ([1], 2)


def test_one_speaker_is_said_to_have_no_interval(own: Path, sertool: Callable[..., Any]) -> None:
    run = own / "fold-1"
    (run / "split.json").write_text(json.dumps({"folds": [{"train": ["ada", "bea", "dov", "eli"], "test": ["cyd"]}]}))
    assert ", no interval: one speaker\n" in sertool("evaluate", run).out


def test_square_brackets_in_names_are_printed_as_they_are(own_tones: Any, sertool: Callable[..., Any]) -> None:
    text = own_tones.manifest.read_text().replace(",joy,", ",[/],").replace(",cyd,", ",[b]c,")
    own_tones.manifest.write_text(text)
    own_tones.split.write_text(own_tones.split.read_text().replace('"cyd"', '"[b]c"'))
    run = own_tones.folder / "[/run]"
    fit(own_tones.recipe(training__epochs=1), run)
    outcome = sertool("evaluate", run)
    assert (outcome.code, outcome.err) == (0, "")
    assert "│ [/] " in outcome.out and "[b]c " in outcome.out
    assert "/tones/[/run]," in re.sub(r"\s", "", outcome.out)


def assert_one_line(outcome: Any, code: int, message: str) -> None:
    assert outcome.code == code
    assert outcome.out == ""
    assert outcome.err.startswith("sertool: ") and outcome.err.count("\n") == 1
    assert message in outcome.err


def test_folds_that_overlap_are_refused(own: Path, sertool: Callable[..., Any]) -> None:
    shutil.rmtree(own / "fold-2")
    shutil.copytree(own / "fold-1", own / "fold-2")
    (own / "metrics.json").unlink(missing_ok=True)
    assert_one_line(sertool("evaluate", own), 1, "test the same clip more than once")
    assert not (own / "metrics.json").exists()


def test_damaged_metrics_are_not_overwritten(own: Path, sertool: Callable[..., Any]) -> None:
    (own / "fold-1" / "metrics.json").write_text("{")
    assert_one_line(sertool("evaluate", own / "fold-1"), 1, "metrics.json: damaged; delete it")
    assert (own / "fold-1" / "metrics.json").read_text() == "{"


def test_an_unfinished_run(own: Path, sertool: Callable[..., Any]) -> None:
    (own / "fold-1" / "checkpoint.safetensors").unlink()
    outcome = sertool("evaluate", own / "fold-1")
    assert_one_line(outcome, 1, "unfinished; run the same sertool train again and it goes on")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 2, "nowhere: no such run folder"),
        (["{folds}/fold-1", "--part", "tset"], 2, "part 'tset' is unknown; did you mean 'test'"),
        (["{folds}/fold-1", "--part", "validation"], 2, "has no validation speakers"),
    ],
)
def test_wrong_arguments(
    folds: Path, sertool: Callable[..., Any], arguments: list[str], code: int, message: str
) -> None:
    assert_one_line(sertool("evaluate", *(text.format(folds=folds) for text in arguments)), code, message)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("manifest", UsageError, r"manifest\.csv: no such manifest"),
        ("speaker", UsageError, "no clip of speaker 'cyd'"),
        ("label", UsageError, "label 'fear' was not trained; valid: anger, joy, sadness"),
        ("audio", SerError, r"cyd-joy-0\.wav: not audio"),
    ],
)
def test_a_corpus_that_is_no_longer_the_one_trained_on(
    own_tones: Any, tmp_path: Path, change: str, error: type[SerError], message: str
) -> None:
    fit(own_tones.recipe(training__epochs=1), tmp_path / "run")
    text = own_tones.manifest.read_text()
    if change == "manifest":
        own_tones.manifest.unlink()
    elif change == "speaker":
        own_tones.manifest.write_text(text.replace(",cyd,", ",eve,"))
    elif change == "label":
        own_tones.manifest.write_text(text.replace("cyd-joy-0.wav,cyd,joy", "cyd-joy-0.wav,cyd,fear"))
    else:
        (own_tones.folder / "cyd-joy-0.wav").write_bytes(b"no sound")
    with pytest.raises(error, match=message):
        evaluate_run(load_run(tmp_path / "run"))


@pytest.mark.parametrize("part", ["test", "train"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("swapped speakers", "'ada-anger-0.wav' has another speaker since"),
        ("label", "'ada-anger-0.wav' has another label since"),
        ("renamed", "'ada-anger-0.wav' is gone since"),
        ("swapped audio", "'ada-anger-0.wav' has another audio since"),
    ],
)
def test_clips_trained_on_cannot_become_those_of_test_speakers(
    own_tones: Any, tmp_path: Path, part: str, change: str, message: str
) -> None:
    fit(own_tones.recipe(training__epochs=1), tmp_path / "run")
    run, text = load_run(tmp_path / "run"), own_tones.manifest.read_text()
    if change == "swapped speakers":
        text = text.replace(",ada,", ",?,").replace(",cyd,", ",ada,").replace(",?,", ",cyd,")
    elif change == "label":
        text = text.replace("ada-anger-0.wav,ada,anger", "ada-anger-0.wav,ada,joy")
    elif change == "renamed":
        text = text.replace("ada-anger-0.wav,ada", "./ada-anger-0.wav,cyd")
    else:
        one, other, aside = (own_tones.folder / name for name in ("ada-anger-0.wav", "cyd-anger-0.wav", "aside.wav"))
        one.rename(aside), other.rename(one), aside.rename(other)
    own_tones.manifest.write_text(text)
    with pytest.raises(UsageError, match=message):
        evaluate_run(run, part)


def test_new_recordings_of_anyone_leave_a_run_as_it_was(own_tones: Any, tmp_path: Path) -> None:
    fit(own_tones.recipe(training__epochs=1), tmp_path / "run")
    shutil.copy(own_tones.folder / "ada-joy-0.wav", own_tones.folder / "new.wav")
    own_tones.manifest.write_text(own_tones.manifest.read_text() + "new.wav,ada,joy,f\n")
    assert len(evaluate_run(load_run(tmp_path / "run")).keys) == 24


def test_a_network_that_answers_with_infinity_is_not_scored(own: Path) -> None:
    path = own / "fold-1" / "checkpoint.safetensors"
    student = load_run(own / "fold-1").student
    weights = load_file(path)
    weights["head.fc2.bias"][0] = float("inf")
    save_file(weights, path, {"student": student.to_json()})
    with pytest.raises(RunError, match="infinite numbers; train again, with a lower learning rate"):
        evaluate_run(load_run(own / "fold-1"))
