"""The training loop: a light CNN, cross entropy, the neighbour loss of the paper and other terms, from top to bottom.

Every epoch draws its order and its dropout from the seed and the epoch's number alone, and ends by writing all that
the next one needs. So a run that was interrupted anywhere goes on from its last whole epoch and ends with the same
weights as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from edge_runtime.errors import SerError, UsageError
from edge_runtime.frontend import FloatArray, FrontEnd, Normalization, log_mel, tile_or_cut
from sertool import processes
from sertool.audio import content_hash
from sertool.augment import augmented, draw_mixture
from sertool.batches import Inputs, training_inputs
from sertool.corpora.manifest import Clip, Manifest, load_manifest
from sertool.corpora.splits import PARTS, Fold, load_fold, load_split, training_labels
from sertool.corpora.withheld import withhold_labels
from sertool.distill import Distiller, TeacherView, load_view
from sertool.epochs import load_resume, save_history, save_resume
from sertool.features import Progress
from sertool.files import write_json, write_text
from sertool.graph import NeighbourGraph, load_graph
from sertool.hardware import choose_device, has_bfloat16
from sertool.invariance import Adversary
from sertool.losses import labelled_cross_entropy, neighbour_loss
from sertool.networks import Student, build_network
from sertool.qat import RoundedComputation
from sertool.recipe import Neighbours, Recipe, Training, decisive, load_recipe, write_recipe
from sertool.run import (
    ClipRecord,
    Run,
    StudentDescription,
    changed_clip,
    describe_clips,
    describe_environment,
    load_run,
    read_distillation,
    read_start,
    read_trained,
    save_checkpoint,
    save_trained,
)

RESUME = "resume.safetensors"
"""In a run folder, until its last epoch."""

CALIBRATION_CLIPS = 64
"""Clips that quantisation-aware training measures activations on, as many as an export takes unless told otherwise."""

LOSSES = ("loss", "neighbour_loss", "distillation_loss", "invariance_loss")
"""What an epoch reports the means of."""

MAX_LOSS = 1e6
"""A greater loss of a batch counts as diverged, though float32 still holds it. Guessing costs the logarithm of the
number of classes; a network that reaches a million has logits of that size, and does not come back from there."""


@dataclass(frozen=True)
class EpochReport:
    """What one epoch did.

    Attributes:
        epoch: counted from 1.
        epochs: how many there will be.
        loss: mean cross entropy of the labelled clips.
        neighbour_loss: mean neighbour loss, before it is multiplied by alpha; 0 without a graph.
        distillation_loss: mean of what the teacher adds, weights included; 0 without one. In quantisation-aware
            training the squared difference of the logits to those before it, and all that is learnt from.
        invariance_loss: mean cross entropy of the adversary, weight included; 0 without one.
        learning_rate: of this epoch.
        seconds: it took.
    """

    epoch: int
    epochs: int
    loss: float
    neighbour_loss: float
    distillation_loss: float
    invariance_loss: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class TrainingSet:
    """The clips trained on, sorted by key.

    Attributes:
        inputs: what the network sees of them.
        targets: float32 (N, classes), 1 at the position of the label; all 0 where it is unknown.
        neighbours: int64 (N, n), rows of this set; -1 where there is none.
    """

    inputs: Inputs
    targets: Tensor
    neighbours: Tensor


def fit(
    recipe: Recipe,
    folder: Path,
    *,
    on_start: Callable[[str], None] | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
    on_features: Progress | None = None,
    allow_seen: bool = False,
) -> bool:
    """Train a network into a run folder; go on from where an earlier call was interrupted.

    Args:
        recipe: with absolute paths.
        folder: the run folder; see :mod:`sertool.run` for what it holds.
        on_start: told in one line what is trained on what, before the first epoch.
        on_epoch: told after every epoch.
        on_features: told while log-Mel spectrograms are computed.
        allow_seen: begin with the weights of a run, or learn from a teacher, that was trained on clips held out here.

    Returns:
        whether anything was trained; False for a run that was finished already.

    Raises:
        UsageError: recipe, manifest, split, graph, embeddings and the run to go on from do not fit together, or the
            folder holds another run, or one on other clips, labels, neighbours, embeddings or first weights.
        AudioError: a clip cannot be read.
        RunError: what an earlier call left is damaged.
        SerError: the loss exceeds :data:`MAX_LOSS` or is not a number.
    """
    if (folder / "recipe.toml").is_file():
        _refuse_other_run(recipe, folder)
    manifest = load_manifest(recipe.data.manifest)
    _, fold = load_fold(recipe.data.split, recipe.data.fold, manifest)
    rows = manifest.indices(_speakers(fold, recipe.data.parts))
    labels = training_labels(manifest, rows)
    manifest, rows = _without_some_labels(manifest, rows, recipe)
    clips = [manifest.clips[row] for row in rows]
    neighbours = _neighbours(recipe, [clip.key for clip in clips])
    view = _teacher_view(recipe, manifest, fold, rows, allow_seen) if recipe.distillation.embeddings else None
    trained = describe_clips(clips)
    if (folder / "recipe.toml").is_file():
        _refuse_other_data(recipe, folder, manifest, trained, view)
    if (folder / "checkpoint.safetensors").is_file():
        return False
    start = _start(recipe, folder, labels, manifest, fold, allow_seen) if recipe.training.start else None

    training = recipe.training
    device = choose_device(training.device)
    precision = precision_of(recipe, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    network = _network(recipe, labels, start, device)
    with processes.zero_first():  # which computes spectrograms that the others read
        inputs, normalization = training_inputs(
            recipe, manifest, rows, network, start.normalization if start else None, device, on_features
        )
    student = StudentDescription(labels, FrontEnd(), normalization, recipe.data.window_samples)
    data = TrainingSet(
        inputs,
        torch.tensor([[clip.label == label for label in labels] for clip in clips], dtype=torch.float32, device=device),
        torch.from_numpy(neighbours).to(device),
    )

    distiller = _distiller(recipe, view, clips, labels, network).to(device) if view else None
    learner = _learner(recipe, network, distiller, clips, device)
    if training.quantization_aware:
        calibration = _calibration(clips, student)
        learner = replace(learner, rounded=RoundedComputation(network, calibration), original=deepcopy(network))
    reports = load_resume(folder / RESUME, learner.optimizer, learner.state())
    if on_start:
        on_start(
            f"{len(clips)} clips, {len({clip.speaker for clip in clips})} speakers, {len(labels)} labels"
            + (f" of {int(data.targets.sum())} clips" if recipe.data.labelled_share < 1 else "")
            + f"; {recipe.network.name} on {device.type} in {precision}"
            + (f", {processes.count()} processes" if processes.count() > 1 else "")
            + (f"; goes on after epoch {len(reports)}" if reports else "")
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(training.threads or threads)
    writes = processes.rank() == 0
    processes.barrier()  # all have read what the folder holds
    try:
        if writes:
            _start_folder(recipe, folder, trained, view, start)
        _epochs(learner, data, recipe, autocast, folder if writes else None, reports, on_epoch)
        learner.finish()
    finally:
        torch.set_num_threads(threads)
    if writes:
        save_checkpoint(folder / "checkpoint.safetensors", network, student)
        (folder / RESUME).unlink(missing_ok=True)
    processes.barrier()  # the run is whole for all
    return True


def _epochs(
    learner: Learner,
    data: TrainingSet,
    recipe: Recipe,
    autocast: torch.autocast,
    folder: Path | None,
    reports: list[dict[str, Any]],
    on_epoch: Callable[[EpochReport], None] | None,
) -> None:
    """Train the epochs that follow those reported, and keep each in the folder, where there is one."""
    done = len(reports)
    with SummaryWriter(folder / "tensorboard", purge_step=done + 1) if folder else nullcontext() as curves:
        for epoch in range(done, recipe.training.epochs):
            report = _epoch(epoch, learner, data, recipe, autocast)
            reports.append(asdict(report))
            if folder and curves:
                save_resume(folder / RESUME, learner.optimizer, learner.state(), reports)
                _record(folder, reports, curves)
            if on_epoch:
                on_epoch(report)


def _epoch(epoch: int, learner: Learner, data: TrainingSet, recipe: Recipe, autocast: torch.autocast) -> EpochReport:
    training, neighbours = recipe.training, recipe.neighbours
    network, optimizer, bank, rounded = learner.network, learner.optimizer, learner.bank, learner.rounded
    started = time.perf_counter()
    order = np.random.default_rng([training.seed, epoch]).permutation(len(data.targets))
    torch.manual_seed(int(np.random.default_rng([training.seed, epoch, 1]).integers(2**62)))  # dropout
    random = np.random.default_rng([training.seed, epoch, 2])
    data.inputs.begin(random)
    if rounded:
        rounded.measure()
    totals = np.zeros(4)
    steps = range(0, len(order), training.batch_size)
    for step, start in enumerate(steps):
        optimizer.param_groups[0]["lr"] = _learning_rate(training, epoch, step / len(steps))
        batch = torch.from_numpy(order[start : start + training.batch_size]).to(data.targets.device)
        mixture = draw_mixture(len(batch), recipe.augmentation.mixup, random)
        extra = batch[:0] if mixture else _companions(batch, data.neighbours, neighbours.mode)
        together = torch.cat([batch, extra])
        seen = augmented(data.inputs.batch(together, random), recipe.augmentation, mixture, random)
        truth = mixture.mix(data.targets[batch]) if mixture else data.targets[batch]
        with autocast, rounded or nullcontext():
            pooled = processes.pool(network, seen)
            embeddings = network.head.embed(pooled)
            logits = network.head.classify(embeddings)
        compared = (embeddings if neighbours.layer == "fc1" else logits).float()
        cross_entropy = labelled_cross_entropy(logits[: len(batch)].float(), truth, training.label_smoothing)
        graph_loss = distillation_loss = invariance_loss = torch.zeros_like(cross_entropy)
        if not mixture:  # two clips at once have no neighbours
            graph_loss = _graph_loss(batch, together, compared, data.neighbours[batch], bank, neighbours)
        if learner.distiller:
            distillation_loss = learner.distiller.loss(batch, mixture, pooled[: len(batch)], logits[: len(batch)])
        if learner.adversary:
            done = (epoch + step / len(steps)) / training.epochs
            invariance_loss = learner.adversary.loss(batch, mixture, pooled[: len(batch)], done)
        truth_share = 1 - recipe.distillation.logit_weight
        loss = truth_share * cross_entropy + neighbours.alpha * graph_loss + distillation_loss + invariance_loss
        if learner.original:  # the labels taught it all they could; what is left is to answer the same though rounded
            with torch.no_grad():
                wanted = learner.original.head(processes.pool(learner.original, seen))
            loss = distillation_loss = functional.mse_loss(logits, wanted)
        if not loss.item() <= MAX_LOSS:  # also where it is not a number
            raise SerError(
                f"training diverged in epoch {epoch + 1}: the loss is {loss.item():.3g}; "
                "lower training.learning_rate, neighbours.alpha or the weights in [distillation] and [invariance]"
            )
        optimizer.zero_grad(set_to_none=True)
        processes.backward(loss, optimizer.param_groups[0]["params"])
        optimizer.step()
        if learner.average:
            learner.average.update_parameters(network)
        terms = (graph_loss, distillation_loss, invariance_loss)
        totals += [cross_entropy.item() * truth.sum().item(), *(term.item() * len(batch) for term in terms)]
    means = (totals / [data.targets.sum().item(), *3 * [len(order)]]).tolist()
    return EpochReport(
        epoch + 1,
        training.epochs,
        **dict(zip(LOSSES, means, strict=True)),
        learning_rate=optimizer.param_groups[0]["lr"],
        seconds=time.perf_counter() - started,
    )


def _learning_rate(training: Training, epoch: int, done: float) -> float:
    """Return the learning rate of a step, ``done`` being the share of its epoch that lies behind it."""
    if training.schedule == "steps":
        return training.learning_rate * training.decay ** (epoch // training.decay_epochs)
    warmup, epochs = training.warmup_epochs, epoch + done
    if epochs < warmup:
        return training.learning_rate * epochs / warmup
    way = (epochs - warmup) / (training.epochs - warmup)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * way))


class EmbeddingBank:
    """The embedding that each training clip had at its last visit: neighbours without a forward pass (mode ``bank``).

    Attributes:
        embeddings: float32 (N, D).
        visited: bool (N,); an embedding counts only after the first visit.
    """

    def __init__(self, clips: int, width: int, device: torch.device) -> None:
        self.embeddings = torch.zeros(clips, width, device=device)
        self.visited = torch.zeros(clips, dtype=torch.bool, device=device)

    def remember(self, rows: Tensor, embeddings: Tensor) -> None:
        """Store the embeddings (B, D) of these rows (B,)."""
        self.embeddings[rows] = embeddings.detach()
        self.visited[rows] = True


@dataclass(frozen=True)
class Learner:
    """All that the steps of a training change.

    Attributes:
        network: the student.
        average: of its weights, where the recipe wants one.
        optimizer: of its weights.
        bank: of its embeddings.
        distiller: with the map from its features to the teacher's, where there is one.
        adversary: that its features are to defeat, where there is one.
        rounded: the rounding of int8, where it is trained with.
        original: the network before it, whose logits it is to keep.
    """

    network: Student
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    bank: EmbeddingBank
    distiller: Distiller | None = None
    adversary: Adversary | None = None
    rounded: RoundedComputation | None = None
    original: Student | None = None

    def state(self) -> dict[str, Tensor]:
        """Return all that an epoch changes but the optimizer, by name."""
        weights = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        if self.average:
            weights |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for kind, module in (("distiller", self.distiller), ("adversary", self.adversary)):
            if module:
                weights |= {f"{kind}.{name}": tensor for name, tensor in module.state_dict().items()}
        return weights | {"bank.embeddings": self.bank.embeddings, "bank.visited": self.bank.visited}

    def finish(self) -> None:
        """Give the network the weights that are the result."""
        if self.average:
            self.network.load_state_dict(self.average.module.state_dict())
        if self.rounded:
            self.rounded.round_weights()


def _learner(
    recipe: Recipe, network: Student, distiller: Distiller | None, clips: Sequence[Clip], device: torch.device
) -> Learner:
    training = recipe.training
    adversary = _adversary(recipe, clips, network).to(device) if recipe.invariance.weight else None
    learnt = [weight for module in (network, distiller, adversary) if module for weight in module.parameters()]
    # Without weight decay, AdamW is the paper's Adam.
    optimizer = torch.optim.AdamW(learnt, lr=training.learning_rate, weight_decay=training.weight_decay)
    layer = network.head.fc1 if recipe.neighbours.layer == "fc1" else network.head.fc2
    bank = EmbeddingBank(len(clips), layer.out_features, device)
    return Learner(network, _average(network, training.average), optimizer, bank, distiller, adversary)


def _distiller(
    recipe: Recipe, view: TeacherView, clips: Sequence[Clip], labels: Sequence[str], network: Student
) -> Distiller:
    torch.manual_seed(recipe.training.seed)  # the map
    return Distiller(recipe.distillation, view, clips, labels, network.head.fc1.in_features)


def _adversary(recipe: Recipe, clips: Sequence[Clip], network: Student) -> Adversary:
    torch.manual_seed(recipe.training.seed)  # its first weights
    return Adversary(recipe.invariance, clips, network.head.fc1.in_features)


def _average(network: Student, share: float) -> AveragedModel | None:
    """Return the moving average of a network's weights, batch statistics included; None where none is wished."""
    if not share:
        return None

    def blend(average: Tensor, new: Tensor, updates: Tensor | int) -> Tensor:
        # The first weights are random, so they must not linger: the share of the old ones rises to its value.
        kept = min(share, (1 + float(updates)) / (10 + float(updates)))
        return average.lerp(new, 1 - kept) if average.is_floating_point() else new

    return AveragedModel(network, avg_fn=blend, use_buffers=True)


