"""graph: neighbours against a full sort, adjacency against a loop, quality against its definition."""

import faiss
import numpy as np
import pytest
from drawn_vectors import unit
from safetensors.numpy import save_file

from tcq_hf import build_index
from tcq_hf.index.segments import SegmentedIndex
from tcq_hf.rerank import graph as module
from tcq_hf.rerank import nearest
from tcq_hf.rerank.graph import KNNGraph, quality


def vectors_of(rows=60, width=5, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


# --- Neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 59])
@pytest.mark.parametrize("block", [1, 200, 2**24])
def test_neighbours_are_those_of_a_full_sort(monkeypatch, k, block):
    monkeypatch.setattr(nearest, "_SCORES_AT_ONCE", block)
    vectors = vectors_of()
    graph = KNNGraph.build(vectors, k)
    cosines = unit(vectors.astype(np.float64)) @ unit(vectors.astype(np.float64)).T
    for row in range(60):
        others = [other for other in np.argsort(-cosines[row]) if other != row][:k]
        assert graph.neighbours[row].tolist() == others
        # Sums of five products of numbers below one in float32.
        np.testing.assert_allclose(graph.scores[row], cosines[row, others], atol=1e-6)


def test_a_row_is_never_its_own_neighbour_even_among_copies():
    graph = KNNGraph.build(np.ones((6, 3)), 5)
    assert [sorted(row) for row in graph.neighbours.tolist()] == [[o for o in range(6) if o != r] for r in range(6)]


def test_each_row_draws_the_order_of_its_ties():
    graphs = [KNNGraph.build(np.ones((500, 8)), 19, seed) for seed in (0, 0, 1)]
    same, other = ([(graphs[0].neighbours == graph.neighbours).all() for graph in graphs[1:]], graphs[2])
    assert same == [True, False]
    assert (np.bincount(other.neighbours.ravel(), minlength=500) < 60).all()  # 19 on average
    np.testing.assert_allclose(other.scores, 1, atol=1e-6)


def test_the_length_of_vectors_plays_no_part():
    vectors = vectors_of()
    longer = vectors * np.random.default_rng(1).uniform(0.1, 10, (60, 1)).astype(np.float32)
    np.testing.assert_array_equal(KNNGraph.build(vectors, 5).neighbours, KNNGraph.build(longer, 5).neighbours)


@pytest.mark.parametrize("mutual", [False, True])
def test_adjacency_holds_who_names_whom(mutual):
    graph = KNNGraph.build(vectors_of(), 6)
    dense = graph.adjacency(mutual).toarray()
    for i in range(60):
        for j in range(60):
            named = [j in graph.neighbours[i], i in graph.neighbours[j]]
            weights = [
                max(graph.scores[a][list(graph.neighbours[a]).index(b)], 0)
                for a, b, yes in ((i, j, named[0]), (j, i, named[1]))
                if yes
            ]
            edge = all(named) if mutual else any(named)
            assert dense[i, j] == (pytest.approx(max(weights), abs=1e-6) if edge else 0)
    assert (dense == dense.T).all()


def test_edges_without_similarity_are_edges():
    graph = KNNGraph.build(np.eye(4, dtype=np.float32), 3)
    assert graph.adjacency().nnz == 12


@pytest.mark.parametrize(
    ("vectors", "k", "message"),
    [
        (np.zeros(5), 1, r"vectors must be float \[n, D\], codes restored first, got float64 \[5\]"),
        (np.zeros((5, 0)), 1, r"got float64 \[5, 0\]"),
        (np.ones((5, 2), np.uint8), 1, "codes restored first, got uint8"),
        (np.ones((5, 2)), 5, "k must be from 1 to 4, the other rows, got 5"),
        (np.ones((5, 2)), 0, "k must be from 1 to 4, the other rows, got 0"),
        (np.full((5, 2), 1e30), 1, "shorter than 1e19, row 0 is not"),
        (np.array([[1.0, 2], [np.nan, 1], [0, 1]]), 1, "row 1 is not"),
        (np.array([[1.0, 2], [1, 1], [0, np.inf]]), 1, "row 2 is not"),
    ],
)
def test_impossible_vectors_are_refused(vectors, k, message):
    with pytest.raises(ValueError, match=message):
        KNNGraph.build(vectors, k)


# --- From an index, appended, on disk --------------------------------------------------------------------------------


def codes_of(rows=60, books=4, words=8, seed=0):
    return np.random.default_rng(seed).integers(words, size=(rows, books)).astype(np.uint8)


def codebooks_of(books=4, words=8, width=3):
    return unit(vectors_of(books * words, width)).reshape(books, words, width)


def distinct_codes(rows):
    return np.unique(codes_of(2 * rows), axis=0)[np.random.default_rng(1).permutation(rows)]


@pytest.mark.parametrize("mode", ["exact", "fast", "ivf"])
@pytest.mark.parametrize("exact_rows", [0, 100_000])
def test_the_graph_of_an_index_is_that_of_its_restored_vectors(monkeypatch, mode, exact_rows):
    monkeypatch.setattr(module, "EXACT_ROWS", exact_rows)
    monkeypatch.setattr(module, "_ASKED_AT_ONCE", 7)
    codebooks, codes = codebooks_of(), distinct_codes(60)
    index = build_index(codebooks, codes, mode)
    if mode == "ivf":
        index.nprobe = index.nlist
    restored = codebooks[np.arange(4), codes].reshape(60, -1)
    graph, expected = KNNGraph.from_index(index, 5), KNNGraph.build(restored, 5)
    np.testing.assert_allclose(graph.vectors, restored / 2, atol=1e-6)
    np.testing.assert_allclose(graph.scores, expected.scores, atol=2e-6)
    cosines = (restored @ restored.T / 4)[np.arange(60)[:, None], graph.neighbours]
    np.testing.assert_allclose(graph.scores, cosines, atol=2e-6)


def test_rows_of_one_code_never_name_themselves_in_an_index(monkeypatch):
    monkeypatch.setattr(module, "EXACT_ROWS", 0)
    index = build_index(codebooks_of(), np.zeros((50, 4), np.uint8))
    graph = KNNGraph.from_index(index, 3)
    assert not (graph.neighbours == np.arange(50)[:, None]).any()
    np.testing.assert_allclose(graph.scores, 1, atol=1e-6)


def test_an_index_without_codes_or_rows_is_refused(tmp_path):
    with pytest.raises(TypeError, match="index must come from build_index or load_index, got IndexFlatIP"):
        KNNGraph.from_index(faiss.IndexFlatIP(4), 3)
    with pytest.raises(ValueError, match="k must be from 1 to 9, the other rows, got 10"):
        KNNGraph.from_index(build_index(codebooks_of(), codes_of(10)), 10)
    for call in (
        lambda: KNNGraph.from_index(build_index(codebooks_of(), codes_of(1)), 0),
        lambda: KNNGraph.build(np.ones((1, 3)), 1),
    ):
        with pytest.raises(ValueError, match="a graph needs at least two rows, got 1"):
            call()
    SegmentedIndex.create(tmp_path, codebooks_of()).append(codes_of(10))
    living = SegmentedIndex.open(tmp_path)
    with pytest.raises(TypeError, match=r"got SegmentedIndex; of one in a folder give its in_memory\(\)"):
        KNNGraph.from_index(living, 3)
    assert len(KNNGraph.from_index(living.in_memory()[0], 3)) == 10


@pytest.mark.parametrize("added", [1, 4, 30])
def test_an_appended_graph_is_that_of_all_rows(added):
    vectors = vectors_of()
    grown = KNNGraph.build(vectors[: 60 - added], 7).append(vectors[60 - added :])
    expected = KNNGraph.build(vectors, 7)
    np.testing.assert_array_equal(grown.neighbours, expected.neighbours)
    np.testing.assert_allclose(grown.scores, expected.scores, atol=1e-6)
    np.testing.assert_allclose(grown.vectors, expected.vectors, atol=1e-7)


@pytest.mark.parametrize("step", [150, 50])
def test_appended_copies_have_the_chance_of_those_that_were_there(step):
    vectors = np.tile(vectors_of(10), (30, 1))
    graph = KNNGraph.build(vectors[:150], 5)
    for start in range(150, 300, step):
        graph = graph.append(vectors[start : start + step], seed=start)
    assert (graph.neighbours % 10 == np.arange(300)[:, None] % 10).all()
    # 15 of the 29 copies of an old row are new, 14 of those of a new one. Five standard errors of 150 rows' five draws.
    close = 5 * np.sqrt(0.25 / (150 * 5))
    assert (graph.neighbours[:150] >= 150).mean() == pytest.approx(15 / 29, abs=close)
    assert (graph.neighbours[150:] >= 150).mean() == pytest.approx(14 / 29, abs=close)


def test_appended_copies_beyond_the_last_place_are_drawn_from_all():
    # Four neighbours at 0.6, as are three new rows; one new row is nearer and takes the first place.
    angle, nearer = np.array([0.6, 0.8]), np.array([0.8, 0.6])
    drawn = set()
    for seed in range(60):
        graph = KNNGraph.build(np.array([[1.0, 0], *[angle] * 4]), 4)
        found = graph.append(np.array([*[angle] * 3, nearer]), seed).neighbours[0]
        assert found[0] == 8
        drawn |= {*found[1:].tolist()}
    assert drawn == {1, 2, 3, 4, 5, 6, 7}


def test_appended_rows_fill_lists_that_are_short():
    graph = KNNGraph(np.array([[1, -1], [0, -1]]), np.array([[0.5, 0], [0.5, 0]], np.float32), np.eye(2, 3).astype("f"))
    grown = graph.append(np.array([[1.0, 0, 1]]))
    assert grown.neighbours.tolist() == [[2, 1], [0, 2], [0, 1]]


def test_what_cannot_be_appended_is_refused():
    graph = KNNGraph.build(vectors_of(), 3)
    with pytest.raises(ValueError, match="vectors must be 5 wide, as those of the graph, got 4"):
        graph.append(vectors_of(3, 4))
    with pytest.raises(ValueError, match="row 0 is not"):
        graph.append(np.full((1, 5), np.nan, np.float32))
    unsigned = KNNGraph(graph.neighbours.astype(np.uint64), graph.scores, graph.vectors)
    assert unsigned.append(vectors_of(3)).neighbours.dtype == np.int64
    with pytest.raises(ValueError, match="a graph without vectors cannot grow"):
        KNNGraph(graph.neighbours, graph.scores).append(vectors_of(3))


def test_more_rows_than_a_graph_has_places_for_are_filled_up():
    graph = KNNGraph.build(np.eye(2, 3), 1)
    wide = KNNGraph(np.array([[1, -1, -1], [0, -1, -1]]), np.zeros((2, 3), np.float32), graph.vectors)
    first, second, added = wide.append(np.array([[1.0, 1, 1]])).neighbours.tolist()
    assert (first, second, sorted(added)) == ([2, 1, -1], [2, 0, -1], [-1, 0, 1])


@pytest.mark.parametrize("with_vectors", [True, False])
def test_a_saved_graph_is_the_graph(tmp_path, with_vectors):
    graph = KNNGraph.build(vectors_of(), 3)
    graph = graph if with_vectors else KNNGraph(graph.neighbours, graph.scores)
    graph.save(tmp_path / "graph.safetensors")
    found = KNNGraph.load(tmp_path / "graph.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "graph.safetensors"]
    for name in ("neighbours", "scores", "vectors"):
        before, after = getattr(graph, name), getattr(found, name)
        assert (before is None and after is None) or (before.dtype == after.dtype and (before == after).all())


def test_a_damaged_foreign_or_missing_graph_file_is_refused(tmp_path):
    path = tmp_path / "graph.safetensors"
    with pytest.raises(FileNotFoundError, match="no graph file"):
        KNNGraph.load(path)
    KNNGraph.build(vectors_of(), 3).save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        KNNGraph.load(path)
    save_file({"neighbours": np.zeros((2, 1), np.int64)}, path)
    with pytest.raises(ValueError, match="holds no graph"):
        KNNGraph.load(path)
    neighbours, scores = np.array([[1], [0]]), np.ones((2, 1), np.float32)
    for tensors in ({"neighbours": neighbours}, {"neighbours": neighbours, "scores": 7 * scores}):
        save_file(tensors, path, metadata={"kind": "tcq_hf graph"})
        with pytest.raises(ValueError, match=r"graph file .* is damaged"):
            KNNGraph.load(path)


def test_a_row_without_neighbours_has_no_edges():
    graph = KNNGraph(np.array([[1, -1], [0, -1], [-1, -1]]), np.array([[0.5, 0]] * 3, np.float32))
    for mutual in (True, False):
        assert graph.adjacency(mutual).nnz == 2
    # N_q of the first two is both, that of the third itself: (2 x 2 x 2 + 1) / (3 x 3 x 3).
    assert quality(graph) == pytest.approx(9 / 27)


@pytest.mark.parametrize(
    ("neighbours", "scores", "message"),
    [
        ([[1, 1], [0, -1]], [[1.0, 1], [1, 1]], "row 0 names one neighbour twice"),
        ([[-1, 1], [0, -1]], [[1.0, 1], [1, 1]], "those of row 0 are not"),
        ([[1], [0]], [[7.0], [1.0]], "one of row 0 is not; divide those of an index of codes by M"),
        ([[1], [0]], [[1.0], [np.nan]], "scores must be cosines, one of row 1 is not"),
        ([[1, 2], [0, 2], [0, 1]], [[0.2, 0.1], [0.1, 0.2], [0, 0]], "scores must fall along a row, those of row 1 do"),
        ([1, 0], [1.0, 1.0], r"must have one shape \[n, k\], got \(2,\)"),
        ([[1], [0]], [[1.0, 1.0], [1.0, 1.0]], r"got \(2, 1\) and \(2, 2\)"),
        ([[1], [2]], [[1.0], [1.0]], "from 0 to 1, with -1 .* those of row 1 are not"),
        ([[0], [0]], [[1.0], [1.0]], "must be other rows, from 0 to 1, .* those of row 0 are not"),
    ],
)
def test_impossible_graphs_are_refused(neighbours, scores, message):
    with pytest.raises(ValueError, match=message):
        KNNGraph(np.array(neighbours), np.array(scores, dtype=np.float32))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"neighbours": np.ones((2, 1))}, TypeError, "neighbours must be integers, got float64"),
        ({"scores": np.ones((2, 1))}, TypeError, "scores must be float32, got float64"),
        ({"vectors": np.eye(2)}, TypeError, "vectors must be float32, got float64"),
        ({"vectors": np.eye(3, dtype=np.float32)}, ValueError, r"vectors must be \[2, D\], got \[3, 3\]"),
        ({"vectors": np.diag([1.0, 2]).astype("f")}, ValueError, "unit norm or be zeros, row 1 has 2"),
    ],
)
def test_graphs_of_other_types_or_lengths_are_refused(changed, error, message):
    fields = {"neighbours": np.array([[1], [0]]), "scores": np.ones((2, 1), np.float32), "vectors": None}
    with pytest.raises(error, match=message):
        KNNGraph(**fields | changed)


