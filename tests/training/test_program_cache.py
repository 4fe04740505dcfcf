"""A second run of the same program does not compile, and a changed program does."""

import contextlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.training import HostData, PrivateRun, fit
from dpoptax.training import _program_cache as cache

COMPILATION = "/jax/core/compile/backend_compile_duration"
_counts = []


def _listen(name, seconds, **_):
    del seconds
    if name == COMPILATION:
        for count in _counts:
            count.append(name)


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def compilations():
    """A list with one entry for each program that is compiled inside the block."""
    count = []
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)


DATA = np.asarray(jax.random.normal(jax.random.key(1), (40, 2)))
SHIFT = 0.0


def shifted_loss(params, example):
    return jnp.sum((params - example - SHIFT) ** 2)


def run(rate=0.1, data=DATA, **options):
    """A run whose parts are all made anew."""
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(40, 8), clip=1.0, noise_multiplier=1.0, num_steps=3,
        delta=1e-3,
    )  # fmt: skip
    return fit(
        lambda params, example: shifted_loss(params, example), jnp.zeros(2), data, plan=plan,
        optimizer=optax.sgd(rate), key=jax.random.key(0), progress=False, **options,
    ).params  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"data": HostData(DATA)}, {"microbatch_size": "auto"}])
def test_a_second_identical_run_compiles_nothing(options):
    with compilations() as first:
        before = run(rate=0.3, **options)
    with compilations() as second:
        after = run(rate=0.3, **options)
    np.testing.assert_array_equal(before, after)
    assert second == []
    if not options:
        assert len(first) > 0  # the count has power


@pytest.mark.slow
def test_a_changed_number_is_another_program(monkeypatch):
    """Also one that the loss reads from a global variable, though the function is the same."""
    first = run()
    monkeypatch.setattr(f"{__name__}.SHIFT", 5.0)
    assert not np.allclose(run(), first)
    monkeypatch.undo()
    np.testing.assert_array_equal(run(), first)


def test_a_second_run_step_by_step_compiles_nothing():
    def make():
        plan = dpoptax.Plan(
            sampler=dpoptax.samplers.Poisson(40, 8), clip=1.0, noise_multiplier=1.0, num_steps=2,
            delta=1e-3,
        )  # fmt: skip
        private = PrivateRun(
            lambda params, example: shifted_loss(params, example), jnp.zeros(2), DATA, plan=plan,
            optimizer=optax.sgd(0.1), key=jax.random.key(0),
        )  # fmt: skip
        list(private)
        return private.params

    before = make()
    with compilations() as second:
        np.testing.assert_array_equal(make(), before)
    assert second == []


def test_only_a_few_programs_are_remembered_and_none_with_a_callback(monkeypatch):
    monkeypatch.setattr(cache, "_programs", type(cache._programs)())
    monkeypatch.setattr(cache, "MAX_PROGRAMS", 2)

    def times(number):
        return jax.jit(lambda x: number * x)

    functions = [times(number) for number in (1.0, 2.0, 3.0)]
    known = [cache.known_program(function, jnp.ones(2)) for function in functions]
    assert all(a is b for a, b in zip(known, functions, strict=True))
    assert cache.known_program(times(3.0), jnp.ones(2)) is functions[2]
    assert cache.known_program(times(3.0), jnp.ones(3)) is not functions[2]
    assert len(cache._programs) == 2

    def calls_back(number):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.jit(lambda x: x + jax.pure_callback(lambda: np.float32(number), shape))

    first, second = calls_back(1.0), calls_back(2.0)
    assert cache.known_program(first, jnp.ones(2)) is first
    assert cache.known_program(second, jnp.ones(2)) is second


IN_A_PROCESS = """
import collections, sys
import jax, jax.numpy as jnp, optax
import dpoptax

events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.split("/")[-1]]))
plan = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(40, 8), clip=1.0, noise_multiplier=1.0, num_steps=3, delta=1e-3
)
data = jnp.full((40, 2), float(sys.argv[1]))
dpoptax.training.fit(
    lambda params, example: jnp.sum((params - example) ** 2), jnp.zeros(2), data,
    plan=plan, optimizer=optax.sgd(0.1), progress=False,
)
print(events["cache_hits"], events["cache_misses"])
"""


@pytest.mark.e2e
def test_a_cache_on_disk_serves_other_keys_and_other_data_so_it_contains_neither(tmp_path):
    def run_in_a_process(value):
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        done = subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS, value],
            capture_output=True, text=True, check=True, env=os.environ | cache, timeout=300,
        )  # fmt: skip
        return [int(count) for count in done.stdout.split()]

    hits, misses = run_in_a_process("1")
    assert misses > 1
    # A new process draws a new secret key.
    assert run_in_a_process("2") == [hits + misses, 0]
