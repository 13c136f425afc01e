"""The commands of training, from recipe to graph: what they print, what they refuse, what they leave on a full disk."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sertool.recipe import Recipe, load_recipe, write_recipe
from sertool.run import load_run

pytestmark = pytest.mark.usefixtures("one_thread")

Command = Callable[..., Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_one_line(outcome: Any, code: int, message: str) -> None:
    assert outcome.code == code, outcome
    assert outcome.out == ""
    (line,) = [line for line in outcome.err.splitlines() if " clips, 4 speakers, 3 labels; " not in line]
    assert line.startswith("sertool: ") and message in line


@pytest.fixture
def recipe_file(tones: Any, tmp_path: Path) -> Path:
    """A recipe of a single epoch."""
    path = tmp_path / "tones.toml"
    path.write_text(write_recipe(tones.recipe(training__epochs=1)))
    return path


# --- sertool recipe ------------------------------------------------------------------------------------------------


def test_a_new_recipe_is_the_default_and_is_not_replaced_unasked(sertool: Command, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    outcome = sertool("recipe", "new", path)
    assert outcome.code == 0 and f"sertool train {path}" in outcome.out
    assert load_recipe(path) == Recipe()
    path.write_text(path.read_text().replace("epochs = 50", "epochs = 5"))
    assert_one_line(sertool("recipe", "new", path), 2, "recipe.toml: exists already; give another name or --force")
    assert load_recipe(path).training.epochs == 5
    assert sertool("recipe", "new", path, "--force").code == 0
    assert load_recipe(path) == Recipe()


def test_a_checked_recipe_is_printed_whole(sertool: Command, recipe_file: Path, tmp_path: Path) -> None:
    outcome = sertool("recipe", "check", recipe_file, "--set", "training.epochs=9")
    (tmp_path / "printed.toml").write_text(outcome.out)
    assert load_recipe(tmp_path / "printed.toml") == load_recipe(recipe_file, ["training.epochs=9"])
    assert_one_line(
        sertool("recipe", "check", recipe_file, "--set", "network.name=resnet"), 2, "did you mean 'resnet9'"
    )


# --- sertool train -------------------------------------------------------------------------------------------------


def test_all_folds_are_trained_each_into_its_folder(sertool: Command, recipe_file: Path, tmp_path: Path) -> None:
    outcome = sertool("train", recipe_file, "-o", tmp_path / "runs", "--fold", "all")
    assert outcome.code == 0
    assert outcome.out == f"{tmp_path}/runs: trained; now run: sertool evaluate {tmp_path}/runs\n"
    assert [line.split(":")[0] for line in outcome.err.splitlines()] == [
        f"{tmp_path}/runs/fold-{number}"
        for number in (1, 1, 2, 2)  # what is trained, and the last epoch
    ]
    assert [load_run(tmp_path / "runs" / f"fold-{number}").recipe.data.fold for number in (1, 2)] == [1, 2]
    again = sertool("train", recipe_file, "-o", tmp_path / "runs", "--fold", "all")
    assert again.err.splitlines() == [f"{tmp_path}/runs/fold-{number}: finished already" for number in (1, 2)]


def test_progress_without_a_terminal_is_a_line_every_ten_epochs_and_one_at_the_end(
    sertool: Command, recipe_file: Path, tmp_path: Path
) -> None:
    outcome = sertool("train", recipe_file, "-o", tmp_path / "run", "--set", "training.epochs=12")
    first, *lines = outcome.err.splitlines()
    assert first == f"{tmp_path}/run: 48 clips, 4 speakers, 3 labels; mobilenet15 on {DEVICE} in fp32"
    assert [line.split(",")[0] for line in lines] == [f"{tmp_path}/run: epoch {epoch}/12" for epoch in (10, 12)]
    for word in (" loss ", " learning rate ", " s"):
        assert all(word in line for line in lines)
    assert "neighbour loss" not in outcome.err  # there is no graph


def test_training_that_goes_on_says_from_where(sertool: Command, tones: Any, tmp_path: Path) -> None:
    from sertool.fit import EpochReport, fit

    def stop(report: EpochReport) -> None:
        raise KeyboardInterrupt

    recipe = tones.recipe(training__epochs=2)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "run", on_epoch=stop)
    (tmp_path / "recipe.toml").write_text(write_recipe(recipe))
    outcome = sertool("train", tmp_path / "recipe.toml", "-o", tmp_path / "run")
    assert outcome.code == 0
    assert outcome.err.splitlines()[0].endswith(" in fp32; goes on after epoch 1")


def test_progress_finds_room_on_a_terminal_of_eighty_columns(
    sertool: Command, tones: Any, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, legacy_windows=False)
    monkeypatch.setattr("sertool.cli.console.STATUS", screen)
    values = ["--set", "training.epochs=2", "--set", f"neighbours.graph={tones.graph}"]
    assert sertool("train", recipe_file, "-o", tmp_path / "run", *values).code == 0
    shown = screen.file.getvalue()
    whole = r"fold 1: loss \d\.\d{3}, neighbour loss \d\.\d{4}, rate 0\.001 \S+ 2/2 \d:\d\d:\d\d"
    assert re.search(whole, shown), shown


def test_paths_are_meant_from_here_and_kept_absolute(
    sertool: Command, tones: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.toml").write_text('[data]\nwindow_samples = 8448\n[network]\nname = "mobilenet15"\n')
    monkeypatch.chdir(tones.folder)
    code = sertool("train", tmp_path / "short.toml", "-o", tmp_path / "run", "--set", "training.epochs=1").code
    assert code == 0
    recipe = load_run(tmp_path / "run").recipe
    assert (recipe.data.manifest, recipe.data.split) == (str(tones.manifest), str(tones.split))
    assert recipe.neighbours.graph == ""


def test_the_folder_is_named_after_the_recipe(
    sertool: Command, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sertool("train", recipe_file, "--fold", "2").code == 0
    assert load_run(tmp_path / "runs" / "tones").recipe.data.fold == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--fold", "0"], 2, "split.json: no fold 0; valid: 1 to 2"),
        (["--fold", "3"], 2, "split.json: no fold 3; valid: 1 to 2"),
        (["--fold", "-1"], 2, "--fold '-1': expected the number of a fold, or 'all'"),
        (["--fold", "first"], 2, "--fold 'first': expected the number of a fold, or 'all'"),
        (["--set", "training.epoch=3"], 2, "no key 'epoch' in [training]; did you mean 'epochs'?"),
        (["--set", "data.manifest=nowhere.csv"], 2, "nowhere.csv: no such manifest; make one with"),
        (["--set", "data.split=nowhere.json"], 2, "nowhere.json: no such split; make one with"),
        (["--set", "neighbours.graph=nowhere"], 2, "no such graph; make it with: sertool graph"),
        (["--set", "training.learning_rate=1e30"], 1, "training diverged in epoch 1"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    sertool: Command, recipe_file: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    assert_one_line(sertool("train", recipe_file, "-o", tmp_path / "run", *arguments), code, message)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_another_recipe_in_the_same_folder_is_refused(sertool: Command, recipe_file: Path, tmp_path: Path) -> None:
    assert sertool("train", recipe_file, "-o", tmp_path / "run").code == 0
    outcome = sertool("train", recipe_file, "-o", tmp_path / "run", "--set", "training.seed=1")
    assert_one_line(outcome, 2, "run: holds a run with training.seed = 0, not 1; give another folder with -o")


def test_folds_are_fine_tuned_each_from_its_own(sertool: Command, recipe_file: Path, tmp_path: Path) -> None:
    assert sertool("train", recipe_file, "-o", tmp_path / "loso", "--fold", "all").code == 0
    outcome = sertool("train", "--from", tmp_path / "loso", "--qat", "--set", "training.epochs=1")
    assert outcome.code == 0 and outcome.out.endswith(f"now run: sertool evaluate {tmp_path / 'loso-qat'}\n")
    for number in (1, 2):
        recipe = load_run(tmp_path / "loso-qat" / f"fold-{number}").recipe
        assert (recipe.data.fold, recipe.training.epochs, recipe.training.learning_rate) == (number, 1, 1e-4)
        assert recipe.training.start == str(tmp_path / "loso" / f"fold-{number}")
        assert recipe.training.quantization_aware
    one = sertool("train", recipe_file, "--from", tmp_path / "loso" / "fold-2", "--fold", "2", "-o", tmp_path / "one")
    assert one.code == 0
    recipe = load_run(tmp_path / "one").recipe
    assert (recipe.training.epochs, recipe.training.learning_rate, recipe.training.quantization_aware) == (
        1,
        1e-3,
        False,
    )
    unfair = sertool("train", "--from", tmp_path / "loso" / "fold-2", "--fold", "1", "-o", tmp_path / "unfair")
    assert_one_line(unfair, 2, "allow it with --allow-seen")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no recipe: give one, e.g. sertool train recipe.toml, or a run to go on from: --from RUN"),
        (("--qat",), "no recipe: give one"),
        (("--from", "nowhere"), "nowhere: no such run folder; make one with: sertool train"),
        (("--from", "nowhere", "--qat"), "nowhere: no such run folder"),
        (("RECIPE", "--qat"), "training.quantization_aware needs a trained network to begin with"),
        (("RECIPE", "--from", "nowhere"), "nowhere: no such run folder"),
    ],
)
def test_fine_tuning_of_nothing_is_one_line(
    sertool: Command, recipe_file: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [recipe_file if argument == "RECIPE" else argument for argument in arguments]
    assert_one_line(sertool("train", *given), 2, message)


def test_one_run_and_folds_are_not_trained_into_one_folder(sertool: Command, recipe_file: Path, tmp_path: Path) -> None:
    arguments = ["train", recipe_file, "-o", tmp_path / "runs"]
    assert sertool(*arguments[:3], tmp_path / "runs" / "fold-1", "--fold", "1").code == 0
    for wrong in ([], ["--fold", "2"]):
        message = "runs: holds folds, e.g. fold-1, which a run beside them would hide; give --fold all"
        assert_one_line(sertool(*arguments, *wrong), 2, message)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["fold-1"]
    message = "fold-1: holds a single run, not folds; give another folder with -o"
    assert_one_line(sertool(*arguments[:3], tmp_path / "runs" / "fold-1", "--fold", "all"), 2, message)


@pytest.mark.parametrize(
    ("old", "new", "code", "message"),
    [
        ("file,speaker,label", "file,speaker,emotion", 2, "no column 'label'"),
        ("cyd-joy-0.wav,cyd,joy", "cyd-joy-0.wav,cyd,disgust", 2, "trains without 'disgust'"),
        ("ada-joy-0.wav", "missing.wav", 1, "missing.wav: no such audio file"),
        ("ada-joy-0.wav,ada", "ada-joy-0.wav,", 2, "line 6: speaker is empty"),
    ],
)
def test_a_bad_manifest_is_one_line(
    sertool: Command, own_tones: Any, tmp_path: Path, old: str, new: str, code: int, message: str
) -> None:
    text = own_tones.manifest.read_text()
    assert old in text
    own_tones.manifest.write_text(text.replace(old, new))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(write_recipe(own_tones.recipe()))
    assert_one_line(sertool("train", recipe, "-o", tmp_path / "run"), code, message)
    assert not (tmp_path / "run").exists()


def test_one_speaker_only(sertool: Command, own_tones: Any, tmp_path: Path) -> None:
    own_tones.split.write_text(json.dumps({"folds": [{"train": ["ada"], "test": ["ada"]}]}))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(write_recipe(own_tones.recipe()))
    assert_one_line(sertool("train", recipe, "-o", tmp_path / "run"), 2, "speaker 'ada' stands in train and in test")


def test_the_real_command_line_exits_with_one_line(recipe_file: Path) -> None:
    command = [sys.executable, "-c", "from sertool.cli import main; main()", "train", str(recipe_file)]
    outcome = subprocess.run([*command, "--set", "network.name=resnet10"], capture_output=True, text=True, check=False)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert outcome.stderr.count("\n") == 1
    assert "network.name = 'resnet10': did you mean 'resnet9'?" in outcome.stderr


# --- full disks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of a few kB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("kilobytes", "file"), [(4, "environment.json"), (8, "trained.json"), (300, "resume.safetensors")]
)
def test_a_full_disk_is_named_and_training_goes_on_when_there_is_room(
    sertool: Command, recipe_file: Path, tiny_disk: Callable[[int], Path], kilobytes: int, file: str
) -> None:
    disk = tiny_disk(kilobytes)
    outcome = sertool("train", recipe_file, "-o", disk / "run")
    assert_one_line(outcome, 1, f"run/{file}: No space left on device")
    assert not [path.name for path in disk.rglob(".*")]
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    assert sertool("train", recipe_file, "-o", disk / "run").code == 0
    load_run(disk / "run").network()


def test_a_full_disk_under_the_cache(
    sertool: Command,
    recipe_file: Path,
    tiny_disk: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = tiny_disk(100)
    monkeypatch.setenv("SERTOOL_CACHE", str(disk))
    outcome = sertool("train", recipe_file, "-o", tmp_path / "run")
    assert_one_line(outcome, 1, ".npy: No space left on device")
    assert list(disk.iterdir()) == [] and not (tmp_path / "run").exists()


def test_a_full_disk_under_an_evaluation(sertool: Command, recipe_file: Path, tiny_disk: Callable[[int], Path]) -> None:
    disk = tiny_disk(65536)
    assert sertool("train", recipe_file, "-o", disk / "run").code == 0
    assert sertool("evaluate", disk / "run").code == 0
    before = (disk / "run" / "metrics.json").read_text(), (disk / "run" / "predictions.csv").read_text()
    # Filled to the brim, by a file of which a part of a block is left.
    with pytest.raises(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    assert_one_line(sertool("evaluate", disk / "run"), 1, "run/predictions.csv: No space left on device")
    after = (disk / "run" / "metrics.json").read_text(), (disk / "run" / "predictions.csv").read_text()
    assert after == before
    assert not [path.name for path in disk.rglob(".*")]


# --- sertool graph -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(tones: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of the tones by a run that was trained on them for a while."""
    from sertool.corpora.manifest import load_manifest
    from sertool.fit import fit
    from sertool.run import load_run_teacher
    from sertool.teacher.embed import embed_manifest

    folder = tmp_path_factory.mktemp("teacher")
    fit(tones.recipe(training__epochs=4, training__batch_size=4), folder / "run")
    embed_manifest(load_manifest(tones.manifest), load_run_teacher(folder / "run"), folder / "embeddings")
    return folder / "embeddings"


