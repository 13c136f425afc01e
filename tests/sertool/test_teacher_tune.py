"""Tuning a teacher: what is trained and what is not, against transformers itself, resumed to the same bits."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch.nn import functional
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from edge_runtime.errors import ArtifactError, AudioError, SerError, UsageError
from sertool.corpora.manifest import load_manifest
from sertool.run import read_metrics, read_trained
from sertool.teacher.encoder import load_encoder, load_teacher
from sertool.teacher.tune import TeacherNetwork, tune
from sertool.teacher.tuned import TuningSettings, load_tuning, parse_settings

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = 3
WINDOW = 9600
"""The clips' own length: what is predicted for a window is what is embedded of a clip."""

SPLIT = {"train": ["ada", "bea", "dov", "eli"], "validation": ["cyd"], "test": ["fox"]}
KINDS = ("whisper", "wav2vec2", "hubert", "wavlm")


def save_small_encoder(folder: Path, kind: str, *, stable: bool = False, dropout: float = 0.0, seed: int = 0) -> Path:
    """Save an encoder of three small blocks with random weights."""
    torch.manual_seed(seed)
    if kind == "whisper":
        config = transformers.WhisperConfig(
            d_model=16, encoder_layers=BLOCKS, encoder_attention_heads=2, encoder_ffn_dim=32,
            max_source_positions=60, dropout=dropout,
        )  # fmt: skip
        WhisperEncoder(config).save_pretrained(folder)
        transformers.WhisperFeatureExtractor().save_pretrained(folder)
        return folder
    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop")
    family = transformers.AutoConfig.for_model(kind)
    config = type(family)(
        hidden_size=16, num_hidden_layers=BLOCKS, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, do_stable_layer_norm=stable,
        feat_extract_norm="layer" if stable else "group", conv_bias=stable, apply_spec_augment=dropout > 0,
        mask_time_prob=0.2, mask_time_length=4, **dict.fromkeys(dropouts, dropout),
    )  # fmt: skip
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of an encoder; shared and therefore never changed."""
    made: dict[str, Path] = {}

    def encoder(kind: str, **values: Any) -> Path:
        key = f"{kind}-{values}"
        if key not in made:
            made[key] = save_small_encoder(tmp_path_factory.mktemp("encoder") / kind, kind, **values)
        return made[key]

    return encoder


@pytest.fixture
def split(tmp_path: Path) -> Path:
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"folds": [SPLIT]}))
    return path


@pytest.fixture
def settings(tones: Any, small_encoder: Callable[..., Path], split: Path) -> Callable[..., TuningSettings]:
    """Return settings of a short tuning on the tones."""

    def make(kind: str = "whisper", small: dict[str, Any] | None = None, **values: Any) -> TuningSettings:
        content = {
            "encoder": str(small_encoder(kind, **(small or {}))), "manifest": str(tones.manifest),
            "split": str(split), "corpus": "tones", "epochs": 3, "learning_rate": 1e-3,
            "window_samples": WINDOW, "threads": 1, "precision": "fp32",
        }  # fmt: skip
        return parse_settings(content | values)

    return make


def stop_after(epoch: int) -> Callable[[Any], None]:
    def stop(report: Any) -> None:
        if report.epoch == epoch:
            raise KeyboardInterrupt

    return stop


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All that was trained, by file and name."""
    paths = [folder / "heads.safetensors", *folder.glob("encoder/*.safetensors")]
    return {f"{path.name} {name}": t for path in paths for name, t in safetensors.torch.load_file(path).items()}


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = weights_of(first), weights_of(second)
    assert ours.keys() == theirs.keys() and len(ours) >= 4
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, msg=name)


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def hidden_states(folder: Path, samples: np.ndarray, layer: int) -> np.ndarray:
    """What transformers itself gives at a layer, (frames, dimension)."""
    config = transformers.AutoConfig.from_pretrained(folder)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    options = {"padding": False} if config.model_type == "whisper" else {}
    inputs = next(iter(extractor(samples, sampling_rate=16000, return_tensors="pt", **options).values()))
    with torch.no_grad():
        output = transformers_model(folder, len(samples) // 320)(inputs, output_hidden_states=True)
    states = output.last_hidden_state if layer == BLOCKS else output.hidden_states[layer]
    return states[0].numpy()


def transformers_model(folder: Path, frames: int) -> Any:
    """The encoder as transformers has it; Whisper's built for exactly so many frames."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.model_type != "whisper":
        return transformers.AutoModel.from_pretrained(folder).eval()
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:frames]
    config.max_source_positions = frames
    model = WhisperEncoder(config)
    model.load_state_dict(weights)
    return model.eval()


# --- the encoder in two parts --------------------------------------------------------------------------------------


def two_clips(encoder: Any) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.cat([encoder.inputs(rng.normal(scale=0.1, size=WINDOW).astype(np.float32)) for _ in range(2)])


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("layer", [2, BLOCKS])
@pytest.mark.parametrize("kind", KINDS)
def test_the_upper_blocks_on_what_the_lower_ones_give_are_the_whole_encoder(
    small_encoder: Callable[..., Path], kind: str, layer: int, stable: bool
) -> None:
    if kind == "whisper" and stable:
        pytest.skip("Whisper has one form")
    encoder = load_encoder(str(small_encoder(kind, stable=stable) if kind != "whisper" else small_encoder(kind)), layer)
    with torch.no_grad():
        clips = two_clips(encoder)
        whole = encoder(clips).clone()
        apart = encoder.above(encoder.below(clips, 1), 1)
    assert whole.shape[0] == 2 and not torch.allclose(whole[0], whole[1])
    torch.testing.assert_close(apart, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("freeze", ["none", 1, "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_what_is_trained_and_nothing_else(
    small_encoder: Callable[..., Path], kind: str, freeze: str | int
) -> None:
    encoder = load_encoder(str(small_encoder(kind)), 2)
    network = TeacherNetwork(encoder, 3, freeze).train()
    rng = np.random.default_rng(0)
    clips = [network.prepare(rng.normal(scale=0.1, size=WINDOW).astype(np.float32)) for _ in range(2)]
    functional.cross_entropy(network(torch.from_numpy(np.stack(clips))), torch.tensor([0, 2])).backward()
    moved = {name for name, weights in network.named_parameters() if weights.grad is not None and weights.grad.any()}
    heads = {"heads.fc1.weight", "heads.fc1.bias", "heads.fc2.weight", "heads.fc2.bias"}
    assert heads <= moved and (freeze != "all" or moved == heads)
    trunk = "encoder.model." + ("" if kind == "whisper" else "encoder.")
    for block, trained in enumerate([freeze == "none", freeze != "all"]):
        assert any(name.startswith(f"{trunk}layers.{block}.") for name in moved) == trained
    assert not any(name.startswith(("encoder.model.conv", "encoder.model.feature_extractor")) for name in moved)
    assert not any("embed_positions" in name for name in moved)
    # The paper freezes the convolutions and nothing between them and the blocks.
    assert any(name.startswith("encoder.model.feature_projection") for name in moved) == (
        freeze == "none" and kind != "whisper"
    )


def test_more_frozen_blocks_than_there_are_and_blocks_of_an_unknown_kind_are_refused(
    small_encoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for blocks in (2, 9, -1):
        encoder = load_encoder(str(small_encoder("whisper")), 2)
        with pytest.raises(UsageError, match=rf"freeze {blocks}: layer 2 stands on 2 blocks; valid: none, fewer, all"):
            TeacherNetwork(encoder, 3, blocks)
    encoder = load_encoder(str(small_encoder("hubert")), 2)
    monkeypatch.setattr(encoder, "kind", "data2vec-audio")
    with pytest.raises(UsageError, match="blocks of a data2vec-audio cannot be run one by one; valid: none, all"):
        TeacherNetwork(encoder, 3, 1)


# --- training against a loop that freezes and caches nothing -------------------------------------------------------


@pytest.mark.parametrize(("kind", "layer"), [("whisper", 2), ("wav2vec2", BLOCKS), ("wavlm", 2)])
def test_training_above_cached_blocks_equals_training_in_the_whole_model(
    tones: Any, settings: Callable[..., TuningSettings], tmp_path: Path, kind: str, layer: int
) -> None:
    """The oracle runs all of transformers' own model at every step, one batch of all clips an epoch."""
    chosen = settings(kind, layer=layer, freeze=1, batch_size=48, learning_rate=1e-3, head_learning_rate=1e-2)
    tune(chosen, tmp_path / "teacher")

    encoder, model = load_encoder(chosen.encoder, layer), transformers_model(Path(chosen.encoder), WINDOW // 320)
    torch.manual_seed(0)
    heads = TeacherNetwork(encoder, 3, 1).heads
    trunk = getattr(model, "encoder", model)
    optimizer = torch.optim.Adam(
        [
            {"params": heads.parameters(), "lr": 1e-2},
            {"params": [w for block in trunk.layers[1:layer] for w in block.parameters()], "lr": 1e-3},
        ]
    )
    manifest = load_manifest(tones.manifest)
    clips = [manifest.clips[row] for row in manifest.indices(SPLIT["train"])]
    inputs = torch.cat([encoder.inputs(clip.read()) for clip in clips])
    targets = torch.tensor([manifest.labels.index(clip.label) for clip in clips])

    def activations() -> torch.Tensor:
        output = model(inputs, output_hidden_states=True)
        return output.last_hidden_state if layer == BLOCKS else output.hidden_states[layer]

    with torch.no_grad():
        means = activations().mean(dim=1)
    mean, std = means.mean(dim=0), means.std(dim=0, correction=0)
    for epoch in range(chosen.epochs):
        standard = (activations() - mean) / std
        loss = functional.cross_entropy(heads.fc2(heads.fc1(standard).mean(dim=1)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert float(history(tmp_path / "teacher")[epoch]["loss"]) == pytest.approx(loss.item(), rel=1e-4)
    saved = transformers_model(tmp_path / "teacher" / "encoder", WINDOW // 320)
    for (name, ours), theirs in zip(saved.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4, msg=name)
    with torch.no_grad():
        states = activations()
        expected = heads.fc2(heads.fc1((states - mean) / std).mean(dim=1))
        found = load_tuning(tmp_path / "teacher").load_heads()(states)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-3)


def test_frozen_heads_are_two_linear_layers_on_the_raw_activations(
    tones: Any, settings: Callable[..., TuningSettings], tmp_path: Path
) -> None:
    """They were trained on standardised activations: a large offset of the encoder must not show."""
    chosen = settings("whisper", layer=2, freeze="all", batch_size=48, epochs=1, head_learning_rate=1e-2)
    tune(chosen, tmp_path / "teacher")
    encoder = load_encoder(chosen.encoder, 2)
    torch.manual_seed(0)
    heads = TeacherNetwork(encoder, 3, "all").heads
    manifest = load_manifest(tones.manifest)
    teacher = load_teacher(chosen.encoder, 2)
    rows = manifest.indices(SPLIT["train"])
    means = np.stack([teacher.embed(manifest.clips[row].read()) for row in rows]).astype(np.float64)
    standard = torch.from_numpy((means - means.mean(axis=0)) / means.std(axis=0)).float()
    targets = torch.tensor([manifest.labels.index(manifest.clips[row].label) for row in rows])
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    functional.cross_entropy(heads.fc2(heads.fc1(standard)), targets).backward()
    optimizer.step()
    folded = load_tuning(tmp_path / "teacher").load_heads()
    with torch.no_grad():
        expected = heads.fc2(heads.fc1(standard))
        found = folded(torch.from_numpy(means).float()[:, None])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("freeze", ["none", 1])
def test_an_encoder_learns_its_training_clips(
    settings: Callable[..., TuningSettings], tmp_path: Path, freeze: str | int, precision: str
) -> None:
    tune(settings("wav2vec2", freeze=freeze, precision=precision, epochs=6, learning_rate=3e-3), tmp_path / "teacher")
    losses = [float(row["loss"]) for row in history(tmp_path / "teacher")]
    assert losses[-1] < 0.7 * losses[0]


def test_heads_learn_what_carries_over_and_never_hear_the_test_speaker(
    tones: Any, settings: Callable[..., TuningSettings], tmp_path: Path
) -> None:
    chosen = settings("whisper", layer=2, freeze="all", head_learning_rate=1e-2)
    assert tune(chosen, tmp_path / "teacher")
    metrics = read_metrics(tmp_path / "teacher")
    assert metrics.keys() == {"validation", "test"}
    assert metrics["test"]["uar"] > 0.9 and list(metrics["test"]["speakers"]) == ["fox"]
    assert float(history(tmp_path / "teacher")[-1]["validation_uar"]) == pytest.approx(metrics["validation"]["uar"])
    trained = read_trained(tmp_path / "teacher")
    assert trained is not None and {clip["speaker"] for clip in trained.values()} == set(SPLIT["train"])

    # With other answers of the test speaker the same network comes out.
    swap = {"anger": "joy", "joy": "sadness", "sadness": "anger"}
    rows = [_relabelled(row, swap) if ",fox," in row else row for row in tones.manifest.read_text().splitlines()]
    other = tones.folder / "other.csv"
    other.write_text("\n".join(rows) + "\n")
    tune(chosen.model_copy(update={"manifest": str(other)}), tmp_path / "other")
    assert_same_weights(tmp_path / "teacher", tmp_path / "other")
    assert read_metrics(tmp_path / "other")["test"]["uar"] < 0.5


def _relabelled(row: str, swap: dict[str, str]) -> str:
    file, speaker, label, gender = row.split(",")
    return ",".join([file, speaker, swap[label], gender])


def test_both_parts_may_be_trained_on_and_only_the_test_part_is_then_reported(
    settings: Callable[..., TuningSettings], tmp_path: Path
) -> None:
    tune(settings(layer=1, freeze="all", parts=["train", "validation"]), tmp_path / "teacher")
    assert read_metrics(tmp_path / "teacher").keys() == {"test"}
    assert {row["validation_uar"] for row in history(tmp_path / "teacher")} == {""}
    description = load_teacher(str(tmp_path / "teacher")).description
    assert sorted(description["speakers"]) == ["ada", "bea", "cyd", "dov", "eli"]


def test_the_order_of_the_manifest_changes_nothing(
    tones: Any, settings: Callable[..., TuningSettings], tmp_path: Path
) -> None:
    header, *rows = tones.manifest.read_text().splitlines()
    shuffled = tones.folder / "shuffled.csv"
    shuffled.write_text("\n".join([header, *np.random.default_rng(3).permutation(rows)]) + "\n")
    chosen = settings(layer=2, freeze=1)
    tune(chosen, tmp_path / "sorted")
    tune(chosen.model_copy(update={"manifest": str(shuffled)}), tmp_path / "shuffled")
    assert_same_weights(tmp_path / "sorted", tmp_path / "shuffled")


# --- what the folder gives back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", ["none", 1, "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_fc1_and_fc2_of_transformers_activations(
    tones: Any, settings: Callable[..., TuningSettings], tmp_path: Path, kind: str, freeze: str | int
) -> None:
    chosen = settings(kind, layer=2, freeze=freeze, epochs=1)
    folder = tmp_path / "teacher"
    tune(chosen, folder)
    assert (folder / "encoder").is_dir() == (freeze != "all")
    manifest = load_manifest(tones.manifest)
    clip = manifest.clips[manifest.indices(["fox"])[5]]
    source = folder / "encoder" if freeze != "all" else Path(chosen.encoder)
    frames = hidden_states(source, clip.read(), 2)
    heads = safetensors.torch.load_file(folder / "heads.safetensors")
    fc1 = np.mean([heads["fc1.weight"].numpy() @ frame + heads["fc1.bias"].numpy() for frame in frames], axis=0)
    fc2 = heads["fc2.weight"].numpy() @ fc1 + heads["fc2.bias"].numpy()
    places = {"fc1": fc1, "fc2": fc2, "layer:2": frames.mean(axis=0)}
    for at, expected in places.items():
        teacher = load_teacher(str(folder), at=at)
        assert teacher.dimension == len(expected)
        np.testing.assert_allclose(teacher.embed(clip.read()), expected, rtol=1e-4, atol=1e-4)
    # The window that was predicted is the whole clip, so the prediction is what the embedding says.
    with (folder / "predictions.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["file"] == clip.key)
    shares = np.exp(fc2 - fc2.max()) / np.exp(fc2 - fc2.max()).sum()
    np.testing.assert_allclose([float(row[label]) for label in manifest.labels], shares, atol=1e-4)


def test_the_heads_are_those_of_the_reference(
    tones: Any, settings: Callable[..., TuningSettings], tmp_path: Path
) -> None:
    """``Wav2Vec2ForSequenceClassification`` is what the paper's code tunes."""
    tune(settings("wav2vec2", epochs=1), tmp_path / "teacher")
    encoder = tmp_path / "teacher" / "encoder"
    reference = transformers.Wav2Vec2ForSequenceClassification.from_pretrained(encoder, num_labels=3).eval()
    heads = safetensors.torch.load_file(tmp_path / "teacher" / "heads.safetensors")
    reference.projector.load_state_dict({"weight": heads["fc1.weight"], "bias": heads["fc1.bias"]})
    reference.classifier.load_state_dict({"weight": heads["fc2.weight"], "bias": heads["fc2.bias"]})
    samples = load_manifest(tones.manifest).clips[0].read()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(encoder)
    with torch.no_grad():
        logits = reference(extractor(samples, sampling_rate=16000, return_tensors="pt").input_values).logits[0]
    found = load_teacher(str(tmp_path / "teacher"), at="fc2").embed(samples)
    np.testing.assert_allclose(found, logits.numpy(), rtol=1e-4, atol=1e-5)


def test_a_tuned_encoder_keeps_the_blocks_above_and_the_convolutions(
    settings: Callable[..., TuningSettings], tmp_path: Path
) -> None:
    chosen = settings("hubert", layer=2, freeze=1)
    tune(chosen, tmp_path / "teacher")
    before = safetensors.torch.load_file(Path(chosen.encoder) / "model.safetensors")
    after = safetensors.torch.load_file(tmp_path / "teacher" / "encoder" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("encoder.layers.1.") for name in changed)


def test_the_teacher_remembers_whom_it_heard(settings: Callable[..., TuningSettings], tmp_path: Path) -> None:
    chosen = settings(layer=1, freeze="all", corpus="emodb")
    tune(chosen, tmp_path / "teacher")
    trained = read_trained(tmp_path / "teacher")
    assert trained is not None
    for at in ("fc1", "fc2", "layer:1"):
        teacher: Any = load_teacher(str(tmp_path / "teacher"), at=at)
        assert teacher.heard_audio == {clip["audio"] for clip in trained.values()} and len(teacher.heard_audio) == 48
        assert teacher.description["corpora"] == ["emodb"] and teacher.description["corpora_licence"] == "CC0-1.0"
        assert teacher.description["speakers"] == SPLIT["train"]


def test_identity_follows_head_encoder_and_weights(settings: Callable[..., TuningSettings], tmp_path: Path) -> None:
    chosen = settings(layer=2, freeze=1, epochs=1)
    tune(chosen, tmp_path / "a")
    tune(chosen, tmp_path / "again")
    tune(chosen.model_copy(update={"seed": 1}), tmp_path / "b")
    identity = {
        (name, at): load_teacher(str(tmp_path / name), at=at).identity
        for name in ("a", "again", "b")
        for at in ("fc1", "fc2", "layer:1", "layer:2")
    }
    for at in ("fc1", "fc2", "layer:1", "layer:2"):
        assert identity["a", at] == identity["again", at]
    assert len({identity[name, at] for name in ("a", "b") for at in ("fc1", "fc2", "layer:2")}) == 6


# --- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values"),
    [("wav2vec2", {"freeze": "none"}), ("wavlm", {"layer": 2, "freeze": 1}), ("whisper", {"freeze": "all"})],
)
def test_a_tuning_that_is_interrupted_ends_with_the_same_weights(
    settings: Callable[..., TuningSettings], tmp_path: Path, kind: str, values: dict[str, Any]
) -> None:
    chosen = settings(kind, small={"dropout": 0.1}, **values)
    tune(chosen, tmp_path / "whole")
    for epoch in range(1, chosen.epochs + 1):
        with pytest.raises(KeyboardInterrupt):
            tune(chosen, tmp_path / "stopped", on_epoch=stop_after(epoch))
        with pytest.raises(SerError, match="unfinished; run the same sertool teacher tune again"):
            load_teacher(str(tmp_path / "stopped"))
        torch.rand(5)
        np.random.rand(5)
    assert tune(chosen, tmp_path / "stopped", on_epoch=pytest.fail)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert history(tmp_path / "whole") == history(tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "resume.safetensors").exists()
    assert not tune(chosen, tmp_path / "stopped", on_epoch=pytest.fail)


KILLED = """
import os, sys
from pathlib import Path
from sertool.teacher import tune as module
from sertool.teacher.tuned import parse_settings
import json

steps, forward = 0, module.TeacherNetwork.forward

def dying(network, prepared):
    global steps
    steps += network.training
    if steps == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
    return forward(network, prepared)

module.TeacherNetwork.forward = dying
module.tune(parse_settings(json.loads(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_killed_tuning_goes_on_to_the_same_weights(settings: Callable[..., TuningSettings], tmp_path: Path) -> None:
    chosen = settings("hubert", small={"dropout": 0.1}, layer=2, freeze=1)
    tune(chosen, tmp_path / "whole")
    for steps in (2, 5):  # 3 steps an epoch: inside the first, and inside the second that then comes first
        arguments = [chosen.model_dump_json(), str(tmp_path / "killed"), str(steps)]
        done = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
        assert done.returncode == -9
    assert len(history(tmp_path / "killed")) == 1
    tune(chosen, tmp_path / "killed")
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    assert history(tmp_path / "whole") == history(tmp_path / "killed")


def test_a_kill_between_encoder_and_heads_is_made_good(
    settings: Callable[..., TuningSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(layer=2, freeze=1)
    tune(chosen, tmp_path / "whole")

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sertool.teacher.tune.save_heads", die)
        tune(chosen, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "encoder").is_dir()
    assert tune(chosen, tmp_path / "stopped", on_epoch=pytest.fail)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(settings: Callable[..., TuningSettings], tmp_path: Path) -> tuple[TuningSettings, Path]:
    """A tuning of a copied encoder that was stopped after its first epoch."""
    chosen = settings(layer=1, freeze="all")
    own = shutil.copytree(chosen.encoder, tmp_path / "own-encoder")
    chosen = chosen.model_copy(update={"encoder": str(own)})
    with pytest.raises(KeyboardInterrupt):
        tune(chosen, tmp_path / "teacher", on_epoch=stop_after(1))
    return chosen, tmp_path / "teacher"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 4}, r"holds a tuning with epochs = 3, not 4; give another folder with -o"),
        ({"layer": 2}, r"holds a tuning with layer = 1, not 2"),
        ({"freeze": "none"}, r"holds a tuning with freeze = 'all', not 'none'"),
    ],
)
def test_a_folder_with_another_tuning_is_refused(
    begun: tuple[TuningSettings, Path], change: dict[str, Any], message: str
) -> None:
    chosen, folder = begun
    with pytest.raises(UsageError, match=message):
        tune(chosen.model_copy(update=change), folder)


def test_a_tuning_on_other_data_or_another_encoder_is_not_gone_on_with(
    begun: tuple[TuningSettings, Path], own_tones: Any, tmp_path: Path
) -> None:
    chosen, folder = begun
    split = Path(chosen.split)
    split.write_text(json.dumps({"folds": [SPLIT | {"train": ["ada", "bea", "dov"]}]}))
    with pytest.raises(UsageError, match="holds a tuning on split"):
        tune(chosen, folder)
    split.write_text(json.dumps({"folds": [SPLIT]}))
    save_small_encoder(Path(chosen.encoder), "whisper", seed=5)
    with pytest.raises(UsageError, match=r"was begun with other weights than .*own-encoder has now"):
        tune(chosen, folder)


def test_a_clip_that_changed_is_named(own_tones: Any, settings: Callable[..., TuningSettings], tmp_path: Path) -> None:
    chosen = settings(layer=1, freeze="all", manifest=str(own_tones.manifest))
    tune(chosen, tmp_path / "teacher")
    shutil.copy(own_tones.folder / "ada-joy-1.wav", own_tones.folder / "ada-joy-0.wav")
    with pytest.raises(
        UsageError, match=r"on other clips: in .*manifest\.csv, clip 'ada-joy-0\.wav' has another audio"
    ):
        tune(chosen, tmp_path / "teacher")


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_damaged_resume_file_is_named(begun: tuple[TuningSettings, Path], damage: str) -> None:
    chosen, folder = begun
    path = folder / "resume.safetensors"
    path.write_bytes(path.read_bytes()[:-50] if damage == "truncated" else b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(SerError, match=r"resume\.safetensors: damaged; delete it to start this run again"):
        tune(chosen, folder)


def test_a_loss_that_is_not_a_number_stops_the_tuning(settings: Callable[..., TuningSettings], tmp_path: Path) -> None:
    with pytest.raises(SerError, match=r"tuning diverged in epoch \d: the loss is (nan|inf); lower the learning rate"):
        tune(settings(layer=2, freeze=1, learning_rate=1e30), tmp_path / "teacher")


def test_an_encoder_with_nan_weights_is_named_by_the_first_clip(
    settings: Callable[..., TuningSettings], tmp_path: Path
) -> None:
    folder = save_small_encoder(tmp_path / "broken", "whisper")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["layers.0.fc1.weight"][:] = np.nan
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AudioError, match=r"\.wav: broken gives no finite numbers for it"):
        tune(settings(layer=1, freeze="all", encoder=str(folder)), tmp_path / "teacher")


@pytest.fixture(scope="module")
def tuned(tones: Any, small_encoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen teacher; shared and therefore never changed: see ``own_tuned``."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "split.json").write_text(json.dumps({"folds": [SPLIT]}))
    encoder = shutil.copytree(small_encoder("whisper"), folder / "public")
    content = {"encoder": str(encoder), "manifest": str(tones.manifest), "split": str(folder / "split.json"),
               "corpus": "tones", "layer": 2, "freeze": 1, "epochs": 1, "window_samples": WINDOW}  # fmt: skip
    tune(parse_settings(content), folder / "partly")
    tune(parse_settings(content | {"freeze": "all"}), folder / "frozen")
    return folder


@pytest.fixture
def own_tuned(tuned: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(tuned, tmp_path / "tuned")
    record = folder / "frozen" / "tuning.json"
    record.write_text(record.read_text().replace(str(tuned / "public"), str(folder / "public")))
    return folder


def drop_head(path: Path) -> None:
    heads = safetensors.torch.load_file(path)
    heads.pop("fc2.bias")
    safetensors.torch.save_file(heads, path)


def spoil_head(path: Path) -> None:
    heads = safetensors.torch.load_file(path)
    heads["fc1.weight"][0, 0] = np.inf
    safetensors.torch.save_file(heads, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-9]),
            "damaged, or not the heads of this teacher; tune again",
        ),
        (lambda path: path.write_bytes(b""), "damaged, or not the heads of this teacher"),
        (drop_head, "damaged, or not the heads of this teacher"),
        (spoil_head, "holds infinite numbers; tune again"),
    ],
)
def test_damaged_heads_are_refused(own_tuned: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(own_tuned / "frozen" / "heads.safetensors")
    with pytest.raises(ArtifactError, match=rf"heads\.safetensors: {message}") as caught:
        load_teacher(str(own_tuned / "frozen"))
    assert "\n" not in str(caught.value)


def test_an_encoder_that_is_another_or_gone_by_now_is_refused(own_tuned: Path) -> None:
    assert load_teacher(str(own_tuned / "frozen")).dimension == 256
    save_small_encoder(own_tuned / "public", "whisper", seed=8)
    with pytest.raises(ArtifactError, match=r"public has other weights than when this teacher was tuned"):
        load_teacher(str(own_tuned / "frozen"))
    shutil.rmtree(own_tuned / "public")
    with pytest.raises(UsageError, match="public: no such folder"):
        load_teacher(str(own_tuned / "frozen"))
    # One that was trained itself needs no other folder, but its own encoder as it was.
    assert load_teacher(str(own_tuned / "partly")).dimension == 256
    save_small_encoder(own_tuned / "partly" / "encoder", "whisper", seed=8)
    with pytest.raises(ArtifactError, match=r"encoder has other weights than when this teacher was tuned"):
        load_teacher(str(own_tuned / "partly"))


def test_a_teacher_that_forgot_whom_it_heard_is_refused(own_tuned: Path) -> None:
    (own_tuned / "frozen" / "trained.json").unlink()
    with pytest.raises(SerError, match=r"trained\.json: missing, nobody knows what was tuned on; tune again"):
        load_teacher(str(own_tuned / "frozen"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {"epochs": "many"}, "labels": [], "encoder": {}}'])
def test_a_damaged_record_is_refused(own_tuned: Path, text: str) -> None:
    (own_tuned / "frozen" / "tuning.json").write_text(text)
    with pytest.raises(SerError, match=r"tuning\.json: damaged; tune again") as caught:
        load_teacher(str(own_tuned / "frozen"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("frozen", {"layer": 3}, r"tuned up to layer 2, no layer 3; valid: fc1, fc2, layer:0 to layer:2"),
        ("frozen", {"at": "fc3"}, r"--at 'fc3': no such place; did you mean 'fc2'\? valid: fc1, fc2, layer:K"),
        ("frozen", {"at": "layer:x"}, r"--at 'layer:x': no such place"),
        ("frozen", {"at": "fc1", "layer": 1}, r"--layer 1 and --at 'fc1': give one of them"),
        ("public", {"at": "fc1"}, r"an encoder has no fc1; give --at layer:K, or tune it: sertool teacher tune"),
        ("partly/encoder", {}, r"was tuned, and only the whole teacher knows on whom; embed with --teacher .*partly"),
    ],
)
def test_a_place_that_is_not_there_is_refused(tuned: Path, source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_teacher(str(tuned / source), **options)


def test_layer_may_be_given_either_way(tuned: Path) -> None:
    assert load_teacher(str(tuned / "public"), at="layer:1").identity == load_teacher(str(tuned / "public"), 1).identity
    assert load_teacher(str(tuned / "frozen")).identity == load_teacher(str(tuned / "frozen"), at="fc1").identity


def test_a_tuned_encoder_is_not_tuned_again(
    tuned: Path, settings: Callable[..., TuningSettings], tmp_path: Path
) -> None:
    for source in ("partly", "partly/encoder"):
        with pytest.raises(UsageError, match="was tuned, and only the whole teacher knows on whom"):
            tune(settings(encoder=str(tuned / source)), tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


# --- several processes ---------------------------------------------------------------------------------------------


@pytest.fixture
def tune_in_two(
    tones: Any, split: Path, run_in: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> Callable[[Path], Path]:
    """Return a function that tunes an encoder in two processes, as the settings ``BRIEF`` say."""

    def in_two(encoder: Path) -> Path:
        options = ["--encoder", encoder, "--manifest", tones.manifest, "--split", split, "--corpus", "tones"]
        for name, value in {"seconds": WINDOW / 16000, "threads": 1, "precision": "fp32", **BRIEF}.items():
            options += [f"--{name.replace('_', '-')}", value]
        code, out, err = run_in(2, "teacher", "tune", *options, "-o", tmp_path / "two")
        assert code == 0, err
        assert out.count("tuned; now run: sertool embed") == 1
        assert [line for line in err.splitlines() if line.endswith("in fp32, 2 processes")]
        return tmp_path / "two"

    return in_two


BRIEF = {"epochs": 2, "batch_size": 47, "learning_rate": 1e-4}
"""Of 48 clips, so the last batch has one."""


@pytest.mark.slow
def test_several_processes_tune_the_teacher_of_one(
    settings: Callable[..., TuningSettings],
    small_encoder: Callable[..., Path],
    tune_in_two: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    two, one = tune_in_two(small_encoder("whisper")), tmp_path / "one"
    tune(settings(**BRIEF), one)
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (one, two)]
    assert names[0] == names[1]
    ours, theirs = weights_of(two), weights_of(one)
    assert max(float((ours[name] - tensor).norm() / tensor.norm()) for name, tensor in theirs.items()) < 1e-4
    assert read_metrics(two).keys() == read_metrics(one).keys() == {"validation", "test"}


@pytest.mark.slow
def test_several_processes_leave_out_other_layers(
    small_encoder: Callable[..., Path], tune_in_two: Callable[[Path], Path]
) -> None:
    tuned = weights_of(tune_in_two(small_encoder("wav2vec2", dropout=0.5)))
    before = safetensors.torch.load_file(small_encoder("wav2vec2", dropout=0.5) / "model.safetensors")
    moved = [not torch.equal(tuned[f"model.safetensors {name}"], tensor) for name, tensor in before.items()]
    assert sum(moved) > 10
