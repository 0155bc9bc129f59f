"""sparse_rows: norms and largest entries against a loop."""

import numpy as np
import pytest
from scipy import sparse

from tcq_hf.rerank.sparse_rows import largest_entries, narrow, unit_rows


def random_rows(seed, levels=None):
    generator = np.random.default_rng(seed)
    values = generator.random((30, 40)) if levels is None else generator.integers(1, levels + 1, (30, 40))
    values = values * (generator.random((30, 40)) < generator.random((30, 1)))
    values[3] = 0
    return sparse.csr_array(values.astype(np.float32))


def test_rows_get_unit_norm_and_empty_ones_stay_empty():
    rows = random_rows(0)
    dense = rows.toarray()
    expected = [row / np.sqrt((row.astype(float) ** 2).sum()) if row.any() else row for row in dense]
    # Sums of 40 products in float32.
    np.testing.assert_allclose(unit_rows(rows).toarray(), expected, atol=1e-6)
    assert unit_rows(rows).dtype == np.float32


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("keep", [1, 5, 40])
def test_the_largest_entries_are_those_of_a_stable_sort(levels, keep):
    rows = random_rows(1, levels)
    kept = largest_entries(rows, keep)
    expected = np.zeros(rows.shape, np.float32)
    for row in range(30):
        part = slice(*rows.indptr[row : row + 2])
        for place in np.argsort(-rows.data[part], kind="stable")[:keep]:
            expected[row, rows.indices[part][place]] = rows.data[part][place]
    np.testing.assert_array_equal(kept.toarray(), expected)
    assert np.diff(kept.indptr).max() <= keep


def test_nothing_is_kept_of_nothing():
    for shape in ((0, 4), (3, 4)):
        assert largest_entries(sparse.csr_array(shape, dtype=np.float32), 2).shape == shape
        assert unit_rows(sparse.csr_array(shape, dtype=np.float32)).nnz == 0


def test_narrow_rows_hold_the_same_in_32_bits():
    wide = sparse.csr_array((np.array([1.5, 2.5]), np.array([3, 0]), np.array([0, 1, 2])), shape=(2, 4))
    found = narrow(wide.T)
    assert (found.indices.dtype, found.indptr.dtype, found.dtype) == (np.int32, np.int32, np.float32)
    np.testing.assert_array_equal(found.toarray(), wide.toarray().T)
