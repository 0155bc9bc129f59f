"""Labelled datasets in, who queries whom and the recipe that a figure must name out.

The published and the strict figures of `metrics.py` share every split here. Nothing here looks at a figure: options are
chosen on `validation(split)`, which holds no query of the split.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Value, concatenate_datasets

# First labels of the official files, by which their order is known.
_CIFAR10_FIRST = {"train": [6, 9, 9, 4, 1, 1, 2, 7, 8, 3], "test": [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]}
_CIFAR10_ROWS = {"train": 50_000, "test": 10_000}
_CIFAR10_SEED = 2021


@dataclass(frozen=True, eq=False)
class Split:
    """Who queries whom.

    Args:
        name: Name of the protocol.
        dataset: All rows, split after split; the row numbers below count in it.
        labels: int64 `[n]`, label of each of its rows, -1 where there is none.
        names: Name of each of its rows: split and name, or split and row.
        queries: int64 `[Q]`.
        database: int64 `[N]`, no query among them.
        train: int64 `[T]`, rows to learn from without labels, all in the database.
        k: Cut-off of mAP.
        recipe: What is printed beside a figure.
    """

    name: str
    dataset: Dataset
    labels: np.ndarray
    names: list[str]
    queries: np.ndarray
    database: np.ndarray
    train: np.ndarray
    k: int
    recipe: dict[str, str | int]


def cifar10_i(dataset: DatasetDict, label_column: str = "label", name_column: str | None = "name") -> Split:
    """CIFAR-10 (I): 1,000 queries of each class; the other 50,000 rows are database and train.

    The rule permutes the 6,000 rows of each class in official order, with one `RandomState(2021)`. Rows in another
    order are sorted by official split and name first; the split then differs, and the recipe says "same rule, other
    order".

    Args:
        dataset: CIFAR-10 with its splits `train` and `test`.
        label_column: Column of the classes 0 to 9.
        name_column: Column of names, different within a split; needed where the order is not the official one. None
            takes the rows as they stand.

    Raises:
        ValueError: If splits, labels or names are not those of CIFAR-10.
    """
    return _cifar10("cifar10-i", 5000, dataset, label_column, name_column)


def cifar10_ii(dataset: DatasetDict, label_column: str = "label", name_column: str | None = "name") -> Split:
    """CIFAR-10 (II): queries and database of `cifar10_i`; train is the first 500 database rows of each class."""
    return _cifar10("cifar10-ii", 500, dataset, label_column, name_column)


def by_labels(
    dataset: Dataset | DatasetDict, label_column: str = "label", name_column: str | None = "name", seed: int = 0
) -> Split:
    """Any dataset with a class a row: its `test` split queries the rest, or 10 % of its rows do, at most 1,000.

    Args:
        dataset: One dataset, or its splits.
        label_column: Column of classes; rows without one (None or -1) are never drawn as queries.
        name_column: Column of names for the hash of the queries; row numbers where there is no such column.
        seed: Seed of the draw, which keeps the shares of the classes. Not used if there is a `test` split.

    Raises:
        ValueError: If the labels are no classes, nothing is left to search, or a class has one row where 10 % of it are
            to be drawn.
    """
    if not isinstance(dataset, (Dataset, DatasetDict)):
        raise ValueError(f"dataset must be a Dataset or DatasetDict that is not streamed, got {type(dataset).__name__}")
    splits = dataset if isinstance(dataset, DatasetDict) else DatasetDict({"all": dataset})
    rows, origins = _join(splits)
    labels, names = _labels(rows, label_column), _names(rows, origins, name_column)
    if "test" in splits:
        queries, rule = np.flatnonzero(origins == "test"), "the test split queries all other rows"
        if not (labels[queries] >= 0).any():
            raise ValueError(f"no row of the test split has a label in {label_column!r}: leave this split out")
    else:
        queries, rule = _draw(labels, np.arange(len(rows)), seed), "10 % of each class, at most 1,000, query the rest"
    database = np.setdiff1d(np.arange(len(rows)), queries)
    if not len(database):
        raise ValueError(f"nothing to search: the splits {list(splits)} have no row beside the queries")
    about = {"protocol": "labels", "rule": rule} | ({} if "test" in splits else {"seed": seed})
    k = min(1000, len(database))
    recipe = _recipe(about, names, queries, database, database, k)
    return Split("labels", rows, labels, names, queries, database, database, k, recipe)


PROTOCOLS: dict[str, Callable[..., Split]] = {"cifar10-i": cifar10_i, "cifar10-ii": cifar10_ii, "labels": by_labels}


def validation(split: Split, seed: int = 0) -> Split:
    """A split of the train rows alone, to choose options on: 10 % of each class, at most 1,000 rows, query the rest.

    Raises:
        ValueError: If a class has one train row.
    """
    queries = _draw(split.labels, split.train, seed)
    database = np.setdiff1d(split.train, queries)
    name, k = f"{split.name} validation", min(split.k, len(database))
    about = {"protocol": name, "rule": "10 % of each class of train, at most 1,000, query the rest", "seed": seed}
    recipe = _recipe(split.recipe | about, split.names, queries, database, database, k)
    return replace(split, name=name, queries=queries, database=database, train=database, k=k, recipe=recipe)


def _cifar10(name: str, per_class: int, dataset: DatasetDict, label_column: str, name_column: str | None) -> Split:
    found = {split: len(rows) for split, rows in dataset.items()} if isinstance(dataset, DatasetDict) else type(dataset)
    if found != _CIFAR10_ROWS:
        raise ValueError(f"{name} needs a DatasetDict with the splits {_CIFAR10_ROWS}, got {found}")
    rows, origins = _join(DatasetDict({split: dataset[split] for split in _CIFAR10_ROWS}))
    labels, names = _labels(rows, label_column), _names(rows, origins, name_column)
    classes, counts = np.unique(labels, return_counts=True)
    if classes.tolist() != list(range(10)) or set(counts) != {6000}:
        counted = dict(zip(classes.tolist(), counts.tolist(), strict=True))
        raise ValueError(f"{name} needs 6,000 rows of each class 0 to 9 in {label_column!r}, got {counted}")
    official, order = _cifar10_order(labels, names, origins, name_column, rows.column_names)
    generator = np.random.RandomState(_CIFAR10_SEED)
    drawn = [order[labels[order] == label][generator.permutation(6000)] for label in range(10)]
    queries, database = (np.concatenate([part[cut] for part in drawn]) for cut in (slice(1000), slice(1000, None)))
    train = np.concatenate([part[1000 : 1000 + per_class] for part in drawn])
    rule = "one RandomState permutes the 6,000 rows of each class in turn: 1,000 queries, then the database"
    about = {"protocol": name, "rule": rule, "order": official, "seed": _CIFAR10_SEED}
    recipe = _recipe(about, names, queries, database, train, 1000)
    return Split(name, rows, labels, names, queries, database, train, 1000, recipe)


def _cifar10_order(
    labels: np.ndarray, names: list[str], origins: np.ndarray, name_column: str | None, columns: list[str]
) -> tuple[str, np.ndarray]:
    """What the order of the rows is called, and the rows in it, train before test."""
    rows = np.arange(len(labels))
    if all(labels[origins == split][:10].tolist() == first for split, first in _CIFAR10_FIRST.items()):
        return "official order", rows
    if name_column is None:
        return "same rule, other order: rows as they stand", rows
    if name_column not in columns:
        raise ValueError(
            f"the rows are not in CIFAR-10's official order and have no column {name_column!r} to sort by: give "
            "name_column, or name_column=None to take them as they stand"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"names in {name_column!r} must differ within a split to fix the order of the rows")
    order = np.lexsort((names, origins == "test"))
    return "same rule, other order: by official split, then name", order


def _join(splits: DatasetDict) -> tuple[Dataset, np.ndarray]:
    """All rows, and the split of each."""
    features = {split: rows.features for split, rows in splits.items()}
    if not splits or any(columns != next(iter(features.values())) for columns in features.values()):
        raise ValueError(f"the splits must have the same columns and types, got {features}")
    origins = np.repeat(list(splits), [len(rows) for rows in splits.values()])
    return concatenate_datasets(list(splits.values())), origins


def _labels(dataset: Dataset, column: str) -> np.ndarray:
    if column not in dataset.column_names:
        raise ValueError(f"label_column must be one of {dataset.column_names}, got {column!r}")
    feature = dataset.features[column]
    if not isinstance(feature, ClassLabel) and not (isinstance(feature, Value) and "int" in feature.dtype):
        raise ValueError(
            f"labels must be one class or int a row, {column!r} has {feature}: if each row has one value, cast it with "
            f"dataset.class_encode_column({column!r})"
        )
    values = dataset.with_format(None)[column][:]
    return np.array([-1 if value is None else value for value in values], dtype=np.int64)


def _names(dataset: Dataset, origins: np.ndarray, column: str | None) -> list[str]:
    if column in dataset.column_names:
        own = dataset.with_format(None)[column][:]
    else:
        _, first, split = np.unique(origins, return_index=True, return_inverse=True)
        own = np.arange(len(origins)) - first[split]
    return [f"{split}/{name}" for split, name in zip(origins, own, strict=True)]


def _draw(labels: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """A tenth of the labelled `rows`, at most 1,000, in which each class keeps its share; int64, ascending."""
    rows = rows[labels[rows] >= 0]
    classes, counts = np.unique(labels[rows], return_counts=True)
    if not len(rows) or (counts < 2).any():
        raise ValueError(
            f"queries are drawn from classes of at least 2 rows, got classes of {counts.tolist()} rows "
            f"(first single one: {classes[counts < 2][:1].tolist()}): leave single rows out or give them the label -1"
        )
    generator = np.random.default_rng(seed)
    shares = counts / len(rows) * min(1000, max(1, round(len(rows) / 10)))
    quotas = np.floor(shares).astype(int)
    # What rounding down left over goes to the largest remainders, equal ones by lot.
    remainders = np.lexsort((generator.random(len(classes)), quotas - shares))
    quotas[remainders[: round(shares.sum()) - quotas.sum()]] += 1
    drawn = [
        generator.permutation(rows[labels[rows] == label])[:quota] for label, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def _recipe(
    about: dict[str, str | int], names: list[str], queries: np.ndarray, database: np.ndarray, train: np.ndarray, k: int
) -> dict[str, str | int]:
    """`about`, the sizes, and the hash of the query names, which tells one split from another."""
    listed = "\n".join(sorted(names[row] for row in queries))
    sizes = {"queries": len(queries), "database": len(database), "train": len(train), "k": k}
    return about | sizes | {"query_names_sha256": hashlib.sha256(listed.encode()).hexdigest()[:12]}
