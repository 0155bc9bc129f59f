"""Drawn unit vectors, and an exhaustive search among them."""

import numpy as np


def unit(vectors):
    """Rows of unit norm; zeros stay."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def clusters(rows, queries, count, spread, width=6, seed=0):
    """Unit vectors float32 of some loose clusters, and of queries among them."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((count, width))
    labels = generator.integers(count, size=rows + queries)
    drawn = centres[labels] + spread * generator.standard_normal((rows + queries, width))
    vectors = unit(drawn).astype(np.float32)
    return vectors[:rows], vectors[rows:]


def search(queries, vectors, k):
    """Scores and ids of the k best rows by cosine."""
    scores = unit(queries) @ unit(vectors).T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, axis=1), ids
