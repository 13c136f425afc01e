from __future__ import annotations

import importlib.metadata
import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edge_runtime.errors import ArtifactError
from edge_runtime.gate import BLOCK, Gate
from edge_runtime.session import Session, SessionGroup
from edge_runtime.settings import Settings
from edge_runtime.vad import CONTEXT, HOLD_BLOCKS, LATENCY_BLOCKS, SileroVad

RATE = 16000


def _silero() -> Path | None:
    """Silero's file: named by ``SILERO_VAD``, or of an installed package, which need not be importable."""
    if given := os.environ.get("SILERO_VAD"):
        return Path(given)
    try:
        files = importlib.metadata.files("silero-vad") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in files if file.name == "silero_vad.onnx"), None)


SILERO = _silero()
needs_silero = pytest.mark.skipif(SILERO is None, reason="needs silero-vad or SILERO_VAD, its model file")


@pytest.fixture
def vad() -> SileroVad:
    return SileroVad(SILERO, threshold=0.5)


def knocks(seconds: int) -> np.ndarray:
    """A knock on wood each second: loud, and no voice."""
    rng = np.random.default_rng(1)
    signal = rng.normal(0, 3e-4, seconds * RATE)
    for second in range(seconds):
        at = second * RATE + 5000
        signal[at : at + 11000] += rng.normal(0, 0.1, 11000) * np.exp(-np.arange(11000) / 2400)
    return signal.astype(np.float32)


def blocks_of(signal: np.ndarray) -> list[np.ndarray]:
    return [signal[i : i + BLOCK] for i in range(0, len(signal) - BLOCK + 1, BLOCK)]


@needs_silero
def test_probabilities_are_those_of_the_model_as_its_authors_run_it(vad, speech):
    session = onnxruntime.InferenceSession(SILERO, providers=["CPUExecutionProvider"])
    signal = speech(3.0)
    state, expected = np.zeros((2, 1, 128), np.float32), []
    padded = np.concatenate([np.zeros(64, np.float32), signal])
    for start in range(0, len(signal) - 511, 512):
        window = padded[None, start : start + 576]
        out, state = session.run(None, {"input": window, "state": state, "sr": np.array(16000, np.int64)})
        expected.append(out.item())
    assert [vad.probability(block) for block in blocks_of(signal)] == pytest.approx(expected, abs=1e-6)
    assert np.ptp(expected) > 0.01


@needs_silero
def test_a_reset_forgets_everything(vad, speech):
    block = speech(0.1)[:BLOCK]
    first = vad.probability(block)
    assert vad.probability(block) != first
    vad.reset()
    assert vad.probability(block) == first


@needs_silero
def test_it_hears_what_is_loud_and_the_gaps_in_it_and_sleeps_otherwise(vad, room, monkeypatch):
    heard = []
    monkeypatch.setattr(vad, "probability", lambda block: heard.append(block) or 0.9)
    blocks = blocks_of(room(4.0))
    loud = [5, 6, 6 + HOLD_BLOCKS - 1, 6 + 3 * HOLD_BLOCKS]
    judged = [vad.is_speech(block, loud=number in loud) for number, block in enumerate(blocks)]
    assert [number for number, speech in enumerate(judged) if speech] == loud
    awake = [*range(5, 6 + 2 * HOLD_BLOCKS - 1), *range(6 + 3 * HOLD_BLOCKS, 6 + 4 * HOLD_BLOCKS)]
    assert [next(i for i, b in enumerate(blocks) if b is block) for block in heard] == awake


@needs_silero
def test_after_sleep_it_knows_the_samples_before_and_no_voice(vad, speech, room):
    before = blocks_of(room(2.0))
    for block in blocks_of(speech(2.0)):
        vad.is_speech(block, loud=True)
    for block in before:
        vad.is_speech(block, loud=False)
    woken = [vad.probability(block) for block in blocks_of(speech(0.5))]
    fresh = SileroVad(SILERO, 0.5)
    fresh._context = before[-1][-CONTEXT:]
    assert woken == [fresh.probability(block) for block in blocks_of(speech(0.5))]


