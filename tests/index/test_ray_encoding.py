"""ray_encoding: a batch by hand; two nodes of which one is killed; shards that die. Real Ray, real Lance."""

import io
import os
import pickle
import shutil
import sys
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
import transformers
from numpy.testing import assert_array_equal

from tcq_hf import TCQModel, build_index, encode_dataset
from tcq_hf.index.batch_encoder import BatchEncoder
from tcq_hf.index.ray_encoding import (
    RayEncoding,
    _commit,
    _report,
    _write_fragments,
    encode_with_ray,
    import_ray,
    ray_map,
)
from tcq_hf.index.segments import SegmentedIndex
from tcq_hf.index.shard_actors import ShardActors

ROWS, FIRST, DAMAGED = 300, 1000, 1123
# What Ray warns of in itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore:lance is not fork-safe", "ignore:.*is deprecated:DeprecationWarning:ray"
)

NODE = {"object_store_memory": 200_000_000, "include_dashboard": False}


@pytest.fixture(scope="module")
def shared_model(tiny_config) -> TCQModel:
    torch.manual_seed(0)
    made = TCQModel(tiny_config).eval()
    return made.initialize(torch.randn(400, 32, generator=torch.Generator().manual_seed(1)))


def png(pixels):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def table():
    """300 rows of drawn pictures of all brightnesses, with ids from 1000; the picture of row 1123 is damaged."""
    rng = np.random.default_rng(0)
    pictures = [
        {"bytes": png((rng.random((32, 32, 3)) * rng.integers(1, 256, 3)).astype(np.uint8))} for _ in range(ROWS)
    ]
    pictures = [picture | {"path": f"{i}.png"} for i, picture in enumerate(pictures)]
    pictures[DAMAGED - FIRST]["bytes"] = pictures[DAMAGED - FIRST]["bytes"][:100]
    names = [None if i % 3 else f"row {i}" for i in range(ROWS)]
    return pa.table(
        {"id": range(FIRST, FIRST + ROWS), "image": pictures, "name": names, "label": pa.array([1] * ROWS, pa.int8())}
    )


@pytest.fixture(scope="module")
def encoded(table, shared_model, processor):
    """What one process makes of the same rows."""
    dataset = datasets.Dataset(table).cast_column("image", datasets.Image(decode=False))
    return encode_dataset(dataset, shared_model, processor, embeddings=True, on_error="skip").with_format("numpy")[:]


def by_hand(table, start, stop):
    return {name: table[name][start:stop].to_pylist() for name in ("id", "image", "label")}


# --- By hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_batch_by_hand_has_the_codes_of_encode_dataset(table, encoded, shared_model, processor, batch_size, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batch = BatchEncoder(shared_model, processor, batch_size=batch_size)(by_hand(table, 0, 100))
    finally:
        torch.set_num_threads(before)
    assert list(batch) == ["id", "label", "codes", "embedding"]
    assert (batch["codes"].dtype, batch["embedding"].dtype) == (np.uint8, np.float32)
    # Sums of another order in batches of another size; a code may change at a tie.
    assert np.abs(batch["embedding"] - encoded["embedding"][:100]).max() <= 1e-5
    assert (batch["codes"] == encoded["codes"][:100]).mean() >= 0.99


def test_arrays_paths_and_decoded_pictures_are_pictures_too(pictures, picture_folder, shared_model, processor):
    encoder = BatchEncoder(shared_model, processor, id_column=None)
    paths = sorted(map(str, picture_folder.rglob("*.png")), key=os.path.basename)
    expected = encoder({"image": pictures})["codes"]
    assert_array_equal(encoder({"image": np.stack([np.asarray(picture) for picture in pictures])})["codes"], expected)
    assert_array_equal(encoder({"image": np.array(paths, dtype=object)})["codes"], expected)


def test_it_travels_and_loads_by_name_where_it_works(tmp_path, table, shared_model, processor):
    shared_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    expected = BatchEncoder(shared_model, processor)(by_hand(table, 0, 20))
    for encoder in (BatchEncoder(tmp_path), BatchEncoder(str(tmp_path)), BatchEncoder(shared_model, processor)):
        for _ in range(2):
            assert_array_equal(encoder(by_hand(table, 0, 20))["embedding"], expected["embedding"])
        again = pickle.loads(pickle.dumps(encoder))
        assert again._job is None
        assert_array_equal(again(by_hand(table, 0, 20))["codes"], expected["codes"])
    assert len(pickle.dumps(BatchEncoder(tmp_path))) < 1000


