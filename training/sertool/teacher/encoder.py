"""Teachers: models that turn a clip into one vector, above all the speech encoders of the transformers library."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

# Read when the library is first imported: nothing about the user's work is reported anywhere.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np
import torch
import transformers

from edge_runtime.errors import ArtifactError, AudioError, UsageError, nearest
from edge_runtime.frontend import FloatArray, as_samples
from sertool.audio import SAMPLE_RATE, content_hash

POOLING = "mean over real frames"
LONGEST_PIECE = 30 * SAMPLE_RATE
"""Samples encoded in one pass: attention costs the square of the length, and Whisper knows no longer audio."""

HUB_FILES = ["*.json", "*.safetensors", "LICENSE*", "README.md"]
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


def load_teacher(source: str, layer: int | None = None, device: str = "auto") -> Teacher:
    """Load a teacher.

    Args:
        source: a local folder with a transformers speech encoder (Whisper, wav2vec 2.0, HuBERT, WavLM and their
            relatives) in safetensors, a name on the Hugging Face hub (``owner/name`` or ``owner/name@revision``), or
            the folder of an earlier training run of our own.
        layer: 0 for what enters the first transformer block, 1 for what leaves it, and so on; the last one is taken
            after the final normalisation. None takes the middle one: emotion is carried best there, while the last
            layers serve the words (Pepino et al., Interspeech 2021).
        device: ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.

    Raises:
        UsageError: no such folder or hub name, not a speech encoder, a layer it does not have, no such device.
        ArtifactError: weights that are damaged, incomplete or not in safetensors.
        SerError: a run that is unfinished or damaged, or a folder of several folds.
    """
    folder = Path(source)
    if _is_run(folder):
        if layer is not None:
            raise UsageError(f"{source}: a run of our own is embedded at its layer fc1; leave --layer out")
        from sertool.run import load_run_teacher

        return load_run_teacher(folder)
    name = folder.resolve().name if folder.is_dir() else source
    folder = folder if folder.is_dir() else _download(source)
    config = _read_config(folder, source)
    family = WhisperTeacher if config.model_type == "whisper" else EncoderTeacher
    last = config.num_hidden_layers
    chosen = last // 2 if layer is None else layer
    if not 0 <= chosen <= last:
        raise UsageError(f"{source}: no layer {chosen}; valid: 0 (before the first block) to {last} (the last block)")
    return family(folder, name, chosen, _device(device))


class EncoderTeacher:
    """A transformers encoder of waveforms (wav2vec 2.0, HuBERT, WavLM ...), up to one of its layers.

    Clips are encoded one by one without padding, so a vector depends on nothing but its clip. Clips longer than 30 s
    are cut into equal pieces of at most 30 s, and the mean is taken over the frames of all pieces.

    Args:
        folder: local folder with ``config.json``, ``preprocessor_config.json`` and safetensors weights.
        name: name of the model.
        layer: see :func:`load_teacher`.
        device: where to compute; always in float32, whatever the weights are stored in.

    Raises:
        UsageError: the folder lacks a feature extractor, or it wants another rate than 16 kHz.
        ArtifactError: weights that are damaged, incomplete or not in safetensors.
    """

    def __init__(self, folder: Path, name: str, layer: int, device: torch.device) -> None:
        _check_weights(folder)
        self._extractor = _load_extractor(folder)
        model = self._load_model(folder)
        blocks = self._tap(model, layer)
        self._model = model.eval().to(device)
        self._device = device
        config = model.config
        self._longest, self._shortest = self._piece_limits(config)
        weights = _digest(content_hash(path) for path in sorted(folder.glob("*.safetensors")))
        settings = _digest(content_hash(folder / name) for name in ("config.json", "preprocessor_config.json"))
        self.name = f"{name} layer {layer}"
        self.dimension = int(config.hidden_size)
        self.identity = _digest([weights, settings, str(layer), POOLING])
        self.description: dict[str, Any] = {
            "name": self.name,
            "kind": config.model_type,
            "layer": layer,
            "layers": blocks,
            "dimension": self.dimension,
            "pooling": POOLING,
            "sample_rate": SAMPLE_RATE,
            "weights_sha256": weights,
            "licence": _licence(folder),
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
        if len(samples) < self._shortest:
            raise AudioError(
                f"too short: {1000 * len(samples) / SAMPLE_RATE:.1f} ms, and one frame of the teacher takes "
                f"{1000 * self._shortest / SAMPLE_RATE:g} ms"
            )
        pieces = np.array_split(samples, -(-len(samples) // self._longest))
        total, frames = np.zeros(self.dimension), 0
        for piece in pieces:
            activations = self._activations(piece)
            total += activations.sum(axis=0, dtype=np.float64)
            frames += len(activations)
        return (total / frames).astype(np.float32)

    @torch.inference_mode()
    def _activations(self, samples: FloatArray) -> FloatArray:
        """Return float32 (frames, dimension) for the samples of one piece."""
        self._model(self._inputs(samples).to(self._device))
        return np.asarray(self._tapped[0].cpu())

    def _tap(self, model: Any, layer: int) -> int:
        """Catch a layer's activations, drop the blocks after it, and return how many blocks there were."""
        encoder = getattr(model, "encoder", model)
        blocks = encoder.layers
        if layer == 0:
            blocks[0].register_forward_pre_hook(lambda _block, inputs: self._catch(inputs))
        elif layer < len(blocks):
            blocks[layer - 1].register_forward_hook(lambda _block, _inputs, output: self._catch(output))
        else:
            model.register_forward_hook(lambda _model, _inputs, output: self._catch(output))
        encoder.layers = blocks[: max(layer, 1)]
        return len(blocks)

    def _catch(self, output: Any) -> None:
        # Blocks give a tensor or a tuple that starts with it, as the model and the library's version have it.
        self._tapped: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]

    def _inputs(self, samples: FloatArray) -> torch.Tensor:
        extracted = self._extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return torch.as_tensor(extracted.input_values)

    def _piece_limits(self, config: Any) -> tuple[int, int]:
        """Return the longest and the shortest input in samples; the shortest is the convolutions' receptive field."""
        field, stride = 1, 1
        for kernel, step in zip(config.conv_kernel, config.conv_stride, strict=True):
            field += (kernel - 1) * stride
            stride *= step
        return LONGEST_PIECE, field

    def _load_model(self, folder: Path) -> Any:
        return _load_weights(transformers.AutoModel, folder)


