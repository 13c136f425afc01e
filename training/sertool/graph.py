"""The neighbour graph: which training clips the teacher finds alike (equation 1 of the paper).

As in TensorFlow Neural Structured Learning, two clips are joined in both directions when the cosine of their
embeddings reaches the threshold, and each clip then keeps at most ``max_neighbours`` of its edges, the most similar
first. Clips are ordered by their keys before anything is computed, so the order of the corpus changes nothing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import SerError, UsageError, nearest
from sertool.corpora.manifest import Clip, Manifest
from sertool.corpora.splits import Fold, Split
from sertool.files import write_json, write_text
from sertool.teacher.embed import Embeddings

SIMILARITY_DECIMALS = 5
"""Cosines are compared after rounding: float32 sums differ in their last digits with the order of the work."""

PARTS_TO_JOIN = ("train", "validation")

CLIPS_PER_SEARCH = 1024
"""Bounds the memory where many clips are tied and all of them are candidates."""


@dataclass(frozen=True)
class NeighbourGraph:
    """Neighbours of each training clip.

    Attributes:
        keys: the clips, sorted.
        neighbours: int64 (N, max_neighbours), rows of ``keys``, most similar first; -1 where there is none.
        similarities: float32 (N, max_neighbours) cosines; 0 where there is none.
    """

    keys: tuple[str, ...]
    neighbours: NDArray[np.int64]
    similarities: NDArray[np.float32]

    @property
    def degrees(self) -> NDArray[np.int64]:
        """Number of neighbours of each clip (N,)."""
        return np.asarray(np.count_nonzero(self.neighbours >= 0, axis=1), np.int64)

    @property
    def edges(self) -> NDArray[np.int64]:
        """All directed edges (E, 2) as (clip, neighbour)."""
        source, place = np.nonzero(self.neighbours >= 0)
        return np.stack([source, self.neighbours[source, place]], axis=1)

    def save(self, path: str | Path) -> None:
        """Write one row an edge: clip, neighbour, cosine; a clip without neighbours has a row with empty cells."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["clip", "neighbour", "similarity"])
        for row, key in enumerate(self.keys):
            found = np.flatnonzero(self.neighbours[row] >= 0)
            for place in found:
                neighbour = self.keys[self.neighbours[row, place]]
                writer.writerow([key, neighbour, f"{self.similarities[row, place]:.{SIMILARITY_DECIMALS}f}"])
            if not len(found):
                writer.writerow([key, "", ""])
        write_text(path, text.getvalue())


