"""Constants of calm speech: whose, how much of it, and that training and evaluation measure what a device would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from edge_runtime.errors import UsageError
from edge_runtime.frontend import FrontEnd, Normalization
from sertool.features import ClipFrames
from sertool.personal import personal_constants
from sertool.recipe import Normalizing

FRAMES = 125  # 2 s
SPEAKERS = ["ada"] * 8 + ["bob"] * 4
LABELS = ["neutral"] * 6 + ["joy"] * 2 + ["neutral", "joy", "joy", "joy"]
USUAL = [Normalization((float(row),), (7.0,)) for row in range(12)]


@pytest.fixture(scope="module")
def clips() -> ClipFrames:
    frames = np.random.default_rng(0).normal(np.repeat(np.arange(12) * 10.0, FRAMES), 3).astype(np.float32)[:, None]
    return ClipFrames(frames, np.arange(1, 13) * FRAMES)


def constants(clips: ClipFrames, seconds: float, label: str = "neutral") -> list[Normalization]:
    calm = Normalizing(personal_seconds=seconds, personal_label=label)
    return personal_constants(clips, SPEAKERS, LABELS, USUAL, calm, FrontEnd())


def test_all_calm_speech_of_the_speaker_but_the_clip_itself(clips: ClipFrames) -> None:
    found = constants(clips, 3600.0)
    for row in range(8):
        others = np.concatenate([clips[other] for other in range(6) if other != row]).astype(np.float64)
        assert found[row].mean[0] == pytest.approx(others.mean(), rel=1e-9)
        assert found[row].std[0] == pytest.approx(others.std(), rel=1e-6)


def test_no_more_than_is_asked_for_and_the_same_for_all_clips_that_are_not_among_it(clips: ClipFrames) -> None:
    found = constants(clips, 6.0)
    assert found[6] == found[7]
    # Clips are ten apart: the mean of three of them says how many were taken.
    used = {row for row in range(6) if found[row] != found[6]}
    assert len(used) == 3
    assert found[6].mean[0] == pytest.approx(
        np.concatenate([clips[row] for row in used]).mean(dtype=np.float64), rel=1e-9
    )


def test_who_has_too_little_calm_speech_keeps_the_usual_constants(clips: ClipFrames) -> None:
    """Bob's one calm clip lasts 2 s."""
    assert constants(clips, 30.0)[8:] == USUAL[8:]
    assert constants(clips, 30.0, label="calm") == USUAL


def test_a_band_that_never_changes_keeps_a_deviation() -> None:
    silent = ClipFrames(np.full((1000, 1), -100.0, np.float32), np.array([500, 1000]))
    found = personal_constants(silent, ["a", "a"], ["neutral", "joy"], USUAL[:2], Normalizing(), FrontEnd())
    assert found[1] == Normalization((-100.0,), (1.0,))


