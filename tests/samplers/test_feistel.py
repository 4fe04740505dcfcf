"""The Feistel permutation: one-to-one, with an inverse, and uniform over keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dpoptax.samplers import _feistel as feistel

LEVEL = 1e-4


@jax.jit
def network_images(key, indices, size, a, b):
    """The network and its inverse at any size, also one that `permute` would sort."""
    images = feistel._cycle(key, indices, size, a, b, forward=True)
    return images, feistel._cycle(key, images, size, a, b, forward=False)


def run_network(sizes, indices):
    halves = np.array([feistel._halves(int(size)) for size in sizes], np.uint32)
    keys = jax.random.split(jax.random.key(4), len(sizes))
    sizes = np.asarray(sizes, np.uint32)
    mapped = jax.vmap(network_images, (0, 0, 0, 0, 0))
    return mapped(keys, indices, sizes, halves[:, 0], halves[:, 1])


@jax.jit
def network(key, indices, a, b):
    return feistel._network(key, indices, a, b, forward=True)


def walk(table, size):
    """Cycle walking by hand."""
    images = table[:size]
    while np.any(outside := images >= size):
        images = np.where(outside, table[images], images)
    return images


@pytest.mark.slow
def test_it_is_one_to_one_for_every_size_up_to_4096():
    key, indices = jax.random.key(4), np.arange(4096 + 64, dtype=np.uint32)
    tables = {}
    for size in range(1, 4097):
        a, b = feistel._halves(size)
        assert size <= a * b < size + a
        if (a, b) not in tables:
            images = network(key, indices % (a * b), np.uint32(a), np.uint32(b))
            tables[a, b] = np.asarray(images)[: a * b]
            np.testing.assert_array_equal(np.sort(tables[a, b]), np.arange(a * b))
        images = walk(tables[a, b], size)
        np.testing.assert_array_equal(np.sort(images), np.arange(size))
        if size % 512 == 9 and size > feistel.MAX_SORTED:
            np.testing.assert_array_equal(feistel.permute(key, jnp.arange(size), size), images)


def test_it_is_one_to_one_where_images_leave_the_range():
    """The network permutes 625 numbers, and applies itself again to images from 601 on."""
    images = feistel.permute(jax.random.key(0), jnp.arange(601), 601)
    np.testing.assert_array_equal(np.sort(images), np.arange(601))


def test_it_is_one_to_one_for_large_sizes():
    rng = np.random.default_rng(0)
    sizes = np.array([2**31, 2**31 - 1, 2**30 + 1, *rng.integers(4097, 2**31, 40)], np.uint32)
    indices = np.stack([rng.choice(size, 500) for size in sizes]).astype(np.uint32)
    images, back = map(np.asarray, run_network(sizes, indices))
    np.testing.assert_array_equal(back, indices)
    assert np.all(images < sizes[:, None])
    for row, image in zip(indices, images, strict=True):
        assert len(np.unique(image)) == len(np.unique(row))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 7, 511, 512, 513, 60_000, 10**9, 2**31])
def test_permute_and_invert_undo_each_other(size):
    indices = jnp.asarray(np.linspace(0, size - 1, 12).astype(np.int32)).reshape(3, 4)
    images = feistel.permute(jax.random.key(1), indices, size)
    assert images.dtype == jnp.int32
    assert images.shape == (3, 4)
    assert np.all((np.asarray(images, np.int64) >= 0) & (np.asarray(images, np.int64) < size))
    np.testing.assert_array_equal(feistel.invert(jax.random.key(1), images, size), indices)


# The images of a few indices under many keys. Sizes are arguments of the compiled programs, so
# that all sizes share one.
@jax.jit
def network_over_keys(keys, indices, size, a, b):
    return jax.lax.map(
        lambda key: feistel._cycle(key, indices, size, a, b, forward=True), keys, batch_size=1000
    )


@functools.partial(jax.jit, static_argnames="size")
def sorted_over_keys(keys, indices, size):
    return jax.lax.map(lambda key: feistel.permute(key, indices, size), keys, batch_size=1000)


@functools.lru_cache
def many_keys(num_keys):
    return jax.random.split(jax.random.key(7), num_keys)


def images_over_keys(size, indices, num_keys=20_000, network=network_over_keys):
    keys, indices = many_keys(num_keys), np.asarray(indices, np.uint32)
    if size <= feistel.MAX_SORTED:
        return np.asarray(sorted_over_keys(keys, indices.astype(np.int32), size))
    numbers = (np.uint32(number) for number in (size, *feistel._halves(size)))
    return np.asarray(network(keys, indices, *numbers)).astype(np.int32)


def cells(images, size, num_cells):
    """The cell of every image, and the probability of each cell."""
    num_cells = min(size, num_cells)
    cell = images.astype(np.int64) * num_cells // size
    return cell, np.bincount(np.arange(size) * num_cells // size) / size


def single_p_value(images, size):
    """Whether the image of one index is uniform."""
    cell, law = cells(images[:, 0], size, 100)
    observed = np.bincount(cell, minlength=len(law))
    return scipy.stats.chisquare(observed, law * len(images)).pvalue


def pair_p_value(images, size):
    """Whether two indices have a uniform pair of distinct images."""
    first, law = cells(images[:, 0], size, 10)
    second, _ = cells(images[:, 1], size, 10)
    same = np.diag(law / size)  # the probability that both are one element, if drawn apart
    joint = (np.outer(law, law) - same) * size / (size - 1)
    table = np.zeros(joint.shape)
    np.add.at(table, (first, second), 1)
    possible = joint > 1e-12
    assert table[~possible].sum() == 0
    return scipy.stats.chisquare(table[possible], joint[possible] * len(images)).pvalue


def difference_p_value(images, size):
    """Whether the difference of two images is uniform, which would show structure in the halves."""
    difference = (images[:, 1].astype(np.int64) - images[:, 0]) % size
    cell, law = cells(difference, size, 100)
    law = law - (np.arange(len(law)) == 0) / size
    law = law / law.sum()
    possible = law > 1e-12
    observed = np.bincount(cell, minlength=len(law))
    return scipy.stats.chisquare(observed[possible], law[possible] * len(images)).pvalue


SIZES = [2, 3, 5, 6, 10, 31, 100, 1000, 60_000]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_images_are_uniform_singly_and_in_pairs(size):
    pairs = ([0, 1], [size - 1, 0], [size // 2, size // 2 - 1])
    together = images_over_keys(size, np.ravel(pairs))
    for number, indices in enumerate(pairs):
        images = together[:, 2 * number : 2 * number + 2]
        for p_value in (single_p_value, pair_p_value, difference_p_value):
            if size > 2 or p_value is not difference_p_value:
                assert p_value(images, size) > LEVEL, (p_value.__name__, indices)


def weakened(**changes):
    """The network with parts of the module replaced while it is traced, and only then."""

    @jax.jit
    def over_keys(keys, indices, size, a, b):
        cycle = functools.partial(feistel._cycle.__wrapped__, forward=True)  # past the jit cache
        with pytest.MonkeyPatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(feistel, name, value)
            return jax.lax.map(lambda key: cycle(key, indices, size, a, b), keys, batch_size=1000)

    return over_keys


def weak_round(key, number, half, size):
    return (half * (number + 1) + jax.random.key_data(key)[0] % 7) % size


WEAKENED = {
    "two rounds": weakened(NUM_ROUNDS=2),
    "weak rounds": weakened(_round_function=weak_round),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [513, 1000, 60_000])
@pytest.mark.parametrize("network", WEAKENED.values(), ids=WEAKENED)
def test_two_rounds_or_a_weak_round_function_would_fail(size, network):
    """The tests above have power, where the network is used."""
    images = images_over_keys(size, [0, 1], network=network)
    tests = (single_p_value, pair_p_value, difference_p_value)
    assert min(p_value(images, size) for p_value in tests) < 1e-12


def test_jit_equals_eager_and_vmap_equals_a_loop():
    keys = jax.random.split(jax.random.key(3), 4)
    indices = jnp.arange(50)
    loop = jnp.stack([feistel.permute(key, indices, 10_000) for key in keys])
    mapped = jax.vmap(lambda key: feistel.permute(key, indices, 10_000))(keys)
    jitted = jax.jit(feistel.permute, static_argnums=2)(keys[0], indices, 10_000)
    np.testing.assert_array_equal(loop, mapped)
    np.testing.assert_array_equal(loop[0], jitted)
    assert len({tuple(row.tolist()) for row in loop}) == 4
