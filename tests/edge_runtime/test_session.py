from __future__ import annotations

import itertools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_artifact import tiny_artifact

from edge_runtime.errors import AudioError, UsageError
from edge_runtime.gate import BLOCK
from edge_runtime.session import Session
from edge_runtime.settings import Settings

RATE = 16000


class Listening:
    """A recognizer that remembers what it was given and answers from its last sample."""

    def __init__(self, window: float = 2.0) -> None:
        self.artifact = tiny_artifact(round(window * RATE))
        self.heard: list[np.ndarray] = []

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        self.heard.append(samples.copy())
        joy = float(np.clip(abs(samples[-1]) * 3 + 0.3, 0, 1))
        return np.array([1 - joy, joy, 0, 0], np.float32)


def run(samples: np.ndarray, recognizer=None, **settings) -> list:
    session = Session(recognizer or Listening(), Settings(**settings))
    return session.push(samples) + session.finish()


def kinds(events: list) -> list[str]:
    return [event.kind for event in events]


def test_an_utterance_begins_updates_and_ends(room, speech):
    events = run(np.concatenate([room(2.0), speech(2.0), room(2.0, seed=1)]))
    assert kinds(events) == ["begin", *["update"] * (len(events) - 2), "end"]
    assert len({event.start for event in events}) == 1
    assert events[0].start == pytest.approx(1.8, abs=0.1)
    assert [event.end - event.start for event in events[:-1]] == pytest.approx([0.8, 1.3, 1.8, 2.3][: len(events) - 1])
    assert events[-1].end == pytest.approx(4.0, abs=0.25)


@pytest.mark.parametrize("hop", [0.25, 0.5, 1.0])
def test_scores_are_a_hop_apart(speech, hop):
    events = run(speech(5.0), hop=hop)
    ends = [event.end for event in events if event.kind != "end"]
    assert np.allclose(np.diff(ends), hop)


def test_a_score_hears_the_last_window_of_the_segment(speech):
    signal = speech(5.0)
    recognizer = Listening()
    events = run(signal, recognizer)
    for event, heard in zip(events[:-1], recognizer.heard, strict=False):
        end = round(event.end * RATE)
        assert np.array_equal(heard, signal[max(0, end - 32000) : end])


def test_a_clip_that_fits_the_window_ends_with_the_answer_for_the_whole_clip(recognizer, speech):
    clip = speech(1.7)
    end = run(clip, recognizer)[-1]
    assert end.kind == "end"
    assert list(end.probabilities.values()) == pytest.approx(recognizer.probabilities(clip).tolist(), abs=1e-6)


def test_a_long_segment_ends_with_the_mean_of_its_full_windows(recognizer, speech):
    clip = speech(5.0)
    events = run(clip, recognizer)
    ends = [round(event.end * RATE) for event in events if round((event.end - event.start) * RATE) >= 32000]
    windows = [recognizer.probabilities(clip[end - 32000 : end]) for end in ends]
    assert events[-1].kind == "end"
    assert list(events[-1].probabilities.values()) == pytest.approx(np.mean(windows, axis=0).tolist(), abs=1e-6)


@hypothesis_settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(0, 160000), max_size=20), seed=st.integers(0, 3))
def test_any_chunking_gives_the_same_events(room, speech, cuts, seed):
    signal = np.concatenate(
        [
            np.zeros(1000 + seed, np.float32), room(1.5, seed=seed), speech(2.5, seed), np.zeros(9000, np.float32),
            speech(1.2, seed), room(2.0, seed=seed + 1),
        ]
    )  # fmt: skip
    session = Session(Listening(), Settings(max_segment=1.5, silence=1.0))
    pieces = np.split(signal, sorted(min(cut, len(signal)) for cut in cuts))
    events = [event for piece in pieces for event in session.push(piece)] + session.finish()
    whole = run(signal, max_segment=1.5, silence=1.0)
    assert {"begin", "end", "no_speech"} <= set(kinds(whole))
    assert events == whole


@pytest.mark.parametrize("lead", [1, 100, 511, 512, 513, 50_000])
@pytest.mark.parametrize("tail", [0, 1, 20_000, 200_000])
def test_digital_zeros_around_a_clip_only_shift_its_events(speech, lead, tail):
    clip = speech(2.3)
    alone = run(clip)
    framed = run(np.concatenate([np.zeros(lead, np.float32), clip, np.zeros(tail, np.float32)]))
    assert kinds(framed) == kinds(alone)
    for event, other in zip(framed, alone, strict=True):
        assert event.start == pytest.approx(other.start + lead / RATE)
        assert event.end == pytest.approx(other.end + lead / RATE)
        assert event.probabilities == other.probabilities


