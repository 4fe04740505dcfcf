"""A forgotten mask costs nothing: padding belongs to no example, and a batch carries its mask."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import dpoptax
from dpoptax.samplers import Batch, MaskedExamples, take
from dpoptax.training import DeviceData, HostData
from dpoptax.training._host_reader import HostReader

ROOT = pathlib.Path(dpoptax.__file__).parents[1]
NUM_EXAMPLES, PARAMS = 40, jnp.ones(2)
# The gradient of a row of zeros is the opposite of that of these examples: the worst case for a
# padded row that counts.
DATA = 3.0 + 0.1 * jax.random.normal(jax.random.key(1), (NUM_EXAMPLES, 2))


def loss_fn(params, example):
    """The loss of README's loop."""
    return jnp.sum((params - example) ** 2)


def take_without_mask(data, batch):
    """A planted fault: zeros in padded rows, and no mask."""
    return take(data, batch).examples


def take_first_example(data, batch):
    """A planted fault: padded rows repeat example 0."""
    return data[jnp.where(batch.mask, batch.indices, 0)]


@functools.partial(jax.jit, static_argnames=("gather", "form"))
def clipped_sum(data, batch, gather=take, form=registry.factored):
    grads = form(loss_fn)(PARAMS, gather(data, batch))  # as in README: no mask
    return grads.clip_and_sum(dpoptax.clipping.FlatClip(1.0).weights)


def padded(indices, size, num_examples=NUM_EXAMPLES):
    missing = size - len(indices)
    return Batch(
        jnp.pad(jnp.asarray(indices, jnp.int32), (0, missing), constant_values=num_examples),
        jnp.arange(size) < len(indices),
    )


@pytest.mark.parametrize("form", registry.FORMS.values(), ids=registry.FORMS)
def test_an_example_that_was_not_drawn_does_not_move_the_sum(form):
    batch = padded(range(1, 24), 59)
    changed = DATA.at[0].set(-100.0)

    def move(gather):
        sums = (clipped_sum(data, batch, gather, form) for data in (DATA, changed))
        return registry.distance(*sums)

    assert move(take) == 0
    assert move(take_first_example) > 70  # 36 padded rows, two clips each


@functools.partial(jax.jit, static_argnames="gather")
def largest_move(batches, gather):
    """How far the sum moves when one example leaves a batch; the largest of many batches."""

    def move(batch):
        last = jnp.argmax(jnp.where(batch.mask, jnp.arange(len(batch.mask)), -1))
        fewer = Batch(batch.indices.at[last].set(NUM_EXAMPLES), batch.mask.at[last].set(False))
        return jnp.linalg.norm(
            clipped_sum(DATA, batch, gather=gather) - clipped_sum(DATA, fewer, gather=gather)
        )

    return jax.vmap(move)(batches).max()


@pytest.mark.slow
@pytest.mark.parametrize("make", registry.SAMPLERS.values(), ids=registry.SAMPLERS)
def test_without_a_mask_one_example_moves_the_sum_by_one_clip(make):
    sampler = make(NUM_EXAMPLES, 8)
    state, batches = sampler.init(jax.random.key(0)), []
    draw = jax.jit(sampler.sample)
    for _ in range(20):
        state, batch = draw(state)
        assert np.all(batch.indices[~batch.mask] == NUM_EXAMPLES)
        # One shape for all samplers, so that the sum compiles once.
        batches.append(padded(batch.indices[batch.mask], NUM_EXAMPLES))
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    assert 0.99 < largest_move(batches, take) < 1 + 1e-5
    assert largest_move(batches, take_without_mask) > 1.9