def load_graph(path: str | Path) -> NeighbourGraph:
    """Read what :meth:`NeighbourGraph.save` wrote.

    Raises:
        UsageError: a missing file, or one that is no such table.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such graph; make it with: sertool graph")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file, strict=True)
            rows = [(row["clip"], row["neighbour"], row["similarity"]) for row in table]
        keys = tuple(sorted({clip for clip, _, _ in rows}))
        position = {key: index for index, key in enumerate(keys)}
        lists: list[list[tuple[int, float]]] = [[] for _ in keys]
        for clip, neighbour, similarity in rows:
            if neighbour != "":  # None is no isolated clip but a row cut short, and an error below
                lists[position[clip]].append((position[neighbour], float(similarity)))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UsageError(f"{path}: damaged, make it again with: sertool graph ({error})") from error
    degree = max((len(edges) for edges in lists), default=0)
    neighbours = np.full((len(keys), max(degree, 1)), -1, np.int64)
    similarities = np.zeros(neighbours.shape, np.float32)
    for row, edges in enumerate(lists):
        for place, (neighbour, similarity) in enumerate(sorted(edges, key=lambda edge: (-edge[1], -edge[0]))):
            neighbours[row, place], similarities[row, place] = neighbour, similarity
    return NeighbourGraph(keys, neighbours, similarities)


def build_graph(
    keys: Sequence[str],
    vectors: NDArray[np.float32],
    threshold: float = 0.99,
    max_neighbours: int = 9,
    centre: bool = False,
    mutual: bool = False,
) -> NeighbourGraph:
    """Join the clips whose embeddings are alike.

    Args:
        keys: names of the clips (N,), all different.
        vectors: embeddings (N, D) of training clips.
        threshold: smallest cosine of an edge, inclusive.
        max_neighbours: how many edges a clip keeps.
        centre: subtract the mean embedding first. Embeddings of speech models share a large common part that pushes
            every cosine towards 1.
        mutual: keep an edge only if each end is among the other's ``max_neighbours``.

    Returns:
        the graph; of equally similar neighbours those with the greater key come first, as in the reference.

    Raises:
        UsageError: fewer than two clips, a threshold outside [-1, 1], or fewer than one neighbour.

    Example:
        >>> graph = build_graph("abc", np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], np.float32), threshold=0.5)
        >>> [graph.keys[i] for i in graph.neighbours[0] if i >= 0]
        ['c', 'b']
    """
    if len(keys) < 2:
        raise UsageError(f"a graph needs two training clips or more, got {len(keys)}")
    if not -1.0 <= threshold <= 1.0:
        raise UsageError(f"threshold {threshold:g} is not a cosine; valid: -1 to 1")
    if max_neighbours < 1:
        raise UsageError(f"max_neighbours {max_neighbours} is too few; valid: 1 or more")
    order = sorted(range(len(keys)), key=lambda row: keys[row])
    ordered = np.asarray(vectors, np.float32)[order]
    if centre:
        ordered = ordered - ordered.mean(axis=0, dtype=np.float64).astype(np.float32)
    similarities, neighbours = _nearest(ordered, max_neighbours)
    neighbours = np.where(similarities >= threshold - 0.5 * 10.0**-SIMILARITY_DECIMALS, neighbours, -1)
    if mutual:
        chosen_back = (neighbours[neighbours] == np.arange(len(order))[:, None, None]).any(axis=2)
        neighbours = np.where(chosen_back, neighbours, -1)
    # Edges that were dropped leave gaps: close them.
    packed = np.argsort(neighbours < 0, axis=1, kind="stable")
    neighbours = np.take_along_axis(neighbours, packed, axis=1)
    similarities = np.take_along_axis(similarities, packed, axis=1)
    similarities[neighbours < 0] = 0.0
    return NeighbourGraph(tuple(keys[row] for row in order), neighbours, similarities)


def _nearest(vectors: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return rounded cosines and rows (N, count) of the nearest others, the greater row first among equals.

    Where there are fewer than ``count`` others the cosine is minus infinity.
    """
    normalised = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(normalised)
    similarities = np.full((len(vectors), count), -np.inf, np.float32)
    neighbours = np.full((len(vectors), count), -1, np.int64)
    for start in range(0, len(vectors), CLIPS_PER_SEARCH):
        pending = np.arange(start, min(start + CLIPS_PER_SEARCH, len(vectors)))
        candidates = count + 2
        while len(pending):
            candidates = min(candidates, len(vectors))
            cosines, rows = index.search(normalised[pending], candidates)
            np.round(cosines, SIMILARITY_DECIMALS, out=cosines)
            # A tie at the last place can be broken only when all that are tied were found.
            complete = cosines[:, min(count, candidates - 1)] > cosines[:, -1]
            complete |= candidates == len(vectors)
            cosines[rows == pending[:, None]] = -np.inf
            best = np.lexsort((-rows, -cosines))[complete, :count]
            done, width = pending[complete], best.shape[1]
            similarities[done, :width] = np.take_along_axis(cosines[complete], best, axis=1)
            neighbours[done, :width] = np.take_along_axis(rows[complete], best, axis=1)
            pending = pending[~complete]
            candidates *= 4
    return similarities, neighbours


def diagnose(graph: NeighbourGraph, clips: Sequence[Clip]) -> dict[str, Any]:
    """Measure what a graph joins, before anything is trained on it.

    Args:
        graph: the graph.
        clips: the clips it was built on, in any order.

    Returns:
        ``clips``, ``edges`` (directed), ``degrees`` (how many clips have 0, 1, ... neighbours), ``isolated`` (share
        of clips without any), ``homophily`` (share of edges whose ends carry one label), ``homophily_by_chance`` (the
        same for clips drawn at random), ``same_speaker`` and ``same_speaker_by_chance`` likewise.
    """
    by_key = {clip.key: clip for clip in clips}
    labels = np.array([by_key[key].label for key in graph.keys])
    speakers = np.array([by_key[key].speaker for key in graph.keys])
    edges = graph.edges
    source, target = edges[:, 0], edges[:, 1]

    def share(values: NDArray[np.str_]) -> float | None:
        return float(np.mean(values[source] == values[target])) if len(edges) else None

    return {
        "clips": len(graph.keys),
        "edges": len(edges),
        "degrees": np.bincount(graph.degrees, minlength=graph.neighbours.shape[1] + 1).tolist(),
        "isolated": float(np.mean(graph.degrees == 0)),
        "homophily": share(labels),
        "homophily_by_chance": _by_chance(labels),
        "same_speaker": share(speakers),
        "same_speaker_by_chance": _by_chance(speakers),
    }