@pytest.mark.parametrize(
    "samples",
    [np.zeros(0), np.zeros(1600), np.zeros(160000), np.full(1600, 0.3), np.full(40000, 1e-4)],
)
def test_silence_is_no_speech_and_never_an_emotion(samples):
    recognizer = Listening()
    events = run(samples, recognizer)
    assert [(e.kind, e.label, e.start) for e in events] == [("no_speech", "no_speech", 0.0)]
    assert events[0].probability is None
    assert not recognizer.heard


@pytest.mark.parametrize("level", [-70.0, -40.0, -20.0])
def test_noise_from_the_start_is_no_speech(room, level):
    assert kinds(run(room(20.0, level))) == ["no_speech"]


def test_a_click_is_no_speech(room):
    signal = room(4.0)
    signal[30000:30400] += np.float32(0.5)
    assert kinds(run(signal)) == ["no_speech"]


def test_speech_too_short_to_be_scored_is_uncertain_and_not_silence(speech):
    recognizer = Listening()
    events = run(speech(0.5), recognizer)
    assert [(event.kind, event.label, event.probability) for event in events] == [("end", "uncertain", None)]
    assert not recognizer.heard


def test_no_speech_is_said_once_for_each_silence(room, speech):
    events = run(np.concatenate([room(12.0), speech(1.5), room(12.0, seed=1)]))
    silences = [event for event in events if event.kind == "no_speech"]
    assert kinds(events)[0] == kinds(events)[-1] == "no_speech"
    assert len(silences) == 2
    assert silences[0].end == pytest.approx(5.0, abs=BLOCK / RATE)
    assert silences[1].start == next(event.end for event in events if event.kind == "end")


def test_a_pause_within_the_hangover_does_not_split(room, speech):
    voiced = speech(1.5)
    split = [np.concatenate([voiced, room(pause, seed=2), voiced]) for pause in (0.2, 1.5)]
    assert [kinds(run(signal)).count("end") for signal in split] == [1, 2]


def test_segments_do_not_overlap(room, speech):
    signal = np.concatenate([np.concatenate([speech(1.2, seed=i), room(0.7, seed=i)]) for i in range(6)])
    ends = [event for event in run(signal, padding=1.0, hangover=0.4) if event.kind == "end"]
    assert len(ends) >= 3
    assert all(first.end <= second.start for first, second in itertools.pairwise(ends))


def test_endless_speech_is_cut_and_nothing_is_left_out(speech):
    ends = [event for event in run(speech(10.0), max_segment=3.0) if event.kind == "end"]
    assert [event.end - event.start for event in ends[:3]] == pytest.approx([3.0] * 3)
    assert all(first.end == second.start for first, second in itertools.pairwise(ends))


def test_memory_does_not_grow_with_the_stream(speech):
    session = Session(Listening(), Settings())
    block = speech(1.0)
    held = set()
    for _ in range(60):
        session.push(block)
        held.add(sum(piece.base.nbytes for piece in session._blocks if piece.base is not None) < 8_000_000)
    assert held == {True}
    assert len(session._blocks) <= round((2.0 + 0.2 + 0.6 + 0.5) * RATE) // BLOCK + 3


def test_positions_past_32_bits(speech):
    session = Session(Listening(), Settings())
    session.gap(2**33, "test")
    events = session.push(speech(2.0)) + session.finish()
    assert events[0].start == 2**33 / RATE
    assert events[-1].end == pytest.approx(2**33 / RATE + 2.0, abs=0.001)


def test_a_gap_ends_the_segment_and_shows_in_the_times(speech):
    session = Session(Listening(), Settings())
    before = session.push(speech(2.0))
    at_gap = session.gap(RATE, "overflow")
    after = session.push(speech(2.0)) + session.finish()
    assert kinds(before) == ["begin", "update", "update"]
    assert kinds(at_gap) == ["end", "gap"]
    assert (at_gap[1].start, at_gap[1].end, at_gap[1].reason) == (2.0, 3.0, "overflow")
    assert after[0].start == 3.0
    assert all(event.start == 3.0 for event in after)


def test_nothing_heard_before_a_gap_counts_after_it(room, speech):
    in_mid_word = speech(2.5)[1600:]
    session = Session(Listening(), Settings())
    session.push(np.concatenate([speech(2.0, seed=1), room(5.0, -15.0)]))
    session.gap(100, "overflow")
    after = session.push(in_mid_word) + session.finish()
    fresh = run(in_mid_word)
    assert [(e.kind, e.probabilities) for e in after] == [(e.kind, e.probabilities) for e in fresh]


def test_a_lost_source_ends_the_segment_and_its_return_begins_afresh(speech):
    session = Session(Listening())
    session.push(speech(2.0))
    lost = session.lose("stalled", "nothing comes")
    back = session.restore(5 * RATE)
    after = session.push(speech(2.0)) + session.finish()
    assert kinds(lost) == ["end", "source_lost"]
    assert (lost[1].start, lost[1].end, lost[1].reason, lost[1].detail) == (2.0, 2.0, "stalled", "nothing comes")
    assert kinds(back) == ["source_restored"]
    assert (back[0].start, back[0].end, back[0].reason) == (2.0, 5.0, "stalled")
    assert after[0].start == 5.0


