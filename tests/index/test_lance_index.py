"""lance_index: what Lance finds with our codebooks, against FAISS; indexes that are foreign, stale or incomplete."""

import sys

import numpy as np
import pyarrow as pa
import pytest
from numpy.testing import assert_array_equal

from tcq_hf import build_index

lance = pytest.importorskip("lance", reason="Lance is not installed: pip install 'tcq_hf[lance]'")

from tcq_hf.index import lance_index  # noqa: E402
from tcq_hf.index.lance_files import read_codes  # noqa: E402
from tcq_hf.index.lance_index import LanceIndex, build_lance_index, to_lance  # noqa: E402

SHAPES = [(4, 256, 4), (8, 256, 16), (1, 256, 8), (16, 16, 8), (2, 16, 4)]


def unit(*shape, seed=0):
    drawn = np.random.default_rng(seed).standard_normal(shape)
    return (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(np.float32)


def drawn_codes(count, books, size):
    return np.random.default_rng(1).integers(0, size, (count, books)).astype(np.uint8)


def drawn_queries(count, books, sub_dim):
    return unit(count, books, sub_dim, seed=2).reshape(count, -1)


CODEBOOKS = unit(4, 256, 4)
CODES = drawn_codes(1000, 4, 256)
QUERIES = drawn_queries(5, 4, 4)


@pytest.fixture
def uri(tmp_path):
    return tmp_path / "codes.lance"


@pytest.fixture
def filled(uri):
    """1,000 rows in four fragments, ids from 5000."""
    return to_lance(uri, CODEBOOKS, CODES, ids=np.arange(5000, 6000), rows_per_fragment=250)


def inner_products(queries, codes, codebooks):
    """All scores [Q, N], by loops over queries and codebooks."""
    scores = np.zeros((len(queries), len(codes)))
    for scored, query in zip(scores, np.float64(queries), strict=True):
        for book, part in enumerate(query.reshape(len(codebooks), -1)):
            scored += codebooks[book].astype(np.float64)[codes[:, book]] @ part
    return scores


def is_faiss(index, codes, ids, queries=QUERIES, codebooks=CODEBOOKS):
    """Whether scores, and ids up to ties, are those of FAISS and of the formula."""
    every = inner_products(queries, codes, codebooks)
    exact = build_index(codebooks, codes)
    for k in (1, min(50, len(codes)), len(codes)):
        scores, found = index.search(queries, k)
        assert (scores.dtype, found.dtype, scores.shape, found.shape) == (
            np.float32,
            np.int64,
            *[(len(queries), k)] * 2,
        )
        # A distance is at most 4 M, summed up in float32; a score is half of it. FAISS rounds sums of M.
        tolerance = len(codebooks) * 4 * np.finfo(np.float32).eps
        assert np.abs(scores - exact.search(queries, k)[0]).max() <= min(tolerance, 1e-5)
        rows = np.searchsorted(ids, found)
        assert_array_equal(ids[rows], found)
        assert np.abs(np.take_along_axis(every, rows, axis=1) - scores).max() <= min(tolerance, 1e-5)
        assert all(len({*row}) == k for row in found.tolist())


# --- Search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("books", "size", "sub_dim"), SHAPES)
def test_lance_answers_as_faiss(uri, books, size, sub_dim):
    codebooks, codes = unit(books, size, sub_dim), drawn_codes(1000, books, size)
    index = to_lance(uri, codebooks, codes, rows_per_fragment=300)
    assert (len(index), index.ntotal, index.d) == (1000, 1000, books * sub_dim)
    is_faiss(index, codes, np.arange(1000), drawn_queries(4, books, sub_dim), codebooks)


def test_a_query_of_any_length_has_its_inner_products(filled):
    for length in (1e-3, 1.0, 30.0):
        scores, _ = filled.search(length * QUERIES, 20)
        expected, _ = build_index(CODEBOOKS, CODES).search(length * QUERIES, 20)
        # |q|^2 + M - 2 qw loses digits in proportion to the largest of its terms.
        assert np.abs(scores - expected).max() <= (length**2 * 4 + 4) * 4 * np.finfo(np.float32).eps


def test_a_stored_word_finds_itself_with_the_score_m(filled):
    rows = np.array([3, 777])
    words = CODEBOOKS[np.arange(4), CODES[rows]].reshape(2, -1)
    scores, found = filled.search(words, 1)
    assert_array_equal(found[:, 0], 5000 + rows)
    assert np.abs(scores - 4).max() <= 1e-6


def test_order_of_queries_does_not_matter(filled):
    scores, found = filled.search(QUERIES, 30)
    turned, turned_found = filled.search(QUERIES[::-1], 30)
    assert_array_equal(scores, turned[::-1])
    assert_array_equal(found, turned_found[::-1])


def test_no_query_is_no_answer(filled):
    scores, found = filled.search(np.empty((0, 16), np.float32), 3)
    assert scores.shape == found.shape == (0, 3)


@pytest.mark.parametrize(
    ("queries", "k", "error", "match"),
    [
        (QUERIES, 0, ValueError, "k must be from 1 to 1000"),
        (QUERIES, 1001, ValueError, "k must be from 1 to 1000"),
        (QUERIES[:, :8], 1, ValueError, r"queries must have shape \[n, 16\], got \[5, 8\]"),
        (CODES, 1, ValueError, "queries must have shape"),
        (QUERIES.astype(int), 1, TypeError, "queries must be floats"),
        (QUERIES * np.nan, 1, ValueError, "queries must be finite"),
    ],
)
def test_wrong_queries_are_refused(filled, queries, k, error, match):
    with pytest.raises(error, match=match):
        filled.search(queries, k)


# --- Writing ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_was_given(uri):
    labels = pa.table({"label": pa.array([i % 7 for i in range(1000)], pa.int16())})
    index = to_lance(uri, CODEBOOKS, CODES.astype(np.int64), ids=np.arange(1000)[::-1], columns=labels)
    table = index.dataset.to_table()
    assert table.schema.names == ["id", "codes", "embedding", "label"]
    assert table.schema.field("codes").type == pa.list_(pa.uint8(), 4)
    assert table.schema.field("label").type == pa.int16()
    codes, ids = read_codes(index.dataset)
    assert_array_equal(codes, CODES)
    assert_array_equal(ids, np.arange(1000)[::-1])
    words = CODEBOOKS[np.arange(4), CODES].reshape(-1)
    assert_array_equal(table["embedding"].combine_chunks().flatten().to_numpy(), words)
    is_faiss(index, CODES[::-1], np.arange(1000))


def test_embeddings_find_the_codes_that_they_had(uri):
    embeddings = unit(1000, 4, 4, seed=3).reshape(1000, 16)
    exact = build_index(CODEBOOKS)
    exact.add(embeddings)
    index = to_lance(uri, CODEBOOKS, exact.codes_array(), embeddings)
    assert_array_equal(
        index.dataset.to_table()["embedding"].combine_chunks().flatten().to_numpy(), embeddings.reshape(-1)
    )
    is_faiss(index, exact.codes_array(), np.arange(1000))


def test_a_dataset_is_not_overwritten_unasked(filled, uri):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        to_lance(uri, CODEBOOKS, CODES[:10])
    assert LanceIndex(uri, CODEBOOKS).ntotal == 1000
    other = unit(4, 256, 4, seed=9)
    index = to_lance(uri, other, CODES[:300], overwrite=True)
    is_faiss(index, CODES[:300], np.arange(300), codebooks=other)
    # An index that is open goes on at the version that it was opened at.
    is_faiss(filled, CODES, np.arange(5000, 6000))


def test_a_dataset_that_another_wrote_meanwhile_is_kept(uri, monkeypatch):
    real = lance_index._batches

    def batches(*arguments):
        yield from real(*arguments)
        lance.write_dataset(pa.table({"id": [7]}), uri)

    monkeypatch.setattr(lance_index, "_batches", batches)
    with pytest.raises(FileExistsError, match=r"another process wrote a Lance dataset to .* meanwhile"):
        to_lance(uri, CODEBOOKS, CODES)
    assert lance.dataset(uri).to_table()["id"].to_pylist() == [7]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"codebooks": unit(4, 64, 4)}, ValueError, "16 or 256 codewords, these have codebook_size=64"),
        ({"codebooks": unit(3, 16, 4)}, ValueError, "num_codebooks=3 must be even"),
        ({"codebooks": 2 * CODEBOOKS}, ValueError, "unit norm"),
        ({"codes": CODES[:, :3]}, ValueError, r"codes must have shape \[N, 4\]"),
        ({"codes": CODES.astype(float)}, TypeError, "codes must be integers"),
        ({"codes": CODES[:0]}, ValueError, "at least one row"),
        ({"ids": np.arange(999)}, ValueError, "1000 rows but 999 ids"),
        ({"ids": np.arange(1000) // 2}, ValueError, "id 0 is given twice"),
        ({"ids": np.arange(1000) - 1}, ValueError, "at least 0, got -1"),
        ({"ids": np.arange(1000.0)}, TypeError, "ids must be integers"),
        ({"ids": np.arange(1000, dtype=np.uint64) + 2**63}, ValueError, "at most"),
        ({"embeddings": QUERIES}, ValueError, "1000 codes but 5 embeddings"),
        ({"embeddings": unit(1000, 16)}, ValueError, "the embedding of row 0 has another code"),
        ({"columns": {"codes": range(1000)}}, ValueError, "may not have the name 'codes'"),
        ({"columns": {"label": range(10)}}, ValueError, "1000 codes but 10 rows of columns"),
    ],
)
def test_wrong_rows_are_refused_before_anything_is_written(uri, options, error, match):
    with pytest.raises(error, match=match):
        to_lance(uri, **({"codebooks": CODEBOOKS, "codes": CODES} | options))
    assert not uri.exists()


