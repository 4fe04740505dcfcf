"""A batch is cut into parts on a CPU if its activations are much larger than the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.per_example import _cached_parts as cached_parts
from dpoptax.per_example._choose_form import choose
from dpoptax.per_example._devices import DEVICES
from dpoptax.per_example._microbatched import MicrobatchedGrads
from dpoptax.per_example._validate_loss import check_loss

TOKENS, WIDTH = 64, 128
PARAMS = {"w": 0.1 * jnp.ones((WIDTH, WIDTH)), "b": jnp.zeros(WIDTH)}


def loss_fn(params, example):
    """Five layers that share a product over the tokens of an example."""
    hidden = example
    for _ in range(5):
        hidden = jnp.tanh(hidden @ params["w"] + params["b"])
    return jnp.mean(hidden**2)


def convolved(params, example):
    image = example.reshape(1, 1, TOKENS, WIDTH)
    kernel = params["w"][None, None, :3, :3]
    return loss_fn(params, jax.lax.conv(image, kernel, (1, 1), "SAME").reshape(TOKENS, WIDTH))


def batch_of(size):
    return jax.random.normal(jax.random.key(0), (size, TOKENS, WIDTH))


def program_of(loss, size=2):
    trace = check_loss(loss, PARAMS, batch_of(size), None, has_aux=False, allow_unused=False)
    return trace.program


@pytest.fixture
def small_cache(monkeypatch):
    # One example writes about 0.6 MiB.
    monkeypatch.setattr(cached_parts, "BYTES_OF_PART", 2**23)


def test_the_bytes_of_loops_are_multiplied_out():
    def one(example):
        return jnp.sum(jnp.sin(example) * 2.0)

    def three(example):
        turn = lambda total, _: (total + jnp.sum(jnp.sin(example) * 2.0), None)  # noqa: E731
        return jax.lax.scan(turn, 0.0, length=3)[0]

    example = jnp.ones(100)
    once, thrice = (
        cached_parts.activation_bytes(jax.make_jaxpr(function)(example).jaxpr)
        for function in (one, three)
    )
    assert once == 4 * (100 + 100 + 1)
    assert 3 * once < thrice <= 3 * (once + 12)  # the counter and the total


def test_keys_count_as_nothing():
    def draw(key):
        return jax.random.bits(jax.random.split(key, 10)[3], (5,))

    jaxpr = jax.make_jaxpr(draw)(jax.random.key(0)).jaxpr
    assert cached_parts.activation_bytes(jaxpr) >= 4 * 5  # the words
    keys = jax.make_jaxpr(lambda key: jax.random.split(key, 10))(jax.random.key(0)).jaxpr
    assert cached_parts.activation_bytes(keys) == 0


def test_large_activations_are_cut_and_small_ones_are_not(small_cache):
    program = program_of(loss_fn)
    sizes = [choose(program, batch).microbatch_size for batch in (4, 16, 64, 1024)]
    assert sizes[:2] == [None, None]
    assert sizes[2] == sizes[3]
    assert sizes[3] % 8 == 0
    assert "fit into the cache" in choose(program, 64).reason
    assert choose(program, 64, in_parts=False).microbatch_size is None


def test_convolutions_devices_and_accelerators_take_the_whole_batch(small_cache, monkeypatch):
    program = program_of(loss_fn)
    assert cached_parts.size_of_parts(program, 64, 1e9) is not None
    assert cached_parts.size_of_parts(program_of(convolved), 64, 1e9) is None
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 8)
        assert cached_parts.size_of_parts(program, 64, 1e9) is None
    tpu = next(device for device in DEVICES if not device.is_cpu)
    monkeypatch.setattr(cached_parts, "current_device", lambda: tpu)
    assert cached_parts.size_of_parts(program, 64, 1e9) is None


def test_parts_are_large_enough_for_products(small_cache):
    """A model with one row per example and parameter takes larger parts."""
    program = program_of(loss_fn)
    num_params = WIDTH * WIDTH + WIDTH
    size = cached_parts.size_of_parts(program, 4096, 6 * num_params * 0.5)
    assert size == 2 * cached_parts.LEAST_ROWS


@pytest.mark.parametrize("size", [0.3, 1.0, 1.6, 3.1, 5.0, 6.0, 11.0, 12.5, 1000.0])
def test_sizes_are_powers_of_two_or_whole_vectors(size):
    found = cached_parts._even(size)
    assert found in (1, 2, 4) or found % 8 == 0
    assert max(1, size / 1.6) <= found <= max(1, 1.5 * size)


@pytest.mark.seconds
def test_the_clipped_sum_and_the_norms_are_those_of_the_whole_batch(small_cache):
    batch = batch_of(40)
    mask = jnp.arange(40) < 27
    rule = dpoptax.clipping.FlatClip(1e-3)
    in_parts = dpoptax.per_example_grads(loss_fn)(PARAMS, batch, mask=mask)
    losses, whole = dpoptax.value_and_per_example_grads(loss_fn)(PARAMS, batch, mask=mask)
    assert isinstance(in_parts, MicrobatchedGrads)
    assert not isinstance(whole, MicrobatchedGrads)
    for one, other in zip(
        jax.tree.leaves((in_parts.clip_and_sum(rule.weights), in_parts.squared_norms())),
        jax.tree.leaves((whole.clip_and_sum(rule.weights), whole.squared_norms())),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    assert losses.shape == (40,)


def test_explain_says_so(small_cache):
    text = str(dpoptax.explain(loss_fn, PARAMS, batch_of(64)))
    assert "in microbatches of" in text
    assert "fit into the cache" in text


def test_no_part_is_larger_than_the_proof_of_rounding_allows():
    params = {"w": jnp.zeros((64, 64)), "v": jnp.zeros(64)}

    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["w"]) * params["v"])

    trace = check_loss(loss, params, jnp.zeros((2, 64)), None, has_aux=False, allow_unused=False)
    for power in range(8, 24):
        size = choose(trace.program, 2**power).microbatch_size
        assert size is None or size <= 4096
