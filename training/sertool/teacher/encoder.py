"""Teachers: models that turn a clip into one vector, above all the speech encoders of the transformers library."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

# Read when the library is first imported: nothing about the user's work is reported anywhere.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np
import torch
import transformers

from edge_runtime.errors import ArtifactError, AudioError, UsageError, nearest
from edge_runtime.frontend import FloatArray, as_samples
from sertool.audio import SAMPLE_RATE, content_hash
from sertool.hardware import choose_device

POOLING = "mean over real frames"
LONGEST_PIECE = 30 * SAMPLE_RATE
"""Samples encoded in one pass: attention costs the square of the length, and Whisper knows no longer audio."""

HUB_FILES = ["*.json", "*.safetensors", "LICENSE*", "README.md"]
HEADS = ("fc1", "fc2")
"""The two linear layers that tuning puts on an encoder: the embedding and the logits."""

UNUSED_WEIGHTS = {"masked_spec_embed"}
"""Weights that only pretraining uses and some checkpoints lack."""


class Teacher(Protocol):
    """Anything that maps a clip to a vector.

    Attributes:
        name: for people, e.g. ``whisper-base-encoder layer 3``.
        identity: hash of everything that decides the vectors; caches are keyed by it.
        dimension: length of the vectors.
        description: facts for ``teacher.json``.
    """

    name: str
    identity: str
    dimension: int
    description: dict[str, Any]

    def embed(self, samples: FloatArray) -> FloatArray:
        """Map (n,) samples at 16 kHz to float32 (dimension,)."""


def load_teacher(source: str, layer: int | None = None, device: str = "auto", at: str | None = None) -> Teacher:
    """Load a teacher.

    Args:
        source: a local folder with a transformers speech encoder (Whisper, wav2vec 2.0, HuBERT, WavLM and their
            relatives) in safetensors, a name on the Hugging Face hub (``owner/name`` or ``owner/name@revision``), a
            folder of ``sertool teacher tune``, or the folder of an earlier training run of our own.
        layer: 0 for what enters the first transformer block, 1 for what leaves it, and so on; the last one is taken
            after the final normalisation. None takes the middle one: emotion is carried best there, while the last
            layers serve the words (Pepino et al., Interspeech 2021).
        device: ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.
        at: ``fc1`` or ``fc2`` of a tuned teacher (``fc1`` when neither this nor a layer is given), or ``layer:K``,
            which says the same as ``layer``.

    Raises:
        UsageError: no such folder or hub name, not a speech encoder, a layer it does not have, no such device.
        ArtifactError: weights that are damaged, incomplete or not in safetensors, or no longer those that were tuned.
        SerError: a run or a tuning that is unfinished or damaged, or a folder of several folds.
    """
    layer, head = _parse_place(layer, at)
    folder = Path(source)
    if (folder / "tuning.json").is_file():
        from sertool.teacher.tuned import load_tuned_teacher

        return load_tuned_teacher(folder, head, layer, device)
    if _is_run(folder):
        if layer is not None:
            raise UsageError(f"{source}: a run of our own is embedded at its layer fc1; leave --layer out")
        if head == "fc2":
            raise UsageError(f"{source}: a run of our own is embedded at its layer fc1; leave --at out")
        from sertool.run import load_run_teacher

        return load_run_teacher(folder)
    if head is not None:
        raise UsageError(f"{source}: an encoder has no {head}; give --at layer:K, or tune it: sertool teacher tune")
    refuse_tuned(source)
    return EncoderTeacher(load_encoder(source, "middle" if layer is None else layer), choose_device(device))


def _parse_place(layer: int | None, at: str | None) -> tuple[int | None, str | None]:
    """Return the layer, or the head, that was asked for; None and None where nothing was."""
    if at is None:
        return layer, None
    if layer is not None:
        raise UsageError(f"--layer {layer} and --at {at!r}: give one of them")
    if at in HEADS:
        return None, at
    kind, _, number = at.partition(":")
    if kind != "layer" or not number.isdecimal():
        raise UsageError(f"--at {at!r}: no such place; {nearest(at, [*HEADS, 'layer:K'])}")
    return int(number), None


def load_encoder(source: str, layer: int | Literal["middle", "last"] = "last") -> SpeechEncoder:
    """Load a speech encoder up to one of its layers, on the CPU.

    Args:
        source: a local folder, or a name on the Hugging Face hub.
        layer: its number as for :func:`load_teacher`, or which one.

    Raises:
        UsageError: no such folder or hub name, not a speech encoder, or a layer it does not have.
        ArtifactError: weights that are damaged, incomplete or not in safetensors.
    """
    folder = Path(source)
    name = folder.resolve().name if folder.is_dir() else source
    folder = folder if folder.is_dir() else _download(source)
    config = _read_config(folder, source)
    family = FAMILIES.get(config.model_type, SpeechEncoder)
    last = config.num_hidden_layers
    chosen = {"middle": last // 2, "last": last}[layer] if isinstance(layer, str) else layer
    if not 0 <= chosen <= last:
        raise UsageError(f"{source}: no layer {chosen}; valid: 0 (before the first block) to {last} (the last block)")
    return family(folder, name, chosen)


def refuse_tuned(source: str) -> None:
    """Refuse to take a tuned encoder for a public one: whom it heard would be forgotten.

    Raises:
        UsageError: the folder is that of a tuned teacher, or the encoder in one.
    """
    folder = Path(source).resolve()
    whole = folder.parent if folder.name == "encoder" else folder
    if (whole / "tuning.json").is_file():
        raise UsageError(
            f"{source}: was tuned, and only the whole teacher knows on whom; embed with --teacher {whole}, or tune the "
            "encoder that it was made from"
        )


class SpeechEncoder(torch.nn.Module):
    """A transformers encoder of waveforms (wav2vec 2.0, HuBERT, WavLM ...), up to one of its layers.

    Args:
        folder: local folder with ``config.json``, ``preprocessor_config.json`` and safetensors weights.
        name: name of the model.
        layer: see :func:`load_teacher`.

    Attributes:
        folder: as given.
        name: as given.
        layer: as given; the blocks above it are dropped.
        layers: how many blocks the whole encoder has.
        dimension: of the activations.
        kind: the model's type in transformers.
        longest: samples encoded in one pass; attention costs the square of the length.
        shortest: samples of one frame.

    Raises:
        UsageError: the folder lacks a feature extractor, or it wants another rate than 16 kHz.
        ArtifactError: weights that are damaged, incomplete or not in safetensors.
    """

    def __init__(self, folder: Path, name: str, layer: int) -> None:
        super().__init__()
        _check_weights(folder)
        self.folder, self.name, self.layer = folder, name, layer
        self._extractor = _load_extractor(folder)
        self.model = self._load_model(folder).eval()
        self.layers = self._tap()
        config = self.model.config
        self.kind = str(config.model_type)
        self.dimension = int(config.hidden_size)
        self.longest, self.shortest = self._piece_limits(config)

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the weights."""
        return _digest(content_hash(path) for path in sorted(self.folder.glob("*.safetensors")))

    @cached_property
    def settings_hash(self) -> str:
        """SHA-256 of the model's and the feature extractor's settings."""
        return _digest(content_hash(self.folder / name) for name in ("config.json", "preprocessor_config.json"))

    @property
    def licence(self) -> str:
        """Licence of the weights, as far as the folder states one."""
        return _licence(self.folder)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.parameters()).device

    def inputs(self, samples: FloatArray) -> torch.Tensor:
        """Turn (n,) samples at 16 kHz into the model's input for one clip, float32 (1, ...), on the CPU."""
        extracted = self._extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return torch.as_tensor(extracted.input_values)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the layer's activations, float32 (clips, frames, dimension), of equally long clips."""
        self.model(inputs)
        return self._tapped

    def _tap(self) -> int:
        """Catch the layer's activations, drop the blocks after it, and return how many blocks there were."""
        blocks = self._trunk.layers
        if self.layer == 0:
            blocks[0].register_forward_pre_hook(lambda _block, inputs: self._catch(inputs))
        elif self.layer < len(blocks):
            blocks[self.layer - 1].register_forward_hook(lambda _block, _inputs, output: self._catch(output))
        else:
            self.model.register_forward_hook(lambda _model, _inputs, output: self._catch(output))
        self._trunk.layers = blocks[: max(self.layer, 1)]
        return len(blocks)

    def _catch(self, output: Any) -> None:
        self._tapped = _activations(output)

    @property
    def _trunk(self) -> Any:
        """The part that holds the transformer blocks."""
        return getattr(self.model, "encoder", self.model)

    def _piece_limits(self, config: Any) -> tuple[int, int]:
        """Return the longest and the shortest input in samples; the shortest is the convolutions' receptive field."""
        field, stride = 1, 1
        for kernel, step in zip(config.conv_kernel, config.conv_stride, strict=True):
            field += (kernel - 1) * stride
            stride *= step
        return LONGEST_PIECE, field

    def _load_model(self, folder: Path) -> Any:
        return _load_weights(transformers.AutoModel, folder)

    # What tuning needs: the blocks that are frozen apart from those that are trained.

    def freeze(self, blocks: int) -> None:
        """Exempt from training the convolutions in front and, with any blocks, all that stands below the next one.

        LayerDrop is switched off: it could drop the very block whose activations are taken.

        Args:
            blocks: how many blocks are frozen, fewer than there are up to the layer; 0 leaves trainable what stands
                between convolutions and blocks.

        Raises:
            UsageError: more blocks than there are up to the layer, or blocks that cannot be run apart.
        """
        if blocks and not 0 < blocks < self.layer:
            raise UsageError(
                f"freeze {blocks}: layer {self.layer} stands on {self.layer} blocks; valid: none, fewer, all"
            )
        if blocks and (self.kind not in SEPARABLE or getattr(self.model, "adapter", None)):
            raise UsageError(f"freeze {blocks}: the blocks of a {self.kind} cannot be run one by one; valid: none, all")
        self.model.config.layerdrop = 0.0
        self.requires_grad_(blocks == 0)
        for module in (*self._convolutions(), *self._trunk.layers[:blocks]):
            module.requires_grad_(False)
        for module in (*self._trunk.layers[blocks:], self._final_norm):
            module.requires_grad_(True)

    def below(self, inputs: torch.Tensor, blocks: int) -> torch.Tensor:
        """Return what enters the block after the first ``blocks``, (clips, frames, dimension)."""
        caught: list[torch.Tensor] = []
        handle = self._trunk.layers[blocks].register_forward_pre_hook(
            lambda _block, entering: caught.append(entering[0])
        )
        with handle:
            self.model(inputs)
        return caught[0]

    def above(self, hidden: torch.Tensor, blocks: int) -> torch.Tensor:
        """Return the layer's activations from what :meth:`below` gives, (clips, frames, dimension)."""
        for block in self._trunk.layers[blocks:]:
            hidden = _activations(self._run(block, hidden))
        return self._final_norm(hidden) if self.layer == self.layers else hidden

    def save(self, folder: Path) -> None:
        """Write the whole encoder with the weights that were trained, as a transformers folder.

        The blocks above the layer are those of the original.
        """
        whole = self._load_model(self.folder)
        trained = {name: weights for name, weights in self.model.named_parameters() if weights.requires_grad}
        whole.load_state_dict({name: weights.detach().cpu() for name, weights in trained.items()}, strict=False)
        whole.save_pretrained(folder)
        self._extractor.save_pretrained(folder)
        for path in self.folder.glob("LICENSE*"):
            (folder / path.name).write_bytes(path.read_bytes())

    def _convolutions(self) -> Iterable[torch.nn.Module]:
        return [self.model.feature_extractor]

    @property
    def _final_norm(self) -> torch.nn.Module:
        stable = getattr(self.model.config, "do_stable_layer_norm", False)
        return self._trunk.layer_norm if stable else torch.nn.Identity()

    def _run(self, block: torch.nn.Module, hidden: torch.Tensor) -> Any:
        """Call a block as the whole model does."""
        return block(hidden)


