"""Optimal coefficients: no small change improves them, and the error is that of the matrices."""

import numpy as np
import pytest
import scipy.optimize

from dpoptax.mechanisms.strategies import (
    BandedInverse,
    BandedToeplitz,
    BufferedToeplitz,
    DenseStrategy,
    Separated,
    StreamingStrategy,
    _optimize,
    prefix_sum_error,
    sensitivity,
)


def matrix_error(matrix, momentum):
    """The root mean squared error, from its definition."""
    steps = len(matrix)
    decays = momentum ** np.subtract.outer(np.arange(steps), np.arange(steps)).clip(0)
    velocities = np.tril(decays)
    sums = np.tril(np.ones((steps, steps))) @ velocities
    return np.linalg.norm(sums @ np.linalg.inv(matrix)) / np.sqrt(steps)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_error_is_that_of_the_matrices(momentum):
    for strategy in (
        BandedToeplitz((1.0, 0.4, -0.2), 20),
        BandedInverse((1.0, -0.4, -0.2), 20),
        BufferedToeplitz((0.4,), (0.8,), 20),
    ):
        exact = matrix_error(strategy.matrix(), momentum)
        assert prefix_sum_error(strategy, momentum=momentum) == pytest.approx(exact, rel=1e-9)
        dense = DenseStrategy(strategy.matrix())
        assert prefix_sum_error(dense, momentum=momentum) == pytest.approx(exact, rel=1e-9)
        corner = matrix_error(strategy.matrix(7), momentum)
        assert prefix_sum_error(strategy, 7, momentum) == pytest.approx(corner, rel=1e-9)


def test_the_error_of_streaming_objects():
    class Differences:
        def init_multiply(self, like):
            return np.zeros(like.shape, np.float32)

        def multiply_next(self, value, state):
            return value - 0.5 * state, value

    error = prefix_sum_error(StreamingStrategy(Differences(), 20))
    assert error == pytest.approx(prefix_sum_error(BandedInverse((1.0, -0.5), 20)), rel=2e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.95])
@pytest.mark.parametrize("bands", [2, 5])
def test_no_small_change_improves_the_bands(bands, momentum):
    steps = 60
    best = BandedToeplitz.optimal(bands, steps, momentum)
    least = prefix_sum_error(best, momentum=momentum)
    draws = np.random.default_rng(5).normal(size=(40, bands))
    for change in 1e-3 * draws:
        other = BandedToeplitz(tuple(np.asarray(best.coefficients) + change), steps)
        assert prefix_sum_error(other, momentum=momentum) >= least * (1 - 1e-9)
    square_root = BandedToeplitz.square_root(bands, steps)
    assert least < prefix_sum_error(square_root, momentum=momentum)


def test_gradients_of_the_errors_are_those_of_finite_differences(monkeypatch):
    seen = []

    def check(objective, start):
        point = start + 0.01
        found = objective(point)[1]
        expected = scipy.optimize.approx_fprime(point, lambda free: objective(free)[0], 1e-6)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        seen.append(len(start))
        return start

    monkeypatch.setattr(_optimize, "_least", check)
    BandedToeplitz.optimal(4, 30, 0.5)
    BandedToeplitz.optimal(80, 90, 0.5)
    BandedInverse.optimal(4, 30, separation=7, momentum=0.5)
    BufferedToeplitz.optimal(2, 30, separation=7, count=3)
    assert seen == [3, 79, 3, 4]


@pytest.mark.parametrize("separation", [None, 10])
def test_inverses_and_buffers_improve_on_square_roots(separation):
    steps = 80
    participation = Separated(separation or steps)

    def error(strategy):
        return prefix_sum_error(strategy) * sensitivity(strategy, participation)

    square_root = error(BandedInverse.square_root(4, steps))
    assert error(BandedInverse.optimal(4, steps, separation=separation)) < square_root
    assert error(BufferedToeplitz.optimal(3, steps, separation=separation)) < square_root


def test_more_bands_have_less_error():
    errors = [prefix_sum_error(BandedToeplitz.optimal(bands, 100)) for bands in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(np.sqrt(101 / 2))


def test_one_step_and_more_bands_than_steps():
    assert BandedToeplitz.optimal(3, 1).coefficients == (1.0,)
    assert len(BandedToeplitz.optimal(9, 4).coefficients) == 4
    assert BandedInverse.optimal(3, 1).inverse == (1.0,)
    assert prefix_sum_error(BandedToeplitz.optimal(3, 1)) == pytest.approx(1.0)
