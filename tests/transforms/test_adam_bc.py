"""DP-AdamBC matches its formula, and its second moment has no bias from the noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax import transforms
from dpoptax.schedules import Schedule
from dpoptax.transforms import scale_by_adam_bc

NOISE = [0.5, 0.5, 0.5, 2.0, 0.1]


@pytest.mark.parametrize("changing", [False, True], ids=["constant", "changing"])
def test_it_is_the_formula_of_the_paper(changing):
    b1, b2, eps, floor = 0.8, 0.95, 1e-3, 0.2
    tx = scale_by_adam_bc(b1, b2, eps, floor=floor)
    noise = NOISE if changing else [0.5] * 5
    grads = np.random.default_rng(0).normal(size=(5, 6))
    state, m, v = tx.init(jnp.zeros(6)), np.zeros(6), np.zeros(6)
    bias, apply = 0.0, jax.jit(tx.update)
    for t, (g, s) in enumerate(zip(grads, noise, strict=True), 1):
        update, state = apply(jnp.asarray(g, jnp.float32), state, noise_stddev=s)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        bias = b2 * bias + (1 - b2) * s**2
        corrected = (v - bias) / (1 - b2**t)
        if not changing:
            np.testing.assert_allclose(corrected, v / (1 - b2**t) - s**2, rtol=1e-9)
        below = np.sqrt(np.maximum(corrected, floor * s**2)) + eps
        np.testing.assert_allclose(update, m / (1 - b1**t) / below, rtol=1e-4)


def test_noise_leaves_no_bias_in_the_second_moment():
    """With schedules of clip, noise and size; Adam's own second moment would be their variance."""
    num, steps, b2 = 4000, 20, 0.9
    private = dpoptax.privatize(
        Schedule((1.0, 2.0), (7, 20)),
        Schedule((1.0, 3.0), (9, 20)),
        expected_batch_size=Schedule((2.0, 4.0), (5, 20)),
        key=jax.random.key(0),
    )
    tx = transforms.chain(private, scale_by_adam_bc(b2=b2))
    params, signal = jnp.zeros(num), 0.3

    def step(state, _):
        # One example with a gradient of 0.3 in every coordinate would be clipped: here in one.
        grads = jnp.zeros((1, num)).at[0, 0].set(signal)
        _, state = tx.update(grads, state, params)
        return state, None

    state = jax.lax.scan(step, tx.init(params), length=steps)[0]
    nu = np.asarray(state[1].nu)[1:]
    # The standard error from the spread itself: the square of a normal has heavy tails.
    assert abs(nu.mean()) < 4 * nu.std() / np.sqrt(num)
    assert nu.std() > 0.1


def test_moments_are_wide_for_narrow_parameters():
    """In bfloat16 an average with decay 0.999 stands still, and small differences are lost."""
    tx = scale_by_adam_bc()
    params = jnp.zeros(3, jnp.bfloat16)
    state, apply = tx.init(params), jax.jit(tx.update)
    for _ in range(400):
        update, state = apply(jnp.full(3, 1.0, jnp.bfloat16), state, noise_stddev=0.8)
    assert update.dtype == jnp.bfloat16
    assert state.nu.dtype == state.mu.dtype == jnp.float32
    np.testing.assert_allclose(state.nu / (1 - 0.999**400), 1 - 0.8**2, rtol=1e-4)


def test_bad_numbers_are_refused():
    for arguments in ({"b1": 1.0}, {"b2": -0.1}, {"eps": -1.0}, {"floor": -1.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            scale_by_adam_bc(**arguments)
