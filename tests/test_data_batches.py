"""Examples, rows and packing: the arithmetic that decides which token is predicted from which."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax.data.batches import PAD_SEGMENT, Example, Examples, build_rows, num_trained_tokens
from ftjax.data.packing import plan_rows


def example(n: int, start: int = 10, origin: str = "") -> Example:
    return Example(np.arange(start, start + n, dtype=np.int32), np.ones(n, np.float32), origin=origin)


def test_rows_reset_positions_count_segments_and_never_train_a_first_token() -> None:
    batch = build_rows([[example(3), example(2, 20)], [example(4, 30)]], 6)
    np.testing.assert_array_equal(batch.tokens, [[10, 11, 12, 20, 21, 0], [30, 31, 32, 33, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]])
    np.testing.assert_array_equal(batch.segments, [[0, 0, 0, 1, 1, -2], [0, 0, 0, 0, -2, -2]])
    np.testing.assert_array_equal(batch.weights, [[0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0]])
    assert num_trained_tokens(batch) == 6
    assert batch.tokens.dtype == np.int32 and batch.weights.dtype == np.float32


def test_missing_rows_are_padding() -> None:
    batch = build_rows([[example(3)]], 4, count=3)
    assert batch.tokens.shape == (3, 4)
    assert (batch.segments[1:] == PAD_SEGMENT).all() and not batch.weights[1:].any()


def test_a_row_that_overflows_is_refused() -> None:
    with pytest.raises(ValueError, match="row 0 holds 7 tokens, the length is 6"):
        build_rows([[example(3), example(4)]], 6)


def test_examples_are_a_sequence_over_flat_arrays() -> None:
    items = [example(3, origin="a:1"), example(1, 50, "a:2"), example(4, 70, "a:3")]
    many = Examples.of(items)
    assert len(many) == 3 and many.lengths.tolist() == [3, 1, 4]
    for one, got in zip(items, many, strict=True):
        np.testing.assert_array_equal(one.input_ids, got.input_ids)
        assert got.origin == one.origin
    taken = many.take(np.array([2, 0]))
    assert [e.input_ids.tolist() for e in taken] == [[70, 71, 72, 73], [10, 11, 12]]
    assert [e.origin for e in taken] == ["a:3", "a:1"] and taken[0].row == 2
    assert [len(e) for e in many[1:]] == [1, 4] and len(many[-1]) == 4
    with pytest.raises(IndexError):
        many[3]
    assert len(Examples.of([])) == 0


def brute_force_best_fit(lengths: list[int], capacity: int) -> list[int]:
    free: list[int] = []
    for n in sorted(lengths, reverse=True):
        fitting = [i for i in range(len(free)) if free[i] >= n]
        if fitting:
            free[min(fitting, key=lambda i: free[i])] -= n
        else:
            free.append(capacity - n)
    return sorted(free)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 37), min_size=1, max_size=60), st.integers(0, 2**31))
def test_best_fit_decreasing_places_every_example_once(lengths: list[int], seed: int) -> None:
    plan = plan_rows(np.array(lengths), 37)
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows = plan.fill(order)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert sorted(37 - sum(lengths[i] for i in row) for row in rows) == brute_force_best_fit(lengths, 37)
    again = plan.fill(order)
    assert all((a == b).all() for a, b in zip(rows, again, strict=True))


def test_equal_lengths_trade_places_with_the_order() -> None:
    plan = plan_rows(np.array([4, 4, 4, 4]), 8)
    assert [r.tolist() for r in plan.fill(np.array([0, 1, 2, 3]))] == [[0, 1], [2, 3]]
    assert [r.tolist() for r in plan.fill(np.array([2, 0, 3, 1]))] == [[2, 0], [3, 1]]


def test_unpacked_rows_keep_the_order() -> None:
    plan = plan_rows(np.array([3, 9, 1]), 10, "none")
    assert [r.tolist() for r in plan.fill(np.array([2, 0, 1]))] == [[2], [0], [1]]
    assert plan.fill_share == pytest.approx(13 / 30)


def test_a_too_long_example_is_refused() -> None:
    with pytest.raises(ValueError, match="an example of 12 tokens does not fit a row of 10"):
        plan_rows(np.array([3, 12]), 10)


def test_packing_is_fast_and_tight() -> None:
    lengths = np.random.default_rng(0).integers(1, 512, 100_000)
    start = time.process_time()
    plan = plan_rows(lengths, 512)
    plan.fill(np.arange(len(lengths)))
    assert time.process_time() - start < 3  # about 0.4 s on an idle core
    assert plan.fill_share > 0.99
