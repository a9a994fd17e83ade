"""Batches: every example once per epoch, exact resumption, hosts that add up, and the device prefetcher."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from typing import Any

import grain
import numpy as np
import pytest

from ftjax.config import Loader
from ftjax.data.batches import Example, Examples, TokenBatch
from ftjax.data.pipeline import Batches, eval_batches, permutation, row_length
from ftjax.data.prefetch import prefetch_to_device
from ftjax.errors import CheckpointError, ConfigError, DataError


def examples(n: int = 40, longest: int = 12) -> Examples:
    lengths = np.random.default_rng(1).integers(2, longest, n)
    items = [Example(np.full(k, i + 1, np.int32), np.ones(k, np.float32)) for i, k in enumerate(lengths)]
    return Examples.of(items)


def loader(**kwargs: Any) -> Loader:
    return Loader(**{"max_length": 16, **kwargs})


def assert_same(a: TokenBatch, b: TokenBatch) -> None:
    for name in ("tokens", "positions", "segments", "weights"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)


def ids_in(batch: TokenBatch) -> list[int]:
    return sorted(batch.tokens[(batch.segments >= 0) & (batch.positions == 0)].tolist())


@pytest.mark.parametrize("packing", ["bfd", "none"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_epoch_holds_every_example_once(packing: str, shuffle: bool) -> None:
    batches = Batches(examples(), loader=loader(packing=packing, shuffle=shuffle), batch=1, seed=3)
    for _ in range(3):
        seen = [i for _ in range(batches.rows_per_epoch) for i in ids_in(batches.next())]
        assert sorted(seen) == list(range(1, 41))
    assert batches.epoch == 3.0


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def first(seed: int, skip: int = 0) -> list[int]:
        batches = Batches(examples(), loader=loader(), batch=4, seed=seed)
        batches.restore({"next_index": skip})
        return ids_in(batches.next())

    assert first(0) == first(0) and first(0) != first(1)
    steps = Batches(examples(), loader=loader(), batch=1).rows_per_epoch
    assert Batches(examples(), loader=loader(shuffle=False), batch=1).next().tokens.any()
    assert first(0) != first(0, skip=steps)


def test_equal_lengths_get_new_neighbours_in_each_epoch() -> None:
    same = Examples.of([Example(np.full(4, i, np.int32), np.ones(4, np.float32)) for i in range(1, 41)])
    batches = Batches(same, loader=loader(), batch=1)
    epochs = [{tuple(ids_in(batches.next())) for _ in range(batches.rows_per_epoch)} for _ in range(2)]
    assert len(epochs[0]) == len(epochs[1]) == 10 and epochs[0] != epochs[1]


def test_batches_straddle_epochs_and_are_always_full() -> None:
    batches = Batches(examples(), loader=loader(), batch=8)
    assert batches.rows_per_epoch % 8
    for _ in range(10):
        batch = batches.next()
        assert batch.tokens.shape == (1, 8, 16) and (batch.segments[:, :, 0] == 0).all()


def test_accumulation_splits_the_same_rows() -> None:
    whole = Batches(examples(), loader=loader(), batch=8).next()
    parts = Batches(examples(), loader=loader(), batch=8, accumulate=4).next()
    assert parts.tokens.shape == (4, 2, 16)
    np.testing.assert_array_equal(parts.tokens.reshape(8, 16), whole.tokens[0])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_build_disjoint_parts_of_one_global_batch(hosts: int) -> None:
    whole = Batches(examples(), loader=loader(), batch=8, accumulate=2)
    parts = [Batches(examples(), loader=loader(), batch=8, accumulate=2, shard=(h, hosts)) for h in range(hosts)]
    for _ in range(4):
        joined = np.concatenate([p.next().tokens for p in parts], axis=1)
        np.testing.assert_array_equal(joined, whole.next().tokens)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_grain_restores_the_output_after_every_checkpoint(workers: int, prefetch: int) -> None:
    batches = Batches(examples(), loader=loader(workers=workers, prefetch=prefetch), batch=4, accumulate=2, seed=5)
    limited = grain.experimental.LimitIterDataset(batches.dataset, 9)
    plain = grain.experimental.LimitIterDataset(batches.dataset.map(lambda b: asdict(b)), 9)
    assert len(list(limited)) == 9
    grain.experimental.assert_equal_output_after_checkpoint(plain)


def test_state_is_json_and_restores_in_another_process_shape() -> None:
    one = Batches(examples(), loader=loader(), batch=4, seed=2)
    for _ in range(7):
        one.next()
    state = json.loads(json.dumps(one.state()))
    other = Batches(examples(), loader=loader(workers=2, prefetch=5), batch=4, seed=2)
    other.check_fingerprint(json.loads(json.dumps(one.fingerprint)))
    other.restore(state)
    for _ in range(5):
        assert_same(one.next(), other.next())


def test_a_changed_fingerprint_is_refused_with_a_diff() -> None:
    saved = Batches(
        examples(), loader=loader(), batch=4, fingerprint={"data": {"a.jsonl": "aaaa"}, "tokenizer": "t" * 64}
    ).fingerprint
    now = Batches(
        examples(),
        loader=loader(packing="none"),
        batch=4,
        seed=1,
        fingerprint={"data": {"a.jsonl": "bbbb"}, "tokenizer": "t" * 64},
    )
    with pytest.raises(CheckpointError) as e:
        now.check_fingerprint(saved)
    text = str(e.value)
    assert (
        "data.a.jsonl" in text and "saved aaaa  now bbbb" in text and "order.seed" in text and "order.packing" in text
    )
    assert "tokenizer" not in text and "order.batch" not in text
    now.check_fingerprint(saved, allow=("data", "order"))
    with pytest.raises(CheckpointError, match="order.seed"):
        now.check_fingerprint(saved, allow=("data", "order.packing", "order.length"))


def test_batches_must_divide_and_hold_something() -> None:
    with pytest.raises(
        ConfigError, match=r"train.batch=10 .*train.accumulate=4 .*over 1 host: .*multiple of 4. Nearest: 8 or 12"
    ):
        Batches(examples(), loader=loader(), batch=10, accumulate=4)
    with pytest.raises(DataError, match="no training examples"):
        Batches(Examples.of([]), loader=loader(), batch=4)


def test_unpacked_rows_are_only_as_long_as_any_example_needs() -> None:
    short, long = examples(), Examples.of([Example(np.ones(33, np.int32), np.ones(33, np.float32))])
    unpacked = loader(max_length=512, packing="none")
    assert [row_length(unpacked, short), row_length(unpacked, short, long), row_length(unpacked)] == [16, 48, 512]
    assert row_length(loader(max_length=40, packing="none"), long) == 40
    assert row_length(loader(max_length=512), short) == 512
    assert Batches(short, loader=unpacked, batch=4, length=16).next().tokens.shape == (1, 4, 16)
    assert Batches(short, loader=unpacked, batch=4).length == 512


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_eval_batches_hold_everything_once_and_pad_the_last(packing: Any) -> None:
    some = examples()
    batches = list(eval_batches(some, 8, 16, packing=packing))
    assert all(b.tokens.shape == (8, 16) for b in batches)
    assert sorted(i for b in batches for i in ids_in(b)) == list(range(1, 41))
    assert sum(b.weights.sum() for b in batches) == some.lengths.sum() - len(some)
    halves = [list(eval_batches(some, 8, 16, packing=packing, shard=(h, 2))) for h in range(2)]
    for whole, a, b in zip(batches, *halves, strict=True):
        np.testing.assert_array_equal(np.concatenate([a.tokens, b.tokens]), whole.tokens)


def test_permutations_are_stable_over_time() -> None:
    golden = [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert permutation(10, 0, 0, 0).tolist() == golden, "if this changes, every resumed run sees other data"


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetch_state_is_that_of_the_batch_in_hand(depth: int) -> None:
    plain, ahead = (Batches(examples(), loader=loader(), batch=4, seed=2) for _ in range(2))
    device = prefetch_to_device(ahead, lambda b: b.tokens + 0, depth)
    assert device.state() == {"next_index": 0}
    for _ in range(6):
        want = plain.next()
        np.testing.assert_array_equal(next(device), want.tokens)
        time.sleep(0.01)  # time to run ahead
        assert device.state() == plain.state()
    device.close()
    assert not any(t.name == "ftjax-prefetch" and t.is_alive() for t in threading.enumerate())


def test_prefetch_hides_loading_and_measures_waiting() -> None:
    def slow(n: int) -> Any:
        for i in range(n):
            time.sleep(0.05)
            yield i

    device = prefetch_to_device(slow(6), lambda b: b, 2)
    for _ in range(6):
        next(device)
        time.sleep(0.1)
    assert device.wait_s < 0.2  # only the first is waited for
    late = prefetch_to_device(slow(4), lambda b: b, 2)
    assert list(late) == [0, 1, 2, 3] and late.wait_s > 0.15
    with pytest.raises(StopIteration):
        next(late)


def test_prefetch_passes_errors_on_and_speaks_up_when_slow() -> None:
    def broken() -> Any:
        yield 1
        time.sleep(0.4)
        raise DataError("the disk is gone")

    said: list[str] = []
    device = prefetch_to_device(broken(), lambda b: b, 2, slow_s=0.1, say=said.append)
    assert next(device) == 1
    for _ in range(2):
        with pytest.raises(DataError, match="the disk is gone"):
            next(device)
    assert said and said[0].startswith("still waiting for data after 0 s") and len(said) <= 3
