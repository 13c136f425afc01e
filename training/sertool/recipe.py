"""The recipe: everything that decides a training run, as one TOML file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import tomllib
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from edge_runtime.errors import UsageError, nearest
from sertool.plugins import BUILT_IN, network_names, network_plugins

PAPER_WINDOW_SAMPLES = 95744
"""5.984 s: the 373 frames of the paper's 373 x 64 log-Mel spectrograms."""

SHORTEST_WINDOW_SAMPLES = 8448
"""32 frames: the fewest that the five halvings of VGG-15 and ResNet-9 leave a frame of."""

SHORTEST_EXCERPT = 32
"""Frames, for the same reason."""

LONGEST_WINDOW_SAMPLES = 960_000
"""One minute."""


class Section(BaseModel):
    """A table of the recipe: unknown keys and values of another type are errors; what was read does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(Section):
    """What is learned from."""

    manifest: str = Field("manifest.csv", description="the corpus, as made by: sertool corpus make")
    split: str = Field("split.json", description="who trains and who tests, as made by: sertool split make")
    fold: int = Field(1, ge=1, description="which fold of the split; sertool train --fold sets it")
    parts: tuple[Literal["train", "validation"], ...] = Field(
        ("train",),
        min_length=1,
        strict=False,  # TOML knows lists, not tuples
        description='parts trained on: ["train"], or ["train", "validation"] before a final test',
    )
    labelled_share: float = Field(
        1.0,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="share of the training clips whose labels are used, drawn by training.seed over labels and "
        "speakers; the others serve graph, teacher and invariance, and are left out without",
    )
    corpus: str = Field(
        "", description="name of the corpus, or names with commas, for the model's papers; see: sertool corpus list"
    )
    licence: str = Field("", description="licence that the corpus puts on the weights; empty: that of the named corpus")
    clips: Literal["tiled", "once"] = Field(
        "tiled",
        description="tiled: each clip is repeated or cut to one window (paper); once: as it is, as a stream hears it; "
        "needs network.time_padding = causal",
    )
    window_samples: int = Field(
        PAPER_WINDOW_SAMPLES,
        ge=SHORTEST_WINDOW_SAMPLES,
        le=LONGEST_WINDOW_SAMPLES,
        description="clips are repeated or cut to this length at 16 kHz; 95744 = 373 frames",
    )

    @property
    def corpora(self) -> list[str]:
        """Names of the corpora; one empty name where none is given."""
        return [name.strip() for name in self.corpus.split(",")]


class Normalizing(Section):
    """How log-Mel bands are normalised."""

    kind: Literal["constant", "running"] = Field(
        "constant",
        description="constant: mean and deviation of the training speakers (paper); running: these, and then those of "
        "whoever speaks, frame by frame; needs data.clips = once",
    )
    prior: float = Field(
        8.0, gt=0, le=3600, allow_inf_nan=False, description="running: seconds of speech that the constants count for"
    )
    memory: float = Field(
        0.0,
        ge=0,
        le=86400,
        allow_inf_nan=False,
        description="running: all earlier speech counts for at most this many seconds; 0: for what it is",
    )
    by: Literal["all", "corpus"] = Field(
        "all",
        description="constant: measured over all clips, or over each corpus of a joined manifest (sertool corpus "
        "join), as is then each corpus that a run goes on to with --from; to pretrain, not to export",
    )
    personal: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="constant: share of the clips that are normalised by their speaker's own calm speech instead, as "
        "after ser-edge calibrate; needs data.clips = once",
    )
    personal_label: str = Field("neutral", description="label of calm speech")
    personal_seconds: float = Field(
        30.0,
        ge=5,
        le=3600,
        allow_inf_nan=False,
        description="how much of it, at most; with less than 5 s, the constants",
    )


class Augmentation(Section):
    """Changes to what is seen in training; the paper has none."""

    excerpt_frames: int = Field(
        0, ge=0, le=3750, description="train on random excerpts of so many frames (192 = 3 s); 0: on all of a window"
    )
    shortest_frames: int = Field(
        0, ge=0, le=3750, description="excerpts are from so many frames to excerpt_frames long; 0: all equally long"
    )
    masks: int = Field(0, ge=0, le=10, description="stripes hidden in frequency, and as many in time (SpecAugment)")
    mask_bands: int = Field(8, ge=0, le=64, description="a stripe hides at most so many mel bands")
    mask_frames: int = Field(24, ge=0, le=3750, description="a stripe hides at most so many frames")
    warp: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="frequencies are multiplied by exp(-warp) to exp(warp), as by another vocal tract",
    )
    mixup: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of the steps that train on mixtures of two clips",
    )
    noise: float = Field(
        0.0, ge=0, le=1, allow_inf_nan=False, description="share of the excerpts that are heard in hiss or babble"
    )
    music: float = Field(
        0.0, ge=0, le=1, allow_inf_nan=False, description="share of the excerpts that are heard beside music"
    )
    room: float = Field(
        0.0, ge=0, le=1, allow_inf_nan=False, description="share of the excerpts that are heard with a room's echo"
    )
    band: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of the excerpts that are heard over a narrow line, as of a telephone, a headset or a codec",
    )
    loudness: float = Field(
        0.0,
        ge=0,
        le=40,
        allow_inf_nan=False,
        description="clips are up to so many dB louder or softer, but where the device is calibrated to the speaker",
    )
    newcomers: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="running: share of the clips before which the speaker is forgotten",
    )


class Network(Section):
    """The light network."""

    name: str = Field(
        "resnet9", description="vgg15, resnet9, cnn6, mobilenet15, or one of your own; see: sertool networks"
    )
    time_padding: Literal["same", "causal"] = Field(
        "same", description="same: the paper's networks; causal: needs no future frames, streams exactly"
    )
    width: float = Field(
        1.0, ge=0.125, le=4, allow_inf_nan=False, description="factor of the channels; 1: the paper's networks"
    )

    @field_validator("name")
    @classmethod
    def _is_installed(cls, name: str) -> str:
        # Looking through all installed packages takes a tenth of a second: only for other names.
        if name not in BUILT_IN and name not in network_plugins():
            raise ValueError(nearest(name, network_names()))
        return name


class Neighbours(Section):
    """The neighbour loss (equation 2); without a graph the network is trained with cross entropy alone."""

    graph: str = Field("", description="folder made by: sertool graph; empty: no neighbour loss")
    count: int = Field(3, ge=1, description="at most this many neighbours of a clip (n); the paper tries 3, 6, 9")
    alpha: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="weight of the neighbour loss; the paper: 0.01, 0.1, 1"
    )
    distance: Literal["cosine", "l1", "l2"] = Field(
        "cosine", description="distance of embeddings: cosine (paper), l1, l2"
    )
    layer: Literal["fc1", "fc2"] = Field("fc1", description="which embedding is compared: fc1 (256) or fc2 (logits)")
    mode: Literal["pass", "bank", "copies"] = Field(
        "pass",
        description="pass: neighbours go through the network with the batch, each once, batch normalisation included; "
        "bank: remembered embeddings, nearly free, without gradient through the neighbour; "
        "copies: each clip brings its own neighbours, 1 + n passes, as the paper's code does",
    )


class Distillation(Section):
    """What the network learns of a teacher's view of each clip, beside the labels; at inference it costs nothing."""

    embeddings: str = Field("", description="folder made by: sertool embed; empty: no teacher")
    embedding_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the cosine distance between a clip's embedding, standardised over the training clips, "
        "and a linear map of the network's pooled features that is thrown away afterwards",
    )
    relation_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the divergence between how alike the clips of a batch are to the network and "
        "to the teacher",
    )
    logit_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of the truth that the teacher's opinion replaces, as given by logistic regression on the "
        "embeddings of other training speakers ...",
    )
    temperature: float = Field(
        2.0, gt=0, le=100, allow_inf_nan=False, description="... whose logits, as the network's, are divided by this"
    )


