"""IVFIndex: the model's own codes in lists, with exact scores, against the exhaustive index."""

import copy
import pickle

import faiss
import numpy as np
import pytest
from clustered_codes import SCORE_TOLERANCE, collection, overlap
from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm

from tcq_hf import add_code_index, build_index, load_index, save_index
from tcq_hf.index import ivf_index
from tcq_hf.index.dataset_index import _search_some
from tcq_hf.index.faiss_index import check_index_belongs, read_recipe
from tcq_hf.index.gpu_index import zero_coarse_index
from tcq_hf.index.ivf_index import IVFIndex


@pytest.fixture(scope="module", params=[256, 16, 64], ids=lambda size: f"K{size}")
def data(request):
    return collection(request.param)


@pytest.fixture(scope="module")
def large():
    return collection()


def test_scores_are_exact_and_as_many_rows_are_found_as_it_says(data):
    codebooks, codes, queries = data
    exact, ivf = (build_index(codebooks, codes, mode=mode) for mode in ("exact", "ivf"))
    scores, rows = ivf.search(queries, 100)
    words = codebooks[np.arange(8), codes[rows]].reshape(*rows.shape, -1)
    assert np.abs(scores - np.einsum("qd,qkd->qk", queries, words)).max() <= SCORE_TOLERANCE
    assert (np.diff(scores, axis=1) <= 0).all()
    assert all(len({*row}) == 100 for row in rows.tolist())
    assert ivf.recall >= 0.95
    # Measured on 128 noisy rows, checked on 300 queries: three standard errors of both means.
    limits = exact.search(queries, 100)[0][:, -1:] - 1e-6
    found = (scores >= limits).mean(axis=1)
    assert found.mean() >= 0.95 - 3 * found.std() * np.sqrt(1 / 128 + 1 / 300)


def test_it_looks_into_few_of_its_lists(large):
    ivf = build_index(*large[:2], mode="ivf")
    assert ivf.nlist == 128  # the power of two next to sqrt(20,000) = 141
    assert ivf.nprobe <= 16
    sizes = [ivf.invlists.list_size(number) for number in range(ivf.nlist)]
    assert sum(sizes) == 20_000
    assert max(sizes) < 20 * 20_000 / 128


def test_all_lists_give_the_exhaustive_search(data):
    codebooks, codes, queries = data
    exact, ivf = (build_index(codebooks, codes, mode=mode) for mode in ("exact", "ivf"))
    ivf.nprobe = ivf.nlist
    np.testing.assert_allclose(ivf.search(queries, 50)[0], exact.search(queries, 50)[0], atol=SCORE_TOLERANCE)


def test_more_lists_find_more(large):
    codebooks, codes, queries = large
    exact, ivf = (build_index(codebooks, codes, mode=mode) for mode in ("exact", "ivf"))
    found = []
    for ivf.nprobe in (1, 4, 16, 128):
        found.append(overlap(ivf, exact, queries, 100))
    assert found == sorted(found)
    assert found[0] < 0.9
    assert found[-1] == 1


@pytest.mark.parametrize("count", [1, 2, 33, 1000])
def test_so_many_rows_as_asked_for_are_found(large, count):
    codebooks, codes, queries = large
    ivf = build_index(codebooks, codes[:count], mode="ivf")
    scores, rows = ivf.search(queries, count)
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(count), (len(queries), 1)))
    assert (np.diff(scores, axis=1) <= 0).all()
    for k, match in ((0, "at least 1, got 0"), (count + 1, f"holds {count} rows")):
        with pytest.raises(ValueError, match=match):
            ivf.search(queries, k)


def test_range_search_looks_into_all_lists(large):
    codebooks, codes, queries = large
    exact, ivf = (build_index(codebooks, codes, mode=mode) for mode in ("exact", "ivf"))
    # A threshold that no score is near, so that rounding decides nothing.
    scores = np.sort(np.concatenate(exact.search(queries[:5], 200)[0]))
    gap = np.argmax(np.diff(scores))
    threshold = float(scores[gap : gap + 2].mean())
    found = [index.range_search(queries[:5], threshold) for index in (exact, ivf)]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    for start, stop in zip(found[0][0][:-1], found[0][0][1:], strict=True):
        assert {*found[0][2][start:stop]} == {*found[1][2][start:stop]}


def test_rows_are_restored_and_a_map_of_them_stands_in_no_ones_way(data):
    codebooks, codes, _ = data
    exact, ivf = (build_index(codebooks, codes[:2000], mode=mode) for mode in ("exact", "ivf"))
    np.testing.assert_array_equal(ivf.reconstruct_n(7, 50), exact.reconstruct_n(7, 50))
    for change in (lambda: ivf.add_codes(codes[:10]), lambda: ivf.remove_ids(np.arange(3))):
        ivf.make_direct_map()
        np.testing.assert_array_equal(ivf.reconstruct(5), exact.reconstruct(5))
        change()
    np.testing.assert_array_equal(ivf.codes_array(), np.concatenate([codes[3:2000], codes[:10]]))


