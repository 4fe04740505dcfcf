"""A padded batch is computed without most of its padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.per_example import _devices, _trimmed
from dpoptax.per_example._api import deferred_values_and_grads
from dpoptax.per_example._choose_form import choose
from dpoptax.per_example._devices import DEVICES
from dpoptax.per_example._trimmed import TrimmedGrads
from dpoptax.per_example._validate_loss import check_loss

WIDTH, BATCH, USUAL = 8, 7, 4
PARAMS = {"w": 0.1 * jnp.ones((WIDTH, WIDTH)), "b": jnp.zeros(WIDTH)}
EXAMPLES = jax.random.normal(jax.random.key(0), (BATCH, WIDTH))


def loss_fn(params, example):
    hidden = jnp.tanh(example @ params["w"] + params["b"])
    return jnp.sum(hidden**2), {"hidden": hidden}


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(_trimmed, "LEAST_FLOPS", 0.0)


def pass_of(usual_size, mask, examples=EXAMPLES):
    values, grads = deferred_values_and_grads(loss_fn, has_aux=True, usual_size=usual_size)(
        PARAMS, examples, mask=mask
    )
    rule = dpoptax.clipping.FlatClip(0.3)
    return grads, (grads.clip_and_sum(rule.weights), grads.squared_norms(), values())


@pytest.mark.parametrize("count", range(BATCH + 1))
def test_sums_norms_and_values_are_those_of_the_whole_batch(always, count):
    mask = jnp.arange(BATCH) < count
    trimmed, found = pass_of(USUAL, mask)
    whole, expected = pass_of(None, mask)
    assert isinstance(trimmed, TrimmedGrads)
    assert not isinstance(whole, TrimmedGrads)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, 1e-5), found, expected)


def test_examples_behind_padding_count(always):
    mask = jnp.arange(BATCH) == BATCH - 1
    _, found = pass_of(USUAL, mask)
    _, expected = pass_of(None, mask)
    assert float(jnp.abs(found[0]["w"]).max()) > 0
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, 1e-5), found, expected)


def test_a_usual_batch_computes_the_usual_rows_only(always):
    """The program has both sizes, and takes the small one if all other rows are padding."""
    sizes = []

    def seen(params, example):
        jax.debug.callback(lambda _: sizes.append(1), example[0])
        return loss_fn(params, example)[0]

    _, grads = deferred_values_and_grads(seen, usual_size=USUAL)(
        PARAMS, EXAMPLES, mask=jnp.arange(BATCH) < USUAL
    )
    sizes.clear()
    jax.block_until_ready(grads.clip_and_sum(dpoptax.clipping.FlatClip(1.0).weights))
    jax.effects_barrier()
    assert len(sizes) == USUAL


def test_padding_may_hold_anything(always):
    mask = jnp.arange(BATCH) < USUAL - 1
    _, expected = pass_of(USUAL, mask)
    _, found = pass_of(USUAL, mask, jnp.where(mask[:, None], EXAMPLES, jnp.nan))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, 1e-5), found, expected)


def test_small_savings_accelerators_and_many_devices_take_the_whole_batch(monkeypatch):
    assert _trimmed.pays_to_trim(_trimmed.LEAST_FLOPS)
    assert not _trimmed.pays_to_trim(0.99 * _trimmed.LEAST_FLOPS)
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        assert not _trimmed.pays_to_trim(1e12)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 8)
        assert not _trimmed.pays_to_trim(1e12)
    tpu = next(device for device in DEVICES if not device.is_cpu)
    monkeypatch.setattr(_devices, "current_device", lambda: tpu)
    assert not _trimmed.pays_to_trim(1e12)


def test_the_choice_says_so(always):
    trace = check_loss(loss_fn, PARAMS, EXAMPLES, None, has_aux=True, allow_unused=False)
    choice = choose(trace.program, BATCH, usual_size=USUAL)
    assert choice.usual_size == USUAL
    assert "padding" in choice.reason
    assert choose(trace.program, BATCH, usual_size=BATCH).usual_size is None
    assert choose(trace.program, BATCH).usual_size is None
