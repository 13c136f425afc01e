"""Export: the written file computes what the network computes, tells where it comes from, or is not written."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from random_networks import settle

from edge_runtime.artifact import METADATA_KEY
from edge_runtime.backends import load_backend
from edge_runtime.errors import SerError, UsageError
from edge_runtime.frontend import FrontEnd, log_mel, tile_or_cut
from edge_runtime.recognizer import Recognizer, softmax
from edge_runtime.session import Session
from sertool.cli import main
from sertool.corpora.adapters import CORPORA
from sertool.corpora.manifest import Clip, load_manifest
from sertool.corpora.splits import Fold, Split
from sertool.evaluate import evaluate_run, save_evaluation
from sertool.export import artifact as export_module
from sertool.export.artifact import UNSPECIFIED_LICENCE, Export, corpus_licence, export_run
from sertool.export.onnx import _fold_pads, to_onnx
from sertool.export.parity import ExportError, check_parity, measure_parity
from sertool.export.quantize import balanced_choice, fingerprint, quantize, training_clips, with_short_windows
from sertool.export.stream import StreamModel, to_stream
from sertool.features import measure_normalization
from sertool.files import write_json, write_text
from sertool.networks import Student, build_network
from sertool.recipe import parse_recipe, write_recipe
from sertool.run import (
    Run,
    StudentDescription,
    describe_clips,
    describe_environment,
    load_run,
    save_checkpoint,
    save_trained,
)

LABELS = {"anger": (0.5, 6.0), "joy": (0.35, 4.0), "sadness": (0.2, 2.0)}
FOLD = Fold(train=("ada-voice", "bea-voice", "cyd-voice"), validation=("dov-voice",), test=("eva-voice", "fay-voice"))
WINDOW_SAMPLES = 16384


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks as small as these lose time to threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits_of(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def trained(network: Student, x: np.ndarray, y: np.ndarray, steps: int = 30) -> Student:
    """Train a network until its logits tell classes apart: fresh ones drown in the noise of any quantisation."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(network.train().parameters(), 1e-3)
    inputs, labels = torch.from_numpy(x)[:, None], torch.from_numpy(y)
    for _ in range(steps):
        rows = torch.randperm(len(x))[:12]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(inputs[rows]), labels[rows]).backward()
        optimizer.step()
    return network.eval()


# --- the network as ONNX -------------------------------------------------------------------------------------------

NETWORKS = [("resnet9", "causal"), ("mobilenet15", "causal"), ("vgg15", "same")]


@pytest.fixture(scope="module", params=NETWORKS, ids="-".join)
def converted(request: pytest.FixtureRequest) -> tuple[Student, onnx.ModelProto]:
    torch.manual_seed(0)
    network = settle(build_network(request.param[0], 5, request.param[1]), bias_std=1.0)
    return network, to_onnx(network, 373, 64)


@pytest.mark.parametrize(("batch", "frames"), [(1, 373), (3, 200), (2, 257), (1, 100), (2, 32)])
def test_fp32_equals_torch_at_any_batch_and_length(
    converted: tuple[Student, onnx.ModelProto], batch: int, frames: int
) -> None:
    network, model = converted
    x = torch.from_numpy(np.random.default_rng(frames).normal(size=(batch, 1, frames, 64)).astype(np.float32))
    with torch.inference_mode():
        expected = network(x).numpy()
    np.testing.assert_allclose(logits_of(model, x.numpy()), expected, atol=1e-4 * max(1.0, np.abs(expected).max()))


