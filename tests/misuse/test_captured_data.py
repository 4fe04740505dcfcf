"""A loss, an augmentation or an optimizer that closes over the training data is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.training import DeviceData, HostData, PrivateRun, fit
from dpoptax.training._captured_data import refuse_captured_data

N = 300
X = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
PLAN = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(N, 8), clip=1.0, noise_multiplier=1.0, num_steps=3,
    delta=1e-4,
)  # fmt: skip


def loss_fn(params, x):
    return jnp.sum((params - x) ** 2)


def mixup(key, x):
    """Mixes an example with a random one of the data."""
    return 0.9 * x + 0.1 * jnp.asarray(X)[jax.random.randint(key, (), 0, N)]


class Rows:
    """A source of single examples."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index]


@pytest.mark.parametrize("start", [fit, PrivateRun])
@pytest.mark.parametrize("augment", [mixup, jax.jit(mixup)], ids=["plain", "jit"])
@pytest.mark.parametrize("data", [X, jnp.asarray(X), HostData(X), Rows()])
def test_an_augmentation_that_mixes_examples_is_refused(data, augment, start):
    loss = dpoptax.average_views(loss_fn, augment, 2)
    with pytest.raises(ValueError, match=r"closes over the training data.*Use only the example"):
        start(loss, jnp.zeros(3), data, plan=PLAN, optimizer=optax.sgd(0.1), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("start", "loss"), [(fit, loss_fn), (PrivateRun, loss_fn), (PrivateRun, None)]
)
def test_an_optimizer_that_reads_the_data_is_refused(start, loss):
    """Here for the scale of each coordinate, which must come from public numbers."""
    optimizer = dpoptax.transforms.scale_then_privatize(
        optax.sgd(0.1), scale=lambda params: 1 / jnp.std(jnp.asarray(X), axis=0)
    )
    run = {"plan": PLAN, "optimizer": optimizer, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match=r"the optimizer closes over the training data"):
        start(loss, jnp.zeros(3), X, **run)


def test_the_column_is_named_also_if_it_is_reshaped_and_no_value_is_shown():
    data = DeviceData({"image": X, "label": np.arange(N) % 2})
    with pytest.raises(ValueError, match=r"over the column data\['image'\]") as refusal:
        refuse_captured_data([jnp.asarray(X).reshape(N, 3, 1, 1)], data)
    assert not any(str(value) in str(refusal.value) for value in X.ravel())
    with pytest.raises(ValueError, match=r"over the column data\['label'\]"):
        refuse_captured_data([jnp.arange(N) % 2], data)


def test_other_arrays_may_be_captured():
    data = DeviceData({"x": X, "one": np.ones(N)})
    others = [
        jnp.asarray(X + 1),
        jnp.ones(N),
        jnp.ones(()),
        X[:-1],
        jax.random.split(jax.random.key(0), N),
    ]
    refuse_captured_data(others, data)