# --- Quality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["authority", "reciprocal"])
@pytest.mark.parametrize("paths_at_once", [300, 2**22])
def test_quality_is_its_definition(monkeypatch, kind, paths_at_once):
    monkeypatch.setattr(module, "_PATHS_AT_ONCE", paths_at_once)
    graph = KNNGraph.build(vectors_of(40), 5)
    lists = [[row, *near] for row, near in enumerate(graph.neighbours.tolist())]
    total = 0.0
    for q in lists:
        for i in q:
            for j in set(lists[i]) & set(q):
                total += 1 if kind == "authority" else 1 / (q.index(j) + 1)
    assert quality(graph, kind) == pytest.approx(total / (40 * 36), rel=1e-12)


def test_separate_cliques_have_quality_one_and_a_ring_less():
    cliques = KNNGraph.build(np.repeat(np.eye(5), 4, axis=0), 3)
    assert quality(cliques) == 1
    assert quality(cliques, "reciprocal") == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False) + np.linspace(0, 1e-3, 24)
    ring = KNNGraph.build(np.stack([np.cos(angle), np.sin(angle)], axis=1), 2)
    # N_q = {q - 1, q, q + 1}: it has 3 in common with itself and 2 with either neighbour, but at the seam.
    assert quality(ring) == pytest.approx(7 / 9, abs=0.05)


def test_vectors_that_are_all_equal_have_no_quality():
    # In a random order a row shares itself and its neighbour with each of its neighbours, and little else.
    assert quality(KNNGraph.build(np.ones((2000, 8)), 19)) == pytest.approx((20 + 19) / 400, abs=0.02)


@pytest.mark.parametrize("kind", ["authority", "reciprocal"])
def test_quality_does_not_depend_on_the_order_of_rows(kind):
    vectors, order = vectors_of(), np.random.default_rng(3).permutation(60)
    found = [quality(KNNGraph.build(given, 6), kind) for given in (vectors, vectors[order])]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'authority' or 'reciprocal', got 'hub'"):
        quality(KNNGraph.build(vectors_of(), 3), "hub")
