"""The neighbour graph: which training clips the teacher finds alike (equation 1 of the paper).

As in TensorFlow Neural Structured Learning, two clips are joined in both directions when the cosine of their
embeddings reaches the threshold, and each clip then keeps at most ``max_neighbours`` of its edges, the most similar
first. Clips are ordered by their keys before anything is computed, so the order of the corpus changes nothing.

Up to :data:`EXACT_CLIPS` clips each is compared with all others. Beyond that faiss parts the embeddings into cells
(IVF) and compares a clip with those of the nearest cells only, of as many as a sample's neighbours ask for; first by
short codes (PQ), then the best of them exactly.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Sequence
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
from sertool.files import atomic_path, write_json
from sertool.teacher.embed import Embeddings

SIMILARITY_DECIMALS = 5
"""Cosines are compared after rounding: float32 sums differ in their last digits with the order of the work."""

PARTS_TO_JOIN = ("train", "validation")

CLIPS_PER_SEARCH = 1024
"""Bounds the memory where many clips are tied and all of them are candidates."""

EXACT_CLIPS = 50_000
"""Among so many clips the nearest are found by comparing all: a minute on two cores at 512 dimensions."""

RECALL = 0.95
"""Share of a sample's true neighbours that a search in cells has to find; further cells are searched until it does."""

RECALL_CLIPS = 500
"""Clips of that sample."""

CELL_SAMPLE = 40
"""Clips a cell is learnt from; faiss takes 256, which finds the same neighbours in six times as long."""

CLIPS_PER_CHECK = 65_536
"""Bounds the memory in which edges are looked up from their other end."""


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
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["clip", "neighbour", "similarity"])
            for key, neighbours, similarities in zip(self.keys, self.neighbours, self.similarities, strict=True):
                found = [
                    (key, self.keys[neighbour], f"{similarity:.{SIMILARITY_DECIMALS}f}")
                    for neighbour, similarity in zip(neighbours.tolist(), similarities.tolist(), strict=True)
                    if neighbour >= 0
                ]
                writer.writerows(found or [(key, "", "")])


def load_graph(path: str | Path) -> NeighbourGraph:
    """Read what :meth:`NeighbourGraph.save` wrote.

    Raises:
        UsageError: a missing file, or one that is no such table.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such graph; make it with: sertool graph")
    clips: dict[str, None] = {}
    position: dict[str, int] = {}
    ends, cosines = array("q"), array("f")  # numbers, not objects: a large graph has tens of millions
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, strict=True):
                clips[row["clip"]] = None
                if row["neighbour"] != "":  # None is no isolated clip but a row cut short, and an error below
                    cosines.append(float(row["similarity"]))
                    ends.extend(position.setdefault(row[end], len(position)) for end in ("clip", "neighbour"))
        if unknown := position.keys() - clips.keys():
            raise KeyError(min(unknown))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UsageError(f"{path}: damaged, make it again with: sertool graph ({error})") from error
    keys = tuple(sorted(clips))
    sorted_row = {key: row for row, key in enumerate(keys)}
    rows = np.array([sorted_row[key] for key in position], np.int64)
    source, target = rows[np.array(ends, np.int64).reshape(-1, 2)].T
    return _packed(keys, source, target, np.array(cosines, np.float32))


def _packed(
    keys: tuple[str, ...], source: NDArray[np.int64], target: NDArray[np.int64], cosines: NDArray[np.float32]
) -> NeighbourGraph:
    """Return the graph of edges (E,) in any order."""
    order = np.lexsort((-target, -cosines, source))
    source, target, cosines = source[order], target[order], cosines[order]
    degrees = np.bincount(source, minlength=len(keys))
    place = np.arange(len(source)) - np.repeat(np.cumsum(degrees) - degrees, degrees)
    neighbours = np.full((len(keys), max(int(degrees.max(initial=0)), 1)), -1, np.int64)
    similarities = np.zeros(neighbours.shape, np.float32)
    neighbours[source, place], similarities[source, place] = target, cosines
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
    return find_nearest(keys, vectors, max_neighbours, centre).joined(threshold, mutual)


@dataclass(frozen=True)
class Nearest:
    """The nearest others of each clip, whatever their cosine.

    Attributes:
        keys: the clips, sorted.
        neighbours: int64 (N, count), rows of ``keys``, most similar first, the greater row first among equals; -1 where
            there are fewer.
        similarities: float32 (N, count) cosines, rounded; minus infinity where there is no neighbour.
        search: how they were found: ``index`` (``exact``, or cells and how many of them are searched), and ``recall``,
            the share of a sample's true neighbours that are among them.
    """

    keys: tuple[str, ...]
    neighbours: NDArray[np.int64]
    similarities: NDArray[np.float32]
    search: dict[str, Any]

    def joined(self, threshold: float, mutual: bool = False) -> NeighbourGraph:
        """Return the graph of those that are alike; see :func:`build_graph`.

        Raises:
            UsageError: a threshold outside [-1, 1].
        """
        if not -1.0 <= threshold <= 1.0:
            raise UsageError(f"threshold {threshold:g} is not a cosine; valid: -1 to 1")
        alike = self.similarities >= threshold - 0.5 * 10.0**-SIMILARITY_DECIMALS
        neighbours = np.where(alike, self.neighbours, -1)
        if mutual:
            neighbours = np.where(_chosen_back(neighbours), neighbours, -1)
        # Edges that were dropped leave gaps: close them.
        packed = np.argsort(neighbours < 0, axis=1, kind="stable")
        neighbours = np.take_along_axis(neighbours, packed, axis=1)
        similarities = np.take_along_axis(self.similarities, packed, axis=1)
        similarities[neighbours < 0] = 0.0
        return NeighbourGraph(self.keys, neighbours, similarities)


def _chosen_back(neighbours: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which edges (N, count) are among those of their other end."""
    found = np.zeros(neighbours.shape, np.bool_)
    for rows in _slices(len(neighbours), CLIPS_PER_CHECK):
        clips = np.arange(len(neighbours))[rows, None, None]
        found[rows] = (neighbours[neighbours[rows]] == clips).any(axis=2)
    return found


