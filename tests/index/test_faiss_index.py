"""faiss_index against the torch quantizer, plain FAISS, damaged files and a full disk."""

import copy
import json
import os
import pickle
import subprocess
import sys

import faiss
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value

from tcq_hf import TCQConfig, TCQModel, add_code_index, build_index, load_index, save_index
from tcq_hf.index.faiss_index import check_index_belongs, index_codebooks, read_recipe
from tcq_hf.index.gpu_index import zero_coarse_index
from tcq_hf.index.tensor_files import save_tensors
from tcq_hf.model.quantization_tcq import ProductQuantizer

# A score sums M inner products of unit vectors in float32: rounding is near M * 2^-24 a term, far below this.
SCORE_TOLERANCE = 1e-5


def random_codebooks(num_codebooks=4, codebook_size=16, sub_dim=8, seed=0):
    drawn = np.random.default_rng(seed).standard_normal((num_codebooks, codebook_size, sub_dim))
    return (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(np.float32)


def random_codes(count, codebooks, seed=1):
    return np.random.default_rng(seed).integers(0, codebooks.shape[1], (count, codebooks.shape[0])).astype(np.uint8)


def random_embeddings(count, codebooks, seed=2):
    books, _, sub_dim = codebooks.shape
    drawn = np.random.default_rng(seed).standard_normal((count, books, sub_dim))
    return (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(np.float32).reshape(count, -1)


def adc(queries, codes, codebooks):
    """Slow lookup-table sum in float64, `[Q, N]`."""
    books, _, sub_dim = codebooks.shape
    table = np.einsum("qmd,mkd->qmk", queries.reshape(-1, books, sub_dim).astype(float), codebooks.astype(float))
    return sum(table[:, m, codes[:, m]] for m in range(books))


def by_row(scores, ids):
    """Search results in the order of the rows."""
    assert all(sorted(row) == list(range(ids.shape[1])) for row in ids.tolist())
    ordered = np.empty_like(scores)
    np.put_along_axis(ordered, ids, scores, axis=1)
    return ordered


@pytest.fixture
def codebooks():
    return random_codebooks()


@pytest.fixture
def filled(codebooks):
    return build_index(codebooks, random_codes(200, codebooks))


@pytest.fixture
def queries(codebooks):
    return random_embeddings(7, codebooks, seed=9)


@pytest.fixture(params=[256, 16], ids=["K256", "K16"], scope="module")
def encoded(request):
    """A quantizer and 20,000 embeddings with its codes."""
    torch.manual_seed(3)
    quantizer = ProductQuantizer(8, request.param, 16, 10.0).requires_grad_(False)
    torch.nn.init.normal_(quantizer.codebooks)
    embeddings = quantizer.normalize(torch.randn(20_000, 128))
    return quantizer, embeddings, quantizer.codes(quantizer.lookup_table(embeddings))


def stored_codes(index):
    packed = faiss.vector_to_array(index.codes).reshape(index.ntotal, -1)
    bits = np.unpackbits(packed, axis=1, bitorder="little")[:, : index.pq.M * index.pq.nbits]
    return bits.reshape(len(bits), index.pq.M, index.pq.nbits) @ (1 << np.arange(index.pq.nbits))


# --- Invariant 1 -----------------------------------------------------------------------------------------------------


def test_invariant_1_add_stores_the_models_codes(encoded):
    quantizer, embeddings, codes = encoded
    index = build_index(quantizer.normalized_codebooks().numpy())
    index.add(embeddings.numpy())
    assert (stored_codes(index) == codes.numpy()).mean() >= 0.9999


@pytest.mark.parametrize("codebook_size", [16, 256])
def test_invariant_1_holds_for_the_forward_pass_of_a_model(tiny_config, codebook_size):
    torch.manual_seed(5)
    model = TCQModel(TCQConfig(**tiny_config.to_diff_dict() | {"codebook_size": codebook_size})).eval()
    with torch.no_grad():
        output = model(features=torch.randn(5000, 32))
    index = build_index(model)
    index.add(output.embeddings.numpy())
    assert (stored_codes(index) == output.codes.numpy()).mean() >= 0.9999


def test_invariant_1_scores_are_the_lookup_table_sum(encoded):
    quantizer, _, codes = encoded
    index = build_index(quantizer.normalized_codebooks().numpy(), codes.numpy())
    queries = quantizer.normalize(torch.randn(5, 128))
    table = quantizer.lookup_table(queries)
    expected = sum(table[:, m][:, codes[:, m].long()] for m in range(8)).numpy()
    found = by_row(*index.search(queries.numpy(), len(codes)))
    assert np.abs(found - expected).max() <= SCORE_TOLERANCE


def test_invariant_1_inner_product_order_is_the_l2_order(encoded):
    quantizer, _, codes = encoded
    codebooks = quantizer.normalized_codebooks().numpy()
    index, other = build_index(codebooks, codes.numpy()), faiss.IndexPQ(128, 8, index_bits(codebooks), faiss.METRIC_L2)
    faiss.copy_array_to_vector(codebooks.ravel(), other.pq.centroids)
    other.is_trained = True
    other.add_sa_codes(faiss.vector_to_array(index.codes).reshape(index.ntotal, -1))
    queries = quantizer.normalize(torch.randn(3, 128)).numpy()
    scores = by_row(*index.search(queries, index.ntotal))
    distances, ids = other.search(queries, index.ntotal)
    assert np.abs(by_row(distances, ids) - (16 - 2 * scores)).max() <= 16 * SCORE_TOLERANCE
    assert np.diff(np.take_along_axis(scores, ids, axis=1)).max() <= SCORE_TOLERANCE


def index_bits(codebooks):
    return int(np.log2(codebooks.shape[1]))


def test_invariant_1_add_equals_add_codes(encoded):
    quantizer, embeddings, _ = encoded
    embeddings = embeddings[:500]
    codes = quantizer.codes(quantizer.lookup_table(embeddings)).numpy()
    by_floats, by_codes = (build_index(quantizer.normalized_codebooks().numpy()) for _ in range(2))
    by_floats.add(embeddings.numpy())
    by_codes.add_codes(codes)
    queries = quantizer.normalize(torch.randn(5, 128)).numpy()
    np.testing.assert_array_equal(by_row(*by_floats.search(queries, 500)), by_row(*by_codes.search(queries, 500)))


def test_invariant_1_embedding_column_and_codes_column_give_one_search(model):
    with torch.no_grad():
        output = model(features=torch.randn(300, 32, generator=torch.Generator().manual_seed(4)))
    columns = {"embedding": output.embeddings.numpy(), "codes": output.codes.numpy()}
    dataset = Dataset.from_dict(columns, features=code_features(model))
    dataset.add_faiss_index("embedding", custom_index=build_index(model))
    add_code_index(dataset, "codes", model)
    query = output.embeddings[:9].numpy()
    floats, codes = (
        by_row(*map(np.asarray, dataset.search_batch(name, query, 300))) for name in ("embedding", "codes")
    )
    assert np.abs(floats - codes).max() <= SCORE_TOLERANCE
    assert np.abs(codes - adc(query, columns["codes"], model.codebooks())).max() <= SCORE_TOLERANCE


def code_features(model):
    return Features(
        {
            "embedding": List(Value("float32"), length=model.config.embedding_dim),
            "codes": List(Value("uint8"), length=model.config.num_codebooks),
        }
    )


# --- Invariant 5 -----------------------------------------------------------------------------------------------------


def rows_to_train(index):
    return np.random.default_rng(0).standard_normal((1000, index.d)).astype(np.float32)


def test_invariant_5_train_raises_on_a_built_index(codebooks):
    index = build_index(codebooks)
    with pytest.raises(RuntimeError, match="learned codebooks"):
        index.train(rows_to_train(index))
    np.testing.assert_array_equal(index_codebooks(index), codebooks)


def test_invariant_5_train_raises_on_a_loaded_index(filled, codebooks, tmp_path):
    save_index(filled, tmp_path / "index.faiss")
    index = load_index(tmp_path / "index.faiss")
    with pytest.raises(RuntimeError, match="learned codebooks"):
        index.train(rows_to_train(index))
    np.testing.assert_array_equal(index_codebooks(index), codebooks)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
def test_invariant_5_a_copy_still_refuses_to_train(filled, queries, duplicate):
    twin = duplicate(filled)
    with pytest.raises(RuntimeError, match="learned codebooks"):
        twin.train(rows_to_train(twin))
    for ours, theirs in zip(filled.search(queries, 20), twin.search(queries, 20), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_invariant_5_datasets_train_size_raises_and_keeps_the_codebooks(codebooks):
    index = build_index(codebooks)
    dataset = Dataset.from_dict({"embedding": random_embeddings(700, codebooks).tolist()})
    with pytest.raises(RuntimeError, match="leave train_size unset"):
        dataset.add_faiss_index("embedding", custom_index=index, train_size=700)
    np.testing.assert_array_equal(index_codebooks(index), codebooks)


def test_invariant_5_another_models_index_is_recognised_by_its_codebooks(codebooks):
    check_index_belongs(build_index(codebooks), codebooks)
    near = codebooks.copy()
    near[0, 0] += 1e-3
    near[0, 0] /= np.linalg.norm(near[0, 0])
    for other in (random_codebooks(seed=5), random_codebooks(4, 32), near):
        with pytest.raises(ValueError, match="belongs to another model"):
            check_index_belongs(build_index(codebooks), other)


def test_invariant_5_holds_for_what_datasets_reads_back(filled, codebooks, tmp_path):
    save_index(filled, tmp_path / "index.faiss")
    dataset = Dataset.from_dict({"row": list(range(200))})
    dataset.load_faiss_index("codes", tmp_path / "index.faiss")
    read = dataset.get_index("codes").faiss_index
    check_index_belongs(read, codebooks)
    with pytest.raises(ValueError, match="belongs to another model"):
        check_index_belongs(read, random_codebooks(seed=5))


# --- Shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook_size", [2, 4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("num_codebooks", [1, 3, 8])
def test_codes_leave_the_index_as_they_came(codebook_size, num_codebooks):
    codebooks = random_codebooks(num_codebooks, codebook_size, 4)
    codes = random_codes(333, codebooks)
    index = build_index(codebooks, codes)
    words = codebooks[np.arange(num_codebooks), codes].reshape(333, -1)
    np.testing.assert_array_equal(index.reconstruct_n(0, 333), words)
    np.testing.assert_array_equal(stored_codes(index), codes)
    np.testing.assert_array_equal(index.codes_array(5, 300, 7), codes[5:300:7])
    assert index.sa_code_size() == -(-num_codebooks * index_bits(codebooks) // 8)


@pytest.mark.parametrize("codebook_size", [2, 16, 64, 256])
def test_scores_equal_a_slow_sum(codebook_size):
    codebooks = random_codebooks(4, codebook_size, 8)
    codes, queries = random_codes(500, codebooks), random_embeddings(6, codebooks, seed=8)
    found = by_row(*build_index(codebooks, codes).search(queries, 500))
    assert np.abs(found - adc(queries, codes, codebooks)).max() <= SCORE_TOLERANCE


def test_a_stored_word_scores_m_for_itself(codebooks):
    codes = random_codes(50, codebooks)
    index = build_index(codebooks, codes)
    scores, _ = index.search(index.reconstruct_n(0, 50), 1)
    assert np.abs(scores - len(codebooks)).max() <= SCORE_TOLERANCE


def test_add_codes_appends_in_order(codebooks):
    codes = random_codes(90, codebooks)
    index = build_index(codebooks, codes[:30])
    index.add_codes(codes[30:].astype(np.int64))
    index.add_codes(codes[:0])
    assert index.ntotal == 90
    np.testing.assert_array_equal(stored_codes(index), codes)


def test_blocks_of_codes_join_without_a_seam(codebooks, monkeypatch):
    monkeypatch.setattr("tcq_hf.index.code_index._BLOCK_ROWS", 7)
    codes = random_codes(50, codebooks)
    index = build_index(codebooks, codes)
    np.testing.assert_array_equal(stored_codes(index), codes)


def test_codes_may_be_a_list_a_tensor_or_strided(codebooks):
    codes = random_codes(40, codebooks)
    wide = np.repeat(codes, 2, axis=1)
    for given in (codes.tolist(), torch.from_numpy(codes), wide[:, ::2], np.asfortranarray(codes)):
        np.testing.assert_array_equal(stored_codes(build_index(codebooks, given)), codes)


def test_float64_and_float16_queries_are_cast(filled, queries):
    expected = by_row(*filled.search(queries, 200))
    np.testing.assert_array_equal(by_row(*filled.search(queries.astype(np.float64), 200)), expected)
    halves = by_row(*filled.search(queries.astype(np.float16), 200))
    # float16 rounds each of D = 32 components, below 1, by at most 2^-12.
    assert np.abs(halves - expected).max() <= 32 * 2**-12


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (lambda codes: set_at(codes, 16), ValueError, "below codebook_size=16, got 16 in row 3"),
        (lambda codes: set_at(codes, -1), ValueError, "got -1 in row 3"),
        (lambda codes: set_at(codes, 300), ValueError, "got 300 in row 3"),
        (lambda codes: codes.astype(float), TypeError, "must be integers, got float64"),
        (lambda codes: codes.astype(bool), TypeError, "must be integers, got bool"),
        (lambda codes: codes[:, :3], ValueError, r"shape \[N, 4\], got \[10, 3\]"),
        (lambda codes: codes[0], ValueError, r"shape \[N, 4\], got \[4\]"),
        (lambda codes: codes[None], ValueError, r"got \[1, 10, 4\]"),
    ],
)
def test_bad_codes_are_refused_before_anything_is_added(codebooks, spoil, error, match):
    index, codes = build_index(codebooks), spoil(random_codes(10, codebooks))
    with pytest.raises(error, match=match):
        index.add_codes(codes)
    assert index.ntotal == 0


def set_at(codes, value):
    codes = codes.astype(np.int64)
    codes[3, 1] = value
    return codes


def test_wide_codes_of_256_words_are_checked_too():
    codebooks = random_codebooks(4, 256)
    for value in (256, -1):
        with pytest.raises(ValueError, match=f"got {value} in row 3"):
            build_index(codebooks, set_at(random_codes(10, codebooks), value))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda books: books * 1.01, "unit norm"),
        (lambda books: np.where(books == books[0, 0, 0], np.nan, books), "unit norm"),
        (lambda books: books * 0, "unit norm"),
        (lambda books: books[0], r"shape \[M, K, d\]"),
        (lambda books: books[:, :12], "power of two from 2 to 256, got 12"),
        (lambda books: books[:, :1], "power of two from 2 to 256, got 1"),
        (lambda books: np.repeat(books, 32, axis=1), "power of two from 2 to 256, got 512"),
        (lambda books: books[:0], "codebooks"),
    ],
)
def test_bad_codebooks_are_refused(codebooks, spoil, match):
    with pytest.raises(ValueError, match=match):
        build_index(spoil(codebooks))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_embedding_names_its_row(codebooks, value):
    index, embeddings = build_index(codebooks), random_embeddings(5, codebooks)
    embeddings[3, 2] = value
    with pytest.raises(ValueError, match="embeddings must be finite, row 3 is not"):
        index.add(embeddings)
    assert index.ntotal == 0


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (lambda q: np.zeros(q.shape, np.int64), TypeError, "queries must be floats, got int64"),
        (lambda q: q[:, :-1], ValueError, r"shape \[n, 32\], got \[7, 31\]"),
        (lambda q: q[0], ValueError, r"shape \[n, 32\], got \[32\]"),
        (lambda q: q * np.nan, ValueError, "row 0 is not"),
    ],
)
def test_bad_queries_are_refused(filled, queries, spoil, error, match):
    with pytest.raises(error, match=match):
        filled.search(spoil(queries), 3)


