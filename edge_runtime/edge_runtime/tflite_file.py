"""What a TFLite file says of itself, read without a library and without trusting it.

A TFLite file is one FlatBuffers table (https://flatbuffers.dev/internals); numbers of fields are those of TensorFlow
Lite's ``schema.fbs``. The interpreter follows a file's offsets and indices as they are and crashes on a wrong one, so
all that it will follow is followed here first. What ``sertool export`` never writes is refused, not checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ArtifactError

OPERATORS = {
    0: "ADD",
    2: "CONCATENATION",
    3: "CONV_2D",
    4: "DEPTHWISE_CONV_2D",
    6: "DEQUANTIZE",
    9: "FULLY_CONNECTED",
    17: "MAX_POOL_2D",
    19: "RELU",
    22: "RESHAPE",
    34: "PAD",
    40: "MEAN",
    45: "STRIDED_SLICE",
    114: "QUANTIZE",
}
"""Names of the operators that an exported file may use, by their number in the schema. None needs code of its own."""

BYTES = {0: 4, 1: 2, 2: 4, 9: 1}
"""Size of an element by the schema's number of its type: float32, float16, int32, int8."""

T = TypeVar("T")

LARGEST_TENSOR = 1 << 28
"""Elements beyond which a tensor is damaged; the largest network makes 15 million of a window of 6 s."""


class _DamageError(Exception):
    """What is wrong with the bytes."""


def read_tflite(content: bytes, where: str = "model") -> tuple[dict[str, str], tuple[str, ...]]:
    """Check a model's structure; return its own key-value text and the operators it uses, sorted.

    Args:
        content: the whole file.
        where: how to name the file in errors.

    Raises:
        ArtifactError: not a whole TFLite model, one that no export wrote, or an unknown operator.
    """
    try:
        model = _Table(content, _offset(content, 0))
        if model.number(0, "<u4") != 3:
            raise _DamageError("its version is not 3")
        operators = [_operator_of(code) for code in model.tables(1)]
        unknown = [name for name in operators if name not in OPERATORS.values()]
        if unknown:
            raise ArtifactError(f"{where}: operator {unknown[0]!r} is unknown; upgrade ser-edge, or export it again")
        buffers = [_data_of(table) for table in model.tables(4)]
        graphs = [_check_graph(graph, operators, buffers) for graph in model.tables(2)]
        for signature in model.tables(7):
            _check_signature(signature, graphs)
        metadata = {
            entry.text(0): _item(buffers, entry.number(1, "<u4")).tobytes().decode() for entry in model.tables(6)
        }
    except (_DamageError, ValueError) as error:
        raise ArtifactError(f"{where}: not a whole TFLite model ({error}); copy or export it again") from error
    return metadata, tuple(sorted(set(operators)))


class _Table:
    """A FlatBuffers table: fields by number, each of them optional.

    Args:
        content: the whole file.
        position: where the table starts.
    """

    def __init__(self, content: bytes, position: int) -> None:
        self._content, self._position = content, position
        self._vtable = position - _number(content, position, "<i4")
        self._vtable_size = _number(content, self._vtable, "<u2")
        self._size = _number(content, self._vtable + 2, "<u2")
        if max(self._vtable + self._vtable_size, position + self._size) > len(content):
            raise _DamageError("it ends within a table")

    def _at(self, field: int) -> int | None:
        """Return the position of a field, None where it is left out."""
        entry = 4 + 2 * field
        offset = _number(self._content, self._vtable + entry, "<u2") if entry + 2 <= self._vtable_size else 0
        if offset >= self._size:
            raise _DamageError("a field lies outside of its table")
        return self._position + offset if offset else None

    def number(self, field: int, kind: str) -> int:
        """Return an integer of a numpy type, 0 where it is left out."""
        at = self._at(field)
        return 0 if at is None else _number(self._content, at, kind)

    def vector(self, field: int, kind: str) -> NDArray[Any]:
        """Return a vector of numbers of a numpy type; empty where it is left out."""
        at = self._at(field)
        if at is None:
            return np.zeros(0, kind)
        start = _offset(self._content, at)
        return np.frombuffer(self._content, kind, _number(self._content, start, "<u4"), start + 4)

    def text(self, field: int) -> str:
        """Return a text; empty where it is left out."""
        return self.vector(field, "u1").tobytes().decode()

    def table(self, field: int) -> _Table | None:
        """Return a table, None where it is left out."""
        at = self._at(field)
        return None if at is None else _Table(self._content, _offset(self._content, at))

    def tables(self, field: int) -> list[_Table]:
        """Return a vector of tables."""
        at = self._at(field)
        if at is None:
            return []
        first = _offset(self._content, at) + 4
        count = len(self.vector(field, "<u4"))
        return [_Table(self._content, _offset(self._content, first + 4 * entry)) for entry in range(count)]

    def refuse(self, *fields: int) -> None:
        """Refuse a table that has one of these fields."""
        if any(self._at(field) is not None for field in fields):
            raise _DamageError("it uses a part of the format that no export uses")


