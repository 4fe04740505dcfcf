"""Averages of the last iterates: chosen where they are better, on iterates with known optima."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpoptax.transforms import scale_then_privatize
from dpoptax.transforms._private import PrivateOptimizer
from dpoptax.vi._iterates import Convergence, keep_iterates, recommend, with_iterates

STEPS, COORDINATES, WORLDS = 800, 20, 40


def iterates(seed, autocorrelation, distance, decay):
    """Returns iterates around 0: an AR(1) process, and an exponential approach from `distance`."""
    rng = np.random.default_rng(seed)
    shape = (STEPS, WORLDS, COORDINATES)
    noise = rng.normal(size=shape) * math.sqrt(1 - autocorrelation**2)
    found = np.empty(shape)
    found[0] = rng.normal(size=shape[1:])
    for step in range(1, STEPS):
        found[step] = autocorrelation * found[step - 1] + noise[step]
    return found + distance * np.exp(-np.arange(STEPS) / decay)[:, None, None]


@jax.jit
def state_of(path):
    """Returns the state after a run whose parameters take these values, by the transformation."""
    tx = keep_iterates(STEPS)

    def step(carry, now):
        before, state = carry
        _, state = tx.update({"w": now - before}, state, {"w": before})
        return (now, state), None

    zero = jnp.zeros_like(path[0])
    (_, state), _ = jax.lax.scan(step, (zero, tx.init({"w": zero})), path)
    return state


def choose(paths):
    """Returns in each world the errors of three choices, and the convergence."""
    states = jax.vmap(state_of, in_axes=1)(jnp.asarray(paths, jnp.float32))
    errors, found = {"last": [], "half": [], "recommended": []}, []
    for world in range(WORLDS):
        state = jax.tree.map(lambda leaf, i=world: leaf[i], states)
        last = jnp.asarray(paths[-1, world], jnp.float32)
        recommended, convergence = recommend({"w": last}, state, STEPS)
        found.append(convergence)
        errors["last"].append(last)
        errors["half"].append(paths[STEPS // 2 :, world].mean(axis=0))
        errors["recommended"].append(recommended["w"])
    return {name: float(np.sqrt(np.mean(np.square(rows)))) for name, rows in errors.items()}, found


def test_the_average_is_recommended_where_the_iterates_have_settled():
    errors, found = choose(iterates(0, 0.7, 0.0, 1.0))
    # The average is five times better here, and the recommendation keeps most of that.
    assert errors["half"] < 0.25 * errors["last"]
    assert errors["recommended"] < 1.3 * errors["half"]
    assert all(one.settled and one.num_averaged_steps["w"] > 0 for one in found)


def test_the_average_is_not_recommended_where_the_iterates_still_move():
    errors, found = choose(iterates(1, 0.7, 30.0, 400.0))
    assert errors["half"] > 1.5 * errors["last"]
    assert errors["recommended"] < 1.1 * errors["last"]
    assert not any(one.settled for one in found)
    assert "Still moving, by R-hat of the iterates: w (" in str(found[0])


def test_a_shorter_average_is_recommended_where_only_the_end_has_settled():
    errors, _ = choose(iterates(2, 0.9, 30.0, 200.0))
    assert errors["recommended"] < 0.9 * min(errors["last"], errors["half"])


def test_rhat_of_iterates_is_that_of_its_definition():
    path = iterates(3, 0.7, 3.0, 400.0)[:, :1]
    _, (convergence, *_) = choose(np.repeat(path, WORLDS, axis=1))
    halves = path[STEPS // 2 :, 0].reshape(2, STEPS // 4, COORDINATES)
    within = halves.var(axis=1, ddof=1).mean(axis=0)
    between = (halves[0].mean(axis=0) - halves[1].mean(axis=0)) ** 2 / 2
    expected = np.sqrt(1 + np.mean(between / within))
    # Block means have 7 degrees of freedom in place of 200, for the smaller part of the variance.
    assert convergence.rhat["w"] == pytest.approx(expected, rel=0.03)


def test_short_and_interrupted_runs_give_the_last_iterate():
    last = {"w": jnp.ones(2), "v": jnp.zeros(())}
    tx = keep_iterates(20)
    state = tx.init(last)
    assert state.block_means["w"].shape == (0, 2)
    _, state = tx.update(last, state, last)
    for planned, kept in ((20, state), (STEPS, keep_iterates(STEPS).init(last))):
        params, convergence = recommend(last, kept, planned)
        assert params is last
        assert not convergence.settled
        assert "too short to tell" in str(convergence)


def test_a_run_that_ends_early_uses_the_blocks_that_it_has():
    path = jnp.asarray(iterates(4, 0.5, 0.0, 1.0)[:, 0], jnp.float32)
    tx = keep_iterates(STEPS)
    state, _ = jax.lax.scan(
        lambda state, now: (tx.update({"w": now}, state, {"w": jnp.zeros_like(now)})[1], None),
        tx.init({"w": path[0]}),
        path[: STEPS // 2 + 5 * 25 + 3],
    )
    params, convergence = recommend({"w": path[-1]}, state, STEPS)
    assert convergence.num_averaged_steps["w"] in (0, 4 * 25, 5 * 25)
    assert bool(jnp.all(jnp.isfinite(params["w"])))


def test_words_name_what_was_averaged():
    mixed = Convergence({"a": 400, "b": 0}, {"a": 1.01, "b": 1.5})
    assert str(mixed) == (
        "Still moving, by R-hat of the iterates: b (1.50). Recommended: averages of the last 400 "
        "iterates, and the last iterate of b. Train for more steps, or lower the learning rate "
        "towards the end."
    )
    assert "have settled (R-hat at most 1.02)" in str(Convergence({"a": 400}, {"a": 1.02}))
    assert "averages would lag" in str(Convergence({"a": 0}, {"a": 1.02}))


def test_an_optimizer_that_acts_before_the_clip_stays_outermost():
    optimizer = with_iterates(scale_then_privatize(optax.sgd(0.1)), STEPS)
    assert isinstance(optimizer, PrivateOptimizer)
    updates, _ = optimizer.optimizer.update(
        {"w": jnp.ones(2)}, optimizer.optimizer.init({"w": jnp.ones(2)}), {"w": jnp.ones(2)}
    )
    np.testing.assert_allclose(updates["w"], -0.1)