@pytest.mark.parametrize(("k", "match"), [(0, "at least 1, got 0"), (-1, "at least 1"), (201, "holds 200 rows")])
def test_bad_k_is_refused(filled, queries, k, match):
    with pytest.raises(ValueError, match=match):
        filled.search(queries, k)


@pytest.mark.parametrize("mode", ["exact", "fast", "ivf"])
def test_k_may_be_any_integer(filled, codebooks, queries, mode):
    index = build_index(codebooks, filled.codes_array(), mode)
    for k in (np.int64(3), np.uint8(3)):
        np.testing.assert_array_equal(index.search(queries, k)[1], index.search(queries, 3)[1])
    with pytest.raises(TypeError, match=r"k must be an integer, got 3\.0"):
        index.search(queries, 3.0)


@pytest.mark.parametrize("mode", ["exact", "fast", "ivf"])
@pytest.mark.parametrize(
    ("rows", "error", "match"),
    [
        (np.arange(200) < 9, TypeError, r"integers \[n\], got bool \[200\]"),
        ([1.5, 2.5], TypeError, r"integers \[n\], got float64 \[2\]"),
        ([[1, 2]], TypeError, r"integers \[n\], got int64 \[1, 2\]"),
        (7, TypeError, r"integers \[n\], got int64 \[\]"),
        ([-1], ValueError, "at least 0, got -1"),
        ([3, 200], ValueError, "no row 200 in the index, which holds 200 rows"),
    ],
)
def test_what_are_no_rows_is_not_removed(filled, codebooks, mode, rows, error, match):
    index = build_index(codebooks, filled.codes_array(), mode)
    with pytest.raises(error, match=match):
        index.remove_ids(rows)
    np.testing.assert_array_equal(index.codes_array(), filled.codes_array())


