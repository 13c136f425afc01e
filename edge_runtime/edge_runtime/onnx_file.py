"""What an ONNX file says of itself, read without a library and without trusting it.

An ONNX file is one Protocol Buffers message (https://protobuf.dev/programming-guides/encoding). Only the parts needed
here are walked; numbers of fields are those of ``onnx.proto``. Weights are stepped over, not read.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_runtime.errors import ArtifactError

DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Sets of operators that onnxruntime brings along. Any other would need a library of custom operators, and none is
ever loaded: a file cannot make a program run code of its own."""

DEEPEST = 8
"""Graphs within graphs (loops, branches) beyond which a file is damaged."""

Message = memoryview


def read_onnx(content: bytes, where: str = "model") -> tuple[dict[str, str], tuple[str, ...]]:
    """Return a model's own key-value text and the operators it uses, sorted; ``domain.Name`` outside of ONNX's own.

    Args:
        content: the whole file.
        where: how to name the file in errors.

    Raises:
        ArtifactError: not a whole ONNX model, weights outside the file, or an operator that needs a library of its own.
    """
    metadata: dict[str, str] = {}
    operators: set[str] = set()
    graphs = 0
    try:
        for field, value in _fields(memoryview(content)):
            if field == 7:
                graphs += 1
                _walk_graph(_message(value), operators, where)
            elif field == 14:
                entry = dict(_fields(_message(value)))
                metadata[_text(entry[1])] = _text(entry[2])
    except (ValueError, TypeError, LookupError) as error:
        raise ArtifactError(f"{where}: not a whole ONNX model; copy or export it again") from error
    if graphs != 1 or not operators:
        raise ArtifactError(f"{where}: not a whole ONNX model; copy or export it again")
    return metadata, tuple(sorted(operators))


def _walk_graph(graph: Message, operators: set[str], where: str, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise ValueError("graphs within graphs without end")
    for field, value in _fields(graph):
        if field == 1:
            _walk_node(_message(value), operators, where, depth)
        elif field == 5:
            _refuse_outside_weights(_message(value), where)


def _walk_node(node: Message, operators: set[str], where: str, depth: int) -> None:
    name = domain = ""
    for field, value in _fields(node):
        if field == 4:
            name = _text(value)
        elif field == 7:
            domain = _text(value)
        elif field == 5:
            for part, inner in _fields(_message(value)):
                if part in {5, 10}:
                    _refuse_outside_weights(_message(inner), where)
                elif part in {6, 11}:
                    _walk_graph(_message(inner), operators, where, depth + 1)
    operator = name if domain in DOMAINS[:2] else f"{domain}.{name}"
    if domain not in DOMAINS:
        raise ArtifactError(
            f"{where}: operator {operator!r} is unknown, and libraries of custom operators are never loaded; "
            "export it again"
        )
    operators.add(operator)


def _refuse_outside_weights(tensor: Message, where: str) -> None:
    """Refuse a tensor whose values lie in another file: a model must not make a program open files."""
    if any(field == 13 or (field == 14 and value != 0) for field, value in _fields(tensor)):
        raise ArtifactError(f"{where}: keeps weights in another file; export it again, as one file")


def _fields(message: Message) -> Iterator[tuple[int, int | Message]]:
    """Give number and value of each field: an int, or the bytes of text, a nested message or packed numbers."""
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if kind == 2:
            size, position = _varint(message, position)
        elif kind in {1, 5}:
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"no such kind of field: {kind}")
        if size > end - position:
            raise ValueError("a field is longer than what holds it")
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: Message, position: int) -> tuple[int, int]:
    """Return an integer of 7 bits a byte, least significant first, and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError("an integer without end")


def _message(value: int | Message) -> Message:
    if isinstance(value, int):
        raise TypeError("a number where a message belongs")
    return value


def _text(value: int | Message) -> str:
    return bytes(_message(value)).decode()
