"""No program is certified that leaks through keys, counters, states, effects or captured arrays."""

import jax
import jax.numpy as jnp
import pytest
from audit import leaks_over_time
from audit.leaking_programs import DATASET, WIDTH, State, honest, initial
from audit.more_leaking_programs import BANDS, OWN_STATES, PROGRAMS, TAPS, leaks_with, step_of

import dpoptax


def certify_own(program, tx, sampler):
    params = {"w": jnp.zeros(WIDTH)}
    keys = jax.random.split(jax.random.key(5))
    state = State(params, tx.init(params), sampler.init(keys[0]), keys[1])

    def step(s, data):
        return program(s, data, tx, sampler)

    return dpoptax.certify(step, state, DATASET, private="data")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_leaking_program_is_not_certified(name):
    assert not dpoptax.certify(PROGRAMS[name], initial(), DATASET, private="data").certified


@pytest.mark.parametrize("name", leaks_over_time.PROGRAMS)
def test_a_program_that_leaks_over_time_is_not_certified(name):
    program = leaks_over_time.PROGRAMS[name]
    assert not dpoptax.certify(program, initial(), DATASET, private="data").certified


@pytest.mark.parametrize("name", OWN_STATES)
def test_a_leaking_program_with_a_state_is_not_certified(name):
    assert not certify_own(*OWN_STATES[name]).certified


def test_a_step_that_keeps_a_private_value_outside_is_refused():
    history = []

    def step(s, data):
        history.append(jnp.mean(data["x"]))
        return honest(s, data)

    found = dpoptax.certify(step, initial(), DATASET, private="data")
    assert ["kept outside" in leak.what for leak in found.leaks] == [True]


def test_an_argument_that_is_named_nonprivate_is_private():
    def fed_back(s, nonprivate_mean, data):
        return honest(s, data), s.params["w"] + nonprivate_mean

    def of_a_tree(s, metrics, data):
        return honest(s, data), s.params["w"] + metrics["nonprivate_mean"]

    mean = jnp.zeros(())
    found = dpoptax.certify(fed_back, initial(), mean, DATASET, private="data")
    assert [leak.output for leak in found.leaks] == ["output[1]"]
    metrics = {"nonprivate_mean": mean}
    assert not dpoptax.certify(of_a_tree, initial(), metrics, DATASET, private="data").certified


def loops(s, data, tx, sampler):
    return jax.lax.scan(lambda s, _: (step_of(s, data, tx, sampler), None), s, None, length=3)[0]


@pytest.mark.parametrize("program", [step_of, loops])
@pytest.mark.parametrize(
    "options",
    [
        {"mechanism": BANDS},
        {"mechanism": TAPS},
        {"sampler": dpoptax.samplers.BallsInBins(60, 10)},
        {"sampler": dpoptax.samplers.Shuffled(60, 6)},
    ],
    ids=lambda options: "-".join(options),
)
def test_the_same_states_without_a_leak_are_certified(program, options):
    leaks_with(**options)(program)
    found = certify_own(*OWN_STATES.pop(program.__name__))
    assert found.certified, str(found)