def test_rows_whose_scores_are_not_finite_are_not_looked_for_for_ever(monkeypatch):
    codebooks, asked, parameters = np.abs(collection()[0]), [], faiss.SearchParametersIVF
    ivf = build_index(codebooks, np.random.default_rng(0).integers(256, size=(500, 8)), mode="ivf")
    ivf.nprobe = 1

    def noted(nprobe):
        asked.append(nprobe)
        assert len(asked) < 20
        return parameters(nprobe=nprobe)

    monkeypatch.setattr(faiss, "SearchParametersIVF", noted)
    rows = ivf.search(np.full((1, 32), -3e38, np.float32), 3)[1]
    np.testing.assert_array_equal(rows, np.full((1, 3), -1))
    assert asked[-1] == ivf.nlist


def test_other_ways_to_search_find_the_same(large):
    codebooks, codes, queries = large
    ivf = build_index(codebooks, codes[:1000], mode="ivf")
    ivf.nprobe = 1
    scores, rows = ivf.search(queries, 100)  # more than a list holds
    np.testing.assert_array_equal(ivf.assign(queries, 100), rows)
    found = ivf.search_and_reconstruct(queries, 100)
    np.testing.assert_array_equal(found[0], scores)
    np.testing.assert_array_equal(found[1], rows)
    np.testing.assert_array_equal(found[2], codebooks[np.arange(8), codes[rows]].reshape(300, 100, -1))


def test_centres_are_those_of_one_run_of_k_means_and_shown_as_they_come(large, monkeypatch):
    codebooks, codes, _ = large
    exact, shown = build_index(codebooks, codes[:4096]), []

    def bar(rounds, **options):
        for each in tqdm(rounds, **options):
            shown.append(options["desc"])
            yield each

    monkeypatch.setattr(ivf_index, "tqdm", bar)
    centres = ivf_index._centres(exact, 64)
    means = faiss.Kmeans(exact.d, 64, niter=10, seed=0, spherical=True, gpu=False)
    means.train(exact.reconstruct_n(0, 4096))
    np.testing.assert_array_equal(centres.reconstruct_n(0, 64), means.centroids)
    assert shown == 10 * ["Centres of lists"]


# --- Rows that change ------------------------------------------------------------------------------------------------


def test_codes_leave_it_as_they_came(data):
    codebooks, codes, queries = data
    ivf = build_index(codebooks, codes[:5000], mode="ivf")
    ivf.add_codes(codes[5000:])
    np.testing.assert_array_equal(ivf.codes_array(), codes)
    exact = build_index(codebooks, codes)
    for index in (exact, ivf):
        index.add(queries)
    np.testing.assert_array_equal(ivf.codes_array(), exact.codes_array())


def test_removed_rows_are_gone_and_those_behind_move_up(data):
    codebooks, codes, queries = data
    ivf = build_index(codebooks, codes, mode="ivf")
    gone = np.random.default_rng(0).permutation(len(codes))[:7000]
    assert ivf.remove_ids(gone) == 7000
    kept = np.delete(codes, gone, axis=0)
    np.testing.assert_array_equal(ivf.codes_array(), kept)
    assert overlap(ivf, build_index(codebooks, kept), queries, 100) >= 0.9
    ivf.reset()
    assert ivf.ntotal == 0
    ivf.add_codes(codes[:70])
    np.testing.assert_array_equal(ivf.codes_array(), codes[:70])


@pytest.mark.parametrize("modes", [("ivf", "exact"), ("exact", "ivf"), ("fast", "ivf"), ("ivf", "ivf")])
def test_merging_moves_all_rows(large, modes):
    codebooks, codes, _ = large
    into, other = build_index(codebooks, codes[:5000], modes[0]), build_index(codebooks, codes[5000:], modes[1])
    into.merge_from(other)
    np.testing.assert_array_equal(into.codes_array(), codes)
    assert other.ntotal == 0


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
def test_a_copy_is_the_index(large, duplicate):
    codebooks, codes, queries = large
    ivf = build_index(codebooks, codes[:3000], mode="ivf")
    twin = duplicate(ivf)
    np.testing.assert_array_equal(twin.search(queries, 5)[1], ivf.search(queries, 5)[1])
    twin.add_codes(codes[3000:3010])
    np.testing.assert_array_equal(twin.codes_array(), codes[:3010])
    assert ivf.ntotal == 3000