def _companions(batch: Tensor, neighbours: Tensor, mode: str) -> Tensor:
    """Return the rows that go through the network with a batch.

    In mode ``pass`` they are its neighbours that are not in it, each once; in mode ``copies`` the neighbours of each of
    its rows, one after the other; in mode ``bank`` none.
    """
    wanted = neighbours[batch].flatten()
    wanted = wanted[wanted >= 0]
    if mode == "copies":
        return wanted
    if mode == "bank":
        return wanted[:0]
    unique: Tensor = torch.unique(wanted)  # type: ignore[no-untyped-call]
    return unique[~torch.isin(unique, batch)]


def _network(recipe: Recipe, labels: Sequence[str], start: Start | None, device: torch.device) -> Student:
    torch.manual_seed(recipe.training.seed)
    network = build_network(recipe.network.name, len(labels), recipe.network.time_padding, recipe.network.width)
    if start:
        network.load_state_dict(start.weights(network, labels))
    # Gradients come in evaluation mode too; the statistics of a batch are not what the file will have.
    network.train(not recipe.training.quantization_aware)
    processes.share_statistics(network)
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


@dataclass(frozen=True)
class Start:
    """The run whose weights a training begins with.

    Attributes:
        run: the run.
        sha256: of its checkpoint.
        seen: keys of clips held out here that it was trained on.
    """

    run: Run
    sha256: str
    seen: tuple[str, ...]

    @property
    def normalization(self) -> Normalization | None:
        """What the weights were trained with, and so belong to; None where every corpus had constants of its own."""
        return self.run.normalization if self.run.recipe.normalization.by == "all" else None

    def weights(self, fresh: Student, labels: Sequence[str]) -> dict[str, Tensor]:
        """Return what a network of these labels begins with: of a label that the run does not know, fresh weights."""
        weights, known = self.run.network().state_dict(), self.run.labels
        for name in ("head.fc2.weight", "head.fc2.bias"):
            rows = zip(labels, fresh.state_dict()[name], strict=True)
            weights[name] = torch.stack(
                [weights[name][known.index(label)] if label in known else row for label, row in rows]
            )
        return weights

    def to_dict(self) -> dict[str, Any]:
        """Return what the new run keeps of it."""
        return {
            "sha256": self.sha256,
            "provenance": self.run.provenance | {"seen": len(self.seen)},
            "audio": sorted(self.run.heard_audio),
        }


