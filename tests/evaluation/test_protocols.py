"""CIFAR-10 by its published rule, any labelled dataset, validation inside train."""

import hashlib

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from tcq_hf.evaluation.metrics import evaluate
from tcq_hf.evaluation.protocols import PROTOCOLS, by_labels, cifar10_i, cifar10_ii, validation

FIRST = {"train": [6, 9, 9, 4, 1, 1, 2, 7, 8, 3], "test": [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]}
PERMUTATIONS = ([4827, 1775, 4027], [724, 324, 1224], [3642, 2268, 271])


@pytest.fixture(scope="module")
def cifar(data, tmp_path_factory):
    """The real CIFAR-10, its rows in no order."""
    return datasets.load_dataset(str(data / "cifar10"), cache_dir=str(tmp_path_factory.mktemp("cifar")))


def label_rows(labels, names=None):
    columns = {"label": list(labels)} | ({"name": list(names)} if names is not None else {})
    return Dataset.from_dict(columns)


@pytest.fixture(scope="module")
def official():
    """60,000 labels that begin as the official files do, without names."""
    made = DatasetDict()
    for split, each in (("train", 5000), ("test", 1000)):
        rest = np.repeat(np.arange(10), each - np.bincount(FIRST[split], minlength=10))
        made[split] = label_rows([*FIRST[split], *np.random.default_rng(0).permutation(rest)])
    return made


def members(split, label):
    """Rows of a class, in the order of the dataset."""
    return np.flatnonzero(split.labels == label)


def disjoint(*rows):
    return len(np.unique(np.concatenate(rows))) == sum(map(len, rows))


def test_official_order_is_known_and_gives_the_published_permutations(official):
    split = cifar10_i(official)
    assert split.recipe["order"] == "official order"
    for label, permutation in enumerate(PERMUTATIONS):
        of_class = split.queries[split.labels[split.queries] == label]
        assert of_class[:3].tolist() == members(split, label)[permutation].tolist()
    generator = np.random.RandomState(2021)
    slow_queries, slow_database, slow_train = [], [], []
    for label in range(10):
        order = generator.permutation(6000)
        rows = [row for row in range(60_000) if split.labels[row] == label]
        slow_queries += [rows[i] for i in order[:1000]]
        slow_database += [rows[i] for i in order[1000:]]
        slow_train += [rows[i] for i in order[1000:1500]]
    assert split.queries.tolist() == slow_queries
    assert split.database.tolist() == split.train.tolist() == slow_database
    second = cifar10_ii(official)
    assert (second.queries.tolist(), second.database.tolist()) == (slow_queries, slow_database)
    assert second.train.tolist() == slow_train
    assert split.names[:2] == ["train/0", "train/1"]
    assert split.names[50_000:50_002] == ["test/0", "test/1"]


def test_splits_may_stand_in_any_order_in_the_dictionary(official):
    turned = DatasetDict({"test": official["test"], "train": official["train"]})
    assert cifar10_i(turned).recipe == cifar10_i(official).recipe


@pytest.mark.parametrize(("protocol", "train"), [(cifar10_i, 50_000), (cifar10_ii, 5000)])
def test_real_cifar_has_the_published_sizes_and_one_hash(cifar, protocol, train):
    split = protocol(cifar)
    assert (len(split.queries), len(split.database), len(split.train), split.k) == (10_000, 50_000, train, 1000)
    assert disjoint(split.queries, split.database)
    assert set(split.train) <= set(split.database)
    for rows in (split.queries, split.database, split.train):
        assert set(np.bincount(split.labels[rows], minlength=10)) == {len(rows) // 10}
    assert split.recipe["order"] == "same rule, other order: by official split, then name"
    assert split.recipe["query_names_sha256"] == "7aedc753d534"
    names = sorted(split.names[row] for row in split.queries)
    assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:12] == "7aedc753d534"
    assert [split.dataset["label"][row] for row in split.queries[:3].tolist()] == [0, 0, 0]
    by_name = sorted(members(split, 0), key=lambda row: (row >= 50_000, split.names[row]))
    assert split.queries[:3].tolist() == [by_name[i] for i in PERMUTATIONS[0]]


