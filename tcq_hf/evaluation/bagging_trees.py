"""Bagging trees: features in, the leaf of each of many random trees out, as codes and as vectors to compare.

After Fakhr et al. (NCAA 2018): rows are alike in as many trees as put them into one leaf. That is a product code whose
table is an indicator: a tree is a codebook, a leaf its code, and codewords that are unit vectors of one leaf each make
the score of a search the number of trees that two rows share a leaf of.
"""

import numpy as np

from .baselines import float_cosine


def bagging_trees(
    queries: np.ndarray, database: np.ndarray, train: np.ndarray, trees: int = 100, depth: int = 6, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Leaves of random trees, each of its own dimension: a baseline as those of `baselines.py`.

    The vectors are `trees` 2^`depth` wide; of many rows keep `leaf_codes`, `trees` bytes a row, and search them with
    `build_index(leaf_codebooks(trees, depth), codes)`.

    Args:
        queries: Float `[Q, F]`.
        database: Float `[N, F]`.
        train: Float `[T, F]`.
        trees: Number of trees; codes have `trees` `depth` bits.
        depth: Splits from the root of a tree to its leaves, 1 to 8.
        seed: Seed of the trees.

    Returns:
        Zeros and ones of queries `[Q, trees 2^depth]` and database `[N, trees 2^depth]`; inner product = trees in which
        both are in one leaf.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If the features do not fit or are not finite, or trees or depth is out of range.
    """
    codes = leaf_codes(queries, database, train, trees, depth, seed)
    codewords = leaf_codebooks(trees, depth)
    first, second = (codewords[np.arange(trees), each].reshape(len(each), -1) for each in codes)
    return first, second


def leaf_codes(
    queries: np.ndarray, database: np.ndarray, train: np.ndarray, trees: int = 100, depth: int = 6, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The leaves alone; arguments and errors are those of `bagging_trees`.

    Each node of a tree splits a feature drawn at random between the smallest and the largest value that its rows of
    `train` have, at a threshold drawn at random: scikit-learn's `RandomTreesEmbedding`, on features of unit norm.

    Returns:
        Number of the leaf in each tree, below 2^`depth`, uint8 of queries `[Q, trees]` and database `[N, trees]`.
    """
    try:
        from sklearn.ensemble import RandomTreesEmbedding
    except ImportError as error:
        raise ImportError("bagging trees are grown by scikit-learn: pip install scikit-learn") from error

    _check_sizes(trees, depth)
    queries, database = float_cosine(queries, database, train)
    train, _ = float_cosine(train, train, train)
    forest = RandomTreesEmbedding(n_estimators=trees, max_depth=depth, random_state=seed).fit(train)
    # Nodes of a tree are numbered, leaves among them; codes count the leaves alone.
    counts = [np.cumsum(tree.tree_.children_left < 0) - 1 for tree in forest.estimators_]
    first, second = (
        np.stack([count[nodes] for count, nodes in zip(counts, forest.apply(rows).T, strict=True)], axis=1)
        for rows in (queries, database)
    )
    return first.astype(np.uint8), second.astype(np.uint8)


def leaf_codebooks(trees: int = 100, depth: int = 6) -> np.ndarray:
    """Codebooks for `leaf_codes`: leaf i of a tree is the i-th unit vector, float32 `[trees, 2^depth, 2^depth]`.

    Raises:
        ValueError: If trees or depth is out of range.
    """
    _check_sizes(trees, depth)
    return np.tile(np.eye(2**depth, dtype=np.float32), (trees, 1, 1))


def _check_sizes(trees: int, depth: int) -> None:
    if trees < 1:
        raise ValueError(f"trees must be at least 1, got {trees}")
    if not 1 <= depth <= 8:
        raise ValueError(f"depth must be from 1 to 8, so that a leaf fits a byte, got {depth}")
