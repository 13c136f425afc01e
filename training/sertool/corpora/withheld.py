"""Fewer labels than clips: what a training is worth where most of the speech was never labelled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from sertool.corpora.manifest import Clip, Manifest


def withhold_labels(manifest: Manifest, rows: Sequence[int], share: float, seed: int) -> Manifest:
    """Take the labels away from all but a share of the clips, drawn evenly over labels and speakers.

    Every label keeps its part of the share, rounded, and one clip at least, so that a network has the same classes
    whatever the share. A smaller share keeps some of what a larger one keeps, and the draw depends on the seed and on
    the clips alone: networks with and without a graph are compared on the same labels.

    Args:
        manifest: the corpus.
        rows: clips that the draw is among; all others stay as they are.
        share: of these clips that keep their label, above 0 and at most 1.
        seed: of the draw.

    Returns:
        the manifest with an empty label where one was withheld.

    Example:
        >>> from pathlib import Path
        >>> clips = [Clip(f"{number}.wav", Path(f"{number}.wav"), "ada", "joy") for number in range(8)]
        >>> clips = withhold_labels(Manifest(tuple(clips), Path("corpus.csv")), range(8), 0.25, seed=0).clips
        >>> sorted(clip.label for clip in clips)
        ['', '', '', '', '', '', 'joy', 'joy']
    """
    by_label: dict[str, list[int]] = {}
    for row in rows:
        by_label.setdefault(manifest.clips[row].label, []).append(row)
    withheld: set[int] = set()
    for members in by_label.values():
        withheld.update(_interleaved(manifest.clips, members, seed)[max(1, round(share * len(members))) :])
    clips = (replace(clip, label="") if row in withheld else clip for row, clip in enumerate(manifest.clips))
    return replace(manifest, clips=tuple(clips))


def _interleaved(clips: Sequence[Clip], rows: Sequence[int], seed: int) -> list[int]:
    """Order clips at random so that every stretch has the speakers in the proportion of the whole, within one."""
    by_speaker: dict[str, list[int]] = {}
    for row in sorted(rows, key=lambda row: _chance(seed, clips[row].key)):
        by_speaker.setdefault(clips[row].speaker, []).append(row)
    places = {
        row: (rank + _chance(seed, clips[row].label, speaker)) / len(members)
        for speaker, members in by_speaker.items()
        for rank, row in enumerate(members)
    }
    return sorted(places, key=lambda row: (places[row], clips[row].key))


def _chance(seed: int, *names: str) -> float:
    """Return a number from 0 to 1 that is the same on every platform and for ever; a generator's stream may change."""
    digest = hashlib.sha256("\n".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
