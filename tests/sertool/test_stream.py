"""Streams: what a trunk gives, in whatever pieces, is what the window model gives, to the last bit of an 8-bit one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from random_networks import settle

from edge_runtime.backends import Backend, OnnxStreamBackend, load_backend
from sertool.export.onnx import to_onnx
from sertool.export.parity import ExportError
from sertool.export.quantize import quantize, with_short_windows
from sertool.export.stream import StreamModel, TimeOp, Timing, check_stream, to_file, to_stream
from sertool.networks import NETWORKS, build_network

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 0.125

STRIDE = {"vgg15": 32, "resnet9": 32, "cnn6": 16, "mobilenet15": 16}
RECEPTIVE_FIELD = {"vgg15": 212, "resnet9": 179, "cnn6": 76, "mobilenet15": 59}
CONTEXT = {"vgg15": 192, "resnet9": 160, "cnn6": 64, "mobilenet15": 48}
STATES = {"vgg15": (2, 73728), "resnet9": (5, 11264), "cnn6": (4, 24576), "mobilenet15": (1, 24576)}
"""Frames of 64 bands before the first layer, and elements before the others at full width."""

FRAMES = 480
"""Of the signal that the window model hears in one go: 15 or 30 features."""


@dataclass(frozen=True)
class Case:
    """A network in both forms.

    Attributes:
        window: its window model.
        stream: what was made of it.
        device: the stream as a device loads it.
        whole: the window model as a device loads it.
        signal: normalised frames (FRAMES, 64).
        features: what the window model computes of them on its way to the logits, (channels, n).
    """

    window: ModelProto
    stream: StreamModel
    device: OnnxStreamBackend
    whole: Backend
    signal: np.ndarray
    features: np.ndarray

    @property
    def allowed(self) -> float:
        """Largest difference of a feature: none for 8 bits."""
        return 0.0 if self.stream.states[0].dtype == "uint8" else 1e-6 * float(np.abs(self.features).max())

    def pieces(self, cuts: list[int], start: int = 0) -> np.ndarray:
        """Return the features of the signal from ``start`` on, given in pieces of ``cuts`` strides."""
        states, features, position = self.device.start(), [], start
        for cut in cuts:
            piece = self.signal[position : position + cut * self.device.stride]
            position += len(piece)
            new, states = self.device.advance(piece, states)
            features.append(new)
        return np.concatenate(features, axis=1)

    def same(self, features: np.ndarray, expected: np.ndarray) -> bool:
        return features.shape == expected.shape and float(np.abs(features - expected).max()) <= self.allowed


@cache
def settled(name: str, time_padding: str) -> ModelProto:
    """Return the window model of a narrow network whose batch normalisation has seen data."""
    torch.manual_seed(0)
    return to_onnx(settle(build_network(name, 5, time_padding, WIDTH), frames=256), 128, 64)


@cache
def model(name: str, time_padding: str, precision: str) -> ModelProto:
    if precision == "fp32":
        return settled(name, time_padding)
    calibration = np.random.default_rng(0).normal(size=(6, 256, 64)).astype(np.float32)
    return quantize(settled(name, time_padding), with_short_windows(calibration))


def features_of(window: ModelProto, signal: np.ndarray) -> np.ndarray:
    """Return what a window model takes its last mean of."""
    shown = ModelProto()
    shown.CopyFrom(window)
    last_mean = [node for node in window.graph.node if node.op_type == "ReduceMean"][-1]
    shown.graph.output.append(helper.make_tensor_value_info(last_mean.input[0], TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"logmel": signal[None, None]})[1][0])


@pytest.fixture(scope="module", params=[f"{n}-{p}" for n in sorted(NETWORKS) for p in ("fp32", "int8")])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def case(name: str, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("files")
    network, precision = name.split("-")
    window = model(network, "causal", precision)
    stream = to_stream(window)
    onnx.save(window, folder / "window.onnx")
    onnx.save(to_file(stream), folder / "stream.onnx")
    device = load_backend(folder / "stream.onnx")
    assert isinstance(device, OnnxStreamBackend)
    signal = np.random.default_rng(1).normal(size=(FRAMES, 64)).astype(np.float32)
    return Case(window, stream, device, load_backend(folder / "window.onnx"), signal, features_of(window, signal))


# --- equality ------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_pieces_give_the_features_and_logits_of_the_window_model(case: Case, data: st.DataObject) -> None:
    left, cuts = FRAMES // case.device.stride, []
    while left:
        cuts.append(data.draw(st.integers(1, left)))
        left -= cuts[-1]
    features = case.pieces(cuts)
    assert case.same(features, case.features)
    # From a reset the window grows; any beginning has the answer of the window model.
    count = data.draw(st.integers(-(-32 // case.device.stride), features.shape[1]))
    expected = case.whole.predict(case.signal[None, : count * case.device.stride])[0]
    assert np.abs(case.device.classify(features[:, :count]) - expected).max() <= (1e-6 if case.allowed else 0)


def test_a_sliding_window_is_the_window_model_given_its_context(case: Case) -> None:
    stride, context = case.device.stride, case.stream.context_frames
    features = case.pieces([1] * (FRAMES // stride))
    differs = []
    for first in range(context // stride, FRAMES // stride - 3):
        start = first * stride - context
        given = case.signal[start : (first + 4) * stride]
        assert case.same(features_of(case.window, given)[:, context // stride :], features[:, first : first + 4])
        short = features_of(case.window, given[stride:])[:, context // stride - 1 :]
        differs.append(not np.array_equal(short, features[:, first : first + 4]))
    assert any(differs), "a stride less of context must show"


def test_after_a_gap_a_stream_is_as_new(case: Case) -> None:
    stride = case.device.stride
    case.pieces([3, 1])
    after = case.pieces([2, 1, 4], start=5 * stride + 7)
    assert case.same(after, features_of(case.window, case.signal[5 * stride + 7 : 12 * stride + 7]))


def test_a_pause_is_caught_up_in_one_larger_call(case: Case) -> None:
    stride, context = case.device.stride, case.stream.context_frames // case.device.stride
    # Nothing was computed in the pause; what the next window depends on is heard in one call, from a reset.
    resumed = case.pieces([context + 1, 1, 2], start=4 * stride)
    assert case.same(resumed[:, context:], case.features[:, 4 + context : 8 + context])


def test_several_windows_and_any_choice_of_frames_come_from_one_pass(case: Case) -> None:
    features = case.pieces([2] * (FRAMES // case.device.stride // 2))
    for count in (1, 2, 5, features.shape[1]):
        newest = case.device.classify(features[:, -count:])
        pooled = features[:, -count:].mean(axis=1, keepdims=True)
        assert np.allclose(newest, case.device.classify(pooled), atol=1e-5 if case.allowed else 0.02)
    voiced = np.arange(features.shape[1]) % 3 > 0
    pooled = features[:, voiced].mean(axis=1, keepdims=True)
    assert np.allclose(case.device.classify(features[:, voiced]), case.device.classify(pooled), atol=0.02)


def test_states_are_snapshots_and_streams_do_not_meet(case: Case) -> None:
    stride = case.device.stride
    first, other = (case.signal[i * stride : (i + 2) * stride] for i in (0, 6))
    _, snapshot = case.device.advance(first, case.device.start())
    once, _ = case.device.advance(other, snapshot)
    _, elsewhere = case.device.advance(other, case.device.start())  # another stream, in between
    case.device.advance(first, elsewhere)
    again, _ = case.device.advance(other, snapshot)
    assert np.array_equal(once, again)
    assert case.same(case.pieces([2, 2]), case.features[:, :4])


def test_the_backend_takes_a_window_as_a_stream_from_its_beginning(case: Case) -> None:
    windows = np.stack([case.signal[:250], case.signal[100:350]])
    expected = case.whole.predict(windows)
    assert np.abs(case.device.predict(windows) - expected).max() <= (1e-6 if case.allowed else 0)


# --- form ----------------------------------------------------------------------------------------------------------


def test_geometry_is_that_worked_out_for_the_networks(name: str, case: Case) -> None:
    network, _ = name.split("-")
    stream = case.stream
    assert (stream.stride, stream.receptive_field) == (STRIDE[network], RECEPTIVE_FIELD[network])
    assert (stream.context_frames, stream.delay) == (CONTEXT[network], 0)
    frames, others = STATES[network]
    assert stream.states[0].shape == (1, frames, 64, 1)
    assert sum(int(np.prod(state.shape)) for state in stream.states) == frames * 64 + others * WIDTH


def test_a_reset_is_what_the_window_model_pads_with(name: str, case: Case) -> None:
    kinds = {
        (state.dtype, values.dtype.name) for state, values in zip(case.stream.states, case.device.start(), strict=True)
    }
    zeros = [state.zero for state in case.stream.states]
    if name.endswith("fp32"):
        assert kinds == {("float32", "float32")}
        assert set(zeros) == {0}
    else:
        assert kinds == {("uint8", "uint8")}
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in case.window.graph.initializer}
        assert zeros[0] == int(constants["logmel_zero_point"]) > 100
        assert set(zeros[1:]) == {0}, "after a ReLU"
    assert all((values == zero).all() for values, zero in zip(case.device.start(), zeros, strict=True))


def test_the_trunk_of_an_int8_file_runs_in_integers(name: str, case: Case, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(case.stream.trunk.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    convolutions = sum(node.op_type == "Conv" for node in case.window.graph.node)
    if name.endswith("int8"):
        assert (kinds["QLinearConv"], kinds["Conv"]) == (convolutions, 0)
        assert kinds["MaxPool"] == 0
        assert kinds["Transpose"] <= 4, "states lie as the 8-bit kernels want them"
    else:
        assert kinds["Conv"] == convolutions


def test_the_window_model_is_left_as_it_was(case: Case) -> None:
    before = case.window.SerializeToString()
    again = to_stream(case.window)
    assert case.window.SerializeToString() == before
    assert again.trunk.SerializeToString() == case.stream.trunk.SerializeToString()
    names = {tensor.name for part in (again.trunk, again.head) for tensor in part.graph.initializer}
    assert {t.name for t in case.window.graph.initializer if t.data_type == TensorProto.INT8} <= names


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_network_that_looks_ahead_is_the_same_one_delayed(precision: str) -> None:
    window = model("resnet9", "same", precision)
    stream = to_stream(window)
    assert stream.delay == 2
    signal = np.random.default_rng(1).normal(size=(FRAMES, 64)).astype(np.float32)
    expected = features_of(window, signal)
    session = onnxruntime.InferenceSession(stream.trunk.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = {state.name: np.full(state.shape, state.zero, state.dtype) for state in stream.states}
    features = session.run(None, {"logmel": signal[None, None], **inputs})[0][0]
    inside = slice(6, expected.shape[1] - 4)  # neither border pads
    allowed = 0.0 if precision == "int8" else 1e-6 * np.abs(expected).max()
    assert np.abs(features[:, 8 : features.shape[1] - 2] - expected[:, inside]).max() <= allowed


# --- any network ---------------------------------------------------------------------------------------------------


def test_a_time_op_worked_by_hand() -> None:
    # Output i of a kernel of 3 and a stride of 2 sees frames 2i - 1 to 2i + 1: the last one is the second of its pair.
    assert TimeOp(3, 2, 1).past(Timing()) == 1
    assert TimeOp(3, 2, 1).timing(Timing()) == Timing(stride=2, delay=0, field=3)
    # Padded on both sides, a kernel of 5 waits two frames; the pool after it waits another for its own pair.
    late = TimeOp(5, 1, 2).timing(Timing())
    assert late.delay == 2
    assert TimeOp(2, 2, 0).held_back(late) == 0
    odd = Timing(delay=1)
    assert (TimeOp(2, 2, 0).held_back(odd), TimeOp(2, 2, 0).timing(odd).delay) == (1, 1)
    # A strided 1 x 1 shortcut skips frames.
    assert TimeOp(1, 2, 0).past(Timing(delay=1)) == -1


layers = st.lists(
    st.tuples(
        st.sampled_from(["Conv", "MaxPool", "residual"]), st.integers(1, 5), st.integers(1, 3), st.integers(1, 2),
        st.integers(0, 4), st.integers(0, 3),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


def network_of(layers: list[tuple[str, int, int, int, int, int]]) -> ModelProto:
    """Return a window model of layers: kind, kernel, stride, dilation, frames padded before and after."""
    random = np.random.default_rng(0)
    nodes, constants, x, channels = [], [], "logmel", 1

    def constant(values: np.ndarray, name: str) -> str:
        constants.append(numpy_helper.from_array(values, name))
        return name

    def convolution(x: str, y: str, kernel: int, **attributes: list[int]) -> onnx.NodeProto:
        weights = constant(random.normal(size=(2, channels, kernel, 1)).astype(np.float32), f"{y}_weights")
        return helper.make_node("Conv", [x, weights], [y], kernel_shape=[kernel, 1], **attributes)

    for number, (kind, kernel, stride, dilation, before, after) in enumerate(layers):
        y, reach = f"layer_{number}", (kernel - 1) * (dilation if kind == "Conv" else 1)
        # No more padding than a kernel can see: beyond it, nothing but padding would come out.
        pads = [min(before, reach), 0, min(after, reach), 0]
        if kind == "MaxPool":
            nodes.append(helper.make_node("Relu", [x], [f"{y}_relu"]))
            shape = {"kernel_shape": [kernel, 1], "strides": [stride, 1], "pads": pads}
            nodes.append(helper.make_node("MaxPool", [f"{y}_relu"], [y], **shape))
        elif kind == "Conv":
            nodes.append(convolution(x, y, kernel, strides=[stride, 1], dilations=[dilation, 1], pads=pads))
        else:  # a convolution of the same length beside the input itself
            nodes.append(convolution(x, f"{y}_beside", kernel, pads=[pads[0], 0, reach - pads[0], 0]))
            nodes.append(helper.make_node("Add", [f"{y}_beside", x], [y]))
        x, channels = y, 1 if kind == "MaxPool" and channels == 1 else 2
    three, two = constant(np.array([3]), "three"), constant(np.array([2]), "two")
    nodes.append(helper.make_node("ReduceMean", [x, three], ["in_time"], keepdims=0))
    nodes.append(helper.make_node("ReduceMean", ["in_time", two], ["logits"], keepdims=0))
    graph = helper.make_graph(
        nodes,
        "any",
        [helper.make_tensor_value_info("logmel", TensorProto.FLOAT, ["batch", 1, "frames", 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@settings(max_examples=60, deadline=None)
@given(layers=layers, cuts=st.lists(st.integers(1, 5), min_size=3, max_size=6))
def test_the_inside_of_any_network_streams(layers: list[tuple[str, int, int, int, int, int]], cuts: list[int]) -> None:
    window = network_of(layers)
    stream = to_stream(window)
    settled = -(-stream.receptive_field // stream.stride) + stream.delay + 1  # features that no border reaches
    cuts = [settled + 2, *cuts, settled]
    signal = np.random.default_rng(1).normal(size=(sum(cuts) * stream.stride, 2)).astype(np.float32)
    expected = features_of(window, signal)
    session = onnxruntime.InferenceSession(stream.trunk.SerializeToString(), providers=["CPUExecutionProvider"])
    states = [np.full(state.shape, state.zero, state.dtype) for state in stream.states]
    pieces, position = [], 0
    for cut in cuts:
        piece = signal[position : position + cut * stream.stride]
        position += len(piece)
        inputs = {state.name: values for state, values in zip(stream.states, states, strict=True)}
        features, *states = session.run(None, {"logmel": piece[None, None], **inputs})
        pieces.append(features[0])
    streamed = np.concatenate(pieces, axis=1)
    assert streamed.shape[1] == sum(cuts)
    inside = slice(settled, sum(cuts) - settled)
    late = slice(settled + stream.delay, sum(cuts) - settled + stream.delay)
    np.testing.assert_allclose(streamed[:, late], expected[:, inside], rtol=1e-4, atol=1e-5)


def chain(*nodes: onnx.NodeProto, **constants: np.ndarray) -> ModelProto:
    return helper.make_model(
        helper.make_graph(
            list(nodes),
            "chain",
            [helper.make_tensor_value_info("logmel", TensorProto.FLOAT, ["batch", 1, "frames", 64])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])],
            [numpy_helper.from_array(np.array(values), name) for name, values in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


MEANS = (
    helper.make_node("ReduceMean", ["x", "three"], ["in_time"], keepdims=0),
    helper.make_node("ReduceMean", ["in_time", "two"], ["logits"], keepdims=0),
)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([helper.make_node("Softmax", ["logmel"], ["x"], axis=2), *MEANS], "its operator Softmax does to time"),
        ([helper.make_node("Slice", ["logmel", "two", "three", "two"], ["x"]), *MEANS], "a piece out of its window"),
        ([helper.make_node("GlobalMaxPool", ["logmel"], ["logits"])], "does not end in a mean over frequency"),
    ],
)  # fmt: skip
def test_what_cannot_stream_is_refused_in_one_line(nodes: list[onnx.NodeProto], message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        to_stream(chain(*nodes, two=[2], three=[3]))
    assert "\n" not in str(caught.value)
    assert "--form window" in str(caught.value)


# --- the check at export -------------------------------------------------------------------------------------------


def test_an_export_accepts_a_true_stream(name: str, case: Case) -> None:
    assert check_stream(case.whole, case.device, case.signal, name.split("-")[1], "run") <= (
        1e-6 if case.allowed else 0
    )


@pytest.mark.parametrize("wrong", ["state", "weight", "head"])
def test_an_export_refuses_a_stream_that_is_off(wrong: str, name: str, case: Case, tmp_path: Path) -> None:
    stream = to_stream(case.window)
    if wrong == "state":
        first, *others = stream.states
        stream = replace(stream, states=(replace(first, zero=first.zero + 60), *others))
    else:
        part = stream.trunk if wrong == "weight" else stream.head
        tensor = max(part.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
        values = numpy_helper.to_array(tensor).copy()
        values.flat[:: max(1, values.size // 200)] //= 2
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(to_file(stream), tmp_path / "wrong.onnx")
    with pytest.raises(ExportError, match=r"^run: as a stream .* nothing was written"):
        check_stream(case.whole, load_backend(tmp_path / "wrong.onnx"), case.signal, name.split("-")[1], "run")
