"""The run folder: what one training leaves behind, readable by people and by every later command.

recipe.toml              complete, with every default written out and absolute paths
split.json               the split; recipe.toml says which fold
trained.json             speaker, label (empty where it was withheld) and hash of the audio of each clip trained on
checkpoint.safetensors   weights after the last epoch, with the student's description as metadata
history.csv              loss, neighbour loss, learning rate and seconds of each epoch
graph.csv, graph.json    the neighbour graph trained with, if any, and its teacher
distillation.json        the teacher whose embeddings were learnt from, if any, and their hash
start.json               the run whose weights it began with, if any: origin, and hashes of all audio it had heard
environment.json         versions and machine
tensorboard/             the curves
resume.safetensors       only until the last epoch: what the next epoch needs
metrics.json             written by ``sertool evaluate``: results on test speakers
predictions.csv          likewise: every test item with its probabilities
parity.json              written by ``sertool parity``: how exported files differ from the network on test speakers
robustness.json          written by ``sertool robustness``: results under noise, in rooms, over channels
report.html              likewise: all of this to look at
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from edge_runtime.artifact import as_tuples
from edge_runtime.errors import SerError, UsageError, nearest
from edge_runtime.frontend import FloatArray, FrontEnd, Normalization, log_mel, tile_or_cut
from sertool import processes
from sertool.audio import content_hash
from sertool.corpora.manifest import Clip, Manifest, load_manifest
from sertool.corpora.splits import PARTS, Fold, Split, load_split
from sertool.files import atomic_path, write_json
from sertool.networks import Student, build_network
from sertool.plugins import network_plugins
from sertool.recipe import Recipe, load_recipe


class RunError(SerError):
    """A run folder that is missing, unfinished or damaged."""


@dataclass(frozen=True)
class StudentDescription:
    """What the weights alone do not say.

    Attributes:
        labels: class names in the order of the logits.
        front_end: parameters of the log-Mel spectrogram.
        normalization: constants of the training speakers, and whether the statistics run on from there.
        window_samples: length that clips are tiled or cut to.
    """

    labels: tuple[str, ...]
    front_end: FrontEnd
    normalization: Normalization
    window_samples: int

    def to_json(self) -> str:
        """Return the description as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StudentDescription:
        """Read :meth:`to_json` back."""
        content = json.loads(text)
        return cls(
            tuple(content["labels"]),
            FrontEnd(**content["front_end"]),
            Normalization(**as_tuples(content["normalization"])),
            content["window_samples"],
        )


def save_checkpoint(path: Path, network: Student, description: StudentDescription) -> None:
    """Write weights and description as one safetensors file, atomically."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(weights, {"student": description.to_json()}))


ClipRecord = dict[str, dict[str, str]]
"""Speaker, label and hash of the audio of clips, by the clips' keys; no label where it was withheld."""


def describe_clips(clips: Sequence[Clip]) -> ClipRecord:
    """Return what a clip is to a training.

    Raises:
        AudioError: an audio file is missing.
    """
    return {
        clip.key: {"speaker": clip.speaker, "label": clip.label, "audio": content_hash(clip.path)} for clip in clips
    }


def save_trained(folder: Path, trained: ClipRecord) -> None:
    """Keep the clips that a run trains on."""
    write_json(folder / "trained.json", trained)


def read_trained(folder: Path) -> ClipRecord | None:
    """Return the clips that a run trains on; None where no training has begun.

    Raises:
        RunError: the record is damaged.
    """
    path = folder / "trained.json"
    if not path.is_file():
        return None
    trained = _read_json(path)
    if not all(
        isinstance(record, dict) and record.keys() == {"speaker", "label", "audio"} for record in trained.values()
    ):
        raise RunError(f"{path}: damaged; train again")
    return trained


def read_start(folder: Path) -> dict[str, Any]:
    """Return what a run keeps of the run whose weights it began with.

    Raises:
        RunError: the record is damaged or missing.
    """
    path = folder / "start.json"
    content = _read_json(path) if path.is_file() else {}
    if content.keys() != {"sha256", "provenance", "audio"}:
        raise RunError(f"{path}: missing or damaged; train again")
    return content


