"""Vectors and labels, or scores and relevance, in, figures out. NumPy only.

Two readings of mAP@k stand side by side wherever figures are reported. Both sum P(r) rel(r) over the ranks r <= k,
where P(r) is the share of relevant rows among the first r.

| | published | strict |
|---|---|---|
| the sum is divided by | the relevant rows found within k | min(k, relevant rows in the database) |
| rows of equal score stand in | a random order, seeded | every order, averaged in closed form |
| queries without a relevant row | count 0 | are left out and counted |

Precision, recall and their curve follow the strict rules. Nothing depends on where in the database a row stands.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from . import ranking
from .ranking import Ties


@dataclass(frozen=True, eq=False)
class Curve:
    """Precision and recall at equal rank, averaged over the queries.

    Args:
        ranks: int64 `[P]`, from 1 to all rows, dense at both ends.
        precision: float64 `[P]`, share of relevant rows among the first `ranks`.
        recall: float64 `[P]`, share of all relevant rows that are among the first `ranks`.
    """

    ranks: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Figures of one search; the table at the head of the module says what published and strict mean.

    Args:
        map_published: mAP@k: hits-in-k denominator, seeded random ties, queries without a relevant row count 0.
        map_strict: mAP@k: min(k, relevant) denominator, expected ties, queries without a relevant row left out.
        precision: Precision by rank.
        recall: Recall by rank.
        chance: Mean share of relevant rows over the queries that have one: the precision of a random order.
        k: Cut-off of both mAPs, at most the rows to rank.
        seed: Seed of the published tie order.
        num_queries: All queries.
        num_unlabelled: Queries without a label.
        num_unmatched: Queries with a label that no row to rank shares.
        num_ranked: Rows that each query ranks.
        average_precision: float64 `[Q]`, published, of each query: what `paired_bootstrap` compares.
        curve: Precision and recall over all rows, where asked for.
    """

    map_published: float
    map_strict: float
    precision: dict[int, float]
    recall: dict[int, float]
    chance: float
    k: int
    seed: int
    num_queries: int
    num_unlabelled: int
    num_unmatched: int
    num_ranked: int
    average_precision: np.ndarray
    curve: Curve | None = None

    def to_dict(self) -> dict[str, Any]:
        """Figures by name, ready for JSON: `map_published`, `map_strict`, `precision@10`, `recall@10`, `k`, ..."""
        figures = asdict(self)
        del figures["average_precision"]
        for name in ("precision", "recall"):
            figures |= {f"{name}@{rank}": value for rank, value in figures.pop(name).items()}
        curve = figures.pop("curve")
        return figures | ({"curve": {name: values.tolist() for name, values in curve.items()}} if curve else {})