@pytest.mark.parametrize("mode", ["exact", "fast", "ivf"])
@pytest.mark.parametrize(
    ("rows", "gone"),
    [([5, 3, 3], [3, 5]), ((7,), [7]), ([], []), (np.uint8([0, 199]), [0, 199]), (faiss.IDSelectorRange(4, 6), [4, 5])],
)
def test_rows_to_remove_may_be_a_list_any_integers_or_a_selector(filled, codebooks, mode, rows, gone):
    index = build_index(codebooks, filled.codes_array(), mode)
    assert index.remove_ids(rows) == len(gone)
    np.testing.assert_array_equal(index.codes_array(), np.delete(filled.codes_array(), gone, axis=0))


@pytest.mark.parametrize("mode", ["exact", "fast", "ivf"])
def test_rows_get_no_ids_of_their_own(filled, codebooks, queries, mode):
    index = build_index(codebooks, filled.codes_array(), mode)
    for add, rows in ((index.add_with_ids, queries), (index.add_sa_codes, index.sa_encode(queries))):
        with pytest.raises(RuntimeError, match="rows are numbered by their place"):
            add(rows, np.full(7, 10**9))
    np.testing.assert_array_equal(index.codes_array(), filled.codes_array())


def test_an_empty_index_answers_nothing(codebooks, queries):
    with pytest.raises(ValueError, match="holds 0 rows"):
        build_index(codebooks).search(queries, 1)