def test_no_documented_program_has_a_mask_to_forget():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    programs = [
        program
        for page in pages
        for program in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    assert len(programs) > 10
    assert not [program for program in programs if "mask=" in program]


DATA_OF_ALL_TYPES = {
    "float": DATA,
    "half": DATA.astype(jnp.bfloat16),
    "int": 1 + jnp.arange(NUM_EXAMPLES, dtype=jnp.int8),
    "bool": jnp.ones(NUM_EXAMPLES, bool),
    "image": jnp.ones((NUM_EXAMPLES, 2, 2, 1), jnp.uint8),
    "key": jax.random.split(jax.random.key(0), NUM_EXAMPLES),
}


def test_padded_rows_are_zeros_of_every_type():
    batch = padded([5, 3], 4)
    taken = take(DATA_OF_ALL_TYPES, batch)
    np.testing.assert_array_equal(taken.mask, batch.mask)
    for name, leaf in DATA_OF_ALL_TYPES.items():
        found = taken.examples[name]
        assert found.dtype == leaf.dtype
        if name == "key":
            found, leaf = jax.random.key_data(found), jax.random.key_data(leaf)
        np.testing.assert_array_equal(found[:2], leaf[np.array([5, 3])])
        np.testing.assert_array_equal(found[2:], np.zeros_like(found[2:]))


def test_rows_that_the_data_do_not_have_are_padding():
    taken = take(DATA[:10], padded([3, 30], 4))
    assert taken.mask.tolist() == [True, False, False, False]
    np.testing.assert_array_equal(taken.examples[1:], 0)


def test_batches_on_the_host_carry_their_mask_and_read_no_padded_row():
    sampler = dpoptax.samplers.Poisson(NUM_EXAMPLES, 8)
    batch = next(dpoptax.samplers.iterate_batches(sampler, jax.random.key(3)))
    assert 0 < batch.mask.sum() < len(batch.mask)
    host = take({"x": np.asarray(DATA)}, batch)
    device = take({"x": DATA}, Batch(*map(jnp.asarray, batch)))
    assert isinstance(host.examples["x"], np.ndarray)
    np.testing.assert_array_equal(host.examples["x"], device.examples["x"])
    np.testing.assert_array_equal(host.mask, device.mask)
    with pytest.raises(IndexError):  # NumPy says so where somebody gathers padded rows
        np.asarray(DATA)[batch.indices]


class Records:
    """A source of single examples that knows which of them were read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return NUM_EXAMPLES

    def __getitem__(self, index):
        self.read.append(index)
        return {"x": np.asarray(DATA[index])}


@pytest.mark.slow
def test_a_stream_returns_zeros_and_the_mask_for_padded_rows():
    records, sampler = Records(), dpoptax.samplers.Poisson(NUM_EXAMPLES, 3)
    state = sampler.init(jax.random.key(0))
    reader = HostReader(HostData(records), sampler)
    records.read.clear()  # the first example, for its shape
    reader.begin(state)
    taken = reader.next()
    reader.close()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), taken) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), reader.shapes
    )
    expected = []
    for number in range(reader.batches):
        state, batch = sampler.sample(state)
        expected.extend(batch.indices[batch.mask].tolist())
        np.testing.assert_array_equal(taken.mask[number], batch.mask)
        direct = take({"x": DATA}, batch).examples["x"]
        np.testing.assert_array_equal(taken.examples["x"][number], direct)
    assert records.read[: len(expected)] == expected


TAKES = {
    "take": DeviceData(DATA),
    "plain arrays": DeviceData(DATA, take=lambda data, batch: data[batch.indices]),
    "host, plain arrays": HostData(np.asarray(DATA), take=lambda rows, batch: rows[batch.indices]),
}


@pytest.mark.slow
def test_every_way_to_gather_a_batch_trains_the_same():
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(NUM_EXAMPLES, 8),
        clip=1.0,
        noise_multiplier=1.0,
        num_steps=5,
        delta=1e-3,
    )
    found = [
        dpoptax.training.fit(
            loss_fn,
            PARAMS,
            data,
            plan=plan,
            optimizer=optax.sgd(0.5),
            key=jax.random.key(0),
            progress=False,
        ).params
        for data in TAKES.values()
    ]
    for params in found[1:]:
        np.testing.assert_allclose(params, found[0], rtol=1e-6)


def test_a_mask_stays_with_the_fields_of_the_examples():
    batch, grads_fn = (
        padded([4, 5], 4),
        dpoptax.per_example_grads(lambda w, row: w * row[0] * row[1]["b"]),
    )
    data = (DATA[:, 0], {"b": DATA[:, 1]})
    whole = take(data, batch)
    first, second = whole
    rebuilt = (first, {"b": second["b"]})
    for examples in (whole, rebuilt, (first.examples, second)):
        assert grads_fn(jnp.array(1.0), examples).mask.tolist() == [True, True, False, False]
    # Every mask counts, the one that is passed too.
    only = jnp.array([True, False, True, True])
    assert grads_fn(jnp.array(1.0), whole, mask=only).mask.tolist() == [True, False, False, False]
    both = (first, MaskedExamples(second.examples, only))
    assert grads_fn(jnp.array(1.0), both).mask.tolist() == [True, False, False, False]


def test_a_tree_map_over_a_batch_keeps_its_mask_or_fails():
    taken, grads_fn = take(DATA, padded(range(3), 4)), dpoptax.per_example_grads(loss_fn)
    parts = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), taken)
    masks = [
        grads_fn(PARAMS, jax.tree.map(lambda leaf, i=i: leaf[i], parts)).mask.tolist()
        for i in range(2)
    ]
    assert masks == [[True, True], [True, False]]
    reordered = jax.tree.map(lambda leaf: leaf[::-1], taken)
    assert grads_fn(PARAMS, reordered).mask.tolist() == [False, True, True, True]
    remedy = r"MaskedExamples\(change\(taken.examples\), taken.mask\)"
    with pytest.raises(TypeError, match=rf"the mask of the examples must be boolean.*{remedy}"):
        grads_fn(PARAMS, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), taken))
    with pytest.raises(ValueError, match=rf"the mask of the examples must have shape.*{remedy}"):
        grads_fn(PARAMS, jax.tree.map(lambda leaf: leaf[..., None], taken))


def test_masks_survive_microbatches_and_sharding():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = padded(range(5), 12)
    expected = clipped_sum(DATA[:5], padded(range(5), 5))
    for gather in (take, dpoptax.samplers.sharded_take(spread)):
        found = clipped_sum(DATA, batch, gather=gather, form=registry.microbatched)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_functions_that_know_no_masks_fail():
    taken = take(DATA, padded([1], 4))
    with pytest.raises((TypeError, ValueError)):
        jax.vmap(jax.grad(loss_fn), (None, 0))(PARAMS, taken)
    with pytest.raises(TypeError, match="Pass the whole to per_example_grads"):
        taken[0]
    with pytest.raises(TypeError, match="Pass the whole to per_example_grads"):
        list(taken)
    with pytest.raises(TypeError, match=r"can be unpacked; got a dict. Take one field"):
        list(take({"x": DATA}, padded([1], 4)))
