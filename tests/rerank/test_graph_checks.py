"""graph_checks: copies counted by a loop, the warning on either side of its limit."""

import warnings

import numpy as np
import pytest

from tcq_hf.rerank import Diffusion, KNNGraph, KReciprocal, QueryExpansion, RankFlow
from tcq_hf.rerank.graph_checks import copies, warn_if_degenerate


def graph_with_copies(share, rows=400, k=10, seed=0):
    """A graph of which each row has the same vector as some others."""
    generator = np.random.default_rng(seed)
    words = generator.standard_normal((rows, 16)).astype(np.float32)
    places = np.where(generator.random(rows) < share, generator.integers(rows // 20, size=rows), np.arange(rows))
    return KNNGraph.build(words[places], k), places


@pytest.mark.parametrize("k", [3, 11])
def test_the_share_of_copies_is_that_of_a_loop(k):
    graph, places = graph_with_copies(0.6)
    same = [places[row] == places[other] for row in range(400) for other in graph.neighbours[row, : k - 1]]
    assert copies(graph, k) == np.mean(same)


def test_missing_neighbours_do_not_count():
    graph = KNNGraph(np.array([[1, 2], [0, -1], [-1, -1]]), np.array([[1, 0.5], [1, 1], [1, 1]], np.float32))
    assert copies(graph, 3) == 2 / 3
    assert copies(KNNGraph(np.full((2, 1), -1), np.ones((2, 1), np.float32)), 2) == 0


def test_more_than_a_tenth_of_copies_is_warned_of():
    few, many = graph_with_copies(0.1)[0], graph_with_copies(0.9)[0]
    assert copies(few, 11) < 0.1 < copies(many, 11)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_degenerate(few, 11)
    with pytest.warns(UserWarning, match=f"{copies(many, 11):.0%} of the 10 nearest neighbours of rows are copies"):
        warn_if_degenerate(many, 11)


@pytest.mark.parametrize("make", [Diffusion, RankFlow, KReciprocal, lambda: QueryExpansion(k=20, database=True)])
def test_a_gallery_of_few_rows_is_ranked_by_all_of_them(make):
    vectors = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    graph = KNNGraph.build(vectors, 8)
    reranker = make().fit(graph)
    assert reranker.num_rows == 9
    scores = graph.vectors @ graph.vectors.T
    ids = np.argsort(-scores, axis=1, kind="stable")
    ranked = reranker(vectors, np.take_along_axis(scores, ids, axis=1), ids)[1]
    assert (np.sort(ranked, axis=1) == np.arange(9)).all()
    with pytest.raises(ValueError, match="needs 8 neighbours a row, the graph holds 4: build the graph with k=8"):
        make().fit(KNNGraph.build(vectors, 4))


@pytest.mark.parametrize("make", [Diffusion, RankFlow, KReciprocal, QueryExpansion])
def test_no_queries_get_no_lists_and_nothing_is_known_before_fit(make):
    graph = KNNGraph.build(np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32), 50)
    empty = np.zeros((0, 5), np.float32), np.zeros((0, 30), np.float32), np.zeros((0, 30), np.int64)
    ways = [{}] if make is QueryExpansion else [{}, {"transductive": True}]
    for options in ways:
        scores, ids = make(**options).fit(graph)(*empty)
        assert scores.shape == ids.shape == (0, 30)
    with pytest.raises(RuntimeError, match=r"call fit\(graph\) first"):
        _ = make().num_rows
