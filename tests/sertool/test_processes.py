"""Several processes, as torchrun starts them, do what one does: training, embedding, going on, failing."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from edge_runtime.errors import SerError, UsageError
from edge_runtime.frontend import FloatArray
from sertool import processes
from sertool.batches import Batch
from sertool.corpora.manifest import Clip, load_manifest
from sertool.fit import EpochReport, fit
from sertool.networks import Head, Student
from sertool.recipe import Recipe, write_recipe
from sertool.run import load_run_teacher
from sertool.teacher.embed import embed_manifest, load_embeddings

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

LIMIT_S = 120.0


def assert_one_line(outcome: tuple[int, str, str], message: str) -> None:
    """What torchrun itself adds, a table and its own traceback, is not ours."""
    code, out, err = outcome
    assert (code, out) == (1, "")
    (line,) = [line for line in err.splitlines() if line.startswith("sertool: ")]
    assert message in line
    assert "/sertool/" not in err.replace(line, "")  # no traceback of ours


def write(recipe: Recipe, folder: Path) -> Path:
    path = folder / "recipe.toml"
    path.write_text(write_recipe(recipe))
    return path


def tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118


def reported(path: Path) -> int:
    """Return the epochs that a file to resume from stands after."""
    with safe_open(path, framework="pt") as file:
        return len(json.loads(file.metadata()["reports"]))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare each tensor by the length of the difference, as a share of its own."""
    assert found.keys() == expected.keys()
    errors = {name: float((found[name] - tensor).norm() / (tensor.norm() + 1e-12)) for name, tensor in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, (worst, errors[worst])


def history(run: Path) -> list[list[float]]:
    with (run / "history.csv").open(newline="") as file:
        return [[float(value) for name, value in row.items() if name != "seconds"] for row in csv.DictReader(file)]


def files(folder: Path) -> list[str]:
    """Return the names of all files, those of TensorBoard without host and process."""
    return sorted(path.name.split(".")[0] for path in folder.rglob("*") if path.is_file())


def workers(command: subprocess.Popen[str]) -> list[int]:
    """Return what torchrun has started."""
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text()
    return [int(child) for child in children.split()]


def stop_after(epoch: int) -> Callable[[EpochReport], None]:
    def stop(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise KeyboardInterrupt

    return stop


def test_a_run_in_several_processes_is_that_of_one_also_when_it_lost_one_and_goes_on_in_more(
    tones: Any, tmp_path: Path, started: Any, run_in: Any
) -> None:
    recipe = tones.recipe(
        graph=True,
        network__name="resnet9",
        network__width=0.125,
        augmentation__masks=1,
        augmentation__mixup=0.5,  # two clips at once bring no neighbours, so one of three processes has none of 2 rows
        invariance__weight=0.1,
        training__epochs=4,
        training__batch_size=23,  # of 48
        training__seed=6,  # which mixes the 2 rows of the second and the last epoch
        # So low that weights hardly move: Adam makes whole steps of the rounding of small gradients, and two runs drift
        # apart, those of one thread and of two as well.
        training__learning_rate=1e-6,
    )
    run, file = tmp_path / "several", write(recipe, tmp_path)
    with started(2, "train", file, "-o", run) as command:
        while not (run / "history.csv").is_file():
            assert command.poll() is None
            time.sleep(0.01)
        os.kill(workers(command)[1], signal.SIGKILL)
        _, err = command.communicate(timeout=LIMIT_S)  # far less than gloo waits for a process that is gone
        assert command.returncode == 1, err
    # Where torchrun has not ended the other one first, that says so.
    lines = [line for line in err.splitlines() if line.startswith("sertool: ")]
    assert all("another process of this command has ended" in line for line in lines)
    assert len(lines) <= 1 and "/sertool/" not in err

    # The gradients of one process, in Adam's moments; the statistics of batch normalisation; the embeddings.
    epochs = reported(run / "resume.safetensors")
    assert epochs < recipe.training.epochs
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "one", on_epoch=stop_after(epochs))
    one, several = (tensors(folder / "resume.safetensors") for folder in (tmp_path / "one", run))
    assert sum(name.endswith("exp_avg") for name in several) > 10
    assert_close(several, one, 1e-4)

    code, out, err = run_in(3, "train", file, "-o", run)
    assert (code, out) == (0, f"{run}: trained; now run: sertool evaluate {run}\n"), err
    first, last = [line for line in err.splitlines() if line.startswith(f"{run}: ")]
    assert first.endswith(f"resnet9 on cpu in fp32, 3 processes; goes on after epoch {epochs}")
    assert last.startswith(f"{run}: epoch 4/4, ")
    fit(recipe, tmp_path / "one")
    assert files(run) == files(tmp_path / "one")
    np.testing.assert_allclose(history(run), history(tmp_path / "one"), rtol=0, atol=1e-6)
    one, several = (tensors(folder / "checkpoint.safetensors") for folder in (tmp_path / "one", run))
    assert_close(several, one, 0.02)  # of a bias that has hardly left 0


TRAIN_AND_COUNT_THREADS = """
import sys, time
from contextlib import suppress
from pathlib import Path
from sertool import processes
from sertool.fit import fit
from sertool.recipe import load_recipe

def threads():
    names = ""
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has just ended
            names += path.read_text()
    return names.count("gloo")

def wait_for(some):  # a thread takes its name, and the system its leave, a moment later
    deadline = time.monotonic() + 10
    while bool(threads()) != some and time.monotonic() < deadline:
        time.sleep(0.01)
    return threads()

processes.start()
processes.total(1)
during = wait_for(True)
fit(load_recipe(sys.argv[1]), Path(sys.argv[2]))
processes.end()
print(during > 0, wait_for(False))
"""


def test_a_process_that_leaves_the_others_keeps_no_thread_for_them(tones: Any, tmp_path: Path) -> None:
    # A thread that is left now and then ends the interpreter by an abort, and so a training that is complete by exit 1.
    file = write(tones.recipe(network__width=0.125, training__epochs=1), tmp_path)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", TRAIN_AND_COUNT_THREADS, str(file), str(tmp_path / "run")]
    environment = {**os.environ, **alone, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "True 0\n"), result.stderr


def test_what_fails_in_one_process_ends_all_with_one_line(own_tones: Any, tmp_path: Path, run_in: Any) -> None:
    clip = own_tones.folder / "bea-joy-1.wav"
    clip.write_bytes(clip.read_bytes()[:20])
    file = write(own_tones.recipe(), tmp_path)
    # Process 0 alone reads the clips, while the others wait for the spectrograms.
    assert_one_line(run_in(2, "train", file, "-o", tmp_path / "run"), "bea-joy-1.wav")
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_processes_share_the_clips_of_an_embedding_out(tones: Any, tmp_path: Path, run_in: Any) -> None:
    fit(tones.recipe(network__width=0.125, training__epochs=1), tmp_path / "teacher")
    one = embed_manifest(load_manifest(tones.manifest), load_run_teacher(tmp_path / "teacher"), tmp_path / "one")
    two = tmp_path / "two"
    code, out, err = run_in(2, "embed", tones.manifest, "--teacher", tmp_path / "teacher", "-o", two)
    assert (code, out) == (0, f"{two}: 72 clips x 256 numbers by run teacher fc1, 72 computed now\n")
    assert [line for line in err.splitlines() if "clips" in line] == ["run teacher fc1: 72 of 72 clips to embed"]
    assert [len(tensors(path)["vectors"]) for path in two.glob("vectors-*.safetensors")] == [36, 36]
    found = load_embeddings(two)
    assert (found.keys, found.contents, found.heard_audio) == (one.keys, one.contents, one.heard_audio)
    np.testing.assert_array_equal(found.vectors, one.vectors)


@pytest.fixture
def _second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 1)


