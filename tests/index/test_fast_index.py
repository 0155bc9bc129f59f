"""FastIndex: exact scores, nearly all of the best rows, and rows that change, against the exact index."""

import copy
import pickle
import weakref

import faiss
import numpy as np
import pytest
from clustered_codes import SCORE_TOLERANCE, collection, overlap
from datasets import Dataset, Features, List, Value

from tcq_hf import add_code_index, build_index, load_index, save_index
from tcq_hf.index import fast_index
from tcq_hf.index.code_index import CodeIndex
from tcq_hf.index.dataset_index import attach_index
from tcq_hf.index.faiss_index import check_index_belongs, index_codebooks, read_recipe
from tcq_hf.index.fast_index import FastIndex
from tcq_hf.index.gpu_index import zero_coarse_index
from tcq_hf.index.shadow import make_shadow


@pytest.fixture(scope="module", params=[256, 16, 4], ids=lambda size: f"K{size}")
def data(request):
    return collection(request.param)


@pytest.fixture(scope="module")
def large():
    return collection()


@pytest.fixture(scope="module")
def small():
    return collection(16, count=2000)


def same_rows(fast, codes):
    """Whether both members hold these rows."""
    np.testing.assert_array_equal(fast.codes_array(), codes)
    assert fast.ntotal == fast.scan.ntotal == fast.base_index.ntotal == len(codes)
    assert fast._scans_its_rows()


# --- Search ----------------------------------------------------------------------------------------------------------


def test_scores_are_exact_and_nearly_all_of_the_best_rows_are_found(data):
    codebooks, codes, queries = data
    exact, fast = (build_index(codebooks, codes, mode=mode) for mode in ("exact", "fast"))
    for k in (1, 10, 100, 1000):
        scores, rows = fast.search(queries, k)
        words = codebooks[np.arange(8), codes[rows]].reshape(*rows.shape, -1)
        assert np.abs(scores - np.einsum("qd,qkd->qk", queries, words)).max() <= SCORE_TOLERANCE
        assert (np.diff(scores, axis=1) <= 0).all()
        assert all(len({*row}) == k for row in rows.tolist())
        assert overlap(fast, exact, queries, k) >= 0.99


def test_all_rows_may_be_asked_for(large):
    codebooks, codes, queries = large
    exact, fast = (build_index(codebooks, codes[:3000], mode=mode) for mode in ("exact", "fast"))
    for ours, theirs in zip(fast.search(queries[:3], 3000), exact.search(queries[:3], 3000), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 999, 1001])
def test_few_rows_are_found_as_by_the_exact_index(large, count):
    codebooks, codes, queries = large
    exact, fast = (build_index(codebooks, codes[:count], mode=mode) for mode in ("exact", "fast"))
    k = min(count, 10)
    np.testing.assert_array_equal(fast.search(queries, k)[0], exact.search(queries, k)[0])


def test_it_scans_in_the_way_that_is_fastest_here_and_any_finds_the_same(large, tmp_path):
    codebooks, codes, queries = large
    fast = build_index(codebooks, codes, mode="fast")
    chosen = fast.scan.implem
    assert chosen in fast_index._IMPLEMENTATIONS
    found = []
    for fast.scan.implem in fast_index._IMPLEMENTATIONS:
        found.append(fast.search(queries, 100)[0])
    np.testing.assert_array_equal(*found)
    # A file from another machine.
    fast.scan.implem = sum(fast_index._IMPLEMENTATIONS) - chosen
    save_index(fast, tmp_path / "fast.faiss")
    assert load_index(tmp_path / "fast.faiss").scan.implem == chosen


def test_the_depth_is_read_with_the_number_of_rows_asked_for(large):
    codebooks, codes, queries = large
    fast = build_index(codebooks, codes, mode="fast")
    assert 1 < fast.k_factor < fast_index._DEEPEST * fast_index._MARGIN + 0.02
    deeper = faiss.IndexRefineSearchParameters(k_factor=200)
    scores = fast.search(queries, 10, params=deeper)[0]
    exact = build_index(codebooks, codes)
    assert (scores >= exact.search(queries, 10)[0] - 1e-6).mean() >= overlap(fast, exact, queries, 10)


def test_a_large_collection_is_measured_on_a_part(large, monkeypatch):
    codebooks, codes, queries = large
    monkeypatch.setattr("tcq_hf.index.fast_index._SAMPLE_ROWS", 4000)
    exact, fast = (build_index(codebooks, codes, mode=mode) for mode in ("exact", "fast"))
    # A quarter of the rows tells the depth at a quarter of the rank; half of the error is granted for that.
    assert overlap(fast, exact, queries, 100) >= 0.985