class Invariance(Section):
    """What the network's features are to hide, by an adversary that is thrown away with the training."""

    to: Literal["speaker", "corpus"] = Field(
        "speaker", description="speaker: who speaks; corpus: which corpus of a joined manifest (sertool corpus join)"
    )
    weight: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="weight of the adversary (Ganin et al., 2016); 0: none"
    )


class Training(Section):
    """The optimisation; defaults are the paper's (section 3.2)."""

    epochs: int = Field(50, ge=1, description="fixed length: the last epoch is the result")
    batch_size: int = Field(16, ge=2, description="clips a step")
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False, description="of Adam, at the start")
    decay: float = Field(0.9, gt=0, le=1, description="the learning rate is multiplied by this ...")
    decay_epochs: int = Field(5, ge=1, description="... after so many epochs")
    schedule: Literal["steps", "cosine"] = Field(
        "steps", description="steps: that decay (paper); cosine: down to 0 along a half wave, step by step"
    )
    warmup_epochs: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="cosine: the rate rises from 0 for so long, first"
    )
    weight_decay: float = Field(0.0, ge=0, le=1, allow_inf_nan=False, description="of AdamW; 0: Adam, as in the paper")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, allow_inf_nan=False, description="share of the truth that is spread over all labels"
    )
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="moving average of the weights (EMA), with this share of the old ones a step; 0: the last weights",
    )
    start: str = Field("", description="run to go on from; sertool train --from sets it; empty: fresh weights")
    quantization_aware: bool = Field(
        False,
        description="compute with the rounding errors of int8, batch normalisation and dropout frozen, and learn "
        "to answer as before; sertool train --qat sets it",
    )
    context: float = Field(
        0.5,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of the steps whose windows follow sound, as amid a stream, instead of a reset; "
        "no effect with time_padding = same",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, order, dropout and all other draws")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="auto: bfloat16, but fp32 for mobilenet15, whose depthwise layers bfloat16 slows down",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU when there is one")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0: all cores")


