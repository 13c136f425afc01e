"""The folder of teacher embeddings: computed once a clip, found again by the clip's content.

An embeddings folder holds

- ``teacher.json``: who made the vectors (the description and identity of a :class:`sertool.teacher.encoder.Teacher`)
  and the name of the manifest;
- ``vectors-*.safetensors``: float32 ``vectors`` (n, dimension) and the ``contents`` (n, 32) they belong to, written
  whole and never changed: a killed run loses at most the clips of one unwritten file;
- ``heard.json``: SHA-256 of each audio file that the teacher was trained on, where it was trained here;
- ``index.csv``: clip key and content of every clip of the manifest, written once all of them are there.

Vectors belong to a clip's content, the SHA-256 of its file's bytes with its start and end: a corpus that is moved or
renamed keeps its vectors, and audio that is replaced under the same name loses them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from edge_runtime.errors import AudioError, SerError, UsageError
from edge_runtime.frontend import FloatArray
from sertool.audio import content_hash
from sertool.corpora.manifest import Clip, Manifest
from sertool.corpora.splits import PARTS, Fold
from sertool.files import atomic_path, write_json, write_text

if TYPE_CHECKING:
    from sertool.teacher.encoder import Teacher

VECTOR_FILES = "vectors-*.safetensors"
CLIPS_PER_FILE = 64
FAILURES_NAMED = 3

Progress = Callable[[Sequence[Clip]], Iterable[Clip]]
"""Passes on the clips to embed, one as each is asked for: the place for a progress bar."""


@dataclass(frozen=True)
class Embeddings:
    """One vector a clip.

    Attributes:
        keys: name of each clip in the manifest they were made from, in its order.
        contents: SHA-256 of each clip's file and stretch, by which :meth:`of` finds it.
        rows: float32 (dimension,) of each clip, mapped from disk: a corpus may have more of them than memory holds.
        teacher: the teacher's description, with its identity and the manifest's name.
        folder: where they are stored.
        heard_audio: SHA-256 of the audio files that the teacher was trained on; None where they are unknown, as those
            of a public encoder are.
    """

    keys: tuple[str, ...]
    contents: tuple[str, ...]
    rows: tuple[FloatArray, ...]
    teacher: dict[str, Any]
    folder: Path
    heard_audio: frozenset[str] | None = None

    @property
    def vectors(self) -> FloatArray:
        """All vectors in memory, float32 (clips, dimension)."""
        return np.stack(self.rows)

    def of(self, manifest: Manifest) -> FloatArray:
        """Return the vectors of a manifest's clips in memory, float32 (clips, dimension); see :meth:`rows_of`."""
        return np.stack(self.rows_of(manifest))

    def rows_of(self, manifest: Manifest) -> list[FloatArray]:
        """Return the vectors of a manifest's clips, found by what the clips hold.

        Returns:
            float32 (dimension,) of each clip, mapped from disk, in the order of ``manifest.clips``.

        Raises:
            UsageError: a clip that was not embedded, or whose audio is another by now.
            AudioError: the file of a clip is missing.
        """
        rows = {content: row for row, content in enumerate(self.contents)}
        found = []
        for clip in manifest.clips:
            row = rows.get(_clip_content(clip))
            if row is None:
                reason = "its audio has changed" if clip.key in self.keys else f"only of {len(rows)} other clips"
                raise UsageError(
                    f"{self.folder}: no embedding of {clip.key!r}, {reason}; "
                    f"run sertool embed on {manifest.path} with --output {self.folder}"
                )
            found.append(self.rows[row])
        return found

    def heard_speakers(self, manifest: Manifest) -> set[str]:
        """Return the speakers of a manifest whom the teacher is known to have been trained on.

        Audio files are compared, because two corpora may both have a speaker 03; a file that was converted is another
        one.

        Raises:
            AudioError: the file of a clip is missing.
        """
        if self.heard_audio is None:
            return set()
        return {clip.speaker for clip in manifest.clips if content_hash(clip.path) in self.heard_audio}

    def seen_speakers(self, manifest: Manifest, fold: Fold) -> dict[str, list[str]]:
        """Return, by part of a fold, the speakers whom the teacher is known to have been trained on."""
        heard = self.heard_speakers(manifest)
        return {part: [speaker for speaker in fold.part(part) if speaker in heard] for part in PARTS}

    def refuse_seen(self, seen: dict[str, list[str]], learned: Sequence[str], fold: int) -> None:
        """Refuse a teacher that hands on what it learnt from the speakers of a split.

        Of those whom the student is tested on it would hand on the answers; of those whom it learns from the teacher
        knows the labels by heart, so that they look better than its judgement of other voices is.

        Args:
            seen: what :meth:`seen_speakers` returns.
            learned: parts that the student learns from.
            fold: number of the fold, for the message.

        Raises:
            UsageError: there is such a speaker.
        """
        for part in sorted(seen, key=lambda part: part in learned):
            if speakers := seen[part]:
                more = f" and {len(speakers) - 1} more" if len(speakers) > 1 else ""
                raise UsageError(
                    f"{self.folder}: {self.teacher['name']} was trained on {part} speaker {speakers[0]!r}"
                    f"{more} of fold {fold}; results would be too good: take a teacher of other speakers, or allow "
                    "it with --allow-seen"
                )


