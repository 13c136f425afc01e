from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_artifact import tiny_artifact

from edge_runtime.errors import AudioError, UsageError
from edge_runtime.gate import BLOCK
from edge_runtime.session import Session, SessionGroup
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
        held.add(sum(piece.base.nbytes for piece in session._segmenter.blocks if piece.base is not None) < 8_000_000)
    assert held == {True}
    assert len(session._segmenter.blocks) <= round((2.0 + 0.2 + 0.6 + 0.5) * RATE) // BLOCK + 3


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


class Moody(Listening):
    """A recognizer that hears anger in a window that is loud somewhere, and joy in another."""

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        angry = float(np.abs(samples).max() > 0.1)
        return np.array([0.1 + 0.8 * angry, 0.9 - 0.8 * angry, 0, 0], np.float32)


FEELING = {"enter": 0.7, "exit": 0.5}


def with_and_without(signal: np.ndarray, **settings) -> tuple[list, list]:
    """The events with emotions, and what a session without them gives."""
    return run(signal, Moody(), **FEELING, **settings), run(signal, Moody(), **settings)


def moods(events: list) -> list[tuple]:
    return [(event.kind, event.label) for event in events if event.kind.startswith("emotion")]


@pytest.mark.parametrize("mode", ["window", "utterance"])
def test_emotions_come_beside_the_other_events_and_change_none(room, speech, mode):
    signal = np.concatenate([speech(3.0), room(1.0), np.float32(0.2) * speech(3.0, seed=1), room(10.0)])
    events, plain = with_and_without(signal, mode=mode)
    assert [event for event in events if not event.kind.startswith("emotion")] == plain
    assert moods(events) == [
        ("emotion_begin", "anger"), ("emotion_end", "anger"), ("emotion_begin", "joy"), ("emotion_end", "joy"),
    ]  # fmt: skip
    assert kinds(events)[-2:] == ["emotion_end", "no_speech"]


def test_an_emotion_may_outlast_a_pause_and_knows_its_times(room, speech):
    signal = np.concatenate([speech(2.0), room(1.5), speech(2.0)])
    events = run(signal, Moody(), **FEELING)
    begin, end = (event for event in events if event.kind.startswith("emotion"))
    ends = [event for event in events if event.kind == "end"]
    assert len(ends) == 2
    assert (begin.start, begin.end) == (0.0, pytest.approx(0.8))
    assert (end.start, end.end) == (0.0, ends[-1].end)


def test_silence_ends_an_emotion_when_it_is_said(room, speech):
    session = Session(Moody(), Settings(**FEELING))
    session.push(speech(2.0))
    events = session.push(room(6.0))
    assert kinds(events) == ["end", "emotion_end", "no_speech"]
    assert events[1].end == events[0].end
    assert "emotion_end" not in kinds(session.finish())


@pytest.mark.parametrize("how", ["gap", "lose", "finish", "update"])
def test_what_ends_listening_ends_the_emotion_before_it(speech, how):
    session = Session(Moody(), Settings(**FEELING))
    session.push(speech(2.0))
    ending = {
        "gap": lambda: session.gap(100, "overflow"),
        "lose": lambda: session.lose("stalled"),
        "finish": session.finish,
        "update": lambda: session.update(Settings(enter=0.8)),
    }[how]()
    after = {"gap": ["gap"], "lose": ["source_lost"], "finish": [], "update": []}[how]
    assert kinds(ending) == ["end", "emotion_end", *after]
    assert session.update(Settings()) == []


def test_the_rest_of_an_emotion_outlasts_a_gap_and_not_the_stream(speech):
    session = Session(Moody(), Settings(**FEELING, refractory=1000))
    assert moods(session.push(speech(2.0))) == [("emotion_begin", "anger")]
    session.gap(100, "overflow")
    assert moods(session.push(speech(2.0))) == []
    session.finish()
    assert moods(session.push(speech(2.0))) == [("emotion_begin", "anger")]


@pytest.fixture(scope="module")
def sounds(room, speech) -> dict[str, np.ndarray]:
    """Two seconds each of what a microphone may hear."""
    quieter = np.float32(0.2) * speech(2.0, seed=1)
    return {"angry": speech(2.0), "joyful": quieter, "room": room(2.0), "zeros": np.zeros(2 * RATE, np.float32)}


