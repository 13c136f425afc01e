"""A window model as a stream: a trunk that carries its past from call to call, and a head over any of its features.

A causal network sees nothing but the past, and a window model puts zeros where the past is not known. The trunk puts
the last frames of the call before there instead (for 8-bit tensors still as 8 bits), so that every frame is computed
once, however the audio is cut. Nothing is calibrated or rounded anew: the trunk holds the very weights and scales of
the window model, and gives its very features.

The pass knows no network. It follows the tensors that lie in time (axis 2) from the input on, and asks of each
operator only what it does to time: :class:`TimeOp` and :class:`Timing`.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.utils import Extractor

from edge_runtime.backends import STREAM_KEY, Backend, StreamBackend
from edge_runtime.frontend import FloatArray
from sertool.export.onnx import INPUT, MIN_FRAMES, OUTPUT, attributes_of
from sertool.export.parity import ExportError

FEATURES = "features"
"""Output of the trunk and input of the head, float32 (1, channels, frames)."""

TIME, FREQUENCY = 2, 3
"""Axes of a (batch, channels, time, frequency) tensor."""

END = np.iinfo(np.int64).max

FP32_MAX_DEVIATION = 1e-5
"""Largest accepted difference of a float stream's logit from the window model's, relative to the largest one where that
exceeds 1. A few kernels of onnxruntime sum in another order when a call brings fewer frames, which made 4e-7 at most in
networks that stream; a wrong past shows in the first digits."""

UNTIMED = frozenset(
    {
        "Clip",
        "DequantizeLinear",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "QuantizeLinear",
        "Relu",
        "Sigmoid",
    }
)
"""Operators that treat every frame alone."""


@dataclass(frozen=True)
class Timing:
    """Where the frames of a tensor lie in time.

    Attributes:
        stride: input frames from one of its frames to the next.
        delay: how many of its own frames the stream lags behind the window model; 0 in a causal network.
        field: input frames that one of its frames depends on (receptive field).
    """

    stride: int = 1
    delay: int = 0
    field: int = 1


@dataclass(frozen=True)
class TimeOp:
    """A convolution or a pooling, as far as time is concerned.

    Attributes:
        kernel: frames it looks at.
        stride: frames from one look to the next.
        padding: zeros that the window model puts before the first frame.
    """

    kernel: int
    stride: int
    padding: int

    def held_back(self, given: Timing) -> int:
        """Return how many of the newest frames wait for the next call, so that strides fall where they fell."""
        return -self._lag(given) % self.stride

    def past(self, given: Timing) -> int:
        """Return how many frames before the new ones it needs; a negative number skips new ones."""
        return self.kernel - self.stride + self.held_back(given)

    def timing(self, given: Timing) -> Timing:
        """Return the timing of what it makes of a tensor with the ``given`` one.

        Example:
            >>> TimeOp(kernel=3, stride=2, padding=1).timing(Timing(stride=4, field=19))
            Timing(stride=8, delay=0, field=27)
        """
        return Timing(
            stride=given.stride * self.stride,
            delay=(self._lag(given) + self.held_back(given)) // self.stride,
            field=given.field + (self.kernel - 1) * given.stride,
        )

    def _lag(self, given: Timing) -> int:
        return given.delay + self.kernel - self.stride - self.padding


@dataclass(frozen=True)
class State:
    """Frames that a stream carries from one call of the trunk to the next.

    Attributes:
        name: of the trunk's input.
        output: name of the trunk's output that is its next value.
        shape: (1, frames, bands, channels), the order of axes that 8-bit kernels work in: in the other order
            onnxruntime would turn every state round twice a call.
        dtype: numpy's name of its type, ``uint8`` or ``float32``.
        zero: value of every element after a reset: what the window model pads with, for 8 bits the zero point.
    """

    name: str
    output: str
    shape: tuple[int, int, int, int]
    dtype: str
    zero: int


@dataclass(frozen=True)
class StreamModel:
    """A window model, cut in two.

    Attributes:
        trunk: maps ``logmel`` (1, 1, n * stride, mel bands) and the states to ``features`` (1, channels, n) and the
            next states, for any n.
        head: maps ``features`` (batch, channels, any number) to ``logits`` (batch, classes), the mean over time first.
        stride: input frames per feature.
        context_frames: frames that must go before a window for its features to be those of an endless stream.
        receptive_field: input frames that one feature depends on.
        delay: features by which the trunk lags behind the window model; 0 where the two are equal from the first.
        states: in the order of the trunk's inputs and outputs.
    """

    trunk: ModelProto
    head: ModelProto
    stride: int
    context_frames: int
    receptive_field: int
    delay: int
    states: tuple[State, ...]


def to_stream(model: ModelProto) -> StreamModel:
    """Cut a window model, float or quantised, into a trunk with explicit states and a head.

    Args:
        model: what :func:`sertool.export.onnx.to_onnx` or :func:`sertool.export.quantize.quantize` returns; left as
            it is.

    Returns:
        two checked models with the weights of the one.

    Raises:
        ExportError: an operator whose way with time is not known, or no mean over time to cut at.
    """
    features = _features_of(model)
    trunk = _Trunk(_cut(model, INPUT, features))
    timing = trunk.timing[FEATURES]
    return StreamModel(
        trunk=trunk.model(),
        head=_checked(_cut(model, features, OUTPUT)),
        stride=timing.stride,
        context_frames=timing.stride * ceil(timing.field / timing.stride - 1),
        receptive_field=timing.field,
        delay=timing.delay,
        states=tuple(trunk.states),
    )


def to_file(stream: StreamModel) -> ModelProto:
    """Return the one model that a file holds: the trunk, with the head and the states' first values in its metadata."""
    form = {
        "stride": stream.stride,
        "reset": [state.zero for state in stream.states],
        "head": base64.b64encode(stream.head.SerializeToString()).decode(),
    }
    model = ModelProto()
    model.CopyFrom(stream.trunk)
    helper.set_model_props(model, {STREAM_KEY: json.dumps(form)})
    return model


