"""Tuning a teacher: two linear layers on a speech encoder, trained on an emotional corpus (sections 2.1 and 3.2).

Every epoch draws its order and its dropout from the seed and the epoch's number alone, and ends by writing all that
the next one needs. So a tuning that was interrupted anywhere goes on from its last whole epoch and ends with the same
weights as one that was not.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edge_runtime.errors import AudioError, SerError, UsageError
from edge_runtime.frontend import FloatArray, tile_or_cut
from edge_runtime.recognizer import softmax
from sertool import processes
from sertool.corpora.adapters import CORPORA
from sertool.corpora.manifest import Manifest, load_manifest
from sertool.corpora.splits import PARTS, Split, load_fold, load_split, training_labels
from sertool.epochs import load_resume, save_history, save_resume
from sertool.evaluate import Predictions, save_evaluation
from sertool.features import Progress, cache_key, cached_rows
from sertool.files import write_json
from sertool.hardware import choose_device, has_bfloat16
from sertool.metrics import confusion_matrix, unweighted_average_recall
from sertool.run import ClipRecord, changed_clip, describe_clips, describe_environment, read_trained, save_trained
from sertool.teacher.encoder import SpeechEncoder, load_encoder, refuse_tuned
from sertool.teacher.tuned import Heads, TuningSettings, read_tuning, save_heads, write_tuning

RESUME = "resume.safetensors"
"""In a teacher's folder, until its last epoch."""

FROZEN_HEAD_LEARNING_RATE = 3e-4
"""Of the heads above frozen blocks: the paper's 3e-5 is made for an encoder that follows them as a whole. Of 3e-5,
1e-4, 3e-4 and 1e-3 the best on RAVDESS' validation speakers after the paper's 20 epochs of the heads alone."""


@dataclass(frozen=True)
class TuningReport:
    """What one epoch did.

    Attributes:
        epoch: counted from 1.
        epochs: how many there will be.
        loss: mean cross entropy of the clips.
        validation_uar: UAR on the validation speakers, for information: no choice is made by it; None without any.
        seconds: it took, with the validation.
    """

    epoch: int
    epochs: int
    loss: float
    validation_uar: float | None
    seconds: float


class TeacherNetwork(torch.nn.Module):
    """An encoder with FC1 and FC2, of which a part may be frozen.

    What the frozen part gives is the same in every epoch: :meth:`prepare` computes it once a clip.

    Args:
        encoder: up to the layer that is tuned.
        classes: number of labels.
        freeze: ``none``: only the convolutions in front are frozen, as in the paper; a number: so many blocks, and
            all below them; ``all``: the whole encoder.

    Raises:
        UsageError: more blocks than the encoder has, or blocks that cannot be run apart.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: SpeechEncoder, classes: int, freeze: str | int) -> None:
        super().__init__()
        self.encoder, self.freeze = encoder, freeze
        self.heads = Heads(encoder.dimension, classes)
        if freeze == "all":
            encoder.requires_grad_(False)
        else:
            encoder.freeze(0 if freeze == "none" else int(freeze))
        self.register_buffer("mean", torch.zeros(encoder.dimension))
        self.register_buffer("std", torch.ones(encoder.dimension))

    @torch.no_grad()
    def standardize(self, batches: Iterable[Tensor]) -> None:
        """Let the heads see the clips' mean activations, as they are now, with mean 0 and deviation 1.

        What an inner layer gives has a mean many times its deviation: without this, 20 epochs of the heads alone end
        far from what two linear layers can learn, and blocks below would be bent to make up for it.
        :meth:`folded_heads` takes it into FC1, so that a tuned teacher has nothing but its two layers.

        Args:
            batches: the prepared clips that are trained on.
        """
        self.eval()
        means = torch.cat([self._activations(batch).mean(dim=1) for batch in batches])
        self.std.copy_(means.std(dim=0, correction=0).clamp(min=1e-6))
        self.mean.copy_(means.mean(dim=0))

    def folded_heads(self) -> Heads:
        """Return heads that give on the encoder's activations what these give on standardised ones."""
        heads = copy.deepcopy(self.heads)
        with torch.no_grad():
            heads.fc1.weight.div_(self.std)
            heads.fc1.bias.sub_(heads.fc1.weight @ self.mean)
        return heads

    @torch.no_grad()
    def prepare(self, samples: FloatArray) -> FloatArray:
        """Return float32 what :meth:`forward` takes for a clip (n,): the output of the frozen part."""
        inputs = self.encoder.inputs(samples)
        if self.freeze == "none":
            return np.asarray(inputs[0])
        inputs = inputs.to(self.encoder.device)
        if self.freeze == "all":
            # One frame for all: FC1 is linear, so the mean over time may as well be taken before it.
            return np.asarray(self.encoder(inputs).mean(dim=1).cpu())
        return np.asarray(self.encoder.below(inputs, int(self.freeze))[0].cpu())

    def forward(self, prepared: Tensor) -> Tensor:
        """Map the prepared clips (B, ...) to logits (B, classes)."""
        logits: Tensor = self.heads((self._activations(prepared) - self.mean) / self.std)
        return logits

    @property
    def trained_weights(self) -> int:
        """How many numbers are trained."""
        return sum(weights.numel() for weights in self.parameters() if weights.requires_grad)

    def state(self) -> dict[str, Tensor]:
        """Return the weights that are trained and what :meth:`standardize` found, by name."""
        weights = {name: weights for name, weights in self.named_parameters() if weights.requires_grad}
        return weights | {"mean": self.mean, "std": self.std}

    def _activations(self, prepared: Tensor) -> Tensor:
        if self.freeze == "none":
            activations: Tensor = self.encoder(prepared)
            return activations
        return prepared if self.freeze == "all" else self.encoder.above(prepared, int(self.freeze))


