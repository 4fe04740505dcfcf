"""Events and noise multipliers from numbers that other libraries and papers use."""

import math

import numpy as np
import pytest

import dpoptax
from dpoptax import Plan
from dpoptax.accounting._events import noise_with_private_quantile, poisson_event
from dpoptax.samplers import Poisson


def test_the_numbers_of_other_libraries():
    event = poisson_event(noise_multiplier=1.5, sampling_rate=128 / 60_000, num_steps=9360)
    sampler = Poisson(60_000, 128)
    plan = Plan(sampler=sampler, clip=2.0, noise_multiplier=1.5, num_steps=9360, delta=1 / 60_000)
    exact = dpoptax.accounting.event_epsilon(event, delta=1 / 60_000)
    assert exact == pytest.approx(plan.epsilon(), rel=1e-3)
    ends = {"noise_multiplier": 1.0, "num_steps": np.int32(3)}
    for rate, bound in ((0.0, 0.0), (1.0, 11.0)):
        event = poisson_event(sampling_rate=rate, **ends)
        assert dpoptax.accounting.event_epsilon(event, delta=1e-5) <= bound
    with pytest.raises(ValueError, match=r"sampling_rate is a probability; got 128"):
        poisson_event(sampling_rate=128, **ends)


def test_a_private_quantile_spends_a_fraction_of_the_budget():
    noise = noise_with_private_quantile(1.0, 5.0)
    # One example moves the pair (gradient / noise, count / 5) by the norm of (1 / noise, 1 / 10).
    assert math.hypot(1 / noise, 0.5 / 5.0) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="must exceed half of noise_multiplier"):
        noise_with_private_quantile(1.0, 0.5)
