"""Several corpora as one: the clips of many speakers, languages and rooms under labels that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edge_runtime.errors import UsageError
from sertool.corpora.manifest import Clip, Manifest


def joined(manifests: Sequence[Manifest]) -> list[Clip]:
    """Return the clips of all manifests, one manifest after the other.

    A manifest is named by its file without the suffix. Speakers and sentences take that name in front, because two
    corpora may both have a speaker 03; files become absolute.

    Raises:
        UsageError: two manifests of one name, or a file that two of them list.

    Example:
        >>> from pathlib import Path
        >>> clips = [Clip("a.wav", Path("one/a.wav"), "03", "fear"), Clip("b.wav", Path("two/b.wav"), "03", "fear")]
        >>> manifests = [Manifest((clip,), Path(f"{name}.csv")) for clip, name in zip(clips, ("emodb", "ravdess"))]
        >>> [clip.speaker for clip in joined(manifests)]
        ['emodb/03', 'ravdess/03']
    """
    clips: dict[str, Clip] = {}
    named: dict[str, Manifest] = {}
    for manifest in manifests:
        name = manifest.path.stem
        if name in named:
            raise UsageError(
                f"{manifest.path}: {named[name].path} is called {name} too, and speakers are told apart by that name; "
                "rename one of the files"
            )
        named[name] = manifest
        for clip in manifest.clips:
            placed = _placed(clip, name)
            if placed.key in clips:
                raise UsageError(
                    f"{manifest.path}: {placed.key} is a clip of {clips[placed.key].speaker} already; join it once"
                )
            clips[placed.key] = placed
    return list(clips.values())


def _placed(clip: Clip, corpus: str) -> Clip:
    path = clip.path.resolve()
    sentence = f"{corpus}/{clip.sentence}" if clip.sentence else ""
    return replace(clip, file=str(path), path=path, speaker=f"{corpus}/{clip.speaker}", sentence=sentence)


def corpus_of(clip: Clip) -> str:
    """Return which corpus a clip of a joined manifest is of; empty where it is not joined.

    Example:
        >>> from pathlib import Path
        >>> [corpus_of(Clip("a.wav", Path("a.wav"), speaker, "fear")) for speaker in ("emodb/03", "03")]
        ['emodb', '']
    """
    return clip.speaker.rpartition("/")[0]


def partial_labels(clips: Sequence[Clip]) -> dict[str, list[str]]:
    """Return the labels that some of the joined corpora lack, each with the names of the corpora that have it.

    Example:
        >>> from pathlib import Path
        >>> speakers = [("ravdess/03", "calm"), ("ravdess/03", "fear"), ("emodb/03", "fear")]
        >>> partial_labels([Clip("a.wav", Path("a.wav"), speaker, label) for speaker, label in speakers])
        {'calm': ['ravdess']}
    """
    corpora: dict[str, set[str]] = {}
    for clip in clips:
        corpora.setdefault(clip.label, set()).add(corpus_of(clip))
    every = set().union(*corpora.values())
    return {label: sorted(names) for label, names in sorted(corpora.items()) if names != every}