def test_the_order_of_the_rows_does_not_change_a_split_by_names(cifar):
    shuffled = DatasetDict({split: rows.shuffle(seed=1) for split, rows in cifar.items()})
    split, twin = cifar10_ii(cifar), cifar10_ii(shuffled)
    for rows in ("queries", "database", "train"):
        named = [[s.names[row] for row in getattr(s, rows)] for s in (split, twin)]
        assert named[0] == named[1]
    as_they_stand = cifar10_ii(shuffled, name_column=None)
    assert as_they_stand.recipe["order"] == "same rule, other order: rows as they stand"
    assert as_they_stand.recipe["query_names_sha256"] != split.recipe["query_names_sha256"]


def test_what_is_not_cifar_is_refused(official):
    for wrong, match in (
        (official["train"], "needs a DatasetDict with the splits"),
        (DatasetDict({"train": official["train"]}), "got {'train': 50000}"),
        (DatasetDict(official | {"validation": official["test"]}), "got {.*'validation': 10000}"),
        (DatasetDict({"train": official["test"], "test": official["train"]}), "got {'train': 10000"),
    ):
        with pytest.raises(ValueError, match=match):
            cifar10_i(wrong)
    uneven = official["test"].map(lambda row: {"label": max(1, row["label"])})
    with pytest.raises(ValueError, match=r"6,000 rows of each class 0 to 9 in 'label', got {0: 5000, 1: 7000"):
        cifar10_i(DatasetDict({"train": official["train"], "test": uneven}))


def test_another_order_needs_names_that_differ(official):
    turned = DatasetDict({split: rows.select(range(len(rows) - 1, -1, -1)) for split, rows in official.items()})
    with pytest.raises(
        ValueError, match=r"not in CIFAR-10's official order and have no column 'name' .*name_column=None"
    ):
        cifar10_i(turned)
    assert "as they stand" in cifar10_i(turned, name_column=None).recipe["order"]
    twins = DatasetDict({split: rows.add_column("name", ["a"] * len(rows)) for split, rows in turned.items()})
    with pytest.raises(ValueError, match="names in 'name' must differ within a split"):
        cifar10_i(twins)


def test_a_test_split_queries_all_the_rest():
    split = by_labels(
        DatasetDict({"test": label_rows([0, 1, -1]), "train": label_rows([0] * 5), "validation": label_rows([1] * 4)})
    )
    assert split.queries.tolist() == [0, 1, 2]
    assert split.database.tolist() == split.train.tolist() == list(range(3, 12))
    assert (split.k, split.recipe["rule"]) == (9, "the test split queries all other rows")
    assert split.names[3:9] == [*(f"train/{i}" for i in range(5)), "validation/0"]
    assert "seed" not in split.recipe


@pytest.mark.parametrize("many", [False, True])
def test_without_a_test_split_a_tenth_is_drawn_and_classes_keep_their_shares(many):
    counts = np.array([200, 100, 50, 25, 15, 10, 4]) * (50 if many else 1)
    labels = np.repeat([3, 0, 8, 1, 2, 7, 5], counts)
    labels = np.random.default_rng(0).permutation(np.concatenate([labels, np.full(40, -1)]))
    split = by_labels(label_rows(labels))
    assert len(split.queries) == (1000 if many else 40)
    assert disjoint(split.queries, split.database)
    assert len(split.queries) + len(split.database) == len(labels)
    drawn = np.bincount(labels[split.queries], minlength=9)[[3, 0, 8, 1, 2, 7, 5]]
    assert np.abs(drawn - counts / counts.sum() * len(split.queries)).max() < 1
    assert (labels[split.queries] >= 0).all()
    assert split.k == 1000 if many else split.k == len(split.database)


def test_a_seed_repeats_its_draw_and_another_does_not():
    labels = np.repeat(np.arange(4), 100)
    draws = [by_labels({"all": label_rows(labels)}["all"], seed=seed) for seed in (1, 1, 2)]
    hashes = [draw.recipe["query_names_sha256"] for draw in draws]
    assert draws[0].queries.tolist() == draws[1].queries.tolist() != draws[2].queries.tolist()
    assert hashes[0] == hashes[1] != hashes[2]
    assert draws[0].recipe["seed"] == 1


