"""dataset_index: codes out of Arrow, an index on a dataset, rows back for every kind of query."""

from pathlib import Path

import datasets
import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from tcq_hf import TCQModel, add_code_index, build_index, codes_array, encode_dataset, save_index, search
from tcq_hf.index.dataset_index import attach_index, matching_rows
from tcq_hf.index.dataset_index import search as search_module_function
from tcq_hf.index.encoding import encode_pictures
from tcq_hf.rerank import Diffusion, Fusion, KNNGraph, KReciprocal, QueryExpansion, reciprocal_rank_fusion

# A sum of M = 4 inner products of unit vectors in float32, once through another batch size.
SCORE_TOLERANCE = 1e-5

CODES = np.random.default_rng(0).integers(0, 256, (50, 4)).astype(np.uint8)


def of_codes(codes, length=4):
    return Dataset.from_dict({"codes": codes}, features=Features({"codes": List(Value("uint8"), length=length)}))


@pytest.fixture
def encoded(dataset, model, processor):
    return encode_dataset(dataset, model, processor, embeddings=True)


@pytest.fixture
def indexed(encoded, model):
    return add_code_index(encoded, "codes", model)


def pairs(rows):
    return [(row["row"], row["score"]) for row in rows]


def assert_same(found, expected):
    assert [row for row, _ in found] == [row for row, _ in expected]
    assert np.abs(np.subtract([score for _, score in found], [score for _, score in expected])).max() <= SCORE_TOLERANCE


# --- codes_array -----------------------------------------------------------------------------------------------------


def test_codes_array_is_the_column():
    found = codes_array(of_codes(CODES))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, CODES)


def test_codes_array_joins_chunks_in_order():
    chunked = datasets.concatenate_datasets([of_codes(CODES[start : start + 7]) for start in range(0, 50, 7)])
    assert len(chunked.data.column("codes").chunks) == 8
    np.testing.assert_array_equal(codes_array(chunked), CODES)
    np.testing.assert_array_equal(codes_array(chunked.select(range(5, 44))), CODES[5:44])
    np.testing.assert_array_equal(codes_array(chunked.select([40, 3, 3])), CODES[[40, 3, 3]])


@pytest.mark.parametrize("rows", [range(10, 30), [3, 1, 2], [49] * 2, range(49, -1, -1), [], range(50)])
def test_codes_array_follows_a_selection(rows):
    found = codes_array(of_codes(CODES).select(rows))
    assert found.shape == (len(rows), 4)
    np.testing.assert_array_equal(found, CODES[list(rows)])


def test_codes_array_follows_filter_sort_and_shuffle():
    numbered = of_codes(CODES).add_column("number", list(range(50)))
    for made in (numbered.filter(lambda row: row["number"] % 3 == 0), numbered.shuffle(seed=1)):
        np.testing.assert_array_equal(codes_array(made), CODES[made["number"][:]])
    np.testing.assert_array_equal(codes_array(numbered.sort("number", reverse=True)), CODES[::-1])


@pytest.mark.parametrize("kind", ["numpy", "torch", "arrow", "pandas"])
def test_codes_array_does_not_mind_the_format(kind):
    np.testing.assert_array_equal(codes_array(of_codes(CODES).with_format(kind)), CODES)


def test_codes_array_takes_a_column_of_any_name():
    np.testing.assert_array_equal(codes_array(of_codes(CODES).rename_column("codes", "mine"), "mine"), CODES)


@pytest.mark.parametrize("width", [1, 8])
def test_codes_array_takes_any_width(width):
    codes = CODES.reshape(-1, width)
    np.testing.assert_array_equal(codes_array(of_codes(codes, width)), codes)


@pytest.mark.parametrize(
    "feature", [List(Value("int64"), length=4), List(Value("uint8")), List(Value("float32"), length=4)]
)
def test_a_column_of_another_type_is_refused(feature):
    made = Dataset.from_dict({"codes": CODES.tolist()}, features=Features({"codes": feature}))
    with pytest.raises(ValueError, match=r"'codes' must be List\(Value\('uint8'\), length=M\), got List"):
        codes_array(made)


