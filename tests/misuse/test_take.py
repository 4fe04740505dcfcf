"""The loss is checked on the examples that `take` returns, which may differ from the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.training import DeviceData, HostData, PrivateRun, fit, init_state, make_train_step

SAMPLER = dpoptax.samplers.Poisson(20, 4)
PLAN = dpoptax.Plan(sampler=SAMPLER, clip=1.0, noise_multiplier=1.0, num_steps=2, delta=1e-3)
ROWS = {"image": np.ones((20, 4), np.uint8), "label": np.ones(20, np.float32)}
PARAMS = {"w": jnp.zeros(2), "b": jnp.zeros(())}
RUN = {"plan": PLAN, "optimizer": optax.sgd(0.1), "key": jax.random.key(0)}


def renaming(rows, batch):
    """Renames the fields, widens one and makes another shape of it."""
    taken = dpoptax.samplers.take(rows, batch)
    x = taken.examples["image"][:, :2].astype(jnp.float32) / 255
    return dpoptax.samplers.MaskedExamples({"x": x, "y": taken.examples["label"]}, taken.mask)


def loss_fn(params, example):
    return (params["w"] @ example["x"] + params["b"] - example["y"]) ** 2


def loss_without_bias(params, example):
    return (params["w"] @ example["x"] - example["y"]) ** 2


def loss_of_rows(params, row):
    return jnp.sum(params["w"]) * row["label"] + params["b"]


def test_a_take_that_renames_fields_trains():
    run = PrivateRun(loss_fn, PARAMS, DeviceData(ROWS, take=renaming), **RUN)
    run.step(2)
    assert np.all(np.isfinite(run.params["w"]))


@pytest.mark.slow
def test_data_on_the_host_train_the_same():
    host, device = (
        fit(loss_fn, PARAMS, wrap(ROWS, take=renaming), progress=False, **RUN)
        for wrap in (HostData, DeviceData)
    )
    np.testing.assert_allclose(host.params["w"], device.params["w"], rtol=1e-5)


@pytest.mark.slow
def test_a_size_of_microbatches_is_found_for_what_take_returns():
    data = DeviceData(ROWS, take=renaming)
    result = fit(loss_fn, PARAMS, data, progress=False, microbatch_size="auto", **RUN)
    assert result.num_steps == 2


def with_fit(loss, data):
    return fit(loss, PARAMS, data, progress=False, **RUN)


def with_private_run(loss, data):
    return PrivateRun(loss, PARAMS, data, **RUN)


def with_train_step(loss, data):
    keys = dpoptax.random.split_by_purpose(RUN["key"])
    run = {
        "tx": optax.chain(PLAN.privatize(keys.noise_key), optax.sgd(0.1)), "sampler": SAMPLER
    }  # fmt: skip
    state = init_state(PARAMS, sampling_key=keys.sampling_key, model_key=keys.model_key, **run)
    step = make_train_step(loss, take=data.take, **run)
    return jax.eval_shape(step, state, jax.tree.map(jnp.asarray, data.arrays))


@pytest.mark.parametrize("train", [with_fit, with_private_run, with_train_step])
def test_a_wrong_loss_is_refused_by_the_fields_that_take_returns(train):
    data = DeviceData(ROWS, take=renaming)
    with pytest.raises(ValueError, match=r"got params\['b'\] without one"):
        train(loss_without_bias, data)
    with pytest.raises(KeyError) as caught:
        train(loss_of_rows, data)
    notes = " ".join(caught.value.__notes__)
    assert "example['x']: float32[2], example['y']: float32[]" in notes


@pytest.mark.parametrize("wrap", [DeviceData, HostData])
def test_a_take_of_another_size_is_refused_before_the_first_step(wrap):
    def short(rows, batch):
        return jax.tree.map(lambda leaf: leaf[:2], renaming(rows, batch))

    with pytest.raises(ValueError, match="must have shape"):
        fit(loss_fn, PARAMS, wrap(ROWS, take=lambda rows, batch: short(rows, batch).examples),
            progress=False, **RUN)  # fmt: skip
