"""The command line of the tuned teacher, from encoder to graph."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
import transformers
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from sertool.run import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

SPLIT = {"train": ["ada", "bea", "dov"], "validation": ["cyd", "eli"], "test": ["fox"]}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Whisper encoder with random weights; shared and therefore never changed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder") / "small-whisper"
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, max_source_positions=60
    )
    WhisperEncoder(config).save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture
def tune(tones: Any, encoder: Path, sertool: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Run ``sertool teacher tune`` on the tones into ``teacher``; a later option replaces an earlier one."""
    (tmp_path / "split.json").write_text(json.dumps({"folds": [SPLIT]}))
    basis = [
        "--encoder", encoder, "--manifest", tones.manifest, "--split", tmp_path / "split.json", "--layer", 1,
        "--freeze", "all", "--head-learning-rate", 1e-2, "--epochs", 2, "--seconds", 0.6, "--threads", 1,
        "--precision", "fp32", "-o", tmp_path / "teacher",
    ]  # fmt: skip
    return lambda *options: sertool("teacher", "tune", *basis, *options)


def test_the_command_tunes_and_says_what_came_of_it(tune: Callable[..., Any], tmp_path: Path) -> None:
    outcome = tune()
    folder = tmp_path / "teacher"
    metrics = read_metrics(folder)
    test = metrics["test"]
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        *(
            f"{part}: accuracy {entry['accuracy']:.1%}, UAR {entry['uar']:.1%}"
            + (
                " (95 % interval {:.1%} to {:.1%} over speakers)".format(*entry["uar_interval"])
                if part != "test"
                else ""
            )
            + f", {entry['items']} clips"
            for part, entry in (("validation", metrics["validation"]), ("test", test))
        ),
        f"{folder}: tuned; now run: sertool embed MANIFEST --teacher {folder} --at fc1",
    ]
    start, *epochs = outcome.err.splitlines()
    assert start == f"{folder}: 36 clips, 3 labels; small-whisper up to layer 1, 5,123 weights on cpu in fp32"
    assert [line.split(",")[0].split(": ")[1] for line in epochs] == ["epoch 1/2", "epoch 2/2"] or all(
        "validation UAR" in line for line in epochs
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "environment.json", "heads.safetensors", "history.csv", "metrics.json", "predictions-validation.csv",
        "predictions.csv", "split.json", "trained.json", "tuning.json",
    ]  # fmt: skip
    record = json.loads((folder / "tuning.json").read_text())
    assert record["settings"]["corpus"] == "manifest" and record["settings"]["window_samples"] == 9600
    assert record["labels"] == ["anger", "joy", "sadness"] and record["encoder"]["name"] == "small-whisper"

    again = tune("--json")
    assert (again.code, again.err) == (0, f"{folder}: finished already\n")
    assert json.loads(again.out) == {"folder": str(folder), "metrics": metrics}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoder", "no-such-folder"], "no-such-folder: no such folder; give a folder with a speech encoder"),
        (["--layer", "9"], "no layer 9; valid: 0 (before the first block) to 2 (the last block)"),
        (["--freeze", "some"], "--freeze 'some': expected none, all, or a number of blocks"),
        (["--freeze", "1"], "freeze 1: layer 1 stands on 1 blocks; valid: none, fewer, all"),
        (["--fold", "2"], "no fold 2; valid: 1 to 1"),
        (["--part", "test"], "parts.1 = 'test': valid: train, validation"),
        (["--learning-rate", "0"], "learning_rate = 0.0: input should be greater than 0"),
        (["--learning-rate", "nan"], "learning_rate = nan: input should be"),
        (["--precision", "fp64"], "precision = 'fp64': did you mean 'fp32'? valid: auto, bf16, fp32"),
        (["--seconds", "31"], "Invalid value for '--seconds'"),
        (["--epochs", "0"], "Invalid value for '--epochs'"),
        (["--manifest", "gone.csv"], "gone.csv: no such manifest"),
        (["--split", "gone.json"], "gone.json: no such split"),
    ],
)
def test_bad_options_give_one_line_and_code_2(
    tune: Callable[..., Any], tmp_path: Path, options: list[str], message: str
) -> None:
    outcome = tune(*options)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "teacher").exists()