pieces = st.lists(
    st.tuples(st.sampled_from(["angry", "joyful", "room", "zeros", "gap", "loss"]), st.floats(0.1, 2)), max_size=6
)


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    pieces=pieces,
    cuts=st.lists(st.integers(1000, 20000), min_size=1, max_size=5),
    mode=st.sampled_from(["window", "utterance"]),
    min_duration=st.sampled_from([0.0, 1.2]),
    refractory=st.sampled_from([0.0, 3.0]),
)
def test_whatever_is_heard_one_emotion_at_a_time_begins_and_ends(sounds, pieces, cuts, mode, min_duration, refractory):
    settings = Settings(**FEELING, mode=mode, min_duration=min_duration, refractory=refractory, silence=1.0)

    def hear(sizes) -> list:
        session = Session(Moody(), settings)
        events = []
        for what, seconds in pieces:
            if what == "gap":
                events += session.gap(round(seconds * RATE), "overflow")
            elif what == "loss":
                events += session.lose("stalled") + session.restore(session.position + round(seconds * RATE))
            else:
                sound = sounds[what][: round(seconds * RATE)]
                while len(sound):
                    size = next(sizes)
                    events += session.push(sound[:size])
                    sound = sound[size:]
        return events + session.finish()

    events = hear(itertools.repeat(10 * RATE))
    assert hear(itertools.cycle(cuts)) == events
    active = None
    for event in events:
        if event.kind == "emotion_begin":
            assert active is None
            active = event
        elif event.kind == "emotion_end":
            assert (active.label, active.start) == (event.label, event.start)
            active = None
        elif event.kind in ("gap", "source_lost", "no_speech"):
            assert active is None
    assert active is None


def test_an_utterance_is_one_answer_the_same_as_the_last_of_the_window_mode(room, speech):
    signal = np.concatenate([speech(5.0), room(2.0), speech(1.5, seed=1), room(6.0), speech(0.5)])
    for coalesce in (False, True):
        sessions = [Session(Listening(), Settings(mode=mode)) for mode in ("window", "utterance")]
        window, utterance = (session.push(signal, coalesce) + session.finish() for session in sessions)
        assert utterance == [event for event in window if event.kind not in ("begin", "update")]
        assert kinds(utterance) == ["end", "end", "no_speech"]


@pytest.mark.parametrize("setting", ["threshold", "enter", "exit"])
def test_a_label_that_the_model_lacks_is_named(setting):
    given = {"enter": 0.9, setting: {"angr": 0.5}}
    message = f"{setting} of 'angr', which the model lacks; did you mean 'anger'? valid: anger, joy, neutral, sadness"
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        Session(Listening(), Settings(**given))
    session = Session(Listening())
    with pytest.raises(UsageError, match="did you mean 'anger'"):
        session.update(Settings(**given))
    assert session._settings == Settings()


def test_new_settings_hold_from_there_on(room, speech):
    session = Session(Listening(), Settings(hop=0.5))
    before = session.push(np.concatenate([room(2.0), speech(2.0)]))
    cut = session.update(Settings(hop=0.25, threshold=1.0))
    after = session.push(speech(2.0)) + session.finish()
    assert kinds(cut) == ["end"]
    assert cut[0].end == pytest.approx(4.0, abs=0.05)
    assert {event.label for event in before} != {"uncertain"}
    assert {event.label for event in after} == {"uncertain"}
    assert after[0].start >= cut[0].end
    assert np.allclose(np.diff([event.end for event in after[:-1]]), 0.25)


def test_the_same_settings_cut_nothing(speech):
    session = Session(Listening(), Settings(hop=0.25))
    events = session.push(speech(2.0)[:20000]) + session.update(Settings(hop=0.25))
    assert events + session.push(speech(2.0)[20000:]) + session.finish() == run(speech(2.0), hop=0.25)


def test_new_settings_know_the_room(room):
    noise = room(10.0, -30.0)
    session = Session(Listening(), Settings(gate_margin=12))
    session.push(noise)
    session.update(Settings(gate_margin=9))
    assert session.push(noise) + session.finish() == []


def test_a_quieter_margin_lets_more_through(room, speech):
    signal = np.concatenate([room(4.0, -45.0), 0.1 * speech(3.0) + room(3.0, -45.0)])
    assert [kinds(run(signal, gate_margin=margin))[-1] for margin in (3, 40)] == ["end", "no_speech"]
    session = Session(Listening(), Settings(gate_margin=40))
    session.push(signal[:32000])
    session.update(Settings(gate_margin=3))
    assert kinds(session.push(signal[32000:]) + session.finish())[-1] == "end"


