"""Recipes: every wrong key and value is named, and what is written is what is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomllib
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import UsageError
from sertool.networks import NETWORKS
from sertool.recipe import PRESETS, SECTIONS, Recipe, load_recipe, parse_recipe, preset, write_recipe

# A key, a value that it does not take, and what the message must say of it.
WRONG_VALUES = [
    ("data.manifest", 5, "valid string"),
    ("data.split", ["a"], "valid string"),
    ("data.fold", 0, "greater than or equal to 1"),
    ("data.parts", [], "at least 1 item"),
    ("data.parts", "train", "valid list"),
    ("data.parts", ["test"], "valid: train, validation"),
    ("data.parts", ["trian"], "did you mean 'train'?"),
    ("data.labelled_share", 0.0, "greater than 0"),
    ("data.labelled_share", 1.5, "less than or equal to 1"),
    ("data.labelled_share", float("nan"), "finite number"),
    ("data.corpus", False, "valid string"),
    ("data.licence", 1, "valid string"),
    ("data.window_samples", 8447, "greater than or equal to 8448"),
    ("data.window_samples", 10**9, "less than or equal to 960000"),
    ("data.clips", "onec", "did you mean 'once'? valid: once, tiled"),
    ("normalization.kind", "constants", "did you mean 'constant'? valid: constant, running"),
    ("normalization.prior", 0.0, "greater than 0"),
    ("normalization.memory", -1.0, "greater than or equal to 0"),
    ("normalization.by", "corpora", "did you mean 'corpus'? valid: all, corpus"),
    ("normalization.personal", 1.5, "less than or equal to 1"),
    ("normalization.personal_label", 3, "valid string"),
    ("normalization.personal_seconds", 1.0, "greater than or equal to 5"),
    ("augmentation.excerpt_frames", -1, "greater than or equal to 0"),
    ("augmentation.masks", 11, "less than or equal to 10"),
    ("augmentation.mask_bands", 65, "less than or equal to 64"),
    ("augmentation.mask_frames", -1, "greater than or equal to 0"),
    ("augmentation.warp", float("nan"), "finite number"),
    ("augmentation.mixup", 1.1, "less than or equal to 1"),
    ("augmentation.noise", 1.5, "less than or equal to 1"),
    ("augmentation.music", 1.5, "less than or equal to 1"),
    ("augmentation.room", -0.5, "greater than or equal to 0"),
    ("augmentation.band", 1.5, "less than or equal to 1"),
    ("augmentation.shortest_frames", -1, "greater than or equal to 0"),
    ("augmentation.loudness", -1.0, "greater than or equal to 0"),
    ("augmentation.newcomers", -0.1, "greater than or equal to 0"),
    ("training.schedule", "cosin", "did you mean 'cosine'? valid: cosine, steps"),
    ("training.warmup_epochs", -1.0, "greater than or equal to 0"),
    ("training.weight_decay", 2.0, "less than or equal to 1"),
    ("training.label_smoothing", 1.0, "less than 1"),
    ("training.average", 1.0, "less than 1"),
    ("network.name", "resnet", "did you mean 'resnet9'? valid: cnn6, mobilenet15, resnet9, vgg15"),
    ("network.time_padding", "casual", "did you mean 'causal'? valid: causal, same"),
    ("network.width", 0.1, "greater than or equal to 0.125"),
    ("neighbours.graph", 3, "valid string"),
    ("neighbours.count", 0, "greater than or equal to 1"),
    ("neighbours.alpha", -0.1, "greater than or equal to 0"),
    ("neighbours.alpha", float("nan"), "finite number"),
    ("neighbours.distance", "l3", "valid: cosine, l1, l2"),
    ("neighbours.layer", "fc3", "valid: fc1, fc2"),
    ("neighbours.mode", "bnak", "did you mean 'bank'? valid: bank, copies, pass"),
    ("training.epochs", 0, "greater than or equal to 1"),
    ("training.epochs", 2.5, "valid integer"),
    ("training.epochs", "50", "valid integer"),
    ("training.epochs", True, "valid integer"),
    ("training.batch_size", 1, "greater than or equal to 2"),
    ("training.learning_rate", 0.0, "greater than 0"),
    ("training.learning_rate", float("inf"), "finite number"),
    ("training.decay", 1.5, "less than or equal to 1"),
    ("training.decay_epochs", 0, "greater than or equal to 1"),
    ("training.start", 3, "valid string"),
    ("training.quantization_aware", "yes", "valid boolean"),
    ("distillation.embeddings", 3, "valid string"),
    ("distillation.embedding_weight", -1.0, "greater than or equal to 0"),
    ("distillation.relation_weight", float("inf"), "finite number"),
    ("distillation.logit_weight", 1.5, "less than or equal to 1"),
    ("distillation.temperature", 0.0, "greater than 0"),
    ("invariance.to", "speeker", "did you mean 'speaker'?"),
    ("invariance.weight", -0.1, "greater than or equal to 0"),
    ("training.context", 1.5, "less than or equal to 1"),
    ("training.context", -0.5, "greater than or equal to 0"),
    ("training.seed", -1, "greater than or equal to 0"),
    ("training.seed", 2**64, "less than"),
    ("training.precision", "fp16", "valid: auto, bf16, fp32"),
    ("training.device", "gpu", "valid: auto, cpu, cuda"),
    ("training.threads", -1, "greater than or equal to 0"),
]
KEYS = [(section, key) for section, table in SECTIONS.items() for key in table.model_fields]


def test_the_defaults_are_the_papers_settings() -> None:
    training, neighbours = Recipe().training, Recipe().neighbours
    assert (training.epochs, training.batch_size, training.learning_rate) == (50, 16, 1e-3)
    assert (training.decay, training.decay_epochs) == (0.9, 5)
    assert (neighbours.distance, neighbours.layer, neighbours.mode) == ("cosine", "fc1", "pass")
    assert Recipe().data.window_samples == 95744


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": {"clips": "once"}}, "needs network.time_padding = 'causal'"),
        ({"normalization": {"kind": "running"}}, "needs data.clips = 'once'"),
        ({"normalization": {"personal": 0.5}}, "normalization.personal needs data.clips = 'once'"),
        ({"augmentation": {"noise": 0.5}}, "augmentation.noise needs data.clips = 'once'"),
        ({"augmentation": {"loudness": 6.0}}, "augmentation.loudness needs data.clips = 'once'"),
        ({"augmentation": {"music": 0.5}}, "augmentation.music needs data.clips = 'once'"),
        ({"augmentation": {"room": 0.5}}, "augmentation.room needs data.clips = 'once'"),
        ({"augmentation": {"band": 0.5}}, "augmentation.band needs data.clips = 'once'"),
        ({"augmentation": {"shortest_frames": 48}}, "augmentation.shortest_frames needs data.clips = 'once'"),
        (
            {
                "data": {"clips": "once"},
                "network": {"time_padding": "causal"},
                "augmentation": {"shortest_frames": 99, "excerpt_frames": 48},
            },
            "augmentation.shortest_frames = 99: must be at most excerpt_frames, 48",
        ),
        ({"normalization": {"by": "corpus"}}, "normalization.by needs data.clips = 'once'"),
        ({"augmentation": {"excerpt_frames": 31}}, "valid: 0 for all, or at least 32"),
        ({"augmentation": {"newcomers": 0.1}}, "needs normalization.kind = 'running'"),
        (
            {"distillation": {"embeddings": "emb"}},
            "teach nothing without a weight; set one of distillation.embedding_w",
        ),
        ({"distillation": {"logit_weight": 0.5}}, "distillation.logit_weight = 0.5 needs distillation.embeddings, a f"),
        (
            {
                "distillation": {"embeddings": "emb", "embedding_weight": 1.0},
                "training": {"quantization_aware": True, "start": "runs/base"},
            },
            "distillation.embedding_weight = 1 begins with a map that has learnt nothing.*; set it to 0",
        ),
        ({"training": {"schedule": "cosine", "epochs": 5, "warmup_epochs": 5.0}}, "must be less than training.epochs"),
    ],
)
def test_values_that_do_not_go_together_are_refused(content: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipe(content)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_whole_recipe(name: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(write_recipe(preset(name)))
    assert load_recipe(tmp_path / "recipe.toml") == preset(name)
    assert (preset(name) == Recipe()) == (name == "paper")


def test_another_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'device'"):
        preset("devise")


@pytest.mark.parametrize(("name", "value", "reason"), WRONG_VALUES)
def test_a_wrong_value_is_named_with_what_is_valid(name: str, value: object, reason: str) -> None:
    section, key = name.split(".")
    with pytest.raises(UsageError) as caught:
        parse_recipe({section: {key: value}}, "recipe.toml")
    message = str(caught.value)
    assert message.startswith(f"recipe.toml: {name}") and reason in message
    assert "\n" not in message and "pydantic" not in message


def test_every_key_has_a_wrong_value_above() -> None:
    assert {name for name, _, _ in WRONG_VALUES} == {f"{section}.{key}" for section, key in KEYS}


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_a_misspelt_key_is_named_with_the_nearest(section: str, key: str) -> None:
    misspelt = key[:-1] + "_"
    with pytest.raises(UsageError) as caught:
        parse_recipe({section: {misspelt: 1}})
    assert f"no key {misspelt!r} in [{section}]; did you mean {key!r}? valid: " in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trainin": {}}, r"no section \[trainin\]; did you mean 'training'\?"),
        (
            {"epochs": 5},
            r"no section \[epochs\]; valid: augmentation, data, distillation, invariance, neighbours, network, norm",
        ),
        ({"training": 5}, r"training = 5: expected a section \[training\]"),
    ],
)
def test_wrong_sections_are_named(content: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipe(content)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({}, "quantization_aware needs a trained network to begin with: training.start, or sertool train --from RUN"),
        ({"start": "run", "precision": "bf16"}, "training.precision = 'bf16' is coarser than int8"),
    ],
)
def test_quantization_aware_training_has_its_conditions(training: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipe({"training": {"quantization_aware": True} | training})


def test_every_network_has_its_name_in_the_recipe_and_no_other_has() -> None:
    for name in NETWORKS:
        assert parse_recipe({"network": {"name": name}}).network.name == name
    with pytest.raises(UsageError, match=f"valid: {', '.join(sorted(NETWORKS))}"):
        parse_recipe({"network": {"name": ""}})


# --- files ---------------------------------------------------------------------------------------------------------


def test_what_is_written_for_the_defaults_parses_back_to_them() -> None:
    assert parse_recipe(tomllib.loads(write_recipe(Recipe()))) == Recipe()


def test_every_key_is_written_below_a_comment_that_explains_it() -> None:
    lines = write_recipe(Recipe()).splitlines()
    for section, key in KEYS:
        place = next(row for row, line in enumerate(lines) if line.startswith(f"{key} = "))
        description = SECTIONS[section].model_fields[key].description
        assert description and lines[place - 1] == f"# {description}"
    assert [line for line in lines if line.startswith("[")] == [f"[{section}]" for section in SECTIONS]


@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f")),
    alpha=st.floats(0, 1e300),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_text_and_number_survives_the_file(text: str, alpha: float, seed: int) -> None:
    recipe = parse_recipe(
        {
            "data": {"manifest": text, "parts": ["train", "validation"]},
            "neighbours": {"alpha": alpha},
            "training": {"seed": seed},
        }
    )
    assert parse_recipe(tomllib.loads(write_recipe(recipe))) == recipe


def test_keys_that_a_file_leaves_out_take_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("\ufeff[training]\nepochs = 7\nlearning_rate = 1\n")
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert (recipe.training.epochs, recipe.training.learning_rate) == (7, 1.0)
    assert (recipe.data, recipe.network) == (Recipe().data, Recipe().network)


@pytest.mark.parametrize("content", [b"[training\n", b"epochs: 5\n", b"\xff\xfe", b"[data]\n[data]\n"])
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(UsageError, match=r"recipe\.toml: not TOML"):
        load_recipe(tmp_path / "recipe.toml")


def test_a_missing_file_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"recipe\.toml: no such recipe; write one with: sertool recipe new"):
        load_recipe(tmp_path / "recipe.toml")


# --- overrides -----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text('[training]\nepochs = 7\n[data]\nmanifest = "file.csv"\n')
    return path


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.epochs=10", 10),
        (" training.epochs = 10", 10),
        ("training.learning_rate=1e-4", 1e-4),
        ("network.name=cnn6", "cnn6"),
        ('network.name="cnn6"', "cnn6"),
        ("data.manifest=my corpus/a=b.csv", "my corpus/a=b.csv"),
        ('data.parts=["train", "validation"]', ("train", "validation")),
        ("neighbours.graph=", ""),
    ],
)
def test_an_override_replaces_a_value(recipe_file: Path, override: str, value: object) -> None:
    recipe = load_recipe(recipe_file, [override])
    section, key = override.partition("=")[0].strip().split(".")
    assert getattr(getattr(recipe, section), key) == value
    assert recipe.data.manifest == (value if key == "manifest" else "file.csv")


def test_the_last_override_wins(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["training.epochs=1", "training.epochs=2"]).training.epochs == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=3", "--set 'epochs=3': expected section.key=value"),
        ("training.epochs", "--set 'training.epochs': expected section.key=value"),
        ("trainin.epochs=3", "no section 'trainin'; did you mean 'training'"),
        ("training.epoch=3", r"no key 'epoch' in \[training\]; did you mean 'epochs'"),
        ("training.epochs=many", "training.epochs = 'many': input should be a valid integer"),
        ("network.name=resnet", "did you mean 'resnet9'"),
    ],
)
def test_a_wrong_override_is_named(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe(recipe_file, [override])


def test_an_override_of_a_key_that_should_be_a_section(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("training = 5\n")
    with pytest.raises(UsageError, match="the recipe's 'training' is not a section"):
        load_recipe(tmp_path / "recipe.toml", ["training.epochs=3"])
