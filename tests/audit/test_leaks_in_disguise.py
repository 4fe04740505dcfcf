"""No program is certified that leaks between calls, in disguise, or by its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit import leaks_between_calls, leaks_in_disguise
from audit.leaking_programs import (
    DATA,
    DATASET,
    LABELS,
    SAMPLER,
    N,
    apply,
    gradients,
    honest,
    initial,
)
from audit.leaks_between_calls import FADING, leaks, step_of
from audit.more_leaking_programs import BANDS, TAPS
from audit.test_more_leaking_programs import certify_own

import dpoptax
from dpoptax.samplers import CyclicPoisson, take

PLAN = dpoptax.Plan(sampler=SAMPLER, clip=1.0, noise_multiplier=1.1, num_steps=9, delta=1e-4)


@pytest.mark.parametrize("name", leaks_between_calls.PROGRAMS)
def test_a_program_that_leaks_between_calls_is_not_certified(name):
    assert not certify_own(*leaks_between_calls.PROGRAMS[name]).certified


@pytest.mark.parametrize("name", leaks_in_disguise.PROGRAMS)
def test_a_program_that_leaks_in_disguise_is_not_certified(name):
    program = leaks_in_disguise.PROGRAMS[name]
    assert not dpoptax.certify(program, initial(), DATASET, private="data").certified


def loops(s, data, tx, sampler):
    return jax.lax.scan(lambda s, _: (step_of(s, data, tx, sampler), None), s, None, length=3)[0]


def loops_between_two_steps(s, data, tx, sampler):
    s = loops(step_of(s, data, tx, sampler), data, tx, sampler)
    return step_of(s, data, tx, sampler), {"nonprivate_mean": jnp.mean(data["x"])}


@pytest.mark.parametrize("program", [step_of, loops_between_two_steps])
@pytest.mark.parametrize(
    "options",
    [
        {"noise": FADING},
        {"mechanism": BANDS},
        {"mechanism": TAPS},
        {"sampler": CyclicPoisson(N, 6, 4)},
    ],
    ids=lambda options: "-".join(options),
)
def test_the_same_runs_without_a_leak_are_certified(program, options):
    leaks(program, **options)
    found = certify_own(*leaks_between_calls.PROGRAMS.pop(program.__name__))
    assert found.certified, str(found)


def test_a_key_that_moves_on_at_its_place_is_certified():
    def step(s, data):
        key, use = jax.random.split(s.key)
        return honest(s, data)._replace(key=key), {"drawn": jax.random.normal(use, (3,))}

    found = dpoptax.certify(step, initial(), DATASET, private="data")
    assert found.certified, str(found)


def test_a_key_of_a_pair_must_stay_at_its_place():
    def step(pair, s, data):
        w, key = pair
        shown, s = jax.random.normal(key, (3,)), honest(s, data)
        return (w, jax.random.split(key)[0]), s, shown

    def leaking(pair, s, data):
        (w, _), after, shown = step(pair, s, data)
        return (w, s.opt_state[0].key), after, shown

    pair = jnp.zeros(2), jax.random.key(7)
    assert dpoptax.certify(step, pair, initial(), DATASET, private="data").certified
    assert not dpoptax.certify(leaking, pair, initial(), DATASET, private="data").certified


def test_all_of_many_arguments_are_private():
    def step(s, *columns):
        return honest(s, {"x": columns[0], "y": columns[1]}), jnp.max(columns[1])

    assert not dpoptax.certify(step, initial(), DATA, LABELS, private="columns").certified


@jax.tree_util.register_pytree_node_class
class WithStaticLabels:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def tree_flatten(self):
        return (self.x,), tuple(self.y.tolist())

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(children[0], np.asarray(aux))


def test_a_static_field_with_an_entry_per_example_is_refused():
    def step(s, data):
        return honest(s, {"x": data.x, "y": jnp.zeros(N, jnp.int32)}), jnp.max(data.y[:30])

    with pytest.raises(ValueError, match="static field"):
        dpoptax.certify(step, initial(), WithStaticLabels(DATA, LABELS), private="data")


def test_a_plan_of_another_class_is_refused():
    class Own(dpoptax.Plan):
        def epsilon(self, *args, **kwargs):
            return 0.1

    plan = Own(sampler=SAMPLER, clip=1.0, noise_multiplier=1.1, num_steps=9, delta=1e-4)
    with pytest.raises(ValueError, match=r"must be a dpoptax\.Plan"):
        dpoptax.certify(honest, initial(), DATASET, private="data", plan=plan)


class EqualToAll(dpoptax.samplers.Poisson):
    """A sampler that says that it is that of the plan, and of the package."""

    __module__ = "dpoptax.samplers._poisson"
    __hash__ = None

    def __eq__(self, other):
        return True

    def sample(self, state):
        return super().sample(state)


def test_a_sampler_that_equals_all_is_not_that_of_the_plan():
    own = EqualToAll(N, 6, 16)

    def step(s, data):
        state, batch = own.sample(s.sampler_state)
        s = s._replace(sampler_state=state)
        return apply(s, gradients(s.params, take(data, batch)))

    found = dpoptax.certify(step, initial(), DATASET, private="data", plan=PLAN)
    assert any("the sampler of a release is not" in leak.what for leak in found.leaks)
    assert any("EqualToAll" in name for name in found.trusted())


@pytest.mark.parametrize(
    "hidden", ["0" * N, (("labels", tuple(range(N))), "mean"), frozenset(range(N))]
)
def test_a_static_field_may_not_hide_an_entry_per_example(hidden):
    class Own:
        pass

    jax.tree_util.register_pytree_node(Own, lambda own: ((DATA,), hidden), lambda *_: Own())
    with pytest.raises(ValueError, match="static field"):
        dpoptax.certify(honest, initial(), Own(), private="data")