def read_distillation(folder: Path) -> dict[str, Any]:
    """Return what a run keeps of the teacher whose embeddings it learns from.

    Raises:
        RunError: the record is damaged or missing.
    """
    path = folder / "distillation.json"
    content = _read_json(path) if path.is_file() else {}
    if content.keys() != {"teacher", "seen", "sha256"}:
        raise RunError(f"{path}: missing or damaged; train again")
    return content


def changed_clip(trained: ClipRecord, manifest: Manifest) -> str | None:
    """Say which clip trained on is no longer what it was, and in what; None if the manifest still has them all.

    Raises:
        AudioError: the audio file of such a clip is missing.
    """
    now = describe_clips([clip for clip in manifest.clips if clip.key in trained])
    for key, record in trained.items():
        if key not in now:
            return f"clip {key!r} is gone"
        known = {name: value for name, value in record.items() if value}  # a label that was withheld may change
        changed = [name for name, value in known.items() if now[key][name] != value]
        if changed:
            return f"clip {key!r} has another {' and '.join(changed)}"
    return None


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        path: the folder.
        recipe: what was trained.
        student: labels, front-end, normalisation and window.
    """

    path: Path
    recipe: Recipe
    student: StudentDescription

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.student.labels

    @property
    def front_end(self) -> FrontEnd:
        """Parameters of the log-Mel spectrogram."""
        return self.student.front_end

    @property
    def normalization(self) -> Normalization:
        """Statistics of the training speakers, and whether they run on from there."""
        return self.student.normalization

    @property
    def window_samples(self) -> int:
        """Length that clips are tiled or cut to, in samples at 16 kHz."""
        return self.student.window_samples

    @cached_property
    def manifest(self) -> Manifest:
        """The corpus; it must still be where the recipe says."""
        return load_manifest(self.recipe.data.manifest)

    @cached_property
    def split(self) -> Split:
        """The split, from the run's own copy."""
        return load_split(self.path / "split.json")

    @property
    def fold(self) -> Fold:
        """The fold that was trained."""
        return self.split.folds[self.recipe.data.fold - 1]

    @property
    def split_hash(self) -> str:
        """Hash of the split, which every result carries."""
        return self.split.hash

    @cached_property
    def trained(self) -> ClipRecord:
        """The clips trained on."""
        trained = read_trained(self.path)
        if trained is None:
            raise RunError(f"{self.path / 'trained.json'}: missing, nobody knows what was trained on; train again")
        return trained

    @property
    def checkpoint_hash(self) -> str:
        """Hash of the weights' file, which says of an exported file whether it comes from this run."""
        return content_hash(self.path / "checkpoint.safetensors")

    @property
    def metrics(self) -> dict[str, Any]:
        """What ``sertool evaluate`` found, by part; empty before it."""
        return read_metrics(self.path)

    def clips(self, part: str) -> list[Clip]:
        """Return the clips of a part (train, validation, test), sorted by key.

        Raises:
            UsageError: an unknown part, one without speakers, or a manifest in which a clip trained on is gone or has
                another speaker, label or audio: it might pass for one that the run never heard.
            AudioError: the audio file of a clip trained on is missing.
        """
        if part not in PARTS:
            raise UsageError(f"part {part!r} is unknown; {nearest(part, PARTS)}")
        speakers = list(self.fold.part(part))
        if not speakers:
            raise UsageError(f"{self.path}: fold {self.recipe.data.fold} of the split has no {part} speakers")
        if changed := changed_clip(self.trained, self.manifest):
            raise UsageError(
                f"{self.manifest.path}: {changed} since {self.path} was trained on it; "
                "bring the manifest and audio of that training back, or train again"
            )
        return [self.manifest.clips[row] for row in self.manifest.indices(speakers)]

    @cached_property
    def heard_audio(self) -> frozenset[str]:
        """SHA-256 of the audio files that the weights come from."""
        return frozenset(clip["audio"] for clip in self.trained.values()) | frozenset(self.start.get("audio", ()))

    @cached_property
    def start(self) -> dict[str, Any]:
        """What ``start.json`` says of the run whose weights this one began with; empty where there was none."""
        return read_start(self.path) if self.recipe.training.start else {}

    def network(self) -> Student:
        """Return the network with its trained weights, in evaluation mode, on the CPU, float32.

        Raises:
            RunError: the checkpoint does not fit the recipe.
        """
        network = build_network(
            self.recipe.network.name, len(self.labels), self.recipe.network.time_padding, self.recipe.network.width
        )
        path = self.path / "checkpoint.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, RuntimeError) as error:
            raise RunError(f"{path}: does not fit the recipe beside it; train again") from error
        return network.eval()

    @property
    def _teacher(self) -> dict[str, Any] | None:
        if self.recipe.distillation.embeddings:
            return dict(read_distillation(self.path)["teacher"])
        return self.graph_teacher

    @property
    def graph_teacher(self) -> dict[str, Any] | None:
        """Description of the teacher whose embeddings the graph joins; None without a graph."""
        if not self.recipe.neighbours.graph:
            return None
        return dict(_read_json(self.path / "graph.json")["teacher"])

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Where the weights come from: corpus, split, teacher, recipe and versions, without paths of this machine."""
        recipe = self.recipe.model_dump(mode="json")
        recipe["data"] |= {"manifest": Path(self.recipe.data.manifest).name, "split": "split.json"}
        recipe["neighbours"]["graph"] = Path(self.recipe.neighbours.graph).name
        recipe["training"]["start"] = Path(self.recipe.training.start).name
        recipe["distillation"]["embeddings"] = Path(self.recipe.distillation.embeddings).name
        corpora = [{"name": name, "licence": self.recipe.data.licence} for name in self.recipe.data.corpora]
        earlier = self.start["provenance"] | {"sha256": self.start["sha256"]} if self.start else None
        return {
            "corpora": corpora + [corpus for corpus in (earlier or {}).get("corpora", ()) if corpus not in corpora],
            "speakers": len(self.fold.train),
            "split_hash": self.split_hash,
            "teacher": self._teacher or (earlier or {}).get("teacher"),
            "recipe": recipe,
            "versions": _read_json(self.path / "environment.json")["versions"],
            "from": earlier,
        }


def load_run(path: str | Path) -> Run:
    """Open a finished run.

    Raises:
        UsageError: no such folder.
        RunError: not a run, a folder of several folds, or an unfinished or damaged run.
    """
    path = Path(path)
    checkpoint = path / "checkpoint.safetensors"
    if not path.is_dir():
        raise UsageError(f"{path}: no such run folder; make one with: sertool train")
    if not checkpoint.is_file():
        if folds := _finished_folds(path):
            raise RunError(f"{path}: holds {len(folds)} folds; name one of them, e.g. {folds[0]}")
        if (path / "recipe.toml").is_file() or any(path.glob("fold-*/recipe.toml")):
            raise RunError(f"{path}: unfinished; run the same sertool train again and it goes on")
        raise RunError(f"{path}: not a run folder (no checkpoint.safetensors); make one with: sertool train")
    try:
        with safe_open(checkpoint, framework="pt") as file:
            student = StudentDescription.from_json((file.metadata() or {})["student"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{checkpoint}: damaged or not one of ours; train again") from error
    return Run(path, load_recipe(path / "recipe.toml"), student)


def read_metrics(folder: Path) -> dict[str, Any]:
    """Return what ``metrics.json`` of a run, or of the folder above its folds, holds; empty before an evaluation.

    Raises:
        RunError: the file is damaged.
    """
    path = folder / "metrics.json"
    return _read_json(path) if path.is_file() else {}


def read_parity(folder: Path) -> dict[str, Any]:
    """Return what ``parity.json`` of a run, or of the folder above its folds, holds; empty before ``sertool parity``.

    Raises:
        RunError: the file is damaged.
    """
    path = folder / "parity.json"
    return _read_json(path) if path.is_file() else {}


def read_robustness(folder: Path) -> dict[str, Any]:
    """Return what ``robustness.json`` of a run, or of the folder above its folds, holds; empty before it is measured.

    Raises:
        RunError: the file is damaged.
    """
    path = folder / "robustness.json"
    return _read_json(path) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise RunError(f"{path}: damaged; delete it and run the command that made it again")
    return content


def without_speakers(content: dict[str, Any]) -> dict[str, Any]:
    """Replace every list or table of speakers by their number: a file for distribution names nobody."""
    plain = {key: without_speakers(value) if isinstance(value, dict) else value for key, value in content.items()}
    if isinstance(plain.get("speakers"), list | dict):
        plain["speakers"] = len(plain["speakers"])
    return plain


def load_folds(path: str | Path) -> list[Run]:
    """Open a run, or the finished folds below a folder in numerical order.

    Raises:
        UsageError: no such folder.
        RunError: no finished run is there, one is damaged, a run stands beside folds, or the folds are not those of one
            split.
    """
    path = Path(path)
    folders = _finished_folds(path)
    refuse_run_beside_folds(path, folders)
    runs = [load_run(folder) for folder in folders or [path]]
    if len({run.split_hash for run in runs}) > 1:
        raise RunError(f"{path}: its folds are not those of one split; evaluate them one by one")
    return runs


def refuse_run_beside_folds(path: Path, folds: Sequence[Path]) -> None:
    """Refuse a folder that is a run and also holds folds of another: either result could be meant.

    Raises:
        RunError: it is both.
    """
    if folds and (path / "checkpoint.safetensors").is_file():
        raise RunError(
            f"{path}: holds both a run and {folds[0].name}; move the one that is not meant to another folder"
        )


def _finished_folds(path: Path) -> list[Path]:
    finished = [checkpoint.parent for checkpoint in path.glob("fold-*/checkpoint.safetensors")]
    numbered = [folder for folder in finished if folder.name.removeprefix("fold-").isdecimal()]
    return sorted(numbered, key=lambda folder: int(folder.name.removeprefix("fold-")))


def describe_environment() -> dict[str, Any]:
    """Return versions and machine, for the record."""
    packages = [
        "sertool",
        "ser-edge",
        "torch",
        "numpy",
        "onnx",
        "onnxruntime",
        "ai-edge-litert",
        "transformers",
        "faiss-cpu",
    ]
    packages += [entry.dist.name for entry in network_plugins().values() if entry.dist]
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    } | ({"processes": processes.count()} if processes.count() > 1 else {})


class RunTeacher:
    """An earlier run of our own as the teacher: the embedding is its student's ``fc1``.

    Attributes:
        name: for people.
        identity: hash of the weights.
        dimension: 256.
        description: for the record, with the speakers it was trained on.
        heard_audio: SHA-256 of the audio files it was trained on.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._network = run.network()
        weights = (run.path / "checkpoint.safetensors").read_bytes()
        self.identity = hashlib.sha256(weights + b"fc1").hexdigest()
        self.name = f"run {run.path.name} fc1"
        self.dimension = int(self._network.head.fc1.out_features)
        self.heard_audio = run.heard_audio
        self.description: dict[str, Any] = {
            "name": self.name,
            "kind": "run",
            "network": run.recipe.network.name,
            "corpora": run.recipe.data.corpora,
            "speakers": list(run.fold.train),
            "split_hash": run.split_hash,
        }

    def embed(self, samples: FloatArray) -> FloatArray:
        """Return the ``fc1`` embedding (256,) of a clip (n,), tiled or cut to the run's window."""
        student = self._run.student
        window = log_mel(tile_or_cut(samples, student.window_samples), student.front_end)
        with torch.inference_mode():
            frames = torch.from_numpy(student.normalization.apply(window))
            embedding: FloatArray = self._network.embed(frames[None, None])[0].numpy()
        return embedding


def load_run_teacher(path: str | Path) -> RunTeacher:
    """Open a run as a teacher; see :func:`load_run` for the errors."""
    return RunTeacher(load_run(path))
