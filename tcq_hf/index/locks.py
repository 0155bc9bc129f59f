"""A lock that many readers or one writer hold."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Held by any number of readers or by one writer; a writer that waits goes before readers that come later.

    Neither may be taken again by a thread that holds one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers, self._waiting, self._writing = 0, 0, False

    @contextmanager
    def read(self) -> Iterator[None]:
        """Hold it beside other readers."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writing and not self._waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        """Hold it alone."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._writing and not self._readers)
                self._writing = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
