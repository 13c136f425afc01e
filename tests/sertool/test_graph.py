"""The neighbour graph against worked numbers, scikit-learn and a table of diagnostics made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from edge_runtime.errors import UsageError
from sertool.corpora.manifest import Clip
from sertool.graph import NeighbourGraph, build_graph, diagnose, load_graph

TRIANGLE = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], np.float32)  # every cosine is 0.5


def edges_by_key(graph: NeighbourGraph) -> list[tuple[str, str]]:
    return [(graph.keys[source], graph.keys[target]) for source, target in graph.edges]


def random_vectors(count: int, dimension: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


def names(count: int) -> list[str]:
    return [f"clip-{number:03d}.wav" for number in range(count)]


# Golden values of the tests of TensorFlow Neural Structured Learning's graph builder.
@pytest.mark.parametrize(("threshold", "edges"), [(0.0, 6), (0.5, 6), (0.51, 0)])
def test_three_vectors_at_sixty_degrees(threshold: float, edges: int) -> None:
    assert len(build_graph("abc", TRIANGLE, threshold).edges) == edges


def test_twenty_vectors_on_a_circle_are_joined_to_a_ring() -> None:
    angles = np.arange(20) * 2 * np.pi / 20
    vectors = 1.1 * np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    graph = build_graph(names(20), vectors, threshold=0.9)
    assert {tuple(edge) for edge in graph.edges.tolist()} == {(i, j % 20) for i in range(20) for j in (i - 1, i + 1)}
    assert graph.similarities[graph.neighbours >= 0] == pytest.approx(0.951057, abs=1e-5)


def test_the_most_similar_come_first_and_of_equals_the_greater_key() -> None:
    vectors = np.array([[1, 0], [1, 1], [1, 1], [1, 0.1], [1, 1]], np.float32)
    graph = build_graph("abcde", vectors, threshold=0.0, max_neighbours=3)
    assert [graph.keys[row] for row in graph.neighbours[0]] == ["d", "e", "c"]
    assert [graph.keys[row] for row in graph.neighbours[1]] == ["e", "c", "d"]


@pytest.mark.parametrize("copies", [3, 12, 60])
def test_the_greatest_keys_win_however_many_clips_are_equal(copies: int) -> None:
    keys = names(copies)
    graph = build_graph(keys, np.ones((copies, 4), np.float32), threshold=0.9, max_neighbours=2)
    for row, key in enumerate(keys):
        expected = [other for other in reversed(keys) if other != key][:2]
        assert [keys[neighbour] for neighbour in graph.neighbours[row]] == expected


def test_edges_go_both_ways_before_a_clip_is_cut_to_its_nearest() -> None:
    vectors = random_vectors(30)
    whole = {tuple(edge) for edge in build_graph(names(30), vectors, 0.2, max_neighbours=29).edges.tolist()}
    assert whole == {(target, source) for source, target in whole}
    cut = build_graph(names(30), vectors, 0.2, max_neighbours=2)
    assert cut.degrees.max() == 2
    assert {tuple(edge) for edge in cut.edges.tolist()} < whole


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(2, 40),
    most=st.integers(1, 12),
    threshold=st.sampled_from([-1.0, 0.0, 0.3, 0.9]),
    centre=st.booleans(),
    mutual=st.booleans(),
)
def test_the_order_of_the_corpus_changes_nothing(
    seed: int, count: int, most: int, threshold: float, centre: bool, mutual: bool
) -> None:
    rng = np.random.default_rng(seed)
    # Small whole numbers: many ties and duplicates, and zero vectors.
    vectors = rng.integers(-1, 2, size=(count, 3)).astype(np.float32)
    keys = names(count)
    shuffle = rng.permutation(count)
    graph = build_graph(keys, vectors, threshold, most, centre, mutual)
    shuffled = build_graph([keys[row] for row in shuffle], vectors[shuffle], threshold, most, centre, mutual)
    assert graph.keys == shuffled.keys == tuple(keys)
    assert np.array_equal(graph.neighbours, shuffled.neighbours)
    assert np.array_equal(graph.similarities, shuffled.similarities)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(3, 60), most=st.integers(1, 9))
def test_neighbours_are_those_of_scikit_learn(seed: int, count: int, most: int) -> None:
    vectors = random_vectors(count, seed=seed)
    graph = build_graph(names(count), vectors, threshold=-1.0, max_neighbours=most)
    search = NearestNeighbors(n_neighbors=min(most, count - 1), metric="cosine").fit(vectors)
    distances, _ = search.kneighbors()
    found = graph.neighbours[:, : distances.shape[1]]
    assert (found >= 0).all() and (graph.neighbours[:, distances.shape[1] :] == -1).all()
    exact = np.take_along_axis(cosine_similarity(vectors), found, axis=1)
    assert exact == pytest.approx(1 - distances, abs=1e-5)
    assert graph.similarities[:, : distances.shape[1]] == pytest.approx(exact, abs=1e-5)
    assert not (found == np.arange(count)[:, None]).any()
    assert all(len(set(row)) == len(row) for row in found.tolist())


def test_more_clips_than_one_search_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = random_vectors(50)
    vectors[7] = 0.0
    whole = build_graph(names(50), vectors, -1.0, 4)
    monkeypatch.setattr("sertool.graph.CLIPS_PER_SEARCH", 8)
    pieces = build_graph(names(50), vectors, -1.0, 4)
    assert np.array_equal(whole.neighbours, pieces.neighbours)


def test_a_silent_embedding_is_like_nothing() -> None:
    vectors = np.concatenate([TRIANGLE, np.zeros((2, 3), np.float32)])
    graph = build_graph("abcde", vectors, threshold=0.1)
    assert graph.degrees.tolist() == [2, 2, 2, 0, 0]


def test_centring_takes_away_what_all_share() -> None:
    vectors = random_vectors(40) + 100.0
    raw = build_graph(names(40), vectors, threshold=0.99, max_neighbours=39)
    centred = build_graph(names(40), vectors, threshold=0.99, max_neighbours=39, centre=True)
    assert raw.degrees.min() == 39
    assert centred.degrees.max() < 3
    expected = cosine_similarity(vectors - vectors.mean(axis=0, dtype=np.float64))
    nearest = build_graph(names(40), vectors, threshold=-1.0, max_neighbours=1, centre=True)
    np.fill_diagonal(expected, -1)
    assert np.array_equal(nearest.neighbours[:, 0], expected.argmax(axis=1))


def test_mutual_keeps_an_edge_that_both_ends_choose_and_closes_the_gaps() -> None:
    vectors = random_vectors(40, seed=3)
    plain = build_graph(names(40), vectors, threshold=-1.0, max_neighbours=4)
    mutual = build_graph(names(40), vectors, threshold=-1.0, max_neighbours=4, mutual=True)
    chosen = {tuple(edge) for edge in plain.edges.tolist()}
    assert {tuple(edge) for edge in mutual.edges.tolist()} == {
        (source, target) for source, target in chosen if (target, source) in chosen
    }
    for neighbours, similarities, degree in zip(mutual.neighbours, mutual.similarities, mutual.degrees, strict=True):
        assert (neighbours[:degree] >= 0).all() and (neighbours[degree:] == -1).all()
        assert (np.diff(similarities[:degree]) <= 0).all() and (similarities[degree:] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keys": "a", "vectors": TRIANGLE[:1]}, "two training clips"),
        ({"threshold": 1.5}, "threshold 1.5 is not a cosine; valid: -1 to 1"),
        ({"threshold": float("nan")}, "threshold nan"),
        ({"max_neighbours": 0}, "max_neighbours 0 is too few"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_graph(**{"keys": "abc", "vectors": TRIANGLE, **arguments})


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [-1.0, 0.4, 1.0])
def test_a_graph_survives_its_file(tmp_path: Path, threshold: float) -> None:
    keys = [f'über, "{number}"\u2028.wav' for number in range(20)]
    graph = build_graph(keys, random_vectors(20), threshold, max_neighbours=5)
    graph.save(tmp_path / "graph.csv")
    loaded = load_graph(tmp_path / "graph.csv")
    width = loaded.neighbours.shape[1]
    assert loaded.keys == graph.keys
    assert np.array_equal(loaded.neighbours, graph.neighbours[:, :width])
    assert np.array_equal(loaded.similarities, graph.similarities[:, :width])
    assert (graph.neighbours[:, width:] == -1).all()


def test_a_table_whose_rows_were_sorted_otherwise_is_the_same_graph(tmp_path: Path) -> None:
    graph = build_graph(names(20), random_vectors(20), 0.2, max_neighbours=5)
    graph.save(tmp_path / "graph.csv")
    head, *rows = (tmp_path / "graph.csv").read_text().splitlines()
    (tmp_path / "other.csv").write_text("\n".join([head, *sorted(rows, reverse=True)]))
    loaded, other = load_graph(tmp_path / "graph.csv"), load_graph(tmp_path / "other.csv")
    assert other.keys == loaded.keys
    assert np.array_equal(other.neighbours, loaded.neighbours)


@pytest.mark.parametrize(
    "content",
    [
        b"clip,neighbour\na,b\n",
        b"clip,neighbour,similarity\na,b,0.9\n",  # b has no row of its own
        b"clip,neighbour,similarity\na,b,high\nb,a,high\n",
        b"clip,neighbour,similarity\na\n",
        b"\xff\xfe\x00",
        b'clip,neighbour,similarity\n"a,b',
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "graph.csv").write_bytes(content)
    with pytest.raises(UsageError, match=r"graph\.csv: damaged, make it again with: sertool graph"):
        load_graph(tmp_path / "graph.csv")


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"graph\.csv: no such graph; make it with: sertool graph"):
        load_graph(tmp_path / "graph.csv")


# --- diagnostics ---------------------------------------------------------------------------------------------------


def test_diagnostics_worked_by_hand() -> None:
    clips = [
        Clip(key, Path(key), speaker, label)
        for key, speaker, label in [
            ("a", "ada", "joy"),
            ("b", "ada", "joy"),
            ("c", "bob", "joy"),
            ("d", "bob", "anger"),
            ("e", "bob", "anger"),
        ]
    ]
    neighbours = np.array([[1, 2], [0, -1], [0, 3], [2, -1], [-1, -1]])
    graph = NeighbourGraph(tuple("abcde"), neighbours, np.where(neighbours >= 0, 0.9, 0).astype(np.float32))
    assert diagnose(graph, list(reversed(clips))) == {
        "clips": 5,
        "edges": 6,
        "degrees": [1, 2, 2],  # e; b and d; a and c
        "isolated": pytest.approx(1 / 5),
        "homophily": pytest.approx(4 / 6),  # ab, ac, ba, ca of ab, ac, ba, ca, cd, dc
        "homophily_by_chance": pytest.approx((3 * 2 + 2 * 1) / (5 * 4)),
        "same_speaker": pytest.approx(4 / 6),  # ab, ba, cd, dc
        "same_speaker_by_chance": pytest.approx((2 * 1 + 3 * 2) / (5 * 4)),
    }
    assert edges_by_key(graph) == [("a", "b"), ("a", "c"), ("b", "a"), ("c", "a"), ("c", "d"), ("d", "c")]


def test_a_graph_without_edges_has_no_shares() -> None:
    clips = [Clip(key, Path(key), key, "joy") for key in "abc"]
    report = diagnose(build_graph("abc", TRIANGLE, threshold=0.9), clips)
    assert (report["edges"], report["isolated"], report["degrees"]) == (0, 1.0, [3] + [0] * 9)
    assert report["homophily"] is None and report["same_speaker"] is None


def test_random_embeddings_are_as_homophilous_as_chance() -> None:
    rng = np.random.default_rng(0)
    clips = [Clip(key, Path(key), f"speaker {rng.integers(8)}", f"label {rng.integers(4)}") for key in names(600)]
    report = diagnose(build_graph([clip.key for clip in clips], random_vectors(600, 32), -1.0, 6), clips)
    assert report["homophily"] == pytest.approx(report["homophily_by_chance"], abs=0.03)
    assert report["same_speaker"] == pytest.approx(report["same_speaker_by_chance"], abs=0.03)
