"""Programs that leak over several iterations or calls, by equal counters, old states and draws."""

from typing import Any

import jax
import jax.numpy as jnp
from audit.leaking_programs import (
    DATA,
    WIDTH,
    N,
    apply,
    gradients,
    honest,
    loss,
    privatize,
    sample,
)
from audit.more_leaking_programs import leaks_with, masked, stacked, step_of, with_state

from dpoptax.samplers import BallsInBins, Batch, Shuffled, take

PROGRAMS: dict[str, Any] = {}


def leaks(program):
    PROGRAMS[program.__name__] = program
    return program


@leaks
def releases_a_public_leaf_beside_padded_rows(s, data):
    s, taken, g = stacked(s, data)
    tx = privatize(key=3)
    ups, st = tx.update(
        {"w": masked(taken, g)["w"], "v": jnp.ones((16, 3))},
        s.opt_state[0],
        {"w": s.params["w"], "v": s.params["w"]},
    )
    return s._replace(opt_state=(st, *s.opt_state[1:])), ups


@leaks
def returns_the_state_after_the_first_of_two_releases(s, data):
    one = honest(s, data)
    two = honest(one, data)
    return two._replace(opt_state=one.opt_state)


@leaks
def returns_the_sampler_after_the_first_of_two_batches(s, data):
    one = honest(s, data)
    two = honest(one, data)
    return two._replace(sampler_state=one.sampler_state)


@leaks
def returns_the_first_counter_after_a_loop(s, data):
    out = jax.lax.scan(lambda s, _: (honest(s, data), None), s, None, length=3)[0]
    return with_state(out, step=s.opt_state[0].step + 1)


@leaks
def forgets_to_move_its_own_key(s, data):
    return honest(with_state(s, key=jax.random.fold_in(s.key, 0), step=jnp.int32(0)), data)


@leaks
def moves_a_copy_of_its_own_key(s, data):
    k, d = jax.random.split(s.key)
    after = honest(with_state(s, key=d, step=jnp.int32(0)), data)
    return after, {"other": k}


@leaks
def hides_sampling_draws_in_a_key(s, data):
    (key, _) = s.sampler_state.keys(2)
    u = jax.random.uniform(key, (N,))
    k = jax.random.fold_in(jax.random.key(0), jax.lax.bitcast_convert_type(u[0], jnp.uint32))
    return honest(s, data), jax.random.normal(k, (3,))


@leaks
def releases_sampling_draws(s, data):
    (key, _) = s.sampler_state.keys(2)
    u = jax.random.uniform(key, (N,))
    g = jnp.where(u[0] < 0.1, jnp.ones((16, WIDTH)), 0.0)
    s2 = apply(s, {"w": g})
    return honest(s2, data)


@leaks
def captures_sampling_draws_in_the_loss(s, data):
    (key, _) = s.sampler_state.keys(2)
    u = jax.random.uniform(key, (N,))
    s, _, taken = sample(s, data)
    return apply(
        s, gradients(s.params, taken, lambda p, r: loss(p, r) + 100 * jnp.sum(p["w"]) * u[0])
    )


@leaks
def returns_the_next_sampling_draws(s, data):
    st = s.sampler_state
    (key, _) = st._replace(step=st.step + 1).keys(2)
    return honest(s, data), jax.random.uniform(key, (N,))


@leaks
def returns_the_last_sampling_draws(s, data):
    st = s.sampler_state
    (key, _) = st._replace(step=st.step - 1).keys(2)
    return honest(s, data), jax.random.uniform(key, (N,))


@leaks
def returns_next_draws_of_a_noise_chain(s, data):
    k = s.key
    now = jax.random.fold_in(k, s.opt_state[0].step)
    nxt = jax.random.fold_in(k, s.opt_state[0].step + 1)
    after = honest(with_state(s, key=now, step=s.opt_state[0].step), data)
    return after, jax.random.normal(nxt, (3,))


@leaks
def returns_next_draws_of_a_split_chain(s, data):
    k = jax.random.split(s.key, 3)
    after = honest(with_state(s, key=k[2], step=jnp.int32(0)), data)._replace(key=k[0])
    ahead = jax.random.split(k[0], 3)[2]
    return after, jax.random.normal(ahead, (3,))


