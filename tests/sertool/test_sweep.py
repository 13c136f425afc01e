"""The sweep: which cells a file means, what it refuses, and the real command on a tiny corpus."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import UsageError
from edge_runtime.frontend import FloatArray
from sertool.corpora.manifest import load_manifest
from sertool.paper.sweep import READY, load_sweep, plan_cells
from sertool.paper.workers import Epoch, Failed, Finished, train_cells, with_folds

pytestmark = pytest.mark.usefixtures("one_thread")

Command = Callable[..., Any]


class EarTeacher:
    """Hears the pitch and nothing else: the spectrum of a clip in 32 bands."""

    name = "ear"
    identity = "ear 1"
    dimension = 32
    description: dict[str, Any] = {"kind": "ear"}  # noqa: RUF012

    def embed(self, samples: FloatArray) -> FloatArray:
        spectrum = np.abs(np.fft.rfft(samples))[: 32 * 24].reshape(32, 24).sum(axis=1)
        return np.log(spectrum + 1.0).astype(np.float32)


SWEEP = """\
[data]
manifest = "{manifest}"
split = "{split}"
corpus = "tones"
window_samples = 8448

[network]
width = 0.125

[neighbours]
mode = "bank"

[training]
epochs = 2
threads = 1

[teachers.ear]
embeddings = "{embeddings}"

[graphs.ear]
teacher = "ear"
threshold = 0.8

[[cells]]
networks = ["mobilenet15"]
settings = [[3, 1.0]]
seeds = [0, 1]
"""
NAMES = [f"mobilenet15-{form}-seed{seed}" for seed in (0, 1) for form in ("base", "ear-n3-alpha1")]


@pytest.fixture(scope="module")
def sweep_file(tones: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four cells of two folds, two epochs each."""
    from sertool.teacher.embed import embed_manifest

    folder = tmp_path_factory.mktemp("sweep")
    embed_manifest(load_manifest(tones.manifest), EarTeacher(), folder / "embeddings")
    path = folder / "tiny.toml"
    path.write_text(SWEEP.format(manifest=tones.manifest, split=tones.split, embeddings=folder / "embeddings"))
    return path


