"""Strategies for correlated noise, written as a user would write them, and runs that record noise.

A run with gradients of zero releases nothing but noise. `C` times its rows is the independent noise
that they were made of.
"""

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpoptax
from dpoptax.mechanisms._strategy import Strategy
from dpoptax.training._train_step import init_state, make_train_step


def toeplitz(column, steps):
    """A lower triangular matrix with the same numbers along each diagonal."""
    rows = np.arange(steps)
    return np.tril(np.pad(column, (0, steps))[np.abs(rows[:, None] - rows)])


@attrs.frozen
class Toeplitz(Strategy):
    """A matrix C, or its inverse, with a few diagonals."""

    numbers: tuple
    num_steps: int = 12

    def matrix(self, num_steps=None):
        size = self.num_steps if num_steps is None else num_steps
        matrix = self._unscaled()
        return (matrix / np.linalg.norm(matrix, axis=0).max())[:size, :size]

    def noise_norms(self):
        return np.linalg.norm(np.linalg.inv(self.matrix()), axis=1)


@attrs.frozen
class Taps(Toeplitz):
    """The inverse of C has these numbers, up to a factor, in its first column."""

    @property
    def num_bands(self):
        return self.num_steps if len(self.numbers) > 1 else 1

    @property
    def taps(self):
        return tuple(np.linalg.inv(self.matrix())[: len(self.numbers), 0].tolist())

    def _unscaled(self):
        return np.linalg.inv(toeplitz(self.numbers, self.num_steps))


@attrs.frozen
class Recursion(Toeplitz):
    """C has these numbers, up to a factor; the noise follows from the last few noises."""

    @property
    def num_bands(self):
        return len(self.numbers)

    def init(self, like):
        count = len(self.numbers) - 1
        return {
            "past": jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), like)
        }

    def next(self, white, state, step):
        first, *others = map(float, self.matrix()[: len(self.numbers), 0])
        noise = jax.tree.map(
            lambda z, past: (z - sum(c * y for c, y in zip(others, past, strict=True))) / first,
            *(white, state["past"]),
        )
        past = jax.tree.map(
            lambda now, before: jnp.concatenate([now[None], before])[: len(others)],
            *(noise, state["past"]),
        )
        return noise, {"past": past}

    def _unscaled(self):
        return toeplitz(self.numbers, self.num_steps)


CORRELATED = {
    "taps": lambda: dpoptax.mechanisms.Correlated(Taps((1.0, -0.5, -0.25, -0.125))),
    "recursion": lambda: dpoptax.mechanisms.Correlated(Recursion((1.0, 0.5, 0.375))),
}
# The parameters after a step are the release of the step.
only_release = optax.GradientTransformation(
    lambda params: optax.EmptyState(),
    lambda updates, state, params: (jax.tree.map(jnp.subtract, updates, params), state),
)


def rows_of(tree):
    """The numbers of a release in one row."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def recorded(mechanism, steps=12, seed=0, params=None, change=lambda step, state: state):
    """Runs train steps, whose keys are a chain, with gradients of zero; returns a row per step.

    The noise multiplier is 1.5 and the clip bound 2, so that independent noise has a standard
    deviation of 3. Before each step, `change(step, state)` may change the state.
    """
    params = {"a": jnp.zeros(2000), "b": jnp.zeros((7, 300))} if params is None else params
    tx = optax.chain(
        dpoptax.privatize(
            2.0, 1.5, expected_batch_size=1, key=jax.random.key(seed), mechanism=mechanism
        ),
        only_release,
    )
    sampler = dpoptax.samplers.Poisson(8, 4)
    state = init_state(
        params, tx=tx, sampler=sampler, sampling_key=jax.random.key(1), model_key=jax.random.key(2)
    )
    loss = lambda params, x: x * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))  # noqa: E731
    step = jax.jit(make_train_step(loss, tx=tx, sampler=sampler))
    rows = []
    for number in range(steps):
        state, _ = step(change(number, state), jnp.zeros(8))
        rows.append(rows_of(state.params))
    return np.stack(rows)


def whitened(mechanism, rows):
    """The independent noise of a run, with standard deviation one."""
    return mechanism.strategy.matrix(len(rows)) @ rows / 3.0