@hypothesis_settings(max_examples=20, deadline=None)
@given(
    at=st.lists(st.integers(0, 160_000), min_size=1, max_size=4),
    choices=st.lists(
        st.fixed_dictionaries(
            {}, optional={
                "hop": st.floats(0.05, 3), "min_audio": st.floats(0.1, 1), "max_segment": st.floats(1, 5),
                "padding": st.floats(0, 5), "hangover": st.floats(0.05, 5), "silence": st.floats(0.5, 3),
                "mode": st.sampled_from(["window", "utterance"]),
            }
        ), min_size=4, max_size=4,
    ),
)  # fmt: skip
def test_settings_may_change_at_any_moment(sounds, at, choices):
    signal = np.concatenate([sounds[name] for name in ("angry", "room", "joyful", "zeros", "angry")])
    recognizer = Listening()
    session = Session(recognizer)
    events, position = [], 0
    for end, choice in zip([*sorted(at), len(signal)], [*choices, {}], strict=False):
        events += session.push(signal[position:end]) + session.update(Settings(**choice))
        position = max(position, end)
    events += session.finish()
    assert all(len(heard) <= 32000 and len(heard) for heard in recognizer.heard)
    ends = [event for event in events if event.kind == "end" and event.probability is not None]
    assert all(first.end <= second.start for first, second in itertools.pairwise(ends))
    running = False
    for event in events:
        assert not (event.kind == "begin" and running)
        assert not (event.kind == "update" and not running)
        running = event.kind in ("begin", "update") or (running and event.kind != "end")
    assert not running


class Named(Listening):
    def __init__(self, name: str, label: int, window: float = 2.0, labels: tuple[str, ...] | None = None) -> None:
        super().__init__(window)
        self.path = Path(name)
        self.name = self.path.name
        self._label = label
        if labels:
            self.artifact = replace(self.artifact, labels=labels)

    def probabilities(self, samples: np.ndarray, log_mel: object = None) -> np.ndarray:
        super().probabilities(samples)
        return np.eye(4, dtype=np.float32)[self._label]


def test_several_models_answer_as_each_would_alone_and_losses_are_said_once(room, speech):
    models = [Named("a.onnx", 0), Named("b.onnx", 1, window=1.0)]
    group = SessionGroup(models, Settings(**FEELING))
    alone = [Session(model, Settings(**FEELING)) for model in models]
    signal = np.concatenate([speech(2.0), room(6.0)])

    def ask(session) -> list:
        events = session.push(signal) + session.gap(100, "overflow") + session.push(signal[:20000])
        return [*events, *session.lose("stalled", "why"), *session.restore(session.position + 50), *session.finish()]

    together, *apart = (ask(session) for session in (group, *alone))
    for model, own in zip(models, apart, strict=True):
        assert [replace(e, model=None) for e in together if e.model == model.path.name] == [e for e in own if e.label]
    assert [e for e in together if e.model is None] == [e for e in apart[0] if not e.label]
    at = kinds(together).index("source_lost")
    assert kinds(together)[at - 4 : at] == ["end", "emotion_end"] * 2
    assert (group.position, group.windows) == (0, sum(session.windows for session in alone))


def test_what_is_set_by_label_is_for_the_models_that_have_it(speech):
    other = ("calm", "tense", "x", "y")
    group = SessionGroup(
        [Named("a.onnx", 0), Named("b.onnx", 0, labels=other)], Settings(enter={"calm": 0.5}, exit={"calm": 0.4})
    )
    events = group.push(speech(2.0)) + group.update(Settings(threshold={"tense": 0.9, "joy": 0.9})) + group.finish()
    assert {event.model for event in events if event.kind == "emotion_begin"} == {"b.onnx"}
    for ask in (lambda settings: SessionGroup([Named("a.onnx", 0)], settings), group.update):
        with pytest.raises(UsageError, match="of 'tens', which the model lacks"):
            ask(Settings(enter={"tens": 0.5}))


def test_models_that_cannot_listen_together():
    with pytest.raises(UsageError, match=r"2 models are named 'a\.onnx'"):
        SessionGroup([Named("x/a.onnx", 0), Named("y/a.onnx", 0)])
    with pytest.raises(UsageError, match="no model"):
        SessionGroup([])
    slow = Named("b.onnx", 0)
    slow.artifact = replace(slow.artifact, front_end=replace(slow.artifact.front_end, sample_rate=8000, max_hz=4000))
    with pytest.raises(UsageError, match="8000 and 16000 Hz"):
        SessionGroup([Named("a.onnx", 0), slow])
