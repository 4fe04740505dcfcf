"""A batch is cut on a CPU if its activations or looked-up rows are much larger than the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import dpoptax
from dpoptax.per_example import _cached_parts as cached_parts
from dpoptax.per_example import _devices
from dpoptax.per_example._choose_form import choose
from dpoptax.per_example._devices import DEVICES
from dpoptax.per_example._microbatched import MicrobatchedGrads
from dpoptax.per_example._validate_loss import check_loss

TOKENS, WIDTH = 64, 128
# Small weights: where tanh saturates, its derivative is a difference of nearly equal numbers.
PARAMS = {"w": 0.01 * jnp.ones((WIDTH, WIDTH)), "b": jnp.zeros(WIDTH)}


def loss_fn(params, example):
    """Five layers that share a product over the tokens of an example."""
    hidden = example
    for _ in range(5):
        hidden = jnp.tanh(hidden @ params["w"] + params["b"])
    return jnp.mean(hidden**2)


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
    assert "waits less for memory" in choose(program, 64).reason
    assert choose(program, 64, in_parts=False).microbatch_size is None


def test_devices_and_accelerators_take_the_whole_batch(small_cache, monkeypatch):
    program = program_of(loss_fn)
    assert cached_parts.size_of_parts(program, 64, 1e9) is not None
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 8)
        assert cached_parts.size_of_parts(program, 64, 1e9) is None
    tpu = next(device for device in DEVICES if not device.is_cpu)
    monkeypatch.setattr(_devices, "current_device", lambda: tpu)
    assert cached_parts.size_of_parts(program, 64, 1e9) is None


def test_convolutions_take_smaller_parts(monkeypatch):
    def of_images(params, example):
        image = example.reshape(1, 1, TOKENS, WIDTH)
        return jnp.mean(jax.lax.conv(image, params["kernel"], (1, 1), "SAME") ** 2)

    params = {"kernel": jnp.ones((4, 1, 3, 3))}
    trace = check_loss(of_images, params, batch_of(2), None, has_aux=False, allow_unused=False)
    of_example = cached_parts.activation_bytes(trace.program.jaxpr)
    monkeypatch.setattr(cached_parts, "BYTES_OF_CONVOLUTIONS", 8 * of_example)
    sizes = [cached_parts.size_of_parts(trace.program, batch, 1e9) for batch in (17, 18, 128)]
    assert sizes == [None, 8, 8]


def test_the_usual_examples_fill_whole_parts(monkeypatch):
    """Of 176 rows, most batches need 144: two parts of 72, and seldom a third one."""
    program = program_of(loss_fn)
    of_example = cached_parts.activation_bytes(program.jaxpr)
    monkeypatch.setattr(cached_parts, "BYTES_OF_PART", 60 * of_example)
    assert cached_parts.size_of_parts(program, 176, 1e9) == 59
    assert cached_parts.size_of_parts(program, 176, 1e9, usual=144) == 72
    assert choose(program, 176, usual_size=144).microbatch_size == 72
    # A batch that is worth cutting has two parts, however few of its rows are usual.
    assert cached_parts.size_of_parts(program, 176, 1e9, usual=50) == 25
    assert cached_parts.size_of_parts(program, 131, 1e9, usual=100) is None
    looking = lookups_program()
    monkeypatch.setattr(cached_parts, "BYTES_OF_LOOKUPS", 4.0 * LOOKUPS * COLUMNS * 100)
    monkeypatch.setattr(cached_parts, "LEAST_PART_OF_PARAMS", 0.0)
    found = [
        cached_parts.size_of_parts(looking, 176, 0.0, 4.0 * LOOKUPS * COLUMNS, usual=usual)
        for usual in (None, 144, 90)
    ]
    assert found == [88, 72, 45]


def test_parts_are_large_enough_for_products(small_cache):
    """A model with one row per example and parameter takes larger parts."""
    program = program_of(loss_fn)
    num_params = WIDTH * WIDTH + WIDTH
    size = cached_parts.size_of_parts(program, 4096, 6 * num_params * 0.5)
    assert size == 2 * cached_parts.LEAST_ROWS


def test_parts_of_many_rows_are_about_equal(monkeypatch):
    program = program_of(loss_fn)
    of_example = cached_parts.activation_bytes(program.jaxpr)
    monkeypatch.setattr(cached_parts, "BYTES_OF_PART", 48 * of_example)
    sizes = {batch: cached_parts.size_of_parts(program, batch, 1e9) for batch in (128, 176, 1024)}
    assert sizes == {128: 43, 176: 44, 1024: 49}


def test_parts_are_never_larger_than_the_proof_of_rounding_allows():
    program = program_of(loss_fn)
    flops = 6 * (WIDTH * WIDTH + WIDTH) * cached_parts.LEAST_ROWS / 3992
    for batch in (3993, 5987, 5989, 9785, 13579, 10**6):
        size = cached_parts.size_of_parts(program, batch, flops)
        assert (size is None) == (batch < 1.5 * 3992)
        assert size is None or batch / 4096 <= -(-batch // size) <= batch / 1000
        assert size is None or size <= 4096


def test_arrays_on_a_mesh_are_not_cut_by_default():
    """Also on a mesh of one device, whose arrays can only be read where the mesh is known."""
    table = jnp.ones((10_004, 16))
    mesh = jax.make_mesh((1,), ("data",))
    params = jax.device_put({"table": table}, NamedSharding(mesh, PartitionSpec()))
    ids = jnp.zeros((1024, 256), jnp.int32)
    norms = jax.jit(lambda p, i: dpoptax.per_example_grads(looking_up)(p, i).squared_norms())
    on_mesh = norms(params, jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data"))))
    np.testing.assert_allclose(*jax.tree.leaves((on_mesh, norms({"table": table}, ids))), rtol=1e-6)


ROWS, COLUMNS, LOOKUPS = 512, 16, 64
TABLE = {"table": jnp.linspace(-1.0, 1.0, ROWS * COLUMNS).reshape(ROWS, COLUMNS)}


def looking_up(params, ids):
    return jnp.sum(jnp.tanh(jnp.mean(params["table"][ids], axis=0)))


def ids_of(batch):
    return jax.random.randint(jax.random.key(0), (batch, LOOKUPS), 0, ROWS)


def lookups_program():
    trace = check_loss(looking_up, TABLE, ids_of(2), None, has_aux=False, allow_unused=False)
    return trace.program


def test_batches_that_look_up_many_rows_are_cut():
    program = lookups_program()
    lookup_bytes = 4 * LOOKUPS * (COLUMNS + 1)  # a cotangent, and an index
    assert 2 * lookup_bytes > cached_parts.activation_bytes(program.jaxpr)
    fitting = cached_parts.BYTES_OF_LOOKUPS // lookup_bytes
    assert choose(program, fitting).microbatch_size is None
    for batch in (2 * fitting, 5 * fitting + 1, 11 * fitting):
        size = choose(program, batch).microbatch_size
        parts = -(-batch // size)
        assert size <= fitting + 1
        assert parts * size - batch < parts  # no row more than it takes to fill equal parts
    assert choose(program, 11 * fitting, in_parts=False).microbatch_size is None


def test_parts_look_up_about_as_many_bytes_as_there_are_parameters(monkeypatch):
    program, lookup_bytes = lookups_program(), 4.0 * LOOKUPS * COLUMNS
    monkeypatch.setattr(cached_parts, "BYTES_OF_LOOKUPS", 4 * lookup_bytes)
    size_of_parts = cached_parts.size_of_parts
    # The table has 8 times the bytes of the rows of an example.
    assert size_of_parts(program, 4092, 0.0, lookup_bytes) == 6
    # Five parts of at least 6 examples would be more than a run, and larger than the cache.
    assert size_of_parts(program, 32, 0.0, lookup_bytes) == 8
    assert size_of_parts(program, 11, 0.0, lookup_bytes) is None
    monkeypatch.setattr(cached_parts, "LARGEST_PARAMS", 4 * ROWS * COLUMNS - 1)
    assert size_of_parts(program, 4096, 0.0, lookup_bytes) is None


def test_parts_are_no_larger_than_a_run_of_chunks(monkeypatch):
    """Few lookups in a large table would need parts of many examples."""
    monkeypatch.setattr(cached_parts, "BYTES_OF_LOOKUPS", 2.0)
    few = 0.75 * 4 * ROWS * COLUMNS / 1024
    assert cached_parts._size_for_lookups(10**6, 10**6, few, 4 * ROWS * COLUMNS) is not None
    assert cached_parts._size_for_lookups(10**6, 10**6, 0.99 * few, 4 * ROWS * COLUMNS) is None


@pytest.mark.parametrize("batch", [1, 2, 5, 7, 9, 11])
def test_sums_over_tables_are_those_of_the_whole_batch(batch, monkeypatch):
    """Any number of parts: turns that fill the last run of sums add nothing."""
    monkeypatch.setattr(cached_parts, "BYTES_OF_LOOKUPS", 4 * LOOKUPS * (COLUMNS + 1) / 2)
    monkeypatch.setattr(cached_parts, "LEAST_PART_OF_PARAMS", 0.0)
    ids, rule = ids_of(batch), dpoptax.clipping.FlatClip(0.05)
    mask = jnp.arange(batch) != 3
    in_parts = dpoptax.per_example_grads(looking_up)(TABLE, ids, mask=mask)
    _, whole = dpoptax.value_and_per_example_grads(looking_up)(TABLE, ids, mask=mask)
    assert isinstance(in_parts, MicrobatchedGrads) == (batch > 1)
    for one, other in zip(
        jax.tree.leaves((in_parts.squared_norms(), in_parts.clip_and_sum(rule.weights))),
        jax.tree.leaves((whole.squared_norms(), whole.clip_and_sum(rule.weights))),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("fitting", "size"), [(0.3, 1), (1.4, 1), (3.1, 4), (5.5, 4), (11.0, 8), (12.5, 16), (31.0, 32)]
)
def test_sizes_of_small_parts_are_powers_of_two(fitting, size, monkeypatch):
    program = program_of(loss_fn)
    of_example = cached_parts.activation_bytes(program.jaxpr)
    monkeypatch.setattr(cached_parts, "BYTES_OF_PART", fitting * of_example)
    assert cached_parts.size_of_parts(program, 128, 1e9) == size


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
    assert "waits less for memory" in text


def test_no_part_is_larger_than_the_proof_of_rounding_allows():
    params = {"w": jnp.zeros((64, 64)), "v": jnp.zeros(64)}

    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["w"]) * params["v"])

    trace = check_loss(loss, params, jnp.zeros((2, 64)), None, has_aux=False, allow_unused=False)
    for power in range(8, 24):
        size = choose(trace.program, 2**power).microbatch_size
        assert size is None or size <= 4096