class WavLMEncoder(SpeechEncoder):
    """WavLM, whose first block makes the position bias of all."""

    def _run(self, block: torch.nn.Module, hidden: torch.Tensor) -> Any:
        clips, frames, _ = hidden.shape
        with torch.no_grad():  # the first block is frozen
            bias = self._trunk.layers[0].attention.compute_bias(frames, frames)
        return block(hidden, position_bias=bias.repeat(clips, 1, 1))


class WhisperEncoder(SpeechEncoder):
    """The encoder of Whisper, given the clip alone instead of 30 s of mostly padding.

    The log-Mel spectrogram is rounded up to a whole frame of the encoder (20 ms), and the encoder gets as many
    positions as it has frames, because transformers' ``WhisperEncoder`` insists on an input that fills all of them.
    """

    def inputs(self, samples: FloatArray) -> torch.Tensor:
        """Turn (n,) samples at 16 kHz into a log-Mel spectrogram, float32 (1, mel bands, frames)."""
        extracted = self._extractor(
            samples,
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            padding="longest",
            truncation=False,
            pad_to_multiple_of=2 * self._extractor.hop_length,
        )
        return torch.as_tensor(extracted.input_features)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the layer's activations, float32 (clips, frames, dimension), of equally long clips."""
        self._fit_positions(inputs)
        return super().forward(inputs)

    def below(self, inputs: torch.Tensor, blocks: int) -> torch.Tensor:
        """See :meth:`SpeechEncoder.below`."""
        self._fit_positions(inputs)
        return super().below(inputs, blocks)

    def _fit_positions(self, mel: torch.Tensor) -> None:
        frames = mel.shape[-1] // 2
        self.model.config.max_source_positions = frames
        positions = self._positions[:frames].to(self.device)
        self.model.embed_positions = torch.nn.Embedding(frames, self.dimension, _weight=positions, _freeze=True)

    def _load_model(self, folder: Path) -> Any:
        config = transformers.AutoConfig.from_pretrained(folder)
        if config.architectures == ["WhisperEncoder"]:
            model = _load_weights(transformers.models.whisper.modeling_whisper.WhisperEncoder, folder)
        else:
            model = _load_weights(transformers.WhisperModel, folder).encoder
        self._positions = model.embed_positions.weight.detach()
        return model

    def _piece_limits(self, config: Any) -> tuple[int, int]:
        samples_per_frame = 2 * self._extractor.hop_length
        return config.max_source_positions * samples_per_frame, samples_per_frame

    def _convolutions(self) -> Iterable[torch.nn.Module]:
        return [self.model.conv1, self.model.conv2, self.model.embed_positions]

    @property
    def _final_norm(self) -> torch.nn.Module:
        norm: torch.nn.Module = self.model.layer_norm
        return norm

    def _run(self, block: torch.nn.Module, hidden: torch.Tensor) -> Any:
        return block(hidden, None)  # no attention mask


