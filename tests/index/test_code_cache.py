"""code_cache: what its digests depend on, and chunk files that are whole or absent."""

import datasets
import pyarrow as pa
import pytest
import torch

from tcq_hf import TCQConfig, TCQModel
from tcq_hf.index.code_cache import cache_key, chunk_path, weights_digest, write_chunk
from tcq_hf.index.decoding import raw_pictures


def holding(**tensors):
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def test_equal_weights_have_one_digest(model, tiny_config):
    twin = TCQModel(tiny_config)
    twin.load_state_dict(model.state_dict())
    assert weights_digest(twin) == weights_digest(model)
    assert len(weights_digest(model)) == 64


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0 + 4e-7]])},
        {"b": torch.tensor([[1.0, 2.0], [3.0, 4.0]])},
        {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)},
        {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(torch.int32)},
        {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])},
        {"a": torch.tensor([[1.0, 3.0], [2.0, 4.0]])},
        {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.zeros(0)},
    ],
    ids=["value", "name", "dtype", "bits", "shape", "order", "one more"],
)
def test_any_difference_changes_the_digest(other):
    assert weights_digest(holding(**other)) != weights_digest(holding(a=torch.tensor([[1.0, 2.0], [3.0, 4.0]])))


def test_strided_and_scalar_tensors_have_a_digest():
    values = torch.arange(6.0).reshape(2, 3)
    assert weights_digest(holding(a=values.T)) == weights_digest(holding(a=values.T.contiguous()))
    assert weights_digest(holding(a=torch.tensor(1.0))) != weights_digest(holding(a=torch.tensor(2.0)))


@pytest.mark.parametrize("name", ["backbone.norm.weight", "projection.bias", "quantizer.codebooks"])
def test_every_part_of_a_model_counts(model, name):
    before = weights_digest(model)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] += 1e-3
    assert weights_digest(model) != before


def key(dataset, model, processor, column="image", columns=("codes",), dtype="None"):
    return cache_key(dataset, model, processor, column, list(columns), dtype)


def test_the_key_is_stable(dataset, model, processor):
    assert key(dataset, model, processor) == key(dataset, model, processor)


@pytest.mark.parametrize(
    "change", [{"column": "label"}, {"columns": ("codes", "embedding")}, {"dtype": "torch.bfloat16"}]
)
def test_the_key_counts_every_argument(dataset, model, processor, change):
    assert key(dataset, model, processor, **change) != key(dataset, model, processor)


def test_the_key_counts_the_config_beside_the_weights(dataset, model, processor, tiny_config):
    other = TCQModel(TCQConfig(**tiny_config.to_diff_dict() | {"pooling": "avg"}))
    other.load_state_dict(model.state_dict(), strict=False)
    assert key(dataset, other, processor) != key(dataset, model, processor)


def test_without_caching_no_key_comes_twice(dataset, model, processor):
    datasets.disable_caching()
    try:
        assert key(dataset, model, processor) != key(dataset, model, processor)
    finally:
        datasets.enable_caching()


def test_every_span_has_its_own_file(dataset):
    pictures = raw_pictures(dataset, "image")
    spans = [(0, 8), (8, 16), (0, 16)]
    assert len({chunk_path("key", pictures, *span) for span in spans}) == 3
    assert chunk_path("key", pictures, 0, 8) != chunk_path("other", pictures, 0, 8)
    assert chunk_path("key", pictures, 0, 8) == chunk_path("key", pictures, 0, 8)


TABLE = pa.table({"codes": [[1, 2], [3, 4]]})


def test_a_chunk_reads_back_as_a_dataset(tmp_path):
    write_chunk(tmp_path / "new" / "chunk.arrow", TABLE)
    assert datasets.Dataset.from_file(str(tmp_path / "new" / "chunk.arrow"))["codes"][:] == [[1, 2], [3, 4]]
    assert [found.name for found in (tmp_path / "new").iterdir()] == ["chunk.arrow"]


def test_a_chunk_that_cannot_be_renamed_leaves_no_file_behind(tmp_path):
    (tmp_path / "chunk.arrow").mkdir()
    with pytest.raises(OSError, match=r"chunk\.arrow"):
        write_chunk(tmp_path / "chunk.arrow", TABLE)
    assert [found.name for found in tmp_path.iterdir()] == ["chunk.arrow"]