def find_nearest(
    keys: Sequence[str], vectors: NDArray[np.float32], count: int, centre: bool = False, exact: bool = False
) -> Nearest:
    """Find the nearest others of each clip, by the cosine of their embeddings.

    Args:
        keys: names of the clips (N,), all different.
        vectors: embeddings (N, D).
        count: how many of them.
        centre: subtract the mean embedding first.
        exact: compare all clips with all, however many they are.

    Raises:
        UsageError: fewer than two clips, or a count below one.
    """
    if len(keys) < 2:
        raise UsageError(f"a graph needs two training clips or more, got {len(keys)}")
    if count < 1:
        raise UsageError(f"max_neighbours {count} is too few; valid: 1 or more")
    order = sorted(range(len(keys)), key=lambda row: keys[row])
    # In place from here on: a million embeddings are a gigabyte.
    ordered = np.asarray(vectors, np.float32)[order]
    if centre:
        ordered -= ordered.mean(axis=0, dtype=np.float64).astype(np.float32)
    ordered /= np.maximum(np.linalg.norm(ordered, axis=1, keepdims=True), 1e-6)
    index, rows = _exact_index(ordered) if exact or len(ordered) <= EXACT_CLIPS else _cell_index(ordered)
    similarities, neighbours = _nearest(ordered, index, rows, count)
    return Nearest(tuple(keys[row] for row in order), neighbours, similarities, _describe(index, ordered, neighbours))


