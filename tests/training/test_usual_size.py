"""How many rows most batches of a sampler need."""

import jax
import jax.numpy as jnp
import pytest

import dpoptax
from dpoptax.per_example import _trimmed
from dpoptax.training import init_state, make_train_step
from dpoptax.training._usual_size import usual_size


@pytest.mark.parametrize("expected", [16, 128, 500])
def test_hardly_a_batch_is_larger(expected):
    sampler = dpoptax.samplers.Poisson(10_000, expected)
    usual = usual_size(sampler)
    assert usual % 8 == 0
    assert expected < usual < sampler.max_batch_size
    key = jax.random.key(0)
    sizes = jax.vmap(lambda step: sampler.sample(sampler.init(key)._replace(step=step))[1].mask)(
        jnp.arange(400)
    ).sum(axis=1)
    assert 0.85 < float((sizes <= usual).mean()) < 1  # 0.90 to 0.97; the standard error is 0.02


def test_batches_without_much_padding_have_no_usual_size():
    samplers = dpoptax.samplers
    assert usual_size(samplers.FixedSize(1000, 100)) is None
    assert usual_size(samplers.Poisson(1000, 100, max_batch_size=110)) is None
    growing = samplers.PoissonSchedule([(samplers.Poisson(1000, 10), 5)])
    assert usual_size(growing) is None


def test_a_step_computes_a_usual_batch_without_most_of_its_padding(monkeypatch):
    monkeypatch.setattr(_trimmed, "LEAST_FLOPS", 0.0)
    # A batch of 8 has room for 31, and usually at most 16.
    sampler = dpoptax.samplers.Poisson(1000, 8, max_batch_size=31)
    keys = dpoptax.random.split_by_purpose(jax.random.key(0))
    run = {
        "tx": dpoptax.dp_sgd(
            0.1, 1.0, noise_multiplier=1.0, expected_batch_size=8, key=keys.noise_key
        ),
        "sampler": sampler,
    }
    sizes = []

    def loss_fn(params, example):
        jax.debug.callback(lambda _: sizes.append(1), example[0])
        return jnp.vdot(params, example) ** 2

    step = make_train_step(loss_fn, **run)
    state = init_state(jnp.ones(3), sampling_key=keys[0], model_key=keys[2], **run)
    sizes.clear()
    jax.block_until_ready(jax.jit(step)(state, jnp.ones((1000, 3))))
    jax.effects_barrier()
    assert usual_size(sampler) == len(sizes) == 16