def _clip_content(clip: Clip) -> str:
    """Return the SHA-256 of a clip's file and its stretch, whatever the file is called."""
    return hashlib.sha256(f"{content_hash(clip.path)} {clip.start or 0.0} {clip.end}".encode()).hexdigest()


def embed_manifest(manifest: Manifest, teacher: Teacher, folder: str | Path, progress: Progress = iter) -> Embeddings:
    """Compute the vectors that a folder lacks for a manifest, and return those of all its clips.

    Several processes (see :mod:`sertool.processes`) share the clips out among them.

    Args:
        manifest: the clips.
        teacher: see :func:`sertool.teacher.encoder.load_teacher`.
        folder: where the vectors are kept; made when absent, continued when the same teacher made it.
        progress: is given the clips that must be computed and yields them.

    Raises:
        UsageError: the folder was made by another teacher or at another layer.
        SerError: clips that cannot be read or embedded, after all others were embedded and stored; or a damaged
            folder.
        OSError: the folder cannot be written.
    """
    from sertool import processes  # with torch, which those who only read a folder do without

    folder = Path(folder)
    facts = _claim(folder, manifest, teacher)
    store = _VectorStore(folder, teacher.dimension)
    contents, missing = _hash_clips(manifest)
    # By content: copies of one file are embedded once.
    lacking = {
        contents[clip.key]: clip
        for clip in manifest.clips
        if clip.key in contents and contents[clip.key] not in store.vectors
    }
    processes.barrier()  # all know what is lacking before any of them stores some of it
    share = list(lacking.values())[processes.rank() :: processes.count()]
    try:
        failures = _embed_clips(progress(share), contents, teacher, store)
    finally:
        if processes.count() == 1:  # else others may be about to store some
            _release_empty(folder)
    if processes.count() > 1:
        processes.barrier()
        store = _VectorStore(folder, teacher.dimension)
        # What is still lacking fails again here, so that every process knows all failures.
        lost = [clip for content, clip in lacking.items() if content not in store.vectors]
        failures = _embed_clips(lost, contents, teacher, store)
    if missing or failures:
        raise SerError(_describe_failures(missing + failures, manifest))
    heard: frozenset[str] | None = getattr(teacher, "heard_audio", None)
    if processes.rank() == 0:
        if heard is not None:
            write_json(folder / "heard.json", sorted(heard))
        _write_index(folder, contents)
    processes.barrier()  # the folder is whole for all
    return _embeddings(contents, store, facts, folder, heard)


def _embed_clips(clips: Iterable[Clip], contents: dict[str, str], teacher: Teacher, store: _VectorStore) -> list[str]:
    """Store the vectors of clips, and return what is wrong with those that have none."""
    failures = []
    try:
        for clip in clips:
            try:
                store.add(contents[clip.key], _embed_clip(clip, teacher))
            except AudioError as error:
                failures.append(str(error))
    finally:
        store.save()
    return failures


def load_embeddings(folder: str | Path) -> Embeddings:
    """Read a finished embeddings folder.

    Raises:
        UsageError: not an embeddings folder, or an unfinished one.
        SerError: a damaged one.
    """
    folder = Path(folder)
    facts = _read_facts(folder)
    if facts is None:
        raise UsageError(f"{folder}: no embeddings folder (it has no teacher.json); make one with: sertool embed")
    if not (folder / "index.csv").is_file():
        raise UsageError(f"{folder}: not all clips are embedded yet; run the same sertool embed command again")
    store = _VectorStore(folder, facts["dimension"])
    contents = _read_index(folder)
    lost = [key for key, content in contents.items() if content not in store.vectors]
    if lost:
        raise SerError(f"{folder}: the vectors of {lost[0]!r} are gone; run: sertool embed")
    return _embeddings(contents, store, facts, folder, _read_heard(folder))


def _embeddings(
    contents: dict[str, str], store: _VectorStore, facts: dict[str, Any], folder: Path, heard: frozenset[str] | None
) -> Embeddings:
    rows = tuple(store.vectors[content] for content in contents.values())
    return Embeddings(tuple(contents), tuple(contents.values()), rows, facts, folder, heard)


class _VectorStore:
    """The vector files of a folder.

    Attributes:
        vectors: float32 (dimension,) by clip content, mapped from disk once they are stored.
    """

    def __init__(self, folder: Path, dimension: int) -> None:
        self._folder = folder
        self._dimension = dimension
        self._unsaved: list[str] = []
        self.vectors: dict[str, FloatArray] = {}
        for path in sorted(folder.glob(VECTOR_FILES)):
            self.vectors |= _map_vectors(path, dimension)

    def add(self, content: str, vector: FloatArray) -> None:
        self.vectors[content] = vector
        self._unsaved.append(content)
        if len(self._unsaved) == CLIPS_PER_FILE:
            self.save()

    def save(self) -> None:
        """Write what is not stored yet into a file of its own, named by what it holds."""
        if not self._unsaved:
            return
        contents = b"".join(map(bytes.fromhex, self._unsaved))
        tensors = {
            "contents": np.frombuffer(contents, np.uint8).reshape(-1, hashlib.sha256().digest_size),
            "vectors": np.stack([self.vectors[content] for content in self._unsaved]),
        }
        path = self._folder / f"vectors-{hashlib.sha256(contents).hexdigest()[:16]}.safetensors"
        with atomic_path(path) as temporary:
            temporary.write_bytes(safetensors.numpy.save(tensors))
        self.vectors |= _map_vectors(path, self._dimension)
        self._unsaved.clear()


