"""Scores under conditions: by hand from the network, equal to ``sertool evaluate`` where nothing is degraded."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from sklearn.metrics import balanced_accuracy_score, recall_score

import sertool.robustness
from edge_runtime.errors import UsageError
from edge_runtime.frontend import FloatArray, log_mel, tile_or_cut
from sertool.degrade import CONDITIONS, Condition, add_noise, chosen_conditions, seeded
from sertool.evaluate import Predictions, evaluate_run
from sertool.fit import fit
from sertool.robustness import Hearing, measure_robustness
from sertool.run import Run, load_run

pytestmark = pytest.mark.usefixtures("one_thread")

STREAM = {
    "data__clips": "once",
    "network__time_padding": "causal",
    "network__name": "resnet9",
    "network__width": 0.125,
    "normalization__personal": 0.5,
    "normalization__personal_label": "sadness",
}


@pytest.fixture(scope="module")
def _little_calm_speech() -> Any:
    """Clips last 0.6 s: 1.2 s of calm speech must do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sertool.personal.LEAST_S", 1.0)
        yield


@pytest.fixture(scope="module")
def streamed(tones: Any, tmp_path_factory: pytest.TempPathFactory, _little_calm_speech: None) -> Path:
    folder = tmp_path_factory.mktemp("robustness") / "folds"
    for number in (1, 2):
        fit(tones.recipe(**STREAM, data__fold=number), folder / f"fold-{number}")
    return folder