def test_codes_given_to_add_are_refused(codebooks):
    with pytest.raises(TypeError, match=r"codes go through index\.add_codes"):
        build_index(codebooks).add(np.zeros((3, 32), np.uint8))


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook_size", [2, 16, 64, 256])
def test_a_saved_index_is_the_index(codebook_size, queries, tmp_path):
    codebooks = random_codebooks(4, codebook_size)
    index = build_index(codebooks, random_codes(200, codebooks))
    save_index(index, tmp_path / "new folder" / "index.faiss", model_id="me/model")
    loaded = load_index(tmp_path / "new folder" / "index.faiss", codebooks)
    for ours, theirs in zip(index.search(queries, 50), loaded.search(queries, 50), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(index_codebooks(loaded), codebooks)
    loaded.add_codes(random_codes(3, codebooks))
    assert loaded.ntotal == 203


def test_a_loaded_index_checks_its_input_as_a_built_one_does(filled, queries, tmp_path):
    save_index(filled, tmp_path / "index.faiss")
    with pytest.raises(ValueError, match="holds 200 rows"):
        load_index(tmp_path / "index.faiss").search(queries, 201)


def test_plain_faiss_reads_and_searches_the_file(filled, queries, tmp_path):
    save_index(filled, tmp_path / "index.faiss")
    plain = faiss.read_index(str(tmp_path / "index.faiss"))
    assert type(plain) is faiss.IndexPQ
    for ours, theirs in zip(filled.search(queries, 20), plain.search(queries, 20), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_file_that_plain_faiss_wrote_is_read(filled, queries, tmp_path):
    faiss.write_index(filled, str(tmp_path / "plain.faiss"))
    assert read_recipe(tmp_path / "plain.faiss") is None
    loaded = load_index(tmp_path / "plain.faiss")
    np.testing.assert_array_equal(loaded.search(queries, 9)[1], filled.search(queries, 9)[1])


def test_the_recipe_says_what_the_index_holds(filled, tmp_path):
    path = tmp_path / "index.faiss"
    save_index(filled, path, model_id="me/model")
    recipe = read_recipe(path)
    assert recipe == json.loads((tmp_path / "index.faiss.json").read_text(encoding="utf-8"))
    expected = {"model": "me/model", "metric": "inner_product", "embedding_dim": 32, "num_codebooks": 4}
    expected |= {"codebook_size": 16, "count": 200, "file_bytes": path.stat().st_size, "faiss": faiss.__version__}
    assert expected.items() <= recipe.items()


def test_saving_again_replaces_index_and_recipe(filled, codebooks, tmp_path):
    path = tmp_path / "index.faiss"
    save_index(build_index(codebooks), path)
    save_index(filled, path)
    assert load_index(path).ntotal == 200
    assert sorted(found.name for found in tmp_path.iterdir()) == ["index.faiss", "index.faiss.json"]


@pytest.mark.parametrize("with_recipe", [True, False])
@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.9999])
def test_a_truncated_file_is_refused(filled, share, with_recipe, tmp_path):
    path = tmp_path / "index.faiss"
    save_index(filled, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    if not with_recipe:
        (tmp_path / "index.faiss.json").unlink()
    with pytest.raises(ValueError, match=r"index\.faiss.* truncated"):
        load_index(path)


def test_every_cut_of_a_small_file_is_refused(tmp_path):
    codebooks = random_codebooks(2, 4, 2)
    path = tmp_path / "index.faiss"
    save_index(build_index(codebooks, random_codes(9, codebooks)), path)
    (tmp_path / "index.faiss.json").unlink()
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated"):
            load_index(path)


@pytest.mark.parametrize("text", ["", "this is no index\n" * 100])
def test_plain_text_is_no_index(text, tmp_path):
    (tmp_path / "index.faiss").write_text(text)
    with pytest.raises(ValueError, match=r"index\.faiss is truncated or no FAISS index"):
        load_index(tmp_path / "index.faiss")


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "nowhere.faiss", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            load_index(path)


def other_kinds(codebooks):
    flat = faiss.IndexFlatIP(32)
    l2 = faiss.IndexPQ(32, 4, 4, faiss.METRIC_L2)
    faiss.copy_array_to_vector(codebooks.ravel(), l2.pq.centroids)
    l2.is_trained = True
    return {"IndexFlatIP": flat, "IndexPQ": l2, "IndexIVFPQ": zero_coarse_index(build_index(codebooks, [[0] * 4]), 2)}


@pytest.mark.parametrize("kind", ["IndexFlatIP", "IndexPQ", "IndexIVFPQ"])
def test_another_kind_of_index_is_refused(kind, codebooks, tmp_path):
    faiss.write_index(other_kinds(codebooks)[kind], str(tmp_path / "index.faiss"))
    expected = "codes of residuals" if kind == "IndexIVFPQ" else f"a {kind}; expected an IndexPQ with inner product"
    with pytest.raises(ValueError, match=f"holds {expected}"):
        load_index(tmp_path / "index.faiss")


def test_an_index_trained_by_faiss_is_refused(tmp_path):
    index = faiss.IndexPQ(32, 4, 4, faiss.METRIC_INNER_PRODUCT)
    index.train(rows_to_train(index))
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    with pytest.raises(ValueError, match="unit norm"):
        load_index(tmp_path / "index.faiss")


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["ST_HE", "ST_generalized_HE", "ST_SDC", "ST_polysemous", "ST_polysemous_generalize"])
def test_an_index_that_searches_otherwise_is_refused(filled, codebooks, kind, mode, tmp_path):
    index, search_type = build_index(codebooks, filled.codes_array(), mode), getattr(faiss.IndexPQ, kind)
    (index if mode == "exact" else index.exact).search_type = search_type
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    with pytest.raises(ValueError, match=rf"index\.faiss holds an IndexPQ of search_type {search_type}; expected 0"):
        load_index(tmp_path / "index.faiss")


