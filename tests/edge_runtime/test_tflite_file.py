"""What is read of a TFLite file without a library, against the schema's own reader; and what is refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from tiny_artifact import tiny_file

from edge_runtime.artifact import METADATA_KEY
from edge_runtime.errors import ArtifactError
from edge_runtime.tflite_file import BYTES, OPERATORS, read_tflite


@pytest.fixture(scope="module")
def content() -> bytes:
    return tiny_file(".tflite")


@pytest.fixture
def model(content):
    """The file as the schema's own objects, to change and to pack again."""
    return schema.ModelT.InitFromPackedBuf(content)


def packed(model) -> bytes:
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def test_numbers_are_those_of_the_schema():
    assert {number: getattr(schema.BuiltinOperator, name) for number, name in OPERATORS.items()} == {
        number: number for number in OPERATORS
    }
    kinds = {"FLOAT32": 4, "FLOAT16": 2, "INT32": 4, "INT8": 1}
    assert {getattr(schema.TensorType, name): size for name, size in kinds.items()} == BYTES


def test_metadata_and_operators_are_what_the_schemas_reader_finds(content, model):
    metadata, operators = read_tflite(content)
    entry = model.metadata[0]
    assert entry.name == METADATA_KEY.encode()
    assert metadata == {METADATA_KEY: bytes(model.buffers[entry.buffer].data).decode()}
    assert json.loads(metadata[METADATA_KEY])["labels"] == ["anger", "joy", "neutral", "sadness"]
    assert operators == ("FULLY_CONNECTED", "MEAN")


def test_a_file_packed_again_by_the_schemas_writer_is_read_alike(content, model):
    assert read_tflite(packed(model)) == read_tflite(content)


def _swap_operators(model):
    model.subgraphs[0].operators.reverse()


def _write_a_constant(model):
    graph = model.subgraphs[0]
    graph.operators[0].outputs = [graph.operators[0].inputs[1]]