# --- Building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("segments", "built"), [(1, 1), (3, 3), (4, 4), (9, 4)])
def test_segments_built_apart_are_one_index(uri, segments, built):
    ids = np.arange(1000)
    words = CODEBOOKS[np.arange(4), CODES].reshape(-1)
    table = pa.table({"number": ids, "vector": pa.FixedSizeListArray.from_arrays(pa.array(words), 16)})
    lance.write_dataset(table, uri, max_rows_per_file=250)
    asked = []

    def fan_out(function, parts):
        asked.extend(parts)
        return [function(part) for part in reversed(parts)]

    index = build_lance_index(uri, CODEBOOKS, "vector", "number", segments, fan_out)
    assert sorted(fragment for part in asked for fragment in part) == [0, 1, 2, 3]
    assert [len(found.segments) for found in index.dataset.describe_indices()] == [built]
    is_faiss(index, CODES, ids)


def append(uri, rows, ids):
    words = CODEBOOKS[np.arange(4), rows].reshape(-1)
    arrays = [
        pa.array(ids),
        *(pa.FixedSizeListArray.from_arrays(pa.array(v), w) for v, w in ((rows.ravel(), 4), (words, 16))),
    ]
    lance.write_dataset(pa.table(arrays, names=["id", "codes", "embedding"]), uri, mode="append")