def graph_arguments(tones: Any, embedded: Path) -> list[object]:
    # The teacher has heard the training speakers of fold 1, of whom fold 2 tests two.
    return ["graph", embedded, "--manifest", tones.manifest, "--split", tones.split, "--allow-seen"]


def test_a_graph_joins_training_speakers_and_trains(
    sertool: Command, tones: Any, embedded: Path, recipe_file: Path, tmp_path: Path
) -> None:
    arguments = [*graph_arguments(tones, embedded), "--centre", "--threshold", "0.5", "--neighbours", "4"]
    outcome = sertool(*arguments, "-o", tmp_path / "graph")
    assert outcome.code == 0
    assert f"--set neighbours.graph={tmp_path}/graph" in outcome.out
    for number, tested in ((1, {"cyd", "fox"}), (2, {"ada", "dov"})):
        folder = tmp_path / "graph" / f"fold-{number}"
        with (folder / "graph.csv").open(newline="") as file:
            joined = {row["clip"].split("-")[0] for row in csv.DictReader(file)}
        assert joined == {"ada", "bea", "cyd", "dov", "eli", "fox"} - tested
        report = json.loads((folder / "graph.json").read_text())
        assert (report["neighbours"], report["parts"], report["centre"]) == (4, ["train"], True)
        assert report["teacher"]["kind"] == "run" and report["teacher"]["speakers"] == ["ada", "bea", "dov", "eli"]
        assert report["graph"]["clips"] == 48
        # The teacher knows these labels, and so do the edges.
        assert report["nearest_centred"]["homophily"] > 2 * report["nearest_centred"]["homophily_by_chance"]

    values = ["--set", f"neighbours.graph={tmp_path}/graph", "--set", "neighbours.count=4"]
    assert sertool("train", recipe_file, "-o", tmp_path / "run", "--fold", "2", *values).code == 0
    run = load_run(tmp_path / "run")
    assert run.provenance["teacher"] == report["teacher"]
    assert (run.path / "graph.csv").read_bytes() == (folder / "graph.csv").read_bytes()


