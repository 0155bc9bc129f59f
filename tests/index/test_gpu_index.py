"""gpu_index: the form that a GPU takes, on the CPU: scores, shapes and the way back; a GPU itself where one is."""

import faiss
import numpy as np
import pytest
from datasets import Dataset
from numpy.testing import assert_array_equal

from tcq_hf import build_index, from_gpu, to_gpu
from tcq_hf.index.dataset_index import attach_index
from tcq_hf.index.faiss_index import check_index_belongs, members_of
from tcq_hf.index.gpu_index import flat_index, gpu_codebooks, lists_for, zero_coarse_index

# A score sums M inner products of unit vectors in float32: rounding is near M * 2^-24 a term, far below this.
SCORE_TOLERANCE = 1e-5
GPU = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def collection(num_codebooks, codebook_size, sub_dim=4, count=500, seed=0):
    """Codebooks, an index with as many rows and seven queries."""
    generator = np.random.default_rng(seed)
    drawn = generator.standard_normal((num_codebooks, codebook_size, sub_dim))
    codebooks = (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(np.float32)
    codes = generator.integers(0, codebook_size, (count, num_codebooks)).astype(np.uint8)
    asked = generator.standard_normal((7, num_codebooks, sub_dim))
    queries = (asked / np.linalg.norm(asked, axis=-1, keepdims=True)).astype(np.float32).reshape(7, -1)
    return codebooks, build_index(codebooks, codes), queries


def by_row(scores, ids):
    """Search results in the order of the rows."""
    assert all(sorted(row) == list(range(ids.shape[1])) for row in ids.tolist())
    ordered = np.empty_like(scores)
    np.put_along_axis(ordered, ids, scores, axis=1)
    return ordered


# Codebooks that are joined, filled and added; the sub-quantizers that come out.
SHAPES = [
    (4, 256, 4),
    (5, 256, 8),
    (17, 256, 20),
    (48, 256, 48),
    (4, 16, 2),
    (5, 16, 3),
    (64, 16, 32),
    (96, 16, 48),
    (6, 4, 2),
    (9, 2, 2),
    (3, 8, 3),
    (6, 128, 8),
]


def test_an_ivf_index_is_refused():
    codebooks, index, _ = collection(4, 16)
    ivf = build_index(codebooks, index.codes_array(), mode="ivf")
    for call in (zero_coarse_index, to_gpu):
        with pytest.raises(TypeError, match="an exact or a fast index from build_index, got IVFIndex"):
            call(ivf)


@pytest.mark.parametrize("num_lists", [1, 16])
@pytest.mark.parametrize(("num_codebooks", "codebook_size", "count"), SHAPES)
def test_scores_are_those_of_the_flat_index(num_codebooks, codebook_size, count, num_lists):
    codebooks, index, queries = collection(num_codebooks, codebook_size)
    moved = zero_coarse_index(index, num_lists)
    difference = by_row(*moved.search(queries, 500)) - by_row(*index.search(queries, 500))
    assert np.abs(difference).max() <= max(1, num_codebooks / 8) * SCORE_TOLERANCE
    assert gpu_codebooks(codebooks).shape[:2] == (count, 256)
    assert moved.d == index.d


@pytest.mark.parametrize(("num_codebooks", "codebook_size", "count"), SHAPES)
def test_the_way_back_gives_the_codes(num_codebooks, codebook_size, count):
    codebooks, index, _ = collection(num_codebooks, codebook_size)
    back = flat_index(zero_coarse_index(index, 16), codebooks)
    assert_array_equal(back.codes_array(), index.codes_array())
    assert_array_equal(back.codebooks(), codebooks)


def test_rows_are_dealt_evenly_in_blocks(monkeypatch):
    monkeypatch.setattr("tcq_hf.index.gpu_index._BLOCK_ROWS", 7)
    _, index, queries = collection(4, 256)
    moved = zero_coarse_index(index, 3)
    sizes = [moved.invlists.list_size(number) for number in range(3)]
    assert sorted(sizes) == [166, 167, 167]
    assert np.abs(by_row(*moved.search(queries, 500)) - by_row(*index.search(queries, 500))).max() <= SCORE_TOLERANCE


@pytest.mark.parametrize("num_codebooks", [4, 5])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_each_shard_has_rows_in_all_lists(num_codebooks, num_shards):
    codebooks, index, _ = collection(num_codebooks, 256)
    moved = zero_coarse_index(index, 16, num_shards)
    for shard in range(num_shards):
        empty = zero_coarse_index(build_index(codebooks), 16)
        (whole,), (part,) = members_of(moved), members_of(empty)
        whole.copy_subset_to(part, faiss.InvertedLists.SUBSET_TYPE_ID_MOD, num_shards, shard)  # as FAISS deals to GPUs
        sizes = [part.invlists.list_size(number) for number in range(16)]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == len(range(shard, 500, num_shards))


@pytest.mark.parametrize("num_codebooks", [4, 5])
def test_it_survives_its_source(num_codebooks):
    _, index, queries = collection(num_codebooks, 256)
    expected, moved = by_row(*index.search(queries, 500)), zero_coarse_index(index, 4)
    del index
    assert np.abs(by_row(*moved.search(queries, 500)) - expected).max() <= SCORE_TOLERANCE


def test_an_empty_index_is_empty():
    codebooks, _, _ = collection(4, 256)
    moved = zero_coarse_index(build_index(codebooks), 4)
    assert moved.ntotal == 0
    assert flat_index(moved, codebooks).ntotal == 0


def test_the_way_back_refuses_what_is_of_another_model():
    codebooks, index, _ = collection(4, 256)
    for other in (collection(4, 256, seed=1)[0], collection(5, 256)[0]):
        with pytest.raises(ValueError, match="belongs to another model"):
            flat_index(zero_coarse_index(index, 4), other)
    with pytest.raises(ValueError, match="expected an index from to_gpu"):
        flat_index(index, codebooks)
    numbered = zero_coarse_index(build_index(codebooks), 2)
    numbered.add_with_ids(index.reconstruct_n(0, 3), np.array([0, 1, 7]))
    with pytest.raises(ValueError, match="not numbered by their place"):
        flat_index(numbered, codebooks)
    twice = zero_coarse_index(build_index(codebooks), 2)
    twice.add_with_ids(index.reconstruct_n(0, 3), np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="not numbered by their place"):
        flat_index(twice, codebooks)


@pytest.mark.parametrize(
    ("rows", "queries", "lists"),
    [(10**7, 1, 128), (10**7, 8, 16), (10**7, 64, 8), (10**7, 1000, 8), (20_000, 1, 16), (100, 1, 1), (0, 1, 1)],
)
def test_lists_fill_the_gpu_and_no_more(rows, queries, lists):
    assert lists_for(rows, queries) == lists


def test_impossible_arguments_are_refused():
    _, index, _ = collection(4, 256)
    for lists in (0, 2049):
        with pytest.raises(ValueError, match=f"num_lists must be from 1 to 2048, got {lists}"):
            to_gpu(index, num_lists=lists)
    with pytest.raises(ValueError, match="device must name a GPU or several, got none"):
        to_gpu(index, [])
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        to_gpu(index, queries=0)
    with pytest.raises(ValueError, match="takes up to 48 codebooks of 256 words, got 49"):
        to_gpu(collection(49, 256, 2)[1])


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this FAISS supports GPUs")
def test_without_gpu_faiss_the_extra_is_named():
    codebooks, index, _ = collection(4, 256)
    for call in (lambda: to_gpu(index), lambda: from_gpu(zero_coarse_index(index), codebooks)):
        with pytest.raises(RuntimeError, match=r"tcq_hf\[gpu\]"):
            call()


@pytest.mark.parametrize(("num_codebooks", "codebook_size", "count"), SHAPES)
def test_its_codebooks_are_recognised(num_codebooks, codebook_size, count):
    codebooks, index, _ = collection(num_codebooks, codebook_size)
    moved, other = zero_coarse_index(index, 4), collection(num_codebooks, codebook_size, seed=1)[0]
    check_index_belongs(moved, codebooks)
    with pytest.raises(ValueError, match="belongs to another model"):
        check_index_belongs(moved, other)


def test_an_index_of_residuals_is_not_taken_for_one_of_the_model():
    codebooks, index, _ = collection(8, 256)
    moved = zero_coarse_index(index, 4)
    coarse = faiss.downcast_index(moved.quantizer)
    coarse.reset()
    coarse.add(np.ones((4, index.d), np.float32))
    with pytest.raises(ValueError, match="the index encodes residuals"):
        check_index_belongs(moved, codebooks)


def within(*indexes):
    """Indexes as shards behind a transform, as several GPUs hold them, and what must outlive it."""
    shards, width = faiss.IndexShards(indexes[0].d, False, False), indexes[0].d
    for index in indexes:
        shards.add_shard(index)
    return faiss.IndexPreTransform(faiss.RemapDimensionsTransform(width, width, False), shards), shards


def test_the_codebooks_of_each_shard_are_compared():
    codebooks, index, _ = collection(5, 256)
    twin, other = build_index(codebooks), collection(5, 256, seed=1)[1]
    for given in within(index, twin):
        assert [member.ntotal for member in members_of(given)] == [500, 0]
        check_index_belongs(given, codebooks)
    for given in within(index, other):
        with pytest.raises(ValueError, match="belongs to another model"):
            check_index_belongs(given, codebooks)


def test_an_index_on_the_cpu_is_saved_as_it_is(tmp_path):
    _, index, _ = collection(5, 256)
    moved = zero_coarse_index(index, 4)  # inside an IndexPreTransform
    shards = faiss.IndexShards(index.d, False, False)
    shards.add_shard(build_index(index.codebooks(), index.codes_array()))
    behind, _ = within(build_index(index.codebooks(), index.codes_array()))
    for name, given in (("flat", index), ("moved", moved), ("shards", shards), ("behind", behind)):
        dataset = attach_index(Dataset.from_dict({"row": range(500)}), given, name)
        assert dataset.get_index(name).device is None
    dataset = attach_index(Dataset.from_dict({"row": range(500)}), moved, "moved")
    dataset.save_faiss_index("moved", str(tmp_path / "moved.faiss"))
    assert faiss.read_index(str(tmp_path / "moved.faiss")).ntotal == 500


@pytest.mark.skipif(not GPU, reason="FAISS sees no GPU")
@pytest.mark.parametrize("device", [0, [0, 0]])
@pytest.mark.parametrize("num_codebooks", [4, 5])
def test_an_index_on_a_gpu_is_saved_through_datasets(num_codebooks, device, tmp_path):
    codebooks, index, _ = collection(num_codebooks, 256)
    moved = to_gpu(index, device)
    check_index_belongs(moved, codebooks)
    dataset = attach_index(Dataset.from_dict({"row": range(500)}), moved, "gpu")
    assert dataset.get_index("gpu").device == device
    dataset.save_faiss_index("gpu", str(tmp_path / "gpu.faiss"))
    saved = faiss.read_index(str(tmp_path / "gpu.faiss"))
    assert_array_equal(flat_index(saved, codebooks).codes_array(), index.codes_array())


@pytest.mark.skipif(not GPU, reason="FAISS sees no GPU")
@pytest.mark.parametrize(("num_codebooks", "codebook_size", "count"), SHAPES)
def test_a_gpu_gives_the_scores_of_the_cpu(num_codebooks, codebook_size, count):
    codebooks, index, queries = collection(num_codebooks, codebook_size)
    moved = to_gpu(index)
    assert np.abs(by_row(*moved.search(queries, 500)) - by_row(*index.search(queries, 500))).max() <= 1e-4
    assert_array_equal(from_gpu(moved, codebooks).codes_array(), index.codes_array())
