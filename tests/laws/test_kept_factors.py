"""Laws 2 and 3 for parameters that are kept as factors, one for each norm rule.

The model of `registry.py` is so small that its gradients are stored instead.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax

BATCH = 6
CLIP = 1.0
NUMBERS = ("NHWC", "HWIO", "NHWC")

# By name of the parameter: its shape, and the rule that must compute its norms.
LEAVES = {
    "once": ((5, 3), "outer"),
    "long": ((2, 2), "direct"),
    "short": ((5, 6), "Gram"),
    "table": ((6, 3), "segments"),
    "tied": ((5, 3), "segments, outer"),
    "image": ((3, 3, 1, 4), "patches"),
    "channels": ((2, 2, 6, 4), "pixel Gram"),
    "both": ((3, 3), "direct"),
    "bias": ((3,), "direct"),
}


def convolve(image, kernel):
    return jax.lax.conv_general_dilated(
        image[None], kernel, (1, 1), "SAME", dimension_numbers=NUMBERS
    )


def loss_fn(params, example):
    """Uses each parameter in the way that its norm rule is for."""
    ids = example["ids"]
    x = jnp.tanh(example["x"])
    hidden = x[:5] @ params["once"] + params["bias"]
    terms = [
        hidden,
        x[:14].reshape(7, 2) @ params["long"],
        x[:10].reshape(2, 5) @ params["short"],
        params["table"][ids] * x[:3],
        params["tied"][ids[:2]] * x[:3],
        params["tied"] @ hidden,
        convolve(x.reshape(6, 6, 1), params["image"]),
        convolve(x[:24].reshape(2, 2, 6), params["channels"]),
        params["both"] @ (params["both"].T @ x[:3] + 1),
    ]
    return sum(jnp.sum(jnp.tanh(term)) for term in terms)


def model():
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, (shape, _) in LEAVES.items()
    }
    x = rng.normal(size=(BATCH, 36)) * np.geomspace(0.01, 3, BATCH)[:, None]
    examples = {"x": np.float32(x), "ids": rng.integers(0, 5, (BATCH, 4))}
    return params, examples


@functools.cache
def clipped():
    """The clipped sum and the norms, compiled once."""
    rule = dpoptax.clipping.FlatClip(CLIP)
    params, _ = model()

    @jax.jit
    def run(examples, mask):
        grads = dpoptax.per_example_grads(loss_fn)(params, examples, mask=mask)
        return grads.clip_and_sum(rule.weights), grads.squared_norms(), grads.stacked()

    return run


@pytest.fixture(autouse=True)
def _kept_as_factors(monkeypatch):
    monkeypatch.setattr(dpoptax.per_example._factored, "is_materialized", lambda *_: False)


def test_the_model_has_a_leaf_for_each_norm_rule():
    rows = dpoptax.explain(loss_fn, *model())
    assert {row.form for row in rows} == {"factored"}
    assert {row.leaf: row.rule for row in rows} == {
        f"['{name}']": rule for name, (_, rule) in LEAVES.items()
    }


def test_law_2_factors_give_the_clipped_sum_of_a_plain_loop():
    params, examples = model()
    grad = jax.jit(jax.grad(loss_fn))
    expected = {name: np.zeros(shape) for name, (shape, _) in LEAVES.items()}
    weights = []
    for i in range(BATCH):
        one = grad(params, {name: leaf[i] for name, leaf in examples.items()})
        one = {name: np.asarray(leaf, np.float64) for name, leaf in one.items()}
        weights.append(min(1.0, CLIP / math.sqrt(sum(np.sum(g**2) for g in one.values()))))
        expected = {name: expected[name] + weights[-1] * one[name] for name in one}
    assert min(weights) < 1 / 2
    total, _, _ = clipped()(examples, np.ones(BATCH, bool))
    for name, leaf in expected.items():
        assert np.linalg.norm(total[name] - leaf) < 1e-5 * np.linalg.norm(leaf)


@pytest.mark.parametrize("filler", [0.0, 1e30, math.inf, math.nan])
def test_law_3_padding_never_changes_the_sum(filler):
    _, examples = model()
    mask = np.array([True, False, True, True, False, True])
    zeros = {"x": np.where(mask[:, None], examples["x"], 0), "ids": examples["ids"]}
    filled = {
        "x": np.where(mask[:, None], examples["x"], np.float32(filler)),
        "ids": np.where(mask[:, None], examples["ids"], 10**6),
    }
    expected, _, _ = clipped()(zeros, mask)
    total, norms, stacked = clipped()(filled, mask)
    for name, leaf in expected.items():
        np.testing.assert_array_equal(total[name], leaf)
    for leaf in jax.tree.leaves((norms, stacked)):
        np.testing.assert_array_equal(leaf[~mask], 0)
