"""The teacher folder: a speech encoder that was tuned on an emotional corpus, readable by people and later commands.

tuning.json              every setting, labels, the encoder and the hashes of its weights
split.json               the split; tuning.json says which fold
trained.json             speaker, label and hash of the audio of each clip trained on
heads.safetensors        FC1 and FC2; written last, it marks the tuning as finished
encoder/                 the tuned encoder as a transformers folder; absent where the whole encoder was frozen
history.csv              loss, validation UAR and seconds of each epoch
metrics.json             accuracy and UAR on the speakers who were not trained on
predictions*.csv         every item behind them with its probabilities
environment.json         versions and machine
resume.safetensors       only until the last epoch: what the next epoch needs
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from edge_runtime.errors import ArtifactError, SerError, UsageError
from edge_runtime.frontend import FloatArray
from sertool.audio import SAMPLE_RATE
from sertool.corpora.splits import load_split
from sertool.files import atomic_path, write_json
from sertool.hardware import choose_device
from sertool.recipe import Section, explain
from sertool.run import ClipRecord, read_trained
from sertool.teacher.encoder import EncoderTeacher, SpeechEncoder, load_encoder

FC1_WIDTH = 256


class TuningSettings(Section):
    """How a teacher is tuned; defaults are the paper's (section 3.2)."""

    encoder: str
    manifest: str
    split: str
    fold: int = Field(1, ge=1)
    parts: tuple[Literal["train", "validation"], ...] = Field(("train",), min_length=1, strict=False)
    corpus: str = ""
    licence: str = ""
    layer: int | None = Field(None, ge=0)
    freeze: Literal["none", "all"] | int = "none"
    epochs: int = Field(20, ge=1)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(3e-5, gt=0, allow_inf_nan=False)
    head_learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    window_samples: int = Field(4 * SAMPLE_RATE, ge=SAMPLE_RATE // 10, le=30 * SAMPLE_RATE)
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(0, ge=0, le=1024)


def parse_settings(content: dict[str, Any], where: str = "teacher") -> TuningSettings:
    """Validate settings that are already a dictionary.

    Raises:
        UsageError: an unknown key, or a value that a setting does not take.
    """
    try:
        return TuningSettings.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{where}: {explain(error)}") from error


class Heads(torch.nn.Module):
    """FC1 and FC2 on the activations of an encoder, as in transformers' ``Wav2Vec2ForSequenceClassification``.

    That class is the reference's (there they are called ``projector`` and ``classifier``): no activation function
    stands between them, and the mean over time is taken of what FC1 gives.

    Args:
        dimension: of the activations.
        classes: number of labels.
    """

    def __init__(self, dimension: int, classes: int) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(dimension, FC1_WIDTH)
        self.fc2 = torch.nn.Linear(FC1_WIDTH, classes)

    def embed(self, activations: Tensor) -> Tensor:
        """Map activations (clips, frames, dimension) to embeddings (clips, 256): the mean over time of FC1."""
        embeddings: Tensor = self.fc1(activations).mean(dim=1)
        return embeddings

    def forward(self, activations: Tensor) -> Tensor:
        """Map activations (clips, frames, dimension) to logits (clips, classes)."""
        logits: Tensor = self.fc2(self.embed(activations))
        return logits


def save_heads(path: Path, heads: Heads) -> None:
    """Write the two layers as safetensors, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.state_dict().items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors))


@dataclass(frozen=True)
class Tuning:
    """A finished tuning.

    Attributes:
        path: the folder.
        settings: how it was tuned.
        labels: class names in the order of the logits.
        encoder: name, layer and hashes of the encoder that was tuned.
    """

    path: Path
    settings: TuningSettings
    labels: tuple[str, ...]
    encoder: dict[str, Any]

    def load_encoder(self, layer: int) -> SpeechEncoder:
        """Return the encoder, tuned where it was not frozen, up to a layer.

        Raises:
            UsageError: the encoder is no longer where it was.
            ArtifactError: it has other weights than those that were tuned, or damaged ones.
        """
        own = self.path / "encoder"
        source = str(own) if own.is_dir() else self.settings.encoder
        encoder = load_encoder(source, layer)
        known = self.encoder.get("tuned", self.encoder)
        for part, found in (("weights", encoder.weights_hash), ("settings", encoder.settings_hash)):
            if found != known[f"{part}_sha256"]:
                raise ArtifactError(
                    f"{self.path}: {source} has other {part} than when this teacher was tuned; bring those back, "
                    "or tune again"
                )
        return encoder

    @property
    def trained(self) -> ClipRecord:
        """The clips tuned on.

        Raises:
            SerError: the record is missing or damaged.
        """
        trained = read_trained(self.path)
        if trained is None:
            raise SerError(f"{self.path / 'trained.json'}: missing, nobody knows what was tuned on; tune again")
        return trained

    def load_heads(self) -> Heads:
        """Return FC1 and FC2.

        Raises:
            ArtifactError: the file is damaged, or not of this encoder and these labels.
        """
        path = self.path / "heads.safetensors"
        heads = Heads(self.encoder["dimension"], len(self.labels))
        try:
            with safe_open(path, framework="pt") as file:
                heads.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, RuntimeError) as error:
            raise ArtifactError(f"{path}: damaged, or not the heads of this teacher; tune again") from error
        if not all(torch.isfinite(weights).all() for weights in heads.parameters()):
            raise ArtifactError(f"{path}: holds infinite numbers; tune again")
        return heads.eval()


def write_tuning(folder: Path, settings: TuningSettings, labels: tuple[str, ...], encoder: dict[str, Any]) -> None:
    """Write ``tuning.json``."""
    content = {"settings": settings.model_dump(mode="json"), "labels": list(labels), "encoder": encoder}
    write_json(folder / "tuning.json", content)


def read_tuning(path: str | Path) -> Tuning:
    """Read ``tuning.json`` of a tuning, finished or not.

    Raises:
        SerError: it is damaged.
    """
    path = Path(path)
    record = path / "tuning.json"
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        settings = TuningSettings.model_validate(content["settings"])
        return Tuning(path, settings, tuple(content["labels"]), dict(content["encoder"]))
    except (ValueError, KeyError, TypeError) as error:  # pydantic's errors are ValueErrors
        raise SerError(f"{record}: damaged; tune again: sertool teacher tune") from error


def load_tuning(path: str | Path) -> Tuning:
    """Open a finished tuning.

    Raises:
        UsageError: not the folder of a tuning.
        SerError: an unfinished or damaged one.
    """
    path = Path(path)
    if not (path / "tuning.json").is_file():
        raise UsageError(f"{path}: no tuned teacher (it has no tuning.json); make one with: sertool teacher tune")
    tuning = read_tuning(path)
    if not (path / "heads.safetensors").is_file():
        raise SerError(f"{path}: unfinished; run the same sertool teacher tune again and it goes on")
    return tuning


class TunedTeacher:
    """A tuned encoder as a teacher: FC1, FC2 or a layer of it, averaged over the real frames of the whole clip.

    Args:
        tuning: finished.
        head: ``fc1`` or ``fc2``; None for the encoder's layer alone.
        layer: of the encoder, where there is no head.
        device: where to compute.

    Attributes:
        name: for people.
        identity: hash of everything that decides the vectors.
        dimension: 256 for ``fc1``, the number of labels for ``fc2``, else the encoder's.
        description: for the record, with corpus and speakers tuned on.
        heard_audio: SHA-256 of the audio files tuned on.
    """

    def __init__(self, tuning: Tuning, head: str | None, layer: int, device: torch.device) -> None:
        self._teacher = EncoderTeacher(tuning.load_encoder(layer), device)
        heads = tuning.load_heads()
        self._layers = {None: [], "fc1": [heads.fc1], "fc2": [heads.fc1, heads.fc2]}[head]
        settings, place = tuning.settings, head or f"layer {layer}"
        self.name = f"{tuning.path.resolve().name} {place}"
        self.dimension = self._layers[-1].out_features if self._layers else self._teacher.dimension
        weights = b"".join(bytes(tensor.numpy()) for head in self._layers for tensor in head.state_dict().values())
        self.identity = hashlib.sha256(self._teacher.identity.encode() + weights).hexdigest()
        self.heard_audio = frozenset(clip["audio"] for clip in tuning.trained.values())
        split = load_split(tuning.path / "split.json")
        fold = split.folds[settings.fold - 1]
        self.description: dict[str, Any] = self._teacher.description | {
            "name": self.name,
            "at": place,
            "dimension": self.dimension,
            "encoder": tuning.encoder["name"],
            "corpora": [settings.corpus],
            "corpora_licence": settings.licence,
            "speakers": [speaker for part in settings.parts for speaker in fold.part(part)],
            "split_hash": split.hash,
        }

    @torch.inference_mode()
    def embed(self, samples: FloatArray) -> FloatArray:
        """Return float32 (dimension,) of (n,) samples at 16 kHz; see :meth:`EncoderTeacher.embed` for the errors."""
        # The heads are linear: of the mean over the frames they give the mean of what they give for each frame.
        vector = torch.from_numpy(self._teacher.embed(samples))
        for layer in self._layers:
            vector = layer(vector)
        embedding: FloatArray = vector.numpy()
        return embedding


def load_tuned_teacher(path: Path, head: str | None, layer: int | None, device: str) -> TunedTeacher:
    """Open a tuned teacher at a head or at a layer of its encoder; at FC1 where neither is named.

    Raises:
        UsageError: a layer above the one that was tuned.
        SerError: see :func:`load_tuning`.
    """
    tuning = load_tuning(path)
    top = tuning.encoder["layer"]
    if layer is None:
        return TunedTeacher(tuning, head or "fc1", top, choose_device(device))
    if layer > top:
        raise UsageError(f"{path}: tuned up to layer {top}, no layer {layer}; valid: fc1, fc2, layer:0 to layer:{top}")
    return TunedTeacher(tuning, None, layer, choose_device(device))
