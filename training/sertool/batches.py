"""What a training step reads: normalised log-Mel windows, or excerpts of clips as a device hears them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_runtime.errors import UsageError, nearest
from edge_runtime.frontend import FloatArray, FrontEnd, Normalization, RunningNormalizer
from sertool.channel import in_random_band, in_random_room
from sertool.corpora.join import corpus_of
from sertool.corpora.manifest import Manifest
from sertool.features import ClipFrames, Progress, log_mel_clips, log_mel_windows, measure_normalization
from sertool.networks import Student, TimeReach, time_reach
from sertool.noise import in_random_music, in_random_noise
from sertool.personal import personal_constants
from sertool.recipe import Augmentation, Normalizing, Recipe


@dataclass(frozen=True)
class Batch:
    """Inputs of one step.

    Attributes:
        inputs: float32 (B, 1, frames, mel_bands), normalised.
        skip: features at the beginning that are context and do not count.
        features: int64 (B,), how many features of each item count from its beginning; None where all do.
    """

    inputs: Tensor
    skip: int = 0
    features: Tensor | None = None


class Inputs(Protocol):
    """Where batches come from."""

    def begin(self, random: np.random.Generator) -> None:
        """Prepare an epoch."""

    def batch(self, rows: Tensor, random: np.random.Generator) -> Batch:
        """Return the inputs of clips, by their rows (B,)."""


def training_inputs(
    recipe: Recipe,
    manifest: Manifest,
    rows: Sequence[int],
    network: Student,
    given: Normalization | None,
    device: torch.device,
    on_features: Progress | None = None,
) -> tuple[Inputs, Normalization]:
    """Return what a network sees of the clips it is trained on, and how that is normalised.

    Args:
        recipe: of the training.
        manifest: the corpus.
        rows: those of its clips that are trained on.
        network: with the recipe's architecture.
        given: the normalisation; measured on the clips when None.
        device: where the batches are needed.
        on_features: told while log-Mel spectrograms are computed.

    Raises:
        AudioError: a clip cannot be read.
        UsageError: the network's context has no end, see :func:`sertool.networks.time_reach`, or no clip has the label
            of calm speech.
    """
    front_end = FrontEnd()
    if recipe.data.clips == "once":
        stride = time_reach(network).stride
        clips = log_mel_clips(manifest, front_end, stride, on_features).take(rows)
        normalization = given or _measured(clips, recipe.normalization, front_end)
        normalization = replace(normalization, personal=recipe.normalization.personal > 0)
        speakers = [manifest.clips[row].speaker for row in rows]
        choices = _choices(clips, manifest, rows, normalization, recipe)
        inputs = Excerpts(
            clips,
            speakers,
            normalization,
            choices,
            recipe.augmentation,
            stride=stride,
            device=device,
        )
        return inputs, normalization
    context = recipe.training.context if recipe.network.time_padding == "causal" else 0.0
    reach = time_reach(network) if context else TimeReach(stride=1, context=0)
    windows = log_mel_windows(manifest, front_end, recipe.data.window_samples, on_features, reach.context)
    normalization = given or measure_normalization(ClipFrames.of_windows(windows, reach.context).take(rows))
    excerpt = recipe.augmentation.excerpt_frames
    return Windows(windows, rows, reach, normalization, context=context, excerpt=excerpt, device=device), normalization


def _measured(clips: ClipFrames, settings: Normalizing, front_end: FrontEnd) -> Normalization:
    constants = measure_normalization(clips)
    if settings.kind == "constant":
        return constants
    prior, memory = (round(seconds * front_end.frame_rate) for seconds in (settings.prior, settings.memory))
    return replace(constants, prior_frames=max(1, prior), memory_frames=max(1, memory) if settings.memory else 0)


@dataclass(frozen=True)
class Choices:
    """By what constants each clip may be normalised.

    Attributes:
        usual: for each clip.
        personal: for each clip: those of its speaker's own calm speech.
        share: of the clips that are normalised by the latter.
        loudness: the others are heard up to so many dB louder or softer.
    """

    usual: Sequence[Normalization]
    personal: Sequence[Normalization] = ()
    share: float = 0.0
    loudness: float = 0.0

    def draw(self, random: np.random.Generator) -> list[Normalization]:
        """Return the constants of each clip for one epoch."""
        drawn = list(self.usual)
        if self.loudness:
            drawn = [_heard_louder(usual, random.uniform(-self.loudness, self.loudness)) for usual in drawn]
        if self.share:
            chosen = random.random(len(drawn)) < self.share
            drawn = [own if is_own else other for other, own, is_own in zip(drawn, self.personal, chosen, strict=True)]
        return drawn


def _heard_louder(constants: Normalization, gain_db: float) -> Normalization:
    """Return constants by which a clip is normalised as one that is so much louder would be by those given."""
    return replace(constants, mean=tuple(value - gain_db for value in constants.mean))


def _choices(
    clips: ClipFrames, manifest: Manifest, rows: Sequence[int], constants: Normalization, recipe: Recipe
) -> Choices:
    chosen, settings = [manifest.clips[row] for row in rows], recipe.normalization
    usual, loudness = [constants] * len(chosen), recipe.augmentation.loudness
    if settings.by == "corpus":
        corpora = np.array([corpus_of(clip) for clip in chosen])
        of_corpus = {
            name: measure_normalization(clips.take(np.flatnonzero(corpora == name).tolist()))
            for name in sorted(set(corpora.tolist()))
        }
        usual = [of_corpus[name] for name in corpora.tolist()]
    if not settings.personal:
        return Choices(usual, loudness=loudness)
    labels = {clip.label for clip in chosen if clip.label}
    if settings.personal_label not in labels:
        raise UsageError(
            f"{manifest.path}: no clip is labelled {settings.personal_label!r}, normalization.personal_label; "
            f"{nearest(settings.personal_label, labels)}; or set normalization.personal to 0"
        )
    personal = personal_constants(
        clips, [clip.speaker for clip in chosen], [clip.label for clip in chosen], usual, settings, FrontEnd()
    )
    return Choices(usual, personal, settings.personal, loudness)


class Windows:
    """Clips that are tiled or cut to one window each, as in the paper; all have one length.

    Args:
        windows: float32 (M, reach.context + frames, mel_bands), dB; may be on disk, and is read batch by batch.
        rows: those of them that are trained on (N,).
        reach: frames of context before each window, and frames a feature.
        normalization: constant.
        context: share of the batches that have the context: zero states are not zero frames, so windows with and
            without do not stack.
        excerpt: frames of each window to take, at random; 0 for all.
        device: where the batches are needed.
    """

    def __init__(
        self,
        windows: FloatArray,
        rows: Sequence[int],
        reach: TimeReach,
        normalization: Normalization,
        *,
        context: float,
        excerpt: int,
        device: torch.device,
    ) -> None:
        self._windows = windows
        self._rows = np.asarray(rows)
        self._reach = reach
        self._normalization = normalization
        self._device = device
        self._context = context
        frames = windows.shape[1] - reach.context
        self._excerpt = min(excerpt or frames, frames)
        self._last = frames - self._excerpt

    def begin(self, random: np.random.Generator) -> None:
        """Do nothing: windows stay what they are."""

    def batch(self, rows: Tensor, random: np.random.Generator) -> Batch:
        """Return windows, or excerpts of them; see :class:`Inputs`."""
        context = self._reach.context if random.random() < self._context else 0
        before = self._reach.context - context
        length = context + self._excerpt
        first = before + (random.integers(0, self._last + 1, len(rows)) if self._last else np.zeros(len(rows), int))
        chosen = self._rows[rows.cpu().numpy()]
        excerpts = np.stack([self._windows[row, at : at + length] for row, at in zip(chosen, first, strict=True)])
        inputs = torch.from_numpy(self._normalization.apply(excerpts))[:, None].to(self._device)
        return Batch(inputs, context // self._reach.stride)


class Excerpts:
    """Random excerpts of clips that are heard once, from a reset, with zeros after a shorter one.

    With running statistics, each epoch hears the clips of every speaker one after the other in another order, through
    the device's own normaliser, and keeps them in memory as it heard them; else clips are read batch by batch.

    Args:
        clips: dB.
        speakers: of each clip.
        normalization: constant or running.
        choices: where it is constant, by what constants each clip may be normalised.
        augmentation: how long excerpts are, and how they are heard.
        stride: frames a feature of the network.
        device: where the batches are needed.
    """

    def __init__(
        self,
        clips: ClipFrames,
        speakers: Sequence[str],
        normalization: Normalization,
        choices: Choices,
        augmentation: Augmentation,
        *,
        stride: int,
        device: torch.device,
    ) -> None:
        self._clips = clips
        self._normalization = normalization
        self._stride = stride
        self._augmentation = augmentation
        self._device = device
        # Below one stride there is no feature.
        self._longest = max(stride, min(augmentation.excerpt_frames or clips.longest, clips.longest))
        self._shortest = max(stride, min(augmentation.shortest_frames or self._longest, self._longest))
        self._speakers = speakers
        self._choices = choices
        # What decides how clips are normalised in an epoch: who was heard before, or constants.
        self._in_turn: list[FloatArray] = []
        self._constants: Sequence[Normalization] = choices.usual

    def begin(self, random: np.random.Generator) -> None:
        """Hear every speaker's clips in another order, or normalise others by their speaker's own constants."""
        if self._normalization.runs:
            self._in_turn = hear_in_turn(
                self._clips, self._speakers, self._normalization, random, newcomers=self._augmentation.newcomers
            )
        else:
            self._constants = self._choices.draw(random)

    def batch(self, rows: Tensor, random: np.random.Generator) -> Batch:
        """Return excerpts; see :class:`Inputs`."""
        inputs, frames = padded([self._normalized(row, self._excerpt(row, random), random) for row in rows.tolist()])
        features = torch.from_numpy(frames // self._stride).clamp(min=1)
        return Batch(torch.from_numpy(inputs)[:, None].to(self._device), features=features.to(self._device))

    def _excerpt(self, row: int, random: np.random.Generator) -> slice:
        """Draw the frames of an excerpt of a clip."""
        frames = self._longest
        if self._shortest < self._longest:
            frames = int(random.integers(self._shortest, self._longest, endpoint=True))
        first = int(random.integers(0, max(0, len(self._clips[row]) - frames), endpoint=True))
        return slice(first, first + frames)

    def _normalized(self, row: int, frames: slice, random: np.random.Generator) -> FloatArray:
        """Return an excerpt of a clip as it is heard, in the order in which sound passes rooms, noise and lines."""
        if self._normalization.runs:
            return self._in_turn[row][frames]
        excerpt, heard = self._clips[row][frames], self._augmentation
        if heard.room and random.random() < heard.room:
            excerpt = in_random_room(excerpt, FrontEnd(), random)
        if heard.noise and random.random() < heard.noise:
            excerpt = in_random_noise(excerpt, self._clips, FrontEnd(), random)
        if heard.music and random.random() < heard.music:
            excerpt = in_random_music(excerpt, FrontEnd(), random)
        if heard.band and random.random() < heard.band:
            excerpt = in_random_band(excerpt, FrontEnd(), random)
        return self._constants[row].apply(excerpt)


def hear_in_turn(
    clips: ClipFrames,
    speakers: Sequence[str],
    normalization: Normalization,
    random: np.random.Generator,
    newcomers: float = 0.0,
) -> list[FloatArray]:
    """Normalise clips as a device does that hears each speaker's one after the other, in random order.

    Args:
        clips: dB.
        speakers: of each clip.
        normalization: whose statistics run on from clip to clip.
        random: source of the order.
        newcomers: share of the clips before which the speaker is forgotten.

    Returns:
        float32 (frames, mel_bands) of each clip, in the order given.
    """
    named, normalized = np.asarray(speakers), list(clips)
    for name in sorted(set(speakers)):
        normalizer = RunningNormalizer(normalization)
        for row in random.permutation(np.flatnonzero(named == name)):
            if newcomers and random.random() < newcomers:
                normalizer.reset()
            normalizer.forget()
            normalized[row] = normalizer.push(clips[row])
    return normalized


def padded(clips: Sequence[FloatArray], frames: int = 0) -> tuple[FloatArray, NDArray[np.int64]]:
    """Put clips (n_i, mel_bands) into one array, with zeros after the shorter ones.

    Args:
        clips: at least one.
        frames: length of the array, at least; that of the longest clip when less.

    Returns:
        float32 (N, frames, mel_bands), and the length of each (N,).

    Example:
        >>> together, lengths = padded([np.ones((2, 64), np.float32), np.ones((5, 64), np.float32)])
        >>> together.shape, lengths.tolist()
        ((2, 5, 64), [2, 5])
    """
    lengths = np.array([len(clip) for clip in clips])
    together = np.zeros((len(clips), max(frames, int(lengths.max())), clips[0].shape[1]), np.float32)
    for row, clip in enumerate(clips):
        together[row, : len(clip)] = clip
    return together, lengths