@pytest.fixture(scope="module")
def trained(tones: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose clips last 0.6 s: 1.2 s of calm speech must do."""
    from sertool.fit import fit

    recipe = tones.recipe(
        data__clips="once", network__time_padding="causal", network__name="resnet9", network__width=0.125,
        training__epochs=2, normalization__personal=0.5, normalization__personal_label="sadness",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("personal") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sertool.personal.LEAST_S", 1.0)
        fit(recipe, folder)
    return folder


def test_a_calibrated_device_hears_what_evaluation_hears(
    trained: Path, tmp_path: Path, sertool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_runtime.calibration import Calibration
    from edge_runtime.recognizer import Recognizer
    from sertool.evaluate import evaluate_run
    from sertool.features import log_mel_clips
    from sertool.run import load_run

    monkeypatch.setattr("sertool.personal.LEAST_S", 1.0)
    run = load_run(trained)
    found, plain = evaluate_run(run, known="calibrated"), evaluate_run(run)
    assert np.abs(found.probabilities - plain.probabilities).max() > 0.01
    sertool("evaluate", trained)
    outcome = sertool("export", trained, "-o", tmp_path / "m.onnx", "--precision", "fp32", "--form", "stream")
    assert outcome.code == 0, outcome.err
    recognizer = Recognizer(tmp_path / "m.onnx")
    assert recognizer.artifact.normalization.personal
    clips = run.clips("test")
    heard = log_mel_clips(run.manifest, FrontEnd(), 16)
    frames = {clip.key: heard[row] for row, clip in enumerate(run.manifest.clips)}
    for row, clip in enumerate(clips):
        others = [c for c in clips if c.speaker == clip.speaker and c.label == "sadness" and c is not clip]
        calm = np.concatenate([frames[other.key] for other in others]).astype(np.float64)
        mean, std = calm.mean(axis=0), calm.std(axis=0).clip(1.0)
        calibration = Calibration(tuple(mean), tuple(std), FrontEnd(), 2.0, "2026-01-01", "clips")
        probabilities = recognizer.calibrated(calibration).probabilities(clip.read())
        assert recognizer.artifact.temperature == 1.0
        assert probabilities == pytest.approx(found.probabilities[row], abs=1e-4)


def test_calibrated_is_another_protocol_beside_the_first(
    trained: Path, tones: Any, tmp_path: Path, sertool: Any
) -> None:
    from sertool.fit import fit

    for options in ([], ["--calibrated"]):
        outcome = sertool("evaluate", trained, *options)
        assert outcome.code == 0, outcome.err
    assert set(json.loads((trained / "metrics.json").read_text())) == {"test", "test-calibrated"}
    assert (trained / "report-test-calibrated.html").is_file()
    fit(tones.recipe(training__epochs=1), tmp_path / "other")
    outcome = sertool("evaluate", tmp_path / "other", "--calibrated")
    assert outcome.code == 2 and "was not trained to be calibrated" in outcome.err
    outcome = sertool("evaluate", trained, "--calibrated", "--in-turn")
    assert outcome.code == 2 and "give one of them" in outcome.err


def test_calm_speech_that_no_clip_is_labelled_with_is_refused(tones: Any, tmp_path: Path) -> None:
    from sertool.fit import fit

    recipe = tones.recipe(data__clips="once", network__time_padding="causal", normalization__personal=0.5)
    with pytest.raises(UsageError, match=r"no clip is labelled 'neutral', normalization\.personal_label; valid: anger"):
        fit(recipe, tmp_path / "run")


def test_each_joined_corpus_is_normalised_as_if_it_were_alone(tones: Any, tmp_path: Path) -> None:
    from sertool.batches import training_inputs
    from sertool.corpora.join import joined
    from sertool.corpora.manifest import Manifest, load_manifest
    from sertool.networks import build_network

    quiet = tmp_path / "quiet"
    quiet.mkdir()
    for clip in load_manifest(tones.manifest).clips:
        soundfile.write(quiet / clip.file, 0.1 * clip.read(), 16000)
    (quiet / "quiet.csv").write_text(tones.manifest.read_text())
    both = Manifest(
        tuple(joined([load_manifest(tones.manifest), load_manifest(quiet / "quiet.csv")])), tmp_path / "both.csv"
    )
    rows, means = range(len(both)), {}
    for by in ("corpus", "all"):
        recipe = tones.recipe(data__clips="once", network__time_padding="causal", normalization__by=by)
        network = build_network("resnet9", 3, "causal", 0.125)
        inputs, _ = training_inputs(recipe, both, rows, network, None, torch.device("cpu"))
        frames = inputs.batch(torch.arange(len(both)), np.random.default_rng(0)).inputs
        means[by] = float(frames[: len(both) // 2].mean() - frames[len(both) // 2 :].mean())
    assert abs(means["corpus"]) < 0.01 and means["all"] > 0.5


@pytest.mark.parametrize("by", ["all", "corpus"])
def test_a_run_of_corpora_apart_leaves_the_next_corpus_its_own_constants(tones: Any, tmp_path: Path, by: str) -> None:
    """Else weights belong to the constants that they were trained with."""
    from sertool.fit import fit
    from sertool.run import load_run

    device = {"data__clips": "once", "network__time_padding": "causal", "network__name": "resnet9",
              "network__width": 0.125, "training__epochs": 1}  # fmt: skip
    fit(tones.recipe(**device, normalization__by=by), tmp_path / "first")
    (tmp_path / "split.json").write_text(json.dumps({"folds": [{"train": ["ada", "dov"], "test": ["cyd", "fox"]}]}))
    further = {"training__start": str(tmp_path / "first"), "data__split": str(tmp_path / "split.json")}
    fit(tones.recipe(**device, **further), tmp_path / "second")
    first, second = (load_run(tmp_path / name).normalization for name in ("first", "second"))
    assert (first == second) == (by == "all")
