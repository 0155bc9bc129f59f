"""bagging trees: leaves against a walk down each tree, scores against a count, search against brute force."""

import sys

import numpy as np
import pytest
from sklearn.ensemble import RandomTreesEmbedding

from tcq_hf import build_index
from tcq_hf.evaluation.bagging_trees import bagging_trees, leaf_codebooks, leaf_codes

RNG = np.random.default_rng(0)
DATABASE = RNG.standard_normal((200, 6)).astype(np.float32)
QUERIES = RNG.standard_normal((7, 6)).astype(np.float32)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_codes_are_the_leaves_that_a_walk_reaches():
    codes = leaf_codes(QUERIES, DATABASE, DATABASE, trees=5, depth=3, seed=2)
    forest = RandomTreesEmbedding(n_estimators=5, max_depth=3, random_state=2).fit(unit(DATABASE))
    for rows, found in zip((QUERIES, DATABASE), codes, strict=True):
        for row, leaves in zip(unit(rows), found.tolist(), strict=True):
            for estimator, leaf in zip(forest.estimators_, leaves, strict=True):
                tree, node = estimator.tree_, 0
                while tree.children_left[node] >= 0:
                    left = row[tree.feature[node]] <= tree.threshold[node]
                    node = (tree.children_left if left else tree.children_right)[node]
                assert leaf == sum(tree.children_left[other] < 0 for other in range(node))


def test_the_score_is_the_number_of_trees_with_one_leaf_for_both():
    queries, database = bagging_trees(QUERIES, DATABASE, DATABASE, trees=9, depth=4)
    codes, base_codes = leaf_codes(QUERIES, DATABASE, DATABASE, trees=9, depth=4)
    expected = [[sum(a == b for a, b in zip(one, other, strict=True)) for other in base_codes] for one in codes]
    assert queries.dtype == database.dtype == np.float32
    assert queries.shape == (7, 9 * 16)
    np.testing.assert_array_equal(queries @ database.T, expected)
    assert 0 < np.mean(expected) < 4.5


def test_two_directions_are_told_apart_by_every_tree():
    """One feature of unit norm is -1 or 1, and the threshold lies between."""
    rows = np.array([[3.0], [-0.5], [7.0], [-9.0]])
    queries, database = bagging_trees(rows[:2], rows, rows, trees=20, depth=1)
    assert (queries @ database.T).tolist() == [[20, 0, 20, 0], [0, 20, 0, 20]]


def test_copies_share_every_leaf_and_rows_that_are_all_copies_have_one_leaf():
    twice = np.concatenate([DATABASE[:50], 3 * DATABASE[:50]])
    _, codes = leaf_codes(QUERIES, twice, twice)
    np.testing.assert_array_equal(codes[:50], codes[50:])
    same = np.ones((30, 4))
    assert (leaf_codes(QUERIES[:, :4], same, same, trees=6)[0] == 0).all()


@pytest.mark.parametrize("depth", [1, 6, 8])
def test_leaves_fit_the_codebooks(depth):
    many = np.random.default_rng(1).standard_normal((3000, 6))
    codes = leaf_codes(QUERIES, many, many, trees=4, depth=depth)[1]
    assert codes.dtype == np.uint8
    # Of 256 leaves some end above the last level: a split at random may leave one row.
    assert 0.4 * 2**depth < codes.max() + 1 <= 2**depth
    assert leaf_codebooks(4, depth).shape == (4, 2**depth, 2**depth)


def test_only_train_is_learnt_from_and_rows_keep_their_codes_in_any_order():
    _, codes = leaf_codes(QUERIES, DATABASE[:80], DATABASE[80:])
    order = RNG.permutation(80)
    moved = leaf_codes(-QUERIES[:1], DATABASE[:80][order], DATABASE[80:])[1]
    np.testing.assert_array_equal(moved, codes[order])
    other = leaf_codes(QUERIES, DATABASE[:80], DATABASE[80:] ** 3)[1]
    assert not np.array_equal(other, codes)


def test_a_seed_repeats_itself_and_another_does_not():
    first, again, other = (leaf_codes(QUERIES, DATABASE, DATABASE, seed=seed)[1] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_an_index_of_leaves_searches_as_brute_force():
    options = {"trees": 11, "depth": 5}
    queries, database = bagging_trees(QUERIES, DATABASE, DATABASE, **options)
    index = build_index(leaf_codebooks(**options), leaf_codes(QUERIES, DATABASE, DATABASE, **options)[1])
    # Sums of zeros and ones are exact.
    np.testing.assert_array_equal(index.reconstruct_n(0, 200), database)
    scores, ids = index.search(queries, 200)
    expected = queries @ database.T
    np.testing.assert_array_equal(scores, -np.sort(-expected, axis=1))
    np.testing.assert_array_equal(np.take_along_axis(expected, ids, axis=1), scores)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ((QUERIES, DATABASE, DATABASE[:, :5]), {}, r"must be features \[n, F\] of one width F"),
        ((QUERIES, DATABASE[:0], DATABASE), {}, r"must be features \[n, F\] of one width F"),
        ((QUERIES, DATABASE, np.where(np.arange(200)[:, None] == 4, np.nan, DATABASE)), {}, "train .* row 4 is not"),
        (
            (np.full((2, 6), np.inf), DATABASE, DATABASE),
            {},
            "queries must be finite .* row 0 is not",
        ),
        ((QUERIES, DATABASE, DATABASE), {"trees": 0}, "trees must be at least 1, got 0"),
        ((QUERIES, DATABASE, DATABASE), {"depth": 0}, "depth must be from 1 to 8, .*, got 0"),
        ((QUERIES, DATABASE, DATABASE), {"depth": 9}, "depth must be from 1 to 8, .*, got 9"),
    ],
)
def test_what_no_tree_grows_from_is_refused(features, options, message):
    with pytest.raises(ValueError, match=message):
        bagging_trees(*features, **options)


def test_codebooks_of_no_tree_are_refused():
    with pytest.raises(ValueError, match="trees must be at least 1"):
        leaf_codebooks(0)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(ImportError, match="grown by scikit-learn: pip install scikit-learn"):
        bagging_trees(QUERIES, DATABASE, DATABASE)
