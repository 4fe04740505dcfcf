"""An audit of a run with a fault shows more epsilon than the plan promises, else it does not."""

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.audit import GradientCanaries
from dpoptax.clipping import FlatClip
from dpoptax.mechanisms import Gaussian
from dpoptax.training import fit

CANARIES, ROWS = 500, 10
DATA = np.ones((ROWS, 2), np.float32)
OFTEN = dpoptax.samplers.Poisson(CANARIES + ROWS, 400)
SELDOM = dpoptax.samplers.Poisson(CANARIES + ROWS, 50)


def loss(params, x):
    return 1e-12 * (jnp.sum(params["w"]) + jnp.sum(params["b"])) * jnp.sum(x)


@attrs.frozen
class HalfTheNoise(Gaussian):
    """A mechanism that is accounted as Gaussian, and adds half of the noise."""

    def release(self, key, grads, clip, noise_multiplier, step):
        return Gaussian().release(key, grads, clip, noise_multiplier / 2, step)


@attrs.frozen
class TooOften(dpoptax.samplers.Sampler):
    """A sampler that is accounted at one rate, and draws at eight times that rate."""

    inner: dpoptax.samplers.Poisson = OFTEN
    accounted: dpoptax.samplers.Poisson = SELDOM
    num_examples: int = CANARIES + ROWS
    expected_batch_size: float = 50.0

    @property
    def max_batch_size(self):
        return self.inner.max_batch_size

    def sample(self, state):
        return self.inner.sample(state)

    def event(self, noise_multiplier, num_steps, relation=None):
        return self.accounted.event(noise_multiplier, num_steps, relation)


def no_clip_in_one_leaf(self, squared_norms, step=0):
    """Weights by the norms of the other leaf only."""
    norms = jnp.sqrt(squared_norms["b"])
    return jnp.where(norms > self.l2_clip, self.l2_clip / jnp.maximum(norms, 1e-12), 1.0)


def audit(monkeypatch, fault, seed):
    arguments = {"sampler": dpoptax.samplers.Poisson(CANARIES + ROWS, 255), "clip": 1.0}
    arguments |= {"noise_multiplier": 2.5, "num_steps": 10, "delta": 1e-3}
    if fault == "half of the noise":
        arguments["mechanism"] = HalfTheNoise()
    if fault == "canaries drawn too often":
        arguments["sampler"] = TooOften()
    plan = dpoptax.Plan(**arguments)
    if fault == "a leaf that is not clipped":
        monkeypatch.setattr(FlatClip, "weights", no_clip_in_one_leaf)
    params = {"w": jnp.zeros((60, 10)), "b": jnp.zeros(40)}
    options = {"optimizer": optax.sgd(0.1), "progress": False, "key": jax.random.key(seed)}
    return fit(loss, params, DATA, plan=plan, audit=GradientCanaries(CANARIES), **options).audit


def is_better_than_chance(bounds):
    """Whether the guesses are right more often than by chance, by three standard deviations."""
    guesses = sum(bound.num_guesses for bound in bounds)
    correct = sum(bound.num_correct for bound in bounds)
    return correct > guesses / 2 + 3 * (guesses / 4) ** 0.5


FAULTS = ["half of the noise", "canaries drawn too often", "a leaf that is not clipped"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(monkeypatch, fault):
    made = audit(monkeypatch, fault, seed=0)
    bound = made.lower_bound(confidence=0.99)
    assert bound.epsilon > made.epsilon
    assert is_better_than_chance([bound])


@pytest.mark.slow
def test_correct_runs_are_not_blamed(monkeypatch):
    audits = [audit(monkeypatch, None, seed) for seed in (0, 1)]
    bounds = [made.lower_bound(confidence=0.99) for made in audits]
    assert all(bound.epsilon < made.epsilon for bound, made in zip(bounds, audits, strict=True))
    # Not because they find nothing: guesses are right more often than by chance. Over ten seeds,
    # the guesses of one run are 4.7 standard deviations better than chance, give or take one, and
    # its bound is between zero and two thirds of epsilon.
    assert is_better_than_chance(bounds)
