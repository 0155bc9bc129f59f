"""Independent pieces of CPU work in, their results out in order, several at a time."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Activations of a batch are held once a stream: with more cores a stream has several.
_MOST_STREAMS = 8


def stream_count(items: int) -> int:
    """Streams that `in_streams` runs for a number of items: a core each, at most eight."""
    return max(1, min(torch.get_num_threads(), items, _MOST_STREAMS))


def in_streams(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Results of `work`, in the order of the items, from as many streams as torch has threads.

    The threads of torch are shared out among the streams. A batch that is decoded and encoded by one core never waits
    for another, whereas two cores in one forward pass wait for each other at the end of every operation.

    Args:
        work: Called once for each item, in a thread; what it raises is raised here in its turn.
        items: What to work on; at most two items a stream are under way before their results are asked for.
    """
    streams, threads = stream_count(len(items)), torch.get_num_threads()
    if streams == 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(streams, initializer=torch.set_num_threads, initargs=(threads // streams,))
    under_way = deque()
    try:
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) > 2 * streams:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # set_num_threads() also sets what threads that are born later begin with.
        torch.set_num_threads(threads)