@needs_silero
def test_knocks_pass_the_gate_and_not_the_cascade(recognizer):
    signal = knocks(12)
    gate = Gate(9.0, -60.0)
    assert sum(gate.is_speech(block) for block in blocks_of(signal)) > 50
    alone, cascade = (Session(recognizer, settings) for settings in (Settings(), Settings(vad=SILERO)))
    assert "begin" in [event.kind for event in alone.push(signal) + alone.finish()]
    assert {event.kind for event in cascade.push(signal) + cascade.finish()} == {"no_speech"}


@needs_silero
@pytest.mark.parametrize("lead", [1, 511, 512, 50_000])
def test_zeros_before_a_clip_only_shift_its_events(recognizer, speech, lead):
    clip = speech(2.3)
    settings = Settings(vad=SILERO, vad_threshold=0.01)
    alone, shifted = Session(recognizer, settings), Session(recognizer, settings)
    expected = alone.push(clip) + alone.finish()
    first = shifted.push(np.concatenate([clip, np.zeros(20_000 + lead, np.float32)]))
    again = shifted.push(clip) + shifted.finish()
    assert expected[0].kind == "begin"
    assert [e.probabilities for e in first] == [e.probabilities for e in again] == [e.probabilities for e in expected]


@needs_silero
def test_a_voice_that_is_known_late_loses_nothing_of_its_beginning(recognizer, room, speech, monkeypatch):
    signal = np.concatenate([room(2.0), speech(2.0), room(2.0)])
    alone, cascade = (Session(recognizer, settings) for settings in (Settings(), Settings(vad=SILERO)))
    heard = itertools.count()
    monkeypatch.setattr(
        cascade._segmenter.vad, "probability", lambda block: 0.9 if next(heard) >= LATENCY_BLOCKS else 0.1
    )
    starts = [session.push(signal)[0].start for session in (alone, cascade)]
    assert starts[0] == starts[1] == pytest.approx(1.8, abs=0.1)


@needs_silero
def test_several_models_hear_one(recognizer, stream_recognizer, room, speech, monkeypatch):
    signal = np.concatenate([knocks(3), speech(2.5), room(1.5), speech(0.7, 1)])
    settings = Settings(vad=SILERO, vad_threshold=0.01)
    judged, probability = [], SileroVad.probability
    monkeypatch.setattr(SileroVad, "probability", lambda vad, block: judged.append(vad) or probability(vad, block))

    def listen(session) -> tuple[list, int]:
        judged.clear()
        return session.push(signal) + session.finish(), len(judged)

    together, calls = listen(SessionGroup([recognizer, stream_recognizer], settings))
    for model in (recognizer, stream_recognizer):
        alone, own_calls = listen(Session(model, settings))
        assert [replace(event, model=None) for event in together if event.model == model.name] == alone
        assert "begin" in [event.kind for event in alone]
        assert calls == own_calls > 50


@needs_silero
@pytest.mark.corpora
@pytest.mark.skipif("SERTOOL_DATA" not in os.environ, reason="SERTOOL_DATA is not set")
def test_people_are_heard(request, recognizer):
    import soundfile

    files = sorted(Path(os.environ["SERTOOL_DATA"], "corpora", "emodb").rglob("*.flac"))[::60]
    assert files
    for file in files:
        samples, _ = soundfile.read(file, dtype="float32")
        gate, cascade = (Session(recognizer, settings) for settings in (Settings(), Settings(vad=SILERO)))
        ends = [[e for e in s.push(samples) + s.finish() if e.kind == "end"] for s in (gate, cascade)]
        spoken = [sum(end.end - end.start for end in each) for each in ends]
        assert spoken[1] > 0.8 * spoken[0], file


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.onnx", "no such model file"), ("tiny.onnx", "not Silero VAD; take silero_vad.onnx"), ("cut.onnx", "ONNX")],
)
def test_another_file_is_refused_with_one_line(model, tmp_path, name, message):
    shutil.copy(model, tmp_path / "tiny.onnx")
    (tmp_path / "cut.onnx").write_bytes(b"\x08\x08cut")
    with pytest.raises(ArtifactError, match=message) as raised:
        SileroVad(tmp_path / name, 0.5)
    assert "\n" not in str(raised.value)
