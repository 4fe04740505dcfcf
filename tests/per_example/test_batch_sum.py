"""Sums over the batch: chunks, runs and double words."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpoptax.per_example import _batch_sum
from dpoptax.per_example._batch_sum import (
    CHUNK,
    MAX_CANCELLATION,
    MAX_FLOAT32_ADDITIONS,
    RUN,
    add_double_word,
    examples_per_chunk,
    fold,
    longest_run,
    sum_in_chunks,
    sum_stacked,
)

U = 2.0**-24


def test_the_constants_are_those_of_the_proof():
    """The bounds in steps 2 and 3 of docs/numerics.md."""
    assert 4 * U * CHUNK**2 == 1 / 64
    for terms in range(2, 100):
        size = examples_per_chunk(terms)
        assert size == {2: 4, 3: 2, 4: 2, 5: 2, 6: 2}.get(terms, 1)
        if size > 1:
            assert 4 * U * size**2 * terms * MAX_CANCELLATION * terms**0.5 <= 1 / 256
    assert 4 * U * MAX_FLOAT32_ADDITIONS < 0.00074
    assert _batch_sum._float32_additions(RUN, 1, CHUNK) <= MAX_FLOAT32_ADDITIONS


def test_runs_are_as_long_as_the_proof_allows():
    """Step 3 of the proof, for the parts of a batch in microbatches of every automatic size."""
    for size in range(1, 4097):
        run = longest_run(size)
        assert run == 1 or (run - 1) * run * size <= 3072
        assert run == RUN or run * (run + 1) * size > 3072
    assert [longest_run(size) for size in (256, 257, 512, 513, 1536, 1537)] == [4, 3, 3, 2, 2, 1]


def test_a_double_word_is_not_simplified_away_by_the_compiler():
    rng = np.random.default_rng(0)
    values = (rng.normal(size=3000) * 10.0 ** rng.integers(-6, 7, 3000)).astype(np.float32)

    @jax.jit
    def add_all(values):
        def add(total, value):
            return add_double_word(total, value), None

        return jax.lax.scan(add, (jnp.float32(0), jnp.float32(0)), values)[0]

    high, low = map(float, add_all(values))
    exact = sum(map(Fraction, values.tolist()))
    largest = max(abs(float(part)) for part in np.cumsum(values.astype(np.float64)))
    assert abs(float(Fraction(high) + Fraction(low) - exact)) <= 3000 * 2 * U**2 * largest
    assert abs(float(np.cumsum(values)[-1]) - float(exact)) > 1e-4  # a plain sum does not


def test_trees_may_hold_whole_numbers():
    steps = {"counts": jnp.arange(20), "x": jnp.full((20, 2), 0.1)}
    total = fold(lambda step: step, steps, CHUNK)
    assert int(total["counts"]) == 190
    assert total["counts"].dtype == steps["counts"].dtype
    np.testing.assert_allclose(total["x"], 2.0, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "size", "at_once", "devices"),
    [(3, 1, 1, 1), (13, 1, 1, 1), (100, 1, 64, 1), (33, 4, 8, 1), (260, 256, 1, 1), (80, 4, 2, 4)],
)
def test_every_example_is_added_once(batch, size, at_once, devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    rows = jnp.arange(batch * 3.0).reshape(batch, 3)
    total = sum_in_chunks(lambda chunk: jnp.sum(chunk, axis=0), rows, size, at_once)
    np.testing.assert_array_equal(total, rows.sum(axis=0))


@pytest.mark.parametrize("batch", [1, 256, 257, 700, 1024, 1112, 2048, 2049])
def test_chunks_side_by_side_add_what_they_add_one_after_the_other(batch):
    rows = jax.random.normal(jax.random.key(0), (batch, 5))
    rows = rows.at[batch // 2].set(jnp.nan)
    kept = jnp.arange(batch) != batch // 2

    def weighted(chunk):
        rows, kept = chunk
        return jnp.sum(jnp.where(kept[:, None], rows, 0.0), axis=0)

    def total(**options):
        return sum_in_chunks(weighted, (rows, kept), CHUNK, 1, **options)

    np.testing.assert_allclose(total(side_by_side=True), total(), rtol=1e-5, atol=1e-5)
    exact = np.asarray(rows, np.float64)[np.asarray(kept)].sum(axis=0)
    np.testing.assert_allclose(total(side_by_side=True), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("batch", "devices"), [(0, 1), (7, 1), (1400, 1), (600, 4)])
def test_stacked_rows_are_added_once(batch, devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    rows = jnp.ones((batch, 2, 3))
    weights = jnp.arange(float(batch))
    total = sum_stacked(weights, rows)
    np.testing.assert_array_equal(total, np.full((2, 3), weights.sum()))
    assert sum_stacked(weights, rows[..., :0]).shape == (2, 0)