def evaluate(
    queries: np.ndarray,
    database: np.ndarray,
    query_labels: np.ndarray,
    database_labels: np.ndarray,
    *,
    k: int = 1000,
    at: Sequence[int] | None = None,
    seed: int = 0,
    exclude_self: bool = False,
    curve: bool = False,
    threads: int | None = None,
) -> Evaluation:
    """Rank the database by inner product for every query and measure the rankings against labels.

    Equal rows, such as rows restored from one code, have exactly equal scores. One block of scores is held at a time.

    Args:
        queries: Float `[Q, D]`, compared in float32.
        database: Float `[N, D]`, never encoded or restored from codes; a larger inner product is closer.
        query_labels: int `[Q]`, -1 where there is none; or bool or 0/1 `[Q, C]`, any number of labels a row.
        database_labels: The same for the database. A row is relevant if it shares at least one label with the query.
        k: Cut-off of mAP; the whole ranking if larger.
        at: Ranks of precision and recall; by default those of 1, 10, 100 and 1000 that the ranking has.
        seed: Seed of the random tie order.
        exclude_self: Database row i is query i, perhaps encoded: leave it out of that query's ranking.
        curve: Measure precision and recall over all rows too.
        threads: Rankings measured at a time; by default as many as Python sees fit.

    Raises:
        ValueError: If shapes, types or labels do not fit, a vector is not finite, a rank is out of range, or no query
            has a relevant row.
    """
    queries, database = _check_vectors(queries, database)
    labels, base_labels = _check_labels(query_labels, database_labels, len(queries), len(database))
    if exclude_self and not np.array_equal(labels, base_labels):
        raise ValueError("exclude_self needs query i and database row i to be one item, but their labels differ")
    ranked = len(database) - exclude_self
    at = [rank for rank in (1, 10, 100, 1000) if rank <= ranked] if at is None else list(at)
    _check_ranks(k, at, ranked, seed)
    along = ranking.curve_ranks(ranked) if curve else []
    top, ranks = np.arange(1, min(k, ranked) + 1), np.array([*at, *along], dtype=np.int64)
    # BLAS may give equal rows different last bits: each distinct row is scored once.
    distinct, places, copies = ranking.distinct_rows(database)
    relevant_places = ranking.relevant_rows(labels, base_labels, places)

    def measure(query: int, distinct_scores: np.ndarray) -> tuple[float, float, int, np.ndarray]:
        scores = np.sort(np.repeat(distinct_scores, copies) if len(distinct) < len(places) else distinct_scores)
        hits = np.sort(distinct_scores[relevant_places(query)])
        if exclude_self:
            scores, hits = (ranking.without_one(part, distinct_scores[places[query]]) for part in (scores, hits))
        groups = ranking.tie_groups(scores, hits, top)
        published = ranking.average_precision(groups, None, "random", (seed, query))
        strict = ranking.average_precision(groups, len(hits), "expected")
        return published, strict, len(hits), ranking.hits_within(ranking.tie_groups(scores, hits, ranks))

    measured: list[tuple[float, float, int, np.ndarray]] = []
    with ThreadPoolExecutor(threads) as pool:
        for start, scores in ranking.score_blocks(queries, distinct, len(database)):
            measured += pool.map(measure, range(start, start + len(scores)), scores)
    published, strict, relevant, found = (np.array(column) for column in zip(*measured, strict=True))
    matched = relevant > 0
    if not matched.any():
        raise ValueError("no query shares a label with any database row: check query_labels and database_labels")
    unlabelled = labels < 0 if labels.ndim == 1 else ~labels.any(axis=1)
    precision = (found[matched] / ranks).mean(axis=0)
    recall = (found[matched] / relevant[matched, None]).mean(axis=0)
    return Evaluation(
        map_published=float(published.mean()),
        map_strict=float(strict[matched].mean()),
        precision=dict(zip(at, precision.tolist(), strict=False)),
        recall=dict(zip(at, recall.tolist(), strict=False)),
        chance=float(relevant[matched].mean() / ranked),
        k=len(top),
        seed=int(seed),
        num_queries=len(queries),
        num_unlabelled=int(unlabelled.sum()),
        num_unmatched=int((~matched & ~unlabelled).sum()),
        num_ranked=ranked,
        average_precision=published,
        curve=Curve(ranks[len(at) :], precision[len(at) :], recall[len(at) :]) if curve else None,
    )


def mean_average_precision(
    scores: np.ndarray,
    relevant: np.ndarray,
    k: int = 1000,
    denominator: Literal["hits", "relevant"] = "hits",
    seed: int = 0,
    ties: Ties = "random",
) -> float:
    """Mean over queries of the average precision of the k best rows, mAP@k; a query without relevant rows counts 0.

    `"hits"` divides by the relevant rows found within k (the usual figure of the hashing literature), `"relevant"` by
    min(k, relevant rows in the database). Rows of equal score are ordered at random by `seed`, never by position, or
    with `ties="expected"` in every order, averaged.

    Args:
        scores: Float `[Q, N]`, larger is closer.
        relevant: bool `[Q, N]`.
        k: Cut-off; the whole ranking if larger than N.
        denominator: See above. The hits within k are themselves random, so they do not go with expected ties.
        seed: Seed of the tie order.
        ties: See above.

    Raises:
        ValueError: If the shapes differ, k is below 1, a score is NaN or an option is unknown.
    """
    scores, relevant = _check(scores, relevant, ties)
    _check_ranks(k, (), scores.shape[1], seed)
    if denominator not in ("hits", "relevant"):
        raise ValueError(f"denominator must be 'hits' or 'relevant', got {denominator!r}")
    if ties == "expected" and denominator == "hits":
        raise ValueError("ties='expected' needs denominator='relevant': the hits within k depend on the tie order")
    ranks, values = np.arange(1, min(k, scores.shape[1]) + 1), []
    for query, row in enumerate(zip(scores, relevant, strict=True)):
        ascending, hits = ranking.sort_scores(*row)
        count = None if denominator == "hits" else len(hits)
        values.append(ranking.average_precision(ranking.tie_groups(ascending, hits, ranks), count, ties, (seed, query)))
    return float(np.mean(values))


