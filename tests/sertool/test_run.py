"""The run folder: what it says of itself, its weights as a teacher, and every way in which it can be none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_runtime.errors import AudioError, UsageError
from edge_runtime.frontend import log_mel, tile_or_cut
from sertool.audio import content_hash
from sertool.fit import fit
from sertool.networks import build_network
from sertool.recipe import write_recipe
from sertool.run import (
    RunError,
    StudentDescription,
    load_folds,
    load_run,
    load_run_teacher,
    read_metrics,
    save_checkpoint,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tones: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "graph"
    fit(tones.recipe(graph=True, neighbours__mode="bank", training__epochs=1), path)
    return path


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy, for a test that damages it."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def test_a_run_knows_its_clips_by_part(folder: Path) -> None:
    run = load_run(folder)
    assert {clip.speaker for clip in run.clips("test")} == {"cyd", "fox"}
    assert len(run.clips("train")) == 48
    assert [clip.key for clip in run.clips("train")] == sorted(clip.key for clip in run.clips("train"))
    assert (run.labels, run.window_samples) == (("anger", "joy", "sadness"), 8448)
    assert run.metrics == {}


def test_a_part_that_is_not_there(folder: Path) -> None:
    with pytest.raises(UsageError, match="part 'tset' is unknown; did you mean 'test'"):
        load_run(folder).clips("tset")
    with pytest.raises(UsageError, match="fold 1 of the split has no validation speakers"):
        load_run(folder).clips("validation")


def test_a_run_that_lost_the_record_of_its_clips_is_refused(own: Path) -> None:
    (own / "trained.json").unlink()
    with pytest.raises(RunError, match=r"trained\.json: missing.*train again"):
        load_run(own).clips("test")
    with pytest.raises(RunError, match=r"trained\.json: missing.*train again"):
        load_run_teacher(own)


@pytest.mark.parametrize("content", ["{", "[]", '{"ada-joy-0.wav": 3}'])
def test_a_damaged_record_of_the_clips(own: Path, content: str) -> None:
    (own / "trained.json").write_text(content)
    with pytest.raises(RunError, match=r"trained\.json: damaged"):
        load_run(own).clips("test")


def test_a_description_survives_its_json(folder: Path) -> None:
    student = load_run(folder).student
    assert StudentDescription.from_json(student.to_json()) == student


def test_the_provenance_names_everything_and_no_place(folder: Path, tones: Any) -> None:
    provenance = load_run(folder).provenance
    assert provenance["corpora"] == [{"name": "tones", "licence": ""}]
    assert (provenance["speakers"], provenance["teacher"]) == (4, {"name": "ideal teacher"})
    assert provenance["split_hash"] == load_run(folder).split_hash
    assert provenance["recipe"]["data"]["manifest"] == "manifest.csv"
    assert provenance["recipe"]["neighbours"]["graph"] == "graph"
    assert provenance["versions"]["torch"] == torch.__version__
    text = json.dumps(provenance)
    assert str(tones.folder) not in text and str(folder) not in text and str(Path.home()) + "/" not in text


def test_a_run_without_a_graph_has_no_teacher(tones: Any, tmp_path: Path) -> None:
    fit(tones.recipe(training__epochs=1), tmp_path / "base")
    provenance = load_run(tmp_path / "base").provenance
    assert provenance["teacher"] is None and provenance["recipe"]["neighbours"]["graph"] == ""


# --- a run as teacher ----------------------------------------------------------------------------------------------


def test_the_teachers_embedding_is_fc1_of_the_clips_window(folder: Path) -> None:
    run, teacher = load_run(folder), load_run_teacher(folder)
    for clip in run.clips("test")[:3]:
        samples = clip.read()
        window = run.normalization.apply(log_mel(tile_or_cut(samples, run.window_samples), run.front_end))
        with torch.no_grad():
            expected = run.network().embed(torch.from_numpy(window)[None, None])[0]
        embedding = teacher.embed(samples)
        assert (embedding.shape, embedding.dtype) == ((teacher.dimension,), np.float32)
        assert np.array_equal(embedding, expected.numpy())


def test_the_teacher_says_whom_it_has_heard(folder: Path) -> None:
    description = load_run_teacher(folder).description
    assert description["speakers"] == ["ada", "bea", "dov", "eli"]
    assert (description["kind"], description["network"], description["corpora"]) == ("run", "mobilenet15", ["tones"])
    json.dumps(description)
    heard = {content_hash(clip.path) for clip in load_run(folder).clips("train")}
    assert load_run_teacher(folder).heard_audio == heard and len(heard) == 48


def test_other_weights_are_another_teacher(folder: Path, own: Path, tones: Any, tmp_path: Path) -> None:
    assert load_run_teacher(own).identity == load_run_teacher(folder).identity
    fit(tones.recipe(training__epochs=1, training__seed=1), tmp_path / "other")
    assert load_run_teacher(tmp_path / "other").identity != load_run_teacher(folder).identity


def test_a_teacher_refuses_an_empty_clip(folder: Path) -> None:
    with pytest.raises(AudioError, match="empty"):
        load_run_teacher(folder).embed(np.zeros(0, np.float32))


# --- folders that are no run ---------------------------------------------------------------------------------------


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: no such run folder; make one with: sertool train"):
        load_run(tmp_path / "nowhere")


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        load_run(tmp_path)


def test_an_unfinished_run(own: Path) -> None:
    (own / "checkpoint.safetensors").unlink()
    for load in (load_run, load_folds):
        with pytest.raises(RunError, match="own: unfinished; run the same sertool train again and it goes on"):
            load(own)


@pytest.mark.parametrize("content", [b"", b"x" * 50, b"\x02\0\0\0\0\0\0\0{}", None])
def test_a_damaged_checkpoint(own: Path, content: bytes | None) -> None:
    path = own / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(RunError, match=r"checkpoint\.safetensors: damaged or not one of ours; train again"):
        load_run(own)


def test_a_checkpoint_of_another_network(own: Path) -> None:
    student = load_run(own).student
    save_checkpoint(own / "checkpoint.safetensors", build_network("resnet9", 3), student)
    with pytest.raises(RunError, match="does not fit the recipe beside it"):
        load_run(own).network()


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_damaged_metrics(own: Path, content: bytes) -> None:
    (own / "metrics.json").write_bytes(content)
    with pytest.raises(RunError, match=r"metrics\.json: damaged; delete it"):
        read_metrics(own)


# --- folds ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folds(folder: Path, tmp_path: Path) -> Path:
    for number in (1, 2, 10):
        shutil.copytree(folder, tmp_path / "folds" / f"fold-{number}")
    return tmp_path / "folds"


def test_folds_come_in_numerical_order(folds: Path) -> None:
    assert [run.path.name for run in load_folds(folds)] == ["fold-1", "fold-2", "fold-10"]
    assert [run.path for run in load_folds(folds / "fold-2")] == [folds / "fold-2"]


def test_a_copy_of_a_fold_and_an_unfinished_fold_are_left_out(folds: Path) -> None:
    (folds / "fold-1").rename(folds / "fold-1-old")
    (folds / "fold-2" / "checkpoint.safetensors").unlink()
    assert [run.path.name for run in load_folds(folds)] == ["fold-10"]


def test_a_command_for_one_run_names_the_folds(folds: Path) -> None:
    with pytest.raises(RunError, match=r"folds: holds 3 folds; name one of them, e\.g\. .*fold-1$"):
        load_run(folds)


def test_folds_of_which_none_is_finished(folds: Path) -> None:
    for path in folds.glob("*/checkpoint.safetensors"):
        path.unlink()
    with pytest.raises(RunError, match="folds: unfinished; run the same sertool train again"):
        load_folds(folds)


def test_a_run_beside_folds_is_refused(folder: Path, folds: Path) -> None:
    shutil.copytree(folder, folds, dirs_exist_ok=True)
    with pytest.raises(RunError, match="folds: holds both a run and fold-1; move the one that is not meant"):
        load_folds(folds)


def test_folds_of_two_splits_are_not_pooled(folds: Path, tones: Any) -> None:
    (folds / "fold-2" / "split.json").write_text(json.dumps({"folds": [{"train": ["ada"], "test": ["cyd"]}]}))
    with pytest.raises(RunError, match="folds: its folds are not those of one split"):
        load_folds(folds)


def test_a_recipe_that_was_damaged(own: Path, tones: Any) -> None:
    (own / "recipe.toml").write_text(write_recipe(tones.recipe()).replace("epochs", "epoks"))
    with pytest.raises(UsageError, match="no key 'epoks'"):
        load_run(own)
