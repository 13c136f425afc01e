"""What a published corpus is, and how its audio files are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import UsageError
from sertool.corpora.manifest import Clip

# What libsndfile decodes, by the suffixes in use.
AUDIO_SUFFIXES = frozenset(
    {".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav"}
)


Note = Callable[[str], None]
"""Told in one line what was passed over."""


@dataclass(frozen=True)
class Corpus:
    """A published corpus.

    Attributes:
        name: how the command line calls it.
        title: how its authors call it.
        language: ISO 639-1 code.
        speakers: how many speak in the complete corpus; None where it still grows or nobody has counted.
        clips: how many clips the complete corpus has, those with a label in ``left_out`` not counted; None likewise.
        labels: the emotions, sorted.
        licence: what its authors allow, in a few words.
        home: where to get it.
        layout: an example of a path inside it, for messages.
        read: lists the clips below a folder, in any order; empty where nothing of the corpus is there.
        left_out: labels that publications on this corpus do not use.
    """

    name: str
    title: str
    language: str
    speakers: int | None
    clips: int | None
    labels: tuple[str, ...]
    licence: str
    home: str
    layout: str
    read: Callable[[Corpus, Path, Note], list[Clip]]
    left_out: tuple[str, ...] = ()


def audio_files(root: Path) -> Iterator[Path]:
    """Walk a folder's audio files, absolute and sorted; hidden files are no audio.

    Raises:
        UsageError: there is no such folder, or a path in it is not UTF-8 and no manifest could name it.
    """
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    # The folder is resolved, its files are not: a link's own name tells the label, its target's may not.
    for path in sorted(root.resolve().rglob("*")):
        if path.suffix.lower() not in AUDIO_SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
            raise UsageError(f"{root}: the path {str(path)!r} is not UTF-8; rename it")
        yield path
