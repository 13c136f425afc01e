"""Streams on the device: features once, answers from any of them, and sessions whose events a formula foretells."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_stream import STRIDE, tiny_features, tiny_logits, tiny_stream_artifact, tiny_stream_model

from edge_runtime.backends import STREAM_KEY, OnnxStreamBackend, load_backend
from edge_runtime.errors import ArtifactError, AudioError, UsageError
from edge_runtime.frontend import RunningNormalizer, log_mel
from edge_runtime.model_file import seal
from edge_runtime.recognizer import Recognizer, softmax
from edge_runtime.scoring import StreamScoring
from edge_runtime.session import Session
from edge_runtime.settings import Settings

RATE = 16000
STRIDE_SAMPLES = STRIDE * 256
FIRST_FEATURE = 512 + (STRIDE - 1) * 256
WINDOW_FEATURES = 124 // STRIDE
ARTIFACT = tiny_stream_artifact()


def features_by_hand(samples: np.ndarray) -> np.ndarray:
    """Return all complete features of a stretch of audio that begins from a reset."""
    return tiny_features(ARTIFACT.normalization.apply(log_mel(samples)))


def answer_by_hand(samples: np.ndarray) -> np.ndarray:
    """Return the probabilities of such a stretch: those of its last window of features."""
    return softmax(tiny_logits(features_by_hand(samples)[:, -WINDOW_FEATURES:]))


def save(model, path: Path) -> Path:
    path.write_bytes(seal(model.SerializeToString()))
    return path


# --- the backend ---------------------------------------------------------------------------------------------------


def test_a_stream_equals_the_formula(stream_model):
    backend = load_backend(stream_model)
    assert isinstance(backend, OnnxStreamBackend)
    assert backend.stride == STRIDE
    frames = np.random.default_rng(0).normal(size=(10 * STRIDE, 64)).astype(np.float32)
    first, states = backend.advance(frames[: 3 * STRIDE], backend.start())
    rest, _ = backend.advance(frames[3 * STRIDE :], states)
    features = np.concatenate([first, rest], axis=1)
    assert np.allclose(features, tiny_features(frames), atol=1e-5)
    assert np.allclose(backend.classify(features), tiny_logits(features), atol=1e-5)
    assert np.allclose(backend.predict(frames[None, :40]), tiny_logits(tiny_features(frames[:32])), atol=1e-5)


@pytest.mark.parametrize("frames", [0, 1, STRIDE - 1, STRIDE + 1])
def test_frames_that_fill_no_stride_are_refused(stream_model, frames):
    backend = load_backend(stream_model)
    with pytest.raises(UsageError, match=f"advances by {STRIDE} frames or a multiple, not by {frames}"):
        backend.advance(np.zeros((frames, 64), np.float32), backend.start())


@pytest.mark.parametrize(
    "form",
    [{"stride": None}, {"stride": "x"}, {"reset": []}, {"reset": [1, 2]}, {"reset": ["a"]}, {"head": "?"}, {"head": 5}],
)
def test_a_damaged_form_is_refused_in_one_line(tmp_path, form):
    with pytest.raises(ArtifactError, match=f"wrong.onnx: its '{STREAM_KEY}' description is damaged") as caught:
        load_backend(save(tiny_stream_model(form=form), tmp_path / "wrong.onnx"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("head", ["", "aGVsbG8="])
def test_a_head_that_is_no_model_is_refused(tmp_path, head):
    with pytest.raises(ArtifactError, match=r"wrong\.onnx: not a whole ONNX model"):
        load_backend(save(tiny_stream_model(form={"head": head}), tmp_path / "wrong.onnx"))


# --- the recogniser ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.3, 0.7, 1.9])
def test_a_clip_is_heard_once_from_its_beginning(stream_recognizer, speech, seconds):
    clip = speech(seconds)
    assert np.allclose(stream_recognizer.probabilities(clip), answer_by_hand(clip), atol=1e-5)


def test_a_longer_clip_is_heard_for_a_window(stream_recognizer, speech):
    clip = speech(4.0)
    assert np.allclose(stream_recognizer.probabilities(clip), answer_by_hand(clip[:32000]), atol=1e-5)
    assert np.array_equal(stream_recognizer.logits(clip), stream_recognizer.logits(clip[:32000]))


def test_a_clip_shorter_than_a_stride_is_repeated_to_one(stream_recognizer, speech):
    clip = speech(0.1)
    assert np.allclose(stream_recognizer.probabilities(clip), answer_by_hand(np.resize(clip, FIRST_FEATURE)), atol=1e-5)


def test_a_window_model_keeps_no_features(recognizer):
    with pytest.raises(UsageError, match=r"tiny\.onnx: takes whole windows only; .* --form stream"):
        recognizer.stream()


@pytest.mark.parametrize("keep", [0, -1])
def test_a_stream_that_keeps_nothing_is_refused(stream_recognizer, keep):
    with pytest.raises(UsageError, match=f"keep is {keep}; valid: at least 1"):
        stream_recognizer.stream(keep)


@pytest.mark.parametrize("change", [{"form": "window"}, {"stride": 8}, {"form": "window", "stride": 0}])
def test_a_description_of_another_form_is_refused(tmp_path, change):
    path = save(tiny_stream_model(replace(ARTIFACT, **change)), tmp_path / "wrong.onnx")
    with pytest.raises(ArtifactError, match=r"wrong\.onnx: its description is that of another form"):
        Recognizer(path)


@hypothesis_settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 70000), max_size=12), keep=st.integers(1, 30))
def test_any_pieces_give_the_same_features(stream_recognizer, speech, cuts, keep):
    signal = speech(4.3)
    stream = stream_recognizer.stream(keep)
    counts = [stream.push(piece) for piece in np.split(signal, sorted(min(cut, len(signal)) for cut in cuts))]
    whole = stream_recognizer.stream(keep)
    whole.push(signal)
    assert sum(counts) == stream.count == whole.count == 16
    assert np.array_equal(stream.features, whole.features)
    assert np.allclose(stream.features, features_by_hand(signal)[:, -keep:], atol=1e-5)


def test_several_windows_and_loud_frames_alone_come_from_one_stream(stream_recognizer, speech):
    signal = speech(4.0)
    stream = stream_recognizer.stream(keep=15)
    stream.push(signal)
    features = features_by_hand(signal)
    assert stream.features.shape == (6, 15)
    assert np.allclose(stream.logits(), tiny_logits(features), atol=1e-5)
    assert np.allclose(stream.probabilities(stream.features[:, -3:]), softmax(tiny_logits(features[:, -3:])), atol=1e-5)
    loud = np.arange(15) % 2 == 0
    assert np.allclose(stream.logits(stream.features[:, loud]), tiny_logits(features[:, loud]), atol=1e-5)


def test_streams_do_not_meet_and_a_reset_is_a_new_one(stream_recognizer, speech):
    one, other = stream_recognizer.stream(), stream_recognizer.stream()
    first, second = speech(2.0), speech(2.0, seed=4)
    for i in range(0, 32000, 1000):
        one.push(first[i : i + 1000])
        other.push(second[i : i + 1000])
    assert np.allclose(one.features, features_by_hand(first), atol=1e-5)
    assert np.allclose(other.features, features_by_hand(second), atol=1e-5)
    one.reset()
    one.push(second)
    assert np.array_equal(one.features, other.features)


def test_a_stream_that_heard_too_little_says_so(stream_recognizer, speech):
    stream = stream_recognizer.stream()
    assert stream.push(speech(0.2)) == stream.count == 0
    with pytest.raises(UsageError, match=r"no feature is complete before 0\.27 s"):
        stream.logits()


def test_samples_that_are_no_audio_leave_a_stream_as_it_was(stream_recognizer, speech):
    stream = stream_recognizer.stream()
    stream.push(speech(2.0)[:9000])
    with pytest.raises(AudioError, match="sample 1 is nan"):
        stream.push([0.1, np.nan])
    stream.push(speech(2.0)[9000:])
    assert np.allclose(stream.features, features_by_hand(speech(2.0)), atol=1e-5)


def test_an_hour_at_once_is_heard_window_by_window(stream_recognizer, monkeypatch):
    backend = stream_recognizer._backend
    lengths, advance = [], backend.advance
    monkeypatch.setattr(
        backend, "advance", lambda frames, states: (lengths.append(len(frames)), advance(frames, states))[1]
    )
    stream_recognizer.stream().push(np.zeros(60 * RATE, np.float32))
    assert sum(lengths) == 3749 // STRIDE * STRIDE
    assert max(lengths) <= 124


# --- the session ---------------------------------------------------------------------------------------------------


def run(recognizer, samples: np.ndarray, **settings) -> list:
    session = Session(recognizer, Settings(**settings))
    return session.push(samples) + session.finish()


def positions(events: list) -> list[tuple[int, int]]:
    return [(round(event.start * RATE), round(event.end * RATE)) for event in events]


def test_every_score_is_the_answer_for_its_last_window_of_features(stream_recognizer, speech):
    signal = speech(6.0)
    *scores, end = run(stream_recognizer, signal)
    answers = []
    for event, (first, last) in zip(scores, positions(scores), strict=True):
        assert (last - first - FIRST_FEATURE) % STRIDE_SAMPLES == 0, "a feature is complete here"
        answers.append(answer_by_hand(signal[first:last]))
        full = [
            a for a, (s, e) in zip(answers, positions(scores), strict=False) if e - s >= 124 // STRIDE * STRIDE_SAMPLES
        ]
        expected = np.mean(full, axis=0) if full else answers[-1]
        assert list(event.probabilities.values()) == pytest.approx(expected.tolist(), abs=2e-5)
    assert len(scores) >= 8
    # The end is scored once more, on the features that are complete by then.
    first, last = positions([end])[0]
    heard = FIRST_FEATURE + (last - first - FIRST_FEATURE) // STRIDE_SAMPLES * STRIDE_SAMPLES
    full.append(answer_by_hand(signal[first : first + heard]))
    assert heard > positions(scores)[-1][1] - first
    assert list(end.probabilities.values()) == pytest.approx(np.mean(full, axis=0).tolist(), abs=2e-5)


def test_a_short_segment_ends_with_the_answer_for_it_as_a_whole(stream_recognizer, speech):
    clip = speech(1.7)
    end = run(stream_recognizer, clip)[-1]
    first, last = positions([end])[0]
    assert list(end.probabilities.values()) == pytest.approx(answer_by_hand(clip[first:last]).tolist(), abs=2e-5)
    assert list(end.probabilities.values()) == pytest.approx(stream_recognizer.probabilities(clip).tolist(), abs=2e-5)


@pytest.mark.parametrize(("hop", "strides"), [(0.05, 1), (0.25, 1), (0.5, 2), (0.6, 2), (1.0, 4)])
def test_the_hop_is_the_nearest_multiple_of_the_stride(stream_recognizer, speech, hop, strides):
    ends = [end for _, end in positions(run(stream_recognizer, speech(5.0), hop=hop)[:-1])]
    assert set(np.diff(ends)) == {strides * STRIDE_SAMPLES}


@hypothesis_settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 160000), max_size=20), seed=st.integers(0, 3))
def test_any_chunking_gives_the_same_events(stream_recognizer, room, speech, cuts, seed):
    signal = np.concatenate(
        [
            np.zeros(1000 + seed, np.float32), room(1.5, seed=seed), speech(2.5, seed), np.zeros(9000, np.float32),
            speech(1.2, seed), room(2.0, seed=seed + 1),
        ]
    )  # fmt: skip
    settings = Settings(max_segment=1.5, silence=1.0, hop=0.25)
    session = Session(stream_recognizer, settings)
    pieces = np.split(signal, sorted(min(cut, len(signal)) for cut in cuts))
    events = [event for piece in pieces for event in session.push(piece)] + session.finish()
    whole = Session(stream_recognizer, settings)
    assert events == whole.push(signal) + whole.finish()
    assert {"begin", "end", "no_speech"} <= {event.kind for event in events}


@pytest.mark.parametrize("lead", [1, 511, 513, 50_000])
def test_digital_zeros_before_a_clip_only_shift_its_events(stream_recognizer, speech, lead):
    clip = speech(2.3)
    alone = run(stream_recognizer, clip)
    framed = run(stream_recognizer, np.concatenate([np.zeros(lead, np.float32), clip, np.zeros(20000, np.float32)]))
    assert [event.probabilities for event in framed] == [event.probabilities for event in alone]
    assert [event.start for event in framed] == pytest.approx([event.start + lead / RATE for event in alone])


def test_a_segment_after_a_gap_or_another_begins_from_a_reset(stream_recognizer, room, speech):
    clip = speech(2.3)
    fresh = [event.probabilities for event in run(stream_recognizer, clip)]
    session = Session(stream_recognizer)
    session.push(speech(3.0, seed=5))
    session.gap(5000, "overflow")
    after = session.push(clip) + session.finish()
    assert [event.probabilities for event in after] == fresh
    later = run(stream_recognizer, np.concatenate([speech(3.0, seed=5), np.zeros(RATE, np.float32), clip]))
    assert [event.probabilities for event in later[-len(fresh) :]] == fresh


def test_endless_speech_is_cut_into_segments_that_begin_from_a_reset(stream_recognizer, speech):
    signal = speech(10.0)
    events = run(stream_recognizer, signal, max_segment=3.0)
    ends = [event for event in events if event.kind == "end"]
    assert [event.end - event.start for event in ends[:3]] == pytest.approx([3.0] * 3)
    assert all(first.end == second.start for first, second in itertools.pairwise(ends))
    for event in events:
        if event.kind == "begin":
            first, last = positions([event])[0]
            expected = answer_by_hand(signal[first:last])
            assert list(event.probabilities.values()) == pytest.approx(expected.tolist(), abs=2e-5)


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory) -> Recognizer:
    """The stream with statistics that run on."""
    path = tmp_path_factory.mktemp("adaptive") / "adaptive.onnx"
    return Recognizer(save(tiny_stream_model(tiny_stream_artifact(prior_frames=100)), path))


def test_running_statistics_go_on_from_segment_to_segment_and_end_with_the_stream(adaptive, speech):
    clips = [speech(2.3, seed=seed) for seed in (5, 6)]
    session = Session(adaptive)
    signal = np.concatenate([clips[0], np.zeros(2 * RATE, np.float32), clips[1]])
    events = session.push(signal) + session.finish()
    normalizer = RunningNormalizer(adaptive.artifact.normalization)
    ends = [event for event in events if event.kind == "end"]
    for event, (first, last) in zip(ends, positions(ends), strict=True):
        heard = FIRST_FEATURE + (last - first - FIRST_FEATURE) // STRIDE_SAMPLES * STRIDE_SAMPLES
        features = tiny_features(normalizer.push(log_mel(signal[first : first + heard])))
        expected = softmax(tiny_logits(features[:, -WINDOW_FEATURES:]))
        assert list(event.probabilities.values()) == pytest.approx(expected.tolist(), abs=2e-5)
    assert len(ends) == 2
    again = session.push(clips[0]) + session.finish()
    assert [event.probabilities for event in again] == [event.probabilities for event in run(adaptive, clips[0])]


@hypothesis_settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 80000), max_size=8))
def test_any_chunking_gives_the_same_events_with_running_statistics(adaptive, speech, cuts):
    signal = np.concatenate([speech(2.1), np.zeros(RATE, np.float32), speech(1.9, seed=2)])
    session = Session(adaptive)
    pieces = np.split(signal, sorted(min(cut, len(signal)) for cut in cuts))
    assert [event for piece in pieces for event in session.push(piece)] + session.finish() == run(adaptive, signal)


def test_a_clip_alone_is_normalised_from_the_prior(adaptive, speech):
    clip = speech(1.8)
    assert adaptive.probabilities(clip) == pytest.approx(
        softmax(tiny_logits(tiny_features(adaptive.artifact.normalization.apply(log_mel(clip))))), abs=2e-5
    )
    assert np.array_equal(adaptive.probabilities(clip), adaptive.probabilities(clip)), "it keeps no state"


@pytest.mark.parametrize("change", [{"prior_frames": -1}, {"prior_frames": 1.5}, {"memory_frames": 10**9}])
def test_a_prior_or_memory_that_is_no_number_of_frames_is_refused(tmp_path, change):
    artifact = replace(ARTIFACT, normalization=replace(ARTIFACT.normalization, **change))
    with pytest.raises(ArtifactError, match=r"normalization\.prior_frames cannot be right"):
        Recognizer(save(tiny_stream_model(artifact), tmp_path / "odd.onnx"))


class Counting:
    """Passes on to a stream and counts its calls and frames."""

    def __init__(self, recognizer: Recognizer) -> None:
        self.artifact, self._recognizer = recognizer.artifact, recognizer
        self.frames: list[int] = []

    def stream(self, **options):
        stream = self._recognizer.stream(**options)
        push = stream.push_frames

        def counted(frames):
            done = push(frames)
            self.frames.append(done)
            return done

        stream.push_frames = counted
        return stream


def test_every_frame_is_computed_once_and_none_in_silence(stream_recognizer, room, speech):
    counting = Counting(stream_recognizer)
    silence = room(20.0)
    run(counting, silence)
    assert counting.frames == []
    signal = np.concatenate([room(3.0), speech(5.0), room(3.0, seed=1)])
    events = run(counting, signal, hop=0.25)
    first, last = positions([event for event in events if event.kind == "end"])[0]
    assert sum(counting.frames) == (last - first - 256) // STRIDE_SAMPLES
    # From the first score on, a stride at a time.
    assert set(counting.frames[1:]) == {1}


def test_a_backlog_is_caught_up_in_one_larger_call(stream_recognizer, speech):
    counting = Counting(stream_recognizer)
    session = Session(counting, Settings(hop=0.25))
    newest = session.push(speech(1.9), coalesce=True)
    assert [event.kind for event in newest] == ["begin"]
    assert len(counting.frames) == 1
    in_time = Session(stream_recognizer, Settings(hop=0.25))
    every = in_time.push(speech(1.9))
    assert newest[0].end == every[-1].end
    assert newest[0].probabilities == every[-1].probabilities
    assert session.coalesced == len(every) - 1
    assert session.finish()[-1] == in_time.finish()[-1]


@pytest.mark.parametrize("hop", [0.25, 1.0, 1.5])
@pytest.mark.parametrize("seconds", [4.0, 6.3, 8.2])
def test_a_backlog_longer_than_a_window_hears_no_more_than_its_score(stream_recognizer, speech, hop, seconds):
    signal = speech(seconds)
    newest = Session(stream_recognizer, Settings(hop=hop)).push(signal, coalesce=True)
    assert [event.kind for event in newest] == ["begin"]
    first, last = positions(newest)[0]
    assert last > (seconds - hop - 0.4) * RATE
    assert list(newest[0].probabilities.values()) == pytest.approx(
        answer_by_hand(signal[first:last]).tolist(), abs=2e-5
    )


def test_a_long_wait_for_the_first_score_loses_no_audio(stream_recognizer, speech):
    signal = speech(9.0)
    counting = Counting(stream_recognizer)
    events = run(counting, signal, min_audio=7.0, hop=0.25)
    first, last = positions(events[:1])[0]
    assert last - first >= 7 * RATE
    assert list(events[0].probabilities.values()) == pytest.approx(
        answer_by_hand(signal[first:last]).tolist(), abs=2e-5
    )
    assert max(counting.frames) <= WINDOW_FEATURES + 5, "no more waits than a window and a hangover"


def test_what_holds_no_feature_is_too_short_to_be_scored(stream_recognizer):
    scoring = StreamScoring(stream_recognizer, hop=8000, min_audio=1600)
    assert scoring.shortest == scoring.first == FIRST_FEATURE
    scoring = StreamScoring(stream_recognizer, hop=8000, min_audio=FIRST_FEATURE + 1)
    assert (scoring.shortest, scoring.first) == (FIRST_FEATURE + 1, FIRST_FEATURE + STRIDE_SAMPLES)
    assert [scoring.heard(n) for n in (0, FIRST_FEATURE - 1, FIRST_FEATURE, 2 * STRIDE_SAMPLES + 256)] == [
        0, 0, FIRST_FEATURE, FIRST_FEATURE + STRIDE_SAMPLES,
    ]  # fmt: skip


# --- the commands --------------------------------------------------------------------------------------------------


def ser_edge(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "edge_runtime", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_commands_take_either_form_by_themselves(stream_model, stream_recognizer, tmp_path, speech, write_wav):
    clip = write_wav(tmp_path / "clip.wav", speech(3.0))
    assert "stream: every 0.256 s is computed once, with the 0.51 s" in ser_edge("info", stream_model).stdout
    assert json.loads(ser_edge("info", stream_model, "--json").stdout)["stride"] == STRIDE
    done = ser_edge("file", stream_model, clip, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    expected = stream_recognizer.probabilities(speech(3.0))
    assert list(found["probabilities"].values()) == pytest.approx(expected.tolist(), abs=2e-3)
    heard = ser_edge("listen", stream_model, clip, "--fast", "--json")
    assert [json.loads(line)["end"] for line in heard.stdout.splitlines()] == [e["end"] for e in found["events"]]
