"""Codebooks in, coarser 4-bit codebooks for their codewords out. NumPy only.

FAISS scans 4-bit codes at the speed of memory, some ten times faster than 8-bit ones. Each codeword of K > 16 is
approximated by the sum of two words, one of each of two books of 16 (additive quantization, Babenko and Lempitsky,
CVPR 2014, of the codewords instead of the data): two 4-bit codes that follow from the codeword's number alone.
"""

from dataclasses import dataclass

import numpy as np

# Words of a 4-bit book.
_SIZE = 16
_STARTS = 4
_ROUNDS = 25


@dataclass(frozen=True)
class Shadow:
    """4-bit books of learned codebooks.

    Args:
        books: float32 `[L M, 16, d]`; books L m to L m + L - 1 belong to codebook m; L is 1 for K <= 16, else 2.
        words: uint8 `[M, K]`, for each codeword its words of 4 bits, that of the first book lowest.
    """

    books: np.ndarray
    words: np.ndarray

    @property
    def levels(self) -> int:
        """L, books for each codebook."""
        return len(self.books) // len(self.words)

    def packed(self, codes: np.ndarray) -> np.ndarray:
        """The 4-bit codes of codes `[n, M]`, as FAISS packs them: uint8 `[n, ceil(L M / 2)]`."""
        words = np.stack([book[column] for book, column in zip(self.words, codes.T, strict=True)], axis=1)
        if self.levels == 2:
            return words
        if words.shape[1] % 2:
            words = np.pad(words, ((0, 0), (0, 1)))
        return words[:, 0::2] | words[:, 1::2] << 4


def make_shadow(codebooks: np.ndarray, usage: np.ndarray, seed: int = 0) -> Shadow:
    """Books whose sums are nearest to the codewords, weighted by how often each is used.

    Args:
        codebooks: float32 `[M, K, d]`.
        usage: `[M, K]`, how many codes name each codeword.
        seed: Seed of the starts; the best of four is taken for each codebook.
    """
    if codebooks.shape[1] <= _SIZE:
        missing = np.repeat(codebooks[:, :1], _SIZE - codebooks.shape[1], axis=1)
        return restore_shadow(codebooks, np.concatenate([codebooks, missing], axis=1))
    generator, books = np.random.default_rng(seed), []
    for words, weights in zip(codebooks.astype(np.float64), usage + 1.0, strict=True):
        starts = [_refine(words, weights, _start(words, weights, generator)) for _ in range(_STARTS)]
        books.extend(min(starts, key=lambda pair: _error(words, weights, pair)))
    return restore_shadow(codebooks, np.stack(books).astype(np.float32))


def restore_shadow(codebooks: np.ndarray, books: np.ndarray) -> Shadow:
    """The shadow of codebooks `[M, K, d]` with these books `[L M, 16, d]`: each codeword's nearest words."""
    if len(books) == len(codebooks):
        return Shadow(books, np.tile(np.arange(codebooks.shape[1], dtype=np.uint8), (len(codebooks), 1)))
    pairs = books.astype(np.float64).reshape(len(codebooks), 2, _SIZE, -1)
    nearest = [_nearest(words, _sums(*pair)) for words, pair in zip(codebooks.astype(np.float64), pairs, strict=True)]
    return Shadow(books, np.stack([number // _SIZE | number % _SIZE << 4 for number in nearest]).astype(np.uint8))


def _start(words: np.ndarray, weights: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of the words, and clusters of what they leave over."""
    first, near = _clusters(words, weights, generator)
    return first, _clusters(words - first[near], weights, generator)[0]


def _clusters(
    points: np.ndarray, weights: np.ndarray, generator: np.random.Generator, rounds: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted k-means: centres `[16, d]` and the nearest one of each point."""
    centres = _spread(points, weights, generator)
    for _ in range(rounds):
        near = _nearest(points, centres)
        for centre in np.unique(near):
            centres[centre] = np.average(points[near == centre], axis=0, weights=weights[near == centre])
    return centres, _nearest(points, centres)


def _spread(points: np.ndarray, weights: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Sixteen points far from each other: k-means++ (Arthur and Vassilvitskii 2007)."""
    chosen, gaps = [], np.ones(len(points))
    for _ in range(_SIZE):
        # Where every point is a centre already, any one will do.
        odds = weights * np.maximum(gaps, 1e-12)
        chosen.append(generator.choice(len(points), p=odds / odds.sum()))
        nearest = ((points - points[chosen[-1]]) ** 2).sum(axis=1)
        gaps = nearest if len(chosen) == 1 else np.minimum(gaps, nearest)
    return points[chosen]


def _refine(
    words: np.ndarray, weights: np.ndarray, pair: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the best sum for each word, then the best books for these choices (least squares), in turns."""
    for _ in range(_ROUNDS):
        nearest = _nearest(words, _sums(*pair))
        chosen = np.zeros((len(words), 2 * _SIZE))
        chosen[np.arange(len(words)), nearest // _SIZE] = 1
        chosen[np.arange(len(words)), _SIZE + nearest % _SIZE] = 1
        weighted = chosen.T * weights
        # The two books are free up to a vector added to one and taken off the other, and a word may be unused.
        solution = np.linalg.solve(
            weighted @ chosen + 1e-6 * weights.mean() * np.eye(2 * _SIZE),
            weighted @ words + 1e-6 * weights.mean() * np.concatenate(pair),
        )
        pair = solution[:_SIZE], solution[_SIZE:]
    return pair


def _error(words: np.ndarray, weights: np.ndarray, pair: tuple[np.ndarray, np.ndarray]) -> float:
    sums = _sums(*pair)
    return float((weights * ((words - sums[_nearest(words, sums)]) ** 2).sum(axis=1)).sum())


def _sums(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """All 256 sums; number 16 i + j is that of word i and word j."""
    return (first[:, None] + second).reshape(_SIZE * _SIZE, -1)


def _nearest(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return ((targets**2).sum(axis=1) - 2 * points @ targets.T).argmin(axis=1)