def test_a_column_that_is_no_list_is_refused():
    with pytest.raises(ValueError, match=r"must be List\(Value\('uint8'\), length=M\), got Value"):
        codes_array(Dataset.from_dict({"codes": [1, 2]}))


def test_a_missing_column_is_named_with_those_that_are_there():
    with pytest.raises(ValueError, match=r"no column 'code'; its columns are \['codes'\]"):
        codes_array(of_codes(CODES), "code")


def test_rows_without_a_code_are_refused():
    with pytest.raises(ValueError, match="has 2 rows without a code"):
        codes_array(of_codes([None, [1, 2, 3, 4], None]))


def test_a_hole_inside_a_code_is_refused():
    holed = pa.array([[1, 2, None, 4], [1, 2, 3, 4]], pa.list_(pa.uint8(), 4))
    with pytest.raises(ValueError, match="codes"):
        codes_array(Dataset(pa.table({"codes": holed})))


# --- add_code_index --------------------------------------------------------------------------------------------------


def test_add_code_index_attaches_every_row_under_the_columns_name(encoded, model):
    assert add_code_index(encoded, "codes", model) is encoded
    assert encoded.list_indexes() == ["codes"]
    assert encoded.get_index("codes").faiss_index.ntotal == len(encoded)
    add_code_index(encoded, "codes", model.codebooks(), name="other")
    assert sorted(encoded.list_indexes()) == ["codes", "other"]


def test_an_attached_index_answers_through_datasets_too(indexed, model):
    query = np.asarray(indexed[3]["embedding"], np.float32)
    scores, rows = indexed.search("codes", query, k=5)
    assert_same(pairs(search(indexed, query, model, k=5)), list(zip(rows, scores, strict=True)))
    _, examples = indexed.get_nearest_examples("codes", query, k=5)
    assert examples["label"] == [indexed[int(row)]["label"] for row in rows]


def test_codes_of_another_width_or_size_are_refused(model):
    with pytest.raises(ValueError, match=r"shape \[N, 4\], got \[25, 8\]"):
        add_code_index(of_codes(CODES.reshape(-1, 8), 8), "codes", model)
    with pytest.raises(ValueError, match="below codebook_size=16"):
        add_code_index(of_codes(CODES), "codes", model)


# --- search ----------------------------------------------------------------------------------------------------------


def test_search_is_a_public_name():
    assert search is search_module_function


QUERIES = {
    "PIL": lambda ds, row: ds[row]["image"],
    "path": lambda ds, row: undecoded(ds, row)["path"],
    "Path": lambda ds, row: Path(undecoded(ds, row)["path"]),
    "bytes": lambda ds, row: Path(undecoded(ds, row)["path"]).read_bytes(),
    "uint8 array": lambda ds, row: np.asarray(ds[row]["image"]),
    "uint8 tensor": lambda ds, row: torch.from_numpy(np.array(ds[row]["image"])).permute(2, 0, 1),
    "row dict": lambda ds, row: ds[row],
    "undecoded row dict": lambda ds, row: {"image": undecoded(ds, row)},
    "undecoded picture": lambda ds, row: undecoded(ds, row),
    "row number": lambda ds, row: row,
    "NumPy row number": lambda ds, row: np.int64(row),
    "NumPy embedding": lambda ds, row: np.asarray(ds[row]["embedding"], np.float32),
    "float64 embedding": lambda ds, row: np.asarray(ds[row]["embedding"], np.float64),
    "torch embedding": lambda ds, row: torch.tensor(ds[row]["embedding"], requires_grad=True),
}


def undecoded(dataset, row):
    twin = dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    return twin[row]["image"]


@pytest.mark.parametrize("kind", QUERIES)
def test_every_kind_of_query_finds_the_same(encoded, model, processor, kind):
    queries = {row: QUERIES[kind](encoded, row) for row in (0, 7, 31)}
    add_code_index(encoded, "codes", model)
    for row, query in queries.items():
        embedding = np.asarray(encoded[row]["embedding"], np.float32)
        assert_same(pairs(search(encoded, query, model, processor, k=6)), pairs(search(encoded, embedding, model, k=6)))


