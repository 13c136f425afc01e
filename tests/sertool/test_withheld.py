"""Labels that are withheld: drawn evenly and alike for all networks, and never learnt from; their clips are."""

from __future__ import annotations

import json
import math
from collections import Counter
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

from edge_runtime.errors import UsageError
from sertool.corpora.manifest import Clip, Manifest
from sertool.corpora.withheld import withhold_labels
from sertool.distill import out_of_fold_logits
from sertool.fit import EpochReport, fit
from sertool.run import load_run

pytestmark = pytest.mark.usefixtures("one_thread")

SPEAKERS, LABELS = ("ada", "bea", "cyd"), ("anger", "joy")


def corpus(takes: int) -> Manifest:
    names = [(speaker, label, take) for speaker in SPEAKERS for label in LABELS for take in range(takes)]
    clips = (Clip(f"{s}-{e}-{t}.wav", Path(f"{s}-{e}-{t}.wav"), s, e) for s, e, t in names)
    return Manifest(tuple(clips), Path("corpus.csv"))


def labelled(manifest: Manifest) -> set[str]:
    return {clip.key for clip in manifest.clips if clip.label}


# --- the draw ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(takes=st.integers(1, 9), share=st.floats(0.01, 1.0), seed=st.integers(0, 99), order=st.randoms())
def test_labels_are_drawn_evenly_whatever_the_order_of_the_rows(
    takes: int, share: float, seed: int, order: Any
) -> None:
    manifest = corpus(takes)
    drawn = withhold_labels(manifest, range(len(manifest)), share, seed)
    strata = Counter((clip.speaker, clip.label) for clip in drawn.clips if clip.label)
    for label in LABELS:
        of_speakers = [strata[speaker, label] for speaker in SPEAKERS]
        assert sum(of_speakers) == max(1, round(share * takes * len(SPEAKERS)))
        assert max(of_speakers) - min(of_speakers) <= 1
    rows = list(range(len(manifest)))
    order.shuffle(rows)
    shuffled = replace(manifest, clips=tuple(manifest.clips[row] for row in rows))
    assert labelled(withhold_labels(shuffled, rows, share, seed)) == labelled(drawn)


def test_a_speaker_of_more_clips_keeps_more_labels() -> None:
    clips = [Clip(f"{n}.wav", Path(f"{n}.wav"), "ada" if n < 60 else "bea", "joy") for n in range(80)]
    drawn = withhold_labels(Manifest(tuple(clips), Path("corpus.csv")), range(80), 0.2, seed=0)
    kept = Counter(clip.speaker for clip in drawn.clips if clip.label)
    assert kept.total() == 16
    assert kept["ada"] in (11, 12, 13)


def test_every_clip_is_drawn_as_often_and_less_is_a_part_of_more() -> None:
    manifest, times = corpus(4), Counter[str]()
    for seed in range(400):
        some, more = (labelled(withhold_labels(manifest, range(len(manifest)), share, seed)) for share in (0.25, 0.5))
        assert some < more
        times.update(some)
    # 100 on average; the standard deviation of a binomial count is under 9.
    assert set(times) == {clip.key for clip in manifest.clips}
    assert all(64 < count < 136 for count in times.values())


def test_other_rows_keep_their_labels_and_a_share_of_one_is_all() -> None:
    manifest = corpus(3)
    drawn = withhold_labels(manifest, range(6), 0.01, seed=0)
    assert drawn.clips[6:] == manifest.clips[6:]
    assert len(labelled(drawn)) == len(manifest) - 6 + len(LABELS)
    assert withhold_labels(manifest, range(len(manifest)), 1.0, seed=0) == manifest


# --- trainings -----------------------------------------------------------------------------------------------------


HALF = {"data__labelled_share": 0.5, "training__epochs": 2, "training__batch_size": 8}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


def withheld(folder: Path) -> list[str]:
    trained = json.loads((folder / "trained.json").read_text())
    return [key for key, clip in trained.items() if not clip["label"]]


def relabel(manifest: Path, keys: list[str], label: Callable[[str], str]) -> None:
    rows = [row.split(",") for row in manifest.read_text().splitlines()]
    manifest.write_text(
        "\n".join(",".join([row[0], row[1], label(row[2]) if row[0] in keys else row[2], row[3]]) for row in rows)
    )


EVERY_USE_OF_LABELS: dict[str, Any] = {
    "data__clips": "once",
    "network__time_padding": "causal",
    "normalization__personal": 0.5,
    "normalization__personal_label": "joy",
    "normalization__personal_seconds": 5.0,
    "augmentation__mixup": 0.5,
    "training__label_smoothing": 0.1,
    "distillation__embedding_weight": 1.0,
    "distillation__relation_weight": 1.0,
    "distillation__logit_weight": 0.5,
}


