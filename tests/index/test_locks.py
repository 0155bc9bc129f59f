"""SharedLock: readers together, a writer alone, none starves; and the indexes, which are read while they change."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
from clustered_codes import SCORE_TOLERANCE, collection

from tcq_hf import build_index, load_index, save_index
from tcq_hf.index import code_index, faiss_index, ivf_index
from tcq_hf.index.code_index import LearnedIndex, select_rows
from tcq_hf.index.locks import SharedLock

MODES = ["exact", "fast", "ivf"]


@pytest.fixture(scope="module")
def rows():
    return collection(16, count=3000)


def paused(monkeypatch, place, name):
    """Let the first call of a function wait: an event that says that it was called, and one that lets it go on."""
    function, called, go_on = getattr(place, name), threading.Event(), threading.Event()

    def waits(*args, **kwargs):
        if not called.is_set():
            called.set()
            assert go_on.wait(30)
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, waits)
    return called, go_on


def test_readers_hold_it_together():
    lock, inside = SharedLock(), threading.Barrier(4, timeout=10)

    def read():
        with lock.read():
            inside.wait()  # passes only when all four are inside at once

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not inside.broken


def test_a_writer_is_alone():
    lock, value = SharedLock(), [0, 0]

    def write():
        for _ in range(200):
            with lock.write():
                value[0] += 1
                time.sleep(0)
                value[1] += 1

    def read():
        for _ in range(200):
            with lock.read():
                seen.append(value[0] == value[1])

    seen: list[bool] = []
    threads = [threading.Thread(target=target) for target in (write, read, write, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert value == [400, 400]
    assert len(seen) == 400
    assert all(seen)


def test_a_waiting_writer_goes_before_later_readers():
    lock, order = SharedLock(), []
    holding, release = threading.Event(), threading.Event()

    def first():
        with lock.read():
            holding.set()
            release.wait(10)

    def write():
        with lock.write():
            order.append("write")

    def late():
        with lock.read():
            order.append("read")

    threads = [threading.Thread(target=first)]
    threads[0].start()
    holding.wait(10)
    threads.append(threading.Thread(target=write))
    threads[1].start()
    while not lock._waiting:
        time.sleep(0.001)
    threads.append(threading.Thread(target=late))
    threads[2].start()
    time.sleep(0.05)
    assert order == []
    release.set()
    for thread in threads:
        thread.join(10)
    assert order == ["write", "read"]


def test_an_error_inside_gives_it_back():
    lock = SharedLock()
    for hold in (lock.read, lock.write):
        try:
            with hold():
                raise KeyError
        except KeyError:
            pass
    with lock.write():
        pass


# --- Indexes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_who_reads_an_index_waits_for_the_end_of_a_change(rows, mode, monkeypatch, tmp_path):
    codebooks, codes, queries = rows
    index, path, everyone = build_index(codebooks, codes[:300], mode), tmp_path / "index.faiss", np.arange(400)
    called, go_on = paused(monkeypatch, ivf_index if mode == "ivf" else code_index, "pack_codes")
    readers = [
        lambda: index.search(queries[:3], 400)[1],
        lambda: index.assign(queries[:3], 400),
        lambda: index.search_and_reconstruct(queries[:3], 400)[1],
        lambda: index.range_search(queries[:3], -9.0)[2].reshape(3, 400),
        lambda: select_rows(index, everyone).search(queries[:3], 400)[1],
        lambda: save_index(index, path),
    ]
    with ThreadPoolExecutor(8) as threads:
        change = threads.submit(index.add_codes, codes[300:400])
        assert called.wait(30)
        found = [threads.submit(reader) for reader in readers]
        time.sleep(0.05)  # enough for those that do not wait
        go_on.set()
        change.result()
        for read in found[:-1]:
            np.testing.assert_array_equal(np.sort(read.result(), axis=1), np.tile(everyone, (3, 1)))
        found[-1].result()
    np.testing.assert_array_equal(load_index(path).codes_array(), codes[:400])


@pytest.mark.parametrize("reader", ["search", "select_rows", "save_index"])
@pytest.mark.parametrize("mode", MODES)
def test_who_changes_an_index_waits_for_the_end_of_a_reader(rows, mode, reader, monkeypatch, tmp_path):
    codebooks, codes, queries = rows
    index, path = build_index(codebooks, codes[:300], mode), tmp_path / "index.faiss"
    place, name, read = {
        "search": (LearnedIndex, "_check_k", lambda: index.search(queries[:3], 300)),
        "select_rows": (
            code_index,
            "listed_codes" if mode == "ivf" else "packed_codes",
            lambda: select_rows(index, np.arange(300)),
        ),
        "save_index": (faiss_index, "write_faiss", lambda: save_index(index, path)),
    }[reader]
    called, go_on = paused(monkeypatch, place, name)
    with ThreadPoolExecutor(2) as threads:
        found = threads.submit(read)
        assert called.wait(30)
        change = threads.submit(index.add_codes, codes[300:320])
        time.sleep(0.03)  # enough for one that does not wait
        before = index.ntotal
        go_on.set()
        found.result()
        change.result()
    assert (before, index.ntotal) == (300, 320)
    if reader == "save_index":
        assert load_index(path).ntotal == 300


@pytest.mark.parametrize("mode", MODES)
def test_searches_beside_a_writer_see_whole_changes(rows, mode):
    """With all rows as candidates a search finds what an exhaustive one finds between two of the changes."""
    codebooks, codes, queries = rows
    index, exact = build_index(codebooks, codes[:500], mode), build_index(codebooks, codes[:500])
    options = {"params": faiss.IndexRefineSearchParameters(k_factor=1000)} if mode == "fast" else {}
    if mode == "ivf":
        index.nprobe = index.nlist
    begun, stop = threading.Barrier(5), threading.Event()

    def look():
        found = [index.search(queries[:4], 20, **options)[0]]
        begun.wait(30)
        while not stop.is_set():
            found.append(index.search(queries[:4], 20, **options)[0])
        return found

    def change(changed):
        for start in range(500, 3000, 500):
            changed.add_codes(codes[start : start + 500])
            yield
            changed.remove_ids(np.arange(100))
            yield

    states = [scores for _ in change(exact) for scores in [exact.search(queries[:4], 20)[0]]]
    states.append(build_index(codebooks, codes[:500]).search(queries[:4], 20)[0])
    with ThreadPoolExecutor(4) as threads:
        looks = [threads.submit(look) for _ in range(4)]
        begun.wait(30)
        try:
            for _ in change(index):
                time.sleep(0.005)  # for some searches
        finally:
            stop.set()
        found = [scores for each in looks for scores in each.result()]
    assert len(found) > 8  # the first ones came before the changes
    for scores in found:
        assert min(np.abs(scores - state).max() for state in states) <= SCORE_TOLERANCE
    np.testing.assert_array_equal(index.codes_array(), exact.codes_array())
