"""streams: order, errors, a bounded look-ahead, torch's threads given back."""

import threading
import time

import pytest
import torch

from tcq_hf.index.streams import in_streams, stream_count


@pytest.fixture(params=[1, 2, 3, 64])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("items", [0, 1, 2, 5, 40])
def test_results_come_in_the_order_of_the_items(threads, items):
    def work(item):
        time.sleep(0.002 * (item % 3))  # later items overtake earlier ones
        return -item

    assert list(in_streams(work, range(items))) == [-item for item in range(items)]


def test_the_threads_of_torch_are_shared_out_and_given_back(threads):
    inside = list(in_streams(lambda _: torch.get_num_threads(), range(20)))
    assert set(inside) == {threads // stream_count(20)}
    assert torch.get_num_threads() == threads
    # Threads that are born later begin with the same number.
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [threads]


def test_streams_run_side_by_side():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        barrier = threading.Barrier(2, timeout=20)
        assert len(list(in_streams(lambda _: barrier.wait(), range(6)))) == 6
    finally:
        torch.set_num_threads(before)


def test_an_error_comes_in_its_turn_and_ends_the_work(threads):
    started = []

    def work(item):
        started.append(item)
        if item == 4:
            raise ValueError("item 4")
        return item

    results = in_streams(work, range(1000))
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="item 4"):
        next(results)
    assert len(started) <= 5 + 2 * stream_count(1000)
    assert torch.get_num_threads() == threads


def test_no_more_than_two_items_a_stream_are_ahead_of_the_reader(threads):
    started = []
    results = in_streams(lambda item: started.append(item), range(1000))
    for read in range(5):
        next(results)
        assert len(started) <= read + 1 + 2 * stream_count(1000)
    results.close()
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("items", "expected"), [(0, 1), (1, 1), (2, 2), (100, 8)])
def test_there_are_as_many_streams_as_threads_items_and_the_limit_allow(items, expected):
    before = torch.get_num_threads()
    torch.set_num_threads(64)
    try:
        assert stream_count(items) == expected
    finally:
        torch.set_num_threads(before)
