"""``sertool pretrain``: several corpora as one source, and a training that begins with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sertool.run import load_run

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("--set", "network.width=0.125", "--set", "training.epochs=3", "--set", "augmentation.excerpt_frames=32",
         "--set", "training.threads=1")  # fmt: skip


@pytest.fixture
def sources(own_tones: Any) -> list[Path]:
    """Two corpora of three speakers each, in which joy is called differently."""
    header, *rows = own_tones.manifest.read_text().splitlines()
    manifests = []
    for name, speakers in (("one", ("ada", "bea", "cyd")), ("two", ("dov", "eli", "fox"))):
        kept = [row for row in rows if row.split(",")[1] in speakers]
        text = "\n".join([header, *kept]).replace(",joy,", ",happy," if name == "two" else ",joy,")
        manifests.append(own_tones.folder / f"{name}.csv")
        manifests[-1].write_text(text + "\n")
    return manifests


def test_a_training_on_ones_own_corpus_begins_with_others(sources: list[Path], tmp_path: Path, sertool: Any) -> None:
    command = ("pretrain", sources[0], sources[1], "--rename", "happy=joy", "-o", tmp_path / "source", *SMALL)
    outcome = sertool(*command)
    assert outcome.code == 0, outcome.err
    assert "72 clips, 6 speakers" in outcome.out and f"--from {tmp_path / 'source'}" in outcome.out
    run = load_run(tmp_path / "source")
    assert run.labels == ("anger", "joy", "sadness")
    assert {clip["speaker"] for clip in run.trained.values()} == {
        *("one/ada", "one/bea", "one/cyd", "two/dov", "two/eli", "two/fox")
    }
    assert [corpus["name"] for corpus in run.provenance["corpora"]] == ["one", "two"]
    assert run.recipe.normalization.by == "corpus" and run.recipe.network.time_padding == "causal"
    assert "finished already" in sertool(*command).err


def test_whom_the_sources_hold_cannot_be_tested_afterwards(
    sources: list[Path], own_tones: Any, tmp_path: Path, sertool: Any
) -> None:
    assert sertool("pretrain", sources[0], "-o", tmp_path / "source", *SMALL).code == 0
    own = ("--set", f"data.manifest={own_tones.manifest}", "--set", f"data.split={own_tones.split}")
    assert sertool("recipe", "new", tmp_path / "own.toml", "--preset", "device", *own).code == 0
    train = ("train", tmp_path / "own.toml", "--from", tmp_path / "source", "-o", tmp_path / "own", *SMALL[:2])
    own_tones.split.write_text(json.dumps({"folds": [{"train": ["dov", "eli"], "test": ["fox", "cyd"]}]}))
    outcome = sertool(*train)
    assert outcome.code == 2 and "cyd-anger-0.wav' of 'cyd', whom fold 1 holds out" in outcome.err
    own_tones.split.write_text(json.dumps({"folds": [{"train": ["dov", "eli"], "test": ["fox"]}]}))
    outcome = sertool(*train, *SMALL[2:])
    assert outcome.code == 0, outcome.err
    assert load_run(tmp_path / "own").provenance["from"]["recipe"]["normalization"]["by"] == "corpus"


def test_other_clips_are_not_mixed_into_a_run(sources: list[Path], tmp_path: Path, sertool: Any) -> None:
    assert sertool("pretrain", sources[0], "-o", tmp_path / "source", *SMALL).code == 0
    kept = (tmp_path / "source" / "manifest.csv").read_bytes()
    outcome = sertool("pretrain", *sources, "-o", tmp_path / "source", *SMALL)
    assert outcome.code == 2 and "source: holds a run on other clips; give another folder" in outcome.err
    assert (tmp_path / "source" / "manifest.csv").read_bytes() == kept
