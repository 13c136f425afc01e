from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edge_runtime.emotion import EmotionTracker
from edge_runtime.settings import Settings

LABELS = ("anger", "joy", "neutral")


def feel(scores: list, hop: float = 1.0, **settings) -> list:
    """Hear scores a hop apart: what anger gets, the rest being neutral, or a whole vector."""
    tracker = EmotionTracker(SimpleNamespace(labels=LABELS), Settings(**settings))
    events = []
    for number, score in enumerate(scores):
        vector = np.array([score, 0, 1 - score] if isinstance(score, float) else score, np.float32)
        events += tracker.hear(number * hop, (number + 1) * hop, vector)
    return events + tracker.end()


def told(events: list) -> list[tuple]:
    return [(event.kind, event.label, event.start, event.end) for event in events]


def test_nothing_is_felt_unless_asked_for():
    assert feel([1.0, 1.0]) == []


def test_an_emotion_goes_on_between_the_two_thresholds():
    events = feel([0.65, 0.7, 0.55, 0.5, 0.69, 0.49, 0.6], enter={"anger": 0.7}, exit=0.5)
    assert told(events) == [("emotion_begin", "anger", 1, 2), ("emotion_end", "anger", 1, 5)]


def test_the_numbers_are_of_the_score_that_began_it_and_the_mean_of_all():
    begin, end = feel([0.75, 0.5, 0.625], enter={"anger": 0.7}, exit=0.5)
    assert begin.probability == begin.probabilities["anger"] == 0.75
    assert end.probability == end.probabilities["anger"] == 0.625
    assert end.probabilities == {"anger": 0.625, "joy": 0.0, "neutral": 0.375}


def test_without_exit_it_ends_0_15_below_enter():
    at, below = (feel([0.75, score, 0.0], enter={"anger": 0.75}) for score in (0.61, 0.59))
    assert [event.end for event in at] == [1, 2]
    assert [event.end for event in below] == [1, 1]


@pytest.mark.parametrize(
    ("enter", "label"),
    [(0.6, "joy"), ({"joy": 0.6, "anger": 0.1}, "joy"), ({"anger": 0.1}, None), ({"joy": 0.71}, None)],
)
def test_only_the_most_probable_label_enters_at_its_own_threshold(enter, label):
    begun = [event.label for event in feel([[0.2, 0.7, 0.1]], enter=enter) if event.kind == "emotion_begin"]
    assert begun == ([label] if label else [])


def test_another_emotion_waits_until_the_active_one_is_left_and_begins_with_that_score():
    events = feel([[0.7, 0.3, 0], [0.45, 0.55, 0], [0.3, 0.7, 0]], enter=0.5, exit=0.4)
    assert told(events) == [
        ("emotion_begin", "anger", 0, 1), ("emotion_end", "anger", 0, 2),
        ("emotion_begin", "joy", 2, 3), ("emotion_end", "joy", 2, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(("scores", "begun_at"), [(2, []), (3, [1.5]), (4, [1.5])])
def test_an_emotion_is_mentioned_once_it_has_lasted(scores, begun_at):
    events = feel([0.9] * scores + [0.0] * 5, hop=0.5, enter={"anger": 0.7}, min_duration=1.5)
    assert [event.end for event in events if event.kind == "emotion_begin"] == begun_at
    assert all(event.start == 0 for event in events)


def test_decimal_times_are_not_short_of_the_least_duration():
    tracker = EmotionTracker(SimpleNamespace(labels=LABELS), Settings(enter=0.5, min_duration=0.3))
    assert 0.7 - 0.4 < 0.3
    assert [event.kind for event in tracker.hear(0.4, 0.7, np.eye(3)[0])] == ["emotion_begin"]


def test_the_same_emotion_rests_and_another_need_not():
    scores = [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]]
    events = feel(scores, enter=0.5, refractory=2.5)
    assert [(e.label, e.start) for e in events if e.kind == "emotion_begin"] == [("anger", 0), ("joy", 1), ("anger", 4)]


def test_one_that_was_never_mentioned_needs_no_rest():
    events = feel([0.9, 0.0, 0.9, 0.9], enter={"anger": 0.7}, min_duration=2, refractory=100)
    assert told(events)[0] == ("emotion_begin", "anger", 2, 4)


@pytest.mark.parametrize(("pause", "emotions"), [(4.9, 1), (5.0, 2)])
def test_a_pause_as_long_as_silence_ends_it(pause, emotions):
    tracker = EmotionTracker(SimpleNamespace(labels=LABELS), Settings(enter=0.5, silence=5.0))
    events = [*tracker.hear(0, 1, np.eye(3)[0]), *tracker.hear(1 + pause, 2 + pause, np.eye(3)[0]), *tracker.end()]
    assert [event.kind for event in events] == ["emotion_begin", "emotion_end"] * emotions


vectors = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(lambda v: [x / sum(v) for x in v])
levels = st.floats(0, 1)


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    scores=st.lists(st.tuples(vectors, st.sampled_from([0.0, 0.0, 0.0, 2.0, 6.0])), max_size=40),
    both=st.tuples(levels, levels).map(sorted),
    min_duration=st.sampled_from([0.0, 1.0, 2.5]),
    refractory=st.sampled_from([0.0, 1.0, 7.0]),
)
def test_emotions_pair_up_and_keep_their_promises(scores, both, min_duration, refractory):
    settings = Settings(exit=both[0], enter=both[1], min_duration=min_duration, refractory=refractory)
    tracker = EmotionTracker(SimpleNamespace(labels=LABELS), settings)
    events, heard, now = [], [], 0.0
    for vector, pause in scores:
        heard.append((now + pause, now + pause + 1, np.array(vector)))
        now += pause + 1
        events += tracker.hear(*heard[-1])
    events += tracker.end()

    begins, ends = events[::2], events[1::2]
    assert [e.kind for e in events] == ["emotion_begin", "emotion_end"] * len(begins)
    for begin, end in zip(begins, ends, strict=True):
        assert (begin.label, begin.start) == (end.label, end.start)
        assert end.end - end.start >= min_duration
        inside = [(s, e, p[LABELS.index(end.label)]) for s, e, p in heard if end.start <= s and e <= end.end]
        assert inside[0][2] >= settings.enter
        assert all(probability >= settings.exit for *_, probability in inside)
        assert all(second[0] - first[1] < settings.silence for first, second in itertools.pairwise(inside))
    for first, second in itertools.pairwise(ends):
        assert first.end <= second.start
    for label in LABELS:
        own = [end for end in ends if end.label == label]
        assert all(first.end + refractory <= second.start for first, second in itertools.pairwise(own))
