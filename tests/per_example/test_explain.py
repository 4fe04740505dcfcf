"""What `explain` says of models that are understood, and of a leaf that is not."""

import jax
import jax.numpy as jnp
import pytest

import dpoptax
from benchmarks.models import PARAMETER_COUNTS, workload


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETER_COUNTS)
def test_every_product_convolution_and_lookup_of_the_workloads_is_factored(name):
    with jax.numpy_dtype_promotion("standard"):  # Flax itself mixes dtypes in places
        work = workload(name, 128)
        explanation = dpoptax.explain(work.loss_fn, work.params, work.examples, key=work.key)
    assert len(explanation) == len(jax.tree.leaves(work.params))
    for row in explanation:
        if "kernel" in row.leaf or "embedding" in row.leaf:
            assert row.form in {"factored", "materialized"}
            assert row.rule in {"outer", "direct", "Gram", "patches", "pixel Gram", "segments"}
            assert row.memory < 2  # of what stacking would hold


def test_a_stacked_leaf_names_the_operation_and_the_line():
    def loss_fn(params, x):
        return jnp.sum(jnp.sort(params["w"]) * x)

    (row,) = dpoptax.explain(loss_fn, {"w": jnp.ones(3)}, jnp.ones((2, 3)))
    assert (row.form, row.rule, row.memory) == ("stacked", "used by sort", 1.0)
    assert "test_explain.py:" in row.source


def test_the_table_has_a_line_per_leaf():
    def loss_fn(params, x):
        return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]))

    params = {"w": jnp.ones((30, 20)), "b": jnp.ones(20)}
    explanation = dpoptax.explain(loss_fn, params, jnp.ones((128, 30)))
    header, rule, *rows, summary = str(explanation).splitlines()
    assert header.startswith("leaf")
    assert set(rule) == {"-"}
    assert ["['b']" in rows[0], "['w']" in rows[1]] == [True, True]
    assert "30 x 20" in rows[1]
    assert len(rows) == 2
    assert summary.startswith("form: factored: one backward pass")