def check_stream(window: Backend, stream: Backend, frames: FloatArray, precision: str, where: str) -> float:
    """Refuse a stream that gives other answers than its window model.

    The stream hears the frames in pieces; the window model hears every beginning of them anew.

    Args:
        window: the model that the stream was made from.
        stream: the file, as a device loads it.
        frames: normalised log-Mel frames (frames, mel_bands) of more than one window of real sound.
        precision: of both; 8 bits must agree exactly, floats within :data:`FP32_MAX_DEVIATION`.
        where: how to name the run in the error.

    Returns:
        the largest difference of a logit.

    Raises:
        ExportError: an answer differs by more.
    """
    assert isinstance(stream, StreamBackend)
    features = _in_pieces(stream, frames)
    counts = range(ceil(MIN_FRAMES / stream.stride), features.shape[1] + 1)
    expected = np.stack([window.predict(frames[None, : count * stream.stride])[0] for count in counts])
    streamed = np.stack([stream.classify(features[:, :count]) for count in counts])
    worst = float(np.abs(streamed - expected).max())
    allowed = 0.0 if precision == "int8" else FP32_MAX_DEVIATION * max(1.0, float(np.abs(expected).max()))
    if not worst <= allowed:
        raise ExportError(
            f"{where}: as a stream its network gives logits that differ by {worst:.2g} from those of a window "
            f"(at most {allowed:.2g}); nothing was written; it must see nothing but the past: use --form window"
        )
    return worst