DAMAGE = {
    "version": lambda m: setattr(m, "version", 4),
    "no operator code": lambda m: setattr(m.subgraphs[0].operators[0], "opcodeIndex", 7),
    "no tensor": lambda m: setattr(m.subgraphs[0].operators[0], "inputs", [99, 1]),
    "an optional tensor": lambda m: setattr(m.subgraphs[0].operators[1], "inputs", [2, 3, -1]),
    "no output": lambda m: setattr(m.subgraphs[0], "outputs", []),
    "no input": lambda m: setattr(m.subgraphs[0], "inputs", []),
    "an output without operator": lambda m: setattr(m.subgraphs[0], "operators", m.subgraphs[0].operators[:1]),
    "an input that is a constant": lambda m: setattr(m.subgraphs[0], "inputs", [0, 3]),
    "an input out of range": lambda m: setattr(m.subgraphs[0], "inputs", [0, 99]),
    "operators out of order": _swap_operators,
    "an operator that writes a constant": _write_a_constant,
    "a negative length": lambda m: setattr(m.subgraphs[0].tensors[0], "shape", [1, -1, 64, 1]),
    "a huge tensor": lambda m: setattr(m.subgraphs[0].tensors[0], "shape", [1, 1 << 30, 64, 1]),
    "a signature of other rank": lambda m: setattr(m.subgraphs[0].tensors[0], "shapeSignature", [1, -1]),
    "another type": lambda m: setattr(m.subgraphs[0].tensors[0], "type", schema.TensorType.STRING),
    "no buffer": lambda m: setattr(m.subgraphs[0].tensors[0], "buffer", 99),
    "too few constants": lambda m: setattr(m.buffers[1], "data", m.buffers[1].data[:-1]),
    "too many constants": lambda m: setattr(m.buffers[1], "data", np.append(m.buffers[1].data, np.uint8(0))),
    "constants outside of the file": lambda m: setattr(m.buffers[1], "offset", 64),
    "a variable": lambda m: setattr(m.subgraphs[0].tensors[0], "isVariable", True),
    "sparse constants": lambda m: setattr(m.subgraphs[0].tensors[1], "sparsity", schema.SparsityParametersT()),
    "options of a custom operator": lambda m: setattr(m.subgraphs[0].operators[0], "customOptions", [1]),
    "a signature of no graph": lambda m: setattr(m.signatureDefs[0], "subgraphIndex", 3),
    "a signature of no tensor": lambda m: setattr(m.signatureDefs[0].outputs[0], "tensorIndex", 99),
    "metadata without a buffer": lambda m: setattr(m.metadata[0], "buffer", 99),
    "metadata that is no text": lambda m: setattr(m.buffers[m.metadata[0].buffer], "data", np.array([0xFF], np.uint8)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_the_interpreter_would_stumble_over_is_refused(model, damage):
    DAMAGE[damage](model)
    with pytest.raises(ArtifactError, match=r"^bad\.tflite: not a whole TFLite model \(.*export it again$"):
        read_tflite(packed(model), "bad.tflite")


@pytest.mark.parametrize(
    ("scales", "zero_points", "axis"), [([0.1] * 3, [0] * 3, 0), ([0.1], [0] * 4, 0), ([0.1] * 4, [0] * 4, 2)]
)
def test_scales_that_do_not_fit_are_refused(model, scales, zero_points, axis):
    weights = next(tensor for tensor in model.subgraphs[0].tensors if list(tensor.shape) == [4, 64])
    weights.quantization = schema.QuantizationParametersT()
    weights.quantization.scale, weights.quantization.zeroPoint = [0.1] * 4, [0] * 4
    read_tflite(packed(model))
    weights.quantization.scale, weights.quantization.zeroPoint = scales, zero_points
    weights.quantization.quantizedDimension = axis
    with pytest.raises(ArtifactError, match="not a whole"):
        read_tflite(packed(model))


def test_scales_of_another_kind_are_refused(model):
    tensor = model.subgraphs[0].tensors[0]
    tensor.quantization = schema.QuantizationParametersT()
    tensor.quantization.scale, tensor.quantization.zeroPoint = [0.1], [0]
    read_tflite(packed(model))
    tensor.quantization.detailsType = schema.QuantizationDetails.CustomQuantization
    tensor.quantization.details = schema.CustomQuantizationT()
    with pytest.raises(ArtifactError, match="a part of the format that no export uses"):
        read_tflite(packed(model))


@pytest.mark.parametrize(("size", "wrong"), [(6, "lies outside of its table"), (0xFFFF, "ends within a table")])
def test_a_table_of_a_wrong_size_is_refused(content, size, wrong):
    damaged = bytearray(content)
    (root,) = struct.unpack_from("<I", content)
    (back,) = struct.unpack_from("<i", content, root)
    struct.pack_into("<H", damaged, root - back + 2, size)
    with pytest.raises(ArtifactError, match=wrong):
        read_tflite(bytes(damaged))


@pytest.mark.parametrize(("code", "custom", "name"), [(25, None, "number 25"), (32, "Flex.Erf", "Flex.Erf")])
def test_an_unknown_operator_is_refused_by_its_name(model, code, custom, name):
    entry = model.operatorCodes[0]
    entry.builtinCode, entry.deprecatedBuiltinCode, entry.customCode = code, code, custom
    with pytest.raises(ArtifactError, match=rf"^bad\.tflite: operator '{name}' is unknown; upgrade ser-edge"):
        read_tflite(packed(model), "bad.tflite")


def test_a_file_cut_anywhere_is_refused(content):
    # Weights come last but for what points to them, so every cut loses something that is followed.
    for kept in range(8, len(content) - 1, 7):
        with pytest.raises(ArtifactError, match="not a whole TFLite model"):
            read_tflite(content[:kept])


def test_no_damage_raises_anything_else_or_crashes_the_interpreter(tmp_path, content):
    """A file with a wrong byte or two is refused, or runs; the hash that would tell it is left out here."""
    (tmp_path / "whole.tflite").write_bytes(content)
    script = """
import sys, numpy as np
from pathlib import Path
from edge_runtime.errors import ArtifactError
from edge_runtime.litert import open_litert
from edge_runtime.model_file import ModelFile
from edge_runtime.tflite_file import read_tflite
content = Path(sys.argv[1]).read_bytes()
random = np.random.default_rng(0)
description = content.find(b'{"card')
places = [at for at in range(8, len(content)) if not description <= at < description + 3000]
refused = ran = 0
for _ in range(1500):
    damaged = bytearray(content)
    for at in random.choice(places, random.integers(1, 3)):
        damaged[at] = random.choice([0, 1, 0x7F, 0x80, 0xFF, damaged[at] ^ (1 << random.integers(8))])
    try:
        metadata, operators = read_tflite(bytes(damaged))
        open_litert(ModelFile(Path("m.tflite"), bytes(damaged), metadata, operators, "")).predict(
            np.zeros((1, 124, 64), np.float32)
        )
        ran += 1
    except ArtifactError:
        refused += 1
print(refused, ran)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "whole.tflite")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    refused, ran = map(int, done.stdout.split())
    assert min(refused, ran) > 100
