"""More programs that leak, through keys, counters, secret states, effects and captured arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from audit.leaking_programs import (
    DATA,
    SAMPLER,
    TX,
    WIDTH,
    N,
    apply,
    gradients,
    honest,
    loss,
    privatize,
    sample,
)

import dpoptax
from dpoptax.mechanisms import Correlated
from dpoptax.mechanisms.strategies import BandedInverse, BandedToeplitz
from dpoptax.samplers import BallsInBins, Batch, MaskedExamples, Shuffled, take

PROGRAMS: dict[str, Any] = {}
ONE_COLUMN = jnp.asarray(DATA[:, 0])


def leaks(program):
    PROGRAMS[program.__name__] = program
    return program


def stacked(s, data):
    s, _, taken = sample(s, data)
    return s, taken, gradients(s.params, taken).stacked()["w"]


def masked(taken, rows):
    return {"w": jnp.where(taken.mask[:, None], rows, 0.0)}


def with_state(s, **fields):
    private, *rest = s.opt_state
    return s._replace(opt_state=(private._replace(**fields), *rest))


# Rows meet


@leaks
def sorts_rows(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jnp.sort(g, axis=0)))


@leaks
def orders_rows_by_argsort(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, g[jnp.argsort(g[:, 0])]))


@leaks
def keeps_the_largest_rows(s, data):
    s, taken, g = stacked(s, data)
    values, _ = jax.lax.top_k(g.T, 16)
    return apply(s, masked(taken, values.T))


@leaks
def accumulates_rows(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jnp.cumsum(g, axis=0)))


@leaks
def flips_rows(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, g[::-1] + g))


@leaks
def scatters_rows(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jnp.zeros_like(g).at[jnp.zeros(16, int)].add(g)))


@leaks
def merges_rows_and_features(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, g.reshape(-1).reshape(WIDTH, 16).T))


@leaks
def transposes_squares(s, data):
    s, taken, g = stacked(s, data)
    wide = jnp.broadcast_to(g[:, :1], (16, 16))
    return apply(s, masked(taken, (wide.T + wide)[:, :3]))


@leaks
def multiplies_by_the_gram_matrix(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, (g @ g.T) @ g))


@leaks
def multiplies_by_a_public_matrix(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jnp.eye(16)[jnp.arange(16)[::-1]] @ g))


@leaks
def convolves_over_rows(s, data):
    s, taken, g = stacked(s, data)
    smooth = jnp.convolve(g[:, 0], jnp.ones(3), mode="same")
    return apply(s, masked(taken, smooth[:, None] * jnp.ones(WIDTH)))


@leaks
def shifts_rows_by_padding(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jnp.pad(g, ((1, 0), (0, 0)))[:-1] + g))


@leaks
def concatenates_neighbours(s, data):
    s, _, taken = sample(s, data)
    x = taken.examples["x"]
    pairs = {"x": x, "y": taken.examples["y"], "next": jnp.roll(x, 1, axis=0)}
    near = lambda params, row: loss(params, row) * jnp.sum(row["next"])  # noqa: E731
    return apply(s, gradients(s.params, MaskedExamples(pairs, taken.mask), near))


@leaks
def normalises_by_batch_statistics(s, data):
    import flax.linen as nn

    norm = nn.BatchNorm(use_running_average=False, use_scale=False, use_bias=False)
    s, _, taken = sample(s, data)
    x, _ = norm.apply({}, taken.examples["x"], mutable=["batch_stats"])
    return apply(s, gradients(s.params, MaskedExamples({**taken.examples, "x": x}, taken.mask)))


@leaks
def updates_running_statistics(s, data):
    s, _, taken = sample(s, data)
    s = apply(s, gradients(s.params, taken))
    return s, {"batch_stats": 0.9 + 0.1 * jnp.mean(taken.examples["x"], axis=0)}


@leaks
def scans_rows_with_memory(s, data):
    s, taken, g = stacked(s, data)
    _, rows = jax.lax.scan(lambda c, row: (c * 0.9 + row, c + row), jnp.zeros(WIDTH), g)
    return apply(s, masked(taken, rows))


@leaks
def scans_with_associative_sums(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jax.lax.associative_scan(jnp.add, g)))


@leaks
def pairs_rows_in_two_scans(s, data):
    s, taken, g = stacked(s, data)
    inner = lambda row: jax.lax.map(lambda other: row * other, g).sum(0)  # noqa: E731
    return apply(s, masked(taken, jax.lax.map(inner, g)))


@leaks
def writes_one_row_into_all(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jax.lax.dynamic_update_slice(g, g[:1], (3, 0))))


@leaks
def repeats_the_first_row(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jnp.broadcast_to(g[0], g.shape)))


@leaks
def tiles_rows_of_half_a_batch(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jnp.tile(g[:8], (2, 1))))


@leaks
def doubles_the_rows(s, data):
    s, _taken, g = stacked(s, data)
    return apply(s, {"w": jnp.concatenate([g, g])})


@leaks
def solves_across_rows(s, data):
    s, taken, g = stacked(s, data)
    system = jnp.eye(16) + jnp.tril(jnp.broadcast_to(g[:, :1], (16, 16)))
    return apply(s, masked(taken, jax.scipy.linalg.solve_triangular(system, g, lower=True)))


@leaks
def uses_rows_twice_by_two_masks(s, data):
    s, batch, taken = sample(s, data)
    even = jnp.arange(16) % 2 == 0
    s = apply(s, gradients(s.params, taken, mask=even))
    return apply(s, gradients(s.params, take(data, Batch(batch.indices, batch.mask & ~even))))


@leaks
def gathers_from_rolled_data(s, data):
    return honest(s, {"x": data["x"] + jnp.roll(data["x"], 1, axis=0), "y": data["y"]})


@leaks
def reads_parameters_of_a_private_iteration(s, data):
    def body(s, _):
        s, _, taken = sample(s, data)
        s = apply(s, gradients(s.params, taken))
        return s._replace(params={"w": s.params["w"] + 1e-6 * taken.examples["x"][0]}), None

    return jax.lax.scan(body, s, None, length=2)[0]


@leaks
def carries_private_optimizer_state(s, data):
    def body(carry, _):
        s, velocity = carry
        s, _, taken = sample(s, data)
        point = {"w": s.params["w"] + 0.0 * velocity}
        s = apply(s, gradients(point, taken))
        return (s, velocity + jnp.sum(taken.examples["x"], axis=0)), None

    return jax.lax.scan(body, (s, jnp.zeros(WIDTH)), None, length=2)[0][0]


# Derivatives and types


@leaks
def has_a_backward_pass_that_reads_the_batch(s, data):
    s, _, taken = sample(s, data)

    @jax.custom_vjp
    def own(x):
        return jnp.sum(x**2)

    own.defvjp(lambda x: (own(x), x), lambda x, g: (g * x + taken.examples["x"].sum(0),))
    return apply(s, gradients(s.params, taken, lambda p, row: own(p["w"] - row["x"])))


@leaks
def has_a_tangent_that_reads_the_data(s, data):
    @jax.custom_jvp
    def own(x):
        return jnp.sum(x**2)

    own.defjvp(lambda x, t: (own(*x), jnp.sum(t[0] * data["x"].mean(0))))
    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken, lambda p, row: own(p["w"] - row["x"])))


@leaks
def stops_the_gradient_of_a_leak(s, data):
    s = honest(s, data)
    return s._replace(params={"w": s.params["w"] + jax.lax.stop_gradient(data["x"].mean(0))})


@leaks
def adds_the_bits_of_the_data(s, data):
    bits = jax.lax.bitcast_convert_type(data["x"], jnp.int32)
    return honest(s, data), jnp.bitwise_xor.reduce(bits.reshape(-1))


@leaks
def rounds_the_data(s, data):
    return honest(s, data), data["x"].astype(jnp.int8)


@leaks
def differentiates_by_the_data(s, data):
    grad = jax.grad(lambda x, w: jnp.mean((x - w) ** 2))(data["x"], s.params["w"])
    return honest(s, data), grad


@leaks
def returns_a_linear_function_of_the_data(s, data):
    _, tangent = jax.jvp(lambda w: jnp.mean((data["x"] - w) ** 2), (s.params["w"],), (jnp.ones(3),))
    return honest(s, data), tangent


@leaks
def returns_the_argmax(s, data):
    return honest(s, data), jnp.argmax(data["x"][:, 0])


@leaks
def scales_by_a_threshold(s, data):
    s = honest(s, data)
    return s._replace(params={"w": s.params["w"] * jnp.where(data["x"].mean() > 0, 1.0, 1.001)})


# Effects


@leaks
def prints_in_a_private_branch(s, data):
    high = jnp.mean(data["x"]) > 0
    jax.lax.cond(high, lambda: jax.debug.print("the loss is high"), lambda: None)
    return honest(s, data)


@leaks
def prints_in_a_private_loop(s, data):
    def body(i):
        jax.debug.print("still training")
        return i + 1

    jax.lax.while_loop(lambda i: i < jnp.sum(data["y"] > 2), body, 0)
    return honest(s, data)


@leaks
def prints_parameters_in_a_private_branch(s, data):
    s = honest(s, data)
    show = lambda: jax.debug.print("{}", s.params["w"])  # noqa: E731
    jax.lax.cond(jnp.any(data["x"] > 3), show, lambda: None)
    return s


@leaks
def prints_in_a_scan_over_the_data(s, data):
    def body(c, row):
        jax.lax.cond(row[0] > 1, lambda: jax.debug.print("large"), lambda: None)
        return c, None

    jax.lax.scan(body, 0, data["x"])
    return honest(s, data)


@leaks
def prints_the_sampling_key(s, data):
    jax.debug.print("{}", jax.random.key_data(s.sampler_state.key))
    return honest(s, data)


@leaks
def writes_to_the_host_in_a_scan(s, data):
    def body(c, row):
        jax.experimental.io_callback(lambda r: None, None, row)
        return c, None

    jax.lax.scan(body, 0, data["x"])
    return honest(s, data)


@leaks
def writes_to_a_reference(s, data):
    ref = jax.new_ref(jnp.zeros(WIDTH))
    ref[...] = data["x"].mean(0)
    return honest(s, data), ref[...]


@leaks
def returns_an_error_flag(s, data):
    from jax.experimental import checkify

    def checked(x):
        checkify.check(jnp.all(x < 3), "too large")
        return x.shape[0]

    error, _ = checkify.checkify(checked)(data["x"])
    return honest(s, data), error._pred


# Keys


@leaks
def makes_the_key_from_a_written_seed(s, data):
    return honest(with_state(s, key=jax.random.key(7)), data)


@leaks
def makes_the_key_from_the_step(s, data):
    return honest(with_state(s, key=jax.random.key(s.opt_state[0].step)), data)


@leaks
def makes_the_sampling_key_from_the_step(s, data):
    state = s.sampler_state
    return honest(s._replace(sampler_state=state._replace(key=jax.random.key(state.step))), data)


@leaks
def makes_the_key_from_parameters(s, data):
    seed = jax.lax.bitcast_convert_type(s.params["w"][0], jnp.uint32)
    return honest(with_state(s, key=jax.random.key(seed)), data)


@leaks
def makes_two_equal_keys_from_bits(s, data):
    bits = jax.random.bits(s.key, (2,), jnp.uint32)
    old = s
    s = honest(with_state(s, key=jax.random.wrap_key_data(bits)), data)
    s = with_state(s, key=jax.random.wrap_key_data(bits), step=old.opt_state[0].step)
    return honest(s, data)


@leaks
def makes_two_equal_keys_from_a_seed(s, data):
    step = s.opt_state[0].step
    s = honest(with_state(s, key=jax.random.key(11)), data)
    s = with_state(s, key=jax.random.key(jnp.int32(22) // 2), step=step)
    return honest(s, data)


@leaks
def goes_through_equal_keys(s, data):
    keys = jax.random.split(s.key, 5)[jnp.zeros(5, jnp.int32)]

    def body(s, key):
        return honest(with_state(s, key=key, step=jnp.int32(0)), data), None

    return jax.lax.scan(body, s, keys)[0]


@leaks
def goes_through_tiled_keys(s, data):
    keys = jnp.tile(jax.random.split(s.key, 2), 3)

    def body(s, key):
        return honest(with_state(s, key=key, step=jnp.int32(0)), data), None

    return jax.lax.scan(body, s, keys)[0]


@leaks
def goes_through_broadcast_keys(s, data):
    keys = jnp.broadcast_to(jax.random.split(s.key, 2), (3, 2)).reshape(6)

    def body(s, key):
        return honest(with_state(s, key=key, step=jnp.int32(0)), data), None

    return jax.lax.scan(body, s, keys)[0]


@leaks
def takes_one_key_by_two_numbers(s, data):
    keys = jax.random.split(s.key, 4)
    s = honest(with_state(s, key=keys[2], step=jnp.int32(0)), data)
    return honest(with_state(s, key=keys[2:][0], step=jnp.int32(0)), data)


@leaks
def takes_one_key_of_reversed_ones(s, data):
    keys = jax.random.split(s.key, 4)
    s = honest(with_state(s, key=keys[0], step=jnp.int32(0)), data)
    return honest(with_state(s, key=keys[::-1][3], step=jnp.int32(0)), data)


@leaks
def takes_one_key_of_a_table_by_two_ways(s, data):
    keys = jax.vmap(lambda key: jax.random.split(key, 2))(jax.random.split(s.key, 2))
    one, two = keys[1], keys[:, 0]
    s = honest(with_state(s, key=one[0], step=jnp.int32(0)), data)
    return honest(with_state(s, key=two[1], step=jnp.int32(0)), data)


@leaks
def takes_keys_beyond_the_last(s, data):
    keys = jax.random.split(s.key, 2)

    def body(carry, _):
        s, i = carry
        (key,) = jax.lax.dynamic_slice(keys, (i,), (1,))
        return (honest(with_state(s, key=key, step=jnp.int32(0)), data), i + 1), None

    return jax.lax.scan(body, (s, jnp.uint32(0)), None, length=6)[0]


@leaks
def numbers_releases_by_multiples_of_all_integers(s, data):
    def body(carry, _):
        s, i = carry
        step = i * jnp.int32(65536) * jnp.int32(65536)
        return (honest(with_state(s, key=s.key, step=step), data), i + 1), None

    return jax.lax.scan(body, (s, jnp.int32(0)), None, length=4)[0]


@leaks
def derives_keys_by_multiples_of_all_integers(s, data):
    def body(carry, _):
        s, i = carry
        key = jax.random.fold_in(s.key, i * jnp.uint32(65536) * jnp.uint32(65536))
        return (honest(with_state(s, key=key, step=jnp.int32(0)), data), i + 1), None

    return jax.lax.scan(body, (s, jnp.uint32(0)), None, length=4)[0]


@leaks
def counts_around_all_integers(s, data):
    largest = jnp.int32(2**31 - 1)
    step = s.opt_state[0].step
    s = honest(with_state(s, key=s.key, step=step), data)
    return honest(with_state(s, key=s.key, step=step + largest + largest + 2), data)


@leaks
def uses_one_key_for_two_transformations(s, data):
    key = s.opt_state[0].key
    after = honest(s, data)
    first = privatize().init(s.params)._replace(key=key, step=s.opt_state[0].step)
    after, _, taken = sample(after, data)
    updates, _ = privatize().update(gradients(after.params, taken), first, after.params)
    return after, updates


@leaks
def releases_the_noise_alone(s, data):
    zero = {"w": jnp.zeros((16, WIDTH))}
    noise, _ = TX.update(zero, s.opt_state, s.params)
    return honest(s, data), noise


@leaks
def keeps_the_key_in_all_iterations(s, data):
    key, step = s.opt_state[0].key, s.opt_state[0].step
    return jax.lax.fori_loop(0, 3, lambda _, s: honest(with_state(s, key=key, step=step), data), s)


# States


@leaks
def returns_the_old_noise_state_and_counts(s, data):
    after = honest(s, data)
    return after._replace(opt_state=s.opt_state), {"step": after.opt_state[0].step}


@leaks
def returns_the_old_sampler_state_and_counts(s, data):
    after = honest(s, data)
    return after._replace(sampler_state=s.sampler_state), after.sampler_state.step


@leaks
def returns_no_state_and_counts(s, data):
    after = honest(s, data)
    return after.params, after.opt_state[0].step, after.sampler_state.step


@leaks
def returns_both_noise_states(s, data):
    after = honest(s, data)
    return after._replace(opt_state=s.opt_state), {"other": after.opt_state}


# Data that were captured


@leaks
def captures_part_of_one_column(s, data):
    return honest(s, data), jnp.sum(jnp.asarray(DATA[:30, 0]))


@leaks
def captures_the_data_in_batches(s, data):
    batches = jnp.asarray((DATA * 2 - 1).reshape(10, 6, WIDTH))
    return honest(s, data), jnp.sum(batches)


@leaks
def captures_the_data_as_columns(s, data):
    columns = jnp.asarray(np.ascontiguousarray((DATA * 2 - 1).T))
    return honest(s, data), jnp.sum(columns)


@leaks
def captures_reversed_data(s, data):
    return honest(s, data), jnp.sum(jnp.asarray(DATA[::-1]))


@leaks
def captures_rounded_data(s, data):
    return honest(s, data), jnp.sum(jnp.asarray(DATA.astype(np.float16)[:40]))


@leaks
def captures_the_data_with_a_padded_row(s, data):
    return honest(s, data), jnp.sum(jnp.asarray(np.pad(DATA, ((0, 4), (0, 0)))))


@leaks
def captures_the_data_in_a_nested_jit(s, data):
    inner = jax.jit(lambda w: w + jnp.asarray(DATA[:20] * 1.0).mean(0))
    return honest(s, data), inner(s.params["w"])


@leaks
def captures_the_data_in_the_backward_pass_of_a_jit(s, data):
    pull = jax.jit(lambda w: jnp.sum((w - jnp.asarray(DATA)) ** 2))
    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken, lambda p, row: loss(p, row) + pull(p["w"])))


@leaks
def trains_a_step_inside_shard_map(s, data):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    parts = jax.sharding.PartitionSpec()
    mean = jax.shard_map(lambda x: x.mean(0), mesh=mesh, in_specs=parts, out_specs=parts)
    return honest(s, data), mean(data["x"])


@leaks
def maps_a_mean_over_devices(s, data):
    mean = jax.pmap(lambda x: x.mean(0))(data["x"][None])
    return honest(s, data), mean


@leaks
def hides_a_mean_in_a_vmap(s, data):
    means = jax.vmap(lambda w: jnp.mean(data["x"] * w))(jnp.arange(3.0))
    return honest(s, data), means


@leaks
def loops_by_a_predicate_of_rows(s, data):
    def body(x):
        return x + 1

    grown = jax.vmap(lambda x: jax.lax.while_loop(lambda x: x < 3, body, x))(data["y"])
    s = honest(s, data)
    return s._replace(params={"w": s.params["w"] + grown[0].astype(jnp.float32)})


@leaks
def makes_keys_of_rows(s, data):
    keys = jax.vmap(jax.random.key)(data["y"])
    return honest(s, data), jax.random.normal(keys[3])


@leaks
def draws_a_key_from_labels(s, data):
    return honest(s, data), jax.random.key(jnp.sum(data["y"]))


# The sampler


@leaks
def takes_the_padding_as_examples(s, data):
    class Own(dpoptax.samplers.Poisson):
        pass

    s, batch, _ = sample(s, data)
    indices = jnp.where(batch.mask, batch.indices, 0)
    return apply(s, gradients(s.params, take(data, Batch(indices, jnp.ones(16, bool)))))


@leaks
def subsamples_by_the_labels(s, data):
    s, _, taken = sample(s, data)
    first = jnp.argmax(taken.examples["y"])
    return apply(s, gradients(s.params, taken, mask=jnp.arange(16) != first))


@leaks
def draws_two_samplers_from_one_key(s, data):
    fixed = dpoptax.samplers.FixedSize(N, 6)
    before = s.sampler_state
    s = honest(s, data)
    _, batch = fixed.sample(before)
    return apply(s, gradients(s.params, take(data, batch)))


@leaks
def returns_a_batch_drawn_again(s, data):
    _, batch = SAMPLER.sample(s.sampler_state)
    return honest(s, data), {"size": batch.mask.sum(dtype=jnp.int32)}


@leaks
def returns_the_order_of_the_labels(s, data):
    return honest(s, data), jnp.unique(data["y"], size=4)


# Programs with states of their own: (program, transformation, sampler).

OWN_STATES: dict[str, tuple[Any, Any, Any]] = {}


def leaks_with(mechanism=None, sampler=SAMPLER):
    options = {} if mechanism is None else {"mechanism": mechanism}
    tx = optax.chain(
        dpoptax.privatize(1.0, 1.1, expected_batch_size=6, key=jax.random.key(1), **options),
        optax.sgd(0.1),
    )

    def keep(program):
        OWN_STATES[program.__name__] = (program, tx, sampler)
        return program

    return keep


def step_of(s, data, tx, sampler):
    state, batch = sampler.sample(s.sampler_state)
    s = s._replace(sampler_state=state)
    return apply(s, gradients(s.params, take(data, batch)), tx)


TAPS = Correlated(BandedInverse.square_root(3, 20))
BANDS = Correlated(BandedToeplitz.square_root(3, 20))


@leaks_with(BANDS)
def subtracts_the_kept_noise(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    kept = jax.tree.leaves(after.opt_state[0].mechanism_state)
    return after, {"shown": sum(jnp.sum(leaf) for leaf in kept if leaf.dtype == jnp.float32)}


@leaks_with(BANDS)
def subtracts_the_noise_kept_before(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    kept = jax.tree.leaves(s.opt_state[0].mechanism_state)
    return after, {"shown": sum(jnp.sum(leaf) for leaf in kept if leaf.dtype == jnp.float32)}


@leaks_with(BANDS)
def trains_on_the_noise_kept_before(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    kept = [
        leaf
        for leaf in jax.tree.leaves(s.opt_state[0].mechanism_state)
        if leaf.dtype == jnp.float32 and leaf.shape[-1:] == (WIDTH,)
    ]
    total = sum(leaf.reshape(-1, WIDTH).sum(0) for leaf in kept)
    return after._replace(params={"w": after.params["w"] - total})


@leaks_with(BANDS)
def keeps_the_first_mechanism_state(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    return with_state(after, mechanism_state=s.opt_state[0].mechanism_state)


@leaks_with(TAPS)
def keeps_the_first_past_keys(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    return with_state(after, mechanism_state=s.opt_state[0].mechanism_state)


@leaks_with(TAPS)
def draws_from_past_keys(s, data, tx, sampler):
    past = jax.tree.leaves(s.opt_state[0].mechanism_state)[0]
    return step_of(s, data, tx, sampler), jax.random.normal(past, (3,))


@leaks_with(sampler=BallsInBins(N, 10))
def returns_the_order_of_the_sampler(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    shown = [leaf for leaf in jax.tree.leaves(s.sampler_state) if jnp.ndim(leaf)]
    return after, {"shown": shown[0][0]}


@leaks_with(sampler=BallsInBins(N, 10))
def returns_the_whole_order_of_the_sampler(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    shown = [leaf for leaf in jax.tree.leaves(after.sampler_state) if jnp.ndim(leaf)]
    return after, {"shown": shown[0] + 0}


@leaks_with(sampler=BallsInBins(N, 10))
def never_moves_on_in_bins(s, data, tx, sampler):
    return step_of(s, data, tx, sampler)._replace(sampler_state=s.sampler_state)


@leaks_with(sampler=BallsInBins(N, 10))
def draws_one_bin_twice(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    return step_of(after._replace(sampler_state=s.sampler_state), data, tx, sampler)


@leaks_with(sampler=Shuffled(N, 6))
def draws_one_part_twice(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    return step_of(after._replace(sampler_state=s.sampler_state), data, tx, sampler)


@leaks_with(sampler=Shuffled(N, 6))
def draws_one_part_in_all_iterations(s, data, tx, sampler):
    def body(s, _):
        return step_of(s, data, tx, sampler)._replace(sampler_state=s.sampler_state), None

    return jax.lax.scan(body, s, None, length=3)[0]