def test_datasets_can_wrap_it_too(table, encoded, shared_model, processor):
    dataset = datasets.Dataset(table.slice(0, 50)).cast_column("image", datasets.Image(decode=False))
    encoder = BatchEncoder(shared_model, processor)
    mapped = dataset.map(encoder, batched=True, batch_size=32, remove_columns="image").with_format("numpy")
    assert (mapped["codes"] == encoded["codes"][:50]).mean() >= 0.99


def test_a_damaged_picture_is_named_by_its_id(table, shared_model, processor):
    batch = by_hand(table, 100, 150)
    with pytest.raises(ValueError, match=r"picture in row 1123 \(123\.png\): .*on_error='skip'"):
        BatchEncoder(shared_model, processor)(batch)
    with pytest.raises(ValueError, match=r"picture in row 23 \(123\.png\)"):
        BatchEncoder(shared_model, processor, id_column=None)(batch)


def test_a_skipped_picture_has_zeros_and_its_error(table, encoded, shared_model, processor):
    for start, stop in ((100, 150), (123, 124)):
        batch = BatchEncoder(shared_model, processor, batch_size=8, on_error="skip")(by_hand(table, start, stop))
        bad = np.array([error is not None for error in batch["error"]])
        assert_array_equal(np.array(batch["id"])[bad], [DAMAGED])
        assert batch["error"][bad][0].startswith("row 1123 (123.png): ")
        assert not batch["codes"][bad].any()
        assert not batch["embedding"][bad].any()
    kept = np.isin(encoded["id"], np.arange(1100, 1150))
    batch = BatchEncoder(shared_model, processor, batch_size=8, on_error="skip")(by_hand(table, 100, 150))
    good = np.array([error is None for error in batch["error"]])
    assert (batch["codes"][good] == encoded["codes"][kept]).mean() >= 0.99


def test_no_row_is_no_code_and_pictures_stay_on_request(table, shared_model, processor):
    empty = BatchEncoder(shared_model, processor)(by_hand(table, 0, 0))
    assert (empty["codes"].shape, empty["embedding"].shape) == ((0, 4), (0, 32))
    batch = by_hand(table, 0, 3)
    assert BatchEncoder(shared_model, processor, keep_pictures=True)(batch)["image"] == batch["image"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"processor": None}, "processor must be given with a model"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'"),
    ],
)
def test_wrong_options_are_refused_where_they_are_given(shared_model, processor, options, match):
    with pytest.raises(ValueError, match=match):
        BatchEncoder(**({"model": shared_model, "processor": processor} | options))


def test_wrong_columns_and_models_are_refused(table, shared_model, processor, tmp_path):
    batch = by_hand(table, 0, 3)
    with pytest.raises(ValueError, match=r"no column 'photo'; the columns are \['id', 'image', 'label'\]"):
        BatchEncoder(shared_model, processor, image_column="photo")(batch)
    with pytest.raises(ValueError, match="no column 'number'"):
        BatchEncoder(shared_model, processor, id_column="number")(batch)
    with pytest.raises(ValueError, match="a column 'codes' already"):
        BatchEncoder(shared_model, processor)(batch | {"codes": [0, 0, 0]})
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a ViTModel, expected a TCQModel"):
        BatchEncoder(tmp_path, processor)(batch)
    with pytest.raises(OSError, match="nowhere"):
        BatchEncoder(str(tmp_path / "nowhere"))(batch)


def test_weights_that_overflow_are_refused_by_row(table, tiny_config, processor):
    broken = TCQModel(tiny_config).eval()
    with torch.no_grad():
        broken.projection.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="embedding of row 1000 is not finite"):
        BatchEncoder(broken, processor)(by_hand(table, 0, 3))


def test_without_ray_the_error_names_the_extra(monkeypatch, shared_model, processor, tmp_path):
    pytest.importorskip("lance", reason="Lance is not installed: pip install 'tcq_hf[lance]'")
    monkeypatch.setitem(sys.modules, "ray", None)
    for call in (
        lambda: encode_with_ray(None, BatchEncoder(shared_model, processor), tmp_path),
        lambda: list(ray_map(len, [[1]])),
        lambda: ShardActors([], shared_model, 1, 0),
    ):
        with pytest.raises(ImportError, match=r"pip install 'tcq_hf\[ray\]'"):
            call()


# --- Two nodes -------------------------------------------------------------------------------------------------------


