"""No program is certified that leaks by what a rule takes for granted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit.leaking_programs import DATASET, apply, gradients, honest, initial, loss, sample
from audit.leaks_of_assumptions import BOXES, PROGRAMS, QUANTILE, Box, shown

import dpoptax
from dpoptax.audit._key_ancestry import may_derive
from dpoptax.random import split_by_purpose

CAPTURED = jax.random.key(1234)


# They pass values of classes that they define to the package, which the type checks refuse first.
UNTYPED = {
    *("samples_twice_by_a_state_with_another_number", "samples_by_a_state_that_ignores_its_number"),
    *("samples_by_a_state_with_a_constant_key", "gives_a_release_of_its_own_to_the_package"),
}
NAMES = [
    pytest.param(name, marks=[pytest.mark.untyped] * (name in UNTYPED), id=name)
    for name in PROGRAMS
]


@pytest.mark.parametrize("name", NAMES)
def test_a_program_that_breaks_an_assumption_is_not_certified(name):
    program, args = PROGRAMS[name]
    assert not dpoptax.certify(program, *args, DATASET, private="data").certified


def draws_by_the_step(s, data):
    key = jax.random.fold_in(jax.random.fold_in(s.key, 7), s.opt_state[0].step)
    return honest(s, data), shown(jax.random.split(key)[1])


def draws_for_many(s, data):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(s.key, jnp.arange(3))
    return honest(s, data), jax.vmap(shown)(keys)


def folds_labels_in_the_loss(s, data):
    def noisy(params, row):
        key = jax.random.fold_in(s.key, row["y"])
        return loss(params, row) + jnp.sum(params["w"] * shown(key))

    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken, noisy))


def names_a_mean(s, data):
    return honest(s, data), {"nonprivate_mean": jnp.mean(data["x"])}


def moves_two_boxes(s, one, two, data):
    moved = [Box(box.w, jax.random.split(box.key)[0]) for box in (one, two)]
    return honest(s, data), *moved, shown(jax.random.split(one.key)[1])


def counts_and_draws(s, count, key, data):
    key, use = jax.random.split(key)
    return honest(s, data), count + 1, key, shown(jax.random.fold_in(use, count))


def draws_of_old_keys(s, words, data):
    return honest(s, data), shown(words)


def captures_a_key(s, data):
    key = jax.random.fold_in(CAPTURED, s.opt_state[0].step)
    return honest(s, data), shown(jax.random.split(key)[1])


def clips_by_quantiles(s, data):
    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken), QUANTILE)


def clips_by_quantiles_in_a_loop(s, data):
    return jax.lax.fori_loop(0, 3, lambda _, s: clips_by_quantiles(s, data), s)


@pytest.mark.parametrize(
    ("program", "args"),
    [
        (draws_by_the_step, (initial(),)),
        (draws_for_many, (initial(),)),
        (folds_labels_in_the_loss, (initial(),)),
        (names_a_mean, (initial(),)),
        (moves_two_boxes, (initial(), *BOXES)),
        (counts_and_draws, (initial(), jnp.int32(0), jax.random.key(3))),
        (captures_a_key, (initial(),)),
        (draws_of_old_keys, (initial(), jax.random.PRNGKey(3))),
        (clips_by_quantiles, (initial(QUANTILE),)),
        (clips_by_quantiles_in_a_loop, (initial(QUANTILE),)),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_programs_like_them_without_a_leak_are_certified(program, args):
    found = dpoptax.certify(program, *args, DATASET, private="data")
    assert found.certified, str(found)


def test_the_ancestors_of_a_key_are_found():
    def words(key):
        return np.asarray(jax.random.key_data(key)).tobytes()

    parent, other = jax.random.key(1), jax.random.key(2)
    derived = [
        jax.random.fold_in(parent, 2**31 + 7),
        jax.random.split(parent, 7)[3],
        jax.random.fold_in(jax.random.fold_in(parent, 9), 77_777),
        jax.random.fold_in(jax.random.split(jax.random.split(parent)[1])[1], 2**20),
        jax.random.fold_in(split_by_purpose(parent).noise_key, 0),
        jax.random.fold_in(split_by_purpose(jax.random.fold_in(parent, 3)).noise_key, 0),
    ]
    assert all(may_derive(words(parent), words(key)) for key in derived)
    assert not any(may_derive(words(other), words(key)) for key in derived)
    assert not may_derive(words(parent), words(other))
