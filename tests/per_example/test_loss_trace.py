"""The user's loss is a Python function that runs once per call, to be traced."""

import jax
import jax.numpy as jnp
import pytest

import dpoptax


def counted():
    """A new loss and the list of its calls; JAX caches traces by function."""
    calls = []

    def loss_fn(params, example):
        calls.append(1)
        image = jnp.tanh(example @ params["w"]).reshape(1, 1, -1)
        return jnp.sum(jax.lax.conv_general_dilated(image, params["k"], (1,), "SAME") ** 2)

    return loss_fn, calls


PARAMS = {"w": jnp.ones((3, 4)), "k": jnp.ones((1, 1, 2))}
EXAMPLES = jnp.arange(15.0).reshape(5, 3)


def use(grads):
    return grads.squared_norms(), grads.weighted_sum(jnp.ones(5)), grads.stacked()


@pytest.mark.slow
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"check": True}, marks=pytest.mark.slow),
        {"form": "stacked"},
        pytest.param({"microbatch_size": 2}, marks=pytest.mark.slow),
        pytest.param({"microbatch_size": 2, "form": "stacked"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_loss_is_traced_once_per_call(options, jit):
    loss_fn, calls = counted()

    def run(params, examples):
        fn = dpoptax.value_and_per_example_grads(loss_fn, **options)
        losses, grads = fn(params, examples)
        return losses, use(grads)

    (jax.jit(run) if jit else run)(PARAMS, EXAMPLES)
    assert len(calls) == 1


def test_explain_traces_the_loss_once():
    loss_fn, calls = counted()
    dpoptax.explain(loss_fn, PARAMS, EXAMPLES)
    assert len(calls) == 1


@pytest.mark.slow
def test_norms_and_sums_do_not_trace_the_loss_again():
    loss_fn, calls = counted()
    for microbatch_size in (None, 2):
        options = {"microbatch_size": microbatch_size}
        grads = dpoptax.per_example_grads(loss_fn, **options)(PARAMS, EXAMPLES)
        calls.clear()
        jax.jit(use)(grads)
        use(grads)
        assert not calls


def test_the_global_norm_is_the_sum_over_leaves():
    loss_fn, _ = counted()

    @jax.jit
    def norms(params, examples):
        grads = dpoptax.per_example_grads(loss_fn)(params, examples)
        return grads.squared_norms(), grads.global_squared_norms()

    squared, whole = norms(PARAMS, EXAMPLES)
    assert jnp.array_equal(whole, squared["k"] + squared["w"])
