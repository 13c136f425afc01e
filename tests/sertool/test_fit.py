"""Training: it learns, it resumes to the same bits, it never hears a test speaker, and it refuses what does not fit."""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import random
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
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional

from edge_runtime.errors import SerError, UsageError
from edge_runtime.frontend import FrontEnd, log_mel
from sertool.audio import content_hash
from sertool.corpora.manifest import load_manifest
from sertool.export.artifact import UNSPECIFIED_LICENCE, corpus_licence
from sertool.fit import EmbeddingBank, EpochReport, _companions, _look_up, fit
from sertool.losses import neighbour_loss
from sertool.metrics import confusion_matrix, unweighted_average_recall
from sertool.networks import Student, build_network, predict
from sertool.recipe import Neighbours, Recipe, write_recipe
from sertool.run import RunError, load_run

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    differing = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    assert not differing


def history(folder: Path) -> list[dict[str, float]]:
    with (folder / "history.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def without_seconds(folder: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history(folder)]


def stop_after(epoch: int) -> Callable[[EpochReport], None]:
    def stop(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise KeyboardInterrupt

    return stop


@pytest.fixture(scope="session")
def whole(tones: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs by mode of the neighbours; mobilenet15 has dropout."""
    folder = tmp_path_factory.mktemp("whole")
    for mode in ("bank", "pass"):
        fit(tones.recipe(graph=True, neighbours__mode=mode), folder / mode)
    return {mode: folder / mode for mode in ("bank", "pass")}


# --- resuming ------------------------------------------------------------------------------------------------------


def start_and_stop(command: list[str], run: Path, sent: signal.Signals) -> tuple[int, str]:
    """Start a training, send it a signal after its first epoch, and return its exit code and stderr."""
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that started the tests in the background made this process, and so its children, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    ) as process:
        while process.poll() is None and not (run / "history.csv").is_file():
            time.sleep(0.002)
        process.send_signal(sent)
        _, err = process.communicate()
    assert not (run / "checkpoint.safetensors").exists()
    return process.returncode, err


@pytest.mark.parametrize(("mode", "sent"), [("bank", signal.SIGKILL), ("pass", signal.SIGINT)])
def test_a_stopped_command_run_again_ends_with_the_weights_of_an_unstopped_one(
    tones: Any, tmp_path: Path, mode: str, sent: signal.Signals
) -> None:
    recipe = tones.recipe(graph=True, neighbours__mode=mode, training__epochs=8)
    file, run = tmp_path / "recipe.toml", tmp_path / "run"
    file.write_text(write_recipe(recipe))
    command = [sys.executable, "-c", "from sertool.cli import main; main()", "train", str(file), "-o", str(run)]
    code, err = start_and_stop(command, run, sent)
    if sent == signal.SIGKILL:
        assert code == -signal.SIGKILL
        again = subprocess.run(command, check=True, capture_output=True, text=True)
        assert again.stdout.endswith(f"now run: sertool evaluate {run}\n")
    else:
        assert code == 130
        _, line = err.splitlines()  # after the one that says what is trained
        assert line.startswith("sertool: interrupted")
        fit(recipe, run)
    fit(recipe, tmp_path / "whole")
    assert_same_weights(run, tmp_path / "whole")
    assert without_seconds(run) == without_seconds(tmp_path / "whole")
    assert not (run / "resume.safetensors").exists()


def test_a_training_killed_at_any_moment_ends_with_the_weights_of_an_unstopped_one(tones: Any, tmp_path: Path) -> None:
    recipe = tones.recipe(graph=True, neighbours__mode="bank")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["sertool.fit"])  # torch is imported once

    def train(name: str, seconds: float | None = None) -> None:
        process = processes.Process(target=fit, args=(recipe, tmp_path / name))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()

    began = time.monotonic()
    train("whole")
    moments = [random.uniform(0, 1.05) * (time.monotonic() - began) for _ in range(2)]
    for seconds in moments:
        train("run", seconds)
    train("run")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert without_seconds(tmp_path / "run") == without_seconds(tmp_path / "whole"), moments


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("bank", {"neighbours__layer": "fc2", "neighbours__distance": "l2", "neighbours__alpha": 0.1}),
        ("copies", {"training__epochs": 2}),
        (
            "pass",
            {
                "network__name": "resnet9",
                "network__time_padding": "causal",
                "training__context": 0.5,
                "training__epochs": 2,
            },
        ),
    ],
)
def test_any_recipe_resumes_to_the_same_weights(tones: Any, tmp_path: Path, mode: str, values: dict[str, Any]) -> None:
    recipe = tones.recipe(graph=True, neighbours__mode=mode, **values)
    fit(recipe, tmp_path / "whole")
    for epoch in range(1, recipe.training.epochs + 1):  # interrupted after every epoch, the last one too
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, tmp_path / "stopped", on_epoch=stop_after(epoch))
    fit(recipe, tmp_path / "stopped", on_epoch=pytest.fail)
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")
    assert without_seconds(tmp_path / "stopped") == without_seconds(tmp_path / "whole")


def test_resuming_does_not_hang_on_what_the_process_did_before(
    tones: Any, whole: dict[str, Path], tmp_path: Path
) -> None:
    recipe = tones.recipe(graph=True, neighbours__mode="bank")
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "run", on_epoch=stop_after(2))
    torch.manual_seed(1234)
    torch.rand(7)
    np.random.default_rng().random(7)
    fit(recipe, tmp_path / "run")
    assert_same_weights(tmp_path / "run", whole["bank"])


def test_a_finished_run_is_not_trained_again(tones: Any, whole: dict[str, Path]) -> None:
    before = {path: path.read_bytes() for path in whole["bank"].iterdir() if path.is_file()}
    assert not fit(tones.recipe(graph=True, neighbours__mode="bank"), whole["bank"], on_epoch=pytest.fail)
    assert {path: path.read_bytes() for path in whole["bank"].iterdir() if path.is_file()} == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "garbage"])
def test_a_damaged_resume_file_is_named(tones: Any, tmp_path: Path, damage: str) -> None:
    recipe = tones.recipe()
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "run", on_epoch=stop_after(1))
    path = tmp_path / "run" / "resume.safetensors"
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[:-100], "empty": b"", "foreign": b"\x02\0\0\0\0\0\0\0{}", "garbage": b"x" * 100}[damage]
    )
    with pytest.raises(RunError, match=r"resume\.safetensors: damaged; delete it to start this run again"):
        fit(recipe, tmp_path / "run")
    path.unlink()
    fit(recipe, tmp_path / "run", on_epoch=lambda report: None)
    assert len(history(tmp_path / "run")) == recipe.training.epochs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("recipe", r"holds a run with training\.epochs = \d, not 5; give another folder with -o"),
        ("split", r"holds a run on split \w+, but .*split\.json is now \w+; give another folder with -o"),
        ("audio", r"holds a run on other clips: in .*manifest\.csv, clip 'ada-joy-0\.wav' has another audio; give"),
        ("label", r"holds a run on other clips: in .*manifest\.csv, clip 'ada-joy-0\.wav' has another label; give"),
        ("new clip", r"holds a run on other clips: in .*manifest\.csv, clip 'new\.wav' is new; give another folder"),
        ("graph", r"holds a run on another graph than .*fold-1/graph\.csv is now; give another folder with -o"),
    ],
)
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_goes_on_and_is_called_finished_with_its_own_data_only(
    own_tones: Any, tmp_path: Path, change: str, message: str, epochs: int
) -> None:
    recipe = own_tones.recipe(graph=change != "new clip", training__epochs=epochs)
    with contextlib.suppress(KeyboardInterrupt):
        fit(recipe, tmp_path / "run", on_epoch=None if epochs == 1 else stop_after(1))
    assert (tmp_path / "run" / "checkpoint.safetensors").exists() == (epochs == 1)
    if change == "recipe":
        recipe = own_tones.recipe(graph=True, training__epochs=5)
    elif change == "split":
        split = json.loads(own_tones.split.read_text())
        own_tones.split.write_text(json.dumps({"folds": split["folds"][::-1]}))
    elif change == "audio":
        soundfile.write(own_tones.folder / "ada-joy-0.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 9600), 16000)
    elif change == "new clip":
        soundfile.write(own_tones.folder / "new.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 9600), 16000)
        own_tones.manifest.write_text(own_tones.manifest.read_text() + "new.wav,ada,joy,f\n")
    elif change == "label":
        text = own_tones.manifest.read_text()
        own_tones.manifest.write_text(text.replace("ada-joy-0.wav,ada,joy", "ada-joy-0.wav,ada,anger"))
    else:
        path = own_tones.graph / "fold-1" / "graph.csv"
        head, first, *rest = path.read_text().splitlines()
        clip = first.split(",")[0]
        path.write_text("\n".join([head, f"{clip},,", *(row for row in rest if not row.startswith(clip))]))
    with pytest.raises(UsageError, match=message):
        fit(recipe, tmp_path / "run", on_epoch=pytest.fail)


def test_a_finished_run_on_an_earlier_split_is_not_taken_for_this_one(own_tones: Any, tmp_path: Path) -> None:
    fit(own_tones.recipe(training__epochs=1), tmp_path / "run")
    split = json.loads(own_tones.split.read_text())
    own_tones.split.write_text(json.dumps({"folds": split["folds"][::-1]}))
    with pytest.raises(UsageError, match="holds a run on split"):
        fit(own_tones.recipe(training__epochs=1), tmp_path / "run")


# --- what decides the weights --------------------------------------------------------------------------------------


def test_test_speakers_touch_nothing(own_tones: Any, whole: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for path in own_tones.folder.glob("*.wav"):
        if path.name.startswith(("cyd", "fox")):
            soundfile.write(path, rng.uniform(-0.9, 0.9, 12000), 16000)
    fit(own_tones.recipe(graph=True, neighbours__mode="bank"), tmp_path / "run")
    assert_same_weights(tmp_path / "run", whole["bank"])
    assert load_run(tmp_path / "run").normalization == load_run(whole["bank"]).normalization


def test_the_order_of_the_manifest_changes_nothing(own_tones: Any, whole: dict[str, Path], tmp_path: Path) -> None:
    head, *rows = own_tones.manifest.read_text().splitlines()
    shuffled = [rows[row] for row in np.random.default_rng(0).permutation(len(rows))]
    own_tones.manifest.write_text("\n".join([head, *shuffled]))
    fit(own_tones.recipe(graph=True, neighbours__mode="pass"), tmp_path / "run")
    assert_same_weights(tmp_path / "run", whole["pass"])


def test_the_seed_changes_the_weights(tones: Any, whole: dict[str, Path], tmp_path: Path) -> None:
    fit(tones.recipe(graph=True, neighbours__mode="bank", training__seed=1), tmp_path / "run")
    assert not torch.equal(weights(tmp_path / "run")["head.fc1.weight"], weights(whole["bank"])["head.fc1.weight"])


def test_without_alpha_a_bank_of_neighbours_changes_nothing(tones: Any, tmp_path: Path) -> None:
    fit(tones.recipe(training__epochs=2), tmp_path / "base")
    values = {"neighbours__alpha": 0.0, "training__epochs": 2}
    fit(tones.recipe(graph=True, neighbours__mode="bank", **values), tmp_path / "bank")
    assert_same_weights(tmp_path / "bank", tmp_path / "base")
    assert history(tmp_path / "bank")[1]["neighbour_loss"] > 0
    # Neighbours that go through the network take part in its batch statistics and its dropout, as in the paper.
    fit(tones.recipe(graph=True, neighbours__mode="pass", **values), tmp_path / "pass")
    name = "trunk.1.running_mean"
    assert not torch.equal(weights(tmp_path / "pass")[name], weights(tmp_path / "base")[name])


CAUSAL = {"network__name": "cnn6", "network__width": 0.125, "network__time_padding": "causal"}


@pytest.mark.parametrize("context", [0.0, 1.0])
def test_the_features_of_the_context_are_not_averaged(tones: Any, tmp_path: Path, context: float) -> None:
    one_step = {"training__epochs": 1, "training__batch_size": 48}
    fit(tones.recipe(**CAUSAL, **one_step, training__context=context), tmp_path / "run")

    manifest, front_end = load_manifest(tones.manifest), FrontEnd()
    clips = [clip for clip in manifest.clips if clip.speaker in {"ada", "bea", "dov", "eli"}]
    past = 64 * 256 if context else 0
    signals = [np.tile(clip.read(), 4)[-past % 9600 :][: past + 8448] for clip in clips]
    frames = load_run(tmp_path / "run").normalization.apply(np.stack([log_mel(s, front_end) for s in signals]))
    torch.manual_seed(0)
    network = build_network("cnn6", 3, "causal", 0.125).train()
    with torch.no_grad():
        logits = network.head(network.features(torch.from_numpy(frames)[:, None])[:, :, -2:].mean(2))
    expected = functional.cross_entropy(
        logits, torch.tensor([["anger", "joy", "sadness"].index(c.label) for c in clips])
    )
    assert history(tmp_path / "run")[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_bfloat16_trains_what_float32_does_but_for_rounding(tones: Any, tmp_path: Path) -> None:
    losses, said = [], []
    for precision in ("fp32", "bf16"):
        recipe = tones.recipe(**CAUSAL, training__precision=precision, training__epochs=3)
        fit(recipe, tmp_path / precision, on_start=said.append)
        assert said[-1].endswith(f" in {precision}")
        losses.append([float(row["loss"]) for row in history(tmp_path / precision)])
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]


def test_a_share_of_the_steps_has_context_and_none_of_the_papers_padding(tones: Any, tmp_path: Path) -> None:
    seen: dict[str, list[int]] = {}

    def watch(kind: str, **values: Any) -> Path:
        folder, lengths = tmp_path / kind, seen.setdefault(kind, [])
        features = Student.features

        def watching(network: Student, log_mel: torch.Tensor) -> torch.Tensor:
            lengths.append(log_mel.shape[2])
            return features(network, log_mel)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Student, "features", watching)
            fit(tones.recipe(**(CAUSAL | values), training__epochs=2, training__batch_size=2), folder)
        return folder

    watch("causal", training__context=0.25)
    lengths = [length for length in seen["causal"] if length < 256]  # the rest measured the reach
    assert set(lengths) == {32, 32 + 64} and len(lengths) == 48
    assert 4 <= lengths.count(96) <= 20  # 12 expected; beyond these bounds once in 500 seeds
    with_key = watch("same", network__time_padding="same", training__context=1.0)
    assert set(seen["same"]) == {32}
    assert_same_weights(with_key, watch("plain", network__time_padding="same", training__context=0.0))


@pytest.mark.parametrize("mode", ["bank", "pass"])
def test_the_neighbour_loss_pulls_neighbours_together(
    tones: Any, whole: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    fit(tones.recipe(graph=True, neighbours__mode=mode, neighbours__alpha=0.0), tmp_path / "free")
    assert history(whole[mode])[-1]["neighbour_loss"] < 0.8 * history(tmp_path / "free")[-1]["neighbour_loss"]


def test_a_bank_is_empty_until_its_clips_were_visited(tones: Any, tmp_path: Path) -> None:
    recipe = tones.recipe(graph=True, neighbours__mode="bank", training__epochs=2, training__batch_size=48)
    fit(recipe, tmp_path / "run")
    first, second = history(tmp_path / "run")
    assert first["neighbour_loss"] == 0.0 < second["neighbour_loss"]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), clips=st.integers(2, 30), batch=st.integers(1, 8), most=st.integers(1, 4))
def test_each_neighbour_is_looked_up_where_it_is(seed: int, clips: int, batch: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.permutation(clips)[:batch])
    neighbours = torch.from_numpy(rng.integers(-1, clips, size=(clips, most)))
    embedding_of = torch.from_numpy(rng.normal(size=(clips, 5)))

    wanted = [int(row) for row in neighbours[rows].flatten() if row >= 0]
    companions = {mode: _companions(rows, neighbours, mode) for mode in ("pass", "bank", "copies")}
    assert sorted(companions["pass"].tolist()) == sorted(set(wanted) - set(rows.tolist()))
    assert companions["bank"].tolist() == []
    assert companions["copies"].tolist() == wanted

    bank = EmbeddingBank(clips, 5, torch.device("cpu"))
    visited = torch.from_numpy(rng.random(clips) < 0.5)
    bank.remember(torch.nonzero(visited).flatten(), embedding_of[visited].float())
    for mode, extra in companions.items():
        together = torch.cat([rows, extra])
        found, weight = _look_up(
            neighbours[rows], together, embedding_of[together], bank, Neighbours.model_validate({"mode": mode})
        )
        for i, row in enumerate(rows.tolist()):
            for k, neighbour in enumerate(neighbours[row].tolist()):
                known = neighbour >= 0 and (mode != "bank" or bool(visited[neighbour]))
                assert weight[i, k] == float(known)
                if known:
                    assert torch.allclose(found[i, k].double(), embedding_of[neighbour])
        assert torch.isfinite(neighbour_loss(embedding_of[rows].float(), found.float(), weight))


# --- going on from another run -------------------------------------------------------------------------------------

FURTHER = {"training__epochs": 2, "training__learning_rate": 1e-4}


def test_weights_and_normalization_are_those_of_the_run_gone_on_from(
    own_tones: Any, whole: dict[str, Path], tmp_path: Path
) -> None:
    # Fewer speakers would be normalised otherwise.
    own_tones.split.write_text(json.dumps({"folds": [{"train": ["ada", "dov"], "test": ["cyd", "fox"]}]}))
    recipe = own_tones.recipe(training__start=str(whole["bank"]), training__epochs=1, training__learning_rate=1e-12)
    fit(recipe, tmp_path / "run")
    assert load_run(tmp_path / "run").normalization == load_run(whole["bank"]).normalization
    for name, tensor in weights(whole["bank"]).items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, rtol=0, atol=1e-9)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_stopped_run_that_went_on_from_another_resumes_to_the_same_weights(
    tones: Any, whole: dict[str, Path], tmp_path: Path, quantized: bool
) -> None:
    start = {"training__start": str(whole["bank"]), "training__quantization_aware": quantized}
    recipe = tones.recipe(graph=True, **FURTHER, **start)
    fit(recipe, tmp_path / "whole")
    for epoch in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, tmp_path / "stopped", on_epoch=stop_after(epoch))
    fit(recipe, tmp_path / "stopped", on_epoch=pytest.fail)
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")


def test_quantization_aware_weights_are_rounded_and_statistics_frozen(
    tones: Any, whole: dict[str, Path], tmp_path: Path
) -> None:
    start = {"training__start": str(whole["bank"]), "training__quantization_aware": True}
    reports: list[EpochReport] = []
    fit(tones.recipe(**FURTHER | {"training__epochs": 5}, **start), tmp_path / "run", on_epoch=reports.append)
    # What is learnt is to answer as the network did before it was rounded.
    assert 0 < reports[-1].distillation_loss < 0.5 * reports[0].distillation_loss
    before, after = weights(whole["bank"]), weights(tmp_path / "run")
    for name, tensor in after.items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(tensor, before[name])
    kernel = after["trunk.3.weight"].flatten(1)  # one of the depthwise layers
    codes = kernel / kernel.abs().amax(1, keepdim=True) * 64
    assert (codes - codes.round()).abs().max() < 1e-3
    assert not torch.equal(kernel, before["trunk.3.weight"].flatten(1))
    logits = after["head.fc2.weight"]
    codes = logits / logits.abs().amax(1, keepdim=True) * 64
    assert (codes - codes.round()).abs().max() > 0.1


def test_a_run_says_where_its_weights_come_from(tones: Any, whole: dict[str, Path], tmp_path: Path) -> None:
    values = {"training__start": str(whole["bank"]), "data__corpus": "more tones", "data__licence": "CC0-1.0"}
    fit(tones.recipe(**FURTHER, **values), tmp_path / "second")
    fit(tones.recipe(**FURTHER, training__start=str(tmp_path / "second")), tmp_path / "third")
    run = load_run(tmp_path / "third")
    origin = run.provenance["from"]
    assert origin["sha256"] == content_hash(tmp_path / "second" / "checkpoint.safetensors")
    assert origin["from"]["sha256"] == content_hash(whole["bank"] / "checkpoint.safetensors")
    assert origin["from"]["from"] is None and origin["seen"] == 0
    assert run.provenance["corpora"] == [
        {"name": "tones", "licence": ""},
        {"name": "more tones", "licence": "CC0-1.0"},
    ]
    assert corpus_licence(run) == f"{UNSPECIFIED_LICENCE}; CC0-1.0"
    assert str(tmp_path) not in json.dumps(run.provenance)


def test_weights_that_know_the_tested_are_refused_through_any_number_of_runs(own_tones: Any, tmp_path: Path) -> None:
    def recipe(train: list[str], test: list[str], **values: Any) -> Recipe:
        own_tones.split.write_text(json.dumps({"folds": [{"train": train, "test": test}]}))
        return own_tones.recipe(training__epochs=1, **values)

    fit(recipe(["ada", "dov"], ["cyd", "fox"]), tmp_path / "first")
    fit(recipe(["bea", "eli"], ["cyd", "fox"], training__start=str(tmp_path / "first")), tmp_path / "second")
    for known in ("first", "second"):
        unfair = recipe(["bea", "eli"], ["ada", "fox"], training__start=str(tmp_path / known))
        message = rf"{known}: was trained on 'ada-anger-0\.wav' of 'ada', whom fold 1 holds out; .* --allow-seen$"
        assert_refused(unfair, tmp_path / "run", message)
    fit(unfair, tmp_path / "run", allow_seen=True)
    assert load_run(tmp_path / "run").provenance["from"]["seen"] == 12


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network__name": "cnn6"}, r"bank: its network\.name is 'mobilenet15', not 'cnn6'; set network\.name="),
        ({"network__width": 0.5}, r"bank: its network\.width is 1\.0, not 0\.5"),
        ({"training__start": "nowhere"}, r"nowhere: no such run folder"),
    ],
)
def test_a_run_that_cannot_be_gone_on_from(
    tones: Any, whole: dict[str, Path], tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    assert_refused(tones.recipe(**({"training__start": str(whole["bank"])} | values)), tmp_path / "run", message)


def test_weights_transfer_to_other_labels_those_of_shared_ones_included(
    own_tones: Any, whole: dict[str, Path], tmp_path: Path
) -> None:
    own_tones.manifest.write_text(own_tones.manifest.read_text().replace(",joy,", ",fear,"))
    # A learning rate that changes nothing shows what training begins with.
    start = {"training__start": str(whole["bank"]), "training__epochs": 1, "training__learning_rate": 1e-12}
    fit(own_tones.recipe(**start), tmp_path / "run")
    assert load_run(tmp_path / "run").labels == ("anger", "fear", "sadness")
    before, after = weights(whole["bank"]), weights(tmp_path / "run")
    for name in (name for name in before if "running" not in name and "num_batches" not in name):
        shared = [0, 2] if name.startswith("head.fc2.") else slice(None)
        torch.testing.assert_close(after[name][shared], before[name][shared], rtol=0, atol=1e-9)
    # Joy was the second label: fear must not begin as joy.
    assert (after["head.fc2.weight"][1] - before["head.fc2.weight"][1]).abs().max() > 1e-3


def test_rounding_is_trained_on_the_labels_of_the_run(own_tones: Any, whole: dict[str, Path], tmp_path: Path) -> None:
    own_tones.manifest.write_text(own_tones.manifest.read_text().replace(",joy,", ",fear,"))
    recipe = own_tones.recipe(training__start=str(whole["bank"]), training__quantization_aware=True)
    assert_refused(
        recipe, tmp_path / "run", "bank: its labels are anger, joy, sadness, but the clips here are .* --qat$"
    )


def test_a_run_does_not_go_on_from_weights_that_changed(tones: Any, whole: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(whole["bank"], tmp_path / "source"))
    recipe = tones.recipe(**FURTHER, training__start=str(source))
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "run", on_epoch=stop_after(1))
    shutil.copy(whole["pass"] / "checkpoint.safetensors", source)
    with pytest.raises(UsageError, match=r"run: began with other weights than .*source has now; give another folder"):
        fit(recipe, tmp_path / "run")


# --- learning ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def learnt(tones: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learnt") / "run"
    fit(tones.recipe(graph=True, neighbours__mode="bank", training__epochs=12, training__batch_size=4), folder)
    return folder


def test_it_learns_and_hears_the_same_in_new_voices(learnt: Path) -> None:
    rows = history(learnt)
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    run = load_run(learnt)
    from sertool.evaluate import evaluate_run

    for part in ("train", "test"):
        predictions = evaluate_run(run, part)
        confusion = confusion_matrix(predictions.truth, predictions.predicted, 3)
        assert unweighted_average_recall(confusion) > 0.9, part


def test_history_follows_the_recipe(learnt: Path) -> None:
    rows = history(learnt)
    assert list(rows[0]) == [
        "epoch", "epochs", "loss", "neighbour_loss", "distillation_loss", "invariance_loss", "learning_rate",
            "seconds",
    ]  # fmt: skip
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3] * 5 + [9e-4] * 5 + [8.1e-4] * 2)


def test_a_run_folder_tells_what_happened(learnt: Path, tones: Any) -> None:
    names = {path.name for path in learnt.iterdir()}
    assert names == {
        "checkpoint.safetensors", "environment.json", "graph.csv", "graph.json", "history.csv", "recipe.toml",
        "split.json", "tensorboard", "trained.json",
    }  # fmt: skip
    versions = json.loads((learnt / "environment.json").read_text())["versions"]
    assert versions["torch"] == torch.__version__ and versions["numpy"] == np.__version__
    assert json.loads((learnt / "environment.json").read_text())["threads"] == 1
    curves = EventAccumulator(str(learnt / "tensorboard"))
    curves.Reload()
    for name in ("loss", "neighbour_loss", "learning_rate"):
        assert [event.value for event in curves.Scalars(name)] == pytest.approx(
            [row[name] for row in history(learnt)], rel=1e-5
        )
    assert load_run(learnt).recipe == tones.recipe(
        graph=True, neighbours__mode="bank", training__epochs=12, training__batch_size=4
    )


def test_the_checkpoint_is_the_network_that_was_trained(learnt: Path) -> None:
    run = load_run(learnt)
    windows = np.random.default_rng(0).normal(size=(2, 32, 64)).astype(np.float32)
    assert predict(run.network(), windows).shape == (2, 3)
    assert run.labels == ("anger", "joy", "sadness")


def test_threads_are_given_back(tones: Any, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    seen: list[int] = []
    fit(tones.recipe(training__epochs=1), tmp_path / "one", on_epoch=lambda _: seen.append(torch.get_num_threads()))
    assert (seen, torch.get_num_threads()) == ([1], 2)


def test_validation_speakers_train_where_the_recipe_says_so(own_tones: Any, tmp_path: Path) -> None:
    own_tones.split.write_text(
        json.dumps({"folds": [{"train": ["ada", "dov"], "validation": ["bea", "eli"], "test": ["cyd", "fox"]}]})
    )
    # The graph of the other split joins ada, bea, dov and eli: just the clips of both parts.
    both = own_tones.recipe(graph=True, data__parts=["train", "validation"], training__epochs=1)
    fit(both, tmp_path / "both")
    with pytest.raises(
        UsageError, match=r"joins 'bea-.*', which is not a training clip .*: sertool graph --part train$"
    ):
        fit(own_tones.recipe(graph=True, training__epochs=1), tmp_path / "train")


# --- refusals ------------------------------------------------------------------------------------------------------


def assert_refused(recipe: Recipe, folder: Path, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        fit(recipe, folder, on_epoch=pytest.fail)
    assert "\n" not in str(caught.value)
    assert not folder.exists()


@pytest.mark.parametrize("fold", [0, 3])
def test_a_fold_that_the_split_lacks(tones: Any, tmp_path: Path, fold: int) -> None:
    recipe = tones.recipe()
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"fold": fold})})
    assert_refused(recipe, tmp_path / "run", rf"split\.json: no fold {fold}; valid: 1 to 2")


def test_a_label_that_no_training_speaker_has(own_tones: Any, tmp_path: Path) -> None:
    text = own_tones.manifest.read_text()
    own_tones.manifest.write_text(text.replace("cyd-joy-0.wav,cyd,joy", "cyd-joy-0.wav,cyd,disgust"))
    assert_refused(own_tones.recipe(), tmp_path / "run", "trains without 'disgust'")


def test_one_label_only(own_tones: Any, tmp_path: Path) -> None:
    text = own_tones.manifest.read_text()
    own_tones.manifest.write_text(text.replace(",joy,", ",anger,").replace(",sadness,", ",anger,"))
    assert_refused(own_tones.recipe(), tmp_path / "run", "all training clips are labelled 'anger'; needed: two")


def test_a_speaker_who_is_not_in_the_manifest(own_tones: Any, tmp_path: Path) -> None:
    own_tones.split.write_text(json.dumps({"folds": [{"train": ["ada", "eve"], "test": ["fox"]}]}))
    assert_refused(own_tones.recipe(), tmp_path / "run", r"manifest\.csv: no clip of speaker 'eve'")


def test_a_graph_of_other_clips(own_tones: Any, tmp_path: Path) -> None:
    other = own_tones.graph / "fold-2" / "graph.csv"
    other.replace(own_tones.graph / "fold-1" / "graph.csv")
    assert_refused(
        own_tones.recipe(graph=True),
        tmp_path / "run",
        r"fold-1: joins 'cyd-anger-0\.wav', which is not a training clip of this fold; make it with this manifest",
    )


def test_a_graph_that_lacks_a_clip(own_tones: Any, tmp_path: Path) -> None:
    path = own_tones.graph / "fold-1" / "graph.csv"
    rows = [row for row in path.read_text().splitlines() if "ada-joy-0" not in row]
    path.write_text("\n".join(rows))
    assert_refused(own_tones.recipe(graph=True), tmp_path / "run", r"fold-1: lacks 'ada-")


def test_a_graph_that_joins_nothing(own_tones: Any, tmp_path: Path) -> None:
    path = own_tones.graph / "fold-1" / "graph.csv"
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *sorted({row.split(",")[0] + ",," for row in rows})]))
    message = "fold-1: joins no clips, so there is no neighbour loss; make it with a lower threshold"
    assert_refused(own_tones.recipe(graph=True), tmp_path / "run", message)


def test_more_neighbours_than_the_graph_was_cut_at(tones: Any, tmp_path: Path) -> None:
    assert_refused(
        tones.recipe(graph=True, neighbours__count=4),
        tmp_path / "run",
        "fold-1: was cut at 3 neighbours; make it again with sertool graph --neighbours 4, or lower neighbours.count",
    )


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"neighbours": null}'])
def test_a_graph_without_its_description(own_tones: Any, tmp_path: Path, content: str | None) -> None:
    path = own_tones.graph / "fold-1" / "graph.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert_refused(own_tones.recipe(graph=True), tmp_path / "run", r"graph\.json: missing or damaged; make the graph")


def test_a_missing_graph(own_tones: Any, tmp_path: Path) -> None:
    recipe = own_tones.recipe(neighbours__graph=str(tmp_path / "nowhere"))
    assert_refused(recipe, tmp_path / "run", r"graph\.csv: no such graph; make it with: sertool graph")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(tones: Any, tmp_path: Path) -> None:
    assert_refused(
        tones.recipe(training__device="cuda"), tmp_path / "run", "this torch sees no CUDA GPU; use auto or cpu"
    )


@pytest.mark.parametrize(("learning_rate", "loss"), [(1e30, "nan|inf"), (1e3, r"[\d.]+e\+\d\d")])
def test_diverging_training_stops_with_one_line_and_no_weights(
    tones: Any, tmp_path: Path, learning_rate: float, loss: str
) -> None:
    with pytest.raises(SerError, match=rf"training diverged in epoch 1: the loss is ({loss}); lower") as caught:
        fit(tones.recipe(training__learning_rate=learning_rate, training__batch_size=4), tmp_path / "run")
    assert not isinstance(caught.value, UsageError)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
    with pytest.raises(RunError, match="unfinished"):
        load_run(tmp_path / "run")


def test_training_clips_come_from_the_manifest_alone(tones: Any, whole: dict[str, Path]) -> None:
    manifest = load_manifest(tones.manifest)
    speakers = {clip.speaker for clip in load_run(whole["bank"]).clips("train")}
    assert speakers == {"ada", "bea", "dov", "eli"} < set(manifest.speakers)
