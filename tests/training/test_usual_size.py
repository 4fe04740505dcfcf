"""How many rows most batches of a sampler need."""

import jax
import pytest

import dpoptax
from dpoptax.training._usual_size import usual_size


@pytest.mark.parametrize("expected", [16, 128, 500])
def test_hardly_a_batch_is_larger(expected):
    sampler = dpoptax.samplers.Poisson(10_000, expected)
    usual = usual_size(sampler)
    assert usual % 8 == 0
    assert expected < usual < sampler.max_batch_size
    key = jax.random.key(0)
    sizes = jax.vmap(lambda step: sampler.sample(sampler.init(key)._replace(step=step))[1].mask)(
        jax.numpy.arange(400)
    ).sum(axis=1)
    assert 0.85 < float((sizes <= usual).mean()) < 1  # 0.90 to 0.97; the standard error is 0.02


def test_batches_without_much_padding_have_no_usual_size():
    samplers = dpoptax.samplers
    assert usual_size(samplers.FixedSize(1000, 100)) is None
    assert usual_size(samplers.Poisson(1000, 100, max_batch_size=110)) is None
    growing = samplers.PoissonSchedule([(samplers.Poisson(1000, 10), 5)])
    assert usual_size(growing) is None or usual_size(growing) >= 10
