"""Teachers against transformers' own forward pass, with small random weights and, where present, the real Whisper."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import sertool.run
from edge_runtime.errors import ArtifactError, AudioError, SerError, UsageError
from sertool.audio import read_audio
from sertool.teacher.encoder import load_teacher

RATE = 16000
LAYERS = 3
FRAME = 320
POSITIONS = 100
"""The small Whisper knows 2 s of audio where the real one knows 30 s: 100 frames of 20 ms."""

WHISPER = transformers.WhisperConfig(
    d_model=16, encoder_layers=LAYERS, encoder_attention_heads=2, encoder_ffn_dim=32, max_source_positions=POSITIONS,
    decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=64, max_target_positions=8,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
WAVEFORM = {
    "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32,
    "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
FAMILIES = {
    "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
    "hubert": (transformers.HubertConfig, transformers.HubertModel),
    "wavlm": (transformers.WavLMConfig, transformers.WavLMModel),
}


def speech(samples: int, seed: int = 0) -> np.ndarray:
    """A gliding harmonic tone in noise."""
    time = np.arange(samples) / RATE
    noise = np.random.default_rng(seed).normal(0, 0.02, samples)
    tone = sum(np.sin(2 * np.pi * k * (120 + 20 * seed) * time * (1 + 0.1 * time)) / k for k in (1, 2, 3))
    return (0.2 * tone + noise).astype(np.float32)


@pytest.fixture(scope="session")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoder and feature extractor alone, as an encoder-only checkpoint is shared."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whisper") / "small-whisper"
    WhisperEncoder(WHISPER).save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=[(f, s) for f in FAMILIES for s in (False, True)], ids=str)
def waveform_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders of waveforms, in the small form (norm before the blocks) and the large one (norm after them)."""
    family, stable = request.param
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(family) / family
    config = config_class(
        **WAVEFORM,
        do_stable_layer_norm=stable,
        feat_extract_norm="layer" if stable else "group",
        conv_bias=stable,
    )
    model_class(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=stable).save_pretrained(folder)
    return folder


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def reference_states(output: transformers.modeling_outputs.BaseModelOutput, layer: int) -> np.ndarray:
    states = output.last_hidden_state if layer == LAYERS else output.hidden_states[layer]
    return states[0].numpy()


