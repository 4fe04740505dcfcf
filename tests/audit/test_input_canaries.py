"""Canaries that are rows of the data, and audits of many runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.audit import GradientCanaries, InputCanaries, audit_many_runs, mislabelled
from dpoptax.audit import uniform_inputs as uniform
from dpoptax.training import HostData, fit

ROWS, CANARIES = 20, 30
DATA = np.zeros((ROWS, 40), np.float32)
# Each canary pulls at its own coordinate.
EXAMPLES = 5.0 * np.eye(CANARIES, 40, dtype=np.float32)


def loss(w, x):
    return jnp.sum((w - x) ** 2)


def loss_with_key(w, x, key):
    return loss(w, x) + jax.random.normal(key, ())


def plan(num_examples=ROWS + CANARIES, noise_multiplier=1e-3, num_steps=6):
    return dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(num_examples, num_examples / 2), clip=1.0,
        noise_multiplier=noise_multiplier, num_steps=num_steps, delta=1e-3,
    )  # fmt: skip


def run(audit, data=DATA, loss=loss, **changes):
    options = {"optimizer": optax.sgd(0.1), "key": jax.random.key(0), "progress": False}
    return fit(loss, jnp.zeros(40), data, plan=plan(), audit=audit, **(options | changes)).audit


@pytest.mark.seconds
@pytest.mark.parametrize("white_box", [False, True])
def test_with_little_noise_the_attack_tells_rows_that_were_in_from_others(white_box):
    audit = run(InputCanaries(EXAMPLES, white_box=white_box))
    assert len(audit.in_scores) + len(audit.out_scores) == CANARIES
    assert min(len(audit.in_scores), len(audit.out_scores)) > 5
    # One in 64 that are in is in no batch.
    assert np.sort(audit.in_scores)[3] > audit.out_scores.max()
    assert not audit.independent
    box = "white" if white_box else "black"
    assert audit.attack == f"{box}-box, {CANARIES} input canaries"


@pytest.mark.slow
def test_rows_on_the_host_and_losses_with_keys():
    device = run(InputCanaries(EXAMPLES), loss=loss_with_key)
    host = run(InputCanaries(EXAMPLES), HostData(DATA), loss=loss_with_key)
    np.testing.assert_allclose(device.in_scores, host.in_scores, rtol=1e-5)
    assert np.sort(device.in_scores)[3] > device.out_scores.max()
    white = run(InputCanaries(EXAMPLES, white_box=True), loss=loss_with_key)
    assert np.sort(white.in_scores)[3] > white.out_scores.max()


def test_rows_unlike_the_data_are_refused():
    with pytest.raises(ValueError, match=r"rows of shape \(40,\), as the data; got \(3,\)"):
        run(InputCanaries(np.zeros((CANARIES, 3), np.float32)))
    with pytest.raises(ValueError, match="must have the fields of the data"):
        run(InputCanaries({"x": EXAMPLES}))
    with pytest.raises(ValueError, match="50 = 20 rows"):
        fit(
            loss, jnp.zeros(40), DATA, plan=plan(51), optimizer=optax.sgd(0.1),
            audit=InputCanaries(EXAMPLES),
        )  # fmt: skip


@pytest.mark.seconds
@pytest.mark.untyped
def test_a_run_is_refused_or_keeps_its_result():
    with pytest.raises(ValueError, match="the number of canaries must be at least 1"):
        run(InputCanaries(EXAMPLES[:0]))
    with pytest.raises(TypeError, match="audit must be canaries"):
        run(GradientCanaries)
    with pytest.raises(ValueError, match="the same coin for each of 1"):
        fit(
            loss, jnp.zeros(40), DATA, plan=plan(ROWS + 1), optimizer=optax.sgd(0.1),
            audit=GradientCanaries(1), key=jax.random.key(0),
        )  # fmt: skip
    # After the run it is too late for a refusal.
    diverged = run(InputCanaries(np.where(np.arange(CANARIES)[:, None] < 1, np.nan, EXAMPLES)))
    assert "-inf for 1 scores that were nan" in diverged.attack
    assert np.isneginf([*diverged.in_scores, *diverged.out_scores]).sum() == 1


@pytest.mark.seconds
def test_wrong_labels_are_other_labels_and_all_of_them():
    labels = jnp.arange(3000) % 3
    wrong = mislabelled(labels, 3, jax.random.key(0))
    counts = np.bincount(np.asarray((wrong - labels) % 3), minlength=3)
    assert counts[0] == 0
    assert abs(counts[1] - 1500) < 4 * (3000 / 4) ** 0.5
    # The sum of two int8 may not be an int8.
    many = jnp.arange(3000, dtype=jnp.int8) % 100
    assert not np.any(mislabelled(many, 100, jax.random.key(0)) == many)
    inputs = uniform(500, (2, 3), jax.random.key(1), low=-1.0, high=3.0)
    assert inputs.shape == (500, 2, 3)
    assert float(inputs.min()) >= -1
    assert abs(float(inputs.mean()) - 1) < 4 * (16 / 12 / 3000) ** 0.5
    with pytest.raises(ValueError, match="low must be below high"):
        uniform(5, (2,), jax.random.key(0), low=1.0)


@pytest.mark.seconds
def test_many_runs_have_independent_scores_and_a_bound_below_epsilon():
    of_runs = plan(num_examples=11, noise_multiplier=1.0, num_steps=4)
    audit = audit_many_runs(
        loss, jnp.zeros(5), jnp.zeros((10, 5)), plan=of_runs, optimizer=optax.sgd(0.1),
        canary=GradientCanaries(1), num_runs=800, key=jax.random.key(0), runs_at_once=200,
    )  # fmt: skip
    assert audit.independent
    assert len(audit.in_scores) + len(audit.out_scores) == 800
    assert 0.5 * audit.epsilon < audit.lower_bound().epsilon < audit.epsilon


def test_many_runs_refuse_more_than_one_canary():
    with pytest.raises(ValueError, match="one canary each; got 2"):
        audit_many_runs(
            loss, jnp.zeros(5), jnp.zeros((10, 5)), plan=plan(12), optimizer=optax.sgd(0.1),
            canary=GradientCanaries(2), num_runs=8, key=jax.random.key(0),
        )  # fmt: skip
