"""Distillation: heads judge unknown speakers only, each term teaches and resumes, and tested speakers touch nothing."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from edge_runtime.errors import UsageError
from edge_runtime.frontend import FrontEnd, log_mel
from sertool.audio import content_hash
from sertool.augment import Mixture
from sertool.corpora.manifest import Clip, load_manifest
from sertool.distill import HEADS, Distiller, TeacherView, fit_head, out_of_fold_logits
from sertool.epochs import save_history
from sertool.evaluate import evaluate_run
from sertool.fit import EpochReport, fit
from sertool.losses import embedding_loss, opinion_loss, relation_loss
from sertool.metrics import confusion_matrix, unweighted_average_recall
from sertool.recipe import Distillation, decisive, write_recipe
from sertool.run import RunError, load_run
from sertool.teacher.embed import embed_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = ("anger", "joy", "sadness")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def history(folder: Path) -> list[dict[str, float]]:
    with (folder / "history.csv").open(newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)
        ]


def stop(report: EpochReport) -> None:
    raise KeyboardInterrupt


# --- the heads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_a_head_is_the_logistic_regression_of_scikit_learn(strength: float) -> None:
    rng = np.random.default_rng(0)
    truth = rng.choice(4, 90, p=[0.55, 0.25, 0.15, 0.05])
    vectors = (rng.normal(size=(90, 12)) + 2 * np.eye(4, 12)[truth]).astype(np.float32)
    oracle = LogisticRegression(C=strength, class_weight="balanced", tol=1e-9, max_iter=5000)
    oracle.fit(vectors.astype(np.float64), truth)
    weights, biases = fit_head(vectors, truth, 4, strength)
    shares = softmax(vectors @ weights + biases, axis=1)
    np.testing.assert_allclose(shares, oracle.predict_proba(vectors), atol=1e-3)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), clips=st.integers(2, 9))
def test_standardised_is_the_scaler_of_scikit_learn(seed: int, clips: int) -> None:
    vectors = np.random.default_rng(seed).normal(5, 3, size=(clips, 4)).astype(np.float32)
    vectors[:, 2] = 0.1  # a constant whose mean in floating point is another number
    expected = StandardScaler().fit_transform(vectors.astype(np.float64))
    found = TeacherView.of(vectors, {}).standardised(range(clips))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def corpus(speakers: int, takes: int = 2) -> list[Clip]:
    return [
        Clip(f"{speaker:02}-{label}-{take}", Path("unread.wav"), f"{speaker:02}", label)
        for speaker in range(speakers)
        for label in LABELS
        for take in range(takes)
    ]


@pytest.mark.parametrize("speakers", [3, HEADS, HEADS + 3])
def test_a_head_never_hears_the_labels_of_whom_it_judges(speakers: int) -> None:
    clips = corpus(speakers)
    vectors = np.random.default_rng(0).normal(size=(len(clips), 20)).astype(np.float32)
    before = out_of_fold_logits(vectors, clips, LABELS)
    lied = [
        replace(clip, label=LABELS[LABELS.index(clip.label) - 1]) if clip.speaker == "01" else clip for clip in clips
    ]
    after = out_of_fold_logits(vectors, lied, LABELS)
    changed = {clip.speaker for clip, equal in zip(clips, (before == after).all(1), strict=True) if not equal}
    # With more speakers than heads, those who share a head with the liar are not told the lie either.
    unaware = {f"{speaker:02}" for speaker in range(1, speakers, HEADS)}
    assert changed == {clip.speaker for clip in clips} - unaware


def test_what_tells_one_speakers_labels_tells_a_head_nothing() -> None:
    """Each speaker says each label in a way of its own: known by heart in sample, a riddle out of fold."""
    clips = corpus(4)
    ways = [LABELS.index(clip.label) + len(LABELS) * int(clip.speaker) for clip in clips]
    vectors = np.eye(len(LABELS) * 4, dtype=np.float32)[ways]
    truth = np.array([LABELS.index(clip.label) for clip in clips])
    weights, biases = fit_head(vectors, truth, len(LABELS))
    assert (np.argmax(vectors @ weights + biases, 1) == truth).all()
    np.testing.assert_allclose(np.ptp(out_of_fold_logits(vectors, clips, LABELS), axis=1), 0, atol=1e-6)


@pytest.mark.parametrize("speakers", [1, 4])
def test_a_label_that_one_speaker_alone_has_cannot_be_judged(speakers: int) -> None:
    clips = [clip for clip in corpus(speakers) if clip.label != "joy" or clip.speaker == "00"]
    with pytest.raises(UsageError, match=r"^distillation\.logit_weight: only 00 can teach 'joy'|'anger', so no .*$"):
        out_of_fold_logits(np.zeros((len(clips), 3), np.float32), clips, LABELS)


HELD = """
import sys
from hashlib import sha256
from pathlib import Path
import numpy as np
import safetensors.numpy
import torch
from sertool.corpora.manifest import Clip
from sertool.distill import Distiller, TeacherView
from sertool.files import write_json, write_text
from sertool.recipe import Distillation
from sertool.teacher.embed import load_embeddings