class Recipe(Section):
    """A whole recipe.

    Example:
        >>> Recipe().training.epochs
        50
    """

    data: Data = Data()
    normalization: Normalizing = Normalizing()
    augmentation: Augmentation = Augmentation()
    network: Network = Network()
    neighbours: Neighbours = Neighbours()
    distillation: Distillation = Distillation()
    invariance: Invariance = Invariance()
    training: Training = Training()

    @property
    def learns_unlabelled(self) -> bool:
        """Whether anything is learnt of a clip without its label."""
        return bool(self.neighbours.graph or self.distillation.embeddings or self.invariance.weight)


SECTIONS: dict[str, type[Section]] = {
    "data": Data,
    "normalization": Normalizing,
    "augmentation": Augmentation,
    "network": Network,
    "neighbours": Neighbours,
    "distillation": Distillation,
    "invariance": Invariance,
    "training": Training,
}


PRESETS: dict[str, tuple[str, ...]] = {
    "paper": (),
    "device": (
        "data.clips=once",
        "augmentation.excerpt_frames=192",
        "augmentation.masks=2",
        "augmentation.warp=0.12",
        "augmentation.mixup=0.5",
        "network.time_padding=causal",
        "training.epochs=30",
        "training.schedule=cosine",
        "training.warmup_epochs=2.0",
        "training.weight_decay=0.01",
        "training.label_smoothing=0.1",
        "training.average=0.99",
    ),
}
PRESETS["field"] = (
    *PRESETS["device"],
    "normalization.personal=0.5",
    "augmentation.noise=0.5",
    "augmentation.loudness=6.0",
    "training.epochs=60",  # noise takes longer to learn
)
PRESETS["pretraining"] = (
    *PRESETS["device"],
    "normalization.by=corpus",
    "training.epochs=8",
    "training.batch_size=32",
)
"""Recipes by name, as what they change of the defaults: the paper's own; what did best as a stream in a quiet room; the
same in noise, at any distance, and calibrated or not; and what both may begin with (docs/results.md)."""