def _map_vectors(path: Path, dimension: int) -> dict[str, FloatArray]:
    """Return the vectors of a file by clip content, mapped from disk."""
    try:
        with safe_open(path, framework="numpy") as file:
            contents = file.get_tensor("contents")
            stored = file.get_slice("vectors")
            whole = stored.get_dtype() == "F32" and stored.get_shape() == [len(contents), dimension]
    except (SafetensorError, TypeError) as error:
        raise SerError(f"{path}: damaged; delete this file and run sertool embed again") from error
    if whole:
        # The library checked the file's header, but has no call that maps an array for numpy.
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            first = json.loads(raw.read(length))["vectors"]["data_offsets"][0]
        vectors = np.asarray(np.memmap(path, np.float32, "r", 8 + length + first, (len(contents), dimension)))
        whole = bool(np.isfinite(vectors).all())
    if not whole:
        raise SerError(f"{path}: not {dimension} numbers a clip; delete this file and run sertool embed again")
    return {content.tobytes().hex(): vector for content, vector in zip(contents, vectors, strict=True)}


def _claim(folder: Path, manifest: Manifest, teacher: Teacher) -> dict[str, Any]:
    """Make sure that a folder belongs to this teacher, and return what ``teacher.json`` says from now on."""
    found = _read_facts(folder)
    if found is None and any(folder.glob(VECTOR_FILES)):
        raise SerError(f"{folder}: holds vectors of an unknown teacher (no teacher.json); delete the folder")
    if found is not None and found["identity"] != teacher.identity:
        found_name = found["name"] if found["name"] != teacher.name else f"another {teacher.name}"
        raise UsageError(f"{folder}: made by {found_name}, not by {teacher.name}; choose another folder with --output")
    facts = {
        **teacher.description,
        "identity": teacher.identity,
        "dimension": teacher.dimension,
        "name": teacher.name,
        "manifest": manifest.path.name,
    }
    write_json(folder / "teacher.json", facts)
    return facts


def _release_empty(folder: Path) -> None:
    """Take ``teacher.json`` away again where not one vector was stored."""
    if not any(folder.glob(VECTOR_FILES)):
        (folder / "teacher.json").unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def _read_heard(folder: Path) -> frozenset[str] | None:
    path = folder / "heard.json"
    if not path.is_file():
        return None
    try:
        return frozenset(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise SerError(f"{path}: damaged; run sertool embed again") from error


def _read_facts(folder: Path) -> dict[str, Any] | None:
    """Return ``teacher.json``, or None where there is none."""
    path = folder / "teacher.json"
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if {"name", "identity", "dimension"} <= facts.keys():
            return dict(facts)
    except (ValueError, AttributeError):
        pass
    raise SerError(f"{path}: damaged; delete the folder and run sertool embed again")


def _hash_clips(manifest: Manifest) -> tuple[dict[str, str], list[str]]:
    """Return the content of every clip that has a file, by key, and what is wrong with the others."""
    contents: dict[str, str] = {}
    failures: list[str] = []
    for clip in manifest.clips:
        try:
            contents[clip.key] = _clip_content(clip)
        except AudioError as error:
            failures.append(str(error))
        except OSError as error:
            failures.append(f"{clip.path}: {error.strerror}")
    return contents, failures


def _embed_clip(clip: Clip, teacher: Teacher) -> FloatArray:
    samples = clip.read()
    try:
        vector = teacher.embed(samples)
    except AudioError as error:
        raise AudioError(f"{clip.path}: {error}") from error
    if not np.isfinite(vector).all():
        raise AudioError(f"{clip.path}: {teacher.name} gives no finite numbers for it")
    return vector


def _describe_failures(failures: list[str], manifest: Manifest) -> str:
    named = "; ".join(failures[:FAILURES_NAMED])
    more = f"; and {len(failures) - FAILURES_NAMED} more" if len(failures) > FAILURES_NAMED else ""
    return (
        f"{len(failures)} of {len(manifest)} clips could not be embedded: {named}{more}; the others are stored: "
        f"repair these or take them out of {manifest.path}, then run the same command again"
    )


def _write_index(folder: Path, contents: dict[str, str]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("clip", "content"), *contents.items()])
    write_text(folder / "index.csv", text.getvalue())


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / "index.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            clips = dict(list(csv.reader(file))[1:])
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise SerError(f"{path}: damaged; run sertool embed again") from error
    if not clips:
        raise SerError(f"{path}: damaged; run sertool embed again")
    return clips
