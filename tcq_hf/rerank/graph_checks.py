"""What a re-ranker asks of a graph: enough neighbours, and that they are no mere copies."""

import warnings

from .graph import KNNGraph
from .nearest import TIE

# PQ codes of handwritten digits, by the share of copies among 19 and 49 neighbours: up to 0.05 diffusion gains all but
# a few points of what it gains from floats and rank flow more than a third, from 0.1 to 0.13 diffusion keeps half or
# less at times and rank flow begins to lose, and from 0.25 on rank flow loses always at 19 and diffusion now and then.
_LIMIT = 0.1


def require_neighbours(graph: KNNGraph, wanted: int, why: str) -> None:
    """Raise ValueError, beginning with `why`, unless a graph holds so many neighbours a row, or all other rows."""
    held, wanted = graph.neighbours.shape[1], min(wanted, len(graph) - 1)
    if held < wanted:
        raise ValueError(
            f"{why} needs {wanted} neighbours a row, the graph holds {held}: build the graph with k={wanted}, or lower "
            "that of the re-ranker"
        )


def require_room_for_queries(graph: KNNGraph, wanted: int, why: str) -> None:
    """Raise ValueError unless queries can come into a graph: it has vectors, and `wanted` neighbours a row by `why`."""
    if graph.vectors is None:
        raise ValueError("transductive=True puts queries into the graph, and this one has no vectors")
    if graph.neighbours.shape[1] < wanted:
        raise ValueError(
            f"transductive=True with {why} needs a gallery of at least {wanted + 1} rows, got {len(graph)}"
        )


def copies(graph: KNNGraph, k: int) -> float:
    """Share of the first k - 1 neighbours of rows that are their copies: cosine 1, within 1e-6.

    Args:
        graph: Its scores are cosines.
        k: Rows of a neighbourhood, the row itself counted.
    """
    there = graph.neighbours[:, : k - 1] >= 0
    return float((there & (graph.scores[:, : k - 1] >= 1 - TIE)).sum() / max(1, there.sum()))


def warn_if_degenerate(graph: KNNGraph, k: int) -> None:
    """Warn of a graph in which more than a tenth of the neighbours are copies; for the `fit` of a re-ranker.

    Rows of one code cannot be told apart: the neighbours that they have are drawn, and so is what is built on them.

    Args:
        graph: Graph of the gallery.
        k: Rows of a neighbourhood, the row itself counted.

    Warns:
        UserWarning: Says the share, and what to do.
    """
    share = copies(graph, k)
    if share > _LIMIT:
        warnings.warn(
            f"{share:.0%} of the {k - 1} nearest neighbours of rows are copies of them: such a graph says little, and "
            "re-ranking by it may do harm; use longer codes or a larger k, build the graph from float embeddings, or "
            "use QueryExpansion",
            stacklevel=3,
        )
