"""Predictions in, the figures of an evaluation out; counts of codewords in, their perplexity out."""

from collections.abc import Sequence

import numpy as np
import torch

from tcq_hf.evaluation.metrics import evaluate
from tcq_hf.rerank.graph import KNNGraph, quality

# Rows in a neighbourhood of the label-free quality, the row itself counted.
_NEIGHBOURHOOD = 20


def retrieval_figures(
    predictions: Sequence[np.ndarray], labels: np.ndarray, codebooks: np.ndarray, seed: int
) -> dict[str, float]:
    """How well codes are found again, without labels and, where there are some, with them.

    Args:
        predictions: Embeddings float32 `[N, D]`, codes uint8 `[N, M]` and, if at hand, embeddings `[N, D]` of a changed
            copy of each picture.
        labels: int `[N]`, -1 where there is none.
        codebooks: float32 `[M, K, d]`.
        seed: Seed of the order of ties.

    Returns:
        `quantization_error`, the mean of 1 - score / M of a picture with its own code; `quality`, of at least four
        pictures, 0 to 1, how well the neighbourhoods of the embeddings agree; `view_recall@1`, the share of changed
        copies that find their picture first; `map`, `map_strict` at k = 1,000 and `precision@k`, each row querying the
        others.
    """
    embeddings, codes, *views = predictions
    restored = codebooks[np.arange(len(codebooks)), codes].reshape(len(codes), -1)
    figures = {"quantization_error": float(1 - (embeddings * restored).sum(axis=1).mean() / len(codebooks))}
    if len(embeddings) >= 4:
        figures["quality"] = neighbourhood_quality(embeddings, seed)
    if views:
        own = np.arange(len(codes))
        figures["view_recall@1"] = evaluate(views[0], restored, own, own, k=1, at=(1,), seed=seed).recall[1]
    if (labels >= 0).any() and len(labels) > 1:
        k = min(1000, len(labels) - 1)
        found = evaluate(embeddings, restored, labels, labels, k=k, seed=seed, exclude_self=True)
        figures |= {"map": found.map_published, "map_strict": found.map_strict}
        figures |= {f"precision@{rank}": value for rank, value in found.precision.items()}
    return figures


def neighbourhood_quality(embeddings: np.ndarray, seed: int) -> float:
    """Authority of the graph of neighbourhoods of 20 rows, or of half the rows if these are fewer.

    Of the embeddings, not of the codes: rows that share a code are neighbours in no order, so that codes which put more
    rows together would gain by that alone. Comparable between models, on the same rows only.

    Args:
        embeddings: Float32 `[N, D]`, N at least 4.
        seed: Seed of the order of ties.
    """
    size = min(_NEIGHBOURHOOD, len(embeddings) // 2)
    return quality(KNNGraph.build(embeddings, size - 1, seed))


def perplexity(chosen: torch.Tensor) -> float:
    """Codewords in use, exp of the entropy of the choices, averaged over the codebooks: 1 to K.

    Args:
        chosen: Counts `[M, K]`.
    """
    share = chosen.double() / chosen.sum(dim=1, keepdim=True)
    return float(torch.special.entr(share).sum(dim=1).exp().mean())
