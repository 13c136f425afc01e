from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_artifact import tiny_artifact

from edge_runtime.events import Event, Reason, SegmentAverage, answer

PROBABILITIES = np.array([0.1, 0.2, 0.3, 0.4], np.float32)


def test_an_event_is_one_line_of_versioned_json():
    event = Event("end", 1.0, 2.5, "joy", 0.75, {"joy": 0.75, "anger": 0.25}, wall="2030-01-01T00:00:00+00:00")
    line = event.to_json()
    assert "\n" not in line
    assert json.loads(line) == {
        "v": 1, "kind": "end", "start": 1.0, "end": 2.5, "label": "joy", "probability": 0.75,
        "probabilities": {"joy": 0.75, "anger": 0.25}, "wall": "2030-01-01T00:00:00+00:00",
    }  # fmt: skip


def test_fields_that_do_not_apply_are_left_out():
    assert json.loads(Event("gap", 0.0, 1.0, reason="overflow").to_json()) == {
        "v": 1, "kind": "gap", "start": 0.0, "end": 1.0, "reason": "overflow",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("thresholds", "threshold", "label"),
    [
        ({}, None, "sadness"),
        ({"sadness": 0.4}, None, "sadness"),
        ({"sadness": 0.41}, None, "uncertain"),
        ({"joy": 0.99}, None, "sadness"),
        ({}, 0.41, "uncertain"),
        ({"sadness": 0.99}, 0.1, "sadness"),
    ],
)
def test_thresholds_make_an_answer_uncertain(thresholds, threshold, label):
    given = answer(PROBABILITIES, replace(tiny_artifact(), thresholds=thresholds), threshold)
    assert given["label"] == label
    assert given["probability"] == 0.4
    assert given["probabilities"] == {"anger": 0.1, "joy": 0.2, "neutral": 0.3, "sadness": 0.4}


def test_a_longer_partial_score_replaces_a_shorter_one():
    average = SegmentAverage()
    average.add(np.array([1.0, 0.0]), full=False)
    average.add(np.array([0.3, 0.7]), full=False)
    assert average.probabilities.tolist() == [0.3, 0.7]


def test_full_windows_are_averaged_without_the_partial_ones():
    scores = np.random.default_rng(0).dirichlet(np.ones(4), 50)
    average = SegmentAverage()
    average.add(np.array([1.0, 0, 0, 0]), full=False)
    for score in scores:
        average.add(score, full=True)
    assert np.allclose(average.probabilities, scores.mean(axis=0))


def test_the_documents_explain_every_reason():
    handbook = (Path(__file__).parents[2] / "docs" / "device.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \| `(?:gap|source_lost)` \|", handbook, re.MULTILINE)) == set(Reason)


def test_a_reason_is_its_code_in_json_and_in_text():
    event = Event("source_lost", 0.0, 0.0, reason=Reason.STALLED, detail="nothing comes")
    assert json.loads(event.to_json())["reason"] == "stalled"
    assert f"{event.reason}" == "stalled"
