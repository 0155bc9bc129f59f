"""What a user would pick instead, on the same vectors: scores of float search and of FAISS product quantization."""

import faiss
import numpy as np


def float_scores(queries: np.ndarray, database: np.ndarray, centre: bool = False) -> np.ndarray:
    """Cosine of every query `[Q, F]` with every database row `[N, F]`, float32 `[Q, N]`, larger is closer.

    With `centre` the database mean is subtracted from both first.
    """
    mean = database.mean(axis=0) if centre else 0.0
    return _unit(queries - mean) @ _unit(database - mean).T


def pq_scores(
    queries: np.ndarray,
    database: np.ndarray,
    num_codebooks: int,
    num_bits: int = 8,
    centre: bool = False,
    seed: int = 1234,
) -> np.ndarray:
    """Inner product of every query with every row of the database as FAISS `IndexPQ`, trained on it, restores it.

    Args:
        queries: Float `[Q, F]`, scaled to unit norm here.
        database: Float `[N, F]`, scaled to unit norm here; N at least 2^`num_bits`.
        num_codebooks: Sub-quantizers M.
        num_bits: Bits of one sub-code.
        centre: Subtract the database mean first.
        seed: Seed of FAISS's k-means; 1234 is FAISS's own.

    Returns:
        float32 `[Q, N]`, larger is closer.
    """
    mean = database.mean(axis=0) if centre else 0.0
    # Zeros at the end change no inner product and make any width a multiple of M.
    padding = ((0, 0), (0, -database.shape[1] % num_codebooks))
    queries, database = (np.pad(_unit(vectors - mean), padding) for vectors in (queries, database))
    index = faiss.IndexPQ(database.shape[1], num_codebooks, num_bits, faiss.METRIC_INNER_PRODUCT)
    index.pq.cp.seed = seed
    index.pq.cp.min_points_per_centroid = 1
    index.train(database)
    index.add(database)
    return queries @ index.reconstruct_n(0, index.ntotal).T


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