def precision_at_k(scores: np.ndarray, relevant: np.ndarray, k: int, seed: int = 0, ties: Ties = "random") -> float:
    """Mean over queries of the share of relevant rows among the k best.

    Args:
        scores: Float `[Q, N]`, larger is closer.
        relevant: bool `[Q, N]`.
        k: Cut-off, at most N.
        seed: Seed of the tie order.
        ties: `"random"` or the mean over every order, `"expected"`.
    """
    return float(np.mean(_found(scores, relevant, k, seed, ties)[0]) / k)


def recall_at_k(scores: np.ndarray, relevant: np.ndarray, k: int, seed: int = 0, ties: Ties = "random") -> float:
    """Mean over the queries with relevant rows of the share of them among the k best; arguments of `precision_at_k`."""
    found, count = _found(scores, relevant, k, seed, ties)
    if not count.any():
        raise ValueError("recall needs a query with a relevant row, relevant is False everywhere")
    return float(np.mean(found[count > 0] / count[count > 0]))


def _found(scores: np.ndarray, relevant: np.ndarray, k: int, seed: int, ties: Ties) -> tuple[np.ndarray, np.ndarray]:
    """Relevant rows among the k best, and all of them, of each query, `[Q]`."""
    scores, relevant = _check(scores, relevant, ties)
    _check_ranks(1, (k,), scores.shape[1], seed)
    found = []
    for query, row in enumerate(zip(scores, relevant, strict=True)):
        groups = ranking.tie_groups(*ranking.sort_scores(*row), np.arange(1, k + 1))
        found.append(
            ranking.hits_within(groups)[-1] if ties == "expected" else ranking.draw_hits(groups, (seed, query)).sum()
        )
    return np.array(found), relevant.sum(axis=1)


def _check_vectors(queries: np.ndarray, database: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    checked = []
    for name, vectors in (("queries", queries), ("database", database)):
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or not vectors.size or vectors.dtype.kind != "f":
            raise ValueError(
                f"{name} must be float vectors [n, D], codes restored first, got {vectors.dtype} {vectors.shape}"
            )
        # So no inner product leaves float32.
        fit = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64) < np.finfo(np.float32).max
        if not fit.all():
            raise ValueError(f"{name} must be finite and shorter than 1e19, row {int(fit.argmin())} is not")
        checked.append(vectors.astype(np.float32, copy=False))
    if checked[0].shape[1] != checked[1].shape[1]:
        raise ValueError(f"queries and database must have one width, got {checked[0].shape} and {checked[1].shape}")
    return checked[0], checked[1]


def _check_labels(
    query_labels: np.ndarray, database_labels: np.ndarray, num_queries: int, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels as int64 `[n]` or 0/1 float32 `[n, C]`."""
    checked = []
    for name, labels, count in (
        ("query_labels", query_labels, num_queries),
        ("database_labels", database_labels, num_rows),
    ):
        labels = np.asarray(labels)
        single = labels.ndim == 1 and labels.dtype.kind in "iu" and (labels.astype(np.int64) >= -1).all()
        several = labels.ndim == 2 and labels.dtype.kind in "iub" and np.isin(labels, (0, 1)).all()
        if len(labels) != count or not (single or several):
            raise ValueError(
                f"{name} must be int [{count}], -1 for no label, or 0/1 [{count}, C], got {labels.dtype} {labels.shape}"
            )
        checked.append(labels.astype(np.int64 if single else np.float32))
    if checked[0].shape[1:] != checked[1].shape[1:]:
        raise ValueError(f"both labels must be [n], or [n, C] of one C, got {checked[0].shape} and {checked[1].shape}")
    return checked[0], checked[1]


def _check_ranks(k: int, at: Sequence[int], rows: int, seed: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not rows:
        raise ValueError("exclude_self leaves no row to rank: database must have at least 2 rows")
    if not all(1 <= rank <= rows for rank in at):
        raise ValueError(f"ranks must be from 1 to {rows}, the rows to rank, got {list(at)}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")


def _check(scores: np.ndarray, relevant: np.ndarray, ties: Ties) -> tuple[np.ndarray, np.ndarray]:
    scores, relevant = np.asarray(scores), np.asarray(relevant, dtype=bool)
    if scores.ndim != 2 or scores.shape != relevant.shape or not scores.size:
        raise ValueError(f"scores and relevant must have one shape [Q, N], got {scores.shape} and {relevant.shape}")
    if ties not in ("random", "expected"):
        raise ValueError(f"ties must be 'random' or 'expected', got {ties!r}")
    broken = np.isnan(scores).any(axis=1)
    if broken.any():
        raise ValueError(f"scores must not be NaN, query {int(broken.argmax())} has one")
    return scores, relevant
