"""Who trains, who validates, who tests: speaker-independent splits with a content hash that every result carries."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from edge_runtime.errors import SerError, UsageError, nearest
from sertool.corpora.join import corpus_of
from sertool.corpora.manifest import Manifest
from sertool.files import write_text

PARTS = ("train", "validation", "test")
PROTOCOLS = ("loso", "loco", "kfold:K", "fractions:A,B,C", "paper", "release")
RELEASE = "release"
"""The protocol by which nobody tests."""

# Women and men in the corpus: women and men in train, validation, test. RAVDESS: the paper's Table 1. DEMoS: the
# reference implementation, whose sizes differ from its 40/30/30 but agree with the paper's Table 2.
_PAPER_SIZES = {
    (12, 12): {"f": (5, 4, 3), "m": (5, 4, 3)},
    (23, 45): {"f": (9, 7, 7), "m": (18, 18, 9)},
}


@dataclass(frozen=True)
class Fold:
    """The speakers of one training: sorted; only ``validation`` may be empty."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def part(self, name: str) -> tuple[str, ...]:
        """Return the speakers of ``train``, ``validation`` or ``test``."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


@dataclass(frozen=True)
class Split:
    """The folds of an experiment.

    Attributes:
        protocol: how they were made; ``by hand`` for a file that does not say.
        seed: what decided the order of the speakers.
        folds: at least one.

    Raises:
        UsageError: no fold, an empty train or test part, or a speaker who stands in two parts of a fold.

    Example:
        >>> Split("by hand", 0, (Fold(("anna", "otto"), (), ("otto",)),))
        Traceback (most recent call last):
        ...
        edge_runtime.errors.UsageError: fold 1: speaker 'otto' stands in train and in test; ...
    """

    protocol: str
    seed: int
    folds: tuple[Fold, ...]

    def __post_init__(self) -> None:
        if not self.folds:
            raise UsageError("the split has no fold")
        for number, fold in enumerate(self.folds, start=1):
            _check_fold(fold, number, tested=self.protocol != RELEASE)

    @property
    def hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the folds as canonical JSON."""
        canonical = json.dumps([asdict(fold) for fold in self.folds], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the split as JSON with one line a part."""
        folds = ",\n".join(
            "    {\n" + ",\n".join(f'      "{part}": {_json(fold.part(part))}' for part in PARTS) + "\n    }"
            for fold in self.folds
        )
        write_text(
            path,
            f'{{\n  "protocol": {_json(self.protocol)},\n  "seed": {self.seed},\n  "hash": "{self.hash}",\n'
            f'  "folds": [\n{folds}\n  ]\n}}\n',
        )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _check_fold(fold: Fold, number: int, tested: bool) -> None:
    for part in ("train", "test") if tested else ("train",):
        if not fold.part(part):
            raise UsageError(f"fold {number}: no speaker in {part}")
    places: dict[str, str] = {}
    for part in PARTS:
        for speaker in fold.part(part):
            if speaker in places:
                raise UsageError(
                    f"fold {number}: speaker {speaker!r} stands in {places[speaker]} and in {part}; "
                    "every speaker belongs to one part"
                )
            places[speaker] = part


def make_split(manifest: Manifest, protocol: str, seed: int = 0) -> Split:
    """Divide the speakers of a manifest, women and men in proportion where the manifest knows them.

    The result depends on the speakers, their genders, the protocol and the seed alone: not on the order of the rows,
    nor on the version of Python or numpy.

    Args:
        manifest: the corpus.
        protocol: ``loso`` (each speaker tests once, all others train), ``loco`` (so each corpus of a joined manifest),
            ``kfold:K`` (K groups of speakers take turns), ``fractions:A,B,C`` (shares of the speakers for train,
            validation, test), ``paper`` (10/8/6 speakers on RAVDESS, 27/25/16 on DEMoS) or ``release`` (all train and
            nobody tests).
        seed: decides which speakers fall together.

    Raises:
        UsageError: an unknown protocol, more parts than speakers, fractions that do not sum to 1, ``paper`` on another
            corpus, ``loco`` on a single one, or a training part without one of the labels.
    """
    kind, _, argument = protocol.partition(":")
    if len(manifest.speakers) < 2:
        raise UsageError(
            f"{manifest.path}: one speaker only, {manifest.speakers[0]!r}; testing on unseen speakers needs two or more"
        )
    if kind == "loso" and not argument:
        folds = _held_out(manifest, [[speaker] for speaker in manifest.speakers])
    elif protocol == "loco":
        folds = _held_out(manifest, _by_corpus(manifest))
    elif kind == "kfold":
        folds = _kfold(manifest, argument, seed)
    elif kind == "fractions":
        folds = [_fractions(manifest, argument, seed)]
    elif kind == "paper" and not argument:
        folds = [_paper(manifest, seed)]
    elif protocol == RELEASE:
        folds = [Fold(tuple(manifest.speakers), (), ())]
    else:
        raise UsageError(f"protocol {protocol!r} is not known; {nearest(protocol, PROTOCOLS)}")
    split = Split(protocol, seed, tuple(folds))
    check_split(split, manifest)
    return split


def _shuffled(speakers: Sequence[str], seed: int) -> list[str]:
    # A hash orders the speakers alike on every platform and for ever; a generator's stream may change.
    return sorted(speakers, key=lambda speaker: hashlib.sha256(f"{seed}:{speaker}".encode()).digest())


def _by_gender(manifest: Manifest) -> dict[str, list[str]]:
    genders = dict.fromkeys(sorted(set(manifest.genders.values())))
    return {g: [speaker for speaker in manifest.speakers if manifest.genders[speaker] == g] for g in genders}


def _interleaved(manifest: Manifest, seed: int) -> list[str]:
    """Order the speakers so that every stretch has women and men in the proportion of the whole, within one."""
    places = [
        ((rank + 0.5) / len(group), gender, speaker)
        for gender, group in _by_gender(manifest).items()
        for rank, speaker in enumerate(_shuffled(group, seed))
    ]
    return [speaker for _, _, speaker in sorted(places)]


def _held_out(manifest: Manifest, groups: Sequence[Sequence[str]]) -> list[Fold]:
    everyone = set(manifest.speakers)
    return [Fold(tuple(sorted(everyone - set(group))), (), tuple(sorted(group))) for group in groups]


def _by_corpus(manifest: Manifest) -> list[list[str]]:
    corpus = {clip.speaker: corpus_of(clip) for clip in manifest.clips}
    groups = [
        [speaker for speaker in manifest.speakers if corpus[speaker] == name] for name in sorted(set(corpus.values()))
    ]
    if len(groups) < 2:
        raise UsageError(f"{manifest.path}: one corpus only; join it with others first: sertool corpus join")
    return groups


def _kfold(manifest: Manifest, argument: str, seed: int) -> list[Fold]:
    speakers = _interleaved(manifest, seed)
    if not argument.isdecimal() or not 2 <= int(argument) <= len(speakers):
        raise UsageError(
            f"protocol 'kfold:{argument}': K must be a whole number from 2 to {len(speakers)}, the number of speakers "
            f"in {manifest.path}"
        )
    k = int(argument)
    bounds = [len(speakers) * fold // k for fold in range(k + 1)]
    return _held_out(manifest, [speakers[first:last] for first, last in pairwise(bounds)])


def _fractions(manifest: Manifest, argument: str, seed: int) -> Fold:
    try:
        fractions = [float(text) for text in argument.split(",")]
    except ValueError:
        fractions = []
    train, validation, test = fractions if len(fractions) == 3 else (0.0, 0.0, 0.0)
    if not (train > 0 and validation >= 0 and test > 0 and math.isclose(train + validation + test, 1, abs_tol=1e-6)):
        raise UsageError(
            f"protocol 'fractions:{argument}': give three shares for train, validation and test that sum to 1, such as "
            "fractions:.4,.3,.3; only validation may be 0"
        )
    speakers = _interleaved(manifest, seed)
    sizes = _largest_remainder((train, validation, test), len(speakers))
    for part, share, size in zip(PARTS, fractions, sizes, strict=True):
        if share > 0 and size == 0:
            raise UsageError(
                f"protocol 'fractions:{argument}': no speaker left for {part}, {manifest.path} has only "
                f"{len(speakers)}; use larger shares, or loso"
            )
    return _cut(speakers, sizes)


def _largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Round shares of a total to whole numbers that sum to it (Hamilton's method).

    Example:
        >>> _largest_remainder((0.4, 0.3, 0.3), 24)
        [10, 7, 7]
    """
    sizes = [math.floor(share * total + 1e-9) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda part: sizes[part] - shares[part] * total)
    for part in by_remainder[: total - sum(sizes)]:
        sizes[part] += 1
    return sizes


def _cut(speakers: Sequence[str], sizes: Sequence[int]) -> Fold:
    train, validation = sizes[0], sizes[0] + sizes[1]
    return Fold(
        tuple(sorted(speakers[:train])),
        tuple(sorted(speakers[train:validation])),
        tuple(sorted(speakers[validation:])),
    )


def _paper(manifest: Manifest, seed: int) -> Fold:
    groups = _by_gender(manifest)
    women, men = len(groups.get("f", [])), len(groups.get("m", []))
    sizes = _PAPER_SIZES.get((women, men))
    if sizes is None or set(groups) != {"f", "m"}:
        raise UsageError(
            f"protocol 'paper' is defined for RAVDESS (12 women, 12 men) and DEMoS (23 women, 45 men); {manifest.path} "
            f"has {women} and {men} of {len(manifest.speakers)} speakers; the nearest is fractions:.4,.3,.3"
        )
    halves = [_cut(_shuffled(groups[gender], seed), sizes[gender]) for gender in ("f", "m")]
    return Fold(*(tuple(sorted(halves[0].part(part) + halves[1].part(part))) for part in PARTS))


def check_split(split: Split, manifest: Manifest) -> None:
    """Refuse a split that cannot be trained and tested on a manifest.

    Raises:
        UsageError: a speaker without a clip, or a fold whose training part lacks a label that another part has.
    """
    for number, fold in enumerate(split.folds, start=1):
        for part in PARTS:
            manifest.refuse_unknown(fold.part(part))
        labels = {part: set().union(*map(manifest.labels_of.__getitem__, fold.part(part))) for part in PARTS}
        missing = sorted((labels["validation"] | labels["test"]) - labels["train"])
        if missing:
            with_label = sorted({clip.speaker for clip in manifest.clips if clip.label == missing[0]})
            raise UsageError(
                f"{manifest.path}: fold {number} of {split.protocol} trains without {', '.join(map(repr, missing))} "
                f"(speakers with {missing[0]!r}: {', '.join(with_label)}); choose another protocol or seed, or drop "
                "the label"
            )


def load_split(path: str | Path) -> Split:
    """Read a split, made by :func:`make_split` or written by hand.

    By hand, ``{"folds": [{"train": ["a", "b"], "test": ["c"]}]}`` is enough.

    Raises:
        UsageError: the file is missing or is no split, it was edited after its hash was taken, or two parts share a
            speaker.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such split; make one with: sertool split make")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from error
    try:
        split = _parsed(content)
    except SerError as error:
        raise UsageError(f"{path}: {error}") from error
    if content.get("hash", split.hash) != split.hash:
        raise UsageError(
            f"{path}: edited after its hash was taken ({content['hash']}, now {split.hash}); "
            'make it anew, or delete the line "hash" to let the edit stand'
        )
    return split


def load_fold(path: str | Path, number: int, manifest: Manifest) -> tuple[Split, Fold]:
    """Read a split that fits a manifest and choose a fold of it.

    Args:
        path: the split.
        number: of the fold, counted from 1.
        manifest: the corpus.

    Raises:
        UsageError: no such fold, or what :func:`load_split` and :func:`check_split` refuse.
    """
    split = load_split(path)
    check_split(split, manifest)
    if not 1 <= number <= len(split.folds):
        raise UsageError(f"{path}: no fold {number}; valid: 1 to {len(split.folds)}")
    return split, split.folds[number - 1]


def training_labels(manifest: Manifest, rows: Sequence[int]) -> tuple[str, ...]:
    """Return the labels of the rows trained on, sorted.

    Raises:
        UsageError: there is only one.
    """
    labels = tuple(sorted({manifest.clips[row].label for row in rows}))
    if len(labels) < 2:
        raise UsageError(f"{manifest.path}: all training clips are labelled {labels[0]!r}; needed: two labels")
    return labels


def _parsed(content: Any) -> Split:
    fields = _known_keys(content, ("protocol", "seed", "hash", "folds"), "the split")
    folds = fields.get("folds")
    if not isinstance(folds, list):
        raise UsageError('no list "folds"; the least is {"folds": [{"train": ["a", "b"], "test": ["c"]}]}')
    protocol, seed = fields.get("protocol", "by hand"), fields.get("seed", 0)
    if not isinstance(protocol, str) or not isinstance(seed, int):
        raise UsageError('"protocol" must be text and "seed" a whole number')
    return Split(protocol, seed, tuple(_parsed_fold(fold, number) for number, fold in enumerate(folds, start=1)))


def _parsed_fold(content: Any, number: int) -> Fold:
    parts = _known_keys(content, PARTS, f"fold {number}")
    speakers = {part: parts.get(part, []) for part in PARTS}
    for part, names in speakers.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UsageError(f'fold {number}: "{part}" must be a list of speakers in quotes, such as ["01", "02"]')
    return Fold(*(tuple(sorted(speakers[part])) for part in PARTS))


def _known_keys(content: Any, known: Sequence[str], where: str) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        raise UsageError(f"{where} is not an object in curly brackets")
    for key in content:
        if key not in known:
            raise UsageError(f"{where} has an unknown key {key!r}; {nearest(key, known)}")
    return content