folder, count, width = Path(sys.argv[1]) / sys.argv[2], int(sys.argv[2]), 4096
folder.mkdir()
contents = [sha256(bytes([row % 256, row // 256])).hexdigest() for row in range(count)]
for start in range(0, count, 64):
    part = b"".join(map(bytes.fromhex, contents[start : start + 64]))
    tensors = {"contents": np.frombuffer(part, np.uint8).reshape(-1, 32), "vectors": np.ones((64, width), np.float32)}
    safetensors.numpy.save_file(tensors, folder / f"vectors-{start}.safetensors")
write_json(folder / "teacher.json", {"name": "ones", "identity": "ones", "dimension": width})
write_text(folder / "index.csv", "\\n".join(["clip,content", *(f"{row},{c}" for row, c in enumerate(contents))]))
del tensors
view = TeacherView.of(load_embeddings(folder).rows, {})
clips = [Clip(str(row), Path(str(row)), str(row % 7), "joy") for row in range(count)]
distiller = Distiller(Distillation(embeddings="e", embedding_weight=1.0), view, clips, ["joy"], 8)
for start in range(0, count, 64):
    distiller.loss(torch.arange(start, start + 64), None, torch.zeros(64, 8), torch.zeros(64, 1))
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["RssAnon"].split()[0]) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_the_embeddings(tmp_path: Path) -> None:
    def held(count: int) -> int:
        command = [sys.executable, "-c", HELD, str(tmp_path), str(count)]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    few, many = held(128), held(8192)
    assert many - few < 15e6, "of embeddings of 132 MB more"


# --- the terms in a step -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    torch.manual_seed(0)
    clips = corpus(3)
    return {
        "view": TeacherView.of(torch.randn(len(clips), 5).numpy(), {}),
        "clips": clips,
        "rows": torch.tensor([4, 0, 7, 11]),
        "pooled": torch.randn(4, 6),
        "logits": torch.randn(4, 3),
    }


@pytest.mark.parametrize("mixture", [None, Mixture(0.7, torch.tensor([2, 3, 1, 0]))])
def test_the_loss_is_the_weighted_sum_of_its_terms_on_mixed_targets(
    batch: dict[str, Any], mixture: Mixture | None
) -> None:
    view, clips, rows, pooled, logits = batch.values()
    vectors = view.standardised(range(len(clips)))
    values = {"embedding_weight": 2.0, "relation_weight": 3.0, "logit_weight": 0.5, "temperature": 4.0}

    def taught(**values: float) -> tuple[Distiller, float]:
        torch.manual_seed(1)
        distiller = Distiller(Distillation(embeddings="embeddings", **values), view, clips, LABELS, pooled.shape[1])
        return distiller, distiller.loss(rows, mixture, pooled, logits).item()

    distiller, loss = taught(**values)
    opinions = torch.from_numpy(softmax(out_of_fold_logits(vectors, clips, LABELS) / 4.0, axis=1))[rows]
    embeddings = torch.from_numpy(vectors)[rows]
    if mixture:
        partner = [2, 3, 1, 0]
        opinions = 0.7 * opinions + 0.3 * opinions[partner]
        embeddings = 0.7 * embeddings + 0.3 * embeddings[partner]
    terms = {
        "embedding_weight": 2.0 * embedding_loss(distiller.projection(pooled), embeddings),
        "relation_weight": 3.0 * relation_loss(pooled, embeddings),
        "logit_weight": 0.5 * opinion_loss(logits, opinions, 4.0),
    }
    assert loss == pytest.approx(sum(term.item() for term in terms.values()), rel=1e-5)
    for name, term in terms.items():
        assert taught(**{name: values[name]}, temperature=4.0)[1] == pytest.approx(term.item(), rel=1e-5)


# --- trainings -----------------------------------------------------------------------------------------------------


class Ear:
    """A teacher that hears how loud each mel band is, and so the pitch that the labels of the tones differ in."""

    name, identity, dimension = "ear", "ear-1", 64

    def __init__(self, heard: tuple[Path, ...] = ()) -> None:
        self.description: dict[str, Any] = {"name": self.name, "licence": "CC0-1.0"}
        self.heard_audio = frozenset(map(content_hash, heard)) if heard else None

    def embed(self, samples: np.ndarray) -> np.ndarray:
        return log_mel(samples, FrontEnd()).mean(0)


TERMS: dict[str, dict[str, float]] = {
    "embedding": {"distillation__embedding_weight": 1.0},
    "relation": {"distillation__relation_weight": 1.0},
    "logit": {"distillation__logit_weight": 1.0},
}
UNTAUGHT = {"distillation__relation_weight": 1e-30, "distillation__embedding_weight": 1e-36}
"""Lost in the last digit of every other loss, and yet in the history."""

SHORT = {"training__epochs": 6, "training__batch_size": 8, "training__learning_rate": 2e-3}


@pytest.fixture(scope="session")
def taught(tones: Any, ear: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A training with each term; where opinions are learnt, they replace the labels altogether."""
    folder = tmp_path_factory.mktemp("taught")
    for name, term in (TERMS | {"untaught": UNTAUGHT}).items():
        fit(tones.recipe(distillation__embeddings=str(ear), **SHORT, **term), folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("term", TERMS)
def test_each_term_is_learnt_and_so_are_the_labels(taught: dict[str, Path], term: str) -> None:
    losses = [row["distillation_loss"] for row in history(taught[term])]
    assert losses[-1] < 0.6 * losses[0]
    predictions = evaluate_run(load_run(taught[term]), "test")
    assert unweighted_average_recall(confusion_matrix(predictions.truth, predictions.predicted, 3)) > 0.75


def test_relations_come_from_the_teacher_and_not_with_the_labels(taught: dict[str, Path]) -> None:
    taught_loss, untaught_loss = (history(taught[name])[-1]["distillation_loss"] for name in ("relation", "untaught"))
    assert taught_loss < 0.6 * untaught_loss / UNTAUGHT["distillation__relation_weight"]


def test_a_weight_too_small_to_count_changes_nothing(tones: Any, taught: dict[str, Path], tmp_path: Path) -> None:
    """So the rest of a training hangs on no more of the section than its losses: not on its draws, for one."""
    fit(tones.recipe(**SHORT), tmp_path / "base")
    assert_same_weights(taught["untaught"], tmp_path / "base")  # and so the map is in neither
    assert {row["distillation_loss"] for row in history(tmp_path / "base")} == {0.0}


@pytest.mark.parametrize(
    "values",
    [
        TERMS["embedding"] | {"training__average": 0.9},
        TERMS["relation"] | {"augmentation__mixup": 0.5, "neighbours__mode": "pass"},
        TERMS["embedding"] | TERMS["relation"] | {"distillation__logit_weight": 0.5},
    ],
)
def test_a_stopped_training_resumes_to_the_same_weights(
    tones: Any, ear: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    recipe = tones.recipe(distillation__embeddings=str(ear), training__epochs=2, **values)
    fit(recipe, tmp_path / "whole")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, tmp_path / "stopped", on_epoch=stop)
    fit(recipe, tmp_path / "stopped", on_epoch=pytest.fail)
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")


def test_the_teachers_view_of_all_other_clips_touches_nothing(tones: Any, ear: Path, tmp_path: Path) -> None:
    manifest = load_manifest(tones.manifest)
    learned = manifest.indices(["ada", "bea", "dov", "eli"])
    training_clips = replace(manifest, clips=tuple(manifest.clips[row] for row in learned))
    embed_manifest(training_clips, Ear(), tmp_path / "learned only")
    for embeddings in (ear, tmp_path / "learned only"):
        every = TERMS["embedding"] | TERMS["relation"] | TERMS["logit"]
        recipe = tones.recipe(distillation__embeddings=str(embeddings), training__epochs=1, **every)
        fit(recipe, tmp_path / embeddings.name / "run")
    assert_same_weights(tmp_path / "ear" / "run", tmp_path / "learned only" / "run")


# --- what a run says of its teacher --------------------------------------------------------------------------------


def test_a_run_names_its_teacher_and_so_does_what_began_with_it(
    taught: dict[str, Path], tones: Any, ear: Path, tmp_path: Path
) -> None:
    run = load_run(taught["logit"])
    assert run.provenance["teacher"]["name"] == "ear"
    assert run.provenance["recipe"]["distillation"]["embeddings"] == "ear"
    assert str(ear.parent) not in json.dumps(run.provenance)
    record = json.loads((run.path / "distillation.json").read_text())
    assert record.keys() == {"teacher", "seen", "sha256"} and record["seen"] is None
    start = {"training__start": str(taught["logit"]), "training__epochs": 1, "training__learning_rate": 1e-4}
    fit(tones.recipe(**start), tmp_path / "further")
    assert load_run(tmp_path / "further").provenance["teacher"]["name"] == "ear"


def test_where_the_embeddings_lie_decides_nothing(tones: Any) -> None:
    one, other = (tones.recipe(distillation__embeddings=path, **TERMS["logit"]) for path in ("here", "there"))
    assert decisive(one) == decisive(other) != decisive(tones.recipe())


@pytest.mark.parametrize("damage", [None, "{", "[]", '{"teacher": {}}'])
def test_a_run_without_its_record_of_the_teacher(taught: dict[str, Path], tmp_path: Path, damage: str | None) -> None:
    run = shutil.copytree(taught["logit"], tmp_path / "run")
    (run / "distillation.json").unlink()
    if damage is not None:
        (run / "distillation.json").write_text(damage)
    with pytest.raises(RunError, match=r"distillation\.json: (missing or )?damaged"):
        _ = load_run(run).provenance


def test_history_goes_on_from_a_version_that_knew_no_distillation(tones: Any, tmp_path: Path) -> None:
    save_history(
        tmp_path / "history.csv", [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0, "distillation_loss": 3}]
    )
    assert history(tmp_path) == [
        {"epoch": 1, "loss": 2, "distillation_loss": 0},
        {"epoch": 2, "loss": 1, "distillation_loss": 3},
    ]


# --- refusals ------------------------------------------------------------------------------------------------------


def assert_refused(recipe: Any, folder: Path, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        fit(recipe, folder, on_epoch=pytest.fail)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("speaker", "part"), [("cyd", "test"), ("ada", "train")])
def test_a_teacher_that_heard_a_speaker_is_refused_and_on_demand_recorded(
    tones: Any, tmp_path: Path, speaker: str, part: str
) -> None:
    teacher = Ear((tones.folder / f"{speaker}-joy-0.wav",))
    embed_manifest(load_manifest(tones.manifest), teacher, tmp_path / "ear")
    values = {"distillation__embeddings": str(tmp_path / "ear"), "training__epochs": 1, **TERMS["logit"]}
    recipe = tones.recipe(**values)
    message = rf"ear: ear was trained on {part} speaker '{speaker}' of fold 1; .* --allow-seen$"
    assert_refused(recipe, tmp_path / "run", message)
    fit(recipe, tmp_path / "run", allow_seen=True)
    seen = json.loads((tmp_path / "run" / "distillation.json").read_text())["seen"]
    assert seen == {"train": [], "validation": [], "test": []} | {part: [speaker]}


def test_a_clip_that_was_not_embedded(tones: Any, tmp_path: Path) -> None:
    manifest = load_manifest(tones.manifest)
    embed_manifest(replace(manifest, clips=manifest.clips[1:]), Ear(), tmp_path / "ear")
    recipe = tones.recipe(distillation__embeddings=str(tmp_path / "ear"), **TERMS["logit"])
    assert_refused(recipe, tmp_path / "run", r"ear: no embedding of 'ada-anger-0\.wav', .*; run sertool embed")


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_does_not_go_on_with_another_teacher(tones: Any, ear: Path, tmp_path: Path, epochs: int) -> None:
    class Deaf(Ear):
        identity = "deaf"

        def embed(self, samples: np.ndarray) -> np.ndarray:
            return -super().embed(samples)

    values = {"training__epochs": epochs, **TERMS["relation"]}
    recipe = tones.recipe(distillation__embeddings=str(ear), **values)
    if epochs == 1:
        fit(recipe, tmp_path / "run")
    else:
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, tmp_path / "run", on_epoch=stop)
    embed_manifest(load_manifest(tones.manifest), Deaf(), tmp_path / "deaf")
    other = tones.recipe(distillation__embeddings=str(tmp_path / "deaf"), **values)
    assert_refused(other, tmp_path / "run", r"run: holds a run on other embeddings than .*deaf holds now; give another")


def test_the_graph_is_of_the_same_teacher(own_tones: Any, ear: Path, tmp_path: Path) -> None:
    values = {"distillation__embeddings": str(ear), "training__epochs": 1, **TERMS["relation"]}
    recipe = own_tones.recipe(graph=True, **values)
    assert_refused(
        recipe, tmp_path / "run", r"graph\.json: made from embeddings of ideal teacher, but .*ear holds those"
    )
    path = own_tones.graph / "fold-1" / "graph.json"
    path.write_text(json.dumps({"neighbours": 3, "teacher": {"name": "ear", "identity": "ear-1"}}))
    assert fit(recipe, tmp_path / "run")
    last = history(tmp_path / "run")[-1]
    assert last["neighbour_loss"] > 0 and last["distillation_loss"] > 0


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["distillation.logit_weight=0.5"], "distillation.logit_weight = 0.5 needs distillation.embeddings"),
        (["distillation.embeddings=nowhere"], "distillation.embeddings teach nothing without a weight"),
        (["distillation.embeddings=nowhere", "distillation.logit_weight=1"], "no embeddings folder"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    sertool: Callable[..., Any], tones: Any, tmp_path: Path, settings: list[str], message: str
) -> None:
    (tmp_path / "tones.toml").write_text(write_recipe(tones.recipe()))
    chosen = [part for setting in settings for part in ("--set", setting)]
    outcome = sertool("train", tmp_path / "tones.toml", "-o", tmp_path / "run", *chosen)
    assert (outcome.code, outcome.out) == (2, "") and message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


def test_rounding_is_trained_without_the_teacher_that_the_run_had(
    sertool: Callable[..., Any], taught: dict[str, Path], tmp_path: Path
) -> None:
    outcome = sertool(
        "train", "--from", taught["embedding"], "--qat", "-o", tmp_path / "qat", "--set", "training.epochs=1"
    )
    assert outcome.code == 0, outcome.err
    run = load_run(tmp_path / "qat")
    assert not run.recipe.distillation.embeddings and run.provenance["teacher"]["name"] == "ear"


def test_progress_tells_what_the_teacher_adds(
    sertool: Callable[..., Any], tones: Any, ear: Path, tmp_path: Path
) -> None:
    recipe = tones.recipe(distillation__embeddings=str(ear), training__epochs=1, **TERMS["embedding"])
    (tmp_path / "tones.toml").write_text(write_recipe(recipe))
    outcome = sertool("train", tmp_path / "tones.toml", "-o", tmp_path / "run")
    assert outcome.code == 0 and re.search(r"epoch 1/1, loss \d\.\d+, distillation \d\.\d+, learning rate", outcome.err)