class MarkingEncoder(BatchEncoder):
    """Leaves a file for each batch that it begins, by node; of many, no more are begun before a node is killed.

    The node to be killed ends one batch and dies in its second.
    """

    marks = to_kill = None

    def __call__(self, batch):
        node = import_ray().get_runtime_context().get_node_id()
        (self.marks / f"{node}.{uuid.uuid4().hex}").touch()
        begun = begun_on(self.marks)
        if node == self.to_kill and begun[node] > 1:
            wait_until((self.marks.parent / "killed").exists, 60)
            time.sleep(10)  # processes of a dead node end within a second
        elif begun.total() > 6:
            wait_until((self.marks.parent / "killed").exists, 60)
        return super().__call__(batch)


def begun_on(marks):
    """Number of batches that were begun, by node."""
    return Counter(mark.name.partition(".")[0] for mark in marks.iterdir())


def wait_until(true, seconds):
    """Whether it was in time."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tcq_hf[ray]'")
    pytest.importorskip("lance", reason="Lance is not installed: pip install 'tcq_hf[lance]'")
    from ray.cluster_utils import Cluster

    # Workers unpickle what this module defines without importing it.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        # Ray finds a node dead that does not answer five times, 3 s apart, and starts workers with a niceness of 15:
        # they would hardly load their model beside other work.
        settings = {"_system_config": {"health_check_period_ms": 500, "worker_niceness": 0}}
        started = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 6} | settings)
        started.second = started.add_node(**NODE, num_cpus=2)
        ray.init(address=started.address, log_to_driver=False, logging_level="error")
        try:
            yield started
        finally:
            ray.shutdown()
            started.shutdown()


@pytest.fixture(scope="module")
def killed(cluster, table, shared_model, processor, tmp_path_factory):
    """A Lance dataset from two nodes of which one was killed in the midst; batches begun by node, till then and in all.

    Each actor takes 2 CPUs. Of the 6 of the head 3 are held back until the other node is dead: one actor must go there,
    one CPU is left for reading and writing, and the actor that is lost has room to come back.
    """
    import ray.data
    from ray.util import placement_group, remove_placement_group

    folder, second = tmp_path_factory.mktemp("ray"), cluster.second.node_id
    encoder = MarkingEncoder(shared_model, processor, batch_size=2, on_error="skip")
    encoder.marks, encoder.to_kill = folder / "marks", second
    encoder.marks.mkdir()
    held_back = placement_group([{"CPU": 3}])
    assert held_back.wait(30)

    def kill():
        try:
            wait_until(lambda: begun_on(encoder.marks).total() >= 6 and begun_on(encoder.marks)[second] >= 2, 110)
            begun = begun_on(encoder.marks)
            cluster.remove_node(cluster.second, allow_graceful=False)
            remove_placement_group(held_back)
            return begun
        finally:
            (folder / "killed").touch()

    with ThreadPoolExecutor(1) as killer:
        killing = killer.submit(kill)
        rows, options = ray.data.from_arrow(table), {"num_actors": 2, "num_cpus": 2, "rows_per_fragment": 50}
        done = encode_with_ray(rows, encoder, folder / "codes.lance", **options)
        begun = killing.result(120)
    return folder / "codes.lance", done, (second, begun, begun_on(encoder.marks))


def test_the_node_was_killed_while_it_encoded(killed):
    second, begun, in_all = killed[2]
    assert begun[second] == 2, f"the node {second} was to end one batch and die in its second; begun by node: {begun}"
    # 300 rows in batches of 16: 19; those that the dead node had begun were begun again.
    assert begun.total() < 19, f"the node was killed when all batches were begun: {begun}"
    assert in_all.total() > 19, f"no batch was begun again after the node was killed: {begun}, in all {in_all}"
    assert in_all[second] == 2


def test_every_row_is_there_once_and_what_failed_is_reported(killed, table):
    import lance

    uri, done, _ = killed
    assert isinstance(done, RayEncoding)
    assert done.rows == ROWS - 1
    assert list(done.failed) == [DAMAGED]
    assert done.failed[DAMAGED].startswith("row 1123 (123.png): ")
    found = lance.dataset(uri).to_table().sort_by("id")
    kept = table.filter(pa.compute.not_equal(table["id"], DAMAGED))
    assert found.schema.names == ["id", "name", "label", "codes", "embedding"]
    for name in ("id", "name", "label"):
        assert found[name].combine_chunks() == kept[name].combine_chunks()


def test_codes_are_those_of_one_process(killed, encoded):
    import lance

    found = lance.dataset(killed[0]).to_table().sort_by("id")
    codes = found["codes"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
    assert (codes == encoded["codes"]).mean() >= 0.99
    embeddings = found["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 32)
    assert np.abs(embeddings - encoded["embedding"]).max() <= 1e-5


@pytest.fixture(scope="module")
def exact(killed, shared_model):
    """One FAISS index of the rows in Lance, and their ids."""
    import lance

    from tcq_hf.index.lance_files import read_codes

    codes, ids = read_codes(lance.dataset(killed[0]))
    return build_index(shared_model, codes), ids


def is_exact(index, exact, queries):
    faiss_index, ids = exact
    for k in (1, 10, len(ids)):
        scores, found = index.search(queries, k)
        expected, _ = faiss_index.search(queries, k)
        assert (scores.dtype, found.dtype) == (np.float32, np.int64)
        assert np.abs(scores - expected).max() <= 1e-5
        # Ids may differ among equals: hold each against the score that its own code has.
        own, rows = faiss_index.search(queries, len(ids))
        for query in range(len(queries)):
            score_of = dict(zip(ids[rows[query]], own[query], strict=True))
            assert np.abs([score_of[id_] for id_ in found[query]] - scores[query]).max() <= 1e-5
            assert len({*found[query]}) == k


def test_segments_of_ray_tasks_answer_as_faiss(killed, exact, encoded, shared_model):
    from tcq_hf.index.lance_index import build_lance_index

    index = build_lance_index(killed[0], shared_model, segments=3, fan_out=ray_map)
    assert [len(found.segments) for found in index.dataset.describe_indices()] == [3]
    is_exact(index, exact, encoded["embedding"][:5])


def test_shards_of_lance_answer_as_faiss_and_never_in_part(killed, exact, encoded, shared_model):
    import ray

    queries = encoded["embedding"][:5]
    shards = ShardActors.from_lance(killed[0], shared_model, 2, max_restarts=1)
    try:
        assert shards.ntotal == ROWS - 1
        is_exact(shards, exact, queries)
        ray.kill(shards.actors[1], no_restart=False)
        # An actor that starts again cannot answer at once.
        with pytest.raises(RuntimeError, match="one of 2 shards did not answer in 0 s"):
            shards.search(queries, 3, timeout=0)
        is_exact(shards, exact, queries)
        ray.kill(shards.actors[1])
        with pytest.raises(RuntimeError, match="one of 2 shards is lost"):
            shards.search(queries, 3)
        for wrong, k, match in ((queries, ROWS, "from 1 to 299"), (queries[:, :5], 1, r"shape \[n, 32\]")):
            with pytest.raises(ValueError, match=match):
                shards.search(wrong, k)
    finally:
        shards.close()


def test_shards_of_segments_answer_as_faiss_and_fail_at_lost_files(cluster, exact, encoded, shared_model, tmp_path):
    faiss_index, ids = exact
    living, codes = SegmentedIndex.create(tmp_path, shared_model), faiss_index.codes_array()
    for start in range(0, len(ids), 100):
        living.append(codes[start : start + 100], ids[start : start + 100])
    shards = ShardActors.from_segments(tmp_path, shared_model, 1)
    try:
        is_exact(shards, exact, encoded["embedding"][:5])
    finally:
        shards.close()
    with pytest.raises(ValueError, match="num_actors must be from 1 to 3, the number of segments, got 4"):
        ShardActors.from_segments(tmp_path, shared_model, 4)
    other = TCQModel(shared_model.config)
    for ask in (ShardActors.from_segments, ShardActors.from_lance):
        with pytest.raises(FileNotFoundError):
            ask(tmp_path / "absent", shared_model, 1)
    with pytest.raises(ValueError, match="another model"):
        ShardActors.from_segments(tmp_path, other, 1)


def test_shards_of_another_model_are_refused(killed, shared_model):
    with pytest.raises(ValueError, match="has another code"):
        ShardActors.from_lance(killed[0], TCQModel(shared_model.config), 1)
    with pytest.raises(ValueError, match="num_actors must be from 1 to"):
        ShardActors.from_lance(killed[0], shared_model, 100)


def test_rows_are_appended_under_new_ids_only(killed, table, encoded, shared_model, processor, tmp_path):
    import lance
    import ray.data

    from tcq_hf.index.lance_index import build_lance_index

    uri = shutil.copytree(killed[0], tmp_path / "codes.lance")
    encoder = BatchEncoder(shared_model, processor)
    before = lance.dataset(uri).version
    with pytest.raises(FileExistsError, match="append=True"):
        encode_with_ray(ray.data.from_arrow(table), encoder, uri)
    with pytest.raises(ValueError, match="id 1000 is in the Lance dataset"):
        encode_with_ray(ray.data.from_arrow(table.slice(0, 10)), encoder, uri, append=True)
    with pytest.raises(FileNotFoundError, match=r"absent\.lance"):
        encode_with_ray(ray.data.from_arrow(table), encoder, tmp_path / "absent.lance", append=True)
    more = table.slice(0, 20).set_column(0, "id", pa.array(range(20)))
    other = TCQModel(shared_model.config)
    other.save_pretrained(tmp_path / "other")
    for encoder_of_other in (BatchEncoder(other, processor), BatchEncoder(tmp_path / "other", processor)):
        with pytest.raises(ValueError, match="has another code under these codebooks"):
            encode_with_ray(ray.data.from_arrow(more), encoder_of_other, uri, append=True)
    assert lance.dataset(uri).version == before
    assert encode_with_ray(ray.data.from_arrow(more), encoder, uri, num_actors=1, append=True) == RayEncoding(20, {})
    index = build_lance_index(uri, shared_model, fan_out=ray_map)
    assert index.ntotal == ROWS + 19
    scores, _ = index.search(encoded["embedding"][:1], 2)
    assert scores[0, 0] == scores[0, 1]


def test_a_damaged_picture_stops_the_run_and_nothing_is_there(cluster, table, shared_model, processor, tmp_path):
    import ray.data

    from tcq_hf.index.lance_files import dataset_exists

    rows = ray.data.from_arrow(table.slice(100, 40))
    with pytest.raises(ValueError, match=r"cannot read the picture in row 1123 \(123\.png\): .*on_error='skip'"):
        encode_with_ray(rows, BatchEncoder(shared_model, processor), tmp_path, num_actors=1)
    assert not dataset_exists(tmp_path)


def test_what_else_a_worker_raises_is_said(cluster):
    import ray.data

    def fail(table):
        raise OSError("no space left on device")

    with pytest.raises(RuntimeError, match=r"a worker failed and nothing was written: OSError: no space left"):
        _report(ray.data.from_items([{"id": 1}]).map_batches(fail), 1)


def test_of_two_runs_to_one_place_the_first_is_kept(table, tmp_path):
    lance = pytest.importorskip("lance", reason="Lance is not installed: pip install 'tcq_hf[lance]'")
    rows = table.select(["id", "name"]).append_column("error", pa.nulls(ROWS, pa.string()))
    reports = [_write_fragments(rows.slice(start, 10), str(tmp_path / "new"), False, "id", None) for start in (0, 50)]
    _commit(reports[0], str(tmp_path / "new"), None, None)
    with pytest.raises(FileExistsError, match="another process wrote a Lance dataset"):
        _commit(reports[1], str(tmp_path / "new"), None, None)
    assert lance.dataset(tmp_path / "new").to_table()["id"].to_pylist() == list(range(FIRST, FIRST + 10))


@pytest.mark.parametrize(
    ("rows", "options", "error", "match"),
    [
        ({"id": [0, 1, 1]}, {}, ValueError, "id 1 is given twice"),
        ({"id": [0.0, 1.0, 2.0]}, {}, TypeError, "ids must be integers"),
        ({"id": [-1, 0, 1]}, {}, ValueError, "at least 0, got -1"),
        ({"codes": [0, 1, 2]}, {}, ValueError, "a column 'codes' already"),
        ({}, {"num_actors": 0}, ValueError, "num_actors must be at least 1, got 0"),
        ({}, {"rows_per_fragment": 0}, ValueError, "rows_per_fragment must be at least 1, got 0"),
    ],
)
def test_wrong_rows_are_refused_before_work_begins(
    cluster, table, shared_model, processor, tmp_path, rows, options, error, match
):
    import ray.data

    given = {name: table[name][:3] for name in ("id", "image")} | rows
    with pytest.raises(error, match=match):
        encode_with_ray(
            ray.data.from_arrow(pa.table(given)), BatchEncoder(shared_model, processor), tmp_path / "new", **options
        )
    assert not (tmp_path / "new").exists()


def test_wrong_datasets_and_encoders_are_refused(cluster, table, shared_model, processor, tmp_path):
    import ray.data

    rows = ray.data.from_arrow(table)
    with pytest.raises(TypeError, match=r"must be a ray\.data\.Dataset, got Dataset; ray\.data\.from_huggingface"):
        encode_with_ray(datasets.Dataset(table), BatchEncoder(shared_model, processor), tmp_path / "new")
    for options, match in (
        ({"image_column": "photo"}, "no column 'photo'"),
        ({"id_column": "number"}, "no column 'number'"),
        ({"id_column": None}, "must have an id_column"),
    ):
        with pytest.raises(ValueError, match=match):
            encode_with_ray(rows, BatchEncoder(shared_model, processor, **options), tmp_path / "new")
