"""Gradient canaries take part as the sampler draws them, at the clip bound, and their scores follow.

The model of most tests has many parameters and almost no gradient. So the law of the scores is that
of the canaries and the noise alone, and NumPy can simulate it.
"""

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import dpoptax
from dpoptax.audit import GradientCanaries
from dpoptax.clipping import FlatClip, PerLayerClip, QuantileClip
from dpoptax.schedules import Schedule
from dpoptax.training import Checkpoints, DeviceData, HostData, fit
from dpoptax.transforms import disk, scale_then_privatize

CANARIES, ROWS, BATCH, STEPS = 60, 12, 24, 4
NUM_EXAMPLES = CANARIES + ROWS
DATA = np.ones((ROWS, 3), np.float32)


def params():
    return {"w": jnp.zeros((20, 5)), "b": jnp.zeros(3), "s": jnp.zeros(())}


def loss(params, x):
    return 1e-12 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)) * jnp.sum(x)


def plan(sampler=None, clip=0.5, noise_multiplier=0.0, **changes):
    sampler = dpoptax.samplers.Poisson(NUM_EXAMPLES, BATCH) if sampler is None else sampler
    arguments = dict(sampler=sampler, clip=clip, noise_multiplier=noise_multiplier, delta=1e-3)
    return dpoptax.Plan(**({"num_steps": STEPS} | arguments | changes))


def run(plan, data=DATA, canaries=CANARIES, seed=0, **changes):
    options = {"optimizer": optax.sgd(0.1), "progress": False, "key": jax.random.key(seed)}
    audit = GradientCanaries(canaries) if isinstance(canaries, int) else canaries
    return fit(loss, params(), data, plan=plan, audit=audit, **(options | changes))


def participations(audit, clip=0.5, batch=BATCH):
    """How often each canary took part, from scores without noise, in and out."""
    return audit.in_scores * batch / clip, audit.out_scores * batch / clip


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in registry.SAMPLERS if "user" not in name])
def test_canaries_that_are_in_take_part_as_the_sampler_draws_them(name):
    sampler = registry.SAMPLERS[name](NUM_EXAMPLES, BATCH)
    result = run(plan(sampler))
    size = float(dpoptax.schedules.as_schedule(sampler.expected_batch_size).max)
    inside, outside = participations(result.audit, batch=size)
    np.testing.assert_allclose(outside, 0, atol=1e-3)
    np.testing.assert_allclose(inside, np.rint(inside), atol=1e-3)
    expected, spread = STEPS * size / NUM_EXAMPLES, (STEPS * 0.25 / len(inside)) ** 0.5
    assert abs(inside.mean() - expected) < 4 * spread
    assert len(inside) + len(outside) == CANARIES and 15 < len(inside) < 45


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"clip": PerLayerClip(0.5)},
        {"clip": dpoptax.clipping.AutoSClip(0.5)},
        {"clip": dpoptax.clipping.PsacClip(0.5)},
        {"clip": dpoptax.clipping.NormalizedClip(0.5)},
        {"clip": QuantileClip(0.5)},
        {"mechanism": dpoptax.mechanisms.DiscreteGaussian(), "noise_multiplier": 0.05},
        {"microbatch_size": 5},
        {"microbatch_size": 1},
        {"optimizer": scale_then_privatize(optax.sgd(0.1))},
        {"optimizer": scale_then_privatize(optax.sgd(0.1), per_leaf=True)},
        {"optimizer": disk(optax.sgd(0.1))},
        {"diagnostics": True, "microbatch_size": 5},
    ],
    ids=str,
)
def test_with_little_noise_who_took_part_is_plain_whatever_clips_sums_and_follows(changes):
    names = {"clip", "mechanism", "noise_multiplier"}
    own = {name: value for name, value in changes.items() if name in names}
    changes = {name: value for name, value in changes.items() if name not in names}
    result = run(plan(**({"noise_multiplier": 1e-3} | own)), **changes)
    scores = np.sort(np.concatenate([result.audit.in_scores, result.audit.out_scores]))
    # With this noise, the ratio of a step in which a canary took part is about 1 / (2 z^2).
    taken = np.rint(result.audit.in_scores * 2e-6)
    reached = 1.0 if not isinstance(own.get("clip"), PerLayerClip) else 3**-0.5
    np.testing.assert_allclose(result.audit.in_scores * 2e-6 / reached**2, taken, atol=0.1)
    assert np.all(result.audit.out_scores < 0) and np.all(np.isfinite(scores))
    assert abs(taken.mean() - STEPS * BATCH / NUM_EXAMPLES) < 0.75
