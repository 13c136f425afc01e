"""What a report shows of a neighbour graph: where its clips lie, which labels it joins, the numbers of neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import SerError, UsageError
from edge_runtime.frontend import FloatArray
from sertool.charts import graph_map
from sertool.graph import NeighbourGraph, diagnose, load_graph
from sertool.run import Run
from sertool.teacher.embed import Embeddings, load_embeddings

CLIPS_DRAWN = 400
"""At most: more would make a page that a phone is slow to open, and a picture on which nothing is told apart."""


@dataclass(frozen=True)
class TrainedGraph:
    """The neighbour graph of a run.

    Attributes:
        run: trained with it.
        graph: its edges.
        labels: of its clips (N,).
        teacher: description of what embedded them.
    """

    run: Run
    graph: NeighbourGraph
    labels: NDArray[np.str_]
    teacher: dict[str, Any]

    @classmethod
    def of(cls, run: Run) -> TrainedGraph:
        """Read the graph of a run that was trained with one.

        Raises:
            UsageError: the graph or the manifest is missing or damaged, or the manifest has lost a clip of the graph.
        """
        graph = load_graph(run.path / "graph.csv")
        label_of = {clip.key: clip.label for clip in run.manifest.clips}
        if lost := [key for key in graph.keys if key not in label_of]:
            raise UsageError(f"{run.manifest.path}: clip {lost[0]!r} of the graph of {run.path} is gone; bring it back")
        return cls(run, graph, np.array([label_of[key] for key in graph.keys]), run.graph_teacher or {})


def describe_graphs(runs: Sequence[Run], embeddings: Sequence[Embeddings] = ()) -> dict[str, Any]:
    """Return what a report shows of the graphs of a run or of its folds; empty where none was trained with.

    Args:
        runs: the folds.
        embeddings: from which a graph may have been made; others are looked for beside the graph.

    Returns:
        ``teacher``; ``folds``: what :func:`sertool.graph.diagnose` says of each; ``degrees``: how many clips have 0, 1,
        ... neighbours; ``homophily``: by label, which share of its clips' edges ends in that label, and which would by
        chance; ``map``: see :func:`_map`.

    Raises:
        UsageError: a graph or manifest is missing or damaged.
    """
    graphs = [TrainedGraph.of(run) for run in runs if run.recipe.neighbours.graph]
    if not graphs:
        return {}
    return {
        "teacher": graphs[0].teacher["name"],
        "folds": [_diagnose(graph) for graph in graphs],
        "degrees": _degrees(graphs),
        "homophily": _homophily(graphs),
        "map": _map(graphs[0], embeddings),
    }


def _diagnose(trained: TrainedGraph) -> dict[str, Any]:
    clips = {clip.key: clip for clip in trained.run.manifest.clips}
    found = diagnose(trained.graph, [clips[key] for key in trained.graph.keys])
    return found | {"fold": trained.run.recipe.data.fold}


def _degrees(graphs: Sequence[TrainedGraph]) -> list[dict[str, Any]]:
    counts = Counter(np.concatenate([trained.graph.degrees for trained in graphs]).tolist())
    return [
        {
            "name": degree,
            "share": counts[degree] / counts.total(),
            "interval": None,
            "chance": None,
            "clips": counts[degree],
        }
        for degree in range(max(counts) + 1)
    ]


def _homophily(graphs: Sequence[TrainedGraph]) -> list[dict[str, Any]]:
    """Return by label the share of the edges from its clips that end in it, beside the share of all other clips."""
    ends = [np.column_stack([t.labels[t.graph.edges[:, 0]], t.labels[t.graph.edges[:, 1]]]) for t in graphs]
    start, end = np.concatenate(ends).T
    clips = np.concatenate([trained.labels for trained in graphs])
    rows = []
    for label in sorted(set(clips.tolist())):
        of_label = int(np.sum(clips == label))
        rows.append(
            {
                "name": label,
                "share": float(np.mean(end[start == label] == label)) if label in start else None,
                "interval": None,
                "chance": (of_label - len(graphs)) / (len(clips) - len(graphs)),
                "clips": of_label,
            }
        )
    return rows


# --- the map -------------------------------------------------------------------------------------------------------


def _map(trained: TrainedGraph, embeddings: Sequence[Embeddings]) -> dict[str, Any] | None:
    """Return ``svg``, ``fold``, ``drawn`` of ``clips`` and ``variance``, the share of it that the two axes hold."""
    vectors = _vectors(trained, embeddings)
    if vectors is None:
        return None
    drawn = choose_clips(trained.graph, CLIPS_DRAWN)
    places, variance = principal_components(vectors[drawn])
    position = np.full(len(trained.graph.keys), -1)
    position[drawn] = np.arange(len(drawn))
    edges = position[np.sort(trained.graph.edges, axis=1)]
    edges = np.unique(edges[(edges >= 0).all(axis=1)], axis=0)
    labels = trained.labels[drawn]
    return {
        "svg": graph_map(places, edges, labels, sorted(set(labels.tolist()))),
        "fold": trained.run.recipe.data.fold,
        "drawn": len(drawn),
        "clips": len(trained.graph.keys),
        "variance": variance,
    }


def choose_clips(graph: NeighbourGraph, count: int) -> NDArray[np.int64]:
    """Choose at most so many clips of a graph: some at random, each with its neighbours, for the edges to be seen.

    Returns:
        rows of the graph (n,), sorted; the same for the same graph.

    Example:
        >>> ring = NeighbourGraph(tuple("abcd"), np.array([[1], [2], [3], [0]]), np.ones((4, 1), np.float32))
        >>> len(choose_clips(ring, 2)), choose_clips(ring, 9).tolist()
        (2, [0, 1, 2, 3])
    """
    chosen: dict[int, None] = {}
    for row in np.random.default_rng(0).permutation(len(graph.keys)).tolist():
        if len(chosen) >= count:
            break
        chosen |= dict.fromkeys([row, *(end for end in graph.neighbours[row].tolist() if end >= 0)])
    return np.sort(np.array(list(chosen)[:count], np.int64))


def principal_components(vectors: FloatArray) -> tuple[NDArray[np.float64], float]:
    """Return where embeddings lie on their two principal components, by direction alone, as the cosine compares them.

    Args:
        vectors: (N, D), N of at least two.

    Returns:
        places (N, 2), and the share of the variance that they keep. The sign of an axis is that of its largest place.

    Example:
        >>> principal_components(np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]))[1]
        1.0
    """
    units = vectors.astype(np.float64) / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    left, sizes, _ = np.linalg.svd(units - units.mean(axis=0), full_matrices=False)
    places = left[:, :2] * sizes[:2]
    furthest = np.abs(places).argmax(axis=0)
    places *= np.where(places[furthest, [0, 1]] < 0, -1.0, 1.0)
    return places, float(np.sum(sizes[:2] ** 2) / max(np.sum(sizes**2), np.finfo(np.float64).tiny))


def fits(embeddings: Embeddings, run: Run) -> bool:
    """Say whether a run's graph was made from these embeddings: by that teacher, of those clips."""
    teacher = run.graph_teacher
    if teacher is None or embeddings.teacher["identity"] != teacher.get("identity"):
        return False
    return set(load_graph(run.path / "graph.csv").keys) <= set(embeddings.keys)


def _vectors(trained: TrainedGraph, embeddings: Sequence[Embeddings]) -> FloatArray | None:
    """Return the embeddings that a graph was made from (N, D), in the order of its clips; None where none are found."""
    for made in chain(embeddings, _beside(trained.run)):
        if fits(made, trained.run):
            row_of = {key: row for row, key in enumerate(made.keys)}
            return np.stack([made.rows[row_of[key]] for key in trained.graph.keys])
    return None


def _beside(run: Run) -> Iterator[Embeddings]:
    """Yield the embeddings of the graph's teacher that lie where they usually do: beside it, or as in a sweep."""
    graph, identity = Path(run.recipe.neighbours.graph), (run.graph_teacher or {}).get("identity")
    descriptions = [*graph.parent.glob("*/teacher.json"), *graph.parent.parent.glob("embeddings/*/teacher.json")]
    for description in sorted(descriptions):
        with suppress(SerError, OSError, UnicodeDecodeError):  # what is damaged or unfinished is not what is looked for
            if identity and identity in description.read_text(encoding="utf-8"):
                yield load_embeddings(description.parent)