# --- Files and datasets ----------------------------------------------------------------------------------------------


def test_a_saved_index_is_the_index(data, tmp_path):
    codebooks, codes, queries = data
    ivf = build_index(codebooks, codes, mode="ivf")
    save_index(ivf, tmp_path / "index.faiss")
    assert read_recipe(tmp_path / "index.faiss")["mode"] == "ivf"
    loaded = load_index(tmp_path / "index.faiss", codebooks)
    assert type(loaded) is IVFIndex
    assert (loaded.nprobe, loaded.recall) == (ivf.nprobe, None)
    for ours, theirs in zip(loaded.search(queries, 20), ivf.search(queries, 20), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    plain = faiss.read_index(str(tmp_path / "index.faiss"))
    assert type(plain) is faiss.IndexIVFPQ
    np.testing.assert_array_equal(plain.search(queries, 20)[0], ivf.search(queries, 20)[0])


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_refused(large, share, tmp_path):
    save_index(build_index(*large[:2], mode="ivf"), tmp_path / "index.faiss")
    (tmp_path / "index.faiss.json").unlink()
    whole = (tmp_path / "index.faiss").read_bytes()
    (tmp_path / "index.faiss").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="truncated"):
        load_index(tmp_path / "index.faiss")


def test_files_of_another_kind_are_refused(large, tmp_path):
    codebooks, codes, _ = large
    path = str(tmp_path / "index.faiss")
    faiss.write_index(zero_coarse_index(build_index(codebooks, codes), 4), path)
    with pytest.raises(ValueError, match="holds codes of residuals to its lists"):
        load_index(path)
    ivf = build_index(codebooks, codes, mode="ivf")
    faiss.write_index(ivf, path)
    with pytest.raises(ValueError, match="has to be read into memory"):
        load_index(path, mmap=True)
    with pytest.raises(ValueError, match="belongs to another model"):
        load_index(path, codebooks[:, ::-1])


def test_rows_with_numbers_of_their_own_are_refused(large, tmp_path):
    codebooks, codes, _ = large
    ivf = build_index(codebooks, codes[:100], mode="ivf")
    faiss.IndexIVFPQ.remove_ids(ivf, np.array([3]))
    faiss.write_index(ivf, str(tmp_path / "index.faiss"))
    with pytest.raises(ValueError, match="not numbered by their place"):
        load_index(tmp_path / "index.faiss")


def test_it_searches_through_datasets_and_a_filter(large):
    codebooks, codes, queries = large
    column = Features({"codes": List(Value("uint8"), length=8)})
    dataset = add_code_index(Dataset.from_dict({"codes": codes}, features=column), "codes", codebooks, mode="ivf")
    ivf = dataset.get_index("codes").faiss_index
    scores, rows = dataset.search("codes", queries[0], k=5)
    np.testing.assert_array_equal(rows, ivf.search(queries[:1], 5)[1][0])
    some = np.arange(3, 20_000, 7)
    scores, rows = _search_some(ivf, some, queries[0], 5)
    np.testing.assert_array_equal(scores, build_index(codebooks, codes[some]).search(queries[:1], 5)[0])
    assert (rows % 7 == 3).all()


def test_invariant_5_it_refuses_to_train(large):
    codebooks, codes, queries = large
    ivf = build_index(codebooks, codes[:100], mode="ivf")
    with pytest.raises(RuntimeError, match="learned codebooks"):
        ivf.train(queries)
    np.testing.assert_array_equal(ivf.codebooks(), codebooks)
    check_index_belongs(ivf, codebooks)
    with pytest.raises(ValueError, match="belongs to another model"):
        check_index_belongs(ivf, codebooks[:, ::-1])


def test_lists_cannot_be_learned_from_nothing(large):
    with pytest.raises(ValueError, match="learns its lists from rows"):
        build_index(large[0], mode="ivf")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda ivf: ivf.add_codes(np.full((2, 8), 999)), ValueError, "below codebook_size=256, got 999 in row 0"),
        (lambda ivf: ivf.add_codes(np.zeros((2, 8))), TypeError, "codes must be integers"),
        (lambda ivf: ivf.add(np.full((1, 32), np.nan, np.float32)), ValueError, "row 0 is not"),
        (lambda ivf: ivf.search(np.zeros((1, 31), np.float32), 1), ValueError, r"shape \[n, 32\], got \[1, 31\]"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(large, call, error, match):
    ivf = build_index(large[0], large[1][:100], mode="ivf")
    with pytest.raises(error, match=match):
        call(ivf)
    np.testing.assert_array_equal(ivf.codes_array(), large[1][:100])
