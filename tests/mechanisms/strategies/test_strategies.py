"""Strategies: noise is the inverse of the stated matrix, and the matrix is scaled."""

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpoptax import _serialize
from dpoptax.mechanisms._strategy import Strategy
from dpoptax.mechanisms.strategies import (
    BandedInverse,
    BandedToeplitz,
    BufferedToeplitz,
    DenseStrategy,
    StreamingStrategy,
)
from dpoptax.random._derive import fingerprint

STEPS = 9


class HalfOfTheLast:
    """An object like a StreamingMatrix of JAX Privacy, for trees: z_t - z_{t-1} / 2."""

    def init_multiply(self, like):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

    def multiply_next(self, value, state):
        return jax.tree.map(lambda new, old: new - 0.5 * old, value, state), value


def dense():
    """A matrix of random numbers, some of them negative."""
    numbers = np.random.default_rng(1).normal(size=(STEPS, STEPS))
    return np.tril(numbers, -1) * 0.4 + np.diag(1 + abs(np.diagonal(numbers)))


def banded(bands):
    """The same with few bands."""
    matrix = dense()
    return matrix * (np.subtract.outer(np.arange(STEPS), np.arange(STEPS)) < bands)


STRATEGIES = {
    "one band": BandedToeplitz((2.0,), STEPS),
    "two bands": BandedToeplitz((2.0, -0.5), STEPS),
    "four bands": BandedToeplitz((1.0, 0.6, -0.3, 0.2), STEPS),
    "more bands than steps": BandedToeplitz.square_root(STEPS + 5, STEPS),
    "two taps": BandedInverse((2.0, -0.5), STEPS),
    "square root inverse": BandedInverse.square_root(5, STEPS),
    "more taps than steps": BandedInverse.square_root(STEPS + 5, STEPS),
    "buffers": BufferedToeplitz((0.3, 0.2, -0.1), (0.5, 0.9, 0.0), STEPS),
    "dense": DenseStrategy(dense()),
    "dense, three bands": DenseStrategy(banded(3)),
    "streaming": StreamingStrategy(HalfOfTheLast(), STEPS),
}
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)


def noise_of(strategy, draws):
    """The noise of every step, from the draws `(steps, ...)`, as a run computes it."""
    taps = strategy.taps
    if taps is not None:
        return np.stack(
            [
                sum(tap * draws[step - age] for age, tap in enumerate(taps) if age <= step)
                for step in range(len(draws))
            ]
        )

    def advance(state, step_and_draw):
        step, draw = step_and_draw
        tree, state = strategy.next({"a": draw, "b": draw[0]}, state, step)
        return state, tree

    like = {"a": jnp.zeros(draws.shape[1:]), "b": jnp.zeros(())}
    steps = jnp.arange(len(draws), dtype=jnp.int32)
    _, noise = jax.lax.scan(advance, strategy.init(like), (steps, jnp.asarray(draws, jnp.float32)))
    np.testing.assert_allclose(noise["a"][:, 0], noise["b"], rtol=1e-5, atol=1e-6)
    return np.asarray(noise["a"])


@each_strategy
def test_the_noise_is_the_inverse_of_the_matrix(strategy):
    draws = np.random.default_rng(0).normal(size=(STEPS, 2))
    noise = noise_of(strategy, draws)
    np.testing.assert_allclose(
        strategy.matrix() @ noise,
        draws,
        atol=3e-3 if isinstance(strategy, StreamingStrategy) else 1e-5,
    )
    # With one coefficient in the wrong place, the check above would fail.
    moved = np.roll(strategy.matrix(), 1, axis=0)
    assert abs(moved @ noise - draws).max() > 0.1


@each_strategy
def test_the_largest_column_has_norm_one(strategy):
    norms = np.linalg.norm(strategy.matrix(), axis=0)
    assert 0.998 < norms.max() <= 1 + 1e-12
    assert not np.triu(strategy.matrix(), 1).any()


@each_strategy
def test_bands_are_all_that_may_be_nonzero(strategy):
    rows, columns = np.nonzero(strategy.matrix())
    assert (rows - columns).max() + 1 == strategy.num_bands


@each_strategy
def test_noise_norms_are_the_rows_of_the_inverse(strategy):
    inverse = np.linalg.inv(strategy.matrix())
    expected = np.linalg.norm(inverse, axis=1)
    np.testing.assert_allclose(strategy.noise_norms(), expected, rtol=2e-3)


@each_strategy
def test_the_first_steps_are_a_corner_of_the_matrix(strategy):
    np.testing.assert_array_equal(strategy.matrix(4), strategy.matrix()[:4, :4])