@pytest.fixture(scope="module")
def windowed(tones: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robustness") / "run"
    fit(tones.recipe(training__epochs=3, training__batch_size=4), folder)
    return folder


@pytest.fixture
def own(streamed: Path, tmp_path: Path) -> Path:
    """A copy, for a test that writes into it."""
    return Path(shutil.copytree(streamed, tmp_path / "own"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the conditions that are computed, once a fold."""
    names = []
    predict = Hearing.predictions

    def noted(hearing: Hearing, condition: Any) -> Predictions:
        names.append(condition.name)
        return predict(hearing, condition)

    monkeypatch.setattr(Hearing, "predictions", noted)
    return names


def probabilities(run: Run, spectrogram: FloatArray) -> FloatArray:
    with torch.no_grad():
        logits = run.network()(torch.from_numpy(run.normalization.apply(spectrogram))[None, None])
    return logits.softmax(1)[0].numpy()


def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "robustness.json").read_text()))


def assert_one_line(outcome: Any, code: int, message: str) -> None:
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.startswith("sertool: ") and outcome.err.count("\n") == 1
    assert message in outcome.err


# --- what is scored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", ["nothing", "calibrated"])
def test_clean_equals_evaluation_of_a_stream(streamed: Path, known: Any) -> None:
    run = load_run(streamed / "fold-1")
    clean, expected = Hearing(run, "test", known).predictions(CONDITIONS["clean"]), evaluate_run(run, known=known)
    assert clean.keys == expected.keys and clean.streamed
    assert np.array_equal(clean.probabilities, expected.probabilities)


def test_clean_equals_evaluation_of_windows(windowed: Path) -> None:
    run = load_run(windowed)
    clean, expected = Hearing(run, "test", "nothing").predictions(CONDITIONS["clean"]), evaluate_run(run)
    assert clean.keys == expected.keys and not clean.streamed
    assert np.array_equal(clean.probabilities, expected.probabilities)


def test_clean_of_the_command_equals_that_of_evaluate(own: Path, sertool: Callable[..., Any]) -> None:
    metrics = json.loads(sertool("evaluate", own, "--json").out)
    clean = json.loads(sertool("robustness", own, "--conditions", "clean", "--json").out)["conditions"]["clean"]
    for name in ("uar", "uar_interval", "recall"):
        assert clean[name] == metrics[name]
    assert np.sum([*clean["confusion"].values()], axis=0).tolist() == metrics["confusion"]
    assert (clean["difference"], clean["difference_interval"]) == (0.0, [0.0, 0.0])


def test_a_stream_under_noise_is_what_the_network_says_of_the_mixture(streamed: Path) -> None:
    run = load_run(streamed / "fold-1")
    predictions = Hearing(run, "test", "nothing").predictions(CONDITIONS["white-5"])
    for row, clip in list(enumerate(run.clips("test")))[::7]:
        noise = seeded("white", clip.key).standard_normal(9600, np.float32)
        heard = log_mel(add_noise(clip.read(), noise, 5.0), run.front_end)[: run.front_end.frames(run.window_samples)]
        assert predictions.probabilities[row] == pytest.approx(probabilities(run, heard), abs=1e-5)


def test_a_window_of_a_beginning_is_the_beginning_repeated(windowed: Path) -> None:
    run = load_run(windowed)
    beginning = Condition("beginning", "length", "the first 0.2 s", excerpts=lambda samples: [samples[:3200]])
    predictions = Hearing(run, "test", "nothing").predictions(beginning)
    for row, clip in list(enumerate(run.clips("test")))[::7]:
        expected = probabilities(run, log_mel(tile_or_cut(clip.read()[:3200], run.window_samples), run.front_end))
        assert predictions.probabilities[row] == pytest.approx(expected, abs=1e-5)
    assert np.abs(predictions.probabilities - evaluate_run(run).probabilities).max() > 1e-2


def test_a_sliding_window_answers_with_the_mean_of_its_answers(own_tones: Any, tmp_path: Path) -> None:
    samples, rate = soundfile.read(own_tones.folder / "cyd-joy-0.wav", dtype="float32")
    long = np.concatenate([samples, np.zeros(16000, np.float32), samples[::-1], samples, np.zeros(8000, np.float32)])
    soundfile.write(own_tones.folder / "cyd-joy-0.wav", long, rate, subtype="FLOAT")  # 3.3 s
    fit(own_tones.recipe(**STREAM | {"data__window_samples": 95744}, training__epochs=2), tmp_path / "run")
    run = load_run(tmp_path / "run")
    predictions, whole = (
        Hearing(run, "test", "nothing").predictions(CONDITIONS[name]) for name in ("sliding", "clean")
    )
    answers = [probabilities(run, log_mel(long[start : start + 32000], run.front_end)) for start in (0, 8000, 16000)]
    row = predictions.keys.index("cyd-joy-0.wav")
    assert predictions.probabilities[row] == pytest.approx(np.mean(answers, axis=0), abs=1e-5)
    assert np.abs(answers[0] - answers[2]).max() > 1e-3
    others = np.arange(len(whole.keys)) != row
    assert predictions.probabilities[others] == pytest.approx(whole.probabilities[others], abs=1e-5)


def test_a_calibrated_device_was_calibrated_under_the_same_condition(streamed: Path) -> None:
    """Its constants take a change of level out again, which the constants of training do not."""
    run = load_run(streamed / "fold-1")
    by_knowledge = {}
    for known in ("nothing", "calibrated"):
        hearing = Hearing(run, "test", known)  # type: ignore[arg-type]
        clean, soft = (hearing.predictions(CONDITIONS[name]).probabilities for name in ("clean", "level-20"))
        by_knowledge[known] = np.abs(clean - soft).max()
    assert by_knowledge["calibrated"] < 1e-4 and by_knowledge["nothing"] > 1e-2


def test_babble_is_of_training_speakers(streamed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, drawn = load_run(streamed / "fold-1"), []
    babble = sertool.degrade.babble

    def noted(voices: list[FloatArray], *others: Any) -> FloatArray:
        drawn.extend(voices)
        return babble(voices, *others)

    monkeypatch.setattr("sertool.degrade.babble", noted)
    Hearing(run, "test", "nothing").predictions(CONDITIONS["babble-5"])
    of_training = {clip.read().tobytes() for clip in run.clips("train")}
    assert len(drawn) == 6 * len(run.clips("test"))
    assert {voice.tobytes() for voice in drawn} <= of_training


def test_a_training_speaker_is_not_behind_the_own_voice(streamed: Path) -> None:
    run = load_run(streamed / "fold-1")
    hearing, clip = Hearing(run, "train", "nothing"), run.clips("train")[0]
    own_voice = {each.read().tobytes() for each in run.clips("train") if each.speaker == clip.speaker}
    voices = hearing._draw(clip, np.random.default_rng(0), 50)
    assert not own_voice & {voice.tobytes() for voice in voices}


def test_no_voices_for_babble(own: Path) -> None:
    (own / "fold-1" / "split.json").write_text(json.dumps({"folds": [{"train": ["ada"], "test": ["cyd", "fox"]}]}))
    with pytest.raises(UsageError, match="no training speaker but 'ada', so there are no voices for babble"):
        Hearing(load_run(own / "fold-1"), "train", "nothing").predictions(CONDITIONS["babble-5"])


# --- what is reported ----------------------------------------------------------------------------------------------


def test_numbers_equal_scikit_learn_and_a_bootstrap_by_hand(own: Path) -> None:
    found = measure_robustness(own, chosen_conditions("level"))
    folds = [Hearing(load_run(own / f"fold-{number}"), "test", "nothing") for number in (1, 2)]
    items = []
    for name in ("clean", "level-20"):
        parts = [fold.predictions(CONDITIONS[name]) for fold in folds]
        items.append([np.concatenate([getattr(part, field) for part in parts]) for field in ("truth", "predicted")])
    (truth, clean), (_, soft) = items
    speakers = np.concatenate([[clip.speaker for clip in fold.clips] for fold in folds])
    result = found["conditions"]["level-20"]
    assert result["uar"] == pytest.approx(balanced_accuracy_score(truth, soft))
    assert [*result["recall"].values()] == pytest.approx(recall_score(truth, soft, average=None))
    difference = balanced_accuracy_score(truth, soft) - balanced_accuracy_score(truth, clean)
    assert result["difference"] == pytest.approx(difference) and difference != 0

    rows = [np.flatnonzero(speakers == name) for name in sorted(set(speakers))]
    differences = []
    for draw in np.random.default_rng(0).integers(len(rows), size=(2000, len(rows))):
        drawn = np.concatenate([rows[speaker] for speaker in draw])
        label = truth[drawn]
        change = (soft[drawn] == label).astype(int) - (clean[drawn] == label)
        differences.append(np.mean([change[label == each].mean() for each in set(label)]))
    assert result["difference_interval"] == pytest.approx(np.quantile(differences, [0.025, 0.975]).tolist())


def test_one_speaker_has_no_interval(own: Path, sertool: Callable[..., Any]) -> None:
    run = own / "fold-1"
    (run / "split.json").write_text(json.dumps({"folds": [{"train": ["ada", "bea", "dov", "eli"], "test": ["cyd"]}]}))
    outcome = sertool("robustness", run, "--conditions", "level")
    assert outcome.code == 0 and outcome.out.count("one speaker") == 3
    assert results(run)["test"]["conditions"]["level-20"]["difference_interval"] is None


def test_the_command_prints_a_table_and_keeps_it(own: Path, tones: Any, sertool: Callable[..., Any]) -> None:
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in tones.folder.rglob("*.wav")}
    outcome = sertool("robustness", own, "--conditions", "white-5,level,first-1s")
    assert (outcome.code, outcome.err) == (0, f"{own / 'robustness.json'}: written\n")
    assert f"{own}: 48 test clips of 4 speakers\nfolds: 2 of 2\n" in outcome.out
    kept = results(own)["test"]
    assert [*kept["conditions"]] == ["clean", "white-5", "level-20", "first-1s"]
    lines = {line.split()[0]: line for line in outcome.out.splitlines() if line.strip()}
    for name, result in kept["conditions"].items():
        low, high = result["uar_interval"]
        assert f"{result['uar']:.1%}" in lines[name] and f"{100 * low:.1f} to {100 * high:.1f}" in lines[name]
        low, high = result["difference_interval"]
        change = f"{100 * result['difference']:+z.1f}", f"{100 * low:+z.1f} to {100 * high:+z.1f}"
        assert all(text in lines[name] for text in change) == (name != "clean")
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in before} == before
    as_json = json.loads(sertool("robustness", own, "--conditions", "white-5,level,first-1s", "--json").out)
    assert as_json == {"run": str(own)} | kept


def test_the_help_names_every_condition(sertool: Callable[..., Any]) -> None:
    words = set(re.split(r"[\s,:(]+", sertool("robustness", "--help").out))
    names = CONDITIONS.keys() | {condition.group for condition in CONDITIONS.values()}
    assert names <= words


# --- going on ------------------------------------------------------------------------------------------------------


def test_a_stopped_command_goes_on(
    own: Path, computed: list[str], sertool: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("robustness", own, "--conditions", "level,microphone")
    with monkeypatch.context() as patch:

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("sertool.degrade.tilt", stop)
        outcome = sertool(*arguments)
    assert outcome.code == 130 and "the same command goes on from here" in outcome.err
    assert [*results(own)["test"]["conditions"]] == ["clean", "level-20"]
    computed.clear()
    assert sertool(*arguments).code == 0
    assert computed == ["tilt+6", "tilt+6", "tilt-6", "tilt-6"]
    kept = results(own)
    computed.clear()
    assert sertool("robustness", own, "--conditions", "tilt-6").code == 0
    assert computed == [] and results(own) == kept


def test_results_follow_what_they_were_computed_from(own: Path, computed: list[str]) -> None:
    chosen = chosen_conditions("clean")
    first = measure_robustness(own, chosen)
    shutil.copy(own / "fold-2" / "checkpoint.safetensors", own / "fold-1" / "checkpoint.safetensors")
    computed.clear()
    again = measure_robustness(own, chosen)
    assert computed == ["clean", "clean"]
    assert again["conditions"]["clean"]["key"] != first["conditions"]["clean"]["key"]


def test_what_was_known_and_who_was_tested_are_kept_apart(own: Path, sertool: Callable[..., Any]) -> None:
    for options in ([], ["--calibrated"], ["--part", "train", "--conditions", "clean"]):
        run = own / "fold-1"
        outcome = sertool("robustness", run, "--conditions", "level", *options)
        assert outcome.code == 0
        assert (", each after calibration to the speaker\n" in outcome.out) == (options == ["--calibrated"])
    kept = results(own / "fold-1")
    assert [*kept] == ["test", "test-calibrated", "train"]
    assert [kept[name]["known"] for name in kept] == ["nothing", "calibrated", "nothing"]
    assert kept["test"]["conditions"]["clean"]["key"] != kept["test-calibrated"]["conditions"]["clean"]["key"]


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 2, "nowhere: no such run folder"),
        (["{folds}", "--conditions", "nose"], 2, "--conditions 'nose' is unknown; did you mean 'noise'? valid: "),
        (["{folds}", "--part", "tset"], 2, "part 'tset' is unknown; did you mean 'test'"),
        (["{windowed}", "--calibrated"], 2, "was not trained to be calibrated; leave --calibrated out"),
    ],
)
def test_wrong_arguments(
    streamed: Path, windowed: Path, sertool: Callable[..., Any], arguments: list[str], code: int, message: str
) -> None:
    texts = (text.format(folds=streamed, windowed=windowed) for text in arguments)
    assert_one_line(sertool("robustness", *texts), code, message)


@pytest.mark.parametrize("content", ["{", "[]", '{"test": 1}', '{"test": {"conditions": {"clean": {}}}}'])
def test_damaged_results_are_not_overwritten(own: Path, sertool: Callable[..., Any], content: str) -> None:
    (own / "robustness.json").write_text(content)
    assert_one_line(sertool("robustness", own, "--conditions", "clean"), 1, "robustness.json: damaged; delete it")
    assert (own / "robustness.json").read_text() == content