def preset(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return one of :data:`PRESETS`.

    Args:
        name: which.
        overrides: as for :func:`load_recipe`.

    Raises:
        UsageError: another name, or an override that cannot be.

    Example:
        >>> preset("device").network.time_padding
        'causal'
    """
    if name not in PRESETS:
        raise UsageError(f"--preset {name!r} is unknown; {nearest(name, PRESETS)}")
    content: dict[str, Any] = {}
    for override in (*PRESETS[name], *overrides):
        _override(content, override, SECTIONS)
    return parse_recipe(content)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: a TOML file; keys that it leaves out take their defaults.
        overrides: ``section.key=value`` texts that replace what the file says.

    Raises:
        UsageError: a missing file, bad TOML, an unknown section or key (with the nearest valid one), or a value that
            the field does not take.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such recipe; write one with: sertool recipe new {path}")
    return parse_recipe(read_toml(path, overrides, SECTIONS), str(path))


def read_toml(path: Path, overrides: Sequence[str], sections: Iterable[str]) -> dict[str, Any]:
    """Read a TOML file and replace values by ``section.key=value`` texts.

    Args:
        path: the file, which must exist.
        overrides: as the user wrote them.
        sections: those in which a value may be replaced.

    Raises:
        UsageError: bad TOML, or an override of another form or section.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML ({error})") from error
    for override in overrides:
        _override(content, override, sections)
    return content


def parse_recipe(content: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a recipe that is already a dictionary; see :func:`load_recipe`."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{where}: {explain(error)}") from error
    training = recipe.training
    if training.quantization_aware and not training.start:
        raise UsageError(
            f"{where}: training.quantization_aware needs a trained network to begin with: training.start, or sertool "
            "train --from RUN"
        )
    if 0 < recipe.augmentation.excerpt_frames < SHORTEST_EXCERPT:
        raise UsageError(
            f"{where}: augmentation.excerpt_frames = {recipe.augmentation.excerpt_frames}; valid: 0 for all, or at "
            f"least {SHORTEST_EXCERPT}"
        )
    if recipe.augmentation.newcomers and recipe.normalization.kind != "running":
        raise UsageError(f"{where}: augmentation.newcomers forgets speakers; it needs normalization.kind = 'running'")
    if training.schedule == "cosine" and training.warmup_epochs >= training.epochs:
        raise UsageError(
            f"{where}: training.warmup_epochs = {training.warmup_epochs}: must be less than training.epochs, "
            f"{training.epochs}"
        )
    if recipe.data.clips == "once" and recipe.network.time_padding != "causal":
        raise UsageError(
            f"{where}: data.clips = 'once' is how a stream hears clips; it needs network.time_padding = 'causal'"
        )
    if recipe.normalization.kind == "running" and recipe.data.clips != "once":
        raise UsageError(
            f"{where}: normalization.kind = 'running' counts what a speaker said once; it needs data.clips = 'once'"
        )
    normalization, augmentation = recipe.normalization, recipe.augmentation
    constants = {
        "normalization.personal": normalization.personal > 0,
        "normalization.by": normalization.by == "corpus",
        "augmentation.noise": augmentation.noise > 0,
        "augmentation.music": augmentation.music > 0,
        "augmentation.room": augmentation.room > 0,
        "augmentation.band": augmentation.band > 0,
        "augmentation.loudness": augmentation.loudness > 0,
    }
    for key, wanted in constants.items():
        if wanted and (recipe.data.clips != "once" or normalization.kind != "constant"):
            raise UsageError(f"{where}: {key} needs data.clips = 'once' and normalization.kind = 'constant'")
    if augmentation.shortest_frames and recipe.data.clips != "once":
        raise UsageError(f"{where}: augmentation.shortest_frames needs data.clips = 'once'")
    if augmentation.shortest_frames > augmentation.excerpt_frames > 0:
        raise UsageError(
            f"{where}: augmentation.shortest_frames = {augmentation.shortest_frames}: must be at most excerpt_frames, "
            f"{augmentation.excerpt_frames}"
        )
    if training.quantization_aware and training.precision == "bf16":
        raise UsageError(f"{where}: training.precision = 'bf16' is coarser than int8; quantization_aware needs 'fp32'")
    _check_distillation(recipe, where)
    return recipe


def _check_distillation(recipe: Recipe, where: str) -> None:
    distillation = recipe.distillation
    weights = {name: value for name, value in distillation if name.endswith("_weight")}
    wanted = [name for name, value in weights.items() if value]
    if wanted and not distillation.embeddings:
        raise UsageError(
            f"{where}: distillation.{wanted[0]} = {weights[wanted[0]]:g} needs distillation.embeddings, a folder made "
            "by: sertool embed"
        )
    if distillation.embeddings and not wanted:
        raise UsageError(
            f"{where}: distillation.embeddings teach nothing without a weight; set one of "
            f"{', '.join(f'distillation.{name}' for name in weights)}"
        )
    if recipe.invariance.weight and recipe.training.quantization_aware:
        raise UsageError(
            f"{where}: invariance.weight = {recipe.invariance.weight:g}: quantisation-aware training keeps what the "
            "network has learnt and hides no more; set it to 0"
        )
    if distillation.embedding_weight and recipe.training.quantization_aware:
        raise UsageError(
            f"{where}: distillation.embedding_weight = {distillation.embedding_weight:g} begins with a map that has "
            "learnt nothing, which would undo what quantisation-aware training is to keep; set it to 0"
        )


def decisive(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return what decides the result of a training, by section and key.

    What lies at a path is compared by its content, so that a corpus may be moved; threads and device decide how fast
    the result comes.

    Example:
        >>> "manifest" in decisive(Recipe())["data"]
        False
    """
    values = recipe.model_dump()
    for section, key in (("data", "manifest"), ("data", "split"), ("training", "threads"), ("training", "device")):
        del values[section][key]
    for section, key in (("neighbours", "graph"), ("distillation", "embeddings")):
        values[section][key] = bool(values[section][key])
    return values


def _override(content: dict[str, Any], override: str, sections: Iterable[str]) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        raise UsageError(f"--set {override!r}: expected section.key=value, e.g. training.epochs=10")
    if section not in sections:
        raise UsageError(f"--set {override!r}: no section {section!r}; {nearest(section, sections)}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is meant as a string: --set network.name=cnn6
    table = content.setdefault(section, {})
    if not isinstance(table, dict):
        raise UsageError(f"--set {override!r}: the recipe's {section!r} is not a section")
    table[key.strip()] = value


def explain(error: ValidationError, model: type[BaseModel] = Recipe) -> str:
    """Turn pydantic's first complaint about a model of sections into one line with the alternatives."""
    first = error.errors()[0]
    # TOML counts nothing; people count the tables of an array from one.
    path = [str(part + 1) if isinstance(part, int) else part for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        *parents, key = path
        valid = _section_at(model, parents).model_fields
        where = f"key {key!r} in [{'.'.join(parents)}]" if parents else f"section [{key}]"
        return f"no {where}; {nearest(key, valid)}"
    if first["type"] == "missing":
        return f"no {path[-1]!r} in [{'.'.join(path[:-1])}]"
    if first["type"] == "model_type":
        name = ".".join(path)
        return f"{name} = {first['input']!r}: expected a section [{name}]"
    reason = (first["msg"][0].lower() + first["msg"][1:]).replace("tuple", "list")
    if first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
    if first["type"] == "literal_error":
        reason = nearest(str(first["input"]), re.findall("'(.+?)'", first["ctx"]["expected"]))
    return f"{'.'.join(path)} = {first['input']!r}: {reason}"


def _section_at(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    """Return the model of a table; names and numbers of tables in a table of tables are passed over."""
    for part in path:
        if part in model.model_fields:
            annotation = model.model_fields[part].annotation
            inner = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
            model = next(kind for kind in inner if issubclass(kind, BaseModel))
    return model


def write_recipe(recipe: Recipe) -> str:
    r"""Return a recipe as TOML in which a comment explains every key.

    Example:
        >>> print("\n".join(write_recipe(Recipe()).splitlines()[:4]))
        # What is learned from.
        [data]
        # the corpus, as made by: sertool corpus make
        manifest = "manifest.csv"
    """
    lines = []
    for name, section in SECTIONS.items():
        lines += [f"# {(section.__doc__ or '').strip()}", f"[{name}]"]
        values = getattr(recipe, name)
        for key, field in section.model_fields.items():
            value = getattr(values, key)
            # JSON's strings, numbers, booleans and lists are TOML's too.
            lines += [f"# {field.description}", f"{key} = {json.dumps(value, ensure_ascii=False)}"]
        lines.append("")
    return "\n".join(lines)