def _by_chance(values: NDArray[np.str_]) -> float:
    """Return how often two different clips drawn at random share the value."""
    counts = np.unique(values, return_counts=True)[1]
    return float(np.sum(counts * (counts - 1)) / (len(values) * (len(values) - 1)))


@dataclass(frozen=True)
class FoldGraph:
    """The graph of one fold.

    Attributes:
        graph: the edges.
        report: for ``graph.json``: ``fold``, ``teacher``, ``split_hash``, the settings (``parts``, ``threshold``,
            ``neighbours``, ``centre``, ``mutual``), ``seen`` (speakers of the split whom the teacher was
            trained on, by part; None where nobody knows), ``graph`` (what :func:`diagnose` says), and ``nearest_raw``
            and ``nearest_centred``: the same for each clip's nearest neighbours, whatever their cosine, so that raw and
            centred embeddings can be compared.
    """

    graph: NeighbourGraph
    report: dict[str, Any]


def build_fold_graphs(
    manifest: Manifest,
    split: Split,
    embeddings: Embeddings,
    *,
    parts: Sequence[str] = ("train",),
    threshold: float = 0.99,
    max_neighbours: int = 9,
    centre: bool = False,
    mutual: bool = False,
    allow_seen: bool = False,
) -> list[FoldGraph]:
    """Build and diagnose the graph of every fold.

    Args:
        manifest: the corpus.
        split: its folds.
        embeddings: of all its clips.
        parts: whose clips are joined: ``train``, and ``validation`` where the student trains on it too.
        threshold: see :func:`build_graph`, as for ``max_neighbours``, ``centre`` and ``mutual``.
        max_neighbours: most edges of a clip.
        centre: subtract the mean embedding.
        mutual: keep an edge only if both ends choose it.
        allow_seen: take a teacher that was trained on speakers of this split.

    Raises:
        UsageError: a teacher that was trained on a speaker of this split, an unknown part or speaker, clips without
            embedding, or what :func:`build_graph` refuses.
        SerError: a fold without any edge.
    """
    for part in parts:
        if part not in PARTS_TO_JOIN:
            raise UsageError(f"part {part!r} cannot be in a graph; {nearest(part, PARTS_TO_JOIN)}")
    vectors = embeddings.of(manifest)
    made = []
    for number, fold in enumerate(split.folds, start=1):
        seen = embeddings.seen_speakers(manifest, fold)
        if not allow_seen:
            embeddings.refuse_seen(seen, parts, number)
        rows = manifest.indices(_speakers(fold, parts))
        clips = [manifest.clips[row] for row in rows]
        keys = [clip.key for clip in clips]
        graph = build_graph(keys, vectors[rows], threshold, max_neighbours, centre, mutual)
        if not len(graph.edges):
            raise SerError(
                f"fold {number}: no two clips of {len(clips)} reach the cosine {threshold:g}, the graph has no edge; "
                "lower the threshold"
            )
        nearest_raw, nearest_centred = (
            diagnose(build_graph(keys, vectors[rows], -1.0, max_neighbours, centred), clips)
            for centred in (False, True)
        )
        report = {
            "fold": number,
            "teacher": embeddings.teacher,
            "split_hash": split.hash,
            "parts": list(parts),
            "threshold": threshold,
            "neighbours": max_neighbours,
            "centre": centre,
            "mutual": mutual,
            "seen": None if embeddings.heard_audio is None else seen,
            "graph": diagnose(graph, clips),
            "nearest_raw": nearest_raw,
            "nearest_centred": nearest_centred,
        }
        made.append(FoldGraph(graph, report))
    return made


def _speakers(fold: Fold, parts: Sequence[str]) -> list[str]:
    return [speaker for part in parts for speaker in fold.part(part)]


def save_fold_graphs(folder: str | Path, graphs: Sequence[FoldGraph]) -> None:
    """Write ``fold-K/graph.csv`` and ``graph.json`` of each fold and ``report.json``; drop an earlier graph's folds.

    Only ``graph.csv`` and ``graph.json`` are ever deleted, and the folder of a fold that is empty without them.
    """
    folder = Path(folder)
    for made in graphs:
        place = folder / f"fold-{made.report['fold']}"
        made.graph.save(place / "graph.csv")
        write_json(place / "graph.json", made.report)
    write_json(folder / "report.json", [made.report for made in graphs])
    current = {f"fold-{made.report['fold']}" for made in graphs}
    for stale in folder.glob("fold-*"):
        if stale.name not in current and stale.name.removeprefix("fold-").isdecimal():
            for name in ("graph.csv", "graph.json"):
                (stale / name).unlink(missing_ok=True)
            with suppress(OSError):  # it holds other files
                stale.rmdir()
