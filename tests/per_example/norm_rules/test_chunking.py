"""Splitting a batch into chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rule_laws import check_laws, floats, ids, sites_of

from dpoptax.per_example._norm_rules import chunking, cost_model
from dpoptax.per_example._norm_rules.convolution import ConvolutionPatches, ConvolutionPixelGram
from dpoptax.per_example._norm_rules.embedding import EmbeddingLookup
from dpoptax.per_example._norm_rules.materialize import Materialize
from dpoptax.per_example._norm_rules.matmul import DirectMatmul, GramMatmul


def product(w, x):
    return jnp.sum(jnp.tanh(x @ w))


def convolution(w, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    output = jax.lax.conv_general_dilated(x[None], w, (1, 1), "SAME", dimension_numbers=numbers)
    return jnp.sum(jnp.tanh(output))


def lookup(w, i):
    return jnp.sum(jnp.tanh(w[i]))


def use_chunks_of(floats, monkeypatch):
    monkeypatch.setattr(cost_model, "CPU", cost_model.CPU._replace(chunk_floats=floats))


@pytest.mark.slow
@pytest.mark.parametrize("examples_per_chunk", [1, 2, 4, 8])
def test_maps_and_sums_are_those_of_the_whole_batch(examples_per_chunk, monkeypatch):
    use_chunks_of(3 * examples_per_chunk, monkeypatch)
    examples = {"x": jnp.arange(14.0).reshape(7, 2), "y": jnp.arange(7.0)}
    assert chunking.chunk_size(3) == examples_per_chunk

    def rows(chunk):
        return chunk["x"] * chunk["y"][:, None]

    expected = rows(examples)
    np.testing.assert_array_equal(chunking.map_chunks(rows, examples, 3), expected)
    for num_terms in (1, 2, 1000):
        total = chunking.sum_examples(lambda c: rows(c).sum(axis=0), examples, num_terms, 3)
        np.testing.assert_array_equal(total, expected.sum(axis=0))


@pytest.mark.parametrize(("devices", "lanes"), [(4, 4), (16, 8), (3, 1), (6, 2)])
def test_each_device_works_on_chunks_of_its_own_rows(devices, lanes, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(chunking, "chunk_size", lambda num_floats: 1)
    seen = []

    def double(chunk):
        seen.append(chunk["x"].shape[0])
        return {"twice": 2 * chunk["x"], "rows": chunk["x"][:, 0]}

    x = jnp.arange(16.0).reshape(8, 2)
    found = chunking.map_chunks(double, {"x": x}, 3)
    assert set(seen) == {lanes}
    np.testing.assert_array_equal(found["twice"], 2 * x)
    np.testing.assert_array_equal(found["rows"], x[:, 0])
    chunks = chunking._split(x, lanes, 1)
    # Row r of a chunk is on the device that has the rows from r * 8 / lanes on.
    np.testing.assert_array_equal(chunks[0, :, 0], x[:: 8 // lanes, 0])


def test_a_chunk_has_at_least_one_example():
    assert chunking.chunk_size(2**40) == 1
    assert chunking.chunk_size(0) == cost_model.CPU_CHUNK_FLOATS


@pytest.mark.parametrize(
    ("rules", "loss_fn", "shape", "example"),
    [
        ((DirectMatmul, GramMatmul, Materialize), product, (6, 5), floats(3, 6)),
        ((EmbeddingLookup,), lookup, (4, 3), ids(9)),
        (
            (ConvolutionPatches, ConvolutionPixelGram),
            convolution,
            (3, 3, 2, 4),
            floats(5, 4, 2),
        ),
    ],
    ids=["product", "lookup", "convolution"],
)
def test_rules_obey_the_laws_in_chunks_of_one_example(rules, loss_fn, shape, example, monkeypatch):
    use_chunks_of(1, monkeypatch)
    use = sites_of(loss_fn, shape, example)
    check_laws(*(rule.matches(*use) for rule in rules))