@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_whisper_equals_transformers_on_audio_of_full_length(whisper_folder: Path, layer: int) -> None:
    samples = speech(POSITIONS * FRAME)
    mel = transformers.WhisperFeatureExtractor()(samples, sampling_rate=RATE, padding=False, return_tensors="pt")
    model = WhisperEncoder.from_pretrained(whisper_folder).eval()
    with torch.no_grad():
        expected = reference_states(model(mel.input_features, output_hidden_states=True), layer).mean(axis=0)
    found = load_teacher(str(whisper_folder), layer).embed(samples)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def whisper_with_positions(folder: Path, frames: int) -> WhisperEncoder:
    """The same weights in an encoder that was built for exactly that many frames."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:frames]
    model = WhisperEncoder(transformers.WhisperConfig.from_pretrained(folder, max_source_positions=frames))
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("layer", [0, 1, LAYERS])
@pytest.mark.parametrize("samples", [FRAME, 1600, 25 * FRAME])
def test_whisper_encodes_a_short_clip_alone(whisper_folder: Path, layer: int, samples: int) -> None:
    clip = speech(samples)
    mel = transformers.WhisperFeatureExtractor()(clip, sampling_rate=RATE, padding=False, return_tensors="pt")
    model = whisper_with_positions(whisper_folder, samples // FRAME)
    with torch.no_grad():
        states = reference_states(model(mel.input_features, output_hidden_states=True), layer)
    assert len(states) == samples // FRAME
    found = load_teacher(str(whisper_folder), layer).embed(clip)
    np.testing.assert_allclose(found, states.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_whisper_rounds_up_to_one_frame_and_no_further(whisper_folder: Path) -> None:
    teacher = load_teacher(str(whisper_folder), 1)
    clip = speech(10 * FRAME + 7)
    filled, longer = np.zeros(11 * FRAME, np.float32), np.zeros(12 * FRAME, np.float32)
    filled[: len(clip)] = longer[: len(clip)] = clip
    np.testing.assert_array_equal(teacher.embed(clip), teacher.embed(filled))
    assert np.abs(teacher.embed(clip) - teacher.embed(longer)).max() > 1e-4


def test_the_encoder_of_a_full_whisper_checkpoint_is_taken(tmp_path: Path) -> None:
    torch.manual_seed(1)
    full = transformers.WhisperForConditionalGeneration(WHISPER)
    for folder, model in (("full", full), ("encoder", full.model.encoder)):
        model.save_pretrained(tmp_path / folder)
        transformers.WhisperFeatureExtractor().save_pretrained(tmp_path / folder)
    clip = speech(4000)
    expected = load_teacher(str(tmp_path / "encoder"), 2).embed(clip)
    np.testing.assert_array_equal(load_teacher(str(tmp_path / "full"), 2).embed(clip), expected)


@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_waveform_encoders_equal_transformers(waveform_folder: Path, layer: int) -> None:
    clip = speech(8000)
    normalised = (clip - clip.mean()) / np.sqrt(clip.var() + 1e-7)
    model = transformers.AutoModel.from_pretrained(waveform_folder).eval()
    with torch.no_grad():
        output = model(torch.from_numpy(normalised)[None], output_hidden_states=True)
    found = load_teacher(str(waveform_folder), layer).embed(clip)
    np.testing.assert_allclose(found, reference_states(output, layer).mean(axis=0), rtol=1e-4, atol=1e-5)


def test_waveform_encoders_need_their_receptive_field(waveform_folder: Path) -> None:
    teacher = load_teacher(str(waveform_folder))
    assert np.isfinite(teacher.embed(speech(400))).all()
    with pytest.raises(AudioError, match=r"too short: 24\.9 ms, and one frame of the teacher takes 25 ms"):
        teacher.embed(speech(399))


def test_whisper_needs_one_frame(whisper_folder: Path) -> None:
    with pytest.raises(AudioError, match=r"too short: 19\.9 ms"):
        load_teacher(str(whisper_folder)).embed(speech(FRAME - 1))


def test_longer_audio_is_the_mean_over_the_frames_of_equal_pieces(whisper_folder: Path) -> None:
    teacher = load_teacher(str(whisper_folder), 2)
    clip = speech(3 * 80 * FRAME)
    pieces = [teacher.embed(piece) for piece in np.split(clip, 3)]
    np.testing.assert_allclose(teacher.embed(clip), np.mean(pieces, axis=0), rtol=1e-5, atol=1e-6)


def test_pieces_of_other_lengths_weigh_by_their_frames(whisper_folder: Path) -> None:
    teacher = load_teacher(str(whisper_folder), 2)
    clip = speech(2 * 80 * FRAME + FRAME)
    first, second = clip[: len(clip) // 2], clip[len(clip) // 2 :]
    # 25760 samples each: 80.5 frames, rounded up to 81.
    assert len(first) == len(second) == 80.5 * FRAME
    expected = (81 * teacher.embed(first) + 81 * teacher.embed(second)) / 162
    np.testing.assert_allclose(teacher.embed(clip), expected, rtol=1e-5, atol=1e-6)


def test_a_vector_depends_on_nothing_but_its_clip(whisper_folder: Path, waveform_folder: Path) -> None:
    for folder in (whisper_folder, waveform_folder):
        teacher, fresh = load_teacher(str(folder), 1), load_teacher(str(folder), 1)
        for samples in (20000, 500, 70000, 20000):
            teacher.embed(speech(samples, seed=3))
        np.testing.assert_array_equal(teacher.embed(speech(9000)), fresh.embed(speech(9000)))


def test_weights_stored_in_half_precision_are_computed_in_float32(whisper_folder: Path, tmp_path: Path) -> None:
    model = WhisperEncoder.from_pretrained(whisper_folder).half()
    for name, saved in (("half", model), ("single", model.float())):
        (saved.half() if name == "half" else saved.float()).save_pretrained(tmp_path / name)
        transformers.WhisperFeatureExtractor().save_pretrained(tmp_path / name)
    clip = speech(5000)
    stored = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    found = load_teacher(str(tmp_path / "half"), 2).embed(clip)
    np.testing.assert_array_equal(found, load_teacher(str(tmp_path / "single"), 2).embed(clip))


def test_the_default_layer_is_the_middle_one(whisper_folder: Path) -> None:
    teacher = load_teacher(str(whisper_folder))
    assert teacher.name == "small-whisper layer 1"
    assert teacher.description["layer"] == LAYERS // 2
    assert teacher.dimension == teacher.description["dimension"] == 16


@pytest.mark.parametrize("layer", [-1, LAYERS + 1])
def test_a_layer_the_encoder_lacks_is_refused_with_the_valid_range(whisper_folder: Path, layer: int) -> None:
    with pytest.raises(UsageError, match=rf"no layer {layer}; valid: 0 .* to {LAYERS} "):
        load_teacher(str(whisper_folder), layer)


def test_identity_follows_weights_settings_and_layer_but_not_the_place(whisper_folder: Path, tmp_path: Path) -> None:
    moved = copy_of(whisper_folder, tmp_path)
    original = load_teacher(str(whisper_folder), 1).identity
    assert load_teacher(str(moved), 1).identity == original
    others = {load_teacher(str(moved), 2).identity}
    transformers.WhisperFeatureExtractor(dither=0.1).save_pretrained(moved)
    others.add(load_teacher(str(moved), 1).identity)
    transformers.WhisperFeatureExtractor().save_pretrained(moved)
    weights = safetensors.torch.load_file(moved / "model.safetensors")
    weights["layer_norm.bias"] += 1e-3
    safetensors.torch.save_file(weights, moved / "model.safetensors", {"format": "pt"})
    others.add(load_teacher(str(moved), 1).identity)
    assert len(others) == 3
    assert original not in others


def test_the_licence_is_recorded(whisper_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(whisper_folder, tmp_path)
    assert load_teacher(str(folder)).description["licence"] == "unknown"
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n")
    assert load_teacher(str(folder)).description["licence"] == "apache-2.0"
    (folder / "LICENSE").write_text("\nMIT License\n\nCopyright (c)\n")
    assert load_teacher(str(folder)).description["licence"] == "MIT License"


class _Mine:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_pickled_weights_are_never_loaded(whisper_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(whisper_folder, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="needs weights in safetensors, found none"):
        load_teacher(str(folder))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Mine(tmp_path / "trace")))
    with pytest.raises(ArtifactError, match=r"found only pytorch_model\.bin, a pickle, which is never loaded"):
        load_teacher(str(folder))
    assert not (tmp_path / "trace").exists()


def test_incomplete_weights_are_refused_instead_of_filled_with_random_numbers(
    whisper_folder: Path, tmp_path: Path
) -> None:
    folder = copy_of(whisper_folder, tmp_path)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["layers.1.fc1.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"1 weights are missing, the first is layers\.1\.fc1\.weight"):
        load_teacher(str(folder))


@pytest.mark.parametrize("kept", [0, 100, -10])
def test_truncated_weights_are_refused(whisper_folder: Path, tmp_path: Path, kept: int) -> None:
    folder = copy_of(whisper_folder, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match="the weights cannot be loaded"):
        load_teacher(str(folder))


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "no-such-model"}', '{"d_model": 3}'])
def test_a_config_that_cannot_be_used_is_refused(whisper_folder: Path, tmp_path: Path, text: str) -> None:
    folder = copy_of(whisper_folder, tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json cannot be used") as caught:
        load_teacher(str(folder))
    assert "\n" not in str(caught.value)


def test_a_model_of_text_is_refused(tmp_path: Path) -> None:
    transformers.BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"'bert' model is no speech encoder.*wav2vec2"):
        load_teacher(str(tmp_path))


def test_the_feature_extractor_must_be_there_and_take_16_khz(whisper_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(whisper_folder, tmp_path)
    transformers.WhisperFeatureExtractor(sampling_rate=8000).save_pretrained(folder)
    with pytest.raises(UsageError, match="takes audio at 8000 Hz; only 16000 Hz"):
        load_teacher(str(folder))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match=r"no usable preprocessor_config\.json"):
        load_teacher(str(folder))


@pytest.mark.parametrize("source", ["no-such-folder", "/no/such/folder", "./missing/model", ""])
def test_a_missing_folder_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match=r"no such folder|holds no model"):
        load_teacher(source)


def test_a_hub_name_without_network_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: object, **kwargs: object) -> str:
        assert kwargs["revision"] == "main"
        raise ConnectionError("cannot reach the hub\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UsageError, match=r"not to be had from the hub \(cannot reach the hub\)") as caught:
        load_teacher("someone/some-model@main")
    assert "\n" not in str(caught.value)


def test_a_hub_name_is_used_from_its_snapshot(whisper_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot(name: str, **kwargs: object) -> str:
        assert not any("bin" in str(pattern) for pattern in kwargs["allow_patterns"])  # type: ignore[attr-defined]
        return str(whisper_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    teacher = load_teacher("someone/some-model", 2)
    assert teacher.name == "someone/some-model layer 2"
    assert teacher.identity == load_teacher(str(whisper_folder), 2).identity


def test_nothing_is_reported_to_the_hub() -> None:
    program = "import sertool.teacher.encoder, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    clean = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_devices_are_checked(whisper_folder: Path) -> None:
    with pytest.raises(UsageError, match=r"no device 'gpu'; .*valid: auto, cpu, cuda"):
        load_teacher(str(whisper_folder), device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="sees no CUDA GPU"):
            load_teacher(str(whisper_folder), device="cuda")


def test_a_run_of_our_own_is_a_teacher_without_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint.safetensors").touch()
    with pytest.raises(UsageError, match="embedded at its layer fc1; leave --layer out"):
        load_teacher(str(tmp_path), 3)
    monkeypatch.setattr(sertool.run, "load_run_teacher", lambda path: ("the run in", path))
    assert load_teacher(str(tmp_path)) == ("the run in", tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["recipe.toml"], "holds no model"),  # the user's own, in any folder
        (["recipe.toml", "environment.json"], "unfinished; run the same sertool train again"),
        (["fold-1/environment.json", "fold-1/recipe.toml"], "unfinished; run the same sertool train again"),
        (["fold-1/checkpoint.safetensors", "fold-2/checkpoint.safetensors"], "holds 2 folds; name one of them"),
    ],
)
def test_a_folder_that_is_not_one_finished_run_says_what_it_is(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(SerError, match=message):
        load_teacher(str(tmp_path))


def test_a_recipe_beside_an_encoder_does_not_make_it_a_run(whisper_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(whisper_folder, tmp_path)
    (folder / "recipe.toml").touch()
    assert load_teacher(str(folder), 2).identity == load_teacher(str(whisper_folder), 2).identity


@pytest.mark.corpora
@pytest.mark.skipif("SERTOOL_DATA" not in os.environ, reason="SERTOOL_DATA is unset")
@pytest.mark.parametrize("layer", [0, 3, 6])
def test_real_whisper_equals_transformers_on_30_s_of_real_speech(layer: int) -> None:
    data = Path(os.environ["SERTOOL_DATA"])
    folder = data / "encoders" / "whisper-base-encoder"
    clip = read_audio(next(iter(sorted((data / "corpora" / "emodb").glob("*.flac")))))
    samples = np.resize(clip, 30 * RATE)
    mel = transformers.WhisperFeatureExtractor()(samples, sampling_rate=RATE, return_tensors="pt").input_features
    model = WhisperEncoder.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        output = model(mel, output_hidden_states=True)
    expected = (output.last_hidden_state if layer == 6 else output.hidden_states[layer])[0].mean(dim=0).numpy()
    np.testing.assert_allclose(load_teacher(str(folder), layer).embed(samples), expected, rtol=1e-4, atol=1e-4)
