"""A tiny corpus of tones that a network learns within seconds, and trainings on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import soundfile

from edge_runtime.frontend import FrontEnd, log_mel
from sertool.corpora.manifest import load_manifest
from sertool.recipe import Recipe, parse_recipe

SPEAKERS = {"ada": "f", "bea": "f", "cyd": "f", "dov": "m", "eli": "m", "fox": "m"}
PITCH = {"anger": 900.0, "joy": 500.0, "sadness": 220.0}
FOLDS = [
    {"train": ["ada", "bea", "dov", "eli"], "test": ["cyd", "fox"]},
    {"train": ["bea", "cyd", "eli", "fox"], "test": ["ada", "dov"]},
]
WINDOW_SAMPLES = 8448


@dataclass(frozen=True)
class Tones:
    """A corpus of 72 clips of 0.6 s: six speakers, three labels, four takes.

    Attributes:
        folder: holds ``manifest.csv``, ``split.json`` with two folds, and the clips.
        graph: neighbours within the training speakers of each fold, cut at three.
    """

    folder: Path
    graph: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.csv"

    @property
    def split(self) -> Path:
        return self.folder / "split.json"

    def recipe(self, *, graph: bool = False, **values: object) -> Recipe:
        """Return a recipe of four short epochs; ``training__epochs=2`` replaces a value."""
        content: dict[str, dict[str, object]] = {
            "data": {
                "manifest": str(self.manifest),
                "split": str(self.split),
                "corpus": "tones",
                "window_samples": WINDOW_SAMPLES,
            },
            "network": {"name": "mobilenet15"},
            "neighbours": {"graph": str(self.graph) if graph else "", "alpha": 1.0},
            # Where processors differ: one that computes in bfloat16 would train so, and tests compare numbers.
            "training": {"epochs": 4, "threads": 1, "precision": "fp32"},
        }
        for name, value in values.items():
            section, key = name.split("__")
            content.setdefault(section, {})[key] = value
        return parse_recipe(content)


def write_tones(folder: Path) -> None:
    rng = np.random.default_rng(0)
    time = np.arange(9600) / 16000
    rows = ["file,speaker,label,gender"]
    for voice, (speaker, gender) in enumerate(SPEAKERS.items()):
        for label, hertz in PITCH.items():
            for take in range(4):
                tone = np.sin(2 * np.pi * hertz * (1 + 0.05 * voice) * time)
                beat = 1 + 0.6 * np.sin(2 * np.pi * (2 + take) * time)
                noise = rng.normal(scale=0.02, size=len(time))
                name = f"{speaker}-{label}-{take}.wav"
                soundfile.write(folder / name, 0.3 * tone * beat + noise, 16000)
                rows.append(f"{name},{speaker},{label},{gender}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    (folder / "split.json").write_text(json.dumps({"folds": FOLDS}))


def write_graph(corpus: Path, folder: Path) -> None:
    from sertool.graph import build_graph

    manifest = load_manifest(corpus / "manifest.csv")
    rng = np.random.default_rng(1)
    for number, fold in enumerate(FOLDS, start=1):
        clips = [manifest.clips[row] for row in manifest.indices(fold["train"])]
        ideal = np.stack([np.eye(3)[sorted(PITCH).index(clip.label)] for clip in clips])
        vectors = (ideal + rng.normal(scale=0.3, size=ideal.shape)).astype(np.float32)
        path = folder / f"fold-{number}"
        build_graph([clip.key for clip in clips], vectors, 0.8, 3).save(path / "graph.csv")
        (path / "graph.json").write_text(json.dumps({"neighbours": 3, "teacher": {"name": "ideal teacher"}}))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep log-Mel windows of the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERTOOL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Tones:
    """Shared and therefore never changed: see ``own_tones``."""
    folder = tmp_path_factory.mktemp("tones")
    write_tones(folder)
    write_graph(folder, folder / "graph")
    return Tones(folder, folder / "graph")


@pytest.fixture
def own_tones(tmp_path: Path) -> Tones:
    """The same corpus, for a test that damages it."""
    folder = tmp_path / "tones"
    folder.mkdir()
    write_tones(folder)
    write_graph(folder, folder / "graph")
    return Tones(folder, folder / "graph")


class Ear:
    """A teacher that hears how loud each mel band is, and so the pitch that the labels of the tones differ in."""

    name, identity, dimension, heard_audio = "ear", "ear-1", 64, None
    description: ClassVar[dict[str, Any]] = {"name": "ear", "licence": "CC0-1.0"}

    def embed(self, samples: Any) -> Any:
        return log_mel(samples, FrontEnd()).mean(0)


@pytest.fixture(scope="session")
def ear(tones: Tones, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of all tones by a teacher without an encoder."""
    from sertool.teacher.embed import embed_manifest

    folder = tmp_path_factory.mktemp("embeddings") / "ear"
    embed_manifest(load_manifest(tones.manifest), Ear(), folder)
    return folder


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def sertool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process, as its entry point does."""
    from sertool.cli import main

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sertool", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        code = stop.value.code
        return Outcome(0 if code is None else int(code), out, err)

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads and lose much where other work keeps the cores busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def _started(number: int, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    command = subprocess.Popen(
        [*torchrun, "-m", "sertool", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    with command:
        try:
            yield command
        finally:
            command.terminate()  # torchrun ends those it has started


@pytest.fixture
def started() -> Callable[..., AbstractContextManager[subprocess.Popen[str]]]:
    """``started(2, "train", ...)`` starts ``sertool`` in several processes on the CPU, and ends them."""
    return _started


@pytest.fixture
def run_in() -> Callable[..., tuple[int, str, str]]:
    """``run_in(2, "train", ...)`` gives exit code, stdout and stderr of ``sertool`` in several processes."""

    def run(number: int, *arguments: object) -> tuple[int, str, str]:
        with _started(number, *arguments) as command:
            out, err = command.communicate(timeout=120)
        return command.returncode, out, err

    return run