def _start(
    recipe: Recipe, folder: Path, labels: tuple[str, ...], manifest: Manifest, fold: Fold, allow_seen: bool
) -> Start:
    """Open the run to go on from; refuse one of another network, or that heard who is tested here."""
    run = load_run(recipe.training.start)
    shared = [("network", "name"), ("network", "width"), ("normalization", "kind")]
    if recipe.normalization.kind == "running":
        shared += [("normalization", "prior"), ("normalization", "memory")]
    for section, key in shared:
        wanted, found = (getattr(getattr(one, section), key) for one in (recipe, run.recipe))
        if wanted != found:
            name = f"{section}.{key}"
            raise UsageError(f"{run.path}: its {name} is {found!r}, not {wanted!r}; set {name}={found}")
    if run.labels != labels and recipe.training.quantization_aware:
        raise UsageError(
            f"{run.path}: its labels are {', '.join(run.labels)}, but the clips here are labelled {', '.join(labels)}; "
            "train on these labels first, and then with --qat"
        )
    held_out = _speakers(fold, [part for part in PARTS if part not in recipe.data.parts])
    tested = describe_clips([manifest.clips[row] for row in manifest.indices(held_out)])
    seen = tuple(key for key, clip in tested.items() if clip["audio"] in run.heard_audio)
    if seen and not allow_seen:
        raise UsageError(
            f"{run.path}: was trained on {seen[0]!r} of {tested[seen[0]]['speaker']!r}, whom fold {recipe.data.fold} "
            "holds out; results would be too good: take a run of other speakers, or allow it with --allow-seen"
        )
    start = Start(run, content_hash(run.path / "checkpoint.safetensors"), seen)
    if (folder / "recipe.toml").is_file() and read_start(folder)["sha256"] != start.sha256:
        raise UsageError(
            f"{folder}: began with other weights than {run.path} has now; "
            "give another folder with -o, or delete that one"
        )
    return start