def test_padding_and_batch_normalisation_are_folded_and_one_file_holds_all(
    converted: tuple[Student, onnx.ModelProto],
) -> None:
    _, model = converted
    assert not {node.op_type for node in model.graph.node} & {"Pad", "BatchNormalization"}
    assert [value.name for value in model.graph.input] == ["logmel"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert all(tensor.data_location == TensorProto.DEFAULT for tensor in model.graph.initializer)
    assert b"site-packages" not in model.SerializeToString()


@pytest.mark.parametrize("kind", ["Conv", "MaxPool"])
def test_folding_a_pad_changes_no_value(kind: str) -> None:
    pads = np.array([0, 0, 2, 0, 0, 0, 0, 1])
    constants = [numpy_helper.from_array(pads, "pads")]
    inputs = ["padded"]
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 1, 0, 1]}
    if kind == "Conv":
        weights = np.random.default_rng(0).normal(size=(2, 1, 3, 3)).astype(np.float32)
        constants.append(numpy_helper.from_array(weights, "weights"))
        inputs.append("weights")
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["padded"]),
        helper.make_node(kind, inputs, ["y"], **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "pad",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, "t", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = np.random.default_rng(1).random((1, 1, 11, 8)).astype(np.float32)
    before = logits_of(model, x)
    _fold_pads(model)
    assert [node.op_type for node in model.graph.node] == [kind]
    np.testing.assert_array_equal(logits_of(model, x), before)


# --- 8 bits --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized() -> tuple[Student, onnx.ModelProto, np.ndarray]:
    """ResNet-9, causal: convolutions, a padded pool, slices and residual sums."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 5
    profiles = np.repeat(rng.normal(size=(5, 1, 16)), 4, axis=2)
    windows = (0.5 * profiles[labels] + rng.normal(size=(96, 96, 64))).astype(np.float32)
    network = trained(build_network("resnet9", 5, "causal"), windows[:48], labels[:48], steps=20)
    model = to_onnx(network, 96, 64)
    return network, quantize(model, with_short_windows(windows[:24])), windows[48:]


@pytest.mark.parametrize("frames", [96, 64, 40])
def test_int8_keeps_labels_and_logits_on_long_and_short_windows(
    quantized: tuple[Student, onnx.ModelProto, np.ndarray], frames: int
) -> None:
    network, model, windows = quantized
    x = windows[:, None, :frames]
    with torch.inference_mode():
        expected = network(torch.from_numpy(x.copy())).numpy()
    assert len(set(expected.argmax(axis=1))) >= 4, "the data must have a real spread"
    parity = measure_parity(expected, logits_of(model, x))
    assert parity.agreement >= 0.95
    assert parity.snr_db >= 25.0


def test_int8_gives_one_answer_on_every_processor(
    quantized: tuple[Student, onnx.ModelProto, np.ndarray],
) -> None:
    _, model, windows = quantized
    # Without optimisation onnxruntime computes in float what the 8-bit kernels must compute: no kernel may overflow.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = windows[:, None]
    assert measure_parity(session.run(None, {"logmel": x})[0], logits_of(model, x)).snr_db >= 35.0
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = [values for values in constants.values() if values.dtype == np.int8 and values.ndim > 1]
    assert len(weights) == 11
    assert max(int(np.abs(values.astype(int)).max()) for values in weights) <= 64


def test_int8_runs_every_convolution_in_integers(
    quantized: tuple[Student, onnx.ModelProto, np.ndarray], tmp_path: Path
) -> None:
    _, model, _ = quantized
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert kinds["QLinearConv"] == 10
    assert kinds["Conv"] == 0
    assert kinds["QGemm"] == 1, "fc1"
    assert kinds["Gemm"] == 1, "the layer that makes the logits stays float"


def test_int8_weights_are_signed_per_channel_and_activations_unsigned(
    quantized: tuple[Student, onnx.ModelProto, np.ndarray],
) -> None:
    _, model, _ = quantized
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    producers = {node.output[0]: node for node in model.graph.node}
    for convolution in (node for node in model.graph.node if node.op_type == "Conv"):
        activation, weights = (producers[name] for name in convolution.input[:2])
        values = constants[weights.input[0]]
        assert values.dtype == np.int8
        assert constants[weights.input[1]].shape == (len(values),)
        assert constants[activation.input[2]].dtype == np.uint8


# --- the choice of clips -------------------------------------------------------------------------------------------


def clip(name: str, speaker: str, label: str, folder: str = "corpus") -> Clip:
    return Clip(f"{folder}/{name}", Path(folder) / name, speaker, label)


@given(
    st.lists(st.tuples(st.sampled_from("ABCDE"), st.sampled_from("xyz")), min_size=1, max_size=60),
    st.integers(1, 70),
    st.randoms(),
)
@settings(max_examples=50, deadline=None)
def test_choice_is_balanced_repeatable_and_independent_of_order_and_place(cells, count, random) -> None:
    clips = [clip(f"{row}.wav", speaker, label) for row, (speaker, label) in enumerate(cells)]
    chosen = balanced_choice(clips, count)
    assert len(chosen) == len({c.key for c in chosen}) == min(count, len(clips))
    assert balanced_choice(clips, max(1, count // 2)) == chosen[: max(1, count // 2)]
    elsewhere = [clip(c.path.name, c.speaker, c.label, "moved") for c in random.sample(clips, len(clips))]
    assert [c.path.name for c in balanced_choice(elsewhere, count)] == [c.path.name for c in chosen]
    taken, available = Counter(c.label for c in chosen), Counter(c.label for c in clips)
    for label in available:
        # A label with fewer clips than another has been used up.
        assert taken[label] >= max(taken.values()) - 1 or taken[label] == available[label]


def test_choice_takes_all_speakers_of_a_label_before_one_twice() -> None:
    clips = [clip(f"{s}-{n}.wav", s, "joy") for s in "ABCD" for n in range(20)]
    assert Counter(c.speaker for c in balanced_choice(clips, 8)) == dict.fromkeys("ABCD", 2)


def test_short_windows_are_among_the_calibration_windows() -> None:
    lengths = [len(window) for window in with_short_windows([np.zeros((373, 64), np.float32)] * 12)]
    assert Counter(lengths) == {373: 8, 186: 2, 93: 2}
    assert all(len(window) >= 32 for window in with_short_windows([np.zeros((62, 64), np.float32)] * 12))


def test_fingerprint_depends_on_sound_and_times_alone(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, content in (("a.wav", b"1"), ("b/a.wav", b"1"), ("other.wav", b"2")):
        (tmp_path / name).write_bytes(content)
    first, moved, other = (Clip(n, tmp_path / n, "s", "l") for n in ("a.wav", "b/a.wav", "other.wav"))
    assert fingerprint([first, other]) == fingerprint([other, moved])
    assert fingerprint([first]) != fingerprint([other])
    assert fingerprint([first]) != fingerprint([replace(first, end=1.0)])


# --- parity --------------------------------------------------------------------------------------------------------


def test_parity_is_worked_out_as_by_hand() -> None:
    expected = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    computed = np.array([[1.0, 0.5], [1.0, 0.0]], np.float32)
    parity = measure_parity(expected, computed)
    assert (parity.clips, parity.max_error, parity.largest, parity.agreement) == (2, 2.0, 2.0, 0.5)
    assert parity.snr_db == pytest.approx(10 * np.log10(5.0 / 5.25))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_parity_refuses_wrong_and_undefined_logits(precision: str) -> None:
    expected = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    check_parity(measure_parity(expected, expected), precision)
    for wrong in (expected[:, ::-1], expected * np.float32(0.8), expected * np.float32(np.nan)):
        with pytest.raises(ExportError, match="nothing was written"):
            check_parity(measure_parity(expected, wrong), precision)


def test_parity_of_fp32_scales_with_large_logits_only() -> None:
    for size, error, accepted in (
        (1.0, 9e-5, True),
        (1.0, 2e-4, False),
        (100.0, 9e-3, True),
        (100.0, 2e-2, False),
    ):
        expected = np.array([[size, 0.0]])
        parity = measure_parity(expected, expected + error)
        if accepted:
            check_parity(parity, "fp32")
        else:
            with pytest.raises(ExportError):
                check_parity(parity, "fp32")


# --- a whole run ---------------------------------------------------------------------------------------------------


def make_corpus(folder: Path) -> None:
    """Write noise whose brightness and rhythm tell the labels apart, and whose level the speakers."""
    rng = np.random.default_rng(0)
    rows = ["file,speaker,label,gender"]
    time = np.arange(24000) / 16000
    for voice, speaker in enumerate([*FOLD.train, *FOLD.validation, *FOLD.test]):
        for label, (brightness, rhythm) in LABELS.items():
            for take in range(4):
                white = rng.normal(size=len(time))
                dull = np.convolve(white, np.full(16, 0.25), mode="same")
                sound = brightness * white + (1 - brightness) * dull
                loudness = 0.05 * (1 + 0.1 * voice) * (1 + 0.6 * np.sin(2 * np.pi * rhythm * time + take))
                name = f"{speaker}-{label}-{take}.wav"
                soundfile.write(folder / name, loudness * sound, 16000)
                rows.append(f"{name},{speaker},{label},f")
    write_text(folder / "manifest.csv", "\n".join(rows) + "\n")


def make_run(corpus: Path, folder: Path) -> Run:
    """Make a run folder as training leaves it, after seconds of training."""
    manifest = load_manifest(corpus / "manifest.csv")
    Split("by hand", 0, (FOLD,)).save(folder / "split.json")
    paths = {"manifest": str(corpus / "manifest.csv"), "split": str(folder / "split.json")}
    recipe = parse_recipe(
        {
            "data": {**paths, "window_samples": WINDOW_SAMPLES},
            "network": {"name": "mobilenet15", "time_padding": "causal"},
        }
    )
    write_text(folder / "recipe.toml", write_recipe(recipe))
    write_json(folder / "environment.json", describe_environment())
    rows = manifest.indices(list(FOLD.train))
    windows = np.stack([log_mel(tile_or_cut(manifest.clips[row].read(), WINDOW_SAMPLES)) for row in rows])
    normalization = measure_normalization(windows)
    torch.manual_seed(0)
    labels = tuple(sorted(LABELS))
    truth = np.array([labels.index(manifest.clips[row].label) for row in rows])
    network = trained(
        build_network("mobilenet15", len(LABELS), "causal"), normalization.apply(windows), truth, steps=40
    )
    student = StudentDescription(labels, FrontEnd(), normalization, WINDOW_SAMPLES)
    save_trained(folder, describe_clips([manifest.clips[row] for row in rows]))
    save_checkpoint(folder / "checkpoint.safetensors", network, student)
    save_trained(folder, describe_clips([manifest.clips[row] for row in rows]))
    return load_run(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    run = make_run(corpus, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERTOOL_CACHE", str(folder.parent / "cache"))
        save_evaluation(folder, "test", evaluate_run(run), run.split_hash)
    return run


@pytest.fixture(scope="module")
def conversion(evaluated: Run) -> bytes:
    frames = evaluated.front_end.frames(evaluated.window_samples)
    return to_onnx(evaluated.network(), frames, evaluated.front_end.mel_bands).SerializeToString()


@pytest.fixture(scope="module", params=["fp32.onnx", "int8.onnx", "fp16.tflite", "int8.tflite"])
def exported(
    request: pytest.FixtureRequest,
    evaluated: Run,
    conversion: bytes,
    tmp_path_factory: pytest.TempPathFactory,
) -> Export:
    path = tmp_path_factory.mktemp("exported") / f"emotion-{request.param}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "to_onnx", lambda *_: onnx.ModelProto.FromString(conversion))
        return export_run(evaluated, path, precision=path.stem.removeprefix("emotion-"), calibration_clips=18)


@pytest.fixture
def converted_before(conversion: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the tests of what happens after it the seconds of conversion."""
    monkeypatch.setattr(export_module, "to_onnx", lambda *_: onnx.ModelProto.FromString(conversion))


def copy_run(run: Run, folder: Path) -> Run:
    """Copy a run and its corpus, so that a test may damage them."""
    corpus = Path(run.recipe.data.manifest).parent
    shutil.copytree(corpus, folder / "corpus")
    shutil.copytree(run.path, folder / "run")
    recipe = (folder / "run" / "recipe.toml").read_text().replace(str(corpus), str(folder / "corpus"))
    (folder / "run" / "recipe.toml").write_text(recipe)
    return load_run(folder / "run")


def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run ``sertool`` in this process, as its entry point does; return the exit code."""
    monkeypatch.setattr(sys, "argv", ["sertool", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_file_and_network_agree_on_speakers_neither_was_tuned_on(exported: Export, evaluated: Run) -> None:
    recognizer = Recognizer(exported.path)
    network = evaluated.network()
    clips = evaluated.clips("test")
    computed = np.stack([recognizer.logits(clip.read()) for clip in clips])
    windows = [
        evaluated.normalization.apply(log_mel(tile_or_cut(c.read(), WINDOW_SAMPLES), evaluated.front_end))
        for c in clips
    ]
    with torch.inference_mode():
        expected = network(torch.from_numpy(np.stack(windows))[:, None]).numpy()
    parity = measure_parity(expected, computed)
    assert len(set(expected.argmax(axis=1))) >= 2
    agreement, snr_db = {"fp32": (1.0, 100.0), "fp16": (1.0, 50.0), "int8": (0.9, 20.0)}[exported.artifact.precision]
    assert parity.agreement >= agreement
    assert parity.snr_db >= snr_db


def test_file_describes_itself(exported: Export, evaluated: Run) -> None:
    artifact = Recognizer(exported.path).artifact
    assert artifact == exported.artifact
    assert artifact.labels == evaluated.labels == ("anger", "joy", "sadness")
    assert artifact.normalization == evaluated.normalization
    assert (artifact.window_samples, artifact.network) == (WINDOW_SAMPLES, "mobilenet15")
    assert artifact.parameters == 673667
    assert artifact.macs > 1e7
    assert artifact.licence == UNSPECIFIED_LICENCE
    assert artifact.metrics["test"]["uar"] == evaluated.metrics["test"]["uar"]
    assert artifact.metrics["test"]["uar_interval"] == evaluated.metrics["test"]["uar_interval"]
    assert artifact.provenance["split_hash"] == evaluated.split_hash
    assert artifact.provenance["recipe"]["network"] == {"name": "mobilenet15", "time_padding": "causal", "width": 1.0}
    assert artifact.provenance["export"]["parity"]["agreement"] == exported.parity.agreement
    assert {"sertool", "torch", "onnx", "onnxruntime"} <= set(artifact.provenance["export"]["versions"])


def test_file_records_its_calibration(exported: Export, evaluated: Run) -> None:
    recorded = exported.artifact.provenance["export"]["calibration"]
    if exported.artifact.precision != "int8":
        assert recorded is None
    else:
        clips = balanced_choice(evaluated.clips("train"), 18)
        assert recorded == {"clips": 18, "sha256": fingerprint(clips)}


def test_file_holds_no_path_and_no_name(exported: Export, corpus: Path) -> None:
    content = exported.path.read_bytes()
    secrets = [str(corpus), str(corpus.parent), "site-packages", *FOLD.train, *FOLD.validation, *FOLD.test]
    assert [secret for secret in secrets if secret.encode() in content] == []


def test_the_device_command_reads_the_file(exported: Export) -> None:
    ser_edge = Path(sys.executable).with_name("ser-edge")
    done = subprocess.run([ser_edge, "info", exported.path, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["labels"] == ["anger", "joy", "sadness"]
    assert done.stderr == "", "no word of an inference library reaches the user"


def test_export_twice_gives_the_same_bytes(evaluated: Run, tmp_path: Path, converted_before: None) -> None:
    first, second = (
        export_run(evaluated, tmp_path / f"{n}.onnx", calibration_clips=18).path.read_bytes() for n in (1, 2)
    )
    assert first == second


def test_conversion_twice_gives_the_same_bytes(evaluated: Run, conversion: bytes) -> None:
    frames = evaluated.front_end.frames(evaluated.window_samples)
    assert to_onnx(evaluated.network(), frames, 64).SerializeToString() == conversion


def test_export_needs_no_clip_of_test_speakers(evaluated: Run, tmp_path: Path, converted_before: None) -> None:
    run = copy_run(evaluated, tmp_path)
    for speaker in FOLD.test:
        for audio in (tmp_path / "corpus").glob(f"{speaker}-*.wav"):
            audio.unlink()
    result = export_run(run, tmp_path / "emotion.onnx", calibration_clips=1000)
    assert result.artifact.provenance["export"]["calibration"]["clips"] == 36
    assert result.artifact.temperature == export_run(evaluated, tmp_path / "whole.onnx").artifact.temperature


def test_the_temperature_is_fitted_on_validation_speakers(exported: Export, evaluated: Run) -> None:
    found = exported.artifact.provenance["export"]["temperature"]
    clips = [clip for clip in evaluated.manifest.clips if clip.speaker in FOLD.validation]
    truth = np.array([evaluated.labels.index(clip.label) for clip in clips])
    frames = np.stack([log_mel(tile_or_cut(clip.read(), WINDOW_SAMPLES), evaluated.front_end) for clip in clips])
    with torch.inference_mode():
        logits = evaluated.network()(torch.from_numpy(evaluated.normalization.apply(frames))[:, None]).double()

    def loss(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / temperature, torch.from_numpy(truth)))

    temperature = exported.artifact.temperature
    assert found["temperature"] == temperature
    if found["reason"]:  # every clip right or wrong: no temperature is the best
        assert temperature == 1.0
    else:
        assert loss(temperature) <= min(loss(temperature * factor) for factor in (0.8, 0.95, 1.05, 1.25))
    assert found["validation"]["clips"] == len(clips)
    assert found["validation"]["nll"] == pytest.approx([loss(1.0), loss(temperature)], rel=1e-3)
    assert found["test"] is None  # evaluated as a stream, which the file is not


def test_the_card_stands_beside_the_file_and_in_it(exported: Export, evaluated: Run) -> None:
    card = exported.path.with_name(f"{exported.path.name}.md").read_text()
    assert card == Recognizer(exported.path).artifact.card
    test = evaluated.metrics["test"]
    for fact in (
        f"# Model card: emotion in speech by mobilenet15, {exported.artifact.precision}",
        "Article 5(1)(f)",
        f"`{evaluated.split_hash}`",
        "3 speakers to train, 1 to validate, 2 to test",
        f"| UAR | {100 * test['uar']:.1f} % |",
        *(f"| recall of {label} | {100 * share:.1f} % |" for label, share in test["recall"].items()),
        f"| UAR, gender f | {100 * test['genders']['f']:.1f} % |",
        "On test speakers: not measured",
        "None: trained without a neighbour graph or distillation.",
        '"time_padding": "causal"',
    ):
        assert fact in card
    assert not [name for name in (*FOLD.train, *FOLD.validation, *FOLD.test) if name in card]


def test_a_document_of_the_users_is_not_replaced_by_a_card(evaluated: Run, tmp_path: Path) -> None:
    (tmp_path / "README.onnx.md").write_text("# My project\n")
    with pytest.raises(UsageError, match=r"README\.onnx\.md: not a model card"):
        export_run(evaluated, tmp_path / "README.onnx")
    assert (tmp_path / "README.onnx.md").read_text() == "# My project\n"
    assert not (tmp_path / "README.onnx").exists()


def test_export_refuses_clips_of_test_speakers(evaluated: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = list(evaluated.manifest.clips)
    monkeypatch.setattr(Run, "clips", lambda self, part: everything)
    with pytest.raises(SerError, match="'dov-voice' both trains and tests"):
        training_clips(evaluated)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, UNSPECIFIED_LICENCE),
        ({"corpus": "emodb"}, CORPORA["emodb"].licence),
        ({"corpus": "call centre"}, UNSPECIFIED_LICENCE),
        ({"corpus": "emodb", "licence": "by agreement"}, "by agreement"),
    ],
)
def test_licence_is_that_of_the_recipe_or_the_corpus(data: dict[str, str], expected: str, evaluated: Run) -> None:
    recipe = evaluated.recipe.model_copy(update={"data": evaluated.recipe.data.model_copy(update=data)})
    assert corpus_licence(replace(evaluated, recipe=recipe)) == expected


# --- as a stream ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def streamed(evaluated: Run, conversion: bytes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Export, Export]:
    """The same int8 network as a stream and as a window."""
    folder = tmp_path_factory.mktemp("streamed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "to_onnx", lambda *_: onnx.ModelProto.FromString(conversion))
        stream, window = (
            export_run(evaluated, folder / f"{form}.onnx", form=form, calibration_clips=18)
            for form in ("stream", "window")
        )
    return stream, window


def test_a_stream_and_a_window_of_one_run_are_one_network(streamed: tuple[Export, Export], evaluated: Run) -> None:
    stream, window = (Recognizer(export.path) for export in streamed)
    described = stream.artifact
    assert (described.form, described.stride, described.context_frames, described.receptive_field) == (
        "stream", 16, 48, 59,
    )  # fmt: skip
    assert (window.artifact.form, window.artifact.stride) == ("window", 0)
    assert described.golden == window.artifact.golden
    assert described.provenance["export"]["stream"] == {"max_error": 0.0}
    assert streamed[0].parity == streamed[1].parity
    calibrated = described.provenance["export"]["temperature"]
    assert calibrated["test"]["clips"] == evaluated.metrics["test"]["items"]
    assert calibrated["test"]["ece"][0] == pytest.approx(evaluated.metrics["test"]["ece"], abs=1e-4)
    for clip in evaluated.clips("test")[:6]:
        samples = tile_or_cut(clip.read(), WINDOW_SAMPLES)
        assert np.array_equal(stream.logits(samples), window.logits(samples))


def test_a_tflite_stream_is_one_file_equal_to_its_window(
    evaluated: Run, tmp_path: Path, converted_before: None
) -> None:
    paths = [tmp_path / f"{form}.tflite" for form in ("stream", "window")]
    exports = [export_run(evaluated, path, form=path.stem, calibration_clips=18) for path in paths]
    assert [export.artifact.form for export in exports] == ["stream", "window"]
    assert exports[0].artifact.provenance["export"]["stream"] == {"max_error": 0.0}
    stream, window = map(Recognizer, paths)
    for clip in evaluated.clips("test")[:4]:
        samples = tile_or_cut(clip.read(), WINDOW_SAMPLES)
        assert np.array_equal(stream.logits(samples), window.logits(samples))
    ser_edge = Path(sys.executable).with_name("ser-edge")
    clip = evaluated.clips("test")[0].path
    for path in paths:
        done = subprocess.run([ser_edge, "file", path, clip, "--json"], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["label"] in {"anger", "joy", "sadness", "uncertain", "no_speech"}
        assert done.stderr == ""


def test_a_stream_gives_the_events_that_its_window_model_foretells(
    streamed: tuple[Export, Export], evaluated: Run
) -> None:
    stream, window = Recognizer(streamed[0].path), load_backend(streamed[1].path)
    artifact, front_end = stream.artifact, stream.artifact.front_end
    speech = np.concatenate([clip.read() for clip in evaluated.clips("test")[:3]])
    *scores, _ = Session(stream).push(speech)
    answers: list[np.ndarray] = []
    for event in scores:
        start, end = round(event.start * 16000), round(event.end * 16000)
        frames = artifact.normalization.apply(log_mel(speech[start:end], front_end))
        features = features_of(streamed[1].path, frames)[:, -artifact.window_features :]
        logits = stream.stream().logits(features)
        if len(frames) <= artifact.window_frames:
            np.testing.assert_array_equal(logits, window.predict(frames[None])[0])
        full = features.shape[1] == artifact.window_features
        probabilities = softmax(logits / artifact.temperature)
        answers = [*answers, probabilities] if full else []
        expected = np.mean(answers, axis=0) if full else probabilities
        assert list(event.probabilities.values()) == pytest.approx(expected.tolist(), abs=2e-6)
    assert len(scores) >= 4


def features_of(path: Path, frames: np.ndarray) -> np.ndarray:
    """Return what a window model takes its mean over time of, for normalised frames (frames, mel_bands)."""
    model = onnx.load(path)
    last_mean = [node for node in model.graph.node if node.op_type == "ReduceMean"][-1]
    model.graph.output.append(helper.make_tensor_value_info(last_mean.input[0], TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"logmel": frames[None, None]})[1][0]


def test_a_stream_that_gives_other_answers_never_replaces_a_good_file(
    evaluated: Run, converted_before: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets(model: onnx.ModelProto) -> StreamModel:
        stream = to_stream(model)
        return replace(stream, states=tuple(replace(state, zero=state.zero + 40) for state in stream.states))

    output = tmp_path / "emotion.onnx"
    output.write_bytes(b"the good one")
    monkeypatch.setattr(export_module, "to_stream", forgets)
    with pytest.raises(ExportError, match=r"as a stream its network gives logits that differ .* nothing was written"):
        export_run(evaluated, output, form="stream", calibration_clips=18)
    assert output.read_bytes() == b"the good one"
    assert [path.name for path in tmp_path.iterdir()] == ["emotion.onnx"]


def test_a_network_that_looks_ahead_is_refused_as_a_stream(evaluated: Run, tmp_path: Path) -> None:
    network = evaluated.recipe.network.model_copy(update={"time_padding": "same"})
    looking_ahead = replace(evaluated, recipe=evaluated.recipe.model_copy(update={"network": network}))
    with pytest.raises(UsageError, match=r"time_padding = 'same', it looks ahead .* network\.time_padding=causal"):
        export_run(looking_ahead, tmp_path / "emotion.onnx", form="stream")


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_run_without_test_evaluation_is_refused_unless_forced(
    evaluated: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    converted_before: None,
) -> None:
    run = copy_run(evaluated, tmp_path)
    (run.path / "metrics.json").unlink()
    output = tmp_path / "emotion.onnx"
    arguments = ["export", str(run.path), "--precision", "fp32", "-o", str(output)]
    assert command(arguments, monkeypatch) == 2
    assert f"run: sertool evaluate {run.path}" in capsys.readouterr().err
    assert not output.exists()
    assert command([*arguments, "--force", "--licence", "CC0-1.0", "--json"], monkeypatch) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["evaluated"], summary["licence"], summary["file"]) == (False, "CC0-1.0", str(output))
    artifact = Recognizer(output).artifact
    assert (artifact.metrics, artifact.licence) == ({}, "CC0-1.0")
    assert artifact.provenance["corpora"][0]["licence"] == UNSPECIFIED_LICENCE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "m.onnx", "--format", "onx"], "did you mean 'onnx'?"),
        (["-o", "m.onnx", "--format", "tflite"], "must end in .tflite"),
        (["-o", "m.onnx", "--precision", "fp8"], "valid: fp16, fp32, int8"),
        (["-o", "m.onnx", "--form", "steam"], "did you mean 'stream'?"),
        (["-o", "m.pt"], "--format 'pt' is not offered; valid: onnx, tflite"),
        (["-o", "m"], "valid: onnx, tflite"),
        (["-o", "folder.onnx"], "is a folder"),
        (["-o", "m.onnx", "--calibration-clips", "0"], "--calibration-clips"),
        ([], "Missing option '--output'"),
    ],
)
def test_wrong_options_are_usage_errors(
    options: list[str],
    message: str,
    evaluated: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    assert command(["export", str(evaluated.path), *options], monkeypatch) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def garble(path: Path) -> None:
    path.write_bytes(b"\x00garbled" * 100)


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "metrics.json", "environment.json", "split.json"])
@pytest.mark.parametrize("damage", [truncate, garble, Path.unlink], ids=["truncated", "garbled", "missing"])
def test_a_damaged_run_is_one_line_and_no_file(
    name: str,
    damage,
    evaluated: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    converted_before: None,
) -> None:
    shutil.copytree(evaluated.path, tmp_path / "run")
    damage(tmp_path / "run" / name)
    output = tmp_path / "emotion.onnx"
    assert command(["export", str(tmp_path / "run"), "-o", str(output)], monkeypatch) in (1, 2)
    complaint = capsys.readouterr().err.strip()
    assert complaint.startswith("sertool: ")
    assert "\n" not in complaint
    assert str(tmp_path / "run") in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_unreadable_training_clip_is_one_line_and_no_file(
    evaluated: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    run = copy_run(evaluated, tmp_path)
    (tmp_path / "corpus" / "ada-voice-joy-2.wav").unlink()
    output = tmp_path / "emotion.onnx"
    assert command(["export", str(run.path), "-o", str(output)], monkeypatch) == 1
    assert "ada-voice-joy-2.wav: no such audio file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "run"]


def zero_a_layer(model: onnx.ModelProto) -> onnx.ModelProto:
    weights = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    weights.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(weights)), weights.name))
    return model


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_file_that_computes_something_else_never_replaces_a_good_one(
    precision: str, evaluated: Run, conversion: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "emotion.onnx"
    output.write_bytes(b"the good one")
    monkeypatch.setattr(export_module, "to_onnx", lambda *_: zero_a_layer(onnx.ModelProto.FromString(conversion)))
    with pytest.raises(ExportError, match="nothing was written"):
        export_run(evaluated, output, precision=precision)
    assert output.read_bytes() == b"the good one"
    assert [path.name for path in tmp_path.iterdir()] == ["emotion.onnx"]


def test_a_description_that_does_not_fit_is_found_out(
    evaluated: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted_before: None
) -> None:
    describe = export_module.describe
    monkeypatch.setattr(
        export_module, "describe", lambda *arguments: replace(describe(*arguments), window_samples=12288)
    )
    with pytest.raises(SerError):
        export_run(evaluated, tmp_path / "emotion.onnx", precision="fp32")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_file_above_a_megabyte() -> Iterator[None]:
    """Make the system refuse to write more into one file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_no_file(
    evaluated: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    converted_before: None,
    no_file_above_a_megabyte: None,
) -> None:
    output = tmp_path / "emotion.onnx"
    assert command(["export", str(evaluated.path), "--precision", "fp32", "-o", str(output)], monkeypatch) == 1
    assert capsys.readouterr().err.strip() == f"sertool: {output}: cannot be written (File too large)"
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nothing_can_be_written_is_one_line(
    evaluated: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    output = tmp_path / "file" / "emotion.onnx"
    assert command(["export", str(evaluated.path), "-o", str(output)], monkeypatch) == 1
    assert capsys.readouterr().err.startswith(f"sertool: {output}: cannot be written (")


def test_the_command_writes_the_file_and_says_what_it_is(evaluated: Run, tmp_path: Path) -> None:
    output = tmp_path / "emotion.onnx"
    output.write_bytes(b"an earlier one")
    arguments = ["export", str(evaluated.path), "--calibration-clips", "6", "-o", str(output)]
    done = subprocess.run(
        [Path(sys.executable).with_name("sertool"), *arguments], capture_output=True, text=True, check=True
    )
    assert done.stderr.replace("\n", "") == f"{output}: replaced", "no warning of a library reaches the user"
    for fact in ("mobilenet15, int8", "0.67 M", "of 36 training clips", "SNR", UNSPECIFIED_LICENCE):
        assert fact in done.stdout
    described = onnx.load(output).metadata_props
    assert [entry.key for entry in described] == [METADATA_KEY]
