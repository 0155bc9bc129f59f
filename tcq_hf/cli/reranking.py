"""Options of `tcq-hf search` that change a ranking after the search: re-rankers on a graph, lists of further models."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from tcq_hf import TCQImageProcessor, TCQModel, build_index, codes_array, encode_dataset
from tcq_hf.index.dataset_index import attach_index
from tcq_hf.rerank import Diffusion, Fusion, KNNGraph, KReciprocal, QueryExpansion, RankFlow
from tcq_hf.rerank.graph import EXACT_ROWS

from . import inputs

# Each with the neighbours of a row that its graph has: one graph serves all but the last.
_RERANKERS = {
    "query-expansion": (QueryExpansion, 49),
    "database-augmentation": (partial(QueryExpansion, database=True), 49),
    "k-reciprocal": (KReciprocal, 49),
    "diffusion": (Diffusion, 49),
    "rank-flow": (RankFlow, 399),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--rerank`, `--graph`, `--fuse`."""
    parser.add_argument(
        "--rerank",
        choices=list(_RERANKERS),
        help="rank what was found anew by the neighbours that the pictures have among each other",
    )
    parser.add_argument(
        "--graph",
        metavar="FILE",
        help="keep the neighbours in this file for the next search with --rerank; read it if it is there",
    )
    parser.add_argument(
        "--fuse",
        action="append",
        default=[],
        metavar="MODEL",
        help="merge the ranking with that of a further model, by reciprocal ranks; repeat it for more",
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse options that say nothing together."""
    if arguments.graph and not arguments.rerank:
        raise ValueError("--graph is the file of the neighbours that --rerank needs; give --rerank too")
    if arguments.rerank and arguments.filter:
        raise ValueError("--filter cannot go with --rerank, which ranks all rows of its graph; leave one of them out")


def add_models(arguments: argparse.Namespace, dataset: Dataset, column: str) -> dict[str, Any]:
    """Attach an index of each model of `--fuse` to the dataset; keyword arguments of `search`, none without such."""
    others: dict[str, tuple[TCQModel, TCQImageProcessor]] = {}
    for number, name in enumerate(arguments.fuse):
        model, processor = inputs.load_model(name)
        pictures = dataset.select_columns([column])
        encoded = encode_dataset(
            pictures,
            model,
            processor,
            image_column=column,
            **(inputs.encoding_options(arguments) | {"on_error": "raise"}),
        )
        attach_index(dataset, build_index(model, codes_array(encoded)), f"fuse-{number}")
        others[f"fuse-{number}"] = model, processor
    return {"fuse": Fusion(others)} if others else {}


def fit(arguments: argparse.Namespace, index: Any) -> dict[str, Any]:
    """The re-ranker of `--rerank` on the graph of an index; keyword arguments of `search`, none without it."""
    if not arguments.rerank:
        return {}
    reranker, k = _RERANKERS[arguments.rerank]
    return {"rerank": reranker().fit(_graph(arguments.rerank, arguments.graph, index, min(k, index.ntotal - 1)))}


def _graph(name: str, path: str | None, index: Any, k: int) -> KNNGraph:
    if path is None or not Path(path).exists():
        # Above the rows that a graph compares one by one, each row asks the index.
        large = index.ntotal > EXACT_ROWS
        graph = KNNGraph.from_index(build_index(index, index.codes_array(), "fast") if large else index, k)
        if path is not None:
            graph.save(path)
        return graph
    graph = KNNGraph.load(path)
    restored = index.reconstruct_n(0, index.ntotal)
    # A restored vector consists of M sub-vectors of unit norm, to rounding.
    restored /= np.float32(np.sqrt(len(index.codebooks())))
    if graph.neighbours.shape[1] < k:
        raise ValueError(
            f"--graph {path} holds {graph.neighbours.shape[1]} neighbours a row, --rerank {name} needs {k}; delete it "
            "or name another file"
        )
    if graph.vectors is None or graph.vectors.shape != restored.shape or np.abs(graph.vectors - restored).max() > 1e-5:
        raise ValueError(f"--graph {path} is that of other codes; delete it or name another file")
    return graph