def test_an_index_of_another_model_is_refused(filled, model, tmp_path):
    save_index(filled, tmp_path / "index.faiss")
    with pytest.raises(ValueError, match="belongs to another model"):
        load_index(tmp_path / "index.faiss", model)


def test_a_replaced_file_does_not_match_its_recipe(filled, tmp_path):
    path, other = tmp_path / "index.faiss", random_codebooks(seed=5)
    save_index(filled, path)
    faiss.write_index(build_index(other, random_codes(200, other)), str(path))
    assert path.stat().st_size == read_recipe(path)["file_bytes"]
    with pytest.raises(ValueError, match=r"does not match its recipe .*index\.faiss\.json"):
        load_index(path)
    faiss.write_index(build_index(other, random_codes(20, other)), str(path))
    with pytest.raises(ValueError, match="truncated or was replaced"):
        load_index(path)


def test_files_that_changed_places_do_not_match_their_recipes(filled, codebooks, tmp_path):
    first, second = tmp_path / "first.faiss", tmp_path / "second.faiss"
    save_index(filled, first)
    save_index(build_index(codebooks, random_codes(200, codebooks, seed=8)), second)
    second.replace(first)
    with pytest.raises(ValueError, match=r"does not match its recipe .*first\.faiss\.json"):
        load_index(first)
    load_index(first, mmap=True)  # would have to read it all


