"""The jaxpr walker: checkpoints of every JAX version, taps after additions, and missed uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import energy, floats

import dpoptax
from dpoptax.per_example._loss_trace import trace_loss
from dpoptax.per_example._tracing.find_sites import run_with_taps
from dpoptax.per_example._tracing.taps import following_additions
from dpoptax.per_example._tracing.visitors import TapRunner


def checkpointed(w, x):
    return energy(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w))(x))


@pytest.mark.parametrize("remat3", [False, True])
def test_parameters_inside_a_checkpoint_are_factored(remat3):
    if remat3 and not hasattr(jax.config, "jax_remat3"):
        pytest.skip("this JAX has no jax_remat3")
    w, x = floats(4, 4), floats(3, 4)
    before = getattr(jax.config, "jax_remat3", None)
    try:
        if remat3:
            jax.config.update("jax_remat3", True)
        (row,) = dpoptax.explain(checkpointed, w, x)
        got = jax.jit(dpoptax.per_example_grads(checkpointed))(w, x).squared_norms()
    finally:
        if remat3:
            jax.config.update("jax_remat3", before)
    assert row.form != "stacked"
    exact = jax.vmap(jax.grad(checkpointed), (None, 0))(w, x)
    np.testing.assert_allclose(got, jnp.sum(exact**2, (1, 2)), rtol=1e-5)


def test_one_tap_after_additions_serves_all_that_they_add():
    def loss_fn(w, x):
        return jnp.sum(jnp.tanh((x @ w["a"] + x @ w["b"]) + w["c"]))

    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2)), "c": jnp.ones(2)}
    trace, _, _ = trace_loss(loss_fn, params, (jnp.ones(3),))
    assert len(trace.program.found.sites) == 3
    assert len({site.tap for site in trace.program.found.sites}) == 1


def test_an_output_with_two_users_is_tapped_at_once():
    def function(x):
        y = jnp.sin(x)
        return (y + 1.0) * y

    assert 0 not in following_additions(jax.make_jaxpr(function)(jnp.ones(2)))


def test_a_use_that_the_site_finder_missed_is_refused():
    """Its gradient would be lost without a word."""
    trace, _, _ = trace_loss(lambda w, x: jnp.sum(w / x), jnp.ones(3), (jnp.ones(3),))
    nothing = TapRunner(sites=(), fallback_reasons={})
    with pytest.raises(AssertionError, match="used by div"):
        run_with_taps(trace.program.jaxpr, nothing, [], [jnp.ones(3)], [jnp.ones(3)], {})