def test_the_report_is_json_on_demand(sertool: Command, tones: Any, embedded: Path, tmp_path: Path) -> None:
    outcome = sertool(*graph_arguments(tones, embedded), "-o", tmp_path / "graph", "--json")
    assert json.loads(outcome.out) == json.loads((tmp_path / "graph" / "report.json").read_text())
    assert [report["fold"] for report in json.loads(outcome.out)] == [1, 2]


def test_the_same_graph_from_a_manifest_in_another_order(
    sertool: Command, tones: Any, embedded: Path, tmp_path: Path
) -> None:
    head, *rows = tones.manifest.read_text().splitlines()
    absolute = [f"{tones.folder}/{row}" for row in rows]
    outcomes = []
    for name, lines in (("one", absolute), ("other", absolute[::-1])):
        (tmp_path / f"{name}.csv").write_text("\n".join([head, *lines]))
        outcomes.append(
            sertool(
                "graph", embedded, "--manifest", tmp_path / f"{name}.csv", "--split", tones.split,
                "--threshold", "0.9", "--allow-seen", "-o", tmp_path / name,
            )
        )  # fmt: skip
    assert [outcome.code for outcome in outcomes] == [0, 0]
    for number in (1, 2):
        file = f"fold-{number}/graph.csv"
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_validation_speakers_are_joined_on_demand(sertool: Command, tones: Any, embedded: Path, tmp_path: Path) -> None:
    split = tmp_path / "split.json"
    split.write_text(
        json.dumps({"folds": [{"train": ["ada", "dov"], "validation": ["bea", "eli"], "test": ["cyd", "fox"]}]})
    )
    arguments = [*graph_arguments(tones, embedded), "--split", split, "-o", tmp_path / "graph"]
    assert json.loads(sertool(*arguments, "--json").out)[0]["graph"]["clips"] == 24
    both = sertool(*arguments, "--part", "train", "--part", "validation", "--json")
    assert json.loads(both.out)[0]["graph"]["clips"] == 48


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--threshold", "2"], 2, "threshold 2 is not a cosine; valid: -1 to 1"),
        (["--neighbours", "0"], 2, "'--neighbours': Input should be greater than or equal to 1"),
        (["--part", "test"], 2, "part 'test' cannot be in a graph; valid: train, validation"),
        (["--part", "trian"], 2, "did you mean 'train'?"),
        (["--split", "nowhere.json"], 2, "nowhere.json: no such split"),
        (["--manifest", "nowhere.csv"], 2, "nowhere.csv: no such manifest"),
    ],
)
def test_a_graph_that_cannot_be_is_one_line(
    sertool: Command, tones: Any, embedded: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    outcome = sertool(*graph_arguments(tones, embedded), "-o", tmp_path / "graph", *arguments)
    assert_one_line(outcome, code, message)
    assert not (tmp_path / "graph").exists()


def test_embeddings_of_other_clips(sertool: Command, own_tones: Any, embedded: Path, tmp_path: Path) -> None:
    clip = own_tones.folder / "ada-joy-0.wav"
    clip.write_bytes(clip.read_bytes()[:-2000])
    outcome = sertool(*graph_arguments(own_tones, embedded), "-o", tmp_path / "graph")
    assert_one_line(outcome, 2, "no embedding of 'ada-joy-0.wav', its audio has changed")
    assert not (tmp_path / "graph").exists()


def test_a_folder_without_embeddings(sertool: Command, tones: Any, tmp_path: Path) -> None:
    outcome = sertool(*graph_arguments(tones, tmp_path), "-o", tmp_path / "graph")
    assert_one_line(outcome, 2, "no embeddings folder")


def test_a_second_graph_that_fails_leaves_the_first_one_whole(
    sertool: Command, tones: Any, embedded: Path, tmp_path: Path
) -> None:
    assert sertool(*graph_arguments(tones, embedded), "-o", tmp_path / "graph").code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "graph").rglob("*.*") if path.is_file()}
    split = tmp_path / "split.json"
    split.write_text(
        json.dumps({"folds": [{"train": ["ada", "dov"], "test": ["cyd"]}, {"train": ["eve"], "test": ["fox"]}]})
    )
    outcome = sertool(*graph_arguments(tones, embedded), "--split", split, "-o", tmp_path / "graph")
    assert_one_line(outcome, 2, "no clip of speaker 'eve'")
    assert {path: path.read_bytes() for path in (tmp_path / "graph").rglob("*.*") if path.is_file()} == before