def test_every_row_is_drawn_equally_often():
    labels = np.repeat([0, 1], [30, 70])
    times = np.bincount(
        np.concatenate([by_labels(label_rows(labels), seed=s).queries for s in range(400)]), minlength=100
    )
    # Each is drawn with probability 1/10: six standard errors.
    assert np.abs(times / 400 - 0.1).max() < 6 * np.sqrt(0.09 / 400)


def test_missing_labels_are_none_or_minus_one():
    features = Features({"label": ClassLabel(names=["a", "b"]), "name": Value("string")})
    rows = Dataset.from_dict({"label": [0, None, 1] * 5, "name": [f"n{i}" for i in range(15)]}, features=features)
    split = by_labels(rows)
    assert split.labels.tolist() == [0, -1, 1] * 5
    assert split.names[:2] == ["all/n0", "all/n1"]
    assert split.dataset.column_names == ["label", "name"]


def test_real_photographs_query_by_their_test_split(data, tmp_path):
    photos = datasets.load_dataset(str(data / "clothing"), cache_dir=str(tmp_path))
    split = by_labels(photos)
    assert (len(split.queries), len(split.database), split.k) == (372, 3409, 1000)
    assert split.recipe["query_names_sha256"] == "dbec86c3824f"


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (
            label_rows(["cat", "dog"]),
            r"'label' has Value\('string'\).*cast it with dataset.class_encode_column\('label'\)",
        ),
        (label_rows([0.5, 1.0]), "must be one class or int a row"),
        (label_rows([[0, 1], [1]]), "must be one class or int a row"),
        (Dataset.from_dict({"kind": [0, 1]}), r"label_column must be one of \['kind'\], got 'label'"),
        (label_rows([0, 0, 0, 1]), r"at least 2 rows, got classes of \[3, 1\] rows \(first single one: \[1\]\)"),
        (label_rows([-1, -1]), r"at least 2 rows, got classes of \[\] rows"),
        (DatasetDict({"test": label_rows([0, 1])}), r"nothing to search: the splits \['test'\]"),
        (
            DatasetDict({"train": label_rows([0, 1]), "test": label_rows([-1, -1])}),
            "no row of the test split has a label",
        ),
        (DatasetDict({"train": label_rows([0]), "test": Dataset.from_dict({"y": [0]})}), "same columns and types"),
        (DatasetDict(), "same columns and types"),
        ([0, 1], "not streamed, got list"),
    ],
)
def test_datasets_that_cannot_be_split_are_refused(rows, match):
    with pytest.raises(ValueError, match=match):
        by_labels(rows)


@pytest.mark.parametrize("protocol", [cifar10_i, cifar10_ii])
def test_validation_stays_inside_train(official, protocol):
    split = protocol(official)
    chosen = validation(split)
    assert len(chosen.queries) == min(1000, len(split.train) // 10)
    assert set(chosen.queries) | set(chosen.database) == set(split.train)
    assert disjoint(chosen.queries, chosen.database, split.queries)
    assert chosen.train.tolist() == chosen.database.tolist()
    assert set(np.bincount(chosen.labels[chosen.queries])) == {len(chosen.queries) // 10}
    assert (chosen.name, chosen.recipe["protocol"]) == (f"{split.name} validation",) * 2
    assert chosen.recipe["order"] == split.recipe["order"]
    assert chosen.recipe["query_names_sha256"] != split.recipe["query_names_sha256"]
    assert validation(split, seed=1).queries.tolist() != chosen.queries.tolist() == validation(split).queries.tolist()


def test_a_validation_can_be_validated_and_evaluated():
    split = by_labels(label_rows(np.repeat(np.arange(3), 100)))
    inner = validation(validation(split))
    assert inner.name == "labels validation validation"
    vectors = np.eye(3, dtype=np.float32)[split.labels]
    found = evaluate(
        vectors[inner.queries],
        vectors[inner.database],
        inner.labels[inner.queries],
        inner.labels[inner.database],
        k=inner.k,
    )
    assert found.precision[10] == 1.0
    assert found.k == inner.k == len(inner.database)


def test_protocols_are_found_by_name(official):
    assert list(PROTOCOLS) == ["cifar10-i", "cifar10-ii", "labels"]
    for name, protocol in PROTOCOLS.items():
        assert protocol(official, label_column="label", name_column="name").name == name
