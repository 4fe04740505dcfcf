"""The private quantile of gradient norms: exact without noise, its sensitivity, and its cost."""

import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.accounting import Ledger, calibrate_noise_multiplier, event_epsilon
from dpoptax.mechanisms import _norm_quantile, norm_quantile
from dpoptax.samplers import Poisson

KEY = jax.random.key(0)


def grads_of(norms):
    return {"w": jnp.asarray(norms, jnp.float32)[:, None] * jnp.array([0.6, 0.8])}


@pytest.mark.seconds
@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_without_noise_it_is_the_quantile(quantile):
    norms = np.random.default_rng(0).lognormal(1.0, 1.0, 999)
    found = float(norm_quantile(grads_of(norms), quantile, 0.0, KEY))
    # Half of one of 256 parts of eight decades.
    assert abs(math.log10(found / np.quantile(norms, quantile))) <= 8 / 256 / 2 + 0.01


def counts_of(monkeypatch, norms, mask, quantile, answers):
    """The eight counts before noise, if the noise makes the search go as `answers` say."""
    seen = []

    def noise(key, count, stddev):
        seen.append(float(count))
        return jnp.float32(-1.0 if answers[len(seen) - 1] else 1.0)

    monkeypatch.setattr(_norm_quantile, "add_gaussian", noise)
    example_grads = dpoptax.per_example_grads(lambda w, x: jnp.sum(w * x))
    data = jnp.asarray(norms, jnp.float32)[:, None]
    norm_quantile(example_grads(jnp.zeros(1), data, mask=jnp.asarray(mask)), quantile, 1.0, KEY)
    return np.array(seen)


@pytest.mark.seconds
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_one_example_moves_all_counts_together_by_what_is_accounted(monkeypatch, quantile):
    """Brute force over norms and answers, for each way in which data sets can be neighbours."""
    norms = [0.0, 0.02, 7.0, 1e12, math.nan]
    unit = max(quantile, 1 - quantile) * math.sqrt(8)
    searches = ([True] * 8, [False] * 8, [False, True] * 4, [True, False, False, True] * 2)
    for answers in searches:
        data = [0.5, 3.0, 1.0], [True, True, False]
        without = counts_of(monkeypatch, *data, quantile, answers)
        found = [
            counts_of(monkeypatch, [0.5, 3.0, norm], [True] * 3, quantile, answers)
            for norm in norms
        ]
        for moved in found:
            # One more example, or one that contributes nothing in its place.
            assert np.linalg.norm(moved - without) <= unit + 1e-5
            for other in found:
                # Another example in its place: the accountant assumes twice the unit.
                assert np.linalg.norm(moved - other) <= 2 * unit + 1e-5
        # The unit is attained, so that a smaller one would be wrong.
        largest = max(np.linalg.norm(moved - without) for moved in found)
        assert largest >= min(quantile, 1 - quantile) * math.sqrt(8) - 1e-5
    if quantile == 0.5:
        assert largest == pytest.approx(unit, rel=1e-5)


def test_noise_of_a_count_is_what_is_accounted(monkeypatch):
    deviations = []
    real = _norm_quantile.add_gaussian

    def recorded(key, count, stddev):
        deviations.append(stddev)
        return real(key, count, stddev)

    monkeypatch.setattr(_norm_quantile, "add_gaussian", recorded)
    norm_quantile(grads_of([1.0, 2.0]), 0.8, 3.0, KEY)
    # Eight Gaussian releases of one example's contribution compose to one with multiplier 3.
    precision = sum((0.8 / deviation) ** 2 for deviation in deviations)
    assert precision**-0.5 == pytest.approx(3.0)
    assert len(deviations) == 8


def test_padding_is_not_counted_and_a_norm_that_is_not_finite_is_large():
    grads_fn = dpoptax.per_example_grads(lambda w, x: jnp.sum(w * x))
    data = jnp.array([[1.0], [2.0], [4.0], [math.nan], [1e-3], [1e-3]])
    mask = jnp.array([True, True, True, True, False, False])
    found = float(norm_quantile(grads_fn(jnp.zeros(1), data, mask=mask), 0.7, 0.0, KEY))
    assert found == pytest.approx(4.0, rel=0.08)


def test_a_quantile_and_the_rest_of_the_run_cost_the_budget():
    sampler, budget = Poisson(1000, 50), {"epsilon": 2.0, "delta": 1e-5}
    probe = calibrate_noise_multiplier(epsilon=0.2, delta=1e-5, sampler=sampler, num_steps=1)
    event = sampler.event(probe.noise_multiplier, 1)
    alone = calibrate_noise_multiplier(**budget, sampler=sampler, num_steps=100)
    rest = calibrate_noise_multiplier(**budget, sampler=sampler, num_steps=100, earlier=event)
    assert alone.noise_multiplier < rest.noise_multiplier < 1.1 * alone.noise_multiplier
    # The ledger of the run, charged with the quantile too, is at the budget.
    ledger = Ledger(sampler, clip=1.0, delta=1e-5)
    ledger.charge_event(event)
    ledger.charge(rest.noise_multiplier, 100)
    assert 1.97 < ledger.epsilon() <= 2.0
    assert rest.epsilon == pytest.approx(ledger.epsilon(), rel=1e-3)
    # Amplified by sampling: on all of the data, the same noise would cost more.
    whole = event_epsilon(dp_accounting.GaussianDpEvent(probe.noise_multiplier), delta=1e-5)
    assert whole > 3 * 0.2


def test_an_earlier_release_that_costs_the_budget_is_refused():
    arguments = {"epsilon": 1.0, "delta": 1e-5, "sampler": Poisson(1000, 50), "num_steps": 10}
    with pytest.raises(ValueError, match="Earlier releases count too"):
        calibrate_noise_multiplier(**arguments, earlier=dp_accounting.GaussianDpEvent(1.0))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"quantile": 1.0}, "quantile must lie strictly between 0 and 1"),
        ({"quantile": 50}, "got 50. Pass 0.5 for the median"),
        ({"quantile": math.nan}, "got nan"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be zero or more"),
        ({"smallest": 2.0, "largest": 1.0}, "smallest must be below largest"),
        ({"smallest": 0.0}, "smallest must be positive"),
    ],
)
def test_bad_arguments_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        norm_quantile(**({"grads": grads_of([1.0]), "quantile": 0.5, "noise_multiplier": 1.0,
                          "key": KEY} | changes))  # fmt: skip