def test_appended_rows_are_refused_by_number_until_they_are_indexed(filled, uri):
    append(uri, CODES[:30], np.arange(30))
    with pytest.raises(ValueError, match=r"30 rows of .* in 1 fragments are not in the index"):
        LanceIndex(uri, CODEBOOKS)
    asked = []
    index = build_lance_index(uri, CODEBOOKS, fan_out=lambda build, parts: asked.extend(parts) or map(build, parts))
    assert asked == [[4]]
    is_faiss(index, np.concatenate([CODES[:30], CODES]), np.r_[np.arange(30), np.arange(5000, 6000)])


def test_an_appended_id_may_not_be_there_already(filled, uri):
    append(uri, CODES[:2], np.array([7, 5003]))
    with pytest.raises(ValueError, match="id 5003 is given twice"):
        build_lance_index(uri, CODEBOOKS)


def test_changed_rows_are_refused_and_deleted_rows_are_gone(filled, uri):
    filled.dataset.delete("id < 5250 OR id = 5999")
    index = LanceIndex(uri, CODEBOOKS)
    is_faiss(index, CODES[250:999], np.arange(5250, 5999))
    index.dataset.update({"id": "id + 10000"}, where="id >= 5900")
    with pytest.raises(ValueError, match=r"99 rows of .* are not in the index"):
        LanceIndex(uri, CODEBOOKS)
    ids = np.r_[np.arange(5250, 5900), np.arange(15900, 15999)]
    is_faiss(build_lance_index(uri, CODEBOOKS), CODES[250:999], ids)


def test_compacted_rows_are_the_same(filled, uri):
    filled.dataset.optimize.compact_files()
    assert len(lance.dataset(uri).get_fragments()) == 1
    is_faiss(LanceIndex(uri, CODEBOOKS), CODES, np.arange(5000, 6000))


def test_an_index_of_other_codebooks_is_refused_and_replaced(filled, uri):
    other = unit(4, 256, 4, seed=9)
    with pytest.raises(ValueError, match="was built from other codebooks"):
        LanceIndex(uri, other)
    with pytest.raises(ValueError, match=r"a list of 32 float32"):
        LanceIndex(uri, unit(8, 256, 4))
    with pytest.raises(ValueError, match=r"codebooks of shape \[4, 256, 4\], expected \[2, 256, 8\]"):
        LanceIndex(uri, unit(2, 256, 8))
    # Another processor normalises with other last bits.
    assert LanceIndex(uri, (CODEBOOKS * (1 + 1e-7)).astype(np.float32)).ntotal == 1000
    index = build_lance_index(uri, other)
    exact = build_index(other)
    exact.add(CODEBOOKS[np.arange(4), CODES].reshape(1000, 16))
    is_faiss(index, exact.codes_array(), np.arange(5000, 6000), codebooks=other)