def _exact_index(vectors: NDArray[np.float32]) -> tuple[faiss.Index, NDArray[np.int64]]:
    """Return what compares a vector with all others, and the order to ask in."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index, np.arange(len(vectors))


def _cell_index(vectors: NDArray[np.float32]) -> tuple[faiss.Index, NDArray[np.int64]]:
    """Return what compares a vector with those of the nearest cells, and an order to ask in that keeps to a cell.

    Three cells for the square root of the vectors: more take longer to learn than they save. Within cells, codes of
    two bits a dimension (four where their number is odd; product quantisation, Jegou et al., 2011) are compared first,
    and the best of them exactly: of a million that takes a third of the time. k-means begins from the same seed each
    time.
    """
    dimension = vectors.shape[1]
    coarse = faiss.IndexFlatIP(dimension)
    codes = dimension // (2 - dimension % 2)
    cells = faiss.IndexIVFPQFastScan(
        coarse, dimension, round(3 * len(vectors) ** 0.5), codes, 4, faiss.METRIC_INNER_PRODUCT
    )
    cells.cp.max_points_per_centroid = CELL_SAMPLE
    cells.cp.spherical = True  # else cells with a long centroid take most of the vectors
    cells.train(vectors)
    cells.add(vectors)
    index = faiss.IndexRefineFlat(cells, faiss.swig_ptr(vectors))
    sample = _sample(len(vectors))
    nearest = _true_neighbours(vectors, sample)
    # What the cells leave out and what the short codes misjudge: both errors fall together.
    cells.nprobe = index.k_factor = 8
    while cells.nprobe < cells.nlist and _recall(index.search(vectors[sample], nearest.shape[1])[1], nearest) < RECALL:
        cells.nprobe += cells.nprobe // 2
        index.k_factor = cells.nprobe
    lists: Any = cells.invlists
    rows = [faiss.rev_swig_ptr(lists.get_ids(cell), lists.list_size(cell)) for cell in range(cells.nlist)]
    return index, np.concatenate(rows).astype(np.int64)


def _describe(index: faiss.Index, vectors: NDArray[np.float32], neighbours: NDArray[np.int64]) -> dict[str, Any]:
    if not isinstance(index, faiss.IndexRefineFlat):
        return {"index": "exact", "recall": 1.0}
    sample = _sample(len(vectors))
    nearest = _true_neighbours(vectors, sample, neighbours.shape[1] + 1)
    others = np.array([row[row != clip][: neighbours.shape[1]] for clip, row in zip(sample, nearest, strict=True)])
    found = _recall(neighbours[sample], others)
    cells: Any = faiss.downcast_index(index.base_index)
    return {"index": f"IVF of {cells.nlist} cells, {cells.nprobe} searched by short codes", "recall": found}


def _sample(count: int) -> NDArray[np.int64]:
    return np.linspace(0, count - 1, min(RECALL_CLIPS, count)).astype(np.int64)


def _true_neighbours(vectors: NDArray[np.float32], rows: NDArray[np.int64], count: int = 11) -> NDArray[np.int64]:
    """Return the rows (len(rows), count) nearest to some rows, themselves included; exactly, and without an index."""
    found: NDArray[np.int64] = faiss.knn(vectors[rows], vectors, count, metric=faiss.METRIC_INNER_PRODUCT)[1]
    return found


def _recall(found: NDArray[np.int64], true: NDArray[np.int64]) -> float:
    return float(np.mean([np.isin(expected, row).mean() for row, expected in zip(found, true, strict=True)]))


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _nearest(
    vectors: NDArray[np.float32], index: faiss.Index, order: NDArray[np.int64], count: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return cosines and rows of the nearest others; see :class:`Nearest`."""
    in_cells = isinstance(index, faiss.IndexRefineFlat)
    similarities = np.full((len(vectors), count), -np.inf, np.float32)
    neighbours = np.full((len(vectors), count), -1, np.int64)
    for part in _slices(len(order), CLIPS_PER_SEARCH):
        pending = order[part]
        candidates = count + 2
        while len(pending):
            candidates = min(candidates, len(vectors))
            cosines, rows = index.search(vectors[pending], candidates)
            cosines[rows < 0] = -np.inf  # the cells held no more
            np.round(cosines, SIMILARITY_DECIMALS, out=cosines)
            # A tie at the last place can be broken only when all that are tied were found; cells find what they find.
            complete = cosines[:, min(count, candidates - 1)] > cosines[:, -1]
            complete |= in_cells | (candidates == len(vectors))
            cosines[rows == pending[:, None]] = -np.inf
            best = np.lexsort((-rows, -cosines))[complete, :count]
            done, width = pending[complete], best.shape[1]
            similarities[done, :width] = np.take_along_axis(cosines[complete], best, axis=1)
            neighbours[done, :width] = np.take_along_axis(rows[complete], best, axis=1)
            pending = pending[~complete]
            candidates *= 4
    neighbours[similarities == -np.inf] = -1  # itself, or nobody, where there were fewer
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
            ``neighbours``, ``centre``, ``mutual``), ``search`` (see :class:`Nearest`), ``seen`` (speakers of the split
            whom the teacher was trained on, by part; None where nobody knows), ``graph`` (what :func:`diagnose` says),
            and ``nearest_raw`` and ``nearest_centred``: the same for each clip's nearest neighbours, whatever their
            cosine, so that raw and centred embeddings can be compared.
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
    exact: bool = False,
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
        exact: compare all clips with all, however many they are.

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
        found = {
            centred: find_nearest(keys, vectors[rows], max_neighbours, centred, exact) for centred in (False, True)
        }
        graph = found[centre].joined(threshold, mutual)
        if not len(graph.edges):
            raise SerError(
                f"fold {number}: no two clips of {len(clips)} reach the cosine {threshold:g}, the graph has no edge; "
                "lower the threshold"
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
            "search": found[centre].search,
            "graph": diagnose(graph, clips),
            "nearest_raw": diagnose(found[False].joined(-1.0), clips),
            "nearest_centred": diagnose(found[True].joined(-1.0), clips),
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
