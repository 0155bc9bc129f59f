"""Benches of the published systems: handwritten digits."""

import faiss
import numpy as np
import pytest
from sklearn.datasets import load_digits


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels of 1,797 digits at unit norm, float32 `[1797, 64]`, and what they are."""
    found = load_digits()
    pixels = found.data.astype(np.float32)
    return pixels / np.linalg.norm(pixels, axis=1, keepdims=True), found.target


@pytest.fixture(scope="session")
def halves(digits) -> list[tuple[np.ndarray, np.ndarray]]:
    """300 queries and the gallery of all others, vectors and labels each."""
    vectors, labels = digits
    order = np.random.default_rng(0).permutation(len(labels))
    return [(vectors[part], labels[part]) for part in (order[:300], order[300:])]


@pytest.fixture(scope="session")
def restored(halves):
    """A function of a number of bits that gives the gallery as PQ codes of 4 bits a sub-vector restore it."""

    def restore(bits):
        gallery = halves[1][0]
        index = faiss.IndexPQ(gallery.shape[1], bits // 4, 4, faiss.METRIC_INNER_PRODUCT)
        index.train(gallery)
        found = index.sa_decode(index.sa_encode(gallery))
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    return restore