class Loudness:
    """A teacher that needs no encoder."""

    name, identity, dimension = "loudness", "loudness-1", 1
    description: ClassVar[dict[str, Any]] = {}

    def embed(self, samples: FloatArray) -> FloatArray:
        return np.abs(samples).mean(keepdims=True)


@pytest.mark.usefixtures("_second_of_two")
def test_clips_that_fail_and_those_of_a_process_that_stored_nothing_are_tried_by_all(
    own_tones: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "barrier", lambda: None)
    clip = own_tones.folder / "fox-joy-1.wav"
    clip.write_bytes(clip.read_bytes()[:20])
    shares: list[int] = []

    def share(clips: Sequence[Clip]) -> Sequence[Clip]:
        shares.append(len(clips))
        return clips

    with pytest.raises(SerError, match=r"^1 of 72 clips could not be embedded: .*fox-joy-1\.wav"):
        embed_manifest(load_manifest(own_tones.manifest), Loudness(), tmp_path / "loudness", share)
    assert shares == [36]
    assert sum(len(tensors(path)["vectors"]) for path in (tmp_path / "loudness").glob("vectors-*.safetensors")) == 71


@pytest.mark.usefixtures("_second_of_two")
def test_a_network_that_draws_before_pooling_is_refused() -> None:
    class Forgetful(Student):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = torch.nn.Dropout(0.1), Head(1, 3, rectified_embedding=True)

    with pytest.raises(UsageError, match="Forgetful draws random numbers before pooling"):
        processes.pool(Forgetful(), Batch(torch.ones(3, 1, 8, 64)))


@pytest.mark.usefixtures("_second_of_two")
def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        UsageError, match="2 processes or more on a machine of 1 GPUs; give torchrun --nproc_per_node 1"
    ):
        processes.start()


def test_a_command_of_one_process_is_refused_in_several(sertool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sertool.cli.SEVERAL", True)
    monkeypatch.setattr(processes, "first_to_fail", lambda: True)
    outcome = sertool("evaluate", "run")
    assert (outcome.code, outcome.out) == (2, "")
    assert (
        outcome.err
        == "sertool: sertool evaluate: runs in one process, without torchrun; in several: train, embed, teacher\n"
    )
