"""TFLite: the file computes what torch computes in float and what the ONNX file computes in 8 bits, in one delegate."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from onnx import TensorProto, helper, numpy_helper
from random_networks import settle

from edge_runtime.litert import HEAD, TRUNK, WINDOW, LiteRtBackend, LiteRtStreamBackend, open_litert
from edge_runtime.model_file import ModelFile
from edge_runtime.tflite_file import read_tflite
from sertool.export import tflite
from sertool.export.half import to_half
from sertool.export.onnx import to_onnx
from sertool.export.parity import ExportError, measure_parity
from sertool.export.quantize import quantize
from sertool.export.stream import to_stream
from sertool.export.tflite import LoweringError, to_tflite
from sertool.networks import NETWORKS, Student, build_network

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = 96
PRECISIONS = ("fp32", "fp16", "int8")
FORMS = [*((name, "causal") for name in sorted(NETWORKS)), ("resnet9", "same")]


def windows(frames: int, count: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, frames, 64)).astype(np.float32)


@cache
def network(name: str, time_padding: str) -> Student:
    """A network whose running statistics, weights and biases are none of those it is made with."""
    torch.manual_seed(0)
    return settle(build_network(name, 5, time_padding, 0.125), items=4, bias_std=1.0)


@cache
def converted(name: str, time_padding: str, precision: str) -> onnx.ModelProto:
    model = to_onnx(network(name, time_padding), FRAMES, 64)
    if precision == "int8":
        return quantize(model, [window for frames in (FRAMES, 48, 32) for window in windows(frames, 2)])
    return to_half(model) if precision == "fp16" else model


def onnx_logits(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"logmel": x[:, None]})[0]


def opened(content: bytes) -> Any:
    return open_litert(ModelFile(Path("model.tflite"), content, *read_tflite(content), ""))


def window_backend(model: onnx.ModelProto, frames: int = FRAMES) -> LiteRtBackend:
    return opened(to_tflite({WINDOW: (model, frames)}))


def stream_backend(model: onnx.ModelProto) -> LiteRtStreamBackend:
    stream = to_stream(model)
    return opened(to_tflite({TRUNK: (stream.trunk, stream.stride), HEAD: (stream.head, 1)}))


@pytest.fixture(params=sorted(NETWORKS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# --- the window form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "time_padding"), FORMS)
def test_fp32_equals_torch_at_any_length_and_batch(name: str, time_padding: str) -> None:
    backend = window_backend(converted(name, time_padding, "fp32"))
    for frames, count in ((FRAMES, 1), (33, 2), (150, 1), (FRAMES, 3)):
        x = windows(frames, count, seed=frames)
        with torch.inference_mode():
            expected = network(name, time_padding)(torch.from_numpy(x)[:, None]).numpy()
        np.testing.assert_allclose(backend.predict(x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "time_padding"), FORMS)
def test_int8_equals_the_onnx_file(name: str, time_padding: str) -> None:
    """Each rounds as the other does, but for a few values halfway between two integers."""
    model = converted(name, time_padding, "int8")
    x = windows(FRAMES, 16, seed=7)
    expected = onnx_logits(model, x)
    parity = measure_parity(expected, window_backend(model).predict(x))
    assert parity.agreement == 1.0
    assert parity.snr_db >= 50.0
    for frames in (32, 41, 150):
        x = windows(frames, 2, seed=frames)
        assert measure_parity(onnx_logits(model, x), window_backend(model).predict(x)).snr_db >= 45.0


def test_int8_computes_in_integers(name: str) -> None:
    model = schema.ModelT.InitFromPackedBuf(to_tflite({WINDOW: (converted(name, "causal", "int8"), FRAMES)}))
    graph = model.subgraphs[0]
    names = {getattr(schema.BuiltinOperator, key): key for key in dir(schema.BuiltinOperator) if key.isupper()}
    operators = [(names[model.operatorCodes[o.opcodeIndex].builtinCode], o) for o in graph.operators]
    counts = [key for key, _ in operators]
    # In from float, out to float for the mean, in again, and out to the layer that makes the logits.
    assert (counts.count("QUANTIZE"), counts.count("DEQUANTIZE")) == (2, 2)
    layers = [o for key, o in operators if key in {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"}]
    for layer in layers[:-1]:
        kinds = [graph.tensors[index].type for index in (*layer.inputs, *layer.outputs)]
        assert kinds == [schema.TensorType.INT8] * 2 + [schema.TensorType.INT32, schema.TensorType.INT8]
    assert {graph.tensors[index].type for index in layers[-1].inputs} == {schema.TensorType.FLOAT32}


@pytest.mark.parametrize("time_padding", ["causal", "same"])
@pytest.mark.parametrize("name", ["resnet9", "cnn6", "mobilenet15"])
def test_bands_as_channels_change_no_bit(name: str, time_padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(name, time_padding, "int8")
    packed = window_backend(model)
    monkeypatch.setattr(tflite, "_packed_bands", lambda *_: None)
    plain = window_backend(model)
    for frames in (32, 41, FRAMES):
        x = windows(frames, 4, seed=frames)
        np.testing.assert_array_equal(packed.predict(x), plain.predict(x))


@pytest.mark.parametrize(("name", "channels"), [("resnet9", 4), ("cnn6", 4), ("mobilenet15", 4), ("vgg15", 1)])
def test_bands_are_channels_where_that_leaves_fewer_products(name: str, channels: int) -> None:
    """A 3x3 convolution at stride 1 would need as many: three groups of four bands for three bands."""
    model = schema.ModelT.InitFromPackedBuf(to_tflite({WINDOW: (converted(name, "causal", "int8"), FRAMES)}))
    graph = model.subgraphs[0]
    codes = [model.operatorCodes[operator.opcodeIndex].builtinCode for operator in graph.operators]
    first = graph.operators[codes.index(schema.BuiltinOperator.CONV_2D)]
    assert graph.tensors[first.inputs[1]].shape[-1] == channels
    assert codes.count(schema.BuiltinOperator.RESHAPE) == (2 if channels > 1 else 0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", ["window", "stream"])
def test_the_whole_graph_is_one_delegate(name: str, precision: str, form: str) -> None:
    model = converted(name, "causal", precision)
    graph, length = (model, FRAMES) if form == "window" else (to_stream(model).trunk, to_stream(model).stride)
    interpreter = Interpreter(model_content=to_tflite({WINDOW: (graph, length)}))
    interpreter.allocate_tensors()
    operators = interpreter._get_ops_details()
    delegates = [operator for operator in operators if operator["op_name"] == "DELEGATE"]
    assert len(delegates) == 1
    made = {index for operator in operators[:-1] for index in operator["outputs"]}
    # What one delegate takes from the graph and gives to it is what the graph takes and gives: nothing is left over.
    assert not made & set(delegates[0]["inputs"])
    assert {detail["index"] for detail in interpreter.get_input_details()} <= set(delegates[0]["inputs"])
    assert set(delegates[0]["outputs"]) == {detail["index"] for detail in interpreter.get_output_details()}


def test_constants_are_aligned_and_nothing_is_transposed(name: str) -> None:
    content = to_tflite({WINDOW: (converted(name, "causal", "int8"), FRAMES)}, {"key": "text"})
    model = schema.Model.GetRootAs(content)
    starts = [
        model.Buffers(index)._tab.Vector(model.Buffers(index)._tab.Offset(4))
        for index in range(model.BuffersLength())
        if model.Buffers(index).DataLength()
    ]
    assert len(starts) > 10
    assert {start % 16 for start in starts} == {0}
    assert "TRANSPOSE" not in read_tflite(content)[1]


# --- half precision ------------------------------------------------------------------------------------------------


def test_fp16_rounds_weights_and_nothing_else(name: str) -> None:
    model, half = converted(name, "causal", "fp32"), converted(name, "causal", "fp16")
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    for tensor in rounded.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16).astype(np.float32), tensor.name))
    x = windows(FRAMES, 4)
    expected = onnx_logits(rounded, x)
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(onnx_logits(half, x), expected, rtol=0, atol=bound)
    np.testing.assert_allclose(window_backend(half).predict(x), expected, rtol=0, atol=bound)
    assert not np.array_equal(expected, onnx_logits(model, x))


def test_fp16_halves_both_files() -> None:
    model, half = converted("vgg15", "causal", "fp32"), converted("vgg15", "causal", "fp16")
    sizes = [(m.ByteSize(), len(to_tflite({WINDOW: (m, FRAMES)}))) for m in (model, half)]
    assert all(small < 0.53 * large for large, small in zip(*sizes, strict=True))


def test_fp16_refuses_a_weight_that_it_cannot_hold() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(converted("cnn6", "causal", "fp32"))
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e6), tensor.name))
    with pytest.raises(ExportError, match="float16 cannot; use --precision fp32"):
        to_half(model)


# --- the stream form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_stream_in_any_pieces_equals_the_window_bit_for_bit(name: str, precision: str) -> None:
    model = converted(name, "causal", precision)
    stream, window = stream_backend(model), window_backend(model)
    blocks = 12
    x = windows(blocks * stream.stride, seed=3)[0]
    expected = window.predict(x[None])[0]
    random = np.random.default_rng(0)
    for pieces in ([blocks], [1] * blocks, *(random_pieces(random, blocks) for _ in range(3))):
        states, features = stream.start(), []
        for piece in np.split(x, np.cumsum(pieces)[:-1] * stream.stride):
            found, states = stream.advance(piece, states)
            assert found.shape[1] * stream.stride == len(piece)
            features.append(found)
        np.testing.assert_array_equal(stream.classify(np.concatenate(features, axis=1)), expected)
    np.testing.assert_array_equal(stream.predict(x[None])[0], expected)


def random_pieces(random: np.random.Generator, total: int) -> list[int]:
    pieces: list[int] = []
    while sum(pieces) < total:
        pieces.append(int(random.integers(1, 1 + min(5, total - sum(pieces)))))
    return pieces


def test_states_are_of_8_bits_and_streams_do_not_mix() -> None:
    stream = stream_backend(converted("resnet9", "causal", "int8"))
    assert {state.dtype for state in stream.start()} == {np.dtype(np.int8)}
    x, y = windows(4 * stream.stride, 2, seed=5)

    def alone(clip: np.ndarray) -> list[np.ndarray]:
        states, found = stream.start(), []
        for block in np.split(clip, 4):
            features, states = stream.advance(block, states)
            found.append(features)
        return found

    expected, mixed = [alone(x), alone(y)], ([], [])
    states = [stream.start(), stream.start()]
    for blocks in zip(np.split(x, 4), np.split(y, 4), strict=True):
        for which, block in enumerate(blocks):
            features, states[which] = stream.advance(block, states[which])
            mixed[which].append(features)
    np.testing.assert_array_equal(mixed, expected)


# --- what is not known ---------------------------------------------------------------------------------------------


def model_of(nodes: list[onnx.NodeProto], output: list[Any], constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "own",
        [helper.make_tensor_value_info("logmel", TensorProto.FLOAT, ["batch", 1, "frames", 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(values, key) for key, values in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_an_unknown_operator_is_named_with_the_known_ones() -> None:
    model = model_of([helper.make_node("Erf", ["logmel"], ["logits"], name="gelu")], ["batch", 1, "t", 64], {})
    with pytest.raises(LoweringError, match=r"uses Erf \(gelu\), .* valid: Add, .*--format onnx$"):
        to_tflite({WINDOW: (model, FRAMES)})


CONV = np.ones((2, 1, 3, 3), np.float32)
UNKNOWN_USES: dict[str, Callable[[], onnx.ModelProto]] = {
    "Conv": lambda: model_of(
        [helper.make_node("Conv", ["logmel", "w"], ["logits"], dilations=[2, 1], kernel_shape=[3, 3])],
        ["batch", 2, "t", "f"],
        {"w": CONV},
    ),
    "MaxPool": lambda: model_of(
        [helper.make_node("MaxPool", ["logmel"], ["logits"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])],
        ["batch", 1, "t", "f"],
        {},
    ),
    "Gemm": lambda: model_of(
        [
            helper.make_node("ReduceMean", ["logmel", "axes"], ["mean"], keepdims=0),
            helper.make_node("Gemm", ["mean", "mean"], ["logits"], transB=1),
        ],
        ["batch", "batch"],
        {"axes": np.array([1, 2])},
    ),
    "ReduceMean": lambda: model_of(
        [helper.make_node("ReduceMean", ["logmel", "axes"], ["logits"], keepdims=0)],
        ["batch", "t", "f"],
        {"axes": np.array([1])},
    ),
    "Slice": lambda: model_of(
        [helper.make_node("Slice", ["logmel", "start", "end", "axes", "step"], ["logits"])],
        ["batch", 1, "t", "f"],
        {"start": np.array([0]), "end": np.array([9]), "axes": np.array([2]), "step": np.array([2])},
    ),
    "Transpose": lambda: model_of(
        [helper.make_node("Transpose", ["logmel"], ["logits"], perm=[0, 1, 3, 2])], ["batch", 1, "f", "t"], {}
    ),
    "Cast": lambda: model_of(
        [
            helper.make_node("Cast", ["logmel"], ["half"], to=TensorProto.FLOAT16),
            helper.make_node("Cast", ["half"], ["logits"], to=TensorProto.FLOAT),
        ],
        ["batch", 1, "t", "f"],
        {},
    ),
}


@pytest.mark.parametrize("operator", UNKNOWN_USES)
def test_an_unknown_use_is_refused_by_name(operator: str) -> None:
    with pytest.raises(LoweringError, match=rf"uses {operator} \(.*\) with .* does not know; export it with"):
        to_tflite({WINDOW: (UNKNOWN_USES[operator](), FRAMES)})


def test_what_the_four_networks_do_not_have_is_lowered_too() -> None:
    """A linear layer that is not transposed, a ReLU after a pool, a ReLU before which others read."""
    random = np.random.default_rng(0)
    constants = {
        "w": random.normal(size=(4, 1, 3, 3)).astype(np.float32),
        "b": random.normal(size=4).astype(np.float32),
        "axes": np.array([2, 3]),
        "fc": random.normal(size=(4, 5)).astype(np.float32),
        **{name: np.array([value]) for name, value in {"one": 1, "end": 1 << 40, "time": 2, "frequency": 3}.items()},
    }
    nodes = [
        helper.make_node("Conv", ["logmel", "w", "b"], ["a"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Add", ["a", "r"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["s"]),
        helper.make_node("MaxPool", ["a"], ["p"], kernel_shape=[2, 2], strides=[1, 1]),
        helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("Slice", ["s", "one", "end", "time"], ["t"]),
        helper.make_node("Slice", ["t", "one", "end", "frequency"], ["u"]),
        helper.make_node("Add", ["q", "u"], ["v"]),
        helper.make_node("ReduceMean", ["v", "axes"], ["m"], keepdims=0),
        helper.make_node("Gemm", ["m", "fc"], ["logits"]),
    ]
    model = model_of(nodes, ["batch", 5], constants)
    x = windows(FRAMES, 2)
    expected = onnx_logits(model, x)
    np.testing.assert_allclose(window_backend(model).predict(x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