def test_scores_are_inner_products_with_the_stored_codewords(indexed, model, processor):
    words = model.codebooks()[np.arange(4), codes_array(indexed)].reshape(32, -1)
    for row in range(32):
        expected = words @ np.asarray(indexed[row]["embedding"], np.float32)
        found = search(indexed, row, model, processor, k=32)
        assert sorted(hit["row"] for hit in found) == list(range(32))
        assert np.abs([hit["score"] - expected[hit["row"]] for hit in found]).max() <= SCORE_TOLERANCE
        assert np.diff([hit["score"] for hit in found]).max() <= 0
        assert all(hit["similarity"] == hit["score"] / 4 for hit in found)


def test_the_own_picture_comes_first(indexed, model, processor):
    """The own code is the nearest codeword in every sub-space: no other row can score more."""
    codes = codes_array(indexed)
    for row in range(32):
        query = torch.tensor(indexed[row]["embedding"])
        with torch.no_grad():
            reconstruction = model.quantizer.reconstruct(torch.from_numpy(codes[[row]]))[0]
        best = search(indexed, row, model, processor, k=1)[0]
        np.testing.assert_array_equal(codes[best["row"]], codes[row])
        assert abs(best["score"] - float(query @ reconstruction)) <= SCORE_TOLERANCE


def test_rows_carry_the_columns_of_the_dataset(indexed, model, processor):
    found = search(indexed, 5, model, processor, k=4)
    assert len(found) == 4
    for hit in found:
        assert set(hit) == {"image", "label", "codes", "embedding", "row", "score", "similarity"}
        assert type(hit["row"]) is int
        assert type(hit["score"]) is float
        assert hit["label"] == indexed[hit["row"]]["label"]
        assert hit["image"] == indexed[hit["row"]]["image"]


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_a_format_does_not_change_the_result(encoded, model, processor, kind):
    expected = pairs(search(add_code_index(encoded.select(range(32)), "codes", model), 3, model, processor, k=5))
    formatted = add_code_index(encoded.with_format(kind), "codes", model)
    assert_same(pairs(search(formatted, 3, model, processor, k=5)), expected)


def test_an_index_over_embeddings_is_searched_alike(encoded, model, processor):
    encoded.add_faiss_index("embedding", custom_index=build_index(model))
    add_code_index(encoded, "codes", model)
    by_name = [pairs(search(encoded, 9, model, processor, k=8, index_name=name)) for name in ("embedding", "codes")]
    assert_same(*by_name)


def test_another_image_column(encoded, model, processor):
    named = add_code_index(encoded.rename_column("image", "picture"), "codes", model)
    for query in (2, named[2]):
        best = search(named, query, model, processor, k=1, image_column="picture")[0]
        np.testing.assert_array_equal(best["codes"], named[2]["codes"])


def test_an_array_and_its_picture_have_one_embedding(pictures, model, processor):
    embeddings = [encode_pictures(model, processor, query) for query in (pictures[0], np.asarray(pictures[0]))]
    np.testing.assert_array_equal(*embeddings)


# --- Bad queries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 33])
def test_a_k_outside_the_index_is_refused(indexed, model, processor, k):
    with pytest.raises(ValueError, match=f"k must be from 1 to 32, the rows in the index, got {k}"):
        search(indexed, 0, model, processor, k=k)


def test_a_dataset_without_index_says_how_to_attach_one(encoded, model, processor):
    with pytest.raises(ValueError, match="has no index; attach one with add_code_index"):
        search(encoded, 0, model, processor)


def test_several_indexes_need_a_name(indexed, model, processor):
    add_code_index(indexed, "codes", model, name="other")
    with pytest.raises(ValueError, match=r"several indexes, choose index_name from \['codes', 'other'\]"):
        search(indexed, 0, model, processor)
    assert search(indexed, 0, model, processor, k=1, index_name="other")