def own_index(uri, kind="IVF_PQ", **options):
    """An index as a user of Lance may build it."""
    dataset = lance.dataset(uri)
    given = {"metric": "l2", "ivf_centroids": np.zeros((1, 16), np.float32), "pq_codebook": CODEBOOKS} | options
    partitions = len(given["ivf_centroids"])
    return dataset.create_index("embedding", kind, num_partitions=partitions, num_sub_vectors=4, **given)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"metric": "dot"}, "no IVF_PQ index of the metric l2"),
        ({"metric": "cosine"}, "no IVF_PQ index of the metric l2"),
        ({"kind": "IVF_HNSW_PQ"}, "no IVF_PQ index of the metric l2"),
        ({"kind": "IVF_FLAT", "pq_codebook": None}, "no IVF_PQ index of the metric l2"),
        ({"ivf_centroids": np.full((1, 16), 0.1, np.float32)}, "other centroids than a single one of zeros"),
        ({"ivf_centroids": np.eye(2, 16, dtype=np.float32) - 1}, "other centroids"),
        ({"pq_codebook": unit(4, 256, 4, seed=4)}, "was built from other codebooks"),
    ],
)
def test_an_index_of_the_same_name_that_differs_is_refused(filled, uri, options, match):
    own_index(uri, name="tcq", replace=True, **options)
    with pytest.raises(ValueError, match=match):
        LanceIndex(uri, CODEBOOKS)
    is_faiss(build_lance_index(uri, CODEBOOKS), CODES, np.arange(5000, 6000))


def test_a_second_index_of_the_column_is_refused(filled, uri):
    own_index(uri, name="mine", pq_codebook=unit(4, 256, 4, seed=4))
    with pytest.raises(ValueError, match=r"index 'mine' .* was built from other codebooks"):
        LanceIndex(uri, CODEBOOKS)
    with pytest.raises(ValueError, match=r"drop_index\('mine'\)"):
        build_lance_index(uri, CODEBOOKS)
    lance.dataset(uri).drop_index("mine")
    is_faiss(LanceIndex(uri, CODEBOOKS), CODES, np.arange(5000, 6000))


def test_no_index_and_no_dataset_are_named(filled, uri, tmp_path):
    filled.dataset.drop_index("tcq")
    with pytest.raises(ValueError, match="has no index; build_lance_index builds it"):
        LanceIndex(uri, CODEBOOKS)
    for ask in (LanceIndex, build_lance_index):
        with pytest.raises(FileNotFoundError, match=r"no Lance dataset at .*absent\.lance"):
            ask(tmp_path / "absent.lance", CODEBOOKS)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"column": "vector"}, r"no column 'vector'; its columns are \['id', 'codes', 'embedding'\]"),
        ({"id_column": "name"}, "no column 'name'"),
        ({"column": "codes"}, "'codes' must be a list of 16 float32"),
        ({"id_column": "embedding"}, "'embedding' must hold integers"),
    ],
)
def test_wrong_columns_are_refused(filled, uri, options, match):
    for ask in (LanceIndex, build_lance_index):
        with pytest.raises(ValueError, match=match):
            ask(uri, CODEBOOKS, **options)


def test_rows_without_a_finite_vector_and_no_segments_are_refused(filled, uri):
    with pytest.raises(ValueError, match="segments must be at least 1, got 0"):
        build_lance_index(uri, CODEBOOKS, segments=0)
    table = filled.dataset.to_table(limit=2).set_column(0, "id", pa.array([1, 2]))
    lance.write_dataset(table.set_column(2, "embedding", pa.nulls(2, pa.list_(pa.float32(), 16))), uri, mode="append")
    with pytest.raises(ValueError, match="2 rows have no finite vector in column 'embedding'"):
        build_lance_index(uri, CODEBOOKS)
    words = np.where(np.arange(32) == 20, np.nan, 1).astype(np.float32)
    broken = pa.FixedSizeListArray.from_arrays(pa.array(words), 16)
    filled.dataset.checkout_version(filled.dataset.version).restore()
    lance.write_dataset(table.set_column(2, "embedding", broken), uri, mode="append")
    with pytest.raises(ValueError, match="1 rows have no finite vector in column 'embedding'"):
        build_lance_index(uri, CODEBOOKS)


def test_without_lance_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lance", None)
    for name in ("lance_files", "lance_index"):
        monkeypatch.delitem(sys.modules, f"tcq_hf.index.{name}")
    with pytest.raises(ImportError, match=r"pip install 'tcq_hf\[lance\]'"):
        import tcq_hf.index.lance_index  # noqa: F401