def test_a_withheld_label_decides_nothing(
    own_tones: Any, ear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = own_tones.recipe(
        distillation__embeddings=str(ear),
        **EVERY_USE_OF_LABELS,
        **(HALF | {"training__epochs": 1, "data__labelled_share": 0.8}),
    )
    fit(recipe, tmp_path / "first")
    lost = withheld(tmp_path / "first")
    assert len(lost) == 48 - 3 * 13

    # The draw itself hangs on the labels of all clips, so it is held fast.
    def same_draw(manifest: Manifest, rows: list[int], share: float, seed: int) -> Manifest:
        return replace(
            manifest, clips=tuple(replace(clip, label="") if clip.key in lost else clip for clip in manifest.clips)
        )

    monkeypatch.setattr("sertool.fit.withhold_labels", same_draw)
    relabel(own_tones.manifest, lost, {"anger": "joy", "joy": "sadness", "sadness": "anger"}.__getitem__)
    fit(recipe, tmp_path / "second")
    assert_same_weights(tmp_path / "first", tmp_path / "second")


def test_the_teachers_heads_learn_from_labelled_clips_and_judge_all() -> None:
    manifest = corpus(6)
    vectors = np.random.default_rng(0).normal(size=(len(manifest), 5)).astype(np.float32)
    clips = withhold_labels(manifest, range(len(manifest)), 0.5, seed=0).clips
    known = [row for row, clip in enumerate(clips) if clip.label]
    alone = out_of_fold_logits(vectors[known], [clips[row] for row in known], LABELS)
    logits = out_of_fold_logits(vectors, clips, LABELS)
    np.testing.assert_allclose(logits[known], alone, atol=1e-6)
    assert np.all(np.abs(logits).sum(1) > 0)


def test_without_graph_and_teacher_they_are_left_out(own_tones: Any, tmp_path: Path) -> None:
    fit(own_tones.recipe(**HALF), tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "trained.json").read_text())
    tested = [f"{speaker}-" for speaker in ("cyd", "fox")]
    head, *rows = own_tones.manifest.read_text().splitlines()
    rows = [row for row in rows if row.split(",")[0] in kept or row[:4] in tested]
    own_tones.manifest.write_text("\n".join([head, *rows]))
    fit(own_tones.recipe(**(HALF | {"data__labelled_share": 1.0})), tmp_path / "fewer")
    assert len(kept) == 24
    assert_same_weights(tmp_path / "run", tmp_path / "fewer")
    assert load_run(tmp_path / "run").normalization == load_run(tmp_path / "fewer").normalization


def test_graph_and_teacher_learn_from_them(own_tones: Any, ear: Path, tmp_path: Path) -> None:
    """An edge, and an embedding, of clips without label decides weights; nothing else tells those runs apart."""
    recipes = {
        "graph": own_tones.recipe(graph=True, neighbours__mode="bank", **HALF),
        "teacher": own_tones.recipe(distillation__embeddings=str(ear), distillation__embedding_weight=1.0, **HALF),
    }
    for name, recipe in recipes.items():
        fit(recipe, tmp_path / name)
    lost = withheld(tmp_path / "graph")
    assert lost == withheld(tmp_path / "teacher")  # the comparison is on the same labels
    path = own_tones.graph / "fold-1" / "graph.csv"
    head, *rows = path.read_text().splitlines()
    among = [row for row in rows if {*row.split(",")[:2]} <= {*lost}]
    assert among
    isolated = [f"{clip},," for clip in {row.split(",")[0] for row in among}]
    path.write_text("\n".join([head, *(row for row in rows if row not in among), *isolated]))
    fit(recipes["graph"], tmp_path / "other graph")
    name = "head.fc1.weight"
    assert not torch.equal(weights(tmp_path / "graph")[name], weights(tmp_path / "other graph")[name])

    reports: list[EpochReport] = []
    untaught = own_tones.recipe(distillation__embeddings=str(ear), distillation__relation_weight=1e-30, **HALF)
    fit(untaught, tmp_path / "untaught", on_epoch=reports.append)
    assert not torch.equal(weights(tmp_path / "teacher")[name], weights(tmp_path / "untaught")[name])
    # A network that has learnt nothing yet: the mean over labelled clips is what guessing one of three costs.
    assert reports[0].loss == pytest.approx(math.log(3), rel=0.2)


def test_a_stopped_run_goes_on_with_the_same_labels_only(own_tones: Any, ear: Path, tmp_path: Path) -> None:
    recipe = own_tones.recipe(
        distillation__embeddings=str(ear), distillation__logit_weight=0.5, augmentation__mixup=0.5, **HALF
    )
    fit(recipe, tmp_path / "whole")

    def stop(report: EpochReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "run", on_epoch=stop)
    text = own_tones.manifest.read_text()
    relabel(own_tones.manifest, withheld(tmp_path / "run")[:9], lambda label: "anger")
    with pytest.raises(
        UsageError, match=r"holds a run on other clips: in .*, (other labels are withheld|clip .* has another label)"
    ):
        fit(recipe, tmp_path / "run")
    own_tones.manifest.write_text(text)
    with pytest.raises(UsageError, match=r"holds a run with data\.labelled_share = 0\.5, not 0\.25"):
        fit(own_tones.recipe(**(HALF | {"data__labelled_share": 0.25})), tmp_path / "run")
    fit(recipe, tmp_path / "run")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_the_command_and_the_report_say_how_many_labels_were_used(sertool: Any, tones: Any, tmp_path: Path) -> None:
    done = sertool("recipe", "new", tmp_path / "recipe.toml")
    values = ["data.labelled_share=0.25", f"data.manifest={tones.manifest}", f"data.split={tones.split}"]
    values += ["data.window_samples=8448", "network.name=mobilenet15", "training.epochs=1", "neighbours.mode=bank"]
    values += [f"neighbours.graph={tones.graph}"]
    sets = [word for value in values for word in ("--set", value)]
    done = sertool("train", tmp_path / "recipe.toml", "-o", tmp_path / "run", *sets)
    assert done.code == 0, done.err
    assert "48 clips, 4 speakers, 3 labels of 12 clips" in done.err
    assert sertool("evaluate", tmp_path / "run").code == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "48 clips of 4 speakers (fold 1), 12 of them with their label" in page
    assert "25% of the labels" in page
