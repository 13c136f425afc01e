from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_artifact import tiny_artifact

from edge_runtime.artifact import Artifact, check_golden, golden_signal
from edge_runtime.errors import ArtifactError

ARTIFACT = tiny_artifact()
CONTENT = json.loads(ARTIFACT.to_json())


def test_what_was_written_is_read_back():
    assert Artifact.from_json(ARTIFACT.to_json()) == ARTIFACT


def test_window_in_frames_and_seconds():
    artifact = replace(ARTIFACT, window_samples=95744)
    assert (artifact.window_frames, artifact.window_seconds) == (373, 5.984)


def test_a_field_of_a_later_version_is_ignored():
    assert Artifact.from_json(json.dumps({**CONTENT, "novelty": 1})) == ARTIFACT


def test_a_newer_schema_is_refused():
    with pytest.raises(ArtifactError, match=r"schema 3 is newer than 2.*upgrade ser-edge"):
        Artifact.from_json(json.dumps({**CONTENT, "schema": 3}), "m.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["a", "b"]}, "golden.logits has 4 values, expected 2"),
        ({"labels": ["a", "a", "b", "c"]}, "labels"),
        ({"labels": 5}, "garbles"),
        ({"normalization": {"mean": [0.0], "std": [1.0]}}, "normalization.mean has 1 values"),
        ({"normalization": {"mean": [0.0] * 64, "std": [0.0] * 64}}, "normalization.std"),
        ({"normalization": {"mean": ["x"] * 64, "std": [1.0] * 64}}, "garbles"),
        ({"normalization": []}, "garbles"),
        ({"golden": {}}, "garbles"),
        ({"golden": {**CONTENT["golden"], "logits": [float("nan")] * 4}}, "not finite"),
        ({"front_end": {**CONTENT["front_end"], "hop": 0}}, "front_end|garbles"),
        ({"front_end": {**CONTENT["front_end"], "window": "512"}}, "front_end|garbles"),
        ({"front_end": {**CONTENT["front_end"], "wide": 1}}, "garbles"),
        ({"window_samples": 100}, "window_samples"),
        ({"window_samples": 10**15}, "front_end|window_samples"),
        ({"temperature": 0}, "temperature"),
        ({"thresholds": {"anger": 2}}, "thresholds"),
        ({"thresholds": [1]}, "garbles"),
    ],
)
def test_a_contradiction_is_refused_in_one_line(change, message):
    with pytest.raises(ArtifactError, match=message) as caught:
        Artifact.from_json(json.dumps({**CONTENT, **change}), "m.onnx")
    assert str(caught.value).startswith("m.onnx: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["labels", "front_end", "normalization", "window_samples", "golden", "schema"])
def test_a_missing_field_is_refused(field):
    with pytest.raises(ArtifactError, match=r"m\.onnx"):
        Artifact.from_json(json.dumps({k: v for k, v in CONTENT.items() if k != field}), "m.onnx")


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '{"schema": Infinity}', "[" * 100000])
def test_what_is_no_description_is_refused(text):
    with pytest.raises(ArtifactError, match="damaged"):
        Artifact.from_json(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(field=st.sampled_from(sorted(CONTENT)), value=json_values)
def test_any_value_in_any_field_is_read_or_refused(field, value):
    try:
        Artifact.from_json(json.dumps({**CONTENT, field: value}))
    except ArtifactError as error:
        assert "\n" not in str(error)


def right_logits(_window: np.ndarray) -> np.ndarray:
    return np.asarray(ARTIFACT.golden.logits, np.float32)


def test_the_golden_vector_passes():
    check_golden(ARTIFACT, right_logits)


def test_another_front_end_fails_the_golden_vector():
    shifted = tuple(np.asarray(ARTIFACT.golden.log_mel_mean) + 0.01)
    wrong = replace(ARTIFACT, golden=replace(ARTIFACT.golden, log_mel_mean=shifted))
    with pytest.raises(ArtifactError, match=r"log-Mel spectrogram differs by 0\.01 dB"):
        check_golden(wrong, right_logits)


@pytest.mark.parametrize("logits", [np.zeros(4, np.float32), np.full(4, np.nan, np.float32), np.zeros(3, np.float32)])
def test_other_logits_fail_the_golden_vector(logits):
    with pytest.raises(ArtifactError, match="logits"):
        check_golden(ARTIFACT, lambda _window: logits)


def test_the_golden_signal_stays_in_range_and_is_a_formula():
    assert np.abs(golden_signal(95744)).max() <= 0.45
    assert np.array_equal(golden_signal(1000), golden_signal(2000)[:1000])
