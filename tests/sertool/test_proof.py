"""``sertool parity``: what it says of exported files is what can be measured of them by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from edge_runtime.errors import UsageError
from edge_runtime.frontend import log_mel, tile_or_cut
from edge_runtime.recognizer import Recognizer, softmax
from sertool.evaluate import Predictions, evaluate_run
from sertool.export.artifact import export_run
from sertool.export.parity import proven_parity
from sertool.export.proof import answer_test_clips, match_files, targets
from sertool.fit import fit
from sertool.networks import predict
from sertool.run import Run, load_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folds(tones, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two folds of a small causal network, not evaluated."""
    folder = tmp_path_factory.mktemp("proof") / "runs"
    runs = []
    for number in (1, 2):
        recipe = tones.recipe(network__width=0.5, network__time_padding="causal", training__epochs=2, data__fold=number)
        fit(recipe, folder / f"fold-{number}")
        runs.append(load_run(folder / f"fold-{number}"))
    return runs


@pytest.fixture(scope="module")
def files(folds: list[Run]) -> list[Path]:
    """One int8 file of each fold."""
    paths = [folds[0].path.parent.parent / f"{run.path.name}.onnx" for run in folds]
    for run, path in zip(folds, paths, strict=True):
        export_run(run, path, force=True, calibration_clips=12)
    return paths


@pytest.fixture(scope="module")
def stream_file(folds: list[Run]) -> Path:
    path = folds[0].path.parent.parent / "stream.onnx"
    export_run(folds[0], path, precision="fp32", form="stream", force=True)
    return path