@pytest.fixture(scope="module")
def swept(sweep_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny sweep, run to its end by the command; never changed."""
    from sertool.cli import main

    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["sertool", "paper", str(sweep_file), "-o", str(folder)])
        main()
    assert not stop.value.code
    return folder


COMMAND = [sys.executable, "-m", "sertool", "paper"]


def replaced(path: Path, old: str, new: str, name: str = "other.toml") -> Path:
    text = path.read_text()
    assert old in text
    other = path.with_name(name)
    other.write_text(text.replace(old, new))
    return other


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "tables" / "results.json").read_text())
    return content


def scores(folder: Path) -> list[Any]:
    """What the tables say, without the time it took and the places of the runs."""
    found = results(folder)
    rows = [{key: value for key, value in row.items() if key != "runs"} for row in found["rows"]]
    return [rows, found["graphs"], found["problems"]]


# --- which cells ---------------------------------------------------------------------------------------------------


def test_cells_are_named_by_what_differs_and_come_seed_by_seed(sweep_file: Path, tmp_path: Path) -> None:
    cells = plan_cells(load_sweep(str(sweep_file)), tmp_path)
    assert [cell.name for cell in cells] == NAMES
    assert cells[0].folder == tmp_path / "cells" / "mobilenet15-base-seed0"
    base, graph = cells[0].recipe, cells[1].recipe
    assert (base.neighbours.graph, base.network.width, base.training.epochs) == ("", 0.125, 2)
    assert (graph.neighbours.count, graph.neighbours.alpha, graph.neighbours.mode) == (3, 1.0, "bank")
    assert graph.neighbours.graph == str(tmp_path / "graphs" / "ear")
    assert [cell.recipe.training.seed for cell in cells] == [0, 0, 1, 1]


def test_what_a_group_sets_apart_stands_in_the_names(sweep_file: Path, tmp_path: Path) -> None:
    group = """\
[[cells]]
networks = ["cnn6", "vgg15"]
width = 0.25
base = false
neighbours = [3, 6]
alphas = [0.01]
distances = ["cosine", "l1"]
layers = ["fc2"]
folds = [2]
"""
    path = sweep_file.with_name("group.toml")
    path.write_text(sweep_file.read_text() + group)
    names = [cell.name for cell in plan_cells(load_sweep(str(path)), tmp_path) if cell.name not in NAMES]
    assert names == [
        f"{network}-width0.25-ear-n{count}-alpha0.01{distance}-student-fc2-seed0"
        for network in ("cnn6", "vgg15")
        for count in (3, 6)
        for distance in ("", "-l1")
    ]


def test_cells_that_two_groups_name_are_trained_once_on_the_folds_of_both(sweep_file: Path, tmp_path: Path) -> None:
    path = sweep_file.with_name("twice.toml")
    group = '[[cells]]\nnetworks = ["mobilenet15"]\nfolds = [{}]\n'
    path.write_text(sweep_file.read_text() + group.format(1))
    cells = plan_cells(load_sweep(str(path)), tmp_path)
    assert [cell.name for cell in cells] == NAMES and cells[0].folds == ()
    path.write_text(sweep_file.read_text().split("[[cells]]")[0] + group.format(2) + group.format(1))
    (cell,) = plan_cells(load_sweep(str(path)), tmp_path)
    assert cell.folds == (1, 2)


def test_both_protocols_train_on_other_parts_and_graphs(sweep_file: Path, tmp_path: Path) -> None:
    path = replaced(
        sweep_file, "[network]", 'parts = ["train", "validation"]\n[corpus]\nreport = ["validation", "test"]\n[network]'
    )
    cells = {cell.name: cell for cell in plan_cells(load_sweep(str(path)), tmp_path)}
    assert set(cells) == {*NAMES, *(f"validation-{name}" for name in NAMES)}
    for name in NAMES:
        tested, validated = cells[name], cells[f"validation-{name}"]
        assert (tested.setting.part, tested.recipe.data.parts) == ("test", ("train", "validation"))
        assert (validated.setting.part, validated.recipe.data.parts) == ("validation", ("train",))
    graphs = {Path(cell.recipe.neighbours.graph).name for cell in cells.values() if cell.setting.graph}
    assert graphs == {"ear", "validation-ear"}


@pytest.mark.parametrize("name", sorted(path.name.removesuffix(".toml") for path in READY.iterdir()))
def test_what_is_shipped_holds_the_paper_s_table(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERTOOL_DATA", raising=False)  # the data are needed when it runs, not before
    sweep = load_sweep(name)
    settings = {cell.setting for cell in plan_cells(sweep, tmp_path)}
    assert {(setting.count, setting.alpha) for setting in settings} >= {(0, 0.0), (3, 0.01), (6, 0.1), (9, 0.1)}
    assert {setting.graph for setting in settings} >= {"", "fc1", "fc2"}
    assert sweep.data.corpus == name.removesuffix("-small")
    small = name.endswith("-small")
    assert (sweep.training.epochs, sweep.network.width) == ((12, 0.5) if small else (50, 1.0))
    if not small:
        grid = {(n, alpha) for n in (3, 6, 9) for alpha in (0.01, 0.1, 1.0)}
        assert {(setting.count, setting.alpha) for setting in settings} >= grid


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[teachers.ear]", "[teacher.ear]", "no section [teacher]; did you mean 'teachers'?"),
        ("threshold = 0.8", "treshold = 0.8", "no key 'treshold' in [graphs.ear]; did you mean 'threshold'?"),
        ("seeds = [0, 1]", "seed = 0", "no key 'seed' in [cells.1]; did you mean 'seeds'?"),
        ("seeds = [0, 1]", "seeds = [0, -1]", "training.seed = -1: input should be greater than or equal to 0"),
        ("seeds = [0, 1]", 'seeds = "0"', "cells.1.seeds = '0': input should be a valid list"),
        ("seeds = [0, 1]", "seeds = []", "cells.1.seeds = []: list should have at least 1 item after validation"),
        ('teacher = "ear"', 'teacher = "eat"', "graphs.ear.teacher = 'eat': no such section; did you mean 'ear'?"),
        ('teacher = "ear"\n', "", "no 'teacher' in [graphs.ear]"),
        ("mobilenet15", "mobilenet", "did you mean 'mobilenet15'?"),
        ("[[3, 1.0]]", "[[3, -1.0]]", "neighbours.alpha = -1.0"),
        ("[[3, 1.0]]", "[[3]]", "cells.1.settings.1"),
        ("[[3, 1.0]]", "[[12, 1.0]]", "n = 12, but graphs.ear is cut at 9 neighbours"),
        ("seeds = [0, 1]", 'graphs = ["eat"]', "no section [graphs.eat]; did you mean 'ear'?"),
        ("seeds = [0, 1]", "alphas = [1.0]", "give neighbours and alphas together"),
        ("settings = [[3, 1.0]]", "base = false", "trains nothing"),
        ("threads = 1", "seed = 3", "training.seed differs between cells; give it in [[cells]]"),
        ("embeddings = ", "tuned = ", "teachers.ear: no section [tuned."),
        ("embeddings = ", 'at = "fc1"\ntuned = "x"\nembeddings = ', "give one of source, tuned and embeddings"),
        ("embeddings = ", 'at = "fc3"\nembeddings = ', "teachers.ear.at = 'fc3'"),
        ("[graphs.ear]", "[graphs.base]", "this name is taken"),
        ("[graphs.ear]", '[graphs."a/b"]', "string should match pattern"),
        ("[network]", "[network", "not TOML"),
        ("[[cells]]", "[cells]", "cells"),
    ],
)
def test_a_bad_sweep_is_one_line(
    sertool: Command, sweep_file: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    outcome = sertool("paper", replaced(sweep_file, old, new, "bad.toml"), "-o", tmp_path / "out")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
    assert outcome.err.startswith("sertool: ") and "bad.toml: " in outcome.err and message in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["emodb-smal"], "no such file, nor a sweep that is shipped; did you mean 'emodb-small'?"),
        (["{sweep}", "--only", "resnet*"], "--only 'resnet*': no such cell"),
        (["{sweep}", "--set", "graphs.ear=1"], "no section 'graphs'"),
        (["{sweep}", "--set", "training.epoch=1"], "did you mean 'epochs'?"),
        (["emodb-small"], "the variable SERTOOL_DATA is not set; name the folder that holds corpora/ and encoders/"),
        (["emodb-small", "--data", "{empty}"], "corpora/emodb"),
        (["{unembedded}"], "no embeddings folder"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    sertool: Command,
    sweep_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("SERTOOL_DATA", "")
    monkeypatch.delenv("SERTOOL_DATA")
    unembedded = replaced(sweep_file, "/embeddings", "/embeddinks", "unembedded.toml")
    places = {"sweep": sweep_file, "empty": tmp_path, "unembedded": unembedded}
    outcome = sertool("paper", *(argument.format(**places) for argument in arguments), "-o", tmp_path / "out")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
    assert outcome.err.startswith("sertool: ") and message in outcome.err


# --- the command ---------------------------------------------------------------------------------------------------


def test_cells_are_ordinary_folders_of_folds(sertool: Command, swept: Path) -> None:
    assert sorted(path.name for path in (swept / "cells").iterdir()) == sorted(NAMES)
    outcome = sertool("evaluate", swept / "cells" / NAMES[0], "--json")
    entry = json.loads(outcome.out)
    (base, _) = results(swept)["rows"]
    assert (entry["folds"], entry["items"]) == ([1, 2], 48)
    assert base["uar"]["by_seed"][0] == pytest.approx(entry["uar"])


def test_the_tables_say_what_compare_says(sertool: Command, swept: Path) -> None:
    cells = swept / "cells"
    outcome = sertool("compare", cells / "mobilenet15-base-seed*", cells / "mobilenet15-ear-*-seed*", "--json")
    expected = json.loads(outcome.out)
    base, graph = results(swept)["rows"]
    for row, described in zip((base, graph), expected["sets"], strict=True):
        for metric in ("uar", "accuracy"):
            assert row[metric] == described[metric]
    (difference,) = expected["differences"]
    for key in ("uar", "accuracy", "z_test", "mcnemar"):
        assert graph["difference"][key] == difference[key]
    (described,) = results(swept)["graphs"]
    assert described["effects"][0]["uar"] == difference["uar"]  # one setting: all of them are this one
    with (swept / "tables" / "table-3.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["uar_difference_low"]) == difference["uar"]["interval"][0]
    assert float(rows[1]["uar_difference_seeds_high"]) == difference["uar"]["seed_interval"][1]
    assert float(rows[1]["z_test_p"]) == difference["z_test"]["p"]
    assert float(rows[1]["mcnemar_p"]) == difference["mcnemar"]["p"]
    text = (swept / "tables" / "results.md").read_text()
    assert f"{100 * difference['uar']['difference']:+z.1f} [" in text
    assert f"{100 * base['uar']['mean']:.1f} ± {100 * base['uar']['seed_deviation']:.1f}" in text


def test_the_graph_is_described_as_sertool_graph_reports_it(swept: Path) -> None:
    reports = json.loads((swept / "graphs" / "ear" / "report.json").read_text())
    (graph,) = results(swept)["graphs"]
    for name in ("homophily", "same_speaker", "isolated"):
        assert graph[name] == pytest.approx(np.mean([report["graph"][name] for report in reports]))
    assert (graph["teacher"], graph["threshold"], graph["mutual"]) == ("ear", 0.8, False)


def test_figures_are_whole_and_drawn_alike_again(sertool: Command, sweep_file: Path, swept: Path) -> None:
    tables = swept / "tables"
    before = {path.name: path.read_bytes() for path in tables.iterdir()}
    assert set(before) == {
        *("results.json", "results.md", "table-3.csv", "graphs.csv"),
        *("table-3.png", "table-3.svg", "figure-2.png", "figure-2.svg"),
    }
    for name in ("table-3", "figure-2"):
        assert before[f"{name}.png"].startswith(b"\x89PNG")
        words = "".join(ET.fromstring(before[f"{name}.svg"]).itertext())
        assert "MobileNet-15 x0.125" in words and "ear" in words
    outcome = sertool("paper", sweep_file, "-o", swept, "--tables")
    assert outcome.code == 0
    assert {path.name: path.read_bytes() for path in tables.iterdir()} == before


def test_finished_cells_are_not_trained_again(sertool: Command, sweep_file: Path, swept: Path) -> None:
    checkpoints = {path: path.stat().st_mtime_ns for path in swept.glob("cells/*/fold-*/*.safetensors")}
    assert len(checkpoints) == 8
    outcome = sertool("paper", sweep_file, "-o", swept, "--json")
    assert outcome.code == 0 and "4 cells, 0 to train" in outcome.err
    assert json.loads(outcome.out)["failed"] == {}
    assert {path: path.stat().st_mtime_ns for path in swept.glob("cells/*/fold-*/*.safetensors")} == checkpoints
    plan = sertool("paper", sweep_file, "-o", swept, "--dry-run", "--json")
    assert json.loads(plan.out)[NAMES[0]] == {"folds": "all", "folds_trained": 2, "evaluated": True}


def test_a_killed_sweep_goes_on_to_the_same_result(
    sertool: Command, sweep_file: Path, swept: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen([*COMMAND, sweep_file, "-o", tmp_path / "killed"], stderr=subprocess.DEVNULL)
    first = tmp_path / "killed" / "cells" / NAMES[0]
    deadline = time.monotonic() + 600
    while not any(first.glob("fold-*/history.csv")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "cells" / NAMES[-1]).exists()
    outcome = sertool("paper", sweep_file, "-o", tmp_path / "killed", "--jobs", 2)
    assert outcome.code == 0
    assert scores(tmp_path / "killed") == scores(swept)
    for path in swept.glob("cells/*/fold-*/checkpoint.safetensors"):
        assert (tmp_path / "killed" / path.relative_to(swept)).read_bytes() == path.read_bytes()


def test_a_permuted_manifest_gives_the_same_tables(
    sertool: Command, sweep_file: Path, swept: Path, tones: Any, tmp_path: Path
) -> None:
    head, *rows = tones.manifest.read_text().splitlines()
    permuted = tones.folder / "permuted.csv"
    permuted.write_text("\n".join([head, *reversed(rows)]))
    path = replaced(sweep_file, str(tones.manifest), str(permuted), "permuted.toml")
    assert sertool("paper", path, "-o", tmp_path / "permuted").code == 0
    permuted.unlink()
    assert scores(tmp_path / "permuted") == scores(swept)


def test_runs_trained_elsewhere_are_taken_in(
    sertool: Command, sweep_file: Path, swept: Path, own_tones: Any, tmp_path: Path
) -> None:
    """The corpus was moved, and other threads are used: neither decides a result."""
    path = replaced(sweep_file, "threads = 1", "threads = 2", "moved.toml")
    path.write_text(path.read_text().replace(str(load_sweep(str(path)).data.manifest), str(own_tones.manifest)))
    shutil.copytree(swept / "cells", tmp_path / "adopted" / "cells")
    outcome = sertool("paper", path, "-o", tmp_path / "adopted")
    assert outcome.code == 0 and "0 to train" in outcome.err
    assert scores(tmp_path / "adopted") == scores(swept)


def test_a_cell_that_cannot_be_trained_is_reported_and_the_others_are(
    sertool: Command, sweep_file: Path, swept: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "partly"
    shutil.copytree(swept / "cells" / NAMES[0], folder / "cells" / NAMES[2])  # seed 0 where seed 1 belongs
    shutil.copytree(swept / "cells" / NAMES[3], folder / "cells" / NAMES[3])
    outcome = sertool("paper", sweep_file, "-o", folder, "--only", "*-seed1")
    assert outcome.code == 1
    assert f"{NAMES[2]}: failed: " in outcome.err and "holds a run with training.seed = 0, not 1" in outcome.err
    assert outcome.err.splitlines()[-1].startswith(f"sertool: 1 of 2 cells failed: {NAMES[2]}: ")
    assert "mobilenet15-ear-n3-alpha1-seed1" not in outcome.err
    # What cannot be compared is not: the base is of another seed.
    assert (folder / "tables" / "results.md").is_file()


def test_a_graph_without_edges_fails_its_cells_alone(
    sertool: Command, sweep_file: Path, swept: Path, tmp_path: Path
) -> None:
    path = replaced(sweep_file, "threshold = 0.8", "threshold = 1.0", "bare.toml")
    folder = tmp_path / "bare"
    for name in (NAMES[0], NAMES[2]):
        shutil.copytree(swept / "cells" / name, folder / "cells" / name)
    outcome = sertool("paper", path, "-o", folder, "--json")
    assert outcome.code == 1
    found = json.loads(outcome.out)
    assert set(found["failed"]) == {NAMES[1], NAMES[3]}
    assert all("no two clips" in reason for reason in found["failed"].values())
    assert [row["name"] for row in found["rows"]] == ["mobilenet15-base"]


def test_a_worker_that_dies_takes_no_other_cell_with_it(sweep_file: Path, tmp_path: Path) -> None:
    import multiprocessing

    from sertool.corpora.splits import load_split

    sweep = load_sweep(str(sweep_file))
    split = load_split(sweep.split(tmp_path))
    first, _, second, _ = (with_folds(cell, split) for cell in plan_cells(sweep, tmp_path))
    outcomes = []
    for event in train_cells([first, second], jobs=1):
        if isinstance(event, Epoch) and event.cell == first:
            for process in multiprocessing.active_children():
                if process.pid is not None:
                    os.kill(process.pid, signal.SIGKILL)
        elif not isinstance(event, Epoch):
            outcomes.append(event)
    died, finished = outcomes
    assert isinstance(died, Failed) and "signal SIGKILL" in died.reason
    assert isinstance(finished, Finished) and finished.cell == second


def test_both_protocols_are_run_and_told_apart(sertool: Command, sweep_file: Path, tones: Any, tmp_path: Path) -> None:
    split = tmp_path / "split.json"
    parts = {"train": ["ada", "dov"], "validation": ["bea", "eli"], "test": ["cyd", "fox"]}
    split.write_text(json.dumps({"folds": [parts]}))
    path = replaced(sweep_file, str(tones.split), str(split), "protocols.toml")
    path = replaced(
        path, "[network]", 'parts = ["train", "validation"]\n[corpus]\nreport = ["validation", "test"]\n[network]'
    )
    folder = tmp_path / "protocols"
    assert sertool("paper", path, "-o", folder, "--only", "*seed0").code == 0
    heard = {
        name: {
            clip["speaker"]
            for clip in json.loads((folder / "cells" / name / "fold-1" / "trained.json").read_text()).values()
        }
        for name in (NAMES[1], f"validation-{NAMES[1]}")
    }
    assert heard == {NAMES[1]: {"ada", "bea", "dov", "eli"}, f"validation-{NAMES[1]}": {"ada", "dov"}}
    rows = results(folder)["rows"]
    assert [(row["part"], row["graph"], row["clips"]) for row in rows] == [
        *(("validation", graph, 24) for graph in ("", "ear")),
        *(("test", graph, 24) for graph in ("", "ear")),
    ]
    assert [(graph["name"], graph["part"]) for graph in results(folder)["graphs"]] == [
        ("ear", "validation"),
        ("ear", "test"),
    ]
    assert "MobileNet-15 x0.125 validation | MobileNet-15 x0.125 test" in (folder / "tables" / "results.md").read_text()


def test_time_left_follows_the_epochs_measured(sweep_file: Path, tmp_path: Path) -> None:
    from sertool.fit import EpochReport
    from sertool.paper.progress import SweepProgress

    cells = [replace(cell, folds=(1, 2)) for cell in plan_cells(load_sweep(str(sweep_file)), tmp_path)]
    progress = SweepProgress(cells, cells[:1], jobs=2)
    assert (progress.cells_done, progress.epochs_done, progress.epochs, progress.seconds_left) == (1, 4, 16, None)
    for cell, seconds in ((cells[1], 3.0), (cells[2], 1.0)):
        progress.update(Epoch(cell, 1, EpochReport(1, 2, 1.0, 0.0, 0.0, 0.0, 0.001, seconds)))
    # Left: three epochs of the base and seven with the graph, two at a time.
    assert progress.seconds_left == pytest.approx((3 * 1.0 + 7 * 3.0) / 2)
    progress.update(Failed(cells[3], "no reason"))
    assert progress.seconds_left == pytest.approx((3 * 1.0 + 3 * 3.0) / 2)
    assert (progress.cells_done, progress.epochs_done) == (2, 10)


def test_the_figure_draws_what_the_table_says(swept: Path) -> None:
    from sertool.paper.figures import _differences

    rows = results(swept)["rows"]
    found = rows[1]["difference"]["uar"]
    (axes,) = _differences(rows[1:], rows).axes
    drawn = [list(line.get_xdata()) for line in axes.lines]
    assert drawn[:2] == [
        [pytest.approx(100 * end) for end in found["interval"]],
        [pytest.approx(100 * found["difference"])],
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["n = 3, alpha = 1"]


def test_a_fold_that_the_split_lacks_is_refused(sweep_file: Path, tones: Any, tmp_path: Path) -> None:
    from sertool.corpora.splits import load_split

    path = replaced(sweep_file, "seeds = [0, 1]", "folds = [3]", "folds.toml")
    cell = plan_cells(load_sweep(str(path)), tmp_path)[0]
    with pytest.raises(UsageError, match="mobilenet15-base-seed0: no fold 3; valid: 1 to 2"):
        with_folds(cell, load_split(tones.split))


def test_ctrl_c_is_one_line_and_what_is_done_stays(sweep_file: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, sweep_file, "-o", tmp_path / "stopped"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "fold 1" in line:
            os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to the workers, too
    assert process.wait() == 130
    assert lines[-1] == "sertool: interrupted; the same command goes on from here\n"
    assert "Traceback" not in "".join(lines)
    assert (tmp_path / "stopped" / "cells" / NAMES[0] / "fold-1" / "history.csv").is_file()


def test_a_shipped_sweep_can_be_shown_and_taken_over(sertool: Command, tmp_path: Path) -> None:
    outcome = sertool("paper", "emodb", "--show")
    assert outcome.code == 0
    (tmp_path / "mine.toml").write_text(outcome.out)
    assert load_sweep(str(tmp_path / "mine.toml")) == load_sweep("emodb")