def _calibration(clips: Sequence[Clip], student: StudentDescription) -> list[FloatArray]:
    """Return the windows (frames, mel_bands) that an export of the run measures its activations on."""
    # Its libraries take a tenth of a second to import, and few trainings need them.
    from sertool.export.quantize import balanced_choice, with_short_windows

    windows = [
        student.normalization.apply(log_mel(tile_or_cut(clip.read(), student.window_samples), student.front_end))
        for clip in balanced_choice(clips, CALIBRATION_CLIPS)
    ]
    return list(with_short_windows(windows))


def _graph_loss(
    batch: Tensor, together: Tensor, compared: Tensor, neighbours: Tensor, bank: EmbeddingBank, settings: Neighbours
) -> Tensor:
    """Return the neighbour loss of a batch, and remember its embeddings."""
    others, weights = _look_up(neighbours, together, compared, bank, settings)
    bank.remember(batch, compared[: len(batch)])
    return neighbour_loss(compared[: len(batch)], others, weights, settings.distance)


def _look_up(
    neighbours: Tensor, together: Tensor, compared: Tensor, bank: EmbeddingBank, settings: Neighbours
) -> tuple[Tensor, Tensor]:
    """Return embeddings (B, n, D) and weights (B, n) of the neighbours (B, n) of a batch."""
    present = neighbours >= 0
    rows = neighbours.clamp(min=0)
    if settings.mode == "bank":
        return bank.embeddings[rows], (present & bank.visited[rows]).float()
    if settings.mode == "copies":  # in the order of _companions, after the batch
        nth = present.flatten().cumsum(0).view_as(present)
        return compared[(len(neighbours) - 1 + nth).clamp(max=len(together) - 1)], present.float()
    place = torch.zeros(int(bank.visited.numel()), dtype=torch.long, device=rows.device)
    place[together] = torch.arange(len(together), device=rows.device)
    return compared[place[rows]], present.float()