def test_range_search_and_reconstruction_are_those_of_the_exact_index(large):
    codebooks, codes, queries = large
    exact, fast = (build_index(codebooks, codes, mode=mode) for mode in ("exact", "fast"))
    for ours, theirs in zip(fast.range_search(queries[:5], 6.5), exact.range_search(queries[:5], 6.5), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(fast.reconstruct_n(3, 40), exact.reconstruct_n(3, 40))


def test_a_selector_that_faiss_would_ignore_is_refused(small):
    fast = build_index(*small[:2], mode="fast")
    chosen = faiss.IndexRefineSearchParameters(k_factor=2, sel=faiss.IDSelectorRange(5, 10))
    for search in (fast.search, fast.search_and_reconstruct):
        with pytest.raises(ValueError, match="does not take the selector in params"):
            search(small[2], 3, params=chosen)


def test_assign_and_search_and_reconstruct_look_as_deep_as_search(large):
    """FAISS's own would take `k_factor` times k."""
    codebooks, codes, queries = large
    fast = build_index(codebooks, codes, mode="fast")
    scores, rows = fast.search(queries, 1)
    np.testing.assert_array_equal(fast.assign(queries, 1), rows)
    found = fast.search_and_reconstruct(queries, 1)
    np.testing.assert_array_equal(found[0], scores)
    np.testing.assert_array_equal(found[1], rows)
    np.testing.assert_array_equal(found[2], codebooks[np.arange(8), codes[rows]].reshape(300, 1, -1))


def test_a_member_keeps_the_index_that_frees_it(small):
    fast = build_index(*small[:2], mode="fast")
    owner, members = weakref.ref(fast), [fast.exact, fast.scan]
    del fast
    for _ in range(2):
        assert owner() is not None
        members.pop()
    assert owner() is None


def test_a_codes_column_gets_a_fast_index(large):
    codebooks, codes, _ = large
    column = Features({"codes": List(Value("uint8"), length=8)})
    dataset = add_code_index(Dataset.from_dict({"codes": codes}, features=column), "codes", codebooks, "fast", "fast")
    fast = dataset.get_index("fast").faiss_index
    assert type(fast) is FastIndex
    same_rows(fast, codes)


def test_it_searches_through_datasets(large):
    codebooks, codes, queries = large
    fast = build_index(codebooks, codes, mode="fast")
    dataset = attach_index(Dataset.from_dict({"row": range(len(codes))}), fast, "codes")
    scores, rows = dataset.search("codes", queries[0], k=5)
    np.testing.assert_array_equal(scores, fast.search(queries[:1], 5)[0][0])
    assert dataset.get_nearest_examples("codes", queries[0], k=5).examples["row"] == list(rows)


# --- Rows that change ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(0, 20_000), (7, 20, 5, 19_968), (12_000, 33, 7967)])
def test_rows_added_in_parts_are_the_rows(data, parts):
    codebooks, codes, queries = data
    fast, start = build_index(codebooks, mode="fast"), 0
    for part in parts:
        fast.add_codes(codes[start : start + part])
        start += part
    same_rows(fast, codes)
    assert overlap(fast, build_index(codebooks, codes), queries, 10) >= 0.99


def test_floats_are_encoded_as_by_the_exact_index(data):
    """`IndexRefine.add` would encode them once for each member, differently."""
    codebooks, codes, queries = data
    exact, fast = (build_index(codebooks, codes, mode=mode) for mode in ("exact", "fast"))
    for index in (exact, fast):
        index.add(queries)
    same_rows(fast, exact.codes_array())


def test_a_dataset_may_fill_it_with_embeddings(large):
    codebooks, _, queries = large
    dataset = Dataset.from_dict({"embedding": queries.tolist()})
    dataset.add_faiss_index("embedding", custom_index=build_index(codebooks, mode="fast"))
    exact = build_index(codebooks)
    exact.add(queries)
    same_rows(dataset.get_index("embedding").faiss_index, exact.codes_array())


def test_removed_rows_are_gone(data):
    codebooks, codes, queries = data
    fast = build_index(codebooks, codes, mode="fast")
    gone = np.random.default_rng(0).permutation(len(codes))[:7000]
    assert fast.remove_ids(gone) == 7000
    kept = np.delete(codes, gone, axis=0)
    same_rows(fast, kept)
    assert overlap(fast, build_index(codebooks, kept), queries, 10) >= 0.99


@pytest.mark.parametrize("modes", [("fast", "fast"), ("fast", "exact"), ("exact", "fast"), ("exact", "exact")])
def test_merging_moves_all_rows(large, modes):
    codebooks, codes, _ = large
    into = build_index(codebooks, codes[:5000], mode=modes[0])
    other = build_index(codebooks, codes[5000:], mode=modes[1])
    into.merge_from(other)
    np.testing.assert_array_equal(into.codes_array(), codes)
    assert other.ntotal == 0
    if modes[0] == "fast":
        same_rows(into, codes)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_rows_of_other_codebooks_are_not_merged(large, mode):
    codebooks, codes, _ = large
    index = build_index(codebooks, codes[:50], mode=mode)
    for other in (build_index(codebooks[:, ::-1], codes[:50]), index):
        with pytest.raises(ValueError, match="another index with the same codebooks"):
            index.merge_from(other)
    with pytest.raises(ValueError, match="add_id must be 0, got 5"):
        index.merge_from(build_index(codebooks), 5)
    assert index.ntotal == 50


def test_a_reset_index_takes_rows_again(large):
    codebooks, codes, _ = large
    fast = build_index(codebooks, codes, mode="fast")
    fast.reset()
    same_rows(fast, codes[:0])
    fast.add_codes(codes[:70])
    same_rows(fast, codes[:70])


# --- Codebooks -------------------------------------------------------------------------------------------------------


def test_invariant_5_it_refuses_to_train(large):
    codebooks, codes, queries = large
    fast = build_index(codebooks, codes[:100], mode="fast")
    with pytest.raises(RuntimeError, match="learned codebooks"):
        fast.train(queries)
    np.testing.assert_array_equal(index_codebooks(fast), codebooks)
    check_index_belongs(fast, codebooks)
    with pytest.raises(ValueError, match="belongs to another model"):
        check_index_belongs(fast, codebooks[:, ::-1])


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
def test_a_copy_is_the_index(large, duplicate):
    codebooks, codes, queries = large
    fast = build_index(codebooks, codes[:3000], mode="fast")
    twin = duplicate(fast)
    np.testing.assert_array_equal(twin.search(queries, 5)[1], fast.search(queries, 5)[1])
    twin.add_codes(codes[3000:3010])
    same_rows(twin, codes[:3010])
    same_rows(fast, codes[:3000])


def test_the_form_for_gpus_is_made_of_the_exact_codes(large):
    codebooks, codes, queries = large
    exact, fast = (build_index(codebooks, codes[:2000], mode=mode) for mode in ("exact", "fast"))
    scores = zero_coarse_index(fast, 4).search(queries, 20)[0]
    assert np.abs(scores - exact.search(queries, 20)[0]).max() <= SCORE_TOLERANCE


# --- Files -----------------------------------------------------------------------------------------------------------


def test_a_saved_index_is_the_index(data, tmp_path):
    codebooks, codes, queries = data
    fast = build_index(codebooks, codes, mode="fast")
    save_index(fast, tmp_path / "index.faiss")
    assert read_recipe(tmp_path / "index.faiss")["mode"] == "fast"
    loaded = load_index(tmp_path / "index.faiss", codebooks)
    assert type(loaded) is FastIndex
    assert loaded.k_factor == fast.k_factor
    for ours, theirs in zip(loaded.search(queries, 20), fast.search(queries, 20), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    loaded.add_codes(codes[:45])
    same_rows(loaded, np.concatenate([codes, codes[:45]]))


def test_plain_faiss_and_datasets_read_the_file(large, tmp_path):
    codebooks, codes, queries = large
    fast = build_index(codebooks, codes, mode="fast")
    save_index(fast, tmp_path / "index.faiss")
    plain = faiss.read_index(str(tmp_path / "index.faiss"))
    assert type(plain) is faiss.IndexRefine
    np.testing.assert_array_equal(plain.search(queries, 100)[1], fast.search(queries, 100)[1])
    dataset = Dataset.from_dict({"row": range(len(codes))})
    dataset.load_faiss_index("codes", tmp_path / "index.faiss")
    np.testing.assert_array_equal(dataset.search("codes", queries[0], k=100)[1], plain.search(queries[:1], 100)[1][0])


def test_it_takes_at_most_twice_the_bytes_of_its_codes(large, tmp_path):
    codebooks, codes, _ = large
    sizes = []
    for rows in (10_000, 20_000):
        save_index(build_index(codebooks, codes[:rows], mode="fast"), tmp_path / "index.faiss")
        sizes.append((tmp_path / "index.faiss").stat().st_size)
    assert (sizes[1] - sizes[0]) / 10_000 == pytest.approx(16, abs=0.1)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(large, share, tmp_path):
    codebooks, codes, _ = large
    path = tmp_path / "index.faiss"
    save_index(build_index(codebooks, codes[:2000], mode="fast"), path)
    whole = path.read_bytes()
    (tmp_path / "index.faiss.json").unlink()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"index\.faiss.* truncated"):
        load_index(path)


def foreign(codebooks, codes):
    """Files that FAISS reads as an IndexRefine but that are no fast index, by name."""
    fast, other = (build_index(codebooks, part, mode="fast") for part in (codes[:500], codes[500:1000]))
    exact = build_index(codebooks, codes[:500])
    swapped = faiss.IndexRefine(other.base_index, exact)
    flat = faiss.IndexFlatIP(exact.d)
    flat.add(exact.reconstruct_n(0, 500))
    yield "do not belong together", swapped, (fast, other, exact)
    yield "other members", faiss.IndexRefine(flat, exact), (flat, exact)
    yield "holds a IndexRefineFlat", faiss.IndexRefine(exact, flat), (flat, exact)


@pytest.mark.parametrize("case", range(3))
def test_members_that_do_not_belong_together_are_refused(large, case, tmp_path):
    match, index, _ = list(foreign(large[0], large[1]))[case]
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    with pytest.raises(ValueError, match=match):
        load_index(tmp_path / "index.faiss")


def test_a_scan_of_another_query_is_refused(large, tmp_path):
    """The map that gives each sub-vector of the query to two books, changed."""
    fast = build_index(large[0], large[1][:500], mode="fast")
    chain = faiss.downcast_VectorTransform(faiss.downcast_index(fast.base_index).chain.at(0))
    values = faiss.vector_to_array(chain.A)
    faiss.copy_array_to_vector(np.roll(values, 1), chain.A)
    save_index(fast, tmp_path / "index.faiss")
    with pytest.raises(ValueError, match="do not belong together"):
        load_index(tmp_path / "index.faiss")


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_as_by_the_exact_index(large):
    codebooks, codes, queries = large
    fast = build_index(codebooks, codes[:200], mode="fast")
    for call, error, match in (
        (lambda: fast.search(queries[:, :-1], 3), ValueError, r"queries must have shape \[n, 32\]"),
        (lambda: fast.search(queries * np.nan, 3), ValueError, "row 0 is not"),
        (lambda: fast.search(queries, 0), ValueError, "k must be at least 1"),
        (lambda: fast.search(queries, 201), ValueError, "holds 200 rows"),
        (lambda: fast.add(np.tile(codes[:3], 4)), TypeError, "embeddings must be floats, got uint8"),
        (lambda: fast.add(queries[:, 1:]), ValueError, r"embeddings must have shape \[n, 32\]"),
        (lambda: fast.add_codes(queries[:, :8]), TypeError, "codes must be integers"),
        (lambda: fast.add_codes(codes[:, :7]), ValueError, r"shape \[N, 8\]"),
        (lambda: build_index(codebooks, mode="quick"), ValueError, "mode must be one of exact, fast, ivf, got 'quick'"),
    ):
        with pytest.raises(error, match=match):
            call()
    same_rows(fast, codes[:200])


def test_equal_rows_and_unused_words_do_no_harm():
    codebooks = collection(count=10)[0]
    fast = build_index(codebooks, np.zeros((5000, 8), np.uint8), mode="fast")
    scores, rows = fast.search(codebooks[:, 0].reshape(1, -1), 10)
    assert np.abs(scores - 8).max() <= SCORE_TOLERANCE
    assert len({*rows[0].tolist()}) == 10


def test_the_shadow_of_a_built_index_is_weighted_by_its_rows(large):
    codebooks, codes, _ = large
    usage = np.stack([np.bincount(column, minlength=256) for column in codes.T])
    fast = build_index(codebooks, codes, mode="fast")
    books = faiss.vector_to_array(fast.scan.pq.centroids)
    np.testing.assert_array_equal(books, make_shadow(codebooks, usage).books.ravel())


def test_a_mapped_index_answers_and_refuses_to_change(large, tmp_path):
    codebooks, codes, queries = large
    exact = build_index(codebooks, codes)
    save_index(exact, tmp_path / "index.faiss")
    mapped = load_index(tmp_path / "index.faiss", codebooks, mmap=True)
    assert type(mapped) is CodeIndex
    np.testing.assert_array_equal(mapped.search(queries, 10)[1], exact.search(queries, 10)[1])
    np.testing.assert_array_equal(mapped.codes_array(), codes)
    for change in (
        lambda: mapped.add(queries),
        lambda: mapped.add_codes(codes),
        lambda: mapped.add_sa_codes(codes),
        lambda: mapped.remove_ids(np.arange(3)),
        mapped.reset,
        lambda: mapped.merge_from(build_index(codebooks, codes)),
    ):
        with pytest.raises(ValueError, match="memory-mapped index is read-only"):
            change()
    assert mapped.ntotal == len(codes)
    for mode in ("exact", "fast"):
        into = build_index(codebooks, codes[:10], mode=mode)
        with pytest.raises(ValueError, match="memory-mapped index is read-only"):
            into.merge_from(mapped)
        assert into.ntotal == 10
    save_index(build_index(codebooks, codes, mode="fast"), tmp_path / "fast.faiss")
    with pytest.raises(ValueError, match="leave mmap unset"):
        load_index(tmp_path / "fast.faiss", mmap=True)
