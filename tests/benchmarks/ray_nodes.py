"""Two Ray nodes encode real pictures into Lance, one is killed half-way; the index that is left, against FAISS."""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import lance
import numpy as np
import psutil
import ray
import ray.data
from page import BACKBONE, data_folder, write_page
from ray.cluster_utils import Cluster

from tcq_hf import TCQImageProcessor, TCQModel, build_index, encode_dataset, extract_features
from tcq_hf.index.batch_encoder import BatchEncoder
from tcq_hf.index.lance_files import read_codes
from tcq_hf.index.lance_index import LanceIndex, build_lance_index
from tcq_hf.index.ray_encoding import encode_with_ray, ray_map
from tcq_hf.index.shard_actors import ShardActors

TEXT = """{count:,} pictures of CIFAR-10 (32 px, WebP, scaled to 224), ViT-Ti/16, float32, 8 codebooks of 256 words. Two
Ray nodes on this one machine share its cores; each has one actor of one thread. In the second run the second node is
killed, with SIGKILL, when half of the batches have begun. Ray {ray}, pylance {lance}. Load of the machine before the
first run: {load:.1f} (0 when nothing else works on it; speeds suffer from other work, counts and scores do not)."""

NOTES = """*Whole call* holds the count of the ids and the start of the actors, which import torch and the model.
*While encoding* runs from the first batch to the last; where a node is killed, that holds the time in which the actor
that is left works alone while the lost one starts again beside it and begins its batches anew. One process encodes in
two streams of one thread each, on the same cores: a second node on one machine adds no core. Scores are
compared for {queries} queries at k = 100; each id found must have that score under its own code."""


class TimedEncoder(BatchEncoder):
    """Leaves a file for each batch: when it began and when it was done."""

    marks: Path

    def __call__(self, batch: dict) -> dict:
        begun = time.time()
        mark = self.marks / f"{os.getpid()}-{begun}"
        mark.touch()
        encoded = super().__call__(batch)
        mark.write_text(f"{begun} {time.time()}")
        return encoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--queries", type=int, default=100)
    arguments = parser.parse_args()
    datasets.disable_caching()
    load = os.getloadavg()[0]
    data = data_folder()
    pictures = datasets.load_dataset(str(data / "cifar10"), split="train").select(range(arguments.count))
    pictures = pictures.flatten_indices().add_column("id", list(range(arguments.count)))
    model = TCQModel.from_timm(BACKBONE, weights=data / BACKBONE / "model.safetensors")
    processor = TCQImageProcessor.from_backbone(BACKBONE)
    model.initialize(extract_features(pictures.select(range(min(512, arguments.count))), model, processor))
    start = time.perf_counter()
    encoded = encode_dataset(pictures, model, processor, embeddings=True, batch_size=arguments.batch_size)
    alone = time.perf_counter() - start
    encoded = encoded.select_columns(["id", "codes", "embedding"]).with_format("numpy")[:]
    with tempfile.TemporaryDirectory() as folder:
        cluster, start_up = start_cluster()
        try:
            runs = [encode(pictures, model, processor, Path(folder), arguments, None)]
            runs.append(encode(pictures, model, processor, Path(folder), arguments, cluster))
            figures = answers(Path(folder) / "killed.lance", model, encoded, arguments.queries)
        finally:
            ray.shutdown()
            cluster.shutdown()
    speed = {
        "way": "encode_dataset, one process",
        "pictures a second, whole call": f"{arguments.count / alone:.1f}",
        "while encoding": f"{arguments.count / alone:.1f}",
        "seconds": f"{alone:.1f}",
        "batches begun": "",
        "rows in Lance": "",
        "files no version names": "",
    }
    text = TEXT.format(count=arguments.count, ray=ray.__version__, lance=lance.__version__, load=load)
    rows = [{"figure": name, "value": value} for name, value in {**start_up, **figures}.items()]
    write_page(
        "ray_nodes",
        "Two Ray nodes, one of them killed",
        [text, [speed, *runs], NOTES.format(queries=arguments.queries), rows],
    )


def start_cluster() -> tuple[Cluster, dict[str, str]]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    node = {"object_store_memory": 300_000_000, "include_dashboard": False}
    seconds, begun = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begun
        seconds[name] = f"{time.perf_counter() - begun:.1f}"
        begun = time.perf_counter()

    cluster = Cluster(initialize_head=True, head_node_args=node | {"num_cpus": 4})
    lap("seconds to start the first node")
    cluster.second = cluster.add_node(**node, num_cpus=2)
    lap("seconds to start the second node")
    ray.init(address=cluster.address, log_to_driver=False)
    lap("seconds of ray.init()")
    return cluster, seconds