@leaks
def strides_around_all_integers(s, data):
    def body(c, _):
        s, i = c
        return (honest(with_state(s, key=s.key, step=i), data), i + 2**20), None

    return jax.lax.scan(body, (s, jnp.int32(0)), None, length=5000)[0]


@leaks
def meets_an_earlier_number_after_five_iterations(s, data):
    def body(c, _):
        s, i = c
        s = honest(with_state(s, key=s.key, step=i), data)
        s = honest(with_state(s, key=s.key, step=i + 5), data)
        return (s, i + 1), None

    return jax.lax.scan(body, (s, jnp.int32(0)), None, length=10)[0]


@leaks
def compensates_a_counter_by_an_inner_loop(s, data):
    def body(c, _):
        s, i = c
        left = jax.lax.while_loop(lambda x: x < 20 - 2 * i, lambda x: x + 1, jnp.int32(0))
        return (honest(with_state(s, key=s.key, step=left + 2 * i), data), i + 1), None

    return jax.lax.scan(body, (s, jnp.int32(0)), None, length=4)[0]


@leaks
def compensates_its_counter_between_calls(s, data):
    i = s.opt_state[0].step
    left = jax.lax.while_loop(lambda x: x < 2000 - i, lambda x: x + 1, jnp.int32(0))
    s2 = honest(with_state(s, step=left + i), data)
    return with_state(s2, step=i + 1)


@leaks
def draws_the_noise_of_the_next_iteration(s, data):
    def body(c, _):
        s, i = c
        d = jax.random.normal(jax.random.fold_in(s.key, i + 1), (3,))
        s = honest(with_state(s, key=jax.random.fold_in(s.key, i), step=jnp.int32(0)), data)
        return (s, i + 1), d

    return jax.lax.scan(body, (s, jnp.int32(0)), None, length=3)


@leaks
def calls_back_with_captured_data(s, data):
    jax.debug.callback(lambda: print(DATA.mean()))
    return honest(s, data)


@leaks
def calls_back_with_captured_data_and_released(s, data):
    s = honest(s, data)
    jax.debug.callback(lambda w: print(DATA.mean() + w), s.params["w"])
    return s


NOISE_KEY = jax.random.fold_in(jax.random.key(1), 0)
INNER = jax.jit(lambda w: jnp.sum(w * jax.random.normal(NOISE_KEY, (3,))))


@leaks
def draws_from_the_noise_key_in_a_loss_that_captured_it(s, data):
    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken, lambda p, r: loss(p, r) + INNER(p["w"])))


@leaks
def splits_the_noise_key_by_sizes(s, data):
    s = honest(with_state(s, key=jax.random.split(s.key, 2)[0], step=jnp.int32(0)), data)
    s = honest(with_state(s, key=jax.random.split(s.key, 3)[0], step=jnp.int32(0)), data)
    return s._replace(key=jax.random.split(s.key, 3)[2])