def test_no_score_comes_before_enough_was_heard_after_a_loss(speech):
    recognizer = Listening()
    session = Session(recognizer)
    session.push(speech(2.0))
    session.lose("device_gone")
    session.restore(3 * RATE)
    scored = len(recognizer.heard)
    assert session.push(speech(0.7)) == []
    assert len(recognizer.heard) == scored


def test_speech_that_was_never_heard_is_not_denied():
    session = Session(Listening())
    session.lose("absent")
    assert session.finish() == []


def test_a_backlog_takes_the_newest_score_only(speech):
    one_by_one, at_once = Listening(), Listening()
    in_time = Session(one_by_one, Settings(hop=0.1))
    every = in_time.push(speech(5.0))
    session = Session(at_once, Settings(hop=0.1))
    newest = session.push(speech(5.0), coalesce=True)
    assert kinds(newest) == ["begin"]
    assert session.windows == 1
    assert np.array_equal(at_once.heard[0], one_by_one.heard[-1])
    assert newest[0].end == every[-1].end
    assert session.coalesced == len(every) - 1
    assert kinds(session.finish()) == kinds(in_time.finish())


def test_segments_within_a_backlog_keep_their_begin_and_end(room, speech):
    signal = np.concatenate([speech(2.0), room(2.0), speech(1.5), room(2.0)])
    session = Session(Listening(), Settings(hop=0.1))
    events = session.push(signal, coalesce=True)
    whole = [event for event in run(signal, hop=0.1) if event.kind == "end"]
    assert [(e.kind, e.end) for e in events if e.kind == "end"] == [("end", e.end) for e in whole]
    assert kinds([e for e in events if e.kind != "update"]) == ["begin", "end", "begin", "end"]


def test_samples_that_arrive_in_time_coalesce_nothing(speech):
    session = Session(Listening(), Settings(hop=0.1))
    events = [e for i in range(0, 48000, 800) for e in session.push(speech(3.0)[i : i + 800], coalesce=True)]
    assert events + session.finish() == run(speech(3.0), hop=0.1)
    assert session.coalesced == 0


def test_a_segment_does_not_reach_back_over_digital_silence(room, speech):
    voiced = speech(2.0)
    recognizer = Listening()
    events = run(np.concatenate([room(1.0), np.zeros(RATE, np.float32), voiced]), recognizer)
    assert events[0].start == 2.0
    assert np.array_equal(recognizer.heard[0], voiced[: round(0.8 * RATE)])


def test_a_session_may_be_used_again(speech):
    session = Session(Listening(), Settings())
    signal = speech(2.0)
    first = session.push(signal) + session.finish()
    assert session.position == 0
    assert session.push(signal) + session.finish() == first


def test_samples_that_are_no_audio_leave_the_session_as_it_was(speech):
    signal = speech(2.0)
    session = Session(Listening(), Settings())
    events = session.push(signal[:9000])
    with pytest.raises(AudioError, match="sample 1 is nan"):
        session.push([0.1, np.nan])
    assert events + session.push(signal[9000:]) + session.finish() == run(signal)


def test_the_threshold_makes_uncertain(speech):
    assert {event.label for event in run(speech(2.0), threshold=1.0)} == {"uncertain"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hop": 0}, "hop is 0; valid: 0.05 to 60"),
        ({"hop": float("nan")}, "hop is nan"),
        ({"hop": "fast"}, "hop is 'fast'"),
        ({"hop": None}, "hop is None"),
        ({"threshold": 1.5}, "threshold is 1.5; valid: 0 to 1"),
        ({"device": 1.5}, "device is 1.5; valid: an index, a part of a name, or None"),
        ({"gate_minimum": 3}, "gate_minimum is 3; valid: -100 to 0"),
        ({"min_audio": 5, "max_segment": 2}, "min_audio is 5; valid: at most max_segment, 2"),
    ],
)
def test_a_setting_out_of_range_is_named(change, message):
    with pytest.raises(UsageError, match=message):
        Settings(**change)


def test_the_public_names_load_lazily(tmp_path):
    script = (
        "import sys, edge_runtime\n"
        "assert 'numpy' not in sys.modules\n"
        "assert all(hasattr(edge_runtime, name) for name in edge_runtime.__all__)\n"
        "assert not {'onnxruntime', 'sounddevice', 'soundfile'} & set(sys.modules)\n"
        "try: edge_runtime.Microfone\n"
        "except AttributeError as error: assert 'Microfone' in str(error)\n"
        "else: raise SystemExit(1)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=tmp_path).returncode == 0


def test_events_need_only_an_artifact_and_probabilities(speech):
    recognizer = SimpleNamespace(artifact=tiny_artifact(), probabilities=lambda _: np.array([0, 0, 0, 1.0]))
    assert {event.label for event in run(speech(2.0), recognizer)} == {"sadness"}
