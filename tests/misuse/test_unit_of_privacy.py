"""The unit of privacy: raw rows with a sampler of users, a delta that protects nobody, and advice
that would weaken the guarantee.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import dpoptax
from dpoptax import Plan, accounting, samplers
from dpoptax.training import HostData, fit, init_state, make_train_step

IDS = np.arange(3 * 12) % 12  # twelve users with three rows each
ROWS = jnp.arange(36.0)
USERS = samplers.UserPoisson(IDS, expected_batch_size=4, max_examples_per_user=3)
RUN = {"clip": 1.0, "noise_multiplier": 1.0, "num_steps": 2, "delta": 1e-3}


def loss_of_row(mean, x):
    return (mean - x) ** 2


def loss_of_user(mean, row):
    x, present = row
    return jnp.sum(jnp.where(present, (mean - x) ** 2, 0.0)) / 3


def train(data, sampler=USERS, loss_fn=loss_of_row):
    return fit(
        loss_fn,
        jnp.array(0.0),
        data,
        plan=Plan(sampler=sampler, **RUN),
        optimizer=optax.sgd(0.1),
        key=jax.random.key(0),
        progress=False,
    )


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: HostData(np.asarray(rows))])
def test_rows_are_not_taken_for_users(wrap):
    with pytest.raises(ValueError, match=r"12 users.*one row per user; got 36 rows") as caught:
        train(wrap(ROWS))
    advice = str(caught.value)
    assert "fit(..., sampler.arrange(data))" in advice
    assert "Keep the sampler" in advice
    assert not re.search(r"(make|pass) (the|a) sampler", advice, re.IGNORECASE)


@pytest.mark.slow
def test_arranged_rows_are_trained_on():
    assert train(USERS.arrange(ROWS), loss_fn=loss_of_user).num_steps == 2


def test_a_sampler_of_other_units_names_them():
    class Households(samplers.Poisson):
        unit = "household"

    with pytest.raises(ValueError, match=r"12 households.*one row per household; got 36 rows"):
        train(ROWS, Households(12, 4))


def test_examples_of_another_number_need_another_plan():
    with pytest.raises(ValueError, match="plan is for 30 examples and data has 36") as caught:
        train(ROWS, samplers.Poisson(30, 4))
    assert "num_examples=36" in str(caught.value)
    assert "samplers.UserPoisson" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("make", registry.SAMPLERS.values(), ids=registry.SAMPLERS)
@pytest.mark.parametrize("rows", [11, 13])
def test_a_train_step_refuses_data_of_another_size(make, rows):
    keys = dpoptax.random.split_by_purpose(jax.random.key(0))
    run = {
        "sampler": make(12, 4),
        "tx": dpoptax.dp_sgd(
            0.1, 1.0, noise_multiplier=1.0, expected_batch_size=4, key=keys.noise_key
        ),
    }
    state = jax.eval_shape(
        lambda: init_state(
            jnp.array(0.0), sampling_key=keys.sampling_key, model_key=keys.model_key, **run
        )
    )
    step = make_train_step(loss_of_row, **run)
    with pytest.raises(ValueError, match=f"12 .*got|data has {rows}"):
        jax.eval_shape(step, state, jax.ShapeDtypeStruct((rows,), jnp.float32))
    jax.eval_shape(step, state, jax.ShapeDtypeStruct((12,), jnp.float32))


def test_a_batch_size_of_users_is_not_taken_for_one_of_rows():
    with pytest.raises(ValueError, match="in users, cannot exceed num_examples; got 24 of 12"):
        samplers.UserPoisson(IDS, expected_batch_size=24, max_examples_per_user=3)


LARGE_DELTA = {
    "Plan": lambda sampler: Plan(sampler=sampler, **RUN | {"delta": 0.1}),
    "epsilon": lambda sampler: accounting.epsilon(
        sampler=sampler, noise_multiplier=1.0, num_steps=2, delta=0.1
    ),
    "Plan.calibrate": lambda sampler: Plan.calibrate(
        sampler=sampler, clip=1.0, num_steps=2, epsilon=5.0, delta=0.1
    ),
    "calibrate_num_steps": lambda sampler: accounting.calibrate_num_steps(
        sampler=sampler, noise_multiplier=5.0, epsilon=1.0, delta=0.1
    ),
    "calibrate_batch_size": lambda sampler: accounting.calibrate_batch_size(
        num_examples=12, noise_multiplier=5.0, num_steps=2, epsilon=1.0, delta=0.1,
        make_sampler=lambda n, b: sampler,
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", LARGE_DELTA.values(), ids=LARGE_DELTA)
def test_a_delta_above_one_over_the_units_is_warned_of(call):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")  # as in a program: once for each line
        call(USERS)
    (message,) = {str(warning.message) for warning in seen}
    assert "1 / num_examples, which is 1 / 12; got 0.1" in message
    assert "publishes one user at random" in message
    assert "Pass for example 0.0083" in message
    # The type checker of the tests adds frames of its own.
    if not hasattr(accounting.epsilon, "__wrapped__"):
        (warning,) = seen
        assert warning.filename == __file__  # the line to change is in the caller's program


def test_the_case_of_fifty_thousand_rows_and_no_false_alarm():
    many = samplers.Poisson(50_000, 512)
    with pytest.warns(UserWarning, match=r"1 / 50000; got 0.001"):
        Plan(sampler=many, **RUN)
    Plan(sampler=samplers.Poisson(1000, 10), **RUN)  # equal to 1 / 1000: no warning


def test_a_report_says_that_delta_is_too_large():
    def guarantee(delta):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = Plan(sampler=samplers.Poisson(20, 4), **RUN | {"delta": delta})
        return " ".join(str(dpoptax.Report.from_plan(plan)).split())

    sentence = "This delta is too large: it is above 1 / 20"
    assert sentence in guarantee(0.1)
    assert sentence not in guarantee(0.05)