def test_bad_data_gives_one_line(own_tones: Any, tune: Callable[..., Any], tmp_path: Path) -> None:
    split = tmp_path / "other.json"
    split.write_text(json.dumps({"folds": [{"train": ["ada", "nobody"], "test": ["fox"]}]}))
    outcome = tune("--split", split)
    assert outcome.code == 2 and "no clip of speaker 'nobody'" in outcome.err

    text = own_tones.manifest.read_text()
    one_label = "\n".join(line for line in text.splitlines() if ",joy," in line or line.startswith("file"))
    own_tones.manifest.write_text(one_label + "\n")
    outcome = tune("--manifest", own_tones.manifest)
    assert outcome.code == 2 and "all training clips are labelled 'joy'; needed: two labels" in outcome.err

    own_tones.manifest.write_text(text.replace("fox-joy-0.wav,fox,joy", "fox-joy-0.wav,fox,surprise"))
    outcome = tune("--manifest", own_tones.manifest)
    assert outcome.code == 2 and "trains without 'surprise'" in outcome.err

    own_tones.manifest.write_text(text)
    (own_tones.folder / "ada-joy-0.wav").write_bytes(b"")
    outcome = tune("--manifest", own_tones.manifest)
    assert outcome.code == 1 and "ada-joy-0.wav: not audio" in outcome.err
    soundfile.write(own_tones.folder / "ada-joy-0.wav", np.full(9600, np.nan, np.float32), 16000, subtype="FLOAT")
    outcome = tune("--manifest", own_tones.manifest)
    assert outcome.code == 1 and "ada-joy-0.wav" in outcome.err and outcome.err.count("\n") == 1
    (own_tones.folder / "ada-joy-0.wav").unlink()
    outcome = tune("--manifest", own_tones.manifest)
    assert outcome.code == 1 and "ada-joy-0.wav: no such audio file" in outcome.err


def test_a_folder_of_another_tuning_is_left_alone(tune: Callable[..., Any], tmp_path: Path) -> None:
    tune()
    before = {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir()}
    outcome = tune("--seed", 1)
    assert outcome.code == 2 and "holds a tuning with seed = 0, not 1; give another folder with -o" in outcome.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir()} == before


@pytest.mark.parametrize("mark", ["recipe.toml", "teacher.json", "config.json"])
def test_a_folder_that_holds_something_else_is_left_alone(tune: Callable[..., Any], tmp_path: Path, mark: str) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / mark).touch()
    outcome = tune()
    assert outcome.code == 2 and f"({mark}); give another folder with -o" in outcome.err
    assert [path.name for path in (tmp_path / "teacher").iterdir()] == [mark]


def test_control_c_is_one_line_and_the_same_command_goes_on(
    tune: Callable[..., Any], tones: Any, encoder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "sertool", "teacher", "tune", "--encoder", encoder, "--manifest", tones.manifest,
               "--split", tmp_path / "split.json", "--epochs", 2000, "--seconds", 0.6,
               "-o", tmp_path / "stopped"]  # fmt: skip
    process = subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not (tmp_path / "stopped" / "history.csv").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "sertool: interrupted; the same command goes on from here"
    assert "Traceback" not in err and (tmp_path / "stopped" / "resume.safetensors").is_file()