def _in_pieces(stream: StreamBackend, frames: FloatArray) -> FloatArray:
    """Return the features (channels, n) of frames that come in pieces of one to five strides."""
    random, position, states = np.random.default_rng(0), 0, stream.start()
    features = []
    while len(frames) - position >= stream.stride:
        strides = min(int(random.integers(1, 6)), (len(frames) - position) // stream.stride)
        piece = frames[position : position + strides * stream.stride]
        position += len(piece)
        new, states = stream.advance(piece, states)
        features.append(new)
    return np.concatenate(features, axis=1)


def _features_of(model: ModelProto) -> str:
    """Return the name of the tensor (batch, channels, time) that the mean over time is taken of."""
    axes = _means(model.graph)
    for node in model.graph.node:
        if axes.get(node.output[0]) == [TIME] and axes.get(node.input[0]) == [FREQUENCY]:
            return str(node.input[0])
    raise ExportError(
        "the network cannot stream: it does not end in a mean over frequency and then one over time; use --form window"
    )


def _means(graph: GraphProto) -> dict[str, list[int]]:
    """Return the axes of every mean that drops them, by the name of what it gives."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    return {
        node.output[0]: numpy_helper.to_array(constants[node.input[1]]).tolist()
        for node in graph.node
        if node.op_type == "ReduceMean" and node.input[-1] in constants and not attributes_of(node).get("keepdims", 1)
    }


def _cut(model: ModelProto, first: str, last: str) -> ModelProto:
    """Return the part of a model from one tensor to another, with the features under their public name."""
    features = first if last == OUTPUT else last
    part = Extractor(onnx.shape_inference.infer_shapes(model)).extract_model([first], [last])
    for node in part.graph.node:
        for names in (node.input, node.output):
            names[:] = [FEATURES if name == features else name for name in names]
    for value in (*part.graph.input, *part.graph.output):
        value.name = FEATURES if value.name == features else value.name
    part.graph.ClearField("value_info")
    return onnx.shape_inference.infer_shapes(part)


def _checked(model: ModelProto) -> ModelProto:
    model.graph.ClearField("value_info")
    onnx.checker.check_model(model, full_check=True)
    return model


class _Trunk:
    """The trunk in the making.

    Attributes:
        states: in the order of the trunk's inputs and outputs.
        timing: of every tensor that lies in time.
    """

    def __init__(self, window: ModelProto) -> None:
        graph = window.graph
        self._window = window
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self._producer = {name: node for node in graph.node for name in node.output}
        self._types = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info, *graph.output)}
        self._means = _means(graph)
        self._nodes: list[NodeProto] = []
        self._added: list[TensorProto] = []
        self.states: list[State] = []
        self.timing = {INPUT: Timing()}
        for node in graph.node:
            self._add(node)

    def _add(self, original: NodeProto) -> None:
        """Add what takes a node's place in the trunk."""
        node = NodeProto()
        node.CopyFrom(original)
        timed = [name for name in node.input if name in self.timing]
        if not timed:
            self._nodes.append(node)  # of constants only
        elif node.op_type in {"Conv", "MaxPool"} and len(timed) == 1:
            self._look_back(node)
        elif node.op_type == "Slice":
            self._crop(node)
        elif node.op_type in {"Add", "Div", "Mul", "Sub"}:
            self._align(node)
        elif node.op_type in UNTIMED or self._means.get(node.output[0]) == [FREQUENCY]:
            self._put(node, self.timing[timed[0]])
        else:
            raise ExportError(
                f"the network cannot stream: what its operator {node.op_type} does to time is not known; "
                "use --form window"
            )

    def _put(self, node: NodeProto, timing: Timing) -> None:
        self._nodes.append(node)
        self.timing |= dict.fromkeys(node.output, timing)

    def _look_back(self, node: NodeProto) -> None:
        """Give a convolution or a pooling its past in place of its padding in time."""
        op, given = _time_op(node), self.timing[node.input[0]]
        node.input[0] = self._with_past(node.input[0], op.past(given), op.held_back(given))
        _, left, _, right = attributes_of(node).get("pads", (0, 0, 0, 0))
        _set(node, "pads", [0, left, 0, right])
        self._put(node, op.timing(given))

    def _crop(self, node: NodeProto) -> None:
        """Leave out a crop of the first frames: what is not cropped lags behind what is, by as many."""
        bounds = [self._constants[name].tolist() for name in node.input[1:] if name in self._constants]
        start, end, *rest = bounds if len(bounds) == len(node.input) - 1 else ([-1], [0])
        if rest not in ([[TIME]], [[TIME], [1]]) or start[0] < 0 or end[0] < np.iinfo(np.int32).max:
            raise ExportError("the network cannot stream: it takes a piece out of its window; use --form window")
        given = self.timing[node.input[0]]
        same = helper.make_node("Identity", [node.input[0]], [node.output[0]])
        self._put(same, replace(given, delay=given.delay + start[0]))

    def _align(self, node: NodeProto) -> None:
        """Delay the inputs of a sum or product until all speak of the same time; constants always do."""
        given = {name: self.timing[name] for name in node.input if name in self.timing}
        delay = max(timing.delay for timing in given.values())
        late = {name: delay - timing.delay for name, timing in given.items()}
        node.input[:] = [self._with_past(n, late[n], late[n]) if late.get(n) else n for n in node.input]
        self._put(node, max(given.values(), key=lambda timing: (timing.delay, timing.field)))

    def _with_past(self, name: str, past: int, held_back: int) -> str:
        """Return the new frames of a tensor with ``past`` frames before them and without the last ``held_back``."""
        if not past and not held_back:
            return name
        dequantize = self._producer.get(name)
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            return self._extended(name, past, held_back, 0)
        # Frames join as the 8 bits they are: joined as floats, they would keep the quantised kernels apart.
        quantized, *scale = dequantize.input
        zero_point = int(self._constants[scale[1]])
        extended = self._extended(quantized, past, held_back, zero_point)
        self._nodes.append(helper.make_node("DequantizeLinear", [extended, *scale], [f"{extended}_float"]))
        return f"{extended}_float"

    def _extended(self, name: str, past: int, held_back: int, zero: int) -> str:
        if past > 0:
            name = self._joined(name, past, zero)
        return self._frames(name, max(-past, 0), -held_back or END) if past < 0 or held_back else name

    def _joined(self, name: str, past: int, zero: int) -> str:
        """Put a state of ``past`` frames before a tensor and keep the last frames of both for the next call."""
        state = self._state(name, past, zero)
        self.states.append(state)
        joined = f"{name}_with_{state.name}"
        self._transpose(state.name, f"{state.name}_frames", perm=[0, 3, 1, 2])
        self._nodes.append(helper.make_node("Concat", [f"{state.name}_frames", name], [joined], axis=TIME))
        self._transpose(self._frames(joined, -past, END), state.output, perm=[0, 2, 3, 1])
        return joined

    def _transpose(self, name: str, output: str, perm: list[int]) -> None:
        self._nodes.append(helper.make_node("Transpose", [name], [output], perm=perm))

    def _state(self, name: str, frames: int, zero: int) -> State:
        kind = self._types[name]
        _, channels, _, bands = (dimension.dim_value for dimension in kind.shape.dim)
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        number = len(self.states)
        return State(f"state_{number}", f"next_state_{number}", (1, frames, bands, channels), dtype, zero)

    def _frames(self, name: str, start: int, end: int) -> str:
        """Return the frames ``start`` to ``end`` of a tensor, both as Python counts them."""
        output = f"{name}_frames_{len(self._nodes)}"
        self._nodes.append(helper.make_node("Slice", [name, *map(self._index, (start, end, TIME))], [output]))
        return output

    def _index(self, value: int) -> str:
        name = f"index_{value}"
        if name not in {tensor.name for tensor in self._added}:
            self._added.append(numpy_helper.from_array(np.array([value], np.int64), name))
        return name

    def model(self) -> ModelProto:
        graph = self._window.graph
        nodes = _needed(self._nodes, {FEATURES, *(state.output for state in self.states)})
        read = {name for node in nodes for name in node.input}
        types = {state.name: helper.np_dtype_to_tensor_dtype(np.dtype(state.dtype)) for state in self.states}
        bands = self._types[INPUT].shape.dim[FREQUENCY].dim_value
        channels = self._types[FEATURES].shape.dim[1].dim_value
        trunk = helper.make_graph(
            nodes,
            "trunk",
            [
                helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [1, 1, "frames", bands]),
                *(helper.make_tensor_value_info(s.name, types[s.name], s.shape) for s in self.states),
            ],
            [
                helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, [1, channels, "features"]),
                *(helper.make_tensor_value_info(s.output, types[s.name], s.shape) for s in self.states),
            ],
            [tensor for tensor in (*graph.initializer, *self._added) if tensor.name in read],
        )
        model = helper.make_model(trunk, opset_imports=self._window.opset_import, ir_version=self._window.ir_version)
        return _checked(model)


def _needed(nodes: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """Return the nodes that ``outputs`` depend on, in their order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


def _time_op(node: NodeProto) -> TimeOp:
    attributes = attributes_of(node)
    if attributes.get("ceil_mode") or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise ExportError(f"the network cannot stream: its {node.op_type} rounds its window up; use --form window")
    dilation, stride, padding = (
        attributes.get(name, (default,))[0] for name, default in (("dilations", 1), ("strides", 1), ("pads", 0))
    )
    return TimeOp(dilation * (attributes["kernel_shape"][0] - 1) + 1, stride, padding)


def _set(node: NodeProto, name: str, value: list[int]) -> None:
    for attribute in [a for a in node.attribute if a.name == name]:
        node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute(name, value))
