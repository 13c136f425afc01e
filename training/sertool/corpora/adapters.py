"""Published corpora by name, and manifests from their folders.

Labels are the same English words in every corpus.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from edge_runtime.errors import UsageError, nearest
from sertool.corpora.corpus import Corpus, Note
from sertool.corpora.file_names import NAMED_CORPORA
from sertool.corpora.label_tables import TABLED_CORPORA
from sertool.corpora.manifest import Clip

CORPORA: dict[str, Corpus] = {corpus.name: corpus for corpus in (*NAMED_CORPORA, *TABLED_CORPORA)}


def corpus_named(name: str) -> Corpus:
    """Return the description of a published corpus.

    Raises:
        UsageError: no adapter has this name.

    Example:
        >>> corpus_named("emodb").speakers
        10
    """
    if name not in CORPORA:
        raise UsageError(f"corpus {name!r} is not known; {nearest(name, CORPORA)}")
    return CORPORA[name]


def corpus_clips(corpus: Corpus, root: str | Path, note: Note = lambda _: None) -> list[Clip]:
    """List the clips of a corpus below a folder, labels that publications leave out included.

    Args:
        corpus: which corpus.
        root: a folder that holds it at any depth.
        note: told in one line what was passed over, such as labels whose audio is not there.

    Returns:
        The clips in the order of their paths; files that are no clips are passed over.

    Raises:
        UsageError: the folder is missing or holds no clip of this corpus, or a clip twice, or a table is damaged.
    """
    clips = corpus.read(corpus, Path(root), note)
    if not clips:
        raise UsageError(f"{root}: no {corpus.title} file here; expected names like {corpus.layout}")
    return sorted(clips, key=lambda clip: (clip.path, clip.start or 0.0))


def relabelled(clips: list[Clip], rename: Mapping[str, str], drop: Collection[str]) -> list[Clip]:
    """Rename labels, then leave out the clips of others.

    Raises:
        UsageError: a label to rename or to drop that no clip has, or no clip is left.

    Example:
        >>> clips = [Clip("a.wav", Path("a.wav"), "01", "calm"), Clip("b.wav", Path("b.wav"), "01", "fear")]
        >>> [clip.label for clip in relabelled(clips, {"calm": "neutral"}, ["fear"])]
        ['neutral']
    """
    for label in rename:
        _refuse_unknown(label, clips)
    renamed = [replace(clip, label=rename.get(clip.label, clip.label)) for clip in clips]
    for label in drop:
        _refuse_unknown(label, renamed)
    kept = [clip for clip in renamed if clip.label not in drop]
    if not kept:
        raise UsageError("every label is dropped, no clip is left")
    return kept


def _refuse_unknown(label: str, clips: list[Clip]) -> None:
    labels = {clip.label for clip in clips}
    if label not in labels:
        raise UsageError(f"no clip has the label {label!r}; {nearest(label, labels)}")
