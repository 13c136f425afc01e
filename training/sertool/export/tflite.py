"""An exported ONNX network, float or quantised, written anew as TFLite: one quantiser for both formats.

A table of short functions lowers each ONNX operator onto TensorFlow Lite's published flatbuffer schema. ONNX keeps
channels before time and frequency, TFLite after them: shapes and constants are permuted here, once, so that the file
holds no transposition. Each 8-bit tensor between a QuantizeLinear and its DequantizeLinear becomes one int8 tensor of
the same scale (uint8 zero point minus 128); what ONNX computes in float between them, TFLite does too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_runtime.errors import SerError
from sertool.export.onnx import attributes_of

Array = NDArray[Any]

CHANNELS_LAST = {2: (0, 1), 3: (0, 2, 1), 4: (0, 2, 3, 1)}
"""By number of axes: which axis of an ONNX tensor comes first, second, ... in TFLite."""

CHANNELS_FIRST = (0, 3, 1, 2)
"""Which axis of a TFLite tensor of four comes first, second, ... in ONNX."""

ALIGNMENT = 16
"""Bytes; the schema asks for it (``force_align``), so that vector units may read weights where they lie in the file."""

PACKED = 4
"""Mel bands that an 8-bit convolution of one channel takes as channels; see :func:`_packed_bands`."""

TYPES = {
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.float16): schema.TensorType.FLOAT16,
    np.dtype(np.int8): schema.TensorType.INT8,
    np.dtype(np.int32): schema.TensorType.INT32,
}

FUSES_RELU = frozenset({"Add", "Conv", "Gemm"})

NONE = schema.ActivationFunctionType.NONE
RELU = schema.ActivationFunctionType.RELU


class LoweringError(SerError):
    """A network with an operator, or a use of one, that the TFLite export does not know."""


@dataclass(frozen=True)
class Quantization:
    """How integers stand for real numbers: ``scale * (integer - zero_point)``.

    Attributes:
        scale: one value, or one a channel.
        zero_point: of int8 values.
        axis: the axis of the channels in TFLite's order.
    """

    scale: tuple[float, ...]
    zero_point: int = 0
    axis: int = 0


@dataclass(frozen=True)
class Constant:
    """Values of the graph that do not depend on its input, as ONNX holds them.

    Attributes:
        values: float32, float16 (widened where they are used), int8 or int32, or ONNX's own integers.
        scale: of quantised values, one a channel; None for others.
    """

    values: Array
    scale: Array | None = None


def to_tflite(models: Mapping[str, tuple[ModelProto, int]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Write networks as one ``.tflite`` file with one signature each.

    Args:
        models: by name of the signature, a network and how many frames it takes unless a caller resizes its input:
            what :func:`sertool.export.onnx.to_onnx`, :func:`sertool.export.quantize.quantize` or
            :func:`sertool.export.half.to_half` returns. A batch is one window.
        metadata: text by key, stored as the file's metadata.

    Returns:
        the file's bytes. Signatures keep the names of inputs and outputs; their axes are in TFLite's order:
        (1, frames, mel bands, 1) for a log-Mel window.

    Raises:
        LoweringError: the network uses an operator that is not in :data:`LOWERINGS`, or one in an unknown way.
    """
    content = schema.ModelT()
    content.version = 3
    content.description = "speech emotion recogniser"
    content.operatorCodes, content.subgraphs, content.signatureDefs = [], [], []
    content.buffers = [_Buffer(b"")]  # by definition the buffer of tensors without constant values
    for name, (model, frames) in models.items():
        _Lowering(content, name, model, frames).run()
    content.metadata = []
    for key, text in (metadata or {}).items():
        entry = schema.MetadataT()
        entry.name, entry.buffer = key, len(content.buffers)
        content.buffers.append(_Buffer(text.encode()))
        content.metadata.append(entry)
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(content.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


class _Buffer(schema.BufferT):  # type: ignore[misc]
    """Bytes of constants, aligned; the generated class ignores the schema's ``force_align``."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = data

    def Pack(self, builder: Any) -> Any:  # noqa: N802
        vector = None
        if self.data:
            builder.StartVector(1, len(self.data), ALIGNMENT)
            builder.head -= len(self.data)
            builder.Bytes[builder.head : builder.head + len(self.data)] = self.data
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


class _Lowering:
    """One ONNX graph on its way to one TFLite subgraph.

    Attributes:
        constants: of the ONNX graph, by name; quantised ones under the name of their DequantizeLinear's output.
        dequantized: float name -> name of the 8-bit tensor that it is the real value of.
    """

    def __init__(self, content: Any, name: str, model: ModelProto, frames: int) -> None:
        self.content = content
        self.graph = model.graph
        self.subgraph = schema.SubGraphT()
        self.subgraph.name, self.subgraph.tensors, self.subgraph.operators = name, [], []
        self.shapes, self.dtypes = _infer(model, frames)
        self.constants = {tensor.name: Constant(numpy_helper.to_array(tensor)) for tensor in self.graph.initializer}
        self.dequantized: dict[str, str] = {}
        self.producer = {output: node for node in self.graph.node for output in node.output}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in self.graph.node:
            for read in node.input:
                self.consumers.setdefault(read, []).append(node)
        self.outputs = {value.name for value in self.graph.output}
        self.absorbed: set[str] = set()
        self.channels_last = _channels_last(self.graph)
        self.quantization = _propagate(self.graph, self.dtypes)
        self.index: dict[str, int] = {}
        self.opcodes = {(code.builtinCode, code.version): at for at, code in enumerate(content.operatorCodes)}

    def run(self) -> None:
        """Lower every operator, in the order of computation, and describe the signature."""
        inputs = [value.name for value in self.graph.input]
        for value in self.graph.input:
            self.tensor(value.name)
            self.mark_free_axes(value)
        for node in self.graph.node:
            if node.output[0] in self.absorbed:
                continue
            if node.op_type not in LOWERINGS:
                raise LoweringError(
                    f"the network uses {node.op_type} ({node.name or node.output[0]}), which the TFLite export does "
                    f"not know; valid: {', '.join(sorted(LOWERINGS))}; export it with --format onnx"
                )
            try:
                LOWERINGS[node.op_type](self, node)
            except (KeyError, IndexError, ValueError) as error:
                raise self.refuse(node, "weights, bounds or axes that are computed or left out") from error
        outputs = [value.name for value in self.graph.output]
        self.subgraph.inputs = [self.index[name] for name in inputs]
        self.subgraph.outputs = [self.read(name) for name in outputs]
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = self.subgraph.name, len(self.content.subgraphs)
        signature.inputs = [_tensor_map(*pair) for pair in zip(inputs, self.subgraph.inputs, strict=True)]
        signature.outputs = [_tensor_map(*pair) for pair in zip(outputs, self.subgraph.outputs, strict=True)]
        self.content.subgraphs.append(self.subgraph)
        self.content.signatureDefs.append(signature)

    # --- tensors ---------------------------------------------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in TFLite's order."""
        shape = self.shapes[name]
        if len(shape) not in CHANNELS_LAST:
            raise LoweringError(f"{name!r} has {len(shape)} axes, not 2 to 4; export it with --format onnx")
        return shape if name in self.channels_last else tuple(shape[axis] for axis in CHANNELS_LAST[len(shape)])

    def tensor(self, name: str) -> int:
        """Make the TFLite tensor of an ONNX tensor."""
        self.index[name] = self.new_tensor(name, self.shape(name), self.quantization.get(name))
        return self.index[name]

    def mark_free_axes(self, value: onnx.ValueInfoProto) -> None:
        """Say in an input's signature which of its axes may have another length, except that of the batch."""
        shape = self.shape(value.name)
        free = [at and not axis.HasField("dim_value") for at, axis in enumerate(value.type.tensor_type.shape.dim)]
        if any(free):
            signature = [-1 if free[axis] else shape[at] for at, axis in enumerate(CHANNELS_LAST[len(shape)])]
            self.subgraph.tensors[self.index[value.name]].shapeSignature = signature

    def new_tensor(
        self,
        name: str,
        shape: Sequence[int],
        quantization: Quantization | None = None,
        dtype: np.dtype[Any] | None = None,
        values: Array | None = None,
    ) -> int:
        """Append a tensor to the subgraph; int8 where it has a quantisation and no other type is given."""
        tensor = schema.TensorT()
        tensor.name, tensor.hasRank, tensor.buffer = name, True, 0
        tensor.shape = list(shape)
        tensor.type = TYPES[dtype or np.dtype(np.int8 if quantization else np.float32)]
        if quantization is not None:
            parameters = schema.QuantizationParametersT()
            parameters.scale = np.array(quantization.scale, np.float32)
            parameters.zeroPoint = np.full(len(parameters.scale), quantization.zero_point, np.int64)
            parameters.quantizedDimension = quantization.axis
            tensor.quantization = parameters
        if values is not None:
            tensor.buffer = len(self.content.buffers)
            self.content.buffers.append(_Buffer(np.ascontiguousarray(values).tobytes()))
        self.subgraph.tensors.append(tensor)
        return len(self.subgraph.tensors) - 1

    def constant(self, name: str, values: Array, quantization: Quantization | None = None) -> int:
        """Make a constant tensor; float16 values are widened to float32 where they are used."""
        index = self.new_tensor(name, values.shape, quantization, values.dtype, values)
        if values.dtype != np.float16:
            return index
        widened = self.new_tensor(f"{name}_float32", values.shape)
        self.operator("DEQUANTIZE", [index], [widened], schema.DequantizeOptionsT(), version=3)
        return widened

    def read(self, name: str) -> int:
        """Return the TFLite tensor that holds an ONNX activation as float, or as int8 where ONNX has 8 bits."""
        if name not in self.index:
            if name not in self.dequantized:
                raise LoweringError(f"the network computes with the constant {name!r} where TFLite wants an activation")
            source = self.index[self.dequantized[name]]
            self.operator("DEQUANTIZE", [source], [self.tensor(name)], schema.DequantizeOptionsT(), version=2)
        return self.index[name]

    # --- operators -------------------------------------------------------------------------------------------------

    def operator(
        self, name: str, inputs: Sequence[int], outputs: Sequence[int], options: Any = None, version: int = 1
    ) -> None:
        """Append an operator of the schema's ``BuiltinOperator`` enumeration."""
        code = getattr(schema.BuiltinOperator, name)
        if (code, version) not in self.opcodes:
            entry = schema.OperatorCodeT()
            entry.builtinCode, entry.deprecatedBuiltinCode, entry.version = code, min(code, 127), version
            self.opcodes[code, version] = len(self.content.operatorCodes)
            self.content.operatorCodes.append(entry)
        operator = schema.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = self.opcodes[code, version], inputs, outputs
        if options is not None:
            operator.builtinOptions = options
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self.subgraph.operators.append(operator)

    def fused_output(self, node: NodeProto, *operands: str) -> tuple[bool, str, int]:
        """Find out what a node computes together with the ReLU and the quantisation that follow it.

        Args:
            node: its result is ``node.output[0]``.
            operands: names that must all be of 8 bits for it to compute in integers.

        Returns:
            whether it computes in integers; the name of what it writes; the fused activation.
        """
        output, activation = node.output[0], NONE
        follower = self._only_consumer(output)
        if follower is not None and follower.op_type == "Relu" and node.op_type in FUSES_RELU:
            output, activation = self._absorb(follower), RELU
            follower = self._only_consumer(output)
        quantized = all(self._is_quantized(name) for name in operands)
        if quantized and follower is not None and follower.op_type == "QuantizeLinear":
            return True, self._absorb(follower), activation
        return self.dtypes.get(output) == TensorProto.UINT8, output, activation

    def _only_consumer(self, name: str) -> NodeProto | None:
        consumers = self.consumers.get(name, [])
        return consumers[0] if len(consumers) == 1 and name not in self.outputs else None

    def _absorb(self, node: NodeProto) -> str:
        self.absorbed.add(node.output[0])
        return str(node.output[0])

    def _is_quantized(self, name: str) -> bool:
        constant = self.constants.get(name)
        return name in self.dequantized if constant is None else constant.scale is not None

    def operand(self, name: str, integer: bool) -> str:
        """Return the name of the 8-bit tensor behind an operand of an operator that computes in integers."""
        return self.dequantized.get(name, name) if integer else name

    def refuse(self, node: NodeProto, use: str) -> LoweringError:
        """Return the error for a use of a known operator that is not known."""
        return LoweringError(
            f"the network uses {node.op_type} ({node.name or node.output[0]}) with {use}, which the TFLite export "
            "does not know; export it with --format onnx"
        )


def _tensor_map(name: str, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, index
    return entry


def _infer(model: ModelProto, frames: int) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Return the shape and the ONNX type of every tensor, for a batch of one and inputs of so many frames."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        for number, axis in enumerate(value.type.tensor_type.shape.dim):
            if not axis.HasField("dim_value"):
                axis.dim_value = frames if number else 1
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(fixed, strict_mode=True).graph
    values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
    shapes = {name: tuple(axis.dim_value for axis in found.shape.dim) for name, found in values.items()}
    return shapes, {name: found.elem_type for name, found in values.items()}


def _channels_last(graph: onnx.GraphProto) -> set[str]:
    """Return the names of tensors that ONNX, too, holds in TFLite's order of axes: a stream's states."""
    names = set()
    for node in graph.node:
        if node.op_type == "Transpose":
            order = tuple(attributes_of(node)["perm"])
            names |= {node.output[0]} if order == CHANNELS_LAST[4] else set()
            names |= {node.input[0]} if order == CHANNELS_FIRST else set()
    return names


def _propagate(graph: onnx.GraphProto, dtypes: Mapping[str, int]) -> dict[str, Quantization]:
    """Return the quantisation of every 8-bit activation.

    A stream's states are joined and cut as 8-bit tensors; those take the scale of what they are joined with.
    """
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found: dict[str, Quantization] = {}
    for node in graph.node:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            name = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
            scale, zero_point = (constants[parameter] for parameter in node.input[1:3])
            if zero_point.dtype == np.uint8:
                found[name] = Quantization((float(scale),), int(zero_point) - 128)
    while True:
        before = len(found)
        for node in graph.node:
            names = [name for name in (*node.input, *node.output) if dtypes.get(name) == TensorProto.UINT8]
            known = [found[name] for name in names if name in found]
            if known and node.op_type in {"Concat", "Slice", "Transpose", "Identity"}:
                found |= dict.fromkeys(names, known[0])
        if len(found) == before:
            return found


# --- one function an operator ----------------------------------------------------------------------------------------


def _dequantize(graph: _Lowering, node: NodeProto) -> None:
    source, scale, _ = node.input
    if source in graph.constants:
        graph.constants[node.output[0]] = Constant(
            graph.constants[source].values, graph.constants[scale].values.reshape(-1)
        )
    else:
        graph.dequantized[node.output[0]] = source


def _quantize(graph: _Lowering, node: NodeProto) -> None:
    source, output = node.input[0], node.output[0]
    quantized = graph.dequantized.get(source)
    if quantized is not None and graph.quantization[quantized] == graph.quantization[output]:
        graph.index[output] = graph.index[quantized]  # there and back again
    else:
        graph.operator("QUANTIZE", [graph.read(source)], [graph.tensor(output)], schema.QuantizeOptionsT())


def _cast(graph: _Lowering, node: NodeProto) -> None:
    if node.input[0] not in graph.constants or attributes_of(node)["to"] != TensorProto.FLOAT:
        raise graph.refuse(node, "something else than constants to float32")
    graph.constants[node.output[0]] = graph.constants[node.input[0]]


def _rename(graph: _Lowering, node: NodeProto) -> None:
    """Let a tensor have two names: an identity, or a transposition between the orders of axes."""
    source, output = node.input[0], node.output[0]
    if node.op_type == "Transpose" and not {source, output} & graph.channels_last:
        raise graph.refuse(node, f"the order {attributes_of(node)['perm']}")
    if source in graph.dequantized:
        graph.dequantized[output] = graph.dequantized[source]
    else:
        graph.index[output] = graph.read(source)


def _conv(graph: _Lowering, node: NodeProto) -> None:
    attributes = attributes_of(node)
    weights = graph.constants[node.input[1]].values
    channels, per_group = weights.shape[:2]
    depthwise = 1 < attributes.get("group", 1) == channels and per_group == 1
    one_group = attributes.get("group", 1) == 1
    if not (one_group or depthwise) or weights.ndim != 4 or set(attributes.get("dilations", (1,))) != {1}:
        raise graph.refuse(node, "groups, dilation or one axis")
    integer, output, activation = graph.fused_output(node, *node.input[:2])
    source = graph.operand(node.input[0], integer)
    packed = _packed_bands(graph, node, source, output) if integer and one_group else None
    if packed is None:
        _write_conv(graph, node, source, output, activation, integer, depthwise)
        return
    _reshape(graph, source, packed.input[0])
    _write_conv(graph, packed, packed.input[0], packed.output[0], activation, integer, depthwise)
    _reshape(graph, packed.output[0], output)


def _write_conv(
    graph: _Lowering, node: NodeProto, source: str, output: str, activation: int, integer: bool, depthwise: bool
) -> None:
    if depthwise:
        options, name, order, axis = schema.DepthwiseConv2DOptionsT(), "DEPTHWISE_CONV_2D", (1, 2, 3, 0), 3
        options.depthMultiplier = 1
    else:
        options, name, order, axis = schema.Conv2DOptionsT(), "CONV_2D", (0, 2, 3, 1), 0
    options.strideH, options.strideW = attributes_of(node).get("strides", (1, 1))
    options.fusedActivationFunction = activation
    options.dilationHFactor = options.dilationWFactor = 1
    padded, options.padding = _pad(graph, node, source)
    operands = [padded, *_weights_and_bias(graph, node, source, integer, order, axis)]
    graph.operator(name, operands, [graph.tensor(output)], options, version=3 if integer else 1)


def _packed_bands(graph: _Lowering, node: NodeProto, source: str, output: str) -> NodeProto | None:
    """Return a convolution of one channel as one with :data:`PACKED` neighbouring bands as its channels.

    8-bit kernels multiply channels by fours or eights and fill up what is missing: of a single channel, three or seven
    products of a weight are by zero. In TFLite's order of axes the bands of a frame lie where channels do, so no byte
    moves. An output then stands for several neighbouring ones, each with its weights in another place among zeros:
    every sum has the terms it had.

    Returns:
        None where the input has other channels, or no fewer products would be left.
    """
    weights = graph.constants[node.input[1]]
    attributes = attributes_of(node)
    left, stride = attributes.get("pads", (0, 0))[1], attributes.get("strides", (1, 1))
    channels, _, frames, bands = weights.values.shape
    (_, given_frames, given, one), (_, made_frames, made, _) = graph.shape(source), graph.shape(output)
    outputs, before = PACKED // stride[1], -(-left // PACKED)
    groups = before + ((outputs - 1) * stride[1] + bands - 1 - left) // PACKED + 1
    if one != 1 or given % PACKED or PACKED % stride[1] or made * stride[1] != given or groups >= bands:
        return None
    values = np.zeros((outputs, channels, frames, groups * PACKED), weights.values.dtype)
    for number, of_output in enumerate(values):
        first = before * PACKED - left + number * stride[1]
        of_output[:, :, first : first + bands] = weights.values[:, 0]
    values = values.reshape(outputs * channels, frames, groups, PACKED).transpose(CHANNELS_FIRST)
    names = [f"{name}_packed" for name in (source, *node.input[1:], output)]
    assert weights.scale is not None
    graph.constants[names[1]] = Constant(values, np.tile(np.broadcast_to(weights.scale, channels), outputs))
    for name, packed in zip(node.input[2:], names[2:-1], strict=True):
        graph.constants[packed] = Constant(np.tile(graph.constants[name].values, outputs))
    graph.shapes[names[0]] = (1, PACKED, given_frames, given // PACKED)
    graph.shapes[names[-1]] = (1, outputs * channels, made_frames, made // outputs)
    graph.quantization[names[0]], graph.quantization[names[-1]] = graph.quantization[source], graph.quantization[output]
    top, bottom = attributes.get("pads", (0, 0, 0, 0))[::2]
    return helper.make_node(
        "Conv", names[:-1], names[-1:], node.name, kernel_shape=(frames, groups), strides=(stride[0], 1),
        pads=(top, before, bottom, groups - 1 - before),
    )  # fmt: skip


def _reshape(graph: _Lowering, name: str, output: str) -> None:
    """Give a tensor of one window another shape with as many frames."""
    source = graph.read(name)
    options = schema.ReshapeOptionsT()
    _, _, *rest = graph.shape(output)
    options.newShape = [1, -1, *rest]
    shape = graph.constant(f"{output}_shape", np.array(options.newShape, np.int32))
    graph.operator("RESHAPE", [source, shape], [graph.tensor(output)], options)


def _gemm(graph: _Lowering, node: NodeProto) -> None:
    attributes = attributes_of(node)
    if attributes.get("alpha", 1) != 1 or attributes.get("beta", 1) != 1 or attributes.get("transA"):
        raise graph.refuse(node, "a factor or a transposed activation")
    integer, output, activation = graph.fused_output(node, *node.input[:2])
    options = schema.FullyConnectedOptionsT()
    options.fusedActivationFunction = activation
    source = graph.operand(node.input[0], integer)
    order = (0, 1) if attributes.get("transB") else (1, 0)
    operands = [graph.read(source), *_weights_and_bias(graph, node, source, integer, order, 0)]
    graph.operator("FULLY_CONNECTED", operands, [graph.tensor(output)], options, version=4 if integer else 1)


def _weights_and_bias(
    graph: _Lowering, node: NodeProto, source: str, integer: bool, order: tuple[int, ...], axis: int
) -> tuple[int, int]:
    """Make the constants of a layer; a layer without bias gets one of zeros, which every kernel takes."""
    name = node.input[1]
    weights = graph.constants[name]
    values = weights.values.transpose(order)
    channels = values.shape[axis]
    bias = graph.constants[node.input[2]].values if len(node.input) > 2 else None
    if not integer:
        zeros = np.zeros(channels, values.dtype)
        return graph.constant(name, values), graph.constant(f"{name}_bias", zeros if bias is None else bias)
    assert weights.scale is not None
    scale = tuple(np.broadcast_to(weights.scale, channels).tolist())
    bias_scale = tuple(graph.quantization[source].scale[0] * one for one in scale)
    sums = np.zeros(channels, np.int32) if bias is None else bias
    return (
        graph.constant(name, values, Quantization(scale, axis=axis)),
        graph.constant(f"{name}_bias", sums, Quantization(bias_scale)),
    )


def _pad(graph: _Lowering, node: NodeProto, source: str) -> tuple[int, int]:
    """Return the input of a convolution or pool with explicit zeros around it, and how TFLite is to pad it itself.

    TFLite's SAME puts zeros where ONNX wants them at stride 1 alone; elsewhere it depends on the length of the input.
    """
    attributes = attributes_of(node)
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise graph.refuse(node, "automatic padding")
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    kernel, strides = attributes["kernel_shape"], attributes.get("strides", (1, 1))
    if not any((top, left, bottom, right)):
        return graph.read(source), schema.Padding.VALID
    if set(strides) == {1} and (top, left) == (bottom, right) == tuple(size // 2 for size in kernel):
        return graph.read(source), schema.Padding.SAME
    zeros = np.array([(0, 0), (top, bottom), (left, right), (0, 0)], np.int32)
    name, quantization = f"{source}_padded_{len(graph.subgraph.tensors)}", graph.quantization.get(source)
    padded = graph.new_tensor(name, graph.shape(source) + zeros.sum(axis=1), quantization)
    operands = [graph.read(source), graph.constant(f"{name}_zeros", zeros)]
    graph.operator("PAD", operands, [padded], schema.PadOptionsT(), version=2 if quantization else 1)
    return padded, schema.Padding.VALID


def _max_pool(graph: _Lowering, node: NodeProto) -> None:
    attributes = attributes_of(node)
    integer, output, _ = graph.fused_output(node, node.input[0])
    if attributes.get("ceil_mode") or set(attributes.get("dilations", (1,))) != {1}:
        raise graph.refuse(node, "dilation or a ceiling")
    if any(attributes.get("pads", ())) and not _is_rectified(graph, node.input[0]):
        raise graph.refuse(node, "padding after something else than a ReLU")
    options = schema.Pool2DOptionsT()
    options.filterHeight, options.filterWidth = attributes["kernel_shape"]
    options.strideH, options.strideW = attributes.get("strides", (1, 1))
    source, options.padding = _pad(graph, node, graph.operand(node.input[0], integer))
    graph.operator("MAX_POOL_2D", [source], [graph.tensor(output)], options, version=2 if integer else 1)


def _is_rectified(graph: _Lowering, name: str) -> bool:
    """Return whether a tensor holds no negative number, so that padding it with zeros cannot win a maximum."""
    quantization = graph.quantization.get(graph.dequantized.get(name, name))
    if quantization is not None:
        return quantization.zero_point == -128
    producer = graph.producer.get(name)
    if producer is None:
        return False
    if producer.op_type == "Concat":  # of a state, which holds what the other operand was
        return any(_is_rectified(graph, operand) for operand in producer.input)
    return producer.op_type == "Relu" or (
        producer.op_type in {"MaxPool", "Slice", "Transpose"} and _is_rectified(graph, producer.input[0])
    )


def _relu(graph: _Lowering, node: NodeProto) -> None:
    graph.operator("RELU", [graph.read(node.input[0])], [graph.tensor(node.output[0])])


def _add(graph: _Lowering, node: NodeProto) -> None:
    integer, output, activation = graph.fused_output(node, *node.input)
    options = schema.AddOptionsT()
    options.fusedActivationFunction = activation
    operands = [graph.read(graph.operand(name, integer)) for name in node.input]
    graph.operator("ADD", operands, [graph.tensor(output)], options, version=2 if integer else 1)


def _concat(graph: _Lowering, node: NodeProto) -> None:
    integer, output, _ = graph.fused_output(node, *node.input)
    operands = [graph.read(graph.operand(name, integer)) for name in node.input]
    options = schema.ConcatenationOptionsT()
    options.axis = _axis(graph, node.input[0], attributes_of(node)["axis"])
    options.fusedActivationFunction = NONE
    graph.operator("CONCATENATION", operands, [graph.tensor(output)], options, version=2 if integer else 1)


def _slice(graph: _Lowering, node: NodeProto) -> None:
    starts, ends, axes, *steps = (graph.constants[name].values for name in node.input[1:])
    if len(axes) != 1 or (steps and steps[0].tolist() != [1]):
        raise graph.refuse(node, "a step or several axes")
    integer, output, _ = graph.fused_output(node, node.input[0])
    source = graph.operand(node.input[0], integer)
    rank, axis = len(graph.shapes[source]), _axis(graph, node.input[0], int(axes[0]))
    start, end = int(starts[0]), int(ends[0])
    begin, stop = np.zeros(rank, np.int32), np.zeros(rank, np.int32)
    begin[axis], stop[axis] = start, min(end, np.iinfo(np.int32).max)
    options = schema.StridedSliceOptionsT()
    options.beginMask = options.endMask = (1 << rank) - 1 - (1 << axis)  # of the other axes, everything
    bounds = {"begin": begin, "end": stop, "step": np.ones(rank, np.int32)}
    operands = [graph.constant(f"{output}_{bound}", values) for bound, values in bounds.items()]
    operands.insert(0, graph.read(source))
    graph.operator("STRIDED_SLICE", operands, [graph.tensor(output)], options, version=2 if integer else 1)


def _mean(graph: _Lowering, node: NodeProto) -> None:
    order = CHANNELS_LAST[len(graph.shapes[node.input[0]])]
    dropped = [axis % len(order) for axis in graph.constants[node.input[1]].values.tolist()]
    kept = [axis for axis in order if axis not in dropped]
    expected = [sorted(kept)[at] for at in CHANNELS_LAST.get(len(kept), ())]
    if kept != expected or attributes_of(node).get("keepdims", 1):
        raise graph.refuse(node, "these axes")
    axes = np.array([order.index(axis) for axis in dropped], np.int32)
    operands = [graph.read(node.input[0]), graph.constant(f"{node.output[0]}_axes", axes)]
    graph.operator("MEAN", operands, [graph.tensor(node.output[0])], schema.ReducerOptionsT())


def _axis(graph: _Lowering, name: str, axis: int) -> int:
    """Return where an axis of an ONNX tensor is in TFLite's order."""
    order = CHANNELS_LAST[len(graph.shapes[name])]
    return order.index(axis % len(order))


LOWERINGS: dict[str, Callable[[_Lowering, NodeProto], None]] = {
    "Add": _add,
    "Cast": _cast,
    "Concat": _concat,
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Gemm": _gemm,
    "Identity": _rename,
    "MaxPool": _max_pool,
    "QuantizeLinear": _quantize,
    "ReduceMean": _mean,
    "Relu": _relu,
    "Slice": _slice,
    "Transpose": _rename,
}
"""The ONNX operators that a network may use."""
