"""Several models that hear one stream: each says what it would say alone, and what they hear alike is computed once."""

from __future__ import annotations

import gc
import tracemalloc
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import edge_runtime
from edge_runtime import scoring
from edge_runtime.frontend import LogMelStream
from edge_runtime.gate import Gate
from edge_runtime.session import Session, SessionGroup
from edge_runtime.settings import Settings

RATE = 16000


def renamed(recognizer, name: str, **changes):
    model = copy(recognizer)
    model.path = Path(name)
    model.artifact = replace(model.artifact, **changes)
    return model


@pytest.fixture(scope="module")
def models(recognizer, stream_recognizer):
    """Windows of one and of two seconds; streams of one front-end with two windows, and one of another front-end."""
    front_end = stream_recognizer.artifact.front_end
    constants = stream_recognizer.artifact.normalization
    shifted = replace(constants, mean=tuple(np.add(constants.mean, constants.std).tolist()))
    return [
        renamed(recognizer, "window.onnx"),
        renamed(recognizer, "window-again.onnx"),
        renamed(stream_recognizer, "stream.onnx"),
        renamed(stream_recognizer, "stream-short.onnx", window_samples=16384),
        renamed(stream_recognizer, "stream-shifted.onnx", normalization=shifted),
        renamed(stream_recognizer, "stream-deep.onnx", front_end=replace(front_end, max_hz=4000.0)),
    ]


SETTINGS = [
    Settings(),
    Settings(enter=0.4, exit=0.3, silence=1.0),
    Settings(hop=0.25, min_audio=0.4, max_segment=1.7),
    Settings(mode="utterance", enter=0.3, exit=0.2, hangover=0.3),
]


@pytest.fixture(scope="module")
def signal(room, speech):
    parts = (
        speech(3.1), room(1.3), speech(0.5, 1), room(0.6, seed=1), np.zeros(9000, np.float32), speech(1.9, 2),
        room(2.2, seed=2), speech(0.3, 3), room(1.1, seed=3), speech(2.2, 4),
    )  # fmt: skip
    return np.concatenate(parts)


ACTS = st.lists(
    st.tuples(
        st.sampled_from(["push"] * 6 + ["coalesce"] * 3 + ["gap", "lose", "update", "finish"]),
        st.integers(1, 60_000),
        st.integers(0, len(SETTINGS) - 1),
    ),
    min_size=3,
    max_size=30,
)


def follow(session, signal: np.ndarray, acts: list) -> list:
    events, at = [], 0
    for act, samples, choice in [*acts, ("push", len(signal), 0)]:
        if act in ("push", "coalesce"):
            events += session.push(signal[at : at + samples], coalesce=act == "coalesce")
            at += samples
        elif act == "gap":
            events += session.gap(samples, "overflow")
        elif act == "lose":
            events += session.lose("stalled") + session.restore(session.position + samples)
        elif act == "update":
            events += session.update(SETTINGS[choice])
        else:
            events += session.finish()
    return events + session.finish()


@hypothesis_settings(max_examples=25, deadline=None)
@given(acts=ACTS, first=st.integers(0, len(SETTINGS) - 1))
def test_each_model_says_what_it_says_alone(models, signal, acts, first):
    group = SessionGroup(models, SETTINGS[first])
    together = follow(group, signal, acts)
    windows = 0
    for model in models:
        session = Session(model, SETTINGS[first])
        alone = follow(session, signal, acts)
        windows += session.windows
        own = [replace(event, model=None) for event in together if event.model == model.name]
        assert [event.kind for event in own] == [event.kind for event in alone if event.label]
        for event, other in zip(own, (event for event in alone if event.label), strict=True):
            assert replace(event, probabilities=None) == replace(other, probabilities=None)
            assert event.probabilities == other.probabilities
        assert [e for e in together if e.model is None] == [e for e in alone if not e.label]
    assert group.windows == windows


def test_what_is_heard_alike_is_computed_once(models, signal, monkeypatch):
    counts = dict.fromkeys(("blocks", "frames", "windows"), 0)
    is_speech, push, log_mel = Gate.is_speech, LogMelStream.push, scoring.log_mel

    def counted_block(gate, block):
        counts["blocks"] += 1
        return is_speech(gate, block)

    def counted_push(stream, samples):
        frames = push(stream, samples)
        counts["frames"] += len(frames)
        return frames

    def counted_window(samples, front_end):
        counts["windows"] += 1
        return log_mel(samples, front_end)

    monkeypatch.setattr(Gate, "is_speech", counted_block)
    monkeypatch.setattr(LogMelStream, "push", counted_push)
    monkeypatch.setattr(scoring, "log_mel", counted_window)

    def cost(of: list) -> dict[str, int]:
        counts.update(dict.fromkeys(counts, 0))
        group = SessionGroup(of)
        assert group.push(signal) + group.finish()
        return dict(counts)

    window, again, stream, _, shifted, deep = models
    one, two = cost([stream]), cost([stream, shifted])
    assert one == two and one["blocks"] > 300 and one["frames"] > 300
    assert cost([stream, deep])["frames"] == 2 * one["frames"]
    assert cost([stream, deep])["blocks"] == one["blocks"]
    alone = Session(window)
    alone.push(signal)
    alone.finish()
    assert cost([window, again])["windows"] == alone.windows > 10


def test_memory_is_flat_however_long_somebody_speaks(models, speech):
    group = SessionGroup(models, Settings(max_segment=3600.0))
    block = speech(10.0)
    # Not all that is traced: a table of the interpreter's own may grow meanwhile, by megabytes at once.
    ours = [
        tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain),
        tracemalloc.Filter(True, str(Path(edge_runtime.__file__).parent / "*")),
    ]

    def held_after(seconds: int) -> int:
        for _ in range(seconds // 10):
            group.push(block)
        gc.collect()
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(ours).traces)

    tracemalloc.start()
    try:
        early, late = held_after(40), held_after(120)
    finally:
        tracemalloc.stop()
    assert early > 500_000
    assert late < early + 20_000