def tune(
    settings: TuningSettings,
    folder: Path,
    *,
    on_start: Callable[[str], None] | None = None,
    on_epoch: Callable[[TuningReport], None] | None = None,
    on_prepare: Progress | None = None,
) -> bool:
    """Tune a teacher into a folder; go on from where an earlier call was interrupted.

    The last epoch is the result. Validation and test speakers are only ever predicted. Several processes (see
    :mod:`sertool.processes`) share every batch out: an encoder without dropout is tuned as in one, but for rounding;
    one with dropout draws other masks.

    Args:
        settings: with absolute paths.
        folder: see :mod:`sertool.teacher.tuned` for what it holds.
        on_start: told in one line what is tuned on what, before the first epoch.
        on_epoch: told after every epoch.
        on_prepare: told while the frozen part's outputs are computed.

    Returns:
        whether anything was done; False for a tuning that was finished already.

    Raises:
        UsageError: encoder, manifest, split and settings do not fit together, or the folder holds another tuning.
        AudioError: a clip cannot be read.
        ArtifactError: the encoder's weights are damaged.
        SerError: the loss is not a number, or what an earlier call left is damaged.
    """
    refuse_tuned(settings.encoder)
    _refuse_other_use(folder)
    manifest = load_manifest(settings.manifest)
    split, fold = load_fold(settings.split, settings.fold, manifest)
    rows = {part: manifest.indices(list(fold.part(part))) for part in PARTS}
    trained_rows = manifest.indices([speaker for part in settings.parts for speaker in fold.part(part)])
    labels = training_labels(manifest, trained_rows)
    trained = describe_clips([manifest.clips[row] for row in trained_rows])
    settings = _resolve(settings)
    if (folder / "tuning.json").is_file():
        _refuse_other_tuning(settings, folder, split, manifest, trained)
    if (folder / "heads.safetensors").is_file():
        return False

    device = choose_device(settings.device)
    precision = _precision(settings, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    encoder = load_encoder(settings.encoder, "last" if settings.layer is None else settings.layer)
    _refuse_other_encoder(folder, encoder)
    torch.manual_seed(settings.seed)
    network = TeacherNetwork(encoder, len(labels), settings.freeze).to(device)
    optimizer = _optimizer(network, settings)
    writes = processes.rank() == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    try:
        data = _tuning_set(network, manifest, labels, settings, on_prepare)
        reports = load_resume(folder / RESUME, optimizer, network.state())
        processes.barrier()  # all have read what the folder holds
        if writes:
            _start_folder(folder, settings, labels, encoder, split, trained)
        if settings.freeze != "none" and not reports:  # in the paper, which freezes no block, FC1 sees raw activations
            network.standardize(data.batches(trained_rows, device))
        if on_start:
            on_start(
                f"{len(trained_rows)} clips, {len(labels)} labels; {encoder.name} up to layer {encoder.layer}, "
                f"{network.trained_weights:,} weights on {device.type} in {precision}"
                + (f", {processes.count()} processes" if processes.count() > 1 else "")
                + (f"; goes on after epoch {len(reports)}" if reports else "")
            )
        held_out = [] if "validation" in settings.parts else rows["validation"]
        for epoch in range(len(reports), settings.epochs):
            report = _epoch(epoch, network, optimizer, data, trained_rows, held_out, settings, autocast)
            reports.append(asdict(report))
            if writes:
                save_resume(folder / RESUME, optimizer, network.state(), reports)
                save_history(folder / "history.csv", reports)
            if on_epoch:
                on_epoch(report)
        if writes:
            unseen = {part: rows[part] for part in PARTS if rows[part] and part not in settings.parts}
            _save_evaluations(folder, network, data, labels, manifest, unseen, split)
            _finish(folder, network, settings, labels)
    finally:
        torch.set_num_threads(threads)
    processes.barrier()  # the teacher is whole for all
    return True


@dataclass(frozen=True)
class TuningSet:
    """All clips of the manifest, in its order.

    Attributes:
        inputs: float32 (N, ...), what :meth:`TeacherNetwork.prepare` gives; on disk.
        targets: int64 (N,), positions of the labels; -1 for a label that is not trained.
    """

    inputs: FloatArray
    targets: Tensor

    def batch(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Return the prepared clips of these rows on a device."""
        return torch.from_numpy(self.inputs[rows]).to(device)

    def batches(self, rows: Sequence[int], device: torch.device, size: int = 16) -> Iterator[Tensor]:
        """Return the prepared clips of these rows on a device, so many at a time."""
        return (self.batch(rows[start : start + size], device) for start in range(0, len(rows), size))


def _tuning_set(
    network: TeacherNetwork,
    manifest: Manifest,
    labels: tuple[str, ...],
    settings: TuningSettings,
    progress: Progress | None,
) -> TuningSet:
    with processes.zero_first():  # which computes what the others read
        inputs = _prepare(network, manifest, settings, progress)
    targets = [labels.index(clip.label) if clip.label in labels else -1 for clip in manifest.clips]
    return TuningSet(inputs, torch.tensor(targets))


def _epoch(
    epoch: int,
    network: TeacherNetwork,
    optimizer: torch.optim.Optimizer,
    data: TuningSet,
    rows: Sequence[int],
    held_out: Sequence[int],
    settings: TuningSettings,
    autocast: torch.autocast,
) -> TuningReport:
    """Train on rows for one epoch, and predict those held out."""
    started = time.perf_counter()
    order = np.random.default_rng([settings.seed, epoch]).permutation(rows).tolist()
    # Other clips, other masks: process 0 draws those of a tuning in one process.
    seed = int(np.random.default_rng([settings.seed, epoch, 1 + processes.rank()]).integers(2**32))
    torch.manual_seed(seed)  # dropout
    np.random.seed(seed)  # SpecAugment: transformers draws its masks from numpy's global generator
    network.train()
    device, total = network.encoder.device, 0.0
    weights = [weights for group in optimizer.param_groups for weights in group["params"]]
    for start in range(0, len(order), settings.batch_size):
        batch = order[start : start + settings.batch_size]
        with autocast:
            logits = _shared_logits(network, data, batch)
        loss = functional.cross_entropy(logits.float(), data.targets[batch].to(device))
        if not math.isfinite(loss.item()):
            raise SerError(f"tuning diverged in epoch {epoch + 1}: the loss is {loss.item()}; lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        processes.backward(loss, weights)
        optimizer.step()
        total += loss.item() * len(batch)
    uar = _uar(network, data, held_out) if held_out else None
    return TuningReport(epoch + 1, settings.epochs, total / len(order), uar, time.perf_counter() - started)


def _shared_logits(network: TeacherNetwork, data: TuningSet, batch: Sequence[int]) -> Tensor:
    """Return the logits (B, classes) of a batch, of which each process computes its own rows."""
    device = network.encoder.device
    if len(batch) < processes.count():  # not every encoder takes no row at all
        whole: Tensor = network(data.batch(batch, device))
        return whole
    return processes.together(network(data.batch(batch[processes.own_rows(len(batch))], device)), len(batch))


@torch.inference_mode()
def _logits(network: TeacherNetwork, data: TuningSet, rows: Sequence[int]) -> FloatArray:
    """Return float32 (rows, classes), always computed in float32."""
    network.eval()
    return np.concatenate([network(batch).cpu().numpy() for batch in data.batches(rows, network.encoder.device)])


def _uar(network: TeacherNetwork, data: TuningSet, rows: Sequence[int]) -> float:
    logits = _logits(network, data, rows)
    confusion = confusion_matrix(data.targets[rows].numpy(), logits.argmax(axis=1), logits.shape[1])
    return unweighted_average_recall(confusion)


def _save_evaluations(
    folder: Path,
    network: TeacherNetwork,
    data: TuningSet,
    labels: tuple[str, ...],
    manifest: Manifest,
    unseen: dict[str, list[int]],
    split: Split,
) -> None:
    """Keep what the tuned network answers for the parts that it was not tuned on."""
    for part, rows in unseen.items():
        predictions = _predictions(labels, manifest, rows, data.targets, _logits(network, data, rows))
        save_evaluation(folder, part, predictions, split.hash)


def _predictions(
    labels: tuple[str, ...], manifest: Manifest, rows: Sequence[int], targets: Tensor, logits: FloatArray
) -> Predictions:
    if not np.isfinite(logits).all():
        raise SerError("the tuned network answers with infinite numbers; tune again, with a lower learning rate")
    clips = [manifest.clips[row] for row in rows]
    return Predictions(
        labels,
        tuple(clip.key for clip in clips),
        tuple(clip.speaker for clip in clips),
        tuple(clip.gender for clip in clips),
        targets[rows].numpy(),
        softmax(logits),
    )


def _prepare(
    network: TeacherNetwork, manifest: Manifest, settings: TuningSettings, progress: Progress | None
) -> FloatArray:
    """Return what the trained part is fed with for every clip of the manifest, from the cache where it is there."""
    encoder = network.eval().encoder

    def prepare(row: int) -> FloatArray:
        clip = manifest.clips[row]
        prepared = network.prepare(tile_or_cut(clip.read(), settings.window_samples))
        if not np.isfinite(prepared).all():
            raise AudioError(f"{clip.path}: {encoder.name} gives no finite numbers for it")
        return prepared

    # Frozen blocks give the same whatever is trained above them, inputs the same for every layer.
    depth = encoder.layer if settings.freeze == "all" else settings.freeze
    decisive = [encoder.weights_hash, encoder.settings_hash, settings.freeze == "all", depth, settings.window_samples]
    name = f"teacher-{cache_key(manifest, *decisive)}"
    return cached_rows(name, len(manifest), prepare, progress)


def _optimizer(network: TeacherNetwork, settings: TuningSettings) -> torch.optim.Adam:
    body = [weights for weights in network.encoder.parameters() if weights.requires_grad]
    groups: list[dict[str, Any]] = [{"params": network.heads.parameters(), "lr": settings.head_learning_rate}]
    return torch.optim.Adam([*groups, {"params": body, "lr": settings.learning_rate}] if body else groups)


def _resolve(settings: TuningSettings) -> TuningSettings:
    """Fill in what depends on other settings."""
    known = CORPORA[settings.corpus].licence if settings.corpus in CORPORA else "unspecified"
    apart = settings.learning_rate if settings.freeze == "none" else FROZEN_HEAD_LEARNING_RATE
    update = {
        "licence": settings.licence or known,
        "head_learning_rate": settings.head_learning_rate or apart,
    }
    return settings.model_copy(update=update)


def _precision(settings: TuningSettings, device: torch.device) -> str:
    if settings.precision != "auto":
        return settings.precision
    return "bf16" if has_bfloat16(device) else "fp32"


def _describe_encoder(encoder: SpeechEncoder) -> dict[str, Any]:
    return {
        "name": encoder.name,
        "kind": encoder.kind,
        "layer": encoder.layer,
        "layers": encoder.layers,
        "dimension": encoder.dimension,
        "licence": encoder.licence,
        "weights_sha256": encoder.weights_hash,
        "settings_sha256": encoder.settings_hash,
    }


def _start_folder(
    folder: Path,
    settings: TuningSettings,
    labels: tuple[str, ...],
    encoder: SpeechEncoder,
    split: Split,
    trained: ClipRecord,
) -> None:
    split.save(folder / "split.json")
    write_json(folder / "environment.json", describe_environment())
    save_trained(folder, trained)
    # Last, because it marks the folder as a tuning.
    write_tuning(folder, settings, labels, _describe_encoder(encoder))


def _finish(folder: Path, network: TeacherNetwork, settings: TuningSettings, labels: tuple[str, ...]) -> None:
    record = _describe_encoder(network.encoder)
    if settings.freeze != "all":
        temporary = folder / ".encoder"
        for left in (temporary, folder / "encoder"):
            shutil.rmtree(left, ignore_errors=True)
        network.encoder.save(temporary)
        temporary.rename(folder / "encoder")
        saved = load_encoder(str(folder / "encoder"), network.encoder.layer)
        record["tuned"] = {"weights_sha256": saved.weights_hash, "settings_sha256": saved.settings_hash}
    write_tuning(folder, settings, labels, record)
    save_heads(folder / "heads.safetensors", network.folded_heads())
    (folder / RESUME).unlink(missing_ok=True)


def _refuse_other_use(folder: Path) -> None:
    """Refuse a folder whose files a tuning would mix with its own."""
    marks = {"recipe.toml": "a run", "teacher.json": "embeddings", "config.json": "an encoder"}
    for mark, what in marks.items():
        if (folder / mark).exists():
            raise UsageError(f"{folder}: holds {what} ({mark}); give another folder with -o")


def _refuse_other_encoder(folder: Path, encoder: SpeechEncoder) -> None:
    """Refuse to go on above frozen or half-tuned weights that were others when the tuning was begun."""
    if not (folder / "tuning.json").is_file():
        return
    earlier = read_tuning(folder).encoder
    if earlier | _describe_encoder(encoder) != earlier:
        raise UsageError(
            f"{folder}: was begun with other weights than {encoder.folder} has now; give another folder with -o, "
            "or delete that one"
        )


def _refuse_other_tuning(
    settings: TuningSettings, folder: Path, split: Split, manifest: Manifest, trained: ClipRecord
) -> None:
    """Refuse to go on with a tuning, or to call it finished, with other settings or data than it was begun with."""
    elsewhere = "give another folder with -o, or delete that one"
    earlier = read_tuning(folder).settings.model_dump()
    for name, value in settings.model_dump().items():
        if earlier[name] != value:
            raise UsageError(f"{folder}: holds a tuning with {name} = {earlier[name]!r}, not {value!r}; {elsewhere}")
    known = load_split(folder / "split.json").hash
    if known != split.hash:
        raise UsageError(f"{folder}: holds a tuning on split {known}, not {split.hash}; {elsewhere}")
    before = read_trained(folder)
    if before is not None and before != trained:
        new = sorted(trained.keys() - before.keys())
        change = f"clip {new[0]!r} is new" if new else changed_clip(before, manifest)
        raise UsageError(f"{folder}: holds a tuning on other clips: in {manifest.path}, {change}; {elsewhere}")
