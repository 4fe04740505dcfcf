"""A fingerprint changes with everything that can change a bit of a gradient."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.training import DeviceData, HostData, init_state, make_train_step
from dpoptax.training._dispatch import make_stepper
from dpoptax.training._resume.fingerprint import fingerprint, is_reproducible

SAMPLER = dpoptax.samplers.Poisson(300, 30)
DATA = np.asarray(2.0 + jax.random.normal(jax.random.key(7), (300, 2)))


@pytest.mark.parametrize(
    ("program", "backend", "flags", "reproducible"),
    [
        ("add", "cpu", "", True),
        ("custom-call callback", "cpu", "", False),
        ("add", "gpu", "", False),
        ("add", "gpu", "--xla_gpu_deterministic_ops=true", True),
        ("add", "gpu", "--a=b --xla_gpu_deterministic_ops=1", True),
        ("add", "gpu", "--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", False),
        ("add", "gpu", "--xla_gpu_exclude_nondeterministic_ops=true", False),
    ],
)
def test_only_programs_that_give_the_same_bits_are_reproducible(
    program, backend, flags, reproducible
):
    assert is_reproducible(program, backend, flags) is reproducible


def test_a_program_that_is_not_reproducible_never_has_the_same_fingerprint():
    assert fingerprint("callback", [DATA]) != fingerprint("callback", [DATA])


def test_another_processor_is_a_change(monkeypatch):
    here = fingerprint("program", [DATA])
    assert fingerprint("program", [DATA]) == here
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1 + os.cpu_count()), raising=False)
    assert fingerprint("program", [DATA]) != here


def loss_fn(params, example):
    return jnp.sum((params["w"] - example) ** 2)


def fingerprint_of(loss=loss_fn, data=DATA, rate=0.1, wrap=DeviceData):
    keys = dpoptax.random.split_by_purpose(jax.random.key(0))
    tx = optax.chain(
        dpoptax.privatize(1.0, 1.0, expected_batch_size=30, key=keys.noise_key), optax.sgd(rate)
    )
    state = init_state(
        {"w": jnp.zeros(2)}, tx=tx, sampler=SAMPLER, sampling_key=keys.sampling_key,
        model_key=keys.model_key,
    )  # fmt: skip
    make_step = functools.partial(make_train_step, loss, tx=tx, sampler=SAMPLER)
    stepper = make_stepper(make_step, wrap(data), sampler=SAMPLER, diagnostics=False)
    found = stepper.fingerprint(state)
    stepper.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [DeviceData, HostData])
def test_rate_data_and_loss_are_part_of_the_fingerprint(wrap):
    found = [
        fingerprint_of(wrap=wrap, **changes)
        for changes in (
            {},
            {},
            {"rate": 0.2},
            {"data": DATA + np.float32(0.001)},
            {"loss": lambda p, x: 2 * loss_fn(p, x)},
        )
    ]
    assert found[0] == found[1]
    assert len(set(found)) == len(found) - 1
