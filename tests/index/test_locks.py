"""SharedLock: readers together, a writer alone, none starves."""

import threading
import time

from tcq_hf.index.locks import SharedLock


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
