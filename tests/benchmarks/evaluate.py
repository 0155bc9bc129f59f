"""Speed and memory of evaluate against what one would write with NumPy or call in scikit-learn."""

import argparse
import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from page import write_page
from sklearn.metrics import average_precision_score

from tcq_hf.evaluation.metrics import evaluate

TEXT = """{queries:,} queries against {rows:,} rows of {width} floats, {classes} classes, k = 1000: the size of CIFAR-10
by its usual protocols. Vectors lie around a centre for each class; the codes are {distinct:,} distinct rows, so that
most scores have ties. Median of {repeats} rounds, one way after the other in each round; memory is the peak above the
process at rest, in the round that took most; Linux only. {load}"""

NOTES = """`evaluate` gives in that time both readings of mAP@1000, precision and recall at 1, 10, 100 and 1000, and the
counts of queries; with the curve also precision and recall at about 190 ranks over all rows. It orders ties by seed and
in expectation. The NumPy ways give the published mAP alone and leave ties to the sort; scikit-learn gives average
precision of whole rankings alone. scikit-learn ran on {few} queries, and its seconds were multiplied."""

CHECK = """Whole rankings of the {few} queries without ties: scikit-learn's mean average precision is {theirs:.7f}, and
`evaluate(..., k={rows})` says {ours:.7f}."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--few", type=int, default=200, help="queries of scikit-learn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--load", default="", help="a sentence on what else ran")
    arguments = parser.parse_args()
    classes, distinct = 10, 8192
    queries, database, labels, base_labels = data = draw(arguments, classes)
    codes = database[np.random.default_rng(1).integers(0, distinct, arguments.rows)]
    few = slice(arguments.few)
    ways = {
        "evaluate": lambda: evaluate(*data).map_published,
        "evaluate, with the curve": lambda: evaluate(*data, curve=True).map_published,
        "evaluate, codes": lambda: evaluate(queries, codes, labels, base_labels).map_published,
        "NumPy, argsort": lambda: by_numpy(*data, sort_all),
        "NumPy, argpartition, then argsort": lambda: by_numpy(*data, sort_best),
        "scikit-learn, average_precision_score": lambda: by_scikit_learn(
            queries[few], database, labels[few], base_labels
        ),
    }
    measured = measure(ways, arguments.repeats)
    # How often the queries that a way ran on go into all.
    times = {way: arguments.queries / arguments.few if way.startswith("scikit") else 1 for way in ways}
    seconds = {way: times[way] * np.median([run[0] for run in runs]) for way, runs in measured.items()}
    rows = [
        {
            "way": way,
            "seconds": f"{seconds[way]:.1f}",
            "seconds of all cores": f"{times[way] * np.median([run[1] for run in runs]):.1f}",
            "times evaluate": f"{seconds[way] / seconds['evaluate']:.1f}",
            "MB above rest": f"{max(run[2] for run in runs):.0f}",
        }
        for way, runs in measured.items()
    ]
    known = vars(arguments) | {"classes": classes, "distinct": distinct}
    known["theirs"] = by_scikit_learn(queries[few], database, labels[few], base_labels)
    known["ours"] = evaluate(queries[few], database, labels[few], base_labels, k=arguments.rows).map_strict
    sections = [TEXT.format(**known).strip(), rows, NOTES.format(**known), CHECK.format(**known)]
    write_page("evaluate", "Speed of evaluation", sections)


def draw(arguments: argparse.Namespace, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels, base_labels = (generator.integers(0, classes, count) for count in (arguments.queries, arguments.rows))
    centres = 0.4 * generator.standard_normal((classes, arguments.width))
    queries, database = (
        (centres[row] + generator.standard_normal((len(row), arguments.width))).astype(np.float32)
        for row in (labels, base_labels)
    )
    return queries, database, labels, base_labels


def measure(ways: dict[str, Callable], repeats: int) -> dict[str, list[tuple[float, float, float]]]:
    """Seconds, seconds of all cores and MB above rest of each way in each round."""
    measured = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            ctypes.CDLL(None).malloc_trim(0)  # what the last way freed does not count as at rest
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            rest, start, cores = memory("VmRSS"), time.perf_counter(), time.process_time()
            run()
            seconds = time.perf_counter() - start, time.process_time() - cores
            measured[way].append((*seconds, max(0.0, memory("VmHWM") - rest)))
    return measured


def memory(field: str) -> float:
    """A field of /proc/self/status in MB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(field))


def sort_all(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, axis=1)[:, :1000]


def sort_best(scores: np.ndarray) -> np.ndarray:
    best = np.argpartition(-scores, 1000, axis=1)[:, :1000]
    return np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1), axis=1)


def by_numpy(
    queries: np.ndarray,
    database: np.ndarray,
    labels: np.ndarray,
    base_labels: np.ndarray,
    ranking: Callable[[np.ndarray], np.ndarray],
) -> float:
    values = []
    for start in range(0, len(queries), 250):
        block = slice(start, start + 250)
        hits = base_labels[ranking(queries[block] @ database.T)] == labels[block, None]
        precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
        values.append((precision * hits).sum(axis=1) / np.maximum(1, hits.sum(axis=1)))
    return float(np.concatenate(values).mean())


def by_scikit_learn(queries: np.ndarray, database: np.ndarray, labels: np.ndarray, base_labels: np.ndarray) -> float:
    pairs = zip(queries, labels, strict=True)
    return float(np.mean([average_precision_score(base_labels == label, database @ query) for query, label in pairs]))


if __name__ == "__main__":
    main()
