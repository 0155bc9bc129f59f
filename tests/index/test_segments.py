"""segments: rows that come and go in a folder, against one index of the same rows; damage, death and company."""

import json
import multiprocessing
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
from datasets import Dataset
from numpy.testing import assert_array_equal

from tcq_hf import build_index, load_index
from tcq_hf.index import segment_files, segments
from tcq_hf.index.code_index import CodeIndex
from tcq_hf.index.faiss_index import check_index_belongs
from tcq_hf.index.segments import SegmentedIndex


def unit(*shape, seed=0):
    drawn = np.random.default_rng(seed).standard_normal(shape)
    return (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(np.float32)


CODEBOOKS = unit(4, 256, 4)
CODES = np.random.default_rng(1).integers(0, 256, (1000, 4)).astype(np.uint8)
QUERIES = unit(5, 4, 4, seed=2).reshape(5, 16)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "living"


@pytest.fixture
def filled(folder):
    """1,000 rows in three segments."""
    index = SegmentedIndex.create(folder, CODEBOOKS, model_id="my-model")
    for start, stop in ((0, 400), (400, 401), (401, 1000)):
        index.append(CODES[start:stop])
    return index


def is_the_index(index, codes, ids):
    """Whether an index holds these rows and answers as one FAISS index of them does."""
    order = np.argsort(index.ids())
    assert_array_equal(index.ids()[order], ids)
    assert_array_equal(index.codes_array()[order], codes)
    assert index.ntotal == len(index) == len(codes)
    for k in (1, min(50, len(codes)), len(codes)):
        scores, found = index.search(QUERIES, k)
        assert_array_equal(scores, build_index(CODEBOOKS, codes).search(QUERIES, k)[0])
        rows = np.searchsorted(ids, found)
        words = CODEBOOKS[np.arange(4), codes[rows]].reshape(*rows.shape, -1)
        # Sums of four inner products of unit vectors in float32.
        assert np.abs(np.einsum("qd,qkd->qk", QUERIES, words) - scores).max() <= 1e-5
        assert all(len({*row}) == k for row in found.tolist())


# --- Rows ------------------------------------------------------------------------------------------------------------


def test_rows_appended_in_parts_are_the_index(filled, folder):
    is_the_index(filled, CODES, np.arange(1000))
    is_the_index(SegmentedIndex.open(folder, CODEBOOKS, verify=True), CODES, np.arange(1000))
    assert [segment.rows for segment in filled.segments] == [400, 1, 599]


def test_appending_leaves_the_other_files_alone(filled, folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.faiss")}
    assert_array_equal(filled.append(CODES[:7]), np.arange(1000, 1007))
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.faiss")}
    assert set(after) - set(before) == {"segment-00003.faiss"}
    assert before.items() <= after.items()


def test_removed_rows_are_gone_and_the_others_keep_their_ids(filled, folder):
    gone = np.array([3, 400, 401, 999, 17])
    whole = filled.segments[0].file
    assert filled.remove(gone) == 5
    kept = np.setdiff1d(np.arange(1000), gone)
    for index in (filled, SegmentedIndex.open(folder, verify=True)):
        is_the_index(index, CODES[kept], kept)
    assert [segment.rows for segment in filled.segments] == [398, 597]
    assert not (folder / whole).exists()
    assert filled.remove(np.arange(402, 999)) == 597
    assert len(filled.segments) == 1
    # Ids are not used twice.
    assert_array_equal(filled.append(CODES[:2]), [1000, 1001])


def test_only_segments_that_lose_rows_are_written(filled, folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.faiss")}
    filled.remove([500])
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.faiss")}
    assert set(before) - set(after) == {"segment-00002.faiss"}
    assert {name: after[name] for name in before if name in after}.items() <= before.items()


def test_all_rows_may_go_and_come_again(filled, folder):
    filled.remove(np.arange(1000))
    assert (filled.ntotal, filled.segments) == (0, [])
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == ["codebooks.faiss", "index.json"]
    with pytest.raises(ValueError, match="k must be from 1 to 0"):
        filled.search(QUERIES, 1)
    filled.append(CODES, ids=np.arange(1000))
    is_the_index(filled, CODES, np.arange(1000))


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_merging_and_sharding_keep_rows_and_ids(filled, folder, parts):
    filled.remove([5, 600])
    filled.merge(parts)
    kept = np.setdiff1d(np.arange(1000), [5, 600])
    for index in (filled, SegmentedIndex.open(folder, verify=True)):
        is_the_index(index, CODES[kept], kept)
        assert len(index.segments) == parts
        sizes = [segment.rows for segment in index.segments]
        assert max(sizes) - min(sizes) <= 1
    assert len([*folder.glob("segment-*.faiss")]) == parts


def test_ids_may_be_any_numbers(folder):
    index = SegmentedIndex.create(folder, CODEBOOKS)
    ids = np.random.default_rng(0).permutation(10**12 + np.arange(1000))
    index.append(CODES[:600], ids=ids[:600])
    index.append(CODES[600:], ids=ids[600:].tolist())
    order = np.argsort(ids)
    is_the_index(SegmentedIndex.open(folder, verify=True), CODES[order], ids[order])
    assert_array_equal(index.append(CODES[:1]), [10**12 + 1000])


def test_ids_end_where_64_bits_do(folder):
    index = SegmentedIndex.create(folder, CODEBOOKS)
    index.append(CODES[:1], ids=[2**63 - 2])
    with pytest.raises(ValueError, match=r"go on from 9223372036854775807 would pass 2\*\*63 - 2; give ids"):
        index.append(CODES[1:2])
    index.append(CODES[1:2], ids=[5])
    is_the_index(SegmentedIndex.open(folder), CODES[1::-1], np.array([5, 2**63 - 2]))


def test_nothing_to_do_changes_nothing(filled, folder):
    before = (folder / "index.json").read_text()
    assert len(filled.append(CODES[:0])) == 0
    assert filled.remove([]) == 0
    assert (folder / "index.json").read_text() == before


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_exported_file_is_read_by_datasets(filled, tmp_path, mode):
    filled.remove([0, 10])
    ids = filled.export(tmp_path / "index.faiss", mode)
    dataset = Dataset.from_dict({"row": range(1000)}).select(ids)
    dataset.load_faiss_index("codes", tmp_path / "index.faiss")
    scores, rows = dataset.search("codes", QUERIES[0], k=9)
    expected, found = filled.search(QUERIES[:1], 9)
    assert_array_equal(scores, expected[0])
    # Rows of equal score may come in another order.
    assert {*ids[rows].tolist()} == {*found[0].tolist()}
    assert dataset[int(rows[0])]["row"] == ids[rows[0]]
    assert load_index(tmp_path / "index.faiss", CODEBOOKS).ntotal == 998


def test_plain_faiss_reads_a_segment(filled, folder):
    plain = faiss.read_index(str(folder / filled.segments[0].file))
    assert_array_equal(plain.search(QUERIES, 5)[0], build_index(CODEBOOKS, CODES[:400]).search(QUERIES, 5)[0])


def test_segments_are_mapped_and_ranges_of_ids_not_held(filled):
    assert not any(part.index.codes.is_owned for part in filled._parts)
    assert not any(isinstance(held, np.ndarray) for part in filled._parts for held in vars(part).values())


def test_an_index_knows_its_model(filled, folder):
    check_index_belongs(filled, CODEBOOKS)
    assert json.loads((folder / "index.json").read_text())["model"] == "my-model"
    for other in (CODEBOOKS[:, ::-1], CODEBOOKS[:2]):
        with pytest.raises(ValueError, match="belongs to another model"):
            SegmentedIndex.open(folder, other)
        with pytest.raises(ValueError, match="belongs to another model"):
            check_index_belongs(filled, other)


@pytest.mark.parametrize("name", ["codebooks.faiss", "segment-00000.faiss", "segment-00002.faiss"])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_truncated_file_is_refused(filled, folder, name, share):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=rf"{name} has .* truncated"):
        SegmentedIndex.open(folder)


def test_a_missing_file_is_named(filled, folder):
    filled.remove([3])
    for name in (filled.segments[0].ids, filled.segments[1].file, "index.json"):
        os.rename(folder / name, folder / "elsewhere")
        with pytest.raises(FileNotFoundError, match=name):
            SegmentedIndex.open(folder)
        os.rename(folder / "elsewhere", folder / name)


def test_swapped_segments_are_refused_by_their_sums(filled, folder):
    filled.merge(2)
    first, second = (folder / segment.file for segment in filled.segments)
    shutil.move(first, folder / "aside")
    shutil.move(second, first)
    shutil.move(folder / "aside", second)
    SegmentedIndex.open(folder)  # sizes and codebooks are right
    with pytest.raises(ValueError, match=r"segment-00003\.faiss has another sum"):
        SegmentedIndex.open(folder, verify=True)


def test_a_segment_of_another_model_is_refused(filled, folder, tmp_path):
    other = SegmentedIndex.create(tmp_path / "other", unit(4, 256, 4, seed=8))
    other.append(CODES[:400])
    shutil.copy(tmp_path / "other" / "segment-00000.faiss", folder / "segment-00000.faiss")
    with pytest.raises(ValueError, match="belongs to another model"):
        SegmentedIndex.open(folder)


def test_changed_ids_are_refused(filled, folder):
    filled.remove([3])
    path = folder / filled.segments[0].ids
    np.save(path, np.load(path)[::-1])
    with pytest.raises(ValueError, match=r"ids\.npy has another sum"):
        SegmentedIndex.open(folder, verify=True)
    np.save(path, np.load(path)[:-1])
    with pytest.raises(ValueError, match="replaced"):
        SegmentedIndex.open(folder)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="truncated"):
        SegmentedIndex.open(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[:100],
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace("segment-00000.faiss", "../segment-00000.faiss"),
        lambda text: text.replace("codebooks.faiss", "../codebooks.faiss"),
        lambda text: text.replace('"changes": 3', '"changes": "?"'),
        lambda text: text.replace('"first": 400', '"first": null'),
        lambda text: text.replace('"model": "my-model",', ""),
    ],
)
def test_a_damaged_manifest_is_a_value_error_that_names_it(filled, folder, spoil):
    path = folder / "index.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        SegmentedIndex.open(folder)


