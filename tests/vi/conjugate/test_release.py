"""Noisy sufficient statistics: what one example moves, what is charged, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.vi.conjugate import (
    BetaBernoulli,
    DirichletMultinomial,
    LinearRegression,
    NormalMeanVariance,
)
from dpoptax.vi.conjugate._normal import SENSITIVITY

REGRESSION = LinearRegression(num_features=3, x_bound=2.0, y_bound=5.0)
NORMAL = NormalMeanVariance(lower=-3.0, upper=7.0)
KEY = jax.random.key(0)


def ledger(num_examples, sampler=dpoptax.samplers.Poisson):
    return dpoptax.accounting.Ledger(sampler(num_examples, num_examples), clip=1.0, delta=1e-5)


def normal_rows(num_rows):
    """Numbers within the range, at its ends, and beyond."""
    inner = jax.random.uniform(KEY, (num_rows,), minval=-3.0, maxval=7.0)
    return NORMAL._statistics(jnp.concatenate([inner, jnp.array([-3.0, 7.0, 2.0, -1e9, 1e9])]))


def regression_rows(num_rows):
    """Rows of every length, in random directions, and at the corners of what is allowed."""
    keys = jax.random.split(KEY, 3)
    x = jax.random.normal(keys[0], (num_rows, 3)) * 4 * jax.random.uniform(keys[1], (num_rows, 1))
    y = 8 * jax.random.normal(keys[2], (num_rows,))
    corners = jnp.array([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, -2.0, 0.0]])
    x, y = jnp.concatenate([x, corners]), jnp.concatenate([y, jnp.array([5.0, -5.0, 5.0])])
    return REGRESSION._statistics(x, y)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("rows", "one_more", "replaced"),
    [(normal_rows, SENSITIVITY, 2.0), (regression_rows, 2.0, math.sqrt(8))],
    ids=["normal", "regression"],
)
def test_the_worst_example_moves_the_sums_by_the_stated_sensitivity(rows, one_more, replaced):
    found = np.asarray(rows(2000), np.float64)
    largest = np.sqrt((found**2).sum(axis=1)).max()
    assert one_more * (1 - 1e-5) < largest < one_more * (1 + 1e-5)
    # All pairs, by |a - b|² = |a|² + |b|² - 2 ab.
    squares = (found**2).sum(axis=1)
    apart = np.sqrt((squares[:, None] + squares - 2 * found @ found.T).max())
    assert replaced * (1 - 1e-2) < apart < replaced * (1 + 1e-5)
    # The event is that of a mechanism that a replacement moves by twice as much as one more.
    assert apart < 2 * one_more * (1 + 1e-5)


def test_the_search_for_the_worst_example_has_power():
    """Without the factor √2 off the diagonal, the stated norm is not the one of the statistics."""
    rows = np.asarray(regression_rows(2000), np.float64)
    off = np.triu_indices(4)[0] != np.triu_indices(4)[1]
    rows[:, off] /= math.sqrt(2)
    assert np.sqrt((rows**2).sum(axis=1)).max() < 2 * 0.9


def test_a_long_row_keeps_its_relation_to_the_label():
    x, y = jnp.array([[4.0, 0.0, 0.0]]), jnp.array([3.0])
    within = REGRESSION._statistics(x / 2, y / 2)
    np.testing.assert_allclose(REGRESSION._statistics(x, y), within, rtol=1e-6)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("model", "data", "bound"),
    [
        (REGRESSION, (jnp.zeros((50, 3)), jnp.zeros(50)), 2.0),
        (BetaBernoulli(), jnp.zeros(50, jnp.int32), 0.5),
        (DirichletMultinomial(num_categories=8), jnp.zeros(50, jnp.int32), 1.0),
    ],
    ids=["regression", "bernoulli", "multinomial"],
)
def test_noise_is_what_it_says(model, data, bound):
    keys = jax.random.split(KEY, 400)
    values = jax.vmap(lambda key: model._noisy_sum(key, data, 3.0)[0])(keys)
    stddev = model._noisy_sum(KEY, data, 3.0)[1]
    assert 3.0 * bound * (1 - 1e-6) <= stddev < 3.0 * bound * 1.001
    found = np.asarray(values - values.mean(axis=0), np.float64)
    # Four standard errors of a standard deviation.
    assert abs(np.sqrt((found**2).mean()) / stddev - 1) < 4 / math.sqrt(2 * found.size)
    # Its mean is the sum without noise.
    exact = {
        "LinearRegression": np.zeros(10),
        "BetaBernoulli": 0.0,
        "DirichletMultinomial": np.array([50.0] + [0.0] * 7),
    }[type(model).__name__]
    assert np.abs(values.mean(axis=0) - exact).max() < 4.5 * stddev / math.sqrt(len(keys))


@pytest.mark.seconds
def test_a_release_is_charged_before_it_happens():
    spent = ledger(20)
    noisy = NORMAL.release(jnp.zeros(20), noise_multiplier=2.0, ledger=spent, key=KEY)
    assert spent.num_other_releases == 1
    assert spent.epsilon() == dpoptax.accounting.event_epsilon(noisy.event, delta=1e-5)
    once = spent.epsilon()
    BetaBernoulli().release(jnp.zeros(20), noise_multiplier=2.0, ledger=spent)
    assert spent.epsilon() > once


@pytest.mark.seconds
def test_replacement_costs_what_twice_the_move_costs():
    by_replacement = dpoptax.accounting.Ledger(
        dpoptax.samplers.FixedSize(20, 20), clip=1.0, delta=1e-5
    )
    NORMAL.release(jnp.zeros(20), noise_multiplier=4.0, ledger=by_replacement)
    one_more = ledger(20)
    NORMAL.release(jnp.zeros(20), noise_multiplier=2.0, ledger=one_more)
    assert by_replacement.epsilon(relation="replace_one") == pytest.approx(
        one_more.epsilon(), rel=1e-3
    )


@pytest.mark.seconds
def test_a_row_that_is_not_finite_is_left_out():
    data = jnp.array([1.0, jnp.nan, 2.0, jnp.inf])
    rows = NORMAL._statistics(data)
    noisy, _ = NORMAL._noisy_sum(KEY, data, 1e-6)
    np.testing.assert_allclose(noisy, rows[jnp.array([0, 2, 3])].sum(axis=0), atol=1e-4)
    x = jnp.ones((4, 3)).at[1, 0].set(jnp.inf)
    noisy, _ = REGRESSION._noisy_sum(KEY, (x, jnp.zeros(4)), 1e-6)
    np.testing.assert_allclose(noisy, 3 * REGRESSION._statistics(x[:1], jnp.zeros(1))[0], atol=1e-4)


def test_numbers_that_are_no_category_count_nowhere():
    model = DirichletMultinomial(num_categories=2)
    noisy, stddev = model._noisy_sum(KEY, jnp.tile(jnp.array([0, 1, 5, -1]), 100), 1.0)
    np.testing.assert_allclose(noisy, [100.0, 100.0], atol=5 * stddev)
    half, stddev = BetaBernoulli()._noisy_sum(KEY, jnp.tile(jnp.array([0, 1, 5, 1]), 100), 1.0)
    assert abs(float(half) - 250) < 5 * stddev


def test_one_key_for_two_data_sets_gives_two_noises():
    """Their difference would be the difference of the data."""

    def release(data):
        return NORMAL.release(data, noise_multiplier=2.0, ledger=ledger(20), key=KEY).values

    zeros, other = jnp.zeros(20), jnp.zeros(20).at[0].set(1.0)
    np.testing.assert_array_equal(release(zeros), release(zeros))
    difference = release(other) - release(zeros)
    exact = NORMAL._statistics(other).sum(axis=0) - NORMAL._statistics(zeros).sum(axis=0)
    assert np.abs(difference - exact).max() > 0.1


@pytest.mark.seconds
def test_an_exact_mechanism_may_add_the_noise():
    exact = dpoptax.mechanisms.DiscreteGaussian()
    noisy = NORMAL.release(
        jnp.full(20, 7.0), noise_multiplier=0.01, ledger=ledger(20), mechanism=exact
    )
    np.testing.assert_allclose(noisy.values, [20.0, 10.0], atol=0.06)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: NORMAL.release(jnp.zeros(5), noise_multiplier=1.0, ledger=ledger(6)), "5 rows"),
        (lambda: NORMAL.release(jnp.zeros(5), noise_multiplier=0.0, ledger=ledger(5)), "positive"),
        pytest.param(
            lambda: NORMAL.release(jnp.zeros((5, 1)), noise_multiplier=1.0, ledger=ledger(5)),
            "shape",
            marks=pytest.mark.untyped,
        ),
        pytest.param(
            lambda: DirichletMultinomial(num_categories=2).release(
                jnp.zeros(5), noise_multiplier=1.0, ledger=ledger(5)
            ),
            "whole numbers",
            marks=pytest.mark.untyped,
        ),
        (
            lambda: REGRESSION.release(
                (jnp.zeros((5, 2)), jnp.zeros(5)), noise_multiplier=1.0, ledger=ledger(5)
            ),
            r"\(examples, 3\)",
        ),
        (lambda: NormalMeanVariance(lower=1.0, upper=1.0), "below upper"),
        (
            lambda: jax.jit(
                lambda x: NORMAL.release(x, noise_multiplier=1.0, ledger=ledger(5)).values
            )(jnp.zeros(5)),
            "outside of jax.jit",
        ),
    ],
)
def test_wrong_input_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.untyped
def test_a_release_needs_a_ledger():
    with pytest.raises(TypeError, match=r"plan.ledger\(\)"):
        NORMAL.release(jnp.zeros(5), noise_multiplier=1.0, ledger=None)


@pytest.mark.parametrize("model", [NORMAL, REGRESSION, BetaBernoulli()])
def test_a_release_of_another_model_is_refused(model):
    other = DirichletMultinomial(num_categories=3)
    noisy = other.release(jnp.zeros(20, jnp.int32), noise_multiplier=1.0, ledger=ledger(20))
    with pytest.raises(ValueError, match="same model"):
        model.posterior(noisy, key=KEY)


def test_a_ledger_of_users_is_refused_since_a_user_may_have_several_rows():
    sampler = dpoptax.samplers.UserExamplesPoisson([0, 0, 1, 1, 2], 2.0, 2)
    users = dpoptax.accounting.Ledger(sampler, clip=1.0, delta=1e-5)
    with pytest.raises(ValueError, match="protects each user"):
        BetaBernoulli().release(jnp.ones(5), noise_multiplier=2.0, ledger=users)
    assert users.num_other_releases == 0


@pytest.mark.untyped
@pytest.mark.parametrize("model", [NORMAL, BetaBernoulli(), DirichletMultinomial(num_categories=2)])
def test_an_error_shows_no_text_of_the_data(model):
    book = ledger(3)
    with pytest.raises(TypeError, match="numbers") as raised:
        model.release([1, 0, "a name"], noise_multiplier=1.0, ledger=book)
    assert "name" not in str(raised.value)
    assert book.epsilon() == 0
