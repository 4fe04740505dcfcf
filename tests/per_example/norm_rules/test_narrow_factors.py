"""Factors in 16 bits on an accelerator are multiplied as they are, and summed in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.per_example import _batch_sum, _devices

BATCH, TOKENS, WIDTH = 6, 512, 4


def loss(params, example):
    x, y, ids = example
    out = x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)
    tied = params["t"].astype(jnp.bfloat16)
    out = out.astype(jnp.float32) + (tied[ids] @ tied.T).astype(jnp.float32)[:, :WIDTH]
    return jnp.sum(out * y)


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32)
              for name, shape in (("w", (3, WIDTH)), ("t", (8, 5)))}  # fmt: skip
    # All numbers are bfloat16 already, so that nothing is rounded before it is multiplied.
    x, y = (jnp.asarray(rng.normal(size=(BATCH, TOKENS, n)), jnp.bfloat16) for n in (3, WIDTH))
    ids = jnp.asarray(rng.integers(0, 8, (BATCH, TOKENS)))
    return params, (x.astype(jnp.float32), y.astype(jnp.float32), ids)


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr(_devices, "kind_of_device", lambda: ("TPU v5 lite", "tpu"))


def test_products_of_16_bit_factors_are_exact_in_float32(problem, accelerator):
    params, (x, y, ids) = problem
    assert _batch_sum.examples_per_chunk(TOKENS) == 1  # so weights scale the products

    @jax.jit
    def found(params, examples, weights):
        grads = dpoptax.per_example_grads(loss, form="factored")(params, examples)
        return grads.squared_norms(), grads.weighted_sum(weights)

    # Weights that bfloat16 would round, and one that leaves out an example with NaN.
    weights = jnp.asarray([1 / 3, 1e-3, 0.7, 0.0, 1.0, 1 / 7], jnp.float32)
    norms, sums = found(params, (x.at[3].set(jnp.nan), y, ids), weights)
    each = np.einsum("btk,btn->bkn", *(np.asarray(leaf, np.float64) for leaf in (x, y)))
    exact = np.einsum("b,bkn->kn", np.asarray(weights, np.float64), each)
    np.testing.assert_allclose(sums["w"], exact, rtol=2e-6, atol=2e-5)
    rows = np.arange(BATCH) != 3
    np.testing.assert_allclose(
        np.asarray(norms["w"])[rows], np.square(each).sum((1, 2))[rows], rtol=1e-4
    )
    assert not np.isfinite(norms["w"][3])
    assert np.isfinite(sums["t"]).all()
    # Power: weights in bfloat16 would be seen.
    rounded = np.asarray(weights.astype(jnp.bfloat16), np.float64)
    assert np.abs(np.einsum("b,bkn->kn", rounded, each) - exact).max() > 1e-3


def test_the_norms_multiply_factors_in_16_bits(problem, accelerator):
    params, examples = problem

    def norms(params, examples):
        return dpoptax.per_example_grads(loss, form="factored")(params, examples).squared_norms()

    text = jax.jit(norms).lower(params, examples).as_text()
    products = re.findall(r"dot_general.* : \((.*), (.*)\) -> (.*)", text)
    types = [tuple(kind.split("x")[-1] for kind in kinds) for kinds in products]
    assert ("bf16>", "bf16>", "f32>") in types