def test_folds_are_pooled_and_every_number_can_be_worked_out(sertool, folds, files) -> None:
    bytes_before = [path.read_bytes() for path in files]
    done = sertool("parity", folds[0].path.parent, *files, "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert json.loads((folds[0].path.parent / "parity.json").read_text()) == found
    assert [path.read_bytes() for path in files] == bytes_before

    truth, by_network, by_file = [], [], []
    for run, path in zip(folds, files, strict=True):
        recognizer, clips = Recognizer(path), run.clips("test")
        windows = np.stack([log_mel(tile_or_cut(clip.read(), run.window_samples)) for clip in clips])
        truth += [clip.label for clip in clips]
        by_network += list(softmax(predict(run.network(), run.normalization.apply(windows))))
        by_file += [recognizer.probabilities(clip.read()) for clip in clips]
    labels = np.array(folds[0].labels)
    expected, computed = labels[np.argmax(by_network, 1)], labels[np.argmax(by_file, 1)]
    [file] = found["files"]
    assert (file["kind"], found["folds"], found["folds_of"]) == ("onnx int8", [1, 2], 2)
    assert (found["clips"], found["speakers"]) == (48, 4)
    assert file["float_uar"] == pytest.approx(balanced_accuracy_score(truth, expected))
    assert file["uar"] == pytest.approx(balanced_accuracy_score(truth, computed))
    assert file["difference"] == pytest.approx(file["uar"] - file["float_uar"])
    assert file["agreement"] == pytest.approx(np.mean(expected == computed))
    assert file["max_probability_difference"] == pytest.approx(np.abs(np.array(by_network) - by_file).max(), abs=1e-5)
    assert file["bytes"] == len(bytes_before[0])
    assert 0 < file["latency_ms"]["median"] <= file["latency_ms"]["p95"]
    assert file["memory_bytes"] is None or file["memory_bytes"] > 10e6


def test_a_single_run_is_exported_and_the_table_says_what_is_met(sertool, folds) -> None:
    done = sertool("parity", folds[0].path, "--export", "fp32")
    assert done.code == 0
    assert "onnx fp32: logits" in done.out and done.out.rstrip().endswith("met")
    assert "24 test clips of 2 speakers" in done.out
    measured = json.loads((folds[0].path / "parity.json").read_text())
    assert measured["files"][0]["max_error"] <= 1e-5 * max(1, measured["files"][0]["largest"])
    assert measured["files"][0]["agreement"] == 1
    assert not list(folds[0].path.glob("*.onnx"))


def test_the_card_of_the_next_export_carries_the_proof(sertool, folds, tmp_path: Path) -> None:
    shutil.copytree(folds[1].path, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert proven_parity(run, "onnx fp32") is None
    first = export_run(run, tmp_path / "first.onnx", precision="fp32", force=True)
    assert sertool("parity", run.path, first.path).code == 0
    second = export_run(run, tmp_path / "second.onnx", precision="fp32", force=True)
    assert "24 clips of 2 test speakers | 100.0 % |" in second.artifact.card
    assert "24 clips of 2 test speakers" not in first.artifact.card


def test_a_stream_is_answered_as_the_device_does(folds, stream_file) -> None:
    [files] = match_files(folds, [stream_file]).values()
    assert list(files) == ["onnx fp32 stream"]
    fold = answer_test_clips(folds[0], files)
    recognizer = Recognizer(stream_file)
    expected = np.stack([recognizer.logits(clip.read()) for clip in fold.clips])
    assert np.array_equal(fold.logits["onnx fp32 stream"], expected)
    # What is expected of it is what an evaluation of the causal run gives, not what windows would.
    np.testing.assert_allclose(fold.expected["onnx fp32 stream"], expected, atol=1e-4)
    np.testing.assert_allclose(softmax(expected), evaluate_run(folds[0]).probabilities, atol=1e-4)


def test_files_that_do_not_belong_are_refused(folds, files, stream_file, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"fold-2\.onnx: not exported from the weights of .*fold-1"):
        match_files(folds[:1], files[1:])
    shutil.copy(files[0], tmp_path / "again.onnx")
    with pytest.raises(UsageError, match="are both onnx int8"):
        match_files(folds, [files[0], tmp_path / "again.onnx"])
    with pytest.raises(UsageError, match=r"fold-2: has no onnx fp32 stream file"):
        match_files(folds, [*files, stream_file])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--export", "int9"], "--export 'int9' is not offered; did you mean 'int8'?"),
        (["--format", "pb"], "--format 'pb' is not offered"),
        (["--form", "streem"], "--form 'streem' is not offered; did you mean 'stream'?"),
    ],
)
def test_wrong_options_are_one_line(sertool, folds, arguments: list[str], message: str) -> None:
    done = sertool("parity", folds[0].path, *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"sertool: {message}") and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("network", "kind", "change", "expected"),
    [
        ("resnet9", "onnx int8", {}, [True, True]),
        ("resnet9", "tflite int8 stream", {"agreement": 0.985}, [True, False]),
        ("mobilenet15", "onnx int8", {"agreement": 0.985}, [True, True]),
        ("mobilenet15", "onnx int8", {"agreement": 0.979}, [True, False]),
        ("cnn6", "onnx fp16", {"difference": 0.006}, [False, True]),
        ("cnn6", "onnx int8", {"difference": -0.005}, [True, True]),
        ("cnn6", "onnx fp32", {"max_error": 9e-5, "largest": 10.0}, [True]),
        ("cnn6", "onnx fp32", {"max_error": 9e-5, "largest": 0.5}, [False]),
    ],
)
def test_targets_are_those_stated(network: str, kind: str, change: dict[str, float], expected: list[bool]) -> None:
    measured = {"difference": 0.0, "agreement": 0.995, "max_error": 1.0, "largest": 5.0} | change
    assert [target["met"] for target in targets(network, kind, measured)] == expected


def test_predictions_are_read_back(folds, tmp_path: Path) -> None:
    predictions = evaluate_run(folds[0])
    predictions.save(tmp_path / "predictions.csv")
    again = Predictions.load(tmp_path / "predictions.csv")
    assert (again.labels, again.keys, again.speakers, again.genders) == (
        predictions.labels,
        predictions.keys,
        predictions.speakers,
        predictions.genders,
    )
    assert np.array_equal(again.truth, predictions.truth)
    np.testing.assert_allclose(again.probabilities, predictions.probabilities, atol=1e-6)
