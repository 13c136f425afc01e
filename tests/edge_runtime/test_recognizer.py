from __future__ import annotations

import numpy as np
import onnx
import pytest
import scipy.special
from onnx import helper
from tiny_artifact import tiny_artifact, tiny_model

from edge_runtime.errors import ArtifactError, AudioError
from edge_runtime.frontend import log_mel
from edge_runtime.model_file import seal
from edge_runtime.recognizer import Recognizer, softmax


def save(model: onnx.ModelProto, path):
    path.write_bytes(seal(model.SerializeToString()))
    return path


def test_probabilities_equal_the_formula(model, recognizer, speech):
    clip = speech(1.1)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer}
    frames = (log_mel(np.resize(clip, 32000)) + 40) / 20
    expected = scipy.special.softmax(frames.mean(axis=0) @ tensors["weights"] + tensors["bias"])
    assert np.allclose(recognizer.probabilities(clip), expected, atol=1e-5)


def test_what_follows_the_window_does_not_count(recognizer, speech):
    clip = speech(4.0)
    assert np.array_equal(recognizer.probabilities(clip), recognizer.probabilities(clip[:32000]))


def test_it_keeps_no_state(recognizer, speech):
    first = recognizer.probabilities(speech(1.0))
    recognizer.probabilities(speech(3.0, seed=5))
    assert np.array_equal(recognizer.probabilities(speech(1.0)), first)


def test_the_temperature_divides_the_logits(tmp_path, recognizer, speech):
    warm = Recognizer(save(tiny_model(temperature=2.5), tmp_path / "warm.onnx"))
    clip = speech(1.0)
    assert np.allclose(warm.probabilities(clip), scipy.special.softmax(recognizer.logits(clip) / 2.5), atol=1e-6)


def test_softmax_survives_large_logits():
    assert softmax(np.array([1000.0, 0.0, -1000.0], np.float32)).tolist() == [1, 0, 0]


@pytest.mark.parametrize("clip", [[], [np.nan] * 600, np.zeros((2, 600))])
def test_a_clip_that_is_none(recognizer, clip):
    with pytest.raises(AudioError):
        recognizer.probabilities(clip)


def test_a_foreign_onnx_is_refused(tmp_path):
    model = tiny_model()
    del model.metadata_props[:]
    with pytest.raises(ArtifactError, match=r"foreign\.onnx: carries no 'ser_artifact' description"):
        Recognizer(save(model, tmp_path / "foreign.onnx"))


def test_a_newer_schema_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="schema 3 is newer"):
        Recognizer(save(tiny_model(schema=3), tmp_path / "new.onnx"))


def test_a_garbled_description_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="damaged"):
        Recognizer(save(tiny_model(description="{"), tmp_path / "garbled.onnx"))


def test_weights_that_changed_after_export_are_refused(tmp_path):
    model = tiny_model()
    bias = next(t for t in model.graph.initializer if t.name == "bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.1, "bias"))
    with pytest.raises(ArtifactError, match=r"self-test's logits differ by 0\.1"):
        Recognizer(save(model, tmp_path / "changed.onnx"))


def test_a_description_of_another_front_end_is_refused(tmp_path):
    artifact = tiny_artifact()
    golden = artifact.golden.__class__((-50.0,) * 64, artifact.golden.logits)
    with pytest.raises(ArtifactError, match="log-Mel spectrogram differs"):
        Recognizer(save(tiny_model(golden=golden), tmp_path / "other.onnx"))


def test_a_network_with_another_number_of_classes_is_refused(tmp_path):
    model = tiny_model()
    extra = helper.make_node("Concat", ["logits", "logits"], ["twice"], axis=1)
    model.graph.node.append(extra)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("twice", 1, ["N", 8]))
    with pytest.raises(ArtifactError, match=r"logits of shape \(8,\) for 4 labels"):
        Recognizer(save(model, tmp_path / "eight.onnx"))