def test_the_scale_of_coefficients_does_not_matter():
    one, other = (BandedToeplitz((a, 0.4 * a), STEPS) for a in (1.0, 7.0))
    np.testing.assert_allclose(one.matrix(), other.matrix(), rtol=1e-14)
    one, other = (BandedInverse((a, -0.4 * a), STEPS) for a in (1.0, 7.0))
    np.testing.assert_allclose(one.taps, other.taps, rtol=1e-14)


def test_square_roots_multiply_to_prefix_sums():
    root = BandedToeplitz.square_root(STEPS, STEPS).matrix()
    np.testing.assert_allclose(root @ root / root[0, 0] ** 2, np.tril(np.ones((STEPS, STEPS))))
    inverse = np.asarray(BandedInverse.square_root(STEPS, STEPS).inverse)
    np.testing.assert_allclose(np.convolve(inverse, root[:, 0])[1:STEPS], 0, atol=1e-15)


@each_strategy
def test_a_strategy_is_a_value(strategy):
    assert {strategy: 1}[strategy] == 1
    # Noise keys are derived from it, and reports show it.
    assert str(STEPS) in fingerprint(strategy) or isinstance(strategy, DenseStrategy)
    record = _serialize.encode(strategy)
    if not isinstance(strategy, StreamingStrategy):
        assert _serialize.decode(record, Strategy) == strategy


def test_different_streaming_matrices_differ():
    class ThirdOfTheLast(HalfOfTheLast):
        def multiply_next(self, value, state):
            return jax.tree.map(lambda new, old: new - old / 3, value, state), value

    one, other = (StreamingStrategy(kind(), STEPS) for kind in (HalfOfTheLast, ThirdOfTheLast))
    assert one != other
    assert fingerprint(one) != fingerprint(other)
    assert one == StreamingStrategy(HalfOfTheLast(), STEPS)
    with pytest.raises(ValueError, match="only the digest"):
        _serialize.decode(_serialize.encode(one), Strategy)


def test_objects_that_are_no_matrix_are_refused():
    class Squares(HalfOfTheLast):
        def multiply_next(self, value, state):
            return value + value**2 - value * jnp.abs(value), state

    class Repeats(HalfOfTheLast):
        """Gives the last draw only, so that the noise of the first step is zero."""

        def multiply_next(self, value, state):
            return state, value

    with pytest.raises(ValueError, match="must be linear"):
        StreamingStrategy(Squares(), 4)
    with pytest.raises(ValueError, match="positive diagonal"):
        StreamingStrategy(Repeats(), 4)
    with pytest.raises(TypeError, match="init_multiply"):
        StreamingStrategy(object(), 4)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BandedToeplitz((), 5), TypeError, "at least one number"),
        (lambda: BandedToeplitz(0.5, 5), TypeError, "tuple of numbers"),
        (lambda: BandedToeplitz((-1.0, 0.5), 5), ValueError, "must be positive"),
        (lambda: BandedToeplitz((1.0, np.inf), 5), ValueError, "must be finite"),
        (lambda: BandedToeplitz((1.0, np.nan), 5), ValueError, "nan"),
        (lambda: BandedToeplitz((1.0,), 0), ValueError, "at least 1"),
        (lambda: BandedToeplitz((1.0,), 2.5), TypeError, "whole number"),
        (lambda: BandedInverse((0.0, 1.0), 5), ValueError, "must be positive"),
        (lambda: BandedInverse((1.0, -9.0), 1000).matrix(), ValueError, "grows beyond"),
        (lambda: BufferedToeplitz((0.5,), (0.5, 0.6), 5), ValueError, "one scale and one decay"),
        (lambda: BufferedToeplitz((0.5,), (1.5,), 5), ValueError, "from 0 to 1"),
        (lambda: DenseStrategy([[1.0, 1.0], [0.0, 1.0]]), ValueError, "lower triangular"),
        (lambda: DenseStrategy([[1.0], [1.0, 0.0]]), ValueError, "diagonal"),
        (lambda: DenseStrategy([[1.0, 2.0, 3.0]]), ValueError, "square matrix"),
        (lambda: DenseStrategy([[np.nan]]), ValueError, "finite"),
        (lambda: DenseStrategy([[1e-200, 0.0], [0.0, 1e-200]]), ValueError, "squares"),
        (lambda: DenseStrategy([[1e200, 0.0], [0.0, 1e200]]), ValueError, "squares"),
        (lambda: BandedToeplitz((1e-300, 1e-300), 5).matrix(), ValueError, "too small"),
        (lambda: BandedToeplitz.optimal(3, 10, momentum=1.0), ValueError, "below 1"),
        (lambda: BandedInverse.optimal(3, 10, count=2), TypeError, "separation"),
    ],
)
def test_bad_matrices_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_strategies_are_frozen():
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        STRATEGIES["two bands"].num_steps = 10
