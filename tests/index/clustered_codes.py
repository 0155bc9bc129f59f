"""Clustered vectors, codebooks drawn from them and their codes: what approximate searches are tested on."""

import numpy as np

from tcq_hf import build_index

# A score sums M inner products of unit vectors in float32.
SCORE_TOLERANCE = 1e-5


def unit(vectors, num_codebooks):
    parts = vectors.reshape(len(vectors), num_codebooks, -1)
    return (parts / np.linalg.norm(parts, axis=2, keepdims=True)).astype(np.float32)


def collection(codebook_size=256, num_codebooks=8, count=20_000, seed=0):
    """Codebooks, codes and queries of clustered data; a codebook is drawn from the data."""
    generator = np.random.default_rng(seed)
    centres, mix = generator.standard_normal((40, 12)), generator.standard_normal((12, num_codebooks * 4))
    drawn = centres[generator.integers(40, size=count + 300)] + 0.5 * generator.standard_normal((count + 300, 12))
    vectors = unit(drawn @ mix, num_codebooks)
    codebooks = np.stack([vectors[:codebook_size, book] for book in range(num_codebooks)])
    index = build_index(codebooks)
    packed = index.sa_encode(np.ascontiguousarray(vectors[300:].reshape(count, -1)))
    index.add_sa_codes(packed)
    return codebooks, index.codes_array(), np.ascontiguousarray(vectors[:300].reshape(300, -1))


def overlap(fast, exact, queries, k):
    limits = exact.search(queries, k)[0][:, -1:] - 1e-6
    return (fast.search(queries, k)[0] >= limits).mean()
