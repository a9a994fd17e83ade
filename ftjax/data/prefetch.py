"""Batches on the device ahead of time, with the data state of the batch in hand rather than of the one being made.

loader = prefetch_to_device(batches, put=lambda b: jax.device_put(b, sharding), depth=2)
batch = next(loader)
loader.state()          # the place after `batch`: save this one
loader.wait_s           # seconds the training loop has waited for data so far
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger("ftjax")


@dataclass(frozen=True)
class _Item:
    batch: Any = None
    state: Any = None
    error: BaseException | None = None


class DevicePrefetch(Iterator[Any]):
    """See `prefetch_to_device`.

    Attributes:
      wait_s: seconds spent waiting in `next` so far.
      last_wait_s: seconds of the last one.
    """

    def __init__(
        self, iterator: Iterator[Any], put: Callable[[Any], Any], depth: int, slow_s: float, say: Callable[[str], None]
    ):
        self._iterator, self._put, self._slow_s, self._say = iterator, put, slow_s, say
        self._state_of = getattr(iterator, "state", lambda: None)
        self._state = self._state_of()
        self._queue: queue.Queue[_Item] = queue.Queue(maxsize=max(depth, 1))
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="ftjax-prefetch", daemon=True) if depth else None
        self.wait_s = self.last_wait_s = 0.0
        if self._thread:
            self._thread.start()

    def _make(self) -> _Item:
        try:
            batch = next(self._iterator)
            return _Item(self._put(batch), self._state_of())
        except BaseException as e:  # travels to the consumer, which raises it
            return _Item(error=e)

    def _fill(self) -> None:
        while not self._stop.is_set():
            item = self._make()
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    pass
            if item.error is not None:
                return

    def __next__(self) -> Any:
        if self._error is not None:
            raise self._error
        start = time.perf_counter()
        item = self._get(start) if self._thread else self._make()
        self.last_wait_s = time.perf_counter() - start
        self.wait_s += self.last_wait_s
        if item.error is not None:
            self._error = item.error
            raise item.error
        self._state = item.state
        return item.batch

    def _get(self, start: float) -> _Item:
        said = 0.0
        while True:
            try:
                return self._queue.get(timeout=self._slow_s)
            except queue.Empty:
                waited = time.perf_counter() - start
                if waited > 2 * said:  # then at twice the time, and so on
                    self._say(f"still waiting for data after {waited:.0f} s: the loader is slow or stuck")
                    said = waited

    def state(self) -> Any:
        """The data state after the batch last returned: what a checkpoint must hold."""
        return self._state

    def close(self) -> None:
        """Stops the thread; what was prepared ahead is dropped."""
        self._stop.set()
        if self._thread:
            self._thread.join()


def prefetch_to_device(
    iterator: Iterator[Any],
    put: Callable[[Any], Any],
    depth: int = 2,
    *,
    slow_s: float = 60.0,
    say: Callable[[str], None] = _log.warning,
) -> DevicePrefetch:
    """Takes batches from `iterator` and puts them on the device in a background thread.

    Args:
      iterator: gives host batches; its `state()`, if it has one, is carried along with each.
      put: makes device arrays of a batch.
      depth: batches kept ready; 0 works in the calling thread.
      slow_s: seconds of waiting after which `say` is told, again at each doubling.
      say: takes one line of text.

    Returns:
      An iterator with `state()`, `wait_s`, `last_wait_s` and `close()`. An exception of the loader is raised by `next`.
    """
    return DevicePrefetch(iterator, put, depth, slow_s, say)