def _number(content: bytes, position: int, kind: str) -> int:
    return int(np.frombuffer(content, kind, 1, position)[0])


def _offset(content: bytes, position: int) -> int:
    """Return the position that the offset at a position points to."""
    return position + _number(content, position, "<u4")


def _item(items: Sequence[T], index: int) -> T:
    if not 0 <= index < len(items):
        raise _DamageError("it speaks of something that it does not have")
    return items[index]


def _data_of(buffer: _Table) -> NDArray[Any]:
    buffer.refuse(1, 2)
    return buffer.vector(0, "u1")


def _operator_of(code: _Table) -> str:
    number = max(code.number(0, "i1"), code.number(3, "<i4"))
    return code.text(1) or OPERATORS.get(number, f"number {number}")


def _check_graph(graph: _Table, operators: Sequence[str], buffers: Sequence[NDArray[Any]]) -> int:
    """Check a graph and return how many tensors it has."""
    tensors = graph.tables(0)
    inputs, outputs = graph.vector(1, "<i4").tolist(), graph.vector(2, "<i4").tolist()
    filled = {index for index, tensor in enumerate(tensors) if _is_constant(tensor, buffers)}
    for operator in graph.tables(3):
        _item(operators, operator.number(0, "<u4"))
        operator.refuse(5, 6, 7, 8)
        operator.table(4)
        reads, writes = operator.vector(1, "<i4").tolist(), operator.vector(2, "<i4").tolist()
        if not reads or not filled.union(inputs).issuperset(reads) or filled.intersection(writes):
            raise _DamageError("its operators are out of order")
        filled.update(writes)
    if not inputs or not outputs or not filled.issuperset(outputs) or filled.intersection(inputs):
        raise _DamageError("a result is never computed, or an input is")
    for index in filled.union(inputs):
        _item(tensors, index)
    return len(tensors)


def _is_constant(tensor: _Table, buffers: Sequence[NDArray[Any]]) -> bool:
    """Check a tensor and return whether its values are in the file."""
    tensor.refuse(5, 6)
    tensor.text(3)
    shape, kind = tensor.vector(0, "<i4").tolist(), tensor.number(1, "i1")
    elements = math.prod(shape)
    if kind not in BYTES or min(shape, default=1) <= 0 or elements > LARGEST_TENSOR:
        raise _DamageError("a tensor has an impossible type or shape")
    if len(tensor.vector(7, "<i4")) not in {0, len(shape)}:
        raise _DamageError("a tensor has two shapes")
    quantization = tensor.table(4)
    if quantization is not None:
        _check_quantization(quantization, shape)
    data = _item(buffers, tensor.number(2, "<u4"))
    if len(data) not in {0, elements * BYTES[kind]}:
        raise _DamageError("a constant has too few or too many values")
    return len(data) > 0


def _check_quantization(quantization: _Table, shape: Sequence[int]) -> None:
    quantization.refuse(4, 5)
    scales, zero_points = quantization.vector(2, "<f4"), quantization.vector(3, "<i8")
    channels = _item(shape, quantization.number(6, "<i4"))
    if len(scales) not in {1, channels} or len(zero_points) != len(scales):
        raise _DamageError("a tensor has too few or too many scales")


def _check_signature(signature: _Table, graphs: Sequence[int]) -> None:
    tensors = _item(graphs, signature.number(4, "<u4"))
    signature.text(2)
    for entry in (*signature.tables(0), *signature.tables(1)):
        entry.text(0)
        if entry.number(1, "<u4") >= tensors:
            raise _DamageError("it speaks of something that it does not have")
