"""DiSK and the low-pass filter match their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.signal

import dpoptax
from dpoptax.training import PrivateRun, fit
from dpoptax.transforms import chain, disk, low_pass, scale_then_privatize

PLAN = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(40, 8), clip=1.0, noise_multiplier=1.0, num_steps=3, delta=1e-3
)


def quiet(seed=0):
    return dpoptax.privatize(np.inf, 0.0, expected_batch_size=1, key=jax.random.key(seed))


def test_disk_filters_gradients_at_extrapolated_points():
    """By the recursion of the paper, in NumPy, on a cubic with one example."""
    gain, rate = 0.6, 0.05
    tx = chain(quiet(), disk(optax.sgd(rate), gain=gain))
    params = jnp.array([1.0, -2.0])
    state = tx.init(params)
    grads_fn = dpoptax.per_example_grads(lambda p, x: jnp.sum(x * p**3))
    x = previous = np.array([1.0, -2.0])
    estimate = None
    for _ in range(6):
        point = tx.gradient_point(params, state)
        updates, state = tx.update(grads_fn(point, jnp.ones(1)), state, params)
        params = optax.apply_updates(params, updates)
        at = x + (1 - gain) / gain * (x - previous)
        np.testing.assert_allclose(point, at, rtol=1e-5)
        gradient = 3 * at**2
        estimate = gradient if estimate is None else (1 - gain) * estimate + gain * gradient
        previous, x = x, x - rate * estimate
        np.testing.assert_allclose(params, x, rtol=1e-5)


def test_disk_tracks_a_moving_gradient_better_than_an_average_does():
    """On a bowl the prediction is exact, so the estimate is the gradient; an average lags."""
    errors = {}
    for name, optimizer in {
        "disk": disk(optax.sgd(0.1), gain=0.3),
        "average": optax.chain(low_pass((0.3,), (-0.7,)), optax.sgd(0.1)),
    }.items():
        tx, params = chain(quiet(), optimizer), jnp.array(1.0)
        state = tx.init(params)
        step = jax.jit(
            lambda params, state, tx=tx: tx.update(
                (tx.gradient_point(params, state) if tx.gradient_point else params)[None],
                *(state, params),
            )
        )
        for _ in range(8):
            updates, state = step(params, state)
            errors[name] = abs(float(-updates / 0.1 - params))
            params = optax.apply_updates(params, updates)
    assert errors["disk"] < 1e-6 < 0.05 < errors["average"]


def test_disk_is_refused_where_the_gradients_are_taken_elsewhere():
    loss = lambda mean, x: 0.5 * (mean - x) ** 2  # noqa: E731
    options = {"plan": PLAN, "optimizer": disk(optax.sgd(0.1)), "key": jax.random.key(0)}
    data = jnp.ones(40)
    with pytest.raises(ValueError, match=r"needs a plain loss; got no loss"):
        PrivateRun(None, jnp.array(0.0), data, **options)
    guide = dpoptax.vi.guides.MeanField(jnp.zeros(()))
    elbo = dpoptax.vi.global_elbo(guide, loss, num_examples=40)
    params = {"loc": jnp.zeros(()), "raw_scale": jnp.zeros(())}
    with pytest.raises(ValueError, match=r"needs a plain loss; got GlobalElbo"):
        fit(elbo, params, data, progress=False, **options)


@pytest.mark.parametrize(
    ("b", "a"),
    [((0.05, 0.05), (-0.9,)), ((0.3,), (-0.7,)), ((0.25, 0.5, 0.25), ()), ((1.0,), ()),
     ((0.02, 0.04, 0.02), (-1.56, 0.64))],
)  # fmt: skip
def test_low_pass_is_the_linear_filter_divided_by_its_response_to_one(b, a):
    tx = low_pass(b, a)
    grads = np.random.default_rng(0).normal(size=(12, 3))
    state, found = tx.init(jnp.zeros(3)), []
    for g in grads:
        output, state = tx.update(jnp.asarray(g, jnp.float32), state)
        found.append(output)
    expected = scipy.signal.lfilter(b, [1.0, *a], grads, axis=0)
    expected /= scipy.signal.lfilter(b, [1.0, *a], np.ones((12, 1)), axis=0)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_bad_filters_are_refused():
    for b, a, message in (
        ((), (), "b_0"),
        ((0.0, 1.0), (), "b_0"),
        ((1.0,), (-1.0,), "stable"),
        ((1.0,), (0.9, -3.0), "stable"),
        ((1.0, -2.0), (), "positive in every step"),
    ):
        with pytest.raises(ValueError, match=message):
            low_pass(b, a)
    for gain in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="gain"):
            disk(optax.sgd(1.0), gain=gain)


def test_disk_moves_the_gradients_also_around_another_optimizer_that_acts_before_the_clip():
    params = jnp.array([1.0, 2.0])
    for optimizer in (
        disk(scale_then_privatize(optax.sgd(0.1)), gain=0.5),
        scale_then_privatize(disk(optax.sgd(0.1), gain=0.5)),
    ):
        tx = chain(quiet(), optimizer)
        state = tx.init(params)
        updates, state = tx.update(jnp.ones((1, 2)), state, params)
        moved = optax.apply_updates(params, updates)
        np.testing.assert_allclose(tx.gradient_point(moved, state), moved + updates, rtol=1e-6)