@pytest.mark.parametrize("recipe", ["", "{", "{}", "[]"])
def test_a_damaged_recipe_is_a_value_error_that_names_it(filled, recipe, tmp_path):
    save_index(filled, tmp_path / "index.faiss")
    (tmp_path / "index.faiss.json").write_text(recipe)
    with pytest.raises(ValueError, match=r"index\.faiss\.json"):
        load_index(tmp_path / "index.faiss")


@pytest.mark.parametrize("kind", ["IndexFlatIP", "IndexPQ", "IndexIVFPQ"])
def test_what_load_index_would_refuse_is_not_saved(kind, codebooks, tmp_path):
    with pytest.raises(TypeError, match=f"only an index from build_index can be saved, got {kind}"):
        save_index(other_kinds(codebooks)[kind], tmp_path / "index.faiss")
    assert not list(tmp_path.iterdir())


def test_files_get_the_rights_of_any_new_file_and_the_mask_is_left_alone(filled, tmp_path, monkeypatch):
    (tmp_path / "plain").touch()
    # It is that of all threads: who sets it for a moment sets it for the files of others.
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the mask was set"))
    save_index(filled, tmp_path / "index.faiss")
    save_tensors(tmp_path / "tensors.safetensors", "thing", {"ones": np.ones(3)})
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