def encode(
    pictures: datasets.Dataset,
    model: TCQModel,
    processor: TCQImageProcessor,
    folder: Path,
    arguments: argparse.Namespace,
    to_kill: Cluster | None,
) -> dict[str, str]:
    name = "whole" if to_kill is None else "killed"
    encoder = TimedEncoder(model, processor, batch_size=arguments.batch_size)
    encoder.marks = folder / f"{name}-marks"
    encoder.marks.mkdir()
    uri = folder / f"{name}.lance"
    batches = -(-arguments.count // (8 * arguments.batch_size))
    killed = threading.Thread(target=kill_half_way, args=(to_kill, encoder.marks, batches), daemon=True)
    if to_kill is not None:
        killed.start()
    start = time.perf_counter()
    done = encode_with_ray(ray.data.from_huggingface(pictures), encoder, uri, num_actors=2, rows_per_fragment=250)
    seconds = time.perf_counter() - start
    if to_kill is not None:
        killed.join(timeout=1)
        assert not killed.is_alive(), "the node was not killed before all was encoded"
    ids = read_codes(lance.dataset(uri))[1]
    assert np.array_equal(np.sort(ids), np.arange(arguments.count)), "a row is missing or there twice"
    assert done.rows == arguments.count
    marks = list(encoder.marks.iterdir())
    times = np.array([[float(value) for value in text.split()] for text in map(Path.read_text, marks) if text])
    named = sum(len(fragment.data_files()) for fragment in lance.dataset(uri).get_fragments())
    return {
        "way": "two Ray nodes" if to_kill is None else "two Ray nodes, one killed half-way",
        "pictures a second, whole call": f"{arguments.count / seconds:.1f}",
        "while encoding": f"{arguments.count / (times[:, 1].max() - times[:, 0].min()):.1f}",
        "seconds": f"{seconds:.1f}",
        "batches begun": f"{len(marks)} of {batches}",
        "rows in Lance": f"{len(ids):,}, every one once",
        "files no version names": str(len(list((uri / "data").iterdir())) - named),
    }


def kill_half_way(cluster: Cluster, marks: Path, batches: int) -> None:
    """Kill the second node while its actor encodes and half of the batches have begun."""
    (raylet,) = [info.process.pid for info in cluster.second.all_processes["raylet"]]
    while len(list(marks.iterdir())) < batches // 2:
        time.sleep(0.05)
    running = [" ".join(child.cmdline()) for child in psutil.Process(raylet).children(recursive=True)]
    assert any("_EncodeTable" in line for line in running), f"no actor encodes on the second node: {running}"
    cluster.remove_node(cluster.second, allow_graceful=False)


def answers(uri: Path, model: TCQModel, encoded: dict[str, np.ndarray], count: int) -> dict[str, str]:
    """Scores of Lance and of the shards against FAISS, and how long each takes."""
    start = time.perf_counter()
    index = build_lance_index(uri, model, segments=4, fan_out=ray_map)
    build = time.perf_counter() - start
    start = time.perf_counter()
    LanceIndex(uri, model)
    opened = time.perf_counter() - start
    codes, ids = read_codes(index.dataset)
    order = np.argsort(ids)
    exact = build_index(model, codes[order])
    start = time.perf_counter()
    shards = ShardActors.from_lance(uri, model, 2, num_cpus=0.5)
    shards_ready = time.perf_counter() - start
    queries = encoded["embedding"][:count].astype(np.float32)
    figures = {
        "codes equal to those of encode_dataset": f"{(codes[order] == encoded['codes']).mean():.6f}",
        "seconds to build the index of Lance, 4 Ray tasks": f"{build:.2f}",
        "seconds to open it": f"{opened:.3f}",
        "seconds to start 2 FAISS shards": f"{shards_ready:.1f}",
    }
    for name, search in (("FAISS", exact.search), ("Lance", index.search), ("2 FAISS shards", shards.search)):
        figures |= compare(name, search, exact.search, queries)
    shards.close()
    return figures


def compare(name: str, search: Callable, exact: Callable, queries: np.ndarray) -> dict[str, str]:
    scores, found = search(queries, 100)
    expected, _ = exact(queries, 100)
    difference = np.abs(scores - expected).max()
    assert difference <= 1e-5, f"{name}: scores differ by {difference}"
    own_scores, own_rows = exact(queries, int(exact.__self__.ntotal))
    by_id = np.take_along_axis(own_scores, np.argsort(own_rows, axis=1), axis=1)
    assert np.abs(np.take_along_axis(by_id, found, axis=1) - scores).max() <= 1e-5, f"{name}: a row has another score"
    start = time.perf_counter()
    for query in queries:
        search(query[None], 100)
    one = (time.perf_counter() - start) / len(queries)
    start = time.perf_counter()
    search(queries, 100)
    batch = (time.perf_counter() - start) / len(queries)
    return {
        f"{name}: largest difference of a score": f"{difference:.1e}",
        f"{name}: ms a query, one at a time / {len(queries)} at a time": f"{1000 * one:.2f} / {1000 * batch:.3f}",
    }


if __name__ == "__main__":
    main()
