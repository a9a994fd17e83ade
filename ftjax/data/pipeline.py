"""Batches of packed rows in an order that is a function of (seed, step): resuming is jumping to a step.

    batches = Batches(prepared.train, loader=loader, batch=8, accumulate=2, seed=0, fingerprint=prepared.fingerprint)
    batch = batches.next()                        # TokenBatch of numpy arrays [2, 4, T]
    state = batches.state()                       # {"next_index": 1}
    batches.check_fingerprint(saved_fingerprint); batches.restore(state)

In each epoch the examples are shuffled, packed into rows and the rows shuffled; a batch takes the next rows, across the
border of epochs, so every batch is full. Row r of the whole run stands in epoch r // R, because every epoch has the
same number of rows R (see `packing`). Hosts build only their own rows of a batch whose order does not depend on how
many they are.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any, Literal

import grain
import jax
import numpy as np

from ftjax.config import Loader
from ftjax.data.cache import flatten
from ftjax.data.layouts import identity
from ftjax.data.packing import plan_rows
from ftjax.errors import CheckpointError, ConfigError, DataError

_FOREVER = 2**40  # batches; training is by steps
_MULTIPLE = 16  # unpacked rows are as long as the longest example, rounded up


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of 0..n-1 that depends on `key` alone.

    Drawn from the raw Philox stream, which numpy keeps stable over versions (`Generator.permutation` it does not).
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")


def row_length(loader: Loader, *parts: Any) -> int:
    """T that fits all given examples (training and held-out ones).

    Packed rows have `max_length`; unpacked ones the longest example's length, rounded up, since padding beyond is waste.
    """
    longest = max((int(p.lengths.max()) for p in parts if len(p)), default=loader.max_length)
    return (
        loader.max_length if loader.packing == "bfd" else min(loader.max_length, -(-longest // _MULTIPLE) * _MULTIPLE)
    )


class RowSource:
    """Random access to micro-batched batches; a source for `grain.MapDataset`.

    Args:
      examples: all training examples.
      loader: packing, shuffle.
      length: T.
      batch: rows per batch.
      accumulate: micro-batches per batch; divides `batch`.
      seed: seed of the order.
      shard: (index, count): which part of every micro-batch this host builds.
    """

    def __init__(
        self,
        examples: Any,
        loader: Loader,
        *,
        length: int,
        batch: int,
        accumulate: int,
        seed: int,
        shard: tuple[int, int],
    ):
        self.examples, self.length, self.batch, self.accumulate = examples, length, batch, accumulate
        self.seed, self.shard, self.shuffle = seed, shard, loader.shuffle
        self.plan = plan_rows(examples.lengths, length, loader.packing)
        self.epoch_rows = functools.lru_cache(maxsize=2)(self._epoch_rows)  # a batch may straddle two epochs

    def __len__(self) -> int:
        return _FOREVER

    def _epoch_rows(self, epoch: int) -> list[np.ndarray]:
        if not self.shuffle:
            return self.plan.fill(np.arange(len(self.examples)))
        rows = self.plan.fill(permutation(len(self.examples), self.seed, epoch, 0))
        return [rows[i] for i in permutation(len(rows), self.seed, epoch, 1)]

    def empty(self) -> Any:
        """One micro-batch over all hosts that is all padding."""
        return self.examples.build([], self.length, count=self.batch // self.accumulate)

    def row(self, index: int) -> np.ndarray:
        """The examples in row `index` of the run."""
        epoch, place = divmod(index, self.plan.rows)
        return self.epoch_rows(epoch)[place]

    def rows_of(self, step: int) -> np.ndarray:
        """Row indices of a batch that this host builds, [accumulate, batch / accumulate / hosts]."""
        host, hosts = self.shard
        rows = np.arange(step * self.batch, (step + 1) * self.batch).reshape(self.accumulate, hosts, -1)
        return rows[:, host]

    def __getitem__(self, index: Any) -> Any:
        indices = self.rows_of(index)
        flat = self.examples.build(
            [self.row(r).tolist() for r in indices.ravel().tolist()],
            self.length,
            key=(self.seed, int(index), self.shard[0]),
        )
        return jax.tree.map(lambda x: x.reshape(*indices.shape, *x.shape[1:]), flat)


class Batches:
    """An endless, exactly resumable iterator of training batches.

    Args:
      examples: training examples, each at most `loader.max_length` long.
      loader: packing, shuffle, workers (threads that build batches), prefetch.
      batch: rows per optimizer step, over all hosts and micro-batches.
      accumulate: micro-batches per step.
      seed: seed of the order.
      length: T; `max_length` unless given (see `row_length`).
      fingerprint: identity of the examples (`Prepared.fingerprint`).
      shard: (index, count) of this host.

    Attributes:
      length: T, tokens per row.
      rows_per_epoch: rows that hold every example once.
      fill_share: share of row positions that hold tokens.
      fingerprint: identity of the whole order; save it with the state.

    Raises:
      ConfigError: `batch` does not divide.
      DataError: there are no examples.
    """

    def __init__(
        self,
        examples: Any,
        *,
        loader: Loader,
        batch: int,
        accumulate: int = 1,
        seed: int = 0,
        length: int | None = None,
        fingerprint: dict[str, Any] | None = None,
        shard: tuple[int, int] = (0, 1),
    ):
        if not len(examples):
            raise DataError("there are no training examples to make batches of")
        parts = accumulate * shard[1]
        if batch % parts:
            near = (batch // parts * parts) or parts
            raise ConfigError(
                f"train.batch={batch} cannot be split into train.accumulate={accumulate} micro-batches over "
                f"{shard[1]} host{'s' * (shard[1] != 1)}: it must be a multiple of {parts}. "
                f"Nearest: {near} or {near + parts}"
            )
        self.length = length or loader.max_length
        source = RowSource(
            examples, loader, length=self.length, batch=batch, accumulate=accumulate, seed=seed, shard=shard
        )
        self.source = source
        self.rows_per_epoch, self.fill_share, self._batch = source.plan.rows, source.plan.fill_share, batch
        self.fingerprint = {
            **(fingerprint or {}),
            "order": {
                "seed": seed,
                "batch": batch,
                "packing": loader.packing,
                "length": self.length,
                "shuffle": loader.shuffle,
            },
        }
        if "examples" not in self.fingerprint:
            self.fingerprint["examples"] = identity(examples)
        options = grain.ReadOptions(num_threads=max(loader.workers, 1), prefetch_buffer_size=loader.prefetch)
        self.dataset = grain.MapDataset.source(source).to_iter_dataset(options)
        self._iterator = iter(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._iterator)

    def next(self) -> Any:
        """The next batch: numpy arrays [accumulate, batch / accumulate / hosts, T]."""
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """Where the next batch stands; JSON-able."""
        return dict(self._iterator.get_state())

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a place given by `state`; call `check_fingerprint` first."""
        self._iterator.set_state(dict(state))

    @property
    def epoch(self) -> float:
        """Epochs that lie behind the next batch."""
        return self.state()["next_index"] * self._batch / self.rows_per_epoch

    def check_fingerprint(self, saved: dict[str, Any], *, allow: Collection[str] = ()) -> None:
        """Compares the identity of these batches with that of a checkpoint.

        Args:
          saved: `fingerprint` as it was saved.
          allow: dotted keys (or their beginnings) that may differ.

        Raises:
          CheckpointError: they differ; the text shows each key with both values.
        """
        old, new = flatten(saved), flatten(self.fingerprint)
        allowed = tuple(allow)
        keys = [
            k
            for k in {**old, **new}
            if old.get(k) != new.get(k) and not any(k == a or k.startswith(a + ".") for a in allowed)
        ]
        if keys:
            width = max(map(len, keys))
            lines = [f"  {k:<{width}}  saved {_short(old.get(k))}  now {_short(new.get(k))}" for k in keys]
            raise CheckpointError(
                "the data of this run are not those of the checkpoint, so it cannot go on where it stopped:\n"
                + "\n".join(lines)
                + "\nUse the same data and settings, or start a new run (out=...)."
            )

    def close(self) -> None:
        """Stops the threads."""
        self._iterator.close()


def _short(value: Any) -> str:
    text = "(none)" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "..."


def eval_batches(
    examples: Any,
    batch: int,
    length: int,
    *,
    packing: Literal["bfd", "none"] = "none",
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Any]:
    """All examples once, in batches [batch / hosts, T]; missing rows of the last batch are padding with weight 0.

    Args:
      examples: held-out examples, each at most `length` long.
      batch: rows per batch over all hosts.
      length: T.
      packing: "bfd" shares rows; the sums over tokens are the same.
      shard: (index, count) of this host.
    """
    plan = plan_rows(examples.lengths, length, packing)
    rows = plan.fill(np.arange(len(examples)))
    host, hosts = shard
    mine = batch // hosts
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch][host * mine : (host + 1) * mine]
        yield examples.build([row.tolist() for row in part], length, count=mine, key=(0, start, host))