@leaks
def folds_equal_numbers_by_floor_division(s, data):
    i = s.opt_state[0].step
    s = honest(with_state(s, key=jax.random.fold_in(s.key, i // 2), step=i), data)
    return honest(with_state(s, key=jax.random.fold_in(s.key, (i + 1) // 2), step=i), data)


@leaks
def casts_its_counter_to_bytes(s, data):
    def body(c, _):
        s, i = c
        st = i.astype(jnp.uint8).astype(jnp.int32)
        return (honest(with_state(s, key=s.key, step=st), data), i + 1), None

    return jax.lax.scan(body, (s, jnp.int32(0)), None, length=300)[0]


@leaks
def swaps_two_keys(s, data):
    a, b = jax.random.split(s.key)

    def body(c, _):
        s, a, b = c
        s = honest(with_state(s, key=a, step=jnp.int32(0)), data)
        return (s, b, a), None

    return jax.lax.scan(body, (s, a, b), None, length=4)[0]


@leaks
def rotates_three_keys(s, data):
    a, b, c3 = jax.random.split(s.key, 3)

    def body(c, _):
        s, a, b, d = c
        s = honest(with_state(s, key=a, step=jnp.int32(0)), data)
        return (s, b, d, a), None

    return jax.lax.scan(body, (s, a, b, c3), None, length=6)[0]


@leaks
def swaps_rows_late_in_a_loop(s, data):
    z = jnp.zeros(WIDTH)

    def body(c, _):
        _, b, d, e = c
        return (b, d, e, data["x"].sum(0)), None

    out = jax.lax.scan(body, (z, z, z, z), None, length=4)[0]
    return honest(s, data), out[0]


@leaks
def passes_rows_through_three_slots(s, data):
    z = {"w": jnp.zeros((16, WIDTH))}

    def body(c, _):
        s, a, b = c
        s, taken, g = stacked(s, data)
        s = apply(s, a)
        return (s, b, masked(taken, g)), None

    return jax.lax.scan(body, (s, z, z), None, length=4)[0][0]


@leaks
def reverses_in_a_nested_scan(s, data):
    s, taken, g = stacked(s, data)

    def outer(c, row):
        return c, jax.lax.scan(lambda c, r: (c, r), 0, g, reverse=True)[1][0] + row

    return apply(s, masked(taken, jax.lax.scan(outer, 0, g)[1]))


@leaks
def batches_a_product_over_rows_and_features(s, data):
    s, taken, g = stacked(s, data)
    w = jnp.broadcast_to(g[:, :1], (16, 16))
    out = jax.lax.dot_general(w, w, (((1,), (0,)), ((), ())))[:, :3]
    return apply(s, masked(taken, out))


@leaks
def batches_the_wrong_axis(s, data):
    s, taken, g = stacked(s, data)
    w = jnp.broadcast_to(g[:, :1], (16, 16))
    out = jax.lax.dot_general(w, w, (((), ()), ((1,), (0,))))
    return apply(s, masked(taken, out.sum(1)[:, :3] if out.ndim == 3 else out))


@leaks
def selects_by_private_predicate_of_all(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jax.lax.select(g[:, 0].sum() > 0, g, 2 * g)))


@leaks
def chooses_a_branch_by_private_index(s, data):
    s, taken, g = stacked(s, data)
    out = jax.lax.switch(jnp.argmax(g[:, 0]) % 3, [lambda: g, lambda: -g, lambda: 2 * g])
    return apply(s, masked(taken, out))


@leaks
def convolves_with_a_private_kernel(s, data):
    s, taken, g = stacked(s, data)
    out = jax.lax.conv_general_dilated(
        g[None, :, :],
        jnp.ones((3, 16, 1))[:, :, :],
        (1,),
        "SAME",
        dimension_numbers=("NCH", "OIH", "NCH"),
    )
    return apply(s, masked(taken, jnp.broadcast_to(out[0][:1], (16, 3))))


@leaks
def gathers_rows_by_public_indices(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jnp.take(g, jnp.arange(16)[::-1], axis=0, mode="clip")))


@leaks
def takes_along_rows(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jnp.take_along_axis(g, jnp.argsort(g, axis=0), axis=0)))


@leaks
def divides_a_release_by_the_batch(s, data):
    s2, batch, taken = sample(s, data)
    s2 = apply(s2, gradients(s2.params, taken))
    return s2, s2.params["w"] / jnp.sum(batch.mask, dtype=jnp.float32)


@leaks
def negates_the_mask(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, {"w": jnp.where(~taken.mask[:, None], 0.0 * g, g + 1.0)[::1] + 1.0})


@leaks
def inverts_the_mask_in_take(s, data):
    s, batch, _ = sample(s, data)
    taken = take(data, Batch(batch.indices, ~batch.mask))
    g = gradients(s.params, taken.examples, mask=~taken.mask)
    return apply(s, g)


@leaks
def xors_words_of_a_key(s, data):
    w = jax.random.key_data(s.key)
    k1 = jax.random.wrap_key_data(w ^ 0)
    k2 = jax.random.wrap_key_data(w | 0)
    s = honest(with_state(s, key=k1, step=jnp.int32(0)), data)
    return honest(with_state(s, key=k2, step=jnp.int32(0)), data)


@leaks
def swaps_words_twice(s, data):
    w = jax.random.key_data(jax.random.split(s.key, 2))
    k = jax.random.wrap_key_data(w[::-1])
    s = honest(with_state(s, key=k[0], step=jnp.int32(0)), data)
    return honest(with_state(s, key=jax.random.split(s.key, 2)[1], step=jnp.int32(0)), data)


# stateful samplers
@leaks_with(sampler=Shuffled(N, 6))
def shuffles_anew_in_each_call(s, data, tx, sampler):
    i = s.sampler_state.step
    fresh = sampler.init(jax.random.fold_in(s.sampler_state.key, i))
    after = step_of(s._replace(sampler_state=fresh), data, tx, sampler)
    return after._replace(sampler_state=s.sampler_state._replace(step=i + 1))


@leaks_with(sampler=Shuffled(N, 6))
def skips_nine_parts(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    return after._replace(
        sampler_state=after.sampler_state._replace(step=after.sampler_state.step + 9)
    )


@leaks_with(sampler=Shuffled(N, 6))
def shuffles_by_its_own_key(s, data, tx, sampler):
    k, d = jax.random.split(s.key)
    after = step_of(s._replace(sampler_state=sampler.init(d)), data, tx, sampler)
    return after._replace(key=k)


@leaks_with(sampler=BallsInBins(N, 10))
def throws_anew_in_each_call(s, data, tx, sampler):
    k, d = jax.random.split(s.key)
    after = step_of(s._replace(sampler_state=sampler.init(d)), data, tx, sampler)
    return after._replace(key=k)


@leaks_with(sampler=BallsInBins(N, 10))
def skips_bins(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    return after._replace(
        sampler_state=after.sampler_state._replace(step=after.sampler_state.step + 9)
    )


# Counters, chains of keys and states of samplers


@leaks
def swaps_state_between_two_counters(s, data):
    a, b = s.opt_state[0].step, s.sampler_state.step
    return with_state(honest(with_state(s, step=a - b), data), step=a + 1)


@leaks
def counts_down_and_up(s, data):
    def body(c, _):
        s, i, j = c
        return (honest(with_state(s, key=s.key, step=i - j), data), i + 1, j + 1), None

    return jax.lax.scan(body, (s, jnp.int32(0), jnp.int32(0)), None, length=4)[0]


@leaks
def counts_down(s, data):
    def body(c, _):
        s, i, j = c
        return (honest(with_state(s, key=s.key, step=i + j), data), i + 1, j - 1), None

    return jax.lax.scan(body, (s, jnp.int32(0), jnp.int32(9)), None, length=4)[0]


@leaks
def nested_overlap(s, data):
    def body(c, _):
        s, i = c

        def inner(c, _):
            s, j = c
            return (honest(with_state(s, key=s.key, step=j), data), j + 1), None

        s, _j = jax.lax.scan(inner, (s, i), None, length=5)[0]
        return (s, i + 1), None

    return jax.lax.scan(body, (s, jnp.int32(0)), None, length=3)[0]


@leaks
def nested_restart(s, data):
    def body(c, _):
        s, i = c

        def inner(c, _):
            s, j = c
            return (honest(with_state(s, key=s.key, step=j), data), j + 1), None

        s, j = jax.lax.scan(inner, (s, i), None, length=5)[0]
        # the end of the inner loop is fed back, but a release starts anew from i
        s = honest(with_state(s, key=s.key, step=i + 2), data)
        return (s, j), None

    return jax.lax.scan(body, (s, jnp.int32(0)), None, length=3)[0]


@leaks
def nested_beyond_end(s, data):
    def body(c, _):
        s, i = c
        s = honest(with_state(s, key=s.key, step=i + 20), data)

        def inner(c, _):
            s, j = c
            return (honest(with_state(s, key=s.key, step=j), data), j + 1), None

        s, j = jax.lax.scan(inner, (s, i), None, length=5)[0]
        return (s, j), None

    return jax.lax.scan(body, (s, jnp.int32(0)), None, length=9)[0]


@leaks
def draws_between_calls_meet(s, data):
    i = s.opt_state[0].step
    one = honest(s, data)
    two = honest(with_state(one, step=i + 7), data)
    return with_state(two, step=i + 1)


@leaks
def two_states_returned_crossed(s, data):
    a, _b = jax.random.split(s.key)
    one = honest(with_state(s, key=a, step=jnp.int32(0)), data)
    return one._replace(key=a)


@leaks
def chain_of_noise_ahead(s, data):
    d = jax.random.split(s.key, 3)

    def body(c, _):
        s, k = c
        ks = jax.random.split(k, 3)
        s = honest(with_state(s, key=ks[2], step=jnp.int32(0)), data)
        ahead = jax.random.normal(jax.random.split(jax.random.split(ks[0], 3)[0], 3)[2], (3,))
        return (s, ks[0]), ahead

    (s2, _k), out = jax.lax.scan(body, (s, d[0]), None, length=5)
    return s2._replace(key=d[1]), out


@leaks
def key_of_sampler_ahead(s, data):
    st = s.sampler_state
    k0, k1 = jax.random.split(st.key)
    after = honest(s._replace(sampler_state=st._replace(key=k1)), data)
    ahead = jax.random.split(k0)[1]
    u = jax.random.uniform(jax.random.split(jax.random.fold_in(ahead, st.step + 1))[0], (N,))
    return after._replace(sampler_state=after.sampler_state._replace(key=k0)), u


@leaks
def folds_sampling_words_in_seed(s, data):
    (key, _) = s.sampler_state.keys(2)
    b = jax.random.bits(key, (1,), jnp.uint32)[0]
    return honest(s, data), jax.random.normal(jax.random.key(b), (3,))


@leaks
def chooses_a_key_by_sampling_bits(s, data):
    (key, _) = s.sampler_state.keys(2)
    u = jax.random.uniform(key, (N,))
    ks = jax.random.split(jax.random.key(0), 2)
    k = jax.lax.cond(u[0] < 0.1, lambda: ks[0], lambda: ks[1])
    return honest(s, data), jax.random.normal(k, (3,))


@leaks
def selects_a_key_by_sampling_bits(s, data):
    (key, _) = s.sampler_state.keys(2)
    u = jax.random.uniform(key, (N,))
    ks = jax.random.split(jax.random.key(0), 2)
    k = jax.lax.dynamic_index_in_dim(ks, (u[0] < 0.1).astype(jnp.int32), keepdims=False)
    return honest(s, data), jax.random.normal(k, (3,))


@leaks
def prints_by_sampling_bits_in_loop(s, data):
    (key, _) = s.sampler_state.keys(2)
    n = (jax.random.uniform(key, (N,))[0] * 5).astype(jnp.int32)
    c = jax.lax.fori_loop(0, n, lambda i, c: c + 1, 0)
    return honest(s, data), c


@leaks
def scans_keys_by_sampling_bits(s, data):
    (key, _) = s.sampler_state.keys(2)
    u = jax.random.uniform(key, (4,))

    def body(k, x):
        return jax.lax.cond(
            x < 0.1, lambda: jax.random.fold_in(k, 1), lambda: jax.random.fold_in(k, 2)
        ), None

    k = jax.lax.scan(body, jax.random.key(0), u)[0]
    return honest(s, data), jax.random.normal(k, (3,))


@leaks
def clips_state_by_sampling_bits(s, data):
    (key, _) = s.sampler_state.keys(2)
    u = jax.random.uniform(key, (N,))
    s2 = honest(s, data)
    return s2._replace(params={"w": s2.params["w"] * 1.0}), jnp.where(u[0] < 0.1, 1, 0)


@leaks
def keys_of_the_data_reversed(s, data):
    keys = jax.vmap(jax.random.key)(data["y"])[::-1]
    z = jax.vmap(lambda k: jax.random.normal(k, (WIDTH,)))(keys)
    return honest(s, {"x": data["x"] + z, "y": data["y"]})


@leaks
def padded_by_public_rows(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, {"w": masked(taken, g)["w"] + jnp.ones((16, WIDTH))})


@leaks_with(sampler=Shuffled(N, 6))
def mixes_two_states(s, data, tx, sampler):
    one = step_of(s, data, tx, sampler)
    two = step_of(one, data, tx, sampler)
    return two._replace(
        sampler_state=jax.tree.map(
            lambda a, b: a if not jnp.issubdtype(a.dtype, jnp.integer) else b,
            one.sampler_state,
            two.sampler_state,
        )
    ), one.sampler_state


@leaks_with(sampler=Shuffled(N, 6))
def counts_batches_in_one_branch(s, data, tx, sampler):
    return jax.lax.cond(
        s.params["w"][0] > 0,
        lambda: step_of(step_of(s, data, tx, sampler), data, tx, sampler),
        lambda: step_of(s, data, tx, sampler)._replace(sampler_state=s.sampler_state),
    )


@leaks_with(sampler=BallsInBins(N, 10))
def keeps_the_order_of_another(s, data, tx, sampler):
    st, batch = sampler.sample(s.sampler_state)
    fresh = sampler.init(s.key)
    st = fresh._replace(step=st.step, key=st.key)
    s = s._replace(sampler_state=st)
    return apply(s, gradients(s.params, take(data, batch)), tx)