def test_a_wrong_index_name_is_refused(indexed, model, processor):
    with pytest.raises(ValueError, match=r"no index 'embedding'; attached: \['codes'\]"):
        search(indexed, 0, model, processor, index_name="embedding")


def test_an_index_of_another_model_is_refused(indexed, model, processor):
    with torch.no_grad():
        model.quantizer.codebooks[0, 0, 0] += 0.1
    with pytest.raises(ValueError, match="belongs to another model"):
        search(indexed, 0, model, processor)


@pytest.mark.parametrize("column", ["row", "score", "similarity"])
def test_a_column_that_search_would_hide_is_refused(encoded, model, processor, column):
    clashing = add_code_index(encoded.rename_column("label", column), "codes", model)
    with pytest.raises(ValueError, match=f"has a column '{column}', which search"):
        search(clashing, 0, model, processor)


@pytest.mark.parametrize("shape", [(31,), (33,), (1, 32), (2, 32), ()])
def test_an_embedding_of_the_wrong_shape_is_refused(indexed, model, shape):
    with pytest.raises(ValueError, match=r"must have shape \[32\], got"):
        search(indexed, np.full(shape, 0.5, np.float32), model)


@pytest.mark.parametrize("factor", [0, 0.9, 2, np.nan])
def test_an_embedding_of_another_norm_is_refused(indexed, model, factor):
    query = np.asarray(indexed[0]["embedding"], np.float32) * np.float32(factor)
    with pytest.raises(ValueError, match="unit-norm sub-vectors"):
        search(indexed, query, model)


def test_one_sub_vector_of_another_norm_is_refused(indexed, model):
    query = np.asarray(indexed[0]["embedding"], np.float32)
    query[-8:] *= 1.5
    with pytest.raises(ValueError, match=r"from 1 to 1\.5"):
        search(indexed, query, model)


@pytest.mark.parametrize("row", [-1, 32])
def test_a_row_outside_the_dataset_is_refused(indexed, model, processor, row):
    with pytest.raises(ValueError, match=f"query row must be from 0 to 31, got {row}"):
        search(indexed, row, model, processor)


def test_a_missing_file_is_named(indexed, model, processor, tmp_path):
    for query in (str(tmp_path / "nowhere.png"), tmp_path / "nowhere.png", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"query: no file {query}"):
            search(indexed, query, model, processor)


def test_a_damaged_picture_is_refused(indexed, model, processor, tmp_path):
    (tmp_path / "text.png").write_text("this is no picture")
    with pytest.raises(OSError, match="cannot identify image file"):
        search(indexed, tmp_path / "text.png", model, processor)


def test_a_picture_needs_the_processor(indexed, model, pictures):
    for query in (pictures[0], 3, "picture.png"):
        with pytest.raises(ValueError, match="needs the processor"):
            search(indexed, query, model)


@pytest.mark.parametrize("query", [None, 0.5, [1, 2], {"caption": "a cat"}])
def test_what_is_no_picture_is_refused(indexed, model, processor, query):
    with pytest.raises(TypeError, match=r"a picture must be|one picture"):
        search(indexed, query, model, processor)


@pytest.mark.parametrize("batch", [lambda p: p[:2], lambda p: [], lambda p: np.stack([np.asarray(q) for q in p[:2]])])
def test_several_pictures_are_no_query(indexed, model, processor, pictures, batch):
    with pytest.raises((TypeError, ValueError), match=r"query|one picture"):
        search(indexed, batch(pictures), model, processor)


# --- Codes leave -----------------------------------------------------------------------------------------------------


