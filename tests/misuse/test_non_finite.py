"""Examples whose loss is not finite are counted, and a warning says that there are many."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax import samplers
from dpoptax.training import Every, fit
from dpoptax.training._diagnostics import nonprivate_nonfinite, warn_if_many

NUM_ROWS, VOCABULARY = 64, 10
PARAMS = jnp.ones((VOCABULARY, 2))
SAMPLER = samplers.Poisson(NUM_ROWS, 32)
PLAN = dpoptax.Plan(sampler=SAMPLER, clip=1.0, noise_multiplier=1.0, num_steps=4, delta=1e-3)


def loss_fn(table, token):
    # JAX returns NaN for a token beyond the table.
    loss = jnp.sum(jnp.take(table, token, axis=0) ** 2)
    return loss, (token >= VOCABULARY).astype(jnp.float32)


def tokens(out_of_range):
    rows = np.arange(NUM_ROWS) % VOCABULARY
    rows[:out_of_range] = VOCABULARY + 7
    return jnp.asarray(rows, jnp.int32)


def test_a_finite_loss_may_have_a_gradient_that_is_not():
    rows = jnp.array([0.0, 1.0, 4.0, 0.0])
    mask = jnp.array([True, True, True, False])
    losses, grads = dpoptax.value_and_per_example_grads(lambda w, x: jnp.sqrt(w * x))(
        jnp.ones(()), rows, mask=mask
    )
    assert int(nonprivate_nonfinite(losses, mask, None)) == 0
    assert int(nonprivate_nonfinite(losses, mask, grads)) == 1


@pytest.mark.slow
def test_fit_counts_them_and_warns_of_many(capfd):
    seen = []
    with pytest.warns(UserWarning, match=r"more than 5% of the drawn examples was not fi") as told:
        result = fit(
            loss_fn, PARAMS, tokens(11), plan=PLAN, optimizer=optax.sgd(0.1), key=jax.random.key(0),
            progress=[True, Every(seen.append, steps=1)], diagnostics=True,
        )  # fmt: skip
    for progress in seen:
        found = progress.nonprivate
        expected = float(found.nonprivate_aux) * int(found.nonprivate_batch_size)
        assert expected > 0
        assert int(found.nonprivate_nonfinite_count) == pytest.approx(expected)
    total = sum(int(progress.nonprivate.nonprivate_nonfinite_count) for progress in seen)
    assert result.nonprivate_nonfinite_count == total
    found = seen[-1].nonprivate
    counts = f"{found.nonprivate_nonfinite_count} of {found.nonprivate_batch_size}"
    assert f"{counts} examples not finite" in capfd.readouterr().err
    # The warning, the printed result and the report do not show a number that is not private.
    assert str(total) not in str(told[0].message)
    assert "finite" not in repr(result)
    assert "finite" not in str(result.report())


def test_a_few_bad_rows_are_no_reason_to_warn():
    with warnings.catch_warnings(action="error"):
        for nonfinite in (None, (0, 0), (0, 1000), (50, 1000), (10, 10)):
            warn_if_many(nonfinite)
    with pytest.warns(UserWarning, match="not finite"):
        warn_if_many((51, 1000))


def test_the_check_says_that_made_up_rows_are_not_finite():
    def root(w, x):
        return jnp.sqrt(w * x - 1e6)

    grads_fn = dpoptax.per_example_grads(root, check=True)
    with pytest.warns(UserWarning, match="not finite on made-up parameters and examples"):
        jax.eval_shape(jax.jit(grads_fn), jnp.ones(()), jnp.ones(3))


@pytest.mark.parametrize("form", ["stacked", "factored"])
def test_a_bad_example_does_not_change_the_last_digits_of_the_others(form):
    """A vote, and the gradient of a loss with a jump, can depend on the last digit."""

    def loss_fn(params, x):
        # The kernel is no parameter itself, so the factored form differentiates it by `vmap`.
        kernel = jnp.tanh(params["kernel"])
        hidden = jax.lax.conv_general_dilated(x[None, None], kernel, (1, 1), "SAME")
        return jnp.sum(jnp.tanh(hidden) * params["scale"])

    params = {
        "kernel": jax.random.normal(jax.random.key(0), (4, 1, 3, 3)),
        "scale": jax.random.normal(jax.random.key(1), (4, 8, 8)),
    }
    x = jax.random.normal(jax.random.key(2), (32, 8, 8))
    grads_fn = dpoptax.value_and_per_example_grads(loss_fn, form=form)

    @jax.jit
    def numbers(x, mask):
        losses, grads = grads_fn(params, x, mask=mask)
        return losses, grads.global_squared_norms()

    others = np.arange(32) != 5
    losses, norms = numbers(x, others)
    for bad in (jnp.nan, jnp.inf):
        with_bad = numbers(x.at[5].set(bad), np.ones(32, bool))
        np.testing.assert_array_equal(with_bad[0][others], losses[others])
        np.testing.assert_array_equal(with_bad[1][others], norms[others])
        assert not np.isfinite(with_bad[0][5])
        assert not np.isfinite(with_bad[1][5])
    # A batch without any good example, and a padded row that is not finite.
    assert not np.isfinite(numbers(jnp.full_like(x, jnp.nan), np.ones(32, bool))[1]).any()
    np.testing.assert_array_equal(numbers(x.at[5].set(jnp.nan), others)[1], norms)
