"""Stored rows in, queries like those that will come out: what an index is measured with. NumPy only."""

import numpy as np


def noisy_rows(codebooks: np.ndarray, codes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Rows, each sub-vector moved as far as the nearest other codeword lies, in a direction at random.

    A picture that was not stored is about as far from the codeword that is nearest to it.

    Args:
        codebooks: float32 `[M, K, d]`.
        codes: uint8 `[Q, M]`.
        generator: Draws the directions.

    Returns:
        Unit sub-vectors, float32 `[Q, D]`.
    """
    cosines = np.einsum("mkd,mjd->mkj", codebooks, codebooks)
    cosines[:, np.arange(cosines.shape[1]), np.arange(cosines.shape[1])] = -1
    gaps = np.sqrt(np.maximum(2 - 2 * cosines.max(axis=2), 0))
    books = np.arange(len(codebooks))
    words = codebooks[books, codes]
    noise = generator.standard_normal(words.shape)
    noise -= (noise * words).sum(axis=2, keepdims=True) * words
    noise /= np.maximum(np.linalg.norm(noise, axis=2, keepdims=True), 1e-12)
    moved = words + gaps[books, codes][..., None] * noise
    return (moved / np.linalg.norm(moved, axis=2, keepdims=True)).astype(np.float32).reshape(len(codes), -1)
