"""Releases: what a row moves is at most what the noise is for, exactly, and is charged first."""

import fractions

import jax
import numpy as np
import pytest
from synthetic.simulated import SCHEMA, simulate

from dpoptax.accounting import event_epsilon
from dpoptax.synthetic import Schema, _marginals
from dpoptax.synthetic._draws import Draws
from dpoptax.synthetic._releases import BITS, Releases, grid_steps


@pytest.mark.parametrize("weights", [[1.0], [1.0] * 15, [1.0, 2.0, 0.3], [1e-3, 1.0]])
@pytest.mark.parametrize("noise_multiplier", [0.1, 1.0, 3.735, 100.0])
def test_a_row_keeps_the_exact_bound(weights, noise_multiplier):
    def spent(steps):
        return fractions.Fraction(noise_multiplier) ** 2 * sum(step**2 for step in steps)

    steps = grid_steps(weights, noise_multiplier)
    assert spent(steps) <= 4**BITS - 9
    # It is used up, but for rounding down.
    assert spent([step + 1 for step in steps]) > 4**BITS - 9
    ratios = np.array(steps) / np.array(weights)
    np.testing.assert_allclose(ratios, ratios[0], rtol=2 / min(steps))


def test_too_many_columns_for_the_grid_are_refused():
    with pytest.raises(ValueError, match="epsilon is too small"):
        grid_steps([1.0] * 100, 1e6)


def test_noise_has_the_stated_scale_and_is_fresh():
    releases = Releases(jax.random.key(0), 1e-5)
    counts = [np.full(4000, 7, np.int64), np.zeros((2, 2000), np.int64)]
    first, stddevs = releases.release(counts, 2.0, [1.0, 2.0])
    second, _ = releases.release(counts, 2.0, [1.0, 2.0])
    for table, again, exact, stddev in zip(first, second, counts, stddevs, strict=True):
        noise, other = (table - exact).ravel() / stddev, (again - exact).ravel() / stddev
        # 4.5 standard errors of a mean, a variance and a correlation of 4000 numbers.
        assert abs(noise.mean()) < 4.5 / 4000**0.5
        assert abs(noise.var() - 1) < 4.5 * (2 / 4000) ** 0.5
        assert abs((noise * other).mean()) < 4.5 / 4000**0.5
    np.testing.assert_allclose(np.array(stddevs) ** -2.0 @ [1, 1], 2.0**-2, rtol=1e-4)
    assert releases.ledger.num_steps == 2


def test_a_release_is_charged_before_its_noise_is_drawn(monkeypatch):
    releases = Releases(jax.random.key(0), 1e-5)

    def crash(*arguments, **more):
        raise RuntimeError

    monkeypatch.setattr("dpoptax.synthetic._releases.discrete_gaussian", crash)
    with pytest.raises(RuntimeError):
        releases.release([np.zeros(3, np.int64)], 2.0)
    assert releases.ledger.num_steps == 1


class Recorder(Releases):
    """Records what is released; given the answers of another run, it repeats them."""

    def __init__(self, answers=None):
        super().__init__(jax.random.key(0), 1e-5)
        self.answers, self.asked, self.answered = answers, [], []

    def release(self, counts, noise_multiplier, weights=None):
        self.asked.append((counts, noise_multiplier, weights))
        answer = super().release(counts, noise_multiplier, weights)
        if self.answers is not None:
            answer = self.answers[len(self.answered)]
        self.answered.append(answer)
        return answer


def squared_moves(recorders, scale=1):
    """By release, how far a row moved it, in units of what the noise is for."""
    first, second = recorders
    for one, other in zip(first.asked, second.asked, strict=True):
        weights = one[2] or [1.0] * len(one[0])
        steps = grid_steps(weights, one[1])
        moved = sum(
            (scale * step) ** 2 * int(np.square(table - changed).sum())
            for table, changed, step in zip(one[0], other[0], steps, strict=True)
        )
        yield fractions.Fraction(one[1]) ** 2 * moved / (4**BITS - 9)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [("x", 0, 0, 0), ("z", 1, 7, 1), ("y", 0, 99, 1)])
def test_one_row_moves_every_release_by_at_most_its_sensitivity(extra):
    """The whole run on two neighbours: given the same answers, it asks for neighbouring counts."""
    pytest.importorskip("mbi")
    schema = Schema.from_dict(SCHEMA)
    table = simulate(0, 3000)
    larger = {
        name: np.append(column, value)
        for (name, column), value in zip(table.items(), extra, strict=True)
    }
    recorders = [Recorder()]
    for data in (table, larger):
        if data is larger:
            recorders.append(Recorder(recorders[0].answered))
        rng = Draws(jax.random.key(0))
        _marginals.measure(schema.encode(data), schema.columns, recorders[-1], 1.0, rng)
    moves = [float(move) for move in squared_moves(recorders)]
    assert len(moves) >= 3
    assert max(moves) <= 1
    # The one-way counts use it up, so that a slightly larger scale would not pass.
    assert max(map(float, squared_moves(recorders, scale=1.01))) > 1
    # All releases together cost what one release of multiplier 1 costs.
    ledger = recorders[0].ledger
    whole = event_epsilon(
        Releases(jax.random.key(0), 1e-5).ledger.sampler.event(1.0, 1), delta=1e-5
    )
    assert ledger.epsilon() <= whole * (1 + 1e-6)


def test_other_counts_under_one_key_have_other_noise():
    counts = np.arange(400)

    def noise(shift):
        releases = Releases(jax.random.key(0), 1e-5)
        noisy, _ = releases.release([counts + shift], 1.0)
        return noisy[0] - counts - shift

    np.testing.assert_array_equal(noise(0), noise(0))
    # The first run and another one that counts other tables would reveal the exact difference.
    assert np.mean(np.abs(noise(0) - noise(1)) < 1e-3) < 0.02
