"""The neighbour graph against worked numbers, scikit-learn and a table of diagnostics made by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from edge_runtime.errors import SerError, UsageError
from sertool.audio import content_hash
from sertool.corpora.manifest import Clip, Manifest, load_manifest
from sertool.corpora.splits import Fold, Split, load_split
from sertool.graph import (
    NeighbourGraph,
    build_fold_graphs,
    build_graph,
    diagnose,
    find_nearest,
    load_graph,
    save_fold_graphs,
)
from sertool.teacher.embed import Embeddings, embed_manifest

TRIANGLE = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], np.float32)  # every cosine is 0.5


def edges_by_key(graph: NeighbourGraph) -> list[tuple[str, str]]:
    return [(graph.keys[source], graph.keys[target]) for source, target in graph.edges]


def random_vectors(count: int, dimension: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


def names(count: int) -> list[str]:
    return [f"clip-{number:04d}.wav" for number in range(count)]


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


def test_edges_are_looked_up_from_their_other_end_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = random_vectors(50)
    whole = build_graph(names(50), vectors, -1.0, 4, mutual=True)
    monkeypatch.setattr("sertool.graph.CLIPS_PER_CHECK", 7)
    pieces = build_graph(names(50), vectors, -1.0, 4, mutual=True)
    assert np.array_equal(whole.neighbours, pieces.neighbours) and 0 < len(whole.edges) < 200


# --- in cells ------------------------------------------------------------------------------------------------------


def grouped_vectors(count: int, dimension: int = 16, groups: int = 60) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(groups, dimension))
    spread = 0.4 * rng.normal(size=(count, dimension))
    return (3 + centres[rng.integers(0, groups, count)] + spread).astype(np.float32)


@pytest.fixture
def in_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sertool.graph.EXACT_CLIPS", 1000)


@pytest.mark.usefixtures("in_cells")
@pytest.mark.parametrize("dimension", [16, 17])
def test_a_search_in_cells_says_what_it_finds_of_the_true_neighbours(dimension: int) -> None:
    vectors = grouped_vectors(4000, dimension)
    found = find_nearest(names(4000), vectors, 10, centre=True)
    assert found.search["index"].startswith("IVF of 190 cells, ")
    centred = vectors - vectors.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    cosines = centred @ centred.T
    np.fill_diagonal(cosines, -np.inf)
    true = np.argsort(-cosines, axis=1)[:, :10]
    recalls = [
        len(set(one) & set(other)) / 10 for one, other in zip(true.tolist(), found.neighbours.tolist(), strict=True)
    ]
    assert np.mean(recalls) > 0.95
    assert found.search["recall"] == pytest.approx(np.mean(recalls), abs=0.02)
    rows = np.arange(4000)[:, None]
    assert found.similarities == pytest.approx(cosines[rows, found.neighbours], abs=2e-5)
    assert (np.diff(found.similarities, axis=1) <= 0).all()


@pytest.mark.usefixtures("in_cells")
def test_a_search_in_cells_is_the_same_for_a_permuted_corpus_and_again() -> None:
    vectors, shuffle = grouped_vectors(2000), np.random.default_rng(1).permutation(2000)
    keys = names(2000)
    one = build_graph(keys, vectors, 0.5, 5, mutual=True)
    other = build_graph([keys[row] for row in shuffle], vectors[shuffle], 0.5, 5, mutual=True)
    assert np.array_equal(one.neighbours, other.neighbours)


@pytest.mark.usefixtures("in_cells")
def test_cells_that_hold_fewer_than_are_asked_for_leave_places_empty() -> None:
    vectors = np.repeat(np.eye(64, dtype=np.float32), 20, axis=0)  # 64 places of 20 clips each, all tied
    found = find_nearest(names(len(vectors)), vectors, 40)
    assert set(found.neighbours[found.similarities == -np.inf].tolist()) <= {-1}
    same = np.isclose(found.similarities, 1.0)
    assert (same.sum(axis=1) == 19).all()
    assert all(
        set(row[:19]) == set(range(clip // 20 * 20, clip // 20 * 20 + 20)) - {clip}
        for clip, row in enumerate(found.neighbours.tolist())
    )


@pytest.mark.usefixtures("in_cells")
def test_cells_can_be_refused() -> None:
    found = find_nearest(names(1500), grouped_vectors(1500), 5, exact=True)
    assert found.search == {"index": "exact", "recall": 1.0}


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


# --- the graphs of all folds ---------------------------------------------------------------------------------------


class Loudness:
    """A teacher that hears how loud and how high a clip is."""

    name, identity, dimension = "loudness", "loudness", 2

    def __init__(self, speakers: Sequence[str] = (), heard: Sequence[Path] = ()) -> None:
        self.description: dict[str, Any] = {"name": self.name, "speakers": list(speakers)}
        self.heard_audio = frozenset(map(content_hash, heard)) if heard else None

    def embed(self, samples: np.ndarray) -> np.ndarray:
        return np.array([samples.std(), np.abs(np.diff(samples)).mean()], np.float32)


@pytest.fixture
def embedded(tones: Any, tmp_path: Path) -> Callable[..., Embeddings]:
    """Embed the tones by a teacher that was trained on these speakers or these files."""
    return lambda *heard: embed_manifest(load_manifest(tones.manifest), Loudness(*heard), tmp_path / "embeddings")


def corpus_of(tones: Any) -> tuple[Manifest, Split]:
    return load_manifest(tones.manifest), load_split(tones.split)


def test_a_teacher_that_heard_test_speakers_is_refused_and_on_demand_recorded(
    tones: Any, embedded: Callable[..., Embeddings]
) -> None:
    heard = ["ada", "bea"]
    embeddings = embedded(heard, [tones.folder / f"{speaker}-joy-0.wav" for speaker in heard])
    manifest, split = corpus_of(tones)
    # The second fold tests ada and trains on bea.
    second = Split(split.protocol, split.seed, split.folds[1:])
    with pytest.raises(UsageError, match=r"loudness was trained on test speaker 'ada' of fold 1.*--allow-seen"):
        build_fold_graphs(manifest, second, embeddings)
    reports = [made.report for made in build_fold_graphs(manifest, split, embeddings, allow_seen=True)]
    assert [report["seen"] for report in reports] == [
        {"train": ["ada", "bea"], "validation": [], "test": []},
        {"train": ["bea"], "validation": [], "test": ["ada"]},
    ]


def test_a_teacher_that_heard_the_joined_speakers_is_refused(tones: Any, embedded: Callable[..., Embeddings]) -> None:
    embeddings = embedded(["bea"], [tones.folder / "bea-joy-0.wav"])
    with pytest.raises(UsageError, match=r"loudness was trained on train speaker 'bea' of fold 1; .*--allow-seen"):
        build_fold_graphs(*corpus_of(tones), embeddings)


def test_whom_a_public_teacher_heard_is_not_known(tones: Any, embedded: Callable[..., Embeddings]) -> None:
    assert [made.report["seen"] for made in build_fold_graphs(*corpus_of(tones), embedded())] == [None, None]


def test_a_namesake_in_another_corpus_is_no_one_the_teacher_heard(
    tones: Any, embedded: Callable[..., Embeddings], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere.wav").write_bytes(b"another recording")
    embeddings = embedded(["ada", "fox"], [tmp_path / "elsewhere.wav"])
    reports = [made.report for made in build_fold_graphs(*corpus_of(tones), embeddings)]
    assert [report["seen"]["test"] for report in reports] == [[], []]


def test_validation_speakers_are_held_out_unless_they_are_joined(
    tones: Any, embedded: Callable[..., Embeddings]
) -> None:
    manifest, embeddings = load_manifest(tones.manifest), embedded(["bea"], [tones.folder / "bea-joy-0.wav"])
    split = Split("by hand", 0, (Fold(("ada", "dov"), ("bea",), ("cyd",)),))
    with pytest.raises(UsageError, match="trained on validation speaker 'bea' of fold 1"):
        build_fold_graphs(manifest, split, embeddings)
    made = build_fold_graphs(manifest, split, embeddings, parts=("train", "validation"), allow_seen=True)
    assert made[0].report["seen"] == {"train": [], "validation": ["bea"], "test": []}
    assert made[0].report["graph"]["clips"] == 36
    with pytest.raises(UsageError, match="part 'test' cannot be in a graph"):
        build_fold_graphs(manifest, split, embeddings, parts=("test",))


def test_a_graph_of_fewer_folds_leaves_none_of_the_earlier_ones(
    tones: Any, embedded: Callable[..., Embeddings], tmp_path: Path
) -> None:
    made = build_fold_graphs(*corpus_of(tones), embedded())
    save_fold_graphs(tmp_path / "graph", made)
    (tmp_path / "graph" / "fold-notes").mkdir()
    (tmp_path / "graph" / "fold-3").mkdir()
    (tmp_path / "graph" / "fold-3" / "mine.txt").touch()
    (tmp_path / "graph" / "fold-3" / "graph.csv").touch()
    save_fold_graphs(tmp_path / "graph", made[:1])
    left = sorted(str(path.relative_to(tmp_path / "graph")) for path in (tmp_path / "graph").rglob("*"))
    assert left == [
        "fold-1", "fold-1/graph.csv", "fold-1/graph.json", "fold-3", "fold-3/mine.txt", "fold-notes", "report.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "graph" / "report.json").read_text()) == [made[0].report]


def test_a_graph_without_an_edge_is_refused_and_nothing_is_written(
    tones: Any, sertool: Callable[..., Any], tmp_path: Path
) -> None:
    class Noise(Loudness):
        def embed(self, samples: np.ndarray) -> np.ndarray:
            return random_vectors(1, self.dimension, seed=int(1e6 * samples.std()))[0]

    noise = Noise()
    noise.dimension = 200
    embeddings = embed_manifest(load_manifest(tones.manifest), noise, tmp_path / "embeddings")
    no_edge = "fold 1: no two clips of 48 reach the cosine 0.99, the graph has no edge; lower the threshold"
    with pytest.raises(SerError, match=re.escape(no_edge)):
        build_fold_graphs(*corpus_of(tones), embeddings)
    options = ("--manifest", tones.manifest, "--split", tones.split, "-o", tmp_path / "graph")
    assert sertool("graph", embeddings.folder, *options) == (1, "", f"sertool: {no_edge}\n")
    assert not (tmp_path / "graph").exists()


def test_the_command_shows_a_table_of_eighty_columns_and_warns_of_isolated_clips(
    tones: Any, embedded: Callable[..., Embeddings], sertool: Callable[..., Any], tmp_path: Path
) -> None:
    folder, graph = embedded(["ada"], [tones.folder / "ada-joy-0.wav"]).folder, tmp_path / "[graph]"
    command = ["graph", folder, "--manifest", tones.manifest, "--split", tones.split, "-o", graph]
    refused = sertool(*command)
    assert (refused.code, refused.out) == (2, "") and "--allow-seen" in refused.err and not graph.exists()
    outcome = sertool(*command, "--allow-seen", "--threshold", "0.5")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"{graph}: 2 fold(s)" in outcome.out
    *shown, _ = outcome.out.splitlines()
    assert max(map(len, shown)) <= 80 and "…" not in outcome.out
    assert "nearest: the 9 nearest neighbours of each clip" in outcome.out
    sparse = sertool(*command, "--allow-seen", "--threshold", "0.999999", "--centre", "--mutual", "--neighbours", "1")
    isolated = max(report["graph"]["isolated"] for report in json.loads((graph / "report.json").read_text()))
    assert isolated > 0.5
    assert sparse.err.endswith(f"{isolated:.0%} of the clips have no neighbour; try a lower --threshold\n")
    none = sertool(*command, "--neighbours", "0")
    assert none.code == 2 and "Invalid value for '--neighbours'" in none.err
