"""Normal draws of ChaCha keys: every word is used once, and all ways to compute them agree."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from eight_devices import run_on_eight_devices

from dpoptax.random import _chacha_normal as chacha_normal
from dpoptax.random import insecure_key
from dpoptax.random._box_muller import from_words
from dpoptax.random._chacha import NORMALS, blocks
from dpoptax.random._chacha_normal import layout_of, normals

SHAPES = [
    *[(), (1,), (15,), (17,), (2048,), (2049,), (70_001,)],
    *[(3, 5), (0, 4), (784, 400), (400, 784), (400, 50), (7, 16, 3), (5, 32, 130), (16, 4096)],
    *[(3, 3, 128, 256), (1 << 17,), (10_004, 16)],
]


def expected(key, layout, first, shape, rounds):
    """The draws of a layout from words in the order of the stream, by one formula for all."""
    count = math.prod(layout.grid)
    counters = jnp.arange(first, first + count, dtype=jnp.uint32)
    words = blocks(jax.random.key_data(key), counters, NORMALS, rounds)
    points = from_words(words[:, :8], words[:, 8:])
    draws = np.concatenate([points.real, points.imag], axis=1).reshape(*layout.grid, 16)
    draws = np.moveaxis(draws, -1, layout.axis)
    return draws.reshape(-1)[: math.prod(shape)].reshape(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layout_holds_all_draws_of_a_shape_and_few_more(shape):
    layout = layout_of(shape)
    size, room = math.prod(shape), 16 * math.prod(layout.grid)
    assert size <= room <= max(1.13 * size, size + 16)
    parts = (*layout.grid[: layout.axis], 16, *layout.grid[layout.axis :])
    if room == size and len(shape) > 1:
        # Merging neighbours of the axis of sixteen gives the shape: an axis may be sharded.
        merged = (*parts[: layout.axis - 1], math.prod(parts[layout.axis - 1 : layout.axis + 2]))
        assert merged + parts[layout.axis + 2 :] == shape or len(layout.grid) == 2


def test_leaves_of_models_are_drawn_in_their_own_shape_and_in_whole_parts_of_eight_devices():
    for shape in ((4096, 4096), (1024, 32_000), (32_000, 1024), (1 << 20,), (8, 2048, 512)):
        layout = layout_of(shape)
        assert 16 * math.prod(layout.grid) == math.prod(shape)
        assert layout.grid[layout.axis - 1] % 8 == 0


@pytest.mark.parametrize("rounds", [8, 20])
def test_draws_are_the_words_of_the_stream_each_used_once(rounds):
    key = insecure_key(3, rounds=rounds)
    shapes = [(5,), (300, 256), (3, 5), (70_001,), ()]
    draws = jax.jit(lambda key: normals(key, shapes))(key)
    assert [draw.shape for draw in draws] == shapes
    first = 0
    for shape, found in (
        ((21,), np.concatenate([np.ravel(draws[i]) for i in (0, 2, 4)])),  # small ones share
        (shapes[1], draws[1]),
        (shapes[3], draws[3]),
    ):
        layout = layout_of(shape)
        np.testing.assert_allclose(
            found, expected(key, layout, first, shape, rounds), rtol=1e-5, atol=2e-7
        )
        first += math.prod(layout.grid)
    values = np.concatenate([np.ravel(draw) for draw in draws])
    # Equal float32 values by chance, as many as of independent draws.
    assert len(np.unique(values)) > 0.98 * values.size


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [2**12, chacha_normal.CPU_CHUNK])  # several turns, and one
@pytest.mark.parametrize("shape", [s for s in SHAPES if math.prod(s) > 0], ids=str)
def test_chunks_give_the_draws_of_the_whole(shape, chunk, monkeypatch):
    monkeypatch.setattr(chacha_normal, "CPU_CHUNK", chunk)
    layout, data = layout_of(shape), jax.random.key_data(insecure_key(5))
    assert math.prod(layout.grid[layout.axis :]) <= chacha_normal.MAX_LANES
    whole, chunks = (
        jax.jit(draw, static_argnums=(1, 2, 3))(data, layout, 7, 8)
        for draw in (chacha_normal.drawn_at_once, chacha_normal.drawn_in_chunks)
    )
    assert whole.shape == chunks.shape
    np.testing.assert_allclose(whole, chunks, rtol=3e-6, atol=1e-7)


def test_counters_are_the_numbers_from_the_first_one_in_order():
    for shape in ((784, 400), (3, 3, 128, 256), (70_001,)):
        layout = layout_of(shape)
        found = np.asarray(layout.counters(11)).reshape(-1)
        np.testing.assert_array_equal(found, 11 + np.arange(found.size))


@pytest.mark.slow
def test_lanes_and_the_sixteen_draws_of_a_block_are_independent():
    """As much as Box and Muller say: also the squares, and of neighbours in every direction."""
    layout = layout_of((1024, 1024))
    data = jax.random.key_data(insecure_key(1))
    draws = np.asarray(chacha_normal.drawn_in_chunks(data, layout, 0, 8), np.float64)
    draws = draws.reshape(-1, 16, math.prod(layout.grid[layout.axis :]))
    count = draws.shape[0] * draws.shape[2]
    by_word = np.moveaxis(draws, 1, 0).reshape(16, -1)
    for power in (1, 2):
        found = np.corrcoef(by_word**power)[np.triu_indices(16, 1)]
        assert np.abs(found).max() < 4.8 / math.sqrt(count)  # the largest of 120
        for one, other in ((draws[1:], draws[:-1]), (draws[..., 1:], draws[..., :-1])):
            pair = np.corrcoef(one.ravel() ** power, other.ravel() ** power)[0, 1]
            assert abs(pair) < 4.5 / math.sqrt(one.size)
    for word in by_word:
        assert scipy.stats.kstest(word, "norm").pvalue > 1e-4


def test_more_blocks_than_a_key_has_are_refused():
    with pytest.raises(ValueError, match=r"counts to 2\*\*32; asked to draw"):
        jax.eval_shape(lambda key: normals(key, [(1 << 18, 1 << 18), (1 << 17,)]), insecure_key(0))


SHARDED = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from dpoptax.mechanisms._gaussian_noise import add_gaussian
from dpoptax.random import insecure_key
from dpoptax.random._chacha_normal import drawn_in_chunks, layout_of
mesh, key = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y")), insecure_key(0)
for shape, spec in (
    ((512, 1024), P("x", "y")), ((512, 1024), P(None, ("x", "y"))), ((1 << 20,), P(("x", "y"))),
    ((4, 256, 1024), P(None, "x", "y")), ((784, 400), P(None, "y")),
):
    spread = NamedSharding(mesh, spec)
    draw = jax.jit(lambda key, zeros: add_gaussian(key, zeros, 1.0), out_shardings=spread)
    zeros = jax.device_put(jnp.zeros(shape), spread)
    text = draw.lower(key, zeros).compile().as_text()
    sizes = [np.prod([int(d) for d in dims.split(",")]) for dims in
             re.findall(r"[uf]32\\[([\\d,]+)\\]", text)]
    part = np.prod(spread.shard_shape(shape))
    assert sizes and max(sizes) <= part, (shape, spec, max(sizes), part)
    assert not re.search("all-gather|all-to-all|all-reduce|collective-permute", text), shape
    one = drawn_in_chunks(jax.random.key_data(key), layout_of(shape), 0, 8).reshape(shape)
    np.testing.assert_allclose(draw(key, zeros), one, rtol=3e-6, atol=1e-6)
print("drawn in parts")
"""


@pytest.mark.e2e
def test_each_device_draws_its_own_part_of_the_noise_of_one_device():
    assert "drawn in parts" in run_on_eight_devices(SHARDED)


def test_a_key_gives_all_its_blocks_also_behind_an_axis_of_one():
    key, shape = insecure_key(0), (1, 16, 2**32)
    (found,) = jax.eval_shape(lambda key: normals(key, [shape]), key)
    assert found.shape == shape