def test_a_folder_without_an_index_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
        SegmentedIndex.open(tmp_path)


def test_an_index_is_not_made_twice(filled, folder):
    with pytest.raises(FileExistsError, match=r"use SegmentedIndex\.open"):
        SegmentedIndex.create(folder, CODEBOOKS)


# --- Death and company -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["append", "remove", "merge"])
def test_a_change_that_dies_leaves_the_index_as_it_was(filled, folder, change, monkeypatch):
    def die(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(segments, "write_manifest", die)
    changes = {"append": lambda: filled.append(CODES[:9]), "remove": lambda: filled.remove([1]), "merge": filled.merge}
    with pytest.raises(OSError, match="no space"):
        changes[change]()
    monkeypatch.undo()
    for index in (filled, SegmentedIndex.open(folder, verify=True)):
        is_the_index(index, CODES, np.arange(1000))
    filled.append(CODES[:9])
    is_the_index(SegmentedIndex.open(folder, verify=True), np.concatenate([CODES, CODES[:9]]), np.arange(1009))


def test_an_index_made_anew_in_the_folder_is_not_changed_by_the_old_one(filled, folder):
    shutil.rmtree(folder)
    new = SegmentedIndex.create(folder, CODEBOOKS)
    for start in range(0, 30, 10):  # as many changes as the old one has seen
        new.append(CODES[start : start + 10])
    for change in (lambda: filled.append(CODES[:3]), lambda: filled.remove([1]), filled.merge):
        with pytest.raises(ValueError, match=r"another index was made in .*; open it again"):
            change()
    is_the_index(SegmentedIndex.open(folder, verify=True), CODES[:30], np.arange(30))


def append_ten(folder, start):
    SegmentedIndex.open(folder, CODEBOOKS).append(CODES[start : start + 10])


def test_processes_that_append_at_once_lose_nothing(folder):
    index = SegmentedIndex.create(folder, CODEBOOKS)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=append_ten, args=(folder, start)) for start in range(0, 30, 10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    found = SegmentedIndex.open(folder, verify=True)
    assert_array_equal(np.sort(found.ids()), np.arange(30))
    assert_array_equal(np.sort(found.codes_array(), axis=0), np.sort(CODES[:30], axis=0))
    # One that was opened before sees them with its next change.
    index.append(CODES[30:31])
    assert_array_equal(np.sort(index.ids()), np.arange(31))


def change_within(monkeypatch, method, change):
    """Let a change come when this method of a segment's index is called for the first time."""
    real = getattr(CodeIndex, method)

    def changed(self, *args):
        monkeypatch.setattr(CodeIndex, method, real)
        change()
        return real(self, *args)

    monkeypatch.setattr(CodeIndex, method, changed)


@pytest.mark.parametrize("change", [SegmentedIndex.merge, lambda index: index.remove(np.arange(400, 1000))])
def test_a_search_goes_on_over_the_rows_it_began_with(filled, monkeypatch, change):
    expected = filled.search(QUERIES, 1000)
    change_within(monkeypatch, "search", lambda: change(filled))
    assert_array_equal(filled.search(QUERIES, 1000), expected)
    assert len(filled.segments) == 1


def test_codes_and_ids_are_of_one_moment(filled, tmp_path, monkeypatch):
    change_within(monkeypatch, "codes_array", lambda: filled.remove(np.arange(400)))
    index, ids = filled.in_memory()
    assert_array_equal(ids, np.arange(1000))
    assert_array_equal(index.codes_array(), CODES)
    change_within(monkeypatch, "codes_array", lambda: filled.append(CODES[:400], np.arange(400)))
    ids = filled.export(tmp_path / "index.faiss")
    assert_array_equal(load_index(tmp_path / "index.faiss").codes_array(), CODES[ids])
    assert len(ids) == 600


def test_searches_beside_changes_see_whole_ones(folder):
    """Rows come and go in pairs of one code, with ids 2i and 2i + 1, from two threads."""
    index = SegmentedIndex.create(folder, CODEBOOKS)
    index.append(np.repeat(CODES[:50], 2, axis=0), np.arange(100))
    stop = threading.Event()

    def look():
        looks = 0
        while not stop.is_set():
            ids = np.sort(index.search(QUERIES, 40)[1])
            assert_array_equal(ids[:, 0::2], ids[:, 1::2] - 1)
            assert not (ids[:, 0::2] % 2).any()
            looks += 1
        return looks

    def change(first, last):
        for start in range(first, last, 5):
            index.append(np.repeat(CODES[start : start + 5], 2, axis=0), np.arange(2 * start, 2 * start + 10))
            index.remove(np.arange(2 * start, 2 * start + 4))
            if start % 25 == 0:
                index.merge()

    with ThreadPoolExecutor(6) as pool:
        looking = [pool.submit(look) for _ in range(4)]
        try:
            for changing in [pool.submit(change, 50, 100), pool.submit(change, 100, 150)]:
                changing.result(60)
        finally:
            stop.set()
        assert all(each.result(60) for each in looking)
    kept = [i for i in range(300) if i < 100 or i % 10 >= 4]
    is_the_index(SegmentedIndex.open(folder, verify=True), np.repeat(CODES[:150], 2, axis=0)[kept], np.array(kept))


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda index: index.append(CODES[:, :3]), ValueError, r"shape \[N, 4\], got \[1000, 3\]"),
        (lambda index: index.append(CODES / 2), TypeError, "codes must be integers"),
        (lambda index: index.append(CODES[:3].astype(int) + 250), ValueError, "below codebook_size=256"),
        (lambda index: index.append(CODES[:3], ids=[1000, 1001]), ValueError, "3 rows but 2 ids"),
        (lambda index: index.append(CODES[:2], ids=[1000, 1000]), ValueError, "id 1000 is given twice"),
        (lambda index: index.append(CODES[:2], ids=[1000, 999]), ValueError, "id 999 is in the index already"),
        (lambda index: index.append(CODES[:2], ids=[-1, 1000]), ValueError, "at least 0, got -1"),
        (lambda index: index.append(CODES[:2], ids=[1000, 2**63 - 1]), ValueError, r"at most 2\*\*63 - 2, got 922"),
        (lambda index: index.append(CODES[:2], ids=[0.5, 1]), TypeError, "ids must be integers"),
        (lambda index: index.remove([5, 1000]), ValueError, "id 1000 is not in the index"),
        (lambda index: index.remove(5), TypeError, r"ids must be integers \[n\]"),
        (lambda index: index.merge(0), ValueError, "parts must be from 1 to 1000, the rows of the index, got 0"),
        (lambda index: index.merge(1001), ValueError, "got 1001"),
        (lambda index: index.search(QUERIES, 0), ValueError, "k must be from 1 to 1000"),
        (lambda index: index.search(QUERIES, 1001), ValueError, "got 1001"),
        (lambda index: index.search(QUERIES[:, 1:], 3), ValueError, r"queries must have shape \[n, 16\]"),
    ],
)
def test_bad_input_changes_nothing(filled, folder, call, error, match):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(error, match=match):
        call(filled)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    is_the_index(filled, CODES, np.arange(1000))


def test_a_read_only_folder_is_opened(filled, folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(segment_files, "FileLock", None)
    is_the_index(SegmentedIndex.open(folder), CODES, np.arange(1000))