# --- from teacher to graph -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "dimension"),
    [(["--at", "fc1"], 256), ([], 256), (["--at", "fc2"], 3), (["--at", "layer:1"], 16), (["--layer", "0"], 16)],
)
def test_a_tuned_teacher_embeds(
    tune: Callable[..., Any], tones: Any, sertool: Callable[..., Any], tmp_path: Path, at: list[str], dimension: int
) -> None:
    tune()
    teacher, folder = tmp_path / "teacher", tmp_path / "embeddings"
    outcome = sertool("embed", tones.manifest, "--teacher", teacher, *at, "-o", folder, "--threads", 1)
    place = at[1].replace(":", " ") if at and at[0] == "--at" else "layer 0" if at else "fc1"
    assert outcome.code == 0
    assert outcome.out == f"{folder}: 72 clips x {dimension} numbers by teacher {place}, 72 computed now\n"
    assert len(json.loads((folder / "heard.json").read_text())) == 36


def test_a_graph_on_what_the_teacher_heard_is_refused(
    tune: Callable[..., Any], tones: Any, sertool: Callable[..., Any], tmp_path: Path
) -> None:
    tune()
    teacher = tmp_path / "teacher"

    def graph(folder: Path, speakers: dict[str, list[str]], *options: str) -> Any:
        name = folder.name
        split = tmp_path / f"{name}.json"
        split.write_text(json.dumps({"folds": [speakers]}))
        embedded = sertool(
            "embed", folder / "manifest.csv", "--teacher", teacher, "-o", tmp_path / name, "--threads", 1
        )
        assert embedded.code == 0
        return sertool("graph", tmp_path / name, "--manifest", folder / "manifest.csv", "--split", split,
                       "-o", tmp_path / f"{name}-graph", "--threshold", "0", *options)  # fmt: skip

    # The same audio under other names and of speakers called otherwise: known by its content.
    target = tmp_path / "target"
    target.mkdir()
    lines = tones.manifest.read_text().splitlines()
    for line in lines[1:]:
        file = line.split(",")[0]
        shutil.copy(tones.folder / file, target / f"new-{file}")
    rows = ["new-{},x{},{},{}".format(*line.split(",")) for line in lines[1:]]
    (target / "manifest.csv").write_text("\n".join([lines[0], *rows]) + "\n")
    heard = graph(target, {"train": ["xcyd", "xeli"], "test": ["xada", "xfox"]})
    assert heard.code == 2 and heard.out == ""
    assert "teacher fc1 was trained on test speaker 'xada' of fold 1; results would be too good" in heard.err
    joined = graph(target, {"train": ["xcyd", "xada"], "test": ["xeli", "xfox"]})
    assert joined.code == 2 and "was trained on train speaker 'xada' of fold 1" in joined.err
    assert not (tmp_path / "target-graph").exists()
    unheard = graph(target, {"train": ["xcyd", "xeli"], "test": ["xfox"]})
    assert (unheard.code, unheard.err) == (0, "")
    allowed = graph(target, {"train": ["xcyd", "xada"], "test": ["xbea", "xfox"]}, "--allow-seen")
    assert allowed.code == 0
    report = json.loads((tmp_path / "target-graph" / "fold-1" / "graph.json").read_text())
    assert report["seen"] == {"train": ["xada"], "validation": [], "test": ["xbea"]}
    assert report["teacher"]["corpora"] == ["manifest"] and report["teacher"]["speakers"] == SPLIT["train"]


def test_heads_that_are_damaged_are_one_line(
    tune: Callable[..., Any], tones: Any, sertool: Callable[..., Any], tmp_path: Path
) -> None:
    tune()
    path = tmp_path / "teacher" / "heads.safetensors"
    heads = safetensors.torch.load_file(path)
    safetensors.torch.save_file({"fc1.weight": heads["fc1.weight"]}, path)
    outcome = sertool("embed", tones.manifest, "--teacher", tmp_path / "teacher", "-o", tmp_path / "embeddings")
    assert (outcome.code, outcome.out) == (1, "") and outcome.err.count("\n") == 1
    assert "heads.safetensors: damaged, or not the heads of this teacher; tune again" in outcome.err
    assert not (tmp_path / "embeddings").exists()