def test_codes_leave_as_parquet_and_as_numpy(encoded, model, tmp_path):
    query = np.asarray(encoded[4]["embedding"], np.float32)[None]
    expected = build_index(model, codes_array(encoded)).search(query, 32)
    encoded.select_columns(["codes"]).to_parquet(tmp_path / "codes.parquet")
    np.save(tmp_path / "codes.npy", codes_array(encoded))
    read = Dataset.from_parquet(str(tmp_path / "codes.parquet"), cache_dir=str(tmp_path / "cache"))
    assert read.features["codes"] == encoded.features["codes"]
    for codes in (codes_array(read), np.load(tmp_path / "codes.npy")):
        np.testing.assert_array_equal(codes, codes_array(encoded))
        for ours, theirs in zip(build_index(model, codes).search(query, 32), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_codes_leave_through_plain_arrow(encoded):
    column = encoded.with_format("arrow")[:].column("codes").combine_chunks()
    assert column.type == pa.list_(pa.uint8(), 4) or column.type.list_size == 4
    np.testing.assert_array_equal(np.array(column.to_pylist(), np.uint8), codes_array(encoded))


def test_an_index_without_our_codebooks_is_refused(encoded_flat, model, processor):
    with pytest.raises(ValueError, match="IndexFlat without the model's codebooks"):
        search(encoded_flat, 0, model, processor, k=2)


@pytest.fixture
def encoded_flat(dataset, model, processor):
    """With the index that datasets makes by default: L2 distances, smaller is closer."""
    encoded = encode_dataset(dataset, model, processor, embeddings=True)
    encoded.add_faiss_index("embedding")
    return encoded


# --- Filters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(encoded, model):
    count = len(encoded)
    names = ClassLabel(names=["cat", "dog", "fox"])
    encoded = encoded.remove_columns([name for name in ("label", "tone", "size") if name in encoded.column_names])
    encoded = encoded.add_column("label", np.arange(count) % 3).cast_column("label", names)
    encoded = encoded.add_column("size", [None, *range(1, count)]).add_column("tone", ["dark", "light"] * (count // 2))
    return add_code_index(encoded, "codes", model)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize(
    ("filters", "fits"),
    [
        ({"label": "dog"}, lambda row: row % 3 == 1),
        ({"label": 1}, lambda row: row % 3 == 1),
        ({"label": ["dog", "fox"]}, lambda row: row % 3 > 0),
        ({"tone": "dark"}, lambda row: row % 2 == 0),
        ({"label": "cat", "tone": "light"}, lambda row: row % 6 == 3),
        ({"size": [5, 7, 11]}, lambda row: row in (5, 7, 11)),
    ],
)
def test_only_rows_that_fit_are_searched(labelled, model, mode, filters, fits):
    dataset = add_code_index(labelled, "codes", model, "other", mode)
    rows = [row for row in range(len(dataset)) if fits(row)]
    query = np.float32(dataset[2]["embedding"])
    found = search(dataset, query, model, k=len(rows), index_name="other", filters=filters)
    everything = search(dataset, query, model, k=len(dataset), index_name="codes")
    assert_same(
        sorted(pairs(found), key=lambda pair: pair[0]),
        sorted((pair for pair in pairs(everything) if pair[0] in rows), key=lambda pair: pair[0]),
    )
    scores = [row["score"] for row in found]
    assert scores == sorted(scores, reverse=True)
    np.testing.assert_array_equal(matching_rows(dataset, filters), rows)


def test_what_datasets_read_back_is_filtered_too(labelled, model, tmp_path):
    for mode in ("exact", "fast"):
        save_index(build_index(model, codes_array(labelled), mode), tmp_path / f"{mode}.faiss")
        labelled.load_faiss_index(mode, tmp_path / f"{mode}.faiss")
        found = search(
            labelled, np.float32(labelled[2]["embedding"]), model, k=5, index_name=mode, filters={"label": 2}
        )
        assert found[0]["row"] == 2
        assert {row["label"] for row in found} == {2}


@pytest.mark.parametrize(
    ("filters", "match"),
    [
        ({"colour": "red"}, "no column 'colour' to filter by; its columns are"),
        ({"label": "cow"}, "no class 'cow'; its classes are cat, dog, fox"),
        ({"size": "large"}, "'size' holds int64 and cannot be filtered by 'large'"),
        ({"size": 10**30}, "'size' holds int64 and cannot be filtered by 1000"),
        ({"image": "x"}, "'image' holds .* and cannot be filtered"),
        ({"label": "cat", "tone": "grey"}, "k=3, but only 0 rows fit the filter"),
        ({"size": [1, 2]}, "k=3, but only 2 rows fit the filter"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(labelled, model, filters, match):
    with pytest.raises(ValueError, match=match):
        search(labelled, np.float32(labelled[0]["embedding"]), model, k=3, filters=filters)


# --- After the search ------------------------------------------------------------------------------------------------


@pytest.fixture
def two_indexes(indexed, tiny_config, processor, pictures):
    """The dataset with a second index, of another model: dataset, model, fusion."""
    torch.manual_seed(1)
    other = TCQModel(tiny_config).eval().initialize(torch.randn(400, 32, generator=torch.Generator().manual_seed(2)))
    codes = codes_array(encode_dataset(indexed.select_columns(["image"]), other, processor))
    return attach_index(indexed, build_index(other, codes), "other"), other, Fusion({"other": (other, processor)})


@pytest.mark.parametrize("mode", ["exact", "fast", "ivf"])
def test_a_reranker_ranks_what_was_found(encoded, model, processor, mode):
    dataset = add_code_index(encoded, "codes", model, mode=mode)
    index = dataset.get_index("codes").faiss_index
    reranker = QueryExpansion(k=3).fit(KNNGraph.from_index(index, 5))
    found = search(dataset, 4, model, processor, k=6, rerank=reranker)
    query = np.float32([dataset[4]["embedding"]])
    scores, rows = reranker(query, *index.search(query, 32))
    assert_same(pairs(found), list(zip(rows[0, :6], scores[0, :6], strict=True)))
    own = query[0] @ build_index(model, codes_array(encoded)).reconstruct_n(0, 32).T / 4
    assert [row["similarity"] for row in found] == pytest.approx(own[rows[0, :6]], abs=SCORE_TOLERANCE)


def test_a_reranker_sees_as_many_rows_as_depth_says(indexed, model):
    seen = []

    def backwards(queries, scores, ids):
        seen.append((queries.shape, ids.shape))
        return scores[:, ::-1], ids[:, ::-1]

    plain = [row["row"] for row in search(indexed, np.float32(indexed[0]["embedding"]), model, k=20)]
    for depth, expected in ((20, 20), (5, 7), (400, 32)):
        found = search(indexed, np.float32(indexed[0]["embedding"]), model, k=7, rerank=backwards, depth=depth)
        assert seen.pop() == ((1, 32), (1, expected))
        if depth == 20:
            assert [row["row"] for row in found] == plain[::-1][:7]


def test_lists_of_two_indexes_are_fused(two_indexes, model, processor):
    dataset, other, fusion = two_indexes
    found = search(dataset, 7, model, processor, k=5, index_name="codes", fuse=fusion)
    asked = [search(dataset, 7, each, processor, 32, name) for each, name in ((model, "codes"), (other, "other"))]
    points = {}
    for ranking in asked:
        for rank, row in enumerate(ranking, 1):
            points[row["row"]] = points.get(row["row"], 0) + 1 / (60 + rank)
    assert [row["row"] for row in found] == sorted(points, key=lambda row: -points[row])[:5]
    assert [row["score"] for row in found] == pytest.approx(sorted(points.values())[:-6:-1], rel=1e-6)
    assert [row["similarity"] for row in found] == [
        next(each["similarity"] for each in asked[0] if each["row"] == row["row"]) for row in found
    ]


def test_fused_lists_are_filtered_and_ranked_anew(two_indexes, model, processor):
    dataset, _, fusion = two_indexes
    found = search(dataset, 7, model, processor, 5, "codes", filters={"label": 1}, fuse=fusion)
    assert {row["label"] for row in found} == {1}
    reranker = QueryExpansion(k=3).fit(KNNGraph.from_index(dataset.get_index("codes").faiss_index, 5))
    both = search(dataset, 7, model, processor, 5, "codes", fuse=fusion, rerank=reranker)
    assert [row["score"] for row in both] == sorted((row["score"] for row in both), reverse=True)


@pytest.mark.filterwarnings("ignore:.*are copies of them:UserWarning")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("reranker", [KReciprocal(5, 3), Diffusion(5)])
def test_a_graph_without_vectors_gets_similarities(two_indexes, model, processor, fused, reranker):
    dataset, _, fusion = two_indexes
    options = {"index_name": "codes", "k": 32, "fuse": fusion if fused else None}
    listed = search(dataset, 7, model, processor, **options)
    graph = KNNGraph.from_index(dataset.get_index("codes").faiss_index, 6)
    reranker.fit(KNNGraph(graph.neighbours, graph.scores))
    similarities, ids = (np.array([[row[name] for row in listed]]) for name in ("similarity", "row"))
    scores, rows = reranker(None, similarities, ids)
    found = search(dataset, 7, model, processor, rerank=reranker, **options)
    assert [row["row"] for row in found] == rows[0].tolist()
    assert [row["score"] for row in found] == scores[0].tolist()


def test_what_cannot_go_together_is_refused(indexed, two_indexes, model, processor):
    dataset, other, fusion = two_indexes
    reranker = QueryExpansion(k=3).fit(KNNGraph.from_index(dataset.get_index("codes").faiss_index, 5))
    with pytest.raises(ValueError, match="filters cannot go with rerank"):
        search(dataset, 7, model, processor, 5, "codes", filters={"label": 1}, rerank=reranker)
    with pytest.raises(ValueError, match="belongs to another model"):
        search(dataset, 7, model, processor, 5, "codes", fuse=Fusion({"other": (model, processor)}))
    with pytest.raises(ValueError, match="no index 'absent'"):
        search(dataset, 7, model, processor, 5, "codes", fuse=Fusion({"absent": (other, processor)}))
    small = QueryExpansion(k=3).fit(KNNGraph.build(np.eye(10, 32, dtype=np.float32), 5))
    with pytest.raises(ValueError, match="rerank knows a gallery of 10 rows, the dataset has 32"):
        search(dataset, 7, model, processor, 5, "codes", rerank=small)
    with pytest.raises(TypeError, match=r"got the class; use QueryExpansion\(\).fit\(graph\)"):
        search(dataset, 7, model, processor, 5, "codes", rerank=QueryExpansion)
    for no_fusion, name in ((reciprocal_rank_fusion, "reciprocal_rank_fusion"), (Fusion, "Fusion"), ({}, "dict")):
        with pytest.raises(TypeError, match=f"fuse must be a Fusion of further indexes, .*, got {name}"):
            search(dataset, 7, model, processor, 5, "codes", fuse=no_fusion)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        search(dataset, 7, model, processor, 5, "codes", fuse=fusion, depth=0)
    with pytest.raises(RuntimeError, match="call fit"):
        search(dataset, 7, model, processor, 5, "codes", rerank=QueryExpansion())
    for embedding in (np.float32(dataset[7]["embedding"]), dataset[7]["embedding"]):
        with pytest.raises(ValueError, match="an embedding is that of one model and fuse asks others too"):
            search(dataset, embedding, model, processor, 5, "codes", fuse=fusion)


def test_an_index_that_gives_no_single_rows_is_refused_whatever_the_query(encoded, model):
    shards = faiss.IndexShards(32, False, False)
    part = build_index(model, codes_array(encoded))
    shards.add_shard(part)
    dataset = attach_index(encoded, shards, "codes")
    reranker = QueryExpansion(k=3).fit(KNNGraph.from_index(part, 5))
    plain = dataset.get_index("codes").faiss_index
    with pytest.raises(ValueError, match="IndexShards"):
        search(dataset, np.float32(dataset[0]["embedding"]), model, k=3, rerank=reranker)
    assert plain is shards


def test_an_embedding_may_come_as_a_row_has_it(indexed, model):
    embedding = indexed[5]["embedding"]
    assert isinstance(embedding, list)
    assert_same(pairs(search(indexed, embedding, model)), pairs(search(indexed, np.float32(embedding), model)))