class WhisperTeacher(EncoderTeacher):
    """The encoder of Whisper, given the clip alone instead of 30 s of mostly padding.

    The log-Mel spectrogram is rounded up to a whole frame of the encoder (20 ms), and the encoder gets as many
    positions as it has frames, because transformers' ``WhisperEncoder`` insists on an input that fills all of them.
    """

    def _load_model(self, folder: Path) -> Any:
        config = transformers.AutoConfig.from_pretrained(folder)
        if config.architectures == ["WhisperEncoder"]:
            model = _load_weights(transformers.models.whisper.modeling_whisper.WhisperEncoder, folder)
        else:
            model = _load_weights(transformers.WhisperModel, folder).encoder
        self._positions = model.embed_positions.weight
        return model

    def _piece_limits(self, config: Any) -> tuple[int, int]:
        samples_per_frame = 2 * self._extractor.hop_length
        return config.max_source_positions * samples_per_frame, samples_per_frame

    def _inputs(self, samples: FloatArray) -> torch.Tensor:
        extracted = self._extractor(
            samples,
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            padding="longest",
            truncation=False,
            pad_to_multiple_of=2 * self._extractor.hop_length,
        )
        mel = torch.as_tensor(extracted.input_features)
        frames = mel.shape[-1] // 2
        self._model.config.max_source_positions = frames
        self._model.embed_positions = torch.nn.Embedding(frames, self.dimension, _weight=self._positions[:frames])
        return mel


def _is_run(folder: Path) -> bool:
    """Tell a run, finished or not, or a folder of folds; a recipe alone is none, it may lie anywhere."""
    marks = ("checkpoint.safetensors", "environment.json")
    return not (folder / "config.json").is_file() and any(
        (place / mark).is_file() for place in (folder, *folder.glob("fold-*")) for mark in marks
    )


def _device(name: str) -> torch.device:
    valid = ["auto", "cpu", "cuda"]
    if name not in valid:
        raise UsageError(f"no device {name!r}; {nearest(name, valid)}")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise UsageError("device 'cuda': this torch sees no CUDA GPU; use auto or cpu")
    return torch.device("cuda" if found and name != "cpu" else "cpu")


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