def precision_of(recipe: Recipe, device: torch.device) -> str:
    """Return in which precision a recipe's network is computed in training: bf16 or fp32."""
    if recipe.training.precision != "auto":
        return recipe.training.precision
    if recipe.training.quantization_aware:
        return "fp32"  # bfloat16 is coarser than int8
    return "bf16" if recipe.network.name != "mobilenet15" and has_bfloat16(device) else "fp32"


def _speakers(fold: Fold, parts: Iterable[str]) -> list[str]:
    return [speaker for part in parts for speaker in fold.part(part)]


def _without_some_labels(manifest: Manifest, rows: list[int], recipe: Recipe) -> tuple[Manifest, list[int]]:
    """Return the corpus with the labels that the recipe uses, and those of the rows that can be learnt from then."""
    manifest = withhold_labels(manifest, rows, recipe.data.labelled_share, recipe.training.seed)
    if recipe.learns_unlabelled:
        return manifest, rows
    return manifest, [row for row in rows if manifest.clips[row].label]


def _neighbours(recipe: Recipe, keys: list[str]) -> NDArray[np.int64]:
    """Return each training clip's neighbours as rows (N, n)."""
    if not recipe.neighbours.graph:
        return np.full((len(keys), 1), -1, np.int64)
    source = _graph_folder(recipe)
    graph = load_graph(source / "graph.csv")
    _refuse_other_clips(graph, keys, recipe)
    if not len(graph.edges):
        raise UsageError(
            f"{source}: joins no clips, so there is no neighbour loss; make it with a lower threshold: "
            "sertool graph --threshold, or set neighbours.graph to nothing"
        )
    try:
        cut = int(json.loads((source / "graph.json").read_text(encoding="utf-8"))["neighbours"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{source / 'graph.json'}: missing or damaged; make the graph again: sertool graph") from error
    if recipe.neighbours.count > cut:
        raise UsageError(
            f"{source}: was cut at {cut} neighbours; make it again with "
            f"sertool graph --neighbours {recipe.neighbours.count}, or lower neighbours.count"
        )
    return graph.neighbours[:, : recipe.neighbours.count]


def _teacher_view(recipe: Recipe, manifest: Manifest, fold: Fold, rows: Sequence[int], allow_seen: bool) -> TeacherView:
    """Read the embeddings learnt from; refuse a graph of another teacher, of whom the model card would say nothing."""
    view = load_view(recipe, manifest, fold, rows, allow_seen)
    if recipe.neighbours.graph:
        path = _graph_folder(recipe) / "graph.json"
        teacher = json.loads(path.read_text(encoding="utf-8")).get("teacher", {})
        if teacher.get("identity") != view.record["teacher"]["identity"]:
            raise UsageError(
                f"{path}: made from embeddings of {teacher.get('name')}, but {recipe.distillation.embeddings} "
                f"holds those of {view.record['teacher']['name']}; make the graph from these: sertool graph"
            )
    return view


def _graph_folder(recipe: Recipe) -> Path:
    return Path(recipe.neighbours.graph) / f"fold-{recipe.data.fold}"


def _refuse_other_clips(graph: NeighbourGraph, keys: list[str], recipe: Recipe) -> None:
    """Refuse a graph that is not over exactly the training clips: others might belong to test speakers."""
    strange = sorted(set(graph.keys) - set(keys))
    missing = sorted(set(keys) - set(graph.keys))
    if strange or missing:
        problem = f"joins {strange[0]!r}, which is not" if strange else f"lacks {missing[0]!r}, which is"
        parts = " ".join(f"--part {part}" for part in recipe.data.parts)
        raise UsageError(
            f"{_graph_folder(recipe)}: {problem} a training clip of this fold; "
            f"make it with this manifest and split: sertool graph {parts}"
        )


def _start_folder(
    recipe: Recipe, folder: Path, trained: ClipRecord, view: TeacherView | None, start: Start | None
) -> None:
    load_split(recipe.data.split).save(folder / "split.json")
    write_json(folder / "environment.json", describe_environment())
    if recipe.neighbours.graph:
        for name in ("graph.csv", "graph.json"):
            write_text(folder / name, (_graph_folder(recipe) / name).read_text(encoding="utf-8"))
    if view:
        write_json(folder / "distillation.json", view.record)
    if start:
        write_json(folder / "start.json", start.to_dict())
    save_trained(folder, trained)
    # Last, because it marks the folder as a run.
    write_text(folder / "recipe.toml", write_recipe(recipe))


def _refuse_other_run(recipe: Recipe, folder: Path) -> None:
    earlier = load_recipe(folder / "recipe.toml")
    wanted, found = decisive(recipe), decisive(earlier)
    for section, values in wanted.items():
        for key, value in values.items():
            if found[section][key] != value:
                before, now = (getattr(getattr(run, section), key) for run in (earlier, recipe))
                raise UsageError(
                    f"{folder}: holds a run with {section}.{key} = {before!r}, not {now!r}; "
                    "give another folder with -o, or delete that one"
                )
    # Whoever trained before the interruption must not be tested after it.
    trained, given = load_split(folder / "split.json").hash, load_split(recipe.data.split).hash
    if trained != given:
        raise UsageError(
            f"{folder}: holds a run on split {trained}, but {recipe.data.split} is now {given}; "
            "give another folder with -o, or delete that one"
        )


def _refuse_other_data(
    recipe: Recipe, folder: Path, manifest: Manifest, clips: ClipRecord, view: TeacherView | None
) -> None:
    """Refuse to go on with a run, or to call it finished, on other data than it was started with."""
    earlier = read_trained(folder)
    if earlier is not None and earlier != clips:
        new = sorted(clips.keys() - earlier.keys())
        change = f"clip {new[0]!r} is new" if new else changed_clip(earlier, manifest) or "other labels are withheld"
        raise UsageError(
            f"{folder}: holds a run on other clips: in {manifest.path}, {change}; "
            "give another folder with -o, or delete that one"
        )
    graphs = [folder / "graph.csv", _graph_folder(recipe) / "graph.csv"] if recipe.neighbours.graph else []
    if len({path.read_text(encoding="utf-8") for path in graphs}) > 1:
        raise UsageError(
            f"{folder}: holds a run on another graph than {graphs[1]} is now; "
            "give another folder with -o, or delete that one"
        )
    if view and read_distillation(folder)["sha256"] != view.record["sha256"]:
        raise UsageError(
            f"{folder}: holds a run on other embeddings than {recipe.distillation.embeddings} holds now; "
            "give another folder with -o, or delete that one"
        )


def _record(folder: Path, reports: list[dict[str, Any]], curves: SummaryWriter) -> None:
    save_history(folder / "history.csv", reports)
    for name in (*LOSSES, "learning_rate"):
        curves.add_scalar(name, reports[-1][name], reports[-1]["epoch"])