FAMILIES: dict[str, type[SpeechEncoder]] = {"whisper": WhisperEncoder, "wavlm": WavLMEncoder}

SEPARABLE = ("hubert", "wav2vec2", "wavlm", "whisper")
"""Kinds whose blocks can be run one by one: what else a block is called with is known."""


class EncoderTeacher:
    """A speech encoder as a teacher: the mean of a layer's activations over a clip's frames.

    Clips are encoded one by one without padding, so a vector depends on nothing but its clip. Clips longer than 30 s
    are cut into equal pieces of at most 30 s, and the mean is taken over the frames of all pieces.

    Args:
        encoder: up to the layer.
        device: where to compute; always in float32, whatever the weights are stored in.
    """

    def __init__(self, encoder: SpeechEncoder, device: torch.device) -> None:
        self._encoder = encoder.eval().to(device)
        self.name = f"{encoder.name} layer {encoder.layer}"
        self.dimension = encoder.dimension
        self.identity = _digest([encoder.weights_hash, encoder.settings_hash, str(encoder.layer), POOLING])
        self.description: dict[str, Any] = {
            "name": self.name,
            "kind": encoder.kind,
            "layer": encoder.layer,
            "layers": encoder.layers,
            "dimension": self.dimension,
            "pooling": POOLING,
            "sample_rate": SAMPLE_RATE,
            "weights_sha256": encoder.weights_hash,
            "licence": encoder.licence,
            "transformers": transformers.__version__,
            "torch": importlib.metadata.version("torch"),
        }

    def embed(self, samples: FloatArray) -> FloatArray:
        """Return the mean of a layer's activations over the frames of a clip.

        Args:
            samples: (n,) samples at 16 kHz in [-1, 1].

        Returns:
            float32 (dimension,).

        Raises:
            AudioError: a clip shorter than one frame of the encoder, or samples that are not finite.
        """
        samples = as_samples(samples)
        shortest = self._encoder.shortest
        if len(samples) < shortest:
            raise AudioError(
                f"too short: {1000 * len(samples) / SAMPLE_RATE:.1f} ms, and one frame of the teacher takes "
                f"{1000 * shortest / SAMPLE_RATE:g} ms"
            )
        pieces = np.array_split(samples, -(-len(samples) // self._encoder.longest))
        total, frames = np.zeros(self.dimension), 0
        for piece in pieces:
            activations = self._activations(piece)
            total += activations.sum(axis=0, dtype=np.float64)
            frames += len(activations)
        return (total / frames).astype(np.float32)

    @torch.inference_mode()
    def _activations(self, samples: FloatArray) -> FloatArray:
        """Return float32 (frames, dimension) for the samples of one piece."""
        inputs = self._encoder.inputs(samples).to(self._encoder.device)
        return np.asarray(self._encoder(inputs)[0].cpu())


def _activations(output: Any) -> torch.Tensor:
    """Unpack what a block gives: a tensor or a tuple that starts with it, by model and version of the library."""
    activations: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return activations


def _is_run(folder: Path) -> bool:
    """Tell a run, finished or not, or a folder of folds; a recipe alone is none, it may lie anywhere."""
    marks = ("checkpoint.safetensors", "environment.json")
    return not (folder / "config.json").is_file() and any(
        (place / mark).is_file() for place in (folder, *folder.glob("fold-*")) for mark in marks
    )


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _download(source: str) -> Path:
    """Fetch a model of the hub, or find it in the hub's local cache."""
    name, _, revision = source.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UsageError(f"{source}: no such folder; give a folder with a speech encoder or a hub name (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client lets through what its HTTP library raises
        raise UsageError(
            f"{source}: no such folder, and not to be had from the hub ({_first_line(error)}); give a local folder"
        ) from error


def _read_config(folder: Path, source: str) -> Any:
    """Read ``config.json`` and make sure that it describes a speech encoder."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{source}: holds no model (no config.json of an encoder, no checkpoint.safetensors of a run)")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises whatever its parts raise on a foreign or damaged file
        raise ArtifactError(f"{source}: config.json cannot be used ({_first_line(error)})") from error
    if config.model_type != "whisper" and not hasattr(config, "conv_kernel"):
        raise UsageError(
            f"{source}: a {config.model_type!r} model is no speech encoder that can teach; "
            "valid: whisper, and those that take the waveform, such as wav2vec2, hubert, wavlm"
        )
    return config


def _check_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        pickled = next(iter([*folder.glob("*.bin"), *folder.glob("*.pt")]), None)
        found = f"only {pickled.name}, a pickle, which is never loaded" if pickled else "none"
        raise ArtifactError(f"{folder}: needs weights in safetensors, found {found}; save the model as safetensors")


def _load_extractor(folder: Path) -> Any:
    try:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    except Exception as error:  # see _read_config
        raise UsageError(f"{folder}: no usable preprocessor_config.json ({_first_line(error)})") from error
    if extractor.sampling_rate != SAMPLE_RATE:
        raise UsageError(f"{folder}: takes audio at {extractor.sampling_rate} Hz; only 16000 Hz is supported")
    return extractor


def _load_weights(model_class: Any, folder: Path) -> Any:
    """Load float32 weights from safetensors; an incomplete file is an error, never random numbers."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # see _read_config
        raise ArtifactError(f"{folder}: the weights cannot be loaded ({_first_line(error)})") from error
    missing = sorted(set(info["missing_keys"]) - UNUSED_WEIGHTS)
    if missing:
        raise ArtifactError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    return model


def _licence(folder: Path) -> str:
    """Return the first line of the licence file, or the licence that the model card states."""
    for path in sorted(folder.glob("LICENSE*")):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in lines if line.strip()), "unknown")
    card = folder / "README.md"
    stated = re.search(r"^license: *(\S+)", card.read_text("utf-8", "replace"), re.M) if card.is_file() else None
    return stated.group(1) if stated else "unknown"