FULL_DISK = """
import json, resource, signal, sys
import numpy as np
from tcq_hf import build_index, save_index

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
errors = []
for path, limit, codebook_size, count in json.loads(sys.argv[1]):
    codebooks = np.zeros((2, codebook_size, 2), np.float32)
    codebooks[..., 0] = 1
    index = build_index(codebooks, np.zeros((count, 2), np.uint8))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_index(index, path)
        errors.append(None)
    except Exception as error:
        errors.append([type(error).__name__, str(error)])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(errors))
"""

# Limit in bytes of every file, codebook size and rows of the index to save.
DISKS = {
    "while writing": (4096, 256, 50_000),
    "while closing": (1000, 16, 1000),
    "in the recipe": (256, 2, 0),
    "nothing fits": (0, 2, 0),
}


@pytest.fixture(scope="module")
def full_disks(tmp_path_factory):
    """Saves over an earlier index that the operating system cuts short: file, files before, error of each."""
    codebooks, before = random_codebooks(2, 4, 2), {}
    for case in DISKS:
        path = tmp_path_factory.mktemp("disk") / "index.faiss"
        save_index(build_index(codebooks, random_codes(9, codebooks)), path)
        before[case] = path, {found.name: found.read_bytes() for found in path.parent.iterdir()}
    jobs = json.dumps([(str(before[case][0]), *disk) for case, disk in DISKS.items()])
    command = [sys.executable, "-c", FULL_DISK, jobs]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {case: (*before[case], error) for case, error in zip(DISKS, json.loads(output), strict=True)}


@pytest.mark.parametrize("case", DISKS)
def test_a_full_disk_is_an_os_error_that_names_the_file(full_disks, case):
    path, _, error = full_disks[case]
    assert error is not None, "save_index returned as if it had written the file"
    assert error[0] == "OSError"
    assert str(path) in error[1]


@pytest.mark.parametrize("case", DISKS)
def test_a_full_disk_keeps_the_earlier_files_and_leaves_no_other(full_disks, case):
    path, before, _ = full_disks[case]
    assert {found.name: found.read_bytes() for found in path.parent.iterdir()} == before
    assert load_index(path).ntotal == 9


def test_codebooks_belong_but_for_their_last_bits(codebooks):
    """Processors normalise with other roundings: one unit in the last place is still the same model."""
    index = build_index(codebooks)
    check_index_belongs(index, np.nextafter(codebooks, np.float32(2)))
    other = codebooks.copy()
    other[0, 0] = -other[0, 0]
    with pytest.raises(ValueError, match="another model"):
        check_index_belongs(index, other)
