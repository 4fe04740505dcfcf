"""A new sampler, clip rule or mechanism is one class and one line in `registry.py`.

Each class below is written as a user would write it, with public names only. We register it and
run on it every test that is parametrized over its table.
"""

import importlib.util
import inspect
import pathlib

import attrs
import dp_accounting
import jax
import jax.numpy as jnp
import pytest
import registry
from inclusion import LEVEL, draw, single_p_value, size_p_value

import dpoptax
from dpoptax.relations import parse_relation
from dpoptax.samplers import Batch, Sampler
from dpoptax.schedules import as_schedule

TESTS = pathlib.Path(registry.__file__).parent
PARAM = type(pytest.param())


@attrs.frozen
class CoinFlips(Sampler):
    """Poisson sampling by one coin per example, in batches as long as the data."""

    num_examples: int
    expected_batch_size: float

    @property
    def max_batch_size(self):
        return self.num_examples

    def sample(self, state):
        _, key = state.keys(2)
        rate = self.expected_batch_size / self.num_examples
        mask = jax.random.bernoulli(key, rate, (self.num_examples,))
        indices = jnp.arange(self.num_examples, dtype=jnp.int32)
        return state.advanced(), Batch(jnp.where(mask, indices, self.num_examples), mask)

    def event(self, noise_multiplier, num_steps, relation=None):
        rate = self.expected_batch_size / self.num_examples
        steps = [
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)),
                last - first,
            )
            for noise, first, last in as_schedule(noise_multiplier).pieces(num_steps)
        ]
        return steps[0] if len(steps) == 1 else dp_accounting.ComposedDpEvent(steps)


@attrs.frozen
class ClipByDivision:
    """Flat clipping, written as a division by max(1, norm / l2_clip)."""

    l2_clip: float

    def weights(self, squared_norms, step=0):
        norms = jnp.sqrt(sum(jax.tree.leaves(squared_norms)))
        return jnp.where(jnp.isfinite(norms), 1 / jnp.maximum(1.0, norms / self.l2_clip), 0.0)

    def sensitivity(self, relation):
        replaced = parse_relation(relation) == dp_accounting.NeighboringRelation.REPLACE_ONE
        return 2 * self.l2_clip if replaced else self.l2_clip


@attrs.frozen
class NormalNoise:
    """Gaussian noise from `jax.random.normal`."""

    scale: float = 1.0

    @property
    def caveat(self):
        return "noise is a floating-point Gaussian and treated as an exact one"

    def release(self, key, grads, clip, noise_multiplier, step):
        total = grads.weighted_sum(clip.weights(grads.squared_norms(), step))
        stddev = as_schedule(noise_multiplier).at(step) * as_schedule(clip.l2_clip).at(step)
        leaves, treedef = jax.tree.flatten(total)
        noisy = [
            leaf + stddev * jax.random.normal(leaf_key, leaf.shape, leaf.dtype)
            for leaf, leaf_key in zip(leaves, jax.random.split(key, len(leaves)), strict=True)
        ]
        return jax.tree.unflatten(treedef, noisy)

    def check(self, clip, noise_multiplier):
        pass


def cases_over(path, argument):
    """Yields each test of a file that is parametrized by `argument`, with its other arguments."""
    spec = importlib.util.spec_from_file_location(f"extension_{pathlib.Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, function in vars(module).items():
        if not (name.startswith("test_") and inspect.isfunction(function)):
            continue
        others, found = {}, False
        marks = getattr(function, "pytestmark", [])
        for mark in (mark for mark in marks if mark.name == "parametrize"):
            names, values = mark.args[:2]
            # One value is enough here: the quickest gradient form, which is the first one, and
            # otherwise the last one, which is the hardest by habit.
            value = list(values)[0 if "form" in names else -1]
            names = names.split(",") if isinstance(names, str) else names
            if isinstance(value, PARAM):
                value = value.values
            elif len(names) == 1:
                value = (value,)
            found = found or argument in names
            others |= dict(zip(names, value, strict=True))
        others.pop(argument, None)
        if found:
            yield pytest.param(function, others, id=name)


SAMPLER_TESTS = [
    *cases_over(TESTS / "samplers" / "test_samplers.py", "make"),
    *cases_over(TESTS / "laws" / "test_laws.py", "make"),
]
CLIP_RULE_TESTS = list(cases_over(TESTS / "laws" / "test_laws.py", "rule"))
MECHANISM_TESTS = list(cases_over(TESTS / "laws" / "test_mechanisms.py", "make"))


def test_the_tests_of_each_table_are_found():
    assert len(SAMPLER_TESTS) >= 6
    assert len(CLIP_RULE_TESTS) >= 6
    assert len(MECHANISM_TESTS) >= 4


@pytest.mark.seconds
@pytest.mark.parametrize(("test", "others"), SAMPLER_TESTS)
def test_a_sampler_is_a_class_and_a_line(test, others, monkeypatch):
    monkeypatch.setitem(registry.SAMPLERS, "coin flips", lambda n, b: CoinFlips(n, b))
    test(make=registry.SAMPLERS["coin flips"], **others)


@pytest.mark.slow
@pytest.mark.parametrize(("test", "others"), CLIP_RULE_TESTS)
def test_a_clip_rule_is_a_class_and_a_line(test, others, monkeypatch):
    monkeypatch.setitem(registry.CLIP_RULES, "by division", ClipByDivision)
    test(rule=registry.CLIP_RULES["by division"], **others)


@pytest.mark.parametrize(("test", "others"), MECHANISM_TESTS)
def test_a_mechanism_is_a_class_and_a_line(test, others, monkeypatch):
    monkeypatch.setitem(registry.MECHANISMS, "normal noise", NormalNoise)
    test(make=registry.MECHANISMS["normal noise"], **others)


def test_a_new_sampler_is_accounted_as_the_poisson_sampler_that_it_is():
    sampler = CoinFlips(30, 6.0)
    table = draw(sampler, 5_000)
    assert size_p_value(table, 0.2) > LEVEL
    assert single_p_value(table, 0.2) > LEVEL
    run = {"noise_multiplier": 1.1, "num_steps": 20, "delta": 1e-4}
    poisson = dpoptax.samplers.Poisson(30, 6, max_batch_size=30)
    epsilon = dpoptax.accounting.epsilon
    assert epsilon(sampler=sampler, **run) == epsilon(sampler=poisson, **run)


def test_a_sampler_without_an_event_cannot_be_made_and_a_plan_takes_samplers_only():
    class NoEvent(Sampler):
        def sample(self, state):
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"abstract method.*event"):
        NoEvent()

    class NoSampler:
        num_examples, expected_batch_size, max_batch_size = 10, 2.0, 10

    # The type checker of the tests refuses it first, where it is on.
    with pytest.raises(TypeError, match=r"sampler must be|Type-check error"):
        dpoptax.Plan(sampler=NoSampler(), clip=1.0, noise_multiplier=1.0, num_steps=1, delta=0.1)
