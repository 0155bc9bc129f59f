"""degenerate: copies counted by a loop, the warning on either side of its limit."""

import warnings

import numpy as np
import pytest

from tcq_hf.rerank.degenerate import copies, warn_if_degenerate
from tcq_hf.rerank.graph import KNNGraph


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
